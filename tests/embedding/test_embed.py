import json
import os
import signal
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from closeness import assert_close_in_norm
from PIL import Image
from transformers import AutoTokenizer

from pipeline import embed
from pipeline.config import EvaluationRun
from pipeline.data.sample import Item, Pair
from pipeline.data.shards import write_shards
from pipeline.embed import Embedder, main
from pipeline.embedding import embedder as embedder_module
from pipeline.embedding import folder as folder_module
from pipeline.embedding.folder import EmbeddingFolder, Identity, best
from pipeline.errors import PipelineError
from pipeline.evaluation.encode import embed_collection
from pipeline.evaluation.encoders import load_encoder
from pipeline.evaluation.store import MemoryStore
from pipeline.evaluation.tasks import Collection, Ranking
from pipeline.models import loading
from pipeline.models.chunks import pack
from pipeline.models.compact import Form, packed, quantized, shortened
from pipeline.models.files import fingerprint
from pipeline.models.llave.folder import save_folder
from pipeline.models.llave.model import Llave
from pipeline.models.llave.processor import LlaveProcessor

ROOT = Path(__file__).parents[2]


def picture(width: int, height: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8))


@pytest.fixture(scope="module")
def media(tmp_path_factory) -> Path:
    """Create a.png, deep/b.jpg (actually a WebP) and a lossless clip.mkv with frames frame0.png to frame8.png."""
    folder = tmp_path_factory.mktemp("media")
    (folder / "deep").mkdir()
    picture(40, 30, 0).save(folder / "a.png")
    picture(30, 64, 1).save(folder / "deep/b.jpg", "WEBP", lossless=True)
    with av.open(str(folder / "clip.mkv"), "w", format="matroska") as file:
        stream = file.add_stream("ffv1", rate=5, width=32, height=48, pix_fmt="bgr0")
        for number in range(9):
            frame = picture(32, 48, 10 + number)
            frame.save(folder / f"frame{number}.png")
            file.mux(stream.encode(av.VideoFrame.from_image(frame)))
        file.mux(stream.encode())
    return folder


@pytest.fixture(scope="module")
def embedder(tiny_model) -> Embedder:
    return Embedder.load(tiny_model, device="cpu", max_tokens=256, video_frames=4, chunk_tokens=600)


@pytest.fixture(scope="module")
def by_hand(tiny_model):
    """Return a function that embeds one item alone with the model."""
    processor, model = LlaveProcessor.load(tiny_model, 256, video_frames=4), Llave.load(tiny_model, "auto").eval()

    @torch.no_grad()
    def embedding(item: Item) -> torch.Tensor:
        return model(pack([processor.encode(item)]), bool(item.images or item.video))[0]

    return embedding


def test_batched_embeddings_match_single_item_embeddings(embedder, by_hand, media, monkeypatch):
    monkeypatch.setattr(embedder_module, "_GROUP", 4)
    a, b, clip = (media / name for name in ("a.png", "deep/b.jpg", "clip.mkv"))
    image, other, video = (path.read_bytes() for path in (a, b, clip))
    given = "Represent the given"
    both = Item(f"<image>\n<video>\n{given} image and video.", (image,), video)
    cases = [
        ("a text that is the longest of all of them here", Item("a text that is the longest of all of them here")),
        (a, Item(f"<image>\n{given} image.", (image,))),
        ("star", Item("star")),
        (clip, Item(f"<video>\n{given} video.", video=video)),
        (b, Item(f"<image>\n{given} image.", (other,))),
        (Image.open(a), Item(f"<image>\n{given} image.", (image,))),
        (Image.open(a).convert("RGBA"), Item(f"<image>\n{given} image.", (image,))),
        ({"text": "star"}, Item("star")),
        ({"text": "What?", "images": [str(a)]}, Item("<image>\nWhat?", (image,))),
        ({"text": "Who? <image>", "images": [a]}, Item("Who? <image>", (image,))),
        ({"images": [b, Image.open(a)]}, Item(f"<image>\n<image>\n{given} images.", (other, image))),
        ({"text": "<image> or <image>", "images": (a, b)}, Item("<image> or <image>", (image, other))),
        ({"video": str(clip)}, Item(f"<video>\n{given} video.", video=video)),
        ({"text": "by <video>", "video": clip, "images": [a]}, Item("<image>\nby <video>", (image,), video)),
        ({"text": "  ", "video": clip, "images": [a]}, both),
    ]
    embeddings = embedder.embed(item for item, _ in cases)
    assert (embeddings.dtype, embeddings.device.type, embeddings.shape) == (torch.float32, "cpu", (len(cases), 48))
    expected = torch.stack([by_hand(item) for _, item in cases])
    assert_close_in_norm(embeddings, expected)
    assert len(set(map(tuple, expected.tolist()))) == 11  # all vectors differ, so that a wrong order is noticed


def test_frame_list_is_used_unsampled(embedder, media):
    frames = [Image.open(media / f"frame{number}.png") for number in range(9)]
    sampled = [frames[number] for number in (0, 2, 5, 8)]
    clip, same, all_of_them, one = embedder.embed(
        [{"video": media / "clip.mkv"}, {"video": sampled}, {"video": frames}, {"video": frames[:1]}]
    )
    assert_close_in_norm(clip, same)
    processor = embedder.processor
    whole = processor.encode_parts("<video>", [], lambda: frames).images[0].tiles
    assert len(whole) == 9
    assert (clip - all_of_them).abs().max() > 1e-4
    assert (clip - one).abs().max() > 1e-4


def test_frames_per_second_of_video_files(tiny_model, embedder, media):
    """The clip has 5 frames a second: at 3, every second one is read."""
    at_rate = Embedder.load(tiny_model, device="cpu", max_tokens=256, video_frames=6, video_fps=3)
    frames = [Image.open(media / f"frame{number}.png") for number in (0, 2, 4, 6, 8)]
    assert_close_in_norm(at_rate.embed([media / "clip.mkv"]), embedder.embed([{"video": frames}]))


def test_equal_items_of_a_group_are_embedded_once(embedder, media, monkeypatch):
    rows, original = [], embedder_module.embed_chunks
    monkeypatch.setattr(embedder_module, "embed_chunks", lambda *given: rows.append(given[2]) or original(*given))
    monkeypatch.setattr(embedder_module, "_GROUP", 8)
    a, frames = Image.open(media / "a.png"), [picture(8, 8, 0)]
    items = ["x", a, picture(40, 30, 5), {"video": frames}] * 2 + ["x", {"images": [a], "text": "x"}]
    embeddings = embedder.embed(items)
    assert rows == [4, 2]
    assert torch.equal(embeddings[:4], embeddings[4:8])
    assert (embeddings[1] - embeddings[2]).abs().max() > 1e-4
    assert_close_in_norm(embeddings[8], embeddings[0])


def test_stream_reads_only_one_group_ahead(embedder, monkeypatch):
    monkeypatch.setattr(embedder_module, "_GROUP", 3)
    taken = []
    stream = embedder.stream(taken.append(number) or f"text {number}" for number in range(100))
    assert [len(next(stream)), len(next(stream))] == [3, 3]
    assert len(taken) == 9
    stream.close()
    assert embedder.embed([]).shape == (0, 48)


def test_vectors_are_cut_on_request(embedder):
    whole = embedder.embed(["star", "ring"])
    cut = embedder.embed(["star", "ring"], dimensions=20)
    assert torch.equal(cut, shortened(whole, 20))
    assert torch.equal(embedder.embed(["star", "ring"], 48), whole)
    assert embedder.embed([], 20).shape == (0, 20)
    for size in (-1, 0, 49):
        with pytest.raises(PipelineError, match=f"dimensions={size} must be from 1 to 48, the size"):
            embedder.embed(["star"], size)
        with pytest.raises(PipelineError, match="must be from 1 to 48"):
            embedder.stream(["star"], size)  # before anything is read


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        ("an <image>", r"item 1: 1 <image> marks in the text, 0 images"),
        ({"text": "<image>", "images": ["a.png", "a.png"]}, r"item 1: 1 <image> marks in the text, 2 images"),
        ({"text": "<video> <video>", "video": "clip.mkv"}, r"item 1: 2 <video> marks in the text, 1 videos"),
        (Path("nowhere.png"), r"item 1: nowhere\.png: No such file"),
        (Path("notes.txt"), r"item 1: notes\.txt: no image or video in one of the formats PNG, .*mp4"),
        (Path("cut.png"), r"item 1: cut\.png: undecodable image"),
        ({"images": ["a.png", "notes.txt"]}, r"item 1: notes\.txt: undecodable image"),
        ({"video": "a.png"}, r"item 1: a\.png: not a video"),
        ({"images": "a.png"}, "item 1: its images must be a list of paths or pictures"),
        ({"images": [3]}, "item 1: its images must be a list of paths or pictures"),
        ({"images": {"a.png"}}, "item 1: its images must be a list"),
        ({"images": (name for name in ["a.png"])}, "item 1: its images must be a list"),
        ({"video": []}, "item 1: its video must be a path, or a list of frames"),
        ({"text": "<video> hi", "video": []}, "item 1: its video must be a path, or a list of frames"),
        ({"video": ["a.png"]}, "item 1: its video must be a path, or a list of frames"),
        ({"video": (picture(8, 8, 0) for _ in range(2))}, "item 1: its video must be a path, or a list of frames"),
        ({"text": 7}, "item 1: its text is a int, not a str"),
        ({"text": "a", "instruction": 7}, "item 1: its instruction is a int, not a str"),
        (
            {"text": "a", "instruction": "find"},
            "item 1: it has an instruction, for which the model's prompt has no turn",
        ),
        ({"text": b"bytes"}, "item 1: its text is a bytes, not a str"),
        ({"image": "a.png"}, "item 1 has 'image'; it can have text, images, video, instruction"),
        ({}, r"item 1 is empty"),
        (" \n", r"item 1 is empty"),
        (b"bytes", r"item 1 is a bytes"),
        (
            {"images": [picture(24, 24, 0)] * 24},
            r"item 1: \d+ tokens: its images or video do not fit in max_tokens=256",
        ),
    ],
)
def test_unusable_item_is_refused_by_number(embedder, media, tmp_path, monkeypatch, item, reason):
    for name in ("a.png", "clip.mkv"):
        (tmp_path / name).symlink_to(media / name)
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "cut.png").write_bytes((media / "a.png").read_bytes()[:300])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PipelineError, match=reason):
        embedder.embed(["fine", item])


def test_truncated_pil_image_is_refused_by_number(embedder, media, tmp_path):
    (tmp_path / "cut.png").write_bytes((media / "a.png").read_bytes()[:300])
    with pytest.raises(PipelineError, match="item 0: undecodable picture"):
        embedder.embed([Image.open(tmp_path / "cut.png")])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_embedding_error_names_item_and_model(tiny_model, tmp_path, monkeypatch, value):
    monkeypatch.setattr(loading, "refuse_not_finite", lambda *_: None)  # finite weights may also give such vectors
    model = Llave.load(tiny_model, torch.float32)
    token = AutoTokenizer.from_pretrained(tiny_model)("q", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        model.language_model.embed_tokens.weight[token] = value
    folder = tmp_path / "broken"
    save_folder(model, dict(model.named_parameters()), tiny_model, folder)
    broken = Embedder.load(folder, device="cpu")
    assert broken.embed(["a", "b", "a"]).shape == (3, 48)
    with pytest.raises(PipelineError, match=r"broken: the embedding of item 3 has length nan, not 1: check the model"):
        broken.embed(["a", "b", "a", "q"])
    collection = Collection()
    collection.tasks = [
        Ranking("QA", "vqa", True, np.array([collection.text("a")]), [np.array([collection.text("b q")])])
    ]
    encoder = load_encoder(str(folder), EvaluationRun(), torch.device("cpu"))
    with pytest.raises(PipelineError, match=r"broken: the embedding of b q has length nan, not 1"):
        embed_collection(encoder, collection, MemoryStore(2, 48))


def test_invalid_options_and_missing_models_are_refused(tiny_model, tmp_path):
    for options in ({"precision": "fp8"}, {"max_tokens": 63}, {"video_frames": 0}, {"video_fps": 0.0}):
        with pytest.raises(PipelineError, match=next(iter(options))):
            Embedder.load(tiny_model, **options)
    with pytest.raises(PipelineError, match="no model at"):
        Embedder.load(tmp_path / "nothing")


@pytest.fixture
def inputs(media, tmp_path) -> Path:
    (tmp_path / "texts.txt").write_bytes("\ufeffein roter Stern\r\n[red] étoile\u2028rouge\nblue ring".encode())
    return tmp_path


TEXTS = ["ein roter Stern", "[red] étoile\u2028rouge", "blue ring"]


def call(monkeypatch, *arguments: object) -> None:
    """Run main() with these arguments; a PipelineError is raised instead of printed."""
    monkeypatch.setattr(sys, "argv", ["embed", *map(str, arguments)])
    main.__wrapped__()


def ids(folder: Path, kind: str) -> list[str]:
    return (folder / f"{kind}.txt").read_bytes().decode().removesuffix("\n").split("\n")


def test_files_are_embedded_and_searched(tiny_model, inputs, media, tmp_path, monkeypatch, capsys, by_hand):
    out = tmp_path / "out"
    common = [tiny_model, "--out", out, "--video-frames", 4]
    call(monkeypatch, *common, "--texts", inputs / "texts.txt", "--images", media / "**/[ab].*")
    call(monkeypatch, *common, "--videos", media / "*.mkv")
    printed = capsys.readouterr().out
    assert printed == f"3 texts -> {out}/texts.npy\n2 images -> {out}/images.npy\n1 video -> {out}/videos.npy\n"
    files = {f"{kind}.{suffix}" for kind in ("texts", "images", "videos") for suffix in ("npy", "txt")}
    assert {path.name for path in out.iterdir()} == {"embeddings.json", *files}
    assert ids(out, "texts") == TEXTS
    assert ids(out, "images") == [str(media / "a.png"), str(media / "deep/b.jpg")]
    given = "Represent the given"
    expected = {
        "texts": [Item(text) for text in TEXTS],
        "images": [Item(f"<image>\n{given} image.", (Path(path).read_bytes(),)) for path in ids(out, "images")],
        "videos": [Item(f"<video>\n{given} video.", video=(media / "clip.mkv").read_bytes())],
    }
    for kind, items in expected.items():
        rows = np.load(out / f"{kind}.npy")
        assert rows.dtype == np.float32
        assert_close_in_norm(rows, torch.stack([by_hand(item) for item in items]))
    made = json.loads((out / "embeddings.json").read_text())
    assert (made["model"], made["dimension"]) == (tiny_model, 48)

    capsys.readouterr()
    monkeypatch.setattr(embed, "_rows", None)  # embedding again would fail
    call(monkeypatch, *common, "--query", TEXTS[1], "--top", 2)
    printed = capsys.readouterr().out
    first = printed[printed.index("texts most similar") :].split("\n")[4]
    assert first.replace("│", " ").split()[:4] == ["1", "1.000", "[red]", "étoile\\u2028rouge"]
    assert [f"{kind} most similar to [red] étoile" in printed for kind in expected] == [True] * 3
    assert printed.count(" 2 ") == 2  # two of three texts and of two images; there is only one video
    call(monkeypatch, *common, "--query-image", media / "deep/b.jpg")
    printed = capsys.readouterr().out
    line = next(line for line in printed.split("\n") if "b.jpg" in line and "1.000" in line)
    assert line.replace("│", " ").split() == ["1", "1.000", str(media / "deep/b.jpg")]


@pytest.mark.parametrize("vectors", ["float32", "int8", "binary"])
def test_small_vectors_are_stored_and_searched(tiny_model, inputs, tmp_path, monkeypatch, capsys, embedder, vectors):
    out = tmp_path / "out"
    form = ["--dimensions", 20, "--vectors", vectors]
    call(monkeypatch, tiny_model, "--out", out, "--texts", inputs / "texts.txt", *form)
    cut, query = embedder.embed(TEXTS, 20), embedder.embed(["a query"], 20)[0]
    rows, kept = np.load(out / "texts.npy"), cut if vectors == "float32" else quantized(cut, vectors)
    np.testing.assert_array_equal(rows, cut if vectors == "float32" else packed(cut, vectors))
    made = json.loads((out / "embeddings.json").read_text())
    assert (made["dimension"], made["vectors"]) == (20, vectors)

    for options in (form, []):  # without options, a search is as the folder
        capsys.readouterr()
        call(monkeypatch, tiny_model, "--out", out, "--query", "a query", *options)
        lines = [line.replace("│", " ").split() for line in capsys.readouterr().out.split("\n") if "│" in line]
        similarities = [float(line[1]) for line in lines]
        assert similarities == pytest.approx(sorted((kept @ query).tolist(), reverse=True), abs=6e-4)
    with pytest.raises(
        PipelineError, match=f"has texts of 20 {vectors} numbers, not 48 {vectors}: give --dimensions 20 "
    ):
        call(monkeypatch, tiny_model, "--out", out, "--query", "x", "--dimensions", 48)


def test_shards_can_be_embedded_by_any_model(tmp_path, monkeypatch):
    """The function that opens it reaches the encoders; they have tests of their own."""
    write_shards([Pair("0", "d", "", Item("q"), Item("t"))], tmp_path / "shards", dataset="d")
    given = []
    monkeypatch.setattr("pipeline.embedding.embed_shards.embed_shards", lambda *each, **_: given.append(each))
    monkeypatch.setattr("pipeline.distributed.end_distributed", lambda: None)
    shards = ["any/model", "--shards", tmp_path / "shards", "--encoder", f"{tmp_path}/texts.py:Texts"]
    call(monkeypatch, *shards, "--items")
    ((model, _, _, options),) = given
    assert (model, options.encoder) == ("any/model", f"{tmp_path}/texts.py:Texts")
    with pytest.raises(PipelineError, match=r"encoder=.*texts\.py:Texts: there is no file"):
        load_encoder(model, options)


def test_embeddings_of_another_form_are_refused(tmp_path, monkeypatch):
    """All embeddings in a folder can be compared with one query."""
    store, rows = EmbeddingFolder(tmp_path), [torch.eye(4)[:2]]
    small, whole = Identity("m", 4, "f", "int8"), Identity("m", 4, "f")
    store.write("texts", ["a", "b"], rows, small)
    with pytest.raises(
        PipelineError, match="has texts of 4 int8 numbers, not 4 float32: give --dimensions 4 --vectors"
    ):
        store.check(whole, ["images"], overwrite=True)
    store.check(small, ["images"], overwrite=False)
    store.check(whole, ["texts"], overwrite=True)
    store.write("images", ["c", "d"], rows, small)
    assert store.kinds() == ["texts", "images"]
    store.write("texts", ["a", "b"], rows, whole)
    assert store.kinds() == ["texts"]
    np.testing.assert_array_equal(store.read("texts")[1], rows[0])
    about = tmp_path / "embeddings.json"
    about.write_text(json.dumps(vars(small)))
    with pytest.raises(PipelineError, match=r"texts\.npy does not hold 4 int8 numbers, as embeddings\.json says: "):
        store.read("texts")
    about.write_text('{"model": "m", "dimension": 4, "fingerprint": "f"}')  # of a version without types
    assert store.form() == Form(4)
    assert store.read("texts")[1].dtype == np.float32


def test_search_among_small_vectors_equals_that_among_restored_ones(monkeypatch):
    monkeypatch.setattr(folder_module, "_BLOCK", 7)
    vectors = torch.nn.functional.normalize(torch.from_numpy(np.random.default_rng(0).normal(size=(40, 21))), dim=1)
    query = vectors[0].float().numpy()
    for kind in ("int8", "binary"):
        found = best(packed(vectors, kind), query, 5, Form(21, kind))
        similarities = quantized(vectors, kind).double().numpy() @ query
        assert [row for row, _ in found] == np.argsort(-similarities)[:5].tolist()
        assert [similarity for _, similarity in found] == pytest.approx(np.sort(similarities)[:-6:-1], abs=1e-6)


def test_unmatched_pattern_is_refused_before_folder_creation(tiny_model, tmp_path, monkeypatch):
    with pytest.raises(PipelineError, match=r"^--images '.*\*\.png' matches no file$"):
        call(monkeypatch, tiny_model, "--images", tmp_path / "*.png", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folder_and_patterns_of_files_are_united(tmp_path):
    names = ("a b.jpg", "c.JPG", "d.webp", "deep/e.png", "f.txt", "g.mp4", ".h.jpg", "i", "[j]/k.jpeg")
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    expected = [str(tmp_path / names[number]) for number in (8, 0, 1, 2, 3)]
    assert embed._files("images", str(tmp_path)) == embed._files("images", f"{tmp_path}/") == expected
    assert embed._files("images", str(tmp_path / "[j]")) == expected[:1]
    assert embed._files("videos", str(tmp_path)) == [str(tmp_path / "g.mp4")]
    assert embed._files("images", f"{tmp_path}/*.*") == [
        *expected[1:4],
        str(tmp_path / "f.txt"),
        str(tmp_path / "g.mp4"),
    ]


def test_repeated_options_add_up(tiny_model, inputs, media, tmp_path, monkeypatch):
    (tmp_path / "more").write_text("another\n")
    texts = ["--texts", inputs / "texts.txt", "--texts", tmp_path / "more"]
    images = ["--images", media / "deep", "--images", media / "a.png", "--images", media / "deep/b.jpg"]
    call(monkeypatch, tiny_model, *texts, *images, "--out", tmp_path / "out")
    assert ids(tmp_path / "out", "texts") == [*TEXTS, "another"]
    assert ids(tmp_path / "out", "images") == [str(media / "deep/b.jpg"), str(media / "a.png")]


@pytest.mark.slow
def test_embeddings_of_another_model_are_refused(tiny_model, inputs, media, tmp_path, monkeypatch, capsys):
    out, moved = tmp_path / "out", tmp_path / "moved"
    texts = ["--texts", inputs / "texts.txt"]
    images = ["--images", media / "a.png"]
    model = Llave.load(tiny_model, torch.float32)
    save_folder(model, dict(model.named_parameters()), tiny_model, moved)
    call(monkeypatch, moved, *texts, *images, "--out", out)
    before = fingerprint(moved)
    moved.rename(moved := tmp_path / "elsewhere")
    assert fingerprint(moved) == before
    call(monkeypatch, moved, "--out", out, "--query", "star")  # models are identified by content

    with torch.no_grad():  # a model that was trained a little further, in some parts only
        model.multi_modal_projector.linear_1.weight.mul_(1.001)
    save_folder(model, dict(model.named_parameters()), tiny_model, moved)
    assert fingerprint(moved) != before
    named = f"{out} has texts, images of {tmp_path}/moved, not of {moved}: embed them again"
    with pytest.raises(PipelineError, match=named):
        call(monkeypatch, moved, "--out", out, "--query", "star")
    with pytest.raises(PipelineError, match="has images of"):
        call(monkeypatch, moved, *texts, "--out", out, "--overwrite")
    call(monkeypatch, moved, *texts, *images, "--out", out, "--overwrite")
    call(monkeypatch, moved, "--out", out, "--query", "star")
    (out / "embeddings.json").write_text("{}")
    with pytest.raises(PipelineError, match=r"embeddings\.json does not name the model of texts, images"):
        call(monkeypatch, moved, "--out", out, "--query", "star")
    call(monkeypatch, moved, *texts, *images, "--out", out, "--overwrite")


def test_embeddings_are_overwritten_only_on_request(tiny_model, inputs, tmp_path, monkeypatch):
    out, texts = tmp_path / "out", inputs / "texts.txt"
    arguments = [tiny_model, "--texts", texts, "--out", out]
    call(monkeypatch, *arguments)
    before = (out / "texts.npy").read_bytes()
    texts.write_text("another\n")
    with pytest.raises(PipelineError, match=r"texts\.npy: already exists; add --overwrite"):
        call(monkeypatch, *arguments)
    assert (out / "texts.npy").read_bytes() == before
    call(monkeypatch, *arguments, "--overwrite")
    assert (ids(out, "texts"), np.load(out / "texts.npy").shape) == (["another"], (1, 48))


def test_failure_keeps_completed_embeddings(tiny_model, inputs, media, tmp_path, monkeypatch):
    monkeypatch.setattr(embedder_module, "_GROUP", 1)
    out, many = tmp_path / "out", tmp_path / "many"
    many.mkdir()
    for name in "abcd":
        (many / f"{name}.png").write_bytes((media / "a.png").read_bytes())
    (many / "c.png").write_text("broken")
    with pytest.raises(PipelineError, match=r"c\.png: undecodable image: .*: replace the file, or leave it out$"):
        call(monkeypatch, tiny_model, "--texts", inputs / "texts.txt", "--images", many / "*.png", "--out", out)
    assert sorted(path.name for path in out.iterdir()) == ["embeddings.json", "texts.npy", "texts.txt"]
    assert len(np.load(out / "texts.npy")) == 3


@pytest.mark.parametrize("same_model", [True, False])
def test_killed_write_leaves_rows_and_ids_consistent(tmp_path, monkeypatch, same_model):
    old, new = (Identity(name, 2, name) for name in ("old", "old" if same_model else "new"))
    for moment in range(8):
        store = EmbeddingFolder(tmp_path / str(moment))
        for kind in ("texts", "images"):
            store.write(kind, ["was"], [torch.zeros(1, 2)], old)
        if (process := os.fork()) == 0:
            _write_and_die(store, new, moment)
        assert os.waitpid(process, 0)[1] == signal.SIGKILL
        for kind in store.kinds():
            names, rows = store.read(kind)
            made = json.loads((store.folder / "embeddings.json").read_text())["fingerprint"]
            assert (names, rows.tolist(), made) in (
                (["was"], [[0, 0]], "old"),
                (["is", "too"], [[1, 1], [2, 2]], new.fingerprint),
            )
        if same_model or moment < 2:
            assert "images" in store.kinds()


def _write_and_die(store: EmbeddingFolder, identity: Identity, moment: int) -> None:
    """Overwrite the folder in this process, which is killed before the n-th change to the folder."""
    left = iter(range(moment))

    def dying(change):
        def either(*arguments, **options):
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return change(*arguments, **options)

        return either

    for name in ("replace", "unlink", "write_bytes"):
        setattr(Path, name, dying(getattr(Path, name)))
    store.write("texts", ["is", "too"], iter([torch.ones(1, 2), torch.full((1, 2), 2.0)]), identity)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"a\n\nb\n", "line 2 is empty"),
        (b"a\nb\n\n", "line 3 is empty"),
        (b"", "line 1 is empty"),
        (b"a\nb\xff\n", "is not UTF-8: byte 4"),
        (b"a\nan <image>\n", "line 2 has <image>"),
    ],
)
def test_invalid_text_file_is_refused(tmp_path, monkeypatch, content, reason):
    (tmp_path / "texts").write_bytes(content)
    with pytest.raises(PipelineError, match=reason):
        call(monkeypatch, "no-model", "--texts", tmp_path / "texts", "--out", tmp_path / "out")


def test_invalid_arguments_are_refused_before_model_load(tiny_model, inputs, media, tmp_path, monkeypatch):
    texts, out = ["--texts", inputs / "texts.txt"], ["--out", tmp_path / "out"]
    monkeypatch.setattr(Embedder, "load", None)
    for arguments, reason in (
        ([tiny_model], "nothing to do"),
        ([tiny_model, *texts, *out, "--items"], "--items embeds all items of a dataset: name it with --shards"),
        ([tiny_model, *texts], "--out is missing: the folder for the embeddings"),
        ([tiny_model, "--query", "x"], "--out is missing: the folder to search"),
        ([tiny_model, *out, "--query", "x"], "has no embeddings to search"),
        ([tiny_model, *out, "--query-image", "nowhere.png"], "there is no file nowhere.png"),
        ([tiny_model, *out, "--images", inputs], "is a folder without files that end with gif, jpeg, jpg, png, webp"),
        ([tiny_model, *out, "--texts", tmp_path / "nowhere"], "nowhere: No such file"),
        ([tmp_path / "nothing", *texts, *out, "--video-fps", 0.5], "no model at"),
        ([tmp_path, *texts, *out], "it has no config.json"),
        ([tiny_model, *texts, *out, "--dimensions", 49], "dimensions=49 must be from 1 to 48, the size of the model"),
        ([tiny_model, *texts, *out, "--encoder", "a.py:A"], "--encoder embeds the captions or items of a dataset"),
        (["m", "--shards", "there", "--published", "--encoder", "a.py:A"], "--encoder cannot be combined with --publ"),
        (["m", "--shards", "there", "--vectors", "int8"], "--shards cannot be combined with --vectors"),
    ):
        with pytest.raises(PipelineError, match=reason):
            call(monkeypatch, *arguments)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(PipelineError, match="one process"):
        call(monkeypatch, tiny_model, *texts, *out)
    assert not (tmp_path / "out").exists()


def test_damaged_embedding_files_are_refused(tmp_path):
    store = EmbeddingFolder(tmp_path)
    store.write("texts", ["a", "b"], [torch.ones(2, 3)], Identity("m", 3, "f"))
    (tmp_path / "texts.txt").write_text("a\n")
    with pytest.raises(PipelineError, match=r"must have a row for each line of texts\.txt"):
        store.read("texts")
    (tmp_path / "texts.npy").write_bytes((tmp_path / "texts.npy").read_bytes()[:-4])
    with pytest.raises(PipelineError, match=r"texts\.npy cannot be read"):
        store.read("texts")
