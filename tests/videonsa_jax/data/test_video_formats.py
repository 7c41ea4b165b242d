"""Containers and codecs: every sampled frame and its time equal those of a sequential decode."""

from fractions import Fraction

import pytest

from tests.videonsa_jax.data.video_truth import check, decoded, encode

FILES = [  # name, encoder, settings
    ("h264.mp4", "libx264", {"b_frames": 2}),
    ("h264_open_gop.mp4", "libx264", {"b_frames": 3, "options": {"x264-params": "open-gop=1"}}),
    ("h264_intra_refresh.mp4", "libx264", {"options": {"x264-params": "intra-refresh=1"}}),
    ("h264_10bit.mp4", "libx264", {"pix_fmt": "yuv420p10le"}),
    ("h264_444.mp4", "libx264", {"pix_fmt": "yuv444p"}),
    ("h264_interlaced.mp4", "libx264", {"interlaced": True, "options": {"x264-params": "tff=1"}}),
    ("h264_fragmented.mp4", "libx264", {"container_options": {"movflags": "frag_keyframe"}}),
    ("h264_empty_moov.mp4", "libx264",
     {"b_frames": 2, "container_options": {"movflags": "frag_keyframe+empty_moov"}}),
    ("h264.mov", "libx264", {"b_frames": 2}),
    ("h264.mkv", "libx264", {"b_frames": 2}),
    ("h264_open_gop.mkv", "libx264", {"b_frames": 3, "options": {"x264-params": "open-gop=1"}}),
    ("h264.avi", "libx264", {"b_frames": 2}),
    ("h264.ts", "libx264", {"b_frames": 2}),
    ("h264.flv", "libx264", {"b_frames": 2}),
    ("h264.h264", "libx264", {"b_frames": 2}),
    ("hevc.mp4", "libx265", {"b_frames": 2}),
    ("hevc_open_gop.mp4", "libx265", {"b_frames": 3, "options": {"x265-params": "open-gop=1"}}),
    ("hevc_10bit.mkv", "libx265", {"pix_fmt": "yuv420p10le"}),
    ("hevc.ts", "libx265", {"b_frames": 2}),
    ("vp8.webm", "libvpx", {"options": {"auto-alt-ref": "1", "lag-in-frames": "16", "deadline": "good"}}),
    ("vp8_alpha.webm", "libvpx", {"pix_fmt": "yuva420p", "options": {"auto-alt-ref": "0"}}),
    ("vp8.mkv", "libvpx", {}),
    ("vp9.webm", "libvpx-vp9", {"options": {"lag-in-frames": "16"}}),
    ("vp9.mp4", "libvpx-vp9", {}),
    ("vp9_10bit.webm", "libvpx-vp9", {"pix_fmt": "yuv420p10le"}),
    ("av1.mp4", "libsvtav1", {"options": {"preset": "12"}}),
    ("av1.webm", "libsvtav1", {"options": {"preset": "12"}}),
    ("av1_10bit.mkv", "libsvtav1", {"pix_fmt": "yuv420p10le", "options": {"preset": "12"}}),
    ("mpeg2.mpg", "mpeg2video", {"b_frames": 2}),
    ("mpeg2.vob", "mpeg2video", {"b_frames": 2}),
    ("mpeg2.ts", "mpeg2video", {"b_frames": 2}),
    ("mpeg2.mkv", "mpeg2video", {"b_frames": 2}),
    ("mpeg2_interlaced.vob", "mpeg2video", {"interlaced": True}),
    ("mpeg4.avi", "mpeg4", {}),
    ("mpeg4_b_frames.avi", "mpeg4", {"b_frames": 2}),
    ("mpeg4.mp4", "mpeg4", {"b_frames": 2}),
    ("mpeg4.3gp", "mpeg4", {}),
    ("mjpeg.avi", "mjpeg", {"pix_fmt": "yuvj420p"}),
    ("mjpeg.mov", "mjpeg", {"pix_fmt": "yuvj422p"}),
    ("prores.mov", "prores_ks", {"pix_fmt": "yuv422p10le"}),
    ("prores_alpha.mov", "prores_ks", {"pix_fmt": "yuva444p10le", "options": {"profile": "4444"}}),
    ("animation_alpha.mov", "qtrle", {"pix_fmt": "argb"}),
    ("png.mov", "png", {"pix_fmt": "rgb24"}),
    ("ffv1.mkv", "ffv1", {}),
    ("flv1.flv", "flv", {}),
    ("theora.ogv", "libtheora", {}),
    ("vp8.ogv", "libvpx", {}),
    ("wmv2.wmv", "wmv2", {}),
    ("msmpeg4.wmv", "msmpeg4", {}),
    ("h264.asf", "libx264", {}),
    ("animated.gif", "gif", {"pix_fmt": "rgb8"}),
    ("dnxhd.mxf", "mpeg2video", {}),
    ("h264.nut", "libx264", {"b_frames": 2}),
    ("vp9.ivf", "libvpx-vp9", {"options": {"lag-in-frames": "16"}}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "codec", "settings"), FILES, ids=[name for name, *_ in FILES])
def test_frames_are_those_of_a_sequential_decode(tmp_path, name, codec, settings):
    path = encode(tmp_path / name, codec, **settings)
    truth = decoded(path)
    assert len(truth.images) > 40
    check(path, truth)


VARIABLE = [0.04 * i + (0.5 if i > 20 else 0) + (0.3 * (i - 30) if i > 30 else 0) for i in range(50)]


@pytest.mark.parametrize(
    ("name", "codec", "settings"),
    [
        ("a.mp4", "libx264", {"b_frames": 2}),
        ("a.mkv", "libx264", {"b_frames": 2}),
        ("a.webm", "libvpx", {}),
        ("a.webm", "libvpx-vp9", {}),
        ("a.ts", "libx264", {"b_frames": 2}),
        ("a.flv", "libx264", {}),
        ("a.wmv", "wmv2", {}),
        ("a.avi", "mpeg4", {}),
        ("a.gif", "gif", {"pix_fmt": "rgb8"}),
        ("a.mov", "mjpeg", {"pix_fmt": "yuvj420p"}),
    ],
)  # fmt: skip
def test_variable_rates_keep_the_frames_own_times(tmp_path, name, codec, settings):
    path = encode(tmp_path / name, codec, times=VARIABLE, **settings)
    check(path, decoded(path))


@pytest.mark.parametrize("rate", [24, Fraction(24000, 1001), Fraction(30000, 1001), 60])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts", "a.flv", "a.avi"])
def test_constant_rates_are_exact_whatever_the_container_rounds_to(tmp_path, name, rate):
    path = encode(tmp_path / name, frames=120, rate=rate, b_frames=2)
    from videonsa_jax.data import video
    info = video.probe(path)
    assert (info.frames, info.fps) == (120, float(rate))


@pytest.mark.parametrize("size", [(65, 49), (62, 47), (16, 130)])
@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"),
    [("a.mp4", "libx264", "yuv444p"), ("a.webm", "libvpx-vp9", "yuv420p"), ("a.avi", "mjpeg", "yuvj420p"),
     ("a.mkv", "ffv1", "yuv420p")],
)
def test_odd_sizes(tmp_path, name, codec, pix_fmt, size):
    path = encode(tmp_path / name, codec, pix_fmt=pix_fmt, size=size)
    check(path, decoded(path))
