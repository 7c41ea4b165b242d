"""Image files -> upright RGB arrays, and lists of them as videos (Pillow)."""

import contextlib
import io
import math
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from videonsa_jax.data.errors import BadSample, check_is_file
from videonsa_jax.data.sampling import FRAME_FACTOR, Frames, Transform, frames_from_arrays

LIES_ON_ITS_SIDE = (5, 6, 7, 8)  # EXIF orientations that exchange height and width


def read_image(path: str | pathlib.Path, data: bytes | None = None) -> np.ndarray:
    """An image file as u8[h w 3], upright, on white where it is transparent.

    Of several pictures in a file the first is taken; `data`, where given, is what the file holds.

    Raises:
      BadSample: the file is missing, not an image, truncated, or far too large.
    """
    with _opened(path, data) as image:
        return np.asarray(_rgb(ImageOps.exif_transpose(image)))


def image_size(path: str | pathlib.Path, data: bytes | None = None) -> tuple[int, int]:
    """(height, width) that `read_image` would give, from the header; raises like it."""
    with _opened(path, data) as image:
        sideways = image.getexif().get(ExifTags.Base.Orientation) in LIES_ON_ITS_SIDE
        if sideways and image.format != "TIFF":  # Pillow itself turns TIFF
            return image.width, image.height
        return image.height, image.width


def frames_from_images(
    paths: Sequence[str | pathlib.Path], *, fps: float, transform: Transform | None = None
) -> Frames:
    """A list of frame images as a video: all of them, the last one repeated to an even number.

    Args:
      paths: in the order of time, all of one size.
      fps: how many of them make a second.
      transform: applied to each frame.

    Raises:
      BadSample: the list is empty, a file is missing or unreadable, or sizes differ.
    """
    if not paths:
        raise BadSample("(no file)", "a video given as a list of frame images has zero frames")
    count = math.ceil(len(paths) / FRAME_FACTOR) * FRAME_FACTOR
    images: list[np.ndarray] = []
    size = None
    for path in paths:
        image = read_image(path)
        size = size or image.shape
        if image.shape != size:
            raise BadSample(
                str(path),
                f"is {image.shape[1]}x{image.shape[0]}, the frames before it are "
                f"{size[1]}x{size[0]}: frames of one video must have one size",
            )
        images.append(image if transform is None else transform(image, count))
    return frames_from_arrays(images + images[-1:] * (count - len(images)), fps=fps)


@contextlib.contextmanager
def _opened(path: str | pathlib.Path, data: bytes | None) -> Iterator[Image.Image]:
    if data is None:
        check_is_file(path)
    try:
        with Image.open(path if data is None else io.BytesIO(data)) as image:
            yield image
    except UnidentifiedImageError as error:  # its text holds an address, unlike from run to run
        raise BadSample(
            str(path), "not a readable image: of no format that Pillow knows"
        ) from error
    except (OSError, SyntaxError) as error:  # what Pillow means to raise for broken files
        raise BadSample(str(path), f"not a readable image: {error}") from error
    except Exception as error:  # DecompressionBombError, and whatever a broken file sets off
        raise BadSample(
            str(path), f"not a readable image: {type(error).__name__}: {error}"
        ) from error


def _rgb(image: Image.Image) -> Image.Image:
    """8 bits per channel, on white."""
    if image.mode == "F":
        raise OSError("its pixels are floating-point numbers of no known range")
    if image.mode.startswith("I"):  # 16 bits, which convert() would clip, not scale
        grey = np.asarray(image)
        eight_bits = (grey >> 8).clip(0, 255).astype(np.uint8)
        eight_bits[grey == image.info.get("transparency")] = 255  # one grey may be transparent
        return Image.fromarray(eight_bits).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
