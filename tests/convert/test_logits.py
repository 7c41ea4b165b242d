"""`python -m convert logits` computes what the model computes, in the inputs' own layout."""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert import logits
from tests import small_models
from tests.small_models import IMAGE, VIDEO, VOCAB, Vision
from videonsa_jax.data import hf_inputs
from videonsa_jax.errors import UserError
from videonsa_jax.model.attention_modes import ATTENTION
from videonsa_jax.training import checkpoint

CLIP, PHOTO = Vision((3, 6, 10), seconds=1.5), Vision((1, 10, 6), is_video=False)
PROMPTS = [[5, CLIP, 4], [9], [2, PHOTO, 1, PHOTO, 3]]
MODES = sorted(ATTENTION)
CFG = small_models.config(heads=6, kv_heads=2, attention="paper")


def run(*argv) -> int:
    parser = argparse.ArgumentParser()
    logits.add_arguments(parser)
    return logits.run(parser.parse_args([str(arg) for arg in argv]))


@pytest.fixture(scope="module")
def params():
    return small_models.random_params(CFG, 0)


@pytest.fixture(scope="module")
def folder(params, tmp_path_factory):
    """A checkpoint in bfloat16, as conversion keeps it, whose own mode is `paper`."""
    folder = tmp_path_factory.mktemp("logits")
    checkpoint.save_params(folder, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params), CFG)
    return folder


@pytest.fixture(scope="module")
def arrays():
    return small_models.inputs(PROMPTS, CFG, padding="left", seed=3)


def _written(folder, tmp_path, arrays, *flags) -> np.ndarray:
    np.savez(tmp_path / "in.npz", **arrays)
    assert run(folder, tmp_path / "in.npz", tmp_path / "out.npz", *flags) == 0
    with np.load(tmp_path / "out.npz", allow_pickle=False) as file:
        assert file.files == ["logits"]
        return file["logits"]


def _expected(params, attention, arrays) -> np.ndarray:
    """By a model in memory, one row at a time, in slots that are wider than needed."""
    cfg = small_models.config(heads=6, kv_heads=2, attention=attention)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params)
    model = small_models.build(cfg, params)
    samples, columns = hf_inputs.to_samples(arrays, cfg)
    like = small_models.batch([[sample] for sample in samples], cfg, spare=5)
    step = jax.jit(lambda model, batch: model.logits(model(batch)[0]))
    values = [step(model, small_models.batch([[sample]], cfg, like=like)) for sample in samples]
    length = arrays["input_ids"].shape[1]
    return hf_inputs.to_columns(np.concatenate(values), columns, length)


@pytest.mark.parametrize("attention", ["dense", "paper"])
def test_logits_are_those_of_the_model(folder, params, arrays, tmp_path, attention):
    got = _written(folder, tmp_path, arrays, f"--attention={attention}")
    want = _expected(params, attention, arrays)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())
    vision = np.isin(arrays["input_ids"], [IMAGE, VIDEO])
    silent = vision | (arrays["attention_mask"] == 0)
    assert not got[silent].any()
    assert got[~silent].any(axis=-1).all()


@pytest.mark.slow
def test_every_mode_of_the_config_is_offered(folder, tmp_path):
    prompt = small_models.inputs([[2, Vision((1, 4, 4)), 3]], CFG, padding="left", seed=0)
    got = {mode: _written(folder, tmp_path, prompt, f"--attention={mode}") for mode in MODES}
    assert {"dense", "paper", "released"} <= got.keys()
    for mode in MODES:
        assert np.isfinite(got[mode]).all()
        assert [x for x in MODES if np.array_equal(got[x], got[mode])] == [mode]


def test_the_side_of_padding_changes_nothing(folder, arrays, tmp_path):
    left = _written(folder, tmp_path, arrays)
    right = small_models.inputs(PROMPTS, CFG, padding="right", seed=3)
    got = _written(folder, tmp_path, right)
    by_row = [a["attention_mask"].astype(bool) for a in (arrays, right)]
    for row in range(len(PROMPTS)):
        np.testing.assert_array_equal(got[row, by_row[1][row]], left[row, by_row[0][row]])


def test_the_checkpoints_own_mode_is_the_default(folder, arrays, tmp_path):
    modes = {
        mode: _written(folder, tmp_path, arrays, f"--attention={mode}")
        for mode in ("paper", "dense")
    }
    np.testing.assert_array_equal(_written(folder, tmp_path, arrays), modes["paper"])
    assert not np.array_equal(modes["paper"], modes["dense"])


def test_text_alone_needs_no_other_array(folder, tmp_path):
    ids = np.arange(2, 14).reshape(2, 6)
    got = _written(folder, tmp_path, {"input_ids": ids}, "--attention=dense")
    assert got.shape == (2, 6, VOCAB)
    assert np.isfinite(got).all()


def _set(name, index, value):
    def change(arrays):
        arrays[name] = arrays[name].copy()
        arrays[name][index] = value

    return change


BAD = {
    "no_ids": (lambda a: a.pop("input_ids"), "input_ids is missing"),
    "ids_rank": (lambda a: a.update(input_ids=a["input_ids"][0]), r"input_ids has shape .*\[B T\]"),
    "ids_dtype": (
        lambda a: a.update(input_ids=a["input_ids"] * 1.0),
        "input_ids has dtype float64",
    ),
    "id": (_set("input_ids", (0, -1), 999), "input_ids holds 999; the vocabulary is 0 to 96"),
    "mask_shape": (
        lambda a: a.update(attention_mask=np.ones((3, 2), int)),
        "attention_mask has sh",
    ),
    "mask_value": (_set("attention_mask", (0, 0), 2), "attention_mask holds values other than"),
    "empty_row": (_set("attention_mask", 1, 0), "attention_mask is 0 all over row 1"),
    "no_grid": (lambda a: a.pop("video_grid_thw"), "video_grid_thw is missing, but pixel_values_v"),
    "no_pixels": (lambda a: a.pop("pixel_values"), "pixel_values is missing, but image_grid_thw"),
    "pixels_shape": (
        lambda a: a.update(pixel_values=a["pixel_values"][1:]),
        "pixel_values has shape",
    ),
    "pixels_nan": (_set("pixel_values", (0, 0), np.nan), "pixel_values holds values that are not"),
    "odd_grid": (_set("image_grid_thw", (0, 1), 5), "image_grid_thw=.*must be positive"),
    "placeholders": (
        _set("input_ids", (0, -4), VIDEO),
        "input_ids holds 46 placeholders 91; video_g",
    ),
    "seconds": (lambda a: a.update(second_per_grid_ts=np.ones(2)), "second_per_grid_ts has shape"),
    "pickled": (lambda a: a.update(input_ids=np.array([[1, None]])), "[Oo]bject arrays"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_bad_arrays_are_named(folder, arrays, tmp_path, change, message):
    arrays = dict(arrays)
    change(arrays)
    np.savez(tmp_path / "in.npz", **arrays)
    with pytest.raises(UserError, match=message) as error:
        run(folder, tmp_path / "in.npz", tmp_path / "out.npz")
    assert str(tmp_path / "in.npz") in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out.npz").exists()


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x03\x04 half a zip", None])
def test_files_that_are_no_npz_are_named(folder, tmp_path, content):
    path = tmp_path / "in.npz"
    if content is None:
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"in\.npz"):
        run(folder, path, tmp_path / "out.npz")


def test_missing_files_are_named(folder, arrays, tmp_path):
    np.savez(tmp_path / "in.npz", **arrays)
    for argv, message in (
        ((folder, tmp_path / "no.npz", tmp_path / "out.npz"), r"no\.npz"),
        ((tmp_path / "nothing", tmp_path / "in.npz", tmp_path / "out.npz"), "nothing"),
        ((folder, tmp_path / "in.npz", tmp_path / "nowhere" / "out.npz"), "nowhere"),
    ):
        with pytest.raises(UserError, match=message):
            run(*argv)
