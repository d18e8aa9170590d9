"""Scores of a task, as MMEB counts them."""

import numpy as np
import torch

from pipeline.evaluation.tasks import Task


def candidate_similarities(task: Task, embeddings: torch.Tensor) -> list[np.ndarray]:
    """Similarities of each query to its candidates, float32, in the candidates' order: the right one first.

    embeddings: (items of the collection, hidden), unit rows.
    """
    columns, places = np.unique(np.concatenate(task.candidates), return_inverse=True)
    queries = torch.as_tensor(task.queries, device=embeddings.device)
    scores = embeddings[queries] @ embeddings[torch.as_tensor(columns, device=embeddings.device)].T
    cuts = np.cumsum([len(candidates) for candidates in task.candidates])[:-1]
    rows = zip(scores.cpu().numpy(), np.split(places, cuts), strict=True)
    return [row[chosen] for row, chosen in rows]


def precision_at_1(similarities: list[np.ndarray]) -> tuple[float, int]:
    """(share of queries whose first candidate, the right one, ranks first; queries where another equals it).

    As published, only a candidate that scores strictly higher makes it wrong, so ties are told.
    """
    best = [(row[0], row[1:].max(initial=-np.inf)) for row in similarities]
    hits = sum(right >= other for right, other in best)
    return hits / len(best), sum(bool(right == other) for right, other in best)
