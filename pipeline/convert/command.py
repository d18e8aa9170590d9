"""The subcommands of tools/make_shards.py, and the arguments that several of them share."""

import argparse
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pipeline.convert.engine import refuse_occupied
from pipeline.convert.sharding import ImageFolder, Rows, convert, folder
from pipeline.data.sample import IMAGE_MARK, VIDEO_MARK
from pipeline.errors import PipelineError

IMAGE_QUERY = f"{IMAGE_MARK}\nFind an image caption describing the given everyday image."  # from MMEB
# Arguments of a conversion that do not affect the output, or that `convert` gets separately.
_NO_OPTIONS = ("run", "dest", "processes", "max_rejected", "shard_mb", "shards")


@dataclass(frozen=True)
class Command:
    """A subcommand. description: its --help; the first line is also shown in the list of all commands."""

    description: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]


def conversion(
    description: str,
    add_arguments: Callable[[argparse.ArgumentParser], None],
    datasets: Callable[[argparse.Namespace], Mapping[str, Rows]],
    files: Callable[[argparse.Namespace], Iterable[tuple[str, bytes]]] = lambda arguments: (),
) -> Command:
    """Return the command of a format: its own arguments, then DEST and the options of every conversion.

    datasets: URL of each dataset's folder -> its rows. files: (URL, content) of files outside of the datasets.
    If SOURCE is a Path, it must be local, and must not be DEST.
    """

    def add_all(parser: argparse.ArgumentParser) -> None:
        add_arguments(parser)
        add_dest(parser)
        cut = parser.add_mutually_exclusive_group()
        cut.add_argument(
            "--shard-mb", type=in_range(1), default=256, metavar="N", help="approximate MiB per shard (default 256)"
        )
        cut.add_argument(
            "--shards", type=in_range(1), metavar="N", help="write N shards with equal numbers of rows instead"
        )
        add_work(parser)

    def run(arguments: argparse.Namespace) -> None:
        source = arguments.source
        if isinstance(source, Path):
            if source.parts[:1] == ("s3:",):
                raise PipelineError(f"SOURCE s3://{'/'.join(source.parts[1:])} must be a local file or folder")
            if source.resolve() == Path(arguments.dest).resolve():
                raise PipelineError(f"DEST {arguments.dest} is SOURCE: choose another DEST")
        refuse_occupied(arguments.dest)  # before a large source is read
        convert(
            datasets(arguments),
            options=_options(arguments) | {"content": _content(arguments)},
            shard_bytes=arguments.shard_mb << 20,
            shards=arguments.shards,
            processes=arguments.processes,
            max_rejected=arguments.max_rejected,
            files=files(arguments),
        )

    return Command(description, add_all, run)


def check_query(query: str, mark: str) -> None:
    """Raise PipelineError unless --query has one `mark` (an image or video mark) and no other."""
    if [query.count(each) for each in (IMAGE_MARK, VIDEO_MARK)] != [mark == IMAGE_MARK, mark == VIDEO_MARK]:
        raise PipelineError(f"--query {query!r} must have one {mark}, and no other mark")


def add_dest(parser: argparse.ArgumentParser) -> None:
    where = "a folder or s3://bucket/prefix (shards are in TMPDIR before their upload)"
    parser.add_argument("dest", metavar="DEST", type=filled, help=where)


def add_processes(parser: argparse.ArgumentParser) -> None:
    cpus = len(os.sched_getaffinity(0))
    parser.add_argument(
        "--processes",
        type=in_range(1),
        default=cpus,
        metavar="N",
        help=f"worker processes (default {cpus}, one per CPU)",
    )


def add_work(parser: argparse.ArgumentParser) -> None:
    """Add --processes and --max-rejected."""
    add_processes(parser)
    parser.add_argument(
        "--max-rejected",
        type=in_range(0, 1, float),
        default=0.01,
        metavar="X",
        help="fail if more than this fraction of a dataset's rows is rejected (default 0.01)",
    )


def add_names(parser: argparse.ArgumentParser, query: str, default: str) -> None:
    """Add --query and --dataset. default: describes the default name."""
    parser.add_argument("--query", default=query, metavar="TEXT", help=f"query of all pairs (default {query!r})")
    parser.add_argument("--dataset", metavar="NAME", help=f"name of the dataset (default: {default})")


def add_images(parser: argparse.ArgumentParser, default: str) -> None:
    """Add --images and the options to scale images down. default: describes the default folder."""
    parser.add_argument(
        "--images", type=local_path, metavar="FOLDER", help=f"folder of the images (default: {default})"
    )
    parser.add_argument(
        "--image-max-side",
        type=in_range(1),
        metavar="N",
        help="scale images with a longer side than N pixels down to N, as JPEG, upright and with 8 bits per channel, "
        "regardless of model.images later (default: keep all images unchanged)",
    )
    parser.add_argument(
        "--image-quality", type=in_range(1, 95), metavar="Q", help="quality of these JPEGs, 1 to 95 (default 90)"
    )


def image_folder(arguments: argparse.Namespace, place: Path) -> ImageFolder:
    """Return the images in `place`, scaled according to the arguments of `add_images`."""
    if arguments.image_quality and not arguments.image_max_side:
        raise PipelineError("--image-quality only applies with --image-max-side: give both, or neither")
    return ImageFolder(folder(place), arguments.image_max_side, arguments.image_quality or 90)


def _options(arguments: argparse.Namespace) -> dict[str, object]:
    """Return the format's own arguments, which affect the output, as JSON values."""
    chosen = {name: value for name, value in vars(arguments).items() if name not in _NO_OPTIONS}
    return {name: str(value.resolve()) if isinstance(value, Path) else value for name, value in chosen.items()}


def _content(arguments: argparse.Namespace) -> dict[str, str]:
    """Identify the content of the source's files, to detect changes during an unfinished conversion.

    Returns hashes of the files that the arguments name, and size and modification time of the source's parquet files.
    """
    content = {}
    for path in (value for value in vars(arguments).values() if isinstance(value, Path) and value.is_file()):
        with path.open("rb") as file:
            content[str(path.resolve())] = hashlib.file_digest(file, "sha256").hexdigest()
    if isinstance(arguments.source, Path):
        for path in sorted(arguments.source.resolve().glob("*/*.parquet")):
            content[str(path)] = f"{path.stat().st_size} bytes, {path.stat().st_mtime_ns} ns"
    return content


def filled(text: str) -> str:
    if not text:  # for example, an unset variable of a script
        raise argparse.ArgumentTypeError("it is empty")
    return text


def local_path(text: str) -> Path:
    return Path(filled(text))


def in_range(least: int, most: int = 10**9, kind: type[int] | type[float] = int) -> Callable[[str], float]:
    """Return the `type` of an argument that is a number in a range."""
    a = "a whole" if kind is int else "a"

    def parse(text: str) -> float:
        with suppress(ValueError):
            if least <= (value := kind(text)) <= most:
                return value
        raise argparse.ArgumentTypeError(f"{text} is not {a} number between {least} and {most}")

    return parse
