"""The file to submit to the public MMEB leaderboard (https://huggingface.co/spaces/TIGER-Lab/MMEB-Leaderboard)."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from pipeline.evaluation.results import DatasetResult


def leaderboard(model: str, datasets: Mapping[str, DatasetResult | None]) -> dict[str, Any]:
    """The content of its scores/MODEL.json, with the image datasets only.

    datasets: MMEB's 36 by name; None for one that was not evaluated, which is written as the authors' program does.
    Metadata that an evaluation does not know is None: fill it in before submitting.

    The layout is that of experiments/report_score_v2.py in https://github.com/TIGER-AI-Lab/VLM2Vec, and of the file
    from the leaderboard in docs/mmebv2_reproduction/ there, where model_size is in billions of parameters.
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
