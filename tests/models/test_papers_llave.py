"""Rows of MMEB give the token ids, lengths and embeddings of LLaVE's published code: tests/papers/llave."""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from pipeline.convert.mmeb import TRAIN
from pipeline.data.batch import Encoded
from pipeline.data.index import Index, load_sidecar, read_samples
from pipeline.data.mmeb import evaluation_rows
from pipeline.data.sample import Item, Pair
from pipeline.data.shards import parse_sample
from pipeline.models.chunks import Packed, pack
from pipeline.models.llave.model import FrozenTower, Llave, TowerlessLlave
from pipeline.models.llave.processor import SUFFIX, LlaveProcessor
from pipeline.models.llave.weights import convert_original

PAPER = Path(__file__).parents[1] / "papers/llave"
TEXTS = json.loads((PAPER / "texts.json").read_text())
ROWS, TRUNCATED = TEXTS["rows"], TEXTS["truncated"]
COLUMNS = ("qry", "qry_image_path", "pos_text", "pos_image_path", "neg_text", "neg_image_path")
SIDES = [(number, side) for number in range(len(ROWS)) for side in ("query", "target")]
TOLERANCE = 1e-5  # of a unit vector's components: float32 through a few layers, one newline changes them by 1e-2


@dataclass(frozen=True)
class Published:
    """The original checkpoint, converted; and the rows of texts.json as our converters and readers give them."""

    folder: str
    processor: LlaveProcessor
    model: Llave
    training: list[Pair]
    evaluation: list[dict[str, Item]]


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Published:
    folder = tmp_path_factory.mktemp("papers")
    convert_original(PAPER / "model", folder / "model")
    source = folder / "source/set"
    source.mkdir(parents=True)
    rows = [dict.fromkeys(COLUMNS, "") | row["row"] for row in (*ROWS, *TRUNCATED)]
    parquet.write_table(pa.Table.from_pylist(rows), source / "original-0.parquet")
    images = str(PAPER / "images")
    parser = argparse.ArgumentParser()
    TRAIN.add_arguments(parser)
    command = [str(source.parent), str(folder / "shards"), "--images", images, "--keep-empty", "--processes", "1"]
    TRAIN.run(parser.parse_args(command))
    index = Index.load(str(folder / "shards/set"))
    url = str(folder / "shards/set")
    pairs = [
        parse_sample(data) for shard in index.shards for data in read_samples(url, shard, load_sidecar(url, shard))
    ]
    processor = LlaveProcessor.load(str(folder / "model"), 4096)  # a trained LLaVE reads as its code does
    model = Llave.load(str(folder / "model"), torch.float32).eval()
    return Published(str(folder / "model"), processor, model, pairs, list(evaluated(folder / "eval")))


def evaluated(folder: Path) -> Iterator[dict[str, Item]]:
    """Yield the rows' items as evaluation reads them from MMEB's files."""
    names = {
        "qry": "qry_text",
        "qry_image_path": "qry_img_path",
        "pos_text": "tgt_text",
        "pos_image_path": "tgt_img_path",
    }
    rows = [{names[name]: value for name, value in row["row"].items()} for row in ROWS]
    rows = [row | {name: [row[name]] for name in ("tgt_text", "tgt_img_path")} for row in rows]
    folder.mkdir()
    parquet.write_table(pa.Table.from_pylist(rows), folder / "test.parquet")
    for query, (target,) in evaluation_rows(str(folder)):
        yield {side: item(*of) for side, of in (("query", query), ("target", target))}


def item(text: str, path: str) -> Item:
    return Item(text, ((PAPER / "images" / path).read_bytes(),) if path else ())


def ids_of(encoded: Encoded, processor: LlaveProcessor) -> list[int]:
    """Return the token ids with one -200 for each image, as the original has them."""
    ids = [-200 if token == processor.image_token_id else token for token in encoded.input_ids.tolist()]
    return [token for place, token in enumerate(ids) if token != -200 or ids[place - 1] != -200]


def embedding(model: torch.nn.Module, *encoded: Encoded) -> torch.Tensor:
    with torch.no_grad():
        return model(pack(encoded), True)


@pytest.mark.parametrize(("number", "side"), SIDES)
def test_row_gives_published_ids_and_embedding(published, number, side):
    theirs: dict[str, Any] = ROWS[number][side]
    encoded = published.processor.encode(getattr(published.training[number], side))
    assert ids_of(encoded, published.processor) == theirs.get("input_ids_seen", theirs["input_ids"])
    assert len(encoded.input_ids) == theirs["length"]
    assert len(encoded.images) == theirs["input_ids"].count(-200)
    ours = embedding(published.model, encoded)[0]
    assert (ours - torch.tensor(theirs["embedding"])).abs().max() < TOLERANCE


def test_training_and_evaluation_read_a_row_alike(published):
    encode = published.processor.encode
    for pair, row in zip(published.training, published.evaluation, strict=False):
        for side, evaluated in row.items():
            assert encode(getattr(pair, side)).key == encode(evaluated).key


def test_protocols_name_the_papers_evaluations_that_read_alike(published):
    def protocols(**options) -> tuple[str, ...]:
        return LlaveProcessor.load(published.folder, **{"max_tokens": 8192} | options).protocols

    assert protocols() == ("mmeb",)
    assert protocols(video_frames=32, video_fps=3.0) == ("mmeb", "video")
    assert protocols(video_frames=32, video_fps=3.0, max_tokens=4096) == ("mmeb",)
    assert protocols(marks="mended") == protocols(images="upright") == ()


def test_converter_keeps_texts_byte_for_byte(published):
    for pair, row in zip(published.training, (*ROWS, *TRUNCATED), strict=True):
        for text, name in ((pair.query.text, "qry"), (pair.target.text, "pos_text")):
            assert text == row["row"][name].replace("<|image_1|>", "<image>")


def test_mark_without_image_is_published_tile_of_zeros(published):
    """The 730 rows are those of the original; the frozen tower and the model's own give the same."""
    theirs = load_file(PAPER / "zero_tile.safetensors")["rows"]
    encoded = published.processor.encode(Item("<image>\nno image"))
    packed = pack([encoded])
    image = published.processor.encode(published.training[0].query)  # its tiles come first
    tower = FrozenTower.load(published.folder, torch.float32, torch.device("cpu"), tiles_at_once=2)
    towerless = TowerlessLlave.load(published.folder, torch.float32).eval()

    def rows(packed: Packed) -> torch.Tensor:
        features = tower.features(packed.tiles, packed.blank_tiles)
        with torch.no_grad():
            return towerless.image_tokens(packed, features)

    assert (rows(packed) - theirs).abs().max() < TOLERANCE * theirs.abs().max()
    both = pack([image, encoded])
    assert both.blank_tiles == [2]
    assert (rows(both)[-730:] - theirs).abs().max() < TOLERANCE * theirs.abs().max()
    alone, together = embedding(published.model, encoded)[0], embedding(published.model, image, encoded)[1]
    assert (alone - together).abs().max() < TOLERANCE
    black = published.processor.encode_parts("<image>\nno image", [lambda: Image.new("RGB", (384, 384))], None)
    assert black.key != encoded.key


@pytest.mark.parametrize(
    ("text", "turn"),
    [
        ("a QA_GT_caption_based_noisy b ", "a  b "),
        ("QA_GT_caption_based_noisy<image> b ", "<image>\n b"),  # a mark moves before the words are removed
        ("<image> QA_GT_caption_based_noisy ", "<image>  "),
    ],
)
def test_words_that_the_original_removes_are_removed(published, text, turn):
    """preprocess_multimodal of llava/train/train.py and of llava/eval/model_embed.py."""
    assert published.processor.encode(Item(text)).key == published.processor.encode(Item(turn)).key
    mending = LlaveProcessor.load(published.folder, 4096, marks="mended")
    assert mending.encode(Item(text)).key != mending.encode(Item(turn)).key


@pytest.mark.parametrize(
    ("width", "height", "length", "alike"),
    [(423, 94, 1334, (423, 93)), (94, 423, 1377, (93, 423)), (188, 423, 2025, (187, 423))],
)
def test_grid_whose_quotient_is_just_below_a_whole_number_loses_a_row_at_both_sides(
    published, width, height, length, alike
):
    """LLaVE's code does not round the quotient, which transformers does.

    length: by unpad_image of llava/model/llava_arch.py.  alike: a size whose grid has as many patches for both.
    """
    (encoded, other), mending = (
        [
            processor.encode_parts("<image>", [lambda size=size: Image.new("RGB", size, "teal")], None)
            for size in ((width, height), alike)
        ]
        for processor in (published.processor, LlaveProcessor.load(published.folder, 4096, marks="mended"))
    )
    packed = pack([encoded])
    assert len(encoded.input_ids) - len(published.processor.encode(Item("")).input_ids) == length
    assert len(mending[0].input_ids) > len(encoded.input_ids)
    features = torch.randn(len(packed.tiles), 729, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = published.model.image_tokens(packed, features)
        assert torch.equal(ours, published.model.image_tokens(pack([other]), features))
        assert torch.isfinite(embedding(published.model, encoded)).all()


@pytest.mark.parametrize("case", TRUNCATED, ids=lambda case: str(case["model_max_length"]))
def test_long_text_keeps_the_prompts_end_where_the_original_cuts_it(published, case):
    """A difference, also of `variant=paper`: the original cuts the end of the prompt, and may cut an image."""
    limit = case["model_max_length"]
    whole = published.processor.encode(item(case["row"]["qry"].replace("<|image_1|>", "<image>"), ""))
    processor = LlaveProcessor.load(published.folder, limit)
    cut = processor.encode(item(case["row"]["qry"].replace("<|image_1|>", "<image>"), "")).input_ids.tolist()
    end = processor.tokenizer(SUFFIX)["input_ids"]
    assert len(cut) == min(limit, len(whole.input_ids))
    assert cut[: -len(end)] == whole.input_ids[: len(cut) - len(end)].tolist()
    assert cut[-len(end) :] == end


@pytest.mark.parametrize(
    ("text", "images", "read"),
    [
        ("<image>\nFind a picture of a tower.\n", 0, "Find a picture of a tower.\n"),
        ("Which <image> is it?", 0, "Which is it?"),
        ("Represent it.\n", 1, "<image>\nRepresent it.\n"),
        ("", 1, "<image>\n"),
        ("", 0, ""),
    ],
)
def test_without_variant_marks_are_mended(published, text, images, read):
    mending = LlaveProcessor.load(published.folder, 4096, marks="mended")
    given = (PAPER / "images/image3.png").read_bytes()
    ours = mending.encode(Item(text, (given,) * images))
    assert ours.key == mending.encode_parts(read, [lambda: opened("image3.png")] * images, None).key


def opened(name: str) -> Image.Image:
    return Image.open(PAPER / "images" / name).convert("RGB")
