"""The one format of everything this project measures: a JSON list of tidy rows in `results/`."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One figure. `low` and `high` bound its 95 % interval; they are None where an interval has no meaning."""

    benchmark: str
    subject: str
    metric: str
    value: float
    unit: str
    low: float | None
    high: float | None
    n: int
    device: str
    commit: str
    command: str

    @property
    def interval(self) -> tuple[float, float]:
        """`low` and `high`. Raises ValueError where there is no interval."""
        if self.low is None or self.high is None:
            raise ValueError(f"{self.metric} of {self.subject} has no interval")
        return self.low, self.high


def make_row(
    benchmark: str, subject: str, metric: str, value: float, *, n: int, command: str, unit: str = "share",
    low: float | None = None, high: float | None = None,
) -> Row:  # fmt: skip
    """Return a row stamped with this machine and this commit, rounded to six decimals."""
    low, high = (None if bound is None else round(float(bound), 6) for bound in (low, high))
    value = round(float(value), 6)
    return Row(benchmark, subject, metric, value, unit, low, high, n, device_name(), commit(), command)


def write_results(path: str | os.PathLike, rows: Sequence[Row]) -> None:
    """Write `rows` to `path`, all or nothing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text("[\n" + ",\n".join(json.dumps(asdict(row)) for row in rows) + "\n]\n")
    partial.replace(path)


def read_results(path: str | os.PathLike) -> list[Row]:
    """Read a results file. Raises FileNotFoundError, or TypeError where a row has other fields."""
    return [Row(**row) for row in json.loads(Path(path).read_text())]


@cache
def device_name() -> str:
    """The accelerator's name, else the processor's name and number of cores."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {cores} cores"


@cache
def commit() -> str:
    """The short git commit of the working tree, with `+` when it has changes; `unknown` outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parents[1])]
    status = [*git, "status", "--porcelain", "-uno", "--", "."]
    try:
        revision = [*git, "rev-parse", "--short", "HEAD"]
        head = subprocess.run(revision, capture_output=True, text=True, check=True)  # noqa: S603
        dirty = subprocess.run(status, capture_output=True, text=True, check=True)  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")
