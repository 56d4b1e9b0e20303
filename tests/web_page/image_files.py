"""Image files of the kinds that browsers and PIL could read differently."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def write_image_files(folder: Path) -> list[Path]:
    """One file of each kind."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    image = coarse.resize((307, 211), Image.Resampling.BICUBIC)
    transparent = Image.fromarray(rng.integers(0, 256, (61, 89, 4), dtype=np.uint8), "RGBA")
    palette = image.quantize(37)
    turned = Image.Exif()
    turned[0x0112] = 6
    contents = {
        "small.png": _encoded(image.resize((29, 31)), "PNG"),
        "tall.png": _encoded(image.resize((83, 401)), "PNG"),
        "gray.png": _encoded(image.convert("L"), "PNG"),
        "16_bit.png": _encoded(Image.fromarray(rng.integers(0, 1 << 16, (53, 67), dtype=np.uint16)), "PNG"),
        "transparent.png": _encoded(transparent, "PNG"),
        "transparent_gray.png": _encoded(transparent.convert("LA"), "PNG"),
        "transparent.webp": _encoded(transparent, "WEBP", lossless=True, exact=True),
        "palette.png": _encoded(palette, "PNG", transparency=3),
        "palette.gif": _encoded(palette, "GIF"),
        "photo.jpg": _encoded(image, "JPEG", quality=80),
        "progressive.jpg": _encoded(image, "JPEG", progressive=True),
        "cmyk.jpg": _encoded(image.convert("CMYK"), "JPEG"),
        "turned.jpg": _encoded(image, "JPEG", exif=turned.tobytes()),
        "turned.png": _encoded(image, "PNG", exif=turned.tobytes()),
        "turned.webp": _encoded(image, "WEBP", exif=turned.tobytes()),
        "linear.png": _with_gamma(_encoded(image, "PNG"), 1.0),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in contents]


def broken_files() -> dict[str, tuple[bytes, str]]:
    """Files that are not usable, and what is to be said about each."""
    png = _encoded(Image.new("RGB", (97, 89), "teal"), "PNG")
    header = struct.pack(">IIBBBBB", 20_000, 10_000, 8, 2, 0, 0, 0)
    huge = png[:8] + _chunk(b"IHDR", header) + png[33:]
    return {
        "notes.txt": (b"no image", "notes.txt cannot be read as an image: it is damaged, or not a JPEG"),
        "cut.png": (png[:-40], "cut.png cannot be read as an image: it is damaged, or not a JPEG"),
        "empty.jpg": (b"", "empty.jpg is empty."),
        "huge.png": (huge, "huge.png has 20,000 × 10,000 pixels, and this page takes at most 64 million"),
    }


def _encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _with_gamma(png: bytes, gamma: float) -> bytes:
    """A PNG that says its colors are not sRGB: a browser shows other ones than are stored."""
    return png[:33] + _chunk(b"gAMA", struct.pack(">I", round(100_000 / gamma))) + png[33:]


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
