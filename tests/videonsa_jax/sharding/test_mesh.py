"""Meshes have named axes and use every device."""

import jax
import pytest

from videonsa_jax.errors import UserError
from videonsa_jax.sharding.mesh import make_mesh
from videonsa_jax.sharding.mesh_config import MeshConfig


def test_axes_are_named_and_sized():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    assert dict(mesh.shape) == {"dcn": 1, "data": 2, "fsdp": 2, "tensor": 2, "context": 1}


def test_a_product_other_than_the_device_count_is_rejected():
    with pytest.raises(UserError, match=r"data=1 x fsdp=3 x .* is 3 devices, but there are 8"):
        make_mesh(MeshConfig(fsdp=3))


def test_the_nearest_mesh_is_proposed():
    with pytest.raises(UserError, match=r"12 devices, but there are 8; .*--config.mesh.data=2$"):
        make_mesh(MeshConfig(data=3, fsdp=2, tensor=2))


def test_groups_of_devices_on_the_slower_network_are_outermost():
    mesh = make_mesh(MeshConfig(dcn=2, fsdp=4))
    assert mesh.devices.shape == (2, 1, 4, 1, 1)
    first, second = ({device.id for device in group.flat} for group in mesh.devices)
    assert max(first) < min(second)


def test_slices_of_tpus_are_groups():
    class Device:
        slice_index = 0

    class Other:
        slice_index = 1

    with pytest.raises(
        UserError, match=r"dcn=1, but the devices are 2 slices.*--config.mesh.dcn=2"
    ):
        make_mesh(MeshConfig(fsdp=2), [Device(), Other()])


def test_a_mesh_may_use_some_devices():
    assert make_mesh(MeshConfig(data=2), jax.devices()[:2]).size == 2


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_the_default_mesh_takes_all_devices(devices):
    mesh = make_mesh(MeshConfig(), jax.devices()[:devices])
    assert mesh.shape["fsdp"] == mesh.size == devices


def test_one_axis_takes_what_the_others_leave():
    mesh = make_mesh(MeshConfig(data=-1, fsdp=2, tensor=2))
    assert mesh.shape["data"] == 2


def test_axes_that_leave_a_part_of_a_device_are_rejected():
    with pytest.raises(UserError, match=r"tensor=3 .* is 6 devices, but there are 8"):
        make_mesh(MeshConfig(tensor=3))


@pytest.mark.parametrize("sizes", [{"data": -1}, {"fsdp": 0}, {"tensor": -2}])
def test_sizes_that_mean_nothing_are_rejected(sizes):
    with pytest.raises(ValueError, match="one of them may be -1"):
        MeshConfig(**sizes)
