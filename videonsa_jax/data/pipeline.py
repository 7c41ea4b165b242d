"""Endless stream of batches: shuffled, measured, planned, decoded, packed; resumable exactly.

    source -> shuffle, repeat -> measure (headers) -> plan -> decode and pack -> count -> batch

Measuring and planning are cheap and done everywhere alike; decoding is done for a process's own
rows. A sample found bad by measuring is replaced by the next one. One that only fails to decode
leaves its place in the row empty, so that the batches are the same for any number of processes.
"""

import concurrent.futures
import dataclasses
import functools
import json
import multiprocessing
import os
import pathlib
import threading
from collections.abc import Callable

import grain
import numpy as np
from absl import flags

from videonsa_jax.config.schema import DataConfig, ModelConfig
from videonsa_jax.data import load, pack
from videonsa_jax.data.bad_samples import BadSampleLog, lost_files
from videonsa_jax.data.decoder_pool import DecoderPool
from videonsa_jax.data.errors import BadSample
from videonsa_jax.data.load import Loader, Size
from videonsa_jax.data.pack import Bucket
from videonsa_jax.data.plan import BatchPacker, BatchPlan, MeasuredSample, PackedSample, PlanDataset
from videonsa_jax.data.sample import Sample
from videonsa_jax.data.sources import JoinedSource, JsonSource, Source
from videonsa_jax.data.tfds_builder import PreparedSource
from videonsa_jax.data.tokenizer import Tokenizer
from videonsa_jax.errors import UserError

PREPARED = "tfds:"  # in front of the folder of a prepared dataset
# Fields of DataConfig that may change when a run continues: not which samples, but where and how.
ELSEWHERE = (
    "source",
    "video_root",
    "tokenizer",
    "workers",
    "threads",
    "decode_timeout_s",
    "max_bad_fraction",
)
PREFETCHED = 2  # batches made ahead of the training step, by each worker


class Batches:
    """Iterator of dicts: the array fields of `videonsa_jax.batch.Batch`, this process's rows.

    `frame_patches` is the static field that goes with all of them.

    Its state is small, made of JSON values, and does not depend on the numbers of workers and
    processes: a run may continue with others.
    """

    def __init__(
        self,
        make_iterator: Callable[[dict | None], grain.DatasetIterator],
        bad_log: BadSampleLog,
        stream: dict,
        decoders: DecoderPool,
        frame_patches: int,
    ):
        """`stream`: settings that must not change when a run continues."""
        self.frame_patches, self._decoders = frame_patches, decoders
        self._make_iterator, self._bad_log, self._stream = make_iterator, bad_log, stream
        self._plan: dict | None = None
        self._iterator = make_iterator(None)

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        """Raises UserError: too many samples are bad, none is good, or a worker was killed."""
        while True:
            arrays, stats = self._next()
            self._plan = stats.next_state
            self._bad_log.add(stats.seen, stats.bad)
            if arrays:
                return arrays

    def _next(self) -> tuple[dict[str, np.ndarray], "BatchStats"]:
        try:
            return next(self._iterator)
        except RuntimeError as error:
            if not str(error).startswith("Worker process was terminated"):  # by Grain
                raise
            raise UserError(
                "a process of data.workers was killed, as when memory runs out; start the same "
                "command again, with fewer workers or threads if it recurs"
            ) from error

    @property
    def counts(self) -> dict[str, int]:
        """Samples of this process so far: "seen" and, of them, "bad"."""
        return {"seen": self._bad_log.seen, "bad": self._bad_log.bad}

    def get_state(self) -> dict:
        """From it on come the batches after the last one that was returned."""
        return {"stream": self._stream, "plan": self._plan, "counts": self.counts}

    def set_state(self, state: dict) -> None:
        """Raises UserError: the state was saved with other data or another batch layout."""
        for name, value in self._stream.items():
            saved = state["stream"].get(name, value)  # a field may be newer than the checkpoint
            if saved != value:
                raise UserError(
                    f"data.{name}={value}, but the checkpoint's data state was saved with "
                    f"{saved}; continue with that, or start in a new --workdir"
                )
        self._iterator.close()
        self._plan = state["plan"]
        self._bad_log.seen, self._bad_log.bad = state["counts"]["seen"], state["counts"]["bad"]
        self._iterator = self._make_iterator(self._plan)

    def close(self) -> None:
        """Ends workers, threads and decoder processes."""
        self._decoders.close()  # first, since threads wait for them
        self._iterator.close()


def make_dataset(
    data: DataConfig,
    model: ModelConfig,
    *,
    bad_samples: str | pathlib.Path,
    shard_index: int = 0,
    num_shards: int = 1,
) -> Batches:
    """The batches of a training run, without end.

    Args:
      data: what to read and how.
      model: token ids, patch geometry, NSA block.
      bad_samples: JSONL file that lists skipped samples; continued if it exists. Each process
        needs its own.
      shard_index: which contiguous shard of a batch's rows to yield.
      num_shards: into how many equal shares they are cut.

    Raises:
      UserError: a file is missing, the tokenizer is not the model's, or rows do not divide.
    """
    if data.batch % num_shards:
        raise UserError(f"data.batch={data.batch} rows do not divide by {num_shards} processes")
    source = open_source(data)
    decoders = DecoderPool(data.threads, data.decode_timeout_s, lost_files(bad_samples))
    loader = Loader(data, model, Tokenizer.from_dir(data.tokenizer), decoders)
    sizes = grain.MapDataset.range(len(source))
    if data.shuffle:
        sizes = sizes.shuffle(seed=data.seed)  # in another order in each pass
    sizes = sizes.repeat().map(SampleSizes(source, loader))
    rows = data.batch // num_shards
    load_rows = LoadRows(
        source,
        loader,
        model,
        rows=slice(shard_index * rows, (shard_index + 1) * rows),
        rejected=slice(shard_index, None, num_shards),
        threads=data.threads,
    )
    make_packer = functools.partial(
        BatchPacker,
        [Bucket(*bucket) for bucket in data.buckets],
        batch=data.batch,
        samples_per_row=data.samples_per_row,
        block=model.nsa.block_size,
    )

    def make_iterator(start: dict | None) -> grain.DatasetIterator:
        reading = grain.ReadOptions(data.threads, prefetch_buffer_size=2 * data.threads)
        plans = PlanDataset(
            sizes.to_iter_dataset(reading),
            make_packer=make_packer,
            start=start,
            records=len(source),
        )
        return iter(_prefetched(plans.map(load_rows), data.workers))

    return Batches(
        make_iterator,
        BadSampleLog(bad_samples, data.max_bad_fraction, records=len(source) // num_shards),
        _stream_settings(data, len(source)),
        decoders,
        load.frame_patches(data, model),
    )


def open_source(data: DataConfig) -> Source:
    """All of `data.source`, one after the other."""
    return JoinedSource(
        [
            PreparedSource(path.removeprefix(PREPARED))
            if path.startswith(PREPARED)
            else JsonSource(path, data.video_root)
            for path in data.source
        ]
    )


class SampleSizes:
    """Record index -> `MeasuredSample`. Sizes are kept, so later passes do not open files again."""

    def __init__(self, source: Source, loader: Loader):
        self._source, self._loader = source, loader
        self._known: dict[int, MeasuredSample] = {}

    def __call__(self, record: int) -> MeasuredSample:
        if record not in self._known:
            self._known[record] = self._measure(record)
        return self._known[record]

    def _measure(self, record: int) -> MeasuredSample:
        try:
            conversation = self._source[record]
            return MeasuredSample(record, conversation.name, self._loader.measure(conversation))
        except BadSample as bad:
            return MeasuredSample(record, bad.file, rejected=bad)


@dataclasses.dataclass(frozen=True)
class BatchStats:
    """What became of one plan's samples."""

    seen: int  # samples of this process's share, bad ones included
    bad: tuple[BadSample, ...]  # likewise
    next_state: dict


class LoadRows:
    """Decodes and packs a process's rows of a plan."""

    def __init__(
        self,
        source: Source,
        loader: Loader,
        model: ModelConfig,
        *,
        rows: slice,
        rejected: slice,
        threads: int,
    ):
        """`rows`, `rejected`: this process's share of a plan's rows and rejected samples."""
        self._source, self._loader, self._model = source, loader, model
        self._rows, self._rejected, self._threads = rows, rejected, threads

    def __call__(self, plan: BatchPlan) -> tuple[dict[str, np.ndarray], BatchStats]:
        """The arrays of a batch; none where the plan is only a report."""
        rows = plan.rows[self._rows]
        places = [place for row in rows for place in row]
        with concurrent.futures.ThreadPoolExecutor(self._threads) as pool:
            samples = list(pool.map(self._load, places))
        rejected = plan.rejected[self._rejected]
        failed = tuple(sample for sample in samples if isinstance(sample, BadSample))
        arrays = {}
        if plan.bucket is not None:
            left = iter(samples)
            whole = [[sample for _, sample in zip(row, left, strict=False)] for row in rows]
            arrays = pack.pack(
                [[s for s in row if isinstance(s, Sample)] for row in whole],
                plan.bucket,
                self._model,
            )
        seen = len(places) + len(rejected)
        return arrays, BatchStats(seen, rejected + failed, plan.next_state)

    def _load(self, place: PackedSample) -> Sample | BadSample:
        try:
            conversation = self._source[place.record]
            sample = self._loader.load(conversation)
        except BadSample as bad:
            return bad
        size = Size(*pack.row_tokens([sample], self._model))
        if size != place.size:
            return BadSample(
                conversation.name, f"decodes to {size}, but its headers promise {place.size}"
            )
        return sample


def _prefetched(batches: grain.IterDataset, workers: int) -> grain.IterDataset:
    if not workers:
        return grain.experimental.ThreadPrefetchIterDataset(
            batches, prefetch_buffer_size=PREFETCHED
        )
    if not flags.FLAGS.is_parsed():  # Grain's workers read flags; programs have parsed them
        flags.FLAGS.mark_as_parsed()
    return batches.mp_prefetch(
        grain.MultiprocessingOptions(workers, per_worker_buffer_size=PREFETCHED),
        worker_init_fn=end_with_parent,
    )


def end_with_parent(*_: int) -> None:
    """For workers: Grain's own would wait for ever for a parent that was killed."""
    parent = multiprocessing.parent_process()

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _stream_settings(data: DataConfig, records: int) -> dict:
    """What decides which samples are in which batch, as JSON values."""
    settings = dataclasses.asdict(data) | {"records": records}
    for name in ELSEWHERE:
        del settings[name]
    return json.loads(json.dumps(settings))
