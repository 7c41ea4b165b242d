"""Orbax checkpoints written and read in parts, so that no parameter is ever whole in memory.

Orbax stays in charge of names, metadata and completeness; only the numbers of each array go through
TensorStore box by box. What is written is what `training.checkpoint.save_params` would write.
"""

import collections
import contextlib
import dataclasses
import itertools
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from flax import traverse_util
from orbax.checkpoint import type_handlers

from convert.models.family import Config
from convert.weights import layout
from videonsa_jax.errors import UserError
from videonsa_jax.training import checkpoint, checkpoint_steps

Index = tuple[slice, ...]
IN_FLIGHT = 3  # boxes being written or read at a time


@dataclasses.dataclass(frozen=True)
class _Array:
    shape: tuple[int, ...]
    dtype: np.dtype
    chunk: tuple[int, ...]  # shape of the parts in which it is stored

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class LazyArray(_Array):
    """An array that exists only box by box; each box is made of whole chunks."""

    boxes: Callable[[], Iterable[tuple[Index, np.ndarray]]]  # called once


@dataclasses.dataclass(frozen=True)
class StoredArray(_Array):
    """An array of a checkpoint."""

    sharding: str  # that it was saved with
    name: str  # Orbax's
    folder: pathlib.PurePath

    def boxes(self, *, layered: bool) -> Iterator[Index]:
        """Cuts the array into boxes of bounded size, chunk after chunk.

        Args:
          layered: axis 0 counts layers; no box then holds more than one.
        """
        first = 1 if layered else 0  # the axis that large chunks are cut on
        starts = [range(0, *pair) for pair in zip(self.shape, self.chunk, strict=True)]
        for corner in itertools.product(*starts):
            chunk = [
                slice(begin, min(begin + step, size))
                for begin, step, size in zip(corner, self.chunk, self.shape, strict=True)
            ]
            sizes = [part.stop - part.start for part in chunk]
            row = math.prod(sizes[first + 1 :]) * self.dtype.itemsize
            steps = {first: max(layout.BOX_BYTES // row, 1)} | ({0: 1} if layered else {})
            yield from itertools.product(
                *(_cut(part, steps[i]) if i in steps else [part] for i, part in enumerate(chunk))
            )

    def read(self, indices: Iterable[Index]) -> Iterator[tuple[Index, np.ndarray]]:
        """Boxes of the array, a few of them read ahead.

        Boxes of one chunk must follow each other: the chunk is then decoded once.
        """
        array = _open(self)
        pending: collections.deque = collections.deque()
        for index in indices:
            pending.append((index, array[index].read()))
            if len(pending) == IN_FLIGHT:
                yield _finished(self, *pending.popleft())
        while pending:
            yield _finished(self, *pending.popleft())


def _cut(part: slice, step: int) -> list[slice]:
    return [
        slice(begin, min(begin + step, part.stop)) for begin in range(part.start, part.stop, step)
    ]


def save_params(folder: pathlib.Path, params: Mapping[str, LazyArray], model: Config) -> None:
    """Writes weights as `checkpoint.save_params` does, one box after the other.

    Args:
      folder: has no checkpoints yet.
      params: by "/"-joined path.
      model: what they are the parameters of.

    Raises:
      OSError: an array cannot be written, for example because the disk is full.
    """
    registry = type_handlers.create_type_handler_registry((LazyArray, _LazyArrayHandler()))
    handlers = {
        "params": ocp.PyTreeCheckpointHandler(type_handler_registry=registry),
        "config": ocp.JsonCheckpointHandler(),
    }
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    with ocp.CheckpointManager(folder, item_handlers=handlers, options=options) as manager:
        manager.save(
            0,
            args=ocp.args.Composite(
                params=ocp.args.PyTreeSave(traverse_util.unflatten_dict(params, sep="/")),
                config=ocp.args.JsonSave({"model": dataclasses.asdict(model)}),
            ),
        )


def stored_params(folder: str | pathlib.Path) -> tuple[int, dict[str, StoredArray]]:
    """The newest parameters of a run's working directory or of a folder of checkpoints.

    Returns:
      Their step, and the arrays by "/"-joined path; only metadata is read.

    Raises:
      UserError: there is no complete checkpoint, or it is damaged.
    """
    newest = checkpoint.newest_folder(folder)
    with _reading(newest / "params"):
        tree = ocp.StandardCheckpointHandler().metadata(newest / "params").tree
        flat = traverse_util.flatten_dict(tree, sep="/")
        return int(newest.name), {path: _stored_array(leaf) for path, leaf in flat.items()}


class _LazyArrayHandler(type_handlers.NumpyHandler):
    """Writes `LazyArray`s; what it has written are ordinary arrays."""

    async def serialize(self, values, infos, args=None):
        del args
        for value, info in zip(values, infos, strict=True):
            await info.await_path_creation()
            spec = type_handlers.get_json_tspec_write(
                info,
                use_ocdbt=info.is_ocdbt_checkpoint,
                global_shape=value.shape,
                local_shape=value.chunk,
                dtype=value.dtype,
                process_index=jax.process_index(),
            )
            _write(value, spec, info)
        return []


def _write(value: LazyArray, spec: dict[str, Any], info: type_handlers.ParamInfo) -> None:
    what = f"{info.parent_dir}: parameter {info.name}"
    pending: collections.deque[ts.Future] = collections.deque()
    with _one_line(what):
        array = ts.open(ts.Spec(spec), create=True, open=True, context=info.ts_context).result()
    for index, block in value.boxes():
        with _one_line(what):
            write = array[index].write(block, can_reference_source_data_indefinitely=True)
            write.commit.force()
            pending.append(write.commit)
            if len(pending) == IN_FLIGHT:
                pending.popleft().result()
    with _one_line(what):
        for commit in pending:
            commit.result()


def _stored_array(leaf: Any) -> StoredArray:
    """From Orbax's metadata of one array."""
    spec = getattr(leaf.sharding, "partition_spec", None)
    return StoredArray(
        shape=tuple(leaf.shape),
        dtype=np.dtype(leaf.dtype),
        chunk=tuple(leaf.storage.chunk_shape),
        sharding="-" if spec is None else _describe_spec(spec),
        name=leaf.name,
        folder=leaf.directory,
    )


def _describe_spec(spec: Iterable[Any]) -> str:
    parts = (part if isinstance(part, str) else "+".join(part or "-") for part in spec)
    return "(" + ", ".join(parts) + ")"


def _open(stored: StoredArray) -> ts.TensorStore:
    chunk = math.prod(stored.chunk) * stored.dtype.itemsize
    context = ts.Context(
        {
            "cache_pool": {"total_bytes_limit": chunk},  # of decoded numbers: one chunk
            "cache_pool#ocdbt": {"total_bytes_limit": 2**24},
        }
    )
    info = type_handlers.ParamInfo(
        name=stored.name,
        parent_dir=stored.folder,
        is_ocdbt_checkpoint=type_handlers.is_ocdbt_checkpoint(stored.folder),
        ts_context=context,
    )
    spec = type_handlers.get_json_tspec_read(info, use_ocdbt=info.is_ocdbt_checkpoint)
    with _reading(stored.folder):
        return ts.open(ts.Spec(spec), open=True, read=True, context=context).result()


def _finished(stored: StoredArray, index: Index, read: ts.Future) -> tuple[Index, np.ndarray]:
    with _reading(stored.folder):
        return index, read.result()


def _reading(params: pathlib.PurePath) -> contextlib.AbstractContextManager[None]:
    step = pathlib.Path(params).parent
    return checkpoint_steps.reading(step.parent, int(step.name))


@contextlib.contextmanager
def _one_line(what: str) -> Iterator[None]:
    """TensorStore's errors, which are ValueErrors of many lines, as those of one.

    Raises:
      OSError: of the operating system, with `what` as its file's name.
      UserError: all others, for example damaged data.
    """
    try:
        yield
    except ValueError as error:
        if code := re.search(r"os_error_code='(\d+)'", str(error)):
            raise OSError(int(code[1]), os.strerror(int(code[1])), what) from error
        reason = " ".join(str(error).split()).split(" [source locations")[0]
        raise UserError(f"{what}: {reason}") from error
