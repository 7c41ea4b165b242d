"""Files agree with the safetensors library; no damaged file is read, crashes or costs memory."""

import json
import struct
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from convert.hf.safetensors import Spec, create_file, read_header
from videonsa_jax.errors import UserError

TENSORS = {
    "layers.0.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "layers.0.bias": np.arange(3, dtype=np.float16),
    "scalar": np.array(7, np.int64),
    "empty": np.zeros((0, 5), np.float32),
    "flags": np.array([True, False, True]),
}


def write(path, header, data=b"", length=None):
    """A file of this header, a dict or bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_files_of_the_library_are_read(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file(TENSORS, path, {"format": "pt"})
    stored = read_header(path)
    assert stored.keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        assert stored[name].nbytes == value.nbytes
        np.testing.assert_array_equal(stored[name].read(), value, strict=True)
        np.testing.assert_array_equal(stored[name].map(), value, strict=True)
    rows = stored["layers.0.weight"].read(slice(1, 3))
    np.testing.assert_array_equal(rows, TENSORS["layers.0.weight"][1:3], strict=True)


def test_the_library_reads_files_written_in_pieces(tmp_path):
    path = tmp_path / "x.safetensors"
    specs = [Spec(name, value.dtype, value.shape) for name, value in TENSORS.items()]
    for name, tensor in create_file(path, specs, {"format": "pt"}).items():
        tensor.map(writable=True)[...] = TENSORS[name]
    with safetensors.safe_open(path, "numpy") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(TENSORS)
        for name, value in TENSORS.items():
            np.testing.assert_array_equal(file.get_tensor(name), value, strict=True)


@pytest.mark.torch
def test_bfloat16_is_that_of_torch(tmp_path):
    torch = pytest.importorskip("torch", reason="needs PyTorch (see the test extra)")
    from safetensors.torch import load_file, save_file

    value = np.linspace(-3, 3, 10, dtype=np.float32).reshape(2, 5)
    theirs, ours = tmp_path / "theirs.safetensors", tmp_path / "ours.safetensors"
    save_file({"x": torch.from_numpy(value).bfloat16()}, theirs)
    stored = read_header(theirs)["x"]
    assert stored.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(stored.read(), value.astype(ml_dtypes.bfloat16), strict=True)
    created = create_file(ours, [Spec("x", stored.dtype, stored.shape)], {"format": "pt"})
    created["x"].map(writable=True)[...] = stored.read()
    assert torch.equal(load_file(ours)["x"], torch.from_numpy(value).bfloat16())


def test_a_created_file_is_filled_through_maps(tmp_path):
    value = TENSORS["layers.0.weight"]
    spec = Spec("x", value.dtype, value.shape)
    stored = create_file(tmp_path / "x.safetensors", [spec], {})["x"]
    stored.map(writable=True).T[1:3] = value.T[1:3]
    want = np.zeros_like(value)
    want[:, 1:3] = value[:, 1:3]
    np.testing.assert_array_equal(read_header(stored.file)["x"].read(), want)


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, np.uint16])
def test_small_dtypes_are_read_without_pytorch(tmp_path, dtype):
    value = np.arange(12).reshape(3, 4).astype(dtype)
    safetensors.numpy.save_file({"x": value}, tmp_path / "x.safetensors")
    stored = read_header(tmp_path / "x.safetensors")["x"]
    np.testing.assert_array_equal(stored.read(slice(1, 3)), value[1:3], strict=True)
    np.testing.assert_array_equal(stored.map(), value, strict=True)


ONE = {"x": entry()}
BAD_HEADERS = {  # header, tensors' bytes, message
    "no file": (None, b"", "No such file"),
    "empty": (b"", None, "header too small"),
    "not json": (b"{'x': 1}", b"", "invalid JSON"),
    "not utf-8": (b'{"\xff": 1}', b"", "invalid UTF-8"),
    "too deep": (b'{"x":' + b"[" * 200_000, b"", "recursion limit"),
    "long integer": (b'{"x": ' + b"9" * 5000 + b"}", b"", "number out of range"),
    "a list": (b"[]", b"", "invalid type: sequence"),
    "leading space": (b' {"x": 1}', b"", "invalid JSON"),
    "metadata": ({"__metadata__": {"format": 1}}, b"", "expected a string"),
    "named twice": (b'{"x": {}, "x": {}}', b"", "missing field"),
    "key missing": ({"x": {"dtype": "F32", "shape": []}}, b"", "missing field `data_offsets`"),
    "no object": ({"x": 3}, b"", "invalid type: integer `3`"),
    "dtype": ({"x": entry("F31")}, bytes(8), "unknown variant `F31`"),
    "dtype type": ({"x": entry(["F32"])}, bytes(8), "invalid type"),
    "negative": ({"x": entry(shape=(-2,))}, bytes(8), "integer `-2`"),
    "fraction": ({"x": entry(shape=(2.0,))}, bytes(8), "floating point `2.0`"),
    "boolean": ({"x": entry(shape=(True, 2))}, bytes(8), "boolean `true`"),
    "shape type": (ONE | {"x": ONE["x"] | {"shape": 2}}, bytes(8), "integer `2`"),
    "rank": ({"x": entry(shape=(1,) * 40, offsets=(0, 4))}, bytes(4), "more than an array can"),
    "too large": ({"x": entry(shape=(2**63, 0), offsets=(0, 0))}, b"", "more than an array can"),
    "no dtype of NumPy": ({"x": entry("F8_E8M0", (8,))}, bytes(8), "dtype F8_E8M0, expected one"),
    "overflow": ({"x": entry(shape=(2**62, 2**62, 0))}, b"", "overflow"),
    "many": ({"x": entry(shape=(2**40,))}, bytes(8), "invalid shape"),
    "backwards": ({"x": entry(offsets=(8, 0))}, bytes(8), "invalid offset for tensor `x`"),
    "three offsets": ({"x": entry(offsets=(0, 4, 8))}, bytes(8), "invalid length 3"),
    "overlap": (ONE | {"y": entry(offsets=(4, 12))}, bytes(12), "invalid offset for tensor `y`"),
    "same bytes": (ONE | {"y": entry()}, bytes(8), "invalid offset for tensor"),
    "gap": (ONE | {"y": entry(offsets=(12, 20))}, bytes(20), "invalid offset for tensor `y`"),
    "late start": ({"x": entry(offsets=(4, 12))}, bytes(12), "invalid offset for tensor `x`"),
    "truncated": (ONE, bytes(7), "it is truncated"),
    "trailing": (ONE, bytes(9), "bytes that belong to no tensor"),
}


@pytest.mark.parametrize(("header", "data", "message"), BAD_HEADERS.values(), ids=BAD_HEADERS)
def test_a_bad_header_is_refused_in_one_line(tmp_path, header, data, message):
    path = tmp_path / "x.safetensors"
    if data is None:
        path.touch()
    elif header is not None:
        write(path, header, data)
    with pytest.raises(UserError, match=message) as error:
        read_header(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500 + len(str(path))


@pytest.mark.parametrize("length", [9, 2**20, 100_000_001, 2**64 - 1])
def test_a_header_longer_than_the_file_is_refused(tmp_path, length):
    path = write(tmp_path / "x.safetensors", b"{}      ", length=length)
    with pytest.raises(UserError, match=r"invalid header length|header too large"):
        read_header(path)


def test_a_file_cut_after_its_header_was_read_is_named(tmp_path):
    path = write(tmp_path / "x.safetensors", ONE, bytes(8))
    tensor = read_header(path)["x"]
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match="tensor 'x' ends 4 bytes early"):
        tensor.read()


ODD = [
    -1,
    0,
    1,
    3,
    4,
    2**31,
    2**63,
    2**64,
    10**30,
    1.5,
    "F16",
    "BF16",
    "",
    None,
    True,
    [],
    {},
    [[]],
]


def damaged(rng, header: dict, data: bytes) -> bytes:
    """The file with one or two bytes, its length, its end or a value of its header changed."""
    kind = rng.integers(4)
    if kind == 3:
        header = json.loads(json.dumps(header))
        tensor = header[rng.choice(list(header))]
        key = str(rng.choice(["dtype", "shape", "data_offsets", "extra"]))
        value = ODD[rng.integers(len(ODD))]
        if isinstance(tensor.get(key), list) and tensor[key] and rng.integers(2):
            tensor[key][rng.integers(len(tensor[key]))] = value
        else:
            tensor[key] = value
    text = json.dumps(header).encode()
    file = bytearray(struct.pack("<Q", len(text)) + text + data)
    if kind == 0:
        return bytes(file[: rng.integers(len(file))])
    if kind in (1, 2):
        end = 8 if kind == 2 else len(file)
        for _ in range(rng.integers(1, 3)):
            file[rng.integers(end)] = rng.integers(256)
    return bytes(file)


def test_damaged_files_give_clear_errors_or_valid_tensors(tmp_path):
    path, rng = tmp_path / "x.safetensors", np.random.default_rng(0)
    safetensors.numpy.save_file(TENSORS, path)
    file = path.read_bytes()
    length = int.from_bytes(file[:8], "little")
    header, data = json.loads(file[8 : 8 + length]), file[8 + length :]
    messages = []
    for _ in range(2500):
        path.write_bytes(content := damaged(rng, header, data))
        tracemalloc.start()
        try:
            stored = read_header(path)
            assert sum(x.read().nbytes for x in stored.values()) <= len(content)
        except UserError as error:
            messages.append(str(error))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2**18 + 100 * len(content)
    assert all(text.startswith(f"{path}: ") and "\n" not in text for text in messages)
    assert (
        1500 < len(messages) < 2500
    )  # a changed byte of a tensor or of a name is no damage to see
