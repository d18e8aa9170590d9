"""Embed texts, images and videos and search among them; or embed the captions or items of datasets for training.

    python -m pipeline.embed MODEL --texts captions.txt --images photos --out embeddings
    python -m pipeline.embed MODEL --out embeddings --query "a red star" --top 5
    python -m pipeline.embed MODEL --out embeddings --query-image star.png
    python -m pipeline.embed MODEL --videos 'clips/*.mp4' --query "a red star moves to the left"
    torchrun --nproc-per-node 8 -m pipeline.embed MODEL --shards s3://bucket/cc3m --out s3://bucket/cc3m-vectors
    torchrun --nproc-per-node 8 -m pipeline.embed MODEL --shards s3://bucket/mmeb --items

MODEL is a folder or hub name. --out gets texts.npy, images.npy and videos.npy: float32 (N, D) with unit rows. Beside
each is a .txt file with one id on each line: the text, or the file's path. The similarity of two rows is their dot
product. A search covers the items of the same call or, without any, all in --out. --query and --query-image together
are one query.

--dimensions N cuts the vectors to their first N numbers, normalised again; use it for models that were trained for it.
A row whose first numbers are all zeros stays zeros. --vectors int8 stores a byte for each number, and binary a bit: its
sign. int8 rows are (N, D) without a scale: normalise them. Binary rows are (N, ceil(D/8)) bytes of numpy.packbits,
where 1 stands for +1 and 0 for -1. All embeddings in --out have the same size and type. A query is cut, too, but its
numbers stay float32: only what is stored is rounded.

--shards is a dataset, or a folder with several. Their captions' embeddings are written as tars beside each dataset's
index, or to --out (to --out/NAME for several datasets). A recipe reads them with data.text_embeddings. With --items,
all items are embedded instead: queries, targets, positives and negatives, with their images; a recipe reads these with
data.teacher. MODEL may then be any model, with --encoder: see pipeline/evaluation/encoders.py. It runs on any number of
processes. If it is killed and started again, it continues.

In Python:

    from pathlib import Path
    from pipeline import Embedder
    embeddings = Embedder.load("runs/demo/export").embed(["a red star", Path("star.png"), {"video": "star.mp4"}])
"""

import argparse
import glob
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from math import inf
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import get_args

import torch
import transformers
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.config import Encoding, EvaluatedVideo
from pipeline.data.sample import IMAGE_MARK, PICTURE_ENDINGS, VIDEO_MARK, VIDEO_SUFFIXES
from pipeline.embedding.embedder import LEAST_TOKENS, Embedder, Parts, family_for
from pipeline.embedding.folder import KINDS, EmbeddingFolder, Identity, best
from pipeline.errors import PipelineError, printable
from pipeline.jobs.program import command_line
from pipeline.models.compact import Form, VectorKind, check_size
from pipeline.models.files import fetched, fingerprint
from pipeline.models.loading import DTYPES
from pipeline.progress import progress_bar
from pipeline.storage import lock
from pipeline.storage.documents import utf8_text

__all__ = ["Embedder", "main"]


@command_line
def main() -> None:
    arguments = _arguments()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and (arguments.published or not arguments.shards):
        raise PipelineError(
            "pipeline.embed runs as one process, unless --shards is given without --published: start it without a "
            "launcher"
        )
    if arguments.shards:
        _embed_shards(arguments)
        return
    if arguments.items:
        raise PipelineError("--items embeds all items of a dataset: name it with --shards")
    if arguments.encoder:
        raise PipelineError("--encoder embeds the captions or items of a dataset: name it with --shards")
    kinds = {}
    for kind in KINDS:
        if given := getattr(arguments, kind):
            found = (_lines(Path(each)) if kind == "texts" else _files(kind, each) for each in given)
            ids = [each for part in found for each in part]
            kinds[kind] = ids if kind == "texts" else list(dict.fromkeys(ids))  # two patterns may match one file
    query: Parts = {}
    if arguments.query is not None:
        query["text"] = arguments.query
    if arguments.query_image is not None:
        if not Path(arguments.query_image).is_file():
            raise PipelineError(f"--query-image: there is no file {arguments.query_image}")
        query["images"] = [arguments.query_image]
    if not kinds and not query:
        raise PipelineError("nothing to do: give --texts, --images, --videos or --shards, or --query to search")
    if not arguments.out and not (kinds and query):
        raise PipelineError(f"--out is missing: the folder {'to search' if query else 'for the embeddings'}")
    if "://" in (arguments.out or ""):
        raise PipelineError(f"--out {arguments.out} is a URL: give a local folder; only with --shards it may be on S3")
    family, folder = family_for(arguments.model), fetched(arguments.model)
    dimension = family.dimension(str(folder))
    check_size(arguments.dimensions or dimension, dimension)
    with ExitStack() as stack:
        out = EmbeddingFolder(Path(arguments.out or stack.enter_context(TemporaryDirectory())))
        if query and not kinds and not out.kinds():
            raise PipelineError(f"{out.folder} has no embeddings to search: give the --out of an earlier call")
        if kinds:
            stack.enter_context(lock.held([str(out.folder)]))
        form = Form(dimension) if kinds else out.form() or Form(dimension)
        size, vectors = arguments.dimensions or form.dimensions, arguments.vectors or form.kind
        hashed = fingerprint(str(folder), modules=True) or ""
        identity = Identity(arguments.model, size, hashed, vectors)
        out.check(identity, kinds, arguments.overwrite)
        transformers.logging.disable_progress_bar()
        embedder = Embedder.load(
            arguments.model,
            precision=arguments.precision,
            max_tokens=arguments.max_tokens,
            video_frames=arguments.video_frames,
            chunk_tokens=arguments.chunk_tokens,
            video_fps=arguments.video_fps,
        )
        for kind, ids in kinds.items():
            try:
                out.write(kind, ids, _rows(embedder, kind, ids, size), identity)
            except OSError as error:
                raise PipelineError(f"{error.filename or out.folder}: {error.strerror or error}") from None
            if arguments.out:
                print(printable(f"{len(ids):,} {kind if len(ids) > 1 else kind[:-1]} -> {out.folder / kind}.npy"))
        if query:
            vector = embedder.embed([query], size)[0].numpy()
            title = " with ".join(filter(None, (arguments.query_image, arguments.query)))
            for kind in kinds or out.kinds():
                ids, rows = out.read(kind)
                _print(f"{kind} most similar to {title}", ids, best(rows, vector, arguments.top, identity.form))


def _embed_shards(arguments: argparse.Namespace) -> None:
    # Imported only here: the rest of this program works without DeepSpeed.
    from pipeline.data.stored_vectors import CAPTIONS, ITEMS
    from pipeline.distributed import end_distributed
    from pipeline.embedding.dataset import open_datasets
    from pipeline.embedding.embed_shards import embed_shards
    from pipeline.embedding.published import index_published

    for name in ("texts", "images", "videos", "query", "query_image", "dimensions", "vectors"):
        if getattr(arguments, name) is not None:
            raise PipelineError(f"--shards cannot be combined with --{name.replace('_', '-')}: use two calls")
    if arguments.items and arguments.published:
        raise PipelineError("--items cannot be combined with --published, whose vectors are those of captions")
    if arguments.encoder and arguments.published:
        raise PipelineError("--encoder cannot be combined with --published, whose vectors are there already")
    datasets = open_datasets(arguments.shards, arguments.out, ITEMS if arguments.items else CAPTIONS)
    if arguments.published:
        with lock.held(dataset.place for dataset in datasets):
            index_published(arguments.model, datasets, overwrite=arguments.overwrite)
        return
    options = Encoding(
        encoder=arguments.encoder,
        precision=arguments.precision,
        max_tokens=arguments.max_tokens,
        chunk_tokens=arguments.chunk_tokens,
        video=EvaluatedVideo(frames=arguments.video_frames, fps=arguments.video_fps),
    )
    embed_shards(arguments.model, datasets, arguments.stored, options, overwrite=arguments.overwrite)
    end_distributed()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument(
        "--texts", metavar="FILE", action="append", help="UTF-8 with a text on each line, none empty; repeatable"
    )
    images = "a folder, with the folders in it; or a glob in quotes, where ** matches nested folders; repeatable"
    parser.add_argument("--images", metavar="FOLDER|GLOB", action="append", help=images)
    parser.add_argument("--videos", metavar="FOLDER|GLOB", action="append", help="video files, likewise")
    shards = "a dataset of images and captions, or with --items of any pairs; may be repeated"
    parser.add_argument("--shards", metavar="URL", action="append", help=shards)
    items = "with --shards: embed all items, of any pairs, as a teacher's vectors; default: only the captions"
    parser.add_argument("--items", action="store_true", help=items)
    encoder = "with --shards: FILE.py:FUNCTION or MODULE:FUNCTION that opens MODEL; see pipeline/evaluation/encoders.py"
    parser.add_argument("--encoder", metavar="FUNCTION", help=encoder)
    parser.add_argument("--out", metavar="DIR", help="the folder for embeddings, or the one to search")
    parser.add_argument("--overwrite", action="store_true", help="replace embeddings of the same kinds or shards")
    size = "store only the first N numbers of each vector, normalised again (default: all; of a search: as stored)"
    parser.add_argument("--dimensions", type=_at_least(1), metavar="N", help=size)
    types = "type of the stored numbers (default: float32; of a search: as stored)"
    parser.add_argument("--vectors", choices=get_args(VectorKind), help=types)
    parser.add_argument(
        "--stored",
        choices=("fp16", "bf16"),
        default="fp16",  # unit vectors do not need bf16's range
        help="number format for --shards; fp16 is more precise for unit vectors (default: %(default)s)",
    )
    published = "index the vectors that LLM2CLIP's own code wrote beside --shards; MODEL is the name of their model"
    parser.add_argument("--published", action="store_true", help=published)
    parser.add_argument("--query", metavar="TEXT", help="print the items most similar to a text")
    parser.add_argument("--query-image", metavar="PATH", help="print the items most similar to an image")
    parser.add_argument("--top", type=_at_least(1), default=10, metavar="N", help="matches to print (%(default)s)")
    parser.add_argument(
        "--precision",
        choices=DTYPES,
        default="auto",
        help="precision of the weights; auto: as stored (default: %(default)s)",
    )
    tokens = "maximum for an item; longer texts are cut (%(default)s)"
    parser.add_argument("--max-tokens", type=_at_least(LEAST_TOKENS), default=4096, metavar="N", help=tokens)
    frames = "frames of a video, evenly spaced (%(default)s)"
    parser.add_argument("--video-frames", type=_at_least(1), default=8, metavar="N", help=frames)
    rate = "frames per second of a video instead, at most --video-frames"
    parser.add_argument("--video-fps", type=_rate, metavar="F", help=rate)
    chunk = "tokens in a forward pass; lower it if memory is exhausted (16384, or 4096 if attention pads)"
    parser.add_argument("--chunk-tokens", type=_at_least(1), metavar="N", help=chunk)
    arguments = parser.parse_args()
    for name, value in vars(arguments).items():
        if value == "" or (isinstance(value, list) and "" in value):  # for example from an unset shell variable
            parser.error(f"{name} is empty")
    return arguments


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"{value} is less than {least}")
        return value

    return number


def _rate(text: str) -> float:
    if not 0 < (value := float(text)) < inf:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def _lines(path: Path) -> list[str]:
    try:
        lines = utf8_text(path.read_bytes()).removesuffix("\n").split("\n")
    except OSError as error:
        raise PipelineError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise PipelineError(f"{path} {error}") from None
    texts = [line.removesuffix("\r") for line in lines]
    for number, text in enumerate(texts, 1):
        if not text.strip():
            raise PipelineError(f"{path}, line {number} is empty: remove it")
        for mark in (IMAGE_MARK, VIDEO_MARK):
            if mark in text:
                raise PipelineError(f"{path}, line {number} has {mark}, which marks the place of a file: remove it")
    return texts


def _files(kind: str, given: str) -> list[str]:
    """Return the files that a glob matches; of a folder the pictures, or videos, known by their endings in any case."""
    is_folder = Path(given).is_dir()
    found = glob.glob(f"{glob.escape(str(Path(given)))}/**/*" if is_folder else given, recursive=True)  # noqa: PTH207 (Path.glob takes no absolute pattern)
    endings = PICTURE_ENDINGS if kind == "images" else VIDEO_SUFFIXES
    files = sorted(path for path in found if Path(path).is_file() and (not is_folder or _ending(path) in endings))
    if not files and is_folder:
        raise PipelineError(f"--{kind} {given!r} is a folder without files that end with {', '.join(sorted(endings))}")
    if not files:
        raise PipelineError(f"--{kind} {given!r} matches no file")
    if broken := next((path for path in files if "\n" in path), None):
        raise PipelineError(f"{broken!r} has a line end in its name, which the list of ids cannot contain: rename it")
    return files


def _ending(path: str) -> str:
    return Path(path).suffix[1:].lower()


def _rows(embedder: Embedder, kind: str, ids: Sequence[str], size: int) -> Iterator[torch.Tensor]:
    wrap = {"texts": lambda text: text, "images": lambda path: {"images": [path]}, "videos": lambda p: {"video": p}}
    with progress_bar(total=len(ids), desc=f"embedding {kind}", unit=kind.removesuffix("s")) as bar:
        for part in embedder.stream(map(wrap[kind], ids), size):
            yield part
            bar.update(len(part))


def _print(title: str, ids: Sequence[str], matches: Sequence[tuple[int, float]]) -> None:
    table = Table(title=Text(printable(title)), title_justify="left", title_style="bold")
    table.add_column("rank", justify="right")
    table.add_column("similarity", justify="right")
    table.add_column("id", overflow="fold")
    for rank, (row, similarity) in enumerate(matches, 1):
        table.add_row(str(rank), f"{similarity:.3f}", Text(printable(ids[row])))  # Text: brackets are no markup
    width = max([120, *(len(ids[row]) + 40 for row, _ in matches)])  # a log file has no width
    console = Console() if sys.stdout.isatty() else Console(width=width)
    console.print(table)


if __name__ == "__main__":
    main()
