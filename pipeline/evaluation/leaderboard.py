"""The file that the public MMEB leaderboard (https://huggingface.co/spaces/TIGER-Lab/MMEB-Leaderboard) takes."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from pipeline.evaluation.results import Result


def leaderboard(model: str, datasets: Mapping[str, Result | None]) -> dict[str, Any]:
    """What scores/MODEL.json holds there, with the image datasets alone.

    datasets: MMEB's 36 by name; None where one was not evaluated, which the file says as its authors' program does.
    What an evaluation does not know of a model is None, to be filled in by whoever hands it in.

    The layout is that of experiments/report_score_v2.py in https://github.com/TIGER-AI-Lab/VLM2Vec, and of the file
    that docs/mmebv2_reproduction/ there has from the leaderboard, where model_size is in billions of parameters.
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
    image = {name: _scores(result) if result else "FILE_N/A" for name, result in datasets.items()}
    return {"metadata": metadata, "metrics": {"image": image, "video": {}, "visdoc": {}}}


def _scores(result: Result) -> dict[str, float | int]:
    queries = sum(result.queries.values())
    return {"hit@1": result.score, "num_pred": queries, "num_data": queries}
