"""Bad input: exit code 1, one line that names what is wrong, source untouched, no destination."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert.__main__ import main
from tests import hf_folder, small_models

CFG = small_models.config(heads=6, kv_heads=2)
SHARD = "model-00002-of-00003.safetensors"
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original") / "hf"
    hf_folder.write(folder, CFG, files=3)
    return folder


@pytest.fixture
def source(original, tmp_path):
    return shutil.copytree(original, tmp_path / "hf")


def _edit_index(folder, change) -> None:
    index = json.loads((folder / hf_folder.INDEX).read_text())
    change(index["weight_map"])
    (folder / hf_folder.INDEX).write_text(json.dumps(index))


def _add_tensor(folder, name, value, *, shard=SHARD) -> None:
    """To one file and to the index."""
    tensors = load_file(folder / shard)
    save_file({**tensors, name: value}, folder / shard)
    _edit_index(folder, lambda files: files.update({name: shard}))


def _missing_shard(folder):
    (folder / SHARD).unlink()


def _truncated_shard(folder):
    data = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(data[:-100])


def _text_for_a_shard(folder):
    (folder / SHARD).write_text("<!doctype html><title>404</title> not found")


def _index_names_a_tensor_twice(folder):
    text = (folder / hf_folder.INDEX).read_text()
    (folder / hf_folder.INDEX).write_text(
        text.replace('"weight_map": {', f'"weight_map": {{"{NORM}": "{SHARD}", ')
    )


def _tensor_in_two_files(folder):
    value = np.ones(CFG.text.d_model, np.float32)
    for shard in sorted(path.name for path in folder.glob("*.safetensors")):
        if NORM not in load_file(folder / shard):
            _add_tensor(folder, NORM, value, shard=shard)


def _index_names_an_absent_tensor(folder):
    _edit_index(folder, lambda files: files.update({"model.more.weight": SHARD}))


def _two_spellings(folder):
    _add_tensor(folder, "model.language_model.norm.weight", np.ones(CFG.text.d_model, np.float32))


def _another_size(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))


def _unknown_tensor(folder):
    _add_tensor(folder, "model.layers.0.self_attn.rotary_emb.inv_freq", np.ones(6, np.float32))


def _integer_tensor(folder):
    shard = json.loads((folder / hf_folder.INDEX).read_text())["weight_map"][NORM]
    _add_tensor(folder, NORM, np.ones(CFG.text.d_model, np.int8), shard=shard)


def _pickles_only(folder):
    for file in folder.glob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))
    (folder / hf_folder.INDEX).unlink()


def _pickles_in_index(folder):
    (folder / SHARD).rename(folder / "pytorch_model.bin")
    _edit_index(
        folder,
        lambda files: files.update(
            {name: "pytorch_model.bin" for name, file in files.items() if file == SHARD}
        ),
    )


def _no_config(folder):
    (folder / "config.json").unlink()


def _broken_config(folder):
    (folder / "config.json").write_text('{"model_type": ')


def _another_model(folder):
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))


def _no_weights(folder):
    for file in folder.glob("model*"):
        file.unlink()


def _layer_missing(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))


FROM_HF = {  # what is done to the source, and what the message must name
    _missing_shard: (SHARD, "missing", hf_folder.INDEX),
    _truncated_shard: (SHARD, "truncated", "download"),
    _text_for_a_shard: (SHARD, "not a valid safetensors file"),
    _index_names_a_tensor_twice: (hf_folder.INDEX, NORM, "twice"),
    _tensor_in_two_files: (NORM, "-of-00003", "only in"),
    _index_names_an_absent_tensor: (SHARD, "model.more.weight", hf_folder.INDEX),
    _two_spellings: ("model.language_model.norm.weight", NORM, "two spellings"),
    _another_size: ("mlp", "(44, 72)", "expected", "48", "another size"),
    _unknown_tensor: ("rotary_emb.inv_freq", "--allow-unexpected"),
    _integer_tensor: (NORM, "int8", "expected", "bfloat16"),
    _pickles_only: (".bin", "pickle", "safetensors"),
    _pickles_in_index: (hf_folder.INDEX, "pytorch_model.bin", "pickle"),
    _no_config: ("config.json",),
    _broken_config: ("config.json", "JSON"),
    _another_model: ("config.json", "LlamaForCausalLM", "Qwen2_5_VLForConditionalGeneration"),
    _no_weights: ("model.safetensors", hf_folder.INDEX),
    _layer_missing: ("missing", "model.layers.2.input_layernorm.weight"),
}


def _fails(capsys, *argv) -> str:
    """The one line on stderr of a command that fails."""
    capsys.readouterr()
    assert main([str(arg) for arg in argv]) == 1
    message = capsys.readouterr().err
    assert message.endswith("\n")
    assert message.count("\n") == 1
    assert message.startswith(f"python -m convert {argv[0]}: ")
    return message


@pytest.mark.parametrize("change", FROM_HF, ids=lambda change: change.__name__[1:])
def test_from_hf_names_what_is_wrong(source, tmp_path, capsys, change):
    change(source)
    before = hf_folder.digest(source)
    message = _fails(capsys, "from-hf", source, tmp_path / "checkpoint")
    for part in FROM_HF[change]:
        assert part in message
    assert hf_folder.digest(source) == before
    assert not (tmp_path / "checkpoint").exists()


@pytest.mark.parametrize("path", ["nothing", "file"])
def test_a_wrong_source_is_named(tmp_path, capsys, path):
    (tmp_path / "file").write_text("")
    for verb in ("from-hf", "to-hf"):
        message = _fails(capsys, verb, tmp_path / path, tmp_path / "made")
        assert str(tmp_path / path) in message
        assert not (tmp_path / "made").exists()
    assert str(tmp_path / path) in _fails(capsys, "inspect", tmp_path / path)
    assert str(tmp_path / path) in _fails(capsys, "verify", tmp_path / path, tmp_path / path)


def test_unknown_tensors_are_left_out_on_request(source, tmp_path, capsys):
    _unknown_tensor(source)
    wrong = "--allow-unexpected=rotary"  # must match the whole name
    assert "inv_freq" in _fails(capsys, "from-hf", source, tmp_path / "made", wrong)
    assert "--allow-unexpected=(" in _fails(
        capsys, "from-hf", source, tmp_path / "made", "--allow-unexpected=("
    )
    assert (
        main(["from-hf", str(source), str(tmp_path / "made"), r"--allow-unexpected=.*inv_freq"])
        == 0
    )
    assert "inv_freq" in capsys.readouterr().out
    argv = ["verify", str(source), str(tmp_path / "made"), "--no-logits"]
    assert main(argv) == 1
    assert main([*argv, "--allow-unexpected=.*inv_freq"]) == 0


@pytest.fixture(scope="module")
def converted(original, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "checkpoint"
    assert main(["from-hf", str(original), str(folder)]) == 0
    return folder


@pytest.mark.parametrize("kind", ["folder", "empty_folder", "file"])
def test_an_existing_destination_is_kept(original, converted, tmp_path, capsys, kind):
    made = tmp_path / "made"
    if kind == "file":
        made.write_text("mine")
    else:
        made.mkdir()
    if kind == "folder":
        (made / "notes.txt").write_text("mine")
    before = hf_folder.digest(tmp_path)
    for verb, path in (("from-hf", original), ("to-hf", converted)):
        message = _fails(capsys, verb, path, made)
        assert str(made) in message
        assert "exists" in message
        assert hf_folder.digest(tmp_path) == before


@pytest.mark.parametrize(
    ("flag", "part"),
    [
        ("--max-shard-size=much", "--max-shard-size=much"),
        ("--max-shard-size=0", "--max-shard-size=0"),
        ("--files=nowhere", "nowhere"),
    ],
)
def test_to_hf_names_wrong_flags(converted, tmp_path, capsys, flag, part):
    before = hf_folder.digest(converted)
    assert part in _fails(capsys, "to-hf", converted, tmp_path / "made", flag)
    assert not (tmp_path / "made").exists()
    assert hf_folder.digest(converted) == before


def test_a_folder_of_tensors_is_no_checkpoint(original, tmp_path, capsys):
    message = _fails(capsys, "to-hf", original, tmp_path / "made")
    assert str(original) in message
    assert "checkpoint" in message
