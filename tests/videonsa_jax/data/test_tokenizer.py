"""Text <-> ids, and the errors of a tokenizer directory."""

import codecs
import json

import pytest
import tokenizers

from videonsa_jax.data import tokenizer as bpe
from videonsa_jax.data.tokenizer import Tokenizer
from videonsa_jax.errors import UserError

TEXT = (
    "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>"
    "Vidéo: 123 苹果 🙂\n\n  x+=1;<|im_end|>"
)


def test_text_survives_encoding(tokenizer):
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


def test_special_tokens_are_single_ids(tokenizer):
    ids = tokenizer.encode("<|im_start|><|im_end|><|image_pad|><|video_pad|>")
    assert ids == [
        tokenizer.im_start,
        tokenizer.im_end,
        tokenizer.image_pad,
        tokenizer.video_pad,
    ]


def test_special_tokens_can_be_left_out(tokenizer):
    assert tokenizer.decode(tokenizer.encode("red<|im_end|>"), skip_special=True) == "red"


def test_digits_are_single_tokens_and_text_is_composed_first(tokenizer):
    assert len(tokenizer.encode("2024")) == 4
    decomposed, composed = "e\u0301", "\u00e9"
    assert tokenizer.encode(decomposed) == tokenizer.encode(composed)


def test_training_is_deterministic_and_keeps_the_size(tmp_path):
    sizes = [bpe.train_bpe(["red square"] * 9, 290, tmp_path / name).vocab_size for name in "ab"]
    assert sizes[0] <= 290
    files = [(tmp_path / name / "tokenizer.json").read_bytes() for name in "ab"]
    assert files[0] == files[1]


def test_too_small_a_vocabulary_is_rejected(tmp_path):
    with pytest.raises(ValueError, match="vocab_size=100 is below 270"):
        bpe.train_bpe(["text"], 100, tmp_path)


@pytest.fixture
def rewrite(tokenizer_dir, tmp_path):
    """Writes the tokenizer's file with some fields changed, as a run may have left it."""

    def write(mark: bytes = b"", model: dict | None = None, **fields) -> Tokenizer:
        stored = json.loads((tokenizer_dir / "tokenizer.json").read_text())
        stored = {**stored, **fields, "model": {**stored["model"], **(model or {})}}
        (tmp_path / "tokenizer.json").write_bytes(mark + json.dumps(stored).encode())
        return Tokenizer.from_dir(tmp_path)

    return write


TRUNCATION = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
PADDING = {
    "strategy": {"Fixed": 64},
    "direction": "Right",
    "pad_to_multiple_of": None,
    "pad_id": 0,
    "pad_type_id": 0,
    "pad_token": "<|endoftext|>",
}


@pytest.mark.parametrize(
    "stored",
    [
        {"truncation": TRUNCATION},
        {"truncation": {**TRUNCATION, "direction": "Left"}},
        {"padding": PADDING},
        {"padding": {**PADDING, "direction": "Left"}},
        {"padding": {**PADDING, "strategy": "BatchLongest", "pad_to_multiple_of": 64}},
        {"truncation": TRUNCATION, "padding": PADDING},
        {"model": {"dropout": 0.9}},
        {"mark": codecs.BOM_UTF8},
    ],
    ids=str,
)
def test_what_training_left_in_the_file_changes_no_ids(tokenizer, rewrite, stored):
    changed = rewrite(**stored)
    for text in (TEXT, "the red square flashes up", "a", ""):
        assert changed.encode(text) == tokenizer.encode(text)


def test_stored_special_tokens_are_not_added(tokenizer, rewrite):
    bos = {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}
    changed = rewrite(
        post_processor={
            "type": "TemplateProcessing",
            "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {
                "<|im_start|>": {
                    "id": "<|im_start|>",
                    "ids": [tokenizer.im_start],
                    "tokens": ["<|im_start|>"],
                }
            },
        }
    )
    assert changed.encode(TEXT) == tokenizer.encode(TEXT)


def test_added_tokens_with_other_ids_than_stored_are_refused(tokenizer_dir, rewrite):
    added = json.loads((tokenizer_dir / "tokenizer.json").read_text())["added_tokens"]
    first = added[0]["id"]
    moved = [{**token, "id": token["id"] + 5} for token in added]
    message = f"says that <.endoftext.> is token {first + 5}, but .* gives it {first}"
    with pytest.raises(UserError, match=message):
        rewrite(added_tokens=moved)


def test_vocabulary_reaches_to_the_largest_id(tokenizer, tokenizer_dir, rewrite):
    vocab = json.loads((tokenizer_dir / "tokenizer.json").read_text())["model"]["vocab"]
    last = max(vocab, key=vocab.get)
    assert rewrite(model={"vocab": {**vocab, last: 5000}}).vocab_size == 5001
    assert tokenizer.vocab_size == len(vocab) + len(bpe.SPECIAL_TOKENS)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere/tokenizer.json: no such file"):
        Tokenizer.from_dir(tmp_path / "nowhere")


def test_unreadable_file_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(UserError, match=r"tokenizer.json: not readable as JSON"):
        Tokenizer.from_dir(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "unheard of"}}))
    with pytest.raises(UserError, match=r"tokenizer.json: not a tokenizer"):
        Tokenizer.from_dir(tmp_path)


def test_tokenizer_without_qwens_tokens_is_rejected(tmp_path):
    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"lacks Qwen's special tokens <\|endoftext\|>"):
        Tokenizer.from_dir(tmp_path)


@pytest.mark.torch
def test_transformers_reads_the_directory(tokenizer_dir, tokenizer):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    theirs = transformers.AutoTokenizer.from_pretrained(tokenizer_dir)
    assert theirs(TEXT).input_ids == tokenizer.encode(TEXT)
    assert theirs.eos_token == "<|im_end|>"
