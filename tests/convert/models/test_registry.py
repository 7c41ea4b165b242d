"""A model family from outside of the package is converted like those inside."""

import dataclasses
import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from convert.__main__ import main
from convert.models import registry, videonsa
from convert.models.family import Family
from convert.weights.table import LINEAR, Row
from tests import hf_folder, small_models
from videonsa_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    width: int
    layers: int
    attention: str = "dense"


class Toy(nnx.Module):
    def __init__(self, cfg: ToyConfig, *, rngs: nnx.Rngs):
        del rngs
        self.up = nnx.Param(jnp.zeros((cfg.layers, cfg.width, 2 * cfg.width)))
        self.norm = nnx.Param(jnp.ones(cfg.width))


def _read(config, attention):
    return ToyConfig(config["size"], config["depth"], attention or "dense")


def _write(cfg, *, dtype, carried=None):
    sizes = {"size": cfg.width, "depth": cfg.layers, "dtype": dtype}
    return {"architectures": ["ToyModel"], "model_type": "toy", **(carried or {}), **sizes}


TOY = Family(
    name="toy",
    architecture="ToyModel",
    model_type="toy",
    config_class=ToyConfig,
    model=Toy,
    rows=lambda cfg: (Row("h.{l}.up", "up", LINEAR, cfg.layers), Row("norm", "norm")),
    read_config=_read,
    write_config=_write,
    prefixes=(("toy.", ""),),
)


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(registry, "FAMILIES", dict(registry.FAMILIES))
    registry.register(TOY)


@pytest.fixture
def source(tmp_path):
    """A folder of two layers, whose names are spelled in the other way."""
    rng = np.random.default_rng(0)
    shapes = {"h.0.up": (6, 3), "h.1.up": (6, 3), "norm": (3,)}
    tensors = {
        name: rng.standard_normal(shape).astype(ml_dtypes.bfloat16)
        for name, shape in shapes.items()
    }
    folder = tmp_path / "hf"
    folder.mkdir()
    save_file({f"toy.{name}": x for name, x in tensors.items()}, folder / "model.safetensors")
    config = {"architectures": ["ToyModel"], "size": 3, "depth": 2, "remark": "kept"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, tensors


@pytest.mark.usefixtures("toy")
def test_a_family_from_outside_goes_there_and_back(source, tmp_path, capsys):
    hf, tensors = source
    weights, back = tmp_path / "weights", tmp_path / "back"
    assert main(["from-hf", str(hf), str(weights)]) == 0
    assert main(["verify", str(hf), str(weights)]) == 0
    out = capsys.readouterr().out
    assert "3 compared, 0 differ" in out
    assert "transformers has no class for toy" in out
    assert main(["inspect", str(weights)]) == 0
    assert "[2, 3, 6]" in capsys.readouterr().out
    assert main(["to-hf", str(weights), str(back)]) == 0
    got = load_file(back / "model.safetensors")
    assert got.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(got[name], value, name, strict=True)
    config = json.loads((back / "config.json").read_text())
    assert (config["size"], config["depth"], config["remark"]) == (3, 2, "kept")


@pytest.mark.usefixtures("toy")
def test_what_a_family_cannot_do_is_one_line(source, tmp_path, capsys):
    hf, _ = source
    weights = tmp_path / "weights"
    assert main(["from-hf", str(hf), str(weights)]) == 0
    capsys.readouterr()
    assert main(["logits", str(weights), str(tmp_path / "x.npz"), str(tmp_path / "y.npz")]) == 1
    assert "toy is not configured as Qwen2.5-VL is" in capsys.readouterr().err
    assert main(["to-hf", str(weights), str(tmp_path / "z"), "--architecture=videonsa"]) == 1
    assert f"--architecture=videonsa: {weights} holds toy" in capsys.readouterr().err
    hf_folder.write(tmp_path / "other", small_models.config())
    assert main(["verify", str(tmp_path / "other"), str(weights)]) == 1
    assert "is of the family qwen2_5_vl" in capsys.readouterr().err


def test_an_unknown_family_is_named(source, tmp_path, capsys, monkeypatch):
    hf, _ = source
    weights = tmp_path / "weights"
    assert main(["from-hf", str(hf), str(weights)]) == 1
    assert "architectures=['ToyModel'] is not supported; allowed: " in capsys.readouterr().err
    assert main(["inspect", str(hf)]) == 0
    assert "toy.h.0.up" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(registry, "FAMILIES", registry.FAMILIES | {"toy": TOY})
        assert main(["from-hf", str(hf), str(weights)]) == 0
    with pytest.raises(UserError, match="architecture='toy' is not known; allowed: qwen2_5_vl"):
        registry.of_checkpoint(weights)


def test_two_families_of_one_name_are_refused():
    other = dataclasses.replace(videonsa.FAMILY, name="other")
    with pytest.raises(ValueError, match="VideoNSAForConditionalGeneration"):
        registry.register(other)


def test_a_config_that_names_no_class_is_known_by_its_type():
    assert registry.of_config({"model_type": "qwen2_5_vl"}).name == "qwen2_5_vl"
    with pytest.raises(UserError, match="architectures='Qwen2_5_VLForConditionalGeneration' is n"):
        registry.of_config({"architectures": "Qwen2_5_VLForConditionalGeneration"})
    with pytest.raises(UserError, match=r"model_type='llama' is not supported; allowed: qwen2_5_v"):
        registry.of_config({"model_type": "llama"})
