"""What a record may name as its image or video: paths, URIs, folders, lists."""

import base64
import io
import pathlib

import numpy as np
import pytest
from PIL import Image

from videonsa_jax.data.errors import BadSample
from videonsa_jax.data.references import image_reference, video_reference
from videonsa_jax.data.sampling import SamplingRule
from videonsa_jax.data.visuals import FrameFiles, ImageFile, VideoFile

ROOT = pathlib.Path("root")
RULE = SamplingRule(4.0, 4, 768)


def png(colour: tuple[int, int, int] = (10, 200, 30)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (6, 4), colour).save(file, "png")
    return file.getvalue()


def image(entry: object):
    return image_reference(entry, "d.jsonl:7", ROOT)


def video(entry: object, root: pathlib.Path = ROOT):
    return video_reference(entry, None, "d.jsonl:7", root)


BASE64 = base64.b64encode(png()).decode()


@pytest.mark.parametrize(
    "entry",
    [
        f"data:image/png;base64,{BASE64}",
        f"DATA:image/png;charset=utf-8;base64,{BASE64}",
        f"data:;base64,{BASE64}",
        "data:image/png;base64," + "\r\n ".join(BASE64[i : i + 60] for i in range(0, 999, 60)),
        "data:image/png;base64," + BASE64.rstrip("="),
        "data:image/png;base64," + BASE64.replace("+", "%2B").replace("/", "%2F"),
        "data:image/png," + "".join(f"%{byte:02X}" for byte in png()),
        {"bytes": BASE64, "path": "a.png"},
    ],
)
def test_picture_within_the_record_is_read(entry):
    reference = image(entry)
    assert reference.outline(RULE)[:3] == (1, 4, 6)
    frames = reference.read(RULE, lambda frame, _: frame)
    assert (frames.images == np.array([10, 200, 30])).all()
    assert not reference.is_video


def test_data_that_is_no_base64_is_a_bad_sample_of_one_short_line():
    with pytest.raises(BadSample, match="data is not base64") as error:
        image(f"data:image/png;base64,{'ab!' * 5000}")
    assert len(str(error.value)) < 200


def test_data_that_is_no_text_is_a_bad_sample():
    for entry in ("data:image/png;base64,\ud800", {"bytes": "\ud800"}):
        with pytest.raises(BadSample, match="data is not base64"):
            image(entry)


def test_data_that_is_no_picture_is_named_without_all_of_it():
    reference = image(f"data:image/png;base64,{base64.b64encode(b'no picture' * 900).decode()}")
    with pytest.raises(BadSample, match=r"^d.jsonl:7, data:image/png;base64: not a readable"):
        reference.outline(RULE)


@pytest.mark.parametrize(
    ("entry", "path"),
    [
        ("a/b.mp4", "root/a/b.mp4"),
        ("/data/b.mp4", "/data/b.mp4"),
        ("file:///data/my%20clip.mp4", "/data/my clip.mp4"),
        ("FILE://localhost/data/b.mp4", "/data/b.mp4"),
        ("file:/data/b.mp4", "/data/b.mp4"),
        ("file:///data/100%.mp4", "/data/100%.mp4"),
        ("file:///data/what?#1.mp4", "/data/what?#1.mp4"),
        ("file:///data/vid%C3%A9o.mp4", "/data/vidéo.mp4"),
        ("file:///data/vidéo.mp4", "/data/vidéo.mp4"),
        ("file:///data/%FF.mp4", "/data/\udcff.mp4"),
        ("clip 1:30.mp4", "root/clip 1:30.mp4"),
        ({"path": "b.mp4", "bytes": None}, "root/b.mp4"),
    ],
)
def test_paths_and_file_uris(entry, path):
    assert video(entry) == VideoFile(path)
    assert image(entry) == ImageFile(path)
    assert video([entry]) == FrameFiles((path,), None)


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ("https://example.com/a.mp4", "nothing is fetched by https://; name a local file"),
        ("s3://bucket/a.mp4", "nothing is fetched by s3://"),
        ("file://server/a.mp4", "write file:///FOLDER/FILE"),
        ("file:a.mp4", "write file:///FOLDER/FILE"),
        (7, "7 is not the path of an image or video"),
        ("", "'' is not the path of an image or video"),
        (None, "None is not the path"),
        ({"url": "a.png"}, "None is not the path"),
        ("clip-" + "very-long-title-" * 18 + ".mp4", "has a part of 297 bytes"),
        ("é" * 130, "has a part of 260 bytes"),
        ("d/" * 2200 + "a.mp4", "and 4410 in all"),
        ("\ud800.mp4", "cannot be the name of a file"),
    ],
)
def test_what_cannot_be_opened_is_a_bad_sample_of_one_short_line(entry, reason):
    for reference in (image, video, lambda entry: video([entry])):
        with pytest.raises(BadSample) as error:
            reference(entry)
        assert reason in str(error.value)
        assert len(str(error.value)) < 200


def test_video_in_a_data_uri_is_refused():
    for entry in ("data:video/mp4;base64,AAAA", [f"data:image/png;base64,{BASE64}"]):
        with pytest.raises(BadSample, match="a video or frame as a data: URI is not read"):
            video(entry)


def fill(folder: pathlib.Path, *names: str) -> pathlib.Path:
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes(png())
    return folder


@pytest.mark.parametrize(
    "names",
    [
        [f"frame_{i}.jpg" for i in range(12)],
        ["0.PNG", "2.png", "07.png", "10.png"],
        ["a1b2.webp", "a1b10.webp", "a2b1.webp"],
        ["frame.jpg", "frame1.jpg", "frame1b.jpg", "frame01c.jpg"],
        ["clip-9.bmp", "clip-99.bmp", "clip-100.bmp"],
    ],
)
def test_frames_of_a_folder_are_in_the_order_of_their_numbers(tmp_path, names):
    folder = fill(tmp_path / "frames", *reversed(names))
    assert video("frames", tmp_path) == FrameFiles(tuple(f"{folder}/{n}" for n in names), None)
    assert video(f"file://{folder}").paths == tuple(f"{folder}/{name}" for name in names)


def test_frames_of_a_folder_below_a_relative_root(tmp_path, monkeypatch):
    (tmp_path / "root").mkdir()
    fill(tmp_path / "root" / "frames", "0.jpg")
    monkeypatch.chdir(tmp_path)
    assert video("frames").paths == ("root/frames/0.jpg",)


def test_what_is_no_image_is_left_out_of_a_folder(tmp_path):
    others = [".DS_Store", "Thumbs.db", "._0.jpg", ".0.jpg.swp", "times.txt", "meta.json", "1.mp4"]
    folder = fill(tmp_path / "frames", "0.jpg", "1.jpeg", *others)
    (folder / "masks.png").mkdir()
    (folder / "@eaDir").mkdir()
    assert video("frames", tmp_path).paths == (f"{folder}/0.jpg", f"{folder}/1.jpeg")


def test_missing_frame_is_not_left_out(tmp_path):
    folder = fill(tmp_path / "frames", "0.jpg")
    (folder / "1.jpg").symlink_to(tmp_path / "gone.jpg")
    assert video("frames", tmp_path).paths == (f"{folder}/0.jpg", f"{folder}/1.jpg")


def test_order_of_a_list_is_kept():
    assert video(["10.jpg", "2.jpg"]).paths == ("root/10.jpg", "root/2.jpg")


def test_folder_without_images_is_a_bad_sample(tmp_path):
    fill(tmp_path / "frames", ".DS_Store")
    with pytest.raises(BadSample, match="frames: a folder without image files"):
        video("frames", tmp_path)
