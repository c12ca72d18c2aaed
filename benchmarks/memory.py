"""Is memory flat over 10,000 images?

    python benchmarks/memory.py                 # writes results/extract_memory.json and a curve beside it

Generated images of many sizes stream through `extract_many` of the bundled tiny model; the process's resident memory is
noted after every tenth answer. Flat means: the mean of the last tenth of the curve is not more than 2 % above that of
the second tenth.
"""

import os
from functools import partial
from pathlib import Path
from typing import Annotated

import matplotlib.pyplot as plt
import numpy as np
import typer
from tqdm import tqdm

from foodextract.evaluation.results import make_row, write_results
from foodextract.inference.extractor import Extractor
from foodextract.models import loading
from odd_images import odd_images

ROOT = Path(__file__).resolve().parents[1]


def resident() -> float:
    """This process's resident memory in GiB (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**30


def main(
    images: Annotated[int, typer.Option(min=100, help="How many to answer.")] = 10_000,
    batch_size: Annotated[int, typer.Option(min=1, help="Images the model sees at once.")] = 8,
    results: Annotated[Path, typer.Option(help="Where the figures go.")] = ROOT / "results" / "extract_memory.json",
) -> None:
    """Measure, print, draw and write down."""
    answers = Extractor.from_pretrained(loading.TINY_TUNED, "cpu").extract_many(odd_images(images), batch_size)
    curve = [
        (done, resident()) for done, _ in enumerate(tqdm(answers, total=images, unit="image"), 1) if done % 10 == 0
    ]
    memory = np.array([gib for _, gib in curve])
    tenth = len(memory) // 10
    growth = memory[-tenth:].mean() / memory[tenth : 2 * tenth].mean() - 1
    row = partial(
        make_row, "extract_memory", "ours", n=images, command=f"python benchmarks/memory.py --images {images}"
    )
    write_results(results, [row("peak_memory_gib", memory.max(), unit="GiB"), row("memory_growth_share", growth)])
    figure, axis = plt.subplots(figsize=(7, 3), layout="constrained")
    axis.plot(*zip(*curve, strict=True), color="#4c78a8")
    axis.set(xlabel="images answered", ylabel="resident memory, GiB", ylim=(0, None))
    axis.grid(alpha=0.3)
    figure.savefig(results.with_suffix(".png"), dpi=120)
    print(f"peak {memory.max():.2f} GiB, growth {growth:+.1%}: {'flat' if growth <= 0.02 else 'NOT FLAT'}")


if __name__ == "__main__":
    typer.run(main)
