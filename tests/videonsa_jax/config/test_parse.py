"""Config files and overrides become one checked RunConfig."""

import dataclasses
import pathlib

import pytest
from ml_collections import ConfigDict

from videonsa_jax.config import parse
from videonsa_jax.config import schema as config
from videonsa_jax.errors import UserError
from videonsa_jax.sharding import rules

CONFIGS = sorted((pathlib.Path(__file__).resolve().parents[3] / "configs").glob("[a-z]*.py"))


def source(**sections) -> ConfigDict:
    return ConfigDict(
        {
            "model": "tiny",
            "data": {"source": ("a.jsonl",), "tokenizer": "tokenizer"},
            "train": {"steps": 10},
            "optim": {"lr": 1e-3},
            **sections,
        }
    )


def test_sections_are_laid_over_the_defaults():
    cfg = parse.parse(source(compute={"dtype": "float32"}))
    assert cfg.model == config.PRESETS["tiny"]
    assert cfg.optim.lr == 1e-3
    assert cfg.optim.b2 == 0.999
    assert cfg.compute == config.ComputeConfig(dtype="float32")


def test_any_field_can_be_overridden_and_the_last_one_wins():
    overrides = ["optim.freeze=('vision',)", "mesh.fsdp=4", "mesh.fsdp=8", "compute.remat=dots"]
    cfg = parse.parse(source(), overrides)
    assert cfg.optim.freeze == ("vision",)
    assert cfg.mesh.fsdp == 8
    assert cfg.compute.remat == "dots"


def test_a_preset_is_a_name_or_a_dict_with_changes():
    cfg = parse.parse(
        source(model={"preset": "tiny", "attention": "dense"}, sharding="tp"),
        ["model.text.num_layers=1", "sharding.vocab=None"],
    )
    assert cfg.model.attention == "dense"
    assert cfg.model.text.num_layers == 1
    assert cfg.model.text.d_ff == config.PRESETS["tiny"].text.d_ff
    assert cfg.sharding.embed is None
    assert cfg.sharding.vocab is None
    assert cfg.sharding.mlp == rules.PRESETS["tp"].mlp


def test_one_axis_of_the_default_sharding_can_be_overridden():
    cfg = parse.parse(source(), ["sharding.heads=tensor"])
    assert cfg.sharding == dataclasses.replace(rules.PRESETS["fsdp"], heads="tensor")


@pytest.mark.parametrize(
    ("override", "message"),
    {
        "train.stpes=4": r"unknown field config.train.stpes; did you mean config.train.steps",
        "lr=1": r"unknown field config.lr; did you mean config.optim.lr",
        "model.text.layers=2": r"did you mean config.model.text.num_layers",
        "zzz=1": r"unknown field config.zzz; fields there: ",
        "train.steps=many": r"config.train.steps='many' must be int",
        "train.steps=0": r"config.train: .*train.steps=0 must be at least 1",
        "optim.freeze=('tower',)": r"config.optim.freeze\[0\]='tower' must be one of 'vision'",
        "compute.dtype=float16": r"config.compute.dtype='float16' must be one of 'bfloat16'",
        "model.preset=8b": r"config.model.preset='8b' must be one of \['qwen2_5_vl_32b'",
        "sharding.heads=tensr": r"config.sharding: heads='tensr' names .* did you mean 'tensor'",
        "sharding.preset=cp": r"config.sharding.preset='cp' must be one of \['dp', 'fsdp'",
        "train.steps": r"config.train.steps has no value; write --config.train.steps=VALUE",
        "seed.x=1": r"--config.seed.x=1: seed=1 has no fields",
        "train=4": r"config.train=4 must be a dict of the fields of TrainConfig",
    }.items(),
)
def test_a_wrong_override_is_one_clear_line(override, message):
    with pytest.raises(UserError, match=message) as error:
        parse.parse(source(seed=1), [override])
    assert "\n" not in str(error.value)


def test_a_required_field_is_named():
    with pytest.raises(UserError, match=r"config\.train\.steps is not set"):
        parse.parse(source(train={}))


def test_flags_of_fields_become_overrides():
    argv = ["train.py", "--config=a.py", "--config.optim.lr=1", "-config.seed=2"]
    assert parse.override_flags(argv) == [
        "train.py",
        "--config=a.py",
        "--override=optim.lr=1",
        "--override=seed=2",
    ]


def test_a_missing_config_file_is_named():
    with pytest.raises(UserError, match=r"--config=configs/none.py: no such file"):
        parse.load_config("configs/none.py:smoke")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_file_parses(path):
    assert parse.parse(parse.load_config(str(path))).train.steps > 0


def test_flatten_gives_every_field_its_dotted_name():
    flat = parse.flatten(parse.parse(source()))
    assert flat["model.text.num_layers"] == 2
    assert flat["sharding.embed"] == "fsdp"
