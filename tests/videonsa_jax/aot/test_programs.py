"""The programs of a run are made from shapes alone, sharded as their config says."""

import jax
import pytest

from videonsa_jax.aot import programs
from videonsa_jax.aot.programs import RowShape
from videonsa_jax.config.parse import load_config, parse
from videonsa_jax.sharding.mesh import abstract_mesh, make_mesh
from videonsa_jax.training import state

CONFIG = "configs/videonsa_7b_sft.py:smoke"
SMALL = ("model.text.vocab_size=256", "mesh.fsdp=8", "data.max_pixels=12544")
SHAPE = RowShape(rows=8, vision_tokens=64, text_tokens=32)


@pytest.fixture(scope="module")
def mesh():
    cfg = parse(load_config(CONFIG), SMALL)
    return cfg, make_mesh(cfg.mesh)


@pytest.mark.parametrize(("variant", "devices"), [("full", 8), ("pod64", 64), ("pod256", 256)])
def test_the_7b_recipe_is_split_over_devices(variant, devices):
    """Parameters and rows divide evenly, and every split takes the recipe's rows."""
    cfg = parse(load_config(f"configs/videonsa_7b_sft.py:{variant}"))
    mesh = abstract_mesh(cfg.mesh)
    _, layouts = state.abstract_model(cfg, mesh)
    assert mesh.size == devices
    whole = sum(4 * x.abstract.size for x in layouts)
    small = 50e6  # biases and the like, which every device holds
    assert sum(x.bytes_per_device for x in layouts) < whole / devices + small
    assert cfg.data.batch == 32 == cfg.optim.grad_accum_steps * cfg.mesh.fsdp


def test_a_training_step_donates_its_state(mesh):
    cfg, mesh = mesh
    with jax.set_mesh(mesh):
        lowered = programs.training_step(cfg, mesh, SHAPE)
    before, batch = lowered.args_info[0]
    assert all(leaf.donated for leaf in jax.tree.leaves(before))
    assert not any(leaf.donated for leaf in jax.tree.leaves(batch))
    after, metrics = lowered.out_info
    assert jax.tree.map(lambda x: x.shape, after) == jax.tree.map(lambda x: x.shape, before)
    assert metrics["loss"].shape == ()


def test_a_prefill_has_a_row_of_the_cache_per_question(mesh):
    cfg, mesh = mesh
    with jax.set_mesh(mesh):
        lowered = programs.prefill_step(cfg, mesh, SHAPE, new_tokens=4)
    logits, cache = lowered.out_info
    assert logits.shape == (8, 256)
    assert cache.keys.shape == (2, 8, 100, 2, 32)
    assert cache.keys.dtype == "bfloat16"


def test_a_batch_is_split_over_the_devices(mesh):
    cfg, mesh = mesh
    batch = programs.abstract_batch(cfg, mesh, SHAPE)
    assert batch.patches.sharding.shard_shape(batch.patches.shape) == (1, 256, 1176)
    assert batch.frame_patches == 64
