"""Text <-> ids, and the errors of a tokenizer directory."""

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
