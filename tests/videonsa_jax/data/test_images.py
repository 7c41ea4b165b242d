"""Pictures: upright, on white, eight bits; and what a broken one says."""

import contextlib
import io

import numpy as np
import pytest
from PIL import Image

from videonsa_jax.data.errors import BadSample
from videonsa_jax.data.images import frames_from_images, image_size, read_image
from videonsa_jax.data.sampling import SamplingRule
from videonsa_jax.data.visuals import FrameFiles

RED, BLUE = (220, 30, 30), (30, 30, 220)
TURNS = {  # EXIF orientation -> the stored picture of an upright one
    1: lambda image: image,
    2: np.fliplr,
    3: lambda image: np.rot90(image, 2),
    4: np.flipud,
    5: lambda image: image.transpose(1, 0, 2),
    6: lambda image: np.rot90(image, 1),
    7: lambda image: np.rot90(image, 2).transpose(1, 0, 2),
    8: lambda image: np.rot90(image, -1),
}


def upright() -> np.ndarray:
    """u8[48 32 3]: red on top, blue on the left below, white on the right."""
    image = np.full((48, 32, 3), 255, np.uint8)
    image[:16], image[16:, :16] = RED, BLUE
    return image


def save(image: Image.Image, form: str, **settings) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **settings)
    return file.getvalue()


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_pictures_are_turned_as_exif_says(orientation, form):
    exif = Image.Exif()
    exif[0x0112] = orientation
    settings = {"quality": 100, "subsampling": 0} if form == "JPEG" else {}
    settings = {"lossless": True} if form == "WEBP" else settings
    stored = Image.fromarray(np.ascontiguousarray(TURNS[orientation](upright())))
    data = save(stored, form, exif=exif, **settings)
    np.testing.assert_allclose(read_image("a", data).astype(int), upright(), atol=8)
    assert image_size("a", data) == (48, 32)


def test_frames_given_as_pictures_are_turned_too(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    paths = []
    for i in range(4):
        paths.append(str(tmp_path / f"{i}.jpg"))
        stored = Image.fromarray(np.ascontiguousarray(np.rot90(upright())))
        stored.save(paths[-1], exif=exif, quality=100, subsampling=0)
    outline = FrameFiles(tuple(paths), None).outline(SamplingRule(4, 4, 768))
    assert outline[:3] == (4, 48, 32)
    np.testing.assert_allclose(
        frames_from_images(paths, fps=4).images[3].astype(int), upright(), atol=8
    )


def drawing(mode: str) -> Image.Image:
    """A black bar on transparent black, 8x6."""
    alpha = np.zeros((6, 8), np.uint8)
    alpha[:, :2] = 255
    image = Image.new(mode, (8, 6))
    image.putalpha(Image.fromarray(alpha))
    return image


def palette(form: str) -> bytes:
    image = Image.fromarray(np.repeat([[0, 0, 1, 1, 1, 1, 1, 1]], 6, axis=0).astype(np.uint8), "P")
    image.putpalette([0, 0, 0, 0, 0, 0])
    return save(image, form, transparency=1)


@pytest.mark.parametrize(
    "data",
    [
        save(drawing("RGB"), "PNG"),
        save(drawing("L"), "PNG"),
        save(drawing("P"), "TIFF"),
        save(drawing("RGB"), "WEBP", lossless=True),
        save(drawing("RGB"), "TIFF"),
        palette("PNG"),
        palette("GIF"),
        save(
            drawing("L").getchannel("A").point(lambda alpha: 9 * (alpha == 0)),
            "PNG",
            transparency=9,
        ),
    ],
    ids=["RGBA", "LA", "PA", "webp", "tiff", "palette", "gif", "grey"],
)
def test_transparent_pictures_lie_on_white(data):
    want = np.full((6, 8, 3), 255)
    want[:, :2] = 0
    np.testing.assert_array_equal(read_image("a", data), want)


def test_half_transparent_is_half_white():
    data = save(Image.new("RGBA", (4, 4), (0, 0, 0, 128)), "PNG")
    np.testing.assert_allclose(read_image("a", data), 127, atol=1)


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_scaled(form):
    values = np.arange(0, 65536, 1366, dtype=np.uint16).reshape(6, 8)
    image = read_image("a", save(Image.fromarray(values), form))
    np.testing.assert_allclose(image[..., 0], values / 257, atol=1)


def test_one_grey_of_sixteen_bits_may_be_transparent():
    picture = Image.fromarray(np.array([[0, 32768], [32769, 65535]], np.uint16))
    image = read_image("a", save(picture, "PNG", transparency=32768))
    assert image[..., 0].tolist() == [[0, 255], [128, 255]]


@pytest.mark.parametrize("form", ["JPEG", "TIFF"])
def test_cmyk_is_converted(form):
    """Pillow writes JPEG's CMYK inverted, as Adobe does."""
    image = read_image("a", save(Image.new("RGB", (16, 16), RED).convert("CMYK"), form))
    np.testing.assert_allclose(image, np.broadcast_to(RED, image.shape), atol=3)


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animated_picture_the_first_frame_is_taken(form):
    pages = [Image.new("RGB", (16, 16), colour) for colour in (RED, BLUE)]
    settings = {"lossless": True} if form == "WEBP" else {}
    data = save(pages[0], form, **settings, save_all=True, append_images=pages[1:])
    image = read_image("a", data)
    np.testing.assert_allclose(image, np.broadcast_to(RED, image.shape), atol=4)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_picture_of_too_many_pixels_is_bad(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    data = save(Image.new("L", (20, 11)), "PNG")
    for read in (read_image, image_size):
        with pytest.raises(BadSample, match=r"^big.png: .*DecompressionBombError: .*220 pixels"):
            read("big.png", data)


def test_what_is_no_picture_is_bad_in_the_same_words_each_time(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    for data in (None, b"no picture"):
        with pytest.raises(BadSample, match=r"image: of no format that Pillow knows$"):
            read_image(tmp_path / "a.png", data)


def test_pixels_of_no_known_range_are_bad():
    with pytest.raises(BadSample, match="floating-point"):
        read_image("a.tif", save(Image.new("F", (4, 4), 0.5), "TIFF"))


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's about TIFF tags
@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"])
def test_mutated_pictures_are_read_or_bad(form):
    noise = np.random.default_rng(0)
    data = save(Image.fromarray(noise.integers(0, 255, (20, 30, 3), np.uint8)), form)
    for _ in range(100):
        broken = np.frombuffer(data, np.uint8).copy()
        places = noise.integers(0, min(len(data), 400), 4)
        broken[places] = noise.integers(0, 256, 4)
        broken = broken[: noise.integers(1, len(data) * 2)].tobytes()
        for read in (read_image, image_size):
            with contextlib.suppress(BadSample):
                read("a", broken)


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
