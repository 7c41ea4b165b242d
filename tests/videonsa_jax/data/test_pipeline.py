"""Batches are the same however they are made; bad samples are skipped, counted and listed."""

import dataclasses
import itertools
import json
import multiprocessing
import os
import re
import select
import subprocess
import sys

import numpy as np
import pytest

from tests import bad_decoders
from videonsa_jax.config.schema import DataConfig
from videonsa_jax.data import load, pipeline, sources
from videonsa_jax.errors import UserError

SMALL, LARGE = (16, 128), (64, 128)


def record(video: str, answer: str = "Red.") -> dict:
    question = {"from": "human", "value": "<image>\nWhat?"}
    return {"video": video, "conversations": [question, {"from": "gpt", "value": answer}]}


@pytest.fixture(scope="module")
def videos(tmp_path_factory, make_video, truncate, damage):
    """0.mp4 .. 9.mp4 of 12 to 48 frames, a truncated one, and one damaged near its end."""
    folder = tmp_path_factory.mktemp("videos")
    for i in range(10):
        make_video(folder / f"{i}.mp4", frames=12 + 4 * i)
    truncate(make_video(folder / "cut.mp4", frames=48, faststart=True), 0.95)
    damage(make_video(folder / "damaged.mp4", frames=48, faststart=True))
    return folder


@pytest.fixture
def make(videos, tokenizer_dir, model, write_jsonl, tmp_path):
    """Opens the batches of some records."""
    opened = []

    def open_batches(records=None, *, share=(0, 1), **fields):
        if records is None:
            records = [record(f"{i}.mp4", f"Answer {i}.") for i in range(10)]
        data = DataConfig(
            **{
                "source": (str(write_jsonl(tmp_path / "d.jsonl", records)),),
                "video_root": str(videos),
                "tokenizer": str(tokenizer_dir),
                "fps": 8.0,
                "max_frames": 16,
                "batch": 2,
                "buckets": (LARGE,),
                "threads": 2,
                "decode_timeout_s": 0,  # no decoder processes: they take a while to start
                **fields,
            }
        )
        batches = pipeline.make_dataset(
            data,
            model,
            bad_samples=tmp_path / f"bad_samples.{share[0]}.jsonl",
            shard_index=share[0],
            num_shards=share[1],
        )
        opened.append(batches)
        return batches

    yield open_batches
    for batches in opened:
        batches.close()


def take(batches, count: int) -> list[dict]:
    return list(itertools.islice(batches, count))


def assert_equal(got: list[dict], want: list[dict]) -> None:
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def answers(batch: dict, tokenizer) -> list[str]:
    return [
        tokenizer.decode(targets[weights > 0])
        for targets, weights in zip(batch["text_targets"], batch["text_weights"], strict=True)
    ]


def listed(tmp_path) -> list[dict]:
    lines = (tmp_path / "bad_samples.0.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_batch_has_the_fields_of_batch(make, model):
    batch_module = pytest.importorskip("videonsa_jax.batch", reason="needs JAX")
    batches = make()
    (batch,) = take(batches, 1)
    fields = {field.name for field in dataclasses.fields(batch_module.Batch)}
    assert set(batch) == fields - {"frame_patches"}
    assert batch["patches"].shape == (2, 4 * LARGE[0], model.vision.patch_elements)
    assert batch["text_tokens"].shape == (2, LARGE[1])
    assert batches.frame_patches >= model.vision.window_patches


def test_a_pass_sees_every_sample_once_in_another_order(make, tokenizer):
    batches = make()
    passes = [[a for b in take(batches, 5) for a in answers(b, tokenizer)] for _ in range(2)]
    assert sorted(passes[0]) == sorted(passes[1]) == [f"Answer {i}.<|im_end|>" for i in range(10)]
    assert passes[0] != passes[1]


def test_the_seed_decides_the_order(make):
    assert_equal(take(make(seed=3), 3), take(make(seed=3), 3))
    one, other = take(make(seed=3), 1)[0], take(make(seed=4), 1)[0]
    assert (one["text_tokens"] != other["text_tokens"]).any()


def test_without_shuffling_the_order_is_that_of_the_file(make, tokenizer):
    batches = take(make(shuffle=False), 5)
    got = [answer for batch in batches for answer in answers(batch, tokenizer)]
    assert got == [f"Answer {i}.<|im_end|>" for i in range(10)]


def test_each_batch_is_of_one_bucket(make):
    batches = take(make(buckets=(LARGE, SMALL)), 10)
    shapes = {batch["vision_order"].shape for batch in batches}
    assert shapes == {(2, SMALL[0]), (2, LARGE[0])}
    for batch in batches:
        most = (batch["vision_order"] >= 0).sum(axis=1).max()
        assert (most <= SMALL[0]) == (batch["vision_order"].shape[1] == SMALL[0])


def test_rows_pack_several_samples(make, model):
    batches = take(make(samples_per_row=3, buckets=((128, 256),)), 3)
    segments = [row.max() + 1 for batch in batches for row in batch["vision_segment"]]
    assert max(segments) == 3
    for batch in batches:
        for row in batch["vision_segment"]:
            starts = [np.argmax(row == s) for s in range(row.max() + 1)]
            assert all(start % model.nsa.block_size == 0 for start in starts)


@pytest.mark.parametrize("at", [1, 4])
@pytest.mark.parametrize("samples_per_row", [1, 2])
def test_resuming_changes_nothing(make, at, samples_per_row):
    """Samples that wait in half-filled rows and buckets come back, bad ones stay skipped."""
    records = [record(f"{i}.mp4") for i in range(10)] + [record("none.mp4"), record("cut.mp4")]
    fields = {
        "buckets": (SMALL, LARGE),
        "samples_per_row": samples_per_row,
        "max_bad_fraction": 1.0,
    }
    straight = make(records, **fields)
    want = take(straight, at)
    state = json.loads(json.dumps(straight.get_state()))
    want += take(straight, 6)
    counts = straight.counts
    resumed = make(records, **fields)
    resumed.set_state(state)
    assert_equal(take(resumed, 6), want[at:])
    assert resumed.counts == counts


def test_state_can_be_restored_in_place(make):
    batches = make()
    take(batches, 2)
    state = batches.get_state()
    want = take(batches, 3)
    batches.set_state(state)
    assert_equal(take(batches, 3), want)


def test_state_of_other_settings_is_refused(make):
    state = make(seed=1).get_state()
    with pytest.raises(UserError, match=r"data.seed=2, but the checkpoint's .* saved with 1"):
        make(seed=2).set_state(state)


@pytest.mark.parametrize("bucket_count", [1, 2])
def test_processes_share_the_rows_of_the_same_batches(make, bucket_count):
    """Also where one process finds a video damaged that the other does not open."""
    records = [record(f"{i}.mp4") for i in range(8)] + [record("damaged.mp4"), record("none.mp4")]
    fields = {"batch": 4, "buckets": (LARGE, SMALL)[:bucket_count], "max_bad_fraction": 1.0}
    want = take(make(records, **fields), 4)
    shares = [take(make(records, share=(i, 2), **fields), 4) for i in range(2)]
    for whole, one, other in zip(want, *shares, strict=True):
        for name, value in whole.items():
            np.testing.assert_array_equal(np.concatenate([one[name], other[name]]), value)


def test_workers_do_not_change_the_batches(make):
    straight = make()
    want = take(straight, 6)
    worked = make(workers=2)
    assert_equal(take(worked, 3), want[:3])
    resumed = make()
    resumed.set_state(worked.get_state())
    assert_equal(take(resumed, 3), want[3:])


def test_bad_samples_are_skipped_counted_and_listed_once(make, tmp_path, videos, tokenizer):
    records = [record(f"{i % 10}.mp4", f"Answer {i}.") for i in range(60)]
    records[3] = record("none.mp4")
    records[5] = record("cut.mp4")
    batches = make(records, max_bad_fraction=0.05)
    got = [a for b in take(batches, 70) for a in answers(b, tokenizer)]
    assert batches.counts["bad"] >= 4  # twice each in two passes
    assert set(got) - {""} == {f"Answer {i}.<|im_end|>" for i in range(60) if i not in (3, 5)}
    rows = listed(tmp_path)
    assert sorted(row["file"] for row in rows) == [f"{videos}/cut.mp4", f"{videos}/none.mp4"]
    assert {"no such file"} < {row["reason"] for row in rows}


def test_sample_that_fails_to_decode_leaves_its_row_empty(make, tokenizer):
    records = [record("0.mp4"), record("damaged.mp4")]
    (batch,) = take(make(records, shuffle=False, max_bad_fraction=1.0), 1)
    assert answers(batch, tokenizer) == ["Red.<|im_end|>", ""]
    assert (batch["vision_order"][1] == -1).all()
    assert (batch["text_order"][1] == -1).all()


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (record("none.mp4"), "none.mp4: no such file"),
        (record("0.mp4", "far too long an answer " * 40), "text tokens fit none of data.buckets"),
        ({"video": "0.mp4"}, 'has neither "conversations" nor "messages"'),
        ({**record("0.mp4"), "video": ["0.png", "1.png"]}, "0.png: no such file"),
        ({"video": "0.mp4", "conversations": record("")["conversations"][:1]}, "nothing to learn"),
        (
            {"conversations": [{"from": "gpt", "value": "a", "loss": False}]},
            'no assistant turn bears loss ("loss": false)',
        ),
    ],
    ids=["missing", "too_long", "no_turns", "missing_frame", "no_answer", "no_loss"],
)
def test_too_many_bad_samples_stop_the_run_in_one_line(make, tmp_path, wrong, reason):
    records = [record(f"{i}.mp4") for i in range(9)] + [wrong] * 3
    with pytest.raises(UserError, match=r"samples are bad, more than data.max_bad_fraction=0.05"):
        take(make(records), 100)
    assert reason in "{file}: {reason}".format(**listed(tmp_path)[0])


def test_few_bad_samples_at_the_beginning_do_not_stop_a_run(make):
    records = [record("none.mp4")] * 2 + [record("0.mp4")] * 60
    assert len(take(make(records, shuffle=False), 20)) == 20


def test_a_source_without_a_usable_sample_ends_with_a_message(make):
    with pytest.raises(UserError, match="a whole pass over 1 samples gave none to train on"):
        take(make([record("none.mp4")], max_bad_fraction=1.0), 1)


def test_the_list_of_bad_samples_is_continued(make, tmp_path):
    records = [record("0.mp4"), record("none.mp4")]
    (tmp_path / "bad_samples.0.jsonl").write_text('{"file": "a", "reason": "b"}\n{"file": "tor')
    take(make(records, max_bad_fraction=1.0), 3)
    take(make(records, max_bad_fraction=1.0), 3)
    assert [row["reason"] for row in listed(tmp_path)] == ["b", "no such file"]


def test_keep_frames_leaves_videos_out_without_counting_them_as_bad(make, tokenizer):
    """At 8 frames per second, videos 3 to 6 of 24 to 36 frames have 8 to 12."""
    batches = make(frame_count_range=(8, 12))
    got = {a for b in take(batches, 4) for a in answers(b, tokenizer)}
    assert got == {f"Answer {i}.<|im_end|>" for i in range(3, 7)}
    assert batches.counts == {"seen": 8, "bad": 0}


def test_rows_must_divide_among_processes(make):
    with pytest.raises(UserError, match=r"data.batch=3 rows do not divide by 2 processes"):
        make(batch=3, share=(0, 2))


def test_tokenizer_must_be_the_models(videos, tokenizer_dir, model, tmp_path, write_jsonl):
    data = DataConfig(
        source=(str(write_jsonl(tmp_path / "d.jsonl", [record("0.mp4")])),),
        tokenizer=str(tokenizer_dir),
    )
    other = dataclasses.replace(model, video_token_id=5)
    with pytest.raises(UserError, match=r"model.video_token_id=5, but the tokenizer"):
        pipeline.make_dataset(data, other, bad_samples=tmp_path / "bad.jsonl")


@pytest.fixture
def bad_decoder(monkeypatch, tmp_path):
    """The absolute path of a video named STAGE-FAULT, which misbehaves so."""
    monkeypatch.setattr(pipeline, "JsonSource", bad_decoders.Source)
    return lambda name: str(tmp_path / f"{name}.mp4")


@pytest.mark.slow
def test_a_killed_worker_ends_the_run_in_one_line(make):
    batches = make(workers=1)
    next(batches)
    for worker in multiprocessing.active_children():
        worker.kill()
    with pytest.raises(UserError, match=r"a process of data\.workers was killed"):
        take(batches, 20)


def test_workers_end_with_a_killed_run(tmp_path):
    os.mkfifo(tmp_path / "pid")
    program = tmp_path / "program.py"
    program.write_text(
        "import multiprocessing, os, pathlib, signal\n"
        "from videonsa_jax.data import pipeline\n"
        "def work():\n"
        "    pipeline.end_with_parent(0, 1)\n"
        f"    pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))\n"
        "    signal.pause()\n"
        "if __name__ == '__main__':\n"
        "    multiprocessing.get_context('spawn').Process(target=work).start()\n"
        "    signal.pause()\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen([sys.executable, str(program)], env=environment)
    worker = os.pidfd_open(int((tmp_path / "pid").read_text()))
    parent.kill()
    parent.wait()
    ended, _, _ = select.select([worker], [], [], 60)
    os.close(worker)
    assert ended


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_videos_that_hang_or_crash_cost_only_themselves(
    make, bad_decoder, tokenizer, tmp_path, workers
):
    bad = ["outline-abort", "outline-hang", "read-abort", "read-hang"]
    records = [record(f"{i}.mp4", f"Answer {i}.") for i in range(8)]
    records += [record(bad_decoder(name)) for name in bad]
    limits = {"max_bad_fraction": 1.0, "decode_timeout_s": 3}
    batches = make(records, shuffle=False, workers=workers, **limits)
    got = [a for b in take(batches, 10) for a in answers(b, tokenizer)]
    assert got == [*(f"Answer {i}.<|im_end|>" for i in range(8)), "", ""] * 2
    reasons = bad_decoders.listed(tmp_path / "bad_samples.0.jsonl")
    assert sorted(reasons) == bad
    for name, reason in reasons.items():
        is_hang = name.endswith("hang")
        assert ("data.decode_timeout_s=3" if is_hang else "was killed (SIGABRT)") in reason
        assert "not tried again while this line is listed" in reason
        assert bad_decoders.tries(bad_decoder(name)).count(name.split("-")[0]) == 1


def test_restart_does_not_try_again_what_hung_or_crashed(make, bad_decoder, tmp_path):
    """And goes on bit by bit, whichever stage was lost; a deleted line is tried again."""
    bad = ["outline-exit", "read-exit"]
    records = [record(f"{i}.mp4", f"Answer {i}.") for i in range(6)]
    records += [record(bad_decoder(name)) for name in bad]
    fields = {"max_bad_fraction": 1.0, "decode_timeout_s": 60}
    straight = make(records, **fields)
    take(straight, 4)  # the first pass ends within them
    state = json.loads(json.dumps(straight.get_state()))
    want = take(straight, 6)
    assert sorted(bad_decoders.listed(tmp_path / "bad_samples.0.jsonl")) == bad

    resumed = make(records, **{**fields, "decode_timeout_s": 50})
    resumed.set_state(state)
    assert_equal(take(resumed, 6), want)
    tried = {name: bad_decoders.tries(bad_decoder(name)) for name in bad}
    assert tried == {"outline-exit": ["outline"], "read-exit": ["outline", "read", "outline"]}
    assert resumed.counts == straight.counts

    (tmp_path / "bad_samples.0.jsonl").unlink()
    take(make(records, **fields), 4)
    assert bad_decoders.tries(bad_decoder("outline-exit")) == ["outline", "outline"]


def test_processes_agree_on_what_any_of_them_lost(make, bad_decoder, tmp_path):
    """Process 1 listed it; process 0 does not give it a place either."""
    path = bad_decoder("outline-exit")
    row = {"file": path, "reason": "died", "lost_in": "outline"}
    (tmp_path / "bad_samples.1.jsonl").write_text(json.dumps(row) + '\n{"file": "torn')
    records = [record(f"{i}.mp4") for i in range(7)] + [record(path)]
    fields = {"batch": 4, "max_bad_fraction": 1.0, "decode_timeout_s": 60}
    want = take(make(records[:7], **fields, shuffle=False), 1)
    assert_equal(take(make(records, **fields, shuffle=False), 1), want)
    take(make(records, **fields), 3)
    assert bad_decoders.tries(path) == []
    assert "died" in bad_decoders.listed(tmp_path / "bad_samples.0.jsonl")["outline-exit"]


@pytest.mark.parametrize("stage", bad_decoders.STAGES)
def test_any_exception_costs_its_sample_only(make, bad_decoder, tokenizer, tmp_path, stage):
    errors = {f"{stage}-{name}": error for name, error in bad_decoders.ERRORS.items()}
    records = [record(f"{i}.mp4", f"Answer {i}.") for i in range(5)]
    records += [record(bad_decoder(name)) for name in errors]
    batches = make(records, max_bad_fraction=1.0)
    got = {a for b in take(batches, 12) for a in answers(b, tokenizer)}
    assert got - {""} == {f"Answer {i}.<|im_end|>" for i in range(5)}
    reasons = bad_decoders.listed(tmp_path / "bad_samples.0.jsonl")
    assert reasons == {name: f"{type(e).__name__}: {e}" for name, e in errors.items()}


def test_records_that_cannot_be_fetched_are_bad_samples(make, tmp_path, monkeypatch):
    class Torn(sources.JsonSource):
        def __getitem__(self, index):
            if index == 1:
                raise RuntimeError("record of a torn file")
            return super().__getitem__(index)

    monkeypatch.setattr(pipeline, "JsonSource", Torn)
    take(make([record("0.mp4"), record("1.mp4")], max_bad_fraction=1.0), 3)
    (row,) = listed(tmp_path)
    assert row["file"] == "record 1 of data.source"
    assert row["reason"] == "RuntimeError: record of a torn file"


def test_video_that_decodes_to_another_size_than_it_promised_is_bad(make, tmp_path, monkeypatch):
    promise = load.FrameReader.outline
    monkeypatch.setattr(
        load.FrameReader,
        "outline",
        lambda *args: promise(*args)._replace(frames=2),
    )
    take(make([record("0.mp4")], max_bad_fraction=1.0, fps=24.0), 2)
    (row,) = listed(tmp_path)
    assert re.search(r"decodes to .*vision=\d+.* but its headers promise .*vision=4", row["reason"])


def test_spoilt_list_of_bad_samples_names_its_line(make, tmp_path):
    (tmp_path / "bad_samples.0.jsonl").write_text('{"file": "a", "reason": "b"}\n{"file": "a"}\n')
    with pytest.raises(UserError, match=r"bad_samples.0.jsonl:2: not a line of a list"):
        make()


@pytest.mark.parametrize(("low", "high"), [(3_136, 50_176), (50_176, 50_176), (784, 12_544)])
def test_frame_patches_bounds_every_usual_frame(model, low, high):
    data = DataConfig(source=("-",), tokenizer="-", min_pixels=low, max_pixels=high)
    bound = load.frame_patches(data, model)
    reader = load.FrameReader(data, model.vision)
    for width in range(40, 2000, 37):
        for aspect in (1.0, 1.2, 4 / 3, 1.6, 16 / 9, 2.4, 3.9):
            height, width_ = reader.size(2, round(width / aspect), width)
            assert height * width_ // 14**2 <= bound
    assert bound == {50_176: 256 if low < high else 512, 12_544: 64}[high]
