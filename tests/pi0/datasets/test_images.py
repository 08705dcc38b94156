"""One reader of stored images: right values of what is accepted, and refusals before anything is decoded."""

from __future__ import annotations

import contextlib
import io
import json
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pi0.datasets.annotations import Questions
from pi0.datasets.errors import DataError
from pi0.datasets.images import read_image

COLORS = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)


def encoded(image: Image.Image, format: str = "png", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def png_of_size(width: int, height: int) -> bytes:
    """A PNG of a few bytes that declares this size."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


PAIRS = [(mode, format) for mode in ("1", "L", "P", "RGB") for format in ("png", "bmp", "tiff", "gif")]


@pytest.mark.parametrize(("mode", "format"), [*PAIRS, ("RGB", "ppm"), ("L", "ppm"), ("RGB", "webp"), ("CMYK", "jpeg")])
def test_eight_bit_images_are_what_pillow_makes_of_them(mode: str, format: str):
    image = Image.fromarray(COLORS).convert(mode)
    expected = np.array(Image.open(io.BytesIO(encoded(image, format))).convert("RGB"))
    np.testing.assert_array_equal(read_image(encoded(image, format)), expected)


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_alpha_is_left_out(mode: str):
    image = Image.fromarray(COLORS).convert(mode)
    image.putalpha(Image.fromarray(COLORS[..., 0]))
    np.testing.assert_array_equal(read_image(encoded(image)), np.array(image.convert("RGB")))
    if mode == "RGBA":
        np.testing.assert_array_equal(read_image(encoded(image)), COLORS)


def test_color_of_16_bits_keeps_its_high_bits(tmp_path: Path):
    """Pillow reads it as 8-bit color: 0x1234 is 0x12."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    row = b"\0" + struct.pack(">3H", 0x1234, 0x8000, 0xFFFF)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0))
    png += chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    np.testing.assert_array_equal(read_image(png), [[[0x12, 0x80, 0xFF]]])


@pytest.mark.parametrize(
    ("array", "format", "mode"),
    [
        ((400 + np.arange(48).reshape(6, 8)).astype(np.uint16), "png", "I;16"),
        ((400 + np.arange(48).reshape(6, 8)).astype(np.uint16), "tiff", "I;16"),
        (np.arange(48, dtype=np.int32).reshape(6, 8), "tiff", "I"),
        (np.linspace(0, 2, 48, dtype=np.float32).reshape(6, 8), "tiff", "F"),
    ],
)
def test_depth_is_no_color(array: np.ndarray, format: str, mode: str):
    with pytest.raises(DataError, match=rf"has mode {mode}: 16-bit, depth or float, not 8-bit colors"):
        read_image(encoded(Image.fromarray(array), format))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["jpeg", "png"])
def test_exif_orientation(orientation: int, format: str):
    """The eight orientations, by their definition: what row 0 and column 0 of the stored image are when shown."""
    smooth = np.zeros((16, 32, 3), np.uint8)
    smooth[:8, :16], smooth[:8, 16:], smooth[8:, :16] = (255, 0, 0), (0, 255, 0), (0, 0, 255)  # corners differ
    exif = Image.Exif()
    exif[0x0112] = orientation
    whole = {"quality": 95, "subsampling": 0} if format == "jpeg" else {}
    shown = read_image(encoded(Image.fromarray(smooth), format, exif=exif, **whole))
    mirrored = smooth[:, ::-1]
    upright = {
        1: smooth,
        2: mirrored,
        3: np.rot90(smooth, 2),
        4: smooth[::-1],
        5: smooth.transpose(1, 0, 2),
        6: np.rot90(smooth, -1),
        7: np.rot90(smooth, 2).transpose(1, 0, 2),
        8: np.rot90(smooth, 1),
    }[orientation]
    assert shown.shape == upright.shape
    assert np.abs(shown.astype(int) - upright).max() < 6, "beyond what JPEG rounds"


@pytest.mark.parametrize("size", [(50_000, 50_000), (13_000, 13_000), (2**30, 1), (8193, 8192)])
def test_size_is_checked_before_decoding(size: tuple[int, int]):
    start = time.perf_counter()
    with pytest.raises(DataError, match=rf"{size[0]} x {size[1]} pixels|decompression bomb|exceeds limit"):
        read_image(png_of_size(*size))
    assert time.perf_counter() - start < 1


def test_a_caller_can_raise_the_limit():
    image = encoded(Image.fromarray(COLORS))
    with pytest.raises(DataError, match="has 8 x 6 pixels; max_pixels is 47, raise it"):
        read_image(image, max_pixels=47)
    assert read_image(image, max_pixels=48).shape == (6, 8, 3)


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n", png_of_size(4, 4), b"%!PS-Adobe-3.0 EPSF-3.0\n%%EOF\n"])
def test_damaged_images_and_formats_that_run_programs(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("a program was run"))
    with pytest.raises(DataError, match="cannot be decoded"):
        read_image(content)
    file = tmp_path / "image.eps"
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"image\.eps: cannot be decoded") as raised:
        read_image(file)
    assert raised.value.file == file


@pytest.mark.filterwarnings("ignore")  # of Pillow, about what is damaged
def test_random_damage_is_a_data_error():
    """Bytes changed at random: an image, or the one named error."""
    rng, whole = np.random.default_rng(0), [encoded(Image.fromarray(COLORS), f) for f in ("png", "jpeg", "tiff", "gif")]
    for i in range(400):
        content = bytearray(whole[i % 4])
        for place in rng.integers(0, len(content), 3):
            content[place] = rng.integers(256)
        with contextlib.suppress(DataError):
            assert read_image(bytes(content)).shape[2] == 3


def question_about(folder: Path, image: str) -> np.ndarray:
    file = folder / "questions.jsonl"
    file.write_text(json.dumps({"image": image, "question": "What?", "answer": "a cup"}) + "\n", encoding="utf-8")
    return Questions(file, "base_0_rgb")[0]["image/base_0_rgb"]


def test_questions_read_the_same_images(tmp_path: Path):
    folder = tmp_path / "questions"
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 3
    (folder / "turned.png").write_bytes(encoded(Image.fromarray(COLORS), exif=exif))
    np.testing.assert_array_equal(question_about(folder, "turned.png"), np.rot90(COLORS, 2))
    (folder / "depth.png").write_bytes(encoded(Image.fromarray(COLORS[..., 0].astype(np.uint16))))
    (folder / "bomb.png").write_bytes(png_of_size(50_000, 50_000))
    (tmp_path / "outside.png").write_bytes(encoded(Image.fromarray(COLORS)))
    for name, problem in {
        "depth.png": "line 1: .*depth.png: has mode I;16",
        "bomb.png": "line 1: .*bomb.png",
        "../outside.png": "without '..'",
        str(tmp_path / "outside.png"): "it must be relative",
    }.items():
        with pytest.raises(DataError, match=rf"questions\.jsonl: .*{problem}"):
            question_about(folder, name)
