"""How many frames are sampled, and which."""

import math

import pytest

from videonsa_jax.data.sampling import frame_count, frame_indices


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
