"""An image's bytes as RGB pixels, whatever its format, orientation and depth."""

import io
import urllib.request
import warnings
from dataclasses import dataclass
from typing import Literal

import numpy
from PIL import Image, ImageOps, UnidentifiedImageError

from mbridge_train.data.errors import RowError
from mbridge_train.data.examples import ImageReference

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Formats that are decoded in this process; PIL would hand others to programs such as Ghostscript."""

LARGEST = 2**27
"""Pixels of an image over which it is refused unread, since a small file can unpack to terabytes. (PIL has a limit of
its own, which is somewhat higher.)"""

LARGEST_FILE = 2**28
"""Bytes of a file."""

URL_TIMEOUT = 30.0
"""Seconds to wait for a server's next answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PixelLimits:
    """`min_pixels`, `max_pixels`: of an image as the model sees it; None: as the model's processor says.

    `oversized`: an image over `max_pixels` is made smaller, or refused as a bad row.
    """

    min_pixels: int | None = None
    max_pixels: int | None = None
    oversized: Literal["resize", "refuse"] = "resize"


def decode(image: ImageReference, source: str, *, most_pixels: int = LARGEST) -> Image.Image:
    """Decode an image: upright by its EXIF orientation, RGB, transparency on white, 16 bits cut to 8.

    Args:
        image: what to decode.
        source: of its row, for messages.
        most_pixels: refuse a larger one before it is unpacked.

    Raises:
        RowError: it cannot be read or decoded, or is too large.
    """
    data = _read(image, source)
    name = "" if image.location is None else f" {image.location}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of broken metadata, and of sizes, which are checked here
            with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
                width, height = opened.size
                if width * height > most_pixels:
                    raise RowError(
                        f"{source}: the image{name} has {width} x {height} pixels, more than {most_pixels}; make it "
                        "smaller, raise data.max_pixels, or set data.oversized=resize"
                    )
                return _rgb(ImageOps.exif_transpose(opened))
    except RowError:
        raise
    except Exception as error:  # noqa: BLE001 - decoders raise anything on a broken file
        reason = "no image format that is read here" if isinstance(error, UnidentifiedImageError) else error
        raise RowError(f"{source}: the image{name} of {len(data)} bytes cannot be decoded: {reason}") from None


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range")
    if image.mode.startswith("I"):  # 16 bits, which PIL would clip to 8 instead of scaling
        return Image.fromarray((numpy.asarray(image).clip(0, 65535) >> 8).astype(numpy.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _read(image: ImageReference, source: str) -> bytes:
    if image.data is not None:
        return image.data
    location = image.location or ""
    try:
        if location.startswith(("http://", "https://")):
            with urllib.request.urlopen(location, timeout=URL_TIMEOUT) as response:
                data: bytes = response.read(LARGEST_FILE + 1)
        else:
            with open(location, "rb") as file:
                data = file.read(LARGEST_FILE + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise RowError(f"{source}: the image {location} cannot be read: {reason}") from None
    if len(data) > LARGEST_FILE:
        raise RowError(f"{source}: the image {location} has more than {LARGEST_FILE} bytes")
    return data
