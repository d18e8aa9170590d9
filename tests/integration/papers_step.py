"""One rank of a training step on LLaVE's published example: `python papers_step.py MODEL IMAGES STEP OUT`.

MODEL is the converted original checkpoint, STEP its step.json. Takes the step through the engine, under the recipe's
variant `paper` in float32, and writes the loss and the gradient norms, in the original's names.
"""

import json
import re
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from limits import HANG_MINUTES

from pipeline.config import load_ds_config, load_recipe
from pipeline.data.batch import Batch, Origin, RawSample, encode_rows
from pipeline.data.mmeb import mmeb_text
from pipeline.data.sample import Item, Pair
from pipeline.distributed import end_distributed, start_distributed
from pipeline.models.chunks import CachedFeatures
from pipeline.models.registry import training_of
from pipeline.objectives.contrastive.step import Contrastive
from pipeline.training.budget import Budget
from pipeline.training.engine import build_engine, load_frozen

NAMES = (
    (r"^multi_modal_projector\.linear_1", "model.mm_projector.0"),
    (r"^multi_modal_projector\.linear_2", "model.mm_projector.2"),
    (r"^image_newline", "model.image_newline"),
    (r"^language_model\.", "model."),
)


def pairs_of(step: dict, images: Path) -> list[Pair]:
    def item(text: str, path: str) -> Item:
        return Item(mmeb_text(text), ((images / path).read_bytes(),) if path else ())

    def pair(number: int, row: dict) -> Pair:
        query, target = item(row["qry"], row["qry_image_path"]), item(row["pos_text"], row["pos_image_path"])
        return Pair(str(number), "d", "t", query, target)

    return [pair(number, row) for number, row in enumerate(step["rows"])]


def original(name: str) -> str:
    for pattern, new in NAMES:
        name = re.sub(pattern, new, name)
    return name


def main() -> None:
    model, images, step, out = sys.argv[1:]
    start_distributed(timeout_minutes=HANG_MINUTES)
    rank, world = dist.get_rank(), dist.get_world_size()
    pairs = pairs_of(json.loads(Path(step).read_text()), Path(images))
    recipe = load_recipe(
        "pipeline/recipes/llave_2b.yaml",
        [
            *("variant=paper", "precision=fp32", "deepspeed=ds_configs/zero0.json", "data.lanes=2"),
            *(f"model.path={model}", f"batch.global_batch={len(pairs)}", f"batch.sub_batch={len(pairs)}"),
            *("batch.chunk_tokens=4000", "batch.kept_chunks=1"),
        ],
    )
    processor = training_of(recipe).processor(recipe, model)
    share = len(pairs) // world
    samples = [
        RawSample(number, Origin("", number), b"", lambda pair=pair: pair)
        for number, pair in enumerate(pairs[rank * share : (rank + 1) * share])
    ]
    tower = load_frozen(recipe, model, torch.device("cpu"))
    engine = build_engine(recipe, load_ds_config(recipe, world), model)
    norms: dict[str, float] = {}
    stepped = engine.step

    def step_noting_norms() -> None:
        for name, parameter in engine.module.named_parameters():
            if parameter.grad is not None:
                norms[original(name)] = float(parameter.grad.double().norm())
        stepped()

    engine.step = step_noting_norms
    result = Contrastive(recipe, engine.device).step(
        engine,
        Batch.of([encode_rows(samples, processor.encode)]),
        Budget.of(recipe.batch, 4096),
        0,
        lr=recipe.optimizer.lr,
        features=CachedFeatures(tower, 64 << 20),
    )
    loss = result.loss.loss.detach().clone()
    dist.all_reduce(loss)
    if rank == 0:
        found = {"loss": float(loss) / world, "gradient_norm": result.grad_norm, "gradient_norm_by_parameter": norms}
        Path(out).write_text(json.dumps(found))
    engine.destroy()
    end_distributed()


if __name__ == "__main__":
    main()
