"""Where labelled pictures come from: small generators that yield one `Sample` at a time, in a fixed order, in constant memory.

A sample carries its label as it was found (a raw dict; `cleaning` judges it) and a function that reads its bytes, so that
passing over a sample costs nothing. What a source cannot turn into a sample it yields as a `Reject` with the reason.
"""

import io
import json
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

import datasets

from foodextract.folders import labelled_folder, not_food_folder
from foodextract.samples import DatasetError, Reject, Rows, Sample
from foodextract.scenes import Placed, Split, draw_scene, plan_scene, record_of
from foodextract.schema import AnswerError, FoodRecord

HUB_DATASET = "berkeruveyik/vlm-food-4k-not-food-dataset"
FOOD101 = "ethz/food101"


# ------------------------------------------------------------------------------------------------------------------------------- offline


def scenes(seed: int = 42, train: int = 8000, test: int = 600) -> Rows:
    """Drawn scenes. Their splits come fixed, because the test split has non-food objects of its own.

    Test scenes are taken as they come, training scenes by what they teach: `_teaches`.
    """
    for split, wanted in (("train", train), ("test", test)):
        planned = ((index, plan_scene(seed, split, index)[0]) for index in count())
        chosen = (scene for scene in planned if split == "test" or _teaches(*scene))
        for index, objects in islice(chosen, wanted):
            yield Sample(
                name=f"scene-{seed}-{split}-{index:06d}.png",
                read=partial(_drawn, seed, split, index),
                label=record_of(objects).model_dump(),
                source="scenes",
                licence="CC BY-SA 4.0 (OpenMoji)",
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
    draw_scene(seed, split, index).image.save(png, "PNG", compress_level=1)  # noise hardly compresses; three times as fast as the default
    return png.getvalue()


# ----------------------------------------------------------------------------------------------------------------------------------- Hub


def hub(dataset_id: str = HUB_DATASET) -> Rows:
    """The original project's data set: `image`, `output_json` and columns of provenance. Raises DatasetError when it cannot be read.

    Its labels were written by a larger model, some as Python reprs, so they are found as `FoodRecord.parse_lenient` finds them.
    """
    for index, row in enumerate(_streamed(dataset_id, "train")):
        name = f"{index:06d}-{Path(str(row.get('image_name') or row.get('image_id') or 'row')).stem}"
        label = row["output_json"]
        try:
            record = FoodRecord.parse_lenient(label if isinstance(label, str) else json.dumps(label))
        except AnswerError as error:
            yield Reject(name, f"output_json is no record: {error}")
            continue
        yield Sample(
            name=name + _suffix(row["image"]),
            read=partial(_bytes, row["image"]),
            label=record.model_dump(),
            source=str(row.get("image_source") or dataset_id),
            licence=f"see {dataset_id}",
            category=str(row.get("food270_class_name") or row.get("category") or ""),
        )


def food101(split: str = "train", dataset_id: str = FOOD101) -> Rows:
    """Food-101: one class a picture, by its name and never its number. Raises DatasetError when it cannot be read."""
    rows = _streamed(dataset_id, split)
    names = rows.features["label"]
    for index, row in enumerate(rows):
        name = names.int2str(row["label"]).replace("_", " ")
        label = {"is_food": 1, "image_title": name, "food_items": [name], "drink_items": []}
        read = partial(_bytes, row["image"])
        yield Sample(f"food101-{split}-{index:06d}{_suffix(row['image'])}", read, label, dataset_id, f"see {dataset_id}", category=name)


def _streamed(dataset_id: str, split: str) -> datasets.IterableDataset:
    try:
        return datasets.load_dataset(dataset_id, split=split, streaming=True).cast_column("image", datasets.Image(decode=False))
    except (OSError, ValueError, datasets.exceptions.DatasetNotFoundError) as error:
        raise DatasetError(
            f"cannot read {dataset_id!r} from the Hub ({type(error).__name__}): check the name and the connection, "
            "or use drawn scenes or a folder"
        ) from error


def _bytes(picture: dict[str, Any]) -> bytes:
    return picture["bytes"] if picture["bytes"] is not None else Path(picture["path"]).read_bytes()


def _suffix(picture: dict[str, Any]) -> str:
    return Path(picture.get("path") or "").suffix.lower() or ".jpg"


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
        raise DatasetError(f"the source `{kind}` needs a folder of pictures")
    match kind:
        case "scenes":
            return scenes(seed, *drawn)
        case "folder":
            return labelled_folder(folder)
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
    Rejects pass through and do not count. Raises DatasetError for shares that are not positive.
    """
    parts = list(parts)
    if not parts or min(share for _, share in parts) <= 0:
        raise DatasetError("every source of a mix needs a share above 0")
    total = sum(share for _, share in parts)
    given = [0] * len(parts)
    while True:
        behind = [share / total * (sum(given) + 1) - count for (_, share), count in zip(parts, given, strict=True)]
        turn = behind.index(max(behind))
        row = next(parts[turn][0], None)
        if row is None:
            return
        given[turn] += isinstance(row, Sample)
        yield row
