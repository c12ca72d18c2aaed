"""Sources of labeled images. Each yields one `Sample` at a time, in a fixed order and in constant memory.

A sample holds its label as found and a function that reads the image, so iterating over samples reads no image.
A row that cannot become a sample is a `Reject` with the reason.
"""

import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

from PIL import Image

from foodextract.data.folders import class_label, labeled_folder, not_food_folder
from foodextract.data.hub_source import HubDataset, image_bytes, suffix_of
from foodextract.data.samples import PRIMARY, DatasetError, Reject, Rows, Sample
from foodextract.data.scenes import Placed, Split, draw_scene, plan_scene, record_of
from foodextract.images import ImageError, open_image
from foodextract.names import HUB_DATASET

FOOD101 = "ethz/food101"
END = object()  # returned by an exhausted iterator


def scenes(seed: int = 42, train: int = 8000, test: int = 600) -> Rows:
    """Drawn scenes with fixed splits: the test split has non-food objects of its own.

    Test scenes are taken as they come. Training scenes with one object or with food are thinned out, see `_keep`.
    """
    return Rows(_scenes(seed, train, test), total=train + test)


def _scenes(seed: int, train: int, test: int) -> Iterator[Sample]:
    sizes: tuple[tuple[Split, int], ...] = (("train", train), ("test", test))
    for split, size in sizes:
        planned = ((index, plan_scene(seed, split, index)[0]) for index in count())
        for index, objects in islice((scene for scene in planned if split == "test" or _keep(*scene)), size):
            yield Sample(
                f"scene-{seed}-{split}-{index:06d}.png",
                partial(_drawn, seed, split, index),
                record_of(objects).model_dump(),
                source="scenes",
                license="CC BY-SA 4.0 (OpenMoji)",
                category=" + ".join(sorted({placed.kind for placed in objects})) or "nothing",
                split=split,
            )


def _keep(index: int, objects: Sequence[Placed]) -> bool:
    """Tell whether to train on a scene.

    Single objects are learned early, so only a third of the scenes with at most one is kept. A third of those with food
    or drink is left out, so that about half show none: new objects look more like food to a model than known ones.
    """
    alone, edible = len(objects) < 2, any(placed.name for placed in objects)
    return index % 3 == 0 or not (alone or (edible and index % 3 == 1))


def _drawn(seed: int, split: Split, index: int) -> bytes:
    png = io.BytesIO()
    draw_scene(seed, split, index).image.save(png, "PNG", compress_level=1)  # noise compresses badly; 3 times as fast
    return png.getvalue()


def hub(dataset_id: str = HUB_DATASET) -> Rows:
    """A data set on the Hub: one that this project published, other records, or the original with its `output_json`.

    Labels may be JSON, Python reprs or columns. Splits are kept, and any but train is held out. The rows of a published
    data set name `dataset_id` as their source. Raises DatasetError when it cannot be read or has other columns.
    """
    return hub_rows(HubDataset.open(dataset_id))


def hub_rows(found: HubDataset) -> Rows:
    """Return the rows of an open data set; see `hub`."""
    samples = found.samples()
    if found.kind == "published":
        samples = (_republished(found.repo_id, row) for row in samples)
    return Rows(samples, total=found.total())


def _republished(dataset_id: str, row: Sample | Reject) -> Sample | Reject:
    if isinstance(row, Reject):
        return row
    license = f"see {dataset_id}" if row.license.startswith("see ") else row.license
    return replace(row, source=dataset_id, license=license)


def food101() -> Rows:
    """The training images of Food-101 with class names as labels. The class is the main item; more may be visible.

    Raises DatasetError when it cannot be read.
    """
    found = HubDataset.open(FOOD101)
    found = replace(found, streams={"train": found.streams["train"]})
    return Rows(_food101_samples(found), total=found.total())


def _food101_samples(found: HubDataset) -> Iterator[Sample]:
    names = found.streams["train"].features["label"]
    for index, (_, row) in enumerate(found.rows()):
        name = names.int2str(row["label"]).replace("_", " ")
        yield Sample(
            f"food101-train-{index:06d}{suffix_of(row['image'])}",
            partial(image_bytes, FOOD101, row["image"]),
            class_label(name),
            source=FOOD101,
            license=f"see {FOOD101}",
            category=name,
            label_scope=PRIMARY,
        )


def open_source(
    kind: str,
    *,
    folder: str | Path | None = None,
    dataset_id: str = HUB_DATASET,
    seed: int = 42,
    drawn: tuple[int, int] = (8000, 600),
) -> Rows:
    """Open a source by name. Raises DatasetError for an unknown name and for a missing folder."""
    match kind:
        case "folder" | "not_food":
            if folder is None:
                raise DatasetError(f"the source `{kind}` needs a folder of images")
            return labeled_folder(folder) if kind == "folder" else not_food_folder(folder)
        case "scenes":
            return scenes(seed, *drawn)
        case "hub":
            return hub(dataset_id)
        case "food101":
            return food101()
    raise DatasetError(f"there is no source {kind!r}: choose scenes, folder, not_food, hub or food101")


def first_image(rows: Iterable[Sample | Reject]) -> tuple[Sample, Image.Image]:
    """Return the first sample whose image can be read, and the image. Raises DatasetError where there is none."""
    problems = []
    for row in rows:
        if isinstance(row, Reject):
            problems.append(f"{row.name}: {row.reason}")
            continue
        try:
            return row, open_image(row.read())
        except (ImageError, OSError) as error:
            problems.append(f"{row.name}: {error}")
    reasons = "".join(f"\n  {problem}" for problem in problems[:5])
    raise DatasetError(f"none of the source's {len(problems)} images can be read{reasons}")


def mix(parts: Iterable[tuple[Rows, float]]) -> Rows:
    """Mix sources in given shares, such as `[(hub(), 0.7), (scenes(), 0.3)]`, until the first one ends.

    The source furthest behind its share goes next, so the shares hold at every point and the order is fixed. Rejects
    do not count; they make `total` a little too low. Raises DatasetError for shares that are not positive.
    """
    parts = list(parts)
    shares = [share for _, share in parts]
    if not parts or min(shares) <= 0:
        raise DatasetError("every source of a mix needs a share above 0")
    totals = [rows.total for rows, _ in parts if rows.total is not None]
    known = len(totals) == len(parts)
    total = sum(1 for _ in _in_turn([iter(range(size)) for size in totals], shares)) if known else None
    return Rows(_in_turn([iter(rows) for rows, _ in parts], shares), total)


def _in_turn(parts: Sequence[Iterator[Any]], shares: Sequence[float]) -> Iterator[Any]:
    given = [0] * len(parts)
    while True:
        behind = [share / sum(shares) * (sum(given) + 1) - size for share, size in zip(shares, given, strict=True)]
        turn = behind.index(max(behind))
        row = next(parts[turn], END)
        if row is END:
            return
        given[turn] += not isinstance(row, Reject)
        yield row
