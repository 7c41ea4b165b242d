"""The demo: a tiny model learns to answer questions about generated clips on two CPU cores.

python -m examples.demo --workdir=runs/demo            (or `make demo`)

runs it all. Its parts, once it has written the clips and the tokenizer:

python train.py --config=configs/demo.py --workdir=runs/demo/nsa
python eval.py --config=configs/demo.py --checkpoint=runs/demo/nsa --task=needle --out=DIR

The variants `first` and `count` (configs/demo.py:first) are for the harder kinds of questions.
"""

from ml_collections import ConfigDict

# By kind of question. "what" and "first" are right from step 100 to 200 on; "count" is a guess.
STEPS = {"what": 400, "first": 600, "count": 3_000}
VOCAB = 384  # bytes, special tokens, and the merges that the questions are worth


def get_config(kind: str = "what") -> ConfigDict:
    """`kind` of the questions: "what", "first" or "count"."""
    if kind not in STEPS:
        raise ValueError(f"{kind=} must be one of {', '.join(STEPS)}")
    c = ConfigDict()
    c.seed = 0
    c.model = dict(
        preset="tiny",
        text=dict(vocab_size=VOCAB),
        nsa=dict(block_size=8, block_count=2, window_size=8),  # half a frame pair each
        video_token_id=VOCAB - 1,  # a trained tokenizer has its special tokens last
        image_token_id=VOCAB - 2,
        vision_start_token_id=VOCAB - 5,
    )
    c.compute = dict(dtype="float32", remat="none")
    c.data = dict(
        source=("runs/demo/clips/train.json",),
        tokenizer="runs/demo/tokenizer",
        fps=4.0,
        max_frames=16,
        max_pixels=112 * 112,  # 16 tokens a frame pair
        batch=8,
        buckets=((128, 64),),
        threads=2,
    )
    c.optim = dict(lr=3e-4, b2=0.99, final_lr_ratio=0.05)
    c.train = dict(steps=STEPS[kind], log_every=10, save_every=100, max_to_keep=1)
    c.eval = dict(tasks=dict(needle="runs/demo/clips/heldout.json"), batch=20, max_new_tokens=4)
    return c
