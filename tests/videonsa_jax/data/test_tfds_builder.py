"""A prepared dataset gives the samples that its videos give, without TensorFlow."""

import dataclasses
import itertools
import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests import bad_decoders
from videonsa_jax.config.schema import DataConfig
from videonsa_jax.data import pipeline, references, tfds_builder
from videonsa_jax.data.load import Loader
from videonsa_jax.data.sources import JsonSource
from videonsa_jax.errors import UserError


@pytest.fixture(scope="module")
def data(tmp_path_factory, make_video, tokenizer_dir, write_jsonl) -> DataConfig:
    folder = tmp_path_factory.mktemp("raw")
    records = []
    for i in range(4):
        make_video(folder / f"{i}.mp4", frames=12 + 4 * i)
        question = {"from": "human", "value": "<image>\nWhat?"}
        answer = {"from": "gpt", "value": f"Rot — {i}."}
        records.append({"video": f"{i}.mp4", "conversations": [question, answer]})
    unlearnt = {**records[2]["conversations"][1], "loss": False}
    records[2]["conversations"][1:1] = [unlearnt, {"from": "human", "value": "Sure?"}]
    Image.fromarray(np.full((60, 60, 3), 9, np.uint8)).save(folder / "still.png")
    records[3]["images"] = ["still.png"]
    records[3]["conversations"][0]["value"] = "<image><video>\nWhat?"
    return DataConfig(
        source=(str(write_jsonl(folder / "d.jsonl", records)),),
        tokenizer=str(tokenizer_dir),
        fps=8.0,
        batch=2,
        buckets=((64, 128),),
        threads=2,
        decode_timeout_s=0,  # no decoder processes: they take a while to start
    )


def prepare(data, model, out, **options):
    return tfds_builder.prepare(pipeline.open_source(data), data, model.vision, out, **options)


def test_samples_equal_those_of_the_videos(data, model, tokenizer, tmp_path):
    counts = prepare(data, model, tmp_path / "out", image_format="png")
    assert counts == {"seen": 4, "bad": 0, "kept": 4}
    raw, prepared = JsonSource(data.source[0]), tfds_builder.PreparedSource(tmp_path / "out")
    loader = Loader(data, model, tokenizer)
    stored = {prepared[i].name: prepared[i] for i in range(len(prepared))}
    assert len(stored) == 4
    for i in range(len(raw)):
        conversation = stored[raw[i].name]
        got, want = loader.load(conversation), loader.load(raw[i])
        np.testing.assert_array_equal(got.tokens, want.tokens)
        np.testing.assert_array_equal(got.loss_weights, want.loss_weights)
        assert loader.measure(conversation) == loader.measure(raw[i])
        for one, other in zip(got.visuals, want.visuals, strict=True):
            np.testing.assert_array_equal(one.patches, other.patches)
            assert dataclasses.replace(one, patches=0) == dataclasses.replace(other, patches=0)


def test_jpeg_frames_are_close(data, model, tokenizer, tmp_path):
    prepare(data, model, tmp_path / "out")
    raw, prepared = JsonSource(data.source[0]), tfds_builder.PreparedSource(tmp_path / "out")
    loader = Loader(data, model, tokenizer)
    stored = {prepared[i].name: prepared[i] for i in range(len(prepared))}
    got, want = loader.load(stored[raw[0].name]), loader.load(raw[0])
    assert np.abs(got.visuals[0].patches - want.visuals[0].patches).max() < 0.1  # of about 4


def test_it_is_a_source_of_batches(data, model, tmp_path):
    prepare(data, model, tmp_path / "out")
    prepared = dataclasses.replace(data, source=(f"tfds:{tmp_path / 'out'}",))
    batches = pipeline.make_dataset(prepared, model, bad_samples=tmp_path / "bad.jsonl")
    for batch in itertools.islice(batches, 4):
        assert (batch["text_weights"].sum(axis=1) > 0).all()
    assert batches.counts == {"seen": 8, "bad": 0}
    batches.close()


def test_bad_and_unwanted_videos_are_left_out(data, model, tmp_path, write_jsonl):
    path = pathlib.Path(data.source[0])
    records = [json.loads(line) for line in path.read_text().splitlines()]
    records[0]["video"] = "none.mp4"
    source = write_jsonl(tmp_path / "d.jsonl", records)
    chosen = dataclasses.replace(
        data,
        source=(str(source),),
        video_root=str(path.parent),
        frame_count_range=(6, 8),
        max_bad_fraction=1.0,
    )
    counts = prepare(chosen, model, tmp_path / "out")
    assert counts == {"seen": 4, "bad": 1, "kept": 2}  # video 1 has 5.3 frames at 8 per second
    (row,) = (tmp_path / "out" / "bad_samples.jsonl").read_text().splitlines()
    assert json.loads(row) == {"file": f"{path.parent}/none.mp4", "reason": "no such file"}


def test_a_full_disk_is_an_error_of_the_file_system(data, model, tmp_path, monkeypatch):
    def prepare_(_):  # as ArrayRecord and TFDS tell it
        raise RuntimeError('Failed to finalize writing of split "train": No space left on device')

    monkeypatch.setattr(tfds_builder.VideoChat, "download_and_prepare", prepare_)
    with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path / 'out'}'"):
        prepare(data, model, tmp_path / "out")


def test_videos_that_hang_crash_or_raise_are_listed_and_not_tried_again(
    data, model, tmp_path, write_jsonl, monkeypatch
):
    monkeypatch.setattr(references, "VideoFile", bad_decoders.video_file)
    path = pathlib.Path(data.source[0])
    records = [json.loads(line) for line in path.read_text().splitlines()][:2]
    bad = ["outline-abort", "read-hang", "read-memory"]
    records += [{**records[0], "video": str(tmp_path / f"{name}.mp4")} for name in bad]
    chosen = dataclasses.replace(
        data,
        source=(str(write_jsonl(tmp_path / "d.jsonl", records)),),
        video_root=str(path.parent),
        decode_timeout_s=3,
        max_bad_fraction=1.0,
    )
    out = tmp_path / "out"
    assert prepare(chosen, model, out) == {"seen": 5, "bad": 3, "kept": 2}
    reasons = bad_decoders.listed(out / "bad_samples.jsonl")
    assert sorted(reasons) == bad
    assert "was killed (SIGABRT)" in reasons["outline-abort"]
    assert "took longer than data.decode_timeout_s=3" in reasons["read-hang"]
    assert reasons["read-memory"] == "MemoryError: picture of 9 GiB"

    shutil.rmtree(out / "video_chat")  # as an interrupted call leaves it
    assert prepare(chosen, model, out) == {"seen": 5, "bad": 3, "kept": 2}
    tried = [bad_decoders.tries(tmp_path / f"{name}.mp4") for name in bad]
    assert tried == [["outline"], ["outline", "read", "outline"], ["outline", "read"] * 2]


def test_existing_and_absent_folders_are_refused(data, model, tmp_path):
    prepare(data, model, tmp_path / "out")
    with pytest.raises(UserError, match="holds a prepared dataset already"):
        prepare(data, model, tmp_path / "out")
    with pytest.raises(UserError, match=r"no prepared dataset; make one with"):
        tfds_builder.PreparedSource(tmp_path / "nowhere")


def test_tensorflow_is_not_imported(data, model, tmp_path):
    prepare(data, model, tmp_path / "out")
    code = (
        "import sys; from videonsa_jax.data.tfds_builder import PreparedSource; "
        f"PreparedSource({str(tmp_path / 'out')!r})[0]; assert 'tensorflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert "tensorflow" not in sys.modules
