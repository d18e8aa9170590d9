"""How a subcommand of tools/make_shards.py is made, and the arguments that several of them share."""

import argparse
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pipeline.convert.engine import refuse_occupied
from pipeline.convert.rows import ImageFolder, Rows, folder
from pipeline.convert.sharding import convert
from pipeline.errors import PipelineError

# Of a conversion's arguments, those that do not decide what is written, or reach `convert` by themselves.
_NO_OPTIONS = ("run", "dest", "processes", "max_rejected", "tmp", "shard_mb", "shards")


@dataclass(frozen=True)
class Command:
    """One subcommand. description: its --help; the first line by itself stands in the list of all commands."""

    description: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]


def conversion(
    description: str,
    add_arguments: Callable[[argparse.ArgumentParser], None],
    datasets: Callable[[argparse.Namespace], Mapping[str, Rows]],
    files: Callable[[argparse.Namespace], Iterable[tuple[str, bytes]]] = lambda arguments: (),
) -> Command:
    """The command of a format: DEST and the options of every conversion follow the arguments of its own.

    datasets: URL of each dataset's folder -> its rows. files: (URL, content) of what belongs to no dataset.
    SOURCE, where the format has it as a Path, must be a local one, and not DEST.
    """

    def add_all(parser: argparse.ArgumentParser) -> None:
        add_arguments(parser)
        add_dest(parser)
        cut = parser.add_mutually_exclusive_group()
        cut.add_argument("--shard-mb", type=positive, default=256, metavar="N", help="MiB a shard, about (default 256)")
        cut.add_argument("--shards", type=positive, metavar="N", help="N shards of as many rows each, instead")
        add_work(parser)
        parser.add_argument(
            "--tmp",
            type=local_path,
            metavar="FOLDER",
            help="where shards wait for their upload (default: the system's)",
        )

    def run(arguments: argparse.Namespace) -> None:
        if isinstance(arguments.source, Path):
            _check_place(arguments.source, arguments.dest)
        refuse_occupied(arguments.dest)  # before a large source is looked through
        convert(
            datasets(arguments),
            options=_options(arguments) | {"content": _content(arguments)},
            shard_bytes=arguments.shard_mb << 20,
            shards=arguments.shards,
            processes=arguments.processes,
            max_rejected=arguments.max_rejected,
            tmp=arguments.tmp,
            files=files(arguments),
        )

    return Command(description, add_all, run)


def add_dest(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dest", metavar="DEST", type=filled, help="a folder or s3://bucket/prefix")


def add_processes(parser: argparse.ArgumentParser) -> None:
    cpus = len(os.sched_getaffinity(0))
    parser.add_argument("--processes", type=positive, default=cpus, metavar="N", help=f"here {cpus}, one a CPU")


def add_work(parser: argparse.ArgumentParser) -> None:
    """--processes and --max-rejected."""
    add_processes(parser)
    parser.add_argument(
        "--max-rejected",
        type=fraction,
        default=0.01,
        metavar="X",
        help="stop when more than this fraction of a dataset's rows is rejected (default 0.01)",
    )


def add_images(parser: argparse.ArgumentParser, default: str) -> None:
    """--images and how images are scaled down. default: says where they are looked for without --images."""
    parser.add_argument(
        "--images", type=local_path, metavar="FOLDER", help=f"folder of the images (default: {default})"
    )
    parser.add_argument(
        "--image-max-side",
        type=positive,
        metavar="N",
        help="scale images with a longer side than N pixels down to that, as JPEG, "
        "upright and with 8 bits a channel, whatever model.images says later (default: all stay as they are)",
    )
    parser.add_argument("--image-quality", type=_quality, metavar="Q", help="of these JPEGs, 1 to 95 (default 90)")


def image_folder(arguments: argparse.Namespace, place: Path) -> ImageFolder:
    """The images in `place`, scaled as the arguments of `add_images` say."""
    if arguments.image_quality and not arguments.image_max_side:
        raise PipelineError("--image-quality is of images that --image-max-side scales down: give that too, or neither")
    return ImageFolder(folder(place), arguments.image_max_side, arguments.image_quality or 90)


def _options(arguments: argparse.Namespace) -> dict[str, object]:
    """The format's own arguments, which decide what is written, as JSON holds them."""
    chosen = {name: value for name, value in vars(arguments).items() if name not in _NO_OPTIONS}
    return {name: str(value.resolve()) if isinstance(value, Path) else value for name, value in chosen.items()}


def _content(arguments: argparse.Namespace) -> dict[str, str]:
    """What the files that describe the rows hold, so that none of them changes under an unfinished conversion.

    Digests of the files that the arguments name; of the parquet files in a source's folders, size and time.
    """
    content = {}
    for path in (value for value in vars(arguments).values() if isinstance(value, Path) and value.is_file()):
        with path.open("rb") as file:
            content[str(path.resolve())] = hashlib.file_digest(file, "sha256").hexdigest()
    if isinstance(arguments.source, Path):
        for path in sorted(arguments.source.resolve().glob("*/*.parquet")):
            content[str(path)] = f"{path.stat().st_size} bytes, {path.stat().st_mtime_ns} ns"
    return content


def _check_place(source: Path, dest: str) -> None:
    if source.parts[:1] == ("s3:",):
        raise PipelineError(f"SOURCE {source.parts[0]}//{'/'.join(source.parts[1:])} must be a local file or folder")
    if source.resolve() == Path(dest).resolve():
        raise PipelineError(f"DEST {dest} is SOURCE: choose another DEST")


def filled(text: str) -> str:
    if not text:  # as when a variable of a script was not set
        raise argparse.ArgumentTypeError("it is empty")
    return text


def local_path(text: str) -> Path:
    return Path(filled(text))


def _quality(text: str) -> int:
    if (value := positive(text)) > 95:  # more only makes files larger, says Pillow
        raise argparse.ArgumentTypeError(f"{value} is not between 1 and 95")
    return value


def positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def fraction(text: str) -> float:
    with suppress(ValueError):
        if 0 <= (value := float(text)) <= 1:
            return value
    raise argparse.ArgumentTypeError(f"{text} is no number between 0 and 1")
