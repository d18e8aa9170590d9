"""Scores compared with manual cases, an independent library, and exact sums."""

import math
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.retrieval import retrieval_hit_rate, retrieval_reciprocal_rank

from pipeline.errors import PipelineError
from pipeline.evaluation import metrics
from pipeline.evaluation.exact import fixed
from pipeline.evaluation.metrics import Scores, result_of, scores_of, worst_queries
from pipeline.evaluation.report import Case, Shown, Similarities
from pipeline.evaluation.tasks import Ranking, Retrieval

# The 16 unit vectors (+-1/2, +-1/2, +-1/2, +-1/2). Their similarities are -1, -0.5, 0, 0.5 and 1, with many ties.
CORNERS = np.array(list(product((-0.5, 0.5), repeat=4)), np.float32)


def ranking(queries: list[int], candidates: list[list[int]]) -> Ranking:
    return Ranking("Set", "vqa", True, np.array(queries), [np.array(rows) for rows in candidates])


def retrieval(queries: list[int], candidates, right: list[list[int]], direction: str = "t2i", kind="text-image"):
    return Retrieval(
        "Set", kind, direction, "en", np.array(queries), np.array(candidates), [np.array(r, np.int64) for r in right]
    )


def taking(rows: np.ndarray):
    return lambda numbers: rows[numbers]


def at(*similarities: float) -> np.ndarray:
    """Return vectors in the plane: row 0, and rows with these similarities to row 0."""
    return np.array([[1, 0], *([s, math.sqrt(1 - s * s)] for s in similarities)], np.float32)


def assert_scores(scores: Scores, **expected) -> None:
    for name, values in expected.items():
        np.testing.assert_array_equal(getattr(scores, name), np.array(values), err_msg=name)


def test_first_ranking_candidate_is_right():
    rows = at(0.2, 0.4, 0.4, 0.6)  # rows 2 and 3 are equal
    task = ranking([0] * 6, [[4, 1, 2], [2, 1, 3], [2, 4, 3], [1, 2, 4, 3], [3], [2, 2]])
    assert_scores(
        scores_of(task, taking(rows)),
        rank=[1, 1, 2, 4, 1, 1],
        tied=[False, True, True, False, False, True],  # the third query has one equal and one better candidate
        positive=np.float32([0.6, 0.4, 0.4, 0.2, 0.4, 0.4]),
        hardest=np.float32([0.4, 0.4, 0.6, 0.6, -math.inf, 0.4]),
        right=[0] * 6,
        first=[0, 0, 1, 2, 0, 0],
        chance=np.mean([1 / 3, 1 / 3, 1 / 3, 1 / 4, 1, 1 / 2]),
    )


def test_best_of_several_right_candidates_counts():
    rows = at(0.2, 0.4, 0.4, 0.6, 0.8)
    candidates = [5, 1, 4, 2, 3]
    right = [[0, 2], [1, 3], [4, 3], [1], [0, 1, 2, 3, 4], [2, 2, 1]]
    assert_scores(
        scores_of(retrieval([0] * 6, candidates, right), taking(rows)),
        rank=[1, 3, 3, 5, 1, 2],
        tied=[False, True, False, False, False, False],
        positive=np.float32([0.8, 0.4, 0.4, 0.2, 0.8, 0.6]),
        hardest=np.float32([0.4, 0.8, 0.8, 0.8, -math.inf, 0.8]),
        right=[0, 3, 3, 1, 0, 2],  # the lowest number among equals
        first=[0, 0, 0, 0, 0, 0],
        chance=np.mean([2 / 5, 2 / 5, 2 / 5, 1 / 5, 1, 2 / 5]),
    )


def assert_as_torchmetrics(scores: Scores, pairs: list[tuple[list[float], set[int]]]) -> None:
    """Compare with torchmetrics. pairs: for each query the candidates' similarities, and the right candidates."""
    hits: dict[int, list[float]] = {1: [], 5: [], 10: []}
    for query, (row, right) in enumerate(pairs):
        wrong = {number: s for number, s in enumerate(row) if number not in right}
        positive, hardest = max(row[number] for number in right), max(wrong.values(), default=-math.inf)
        assert (scores.positive[query], scores.hardest[query]) == (positive, hardest)
        assert scores.tied[query] == (positive in wrong.values())
        assert scores.right[query] == min(number for number in right if row[number] == positive)
        best = [number for number, s in wrong.items() if s == hardest]
        assert scores.first[query] == (scores.right[query] if hardest <= positive else best[0])
        # torchmetrics needs positive values without ties. Similarities are multiples of 0.5, so adding 0.1 lets only
        # strictly better candidates precede a right one.
        is_right = torch.tensor([number in right for number in range(len(row))])
        raised = 2 + torch.tensor(row) + 0.1 * is_right
        assert retrieval_reciprocal_rank(raised, is_right).item() == pytest.approx(1 / scores.rank[query])
        for k, found in hits.items():
            found.append(retrieval_hit_rate(raised, is_right, top_k=k).item())
    for k, found in hits.items():
        assert metrics.recall_at(scores, k) == pytest.approx(np.mean(found))


corner = st.integers(0, 15)
tile_bytes = st.sampled_from([1, 700, 1 << 20])
checked = settings(max_examples=60, derandomize=True)


@checked
@given(st.data(), st.lists(corner, min_size=1, max_size=5), st.lists(corner, min_size=1, max_size=20), tile_bytes)
def test_retrieval_agrees_with_torchmetrics(data, queries, candidates, tile_bytes):
    number = st.integers(0, len(candidates) - 1)
    right = [data.draw(st.lists(number, min_size=1, max_size=4)) for _ in queries]
    scores = scores_of(retrieval(queries, candidates, right), taking(CORNERS), tile_bytes=tile_bytes)
    similarities = (CORNERS[queries] @ CORNERS[candidates].T).tolist()
    assert_as_torchmetrics(scores, list(zip(similarities, map(set, right), strict=True)))


@checked
@given(st.lists(st.tuples(corner, st.lists(corner, min_size=1, max_size=15)), min_size=1, max_size=70), tile_bytes)
def test_ranking_agrees_with_torchmetrics(rows, tile_bytes):
    queries, lists = zip(*rows, strict=True)
    scores = scores_of(ranking(queries, lists), taking(CORNERS), tile_bytes=tile_bytes)
    pairs = [((CORNERS[query] @ CORNERS[list_].T).tolist(), {0}) for query, list_ in rows]
    assert_as_torchmetrics(scores, pairs)


def unit(count: int, dimension: int, seed: int = 0) -> np.ndarray:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, dimension, generator=generator), dim=1).numpy()


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.slow
def test_identical_embeddings_tie_for_any_tile_and_thread_count(threads):
    """In a plain float32 product, some similarities differ in the last digit."""
    distinct = unit(24, 333)
    rows = np.tile(distinct, (9, 1))  # items i and i + 24 n are equal
    queries = list(range(24))
    # The right candidates are at the end, where a tile may be incomplete; their copies are everywhere.
    flat = retrieval(queries, range(24, 9 * 24), [[8 * 24 - 24 + (q + 1) % 24] for q in queries])
    listed = ranking(queries, [[8 * 24 + (q + 1) % 24, *range(24 + q, 8 * 24)] for q in queries])
    for task in (flat, listed):
        all_scores = []
        for count, size in ((1, 1), (1, 111_111), (2, 30_000), (2, 1 << 28)):
            threads(count)
            all_scores.append(scores_of(task, taking(rows), tile_bytes=size))
        assert all_scores[0].tied.all()
        similar = np.array([math.fsum(a * b) for a, b in zip(*exact(distinct[queries], distinct[1:]), strict=False)])
        np.testing.assert_array_equal(all_scores[0].positive[:23], similar.astype(np.float32))
        for other in all_scores[1:]:
            assert_scores(other, **vars(all_scores[0]))


def exact(*rows: np.ndarray) -> tuple[np.ndarray, ...]:
    return tuple(np.round(each.astype(np.float64) * 2**26) / 2**26 for each in rows)


def test_similarity_is_independent_of_dimension_order():
    """In plain float64 it changes by about 1e-17, which can change the last digit after rounding to float32."""
    rows = torch.from_numpy(unit(64, 1000)).double()
    orders = [torch.randperm(1000, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    plain = [rows[:, order] @ rows[:, order].T for order in orders]
    assert not all(torch.equal(plain[0], each) for each in plain)
    rounded = [fixed(rows[:, order]) for order in orders]
    ours = [each @ each.T for each in rounded] + [(rounded[0][:, None] * rounded[0]).cumsum(dim=2)[..., -1]]
    assert all(torch.equal(ours[0], each) for each in ours)
    assert (ours[0] - plain[0]).abs().max() < 3e-8


def test_float32_holds_exact_similarities_too():
    """Numbers of 1/4 and more are multiples of 2^-26 in float32; smaller ones are rounded to such."""
    rows = torch.from_numpy(unit(200, 40))
    rows[0, 0], rows[0, 1] = 1.0, 2.0**-27 + 2.0**-30
    wide = fixed(rows.double())
    ours = fixed(rows)
    assert ours.dtype == torch.float32
    assert torch.equal(ours.double(), wide)
    assert ours[0, :2].tolist() == [1, 2.0**-26]


def test_candidate_of_several_items_is_their_mean():
    rows = unit(40, 24)
    classes = np.arange(10, 40).reshape(10, 3)
    classes[7] = classes[2][[1, 2, 0]]  # the same prompts as class 2
    task = retrieval(list(range(10)), classes, [[n] for n in range(10)], "", "classification")
    means = rows[classes].astype(np.float64).mean(axis=1)
    similar = rows[:10] @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T
    scores = scores_of(task, taking(rows))
    np.testing.assert_allclose(scores.positive, np.diag(similar), rtol=0, atol=1e-7)
    assert scores.tied.tolist() == [n in (2, 7) for n in range(10)]
    higher = similar > np.diag(similar)[:, None] + 1e-6
    np.testing.assert_array_equal(scores.rank, 1 + higher.sum(axis=1))
    for size in (1, 5000):
        assert_scores(scores_of(task, taking(rows), tile_bytes=size), **vars(scores))
    opposite = np.array([[1, 0], [1, 0], [-1, 0]], np.float32)  # a mean of zero has similarity 0 to everything
    assert scores_of(retrieval([0], [[1, 2]], [[0]]), taking(opposite)).positive == 0


def test_embeddings_read_at_once_are_bounded():
    rows, taken = unit(3000, 64), []

    def take(numbers: np.ndarray) -> np.ndarray:
        taken.append(len(numbers))
        return rows[numbers]

    queries = list(range(1000))
    for task in (
        retrieval(queries, range(3000), [[q] for q in queries]),
        retrieval(queries, np.arange(3000).reshape(750, 4), [[q % 750] for q in queries]),
        ranking(queries, [range(q, q + 1500) for q in queries]),
    ):
        taken.clear()
        scores_of(task, take, tile_bytes=1 << 17)
        assert max(taken) <= (1 << 17) / (16 * 64)


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0, 0.9])
@pytest.mark.parametrize(
    "task",
    [ranking([0, 1], [[2, 3], [4, 5]]), retrieval([0, 1], [2, 3, 4, 5], [[0], [1]]), retrieval([0], [[2, 4]], [[0]])],
)
def test_non_unit_embedding_error_names_item(task, value):
    rows = np.tile(np.float32([1, 0]), (6, 1))
    rows[4, 0] = value
    with pytest.raises(PipelineError, match=r"^Set: the embedding of item 4 has length "):
        scores_of(task, taking(rows))


def test_task_without_queries_or_right_candidate_is_refused():
    with pytest.raises(PipelineError, match="Set has no queries"):
        scores_of(ranking([], []), taking(CORNERS))
    with pytest.raises(PipelineError, match="Set: query 1 has no right candidate"):
        scores_of(retrieval([0, 1], [2, 3], [[0], []]), taking(CORNERS))


def scores(rank: list[int], tied: int = 0, positive=0.5, hardest=0.25, chance: float = 0.1) -> Scores:
    count = len(rank)
    return Scores(
        rank=np.array(rank),
        tied=np.arange(count) < tied,
        positive=np.broadcast_to(np.float32(positive), count),
        hardest=np.broadcast_to(np.float32(hardest), count),
        right=np.zeros(count, np.int64),
        first=np.zeros(count, np.int64),
        chance=chance,
    )


def test_worst_queries_are_sorted_stably_by_margin():
    some = scores([1] * 5, positive=[0.5, 0.25, 0.75, 0.25, 0.5], hardest=[0.25, 0.5, 0.5, 0.5, -math.inf])
    assert worst_queries(some, 4).tolist() == [1, 3, 0, 2]
    assert worst_queries(some, 9).tolist() == [1, 3, 0, 2, 4]
    many = scores([1] * 1000, positive=np.tile([0.5, 0.4], 500))
    assert worst_queries(many, 1000).tolist() == [*range(1, 1000, 2), *range(0, 1000, 2)]


WORST = [Case(Shown("q"), Shown("r"), Shown("f"), 0.1, 0.2, 2)]


def test_mmeb_dataset_result():
    result = result_of([ranking([0], [[1]])], [scores([1, 2, 1, 9], tied=2)], WORST)
    assert (result.group, result.in_distribution, result.language, result.queries) == ("vqa", True, "", {"": 4})
    assert result.metrics == {"P@1": 0.5}
    assert (result.score, result.chance, result.ties, result.worst) == (0.5, 0.1, 2, WORST)
    assert result.similarities == Similarities.of(np.full(4, 0.5), np.full(4, 0.25))


def test_two_direction_result_lists_text_queries_first():
    back, forth = (retrieval([0], [1], [[0]], direction, "text-video") for direction in ("v2t", "t2v"))
    of_back, of_forth = scores([1, 11], 1, hardest=0.75, chance=0.5), scores([1, 2, 5, 6, 10, 11], 2)
    result = result_of([back, forth], [of_back, of_forth], [])
    assert (result.group, result.in_distribution, result.language) == ("text-video", None, "en")
    assert result.queries == {"t2v": 6, "v2t": 2}
    shares = {"R@1": (1 / 6, 1 / 2), "R@5": (3 / 6, 1 / 2), "R@10": (5 / 6, 1 / 2), "MdR": (5.5, 6), "MnR": (35 / 6, 6)}
    expected = [(f"{way} {name}", both[i]) for i, way in enumerate(("t2v", "v2t")) for name, both in shares.items()]
    assert list(result.metrics.items()) == [(name, pytest.approx(value)) for name, value in expected]
    assert (result.chance, result.ties) == (0.1, 3)
    assert result.similarities == Similarities.of(np.full(8, 0.5), np.array([0.25] * 6 + [0.75] * 2))


def test_classification_result():
    task = retrieval([0], [[1, 2]], [[0]], "", "classification")
    result = result_of([task], [scores([1, 5, 6, 7])], [])
    assert (result.group, result.language, result.queries) == ("zero-shot classification", "en", {"": 4})
    assert result.metrics == {"top-1": 0.25, "top-5": 0.5}
