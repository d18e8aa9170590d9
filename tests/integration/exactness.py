"""One rank of the exactness tests: `python exactness.py MODEL[,MODEL...] DS_CONFIG OUT REFERENCES [FLAGS]`.

Flags: `few0`, `few1`, `few2`, `alone`, `offloaded`, `shaped`, or `no-guard MIX`.  REFERENCES: a folder that keeps the
results of one process, for programs that compare the same cases.

Takes optimizer steps through the engine. Takes the same steps in one process with the whole global batch: item by item,
with the loss as one B x B formula, plain autograd and torch's AdamW. Writes the differences.
"""

import hashlib
import io
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from limits import HANG_MINUTES
from PIL import Image

from pipeline.config import Recipe, load_ds_config, load_recipe
from pipeline.data.batch import Batch, Origin, RawSample, encode_rows
from pipeline.data.sample import BadSample, Item, Pair
from pipeline.distributed import end_distributed, start_distributed
from pipeline.models import chunks as chunks_module
from pipeline.models.chunks import CachedFeatures, Features, pack
from pipeline.models.family import Processor
from pipeline.models.lora import add_adapters
from pipeline.models.registry import training_of
from pipeline.objectives.contrastive import step as step_module
from pipeline.objectives.contrastive.config import ContrastiveSection
from pipeline.objectives.contrastive.step import Contrastive
from pipeline.storage.atomic import replacing
from pipeline.training import part_norms
from pipeline.training.budget import Budget
from pipeline.training.engine import build_engine, freeze, load_frozen
from pipeline.training.part_norms import PartNorms

PAIRS = 16
STEPS = 2
LR = 0.1
EPS = 1.0  # makes a step nearly proportional to the gradient, whose scale Adam otherwise hides
INVALID = {3, 9}  # one on each of two ranks
LABELLED_INVALID = {3, 4}  # both on the first rank: the ranks' numbers of valid pairs differ
TEACHER_WIDTH = 5
# By the model_type in a folder's config.json.
RECIPES = {"llava_onevision": "demo"} | dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), "demo_qwen")
WHOLE = ("model.train.vision_tower=true",)
FROZEN = ("batch.tower_tiles=3", "batch.features_mb=0")
OF_TASKS = "objective.temperatures={a: 0.05}"
TEACHER = ("data.teacher=beside",)
DISTILL = "objective.distill={scores: teacher, temperature: 0.5}"
STORED = "objective.distill={scores: stored, temperature: 1, weight: 0.5}"
CHECKPOINTING = "batch.activation_checkpointing=true"


@dataclass(frozen=True)
class Case:
    """A batch type, the chunk size, the number of chunks whose graph is cached, and further fields of the recipe.

    A chunk has one item with 1 token, several with 200, and all with 100,000.
    """

    mix: str
    chunk_tokens: int
    kept_chunks: int = 0
    fields: tuple[str, ...] = WHOLE


FEW = (  # at every ZeRO stage
    *(Case(mix, tokens) for mix, tokens in (("mixed", 1), ("mixed", 200), ("mixed", 100_000), ("text", 100_000))),
    Case("images", 200, 5),
    Case("mixed", 200, 1),
    Case("images", 200, 2, FROZEN),
    Case("mixed", 200, 1000),
    Case("mixed", 200, 2, ("model.train.lora.rank=4", "objective.mask_duplicates=false")),
    Case("mixed", 200, 1000, FROZEN),
    Case("mixed", 200, 1, (*WHOLE, "objective.learn_temperature=true", "objective.temperature=0.07")),
    Case("mixed", 200, 2, (*FROZEN, "batch.sub_batch=4")),
    Case("mixed", 200, 3, (*WHOLE, CHECKPOINTING)),
)
ALIKE = (  # in what stages 0 to 2 do alike, such as the loss: each at one of them, and at stage 3
    *(Case(mix, tokens) for mix, tokens in (("images", 200), ("images", 100_000), ("text", 200))),
    Case("labelled", 200, 1, (*WHOLE, *TEACHER, "objective.reward=teacher", "objective.dimensions=[4,16]")),
    Case("mixed", 200, 2, (*FROZEN, "batch.sub_batch=4", "objective.directions=query")),
    Case("labelled", 200, 1, (*WHOLE, STORED, "batch.sub_batch=4", OF_TASKS, "objective.learn_temperature=true")),
    Case("labelled", 200, 2, (*FROZEN, *TEACHER, DISTILL, "batch.sub_batch=4", "objective.alpha_ramp=2")),
)
ALL = (
    *FEW,
    *ALIKE,
    *(Case("mixed", 200, kept) for kept in (5, 6)),  # two ranks have six chunks; FEW has one, and more than all
    *(Case(mix, 200, kept, FROZEN) for mix, kept in (("mixed", 0), ("text", 1))),
    Case("mixed", 200, 1, ("model.train.language_model=false", "model.train.projector=0.03")),
    Case("mixed", 200, 2, ("model.train.projector=false", "model.train.vision_tower=0.02")),
    Case("mixed", 200, 0, (*WHOLE, CHECKPOINTING)),
    Case("images", 200, 1000, (*FROZEN, CHECKPOINTING, "model.train.lora.rank=4")),
    Case("labelled", 1, 0, (*WHOLE, STORED, "objective.dimensions=[8,32]", "objective.directions=query", OF_TASKS)),
    Case("labelled", 100_000, 0, (*FROZEN, *TEACHER, DISTILL, "objective.reward=teacher")),
)
ALONE = (*FEW[::2], *ALIKE[::2])  # there is no other rank: only the chunking of the batch differs
SHAPED = (Case("mixed", 200, 2),)
OF_EACH = (  # of each other model, beside ALL; the first is also beside FEW and ALONE
    *(Case("mixed", 200, kept) for kept in (1, 0, 1000)),
    Case("mixed", 200, 2, (*FROZEN, "model.train.lora.rank=4")),
)
OTHERS = (  # of the last other model
    *OF_EACH,
    Case("images", 200, 1000, (*FROZEN, CHECKPOINTING)),
)
OFFLOADED = (
    Case("mixed", 200),
    Case("images", 200, 2),
    Case("fading", 200, 1),
    Case("mixed", 200, 1000, FROZEN),
    Case("mixed", 200, 0, (*FROZEN, CHECKPOINTING, "model.train.lora.rank=4")),
)


def picture(rng: np.random.Generator) -> bytes:
    size = [int(n) for n in rng.choice([16, 24, 48], 2)]
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def make_pairs(mix: str, seed: int) -> list[Pair]:
    """Return pairs of different lengths: some have explicit negatives, and a query and targets occur twice.

    mix: "images" or "text"; "mixed": images in the first half only, so that one of two ranks has none; "labelled":
    the same, with positives, tasks, scores and a teacher's vectors; "fading": images in the first step only.
    """
    rng = np.random.default_rng(seed)

    def item(name: str, with_image: bool) -> Item:
        words = " ".join(["star"] * int(rng.integers(1, 12)))
        return Item(f"<image>\n{name} {words}", (picture(rng),)) if with_image else Item(f"{name} {words}")

    all_images = mix == "images" or (mix == "fading" and seed == 0)
    images = [all_images or (mix in ("mixed", "labelled") and i < PAIRS // 2 and i % 2 == 0) for i in range(PAIRS)]
    targets = [item(f"target {i}", images[i] and i % 3 == 0) for i in range(PAIRS)]
    targets[5] = targets[1]
    queries = [item(f"query {i}", images[i]) for i in range(PAIRS)]
    queries[6] = queries[2]
    negatives = [
        (item(f"negative {i}", images[i] and i % 4 == 0),) if i % 3 == 0 or i < 5 else () for i in range(PAIRS)
    ]
    pairs = [Pair(str(i), "d", "t", queries[i], targets[i], negatives[i]) for i in range(PAIRS)]
    return [labelled(pair, item, rng) for pair in pairs] if mix == "labelled" else pairs


def labelled(pair: Pair, item: Callable[[str, bool], Item], rng: np.random.Generator) -> Pair:
    """Return the pair with a task, and with a teacher's vectors; some also with further positives and with scores."""
    number = int(pair.key)
    positives = tuple(item(f"positive {number} {i}", number == 0) for i in range(number % 3 if number < 12 else 0))
    weights = tuple(float(weight) for weight in rng.uniform(0.5, 2, 1 + len(positives)))
    scores = None
    if number % 2:
        scores = tuple(float(score) for score in rng.normal(size=1 + len(positives) + len(pair.negatives)))
    pair = replace(pair, task="ab"[number % 2], positives=positives, weights=weights, scores=scores)
    return replace(pair, teacher=np.stack([taught_vector(each) for each in pair.items]))


def is_invalid(pair: Pair) -> bool:
    return int(pair.key) in (INVALID if pair.teacher is None else LABELLED_INVALID)


def batch_of(pairs: list[Pair], processor: Processor) -> Batch:
    def parse(pair: Pair) -> Pair:
        if is_invalid(pair):
            raise BadSample("made so")
        return pair

    samples = [RawSample(i, Origin("", i), b"", lambda pair=pair: parse(pair)) for i, pair in enumerate(pairs)]
    width = None if pairs[0].teacher is None else TEACHER_WIDTH
    return Batch.of([encode_rows(samples, processor.encode, width)])


def sub_batches(pairs: list[Pair], recipe: Recipe) -> list[list[Pair]]:
    """Split the global batch into sub-batches, each with an equal number of consecutive pairs from every lane."""
    size = recipe.batch.sub_batch or PAIRS
    share, piece = PAIRS // recipe.data.lanes, size // recipe.data.lanes
    return [[pair for i, pair in enumerate(pairs) if i % share // piece == part] for part in range(PAIRS // size)]


def formula(
    model: torch.nn.Module,
    pairs: list[Pair],
    processor: Processor,
    objective: ContrastiveSection,
    temperature: torch.Tensor,
    alpha: float,
) -> torch.Tensor:
    """Return the objective's loss as B x C matrices, with each item embedded separately.

    temperature: of all tasks but those in objective.temperatures, which follow by name.
    """
    pairs = [pair for pair in pairs if not is_invalid(pair)]

    def embed(items: list[Item]) -> torch.Tensor:
        return torch.cat([model(pack([processor.encode(item)]), bool(item.images)) for item in items])

    queries, targets = embed([p.query for p in pairs]), [p.target for p in pairs]
    others = [(i, item) for i, p in enumerate(pairs) for item in (*p.positives, *p.negatives)]
    columns = embed([*targets, *(item for _, item in others)])
    same = torch.tensor([[a.query == b.query or a.target == b.target for b in pairs] for a in pairs])
    same &= ~torch.eye(len(pairs), dtype=torch.bool) & objective.mask_duplicates
    of_same = [
        [objective.mask_duplicates and a.query == pairs[i].query and item in pairs[i].positives for i, item in others]
        for a in pairs
    ]
    masked = torch.cat([same, torch.tensor(of_same, dtype=torch.bool).view(len(pairs), len(others))], dim=1)
    answers = torch.zeros(len(pairs), len(columns))  # the weight of each right answer
    for i, pair in enumerate(pairs):
        own = [n for n, (owner, item) in enumerate(others, len(pairs)) if owner == i and item in pair.positives]
        answers[i, [i, *own]] = F.normalize(torch.tensor(pair.weights), p=1, dim=0)
    masked &= answers == 0
    tasks = sorted(objective.temperatures)
    taus = torch.stack([temperature[1 + tasks.index(p.task) if p.task in tasks else 0] for p in pairs])
    taught = None
    if objective.uses_teacher:
        of_columns = torch.from_numpy(np.stack([taught_vector(item) for item in [*targets, *(o for _, o in others)]]))
        taught = torch.from_numpy(np.stack([taught_vector(p.query) for p in pairs])) @ of_columns.T

    def of_size(size: int) -> torch.Tensor:
        x, y = F.normalize(queries[:, :size], dim=-1), F.normalize(columns[:, :size], dim=-1)
        forth, count = x @ y.T, len(pairs)
        rewards = taught if objective.reward == "teacher" else forth.detach()
        negative = ~masked & (answers == 0)
        hard = (alpha * rewards + forth / taus[:, None]).masked_fill(~negative, -torch.inf)
        excess = torch.logsumexp(hard, dim=1)[:, None] - forth / taus[:, None]
        loss = (answers * F.softplus(excess)).sum(dim=1).mean()
        if objective.directions == "both":
            back = (alpha * rewards[:, :count] + forth[:, :count] / taus).masked_fill(
                same | torch.eye(count, dtype=torch.bool), -torch.inf
            )
            loss = (loss + F.softplus(torch.logsumexp(back, dim=0) - forth.diagonal() / taus).mean()) / 2
        if objective.distill:
            log_q = (forth / taus[:, None]).masked_fill(masked, -torch.inf).log_softmax(dim=1)
            scores = taught
            if objective.distill.scores == "stored":  # only of a query's own answers and negatives
                scores = stored_scores(pairs, others)
                log_q = (forth / taus[:, None]).masked_fill(scores == -torch.inf, -torch.inf).log_softmax(dim=1)
            log_p = (scores / objective.distill.temperature).masked_fill(log_q == -torch.inf, -torch.inf)
            log_p = log_p.log_softmax(dim=1)
            divergence = torch.where(log_q == -torch.inf, 0, log_p.exp() * (log_p - log_q))
            divergence = divergence[[objective.distill.scores == "teacher" or p.scores is not None for p in pairs]]
            loss = loss + objective.distill.weight * divergence.sum() / count
        return loss

    losses = torch.stack([of_size(size) for size in objective.dimensions or [queries.shape[1]]])
    return F.normalize(torch.tensor(objective.dimension_weights or [1.0] * len(losses)), p=1, dim=0) @ losses


def taught_vector(item: Item) -> np.ndarray:
    """Return a teacher's unit vector of an item: random, but always the same."""
    vector = np.random.default_rng(item.content_hash).normal(size=TEACHER_WIDTH).astype(np.float32)
    return vector / np.linalg.norm(vector)


def stored_scores(pairs: list[Pair], others: list[tuple[int, Item]]) -> torch.Tensor:
    """Return the scores of each pair's own answers and negatives, and -inf for all other columns."""
    scores = torch.full((len(pairs), len(pairs) + len(others)), -torch.inf)
    for i, pair in enumerate(pairs):
        own = [n for n, (owner, _) in enumerate(others, len(pairs)) if owner == i]
        if pair.scores:
            scores[i, [i, *own]] = torch.tensor(pair.scores)
    return scores


def worst(*values: float) -> float:
    """Return the largest value, or NaN if one is NaN, which Python's max may pass over."""
    return float(torch.tensor(values, dtype=torch.float64).max())


def largest_difference(engine: deepspeed.DeepSpeedEngine, theirs: dict[str, torch.Tensor]) -> float:
    """Return the largest difference of any parameter, relative to the largest value of its tensor."""
    largest = 0.0
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            scale = float(theirs[name].abs().max())
            largest = worst(largest, float((parameter.detach() - theirs[name]).abs().max()) / scale)
    return largest


def recipe_of(fields: tuple[str, ...], model: str | None = None) -> Recipe:
    """Return the demo's recipe with these fields.  model: its folder; None is a LLaVE's."""
    kind = json.loads(Path(model, "config.json").read_text())["model_type"] if model else "llava_onevision"
    common = [f"batch.global_batch={PAIRS}", "data.lanes=2", f"optimizer.lr={LR}", f"optimizer.eps={EPS}"]
    common += ["optimizer.weight_decay=0.1", "optimizer.max_grad_norm=1.0", "model.train.vision_tower=false"]
    return load_recipe(f"pipeline/recipes/{RECIPES[kind]}.yaml", [*common, *fields])


@dataclass(frozen=True)
class Expected:
    """One process's results with the whole batch: losses, gradient norms (whole, by part), and final parameters."""

    losses: list[float]
    norms: list[float]
    of_parts: list[dict[str, float]]
    temperatures: list[float]
    parameters: dict[str, torch.Tensor]


Key = TypeVar("Key")


def computed_once(keys: Iterable[Key], compute: Callable[[Key], Expected], folder: Path) -> dict[Key, Expected]:
    """Return `compute(key)` for every key, each computed once by one of the ranks, or by an earlier program.

    folder: where all ranks, and later programs, find the results.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    files = {key: folder / f"{hashlib.sha256(repr(key).encode()).hexdigest()}.pt" for key in keys}
    for number, (key, file) in enumerate(files.items()):
        if number % world == rank and not file.exists():
            with replacing(file, durable=False) as partial:  # another program may write the same
                torch.save(vars(compute(key)), partial)
    dist.barrier()
    return {key: Expected(**torch.load(file, weights_only=True)) for key, file in files.items()}


def expected(model: str, mix: str, fields: tuple[str, ...]) -> Expected:
    recipe = recipe_of(fields, model)
    family = training_of(recipe)
    processor, reference = family.processor(recipe, model), family.load_whole(recipe, model)

    def loss(step: int, temperature: torch.Tensor) -> torch.Tensor:
        parts = sub_batches(make_pairs(mix, seed=step), recipe)
        alpha = recipe.objective.alpha_at(step)
        of_parts = [formula(reference, part, processor, recipe.objective, temperature, alpha) for part in parts]
        return torch.stack(of_parts).mean()

    parts = {prefix: part for part, prefixes in recipe.model.train.parts().items() for prefix in prefixes}
    return trained_alone(reference, recipe, parts, loss)


def trained_alone(
    reference: torch.nn.Module,
    recipe: Recipe,
    parts: dict[str, str],
    loss: Callable[[int, torch.Tensor], torch.Tensor],
    factor: Callable[[str], float] = lambda name: 1.0,
    undecayed: str = "no name",
) -> Expected:
    """Take the steps in this process with plain autograd and AdamW.

    parts: maps prefixes of parameter names to the recipe's part names. loss: the loss of a step at a temperature.
    factor: of a parameter's learning rate, by name. undecayed: part of the names of matrices without weight decay.
    """
    freeze(reference, recipe)
    if recipe.model.train.adapters:
        add_adapters(reference.language_model, recipe.model.train.adapters, recipe.seed)
    trained = {name: p for name, p in reference.named_parameters() if p.requires_grad}
    groups = []
    for name, parameter in trained.items():
        rate = getattr(recipe.model.train, next(part for prefix, part in parts.items() if name.startswith(prefix)))
        decay = 0.1 if parameter.ndim > 1 and undecayed not in name else 0
        lr = factor(name) * (LR if rate is True else rate)
        groups.append({"params": [parameter], "weight_decay": decay, "lr": lr})
    optimizer = torch.optim.AdamW(groups, eps=EPS)
    log_scale = -torch.tensor(temperatures_of(recipe)).log()
    log_scale.requires_grad_(recipe.objective.learn_temperature)
    scale_optimizer = torch.optim.AdamW([log_scale], lr=LR, eps=EPS, weight_decay=0)
    losses, norms, of_parts = [], [], []
    for step in range(STEPS):
        value = loss(step, torch.exp(-log_scale))
        optimizer.zero_grad()
        scale_optimizer.zero_grad()
        value.backward()
        for parameter in trained.values():
            # Parameters that no item of the batch uses get a zero gradient, and weight decay.
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        losses.append(float(value.detach()))
        squares: dict[str, float] = defaultdict(float)
        for name, parameter in trained.items():
            part = next(part for prefix, part in parts.items() if name.startswith(prefix))
            squares[part] += float(parameter.grad.double().square().sum())
        of_parts.append({part: square**0.5 for part, square in squares.items()})
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)))
        optimizer.step()
        scale_optimizer.step()
    parameters = {name: parameter.detach() for name, parameter in reference.named_parameters()}
    return Expected(losses, norms, of_parts, torch.exp(-log_scale).tolist(), parameters)


def temperatures_of(recipe: Recipe) -> list[float]:
    """Return the temperature of all tasks but those in objective.temperatures, and then theirs by name."""
    of_tasks = recipe.objective.temperatures
    return [recipe.objective.temperature, *(of_tasks[task] for task in sorted(of_tasks))]


def reference_of(model: str, case: Case) -> tuple[str, str, tuple[str, ...]]:
    """Return the arguments of `expected`, which are equal for all cases with the same mathematical result."""
    return model, case.mix, tuple(field for field in case.fields if field not in (*FROZEN, CHECKPOINTING))


def compare(model: str, stage: str, case: Case, theirs: Expected) -> dict:
    cut = (f"batch.chunk_tokens={case.chunk_tokens}", f"batch.kept_chunks={case.kept_chunks}")
    recipe = recipe_of((f"deepspeed={stage}", *cut, *case.fields), model)
    tower = load_frozen(recipe, model, torch.device("cpu"))
    engine = build_engine(recipe, load_ds_config(recipe, dist.get_world_size()), model)
    return {"case": repr(case)} | differences(
        engine,
        recipe,
        theirs,
        training_of(recipe).processor(recipe, model),
        partial(make_pairs, case.mix),
        lambda: CachedFeatures(tower, recipe.batch.features_mb << 20) if tower else None,
    )


def differences(
    engine: deepspeed.DeepSpeedEngine,
    recipe: Recipe,
    theirs: Expected,
    processor: Processor,
    pairs_of: Callable[[int], list[Pair]],
    features: Callable[[], Features | None],
) -> dict[str, float]:
    """Take the steps through the engine; return its relative differences and the change of the temperature.

    pairs_of: returns the pairs of a step, for all ranks. features: created anew for each step.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    objective, result = Contrastive(recipe, engine.device), {"loss": 0.0, "grad_norm": 0.0, "part_norms": 0.0}
    of_parts = PartNorms(engine.basic_optimizer, list(theirs.of_parts[0]))
    for step in range(STEPS):
        pairs = pairs_of(step)
        own = batch_of(pairs[rank * len(pairs) // world : (rank + 1) * len(pairs) // world], processor)
        budget = Budget.of(recipe.batch, 512)
        ours = objective.step(engine, own, budget, step, lr=LR, features=features())
        loss = ours.loss.loss.detach().clone()
        dist.all_reduce(loss)
        result["loss"] = worst(result["loss"], abs(float(loss) / world / theirs.losses[step] - 1))
        result["grad_norm"] = worst(result["grad_norm"], abs(ours.grad_norm / theirs.norms[step] - 1))
        squares = torch.tensor(list(of_parts.take().values()), dtype=torch.float64)
        dist.all_reduce(squares)
        found = part_norms.norms(dict(zip(theirs.of_parts[step], squares.tolist(), strict=True)), ours.grad_norm)
        off = [abs(found[part] - norm) for part, norm in theirs.of_parts[step].items()] if len(found) > 1 else []
        result["part_norms"] = worst(result["part_norms"], *(each / theirs.norms[step] for each in off))
    tasks = sorted(recipe.objective.temperatures)
    ended = torch.as_tensor(objective.temperature.of(["", *tasks])).detach().expand(1 + len(tasks))
    result["temperature"] = float((ended / torch.tensor(theirs.temperatures) - 1).abs().max())
    result["learnt"] = float((ended - torch.tensor(temperatures_of(recipe))).abs().max())
    result["parameters"] = largest_difference(engine, theirs.parameters)
    engine.destroy()
    return result


def main() -> None:
    models, stage, out, references, *flags = sys.argv[1:]
    start_distributed(timeout_minutes=HANG_MINUTES)
    named = {"alone": ALONE, "offloaded": OFFLOADED, "shaped": SHAPED}
    named |= {f"few{part}": (*FEW, *ALIKE[part::3]) for part in range(3)}
    cases = next((named[flag] for flag in flags if flag in named), ALL)
    if "no-guard" in flags:
        # Without the guard, each rank runs the tower only for its own chunks that have an image.
        def unguarded(*arguments, **options):
            chunks = chunks_module.plan_chunks(*arguments, **options)
            return [replace(chunk, with_images=bool(chunk.packed.images)) for chunk in chunks]

        step_module.plan_chunks = unguarded
        cases = (Case(flags[1], 200),)
    first, *others = models.split(",")
    pairs = [(first, case) for case in cases]
    of_others = cases if cases is SHAPED else OTHERS if cases is ALL else OTHERS[:1]
    pairs += [
        (model, case) for model in others for case in of_others if model == others[-1] or case in (*OF_EACH, *SHAPED)
    ]
    kept = computed_once((reference_of(*pair) for pair in pairs), lambda key: expected(*key), Path(references))
    results = [compare(model, stage, case, kept[reference_of(model, case)]) for model, case in pairs]
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(results))
    end_distributed()


if __name__ == "__main__":
    main()
