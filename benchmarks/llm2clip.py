"""Does a language model teach better than CLIP's own text tower? On synthetic images, from random weights.

    python benchmarks/llm2clip.py [--seeds 3] [--processes 2] [--folder DIR]

Each seed has its own synthetic images with captions. CLIP (demo_clip.yaml) trains both towers, with texts truncated to
77 tokens. LLM2CLIP trains a tiny decoder to distinguish captions (demo_caption.yaml), embeds the training captions with
it (pipeline.embed), and trains the same vision encoder with these vectors, for as many steps on the same images and
captions (demo_llm2clip.yaml). Both then retrieve among 300 images: by short captions, by long ones, and by Chinese
ones, which neither saw together with an image in training; the decoder saw them together with other captions.

R@1 counts a query as 1/k if k candidates, including the right one, are equally similar: a tower that reads the same 77
tokens of two captions has not distinguished them. All results stay in DIR; finished seeds are not repeated.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pipeline.config import EvaluationRun
from pipeline.evaluation import sets
from pipeline.evaluation.encode import embed_collection
from pipeline.evaluation.encoders import load_encoder
from pipeline.evaluation.store import MemoryStore
from pipeline.evaluation.tasks import Retrieval
from pipeline.jobs.program import command_line

CPU = torch.device("cpu")
SETS = ("short", "long", "chinese")
EQUAL = 1e-5  # smaller differences of similarities are rounding
MODELS = {"CLIP": "clip", "LLM2CLIP": "llm2clip"}


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, metavar="N")
    parser.add_argument("--processes", type=int, default=2, metavar="N")
    parser.add_argument("--folder", type=Path, default=Path("runs/llm2clip_benchmark"), metavar="DIR")
    arguments = parser.parse_args()
    results = [_of_seed(seed, arguments.folder / str(seed), arguments.processes) for seed in range(arguments.seeds)]
    print(_table(results))


def _of_seed(seed: int, folder: Path, processes: int) -> dict:
    done = folder / "results.json"
    if done.is_file():
        return json.loads(done.read_text())
    began = time.monotonic()
    world = folder / "world"
    if not world.exists():
        _run("tools/make_shards.py", "demo", str(seed), str(world))
    common = [f"data.url={world}/captions/train", f"seed={seed}"]

    def train(name: str, *overrides: str) -> None:
        _launch(processes, "pipeline.train", f"pipeline/recipes/demo_{name}.yaml", f"run={folder}/{name}", *overrides)

    separation = f"evaluation.urls=[{world}/captions/eval/separation]"
    train("caption", *common, separation)
    images, text_encoder = f"{world}/captions/train/images", f"{folder}/caption/export"
    _launch(processes, "pipeline.embed", text_encoder, "--shards", images)
    train("llm2clip", *common, f"model.text_encoder={text_encoder}")
    train("clip", *common)
    result = {"seed": seed, "separation": _separation(folder / "caption")}
    for name, run in MODELS.items():
        result[name] = {each: _recalls(folder / run / "export", f"{world}/captions/eval/{each}") for each in SETS}
    result["seconds"] = time.monotonic() - began
    done.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return result


def _separation(run: Path) -> dict[str, list[float]]:
    """Return {set: [Precision@1 before training, after training]}."""
    reports = [json.loads(path.read_text()) for path in sorted((run / "evaluation").glob("step-*.json"))]
    first, last = reports[0]["results"], reports[-1]["results"]
    return {name: [100 * first[name]["metrics"]["P@1"], 100 * last[name]["metrics"]["P@1"]] for name in first}


def _recalls(model: Path, url: str) -> dict[str, float]:
    """Return R@1 in percent by direction."""
    encoder = load_encoder(str(model), EvaluationRun(), CPU)
    collection = sets.load([f"text-image={url}"], instructed=encoder.instructed)
    store = MemoryStore(len(collection.items), encoder.dimension)
    embed_collection(encoder, collection, store)
    rows = store.take(np.arange(len(collection.items)))
    return {task.direction: _recall(task, rows) for task in collection.tasks if isinstance(task, Retrieval)}


def _recall(task: Retrieval, rows: np.ndarray) -> float:
    scores = rows[task.queries].astype(np.float64) @ rows[task.candidates].T
    return 100 * mean(_share(row, right) for row, right in zip(scores, task.right, strict=True))


def _share(scores: np.ndarray, right: np.ndarray) -> float:
    """Return the fraction of right candidates among the most similar ones."""
    best = np.flatnonzero(scores >= scores.max() - EQUAL)
    return float(np.isin(best, right).mean())


def _run(*command: str) -> None:
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, check=True)


def _launch(processes: int, module: str, *arguments: str) -> None:
    _run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m", module, *arguments)


def _table(results: list[dict]) -> str:
    lines = ["| R@1, % | " + " | ".join(f"{each} {way}" for each in SETS for way in ("t2i", "i2t")) + " |"]
    lines.append("|" + " --- |" * (1 + 2 * len(SETS)))
    for name in MODELS:
        cells = []
        for each in SETS:
            for way in ("t2i", "i2t"):
                values = [result[name][each][way] for result in results]
                cells.append(f"{mean(values):.1f} ({', '.join(f'{value:.1f}' for value in values)})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", "| captions told apart, P@1, % | before | after |", "| --- | --- | --- |"]
    for name in results[0]["separation"]:
        before, after = (mean(result["separation"][name][place] for result in results) for place in (0, 1))
        each = ", ".join(f"{result['separation'][name][1]:.1f}" for result in results)
        lines.append(f"| {name} | {before:.1f} | {after:.1f} ({each}) |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
