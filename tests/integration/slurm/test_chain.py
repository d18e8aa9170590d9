"""Conversion, training, evaluation and report as jobs; and every script checked by sbatch and shellcheck."""

import os
import re
import shutil
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from cluster import ROOT, SlurmFailure
from limits import HANG_MINUTES

from pipeline.data.index import Index
from pipeline.evaluation.report import Report

SCRIPTS = sorted((ROOT / "slurm").glob("*.sh"))
SUBMITTED = [path for path in SCRIPTS if "#SBATCH" in path.read_text()]


@pytest.fixture
def site(tmp_path) -> dict[str, str]:
    """Return the environment for submitting, as on a site without GPUs. Jobs write outside the repository."""
    file = tmp_path / "site.env"
    file.write_text("export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1\n")
    return {
        "SITE_ENV": str(file),
        "SBATCH_OUTPUT": str(tmp_path / "%x-%A_%a.out"),
        "SBATCH_GPUS_PER_NODE": "0",
    }


@pytest.mark.parametrize("script", SUBMITTED, ids=lambda path: path.name)
def test_sbatch_accepts_every_script(slurm, script):
    slurm.run("sbatch", "--test-only", str(script))


def test_shellcheck_reports_nothing():
    if not shutil.which("shellcheck") and not os.environ.get("PIPELINE_REQUIRE_SLURM"):
        pytest.skip("no shellcheck here: apt-get install shellcheck")
    files = [*SCRIPTS, ROOT / "slurm/site.env.example", *(ROOT / "tools").glob("*.sh"), ROOT / "tests/run.sh"]
    checked = subprocess.run(["shellcheck", "-x", *files], cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_pipeline_jobs_run_from_conversion_to_report(slurm, s3, site, tmp_path):
    run = tmp_path / "run"
    recipe = [
        "steps=4",
        "batch.global_batch=16",
        "data.workers=0",
        "evaluation=null",
        f"timeout_minutes={HANG_MINUTES}",
    ]
    submitted = slurm.run(
        *("bash", "slurm/pipeline.sh", "--train", "slurm/train_demo.sh", "--run", str(run), "--parts", "2"),
        *("--shards", "demo 0 s3://pipeline-tests/chain --pairs 60 --queries 12 --processes 2"),
        *("--evaluate", "s3://pipeline-tests/chain/eval", "data.url=s3://pipeline-tests/chain/train", *recipe),
        **site,
    )
    shards, training, evaluation, report = map(int, re.findall(r"\d+", submitted))
    assert slurm.job(report)["JobState"] == slurm.job(evaluation)["JobState"] == "PENDING"
    for job in (shards, training, evaluation, report):
        slurm.wait(job, "COMPLETED")
    assert Index.load("s3://pipeline-tests/chain/train/Scene-T2I").samples == 60
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 4
    gathered = Report.read(run / "mmeb")
    assert (len(gathered.results), gathered.model) == (10, str(run / "export"))
    assert (run / "mmeb/report.html").exists()
    told = re.search(r"([\d,]+) of ([\d,]+) items are already embedded", slurm.output(report))
    assert told[1] == told[2]  # the array's tasks left no work
    assert "mean: overall" in slurm.output(report)


def test_llm2clip_jobs_run_from_captions_to_report(slurm, s3, site, tmp_path):
    runs, url = tmp_path / "runs", "s3://pipeline-tests/llm2clip"
    sets = [f"text-image={url}/captions/eval/{name}" for name in ("short", "long", "chinese")]
    sets.append(f"classification={url}/captions/eval/classification")
    make = ("tools/make_shards.py", "demo", "0", url, "--pairs", "60", "--queries", "12", "--processes", "1")
    subprocess.run([sys.executable, *make], cwd=ROOT, check=True, capture_output=True)
    submitted = slurm.run(
        *("bash", "slurm/train_llm2clip.sh", "--demo", "--runs", str(runs), "--data", f"{url}/captions/train"),
        *("--datasets", "images", "--vectors", str(tmp_path / "vectors")),
        *("--evaluate", ",".join(sets), "--caption", "evaluation=null data.datasets=[texts]"),
        *("steps=3", "batch.global_batch=16", "checkpoint.every=2", f"timeout_minutes={HANG_MINUTES}"),
        **site,
    )
    caption, embedding, vision, evaluation, report = map(int, re.findall(r"\b\d+\b", submitted))
    for job in (caption, embedding, vision, evaluation, report):
        slurm.wait(job, "COMPLETED")
    assert [len((runs / name / "metrics.jsonl").read_text().splitlines()) for name in ("caption", "vision")] == [3, 3]
    assert (tmp_path / "vectors/images/text_embeddings.json").exists()
    gathered = Report.read(runs / "report")
    assert set(gathered.results) == {"short", "long", "chinese", "classification"}
    assert gathered.model == str(runs / "vision/export")


def test_array_tasks_convert_all_subsets(slurm, site, tmp_path):
    source, out = tmp_path / "MMEB-train", tmp_path / "shards"
    for number, subset in enumerate(("OK-VQA", "SUN397", "VisDial")):
        (source / subset).mkdir(parents=True)
        rows = [{"qry": f"{subset} {i}?", "pos_text": f"answer {i}", "neg_text": "no"} for i in range(5 + number)]
        rows = [row | {"qry_image_path": "", "pos_image_path": "", "neg_image_path": ""} for row in rows]
        parquet.write_table(pa.Table.from_pylist(rows), source / subset / "original-00000-of-00001.parquet")
    (source / "images").mkdir()
    command = ("sbatch", "--wait", "--array=0-1", "--cpus-per-task=1", "slurm/make_shards.sh", "mmeb-train")
    slurm.run(*command, str(source), str(out), **site)
    assert [Index.load(str(out / subset)).samples for subset in ("OK-VQA", "SUN397", "VisDial")] == [5, 6, 7]


def test_failed_job_cancels_dependent_job(slurm, s3, site, tmp_path):
    submitted = slurm.run(
        *("bash", "slurm/pipeline.sh", "--train", "slurm/train_demo.sh", "--run", str(tmp_path / "run")),
        *("--shards", "demo 0 s3://no-such-bucket/chain"),
        **site,
    )
    shards, training = map(int, re.findall(r"\d+", submitted))
    with pytest.raises(SlurmFailure):
        slurm.wait(shards, "COMPLETED")
    assert "no-such-bucket" in slurm.output(shards)
    with pytest.raises(SlurmFailure):
        slurm.wait(training, "COMPLETED")
    assert slurm.job(training)["JobState"] == "CANCELLED"
