"""Convert a dataset to WebDataset shards with an index, in a folder or on S3; check and show such datasets.

    python tools/make_shards.py FORMAT SOURCE DEST [options]
    python tools/make_shards.py verify|show|stats DEST [options]
    python tools/make_shards.py COMMAND --help

From an installed package the command is pipeline-make-shards. The help of a format shows the layout of its source, an
example and the options.

A conversion can be stopped at any time. The same command continues it and writes the same bytes as an uninterrupted
conversion, with any number of processes. DEST/rejected.jsonl lists each row that could not become a sample, with the
cause. A conversion with more of them than --max-rejected allows ends with an error.
"""

import argparse
import os
import signal
import sys

from pipeline.convert import captions, demo, img2dataset, inspect, jsonl, mmeb
from pipeline.errors import PipelineError
from pipeline.jobs.program import command_line

CONVERSIONS = {
    "jsonl": jsonl.COMMAND,
    "mmeb-train": mmeb.TRAIN,
    "coco-captions": captions.IMAGES,
    "demo": demo.COMMAND,
    "img2dataset": img2dataset.COMMAND,
    "mmeb-eval": mmeb.EVAL,
    "video-captions": captions.VIDEOS,
}
INSPECTIONS = {"verify": inspect.VERIFY, "show": inspect.SHOW, "stats": inspect.STATS}
COMMANDS = CONVERSIONS | INSPECTIONS


@command_line
def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(metavar="COMMAND", dest="command", required=True)
    for name, command in COMMANDS.items():
        line, _, _ = command.description.partition("\n")
        added = commands.add_parser(name, help=line, description=command.description, formatter_class=raw)
        command.add_arguments(added)
        added.set_defaults(run=command.run)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        arguments.run(arguments)
    except KeyboardInterrupt:
        continues = "" if arguments.command in INSPECTIONS else ": the same command continues from here"
        print(f"\ninterrupted{continues}", file=sys.stderr, flush=True)
        os._exit(130)  # do not wait for uploads that are under way: the next start repeats them
    except OSError as error:
        raise PipelineError(f"{error.filename or 'writing'}: {error.strerror or error}") from error


if __name__ == "__main__":
    main()
