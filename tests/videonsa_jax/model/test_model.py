"""What the model promises whatever the attention mode: sizes, packing, padding, causality."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import small_models
from tests.small_models import Vision
from videonsa_jax.config.schema import PRESETS, ComputeConfig
from videonsa_jax.model.model import VideoNSA
from videonsa_jax.training.loss import next_token_loss

CLIP = Vision((2, 6, 10), seconds=1.5)
PHOTO = Vision((1, 4, 4), is_video=False)
PROMPTS = [[3, CLIP, 4, PHOTO, 5], [2, Vision((3, 4, 6)), 9]]

STOCK_PARAMS = {  # of the published checkpoints
    "qwen2_5_vl_3b": 3_754_622_976,
    "qwen2_5_vl_7b": 8_292_166_656,
    "qwen2_5_vl_32b": 33_452_718_336,
    "qwen2_5_vl_72b": 73_410_777_344,
}


@pytest.fixture(params=["paper", "dense"], scope="module")
def setup(request):
    """A model and two samples for it."""
    cfg = small_models.config(heads=4, kv_heads=2, attention=request.param)
    model = small_models.build(cfg, small_models.random_params(cfg, seed=3))
    arrays = small_models.inputs(PROMPTS, cfg, padding="right", seed=4)
    return model, small_models.samples(arrays, cfg)


@jax.jit
def _logits(model, batch):
    return model.logits(model(batch)[0])


def _close(got, want):
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("preset", STOCK_PARAMS)
def test_published_sizes_have_published_parameter_counts(preset):
    cfg = PRESETS[preset]
    params = small_models.abstract_params(cfg)[1]
    gates = params["text"]["layers"].pop("gates")
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == STOCK_PARAMS[preset]
    d, outputs = cfg.text.d_model, 3 * cfg.text.num_heads
    per_layer = d * d + d + d * outputs + outputs
    assert sum(leaf.size for leaf in jax.tree.leaves(gates)) == cfg.text.num_layers * per_layer


def test_every_parameter_names_its_axes():
    model = nnx.eval_shape(lambda: VideoNSA(PRESETS["tiny"], rngs=nnx.Rngs(0)))
    for path, param in nnx.to_flat_state(nnx.state(model)):
        assert len(param.get_metadata()["logical_axes"]) == len(param.shape), path


def test_packed_rows_equal_separate_rows(setup):
    model, samples = setup
    packed = small_models.batch([samples], model.cfg)
    separate = small_models.batch([[sample] for sample in samples], model.cfg)
    got = _logits(model, packed)[packed.text_order >= 0]
    want = _logits(model, separate)[separate.text_order >= 0]
    _close(got, want)


def test_padding_changes_nothing(setup):
    model, samples = setup
    fit = small_models.batch([samples], model.cfg)
    loose = small_models.batch([samples, []], model.cfg, spare=7)
    got = _logits(model, loose)
    assert np.isfinite(got).all()
    _close(got[loose.text_order >= 0], _logits(model, fit)[fit.text_order >= 0])


def test_contents_of_padding_patches_do_not_matter(setup):
    model, samples = setup
    batch = small_models.batch([samples], model.cfg, spare=7)
    empty = np.asarray(batch.patch_frame[..., 0] == batch.patch_frame[..., 1])
    dirty = np.where(empty[..., None], 1e3, batch.patches)
    real = batch.text_order >= 0
    want = _logits(model, batch)[real]
    _close(_logits(model, dataclasses.replace(batch, patches=dirty))[real], want)


def test_later_text_does_not_change_earlier_logits(setup):
    model, samples = setup
    batch = small_models.batch([samples], model.cfg)
    real = np.flatnonzero(batch.text_order[0] >= 0)
    changed = real[len(real) // 2]
    tokens = np.array(batch.text_tokens)
    tokens[0, changed] += 1
    before = _logits(model, batch)
    after = _logits(model, dataclasses.replace(batch, text_tokens=tokens))
    np.testing.assert_array_equal(before[0, :changed], after[0, :changed])
    assert np.abs(before[0, changed] - after[0, changed]).max() > 1e-2


def test_later_frames_do_not_change_earlier_logits(setup):
    model, samples = setup
    batch = small_models.batch([samples], model.cfg)
    first_vision = int(batch.vision_order[0].min(initial=2**30, where=batch.vision_order[0] >= 0))
    before_it = np.flatnonzero((batch.text_order[0] >= 0) & (batch.text_order[0] < first_vision))
    before = _logits(model, batch)
    after = _logits(model, dataclasses.replace(batch, patches=batch.patches + 1))
    np.testing.assert_array_equal(before[0, before_it], after[0, before_it])
    assert np.abs(before - after).max() > 1e-2


def test_text_alone_needs_no_vision_slots(setup):
    model, _ = setup
    arrays = small_models.inputs([[6]], model.cfg, padding="right", seed=5)
    samples = small_models.samples(arrays, model.cfg)
    without = small_models.batch([samples], model.cfg)
    assert without.vision_order.shape == (1, 0)
    with_slots = small_models.batch([samples], model.cfg, spare=8)
    _close(_logits(model, without)[0, :6], _logits(model, with_slots)[0, :6])


@pytest.mark.parametrize(("attention", "prompt"), [("dense", [6]), ("paper", [3, CLIP, 4])])
def test_recomputation_changes_no_gradient(attention, prompt):
    cfg = small_models.config(attention=attention)
    params = small_models.random_params(cfg, seed=3)
    arrays = small_models.inputs([prompt], cfg, padding="right", seed=4)
    batch = small_models.batch([small_models.samples(arrays, cfg)], cfg)

    def gradient(remat):
        compute = ComputeConfig(dtype="float32", remat=remat)
        model = nnx.eval_shape(lambda: VideoNSA(cfg, compute=compute, rngs=nnx.Rngs(0)))
        graphdef = nnx.split(model)[0]

        def loss(params):
            model = nnx.merge(graphdef, params)
            return next_token_loss(model, model(batch)[0], batch)[0]

        return jax.tree.leaves_with_path(jax.jit(jax.grad(loss))(params))

    want = gradient("none")
    for remat in ("dots", "save_selection", "full"):
        for (path, got), (_, leaf) in zip(gradient(remat), want, strict=True):
            name = f"{remat} {jax.tree_util.keystr(path)}"
            np.testing.assert_allclose(got, leaf, rtol=1e-4, atol=1e-5, err_msg=name)


def test_a_named_implementation_is_also_the_vision_tower_s():
    """Where its kernels do not run, the tower says so, as any attention does."""
    cfg = small_models.config()
    arrays = small_models.inputs([[3, CLIP, 4]], cfg, padding="right", seed=4)
    batch = small_models.batch([small_models.samples(arrays, cfg)], cfg)
    compute = ComputeConfig(dtype="float32", implementation="triton")
    model = nnx.eval_shape(lambda: VideoNSA(cfg, compute=compute, rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(model)
    with pytest.raises(ValueError, match="implementation='triton' runs on a GPU"):
        jax.eval_shape(lambda params: nnx.merge(graphdef, params).vision(batch), params)


@pytest.mark.parametrize("attention", ["dense", "paper"])
def test_bfloat16_is_close_to_float32(attention):
    cfg = small_models.config(attention=attention)
    params = small_models.random_params(cfg, seed=3)
    arrays = small_models.inputs(PROMPTS, cfg, padding="right", seed=4)
    batch = small_models.batch([small_models.samples(arrays, cfg)], cfg)
    model = nnx.eval_shape(lambda: VideoNSA(cfg, rngs=nnx.Rngs(0)))
    low = _logits(nnx.merge(nnx.split(model)[0], params), batch)
    high = _logits(small_models.build(cfg, params), batch)
    assert low.dtype == jnp.float32
    assert np.sqrt(np.mean((low - high) ** 2)) < 0.05 * np.sqrt(np.mean(high**2))


def test_initial_values_are_as_published():
    state = jax.jit(lambda: nnx.state(VideoNSA(PRESETS["tiny"], rngs=nnx.Rngs(0))))()
    for path, param in nnx.to_flat_state(state):
        value = np.asarray(param[...])
        if path[-1] == "scale":
            assert (value == 1).all(), path
        elif path[-1] == "bias":
            assert (value == 0).all(), path
        else:
            assert value.std() == pytest.approx(0.02, rel=0.1), path
