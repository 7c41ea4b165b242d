"""One attention layer against the released code's own output, and against a naive one."""

import dataclasses
import functools
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf, expit

from pallas_kernels import BlockSet
from tests.videonsa_jax.model.released import naive
from videonsa_jax.config.schema import (
    ModelConfig,
    NSAConfig,
    ReleasedConfig,
    TextConfig,
    VisionConfig,
)
from videonsa_jax.model.attention import AttentionMetadata, Streams
from videonsa_jax.model.released.attention import Sparse, attend, sparse_keys
from videonsa_jax.model.released.layout import plan

ROOT = pathlib.Path(__file__).resolve().parents[4]
AGREES = 2e-6  # absolute, of values of order one


@dataclasses.dataclass(frozen=True)
class Layer:
    """Inputs of one layer in sequence order."""

    q: np.ndarray  # f[L n h]
    k: np.ndarray  # f[L kv h]
    v: np.ndarray  # f[L kv h]
    gates: np.ndarray  # f[L n 3]
    vis: np.ndarray  # bool[L]
    sizes: tuple[int, int, int]  # block size, block count, window
    switches: ReleasedConfig = ReleasedConfig()  # noqa: RUF009 (frozen)

    @property
    def cfg(self):
        n, h = self.q.shape[1:]
        text = TextConfig(
            vocab_size=2,
            d_model=8,
            d_ff=8,
            num_layers=1,
            num_heads=n,
            num_kv_heads=self.k.shape[1],
            head_dim=h,
            mrope_section=(h // 2, 0, 0),
        )
        vision = VisionConfig(8, 8, 1, 1, ())
        sizes = NSAConfig(*self.sizes)
        return ModelConfig(text, vision, sizes, attention="released", released=self.switches)

    def run(self, in_vision_stream, spare=0):
        """The layer with some tokens in the vision stream, in slots with NaN to spare."""
        parts = [np.flatnonzero(in_vision_stream), np.flatnonzero(~in_vision_stream)]
        order = Streams(*(np.pad(x, (0, spare), constant_values=-1)[None] for x in parts))

        def streams(x):
            pads = [(0, spare)] + [(0, 0)] * (x.ndim - 1)
            fill = np.nan if x.dtype.kind == "f" else 0
            return Streams(*(np.pad(x[part], pads, constant_values=fill)[None] for part in parts))

        qkv = [streams(x.astype(np.float32)) for x in (self.q, self.k, self.v)]
        gates = streams(self.gates.astype(np.float32)).vision
        positions = streams(np.where(self.vis[:, None], [[1, 2, 3]], [[4, 4, 4]]))
        out, blocks, text, vision = _layer(*qkv, gates, order, positions, self.cfg)
        result = np.zeros_like(self.q)
        for part, stream in zip(parts, out, strict=True):
            result[part] = stream[0, : len(part)]
        return Result(result, blocks, text[0], vision[0])


class Result(NamedTuple):
    """What the layer gives, and its parts."""

    out: np.ndarray  # [L n h] in sequence order
    blocks: BlockSet  # of the vision stream
    sparse_text: np.ndarray  # [. n h] sparse part of the text stream, by closed forms
    sparse_vision: np.ndarray  # [. n h] that of the vision stream


@functools.partial(jax.jit, static_argnums=6)
def _layer(q, k, v, gates, order, positions, cfg):
    joined = order.joined()
    layout = plan(joined, positions.joined(), order.vision.shape[1], cfg)
    starts = Streams(*(jnp.where(x < 0, 2**30, 0) for x in order))
    metadata = AttentionMetadata(None, order, starts, None, joined, layout)
    cached_kv = (k.joined(), v.joined())
    how = {"cfg": cfg, "implementation": "xla"}
    out = attend(q, k, v, cached_kv=cached_kv, gates=gates, metadata=metadata, **how)
    sparse = Sparse(sparse_keys(k, v, layout, cfg), layout, **how)
    scored = sparse.score(q.vision)
    return out, scored.blocks, sparse.text(scored), sparse.vision(scored, gates)


def released_layer():
    """The recorded one, with its output and its chosen blocks."""
    data = np.load(ROOT / "tests/data/released_layer.npz")
    hidden = data["x"] @ data["g1w"].T + data["g1b"]
    hidden = hidden * (1 + erf(hidden / np.sqrt(2))) / 2
    gates = expit((hidden @ data["g2w"].T + data["g2b"]) / 0.3).reshape(len(hidden), -1, 3)
    sizes = tuple(int(n) for n in data["meta"])
    layer = Layer(*(data[x] for x in "qkv"), gates, data["vis"], sizes)
    return layer, data["attn"], data["idx"]


def random_layer(length, heads, kv, sizes, seed=0, width=8):
    """Video in runs, text between; a few vision tokens that count as text."""
    rng = np.random.default_rng(seed)
    vis = np.zeros(length, bool)
    vis[length // 9 : length // 2] = vis[-length // 3 : -length // 10] = True
    vis[rng.integers(0, length, length // 12)] = False
    q, k, v = (rng.standard_normal((length, n, width)) for n in (heads, kv, kv))
    return Layer(q, k, v, rng.uniform(size=(length, heads, 3)), vis, sizes)


def sets(ids):
    """Chosen blocks per token and KV head, empty entries left out."""
    return [[frozenset(x[x >= 0].tolist()) for x in token] for token in np.asarray(ids)]


def members(blocks, count):
    """The same from a `BlockSet` of one row."""
    chosen = np.asarray(blocks.members(count))[0]
    return [[frozenset(np.flatnonzero(x).tolist()) for x in token] for token in chosen]


@pytest.mark.parametrize("stream", ["vision only", "some text too", "every token but one"])
def test_equals_the_released_code(stream):
    """Text in the vision stream goes the general way, text in the text stream by closed forms."""
    layer, attn, ids = released_layer()
    in_vision = layer.vis.copy()
    if stream == "some text too":
        in_vision[::3] = True
    elif stream == "every token but one":
        in_vision[1:] = True
        in_vision[0] = False
    got = layer.run(in_vision)
    assert np.abs(got.out - attn).max() <= AGREES
    blocks = members(got.blocks, -(-len(attn) // layer.sizes[0]))
    assert blocks == [chosen for chosen, here in zip(sets(ids), in_vision, strict=True) if here]


def test_naive_layer_equals_the_released_code():
    layer, attn, ids = released_layer()
    block, count, window = layer.sizes
    got, chosen = naive.layer(
        *(layer.q, layer.k, layer.v, layer.gates, layer.vis),
        block=block,
        count=count,
        window=window,
    )
    assert np.abs(got - attn).max() <= AGREES
    assert sets(chosen) == sets(ids)


@pytest.mark.parametrize(
    ("length", "heads", "kv", "sizes"),
    [
        (77, 28, 4, (16, 3, 20)),
        (130, 6, 2, (4, 8, 9)),
        (33, 16, 1, (64, 2, 256)),
        (90, 7, 1, (1, 64, 1)),
    ],
)
def test_equals_the_naive_layer(length, heads, kv, sizes):
    """Odd lengths, other groupings, blocks of one token, blocks longer than the prompt."""
    layer = random_layer(length, heads, kv, sizes)
    block, count, window = sizes
    want, ids = naive.layer(
        *(layer.q, layer.k, layer.v, layer.gates, layer.vis),
        block=block,
        count=count,
        window=window,
    )
    got = layer.run(layer.vis, spare=5)
    assert np.abs(got.out - want).max() <= 10 * AGREES  # logits of 8 wide heads are larger
    blocks = members(got.blocks, -(-length // block))[: layer.vis.sum()]
    assert blocks == [chosen for chosen, here in zip(sets(ids), layer.vis, strict=True) if here]


def test_closed_forms_equal_the_general_way():
    """Text by prefix sums against text as queries of zero through the attention operations."""
    layer = random_layer(200, 28, 4, (16, 4, 24), seed=1)
    in_vision = np.ones(len(layer.vis), bool)
    in_vision[0] = False
    general = layer.run(in_vision).sparse_vision
    closed = layer.run(layer.vis).sparse_text
    text = np.flatnonzero(~layer.vis)
    np.testing.assert_allclose(closed[text > 0], general[text[text > 0] - 1], atol=AGREES, rtol=0)


def without(layer, *switches):
    """The layer with some switches off."""
    return dataclasses.replace(layer, switches=ReleasedConfig(**dict.fromkeys(switches, False)))


IN_LAYER = [field.name for field in dataclasses.fields(ReleasedConfig)]
IN_LAYER.remove("whole_seconds")  # changes positions, before any layer


@pytest.mark.parametrize("switch", IN_LAYER)
def test_each_switch_changes_the_output(switch):
    layer = random_layer(77, 4, 2, (16, 2, 12), seed=3)
    in_vision = layer.vis | (np.arange(77) % 20 == 10)  # some count as text by their positions
    got = without(layer, switch).run(in_vision).out
    assert np.isfinite(got).all()
    assert np.abs(got - layer.run(in_vision).out).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("switches", [["text_as_zeros"], ["absolute_blocks"]])
def test_padding_changes_nothing(switches):
    layer = without(random_layer(77, 4, 2, (8, 3, 12), seed=4), *switches)
    alone, padded = (layer.run(layer.vis, spare=spare).out for spare in (0, 6))
    np.testing.assert_allclose(padded, alone, atol=AGREES, rtol=0)
