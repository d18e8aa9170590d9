"""Items that are equal for the model are one item and not negatives of each other; others never are."""

import io
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image as Pillow
from transformers import CLIPTokenizer

from pipeline.config import load_recipe
from pipeline.data.batch import Batch, Encoded, Image, Origin, RawSample, encode_rows
from pipeline.data.sample import BadSample, Item, Pair
from pipeline.models.clip.processor import ClipTexts
from pipeline.models.llave.processor import LlaveProcessor
from pipeline.models.text_encoder.processor import TextProcessor
from pipeline.models.two_tower import TwoTowerProcessor
from pipeline.models.vision import Pixels
from pipeline.objectives.contrastive.batch_loss import contrastive_loss

ASK = "<image>\nWhat is it?"


def batch_of(pairs: list[Pair], encode: Callable[[Item], Encoded], workers: int = 1) -> Batch:
    samples = [RawSample(i, Origin("", i), b"", lambda pair=pair: pair) for i, pair in enumerate(pairs)]
    return Batch.of([encode_rows(samples[worker::workers], encode) for worker in range(workers)])


def stored(picture: Pillow.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def picture() -> Pillow.Image:
    return Pillow.fromarray(np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8))


def with_exif(number: int) -> Pillow.Exif:
    exif = Pillow.Exif()
    exif[0x9003] = f"2024:01:0{number} 10:00:00"
    return exif


def upright_and_tagged() -> tuple[bytes, bytes]:
    exif = Pillow.Exif()
    exif[0x0112] = 6
    return stored(picture()), stored(picture().transpose(Pillow.Transpose.ROTATE_90), exif=exif)


# Items that differ only in their bytes.
SAME = {
    "a mark that moves to the front": (
        Item("<image>\nwhich?", (stored(picture()),)),
        Item(" which? <image>\n", (stored(picture()),)),
    ),
    "what is cut": (Item("star " * 300), Item("star " * 301)),
    "composed and decomposed letters": (Item("caf\u00e9"), Item("cafe\u0301")),
    "a photo with another date": tuple(
        Item(ASK, (stored(picture(), "JPEG", exif=with_exif(number)),)) for number in (1, 2)
    ),
    "a picture compressed otherwise": tuple(Item(ASK, (stored(picture(), compress_level=n),)) for n in (1, 9)),
    "a picture in another format": (
        Item(ASK, (stored(picture()),)),
        Item(ASK, (stored(picture(), "WEBP", lossless=True),)),
    ),
    "a picture that is turned by its tag": tuple(Item(ASK, (data,)) for data in upright_and_tagged()),
    "16 bits and 8": (
        Item(ASK, (stored(picture().convert("L")),)),
        Item(ASK, (stored(Pillow.fromarray(np.asarray(picture().convert("L")).astype(np.uint16) * 257)),)),
    ),
}


@pytest.fixture(scope="module")
def llave(tiny_model) -> LlaveProcessor:
    return LlaveProcessor.load(tiny_model, 128)


@pytest.mark.parametrize("case", SAME)
def test_items_equal_after_processing_are_deduplicated(case, llave):
    one, other = SAME[case]
    assert one.content_hash != other.content_hash
    pairs = [Pair("0", "d", "t", Item("query 0"), one), Pair("1", "d", "t", Item("query 1"), other, (one,))]
    for workers in (1, 2):
        batch = batch_of(pairs, llave.encode, workers)
        assert batch.target[0] == batch.target[1] == batch.negatives[1][0] and len(batch.items) == 3
    recipe = load_recipe("pipeline/recipes/demo.yaml", ["batch.global_batch=2", "data.lanes=1"])
    embeddings = torch.nn.functional.normalize(torch.randn(3, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    output = contrastive_loss(embeddings, batch, recipe, 0.02, 9.0)
    assert output.loss == 0  # the two are not negatives of each other, and an equal explicit negative is masked


def test_item_equality_depends_on_model(llave):
    lower = CLIPTokenizer().train_new_from_iterator(["a small red star"], 300, show_progress=False)
    pixels = Pixels(24, (0.5,) * 3, (0.5,) * 3, 24, False, Pillow.Resampling.BICUBIC)
    clip = TwoTowerProcessor(pixels, 10, ClipTexts(lower, 16))
    image = stored(picture())
    for one, other in (
        (Item("A Red Star"), Item("a red star")),  # CLIP's tokenizer lowercases
        (Item(ASK, (image,)), Item("<image>\nWhere is it?", (image,))),  # CLIP reads only the image
    ):
        assert clip.encode(one).key == clip.encode(other).key
        assert llave.encode(one).key != llave.encode(other).key


def test_item_key_covers_all_model_inputs():
    tiles = np.random.default_rng(0).integers(0, 256, (2, 3, 14, 14), np.uint8)
    item = Encoded(np.arange(5, dtype=np.int32), (Image(tiles, 20, 30), Image(tiles, 20, 30)))
    assert replace(item).key == item.key == Encoded(np.arange(5), item.images).key  # for any integer type of the ids
    changed = tiles.copy()
    changed[-1, -1, -1, -1] ^= 128
    first, second = item.images
    others = [
        replace(item, input_ids=np.arange(1, 6, dtype=np.int32)),
        replace(item, input_ids=np.arange(4, dtype=np.int32)),
        replace(item, skipped=1),
        replace(item, text=b"a"),
        replace(item, images=(first,)),
        replace(item, images=(first, replace(second, tiles=changed))),
        replace(item, images=(replace(first, tiles=changed), second)),
        replace(item, images=(first, replace(second, height=30, width=20))),
        replace(item, images=(first, replace(second, video=True))),
        replace(item, images=(Image(np.concatenate([tiles, tiles]), 20, 30),)),
        Encoded(item.input_ids),
    ]
    keys = {each.key for each in (item, *others)}
    assert len(keys) == 1 + len(others)


def test_repeated_items_are_encoded_once(llave):
    encoded = []

    def encode(item: Item) -> Encoded:
        encoded.append(item)
        if item.text == "bad":
            raise BadSample("made so")
        return llave.encode(item)

    target, negative = Item("a red star"), Item("a blue ring")
    pairs = [Pair(str(i), "d", "t", Item(f"query {i % 2}"), target, (negative,)) for i in range(4)]
    bad = Pair("4", "d", "t", Item("query 4"), Item("bad"))
    batch = batch_of([*pairs, bad, bad], encode)
    assert [item.text for item in encoded[:4]] == ["query 0", "a red star", "a blue ring", "query 1"]
    assert [item.text for item in encoded[4:] if item.text] == ["query 4", "bad"] * 2
    assert batch.valid == [True] * 4 + [False] * 2
    assert batch.query[4] == batch.target[5] == llave.encode(Item("")).key


def test_text_key_ignores_whitespace_but_not_instruction(tiny_model, llave):
    processor = TextProcessor(llave.tokenizer, 64, "find:")
    assert processor.encode(Item("a star")).key == processor.encode(Item(" a star ")).key
    assert processor.encode(Item("a star")).key != TextProcessor(llave.tokenizer, 64).encode(Item("a star")).key


def test_key_ignores_original_size_of_single_tiles_and_videos():
    tile = np.zeros((1, 3, 4, 4), np.uint8)
    two = np.zeros((2, 3, 4, 4), np.uint8)

    def key(tiles: np.ndarray, height: int, width: int, video: bool = False) -> int:
        return Encoded(np.arange(3, dtype=np.int32), (Image(tiles, height, width, video),)).key

    assert key(tile, 20, 20) == key(tile, 40, 30)
    assert key(two, 20, 20, video=True) == key(two, 40, 30, video=True)
    assert key(two, 20, 20) != key(two, 40, 30)  # the padding is removed
    assert key(two, 20, 20) != key(two, 20, 20, video=True)
