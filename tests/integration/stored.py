"""Steps of LLM2CLIP's second stage with stored vectors, compared with a live text encoder.

`python stored.py OUT VECTORS FORMAT RECIPE [key=value ...]`, in one process. VECTORS: the output of pipeline.embed for
the recipe's data. FORMAT: the number format of the stored vectors.
"""

import json
import sys
from functools import partial
from pathlib import Path

import deepspeed
import torch
from limits import HANG_MINUTES, HANG_SECONDS

from pipeline.config import Recipe, load_ds_config, load_recipe
from pipeline.data.batch import Batch
from pipeline.data.source import Source
from pipeline.data.stored_vectors import Stored, restored, rounded
from pipeline.data.stream import batches
from pipeline.distributed import end_distributed, start_distributed
from pipeline.models.chunks import Chunk, Packed, pack
from pipeline.models.registry import training
from pipeline.models.text_encoder.model import FrozenTextEncoder
from pipeline.objectives.contrastive.batch_loss import contrastive_loss
from pipeline.objectives.contrastive.step import Contrastive
from pipeline.training.budget import Budget
from pipeline.training.engine import build_engine, load_frozen

STEPS = 5
ROUNDING = {"fp16": 2.0**-11, "bf16": 2.0**-8}  # largest relative rounding error of a number


def train(recipe: Recipe, stored: Stored | None = None) -> tuple[list[float], float | None]:
    """Return the loss of each step and, with a live text encoder, the first step's `deviation`.

    stored: round the live text encoder's vectors as these are rounded.
    """
    source, kind, device = Source.open(recipe.data), training("llm2clip"), torch.device("cpu")
    order = source.order(recipe.batch.global_batch, recipe.seed, kind.lengths(recipe))
    path = recipe.model.path
    processor, frozen = kind.processor(recipe, path), load_frozen(recipe, path, device)
    engine, objective = build_engine(recipe, load_ds_config(recipe, 1), path), Contrastive(recipe, device)

    def features(chunk: Chunk, packed: Packed) -> torch.Tensor | None:
        vectors = frozen.features_of(chunk, packed)
        if stored and vectors is not None:
            vectors = torch.from_numpy(restored(rounded(vectors, stored), stored))
        return vectors

    losses, expected = [], None
    given = {"rank": 0, "world": 1, "timeout": HANG_SECONDS, "trained_on": partial(kind.trained_on, recipe)}
    for step, batch in enumerate(batches(source, order, processor.encode, range(STEPS), **given)):
        if frozen and not losses:
            expected = deviation(engine, frozen, batch, recipe)
        budget, seen = Budget.of(recipe.batch, 512), features if frozen else None
        result = objective.step(engine, batch, budget, step, lr=recipe.optimizer.lr, features=seen)
        losses.append(result.loss.loss.item())
    return losses, expected


def deviation(engine: deepspeed.DeepSpeedEngine, frozen: FrozenTextEncoder, batch: Batch, recipe: Recipe) -> float:
    """Return sqrt(sum((v * dL/dv)^2)): the loss's first-order change if the error of each number v equals v.

    The errors are independent. Multiplied by the format's rounding, this bounds the standard deviation from above.
    """
    items = list(batch.items.values())
    vectors = frozen.model(pack([item for item in items if not item.images])).requires_grad_()
    embeddings = engine.module(pack(items), True, vectors)
    objective = recipe.objective
    loss = contrastive_loss(embeddings, batch, recipe, objective.temperature, objective.alpha).loss
    return float((torch.autograd.grad(loss, vectors)[0] * vectors).norm())


def main() -> None:
    out, vectors, stored, name, *fields = sys.argv[1:]
    start_distributed(timeout_minutes=HANG_MINUTES)
    recipe = load_recipe(name, [*fields, f"data.text_embeddings={vectors}"])
    without = load_recipe(name, [*fields, "data.text_embeddings=null"])
    cached, _ = train(recipe)
    live, expected = train(without)
    as_stored, _ = train(without, stored)
    result = {"cached": cached, "live": live, "rounded": as_stored, "deviation": expected * ROUNDING[stored]}
    Path(out).write_text(json.dumps(result))
    end_distributed()


if __name__ == "__main__":
    main()
