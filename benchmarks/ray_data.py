"""What do one and two workers of deploy/ray label a second, and is memory flat over 100,000 rows?

    .venv/bin/foodextract draw /tmp/drawn --count 200
    .venv/ray/bin/python benchmarks/ray_data.py /tmp/drawn                 # writes results/ray_data.json

Throughput: the bundled tiny model answers the same drawn images with one worker and with two, alternately. The clock
starts when every worker has loaded its model. Memory: an engine that answers without a model labels images of 16 x 16
pixels; the sum over all of Ray's processes (proportional set size) is noted when a tenth, half and nine tenths of the
rows are written.
Linux, in Ray's environment, with `src` on PYTHONPATH.
"""

import io
import os
import sys
import tarfile
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated

import pyarrow.parquet as pq
import ray
import typer
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "deploy" / "ray"), str(ROOT / "src")]

import label_many  # noqa: E402

from foodextract.evaluation.results import make_row, write_results  # noqa: E402
from foodextract.schema import FoodRecord  # noqa: E402

TINY = ROOT / "src/foodextract/models/bundled/tiny-tuned"  # its name in `models.loading`, which imports torch
COMMAND = "python benchmarks/ray_data.py {} --images {} --rows {} --repeats {}"
PARTS = (0.1, 0.5, 0.9)  # of the rows; when all are written, the workers end
ROWS_PER_FILE = 1000


def stand_in() -> label_many.Engine:
    """An engine without a model."""
    record = FoodRecord(is_food=1, image_title="beer", food_items=[], drink_items=["beer"])
    return lambda images: [record for _ in images]


def timed(folder: Path) -> label_many.Engine:
    """The tiny model; notes in `folder` when it was ready."""
    engine = label_many.load_extractor(str(TINY), 8)
    (folder / f"{time.time()}").touch()
    return engine


def written(answers: Path) -> int:
    """Rows that the checkpoint names."""
    files = [path for path in Path(f"{answers}.checkpoint").glob("*.parquet") if ".pending" not in path.name]
    return sum(pq.read_metadata(path).num_rows for path in files)


def memory() -> float:
    """GiB of this process and all below it, each shared page counted once."""
    parents = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(status.parent.name)] = int(status.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended
            continue
    family, total = {os.getpid()}, 0
    while more := {child for child, parent in parents.items() if parent in family} - family:
        family |= more
    for process in family:
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 2**20


def throughput(images: Path, count: int, workers: int) -> float:
    """Images a second of one run."""
    with tempfile.TemporaryDirectory() as folder:
        ready = Path(folder, "ready")
        ready.mkdir()
        load = partial(timed, ready)
        label_many.label(str(images), f"{folder}/answers", load, workers, rows_per_file=ROWS_PER_FILE, num_cpus=1)
        end = time.time()
        assert written(Path(folder, "answers")) == count
        return count / (end - max(float(path.name) for path in ready.iterdir()))


def memory_at_parts(shard: Path, rows: int) -> list[float]:
    """Label `rows` images with the stand-in; the memory when each of PARTS of them is written."""
    noted: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        answers = Path(folder, "answers")

        def watch() -> None:
            for part in PARTS:
                while written(answers) < part * rows:
                    time.sleep(0.5)
                noted.append(memory())

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        label_many.label(str(shard), str(answers), stand_in, 2, rows_per_file=ROWS_PER_FILE, num_cpus=1)
        watcher.join(60)
    return noted


def main(
    drawn: Annotated[Path, typer.Argument(help="Folder from `foodextract draw`, whose images are used in turn.")],
    images: Annotated[int, typer.Option(min=16, help="Drawn images for throughput.")] = 1000,
    rows: Annotated[int, typer.Option(min=10_000, help="Rows for memory.")] = 100_000,
    repeats: Annotated[int, typer.Option(min=1, help="Runs with each number of workers.")] = 3,
    results: Annotated[Path, typer.Option(help="Where the figures go.")] = ROOT / "results" / "ray_data.json",
) -> None:
    """Measure, print and write down."""
    ray.cloudpickle.register_pickle_by_value(label_many)  # workers cannot import it
    label_many.start(None, 2, 1)
    command = COMMAND.format(drawn, images, rows, repeats)
    row = partial(make_row, "ray_data", command=command)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        files = sorted(drawn.glob("*.png"))
        (copies := Path(folder, "images")).mkdir()
        for number in range(images):
            (copies / f"{number:06}.png").write_bytes(files[number % len(files)].read_bytes())
        rates = {1: [], 2: []}
        for _ in range(repeats):
            for workers, rate in rates.items():
                rate.append(throughput(copies, images, workers))
        for workers, rate in rates.items():
            subject = f"{images:,} images, tiny model, {workers} worker{'s' * (workers > 1)} with 1 CPU each"
            low, middle, high = min(rate), median(rate), max(rate)
            found.append(row(subject, "throughput", middle, unit="images/s", low=low, high=high, n=repeats))
        Image.new("RGB", (16, 16), "tan").save(file := io.BytesIO(), "PNG")
        with tarfile.open(shard := Path(folder, "0.tar"), "w") as archive:
            for number in range(rows):
                info = tarfile.TarInfo(f"{number:07}.png")
                info.size = file.tell()
                archive.addfile(info, io.BytesIO(file.getvalue()))
        for part, value in zip(PARTS, memory_at_parts(shard, rows), strict=True):
            subject = f"{rows:,} rows, no model, 2 workers, {part:.0%} written"
            found.append(row(subject, "memory", value, unit="GiB", n=1))
    for one in found:
        print(f"{one.subject}: {one.value:.2f} {one.unit}")
    write_results(results, found)


if __name__ == "__main__":
    typer.run(main)
