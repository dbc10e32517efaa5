"""Reading images of any format, orientation and depth: their size from the header, or their RGB pixels."""

import errno
import io
import os
import stat
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, Literal

import numpy
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngImageFile

from mbridge_train.data.errors import RowError
from mbridge_train.data.examples import ImageReference
from mbridge_train.data.fetch import fetch

if TYPE_CHECKING:
    from mbridge_model.vision.inputs import VisionInputs
    from torch import Tensor

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Formats that are decoded in this process; PIL would pass others to programs such as Ghostscript."""

LARGEST = 2**27
"""Most pixels of an image. A larger one is refused before it is decoded, since a small file can unpack to terabytes.
(PIL's own limit is somewhat higher.)"""

LARGEST_FILE = 2**28
"""Most bytes of an image file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PixelLimits:
    """Limits on the size of an image as the model sees it; None takes the limit of the model's processor.

    Attributes:
        oversized: whether an image of more than `max_pixels` is resized or makes its row a bad row.
    """

    min_pixels: int | None = None
    max_pixels: int | None = None
    oversized: Literal["resize", "refuse"] = "resize"


@dataclass(kw_only=True, slots=True)
class RowImages:
    """The images of one row in the order of their tokens, which all ranks measure, and those that need them decode.

    Attributes:
        grid_thw: int64 [images, 3]: patches of each image along time, height and width.
        source: file and row, for error messages.
        vision: the pixels, once `Encoder.decode` has decoded them.
    """

    references: tuple[ImageReference, ...]
    grid_thw: "Tensor"
    source: str
    vision: "VisionInputs | None" = None

    def materialize(self) -> "VisionInputs":
        """Return the pixels. Raise `RuntimeError` on a rank whose share of the batch did not include this row."""
        if self.vision is None:
            raise RuntimeError(f"{self.source}: its images were not decoded on this rank, which now needs them")
        return self.vision


def image_size(image: ImageReference, source: str, *, most_pixels: int = LARGEST) -> tuple[int, int]:
    """Return the (width, height) of the image that `decode` with the same arguments returns, from the header.

    Raises `RowError` if the image cannot be read, has no header of a known format, or is too large.
    """
    with _opened(image, source, most_pixels) as opened:
        width, height = opened.size
        if opened.format == "TIFF":  # PIL returns its upright size
            return width, height
        if isinstance(opened, PngImageFile) and not _has_late_metadata(opened):
            exif = Image.Image.getexif(opened)  # PngImageFile's own getexif decodes the image
        else:
            exif = opened.getexif()
        orientation = exif.get(ExifTags.Base.Orientation)
        return (height, width) if orientation in (5, 6, 7, 8) else (width, height)


def decode(image: ImageReference, source: str, *, most_pixels: int = LARGEST) -> Image.Image:
    """Decode an image: upright by its EXIF orientation, RGB, transparency on white, 16 bits reduced to 8.

    Raises `RowError`, naming `source`, if it cannot be read or decoded, or has more than `most_pixels`.
    """
    with _opened(image, source, most_pixels) as opened:
        return _rgb(ImageOps.exif_transpose(opened))


def fetched(image: ImageReference, source: str) -> ImageReference:
    """Return an image that is given by URL with its bytes fetched, and any other image unchanged.

    Raises `RowError` if the server does not give them in time, or is at an address that is not allowed.
    """
    location = image.location or ""
    if image.data is not None or not location.startswith(("http://", "https://")):
        return image
    try:
        data = fetch(location, networks=image.networks, most_bytes=LARGEST_FILE)
    except OSError as error:
        raise _unreadable(image, source, error) from None
    return ImageReference(data=data, location=location)


@contextmanager
def _opened(image: ImageReference, source: str, most_pixels: int) -> Iterator[Image.Image]:
    """Open an image and have PIL read its header. Errors, those of the `with` block included, become `RowError`."""
    name = "" if image.location is None else f" {image.location}"
    try:
        file, size = _open_file(fetched(image, source))
    except (OSError, ValueError) as error:
        raise _unreadable(image, source, error) from None
    if size > LARGEST_FILE:
        raise RowError(f"{source}: the image{name} has more than {LARGEST_FILE} bytes")
    try:
        with file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about broken metadata, and about sizes, which are checked here
            with Image.open(file, formats=FORMATS) as opened:
                width, height = opened.size
                if width * height > most_pixels:
                    raise RowError(
                        f"{source}: the image{name} has {width} x {height} pixels, more than {most_pixels}; make it "
                        "smaller, raise data.max_pixels, or set data.oversized=resize"
                    )
                yield opened
    except RowError:
        raise
    except Exception as error:  # noqa: BLE001 - decoders raise anything on a broken file
        reason = "no image format that is read here" if isinstance(error, UnidentifiedImageError) else error
        raise RowError(f"{source}: the image{name} of {size} bytes cannot be decoded: {reason}") from None


def _open_file(image: ImageReference) -> tuple[BinaryIO, int]:
    """Return the image's file and its size in bytes."""
    if image.data is not None:
        return io.BytesIO(image.data), len(image.data)
    # Without O_NONBLOCK, opening a pipe would wait for its other end.
    descriptor = os.open(image.location or "", os.O_RDONLY | os.O_NONBLOCK)
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "Is a directory" if stat.S_ISDIR(found.st_mode) else "Is not a regular file")
    return os.fdopen(descriptor, "rb"), found.st_size


def _unreadable(image: ImageReference, source: str, error: Exception) -> RowError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
    return RowError(f"{source}: the image {image.location} cannot be read: {reason}")


def _has_late_metadata(opened: PngImageFile) -> bool:
    """Return whether a PNG file has text or EXIF after its pixels, where only decoding finds it."""
    file = opened.fp
    assert file is not None
    position, is_late = file.tell(), False
    file.seek(8)
    try:
        while len(header := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", header)
            if is_late and kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
                return True
            is_late |= kind == b"IDAT"
            file.seek(length + 4, io.SEEK_CUR)
        return False
    finally:
        file.seek(position)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range")
    if image.mode.startswith("I"):  # 16 bits, which PIL would clip to 8 instead of scaling
        return Image.fromarray((numpy.asarray(image).clip(0, 65535) >> 8).astype(numpy.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
