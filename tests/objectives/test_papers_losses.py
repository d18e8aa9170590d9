"""The loss compared with those of the papers' published code (tests/papers), on one process and on two.

What their ranks save are gradients by their own embeddings, through a gather whose backward pass sums over ranks: those
of the SUM of the ranks' losses. DDP and DeepSpeed divide parameters' gradients by the number of ranks W, so a step
applies the gradient of the losses' MEAN, which is the global batch's loss. Hence each saved gradient is W times the
gradient of the global batch's loss. So are ours, since an engine averages them too.

In LLM2CLIP's first stage all ranks compute the whole batch's loss; else each computes that of its own rows, as ours do.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from two_ranks import on_two_ranks

from pipeline.objectives.contrastive.loss import hardness_weighted_loss

PAPERS = Path(__file__).parents[1] / "papers"
BATCHES, SCALE = 3, 50.0

# The originals computed in float32, where a logit up to 50 is off by up to 50 * 2**-24, which is its exponential's
# relative error. Ours are computed in float64 here, so that the comparison is the same on every processor.
RELATIVE = 5e-6
# A gradient is the difference of two probabilities, near one where a batch is solved, times scale / rows: each is
# rounded to 2**-23 relative. In stage 1's solved batch without negatives, all gradients are below 4e-3, and the
# original's are 2e-5 relative off those of float64 (ours in float32: 8e-7).
ABSOLUTE = 2**0.5 * 2**-23 * SCALE / 8


@dataclass(frozen=True)
class Case:
    """A variant of an original loss.  file: its golden file.  sides: the inputs' names.  options: of our loss."""

    file: str
    name: str
    sides: tuple[str, ...]
    options: dict[str, Any]
    unit: bool = True  # whether the inputs are unit rows; else the loss normalises them
    whole: bool = False  # whether each rank's loss is that of the whole batch
    log_scale: float | None = None  # a parameter, if the scale is learned


def cases() -> list[Case]:
    stage1 = {"alpha": 0.0, "temperature": 1 / SCALE, "directions": "query"}
    logit_scale = json.loads((PAPERS / "llm2clip/stage2_loss.json").read_text())["logit_scale"]
    return [
        Case("llm2clip/stage1_loss", "negatives", ("query", "positive", "negative"), stage1, False, True),
        Case("llm2clip/stage1_loss", "no_negatives", ("query", "positive"), stage1, False, True),
        *(
            Case("llm2clip/stage2_loss", name, ("image", "text"), {"alpha": 0.0}, log_scale=value)
            for name, value in logit_scale.items()
        ),
        *(
            Case("llave/loss", f"alpha{alpha}", ("query", "target"), {"alpha": alpha, "temperature": 1 / SCALE})
            for alpha in (9, 0)
        ),
    ]


CASES = {f"{case.file} {case.name}": case for case in cases()}


def ours(case: Case, batch: int, ranks: list[int]) -> dict[str, torch.Tensor]:
    """Return the loss and its gradients in this process, on the rows of these ranks."""
    given = load_file(PAPERS / f"{case.file}.safetensors")
    leaves = {
        side: torch.cat([given[f"batch{batch}.rank{rank}.{side}"] for rank in ranks]).double().requires_grad_()
        for side in case.sides
    }
    query, target, *negatives = (x if case.unit else F.normalize(x, dim=-1) for x in leaves.values())
    options = dict(case.options)
    if case.log_scale is not None:
        leaves["logit_scale"] = torch.tensor(case.log_scale, dtype=torch.float64, requires_grad=True)
        options["temperature"] = torch.exp(-leaves["logit_scale"])
    loss = hardness_weighted_loss(query, target, negatives=negatives[0] if negatives else None, **options).loss
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return {"loss": loss.detach(), **dict(zip(leaves, gradients, strict=True))}


def theirs(case: Case, batch: int, rank: int, world: int) -> dict[str, torch.Tensor]:
    """Return the loss and gradients that the original code computed on a rank."""
    found = json.loads((PAPERS / f"{case.file}.json").read_text())
    key = f"world{world}.rank{rank}.batch{batch}.{case.name}"
    values = found["values"][key] if "values" in found else {"loss": found["losses"][key]}
    tensors = load_file(PAPERS / f"{case.file}.safetensors")
    numbers = {"loss": "loss"} | ({} if case.log_scale is None else {"logit_scale": "logit_scale_gradient"})
    scalars = {name: torch.tensor(values[stored], dtype=torch.float64) for name, stored in numbers.items()}
    return scalars | {side: tensors[f"{key}.{side}_gradient"].double() for side in case.sides}


def assert_near(actual: torch.Tensor, original: torch.Tensor) -> None:
    allowed = max(RELATIVE * float(original.abs().max()), ABSOLUTE)
    torch.testing.assert_close(actual, original, rtol=0, atol=allowed)


@pytest.mark.parametrize("batch", range(BATCHES))
@pytest.mark.parametrize("name", CASES)
def test_one_process_equals_the_original(name, batch):
    mine, original = ours(CASES[name], batch, [0]), theirs(CASES[name], batch, 0, 1)
    assert mine.keys() == original.keys()
    for key in original:
        assert_near(mine[key], original[key])


def on_rank(rank: int) -> dict:
    return {name: [ours(case, batch, [rank]) for batch in range(BATCHES)] for name, case in CASES.items()}


@pytest.fixture(scope="module")
def of_two_ranks() -> list[dict]:
    return on_two_ranks(on_rank)


@pytest.mark.parametrize("batch", range(BATCHES))
@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_the_original(of_two_ranks, name, batch):
    case = CASES[name]
    mine = [results[name][batch] for results in of_two_ranks]
    original = [theirs(case, batch, rank, 2) for rank in range(2)]
    for side in case.sides:
        for rank in range(2):
            assert_near(mine[rank][side], original[rank][side])
    # Ranks may divide these differently; a step uses their mean.
    for key in {"loss", "logit_scale"} & original[0].keys():
        assert_near((mine[0][key] + mine[1][key]) / 2, (original[0][key] + original[1][key]) / 2)
    if not case.whole:
        for rank in range(2):
            assert_near(mine[rank]["loss"], original[rank]["loss"])


@pytest.mark.parametrize("batch", range(BATCHES))
@pytest.mark.parametrize("name", CASES)
def test_average_over_the_originals_ranks_is_the_whole_batchs_gradient(name, batch):
    case = CASES[name]
    mine, original = ours(case, batch, [0, 1]), [theirs(case, batch, rank, 2) for rank in range(2)]
    for side in case.sides:
        # A parameter's gradient is the sum of its embeddings' on each rank; the engine divides the ranks' sum by two.
        assert_near(2 * mine[side], torch.cat([each[side] for each in original]))
    for key in {"loss", "logit_scale"} & original[0].keys():
        assert_near(mine[key], (original[0][key] + original[1][key]) / 2)
