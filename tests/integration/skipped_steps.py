"""Steps whose gradient is NaN, under each way of sharding: `python skipped_steps.py MODEL OUT`.

Takes three steps of which the second has a NaN loss, and the same without it. Writes by way of sharding whether the
norm was finite in each step, and whether parameters and temperature are the same.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from exactness import LR, batch_of, make_pairs, recipe_of
from limits import HANG_MINUTES

from pipeline.config import load_ds_config
from pipeline.distributed import end_distributed, start_distributed
from pipeline.models.registry import training_of
from pipeline.objectives.contrastive import step as step_module
from pipeline.objectives.contrastive.step import Contrastive
from pipeline.training.budget import Budget
from pipeline.training.engine import build_engine
from pipeline.training.part_norms import PartNorms

WAYS = {"zero0": "fp32", "zero1": "fp32", "zero2": "fp32", "zero3": "fp32", "zero1 bf16": "bf16", "zero2 bf16": "bf16"}
WAYS |= {"zero3 bf16": "bf16", "zero3_offload": "fp32"}


def steps(model: str, way: str, planted: tuple[bool, ...]) -> tuple[list[float], list[float], list[torch.Tensor]]:
    """Return the norms, the sums of PartNorms, and the parameters with the temperature after the last step."""
    fields = (f"deepspeed=ds_configs/{way.split()[0]}.json", f"precision={WAYS[way]}", "model.train.vision_tower=true")
    recipe = recipe_of((*fields, "objective.learn_temperature=true", "batch.chunk_tokens=200"), model)
    engine = build_engine(recipe, load_ds_config(recipe, 1), model)
    objective, processor = Contrastive(recipe, engine.device), training_of(recipe).processor(recipe, model)
    of_parts = PartNorms(engine.basic_optimizer, ["projector", "language_model", "vision_tower"])
    loss_of, norms, sums = step_module.contrastive_loss, [], []
    for number, is_planted in enumerate(planted):

        def loss(*arguments, is_planted=is_planted):
            output = loss_of(*arguments)
            return replace(output, loss=output.loss * torch.nan) if is_planted else output

        step_module.contrastive_loss = loss
        batch = batch_of(make_pairs("mixed", seed=0), processor)
        norms.append(objective.step(engine, batch, Budget.of(recipe.batch, 512), number, lr=LR).grad_norm)
        sums.append(sum(of_parts.take().values()))
    step_module.contrastive_loss = loss_of
    state = engine.module_state_dict() if "zero3" not in way else engine._zero3_consolidated_16bit_state_dict()
    values = [value.detach().float().clone() for value in state.values()] + [objective.temperature.of([]).detach()]
    engine.destroy()
    return norms, sums, values


def main() -> None:
    model, out = sys.argv[1:]
    start_distributed(timeout_minutes=HANG_MINUTES)
    found = {}
    for way in WAYS:
        norms, sums, values = steps(model, way, (False, True, False))
        _, _, expected = steps(model, way, (False, False))
        found[way] = {
            "finite": torch.tensor(norms).isfinite().tolist(),
            "summed": [total > 0 for total in sums],
            "same": all(torch.equal(ours, theirs) for ours, theirs in zip(values, expected, strict=True)),
        }
    Path(out).write_text(json.dumps(found))
    end_distributed()


if __name__ == "__main__":
    main()
