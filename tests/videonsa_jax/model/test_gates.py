"""Gates equal their formula, head by head and branch by branch."""

import numpy as np
from flax import nnx
from scipy.special import erf, expit

from tests import small_models
from videonsa_jax.model.gates import BRANCHES, BranchGates


def test_gates_equal_the_formula():
    cfg = small_models.config(heads=4, kv_heads=2)
    gates = BranchGates(cfg, layers=3, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    params = nnx.to_pure_dict(nnx.state(gates))
    one_layer = {
        part: {name: 0.3 * rng.standard_normal(x.shape[1:]) for name, x in params[part].items()}
        for part in ("hidden", "out")
    }
    x = rng.standard_normal((2, 5, cfg.text.d_model))
    got = nnx.merge(nnx.split(gates)[0], one_layer)(x.astype(np.float32))

    hidden = x @ one_layer["hidden"]["kernel"] + one_layer["hidden"]["bias"]
    hidden = hidden * (1 + erf(hidden / np.sqrt(2))) / 2
    logits = hidden @ one_layer["out"]["kernel"] + one_layer["out"]["bias"]
    assert got.shape == (2, 5, 4, 3)
    for head in range(4):
        for branch in range(len(BRANCHES)):
            want = expit(logits[..., 3 * head + branch] / 0.3)
            np.testing.assert_allclose(got[..., head, branch], want, atol=1e-4)
