"""How many planted near-duplicates are found again, and how many images are grouped with a stranger?

    python benchmarks/near_duplicates.py                                   # drawn scenes; writes results/near_duplicates.json
    python benchmarks/near_duplicates.py --folder my_images --results mine.json

Copies of random images are planted: resized, recompressed as JPEG, mirrored, or with 5 % cropped off, in equal parts. A copy counts as
found when it is in one group with its original. An image counts as falsely grouped when its group holds any other original; in a folder
that has look-alikes of its own, these count against us here.
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image
from tqdm import tqdm

from corruptions import CHANGES
from foodextract.data.near_duplicates import fingerprint, group_near
from foodextract.data.scenes import draw_scene
from foodextract.evaluation.evaluate import rate
from foodextract.evaluation.results import make_row, write_results
from foodextract.images import find_images, open_image

ROOT = Path(__file__).resolve().parents[1]


def main(
    folder: Annotated[Path | None, typer.Option(help="Images to plant copies among (default: drawn scenes).")] = None,
    scenes: Annotated[int, typer.Option(help="How many scenes, without a folder.")] = 1700,
    planted: Annotated[int, typer.Option(help="How many copies.")] = 300,
    seed: Annotated[int, typer.Option(help="Which images are copied, and how.")] = 0,
    results: Annotated[Path, typer.Option(help="Where the figures go.")] = ROOT / "results/near_duplicates.json",
) -> None:
    """Plant near-duplicates, group, and count."""
    paths = list(find_images([folder])) if folder else []
    count = len(paths) or scenes

    def image(number: int) -> Image.Image:
        return open_image(paths[number]) if paths else draw_scene(seed, "train", number).image

    prints = [fingerprint(image(number)) for number in tqdm(range(count), desc="looking", unit="image")]
    rng = np.random.default_rng(seed)
    originals = rng.choice(count, planted, replace=False).tolist()
    changes = [CHANGES[number % len(CHANGES)] for number in range(planted)]
    copies = [
        fingerprint(change(image(number), rng))
        for number, change in zip(originals, tqdm(changes, desc="planting"), strict=True)
    ]
    groups = np.array(group_near(prints + copies))
    origin = np.array([*range(count), *originals])
    found = groups[count:] == groups[originals]
    kinds = {group: set(origin[groups == group]) for group in set(groups.tolist())}
    strangers = [len(kinds[group]) > 1 for group in groups.tolist()]
    command = "python benchmarks/near_duplicates.py" + (" --folder FOLDER" if folder else "")
    subject = "folder" if folder else "drawn scenes"
    metrics = [rate("recall", found.tolist())]
    metrics += [
        rate(
            f"recall, {change.__name__}", [bool(hit) for hit, one in zip(found, changes, strict=True) if one is change]
        )
        for change in CHANGES
    ]
    metrics.append(rate("falsely_grouped_rows", strangers))
    rows = [
        make_row("near_duplicates", subject, m.name, m.value, low=m.low, high=m.high, n=m.n, command=command)
        for m in metrics
    ]
    write_results(results, rows)
    for row in rows:
        print(f"{row.metric:>22}: {row.value:.4f} ({row.low:.4f} to {row.high:.4f}), n = {row.n:,}")


if __name__ == "__main__":
    typer.run(main)
