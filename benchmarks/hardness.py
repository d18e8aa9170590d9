"""What makes an embedder learn: hardness weighting, larger batches, a coach, mined negatives, neighbours, labels?

    python benchmarks/hardness.py --work runs/hardness [--seeds 3] [--steps 150] [--runs 2] [key=value ...]

Trains the demo's tiny LLaVE from random weights on its drawn scenes, whose hard candidates differ from the right one in
one attribute: a run for each variant and seed, `--runs` at a time, each one process with one thread. All runs read the
same shards, without the samples' own hard negatives, and differ only in the fields of VARIANTS. Two coaches are trained
first, with other seeds: one for three times as many steps, one without hardness weighting for as many as the runs.

Prints Precision@1 on the evaluation sets over the steps, mean and standard deviation over the seeds, and draws it with
the distributions of the similarities, as LLaVE's figure has them (arXiv 2503.04812), to WORK/hardness.png. Started
again, it continues where it stopped. key=value: fields of pipeline/recipes/demo.yaml for all runs.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pipeline.errors import PipelineError
from pipeline.evaluation.report import BINS, Report
from pipeline.jobs.program import command_line
from pipeline.progress import progress_bar

DATASETS = ("Scene-CLS", "Scene-I2T", "Scene-Ground")
BATCH = 128
EVALUATIONS = 3  # after as many equal parts of the steps
CLUSTER = 16  # samples in a cluster of neighbours
COACH, PLAIN_COACH = "coach", "coach without hardness"
COACH_SEED = 1000  # no run has it

PLAIN = "alpha 9"  # LLaVE's loss, with which the others are compared
REWARD = "objective.reward=teacher"
VARIANTS: dict[str, tuple[str, ...]] = {
    "alpha 0": ("objective.alpha=0",),
    "alpha 4": ("objective.alpha=4",),
    "alpha 9": (),
    "alpha 14": ("objective.alpha=14",),
    "alpha 0, 32 of the batch": ("objective.alpha=0", "batch.sub_batch=32"),
    "alpha 9, 32 of the batch": ("batch.sub_batch=32",),
    "alpha 9 by the coach": (REWARD, f"data.teacher={{{COACH}}}"),
    "alpha 9 by the coach without hardness": (REWARD, f"data.teacher={{{PLAIN_COACH}}}"),
    "alpha 9, mined negatives": ("data.negatives={mined}",),
    "alpha 9, neighbours": ("data.batches=neighbours", "data.neighbours={mined}"),
    "alpha 9, distillation": ("objective.distill.scores=teacher", f"data.teacher={{{COACH}}}"),
}
PANELS = {  # of the picture: the variants of each
    "hardness weighting": ("alpha 0", "alpha 4", "alpha 9", "alpha 14"),
    "negatives of the batch": (
        "alpha 0",
        "alpha 0, 32 of the batch",
        "alpha 9",
        "alpha 9, 32 of the batch",
    ),
    "another model's reward": ("alpha 9", "alpha 9 by the coach", "alpha 9 by the coach without hardness"),
    "other negatives, labels": ("alpha 9", "alpha 9, mined negatives", "alpha 9, neighbours", "alpha 9, distillation"),
}


@dataclass(frozen=True)
class Study:
    """The study's folder and sizes.  runs: how many at a time.  fields: of the recipe, for all runs."""

    work: Path
    seeds: int
    steps: int
    runs: int
    fields: tuple[str, ...]

    def run(self, name: str, *arguments: str) -> None:
        """Run a program of the project; its output goes to WORK/logs/NAME.txt."""
        log = self.work / "logs" / f"{_file(name)}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with log.open("ab") as file:
            failed = subprocess.run([sys.executable, *arguments], stdout=file, stderr=file, env=environment, cwd=ROOT)
        if failed.returncode:
            raise PipelineError(f"{name} failed: see {log}")

    def train(self, name: str, seed: int, steps: int, *fields: str) -> Path:
        """Train a model, unless it is trained already; return its run directory."""
        run = self.work / "runs" / f"{_file(name)}-{seed}"
        if not (run / "export" / "config.json").exists():
            settings = [
                f"data.url={self.work}/data/train",
                f"data.datasets=[{','.join(DATASETS)}]",
                "data.hard_negatives=false",
                f"evaluation.urls=[{self.work}/data/eval]",
                f"evaluation.every={max(steps // EVALUATIONS, 1)}",
                f"batch.global_batch={BATCH}",
                "batch.kept_chunks=1000",
                "deepspeed=ds_configs/zero0.json",
                "epochs=null",
                f"steps={steps}",
                f"seed={seed}",
                f"run={run}",
            ]
            self.run(run.name, "-m", "pipeline.train", "pipeline/recipes/demo.yaml", *settings, *self.fields, *fields)
        return run

    def once(self, name: str, work: Callable[[], None]) -> None:
        """Do work that is recorded as done in WORK/done."""
        done = self.work / "done" / _file(name)
        if not done.exists():
            work()
            done.parent.mkdir(parents=True, exist_ok=True)
            done.touch()


def _file(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower())


def require_same_options(study: Study) -> None:
    """Raise PipelineError if the folder has runs with other options; the number of seeds may grow."""
    options = {"steps": study.steps, "fields": list(study.fields)}
    file = study.work / "options.json"
    if file.exists() and (before := json.loads(file.read_text())) != options:
        raise PipelineError(f"{study.work} has runs with {before}, not {options}: choose another --work")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(options))


def prepare(study: Study) -> dict[str, str]:
    """Make the data, the coaches, their vectors and the mined negatives; return the places that VARIANTS name."""
    work, train = study.work, study.work / "data" / "train"

    def make_data() -> None:
        study.run("data", "tools/make_shards.py", "demo", "0", str(work / "data"))
        tasks = work / "data" / "eval" / "tasks.json"
        for folder in (*train.iterdir(), *tasks.parent.iterdir()):
            if folder.is_dir() and folder.name not in (*DATASETS, "images"):
                shutil.rmtree(folder)
        kept = {name: task for name, task in json.loads(tasks.read_text()).items() if name in DATASETS}
        tasks.write_text(json.dumps(kept))

    study.once("data", make_data)
    coaches = {COACH: (3 * study.steps, ()), PLAIN_COACH: (study.steps, ("objective.alpha=0",))}

    def coach(item: tuple[str, tuple[int, tuple[str, ...]]]) -> tuple[str, str]:
        name, (steps, fields) = item
        run, place = study.train(name, COACH_SEED, steps, *fields), work / "vectors" / _file(name)
        embed = ("-m", "pipeline.embed", f"{run}/export", "--shards", str(train), "--items", "--out", str(place))
        study.once(f"vectors of {name}", lambda: study.run(f"vectors of {name}", *embed))
        return name, str(place)

    with ThreadPoolExecutor(study.runs) as pool:
        places = dict(pool.map(coach, coaches.items()))
    mined, export = work / "mined", study.work / "runs" / f"{COACH}-{COACH_SEED}" / "export"
    mine = ("-m", "pipeline.mine", str(export), str(train), f"teacher={places[COACH]}", f"out={mined}")
    study.once("mined", lambda: study.run("mined", *mine, "count=2", f"clusters={CLUSTER}"))
    return places | {"mined": str(mined)}


def train_all(study: Study, places: dict[str, str]) -> None:
    """Train all variants with all seeds. The first seed of every variant comes first."""
    runs = [(name, seed) for seed in range(study.seeds) for name in VARIANTS]

    def one(run: tuple[str, int]) -> None:
        name, seed = run
        study.train(name, seed, study.steps, *(field.format(**places) for field in VARIANTS[name]))

    with (
        ThreadPoolExecutor(study.runs) as pool,
        progress_bar(total=len(runs), desc="training", unit="run") as bar,
    ):
        for _ in pool.map(one, runs):
            bar.update()


def reports_of(study: Study, name: str) -> list[dict[int, Report]]:
    """Return each seed's reports by step."""
    found = []
    for seed in range(study.seeds):
        folder = study.work / "runs" / f"{_file(name)}-{seed}" / "evaluation"
        files = sorted(folder.glob("step-*.json"))
        found.append({int(file.stem.removeprefix("step-")): Report.read(file) for file in files})
    return found


def scores_of(reports: list[dict[int, Report]]) -> tuple[list[int], np.ndarray]:
    """Return the evaluated steps, and Precision@1 in percent, (seeds, steps)."""
    steps = list(reports[0])
    return steps, np.array([[100 * of_seed[step].score for step in steps] for of_seed in reports])


def table(study: Study) -> str:
    """Return Precision@1 over the steps as a Markdown table: mean ± standard deviation over the seeds.

    The last step's is also compared with PLAIN's, seed by seed: the same initial weights, samples and order.
    """
    lines: list[str] = []
    plain = scores_of(reports_of(study, PLAIN))[1][:, -1]
    for name in VARIANTS:
        reports = reports_of(study, name)
        steps, scores = scores_of(reports)
        if not lines:
            lines.append("| | " + " | ".join(f"{step} steps" for step in steps[1:]) + f" | minus {PLAIN} | overlap |")
            lines.append("|---|" + "---:|" * (len(steps) + 1))
        cells = [_spread(of) for of in scores.T[1:]]
        cells.append("" if name == PLAIN else _spread(scores[:, -1] - plain))
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {_overlap(reports, steps[-1]):.2f} |")
    return "\n".join(lines)


def _spread(of: np.ndarray) -> str:
    return f"{of.mean():.1f} ± {of.std(ddof=1) if len(of) > 1 else 0:.1f}"


def _overlap(reports: list[dict[int, Report]], step: int) -> float:
    """Return the mean common area of the distributions of positive and hardest negative similarities."""
    found = [result.similarities.overlap for of in reports for result in of[step].results.values()]
    return float(np.mean(found))


def draw(study: Study, path: Path) -> None:
    """Draw Precision@1 over the steps, a panel for each of PANELS, and below it the similarities of four variants.

    The bands are from the lowest to the highest seed.
    """
    matplotlib.rcParams["font.size"] = 8
    figure = Figure(figsize=(12, 5.6), layout="constrained")
    axes = figure.subplots(2, len(PANELS), sharey="row")
    for axis, (title, names) in zip(axes[0], PANELS.items(), strict=True):
        for name in names:
            steps, scores = scores_of(reports_of(study, name))
            (line,) = axis.plot(steps, scores.mean(axis=0), marker=".", label=name)
            axis.fill_between(steps, scores.min(axis=0), scores.max(axis=0), color=line.get_color(), alpha=0.15)
        axis.set(title=title, xlabel="steps")
        axis.legend(fontsize=6.5, loc="lower right")
    axes[0, 0].set_ylabel("Precision@1, %")
    middle = (BINS[1:] + BINS[:-1]) / 2
    shown = ("alpha 0", PLAIN, "alpha 9 by the coach", "alpha 9 by the coach without hardness")
    for axis, name in zip(axes[1], shown, strict=True):
        reports = reports_of(study, name)
        last = [of[max(of)] for of in reports]
        results = [result.similarities for report in last for result in report.results.values()]
        for kind, colour in (("positive", "#0072b2"), ("hardest_negative", "#d55e00")):
            counts = np.sum([getattr(each, kind) for each in results], axis=0)
            axis.fill_between(middle, counts / counts.sum(), step="mid", alpha=0.5, color=colour, label=kind)
        axis.set(title=f"{name}\noverlap {_overlap(reports, max(reports[0])):.2f}", xlabel="similarity", xlim=(0, 1))
        axis.legend(["right answer", "hardest wrong one"], fontsize=6.5, loc="upper left")
    axes[1, 0].set_ylabel("share of queries")
    figure.savefig(path, dpi=150)


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for data, runs and results; may exist")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each variant (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=150, help="optimizer steps of a run (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=os.cpu_count() or 1, help="at a time (default: one per core)")
    parser.add_argument("fields", nargs="*", metavar="key=value", help="of pipeline/recipes/demo.yaml, for all runs")
    given = parser.parse_args()
    study = Study(given.work.resolve(), given.seeds, given.steps, given.runs, tuple(given.fields))
    require_same_options(study)
    train_all(study, prepare(study))
    print(table(study))
    draw(study, study.work / "hardness.png")
    print(f"picture: {study.work / 'hardness.png'}")


if __name__ == "__main__":
    main()
