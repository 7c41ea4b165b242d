"""Frozen configuration of a run: the model and its published sizes, the optimizer, the training."""

import dataclasses
from typing import Literal

PositionAdvance = Literal["all_axes", "spatial"]

# Sizes that are fixed in the released code.
RELEASED_GROUP = 16  # head slots per KV head
RELEASED_TOPK = 64  # blocks that the top-k network looks at together


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The text decoder: grouped-query attention, SwiGLU, multimodal rotary positions."""

    vocab_size: int
    d_model: int
    d_ff: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mrope_section: tuple[int, int, int]  # rotary pairs driven by (time, height, width)
    rope_theta: float = 1_000_000.0
    norm_eps: float = 1e-6
    tie_embeddings: bool = False

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_heads=} is not a multiple of {self.num_kv_heads=}")
        if 2 * sum(self.mrope_section) != self.head_dim:
            raise ValueError(
                f"{self.mrope_section=} must sum to half of {self.head_dim=}: one entry a pair"
            )


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The vision tower: 3-D patches, window attention with some full-attention layers, merger."""

    d_model: int
    d_ff: int
    num_layers: int
    num_heads: int
    full_attention_layers: tuple[int, ...]
    patch_size: int = 14  # pixels
    temporal_patch_size: int = 2  # frames
    merge_size: int = 2  # merge_size x merge_size patches become one token
    window_pixels: int = 112
    in_channels: int = 3
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6

    def __post_init__(self):
        if self.d_model % self.num_heads or (self.d_model // self.num_heads) % 4:
            raise ValueError(
                f"{self.d_model=} over {self.num_heads=} must give a head width divisible by 4"
            )
        if self.window_pixels % (self.patch_size * self.merge_size):
            raise ValueError(f"{self.window_pixels=} must be a multiple of a merged patch")

    @property
    def patch_elements(self) -> int:
        """Values per flattened patch: channels x frames x height x width."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def window_patches(self) -> int:
        """The most patches one attention window holds."""
        return (self.window_pixels // self.patch_size) ** 2


@dataclasses.dataclass(frozen=True)
class NSAConfig:
    """Native sparse attention over vision tokens (arXiv:2510.02295 sec. 2.2)."""

    block_size: int = 64
    block_count: int = 32  # selected blocks per query, its own included
    window_size: int = 256  # keys, the query's own included
    gate_temperature: float = 0.3


@dataclasses.dataclass(frozen=True)
class ReleasedConfig:
    """What the released VideoNSA code computes and the paper does not say, each with its switch.

    The released weights were evaluated with all on. With all off, `released` computes what `paper`
    does. See docs/released_semantics.md.
    """

    # Each query head runs once per full copy of the heads in 16 slots per KV head, against the KV
    # heads of those slots, and the copies are averaged. Off: grouped-query attention.
    two_copies: bool = True
    # A query sees the compressed blocks from its own on. Off: those complete by its position.
    future_blocks: bool = True
    # Scores are scaled by the softmax denominators of other tokens and heads. Off: by their own.
    transposed_lse: bool = True
    # The best blocks come from a bitonic network of 64: its ties, its power-of-two count, one vote
    # per slot for the own block. Off: the own block, then the highest, ties to the lowest.
    network_topk: bool = True
    # Text stands in the sparse sequence as keys and values of zero. Off: it is left out.
    text_as_zeros: bool = True
    # Blocks count from the prompt's first token. Off: from its first vision token.
    absolute_blocks: bool = True
    # Text adds sparse attention of a query of zero, gates at a half. Off: dense attention only.
    sparse_on_text: bool = True
    # Vision adds the mean of all values so far. Off: sparse attention only.
    mean_on_vision: bool = True
    # A token is vision if its three rotary ids differ. Off: if it is a placeholder.
    split_by_positions: bool = True
    # Seconds per grid are truncated to an integer before rotary ids are made. Off: kept.
    whole_seconds: bool = True


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters on projections of every decoder layer (arXiv:2106.09685)."""

    rank: int = 0  # 0: none
    alpha: float = 16.0  # adapters are scaled by alpha / rank
    targets: tuple[Literal["q", "k", "v", "o", "gate", "up", "down"], ...] = ("q", "v")

    def __post_init__(self):
        if self.rank < 0:
            raise ValueError(f"lora.rank={self.rank} must not be negative; 0 means no adapters")
        if self.rank and not self.targets:
            raise ValueError(f"lora.rank={self.rank}, but lora.targets is empty")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything that fixes the parameters' shapes and the function they compute."""

    text: TextConfig
    vision: VisionConfig
    nsa: NSAConfig = NSAConfig()
    attention: str = "paper"  # a name in `videonsa_jax.model.attention_modes.ATTENTION`
    # What the mode of attention lets one choose; in a config file a dict.
    attention_options: tuple[tuple[str, int | float | bool | str], ...] = ()
    released: ReleasedConfig = ReleasedConfig()  # read where attention is "released"
    lora: LoRAConfig = LoRAConfig()
    image_token_id: int = 151_655
    video_token_id: int = 151_656
    vision_start_token_id: int = 151_652
    tokens_per_second: float = 2.0  # temporal rotary ids per second of video
    # Where rotary ids go on after an image or video: one past its largest id of all three axes, as
    # Qwen2.5-VL was trained (transformers 4), or past its height and width only (transformers 5).
    position_advance: PositionAdvance = "all_axes"

    def __post_init__(self):
        if self.attention != "released":
            return
        group = self.text.num_heads // self.text.num_kv_heads
        if self.released.two_copies and group > RELEASED_GROUP:
            raise ValueError(
                f"{group} query heads per KV head do not fit into the released layout's "
                f"{RELEASED_GROUP} slots; set released.two_copies=false"
            )
        if self.released.network_topk and self.nsa.block_count > RELEASED_TOPK:
            raise ValueError(
                f"{self.nsa.block_count=} is above {RELEASED_TOPK}, the width of the released "
                "top-k; set released.network_topk=false"
            )


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
    """How the model is computed; none of it changes the parameters."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of activations; parameters are float32
    implementation: str | None = None  # of attention, see pallas_kernels; None: best for platform
    # What a layer's backward pass recomputes: "dots" all but matrix products and selected blocks,
    # "save_selection" all but selected blocks, "full" everything.
    remat: Literal["none", "dots", "save_selection", "full"] = "full"
    # How keys reach the devices that split a sequence: "gather" copies all keys of a layer to each,
    # "ring" passes them round, two devices' keys at a time.
    cp_mode: Literal["gather", "ring"] = "gather"


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW with linear warm-up and cosine decay."""

    lr: float = 1e-6  # the peak
    gate_lr: float | None = None  # the peak for the NSA gates; None: the same as `lr`
    warmup_ratio: float = 0.1  # of all steps
    final_lr_ratio: float = 0.0  # of the peak, at the last step
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01  # of matrices and embeddings, not of norms and biases
    clip_norm: float = 1.0  # of the gradient over all trained parameters
    grad_accum_steps: int = 1  # parts that the rows of a step are computed in, one after the other
    freeze: tuple[Literal["vision", "merger", "decoder", "gates", "adapters"], ...] = ()

    def __post_init__(self):
        if self.grad_accum_steps < 1:
            raise ValueError(f"{self.grad_accum_steps=} must be at least 1")
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"{self.warmup_ratio=} must be in [0, 1)")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Length of the run and what it writes."""

    steps: int
    log_every: int = 10  # steps
    save_every: int = 200  # steps
    max_to_keep: int = 2  # checkpoints kept on disk
    init_from: str | None = None  # folder of weights, see docs/training.md; None: random
    max_consecutive_nonfinite: int = 10  # steps in a row with a non-finite loss or gradient
    profile: tuple[int, int] | None = None  # first and last step of a profiler trace

    def __post_init__(self):
        for name in (
            "steps",
            "log_every",
            "save_every",
            "max_to_keep",
            "max_consecutive_nonfinite",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name}={getattr(self, name)} must be at least 1")
        if self.profile is not None and not 1 <= self.profile[0] <= self.profile[1] <= self.steps:
            raise ValueError(
                f"train.profile={self.profile} must be (first, last) within steps 1..{self.steps}"
            )


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where samples come from and how they become batches. A video's frames are sampled by Qwen's
    rules: `fps` of them per second, at least `min_frames`, at most `max_frames`.
    """

    source: tuple[str, ...]  # JSON or JSONL files, or tfds:DIR for a prepared dataset
    tokenizer: str  # folder with a Hugging Face tokenizer.json
    video_root: str | None = None  # folder of relative paths; None: that of the JSON file
    fps: float = 4.0  # frames sampled per second of video
    min_frames: int = 4
    max_frames: int = 768
    min_pixels: int = 3_136  # of a resized frame; smaller ones are enlarged
    max_pixels: int = 50_176  # of a resized frame: 64 tokens a frame pair
    total_pixels: int | None = None  # of a video, its frame pairs counted once; None: no limit
    # Only videos with this many frames at `fps`, both ends included; the paper's is (350, 550).
    frame_count_range: tuple[int, int] | None = None
    batch: int = 8  # rows of a step, over all processes
    buckets: tuple[tuple[int, int], ...] = ((16_384, 2_048),)  # (vision, text) slots of a row
    samples_per_row: int = 1  # the most samples packed into one row
    shuffle: bool = True
    seed: int = 0  # of the order of samples
    workers: int = 0  # processes that decode; 0: a thread of the main process
    threads: int = 4  # of each of them
    # Seconds that one file may take to open or to decode, in a process that is replaced if the file
    # hangs or kills it. 0: files are opened without such processes and without a limit.
    decode_timeout_s: float = 1_200.0
    max_bad_fraction: float = 0.05  # of samples; a run with more bad ones stops

    def __post_init__(self):
        for name in ("min_frames", "max_frames", "batch", "samples_per_row", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name}={getattr(self, name)} must be at least 1")
        if not self.source:
            raise ValueError("data.source is empty; name at least one JSON or JSONL file")
        if not self.buckets:
            raise ValueError("data.buckets is empty; give at least one (vision, text) pair")
        if not 0 <= self.decode_timeout_s <= 1e6:
            raise ValueError(
                f"data.decode_timeout_s={self.decode_timeout_s} must be in 0..1e6; 0: no limit"
            )
        if self.fps <= 0:
            raise ValueError(f"data.fps={self.fps} must be above 0")
        if self.min_pixels > self.max_pixels:
            raise ValueError(f"{self.min_pixels=} is above {self.max_pixels=}")
        if self.min_frames > self.max_frames:
            raise ValueError(f"{self.min_frames=} is above {self.max_frames=}")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """How questions are answered. Videos are sampled and rows are padded as `DataConfig` says."""

    tasks: tuple[tuple[str, str], ...] = ()  # where each task's questions are; in a file a dict
    batch: int = 8  # questions answered together
    max_new_tokens: int = 16

    def __post_init__(self):
        for name in ("batch", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"eval.{name}={getattr(self, name)} must be at least 1")


def _qwen(d_model, d_ff, num_layers, num_heads, num_kv_heads, *, vocab_size, tie, vision_d_ff):
    return ModelConfig(
        text=TextConfig(
            vocab_size=vocab_size,
            d_model=d_model,
            d_ff=d_ff,
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=128,
            mrope_section=(16, 24, 24),
            tie_embeddings=tie,
        ),
        vision=VisionConfig(
            d_model=1280,
            d_ff=vision_d_ff,
            num_layers=32,
            num_heads=16,
            full_attention_layers=(7, 15, 23, 31),
        ),
    )


PRESETS: dict[str, ModelConfig] = {
    "qwen2_5_vl_3b": _qwen(2048, 11008, 36, 16, 2, vocab_size=151_936, tie=True, vision_d_ff=3420),
    "qwen2_5_vl_7b": _qwen(3584, 18944, 28, 28, 4, vocab_size=152_064, tie=False, vision_d_ff=3420),
    "qwen2_5_vl_32b": _qwen(
        5120, 27648, 64, 40, 8, vocab_size=152_064, tie=False, vision_d_ff=3456
    ),
    "qwen2_5_vl_72b": _qwen(
        8192, 29568, 80, 64, 8, vocab_size=152_064, tie=False, vision_d_ff=3456
    ),
    "tiny": ModelConfig(
        text=TextConfig(
            vocab_size=1024,
            d_model=128,
            d_ff=320,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=32,
            mrope_section=(4, 6, 6),
            tie_embeddings=True,
        ),
        vision=VisionConfig(
            d_model=64, d_ff=160, num_layers=2, num_heads=2, full_attention_layers=(1,)
        ),
        nsa=NSAConfig(block_size=16, block_count=2, window_size=16),
    ),
}
