"""The sorts of trials: each disturbs a small run, repeats its command, and checks the result."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from damage import BYTES, copy_of, damage_file, damage_json
from fault_proxy import RESET, TRUNCATE, UNAVAILABLE, refuse, stall
from launch import Ended, Rank, fork, wait
from world import AFTER_FAILURE, EVERY, HANG, STEPS, Violation, World, judged, launched, same_files, same_run, succeed

from pipeline.data.index import INDEX_FILE, checksum_of
from pipeline.evaluation.report import Report

SIGNALS = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGSTOP]


@dataclass
class Trial:
    """One trial. chance: its source of randomness. folder: its own, initially empty. faults: the injected ones."""

    world: World
    chance: random.Random
    folder: Path
    faults: Counter[str] = field(default_factory=Counter)

    def note(self, fault: str) -> None:
        self.faults[fault] += 1


# ---------------------------------------------------------------------------------------------------- processes


def _moments(run: Path) -> dict[str, Callable[[], bool]]:
    """Return, for moments of a training run, functions that tell whether they have come."""
    metrics = run / "metrics.jsonl"

    def steps() -> int:
        return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

    return {
        "start": lambda: run.exists(),
        "first step": lambda: steps() >= 1,
        "step": lambda: steps() >= STEPS // 2 + 1,
        "checkpoint": lambda: any((run / "checkpoints").glob("unfinished-*")),
        "second checkpoint": lambda: steps() >= 2 * EVERY,
        "evaluation": lambda: steps() == 4,
        "last step": lambda: steps() >= STEPS,
        "export": lambda: any(run.glob("export*")),
    }


def _await(come: Callable[[], bool], ranks: list[Rank], chance: random.Random) -> None:
    """Wait for a moment and a little longer, or until the ranks have ended."""
    while not come() and None in [rank.poll() for rank in ranks]:
        time.sleep(0.002)
    time.sleep(chance.choice([0, 0.01, 0.05, 0.2, 0.6]))


def _strike(pids: list[int], number: signal.Signals, chance: random.Random) -> None:
    """Send a signal to processes; continue or kill stopped ones after a while."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
    if number == signal.SIGSTOP:
        time.sleep(chance.choice([0.5, 3]))
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, chance.choice([signal.SIGCONT, signal.SIGCONT, signal.SIGKILL]))


def _children(ranks: list[Rank]) -> list[psutil.Process]:
    found = []
    for rank in ranks:
        with suppress(psutil.NoSuchProcess):
            found += psutil.Process(rank.pid).children(recursive=True)
    return found


def _victims(trial: Trial, ranks: list[Rank]) -> tuple[str, list[int]]:
    """Choose processes to disturb; return their name and ids."""
    workers = [child.pid for child in _children(ranks)]
    choices = {"first process": [ranks[0].pid], "last process": [ranks[-1].pid], "all": [rank.pid for rank in ranks]}
    if workers:
        choices["worker"] = [trial.chance.choice(workers)]
    name = trial.chance.choice(list(choices))
    return name, choices[name]


def _disturbed(
    trial: Trial, arguments: list[str], processes: int, moments: dict[str, Callable[[], bool]], signals: list
) -> Ended:
    """Run a program and send it a signal at some moment, unless it has ended. All its children must end with it."""
    ranks = fork(arguments, processes)
    moment = trial.chance.choice(list(moments))
    _await(moments[moment], ranks, trial.chance)
    name, pids = _victims(trial, ranks)
    number = trial.chance.choice(signals)
    children = _children(ranks)
    if None in [rank.poll() for rank in ranks]:
        trial.note(f"{signal.Signals(number).name} of {name} at {moment}")
        _strike(pids, number, trial.chance)
    ended = judged(wait(ranks, HANG, AFTER_FAILURE))
    if left := psutil.wait_procs(children, timeout=60)[1]:
        for process in left:
            process.kill()
        raise Violation(f"{len(left)} processes outlived the program that started them\n{ended.output[-2000:]}")
    return ended


def train_killed(trial: Trial) -> None:
    """Disturb a training run up to three times, and resume it."""
    run = trial.folder / "run"
    arguments = trial.world.train(run, f"data.workers={trial.chance.choice([0, 1])}")
    for _ in range(trial.chance.choice([1, 1, 2, 3])):
        _disturbed(trial, arguments, 2, _moments(run), SIGNALS)
    succeed(arguments, 2)
    same_run(run, trial.world.undisturbed / "run")


def launcher_killed(trial: Trial) -> None:
    run = trial.folder / "run"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    (launcher,) = ranks = fork([*torchrun, *trial.world.train(run)], 1)
    _await(_moments(run)[trial.chance.choice(["first step", "step"])], ranks, trial.chance)
    children = _children(ranks)
    number = trial.chance.choice(SIGNALS)
    trial.note(f"{number.name} of launcher")
    _strike([launcher.pid], number, trial.chance)
    if None in wait(ranks, HANG).status:  # torchrun prints a traceback with the signal that it received
        raise Violation("the launcher hangs")
    for process in psutil.wait_procs(children, timeout=HANG)[1]:
        process.kill()
        raise Violation("ranks outlived their launcher")
    succeed(trial.world.train(run), 2)
    same_run(run, trial.world.undisturbed / "run")


def evaluate_killed(trial: Trial) -> None:
    out = trial.folder / "evaluation"
    arguments = trial.world.evaluate(out)
    moments = {"start": lambda: True, "embedding": lambda: any(out.glob("embeddings/*/*"))}
    _disturbed(trial, arguments, 2, moments, SIGNALS)
    succeed(arguments, 2)
    _same_report(out, trial.world)


def embed_killed(trial: Trial) -> None:
    out = trial.folder / "vectors"
    arguments = trial.world.embed(out)
    moments = {"start": lambda: True, "embedding": lambda: any(out.rglob("*.tar"))}
    _disturbed(trial, arguments, 2, moments, SIGNALS)
    succeed(arguments, 2)
    same_files(str(out), str(trial.world.undisturbed / "vectors"))


def convert_killed(trial: Trial) -> None:
    dest = trial.chance.choice([str(trial.folder / "pairs"), f"s3://chaos/{trial.folder.name}/pairs"])
    arguments = trial.world.convert(dest)
    moments = {"start": lambda: True, "converting": lambda: any(Path(dest).glob("*"))}
    if any(_disturbed(trial, arguments, 1, moments, SIGNALS).status):  # it had not finished
        succeed(arguments, 1)
    same_files(dest, str(trial.world.undisturbed / "pairs"))


def two_starts(trial: Trial) -> None:
    """A second start in the same directory is refused, and does not harm the first."""
    run = trial.folder / "run"
    arguments = trial.world.train(run)
    first = fork(arguments, 2)
    time.sleep(trial.chance.choice([0, 0, 0.3, 1, 3]))
    second = fork(arguments, 2)
    trial.note("a second start in the same directory")
    ends = [judged(wait(ranks, HANG, AFTER_FAILURE)) for ranks in (first, second)]
    both_refused = all("is in use by" in ended.output for ended in ends)
    if not both_refused and len((run / "metrics.jsonl").read_bytes().splitlines()) != STEPS:
        raise Violation(f"two runs wrote into one directory\n{ends[0].output[-1500:]}\n{ends[1].output[-1500:]}")
    succeed(arguments, 2)
    same_run(run, trial.world.undisturbed / "run")


# ---------------------------------------------------------------------------------------------------- storage


def _with_broken_storage(trial: Trial, arguments: list[str], processes: int) -> None:
    """Run with failing storage; after an error, run again without faults."""
    permanent = trial.chance.random() < 0.2
    fault = trial.chance.choice([refuse(403, "AccessDenied"), UNAVAILABLE, RESET, TRUNCATE, stall(60)])
    before = trial.world.injected.copy()
    with trial.world.broken_storage(trial.chance, 0.7 if permanent else 0.15, fault if permanent else None):
        ended = judged(launched(arguments, processes))
    trial.faults += trial.world.injected - before
    if any(ended.status):
        succeed(arguments, processes)


def train_storage(trial: Trial) -> None:
    run = trial.folder / "run"
    _with_broken_storage(trial, trial.world.train(run, f"data.workers={trial.chance.choice([0, 1])}"), 2)
    same_run(run, trial.world.undisturbed / "run")


def evaluate_storage(trial: Trial) -> None:
    out = trial.folder / "evaluation"
    _with_broken_storage(trial, trial.world.evaluate(out), 2)
    _same_report(out, trial.world)


def convert_storage(trial: Trial) -> None:
    dest = f"s3://chaos/{trial.folder.name}/pairs"
    _with_broken_storage(trial, trial.world.convert(dest), 1)
    same_files(dest, str(trial.world.undisturbed / "pairs"))


def server_struck(trial: Trial) -> None:
    """Kill and restart the S3 server, or suspend it, while a run reads from it."""
    run = trial.folder / "run"
    arguments = trial.world.train(run, "data.workers=1")
    ranks = fork(arguments, 2)
    _await(_moments(run)[trial.chance.choice(["start", "first step", "step"])], ranks, trial.chance)
    if trial.chance.random() < 0.5:
        number = trial.chance.choice([signal.SIGKILL, signal.SIGTERM])
        trial.note(f"{number.name} of the server, which comes back")
        trial.world.server.restart(number)
    else:
        trial.note("the server stands still")
        trial.world.server.pause(trial.chance.choice([1, 7]))
    if any(judged(wait(ranks, HANG, AFTER_FAILURE)).status):
        succeed(arguments, 2)
    same_run(run, trial.world.undisturbed / "run")


@contextmanager
def _small_disk(folder: Path, megabytes: float) -> Iterator[Callable[[str], None]]:
    """Mount a disk of this size at a folder; yield a function that changes its options. Requires root."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={int(megabytes * 1024)}k", "tmpfs", folder], check=True)
    try:
        yield lambda options: subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def disk(trial: Trial) -> None:
    """Use a disk that is full or read-only at the start or after some steps."""
    with _small_disk(trial.folder / "disk", 300) as remount:
        run = trial.folder / "disk/run"
        arguments = trial.world.train(run)
        if trial.chance.random() < 0.5:  # a run that had started normally
            _disturbed(trial, arguments, 2, {"step": _moments(run)["step"]}, [signal.SIGTERM])
        if trial.chance.random() < 0.3:
            trial.note("a read-only disk")
            remount("ro")
            ended = judged(launched(arguments, 2))
            remount("rw")
            if not any(ended.status):
                raise Violation("it ended well on a read-only disk")
        else:
            trial.note("a full disk")
            used = sum(path.stat().st_size for path in run.rglob("*") if path.is_file()) / 1e6 if run.exists() else 0
            remount(f"size={int((used + trial.chance.choice([0.05, 0.5, 1, 2, 4])) * 1024)}k")
            judged(launched(arguments, 2))
            remount("size=300m")
        succeed(arguments, 2)
        same_run(run, trial.world.undisturbed / "run")


# ---------------------------------------------------------------------------------------------------- damage


def run_damaged(trial: Trial) -> None:
    """Damage a file of a killed run: the run resumes, or reports why it cannot and loses nothing."""
    run = copy_of(_killed_run(trial.world), trial.folder / "run")
    files = [path for path in sorted(run.rglob("*")) if path.is_file() and "tensorboard" not in path.parts]
    path = trial.chance.choice(files)
    name = path.relative_to(run)
    trial.note(f"{damage_file(path, trial.chance)}: {_kind_of(name)}")
    steps = {each.name for each in (run / "checkpoints").glob("step-*")}
    ended = judged(launched(trial.world.train(run), 2))
    if not any(ended.status):
        same_run(run, trial.world.undisturbed / "run", whole=name.suffix != ".jsonl")
    elif name.parts[0] == "checkpoints" and name.parts[1].startswith("step-"):
        raise Violation(f"{name} is damaged, and the whole checkpoint beside it is not taken\n{ended.output[-2000:]}")
    else:
        left = {each.name for each in (run / "checkpoints").iterdir()}
        if gone := [step for step in steps if not any(step in each for each in left)]:
            raise Violation(f"{name} is damaged, and {gone} are gone\n{ended.output[-2000:]}")


def _killed_run(world: World) -> Path:
    """Return a run that was killed with two checkpoints; create it once."""
    run = world.folder / "killed"
    if not run.exists():
        made = run.with_name("killed.unfinished")
        ranks = fork(world.train(made), 2)
        while not (made / "checkpoints/step-00000006").exists():
            if None not in [rank.poll() for rank in ranks]:
                raise Violation(f"the run to be damaged ended too early\n{wait(ranks, 1).output[-3000:]}")
            time.sleep(0.002)
        for rank in ranks:
            os.kill(rank.pid, signal.SIGKILL)
        wait(ranks, HANG)
        made.rename(run)
    return run


def _kind_of(name: Path) -> str:
    """Return the file's name, without the step in a checkpoint's name."""
    return "/".join(part for part in name.parts if not part.startswith("step-"))


def index_damaged(trial: Trial) -> None:
    """Change one node of an index, with or without a valid checksum, or damage its bytes."""
    shards = copy_of(trial.world.shards, trial.folder / "shards")
    path, refused = shards / INDEX_FILE, False
    if trial.chance.random() < 0.3:
        trial.note(f"{damage_file(path, trial.chance)}: {INDEX_FILE}")
    else:
        before = json.loads(path.read_text())
        content = damage_json({name: value for name, value in before.items() if name != "checksum"}, trial.chance)
        right = isinstance(content, dict) and trial.chance.random() < 0.7
        if right:
            content["checksum"] = checksum_of(content)
        trial.note(f"a node of {INDEX_FILE}, {'with' if right else 'without'} its checksum")
        refused = not right and content != before
        path.write_text(json.dumps(content))
    _look(trial, shards, refused)


def sidecar_damaged(trial: Trial) -> None:
    """Damage a sidecar or a shard, sometimes with a matching index."""
    shards = copy_of(trial.world.shards, trial.folder / "shards")
    path = trial.chance.choice(sorted(each for each in shards.iterdir() if each.suffix in (".npy", ".tar")))
    before = path.read_bytes()
    name = trial.chance.choice(list(BYTES))
    path.write_bytes(BYTES[name](before, trial.chance))
    adopted = path.suffix == ".npy" and trial.chance.random() < 0.5
    if adopted:
        index = json.loads((shards / INDEX_FILE).read_text())
        del index["checksum"]
        for shard in index["shards"]:
            if shard["file"].removesuffix(".tar") == path.name.removesuffix(".idx.npy"):
                shard["sidecar_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
                shard["sidecar_bytes"] = path.stat().st_size
        (shards / INDEX_FILE).write_text(json.dumps(index | {"checksum": checksum_of(index)}))
    trial.note(f"{name}: {path.suffix}{' that the index names so' if adopted else ''}")
    verify = ["tools/make_shards.py", "verify", str(shards), "--processes", "1"]
    if path.read_bytes() != before and launched(verify, 1).status == [0]:
        raise Violation(f"verify finds nothing wrong with {path.name}")
    _look(trial, shards)


def _look(trial: Trial, shards: Path, refused: bool = False) -> None:
    """Check that all programs that read the dataset succeed or give one clear error. refused: it must be an error."""
    commands = [["tools/make_shards.py", *each, str(shards)] for each in (["show"], ["stats"], ["verify"])]
    out = trial.folder / "out"
    arguments = trial.chance.choice(
        [
            ["-m", "pipeline.evaluate", str(trial.world.model), str(shards), f"out={out}"],
            ["-m", "pipeline.embed", str(trial.world.model), "--shards", str(shards), "--out", str(out)],
            trial.world.train(out, f"data.url={shards}", "data.datasets=[]", "evaluation=null", "steps=4"),
        ]
    )
    for each in (*commands, arguments):
        if not any(judged(launched(each, 1)).status) and refused:
            raise Violation(f"it takes what is damaged: {' '.join(each)}")


def model_damaged(trial: Trial) -> None:
    model = copy_of(trial.world.model, trial.folder / "model")
    path = trial.chance.choice(sorted(each for each in model.iterdir() if each.is_file()))
    if path.suffix == ".json" and trial.chance.random() < 0.6:
        path.write_text(json.dumps(damage_json(json.loads(path.read_text()), trial.chance)))
        trial.note(f"a node of {path.name}")
    else:
        trial.note(f"{damage_file(path, trial.chance)}: {path.name}")
    (trial.folder / "texts.txt").write_text("a cat\na dog\n")
    texts = ["--texts", str(trial.folder / "texts.txt"), "--out", str(trial.folder / "out")]
    judged(launched(["-m", "pipeline.embed", str(model), *texts], 1))


def _same_report(out: Path, world: World) -> None:
    ours, theirs = (Report.read(folder).results for folder in (out, world.undisturbed / "evaluation"))
    if ours != theirs:
        raise Violation("the report differs from the undisturbed one")


def can_mount() -> bool:
    """Return whether a small disk can be mounted: as root, if the kernel permits it."""
    folder = Path(os.environ.get("TMPDIR", "/tmp"), f"chaos-mount-{os.getpid()}")
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True).returncode == 0
    if mounted:
        subprocess.run(["umount", folder], check=True)
    folder.rmdir()
    return mounted


# The number of trials of each sort in a round.
SORTS: dict[Callable[[Trial], None], int] = {
    train_killed: 4,
    train_storage: 1,
    run_damaged: 4,
    index_damaged: 5,
    sidecar_damaged: 4,
    model_damaged: 6,
    convert_killed: 1,
    convert_storage: 1,
    evaluate_killed: 1,
    evaluate_storage: 1,
    embed_killed: 1,
    server_struck: 1,
    two_starts: 1,
    disk: 1,
    launcher_killed: 1,
}


def remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
