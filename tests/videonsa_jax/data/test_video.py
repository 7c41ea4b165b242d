"""Which frames are sampled, when they are shown, and what a broken file says."""

import math
import re

import av
import numpy as np
import pytest
from PIL import Image

from videonsa_jax.data import video
from videonsa_jax.data.errors import BadSample
from videonsa_jax.data.images import frames_from_images, read_image
from videonsa_jax.data.sampling import Frames, frame_count, frame_indices

ALL = {"fps": 1000, "min_frames": 2, "max_frames": 1000}


def shown(frames: Frames, total: int) -> list[int]:
    """Which frames of a video from black to white these are, by their brightness."""
    grey = frames.images.mean(axis=(1, 2, 3))
    return np.round(grey / 255 * (total - 1)).astype(int).tolist()


def published_count(total, video_fps, fps, min_frames, max_frames):
    """Qwen's rule in its own words: clamp the wished number, then floor to a multiple of two."""
    low = math.ceil(min_frames / 2) * 2
    high = math.floor(max_frames / 2) * 2
    wished = total / video_fps * fps
    if wished < low:
        wished = low
    if wished > high:
        wished = high
    if wished > total:
        wished = total
    return math.floor(wished / 2) * 2


@pytest.mark.parametrize(
    ("total", "video_fps", "fps", "min_frames", "max_frames", "count"),
    [
        (300, 30.0, 2.0, 4, 768, 20),  # 10 s at 2 fps
        (300, 30.0, 2.3, 4, 768, 22),  # 23 wished: floored to even
        (30, 30.0, 2.0, 4, 768, 4),  # 2 wished: the minimum
        (30, 30.0, 2.0, 5, 768, 6),  # an odd minimum goes up
        (30_000, 30.0, 2.0, 4, 768, 768),  # 2000 wished: the maximum
        (30_000, 30.0, 2.0, 4, 767, 766),  # an odd maximum goes down
        (3, 30.0, 2.0, 4, 768, 2),  # never more than there are
        (100, 10.0, 20.0, 4, 768, 100),  # nor by a high rate
    ],
)
def test_frame_count_follows_qwens_rule(total, video_fps, fps, min_frames, max_frames, count):
    got = frame_count(total, video_fps, fps=fps, min_frames=min_frames, max_frames=max_frames)
    assert got == count
    assert got == published_count(total, video_fps, fps, min_frames, max_frames)


def test_one_frame_is_too_few():
    with pytest.raises(ValueError, match="1 frames with max_frames=768 leave 0 to sample"):
        frame_count(1, 30.0, fps=2.0, min_frames=4, max_frames=768)


def test_indices_are_spread_evenly_from_first_to_last():
    assert frame_indices(300, 4).tolist() == [0, 100, 199, 299]
    assert frame_indices(7, 4).tolist() == [0, 2, 4, 6]
    assert frame_indices(10, 10).tolist() == list(range(10))
    assert frame_indices(4, 2).tolist() == [0, 3]


@pytest.mark.torch
def test_indices_are_torchs_linspace_rounded():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    totals = [*range(2, 120), 4_321, 66_859, 71_423, 96_571]
    for total in totals:
        for count in range(2, min(total, 210) + 1, 2):
            want = torch.linspace(0, total - 1, count).round().long().tolist()
            assert frame_indices(total, count).tolist() == want, (total, count)


def test_sampled_frames_are_the_right_ones(tmp_path, make_video):
    path = make_video(tmp_path / "a.mp4", frames=48)
    frames = video.sample_frames(path, fps=3, min_frames=2, max_frames=100)
    assert frames.indices.tolist() == [0, 9, 19, 28, 38, 47]
    assert shown(frames, 48) == frames.indices.tolist()
    assert frames.images.shape == (6, 48, 64, 3)
    np.testing.assert_allclose(frames.seconds, frames.indices / 24, atol=1e-6)
    assert frames.sampled_fps == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("name", "codec"), [("a.mkv", "libx264"), ("a.webm", "libvpx"), ("a.avi", "mpeg4")]
)
def test_other_containers(tmp_path, make_video, name, codec):
    path = make_video(tmp_path / name, frames=24, codec=codec)
    frames = video.sample_frames(path, fps=4, min_frames=4, max_frames=4)
    assert shown(frames, 24) == frames.indices.tolist() == [0, 8, 15, 23]
    info = video.probe(path)
    assert (info.frames, info.height, info.width) == (24, 48, 64)
    assert info.fps == pytest.approx(24)


def test_decoding_from_keyframes_changes_nothing(tmp_path, make_video):
    """Sparse frames with many keyframes between them equal those of decoding everything."""
    path = make_video(tmp_path / "a.mp4", frames=60, keyframe_every=5)
    every = video.sample_frames(path, **ALL)
    sparse = video.sample_frames(path, fps=1, min_frames=4, max_frames=4)
    np.testing.assert_array_equal(sparse.images, every.images[sparse.indices])


def test_variable_frame_rate_keeps_real_times(tmp_path, make_video):
    times = [0.0, 0.1, 0.2, 0.3, 2.0, 4.0, 4.1, 6.0]
    path = make_video(tmp_path / "a.mp4", frames=8, times=times)
    frames = video.sample_frames(path, **ALL)
    assert shown(frames, 8) == list(range(8))
    np.testing.assert_allclose(frames.seconds, times, atol=2e-3)


def test_transform_is_applied_to_each_frame(tmp_path, make_video):
    path = make_video(tmp_path / "a.mp4", frames=8)
    frames = video.sample_frames(path, **ALL, transform=lambda image, count: image[:count, :3])
    assert frames.images.shape == (8, 8, 3, 3)


def test_rotated_video_is_upright(tmp_path, make_video):
    straight, turned = make_video(tmp_path / "a.mp4"), tmp_path / "b.mp4"
    with av.open(str(straight)) as source, av.open(str(turned), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        stream.set_display_rotation(90)
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    info = video.probe(turned)
    assert (info.height, info.width) == (64, 48)
    assert video.sample_frames(turned, **ALL).images.shape[1:] == (64, 48, 3)


@pytest.mark.parametrize("kept", [0.4, 0.6, 0.9])
@pytest.mark.parametrize("faststart", [True, False])
def test_truncated_file_is_an_error_not_black_frames(
    tmp_path, make_video, truncate, faststart, kept
):
    path = truncate(make_video(tmp_path / "a.mp4", faststart=faststart), kept)
    with pytest.raises(BadSample, match=re.escape(f"{path}: ") + ".*truncated"):
        video.sample_frames(path, **ALL)


def test_missing_file():
    for read in (video.probe, read_image, lambda p: video.sample_frames(p, **ALL)):
        with pytest.raises(BadSample, match=r"^nowhere.mp4: no such file$"):
            read("nowhere.mp4")


def test_file_that_is_no_video(tmp_path):
    path = tmp_path / "a.mp4"
    for content in (b"", b"some text, not a video"):
        path.write_bytes(content)
        with pytest.raises(BadSample, match=f"^{path}: .*") as error:
            video.sample_frames(path, **ALL)
        assert "\n" not in str(error.value)


def test_sound_without_video(tmp_path):
    path = tmp_path / "a.wav"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        sound.rate = 8000
        container.mux(stream.encode(sound))
    with pytest.raises(BadSample, match="has no video stream"):
        video.sample_frames(path, **ALL)


def test_video_of_one_frame_is_too_short(tmp_path, make_video):
    path = make_video(tmp_path / "a.mp4", frames=1)
    with pytest.raises(BadSample, match=f"{path}: 1 frames"):
        video.sample_frames(path, **ALL)


def test_frame_images_are_a_video(tmp_path):
    paths = []
    for i in range(3):
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(np.full((6, 8, 3), i, np.uint8)).save(paths[-1])
    frames = frames_from_images(paths, fps=2.0)
    assert frames.images[:, 0, 0, 0].tolist() == [
        0,
        1,
        2,
        2,
    ]  # the last is repeated to an even number
    assert frames.seconds.tolist() == [0.0, 0.5, 1.0, 1.5]
    assert frames.sampled_fps == 2.0


def test_broken_frame_images_are_named(tmp_path):
    good, other, broken = (tmp_path / name for name in ("a.png", "b.png", "c.png"))
    Image.fromarray(np.zeros((6, 8, 3), np.uint8)).save(good)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(other)
    broken.write_bytes(good.read_bytes()[:40])
    with pytest.raises(BadSample, match=f"{other}: is 8x8, the frames before it are 8x6"):
        frames_from_images([good, other], fps=1.0)
    with pytest.raises(BadSample, match=f"{broken}: not a readable image"):
        frames_from_images([good, broken], fps=1.0)
    with pytest.raises(BadSample, match="zero frames"):
        frames_from_images([], fps=1.0)
