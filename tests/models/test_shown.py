"""Items as people see them, from what a model gets: the text without its prompt, and the picture."""

import io

import numpy as np
import pytest
from PIL import Image

from pipeline.data.batch import Image as EncodedImage
from pipeline.data.sample import Item
from pipeline.models.llave.processor import LlaveProcessor
from pipeline.models.qwen_vl.patches import Patches

TEXT = "<image>\na small red star"


def png(width: int, height: int) -> bytes:
    """Return a picture whose left half is red and whose right half is blue."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2, 0] = pixels[:, width // 2 :, 2] = 255
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_text_and_picture_of_an_item_are_shown(tiny_model):
    processor = LlaveProcessor.load(str(tiny_model), 512)
    text, picture, aspect = processor.shown(processor.encode(Item(TEXT, (png(96, 48),))))
    assert text == "a small red star"
    assert picture is not None and aspect == 2.0
    left, right = np.split(picture, 2, axis=2)
    for half, colour in ((left, [255, 0, 0]), (right, [0, 0, 255])):
        assert np.abs(np.median(half, axis=(1, 2)) - colour).max() < 3
    assert processor.shown(processor.encode(Item("a blue ring"))) == ("a blue ring", None, 1.0)


@pytest.mark.parametrize("video", [False, True])
def test_patches_are_joined_to_the_image_that_was_cut(video):
    """An image that already has a size of whole tokens is cut as it is. The patches of two frames alternate."""
    patches, rng = Patches(4, 2, 16, 1 << 20), np.random.default_rng(0)
    frames = [rng.integers(0, 255, (16, 24, 3), dtype=np.uint8) for _ in range(2)]
    cut = [patches.cut(Image.fromarray(frame)) for frame in frames]
    assert cut[0][1:] == (16, 24)
    tiles = np.stack([each[0] for each in cut], axis=1).reshape(-1, 3, 4, 4) if video else cut[0][0]
    picture, aspect = patches.joined(EncodedImage(tiles, 16, 24, video=video))
    assert aspect == 1.5
    assert np.abs(picture.astype(int) - frames[0].transpose(2, 0, 1)).max() <= 1
