"""Tiles and token counts equal those of transformers' image processor; invalid images are refused."""

import io
import resource
import struct
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from closeness import assert_close_in_norm
from PIL import Image
from transformers import LlavaOnevisionConfig, LlavaOnevisionImageProcessorPil, LlavaOnevisionModel
from transformers.image_processing_utils import select_best_resolution
from transformers.image_utils import load_image

from pipeline.data import tiles as tiles_module
from pipeline.data.sample import BadSample
from pipeline.data.tiles import Tiling, decode_image

PINPOINTS = ((384, 384), (384, 768), (768, 384), (768, 768))  # values of LLaVE
WIDE = (*PINPOINTS, (384, 1152), (1152, 384))
SIGHTED = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}  # values of SigLIP


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Return an image of noise, which reveals every difference in resizing."""
    shape = (len(Image.new(mode, (1, 1)).getbands()), height, width)
    bands = np.random.default_rng(shape).integers(0, 256, shape, dtype=np.uint8)
    return Image.merge(mode, [Image.fromarray(band) for band in bands])


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def sideways() -> bytes:
    """Return a JPEG from a camera that was rotated by 90 degrees."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(picture(300, 200), "JPEG", exif=exif)


IMAGES = {
    "square": encoded(picture(384, 384)),
    "landscape": encoded(picture(640, 480)),
    "portrait": encoded(picture(427, 640)),
    "odd sides": encoded(picture(501, 333)),
    "larger than the grid": encoded(picture(1200, 900)),
    "smaller than a tile": encoded(picture(31, 17)),
    "one pixel high": encoded(picture(700, 1)),
    "one pixel wide": encoded(picture(1, 700)),
    "one pixel": encoded(picture(1, 1)),
    "grey": encoded(picture(320, 240, "L")),
    "with alpha": encoded(picture(320, 240, "RGBA")),
    "grey with alpha": encoded(picture(120, 240, "LA")),
    "palette": encoded(picture(240, 320).quantize(17)),
    "palette with transparency": encoded(picture(240, 320).quantize(17), transparency=3),
    "black and white": encoded(picture(240, 320).convert("1")),
    "jpeg": encoded(picture(640, 480), "JPEG"),
    "cmyk jpeg": encoded(picture(320, 240, "CMYK"), "JPEG"),
    "webp": encoded(picture(320, 240), "WEBP"),
    "gif": encoded(picture(320, 240), "GIF"),
    "turned by exif": sideways(),
}


def assert_like_transformers(images: list[bytes], pinpoints: tuple[tuple[int, int], ...]) -> None:
    """Assert that these images, as one sample, give the same pixels as in transformers."""
    theirs = LlavaOnevisionImageProcessorPil(image_grid_pinpoints=[list(size) for size in pinpoints], **SIGHTED)
    tiling = Tiling(384, 27, pinpoints)
    anyres = len(images) == 1
    outputs = theirs([[load_image(Image.open(io.BytesIO(data))) for data in images]])["pixel_values"]
    for data, pixels in zip(images, outputs, strict=True):
        tiles = tiling.cut(decode_image(data), anyres=anyres)
        assert tiles.dtype == np.uint8
        assert tiles.shape == pixels.shape
        normalised = (tiles.astype(np.float32) / 255 - 0.5) / 0.5
        assert_close_in_norm(normalised, pixels)


@pytest.mark.parametrize("name", IMAGES)
def test_single_image_tiles_match_transformers(name):
    assert_like_transformers([IMAGES[name]], PINPOINTS)


@pytest.mark.parametrize("size", [(1000, 300), (250, 900)])
def test_other_grids_match_transformers(size):
    assert_like_transformers([encoded(picture(*size))], WIDE)


def test_several_images_are_padded_like_transformers():
    names = ("square", "landscape", "portrait", "smaller than a tile", "one pixel wide", "with alpha", "turned by exif")
    assert_like_transformers([IMAGES[name] for name in names], PINPOINTS)


@pytest.mark.parametrize("pinpoints", [PINPOINTS, WIDE])
def test_token_count_matches_model(pinpoints):
    config = LlavaOnevisionConfig(image_grid_pinpoints=[list(size) for size in pinpoints])
    model, tiling = SimpleNamespace(config=config), Tiling(384, 27, pinpoints, max_tiles=2)
    newline, options = torch.zeros(1), {"vision_aspect_ratio": "anyres_max_2"}
    sizes = np.random.default_rng(0).integers(1, 1500, (60, 2)).tolist()
    for height, width in [*sizes, (1, 1), (1, 1500), (1500, 1), (384, 384), (768, 768)]:
        grid = select_best_resolution((height, width), pinpoints)
        tiles = torch.zeros(1 + grid[0] * grid[1] // 384**2, 27 * 27, 1)
        _, tokens = LlavaOnevisionModel.pack_image_features(model, [tiles], [(height, width)], newline, **options)
        assert tiling.tokens(height, width, anyres=True) == tokens


def test_frames_are_resized_ignoring_aspect_ratio():
    frames = [picture(64, 32), picture(17, 40), picture(24, 24)]
    tiles = Tiling(24, 3, ((24, 24),)).cut_frames(frames)
    assert tiles.shape == (3, 3, 24, 24)
    for tile, frame in zip(tiles, frames, strict=True):
        assert np.array_equal(tile.transpose(1, 2, 0), np.asarray(frame.resize((24, 24), Image.Resampling.BICUBIC)))


def test_video_token_count():
    assert Tiling(384, 27, PINPOINTS).video_tokens(32) == 32 * 14 * 14 + 1
    assert Tiling(56, 4, ((56, 56),)).video_tokens(1) == 2 * 2 + 1


def png_of(width: int, height: int) -> bytes:
    """Return a PNG without pixels: a few bytes that claim an image of this size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("side", "reason"), [(60_000, "DecompressionBombError.*3600000000 pixels"), (12_000, "12000x12000 pixels")]
)
def test_decompression_bomb_is_refused_before_allocation(side, reason):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BadSample, match=reason):
        decode_image(png_of(side, side))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB


@pytest.mark.parametrize("data", [b"", b"no image", IMAGES["jpeg"][:3000], encoded(picture(8, 8), "BMP")])
def test_truncated_or_unsupported_images_are_refused(data):
    with pytest.raises(BadSample, match="undecodable image"):
        decode_image(data)


@pytest.mark.parametrize("size", [(60_000, 1), (1, 60_000), (9_500, 100)])
def test_elongated_image_is_refused_instead_of_padded(size):
    with pytest.raises(BadSample, match=f"{size[0]}x{size[1]} pixels are too many"):
        Tiling(24, 3, ((24, 24),)).cut(Image.new("RGB", size), anyres=False)


def photograph(width: int, height: int, **options: object) -> bytes:
    """Return a JPEG whose spectrum falls with the frequency, as that of photographs."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = np.inf
    noise = np.random.default_rng(0).standard_normal((3, height, width))
    bands = np.fft.irfft2(np.fft.rfft2(noise) / frequency, (height, width))
    pixels = (127 + 55 * bands / bands.std()).clip(0, 255).astype(np.uint8)
    return encoded(Image.fromarray(pixels.transpose(1, 2, 0)), "JPEG", quality=90, **options)


SMALL = Tiling(56, 4, ((56, 56), (56, 112), (112, 56), (112, 112), (112, 224)))


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    ("width", "height", "divisors"), [(800, 600, (2, 2)), (1008, 400, (2, 2)), (1792, 896, (4, 8)), (440, 330, (1, 1))]
)
def test_jpegs_decoded_smaller_have_nearly_the_same_tiles(monkeypatch, width, height, divisors, turned):
    """They differ less than the tiles by bicubic and by Lanczos filters."""
    exif = Image.Exif()
    exif[0x0112] = 6 if turned else 1
    data = photograph(width, height, exif=exif)
    smaller, whole = decode_image(data, needed=SMALL.needed), decode_image(data)
    divisor = divisors[turned]
    assert smaller.size == tuple(side // divisor for side in whole.size)
    ours, expected = (SMALL.cut(picture, anyres=True).astype(np.float64) for picture in (smaller, whole))
    assert ours.shape == expected.shape
    if divisor == 1:
        assert np.array_equal(ours, expected)

    def resized(image: Image.Image, height: int, width: int) -> np.ndarray:
        return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS)).transpose(2, 0, 1)

    monkeypatch.setattr(tiles_module, "resized", resized)
    lanczos = SMALL.cut(whole, anyres=True)
    assert np.square(ours - expected).mean() < np.square(lanczos - expected).mean()


def test_sizes_of_jpegs_decoded_smaller_give_the_same_grids_and_token_counts():
    tiling, rng, seen = Tiling(384, 27, WIDE, max_tiles=2), np.random.default_rng(0), set()
    for height, width in (8 * rng.integers(100, 1200, (300, 2))).tolist():
        for divisor in (2, 4, 8):
            smaller, needed = (height // divisor, width // divisor), tiling.needed(height, width)
            if all(side >= 2 * least for side, least in zip(smaller, needed, strict=True)):
                seen.add(divisor)
                assert tiling.grid(*smaller) == tiling.grid(height, width)
                for rounded in (False, True):
                    counts = [tiling.tokens(*size, anyres=True, rounded=rounded) for size in ((height, width), smaller)]
                    assert counts[0] == counts[1]
    assert seen == {2, 4}


def test_only_jpegs_whose_sides_divide_are_decoded_smaller():
    exact = {
        "odd": encoded(picture(801, 601), "JPEG"),
        **{name: IMAGES[name] for name in ("larger than the grid", "webp", "gif")},
    }
    for data in exact.values():
        smaller = decode_image(data, needed=lambda *size: (2, 2))
        assert np.array_equal(np.asarray(smaller), np.asarray(decode_image(data)))


@pytest.mark.parametrize("anyres", [False, True])
def test_tiles_are_contiguous(anyres):
    """Convolutions over other strides may round differently, and tiles from a worker process are contiguous."""
    assert Tiling(24, 3, ((24, 48),)).cut(picture(40, 30), anyres=anyres).flags.c_contiguous
