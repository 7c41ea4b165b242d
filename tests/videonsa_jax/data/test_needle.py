"""Generated clips: what is drawn, what is asked, and that the question alone gives nothing away."""

import collections
import itertools
import json
import tracemalloc

import av
import numpy as np
import pytest

from videonsa_jax.data import needle
from videonsa_jax.data.needle import NeedleConfig
from videonsa_jax.errors import UserError

KINDS = tuple(needle.QUESTIONS)


def decode(path) -> np.ndarray:
    """u8[f h w 3]."""
    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def colourful(frame: np.ndarray) -> np.ndarray:
    """bool[h w]: pixels that are not grey."""
    return np.ptp(frame.astype(int), axis=-1) > 60


def coloured_frames(images) -> list[int]:
    """Frames that show an event: a hundredth of their pixels is coloured."""
    return [i for i, image in enumerate(images) if colourful(image).mean() > 0.01]


def shown_frames(clip: needle.Clip) -> list[int]:
    return [frame for event in clip.events for frame in range(event.start, event.stop)]


@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_gives_same_clips_and_another_seed_gives_others(kind):
    cfg = NeedleConfig(kind=kind, seed=3)
    clips = needle.plan(cfg, "train", 6)
    assert clips == needle.plan(cfg, "train", 6)
    first, again = (np.stack(list(needle.render(cfg, clips[0]))) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    other = NeedleConfig(kind=kind, seed=4)
    assert [c.events for c in needle.plan(other, "train", 6)] != [c.events for c in clips]


def test_longer_split_begins_with_the_shorter_one():
    cfg = NeedleConfig()
    assert needle.plan(cfg, "train", 9)[:5] == needle.plan(cfg, "train", 5)


def test_splits_share_no_clip():
    cfg = NeedleConfig()
    train, heldout = ({c.events for c in needle.plan(cfg, s, 50)} for s in needle.SPLITS)
    assert not train & heldout


@pytest.mark.parametrize("kind", KINDS)
def test_every_letter_is_right_equally_often(kind):
    clips = needle.plan(NeedleConfig(kind=kind), "heldout", 40)
    assert set(collections.Counter(c.answer for c in clips).values()) == {10}


@pytest.mark.parametrize("kind", KINDS)
def test_best_guess_from_the_text_alone_is_at_chance(kind):
    cfg = NeedleConfig(kind=kind)
    answers = collections.defaultdict(collections.Counter)
    for clip in needle.plan(cfg, "heldout", 200):
        prompt = needle.record(cfg, clip, "v.mp4")["conversations"][0]["value"]
        answers[prompt][clip.answer] += 1
    best = sum(max(counts.values()) for counts in answers.values())
    assert best / 200 == 0.25


@pytest.mark.parametrize("kind", KINDS)
def test_answer_follows_from_the_events(kind):
    for clip in needle.plan(NeedleConfig(kind=kind), "train", 24):
        right = clip.options[needle.LETTERS.index(clip.answer)]
        names = [event.name for event in clip.events]
        if kind == "count":
            assert right == str(len(names))
        else:
            assert right == names[0]
        if kind == "what":
            assert len(names) == 1
        if kind == "first":
            assert sorted(names) == sorted(clip.options)


@pytest.mark.parametrize("kind", KINDS)
def test_events_are_drawn_when_the_plan_says_and_nothing_else_is_coloured(kind):
    cfg = NeedleConfig(kind=kind, seconds=6)
    for clip in needle.plan(cfg, "train", 6):
        assert coloured_frames(needle.render(cfg, clip)) == shown_frames(clip)


def test_grey_shapes_move_and_flash_behind_the_events():
    cfg = NeedleConfig(seconds=10)
    clip = needle.plan(cfg, "train", 1)[0]
    frames = [f for i, f in enumerate(needle.render(cfg, clip)) if i not in shown_frames(clip)]
    bright = np.array([(f.max(axis=-1) >= 90).mean() for f in frames])
    assert (bright > 0).all()
    assert np.ptp(bright) > 0.02  # a flash covers that much


@pytest.mark.parametrize("events", [1, 4])
def test_events_do_not_overlap_and_fall_anywhere_in_the_clip(events):
    cfg = NeedleConfig(kind="what" if events == 1 else "first", seconds=10)
    clips = needle.plan(cfg, "train", 400)
    for clip in clips:
        for one, two in itertools.pairwise(clip.events):
            assert one.stop <= two.start
    middles = [(e.start + e.stop) / 2 / cfg.frames for c in clips for e in c.events]
    thirds = np.histogram(middles, bins=3, range=(0, 1))[0] / len(middles)
    np.testing.assert_allclose(thirds, 1 / 3, atol=0.08)
    assert min(c.events[0].start for c in clips) == 0
    assert max(c.events[-1].stop for c in clips) == cfg.frames


def test_file_shows_what_was_rendered(tmp_path):
    cfg = NeedleConfig()
    clip = needle.plan(cfg, "train", 1)[0]
    rendered = np.stack(list(needle.render(cfg, clip)))
    needle.write_video(tmp_path / "clip.mp4", iter(rendered), fps=cfg.fps)
    decoded = decode(tmp_path / "clip.mp4")
    assert decoded.shape == rendered.shape == (16, 112, 112, 3)
    assert coloured_frames(decoded) == shown_frames(clip)
    assert np.abs(decoded.astype(int) - rendered).mean() < 6
    event = clip.events[0]
    x, y = (round(c * cfg.pixels) for c in event.look.centre)
    np.testing.assert_allclose(decoded[event.start, y, x], needle.COLOURS[event.name], atol=40)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.average_rate) == ("h264", 4)


def test_video_without_frames_is_refused_and_leaves_no_file(tmp_path):
    with pytest.raises(ValueError, match="needs at least one frame"):
        needle.write_video(tmp_path / "empty.mp4", iter(()), fps=4)
    assert not list(tmp_path.iterdir())


def test_memory_does_not_grow_with_length():
    def peak(seconds):
        cfg = NeedleConfig(kind="count", seconds=seconds, pixels=28)
        clip = needle.plan(cfg, "train", 1)[0]
        tracemalloc.start()
        for _ in needle.render(cfg, clip):
            pass
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    peak(10)  # caches of the libraries
    assert peak(400) < 1.5 * peak(20)


def test_hours_are_planned_at_once():
    cfg = NeedleConfig(kind="first", seconds=5 * 3600)
    clip = needle.plan(cfg, "heldout", 1)[0]
    assert cfg.frames == 72_000
    assert next(needle.render(cfg, clip)).shape == (112, 112, 3)
    assert clip.events[-1].stop <= cfg.frames


def test_dataset_has_llava_records_and_keeps_finished_videos(tmp_path):
    cfg = NeedleConfig(seconds=2)
    calls = []
    counts = {"train": 4, "heldout": 4}
    files = needle.write_dataset(tmp_path, cfg, counts, lambda *x: calls.append(x))
    assert calls == [(i, 8) for i in range(1, 9)]
    records = json.loads(files["heldout"].read_text())
    assert len(records) == 4
    human, gpt = records[0]["conversations"]
    assert human["from"] == "human"
    assert human["value"].startswith("<image>\n")
    assert gpt == {"from": "gpt", "value": records[0]["answer"]}
    assert records[0]["options"] == list(needle.COLOURS)
    video = tmp_path / records[0]["video"]
    before = video.stat().st_mtime_ns
    event = records[0]["events"][0]
    shown = range(round(event["start_s"] * cfg.fps), round(event["stop_s"] * cfg.fps))
    assert coloured_frames(decode(video)) == list(shown)
    needle.write_dataset(tmp_path, cfg, counts)
    assert video.stat().st_mtime_ns == before


def test_folder_with_other_clips_is_refused(tmp_path):
    needle.write_dataset(tmp_path, NeedleConfig(seconds=2), {"train": 1})
    with pytest.raises(UserError, match="written with other kind"):
        needle.write_dataset(tmp_path, NeedleConfig(seconds=3, kind="count"), {"train": 1})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "where"}, "kind='where' must be one of what, first, count"),
        ({"seconds": 1}, "1 s at 4 fps are 4 frames"),
        ({"pixels": 99}, "pixels=99 must be even"),
        ({"kind": "first", "seconds": 2}, "4 events of 0.75 s must .* fit 8 frames"),
        ({"event_seconds": 0.1}, "at least a frame"),
    ],
)
def test_impossible_clips_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        NeedleConfig(**changes)
