"""One rank of the exactness tests of LLM2CLIP's two stages and of CLIP: `python two_tower.py MODELS OUT CASES`.

The reference and the comparison are those of exactness.py. MODELS: the folder that test_two_tower.py creates.
CASES: a key of `CASES`.
"""

import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from exactness import CHECKPOINTING, EPS, LR, Expected, computed_once, differences, formula, picture, trained_alone
from limits import HANG_MINUTES

from pipeline.config import Recipe, load_ds_config, load_recipe
from pipeline.data.sample import Item, Pair
from pipeline.distributed import end_distributed, start_distributed
from pipeline.models.chunks import CachedFeatures, Features, Packed
from pipeline.models.registry import training
from pipeline.training.engine import build_engine, load_frozen

PAIRS = 12
WIDTH = 32  # size of the text encoder's vectors
PARTS = {
    "vision": "vision_tower",
    "adapter": "adapter",
    "language_model": "language_model",
    "clip.vision_model": "vision_tower",
    "clip.visual_projection": "vision_tower",
    "clip.text_model": "language_model",
    "clip.text_projection": "language_model",
}
BOTH = ("model.train.vision_tower=true",)
LIVE = (*BOTH, "data.text_embeddings=null")
LEARNT = ("objective.learn_temperature=true", "objective.temperature=0.07")
ALPHA = ("objective.alpha=9", "objective.temperature=0.05")
DECAY = "model.train.layer_decay=0.5"
IN_HOST_MEMORY = "batch.features_mb=0"
RECIPES = {"text_encoder": "demo_caption", "llm2clip": "demo_llm2clip", "clip": "demo_clip"}
INSTRUCTION = "model.instruction=what a caption shows"


@dataclass(frozen=True)
class Case:
    """mix: see `make_pairs`. recomputed: the second pass computes the frozen text encoder's vectors again."""

    kind: str
    stage: int
    mix: str
    chunk_tokens: int = 60
    kept_chunks: int = 0
    fields: tuple[str, ...] = BOTH
    recomputed: bool = False


CASES = {
    "alone": (
        Case("llm2clip", 0, "captioned"),
        Case("llm2clip", 2, "divided", 60, 1, LIVE),
        Case("clip", 1, "divided", 60, 2, (*BOTH, *LEARNT)),
        Case("text_encoder", 2, "texts", 60, 1, ("model.train.lora.rank=4", INSTRUCTION)),
    ),
    "two": (
        # One item per chunk, several, all. In "divided" the first rank has no text and the second has no image.
        *(Case("llm2clip", 1, mix, tokens) for mix in ("captioned", "divided") for tokens in (60, 100_000)),
        Case("llm2clip", 2, "divided", 1),
        *(Case("llm2clip", stage, "divided", 60, kept) for stage, kept in ((0, 1), (2, 2), (1, 1000))),
        Case("llm2clip", 2, "captioned", 60, 1, (*BOTH, *LEARNT, "objective.alpha=9", CHECKPOINTING)),
        Case("llm2clip", 1, "divided", 60, 1, ("model.train.vision_tower=false",)),
        Case("llm2clip", 2, "captioned", 60, 1, ("model.train.vision_tower=0.03", "model.train.adapter=false")),
        Case("llm2clip", 1, "texts", 60, 1, ("model.train.vision_tower=true", "model.train.adapter=0.03")),
        *(Case("llm2clip", stage, "captioned", 60, 1, (*BOTH, DECAY)) for stage in (1, 2)),
        Case("llm2clip", 1, "captioned", 60, 1, LIVE),
        Case("llm2clip", 2, "divided", 60, 2, (*LIVE, IN_HOST_MEMORY)),
        Case("llm2clip", 0, "divided", 60, 0, LIVE, recomputed=True),
        Case("clip", 1, "captioned", 60, 1, (*BOTH, *LEARNT)),
        Case("clip", 2, "divided", 60, 2, (*BOTH, *ALPHA)),
        Case("clip", 0, "divided", 1),
        Case("clip", 2, "captioned", 1, 0, ("model.train.vision_tower=true", "model.train.language_model=false")),
        Case("clip", 1, "texts", 60, 0, ("model.train.vision_tower=false",)),
        Case("text_encoder", 0, "texts", 60, 2, (INSTRUCTION,)),
        Case("text_encoder", 1, "texts", 1, 0, ("model.train.lora.rank=4",)),
        Case("text_encoder", 2, "texts", 100_000, 1, (*LEARNT, INSTRUCTION)),
        Case("text_encoder", 2, "texts", 60, 1, (*ALPHA, "model.train.lora.rank=4", INSTRUCTION)),
        Case("text_encoder", 3, "texts", 60, 2, (*ALPHA, INSTRUCTION)),
        Case("text_encoder", 3, "texts", 60, 0, ("model.train.lora.rank=4", CHECKPOINTING)),
    ),
}


def make_pairs(mix: str, seed: int) -> list[Pair]:
    """Return pairs with texts of very different lengths; some have a negative; an image and a caption occur twice.

    mix: "captioned": images, some items with two of them, and their captions; "texts": only texts; "divided": only
    images in the first half, and only texts in the second.
    """
    rng = np.random.default_rng(seed)

    def text(name: str) -> Item:
        words = int(rng.integers(30, 60)) if rng.random() < 0.2 else int(rng.integers(0, 6))
        vector = rng.normal(size=WIDTH).astype(np.float32)
        return Item(f"{name}{' star' * words}", vector=vector / np.linalg.norm(vector))

    def image(number: int) -> Item:
        return Item("<image>", tuple(picture(rng) for _ in range(1 + (number % 5 == 4))))

    def item(name: str, number: int, shown: bool) -> Item:
        return image(number) if shown else text(f"{name} {number}")

    first = [i < PAIRS // 2 for i in range(PAIRS)]
    queries = [item("query", i, mix == "captioned" or (mix == "divided" and first[i])) for i in range(PAIRS)]
    targets = [item("target", i, mix == "divided" and first[i]) for i in range(PAIRS)]
    negatives = [(item("negative", i, mix == "divided" and first[i]),) if i % 4 == 1 else () for i in range(PAIRS)]
    targets[5], targets[PAIRS - 1], queries[6] = targets[1], targets[7], queries[2]
    return [Pair(str(i), "d", "t", queries[i], targets[i], negatives[i]) for i in range(PAIRS)]


def recipe_of(models: str, kind: str, fields: tuple[str, ...]) -> Recipe:
    texts = [f"model.text_encoder={models}/text_encoder", "data.text_embeddings=beside"] if kind == "llm2clip" else []
    common = [f"model.path={models}/{kind}", f"batch.global_batch={PAIRS}", "data.lanes=2", f"optimizer.lr={LR}"]
    common += [f"optimizer.eps={EPS}", "optimizer.weight_decay=0.1", "optimizer.max_grad_norm=1.0"]
    common += ["objective.learn_temperature=false", *texts]
    return load_recipe(f"pipeline/recipes/{RECIPES[kind]}.yaml", [*common, *fields])


def expected(models: str, kind: str, mix: str, fields: tuple[str, ...]) -> Expected:
    recipe = recipe_of(models, kind, fields)
    path = recipe.model.path
    processor, frozen = training(kind).processor(recipe, path), load_frozen(recipe, path, torch.device("cpu"))
    reference = training(kind).load(recipe, path, "sdpa")

    def by_itself(packed: Packed, with_images: bool) -> torch.Tensor:
        return reference(packed, with_images, frozen.model(packed) if frozen and not with_images else None)

    def loss(step: int, temperature: torch.Tensor) -> torch.Tensor:
        pairs = make_pairs(mix, seed=step)
        return formula(by_itself, pairs, processor, recipe.objective, temperature, recipe.objective.alpha)

    if DECAY not in fields:
        return trained_alone(reference, recipe, PARTS, loss)
    return trained_alone(reference, recipe, PARTS, loss, layer_factor, undecayed="position_embedding")


def layer_factor(name: str) -> float:
    """Return the factor of the learning rate under `DECAY` in a tower of two layers."""
    steps = {"patch_embedding": 3, "position_embedding": 3, "encoder.layers.0.": 2, "encoder.layers.1.": 1}
    return 0.5 ** next((count for part, count in steps.items() if part in name), 0)


def reference_of(models: str, case: Case) -> tuple[str, str, str, tuple[str, ...]]:
    """Return the arguments of `expected`, which are equal for all cases with the same mathematical result."""
    return models, case.kind, case.mix, tuple(f for f in case.fields if f not in (CHECKPOINTING, IN_HOST_MEMORY))


def compare(models: str, case: Case, theirs: Expected) -> dict:
    cut = (f"batch.chunk_tokens={case.chunk_tokens}", f"batch.kept_chunks={case.kept_chunks}")
    recipe = recipe_of(models, case.kind, (f"deepspeed={models}/zero{case.stage}.json", *cut, *case.fields))
    path = recipe.model.path
    processor, frozen = training(case.kind).processor(recipe, path), load_frozen(recipe, path, torch.device("cpu"))
    engine = build_engine(recipe, load_ds_config(recipe, dist.get_world_size()), path)

    def features() -> Features | None:
        if case.recomputed:
            return frozen.features_of
        return CachedFeatures(frozen, recipe.batch.features_mb << 20) if frozen else None

    pairs_of = partial(make_pairs, case.mix)
    return {"case": repr(case)} | differences(engine, recipe, theirs, processor, pairs_of, features)


def main() -> None:
    models, out, name = sys.argv[1:]
    start_distributed(timeout_minutes=HANG_MINUTES)
    cases = CASES[name]
    references = computed_once((reference_of(models, case) for case in cases), lambda key: expected(*key), Path(models))
    results = [compare(models, case, references[reference_of(models, case)]) for case in cases]
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(results))
    end_distributed()


if __name__ == "__main__":
    main()
