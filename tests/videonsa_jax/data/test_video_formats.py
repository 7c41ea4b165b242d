"""Containers and codecs: every sampled frame and its time equal those of a sequential decode."""

import pathlib
import re
from fractions import Fraction

import pytest

from tests.video_files import check, decode, encode
from videonsa_jax.data import video

DOCS = pathlib.Path(__file__).parents[3] / "docs" / "data.md"
FAST = {"preset": "12"}
FULL_RANGE, TEN_BITS = "yuvj420p", "yuv420p10le"
CODECS = {  # encoder -> the name that docs/data.md gives
    "libx264": "H.264",
    "libx265": "HEVC",
    "libvpx": "VP8",
    "libvpx-vp9": "VP9",
    "libsvtav1": "AV1",
    "mpeg2video": "MPEG-2",
    "mpeg4": "MPEG-4",
    "mjpeg": "MJPEG",
    "prores_ks": "ProRes",
    "qtrle": "QuickTime Animation",
    "png": "PNG",
    "ffv1": "FFV1",
    "flv": "Sorenson",
    "libtheora": "Theora",
    "wmv2": "WMV",
    "gif": "GIF",
}
FILES = {  # name -> encoder, settings
    "b_frames.mp4": ("libx264", {"b_frames": 2}),
    "open_gop.mp4": ("libx264", {"b_frames": 3, "options": {"x264-params": "open-gop=1"}}),
    "intra_refresh.mp4": ("libx264", {"options": {"x264-params": "intra-refresh=1"}}),
    "10_bit.mp4": ("libx264", {"pix_fmt": TEN_BITS}),
    "444.mp4": ("libx264", {"pix_fmt": "yuv444p"}),
    "interlaced.mp4": ("libx264", {"interlaced": True, "options": {"x264-params": "tff=1"}}),
    "fragmented.mp4": ("libx264", {"b_frames": 2, "muxing": {"movflags": "frag_keyframe"}}),
    "streamed.mp4": ("libx264", {"muxing": {"movflags": "frag_keyframe+empty_moov"}}),
    "hevc.mp4": ("libx265", {"b_frames": 2}),
    "hevc_open_gop.mp4": ("libx265", {"b_frames": 3, "options": {"x265-params": "open-gop=1"}}),
    "vp9.mp4": ("libvpx-vp9", {}),
    "av1.mp4": ("libsvtav1", {"options": FAST}),
    "mpeg4.mp4": ("mpeg4", {"b_frames": 2}),
    "mpeg4.3gp": ("mpeg4", {}),
    "b_frames.mov": ("libx264", {"b_frames": 2}),
    "full_range.mov": ("mjpeg", {"pix_fmt": "yuvj422p"}),
    "10_bit.mov": ("prores_ks", {"pix_fmt": "yuv422p10le"}),
    "alpha.mov": ("prores_ks", {"pix_fmt": "yuva444p10le", "options": {"profile": "4444"}}),
    "animation_alpha.mov": ("qtrle", {"pix_fmt": "argb"}),
    "png.mov": ("png", {"pix_fmt": "rgb24"}),
    "b_frames.mkv": ("libx264", {"b_frames": 2}),
    "open_gop.mkv": ("libx264", {"b_frames": 3, "options": {"x264-params": "open-gop=1"}}),
    "hevc_10_bit.mkv": ("libx265", {"pix_fmt": TEN_BITS}),
    "vp8.mkv": ("libvpx", {}),
    "av1_10_bit.mkv": ("libsvtav1", {"pix_fmt": TEN_BITS, "options": FAST}),
    "mpeg2.mkv": ("mpeg2video", {"b_frames": 2}),
    "ffv1.mkv": ("ffv1", {}),
    "hidden_frames.webm": ("libvpx", {"options": {"auto-alt-ref": "1", "lag-in-frames": "16"}}),
    "alpha.webm": ("libvpx", {"pix_fmt": "yuva420p", "options": {"auto-alt-ref": "0"}}),
    "vp9.webm": ("libvpx-vp9", {"options": {"lag-in-frames": "16"}}),
    "vp9_10_bit.webm": ("libvpx-vp9", {"pix_fmt": TEN_BITS}),
    "av1.webm": ("libsvtav1", {"options": FAST}),
    "b_frames.avi": ("libx264", {"b_frames": 2}),
    "mpeg4.avi": ("mpeg4", {}),
    "mpeg4_b_frames.avi": ("mpeg4", {"b_frames": 2}),
    "mjpeg.avi": ("mjpeg", {"pix_fmt": FULL_RANGE}),
    "b_frames.ts": ("libx264", {"b_frames": 2}),
    "hevc.ts": ("libx265", {"b_frames": 2}),
    "mpeg2.ts": ("mpeg2video", {"b_frames": 2}),
    "mpeg2.mpg": ("mpeg2video", {"b_frames": 2}),
    "mpeg2.vob": ("mpeg2video", {"b_frames": 2}),
    "interlaced.vob": ("mpeg2video", {"interlaced": True}),
    "b_frames.flv": ("libx264", {"b_frames": 2}),
    "sorenson.flv": ("flv", {}),
    "theora.ogv": ("libtheora", {}),
    "vp8.ogv": ("libvpx", {}),
    "wmv2.wmv": ("wmv2", {}),
    "animated.gif": ("gif", {"pix_fmt": "rgb8"}),
    "no_timestamps.h264": ("libx264", {"b_frames": 2}),
}


@pytest.mark.parametrize("name", FILES)
def test_frames_are_those_of_a_sequential_decode(tmp_path, monkeypatch, name):
    codec, settings = FILES[name]
    path = encode(tmp_path / name, codec, **settings)
    truth = decode(path)
    assert len(truth.images) == 50
    check(path, truth)
    monkeypatch.setattr(video, "SEEK_OVER", 0)  # also with as many seeks as there can be
    check(path, truth, rates=(1, 4))


def test_the_table_in_the_docs_lists_what_is_tested():
    rows = re.findall(r"^\| (\.[\w., ]+) \| ([^|]+) \|", DOCS.read_text(), re.MULTILINE)
    listed = {
        (suffix, codec)
        for suffixes, codecs in rows
        for suffix in suffixes.split(", ")
        for codec in codecs.strip().split(", ")
    }
    assert listed == {
        (pathlib.Path(name).suffix, CODECS[codec]) for name, (codec, _) in FILES.items()
    }


VARIABLE = [0.04 * i + 0.5 * (i > 20) + 0.3 * max(i - 30, 0) for i in range(50)]


@pytest.mark.parametrize(
    ("name", "codec", "settings"),
    [
        ("a.mp4", "libx264", {"b_frames": 2}),
        ("a.mkv", "libx264", {"b_frames": 2}),
        ("vp8.webm", "libvpx", {}),
        ("vp9.webm", "libvpx-vp9", {}),
        ("a.ts", "libx264", {"b_frames": 2}),
        ("a.flv", "libx264", {}),
        ("a.wmv", "wmv2", {}),
        ("a.avi", "mpeg4", {}),  # with empty packets where a frame is shown for longer
        ("a.gif", "gif", {"pix_fmt": "rgb8"}),
        ("a.mov", "mjpeg", {"pix_fmt": FULL_RANGE}),
    ],
)
def test_variable_rates_keep_the_frames_own_times(tmp_path, name, codec, settings):
    path = encode(tmp_path / name, codec, times=VARIABLE, **settings)
    check(path, decode(path))
    info = video.probe(path)
    assert info.frames / info.fps == pytest.approx(VARIABLE[-1] + 0.04, abs=0.02)


@pytest.mark.parametrize("rate", [24, Fraction(24000, 1001), Fraction(30000, 1001), 60])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts", "a.flv", "a.avi"])
def test_constant_rates_are_exact_though_times_are_rounded(tmp_path, name, rate):
    info = video.probe(encode(tmp_path / name, rate=rate, b_frames=2))
    assert info.frames == 50
    assert info.fps == pytest.approx(float(rate), rel=1e-4 if name == "a.flv" else 1e-12)


@pytest.mark.parametrize("size", [(65, 49), (62, 47), (16, 130)])
@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"),
    [
        ("a.mp4", "libx264", "yuv444p"),
        ("a.webm", "libvpx-vp9", "yuv420p"),
        ("a.avi", "mjpeg", FULL_RANGE),
        ("a.mkv", "ffv1", "yuv420p"),
    ],
)
def test_odd_sizes(tmp_path, name, codec, pix_fmt, size):
    path = encode(tmp_path / name, codec, pix_fmt=pix_fmt, size=size)
    truth = decode(path)
    assert truth.images[0].shape == (size[1], size[0], 3)
    check(path, truth)
