"""Evaluate a model: `python -m pipeline.evaluate MODEL SETS [key=value ...]`, on all processes of the launcher.

    python -m pipeline.evaluate runs/llave_7b/export mmeb=s3://bucket/mmeb-eval
    torchrun --nproc-per-node 8 -m pipeline.evaluate llave-7b mmeb/vqa=MMEB-eval,msrvtt=/data/MSRVTT out=results/7b
    python -m pipeline.evaluate openai/clip-vit-large-patch14 coco=/data/coco out=results/clip against=results/7b

MODEL is a folder or hub name: a model of this project, transformers' CLIP or SigLIP, or any other with encoder=.
SETS is a comma-separated list of NAME=URL. The URL is a folder or an s3:// prefix. NAME is one of

    mmeb, mmeb/ind, mmeb/ood, mmeb/vqa, ..., mmeb/OK-VQA, ...   MMEB, as on the hub or converted (make_shards.py)
    msrvtt, msvd                                                text-video retrieval, zero-shot
    flickr30k, coco, urban1k, docci, sharegpt4v                 text-image retrieval, short and long texts
    xm3600, flickr-cn, coco-cn                                  in other languages
    text-video, text-image                                      your own captions.json (pipeline/evaluation/sets)
    classification                                              folders of images, class names and templates

A set may also be only a URL: of sets in MMEB's layout with their tasks.json, or of shards of pairs (index.json).

The folder out= (evaluation/MODEL) gets report.html, report.json, figures/ and, for MMEB, leaderboard.json. If the
program is killed and started again, it continues from the embeddings there.

dimensions=[64,256] and vectors=[int8,binary] score smaller vectors, too: cut to these sizes, with candidates rounded to
these types. Queries are cut, and stay float32. No item is embedded again for this.

projector=20 writes 20 queries of each dataset (of captions: in each direction), with one right answer to each, for
TensorBoard's embedding projector: start `tensorboard --logdir OUT/tensorboard`. After a complete evaluation, this
embeds nothing again.
"""

import argparse
import re
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from pipeline.config import EvaluationRun, parse_options
from pipeline.distributed import end_distributed, on_first_rank, start_distributed
from pipeline.errors import PipelineError
from pipeline.evaluation import sets
from pipeline.evaluation.encode import embed_collection
from pipeline.evaluation.encoders import load_encoder
from pipeline.evaluation.html import write_report
from pipeline.evaluation.measure import measure
from pipeline.evaluation.projector import write_projector
from pipeline.evaluation.report import Report
from pipeline.evaluation.store import DiskStore, held
from pipeline.evaluation.terminal import print_report
from pipeline.jobs.program import command_line
from pipeline.models.compact import smaller_forms
from pipeline.storage import lock, objects

_WORST = 20  # queries of each dataset that the report shows


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="key=value options:\n" + EvaluationRun.describe(),
    )
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("tasks", metavar="SETS")
    parser.add_argument("options", nargs="*", metavar="key=value", help="see below")
    arguments = parser.parse_args()
    options = parse_options(EvaluationRun, arguments.options)
    objects.configure(**options.store())
    before = Report.read(Path(options.against)) if options.against else None
    number, count = map(int, (options.part or "0/1").split("/"))
    if number >= count:
        raise PipelineError(f"part={options.part}: the parts are 0/{count} to {count - 1}/{count}")
    device = start_distributed(options.timeout_minutes)
    encoder = load_encoder(arguments.model, options, device)
    forms = smaller_forms(encoder.dimension, options.dimensions, options.vectors)
    wanted = arguments.tasks.split(",")
    apart = options.instructions == "system"
    if apart and not getattr(encoder, "system_turn", False):
        raise PipelineError(f"instructions=system: the prompt of {arguments.model} has no system's turn: leave it out")
    collection = sets.load(wanted, instructed=encoder.instructed, apart=apart, number=number, count=count)
    out = Path(options.out or Path("evaluation", _plain(arguments.model)))
    folder = out / "embeddings" / _plain(encoder.identity)

    def report() -> None:
        assert store  # the first rank has one
        result = measure(arguments.model, collection, store.take, worst=_WORST, forms=forms, device=device)
        result = replace(result, protocols=getattr(encoder, "protocols", ()))
        write_report(result, out, before)
        print_report(result, before)
        print(f"the report: {out}/report.html")
        if options.projector:
            write_projector(out / "tensorboard", _plain(arguments.model), collection, store.take, options.projector)
            print(f"the embedding projector: tensorboard --logdir {out}/tensorboard")

    with ExitStack() as stack:

        def begin() -> None:
            """Lock only what this job writes: the jobs of an array share OUT, but have different datasets."""
            stack.enter_context(held(folder, {task.name for task in collection.tasks}))
            if not options.part:
                stack.enter_context(lock.held([str(out)]))

        on_first_rank(begin, "the lock of the output folder")
        store = DiskStore(folder, collection.keys, encoder.dimension) if dist.get_rank() == 0 else None
        embed_collection(encoder, collection, store)
        if not options.part:
            on_first_rank(report, "the report")
    end_distributed()


def _plain(name: str) -> str:
    """The name with only characters that suit a folder; never empty, also of a model in `.` or `..`."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "model"


if __name__ == "__main__":
    main()
