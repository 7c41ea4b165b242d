"""A folder loads onto a mesh as its conversion would, each device reading its part."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from jax.sharding import NamedSharding, PartitionSpec

from convert import load
from convert.hf.safetensors import Stored
from convert.models import videonsa
from convert.weights import layout
from tests import hf_folder, small_models
from videonsa_jax.errors import UserError
from videonsa_jax.sharding.mesh import make_mesh
from videonsa_jax.sharding.mesh_config import MeshConfig

CFG = small_models.config(heads=8, kv_heads=4)
TIED = small_models.config(heads=8, kv_heads=4, tied=True)


def abstract(cfg, axis: int | None, dtype="float32") -> dict[str, jax.ShapeDtypeStruct]:
    """By path; split over 8 devices along the first or last (0, -1) even dimension, or whole."""
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=4))

    def place(shape):
        split = [None] * len(shape)
        even = [at for at, size in enumerate(shape) if size % 8 == 0]
        if axis is not None and even:
            split[even[axis]] = ("fsdp", "tensor")
        sharding = NamedSharding(mesh, PartitionSpec(*split))
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)

    return {x.row.jax: place(x.shape) for x in layout.params(videonsa.FAMILY, cfg)}


def loaded(path, cfg, wanted, **options) -> dict[str, jax.Array]:
    nested = load.load_hf(path, cfg, traverse_util.unflatten_dict(wanted, sep="/"), **options)
    return traverse_util.flatten_dict(nested, sep="/")


@pytest.mark.parametrize("axis", [None, 0, -1])
@pytest.mark.parametrize("cfg", [CFG, TIED], ids=["untied", "tied"])
def test_values_and_shardings_are_those_asked_for(tmp_path, cfg, axis):
    tensors = hf_folder.write(tmp_path / "hf", cfg, gates=True, files=2, dtype="bfloat16")
    wanted = abstract(cfg, axis)
    got = loaded(tmp_path / "hf", cfg, wanted)
    want = hf_folder.to_jax(tensors, videonsa.rows(cfg))
    assert got.keys() == want.keys()
    for path, value in want.items():
        np.testing.assert_array_equal(got[path], value.astype(np.float32), path, strict=True)
        assert got[path].sharding == wanted[path].sharding
    split = sum(not x.sharding.is_fully_replicated for x in wanted.values())
    assert split == 0 if axis is None else split > 20


def test_dtypes_are_those_asked_for(tmp_path):
    tensors = hf_folder.write(tmp_path / "hf", CFG, gates=True)
    got = loaded(tmp_path / "hf", CFG, abstract(CFG, 0, "bfloat16"))
    for path, value in hf_folder.to_jax(tensors, videonsa.rows(CFG)).items():
        np.testing.assert_array_equal(got[path], value.astype(jnp.bfloat16), path, strict=True)


def test_missing_gates_are_those_of_a_conversion(tmp_path):
    hf_folder.write(tmp_path / "hf", CFG)
    kernel = "text/layers/gates/hidden/kernel"
    a, b, c = (
        loaded(tmp_path / "hf", CFG, abstract(CFG, axis), seed=seed)[kernel]
        for axis, seed in ((None, 1), (-1, 1), (-1, 2))
    )
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c)


def test_only_the_files_maps_are_read(tmp_path, monkeypatch):
    """No tensor is read as a whole into memory."""
    hf_folder.write(tmp_path / "hf", CFG, gates=True)
    monkeypatch.delattr(Stored, "read")
    loaded(tmp_path / "hf", CFG, abstract(CFG, -1))


def test_parameters_of_another_model_are_named(tmp_path):
    hf_folder.write(tmp_path / "hf", CFG)
    wanted = abstract(CFG, None)
    wanted["text/norm/scale"] = wanted["text/layers/attn_norm/scale"]
    with pytest.raises(UserError, match=r"text/norm/scale is \(96,\) there, \(2, 96\) in the"):
        loaded(tmp_path / "hf", CFG, wanted)
    del wanted["text/norm/scale"]
    with pytest.raises(UserError, match=r"text/norm/scale is \(96,\) there, missing in the model"):
        loaded(tmp_path / "hf", CFG, wanted)
