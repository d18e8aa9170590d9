"""How the weight is spread over negatives, compared with sorting all of it."""

import pytest
import torch

from pipeline.objectives.contrastive.hardness import effective_number, hardest_share


@pytest.mark.parametrize("columns", [1, 7, 100, 101, 203, 1000])
def test_hardest_share_equals_that_of_sorted_weights(columns):
    generator = torch.Generator().manual_seed(columns)
    weights = torch.rand(6, columns, generator=generator, dtype=torch.float64) ** 8
    counts = torch.tensor([columns, columns - 1, (columns + 1) // 2, 1, 0, columns]).clamp(min=0)
    for row, count in zip(weights, counts, strict=True):
        row[torch.randperm(columns, generator=generator)[int(count) :]] = 0
    weights[5] = 1.0  # equal weights
    total = weights.sum(dim=1)
    found = hardest_share(weights, total, counts)
    for row, count, share in zip(weights, counts, found, strict=True):
        largest = row.sort(descending=True).values[: max(-(-int(count) // 100), 1)]
        expected = largest.sum() / row.sum() if row.any() else torch.zeros((), dtype=torch.float64)
        torch.testing.assert_close(share, expected)


def test_effective_number_counts_equal_weights():
    weights = torch.tensor([[2.0, 2.0, 2.0, 0.0], [5.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [3.0, 1.0, 0.0, 0.0]])
    found = effective_number(weights, weights.sum(dim=1))
    torch.testing.assert_close(found, torch.tensor([3.0, 1.0, 0.0, 1.6]))
