"""Items of text models and of two-tower models; and the texts of a sample that a step uses."""

import io
from collections import Counter
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from transformers import LlamaTokenizer, PreTrainedTokenizerBase, Qwen2Tokenizer

from pipeline.config import load_recipe
from pipeline.data.dataset import Dataset
from pipeline.data.order import Order
from pipeline.data.sample import BadSample, Item, Pair
from pipeline.demo import clips
from pipeline.errors import PipelineError
from pipeline.models.registry import training
from pipeline.models.text_encoder.processor import TextProcessor
from pipeline.models.two_tower import TwoTowerProcessor
from pipeline.models.vision import Pixels, RandomCrops

TEXT_ENCODER = "model.text_encoder=/tmp/none"
CORPUS = ["a small red star at the top left", "a large blue ring", "find the same:"]
RECIPE = load_recipe("demo_caption.yaml")
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
    return TwoTowerProcessor(PIXELS, 10, TextProcessor(qwen, 64), video_frames=3)


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


def noise(width: int, height: int, seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    drawn = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(drawn).save(buffer, "PNG")
    return buffer.getvalue()


def test_random_crops_depend_only_on_step_and_image(processor):
    recipe = load_recipe("pipeline/recipes/demo_llm2clip.yaml", ["model.crop_scale=[0.5, 0.9]", TEXT_ENCODER])
    order = Order((Dataset("a", np.array([9])),), 1, 1, 1, 1, seed=0)

    def tiles(step: int, item: Item) -> np.ndarray:
        draws = partial(order.draw_of_step, step)
        return training("llm2clip").augmented(recipe, processor, draws).encode(item).images[0].tiles

    one, other = noise(40, 24), noise(40, 24, 1)
    first = tiles(3, Item("<image>", (one,)))
    assert np.array_equal(first, tiles(3, Item("<image> another text", (one,))))
    assert np.array_equal(first[0], tiles(3, Item("", (other, one)))[1])  # wherever the image is
    assert not np.array_equal(first, tiles(4, Item("<image>", (one,))))
    plain = processor.encode(Item("<image>", (one,)))
    assert not np.array_equal(first, plain.images[0].tiles)  # as in evaluation
    (box,) = RandomCrops((0.5, 0.9), partial(order.draw_of_step, 3)).boxes(Item("", (one,)), [decoded(one)])
    assert np.array_equal(first[0], np.asarray(decoded(one).crop(box).resize((24, 24), 3)).transpose(2, 0, 1))
    (video,) = (data for name, data in clips.evaluation_files(0, 1).items() if name.endswith(".mp4"))
    shown = [decoded(one)] * 3
    boxes = RandomCrops((0.5, 0.9), partial(order.draw_of_step, 3)).boxes(Item("", video=video), shown)
    assert len(boxes) == 3 and len(set(boxes)) == 1
    assert len(tiles(3, Item("", video=video))) == 3


def test_without_crop_scale_steps_use_the_processor_of_evaluation(processor):
    recipe = load_recipe("pipeline/recipes/demo_llm2clip.yaml", [TEXT_ENCODER])
    assert training("llm2clip").augmented(recipe, processor, lambda *_: np.zeros(0)) is processor
    assert training("clip").augmented(recipe, processor, lambda *_: np.zeros(0)) is processor


@pytest.mark.parametrize("scale", ["[0.9, 0.8]", "[0, 1]", "[0.5, 1.1]"])
def test_impossible_crop_scale_is_refused(scale):
    with pytest.raises(PipelineError, match=r"model\.crop_scale"):
        load_recipe("pipeline/recipes/demo_llm2clip.yaml", [f"model.crop_scale={scale}", TEXT_ENCODER])


def decoded(image: bytes) -> Image.Image:
    return Image.open(io.BytesIO(image))


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
        one = training("llm2clip").trained_on(RECIPE, pair, lambda n, number=number: number)
        assert one.target.text == text and np.array_equal(one.target.vector, np.eye(2)[number])
        assert one.target.content_hash == Item(text).content_hash and one.negatives == (Item("n"),)


def test_each_family_trains_on_its_own_items():
    pair = Pair("0", "d", "t", IMAGE, Item("a"), alternatives=("b",))
    assert training("text_encoder").trained_on(RECIPE, pair, lambda n: 0).query == Item("a")
    for kind in ("llm2clip", "clip", "llave"):
        assert training(kind).trained_on(RECIPE, pair, lambda n: 1) == Pair("0", "d", "t", IMAGE, Item("b"))


def test_queries_alone_get_the_instruction_of_their_dataset():
    given = "{d: 'Find: ', one: ['A: ', 'B: '], two: {longer: 'Shorten: ', shorter: 'Lengthen: '}, plain: ''}"
    recipe = load_recipe("demo_caption.yaml", [f"model.query_instructions={given}"])
    family = training("text_encoder")

    def instructions(dataset: str, *texts: str, number: int = 0) -> tuple[str, str]:
        query, target, *rest = texts
        pair = Pair("0", dataset, "t", Item(query), Item(target), tuple(map(Item, rest)))
        pair = family.trained_on(recipe, pair, lambda n: number % n)
        assert tuple(item.text for item in pair.items) == texts
        assert not any(item.instruction for item in pair.negatives)
        return pair.query.instruction, pair.target.instruction

    assert instructions("d", "a star", "a ring", "no") == ("Find: ", "")
    assert instructions("plain", "a star", "a ring") == instructions("unlisted", "a star", "a ring") == ("", "")
    assert instructions("two", "a large star", "a ring") == ("Shorten: ", "")
    assert instructions("two", "a ring", "a large star") == ("Lengthen: ", "")
    assert instructions("two", "a ring", "a star") == ("Lengthen: ", "")
    # A list's instruction is drawn independently of the target's text, which the lowest bits decide.
    drawn = Counter(instructions("one", "a", "b", number=(high << 32) + low)[0] for high in (0, 1) for low in (0, 1))
    assert drawn == {"A: ": 2, "B: ": 2}
    image = Pair("0", "two", "t", IMAGE, Item("a large star"), alternatives=("a ring",))
    found = [family.trained_on(recipe, image, lambda n, number=number: number) for number in (0, 1)]
    assert {(pair.query.text, pair.query.instruction) for pair in found} == {
        ("a large star", "Shorten: "),
        ("a ring", "Lengthen: "),
    }


def test_instruction_of_an_item_replaces_the_processors(llama):
    processor = TextProcessor(llama, 64, "find the same:")
    one, other = processor.encode(Item("a red star", instruction="a large")), processor.encode(Item("a red star"))
    assert np.array_equal(one.input_ids, TextProcessor(llama, 64, "a large").encode(Item("a red star")).input_ids)
    assert one.key != other.key and other.skipped == len(processor.before("find the same:"))
    # Equal content hashes would give both items one embedding.
    assert Item("a", instruction="b").content_hash != Item("a").content_hash


def test_each_dataset_needs_an_entry_in_query_instructions():
    source = SimpleNamespace(names=("images", "texts", "sentences"), embedding_metadata=None, shards=[])
    family = training("text_encoder")
    family.check_data(RECIPE, source)
    given = "model.query_instructions={images: 'Find: ', unused: 'Find: '}"
    with pytest.raises(PipelineError, match=r"model\.query_instructions has none for texts, sentences: add one"):
        family.check_data(load_recipe("demo_caption.yaml", [given]), source)
    given = given.replace("unused: 'Find: '", "texts: '', sentences: ''")
    family.check_data(load_recipe("demo_caption.yaml", [given]), source)
