"""What a model family brings to a conversion: one object, which all verbs read."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from convert.weights.table import Row

Config = Any  # a family's own class, see `Family.config_class`


@dataclasses.dataclass(frozen=True)
class Family:
    """A model's names, layouts and config on both sides.

    `config_class` is a frozen dataclass of numbers, strings, tuples and such dataclasses: a
    checkpoint stores it as JSON. It has a field `attention`, the mode that the model computes in,
    and, if the model can have adapters, `lora`.
    """

    name: str  # of --architecture and in manifests
    architecture: str  # the class that its config.json names first
    model_type: str  # of its config.json
    config_class: type
    model: Callable[..., nnx.Module]  # model(cfg, rngs=...) has the parameters that `rows` name
    rows: Callable[[Config], tuple[Row, ...]]
    # A parsed config.json, and the mode of attention, or None for the family's own -> config.
    # Raises UserError for what the model cannot compute.
    read_config: Callable[[Mapping[str, Any], str | None], Config]
    # config, keywords `dtype`, that transformers is to load all tensors in, and `carried`, None or
    # a config.json whose other fields are kept -> a config.json. Raises UserError.
    write_config: Callable[..., dict[str, Any]]
    prefixes: tuple[tuple[str, str], ...] = ()  # of names: (another spelling, the canonical one)
    tied: Callable[[Config], Mapping[str, str]] = lambda cfg: {}  # {copy a folder may hold: of}
    free_fields: tuple[str, ...] = ()  # starts of config fields that a run chooses, not the folder
    transformers_class: str | None = None  # that computes its logits with dense attention
    lacks: "Lack | None" = None

    @property
    def whole(self) -> "Family":
        """The family with all parameters of `model`, which a checkpoint holds."""
        return self if self.lacks is None else self.lacks.whole


@dataclasses.dataclass(frozen=True)
class Lack:
    """Parameters of the model that a family's folders do not have; they are drawn."""

    what: str  # in one word
    whole: Family  # whose rows are those of the family, and theirs
