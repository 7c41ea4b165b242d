"""Folders are opened whole, in either spelling and any number of files, or refused by name."""

import json
import pathlib
import re

import numpy as np
import pytest

from convert.hf import directory
from tests import hf_folder, small_models
from videonsa_jax.errors import UserError

CFG = small_models.config()
NORM = "model.norm.weight"
FILES = [f"model-{i}-of-00003.safetensors" for i in ("00001", "00002", "00003")]


def refuse(folder: pathlib.Path, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        directory.open_hf(folder)
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)


def edit_index(folder: pathlib.Path, change) -> None:
    file = folder / hf_folder.INDEX
    index = json.loads(file.read_text())
    change(index["weight_map"])
    file.write_text(json.dumps(index))


@pytest.fixture
def sharded(tmp_path):
    tensors = hf_folder.write(tmp_path / "hf", CFG, files=3)
    return tmp_path / "hf", tensors


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("spelling", ["hub", "state dict"])
def test_all_tensors_are_found(tmp_path, files, spelling):
    folder = tmp_path / "hf"
    tensors = hf_folder.write(folder, CFG, files=files)
    if spelling == "state dict" and files == 1:
        hf_folder.rename(folder)
    opened = directory.open_hf(folder)
    assert opened.tensors.keys() == tensors.keys()
    assert opened.config == json.loads((folder / "config.json").read_text())
    for name, value in tensors.items():
        np.testing.assert_array_equal(opened.tensors[name].read(), value, strict=True)


def test_what_belongs_to_a_model_is_carried(tmp_path):
    folder = tmp_path / "hf"
    hf_folder.write(folder, CFG, files=3)
    for name in ("merges.txt", "chat_template.jinja", "LICENSE", "README.md", "x.gguf", "a.bin"):
        (folder / name).touch()
    (folder / "manifest.json").write_text("{}")
    (folder / "onnx").mkdir()
    assert {file.name for file in directory.open_hf(folder).carried} == {
        "config.json", "tokenizer.json", "merges.txt", "chat_template.jinja", "LICENSE", "README.md"
    }  # fmt: skip


def test_what_is_no_folder_of_a_model_is_refused(tmp_path):
    refuse(tmp_path / "none", "none: no such folder")
    refuse(tmp_path, r"no config\.json in it")
    (tmp_path / "config.json").write_text("[1]")
    refuse(tmp_path, "expected a JSON object, not list")
    (tmp_path / "config.json").write_text("{")
    refuse(tmp_path / "config.json", r"config\.json is a file; name its folder")
    refuse(tmp_path, r"config\.json: not valid JSON")
    (tmp_path / "config.json").write_text("{}")
    refuse(tmp_path, r"neither model\.safetensors nor .* in it; download the weights")
    (tmp_path / FILES[0]).touch()
    refuse(tmp_path, "00001-of-00003.safetensors has no model.safetensors.index.json beside it")


@pytest.mark.parametrize("suffix", directory.PICKLES)
def test_pickles_are_refused_with_a_hint(tmp_path, suffix):
    (tmp_path / "config.json").write_text("{}")
    pickle = tmp_path / f"pytorch_model{suffix}"
    pickle.touch()
    hint = re.escape(pickle.name) + r" is a pickle; .* save_pretrained\(\) writes safetensors"
    refuse(tmp_path, hint)
    refuse(pickle, hint)
    (tmp_path / hf_folder.INDEX).write_text(json.dumps({"weight_map": {NORM: pickle.name}}))
    refuse(tmp_path, hint)


def test_a_missing_file_is_named_with_a_tensor_of_it(sharded):
    folder, _ = sharded
    (folder / FILES[1]).unlink()
    refuse(folder, rf"{FILES[1]} is missing; .* expects tensor '.*' in it; download it")


def test_a_truncated_file_is_named(sharded):
    folder, _ = sharded
    file = folder / FILES[1]
    file.write_bytes(file.read_bytes()[:-1])
    refuse(folder, rf"{FILES[1]}: not a valid safetensors file: it is truncated")


def test_an_index_that_names_a_tensor_twice_is_refused(sharded):
    folder, _ = sharded
    index = folder / hf_folder.INDEX
    index.write_text(f'{{"weight_map": {{"{NORM}": "{FILES[0]}", "{NORM}": "{FILES[1]}"}}}}')
    refuse(folder, rf"index\.json: .*'{NORM}' is named twice")


def test_a_tensor_in_two_spellings_is_refused(sharded):
    folder, tensors = sharded
    other = "model.language_model.norm.weight"
    (folder / hf_folder.INDEX).unlink()
    hf_folder.write_tensors(folder, {**tensors, other: tensors[NORM]}, files=1)
    refuse(folder, f"{other} and {NORM} are two spellings of one tensor; remove one of them")


@pytest.mark.parametrize(
    ("change", "message"),
    {
        "absent tensor": (lambda x: x.update(extra=FILES[2]), f"{FILES[2]}: no tensor 'extra'"),
        "other file": (
            lambda x: x.update({NORM: next(f for f in FILES if f != x[NORM])}),
            rf"safetensors: no tensor '{NORM}', which .* expects in it",
        ),
        "unnamed tensor": (lambda x: x.pop(NORM), rf"tensor '{NORM}' is not in .*index\.json"),
        "outside": (lambda x: x.update({NORM: "../x"}), r"is in '\.\./x', expected a file's name"),
        "no name": (lambda x: x.update({NORM: 3}), "is in 3, expected a file's name"),
        "empty": (lambda x: x.clear(), "no weight_map of tensors and their files"),
    }.values(),
    ids=["absent tensor", "other file", "unnamed tensor", "outside", "no name", "empty"],
)
def test_an_index_that_disagrees_with_its_files_is_refused(sharded, change, message):
    folder, _ = sharded
    edit_index(folder, change)
    refuse(folder, message)


def test_a_tensor_in_two_files_is_refused(sharded):
    folder, tensors = sharded
    edit_index(folder, lambda x: x.update(dict.fromkeys(x, FILES[0])))
    hf_folder.write_tensors(folder / "..", {NORM: tensors[NORM]}, files=1)
    (folder / ".." / "model.safetensors").rename(folder / FILES[1])
    hf_folder.write_tensors(folder / "..", tensors, files=1)
    (folder / ".." / "model.safetensors").rename(folder / FILES[0])
    edit_index(folder, lambda x: x.update({"model.embed_tokens.weight": FILES[1]}))
    refuse(folder, rf"tensor '{NORM}' is in .*{FILES[0]} and in .*{FILES[1]}; expected it only in")


def test_weights_in_both_forms_are_refused(sharded):
    folder, tensors = sharded
    hf_folder.write_tensors(folder, tensors, files=1)
    refuse(folder, r"holds both model\.safetensors and model\.safetensors\.index\.json")
