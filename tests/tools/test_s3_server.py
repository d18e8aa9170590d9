import socket
import subprocess
import sys
from pathlib import Path

from limits import HANG_SECONDS

TOOLS = Path(__file__).resolve().parents[2] / "tools"


def test_server_stops_with_its_command(tmp_path):
    command = [sys.executable, str(TOOLS / "s3_server.py"), "--dir", str(tmp_path), "--bucket", "abc", "--"]
    code = "echo $AWS_ENDPOINT_URL; exit 7"
    done = subprocess.run([*command, "bash", "-c", code], capture_output=True, text=True, timeout=HANG_SECONDS)
    assert done.returncode == 7, done.stderr
    assert list(tmp_path.iterdir()) == []
    assert refuses(done.stdout.strip())

    code = "echo $AWS_ENDPOINT_URL; exec sleep 99"
    sleeper = subprocess.Popen([*command, "bash", "-c", code], stdout=subprocess.PIPE, text=True)
    url = sleeper.stdout.readline().strip()
    assert not refuses(url)
    sleeper.terminate()
    assert sleeper.wait(HANG_SECONDS) == 143
    assert list(tmp_path.iterdir()) == []
    assert refuses(url)


def refuses(url: str) -> bool:
    host, port = url.removeprefix("http://").split(":")
    with socket.socket() as client:
        return client.connect_ex((host, int(port))) != 0
