"""Parameters and batches lie on the mesh as the rules say, or an error says why not."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from tests import synthetic
from videonsa_jax.config import schema as config
from videonsa_jax.errors import UserError
from videonsa_jax.sharding import rules, shard
from videonsa_jax.sharding.mesh import abstract_mesh, make_mesh
from videonsa_jax.sharding.mesh_config import MeshConfig
from videonsa_jax.sharding.rules import Rules
from videonsa_jax.training import state as state_lib

KERNEL_SPECS = {  # preset -> spec of text/layers/{attn/q [l d n h], mlp/down [l f d]}/kernel
    "dp": ((None, None, None, None), (None, None, None)),
    "fsdp": ((None, "fsdp", None, None), (None, None, "fsdp")),
    "hsdp": ((None, "fsdp", None, None), (None, None, "fsdp")),
    "tp": ((None, None, "tensor", None), (None, "tensor", None)),
    "fsdp_tp": ((None, "fsdp", "tensor", None), (None, "tensor", "fsdp")),
    "fsdp_cp": ((None, ("fsdp", "context"), None, None), (None, None, ("fsdp", "context"))),
    "fsdp_tp_cp": (
        (None, ("fsdp", "context"), "tensor", None),
        (None, "tensor", ("fsdp", "context")),
    ),
}


def layouts_of(preset: str, mesh: MeshConfig, model: str) -> list[shard.ParamLayout]:
    cfg = synthetic.run_config(model=config.PRESETS[model], sharding=rules.PRESETS[preset])
    return state_lib.abstract_model(cfg, make_mesh(mesh))[1]


def test_every_preset_is_tested():
    assert synthetic.MESHES.keys() == KERNEL_SPECS.keys() == rules.PRESETS.keys()


@pytest.mark.parametrize("model", ["tiny", "qwen2_5_vl_7b"])
@pytest.mark.parametrize("preset", sorted(synthetic.MESHES))
def test_parameters_are_split_as_written(preset, model):
    layouts = {x.path: x for x in layouts_of(preset, synthetic.MESHES[preset], model)}
    query, down = KERNEL_SPECS[preset]
    assert layouts["text/layers/attn/q/kernel"].sharding.spec == PartitionSpec(*query)
    assert layouts["text/layers/mlp/down/kernel"].sharding.spec == PartitionSpec(*down)
    assert layouts["text/norm/scale"].sharding.spec == PartitionSpec(None)


def test_bytes_per_device_count_the_shard():
    whole, split = (
        sum(
            x.bytes_per_device
            for x in layouts_of(preset, synthetic.MESHES[preset], "qwen2_5_vl_7b")
        )
        for preset in ("dp", "fsdp")
    )
    size = sum(x.size for x in layouts_of("dp", synthetic.MESHES["dp"], "qwen2_5_vl_7b"))
    assert whole == 4 * size
    assert split < whole / 7.9  # all but norms and biases


def test_the_table_lists_every_parameter_and_the_total():
    layouts = layouts_of("fsdp_tp", synthetic.MESHES["fsdp_tp"], "tiny")
    lines = shard.describe_layouts(layouts).splitlines()
    assert len(lines) == len(layouts) + 2
    assert "(-, fsdp, tensor, -)" in next(line for line in lines if "text/layers/attn/q/k" in line)
    assert f"{sum(x.size for x in layouts):,}" in lines[-1]


def test_an_uneven_split_names_parameter_and_remedy():
    message = (
        r"text/layers/attn/k/.*: its 'kv_heads' dimension of 4 cannot be split over 8 .* use 4,"
    )
    with pytest.raises(UserError, match=message):
        layouts_of("tp", MeshConfig(tensor=8), "qwen2_5_vl_7b")


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        (
            (1024, 100),
            r"100 text slots cannot be .* 8 devices \(context\).* use 104 slots, or 4 dev",
        ),
        ((1000, 64), "1000 vision slots .* in whole blocks of 64 .* use 1024 slots, or 1 devices"),
        ((256, 64), "256 vision slots .* in whole blocks of 64 .* use 512 slots, or 4 devices"),
    ],
)
def test_a_row_that_would_split_a_block_is_rejected(slots, message):
    mesh = abstract_mesh(MeshConfig(context=8))
    with pytest.raises(UserError, match=message):
        shard.check_rows([(512, 8), slots], 64, rules.PRESETS["fsdp_cp"], mesh)
    shard.check_rows([slots], 64, rules.PRESETS["fsdp"], mesh)


def test_buckets_are_checked_before_parameters_are_laid_out():
    preset = rules.PRESETS["fsdp_cp"]
    data = dataclasses.replace(synthetic.run_config().data, buckets=((48, 16),))
    cfg = synthetic.run_config(sharding=preset, data=data)
    with pytest.raises(UserError, match=r"config.data.buckets: 48 vision slots"):
        state_lib.abstract_model(cfg, abstract_mesh(MeshConfig(context=2)))


def test_an_unknown_mesh_axis_is_named():
    message = r"seq='contxt' names the mesh axis 'contxt', which does not exist; did you mean 'cont"
    with pytest.raises(ValueError, match=message):
        Rules(seq="contxt")


def test_an_idle_mesh_axis_is_rejected():
    with pytest.raises(UserError, match=r"config.mesh.tensor=2, but config.sharding splits noth"):
        layouts_of("fsdp", MeshConfig(fsdp=4, tensor=2), "tiny")


def test_one_mesh_axis_twice_in_a_parameter_is_rejected():
    class Square(nnx.Module):
        def __init__(self):
            self.kernel = nnx.Param(jnp.zeros((8, 8)), logical_axes=("embed", "mlp"))

    state = nnx.state(Square())
    with pytest.raises(ValueError, match="use a mesh axis twice"):
        shard.param_layouts(state, Rules(mlp="fsdp", embed="fsdp"), make_mesh(MeshConfig(fsdp=8)))


def test_a_batch_is_split_by_rows():
    mesh = make_mesh(synthetic.MESHES["fsdp_tp"])
    arrays = synthetic.batch(0)
    batch = shard.global_batch(arrays, 64, Rules(), mesh)
    assert batch.frame_patches == 64
    assert batch.patches.sharding.shard_shape(batch.patches.shape)[0] == 2
    for name, value in arrays.items():
        np.testing.assert_array_equal(getattr(batch, name), value)


def test_slots_are_split_where_the_sequence_is():
    batch = shard.global_batch(
        synthetic.batch(0), 64, rules.PRESETS["fsdp_cp"], make_mesh(synthetic.MESHES["fsdp_cp"])
    )
    assert batch.patches.sharding.shard_shape(batch.patches.shape)[:2] == (2, 64)
    assert batch.text_tokens.sharding.shard_shape(batch.text_tokens.shape) == (2, 8)


def test_rows_that_do_not_divide_are_rejected():
    with pytest.raises(UserError, match="6 rows a step of 16 slots cannot be split"):
        shard.global_batch(
            synthetic.batch(0, rows=6), 64, Rules(), make_mesh(synthetic.MESHES["fsdp"])
        )


def mesh_of(processes, **sizes):
    """8 devices, the first of them in process 0."""
    mesh = abstract_mesh(MeshConfig(**sizes))
    places = np.arange(8) * processes // 8
    devices = [SimpleNamespace(process_index=int(process)) for process in places]
    grid = np.array(devices).reshape(tuple(mesh.shape.values()))
    return SimpleNamespace(axis_names=mesh.axis_names, shape=mesh.shape, devices=grid)


@pytest.mark.parametrize(
    ("processes", "sizes", "indices", "count"),
    [
        (1, {"fsdp": 2, "context": 4}, [0], 1),
        (2, {"fsdp": 2, "context": 4}, [0, 1], 2),
        (4, {"fsdp": 2, "context": 4}, [0, 0, 1, 1], 2),
        (4, {"context": 8}, [0, 0, 0, 0], 1),
        (2, {"data": 2, "fsdp": 4}, [0, 1], 2),
    ],
)
def test_processes_that_share_rows_load_the_same(monkeypatch, processes, sizes, indices, count):
    mesh = mesh_of(processes, **sizes)
    for process, index in enumerate(indices):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        share = shard.row_shard(rules.PRESETS["fsdp_cp"], mesh)
        assert (share.index, share.count) == (index, count)


def test_rows_that_processes_share_in_part_are_rejected():
    with pytest.raises(UserError, match=r"context=4 lets processes share some of their rows"):
        shard.row_shard(rules.PRESETS["fsdp_cp"], mesh_of(3, fsdp=2, context=4))


def test_constraints_need_no_mesh():
    x = jax.numpy.ones((2, 2))
    assert Rules().constrain(x, "batch", None) is x


def test_an_operation_runs_on_each_devices_part():
    """Under a mesh it sees its rows and its heads only; alone it sees everything."""

    def shape_seen(x):
        return jnp.broadcast_to(jnp.array(x.shape[:3], jnp.int32), (*x.shape[:3], 3))

    axes = ("batch", None, "act_heads")
    x = jnp.zeros((8, 5, 4, 2))
    split = Rules().shard_op(shape_seen, [axes], axes)
    assert split is shape_seen
    with jax.set_mesh(make_mesh(synthetic.MESHES["fsdp_tp"])):
        seen = jax.jit(Rules().shard_op(shape_seen, [axes], axes))(x)
    assert seen.shape == (8, 5, 4, 3)
    np.testing.assert_array_equal(seen, np.broadcast_to([2, 5, 2], seen.shape))
