"""Where labeled images come from: small generators that yield one `Sample` at a time, in a fixed order, in constant memory.

A sample carries its label as it was found (a raw dict; `cleaning` judges it) and a function that reads its bytes, so that
passing over a sample costs nothing. What a source cannot turn into a sample it yields as a `Reject` with the reason.
"""

import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

from foodextract.data.folders import labeled_as, labeled_folder, not_food_folder
from foodextract.data.hub_source import HubDataset, image_bytes, suffix_of
from foodextract.data.samples import PRIMARY, DatasetError, Reject, Rows, Sample
from foodextract.data.scenes import Placed, Split, draw_scene, plan_scene, record_of
from foodextract.names import HUB_DATASET

FOOD101 = "ethz/food101"
STOP = object()  # what an iterator gives when it has run out


# ------------------------------------------------------------------------------------------------------------------------------- offline


def scenes(seed: int = 42, train: int = 8000, test: int = 600) -> Rows:
    """Drawn scenes. Their splits come fixed, because the test split has non-food objects of its own.

    Test scenes are taken as they come, training scenes by what they teach: `_teaches`.
    """
    return Rows(_scenes(seed, train, test), total=train + test)


def _scenes(seed: int, train: int, test: int) -> Iterator[Sample]:
    for split, wanted in (("train", train), ("test", test)):
        planned = ((index, plan_scene(seed, split, index)[0]) for index in count())
        chosen = (scene for scene in planned if split == "test" or _teaches(*scene))
        for index, objects in islice(chosen, wanted):
            yield Sample(
                name=f"scene-{seed}-{split}-{index:06d}.png",
                read=partial(_drawn, seed, split, index),
                label=record_of(objects).model_dump(),
                source="scenes",
                license="CC BY-SA 4.0 (OpenMoji)",
                category=" + ".join(sorted({placed.kind for placed in objects})) or "nothing",
                split=split,
            )


def _teaches(index: int, objects: Sequence[Placed]) -> bool:
    """Is this training scene one to keep?

    A single object is soon learned, so two thirds of the scenes that have no more are passed over. So is a third of those that show food
    or drink, which leaves about as many that show none: objects that a model has never seen look more like food to it than those it has.
    """
    alone, edible = len(objects) < 2, any(placed.name for placed in objects)
    return index % 3 == 0 or not (alone or (edible and index % 3 == 1))


def _drawn(seed: int, split: Split, index: int) -> bytes:
    png = io.BytesIO()
    draw_scene(seed, split, index).image.save(
        png, "PNG", compress_level=1
    )  # noise hardly compresses; three times as fast as the default
    return png.getvalue()


# ----------------------------------------------------------------------------------------------------------------------------------- Hub


def hub(dataset_id: str = HUB_DATASET) -> Rows:
    """A data set on the Hub: one that this project published, another author's records, or the original with its `output_json`.

    Labels are found as they are, in JSON, as Python reprs or in columns. A split that is stated is kept: what is not the train split is
    never trained on. Raises DatasetError when the data set cannot be read, or has other columns.
    """
    return hub_rows(HubDataset.open(dataset_id))


def hub_rows(found: HubDataset) -> Rows:
    """The rows of a data set that is open already; see `hub`."""
    samples = (
        map(partial(_republished, found.repo_id), found.samples()) if found.kind == "published" else found.samples()
    )
    return Rows(samples, total=found.total())


def _republished(dataset_id: str, row: Sample | Reject) -> Sample | Reject:
    """A row names the source that it had when it was published. Here it comes from the Hub, and so does what it says of its license."""
    if isinstance(row, Reject):
        return row
    return replace(
        row, source=dataset_id, license=f"see {dataset_id}" if row.license.startswith("see ") else row.license
    )


def food101(split: str = "train", dataset_id: str = FOOD101) -> Rows:
    """Food-101: one class an image, by its name and never its number. The class is the main item; more may be seen beside it.

    Raises DatasetError when it cannot be read.
    """
    found = HubDataset.open(dataset_id)
    if split not in found.streams or "label" not in (found.streams[split].features or ()):
        raise DatasetError(
            f"{dataset_id!r} has no split {split!r} with a column `label`: choose another data set or split"
        )
    return Rows(_food101_rows(found, split), total=found.total(split))


def _food101_rows(found: HubDataset, split: str) -> Iterator[Sample]:
    names = found.streams[split].features["label"]
    for index, (_, row) in enumerate(found.rows(split)):
        name = names.int2str(row["label"]).replace("_", " ")
        read = partial(image_bytes, found.repo_id, row["image"])
        sample_name = f"food101-{split}-{index:06d}{suffix_of(row['image'])}"
        told = {"source": found.repo_id, "license": f"see {found.repo_id}", "category": name, "label_scope": PRIMARY}
        yield Sample(sample_name, read, labeled_as(name), **told)


# ---------------------------------------------------------------------------------------------------------------------------- all together


def open_source(
    kind: str,
    *,
    folder: str | Path | None = None,
    dataset_id: str = HUB_DATASET,
    seed: int = 42,
    drawn: tuple[int, int] = (8000, 600),
) -> Rows:
    """The source of that name. Raises DatasetError where there is none, or where its folder is not given."""
    if kind in ("folder", "not_food") and folder is None:
        raise DatasetError(f"the source `{kind}` needs a folder of images")
    match kind:
        case "scenes":
            return scenes(seed, *drawn)
        case "folder":
            return labeled_folder(folder)
        case "not_food":
            return not_food_folder(folder)
        case "hub":
            return hub(dataset_id)
        case "food101":
            return food101()
    raise DatasetError(f"there is no source {kind!r}: choose scenes, folder, not_food, hub or food101")


def mix(parts: Iterable[tuple[Rows, float]]) -> Rows:
    """Several sources in given shares, such as `[(hub(), 0.7), (scenes(), 0.3)]`, until the first of them runs out.

    The source that is furthest behind its share goes next, so the shares hold at every point and the order is always the same.
    Rejects pass through and do not count; where a source has some, `total` is a little too low. Raises DatasetError for shares that are
    not positive.
    """
    parts = list(parts)
    if not parts or min(share for _, share in parts) <= 0:
        raise DatasetError("every source of a mix needs a share above 0")
    shares, totals = [share for _, share in parts], [getattr(rows, "total", None) for rows, _ in parts]
    total = sum(1 for _ in _in_turn([iter(range(total)) for total in totals], shares)) if None not in totals else None
    return Rows(_in_turn([iter(rows) for rows, _ in parts], shares), total)


def _in_turn(parts: Sequence[Iterator[Any]], shares: Sequence[float]) -> Iterator[Any]:
    given = [0] * len(parts)
    while True:
        behind = [share / sum(shares) * (sum(given) + 1) - count for share, count in zip(shares, given, strict=True)]
        turn = behind.index(max(behind))
        row = next(parts[turn], STOP)
        if row is STOP:
            return
        given[turn] += not isinstance(row, Reject)
        yield row
