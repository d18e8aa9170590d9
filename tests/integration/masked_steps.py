"""One rank of the tests of masked next-token prediction: `python masked_steps.py MODELS OUT`.

Takes optimizer steps through the engine. Takes the same steps in one process with the whole global batch: text by text,
with transformers' model, plain autograd and torch's AdamW. Writes the differences.
MODELS: the folder that test_masked_steps.py creates.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from exactness import EPS, INVALID, LR, batch_of, largest_difference, worst
from limits import HANG_MINUTES
from transformers import AutoModelForCausalLM

from pipeline.config import Recipe, load_ds_config, load_recipe
from pipeline.data.sample import Item, Pair
from pipeline.distributed import end_distributed, start_distributed
from pipeline.models.lora import add_adapters
from pipeline.models.text_encoder.masked import MaskedLanguageModel
from pipeline.models.text_encoder.processor import TextProcessor, load_config
from pipeline.objectives.masked_tokens.masks import mask
from pipeline.objectives.masked_tokens.step import MaskedNextToken
from pipeline.training.budget import Budget
from pipeline.training.engine import build_engine, freeze
from pipeline.training.export import export

PAIRS = 16
STEPS = 2


@dataclass(frozen=True)
class Case:
    model: str
    stage: int
    chunk_tokens: int = 60
    fields: tuple[str, ...] = ()


ADAPTERS = ("model.train.lora.rank=4",)
CASES = {
    1: (Case("untied", 0, 1), Case("untied", 3), Case("tied", 2, 100_000, ADAPTERS)),
    2: (
        *(Case("untied", stage, tokens) for stage in (1, 3) for tokens in (1, 100_000)),
        Case("tied", 2),
        Case("tied", 3),
        Case("untied", 3, 200, (*ADAPTERS, "batch.activation_checkpointing=true")),
    ),
}


def make_pairs(seed: int) -> list[Pair]:
    """Return pairs of texts of different lengths. One text occurs twice on a rank, one on both ranks; one is empty."""
    rng = np.random.default_rng(seed)

    def item(name: str) -> Item:
        return Item(" ".join([name, *(str(number) for number in rng.integers(0, 100, rng.integers(2, 12)))]))

    queries, targets = [item(f"query {i}") for i in range(PAIRS)], [item(f"target {i}") for i in range(PAIRS)]
    targets[6] = queries[5]
    targets[12] = targets[1]
    queries[10] = Item("")
    return [
        Pair(str(i), "d", "t", queries[i], targets[i], (item(f"negative {i}"),) if i % 5 == 0 else ())
        for i in range(PAIRS)
    ]


def formula(
    reference: MaskedLanguageModel, pairs: list[Pair], texts: TextProcessor, recipe: Recipe, step: int
) -> tuple[torch.Tensor, int]:
    """Return the mean cross entropy over all masked tokens of all texts, and the number of these tokens."""
    costs = []
    for item in (item for pair in pairs if int(pair.key) not in INVALID for item in pair.items):
        encoded = texts.encode(item)
        key = recipe.seed, step, encoded.key
        text = mask(encoded, recipe.objective, reference.mask_token, reference.vocabulary, key)
        logits = reference.causal(torch.from_numpy(text.input_ids).long()[None], use_cache=False).logits[0]
        costs += [
            F.cross_entropy(logits[at - 1], torch.tensor(of)) for at, of in zip(text.places, text.targets, strict=True)
        ]
    return torch.stack(costs).mean(), len(costs)


def compare(models: Path, case: Case) -> dict:
    rank, world, model = dist.get_rank(), dist.get_world_size(), str(models / case.model)
    recipe = load_recipe(
        "pipeline/recipes/demo_masked.yaml",
        [
            f"model.path={model}",
            f"deepspeed={models}/zero{case.stage}.json",
            f"batch.global_batch={PAIRS}",
            f"batch.chunk_tokens={case.chunk_tokens}",
            f"optimizer.eps={EPS}",
            "optimizer.weight_decay=0.1",
            *case.fields,
        ],
    )
    engine = build_engine(recipe, load_ds_config(recipe, world), model)
    texts = TextProcessor.load(model, 512)
    config = load_config(model)
    config.is_causal = False
    causal = AutoModelForCausalLM.from_pretrained(model, config=config, attn_implementation="eager")
    reference = MaskedLanguageModel(causal, engine.module.mask_token, engine.module.vocabulary)
    freeze(reference, recipe)
    if recipe.model.train.adapters:
        add_adapters(reference.language_model, recipe.model.train.adapters, recipe.seed)
    trained = [parameter for parameter in reference.parameters() if parameter.requires_grad]
    groups = [{"params": [p], "weight_decay": 0.1 if p.ndim > 1 else 0} for p in trained]
    optimizer = torch.optim.AdamW(groups, lr=LR, eps=EPS)
    result = {"case": repr(case), "loss": 0.0, "grad_norm": 0.0}
    objective = MaskedNextToken(recipe, engine.device)
    for step in range(STEPS):
        pairs = make_pairs(seed=step)
        own = batch_of(pairs[rank * PAIRS // world : (rank + 1) * PAIRS // world], texts)
        ours = objective.step(engine, own, Budget.of(recipe.batch, 512), step, lr=LR)
        expected, count = formula(reference, pairs, texts, recipe, step)
        assert (ours.masked_tokens, ours.valid) == (count, PAIRS - len(INVALID))
        optimizer.zero_grad()
        expected.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        result["loss"] = worst(result["loss"], abs(ours.loss / float(expected.detach()) - 1))
        result["grad_norm"] = worst(result["grad_norm"], abs(ours.grad_norm / float(norm) - 1))
    result["parameters"] = largest_difference(engine, {name: p.detach() for name, p in reference.named_parameters()})
    out = models / f"export-{world}"
    export(engine, None, recipe, model, out)
    with torch.no_grad():
        written = MaskedLanguageModel.load(str(out), torch.float32)
        written.causal.set_attn_implementation("eager")
        losses = [float(formula(each, make_pairs(9), texts, recipe, 9)[0]) for each in (written, reference)]
    result["export"] = abs(losses[0] / losses[1] - 1)
    dist.barrier()
    engine.destroy()
    return result


def main() -> None:
    models, out = map(Path, sys.argv[1:])
    start_distributed(timeout_minutes=HANG_MINUTES)
    results = [compare(models, case) for case in CASES[dist.get_world_size()]]
    if dist.get_rank() == 0:
        out.write_text(json.dumps(results))
    end_distributed()


if __name__ == "__main__":
    main()
