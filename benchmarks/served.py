"""Start `foodextract serve` in its own process on the loopback, for the load and fault benchmarks."""

import io
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from foodextract.data.scenes import draw_scenes
from foodextract.evaluation.results import Row
from reports import write_beside

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results" / "serving.json"


@dataclass
class Served:
    """A running server. `memory` grows by one resident size in GiB every half second, while it lives."""

    process: subprocess.Popen
    address: str
    seconds_to_ready: float
    memory: list[float] = field(default_factory=list)

    @property
    def port(self) -> int:
        """On the loopback."""
        return int(self.address.rsplit(":", 1)[1])

    def resident(self) -> float:
        """Resident memory now, in GiB."""
        return psutil.Process(self.process.pid).memory_info().rss / 2**30

    def peak(self) -> float:
        """The most that was ever resident, in GiB: loading and rounding the weights counts (Linux)."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"^VmHWM:\s+(\d+) kB$", status, re.M)[1]) / 2**20

    def watch(self) -> None:
        """Until the process ends."""
        while self.process.poll() is None:
            try:
                self.memory.append(self.resident())
            except psutil.Error:
                return
            time.sleep(0.5)


@contextmanager
def serving(model: Path, *options: str, port: int | None = None) -> Iterator[Served]:
    """Start a server, wait until it is ready, and kill it at the end. Raises RuntimeError with its last output."""
    port = port or free_port()
    with started(
        [sys.executable, "-m", "foodextract", "serve", "--model", str(model), "--port", str(port), *options], port
    ) as served:
        yield served


def free_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def started(command: list[str], port: int) -> Iterator[Served]:
    """Run a command that writes {"event": "ready"} to stderr once it answers on `port`."""
    begun = time.monotonic()
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})  # noqa: S603
    try:
        said = []
        for line in process.stderr:
            said.append(line)
            if line.startswith("{") and json.loads(line)["event"] == "ready":
                break
        else:
            raise RuntimeError(f"the server did not start: {''.join(said[-5:])}")
        served = Served(process, f"http://127.0.0.1:{port}", time.monotonic() - begun)
        threading.Thread(target=process.stderr.read, daemon=True).start()  # so that its log never fills the pipe
        threading.Thread(target=served.watch, daemon=True).start()
        yield served
    finally:
        process.kill()
        process.wait()


def drawn_images(count: int) -> list[bytes]:
    """PNG files of drawn scenes that no model was trained on."""
    files = []
    for scene in draw_scenes(77, "test", count):
        file = io.BytesIO()
        scene.image.save(file, "PNG")
        files.append(file.getvalue())
    return files


def growth(memory: list[float]) -> float:
    """By which share memory grew: the mean of its last tenth over that of its second tenth, less one."""
    tenth = max(1, len(memory) // 10)
    early, late = memory[tenth : 2 * tenth] or memory, memory[-tenth:]
    return sum(late) / len(late) / (sum(early) / len(early)) - 1


def write_part(path: Path, rows: list[Row]) -> None:
    """Replace the rows of one benchmark in a results file that several share."""
    write_beside(path, rows, lambda row: row.benchmark != rows[0].benchmark)
