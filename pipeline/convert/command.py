"""How a subcommand of tools/make_shards.py is made, and the arguments that several of them share."""

import argparse
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.convert.engine import refuse_occupied
from pipeline.convert.rows import ImageFolder, Rows, folder
from pipeline.convert.sharding import convert

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
    """

    def add_all(parser: argparse.ArgumentParser) -> None:
        add_arguments(parser)
        add_dest(parser)
        parser.add_argument("--shard-mb", type=positive, default=256, metavar="N", help="MiB a shard, about (256)")
        parser.add_argument("--shards", type=positive, metavar="N", help="N shards of as many rows each, instead")
        add_work(parser)
        parser.add_argument(
            "--tmp", type=Path, metavar="FOLDER", help="where shards wait for their upload (the system's)"
        )

    def run(arguments: argparse.Namespace) -> None:
        refuse_occupied(arguments.dest)  # before a large source is looked through
        convert(
            datasets(arguments),
            options=_options(arguments),
            shard_bytes=arguments.shard_mb << 20,
            shards=arguments.shards,
            processes=arguments.processes,
            max_rejected=arguments.max_rejected,
            tmp=arguments.tmp,
            files=files(arguments),
        )

    return Command(description, add_all, run)


def add_dest(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dest", metavar="DEST", help="a folder or s3://bucket/prefix")


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
        help="stop when more than this fraction of a dataset's rows is rejected (0.01)",
    )


def add_images(parser: argparse.ArgumentParser, default: str) -> None:
    """--images and how images are scaled down. default: says where they are looked for without --images."""
    parser.add_argument("--images", type=Path, metavar="FOLDER", help=f"folder of the images ({default})")
    parser.add_argument(
        "--image-max-side",
        type=positive,
        metavar="N",
        help="scale images with a longer side than N pixels down to that, as JPEG (all stay as they are)",
    )
    parser.add_argument("--image-quality", type=positive, default=90, metavar="Q", help="of these JPEGs (90)")


def image_folder(arguments: argparse.Namespace, place: Path) -> ImageFolder:
    """The images in `place`, scaled as the arguments of `add_images` say."""
    return ImageFolder(folder(place), arguments.image_max_side, arguments.image_quality)


def _options(arguments: argparse.Namespace) -> dict[str, object]:
    """The format's own arguments, which decide what is written, as JSON holds them."""
    chosen = {name: value for name, value in vars(arguments).items() if name not in _NO_OPTIONS}
    return {name: str(value.resolve()) if isinstance(value, Path) else value for name, value in chosen.items()}


def positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def fraction(text: str) -> float:
    if not 0 <= (value := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value
