"""Manifests come back as they were written; damaged ones are named."""

import hashlib
import json

import numpy as np
import pytest

from convert.hf.safetensors import Spec, create_file
from convert.store import manifest
from convert.store.manifest import Hashes, Manifest, Record
from videonsa_jax.errors import UserError

VALUE = np.arange(12, dtype=np.float32).reshape(3, 4)
MADE = Manifest(
    source={"path": "/x", "step": 3},
    architecture="videonsa",
    gates="source",
    dtype="keep",
    tensors={"model.norm.weight": Record((4,), "bfloat16", "0" * 64)},
)


def test_a_manifest_comes_back(tmp_path):
    assert manifest.read(tmp_path) is None
    manifest.write(tmp_path, MADE)
    assert manifest.read(tmp_path) == MADE
    stored = json.loads((tmp_path / "manifest.json").read_text())
    assert stored["format"] == 1
    assert {"jax", "orbax-checkpoint", "numpy"} <= stored["versions"].keys()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ('{"format": 1, "tensors": {}}', "is damaged"),
        ('{"format": 1, "tensors": {"x": {}}}', "is damaged"),
        ('{"format": 2}', "has format 2, expected 1"),
    ],
)
def test_a_damaged_manifest_is_named(tmp_path, text, message):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        manifest.read(tmp_path)
    assert str(error.value).startswith(str(tmp_path / "manifest.json"))


def test_hashes_are_of_the_bytes_however_they_come(tmp_path):
    want = hashlib.sha256(VALUE.tobytes()).hexdigest()
    hashes = Hashes()
    for row in VALUE:
        hashes.update("x", row)
    assert hashes["x"] == want
    spec = Spec("x", VALUE.dtype, VALUE.shape)
    stored = create_file(tmp_path / "x.safetensors", [spec], {})
    stored["x"].map(writable=True)[...] = VALUE
    assert manifest.sha256(stored["x"]) == want
