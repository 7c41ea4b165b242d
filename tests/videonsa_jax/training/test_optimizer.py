"""Each parameter is updated by the rule of its group."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from videonsa_jax.config import schema as config
from videonsa_jax.config.schema import OptimConfig
from videonsa_jax.model.model import VideoNSA
from videonsa_jax.training import optimizer
from videonsa_jax.training.optimizer import Optimizer

PARAMS = {
    "text": {
        "embed": {"embedding": jnp.full((3, 2), 2.0)},
        "layers": {
            "attn": {
                "q": {
                    "kernel": jnp.full((2, 2), 2.0),
                    "bias": jnp.full(2, 2.0),
                    "lora_in": jnp.full((2, 1), 2.0),
                    "lora_out": jnp.full((1, 2), 2.0),
                }
            },
            "gates": {"out": {"kernel": jnp.full((2, 3), 2.0), "bias": jnp.full(3, 2.0)}},
        },
        "norm": {"scale": jnp.full(2, 2.0)},
    },
    "vision": {
        "patch": {"kernel": jnp.full((2, 2), 2.0)},
        "merger": {"out": {"kernel": jnp.full((2, 2), 2.0)}},
    },
}


def update(cfg: OptimConfig, gradient: float, steps: int = 1) -> tuple[dict, dict]:
    """The flat parameters before and after one update with the same gradient everywhere."""
    rule = Optimizer(cfg, steps)
    trained, _ = rule.split(PARAMS)
    tx = rule.transformation()
    grads = jax.tree.map(lambda x: jnp.full_like(x, gradient), trained)
    updates, _ = tx.update(grads, tx.init(trained), trained)
    return trained, optax.apply_updates(trained, updates)


@pytest.mark.parametrize("preset", sorted(config.PRESETS))
def test_every_parameter_has_one_group_and_a_decay_rule(preset):
    cfg = dataclasses.replace(config.PRESETS[preset], lora=config.LoRAConfig(rank=2))
    model = nnx.eval_shape(lambda: VideoNSA(cfg, rngs=nnx.Rngs(0)))
    paths = ["/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model))]
    assert {optimizer.group_of(path) for path in paths} == set(optimizer.GROUPS)
    assert {path.rpartition("/")[2] for path in paths if optimizer.is_decayed(path)} == {
        "kernel",
        "embedding",
        "lora_in",
        "lora_out",
    }


def test_a_parameter_outside_the_groups_is_rejected():
    with pytest.raises(ValueError, match="'audio/kernel' is in no group"):
        optimizer.group_of("audio/kernel")


def test_a_parameter_without_decay_rule_is_rejected():
    with pytest.raises(ValueError, match="'text/gain': its last name must be one of"):
        optimizer.is_decayed("text/gain")


@pytest.mark.parametrize("group", sorted(optimizer.GROUPS))
def test_frozen_parameters_have_no_optimizer_state(group):
    rule = Optimizer(OptimConfig(freeze=(group,)), steps=1)
    trained, frozen = rule.split(PARAMS)
    assert frozen
    assert {optimizer.group_of(path) for path in frozen} == {group}
    moments = [x for x in jax.tree.leaves(rule.transformation().init(trained)) if x.ndim]
    assert len(moments) == 2 * len(trained)
    jax.tree.map(np.testing.assert_array_equal, rule.join(trained, frozen), PARAMS)


def test_gates_have_their_own_learning_rate():
    cfg = OptimConfig(lr=1e-3, gate_lr=1e-2, warmup_ratio=0, weight_decay=0, clip_norm=1e9)
    before, after = update(cfg, gradient=1.0)
    for path in before:
        lr = 1e-2 if "/gates/" in path else 1e-3  # Adam's first update is lr x sign of the gradient
        np.testing.assert_allclose(before[path] - after[path], lr, rtol=1e-3)


def test_weight_decay_leaves_norms_and_biases_alone():
    cfg = OptimConfig(lr=0.1, warmup_ratio=0, weight_decay=0.5)
    before, after = update(cfg, gradient=0.0)
    for path in before:
        kept = 1.0 if path.endswith(("bias", "scale")) else 1 - 0.1 * 0.5
        np.testing.assert_allclose(after[path], kept * before[path], rtol=1e-6)


def test_gradients_are_clipped_by_their_norm_over_all_trained_parameters():
    rule = Optimizer(OptimConfig(lr=1.0, clip_norm=0.5, freeze=("decoder",)), steps=1)
    trained, _ = rule.split(PARAMS)
    tx = rule.transformation()
    grads = jax.tree.map(lambda x: jnp.full_like(x, 7.0), trained)
    _, state = tx.update(grads, tx.init(trained), trained)
    moments = optax.tree.get(state, "mu")  # (1 - b1) x the clipped gradient
    np.testing.assert_allclose(optax.tree.norm(moments), 0.1 * 0.5, rtol=1e-5)


def test_learning_rate_warms_up_linearly_and_decays_to_its_floor():
    rule = Optimizer(OptimConfig(warmup_ratio=0.1, final_lr_ratio=0.2), steps=100)
    rates = np.array([rule.learning_rate(2.0)(jnp.int32(i)) for i in range(101)])
    np.testing.assert_allclose(rates[:10], 2.0 * np.arange(1, 11) / 10, rtol=1e-6)
    np.testing.assert_allclose(rates[55], 2.0 * (0.2 + 0.8 * 0.5), rtol=1e-6)  # halfway down
    np.testing.assert_allclose(rates[100], 0.4, rtol=1e-6)
    assert (np.diff(rates[10:]) <= 0).all()
