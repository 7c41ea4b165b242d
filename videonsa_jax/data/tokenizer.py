"""Byte-level BPE with Qwen's special tokens: read from a Hugging Face directory, or trained."""

import json
import pathlib
from collections.abc import Iterable

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from videonsa_jax.errors import UserError

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"
SPECIAL_TOKENS = (  # in the order of Qwen2.5's ids, from 151643 on
    END_OF_TEXT,
    IM_START,
    IM_END,
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    VISION_START,
    VISION_END,
    "<|vision_pad|>",
    IMAGE_PAD,
    VIDEO_PAD,
)
NEEDED_TOKENS = (END_OF_TEXT, IM_START, IM_END, VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD)

# Qwen's pre-tokenizer: contractions, words with one leading non-letter, single digits,
# punctuation, line ends, other white space.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Tokenizer:
    """Text <-> token ids. Special tokens written in a text are read as special tokens."""

    def __init__(self, backend: tokenizers.Tokenizer, origin: str):
        self._backend = backend
        missing = [name for name in NEEDED_TOKENS if backend.token_to_id(name) is None]
        if missing:
            raise UserError(f"{origin}: lacks Qwen's special tokens {', '.join(missing)}")
        self.vocab_size = max(backend.get_vocab().values()) + 1  # ids may leave gaps
        self.end_of_text, self.im_start, self.im_end = map(
            backend.token_to_id, (END_OF_TEXT, IM_START, IM_END)
        )
        self.vision_start, self.vision_end = map(backend.token_to_id, (VISION_START, VISION_END))
        self.image_pad, self.video_pad = map(backend.token_to_id, (IMAGE_PAD, VIDEO_PAD))

    @classmethod
    def from_dir(cls, directory: str | pathlib.Path) -> "Tokenizer":
        """Reads `tokenizer.json` of a Hugging Face directory.

        What training left in the file is switched off: truncation, padding, dropout of merges.

        Raises:
          UserError: there is no such file, it is not a tokenizer, it lacks one of Qwen's special
            tokens, or an added token would get another id than the file says.
        """
        path = pathlib.Path(directory) / "tokenizer.json"
        if not path.is_file():
            raise UserError(f"{path}: no such file; give a directory with a tokenizer.json")
        try:
            text = path.read_text(encoding="utf-8-sig")
            stored = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: not readable as JSON: {error}") from error
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises nothing more specific
            raise UserError(
                f"{path}: not a tokenizer of the library tokenizers: {error}"
            ) from error
        backend.no_truncation()
        backend.no_padding()
        if isinstance(backend.model, models.BPE):
            backend.model.dropout = None
        for token in stored.get("added_tokens") or ():
            given = backend.token_to_id(token["content"])
            if given != token["id"]:  # the library counts on from the vocabulary, whatever is said
                raise UserError(
                    f"{path}: says that {token['content']} is token {token['id']}, but the library "
                    f"tokenizers gives it {given}; number the added tokens on from the vocabulary"
                )
        return cls(backend, str(path))

    def encode(self, text: str) -> list[int]:
        """Nothing is added: no begin or end token."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Bytes that are not UTF-8 become U+FFFD; `skip_special` leaves out special tokens."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)


def train_bpe(texts: Iterable[str], vocab_size: int, directory: str | pathlib.Path) -> Tokenizer:
    """Trains a small tokenizer with Qwen's rules and writes it as a Hugging Face directory.

    Args:
      texts: what to learn merges from.
      vocab_size: the most tokens, the 256 bytes and the special tokens included.
      directory: gets tokenizer.json and tokenizer_config.json.

    Returns:
      The tokenizer. Special tokens have the last ids, as in Qwen's.

    Raises:
      ValueError: `vocab_size` does not hold the bytes and the special tokens.
    """
    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ValueError(f"{vocab_size=} is below {smallest}: 256 bytes and the special tokens")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(SPLIT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.add_special_tokens(
        [tokenizers.AddedToken(name, special=True, normalized=False) for name in SPECIAL_TOKENS]
    )
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": IM_END,
        "pad_token": END_OF_TEXT,
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    return Tokenizer(backend, str(directory / "tokenizer.json"))
