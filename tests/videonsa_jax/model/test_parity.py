"""Dense mode is stock Qwen2.5-VL: features, logits and greedy continuations equal PyTorch's."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch", reason="parity needs PyTorch (see the test extra)")
pytest.importorskip("transformers", reason="parity needs transformers (see the test extra)")

import torch

from convert.models.qwen2_5_vl import rows as qwen2_5_vl
from tests import hf_folder, huggingface, small_models
from tests.small_models import IMAGE, VIDEO, Vision
from videonsa_jax.data import hf_inputs
from videonsa_jax.model.generate import generate

pytestmark = pytest.mark.torch

RELATIVE = 1e-4  # of the largest value compared


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of a model and a batch of prompts for it."""

    heads: int
    kv_heads: int
    tied: bool
    prompts: list
    padding: str = "left"


PHOTO = Vision((1, 10, 6), is_video=False)
CLIP = Vision((3, 6, 10), seconds=1.5)
SHORT = Vision((2, 4, 14))
LONG = Vision((3, 6, 10), seconds=9.0)

CASES = {
    "group_2_video": Case(4, 2, False, [[5, CLIP, 4]]),
    "group_1_tied_image": Case(3, 3, True, [[4, PHOTO, 7]]),
    "group_7_odd_grid": Case(7, 1, False, [[3, Vision((4, 10, 10), seconds=0.4), 6]]),
    "two_videos_and_an_image": Case(4, 2, True, [[3, CLIP, 2, PHOTO, SHORT, 5]]),
    "left_padded": Case(6, 2, False, [[5, CLIP, 4], [9], [2, PHOTO, 1, PHOTO, 3]]),
    "right_padded": Case(6, 2, False, [[5, CLIP, 4], [9], [2, PHOTO, 1, PHOTO, 3]], "right"),
    # Times run far past height and width, so that ids after the video are below the video's.
    "long_videos": Case(4, 2, False, [[5, LONG, 4], [2, PHOTO, 1, LONG, 3], [3, LONG, SHORT, 2]]),
    "text_only": Case(14, 2, True, [[8], [5]]),
}


def _close(got: np.ndarray, want: np.ndarray) -> None:
    np.testing.assert_allclose(got, want, rtol=0, atol=RELATIVE * np.abs(want).max())


@pytest.fixture(params=CASES, scope="module")
def pair(request):
    """Both models and their inputs: once as the case pads them, once padded on the left."""
    case = CASES[request.param]
    cfg = small_models.config(heads=case.heads, kv_heads=case.kv_heads, tied=case.tied)
    cfg = dataclasses.replace(cfg, position_advance="spatial")  # as transformers 5 does
    seed = list(CASES).index(request.param)
    theirs = huggingface.torch_model(cfg, seed)
    params = small_models.random_params(cfg, seed)  # of the gates, which stock Qwen2.5-VL has not
    tensors = huggingface.tensors(theirs)
    for path, value in hf_folder.to_jax(tensors, qwen2_5_vl.rows(cfg)).items():
        *parents, name = path.split("/")
        owner = functools.reduce(dict.__getitem__, parents, params)
        assert owner[name].shape == value.shape, path
        owner[name] = jnp.asarray(value)
    ours = small_models.build(cfg, params)
    sides = (case.padding, "left")
    arrays = [small_models.inputs(case.prompts, cfg, padding=side, seed=seed) for side in sides]
    return theirs, ours, *arrays


def _batch(arrays, cfg):
    return small_models.batch([[s] for s in hf_inputs.to_samples(arrays, cfg)[0]], cfg)


def test_logits_equal(pair):
    theirs, ours, arrays, _ = pair
    with torch.no_grad():
        want = theirs(**huggingface.torch_inputs(arrays)).logits.numpy()
    batch, columns = _batch(arrays, ours.cfg), hf_inputs.to_samples(arrays, ours.cfg)[1]
    got = jax.jit(lambda model, batch: model.logits(model(batch)[0]))(ours, batch)
    got = hf_inputs.to_columns(np.asarray(got), columns, arrays["input_ids"].shape[1])
    text = arrays["attention_mask"].astype(bool)
    text &= ~np.isin(arrays["input_ids"], [IMAGE, VIDEO])
    assert np.isfinite(got).all()
    _close(got[text], want[text])


@pytest.mark.parametrize("pair", [name for name in CASES if name != "text_only"], indirect=True)
def test_vision_features_equal(pair):
    theirs, ours, arrays, _ = pair
    batch = _batch(arrays, ours.cfg)
    features = np.asarray(jax.jit(lambda model, batch: model.vision(batch))(ours, batch))
    got = features[np.asarray(batch.vision_order) >= 0]  # of all rows, in sequence order
    ids = arrays["input_ids"][np.isin(arrays["input_ids"], [IMAGE, VIDEO])]
    for pixels, grids, token in (
        ("pixel_values_videos", "video_grid_thw", VIDEO),
        ("pixel_values", "image_grid_thw", IMAGE),
    ):
        if grids not in arrays:
            continue
        with torch.no_grad():
            output = theirs.model.visual(
                torch.from_numpy(arrays[pixels]), torch.from_numpy(arrays[grids])
            )
        _close(got[ids == token], output.pooler_output.numpy())


def test_greedy_continuations_equal(pair):
    theirs, ours, arrays, left_padded = pair  # transformers can only continue the latter
    prompt = left_padded["input_ids"].shape[1]
    inputs = huggingface.torch_inputs(left_padded)
    want = theirs.generate(**inputs, max_new_tokens=16, do_sample=False)[:, prompt:]
    got = generate(ours, _batch(arrays, ours.cfg), max_new_tokens=16)
    np.testing.assert_array_equal(got, want.numpy())
