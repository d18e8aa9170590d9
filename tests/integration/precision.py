"""`python precision.py MODEL DS_CONFIG PRECISION FOLDER`: two steps, a checkpoint, a third step; then the third step
again by a new engine that loads the checkpoint. Prints the losses as JSON."""

import json
import sys
from pathlib import Path

import torch.distributed as dist
from exactness import batch_of, make_pairs

from pipeline.config import load_ds_config, load_recipe
from pipeline.models.llave import Processor
from pipeline.training import checkpoint
from pipeline.training.engine import build_engine, start_distributed
from pipeline.training.step import train_step


def main() -> None:
    model, config, precision, folder = sys.argv[1:]
    start_distributed(timeout_minutes=0.5)
    recipe = load_recipe(
        "pipeline/recipes/demo.yaml", [f"deepspeed={config}", f"precision={precision}", "batch.global_batch=16"]
    )
    processor = Processor.load(model, 512)
    batches = [batch_of(make_pairs("mixed", seed), processor) for seed in range(3)]

    def step(engine, batch) -> tuple[float, float]:
        result = train_step(engine, batch, recipe.loss, chunk_tokens=200, lr=1e-3)
        return float(result.loss.loss.detach()), result.grad_norm

    ds_config = load_ds_config(recipe, world_size=1)
    engine = build_engine(recipe, ds_config, model)
    losses = [step(engine, batch) for batch in batches[:2]]
    checkpoint.save(engine, Path(folder), 2, {"bad_samples": 0}, {}, keep=1)
    losses.append(step(engine, batches[2]))
    again = build_engine(recipe, ds_config, model)
    assert checkpoint.load(again, checkpoint.latest(Path(folder)))["step"] == 2
    print(json.dumps({"losses": losses, "resumed": step(again, batches[2])}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
