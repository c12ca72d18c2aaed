"""Measure memory and throughput of building a dataset of 100,000 small images, with and without a SIGKILL.

    python benchmarks/build_dataset.py  # five minutes on 2 cores; writes results/dataset_build.json and curves

Two builds of the same generated images run side by side. One is killed halfway with SIGKILL and resumed. Both must
write the same files, byte for byte.
"""

import hashlib
import io
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated

import matplotlib.pyplot as plt
import numpy as np
import psutil
import typer
from PIL import Image

from foodextract.data import dataset
from foodextract.data.samples import Rows, Sample
from foodextract.data.scenes import DRINKS, FOODS
from foodextract.evaluation.results import make_row, write_results

ROOT = Path(__file__).resolve().parents[1]
SIDE = 64  # pixels


def generated(count: int, seed: int = 0) -> Iterator[Sample]:
    """Yield `count` different images of smooth random colors, with labels."""
    names = [(name, "food_items") for name in FOODS] + [(name, "drink_items") for name in DRINKS]
    for number in range(count):
        name, field = names[number % len(names)]
        label = {"is_food": 1, "image_title": name, "food_items": [], "drink_items": [], field: [name]}
        read = partial(_png, seed, number)
        origin = {"source": "generated", "license": "none needed", "category": name, "group": f"{number // 2}"}
        yield Sample(f"{number:07d}.png", read, label, **origin)


def _png(seed: int, number: int) -> bytes:
    coarse = np.random.default_rng([seed, number]).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(file, "PNG", compress_level=1)
    return file.getvalue()


def checksum(folder: Path) -> str:
    """Return one hash of the names and bytes of all files below `folder`."""
    total = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        total.update(path.relative_to(folder).as_posix().encode())
        total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


class Watched:
    """A build in a process of its own, and its resident memory over time."""

    def __init__(self, count: int, out: Path) -> None:
        self.out, self.curve, self.start = out, [], time.perf_counter()
        command = [sys.executable, __file__, "--images", str(count), "--build-in", str(out)]
        self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)  # noqa: S603

    def look(self) -> bool:
        """Record time, memory in GiB and images done. Return False once the process has ended."""
        if self.process.poll() is not None:
            return False
        memory = psutil.Process(self.process.pid).memory_info().rss / 2**30
        self.curve.append((time.perf_counter() - self.start, memory, self.done()))
        return True

    def done(self) -> int:
        ledger = self.out.with_name(self.out.name + ".partial") / "ledger.jsonl"
        return sum(1 for _ in ledger.open("rb")) if ledger.exists() else 0


def main(
    images: Annotated[int, typer.Option(help="How many to build.")] = 100_000,
    build_in: Annotated[Path | None, typer.Option(hidden=True)] = None,
    results: Annotated[Path, typer.Option(help="Where the figures go.")] = ROOT / "results/dataset_build.json",
) -> None:
    """Measure an uninterrupted and a killed build."""
    if build_in:
        dataset.build(Rows(generated(images), images), build_in)
        return
    with tempfile.TemporaryDirectory() as scratch:
        whole, killed = Watched(images, Path(scratch) / "whole"), Watched(images, Path(scratch) / "killed")
        again = None
        while whole.look() | (again or killed).look():
            if again is None and killed.done() >= images // 2:
                killed.process.send_signal(signal.SIGKILL)
                killed.process.wait()
                again = Watched(images, killed.out)
            time.sleep(1)
        same = checksum(whole.out) == checksum(killed.out)
    reading = [point for point in whole.curve if 0 < point[2] < images]
    speed = (reading[-1][2] - reading[0][2]) / (reading[-1][0] - reading[0][0])
    peak = max(memory for _, memory, _ in whole.curve + killed.curve + again.curve)
    row = partial(make_row, "dataset_build", n=images, command="python benchmarks/build_dataset.py")
    write_results(
        results,
        [
            row("uninterrupted", "images_per_second", speed, unit="1/s"),
            row("uninterrupted", "seconds", whole.curve[-1][0], unit="s"),
            row("uninterrupted and killed", "peak_memory_gib", peak, unit="GiB"),
            row("killed", "byte_identical", float(same), unit="1 is yes"),
        ],
    )
    figure, (top, bottom) = plt.subplots(2, sharex=True, figsize=(7, 4.8), layout="constrained")
    for name, watched, shift in (
        ("uninterrupted", whole, 0),
        ("until SIGKILL", killed, 0),
        ("resumed", again, again.start - killed.start),
    ):
        seconds, memory, done = zip(*watched.curve, strict=True)
        bottom.plot([second + shift for second in seconds], memory, label=name)
        read = [number / 1000 or float("nan") for number in done]  # the ledger is gone once the dataset is whole
        top.plot([second + shift for second in seconds], read, label=name)
    top.set(ylabel="thousand images read", title=f"building {images:,} images, two builds at a time")
    bottom.set(xlabel="seconds", ylabel="resident memory, GiB", ylim=(0, None))
    top.legend(frameon=False)
    for axis in (top, bottom):
        axis.grid(alpha=0.3)
    figure.savefig(results.with_suffix(".png"), dpi=120)
    print(
        f"{speed:.0f} images/s, peak {peak:.2f} GiB, killed and resumed build is {'the same' if same else 'DIFFERENT'}"
    )


if __name__ == "__main__":
    typer.run(main)
