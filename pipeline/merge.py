"""Merge trained models into one by a weighted mean of their weights: `python -m pipeline.merge OUT MODEL[:WEIGHT] ...`

    python -m pipeline.merge soup runs/seed1 runs/seed2 runs/seed3
    python -m pipeline.merge half-way llave-7b:0.7 models/llave-7b-before:0.3
    python -m pipeline.merge arc llave-7b-step400 llave-7b-step800 --method slerp

A MODEL is the folder of an export or of a model from elsewhere, a hub name, or a run directory, which stands for its
RUN/export. Export other checkpoints first, with pipeline.export. WEIGHT, the number after the last colon, is 1 by
default; the weights are divided by their sum. The models must be of one architecture, and have the same tokenizer,
prompts, pooling and image settings: an error names what differs. Merge only models that were trained from the
same weights.

OUT is a folder like that of the first MODEL, with a card that lists the parts. Evaluate it as any model: a merged model
is not always better than its parts. It runs in one process on the CPU. It needs less than 1 GB of memory, whatever the
models' size.
"""

import argparse
import re
from pathlib import Path

from pipeline.errors import PipelineError
from pipeline.jobs.program import command_line
from pipeline.models.loading import DTYPES
from pipeline.models.merging import Part, merge


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", metavar="OUT", help="the folder to write")
    parser.add_argument("parts", metavar="MODEL[:WEIGHT]", type=_part, nargs="+", help="two or more models to merge")
    parser.add_argument(
        "--method",
        choices=("mean", "slerp"),
        default="mean",
        help="the weighted mean, in float64 and rounded once; or, of exactly two models, the arc between each two "
        "tensors (slerp): two tensors of equal norm keep it (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="of the written weights; auto: that of the first MODEL"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a model in OUT, once the new one is complete")
    arguments = parser.parse_args()
    if "://" in arguments.out:
        raise PipelineError(f"{arguments.out} is a URL: name a local folder")
    parts, out = arguments.parts, Path(arguments.out)
    count = merge(parts, out, arguments.method, arguments.dtype, overwrite=arguments.overwrite)
    print(f"{out}: {arguments.method} of {len(parts)} models, {count / 1e9:.3g} B weights")


def _part(text: str) -> Part:
    """Return a model and its weight."""
    if found := re.fullmatch(r"(.+):([-+]?[\d.]+(?:[eE][-+]?\d+)?)", text):
        try:
            return Part(found[1], float(found[2]))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} does not end in a number: write MODEL:0.5") from None
    if not text:
        raise argparse.ArgumentTypeError("a MODEL is empty")
    return Part(text)


if __name__ == "__main__":
    main()
