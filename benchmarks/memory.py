"""Is memory flat over 10,000 images?

    python benchmarks/memory.py                 # writes results/extract_memory.json and a curve beside it

Generated images of many sizes stream through `extract_many` of the bundled tiny model; the process's resident memory is
noted after every tenth answer. Flat means: the mean of the last tenth of the curve is not more than 2 % above that of
the second tenth.
"""

from functools import partial
from pathlib import Path
from typing import Annotated

import matplotlib.pyplot as plt
import psutil
import typer
from tqdm import tqdm

from foodextract.evaluation.results import make_row, write_results
from foodextract.inference.extractor import Extractor
from foodextract.models import loading
from odd_images import odd_images
from served import growth

ROOT = Path(__file__).resolve().parents[1]


def main(
    images: Annotated[int, typer.Option(min=100, help="How many to answer.")] = 10_000,
    batch_size: Annotated[int, typer.Option(min=1, help="Images the model sees at once.")] = 8,
    results: Annotated[Path, typer.Option(help="Where the figures go.")] = ROOT / "results" / "extract_memory.json",
) -> None:
    """Measure, print, draw and write down."""
    answers = Extractor.from_pretrained(loading.TINY_TUNED, "cpu").extract_many(odd_images(images), batch_size)
    curve, process = [], psutil.Process()
    for done, _ in enumerate(tqdm(answers, total=images, unit="image"), 1):
        if done % 10 == 0:
            curve.append((done, process.memory_info().rss / 2**30))
    memory = [gib for _, gib in curve]
    peak, grown = max(memory), growth(memory)
    row = partial(
        make_row, "extract_memory", "ours", n=images, command=f"python benchmarks/memory.py --images {images}"
    )
    write_results(results, [row("peak_memory_gib", peak, unit="GiB"), row("memory_growth_share", grown)])
    figure, axis = plt.subplots(figsize=(7, 3), layout="constrained")
    axis.plot(*zip(*curve, strict=True), color="#4c78a8")
    axis.set(xlabel="images answered", ylabel="resident memory, GiB", ylim=(0, None))
    axis.grid(alpha=0.3)
    figure.savefig(results.with_suffix(".png"), dpi=120)
    print(f"peak {peak:.2f} GiB, growth {grown:+.1%}: {'flat' if grown <= 0.02 else 'NOT FLAT'}")


if __name__ == "__main__":
    typer.run(main)
