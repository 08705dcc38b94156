"""Stored images, decoded from a file or from bytes: size and pixel format are checked before anything is decoded."""

from __future__ import annotations

import dataclasses
import io
import re
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from pi0.datasets.errors import DataError
from pi0.plugins import require_extra
from pi0.reading import require_regular

MAX_PIXELS = 2**26  # of an image or a video's frame, 8192 x 8192: default of the arguments `max_pixels`
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM")  # Pillow runs programs to read others, as EPS
MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr")  # 8 bits per channel


def read_image(source: str | Path | bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """An encoded image as uint8 [H, W, 3]: the first frame, without its alpha channel.

    The EXIF orientation is applied, as viewers and LeRobot's reader (Hugging Face datasets) do. Raises DataError for
    damaged images, for more pixels than `max_pixels`, and for depth maps and other numbers that are not 8-bit colors.
    """
    file = None if isinstance(source, bytes) else Path(source)
    if file is not None:
        require_regular(file, DataError)
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
            check_size(image.width, image.height, max_pixels)
            if image.mode not in MODES:
                raise DataError(f"has mode {image.mode}: 16-bit, depth or float, not 8-bit colors; leave it out")
            ImageOps.exif_transpose(image, in_place=True)
            return np.array(image.convert("RGB"))
    except DataError as error:
        raise DataError(error.problem, file) from error
    except Exception as error:  # Pillow raises errors of almost any type for damaged bytes
        unknown = isinstance(error, UnidentifiedImageError)
        reason = f"it is none of {', '.join(FORMATS)}, or damaged" if unknown else error
        raise DataError(f"cannot be decoded: {reason}", file) from error


@dataclasses.dataclass(frozen=True)
class Encoding:
    """How images are stored: "raw", "png", or "jpeg:QUALITY", whose color has half the resolution with ":420"."""

    name: str

    def __post_init__(self) -> None:
        """Raises ValueError for another name."""
        if not re.fullmatch(r"raw|png|jpeg:([1-9]\d?|100)(:420)?", self.name, re.ASCII):
            raise ValueError(f"unknown encoding {self.name!r}; known are raw, png, jpeg:1 to jpeg:100 and jpeg:95:420")

    def encode(self, image: np.ndarray) -> bytes:
        """An image uint8 [H, W, 3] as bytes, the same ones each time."""
        kind, *options = self.name.split(":")
        if kind == "raw":
            return image.tobytes()
        if kind == "png":
            stream = io.BytesIO()
            Image.fromarray(image).save(stream, "PNG")
            return stream.getvalue()
        require_extra("data", "simplejpeg")
        import simplejpeg

        colors = "420" if options[1:] else "444"
        return simplejpeg.encode_jpeg(np.ascontiguousarray(image), int(options[0]), colorsubsampling=colors)

    def decode(self, source: bytes, size: tuple[int, int] | None, max_pixels: int = MAX_PIXELS) -> np.ndarray:
        """The image uint8 [H, W, 3], of the size (height, width) where one is given. Raises DataError."""
        if self.name == "raw":
            if size is None or len(source) != size[0] * size[1] * 3:
                raise DataError(f"has {len(source)} bytes; an image of size {size} was expected")
            return np.frombuffer(source, np.uint8).reshape(*size, 3)
        image = read_image(source, max_pixels) if self.name == "png" else read_jpeg(source, max_pixels, fast=False)
        if size is not None and image.shape[:2] != tuple(size):
            raise DataError(f"is an image of size {image.shape[:2]}; {tuple(size)} was expected")
        return image


def read_jpeg(source: bytes, max_pixels: int = MAX_PIXELS, *, fast: bool = True) -> np.ndarray:
    """A JPEG image as uint8 [H, W, 3], without EXIF orientation.

    With `fast`, by libjpeg-turbo's fast DCT: TensorFlow's pixels; without, those of Pillow and LeRobot. Raises
    DataError.
    """
    require_extra("data", "simplejpeg")
    import simplejpeg

    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(source)
        check_size(width, height, max_pixels)
        return simplejpeg.decode_jpeg(source, fastdct=fast)
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"cannot be decoded: {error}") from error


def check_size(width: int, height: int, max_pixels: int) -> None:
    """Raise DataError for an image or a video's frame of more pixels."""
    if width * height > max_pixels:
        raise DataError(f"has {width} x {height} pixels; max_pixels is {max_pixels}, raise it to read more")
