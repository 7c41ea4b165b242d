"""Which frames are sampled, when they are shown, and what a broken file says."""

import av
import numpy as np
import pytest

from videonsa_jax.data import video
from videonsa_jax.data.errors import BadSample
from videonsa_jax.data.images import read_image
from videonsa_jax.data.sampling import Frames

ALL = {"fps": 1000, "min_frames": 2, "max_frames": 1000}


def shown(frames: Frames, total: int) -> list[int]:
    """Which frames of a video from black to white these are, by their brightness."""
    grey = frames.images.mean(axis=(1, 2, 3))
    return np.round(grey / 255 * (total - 1)).astype(int).tolist()


def test_sampled_frames_are_the_right_ones(tmp_path, make_video):
    path = make_video(tmp_path / "a.mp4", frames=48)
    frames = video.sample_frames(path, fps=3, min_frames=2, max_frames=100)
    assert frames.indices.tolist() == [0, 9, 19, 28, 38, 47]
    assert shown(frames, 48) == frames.indices.tolist()
    assert frames.images.shape == (6, 48, 64, 3)
    np.testing.assert_allclose(frames.seconds, frames.indices / 24, atol=1e-6)
    assert frames.sampled_fps == pytest.approx(3.0)


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
