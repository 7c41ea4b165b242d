"""Asks a model a task's questions by greedy generation; one row per question, as they come."""

import dataclasses
import hashlib
import json
import pathlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from videonsa_jax.batch import Batch
from videonsa_jax.config.schema import DataConfig, EvalConfig
from videonsa_jax.data import load, pack, sources
from videonsa_jax.data.bad_samples import BadSampleLog, lost_files
from videonsa_jax.data.decoder_pool import DecoderPool
from videonsa_jax.data.errors import BadSample, about_sample
from videonsa_jax.data.pack import Bucket
from videonsa_jax.data.sample import Sample, Visual
from videonsa_jax.data.tokenizer import Tokenizer
from videonsa_jax.evaluation import scoring
from videonsa_jax.evaluation.question import Question
from videonsa_jax.evaluation.results import ResultFile, write_json
from videonsa_jax.evaluation.tasks import task_of
from videonsa_jax.model.generate import generate
from videonsa_jax.model.model import VideoNSA
from videonsa_jax.progress import Progress
from videonsa_jax.sharding.rules import Rules

SAMPLING = ("fps", "min_frames", "max_frames", "min_pixels", "max_pixels", "total_pixels")


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """A model and all that decides what it answers.

    Attributes:
      model: with its parameters, on the mesh of `jax.set_mesh` if there is one.
      tokenizer: of the model.
      data: how videos are sampled and resized, where relative paths start, the buckets.
      cfg: how many questions at a time, how long the answers.
      checkpoint: names the parameters in the results, so that rows of others do not mix with them.
      blind: blank all frames, to see what the questions alone give away.
    """

    model: VideoNSA
    tokenizer: Tokenizer
    data: DataConfig
    cfg: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    checkpoint: str = ""
    blind: bool = False

    @property
    def settings(self) -> str:
        """Sixteen digits that differ where answers may differ."""
        values = {
            "model": dataclasses.asdict(self.model.cfg),
            "dtype": self.model.compute.dtype,
            "data": {name: getattr(self.data, name) for name in (*SAMPLING, "buckets")},
            "eval": {name: getattr(self.cfg, name) for name in ("batch", "max_new_tokens")},
            "checkpoint": self.checkpoint,
            "blind": self.blind,
        }
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]

    def load(self, question: Question, decoders: DecoderPool | None = None) -> Sample:
        """Decodes a question's video and renders its prompt, up to where the answer begins.

        Args:
          question: its record and its video.
          decoders: opens the files; None: this process does.

        Raises:
          BadSample: the record or the video cannot be used, or the prompt fits no bucket.
        """
        root = pathlib.Path(self.data.video_root or question.file.parent)
        conversation = sources.parse_record(question.record, question.name, root)
        loader = load.Loader(self.data, self.model.cfg, self.tokenizer, decoders)
        sample = loader.load(conversation, generation_prompt=True)
        if self.bucket(sample) is None:
            vision, text = pack.row_tokens([sample], self.model.cfg)
            raise BadSample(
                question.name,
                f"needs {vision} vision and {text} text slots, more than "
                f"data.buckets={self.data.buckets} has",
            )
        if self.blind:
            return dataclasses.replace(sample, visuals=tuple(map(_blank, sample.visuals)))
        return sample

    def answer(self, samples: Sequence[Sample]) -> list[str]:
        """The generated text after each prompt, special tokens left out."""
        buckets = [self.bucket(sample) for sample in samples]
        answers: dict[int, str] = {}
        for bucket in dict.fromkeys(buckets):
            places = [i for i, own in enumerate(buckets) if own == bucket]
            texts = self._generate([samples[i] for i in places])
            answers.update(zip(places, texts, strict=True))
        return [answers[i] for i in range(len(samples))]

    def bucket(self, sample: Sample) -> Bucket | None:
        """The smallest bucket that holds the sample; None: it fits none."""
        vision, text = pack.row_tokens([sample], self.model.cfg)
        fitting = [b for b in self.data.buckets if vision <= b[0] and text <= b[1]]
        return Bucket(*min(fitting)) if fitting else None

    def batch(self, samples: Sequence[Sample]) -> Batch:
        """One prompt per row, all of the same bucket; the mesh may ask for spare rows."""
        spare = -len(samples) % _row_shards(self.model.rules)
        rows = [[sample] for sample in samples] + [[samples[-1]]] * spare
        arrays = pack.pack(rows, self.bucket(samples[0]), self.model.cfg)
        return Batch(**arrays, frame_patches=load.frame_patches(self.data, self.model.cfg))

    def _generate(self, samples: list[Sample]) -> list[str]:
        """Always `cfg.batch` rows; those left over repeat the last prompt and end when it does."""
        stop = (self.tokenizer.im_end, self.tokenizer.end_of_text)
        spare = [samples[-1]] * (self.cfg.batch - len(samples))
        tokens = generate(
            self.model,
            self.batch(samples + spare),
            max_new_tokens=self.cfg.max_new_tokens,
            stop_tokens=stop,
        )
        return [_decode(row, stop, self.tokenizer) for row in np.asarray(tokens)[: len(samples)]]


def evaluate(
    evaluator: Evaluator, questions: Sequence[Question], *, task: str, out: str | pathlib.Path
) -> dict[str, Any]:
    """Answers the questions and scores the answers.

    Writes `out/<task>.jsonl`, one row per question, flushed as they come; what an earlier,
    interrupted call wrote there is kept and not asked again. Then writes `out/<task>_summary.json`.
    A question whose video cannot be read, or that fits no bucket, gets a row with `error`, counts
    as wrong, and is listed in `out/bad_samples.jsonl`.

    Args:
      evaluator: the model and its settings.
      questions: with distinct ids, see `videonsa_jax.evaluation.tasks.load`.
      task: of `videonsa_jax.evaluation.tasks`; scores the answers and names the files.
      out: folder, made if it does not exist.

    Returns:
      The summary: `scoring.summarize`'s fields (accuracy, n, kinds, chance, n_failed, n_unparsed),
      what the task adds, and task, attention, blind, checkpoint, settings (`Evaluator.settings`),
      wall_s of this call.

    Raises:
      UserError: `out` holds rows of other settings.
    """
    started = time.monotonic()
    out = pathlib.Path(out)
    with ResultFile(out / f"{task}.jsonl", evaluator.settings) as results:
        bad_log = BadSampleLog(
            out / "bad_samples.jsonl", max_bad_fraction=1.0, records=len(questions)
        )
        _answer_missing(evaluator, questions, results, bad_log, task=task)
        rows = results.rows([q.id for q in questions])
    summary = {
        "task": task,
        **scoring.summarize(rows),
        **task_of(task).aggregate(rows),
        "attention": evaluator.model.cfg.attention,
        "blind": evaluator.blind,
        "checkpoint": evaluator.checkpoint,
        "settings": evaluator.settings,
        "wall_s": round(time.monotonic() - started, 3),
    }
    write_json(out / f"{task}_summary.json", summary)
    return summary


def _answer_missing(
    evaluator: Evaluator,
    questions: Sequence[Question],
    results: ResultFile,
    bad_log: BadSampleLog,
    *,
    task: str,
) -> None:
    """Groups are those of an uninterrupted run, so that each row is computed in the same batch."""
    size, data = evaluator.cfg.batch, evaluator.data
    groups = [questions[i : i + size] for i in range(0, len(questions), size)]
    groups = [group for group in groups if any(q.id not in results for q in group)]
    right = [row["correct"] for row in results.rows([q.id for q in questions])]
    with (
        ThreadPoolExecutor(data.threads) as pool,
        # inside, so that no thread still waits for a decoder when the threads are joined
        DecoderPool(data.threads, data.decode_timeout_s, lost_files(bad_log.path)) as decoders,
        Progress(task, len(questions), done=len(right)) as progress,
    ):
        for group, samples in _one_ahead(pool, lambda q: _load(evaluator, q, decoders), groups):
            bad_log.add(len(samples), [s for s in samples if isinstance(s, BadSample)])
            rows = _rows(evaluator, task, group, samples)
            new = [row for row in rows if row["id"] not in results]
            for row in new:
                results.append(row)
            right += [row["correct"] for row in new]
            progress.advance(len(new), f"accuracy {sum(right) / len(right):.3f}")


def _one_ahead(
    pool: ThreadPoolExecutor, function: Callable, groups: Sequence[Sequence]
) -> Iterator[tuple[Sequence, list]]:
    """Each group and its items' results, the next group's being computed meanwhile."""
    waiting = deque()
    for group in groups:
        waiting.append((group, [pool.submit(function, item) for item in group]))
        if len(waiting) > 1:
            group, futures = waiting.popleft()
            yield group, [future.result() for future in futures]
    for group, futures in waiting:
        yield group, [future.result() for future in futures]


def _load(evaluator: Evaluator, question: Question, decoders: DecoderPool) -> Sample | BadSample:
    try:
        with about_sample(question.name):
            return evaluator.load(question, decoders)
    except BadSample as error:
        return error


def _rows(
    evaluator: Evaluator,
    task: str,
    questions: Sequence[Question],
    samples: Sequence[Sample | BadSample],
) -> list[dict[str, Any]]:
    good = [sample for sample in samples if isinstance(sample, Sample)]
    answers = iter(evaluator.answer(good))
    return [
        _row(task, question, error=sample)
        if isinstance(sample, BadSample)
        else _row(task, question, sample, next(answers))
        for question, sample in zip(questions, samples, strict=True)
    ]


def _row(
    task: str,
    question: Question,
    sample: Sample | None = None,
    generated: str | None = None,
    error: BadSample | None = None,
) -> dict[str, Any]:
    """With a sample and its answer, or with an error."""
    parsed, correct = (None, False) if error else task_of(task).score(generated, question)
    row = {
        "id": question.id,
        "kind": question.kind,
        "prompt": question.prompt,
        "options": question.options,
        "frames": [] if error else [_frames(visual) for visual in sample.visuals],
        "generated": generated,
        "parsed": parsed,
        "answer": question.answer,
        "correct": correct,
    }
    return {**row, "error": str(error)} if error else row


def _frames(visual: Visual) -> dict[str, Any]:
    """The grid of patches the model saw, and when in the video its frames are."""
    return {
        "count": len(visual.frame_seconds),
        "seconds": [round(second, 3) for second in visual.frame_seconds],
        "grid": visual.grid,
    }


def _row_shards(rules: Rules) -> int:
    """Into how many parts rows are split under the mesh of `jax.set_mesh`."""
    axis = rules.mesh_axis("batch")
    return 1 if axis is None else axis.size


def _blank(visual: Visual) -> Visual:
    """The mean colour everywhere: patches are normalised."""
    return dataclasses.replace(visual, patches=np.zeros_like(visual.patches))


def _decode(tokens: np.ndarray, stop: Sequence[int], tokenizer: Tokenizer) -> str:
    ends = np.flatnonzero(np.isin(tokens, stop))
    tokens = tokens[: ends[0]] if len(ends) else tokens
    return tokenizer.decode(tokens, skip_special=True).strip()
