"""What a Mosaic kernel takes of VMEM is read from the program that libtpu compiled."""

import types

import pytest

from benchmarks.aot import tpu

KERNEL = (
    "  ROOT %{name} = bf16[4,128]{{1,0:T(8,128)(2,1)}} custom-call(%q.1), "
    'custom_call_target="tpu_custom_call", metadata={{op_name="jit(f)/jit(g)/window/pallas_call" '
    'stack_frame_id=2}}, backend_config={{"scoped_memory_configs":[],{taken}"retry_config":'
    '{{"retry_count":"0"}}}}\n'
)
TAKEN = '"used_scoped_memory_configs":[{{"memory_space":"1","offset":"0","size":"{size}"}}],'


def program(*lines):
    return types.SimpleNamespace(as_text=lambda: "HloModule m\n" + "".join(lines))


def uses(*lines):
    return tpu.kernels(None, program(*lines), "")[0]


@pytest.fixture(autouse=True)
def _libtpu(monkeypatch):
    monkeypatch.setattr(tpu.importlib.metadata, "version", lambda name: "1.2")


def test_calls_of_one_kernel_are_one_row_with_the_most_that_they_take():
    lines = [
        KERNEL.format(name=f"window.{i}", taken=TAKEN.format(size=size))
        for i, size in enumerate((1000, 3000, 2000))
    ]
    (use,) = uses(*lines)
    assert (use.name, use.vmem_bytes, use.registers) == ("window", 3000, None)


def test_the_kernel_of_a_gradient_has_its_own_name():
    line = KERNEL.format(name="transpose_jvp_window__.1", taken=TAKEN.format(size=1))
    (use,) = uses(line.replace("jit(g)/window/", "transpose(jvp(window_bwd))/"))
    assert use.name == "window_bwd"


def test_annotations_over_several_lines_do_not_hide_a_kernel():
    line = KERNEL.format(name="splash.1", taken=TAKEN.format(size=1000))
    metadata = 'frontend_attributes={kernel_metadata={\n"a":"{}"\n}}, metadata='
    (use,) = uses(line.replace("metadata=", metadata, 1))
    assert use.vmem_bytes == 1000


def test_too_much_is_a_problem():
    (use,) = uses(KERNEL.format(name="window.1", taken=TAKEN.format(size=200 * 2**20)))
    (problem,) = tpu.problems(use, "bfloat16", "TPU v5")
    assert "takes 209715200 bytes of VMEM" in problem


def test_a_kernel_of_unknown_size_is_an_error():
    with pytest.raises(ValueError, match="does not say what window"):
        uses(KERNEL.format(name="window", taken=""))
