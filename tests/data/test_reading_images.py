"""Images are decoded by one function, upright as people see them; or as they are stored, as in the papers."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps
from transformers.image_utils import load_image

from pipeline.data.sample import BadSample
from pipeline.data.tiles import decode_image, image_format, rgb

WIDTH, HEIGHT = 31, 17
PIXELS = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
PICTURE = Image.fromarray(PIXELS)
LOSSY = Image.fromarray(np.add.outer(np.arange(HEIGHT) * 3, np.arange(WIDTH) * 5).astype(np.uint8)).convert("RGB")
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def tag(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    crc = lambda kind, content: struct.pack(">I", zlib.crc32(kind + content))  # noqa: E731
    parts = (struct.pack(">I", len(content)) + kind + content + crc(kind, content) for kind, content in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def png_16(values: np.ndarray, colour: int, *more: tuple[bytes, bytes]) -> bytes:
    """Return a PNG of (height, width, bands) uint16. colour: 0 grey, 2 RGB, 4 grey with alpha, 6 RGB with alpha."""
    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    return png((b"IHDR", header), (b"IDAT", zlib.compress(rows)), *more, (b"IEND", b""))


def tagged_behind_its_pixels(orientation: int) -> bytes:
    """Return a PNG whose orientation tag follows the pixels, as some tools append it."""
    data = encoded(PICTURE)
    return data[:-12] + png((b"eXIf", tag(orientation).removeprefix(b"Exif\0\0")))[8:] + data[-12:]


@pytest.mark.parametrize("orientation", [*range(10), 42, 65535])
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "MPO", "PNG, at its end"])
def test_image_is_rotated_by_exif_orientation(form, orientation):
    if form == "PNG, at its end":
        data = tagged_behind_its_pixels(orientation)
    elif form == "MPO":
        data = encoded(LOSSY, form, save_all=True, append_images=[LOSSY], exif=tag(orientation))
    else:
        data = encoded(LOSSY if form == "JPEG" else PICTURE, form, exif=tag(orientation))
    turned = decode_image(data)
    assert np.array_equal(turned, ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    assert np.array_equal(turned, load_image(Image.open(io.BytesIO(data))))
    expected = (HEIGHT, WIDTH) if orientation in range(5, 9) else (WIDTH, HEIGHT)
    suffix = {"JPEG": "jpg", "MPO": "jpg", "WEBP": "webp"}.get(form, "png")
    assert image_format(data) == (suffix, *expected) and turned.size == expected
    stored = decode_image(data, as_stored=True)
    assert np.array_equal(stored, Image.open(io.BytesIO(data)).convert("RGB")) and stored.size == (WIDTH, HEIGHT)


@pytest.mark.parametrize("form", ["JPEG", "WEBP"])
def test_image_is_rotated_by_xmp_orientation(form):
    data = encoded(LOSSY, form, xmp=XMP)
    assert np.array_equal(decode_image(data), load_image(Image.open(io.BytesIO(data))))
    assert decode_image(data).size == image_format(data)[1:] == (HEIGHT, WIDTH)


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0MM", b"Exif\0\0noise and more", tag(6)[:-9], bytes(50)])
def test_image_with_damaged_exif_is_decoded(exif):
    data = encoded(LOSSY, "JPEG", exif=exif)
    assert np.array_equal(decode_image(data), Image.open(io.BytesIO(data)).convert("RGB"))
    assert image_format(data) == ("jpg", WIDTH, HEIGHT)


RAMP = np.linspace(0, 65535, WIDTH * HEIGHT).astype(np.uint16).reshape(HEIGHT, WIDTH, 1)


@pytest.mark.parametrize(("colour", "bands"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_16_bit_images_are_scaled_to_8_bits(colour, bands):
    values = np.concatenate([RAMP, RAMP[::-1], RAMP[:, ::-1], RAMP], axis=2)[..., :bands]
    shown = values[..., :3] if bands > 2 else values[..., [0, 0, 0]]
    assert np.array_equal(decode_image(png_16(values, colour)), shown >> 8)
    turned = decode_image(png_16(values, colour, (b"eXIf", tag(6).removeprefix(b"Exif\0\0"))))
    assert np.array_equal(turned, np.rot90(shown >> 8, -1))


def test_16_bit_grey_as_stored_matches_pillow():
    data = png_16(RAMP, 0)
    stored = np.asarray(decode_image(data, as_stored=True))
    assert np.array_equal(stored, Image.open(io.BytesIO(data)).convert("RGB"))
    assert (stored == 255).mean() > 0.99  # the reason for scaling it in all other cases


def test_integer_modes_convert_to_rgb_and_floats_are_refused():
    levels = RAMP[..., 0]
    for mode in ("<u2", ">u2", "<i4"):  # I;16, I;16B, I
        assert np.array_equal(rgb(Image.fromarray(levels.astype(mode))), (RAMP >> 8).repeat(3, axis=2))
    small = Image.fromarray((levels >> 8).astype(np.int32))  # 32-bit pixels with 8-bit values
    assert np.array_equal(rgb(small), (RAMP >> 8).repeat(3, axis=2))
    beyond = Image.fromarray(np.array([[-5, 70_000]], np.int32))
    assert np.asarray(rgb(beyond)).tolist() == [[[0] * 3, [255] * 3]]
    with pytest.raises(ValueError, match="its pixels are floats"):
        rgb(Image.fromarray(levels / np.float32(65535)))


def animated(format: str) -> bytes:
    frames = [PICTURE, Image.fromarray(255 - PIXELS)]
    return encoded(frames[0], format, save_all=True, append_images=frames[1:], duration=100)


OTHERS = {
    "black and white": encoded(PICTURE.convert("1")),
    "grey": encoded(PICTURE.convert("L")),
    "grey with alpha": encoded(Image.merge("LA", (PICTURE.getchannel(0), PICTURE.getchannel(1)))),
    "with alpha": encoded(Image.merge("RGBA", (*PICTURE.split(), PICTURE.getchannel(1)))),
    "alpha in WebP": encoded(Image.merge("RGBA", (*PICTURE.split(), PICTURE.getchannel(1))), "WEBP", lossless=True),
    "palette": encoded(PICTURE.quantize(17)),
    "palette, one colour transparent": encoded(PICTURE.quantize(17), transparency=3),
    "palette with alphas": encoded(PICTURE.quantize(17), transparency=bytes(range(0, 255, 15))),
    "RGB, one colour transparent": encoded(PICTURE, transparency=tuple(PIXELS[0, 0].tolist())),
    "GIF, one colour transparent": encoded(PICTURE.quantize(17), "GIF", transparency=3),
    "grey JPEG": encoded(LOSSY.convert("L"), "JPEG"),
    "CMYK JPEG": encoded(LOSSY.convert("CMYK"), "JPEG"),
    "progressive JPEG": encoded(LOSSY, "JPEG", progressive=True),
    "animated GIF": animated("GIF"),
    "animated PNG": animated("PNG"),
    "animated WebP": animated("WEBP"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_formats_match_transformers(name):
    """Transparency is dropped, and an animation is represented by its first frame."""
    data = OTHERS[name]
    expected = load_image(Image.open(io.BytesIO(data)))
    assert np.array_equal(decode_image(data), expected)
    assert np.array_equal(decode_image(data, as_stored=True), expected)
    suffix = "gif" if "GIF" in name else "jpg" if "JPEG" in name else "webp" if "WebP" in name else "png"
    assert image_format(data) == (suffix, WIDTH, HEIGHT)


def test_truncated_or_unsupported_images_are_refused():
    jpeg = encoded(LOSSY.resize((300, 200)), "JPEG")
    for data in (jpeg[: len(jpeg) // 2], OTHERS["palette"][:-40], encoded(PICTURE, "BMP"), encoded(PICTURE, "TIFF")):
        with pytest.raises(BadSample, match="undecodable image"):
            decode_image(data)
