"""Do the bytes that are handed on decode to the documented 8-bit pixels, and is damage noticed?"""

import io

import numpy as np
import pytest
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_image

from fuseer.engine.data.decodable import DECODE_ERRORS, decodable, examine

PHOTO = Image.fromarray(load_sample_image("china.jpg")).resize((60, 40))


def encoded(image, kind, **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def pixels(data):
    """What is handed on for `data`, upright."""
    found = examine(data)
    handed = Image.open(io.BytesIO(decodable(data, found)))
    assert handed.format in ("JPEG", "PNG") and handed.mode in ("RGB", "L")
    upright = np.asarray(ImageOps.exif_transpose(handed))
    assert upright.shape[:2] == (found.height, found.width) and upright.dtype == np.uint8
    return upright


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "TIFF", "PPM"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_plain_images_keep_their_pixels(kind, mode):
    data = encoded(PHOTO.convert(mode), kind)
    assert (pixels(data) == np.asarray(Image.open(io.BytesIO(data)))).all()
    assert examine(data).convert == (kind not in ("JPEG", "PNG"))


def test_metadata_is_cut_but_orientation_obeyed():
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112], exif[0x010E] = orientation, "a description"
        for kind in ("JPEG", "PNG"):
            data = encoded(PHOTO, kind, exif=exif, icc_profile=b"profile" * 9)
            assert (pixels(data) == np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))).all()
            handed = decodable(data, examine(data))
            assert b"description" not in handed and b"profile" not in handed
            assert examine(data).orientation == orientation


def test_sixteen_bits_are_cut_to_the_high_byte():
    wide = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    for kind in ("PNG", "TIFF"):
        assert (pixels(encoded(Image.fromarray(wide), kind)) == wide >> 8).all()


def test_transparency_is_composited_on_white():
    alpha = np.tile(np.array([0, 128, 255], np.uint8), (5, 20))[:, :60].repeat(8, 0)
    clear = PHOTO.copy()
    clear.putalpha(Image.fromarray(alpha))
    expected = 255 + (np.asarray(PHOTO).astype(float) - 255) * alpha[..., None] / 255
    assert np.abs(pixels(encoded(clear, "PNG")) - expected).max() <= 1
    grey = clear.convert("LA")
    grey_expected = 255 + (np.asarray(PHOTO.convert("L")).astype(float) - 255) * alpha / 255
    assert np.abs(pixels(encoded(grey, "PNG")) - grey_expected[..., None]).max() <= 1
    indexed = PHOTO.quantize(16)
    hidden = np.asarray(indexed) == 3
    assert hidden.any() and (pixels(encoded(indexed, "PNG", transparency=3))[hidden] == 255).all()


def test_other_modes_become_rgb_or_grey():
    cmyk = PHOTO.convert("CMYK")
    data = encoded(cmyk, "JPEG", quality=95)
    assert (pixels(data) == np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))).all()
    palette = PHOTO.quantize(64)
    assert (pixels(encoded(palette, "PNG")) == np.asarray(palette.convert("RGB"))).all()
    bits = PHOTO.convert("1")
    assert (pixels(encoded(bits, "PNG")) == np.asarray(bits) * np.uint8(255)).all()
    frames = [PHOTO.quantize(8), PHOTO.transpose(Image.Transpose.ROTATE_180).quantize(8)]
    gif = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (pixels(gif) == np.asarray(frames[0].convert("RGB"))).all()


def test_damage_is_an_error_of_the_known_kinds():
    jpeg, png = encoded(PHOTO, "JPEG"), encoded(PHOTO, "PNG")
    for data in (b"", b"text", jpeg[:300], jpeg[:-40], png[:40], png[: len(png) // 2], b"%!PS-Adobe-3.0 EPSF-3.0\n" + bytes(99)):
        with pytest.raises(DECODE_ERRORS):
            examine(data)
    with pytest.raises(ValueError, match="no known range"):
        examine(encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"))
    with pytest.raises(ValueError, match=r"outside 0..65535 \(from -1 to 70000\)"):
        examine(encoded(Image.fromarray(np.array([[-1, 70000]], np.int32)), "TIFF"))


def test_png_that_only_pillow_forgives_is_converted():
    png = encoded(PHOTO, "PNG")
    for data in (png[:-12], png[:-12] + b"\0\0\0\x05IEND", png[:-13] + bytes([png[-13] ^ 1]) + png[-12:]):
        assert examine(data).convert
        assert (pixels(data) == np.asarray(PHOTO)).all()
