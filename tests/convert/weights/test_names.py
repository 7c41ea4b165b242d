"""Names in either spelling are one name."""

import pytest

from convert.models import videonsa
from convert.weights import names


@pytest.mark.parametrize(
    ("state_dict", "hub"),
    [
        ("model.language_model.layers.3.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight"),
        ("model.language_model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("model.visual.blocks.0.attn.qkv.bias", "visual.blocks.0.attn.qkv.bias"),
        ("lm_head.weight", "lm_head.weight"),
    ],
)
def test_both_spellings_are_one_name(state_dict, hub):
    prefixes = videonsa.FAMILY.prefixes
    assert names.canonical(state_dict, prefixes) == names.canonical(hub, prefixes) == hub
    if hub != state_dict:
        with pytest.raises(ValueError, match="two spellings"):
            names.canonical_names([hub, state_dict], prefixes)
