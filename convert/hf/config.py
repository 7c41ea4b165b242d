"""Typed reads from a config.json."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from videonsa_jax.errors import UserError

DTYPE_FIELDS = ("dtype", "torch_dtype")  # of all tensors, as they are loaded; the first rules


@dataclasses.dataclass(frozen=True)
class Section:
    """One object of a config.json; reads check types, errors name the field."""

    path: str  # of its fields in the file
    values: Mapping[str, Any]
    defaults: Mapping[str, Any]

    def has(self, key: str) -> bool:
        """Whether the file gives a value other than null."""
        return self.values.get(key) is not None

    def with_aliases(self, aliases: Mapping[str, str]) -> "Section":
        """The same object with the values of `aliases` ({other name: own name}) under own names.

        Raises:
          UserError: a field has two values. Which one rules depends on transformers' version.
        """
        values = dict(self.values)
        for alias, key in aliases.items():
            if alias in values and values.setdefault(key, values[alias]) != values[alias]:
                raise UserError(
                    f"config.json: {self.path}{alias}={values[alias]!r} and "
                    f"{self.path}{key}={values[key]!r} are two names of one field; remove one"
                )
        return dataclasses.replace(self, values=values)

    def integer(self, key: str, least: int = 1) -> int:
        return self._checked(key, self._read(key), least)

    def integers(self, key: str, count: int | None = None) -> tuple[int, ...]:
        values = self._read(key)
        if not isinstance(values, list | tuple) or count not in (None, len(values)):
            what = "integers" if count is None else f"{count} integers"
            raise UserError(f"config.json: {self.path}{key}={values!r} must be a list of {what}")
        return tuple(self._checked(key, value, 0) for value in values)

    def number(self, key: str) -> float:
        value = self._read(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise UserError(f"config.json: {self.path}{key}={value!r} must be a number above 0")
        return float(value)

    def allow(self, key: str, *values: Any) -> None:
        """Raises for a value, explicit or by default, that would change what is computed."""
        value = self.values[key] if key in self.values else self.defaults.get(key, values[0])
        if value not in values:
            raise UserError(
                f"config.json: {self.path}{key}={value!r} is not supported; "
                f"allowed: {' or '.join(map(repr, values))}"
            )

    def section(self, key: str, defaults: Mapping[str, Any]) -> "Section":
        value = self._read(key)
        if not isinstance(value, Mapping):
            raise UserError(f"config.json: {self.path}{key}={value!r} must be an object")
        return Section(f"{self.path}{key}.", value, defaults)

    def _read(self, key: str) -> Any:
        for level in (self.values, self.defaults):
            if key in level:
                return level[key]
        raise UserError(f"config.json: {self.path}{key} is missing; copy it from the original")

    def _checked(self, key: str, value: Any, least: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UserError(
                f"config.json: {self.path}{key}={value!r} must be an integer, at least {least}"
            )
        return value
