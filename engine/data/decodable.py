"""Which bytes decode to the same 8-bit pixels in every decoder?"""

import io
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

# what Pillow's plugins are known to raise on damaged input, beyond the OSError that they promise
DECODE_ERRORS = (
    OSError, SyntaxError, ValueError, TypeError, AttributeError, EOFError, LookupError, ArithmeticError,
    NotImplementedError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip
_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM")  # by content: Pillow would hand PostScript to a program
_ORIENTATION = 0x0112


class Examined(NamedTuple):
    """Size of the image as displayed; EXIF orientation 1 to 8; whether its pixels must be re-encoded."""

    height: int
    width: int
    orientation: int
    convert: bool


def examine(data: bytes) -> Examined:
    """What is in `data`, after one full decode; raises one of `DECODE_ERRORS` where that fails."""
    with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
        image.load()
        orientation = image.getexif().get(_ORIENTATION, 1)
        orientation = orientation if orientation in range(1, 9) else 1
        width, height = image.size
        if orientation >= 5:
            width, height = height, width
        plain = image.mode in ("RGB", "L")
        if image.format == "PNG":
            plain = plain and data[24] == 8 and not data[28] and orientation == 1 and "transparency" not in image.info
        else:
            plain = plain and image.format in ("JPEG", "MPO")
        if plain and _can_be_cut(data):
            return Examined(height, width, orientation, False)
        _eight_bit(image)
        return Examined(height, width, orientation, True)


def decodable(data: bytes, found: Examined) -> bytes:
    """A JPEG or PNG on which Pillow and DALI agree to the bit, from examined `data`.

    8-bit RGB and grey JPEG and PNG (not interlaced) keep their pixel data; their metadata is cut down to a JPEG's EXIF orientation,
    so that no decoder can read it in another way. Everything else becomes the PNG of: the first frame; turned upright; transparency
    composited on white; 16-bit channels cut to their high byte; CMYK, YCbCr, Lab, HSV and palettes as Pillow converts them to RGB;
    1 bit as 0 and 255.
    """
    if not found.convert:
        return _cut(data, found.orientation)
    with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
        out = io.BytesIO()
        _eight_bit(ImageOps.exif_transpose(image)).save(out, "PNG", compress_level=1)
        return out.getvalue()


def _can_be_cut(data: bytes) -> bool:
    """Whether the file is whole by the letter of its format: Pillow is more forgiving than other decoders."""
    try:
        cut = _cut(data, 1)
        if data[:2] == b"\xff\xd8":
            return True
        chunks = list(_chunks(cut))
        zlib.decompress(b"".join(cut[at + 8 : end - 4] for kind, at, end in chunks if kind == b"IDAT"))
    except (ValueError, IndexError, struct.error, zlib.error):
        return False
    return all(zlib.crc32(cut[at + 4 : end - 4]) == struct.unpack_from(">I", cut, end - 4)[0] for _, at, end in chunks)


def _cut(data: bytes, orientation: int) -> bytes:
    return _plain_jpeg(data, orientation) if data[:2] == b"\xff\xd8" else _plain_png(data)


def _plain_png(data: bytes) -> bytes:
    """The PNG's IHDR, IDAT and IEND chunks, which must be there to the end."""
    return b"".join([data[:8], *(data[at:end] for kind, at, end in _chunks(data) if kind in (b"IHDR", b"IDAT", b"IEND"))])


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(type, first byte, end) of the chunks of a PNG, up to IEND."""
    at, kind = 8, b""
    while kind != b"IEND":
        end = at + 12 + struct.unpack_from(">I", data, at)[0]
        kind = data[at + 4 : at + 8]
        if end > len(data):
            raise ValueError(f"PNG: chunk {kind!r} at byte {at} is cut short")
        yield kind, at, end
        at = end


def _plain_jpeg(data: bytes, orientation: int) -> bytes:
    """The JPEG without APP segments other than JFIF and Adobe's colour transform, with a minimal EXIF where it must be turned."""
    kept = [data[:2]]
    if orientation > 1:
        tiff = b"II*\0" + struct.pack("<IHHHIHHI", 8, 1, _ORIENTATION, 3, 1, orientation, 0, 0)
        kept.append(b"\xff\xe1" + struct.pack(">H", 8 + len(tiff)) + b"Exif\0\0" + tiff)
    at = 2
    while data[at + 1] != 0xDA:
        marker = data[at + 1]
        if data[at] != 0xFF or not 0xC0 <= marker <= 0xFE:
            raise ValueError(f"JPEG: no marker at byte {at}")
        end = at + 2 + struct.unpack_from(">H", data, at + 2)[0]
        if marker in (0xE0, 0xEE) or not 0xE1 <= marker <= 0xEF:
            kept.append(data[at:end])
        at = end
    return b"".join([*kept, data[at:]])


def _eight_bit(image: Image.Image) -> Image.Image:
    """`image` as RGB or L, by the rules of `decodable`."""
    if image.mode.startswith("I"):
        wide = np.asarray(image).astype(np.int64)
        if wide.min() < 0 or wide.max() > 65535:
            raise ValueError(f"integer pixels outside 0..65535 (from {wide.min()} to {wide.max()})")
        return Image.fromarray((wide >> 8).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("L" if image.mode in ("1", "L") else "RGB")
