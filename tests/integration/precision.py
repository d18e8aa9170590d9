"""`python precision.py MODEL DS_CONFIG PRECISION RUN [key=value ...]`: checkpoints and exports of one precision.

Takes two steps, saves a checkpoint and takes a third step. Then a new engine loads the checkpoint, exports it and takes
the third step again. Prints as JSON the losses, and the smallest cosine between embeddings of the exported model and
of the engine.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from exactness import batch_of, make_pairs
from limits import HANG_MINUTES

from pipeline.config import dump_recipe, load_ds_config, load_recipe
from pipeline.distributed import end_distributed, start_distributed
from pipeline.models.chunks import CachedFeatures, embed_chunks, plan_chunks
from pipeline.models.files import fingerprint
from pipeline.models.llave.model import Llave
from pipeline.models.llave.processor import LlaveProcessor
from pipeline.objectives.contrastive.step import Contrastive
from pipeline.training import checkpoint
from pipeline.training.budget import Budget
from pipeline.training.engine import build_engine, load_frozen
from pipeline.training.export import export
from pipeline.training.saving import Saver


def main() -> None:
    model, config, precision, run, *fields = sys.argv[1:]
    run = Path(run)
    start_distributed(timeout_minutes=HANG_MINUTES)
    fields += [f"deepspeed={config}", f"precision={precision}", "batch.global_batch=16", "batch.chunk_tokens=200"]
    fields += [f"model.path={model}", f"run={run}"]
    recipe = load_recipe("pipeline/recipes/demo.yaml", fields)
    processor = LlaveProcessor.load(model, 512)
    rank, world = dist.get_rank(), dist.get_world_size()
    batches = [batch_of(make_pairs("mixed", seed)[rank::world], processor) for seed in range(3)]

    def step(engine, batch) -> tuple[float, float]:
        features = CachedFeatures(tower, 0) if tower else None
        objective, budget = Contrastive(recipe, engine.device), Budget.of(recipe.batch, 512)
        result = objective.step(engine, batch, budget, 0, lr=1e-3, features=features)
        return float(result.loss.loss.detach()), result.grad_norm

    tower = load_frozen(recipe, model, torch.device("cpu"))
    ds_config = load_ds_config(recipe, world)
    engine = build_engine(recipe, ds_config, model)
    losses = [step(engine, batch) for batch in batches[:2]]
    stage = ds_config["zero_optimization"]["stage"]
    conditions = {"the ZeRO stage": stage, "the model's fingerprint": fingerprint(model)}
    saver = Saver(engine, run / "checkpoints", conditions, keep=1)
    saver.begin(2, {"bad_samples": 0})
    losses.append(step(engine, batches[2]))
    saver.finish()
    again = build_engine(recipe, ds_config, model)
    assert checkpoint.load(again, checkpoint.candidates(run / "checkpoints")[0])["step"] == 2
    export(again, tower, recipe, model, run / "export")
    items = list(batches[0].items.values())
    chunks = plan_chunks(items, 200, torch.device("cpu"))
    features = CachedFeatures(tower, 0) if tower else None
    trained = embed_chunks(again, chunks, len(items), features)
    exported = embed_chunks(Llave.load(str(run / "export"), "auto"), chunks, len(items))
    cosine = float((trained * exported).sum(dim=1).min())
    resumed = step(again, batches[2])
    if rank == 0:
        (run / "recipe.yaml").write_text(dump_recipe(recipe))
        print(json.dumps({"losses": losses, "resumed": resumed, "cosine": cosine}))
    end_distributed()


if __name__ == "__main__":
    main()
