"""The file to submit to the public MMEB leaderboard (https://huggingface.co/spaces/TIGER-Lab/MMEB-Leaderboard)."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from pipeline.evaluation.results import DatasetResult


def leaderboard(model: str, datasets: Mapping[str, DatasetResult | None]) -> dict[str, Any]:
    """Return the content of the leaderboard's scores/MODEL.json, for the image datasets only.

    datasets: MMEB's 36 datasets by name; None for one that was not evaluated, written as in the authors' program.
    Metadata that an evaluation does not know is None: fill it in before submitting.

    The layout follows experiments/report_score_v2.py in https://github.com/TIGER-AI-Lab/VLM2Vec, and the leaderboard's
    file in docs/mmebv2_reproduction/ there, where model_size is in billions of parameters.
    """
    metadata = {
        "model_name": model,
        "model_backbone": None,
        "model_size": None,
        "embedding_dimension": None,
        "max_length_tokens": None,
        "model_release_date": None,
        "data_source": "Self-Reported",
        "url": None,
        "report_generated_date": datetime.now().isoformat(),
    }
    image: dict[str, Any] = dict.fromkeys(datasets, "FILE_N/A")
    for name, result in datasets.items():
        if result:
            queries = sum(result.queries.values())
            image[name] = {"hit@1": result.score, "num_pred": queries, "num_data": queries}
    return {"metadata": metadata, "metrics": {"image": image, "video": {}, "visdoc": {}}}
