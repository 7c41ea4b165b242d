"""Files whose headers, packets or seeks tell other than what decodes, and what is bad, and why."""

import dataclasses

import av
import numpy as np
import pytest

from tests.video_files import check, decode, encode, picture, remux
from videonsa_jax.config.schema import PRESETS
from videonsa_jax.data import processor, video
from videonsa_jax.data.errors import BadSample
from videonsa_jax.data.sampling import SamplingRule
from videonsa_jax.data.visuals import VideoFile

ALL = {"fps": 1000, "min_frames": 2, "max_frames": 1000}


@pytest.mark.parametrize("name", ["a.mp4", "a.mov"])
def test_frames_cut_off_by_an_edit_list_are_not_shown(tmp_path, name):
    untrimmed = encode(tmp_path / "untrimmed.mp4", frames=80, b_frames=2)
    path = remux(untrimmed, tmp_path / name, shift=-0.52, muxing={"avoid_negative_ts": "disabled"})
    truth = decode(path)
    assert len(truth.images) == 67
    check(path, truth)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts", "a.flv"])
@pytest.mark.parametrize("shift", [4.5, -0.52])
def test_times_count_from_the_first_frame(tmp_path, name, shift):
    source = encode(tmp_path / "source.mp4", b_frames=2)
    options = {"avoid_negative_ts": "disabled"} if shift < 0 and name != "a.flv" else {}
    path = remux(source, tmp_path / name, shift=shift, muxing=options)
    check(path, decode(path))
    assert video.sample_frames(path, **ALL).seconds[0] == 0


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts"])
def test_a_stream_that_begins_in_the_middle(tmp_path, codec, name):
    """Its first frames need others that are not there."""
    options = {"x264-params": "open-gop=1", "x265-params": "open-gop=1:log-level=none"}
    options = {key: value for key, value in options.items() if key[:4] == codec[3:]}
    source = encode(tmp_path / f"whole_{name}", codec, b_frames=3, options=options)
    path = remux(source, tmp_path / name, keep=lambda i: i >= 12)
    truth = decode(path)
    assert len(truth.images) < 50
    check(path, truth)


def with_cover(path, *, cover_first: bool):
    """An MP4 file with a cover picture; PyAV writes it behind the video."""
    with av.open(str(path), "w") as container:
        streams = [container.add_stream(codec, rate=25) for codec in ("libx264", "mjpeg")]
        for stream, size, pix_fmt in zip(
            streams, [(64, 48), (320, 240)], ["yuv420p", "yuvj420p"], strict=True
        ):
            stream.width, stream.height, stream.pix_fmt = *size, pix_fmt
        streams[1].disposition = av.stream.Disposition.attached_pic
        cover = av.VideoFrame.from_ndarray(picture(0, (320, 240)))
        container.mux([*streams[1].encode(cover), *streams[1].encode()])
        for i in range(50):
            container.mux(streams[0].encode(av.VideoFrame.from_ndarray(picture(i))))
        container.mux(streams[0].encode())
    if cover_first:
        data = path.read_bytes()
        tracks, cover = data.rindex(b"trak") - 4, data.rindex(b"udta") - 4  # in the index, the end
        path.write_bytes(data[:tracks] + data[cover:] + data[tracks:cover])
    return path


@pytest.mark.parametrize("cover_first", [False, True])
def test_a_cover_is_not_the_video(tmp_path, cover_first):
    path = with_cover(tmp_path / "a.mp4", cover_first=cover_first)
    with av.open(str(path)) as container:
        names = [stream.codec_context.name for stream in container.streams.video]
    assert names == (["mjpeg", "h264"] if cover_first else ["h264", "mjpeg"])
    check(path, decode(path, stream=int(cover_first)))


def test_of_several_video_streams_ffmpegs_choice_is_taken(tmp_path):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        for size in ((32, 32), (320, 240)):
            stream = container.add_stream("mjpeg", rate=25)
            stream.width, stream.height, stream.pix_fmt = *size, "yuvj420p"
        stream.disposition = av.stream.Disposition.default  # the second one
        for i in range(50):
            for stream, size in zip(container.streams.video, ((32, 32), (320, 240)), strict=True):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(i, size))))
    with av.open(str(path)) as container:
        best = container.streams.best("video").index
    assert best == 1
    check(path, decode(path, stream=best))


def test_a_sound_file_with_a_cover_is_no_video(tmp_path):
    path = tmp_path / "a.m4a"
    with av.open(str(path), "w", format="mp4") as container:
        sound = container.add_stream("aac", rate=8000, layout="mono")
        cover = container.add_stream("mjpeg", rate=25)
        cover.width, cover.height, cover.pix_fmt = 64, 48, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        container.mux([*cover.encode(av.VideoFrame.from_ndarray(picture(0))), *cover.encode()])
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        samples.rate = 8000
        container.mux([*sound.encode(samples), *sound.encode()])
    with pytest.raises(BadSample, match="has no video stream"):
        video.sample_frames(path, **ALL)


def test_a_header_that_promises_too_much_is_not_believed(tmp_path):
    path = encode(tmp_path / "a.avi", "mpeg4")
    data = bytearray(path.read_bytes())
    for place in (data.index(b"avih") + 8 + 16, data.index(b"strh") + 8 + 32):
        assert data[place : place + 4] == (50).to_bytes(4, "little")
        data[place : place + 4] = (999).to_bytes(4, "little")
    path.write_bytes(data)
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 999
    check(path, decode(path))


@pytest.mark.parametrize("name", ["a.ts", "a.mpg"])
def test_broadcasts_cut_anywhere_and_joined(tmp_path, name):
    codec = "libx264" if name == "a.ts" else "mpeg2video"
    data = encode(tmp_path / name, codec, frames=80, b_frames=2).read_bytes()
    unit = 188 if name == "a.ts" else 2048
    middle = data[len(data) // 4 // unit * unit : -unit // 2]
    for number, content in enumerate((middle, data + data)):
        path = tmp_path / f"{number}{name}"
        path.write_bytes(content)
        check(path, decode(path))


def test_a_stream_that_appears_midway(tmp_path):
    silent = encode(tmp_path / "silent.ts", frames=50)
    path, sounding = tmp_path / "a.ts", tmp_path / "sounding.ts"
    with (
        av.open(str(silent)) as source,
        av.open(str(sounding), "w", options={"tables_version": "5"}) as container,
    ):
        picture_stream = container.add_stream_from_template(source.streams.video[0])
        sound = container.add_stream("mp2", rate=48000, layout="mono")
        noise = np.random.default_rng(0).integers(-999, 999, (1, 1152), np.int16)
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = picture_stream
                container.mux(packet)
                samples = av.AudioFrame.from_ndarray(noise, "s16", "mono")
                samples.rate = 48000
                container.mux(sound.encode(samples))
    # so far from both ends that FFmpeg does not see it when it opens the file
    padding = (b"\x47\x1f\xff\x10" + bytes(184)) * 40_000
    parts = [silent.read_bytes(), padding, sounding.read_bytes(), padding, silent.read_bytes()]
    path.write_bytes(b"".join(parts))
    frames = video.sample_frames(path, **ALL)
    assert len(frames.images) == 150
    np.testing.assert_array_equal(frames.images[100:], frames.images[:50])


def test_a_pixel_format_that_changes(tmp_path):
    parts = [
        encode(tmp_path / f"{pix_fmt}.h264", pix_fmt=pix_fmt).read_bytes()
        for pix_fmt in ("yuv420p", "yuv444p")
    ]
    path = tmp_path / "both.h264"
    path.write_bytes(b"".join(parts))
    truth = decode(path)
    assert len(truth.images) == 100
    check(path, truth)


@pytest.mark.parametrize("suffix", [".h264", ".ts"])
def test_a_size_that_changes_is_bad(tmp_path, suffix):
    parts = [
        encode(tmp_path / f"{size[0]}{suffix}", size=size).read_bytes()
        for size in ((64, 48), (96, 64))
    ]
    path = tmp_path / f"both{suffix}"
    path.write_bytes(b"".join(parts))
    with pytest.raises(BadSample, match="its frames change size"):
        video.sample_frames(path, **ALL, transform=lambda image, count: image[:8, :8])


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_rotated_videos_are_upright(tmp_path, rotation):
    straight = encode(tmp_path / "straight.mp4", b_frames=2)
    path = remux(straight, tmp_path / "turned.mp4", rotation=rotation)
    upright = [np.rot90(image, rotation // 90) for image in decode(straight).images]
    check(path, decode(straight)._replace(images=upright))


@pytest.mark.parametrize(("colorspace", "matrix"), [(1, "bt709"), (5, "smpte170m")])
@pytest.mark.parametrize(("color_range", "full"), [(1, "off"), (2, "on")])
def test_colours_are_those_that_the_file_declares(tmp_path, colorspace, matrix, color_range, full):
    path, colour = tmp_path / "a.mp4", (200, 40, 30)
    options = {"crf": "1", "x264-params": f"colormatrix={matrix}:fullrange={full}"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.colorspace = colorspace
        stream.codec_context.color_range = color_range
        for _ in range(8):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), colour, np.uint8))
            frame = frame.reformat(
                format="yuv420p", dst_colorspace=colorspace, dst_color_range=color_range
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    np.testing.assert_allclose(
        video.sample_frames(path, **ALL).images[0].mean((0, 1)), colour, atol=3
    )


@pytest.mark.parametrize("rate", [30, 1000])
def test_frames_wanted_are_seconds_times_fps_at_a_variable_rate(tmp_path, rate):
    """Half of a recording of 20 s stands still; the container's mean rate is a guess."""
    times = [i / 15 for i in range(150)] + [10.0 + i for i in range(11)]
    path = encode(tmp_path / "a.webm", "libvpx", rate=rate, frames=len(times), times=times)
    rule = SamplingRule(4, 4, 768)
    outline = VideoFile(str(path)).outline(rule)
    assert outline.frames == 80
    assert outline.candidates == pytest.approx(80, abs=0.4)
    frames = video.sample_frames(path, **dataclasses.asdict(rule))
    seconds_apart = np.diff(frames.seconds).mean()
    visual = processor.visual_from_frames(
        frames, PRESETS["tiny"].vision, min_pixels=28 * 28, max_pixels=28 * 28 * 4
    )
    assert visual.seconds_per_grid == pytest.approx(2 * seconds_apart)


@pytest.mark.parametrize("kept", [0.3, 0.6, 0.95])
@pytest.mark.parametrize(
    ("name", "codec", "muxing"),
    [
        ("a.mkv", "libx264", {}),
        ("a.webm", "libvpx", {}),
        ("a.avi", "mpeg4", {}),
        ("a.mp4", "libx264", {}),
        ("a.mp4", "libx264", {"movflags": "faststart"}),
        ("a.mp4", "libx264", {"movflags": "frag_keyframe+empty_moov"}),
    ],
)
def test_truncated_files_are_said_to_be(tmp_path, truncate, name, codec, muxing, kept):
    path = truncate(encode(tmp_path / name, codec, muxing=muxing), kept)
    for read in (video.probe, lambda p: video.sample_frames(p, **ALL)):
        with pytest.raises(BadSample, match=r"truncated: \d+ bytes are there of \d+"):
            read(path)


def test_fragments_behind_boxes_of_other_kinds_count(tmp_path):
    """The index in front knows the first fragment only."""
    path = encode(tmp_path / "a.mp4", muxing={"movflags": "frag_keyframe+default_base_moof"})
    data = path.read_bytes()
    place = data.index(b"moof") - 4
    other = (24).to_bytes(4) + b"uuid" + bytes(16)
    path.write_bytes(data[:place] + other + data[place:])
    truth = decode(path)
    assert len(truth.images) == 50
    check(path, truth)


def test_damage_is_not_called_truncation(tmp_path):
    path = encode(tmp_path / "a.mp4", frames=80)
    data = bytearray(path.read_bytes())
    place = data.index(b"mdat") + len(data) // 3
    data[place : place + 2000] = bytes(2000)
    path.write_bytes(data)
    with pytest.raises(BadSample, match=r"what follows \d\.\d\d s does not decode: Invalid data"):
        video.sample_frames(path, **ALL)


def test_a_stream_without_a_decoder_is_named(tmp_path):
    path = encode(tmp_path / "a.mkv")
    path.write_bytes(path.read_bytes().replace(b"V_MPEG4/ISO/AVC", b"V_MPEG4/ISO/AXX"))
    with pytest.raises(BadSample, match="no decoder for its video stream"):
        video.sample_frames(path, **ALL)


def test_names_that_look_like_something_else(tmp_path):
    path = encode(tmp_path / "a.mp4")
    truth = decode(path)
    check(path.rename(tmp_path / "http:clip %03d.mp4"), truth)
    for name in ("n" * 290, "a\0b"):
        with pytest.raises(BadSample, match="no such file"):
            video.sample_frames(tmp_path / name, **ALL)
