"""The program that mines negatives: killed on two processes, and continued by one."""

import signal

from launch import launch
from small_mining import files, mine, write_datasets

from pipeline.data.mined import MINED_FILE


def test_killed_mining_continues_to_the_bytes_of_one_process(tmp_path):
    folder, out = tmp_path / "data", tmp_path / "out"
    write_datasets(folder)
    options = [f"teacher={folder / 'vectors'}", f"out={out}", "count=3", "depth=20", f"scratch={tmp_path}"]
    encoder = "encoder=tests/integration/killed_mining.py:encoder"
    ended = launch(["-m", "pipeline.mine", "texts", str(folder), *options, encoder], world=2)
    assert ended.status == [-signal.SIGKILL] * 2, ended.output[-4000:]
    records = {path.name: path.stat().st_mtime_ns for path in out.glob("*/.mined/*.npy.json")}
    assert len(records) == 4 and not list(out.glob(f"*/{MINED_FILE}"))
    assert not list(tmp_path.glob("mining-*"))
    times = {path: path.stat().st_mtime_ns for path in out.glob("*/*.mined.npy")}
    mine(folder, out)
    written = {name: data for name, data in files(out).items() if "/.lock/" not in name}
    assert written == files(folder / "mined")
    kept = [path for path, time in times.items() if path.stat().st_mtime_ns == time]
    assert len(kept) == len(records)
