"""A missing or read-only home directory stops nothing, and reading never creates a directory there."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.cpp_extension import _get_build_directory

from pipeline import distributed, home
from pipeline.errors import PipelineError
from pipeline.jobs import program

ROOT = Path(__file__).parents[1]
VARIABLES = ("TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR", "MPLCONFIGDIR", "HF_HOME")


@pytest.fixture
def no_home(tmp_path, monkeypatch) -> Path:
    """Set HOME to a file, in which not even root can create a folder, and use the test's own temporary directory."""
    (tmp_path / "home").write_text("")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    return tmp_path


def test_library_caches_move_to_a_private_folder(no_home, capsys):
    environment = {}
    home.replace_if_unwritable(environment)
    private = no_home / "tmp" / f"embedding-pipeline-{os.getuid()}"
    assert environment == {name: str(private / name.lower()) for name in VARIABLES}
    assert private.stat().st_mode & 0o777 == 0o700
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {no_home}/home/.cache/torch_extensions cannot be written")
    home.replace_if_unwritable(environment)  # as a process does for the processes that it starts
    assert capsys.readouterr().err == ""


def test_only_rank_0_prints_the_warning(no_home, capsys):
    environment = {"RANK": "1"}
    home.replace_if_unwritable(environment)
    assert set(environment) == {*VARIABLES, "RANK"}
    assert capsys.readouterr().err == ""


def test_writable_folders_and_readonly_model_cache_are_kept(no_home, monkeypatch):
    monkeypatch.setattr(home, "is_writable", lambda folder, executed: folder != no_home / "models")
    (no_home / "models").mkdir()
    kept = {"HF_HOME": str(no_home / "models")}
    environment = dict(kept)
    home.replace_if_unwritable(environment)
    assert environment == kept


def test_private_folder_writable_by_others_is_not_used(no_home):
    private = no_home / "tmp" / f"embedding-pipeline-{os.getuid()}"
    for make in (lambda: private.symlink_to(no_home), lambda: private.mkdir(mode=0o777)):
        make()
        private.chmod(0o777)
        environment = {}
        home.replace_if_unwritable(environment)
        assert private not in Path(environment["TORCH_EXTENSIONS_DIR"]).parents
        private.unlink() if private.is_symlink() else private.rmdir()


def test_missing_home_is_replaced_by_private_folder(no_home, monkeypatch):
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # the result for a user that the system does not know
    environment = {}
    home.replace_if_unwritable(environment)
    assert environment["HOME"] == str(no_home / "tmp" / f"embedding-pipeline-{os.getuid()}")
    assert set(VARIABLES) < set(environment)


@pytest.mark.parametrize("named", [True, False])
def test_build_locks_are_found_without_creating_folders(tmp_path, monkeypatch, named):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    if named:
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    distributed.remove_stale_lock()
    assert list(tmp_path.iterdir()) == []
    wanted = [Path(_get_build_directory(kernel, verbose=False), "lock") for kernel in distributed._KERNELS]
    for lock in wanted:
        lock.touch()
    assert distributed._locks() == wanted


def test_program_starts_without_a_home(no_home):
    environment = os.environ | {"TMPDIR": str(no_home / "tmp")}
    command = [sys.executable, "tools/make_shards.py", "--help"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert len(run.stderr.splitlines()) == 1, run.stderr


def test_program_enables_the_garbage_collector_after_its_imports(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["program"])
    enabled = []
    gc.disable()  # as pipeline/__init__.py does in a program
    try:
        program.command_line(lambda: enabled.append(gc.isenabled()))()
    finally:
        gc.enable()
    assert enabled == [True]


def test_spawned_workers_of_a_program_collect_garbage(tmp_path):
    """They import the program's script, with its sys.argv."""
    script = tmp_path / "pipeline-probe"
    script.write_text(
        "import gc\n"
        "from pipeline.convert.workers import workers\n"
        "from pipeline.jobs.program import command_line\n"
        "at_import = gc.isenabled()\n"
        "def enabled():\n"
        "    return gc.isenabled()\n"
        "if __name__ == '__main__':\n"
        "    with workers(2, [enabled]) as (_, run):\n"
        "        command_line(lambda: print(at_import, enabled(), run(0)))()\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout == "False True True\n"


def test_package_import_has_no_side_effects_and_loads_no_torch(no_home):
    code = (
        "import gc, os, signal, sys\n"
        "state = lambda: (dict(os.environ), signal.getsignal(signal.SIGINT), gc.isenabled())\n"
        "before = state(); import pipeline; print(before == state(), {'torch', 'numpy'} & {*sys.modules})\n"
        "from pipeline import Pair; print(Pair.__name__, 'torch' in sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout == "True set()\nPair False\n"


def test_tilde_in_arguments_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    given = ["~/x", "--out=~/x", "run=~/a=b", "mmeb=~/x", "objective.margin=~", "s3://b/~/x", "./~/x", "a ~/b", "~"]
    meant = ["/home/me/x", "--out=/home/me/x", "run=/home/me/a=b", "mmeb=/home/me/x", *given[4:]]
    assert list(map(program._with_home, given)) == meant
    with pytest.raises(PipelineError, match="~of-nobody/x: there is no such home; write the whole path"):
        program._with_home("--out=~of-nobody/x")
