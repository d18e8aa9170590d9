"""Evaluate a model: `python -m pipeline.evaluate MODEL TASKS [key=value ...]`, on as many processes as started.

    python -m pipeline.evaluate runs/demo/export s3://bucket/eval
    torchrun --nproc-per-node 8 -m pipeline.evaluate runs/demo/export data/eval out=report.json

MODEL is a folder or hub name; TASKS a folder or s3:// prefix in MMEB's layout (tasks.json), or shards of pairs
(index.json), or several of these with commas between.
"""

import argparse
from pathlib import Path

import torch.distributed as dist

from pipeline.config import EvaluationRun, parse_options
from pipeline.data import objects
from pipeline.errors import PipelineError, command_line
from pipeline.evaluation.encode import embed_collection
from pipeline.evaluation.report import Report
from pipeline.evaluation.tasks import Collection
from pipeline.models.llave import DTYPES, Llave, Processor
from pipeline.training.distributed import end_distributed, start_distributed


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="options:\n" + EvaluationRun.describe(),
    )
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("tasks", metavar="TASKS")
    parser.add_argument("options", nargs="*", metavar="key=value", help="see below")
    arguments = parser.parse_args()
    options = parse_options(EvaluationRun, arguments.options)
    objects.configure(**options.store())
    before = Report.read(Path(options.against)) if options.against else None
    collection = Collection.load(arguments.tasks.split(","), *_part(options.part))
    names = [task.name for task in collection.tasks]
    if not names:
        print(f"part={options.part} has no dataset: there are fewer datasets than parts")
        return
    if options.example and options.example not in names:
        raise PipelineError(f"example={options.example} is not evaluated here; there are {', '.join(names)}")

    device = start_distributed(options.timeout_minutes)
    processor = Processor.load(arguments.model, options.max_tokens, options.video.frames)
    model = Llave.load(arguments.model, DTYPES[options.precision]).to(device)
    embeddings = embed_collection(model, processor.encode, collection, chunk_tokens=options.chunk_tokens, device=device)
    if dist.get_rank() == 0:
        report = Report.of(arguments.model, collection, embeddings)
        if options.out:
            report.write(Path(options.out))
        report.print(before)
        if options.example:
            report.print_example(options.example)
    end_distributed()


def _part(part: str | None) -> tuple[int, int]:
    number, count = map(int, (part or "0/1").split("/"))
    if number >= count:
        raise PipelineError(f"part={part}: parts of {count} are 0/{count} to {count - 1}/{count}")
    return number, count


if __name__ == "__main__":
    main()
