"""The devices that share a row compute what one device does: any degree, both modes."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx

from tests import synthetic
from tests.gradient_program import GradientProgram, assert_equal
from videonsa_jax.config.schema import ComputeConfig
from videonsa_jax.data.pack import Bucket, frame_patches, pack
from videonsa_jax.model.generate import generate
from videonsa_jax.sharding import rules, shard
from videonsa_jax.sharding.mesh import make_mesh
from videonsa_jax.sharding.mesh_config import MeshConfig
from videonsa_jax.training import state as state_lib

pytestmark = pytest.mark.slow

GRID, LONG = (3, 8, 6), (5, 8, 6)  # 36 and 60 tokens: no whole blocks of 16
BUCKET = Bucket(vision_tokens=128, text_tokens=32)
FRAME_PATCHES = frame_patches([GRID, LONG], synthetic.MODEL)


@functools.cache
def arrays(*, packed: bool = True):
    """Two rows: of two sequences, or one; of one. The last frames end in the middle of a block."""
    rng = np.random.default_rng(0)
    first = [synthetic.sample(rng, GRID) for _ in range(1 + packed)]
    return pack([first, [synthetic.sample(rng, LONG)]], BUCKET, synthetic.MODEL)


def config(mode: str, mesh: MeshConfig, attention: str):
    preset = "fsdp_cp" if mesh.tensor == 1 else "fsdp_tp_cp"
    base = synthetic.run_config()
    return synthetic.run_config(
        model=dataclasses.replace(synthetic.MODEL, attention=attention),
        mesh=mesh,
        sharding=rules.PRESETS[preset],
        compute=ComputeConfig(dtype="float32", remat="full", cp_mode=mode),
        data=dataclasses.replace(base.data, buckets=(dataclasses.astuple(BUCKET),)),
    )


@functools.cache
def program(mode: str, mesh: MeshConfig, attention: str) -> GradientProgram:
    return GradientProgram(
        config(mode, mesh, attention),
        arrays(),
        frame_patches=FRAME_PATCHES,
        devices=jax.devices()[: mesh.context * mesh.tensor],
    )


@pytest.mark.parametrize("mode", ["gather", "ring"])
@pytest.mark.parametrize("context", [2, 4, 8])
def test_every_degree_and_mode_equals_one_device(context, mode):
    got = program(mode, MeshConfig(context=context), "paper")
    assert_equal(got, program("gather", MeshConfig(), "paper"))


@pytest.mark.parametrize("mode", ["gather", "ring"])
def test_heads_are_split_as_well(mode):
    got = program(mode, MeshConfig(tensor=2, context=4), "paper")
    assert_equal(got, program("gather", MeshConfig(), "paper"))


@pytest.mark.parametrize("mode", ["gather", "ring"])
def test_dense_attention_is_shared_as_well(mode):
    got = program(mode, MeshConfig(context=4), "dense")
    assert_equal(got, program("gather", MeshConfig(), "dense"))


@pytest.mark.parametrize(
    ("mode", "attention"),
    [("gather", "paper"), ("ring", "paper"), ("gather", "dense"), ("gather", "released")],
)
def test_generation_continues_as_on_one_device(mode, attention):
    def tokens(mesh_cfg):
        mesh = make_mesh(mesh_cfg, jax.devices()[: mesh_cfg.context])
        cfg = config(mode, mesh_cfg, attention)
        with jax.set_mesh(mesh):
            model = jax.jit(lambda: nnx.split(state_lib.build_model(cfg))[1])()
            model = nnx.merge(
                nnx.split(nnx.eval_shape(lambda: state_lib.build_model(cfg)))[0], model
            )
            rows = shard.global_batch(arrays(packed=False), FRAME_PATCHES, cfg.sharding, mesh)
            return np.asarray(generate(model, rows, max_new_tokens=4))

    np.testing.assert_array_equal(tokens(MeshConfig(context=4)), tokens(MeshConfig()))
