"""Reads the text of a compiled program: how often its parts run, what they write and exchange."""

import collections
import dataclasses
import functools
import math
import re

import numpy as np

# What some kernels are annotated with; it breaks the line of their instruction.
_METADATA = re.compile(r"kernel_metadata=\{\n[^\n]*\n\}")
# A computation and its instructions; the entry is the one that a program starts with.
_COMPUTATION = re.compile(
    r"^(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) [^\n]*\{\n(?P<body>.*?)^\}", re.DOTALL | re.MULTILINE
)
_INSTRUCTION = re.compile(r"^ *(?:ROOT )?%[\w.-]+ = (?P<type>.*?) (?P<op>[\w-]+)\(", re.MULTILINE)
_TYPED = re.compile(r"^ *(?:ROOT )?(%[\w.-]+) = (.*?) [\w-]+\(", re.MULTILINE)
_UPDATE = re.compile(
    r"= (?P<type>.*?) dynamic-update-slice\(%[\w.-]+, (?P<update>%[\w.-]+),", re.MULTILINE
)
_ARRAY = re.compile(r"\b(pred|[suf]\d+|bf16)\[([\d,]*)\]")
_FUSED = re.compile(r" fusion\([^\n]*?calls=%?([\w.-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|(?:true|false)_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_WHILE = re.compile(r" while\([^\n]*?condition=%?([\w.-]+), body=%?([\w.-]+)[^\n]*")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CONSTANT = re.compile(r"[su]32\[\]\S* constant\((\d+)\)")
# Instructions that write nothing, or what another one writes.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional"}
_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_COLLECTIVE = re.compile(
    rf"^ *(?:ROOT )?%[\w.-]+ = (?P<type>.*?) (?P<kind>{'|'.join(_KINDS)})(?:-start)?\("
    r"(?P<rest>.*)$",
    re.MULTILINE,
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """Exchanges of one kind between the devices along some axes of the mesh.

    Attributes:
      kind: as XLA names it.
      axis: the mesh axes, joined by "+".
      count: how often, in one run of the program.
      bytes: that a device receives in all of them, each done around a ring.
    """

    kind: str
    axis: str
    count: int
    bytes: int


def one_line_each(text: str) -> str:
    """The text of a program with every instruction on a line of its own."""
    return _METADATA.sub("kernel_metadata={}", text)


class Program:
    """The text of a compiled program, of `jax.stages.Compiled.as_text`."""

    def __init__(self, text: str):
        text = one_line_each(text)
        found = list(_COMPUTATION.finditer(text))
        self._bodies = {match["name"]: match["body"] for match in found}
        (self._entry,) = (match["name"] for match in found if match["entry"])
        self._fused = set(_FUSED.findall(text))

    def in_memory(self) -> set[str]:
        """The arrays that programs keep in memory, such as "f32[8,128]": not those in a fusion."""
        bodies = (body for name, body in self._bodies.items() if name not in self._fused)
        return {match[0] for body in bodies for match in _ARRAY.finditer(body)}

    @functools.cached_property
    def runs(self) -> dict[str, int]:
        """How often each computation runs. Of branches, each counts as if it were always taken."""
        runs = collections.Counter()

        def enter(name, times):
            runs[name] += times
            body = self._bodies[name]
            for loop in _WHILE.finditer(body):
                enter(loop[2], times * self._trips(loop))
            branches = (name for text in _BRANCHES.findall(body) for name in text.split(","))
            called = [*_CALLED.findall(body), *(name.strip().lstrip("%") for name in branches)]
            for name in called:
                enter(name, times)

        enter(self._entry, 1)
        return dict(runs)

    def _trips(self, loop):
        """Of a loop that counts up from 0; 1 where the count depends on data."""
        if match := _TRIPS.search(loop[0]):
            return int(match[1])
        bounds = _CONSTANT.findall(self._bodies[loop[1]])
        return int(bounds[0]) if len(bounds) == 1 else 1

    def written_bytes(self) -> int:
        """What all instructions write to memory; of an array changed in place, the change."""
        total = 0
        for name, times in self.runs.items():
            body = self._bodies[name]
            if name not in self._fused:
                for match in _INSTRUCTION.finditer(body):
                    if match["op"] not in _FREE and not match["op"].endswith("-done"):
                        total += times * _bytes(match["type"])
            types = dict(_TYPED.findall(body))
            for match in _UPDATE.finditer(body):
                total -= times * (_bytes(match["type"]) - _bytes(types[match["update"]]))
        return total

    def collectives(self, mesh_shape: dict[str, int]) -> list[Collective]:
        """All exchanges between devices, by kind and axes.

        Args:
          mesh_shape: name and size of each axis of the mesh, in order.

        Raises:
          ValueError: a group of devices is written as it is not known here.
        """
        totals = collections.defaultdict(lambda: [0, 0])
        for name, times in self.runs.items():
            for match in _COLLECTIVE.finditer(self._bodies[name]):
                kind = match["kind"]
                # On TPUs, a fusion that keeps a part of a sum is never more than that part.
                if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
                    kind = "reduce-scatter"
                group = _group(match["rest"], math.prod(mesh_shape.values()))
                if len(set(group)) == 1:  # a device and itself
                    continue
                total = totals[kind, _axes(group, mesh_shape)]
                total[0] += times
                total[1] += times * _received(match, kind, len(group))
        return [Collective(*key, *total) for key, total in sorted(totals.items())]


def _bytes(text):
    """Of all arrays of a type."""
    return sum(_size(*match) for match in _ARRAY.findall(text))


def _size(dtype, sizes):
    bits = 8 if dtype == "pred" else int(re.search(r"\d+$", dtype)[0])
    return math.prod(int(size) for size in sizes.split(",") if size) * bits // 8


def _received(match, kind, devices):
    """Bytes that one device receives, from the type of the result."""
    arrays = [_size(*array) for array in _ARRAY.findall(match["type"])]
    if "-start(" in match[0] and kind != "all-reduce":  # its type names the operands first
        operands = match["rest"].split(")")[0].count("%")
        arrays = arrays[operands : 2 * operands]
    result = sum(arrays)
    if kind == "collective-permute":
        return result
    if kind == "reduce-scatter":
        whole = result if match["kind"] == "all-reduce" else result * devices
        return whole * (devices - 1) // devices
    return (2 if kind == "all-reduce" else 1) * result * (devices - 1) // devices


def _group(text, devices):
    """The first group of devices that exchange something, by their places in the mesh."""
    if match := re.search(r"source_target_pairs=\{(\{.*?\})\}", text):
        pairs = [[int(x) for x in pair] for pair in re.findall(r"(\d+),(\d+)", match[1])]
        return max(pairs, key=lambda pair: pair[0] != pair[1])  # some may keep what they have
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return [int(place) for place in match[1].split(",")]
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", text):
        places = _places(match[3], devices)
        return places.reshape(int(match[1]), int(match[2]))[0].tolist()
    if match := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}", text
    ):
        return _named_group(match[1], match[3], _places(match[2], devices))
    if "replica_groups={}" in text:
        return list(range(devices))
    raise ValueError(f"unknown form of a group of devices: {text[:200]}")


def _places(order, devices):
    """The places of all devices, in an order such as `[2,4]T(1,0)`; None: ascending."""
    places = np.arange(devices)
    if order:
        sizes, axes = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", order).groups()
        places = places.reshape([int(size) for size in sizes.split(",")])
        if axes:
            places = places.transpose([int(axis) for axis in axes.split(",")])
    return places


def _named_group(mesh, axes, places):
    """Of `'a'=2,'b'=8` and `'a','b':(2)4`: a part of an axis is (size before it) and its size."""
    names, sizes = zip(*re.findall(r"'([^']+)'=(\d+)", mesh), strict=True)
    places = places.reshape([int(size) for size in sizes])
    taken = {name: part for name, *part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes)}
    at = []
    for name, size in zip(names, sizes, strict=True):
        if name not in taken:
            at.append(np.array([0]))
            continue
        before, part = (int(x or 0) for x in taken[name])
        step = int(size) // (before * part) if part else 1
        at.append(np.arange(part or int(size)) * step)
    return places[np.ix_(*at)].ravel().tolist()


def _axes(group, mesh_shape):
    """The mesh axes along which the devices of a group differ."""
    places = np.stack(np.unravel_index(group, list(mesh_shape.values())))
    varies = (places != places[:, :1]).any(axis=1)
    return "+".join(name for name, differs in zip(mesh_shape, varies, strict=True) if differs)
