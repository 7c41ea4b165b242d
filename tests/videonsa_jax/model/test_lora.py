"""Adapters start as nothing, are trained alone, and are merged when weights are exported."""

import argparse
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util

import train
from convert import to_hf
from convert.hf import directory
from tests import synthetic
from videonsa_jax.batch import Batch
from videonsa_jax.config.schema import LoRAConfig
from videonsa_jax.errors import UserError
from videonsa_jax.training import checkpoint
from videonsa_jax.training import state as state_lib
from videonsa_jax.training.optimizer import is_adapter

LORA = LoRAConfig(rank=4, alpha=8.0, targets=("q", "o", "up", "down"))
RUN = synthetic.run_config()
ADAPTED = dataclasses.replace(synthetic.MODEL, lora=LORA)
BASE = ("vision", "merger", "decoder", "gates")  # all but the adapters


def _flat(params):
    return {path: np.asarray(x) for path, x in traverse_util.flatten_dict(params, sep="/").items()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run that trains adapters over given weights, and the weights of both."""
    folder = tmp_path_factory.mktemp("lora")
    build = jax.jit(lambda: nnx.to_pure_dict(nnx.state(state_lib.build_model(RUN))))
    base = build()
    checkpoint.save_params(folder / "base", base, synthetic.MODEL)
    cfg = synthetic.run_config(
        model=ADAPTED, optim={"freeze": BASE}, train={"steps": 2, "init_from": str(folder / "base")}
    )
    data, devices = synthetic.Batches(), jax.devices()[:1]
    adapted = train.run(cfg, folder / "adapted", data=data, devices=devices)
    return folder / "adapted", _flat(base), _flat(adapted.params)


def test_only_adapters_are_trained(trained):
    _, base, adapted = trained
    added = adapted.keys() - base.keys()
    assert len(added) == 2 * len(LORA.targets)
    assert all(is_adapter(path) for path in added)
    assert all(np.array_equal(adapted[path], base[path]) for path in base)
    assert all(adapted[path].any() for path in added)  # lora_out began at 0


def test_an_untrained_adapter_changes_nothing_and_a_trained_one_does(trained):
    _, base, adapted = trained
    fresh = {
        path: np.zeros_like(x) if path.endswith("lora_out") else x for path, x in adapted.items()
    }
    want, same, other = (_hidden(x) for x in (base, fresh, adapted))
    np.testing.assert_allclose(same, want, rtol=0, atol=1e-5)
    assert np.abs(other - want).max() > 1e-3


def test_merged_weights_compute_the_same(trained, tmp_path):
    folder, base, adapted = trained
    code = to_hf.run(_arguments(folder, tmp_path / "hf"))
    assert code == 0
    source = directory.open_hf(tmp_path / "hf")
    tensors = source.tensors
    kernel = tensors["model.layers.1.mlp.up_proj.weight"].map()
    path = "text/layers/mlp/up"
    change = 2.0 * adapted[f"{path}/lora_in"][1] @ adapted[f"{path}/lora_out"][1]
    np.testing.assert_allclose(kernel.T, base[f"{path}/kernel"][1] + change, rtol=0, atol=1e-6)
    assert not any("lora" in name for name in tensors)


def _arguments(source, destination):
    parser = argparse.ArgumentParser()
    to_hf.add_arguments(parser)
    return parser.parse_args([str(source), str(destination)])


def _hidden(flat):
    lora = LORA if any(map(is_adapter, flat)) else LoRAConfig()
    cfg = dataclasses.replace(RUN, model=dataclasses.replace(synthetic.MODEL, lora=lora))
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: state_lib.build_model(cfg)))

    def run(params, batch):
        return nnx.merge(graphdef, params)(batch)[0]

    batch = Batch(**synthetic.batch(0, rows=1), frame_patches=synthetic.FRAME_PATCHES)
    jitted = jax.jit(run, compiler_options=synthetic.FAST_COMPILE)
    return np.asarray(jitted(traverse_util.unflatten_dict(flat, sep="/"), batch))


def test_weights_that_lack_more_than_adapters_are_refused(trained):
    folder, *_ = trained
    with pytest.raises(UserError, match="text/extra/kernel is missing"):
        checkpoint.load_params(
            folder,
            {"text": {"extra": {"kernel": jax.ShapeDtypeStruct((1,), jnp.float32)}}},
            may_lack=is_adapter,
        )


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"rank": -1}, "rank=-1 must not be negative"), ({"rank": 2, "targets": ()}, "is empty")],
)
def test_bad_settings_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        LoRAConfig(**fields)
