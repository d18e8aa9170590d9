"""Convert a dataset to WebDataset shards with an index, in a folder or on S3; inspect such datasets.

    python tools/make_shards.py FORMAT SOURCE DEST [options]
    python tools/make_shards.py verify|show|stats DEST [options]
    python tools/make_shards.py COMMAND --help

The help of a format describes the layout of its source, the options, and an example.

A conversion can be stopped at any time. The same command continues it, and gives the same bytes as an uninterrupted
one, on any number of processes. Rows that cannot become samples are listed with the cause in DEST/rejected.jsonl. A
conversion with too many of them (--max-rejected) ends with an error.
"""

import argparse
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.convert import coco, demo, img2dataset, inspect, jsonl, mmeb, mmeb_eval, video_captions
from pipeline.errors import PipelineError, command_line

CONVERSIONS = {
    "jsonl": jsonl.COMMAND,
    "mmeb-train": mmeb.COMMAND,
    "coco-captions": coco.COMMAND,
    "demo": demo.COMMAND,
    "img2dataset": img2dataset.COMMAND,
    "mmeb-eval": mmeb_eval.COMMAND,
    "video-captions": video_captions.COMMAND,
}
INSPECTIONS = {"verify": inspect.VERIFY, "show": inspect.SHOW, "stats": inspect.STATS}
COMMANDS = CONVERSIONS | INSPECTIONS


@command_line
def main() -> None:
    raw = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(description=__doc__, **raw)
    commands = parser.add_subparsers(metavar="COMMAND", dest="command", required=True)
    for name, command in COMMANDS.items():
        line, _, _ = command.description.partition("\n")
        added = commands.add_parser(name, help=line, description=command.description, **raw)
        command.add_arguments(added)
        added.set_defaults(run=command.run)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        arguments.run(arguments)
    except KeyboardInterrupt:
        hint = "" if arguments.command in INSPECTIONS else ": the same command continues from here"
        print(f"\ninterrupted{hint}", file=sys.stderr, flush=True)
        os._exit(130)  # without waiting for uploads, which would be repeated anyway
    except OSError as error:
        raise PipelineError(f"{error.filename or 'writing'}: {error.strerror or error}") from error


if __name__ == "__main__":
    main()
