"""Measure how many near-duplicates are found, and how many images are grouped with a different one.

    python benchmarks/near_duplicates.py  # drawn scenes; writes results/near_duplicates.json
    python benchmarks/near_duplicates.py --folder my_images --results mine.json

Random images get a changed copy: resized, recompressed as JPEG, mirrored, or cropped by 5 %, in equal parts. A copy
counts as found when it is in one group with its original. An image counts as falsely grouped when its group holds any
other original, so near-duplicates that a folder has of its own count as errors.
"""

from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image
from tqdm import tqdm

from corruptions import IMAGE_CORRUPTIONS
from foodextract.data.near_duplicates import fingerprint, group_near
from foodextract.data.scenes import draw_scene
from foodextract.evaluation.evaluate import rate
from foodextract.evaluation.results import make_row, write_results
from foodextract.images import find_images, open_image

ROOT = Path(__file__).resolve().parents[1]


def main(
    folder: Annotated[Path | None, typer.Option(help="Images to copy (default: drawn scenes).")] = None,
    scenes: Annotated[int, typer.Option(help="Number of scenes, without a folder.")] = 1700,
    copies: Annotated[int, typer.Option(help="Number of copies.")] = 300,
    seed: Annotated[int, typer.Option(help="Which images are copied, and how.")] = 0,
    results: Annotated[Path, typer.Option(help="Where the figures go.")] = ROOT / "results/near_duplicates.json",
) -> None:
    """Copy images, group, and count."""
    paths = list(find_images([folder])) if folder else []
    count = len(paths) or scenes

    def image(number: int) -> Image.Image:
        return open_image(paths[number]) if paths else draw_scene(seed, "train", number).image

    prints = [fingerprint(image(number)) for number in tqdm(range(count), desc="fingerprinting", unit="image")]
    rng = np.random.default_rng(seed)
    originals = rng.choice(count, copies, replace=False).tolist()
    changes = [IMAGE_CORRUPTIONS[number % len(IMAGE_CORRUPTIONS)] for number in range(copies)]
    for number, change in zip(originals, tqdm(changes, desc="copying"), strict=True):
        prints.append(fingerprint(change(image(number), rng)))
    groups = np.array(group_near(prints))
    origin = np.array([*range(count), *originals])
    found = groups[count:] == groups[originals]
    members = {group: set(origin[groups == group]) for group in set(groups.tolist())}
    metrics = [rate("recall", found.tolist())]
    for kind in IMAGE_CORRUPTIONS:
        hits = [bool(hit) for hit, change in zip(found, changes, strict=True) if change is kind]
        metrics.append(rate(f"recall, {kind.__name__}", hits))
    metrics.append(rate("falsely_grouped_rows", [len(members[group]) > 1 for group in groups.tolist()]))
    command = "python benchmarks/near_duplicates.py" + (" --folder FOLDER" if folder else "")
    row = partial(make_row, "near_duplicates", "folder" if folder else "drawn scenes", command=command)
    rows = [row(m.name, m.value, low=m.low, high=m.high, n=m.n) for m in metrics]
    write_results(results, rows)
    for figure in rows:
        print(f"{figure.metric:>22}: {figure.value:.4f} ({figure.low:.4f} to {figure.high:.4f}), n = {figure.n:,}")


if __name__ == "__main__":
    typer.run(main)
