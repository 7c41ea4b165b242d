"""Which samples go into which row of which batch, decided from their sizes alone.

The plan is a pure function of the stream of sizes. Every process and every worker computes all of
it and decodes its own share, so that the batches depend on neither of their numbers.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import grain

from videonsa_jax.data.errors import BadSample
from videonsa_jax.data.load import Size
from videonsa_jax.data.pack import Bucket
from videonsa_jax.errors import UserError

FLUSH_REJECTED = 20  # so many rejected samples are reported without waiting for a full batch


class MeasuredSample(NamedTuple):
    """One element of the stream of samples."""

    record: int  # index in the source
    name: str  # file and line
    size: Size | None = None  # None: rejected, or left out by a filter
    rejected: BadSample | None = None


class PackedSample(NamedTuple):
    """A sample in a row."""

    record: int
    size: Size


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """One batch or, without a bucket, only a report of rejected samples."""

    bucket: Bucket | None
    rows: tuple[tuple[PackedSample, ...], ...]
    rejected: tuple[BadSample, ...]  # since the plan before
    next_state: dict  # of the BatchPacker: from it on come the batches after this one


class BatchPacker:
    """Fills rows with samples in the order of the stream; a batch is full rows of one bucket."""

    def __init__(self, buckets: Sequence[Bucket], *, batch: int, samples_per_row: int, block: int):
        """`block`: each sequence's vision tokens start at a multiple of it."""
        self._buckets = sorted(buckets, key=lambda b: (b.vision_tokens, b.text_tokens))
        self._batch, self._samples_per_row, self._block = batch, samples_per_row, block
        self.position = 0  # in the stream
        self.unplaced = 0  # elements without a place in a row since the last one with
        # of each bucket: full rows, and the row being filled
        self._full: list[list[list[PackedSample]]] = [[] for _ in buckets]
        self._open: list[list[PackedSample]] = [[] for _ in buckets]
        self._rejected: list[BadSample] = []

    def get_state(self) -> dict:
        """All of it as JSON values."""
        return {
            "position": self.position,
            "full": [[_to_json(row) for row in rows] for rows in self._full],
            "open": [_to_json(row) for row in self._open],
            "rejected": [[bad.file, bad.reason, bad.lost_in] for bad in self._rejected],
        }

    def set_state(self, state: dict) -> None:
        """Takes what `get_state` of a BatchPacker with the same arguments gave."""
        self.position = state["position"]
        self._full = [[_from_json(row) for row in rows] for rows in state["full"]]
        self._open = [_from_json(row) for row in state["open"]]
        self._rejected = [BadSample(*values) for values in state["rejected"]]

    def add(self, element: MeasuredSample) -> BatchPlan | None:
        """Takes the next element of the stream; returns a plan where that completes one."""
        self.position += 1
        self.unplaced += 1
        rejected = element.rejected
        if element.size is not None:
            for index, bucket in enumerate(self._buckets):
                if self._fits([element], bucket):
                    return self._place(index, PackedSample(element.record, element.size))
            rejected = BadSample(element.name, self._too_long(element.size))
        if rejected is not None:
            self._rejected.append(rejected)
            if len(self._rejected) >= FLUSH_REJECTED:
                return self._emit(None, ())
        return None

    def _place(self, index: int, place: PackedSample) -> BatchPlan | None:
        self.unplaced = 0
        bucket, full, row = self._buckets[index], self._full[index], self._open[index]
        if row and not self._fits([*row, place], bucket):
            full.append(row)
            row = []
        row = [*row, place]
        if len(row) == self._samples_per_row:
            full.append(row)
            row = []
        self._open[index] = row
        if len(full) < self._batch:
            return None
        self._full[index] = full[self._batch :]
        return self._emit(bucket, full[: self._batch])

    def _fits(self, row: Sequence[PackedSample | MeasuredSample], bucket: Bucket) -> bool:
        vision = 0
        for place in row:
            vision = math.ceil(vision / self._block) * self._block + place.size.vision
        text = sum(place.size.text for place in row)
        return vision <= bucket.vision_tokens and text <= bucket.text_tokens

    def _too_long(self, size: Size) -> str:
        buckets = ", ".join(f"({b.vision_tokens}, {b.text_tokens})" for b in self._buckets)
        return (
            f"{size.vision} vision and {size.text} text tokens fit none of data.buckets={buckets}: "
            "use fewer frames, a shorter answer or a larger bucket"
        )

    def _emit(self, bucket: Bucket | None, rows: Sequence[Sequence[PackedSample]]) -> BatchPlan:
        rejected, self._rejected = tuple(self._rejected), []
        return BatchPlan(bucket, tuple(tuple(row) for row in rows), rejected, self.get_state())


class PlanDataset(grain.IterDataset):
    """Stream of `MeasuredSample` -> stream of `BatchPlan`; a worker's slice is every n-th plan."""

    def __init__(
        self,
        parent: grain.IterDataset,
        *,
        make_packer: Callable[[], BatchPacker],
        start: dict | None,
        records: int,
    ):
        """`start`: a BatchPacker's state, None for the beginning; `records`: of one pass."""
        super().__init__(parent)
        self._make_packer, self._start, self._records = make_packer, start, records
        self._slice = slice(0, None, 1)

    def set_slice(self, sl: slice, sequential_slice: bool = False) -> None:
        """Called by Grain in each worker: it is to yield plans start, start + step, ..."""
        del sequential_slice
        self._slice = sl

    def __iter__(self) -> "PlanIterator":
        packer, parent = self._make_packer(), iter(self._parent)
        if self._start is not None:
            packer.set_state(self._start)
            grain.experimental.set_next_index(parent, packer.position)
        return PlanIterator(parent, packer, self._slice, self._records)


class PlanIterator(grain.DatasetIterator):
    """See `PlanDataset`."""

    def __init__(self, parent: grain.DatasetIterator, packer: BatchPacker, sl: slice, records: int):
        super().__init__(parent)
        self._packer, self._records = packer, records
        self._skip, self._step = sl.start, sl.step

    def __next__(self) -> BatchPlan:
        for _ in range(self._skip):
            self._next_plan()
        self._skip = self._step - 1
        return self._next_plan()

    def _next_plan(self) -> BatchPlan:
        while self._packer.unplaced < self._records + FLUSH_REJECTED:
            plan = self._packer.add(next(self._parent))
            if plan is not None:
                return plan
        raise UserError(
            f"a whole pass over {self._records} samples gave none to train on: all are bad, or "
            "left out by data.frame_count_range"
        )

    def get_state(self) -> dict:
        return {"skip": self._skip, "packer": self._packer.get_state()}

    def set_state(self, state: dict) -> None:
        self._skip = state["skip"]
        self._packer.set_state(state["packer"])
        grain.experimental.set_next_index(self._parent, self._packer.position)


def _to_json(row: Sequence[PackedSample]) -> list:
    return [[place.record, *place.size] for place in row]


def _from_json(row: list) -> list[PackedSample]:
    return [PackedSample(record, Size(vision, text)) for record, vision, text in row]
