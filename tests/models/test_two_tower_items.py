"""Items of text models and of two-tower models; and the texts of a sample that a step uses."""

import io
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from transformers import LlamaTokenizer, PreTrainedTokenizerBase, Qwen2Tokenizer

from pipeline.data.sample import BadSample, Item, Pair
from pipeline.demo import clips
from pipeline.models.registry import training
from pipeline.models.text_encoder.processor import TextProcessor
from pipeline.models.two_tower import TwoTowerProcessor
from pipeline.models.vision import Pixels

CORPUS = ["a small red star at the top left", "a large blue ring", "find the same:"]
PIXELS = Pixels(24, (0.5,) * 3, (0.5,) * 3, 24, False, Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def llama() -> PreTrainedTokenizerBase:
    """Return a tokenizer that adds a token before each text."""
    tokenizer = LlamaTokenizer().train_new_from_iterator(CORPUS, 300, show_progress=False)
    tokenizer.add_bos_token = True
    return tokenizer


@pytest.fixture(scope="module")
def qwen() -> PreTrainedTokenizerBase:
    return Qwen2Tokenizer().train_new_from_iterator(CORPUS, 300, show_progress=False)


def png(width: int = 40, height: int = 24) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (200, 30, 30)).save(buffer, "PNG")
    return buffer.getvalue()


def test_bos_token_and_instruction_precede_the_text(llama, qwen):
    for tokenizer, mark in ((llama, [llama.bos_token_id]), (qwen, [])):
        ids = tokenizer("a red star", add_special_tokens=False)["input_ids"]
        before = tokenizer("find the same:", add_special_tokens=False)["input_ids"]
        plain = TextProcessor(tokenizer, 64).encode(Item("a red star"))
        assert plain.input_ids.tolist() == mark + ids and plain.skipped == len(mark)
        instructed = TextProcessor(tokenizer, 64, "find the same:").encode(Item("a red star"))
        assert instructed.input_ids.tolist() == mark + before + ids
        assert instructed.skipped == len(mark + before)
        assert instructed.input_ids.dtype == np.int32


def test_truncated_text_keeps_at_least_one_pooled_token(llama, qwen):
    for tokenizer in (llama, qwen):
        whole = TextProcessor(tokenizer, 4096, "find the same:").encode(Item("a large blue ring " * 40))
        for limit in (64, whole.skipped + 1, whole.skipped, 1):
            cut = TextProcessor(tokenizer, limit, "find the same:").encode(Item("a large blue ring " * 40))
            assert cut.input_ids.tolist() == whole.input_ids[:limit].tolist()
            assert cut.skipped == min(whole.skipped, limit - 1)
        empty = TextProcessor(tokenizer, 64, "find the same:").encode(Item(""))
        assert empty.input_ids.tolist() == whole.input_ids[: whole.skipped].tolist()
        assert empty.skipped == whole.skipped - 1
    for tokenizer, stands_in in ((llama, llama.bos_token_id), (qwen, qwen.eos_token_id)):
        empty = TextProcessor(tokenizer, 64).encode(Item(""))
        assert (empty.input_ids.tolist(), empty.skipped) == ([stands_in], 0)


def test_text_encoder_rejects_images_and_videos(qwen):
    processor = TextProcessor(qwen, 64)
    for item in (Item("a red star", (png(),)), Item("", video=b"video")):
        with pytest.raises(BadSample, match="the model reads texts alone"):
            processor.encode(item)


@pytest.fixture
def processor(qwen) -> TwoTowerProcessor:
    return TwoTowerProcessor(PIXELS, 10, TextProcessor(qwen, 64).tokenized, video_frames=3)


def test_images_and_video_frames_have_a_fixed_token_count(processor):
    text = processor.encode(Item("a red star"))
    assert not text.images and len(text.input_ids) > 1
    one = processor.encode(Item("<image> what is asked of other models", (png(),)))
    (image,) = one.images
    assert image.tiles.shape == (1, 3, 24, 24) and image.tiles.dtype == np.uint8
    assert (image.tiles == np.array([200, 30, 30], np.uint8)[:, None, None]).all()
    assert len(one.input_ids) == 10
    two = processor.encode(Item("", (png(), png(24, 60))))
    assert len(two.input_ids) == 20 and [len(image.tiles) for image in two.images] == [2]
    (video,) = (data for name, data in clips.evaluation_files(0, 1).items() if name.endswith(".mp4"))
    frames = processor.encode(Item("", video=video))
    assert len(frames.input_ids) == 30 and frames.images[0].video and len(frames.images[0].tiles) == 3
    every = replace(processor, video_frames=8, video_fps=4).encode(Item("", video=video)).images[0].tiles
    assert len(every) == 4 and np.array_equal(every[0], frames.images[0].tiles[0])  # of 8 frames in a second
    assert np.ptp(frames.images[0].tiles.astype(int), axis=0).any()  # the frames differ
    for broken in (Item("", (b"no image",)), Item("", video=b"no video")):
        with pytest.raises(BadSample):
            processor.encode(broken)
    with pytest.raises(BadSample, match="a text beside an image: for this model they are two items"):
        processor.encode_parts("a red star", [lambda: Image.new("RGB", (24, 24))], None)


def test_text_without_stored_embedding_raises_bad_sample(processor):
    given = replace(processor, with_vectors=True)
    vector = np.arange(4, dtype=np.float32)
    item = given.encode(Item("a red star", vector=vector))
    assert np.array_equal(item.vector, vector) and len(item.input_ids) == 1 and not item.images
    assert given.encode(Item("<image>", (png(),))).images
    with pytest.raises(BadSample, match=r"its text has no vector in data\.text_embeddings"):
        given.encode(Item("a red star"))
    stand_in = given.encode(Item(""))  # a bad sample's replacement
    assert stand_in.vector is None and len(stand_in.input_ids) == 1
    assert processor.encode(Item("a red star", vector=vector)).vector is None
    # A text's vector differs in its last bits if computed with other texts, so the tokens identify the item.
    other = given.encode(Item(" a red star\n", vector=np.nextafter(vector, np.float32(9))))
    assert other.key == item.key != given.encode(Item("a red ring", vector=vector)).key


IMAGE = Item("<image>", (b"image",))


def drawn(pair: Pair) -> Counter:
    """Count the (query, target) texts over all possible draws of caption contrast."""
    sizes: list[int] = []

    def size(n: int) -> int:
        sizes.append(n)
        return 0

    pair.two_texts(size)
    pairs = [pair.two_texts(lambda n, number=number: number) for number in range(sizes[0] if sizes else 1)]
    assert all(not each.query.images and not each.alternatives for each in pairs)
    return Counter((each.query.text, each.target.text) for each in pairs)


def test_two_different_captions_are_drawn_uniformly():
    pair = Pair("0", "d", "t", IMAGE, Item("a"), alternatives=("b", "c", "d"))
    assert drawn(pair) == Counter((x, y) for x in "abcd" for y in "abcd" if x != y)
    again = replace(pair, alternatives=("b", "a", " ", "b", "", "a\n", "\t b"))
    assert drawn(again) == Counter([("a", "b"), ("b", "a")])
    clip = replace(pair, query=Item("<video>", video=b"video"), negatives=(Item("n"),))
    assert drawn(clip) == drawn(pair)
    assert clip.two_texts(lambda n: 0).negatives == ()
    for alternatives in ((), ("a",), (" ",)):
        with pytest.raises(BadSample, match="fewer than two different captions"):
            replace(pair, alternatives=alternatives).two_texts(lambda n: 0)
    with pytest.raises(BadSample, match="its target has an image"):
        Pair("0", "d", "t", IMAGE, IMAGE).two_texts(lambda n: 0)


def test_text_pair_keeps_its_query_with_each_target():
    pair = Pair("0", "d", "t", Item("q"), Item("a"), (Item("n"),), ("b",), vectors=np.eye(2, dtype=np.float32))
    assert drawn(replace(pair, vectors=None)) == Counter([("q", "a"), ("q", "b")])
    for number, text in enumerate("ab"):
        one = training("llm2clip").trained_on(pair, lambda n, number=number: number)
        assert one.target.text == text and np.array_equal(one.target.vector, np.eye(2)[number])
        assert one.target.content_hash == Item(text).content_hash and one.negatives == (Item("n"),)


def test_each_family_trains_on_its_own_items():
    pair = Pair("0", "d", "t", IMAGE, Item("a"), alternatives=("b",))
    assert training("text_encoder").trained_on(pair, lambda n: 0).query == Item("a")
    for kind in ("llm2clip", "clip", "llave"):
        assert training(kind).trained_on(pair, lambda n: 1) == Pair("0", "d", "t", IMAGE, Item("b"))
