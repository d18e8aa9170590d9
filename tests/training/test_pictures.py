"""Pictures of queries and their hardest negatives: the items and similarities are those of the whole batch."""

import numpy as np
import pytest
import torch
from plain_loss import near, unit
from two_ranks import on_two_ranks

from pipeline.data.batch import Batch, Encoded, Origin
from pipeline.models.shown import View
from pipeline.training.pictures import NEGATIVES, QUERIES, Candidate, Row, _small, as_table, drawn, hardest

PAIRS, SIZE = 12, 16


def shown(item: Encoded) -> View:
    return View(str(item.input_ids[0]))


def vectors() -> torch.Tensor:
    """Return the vectors of items 0 to 4 * PAIRS - 1, by key: queries, targets, negatives, further positives."""
    query = unit(PAIRS, 6, seed=1)
    return torch.cat([query, near(query, 1.0, seed=2), near(query, 1.0, seed=3), near(query, 0.5, seed=4)]).float()


def global_pairs() -> list[dict]:
    """Pair 2 has the query of pair 0, pair 7 the target of pair 1; pair 3 is invalid; pair 0 has a further positive."""
    pairs = [
        {"query": i, "target": PAIRS + i, "negatives": (2 * PAIRS + i,), "positives": (), "valid": i != 3}
        for i in range(PAIRS)
    ]
    pairs[2]["query"], pairs[7]["target"], pairs[0]["positives"] = 0, PAIRS + 1, (3 * PAIRS,)
    return pairs


def rows_of(rank: int) -> list:
    pairs = global_pairs()[rank * PAIRS // 2 : (rank + 1) * PAIRS // 2]
    keys = dict.fromkeys(
        key for pair in pairs for key in (pair["query"], pair["target"], *pair["positives"], *pair["negatives"])
    )
    batch = Batch(
        items={key: Encoded(np.array([key], np.int32)) for key in keys},
        query=[pair["query"] for pair in pairs],
        target=[pair["target"] for pair in pairs],
        negatives=[pair["negatives"] for pair in pairs],
        valid=[pair["valid"] for pair in pairs],
        origins=[Origin("", i, i // 5) for i in range(len(pairs))],
        bad=[],
        received=0,
        positives=[pair["positives"] for pair in pairs],
        weights=[(1.0,)] * len(pairs),
        scores=[None] * len(pairs),
        tasks=[""] * len(pairs),
    )
    rows = hardest(batch, vectors()[list(keys)], shown)
    return [
        [int(row.query.text), [[each.similarity, int(each.view.text)] for each in (row.target, *row.negatives)]]
        for row in rows
    ]


def test_negatives_are_the_most_similar_of_all_ranks():
    first, second = on_two_ranks(rows_of)
    assert second == []  # the first rank draws
    pairs, x = global_pairs(), vectors().double()
    assert [query for query, _ in first] == [0, 5, 1, 0]  # datasets 0 and 1, then others, without the invalid pair
    for query, (target, *negatives) in [first[0], first[1], first[2]]:
        pair = pairs[query]
        assert target[1] == pair["target"]
        right = {pair["target"], *pair["positives"]}
        for other in pairs:
            if other["query"] == pair["query"] or other["target"] == pair["target"]:
                right |= {other["target"], *other["positives"]}
        candidates = {
            key
            for other in pairs
            if other["valid"]
            for key in (other["target"], *other["positives"], *other["negatives"])
        } - right
        expected = sorted(((float(x[query] @ x[key]), key) for key in candidates), reverse=True)[:NEGATIVES]
        assert [key for _, key in negatives] == [key for _, key in expected]
        assert [similarity for similarity, _ in (target, *negatives)] == pytest.approx(
            [float(x[query] @ x[target[1]]), *(similarity for similarity, _ in expected)], abs=1e-6
        )


def test_ranks_send_small_pictures_and_short_texts_and_survive_an_item_that_cannot_be_shown(caplog):
    item = Encoded(np.array([1], np.int32))
    large = _small(item, lambda item: View("a" * 99_999, np.zeros((3, 1000, 2000), np.uint8), 2.0))
    assert large.picture.nbytes < 3 * 188 * 120 and large.picture.shape == (3, 94, 188)
    assert len(large.text) == 1000
    assert _small(item, lambda item: View("a")) == View("a")
    assert _small(item, lambda item: 1 / 0) == View("(cannot be shown)")
    assert "division by zero" in caplog.text


def test_sheet_has_the_pictures_and_the_table_all_texts():
    red = np.zeros((3, SIZE, SIZE), np.uint8)
    red[0] = 255
    row = Row(View("where is it?", red, 2.0), Candidate(0.5, View("字" * 99)), [Candidate(0.9, View("a | b"))])
    sheet = drawn([row] * QUERIES)
    assert sheet.shape == (240 * QUERIES, 1000, 3) and sheet.dtype == np.uint8
    pure = (sheet == [255, 0, 0]).all(axis=2)
    heights, widths = pure.any(axis=1).sum(), pure.any(axis=0).sum()
    assert widths == 2 * heights / QUERIES  # the aspect ratio
    table = as_table([row]).splitlines()
    assert len(table) == 3 and len({line.replace("\\|", "").count("|") for line in table}) == 1
    assert "字" * 99 in table[2] and "**0.900** a \\| b" in table[2]


def test_blank_items_are_drawn():
    blank = View("")
    assert drawn([Row(blank, Candidate(0.0, blank), [])]).any()
