"""The gather and the backward pass of its gradient."""

import torch
from two_ranks import on_two_ranks

from pipeline.distributed import all_gather_constant, all_gather_rows, rank_and_world


def on_rank(rank: int) -> dict:
    x = (torch.arange(6.0).reshape(3, 2) + 10 * rank).requires_grad_()
    gathered = all_gather_rows(x, None)
    weights = torch.arange(12.0).reshape(6, 2) * (1 + rank)
    (gathered * weights).sum().backward()
    return {
        "world": rank_and_world(),
        "gathered": gathered.detach(),
        "grad": x.grad,
        "ids": all_gather_constant(torch.tensor([rank, -(2**63) + rank])),
        "mask": all_gather_constant(torch.tensor([True, rank == 1])),
        "columns": all_gather_constant(torch.arange(6).reshape(2, 3).T),  # not contiguous
    }


def test_two_processes_gather_rows_and_sum_gradients():
    zero, one = on_two_ranks(on_rank)
    assert (zero["world"], one["world"]) == ((0, 2), (1, 2))
    rows = torch.arange(6.0).reshape(3, 2)
    for result in (zero, one):
        torch.testing.assert_close(result["gathered"], torch.cat([rows, rows + 10]))
        assert result["ids"].tolist() == [0, -(2**63), 1, -(2**63) + 1]
        assert result["mask"].tolist() == [True, False, True, True]
        assert result["columns"].tolist() == [[0, 3], [1, 4], [2, 5]] * 2
    # Both ranks used every row: the gradient is rank 0's weights plus rank 1's, which are twice as large.
    weights = 3 * torch.arange(12.0).reshape(6, 2)
    torch.testing.assert_close(zero["grad"], weights[:3])
    torch.testing.assert_close(one["grad"], weights[3:])


def test_gather_without_process_group_is_the_identity():
    x = torch.ones(2, 3, requires_grad=True)
    assert rank_and_world() == (0, 1)
    assert all_gather_rows(x) is x
    assert all_gather_constant(x).data_ptr() == x.data_ptr()
    assert not all_gather_constant(x).requires_grad
