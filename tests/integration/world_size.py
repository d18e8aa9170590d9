"""`python world_size.py MODELS RUN SAVED_BY FIRST LAST CASE...`: take steps FIRST to LAST in an engine of each case.

MODELS: the folders of a LLaVE and of a Qwen-VL, with a comma between them.

If FIRST is 0, starts a new run; otherwise loads the checkpoint that SAVED_BY processes wrote after FIRST steps. Writes
a checkpoint every two steps, and prints each case's losses and gradient norms as JSON.
"""

import json
import sys
import threading
from pathlib import Path

import torch
import torch.distributed as dist
from exactness import PAIRS, batch_of, make_pairs
from limits import HANG_MINUTES
from torch.optim.optimizer import register_optimizer_step_pre_hook

from pipeline.config import load_ds_config, load_recipe
from pipeline.distributed import end_distributed, start_distributed
from pipeline.models.chunks import CachedFeatures
from pipeline.models.registry import training_of
from pipeline.objectives.contrastive.step import Contrastive
from pipeline.training import checkpoint
from pipeline.training.budget import Budget
from pipeline.training.engine import build_engine, load_frozen, set_hyperparameters
from pipeline.training.saving import Saver
from pipeline.training.universal import for_this_world

WHOLE = (
    "model.train.vision_tower=true",
    "model.train.projector=0.004",
)  # parameter groups with different learning rates and weight decays
ADAPTERS = ("model.train.vision_tower=false", "model.train.projector=false", "model.train.lora.rank=2")
# Name: (DeepSpeed config, elements per ZeRO-3 sub-group, precision, further fields).
CASES = {
    "zero0": ("zero0", None, "fp32", WHOLE),
    "zero1": ("zero1", None, "fp32", WHOLE),
    "zero2": ("zero2", None, "fp32", (*WHOLE, "objective.learn_temperature=true")),
    "zero3": ("zero3", 5_000, "fp32", WHOLE),
    "zero3-adapters": ("zero3", None, "fp32", ADAPTERS),
    "zero1-bf16": ("zero1", None, "bf16", WHOLE),
    "zero3-qwen": ("zero3", None, "fp32", WHOLE),
}


def run(case: str, models: str, folder: Path, saved_by: int, steps: range) -> list[tuple[float, float]]:
    config, sub_group, precision, fields = CASES[case]
    model, demo = models.split(",")["qwen" in case], "demo_qwen" if "qwen" in case else "demo"
    fields = [f"deepspeed=ds_configs/{config}.json", f"precision={precision}", f"model.path={model}", *fields]
    fields += [f"batch.global_batch={PAIRS}", "batch.chunk_tokens=200", "optimizer.weight_decay=1.0"]
    recipe = load_recipe(f"pipeline/recipes/{demo}.yaml", fields)
    rank, world = dist.get_rank(), dist.get_world_size()
    config = load_ds_config(recipe, world)
    if world == 4 and case.startswith("zero3"):
        config["zero_optimization"]["zero_hpz_partition_size"] = 2
    if sub_group:
        config["zero_optimization"]["sub_group_size"] = sub_group
    checkpoints = folder / case / f"by{saved_by}"
    if start := next(iter(checkpoint.candidates(checkpoints)), None) if steps.start else None:
        start = start.with_name(f"step-{steps.start:08d}")
        as_saved, start = start, for_this_world(start, timeout_minutes=HANG_MINUTES)
        if start != as_saved:
            config["checkpoint"] = {"load_universal": True}
    tower = load_frozen(recipe, model, torch.device("cpu"))
    engine, processor = build_engine(recipe, config, model), training_of(recipe).processor(recipe, model)
    objective = Contrastive(recipe, engine.device)
    if start:
        state = checkpoint.load(engine, start)
        assert (state["step"], state["bad_samples"], state["budget"]) == (steps.start, 7, {"chunk_tokens": 200})
        set_hyperparameters(engine, recipe)
        objective.load(state)
    conditions = {"the ZeRO stage": config["zero_optimization"]["stage"]}
    # The states are copied when the next step's optimizer waits for it, and the copies are written after the step.
    stepping, stepped = threading.Event(), threading.Event()
    register_optimizer_step_pre_hook(lambda *_: stepping.set())
    results, saver = [], Saver(engine, folder / case / f"by{world}", conditions, keep=9)
    fill, write = saver._copies.fill, saver._write
    saver._copies.fill = lambda: (stepping.wait(), fill())
    saver._write = lambda *arguments: (stepped.wait(), write(*arguments))
    for step in steps:
        pairs = make_pairs("mixed", seed=step)
        batch = batch_of(pairs[rank * PAIRS // world : (rank + 1) * PAIRS // world], processor)
        features = CachedFeatures(tower, 0) if tower else None
        budget = Budget.of(recipe.batch, 512)
        result = objective.step(engine, batch, budget, step, lr=2e-3, features=features)
        loss = result.loss.loss.detach().clone()
        dist.all_reduce(loss)
        results.append((float(loss) / world, result.grad_norm))
        stepped.set()
        if (step + 1) % 2 == 0:
            kept = {"bad_samples": 7, "budget": {"chunk_tokens": 200}} | objective.state()
            saver.finish()
            stepping.clear()
            stepped.clear()
            saver.begin(step + 1, kept)
            if step + 1 == 2:  # what DeepSpeed writes by itself
                tag, state = f"unfinished-{step + 1:08d}", kept | {"step": step + 1}
                engine.save_checkpoint(str(folder / case / "plain"), tag, state, False, exclude_frozen_parameters=True)
    stepping.set()
    stepped.set()
    saver.finish()
    engine.destroy()
    return results


def main() -> None:
    models, folder, saved_by, first, last, *cases = sys.argv[1:]
    start_distributed(timeout_minutes=HANG_MINUTES)
    steps = range(int(first), int(last))
    results = {case: run(case, models, Path(folder), int(saved_by), steps) for case in cases}
    if dist.get_rank() == 0:
        print(json.dumps(results))
    end_distributed()


if __name__ == "__main__":
    main()
