"""Where labelled pictures come from: small generators that yield one `Sample` at a time, in a fixed order, in constant memory.

A sample carries its label as it was found (a raw dict; `cleaning` judges it) and a function that reads its bytes, so that
passing over a sample costs nothing. What a source cannot turn into a sample it yields as a `Reject` with the reason.
"""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets

from foodextract.pictures import SUFFIXES
from foodextract.scenes import Split, draw_scene, plan_scene, record_of
from foodextract.schema import AnswerError, FoodRecord

HUB_DATASET = "berkeruveyik/vlm-food-4k-not-food-dataset"
FOOD101 = "ethz/food101"
METADATA = ("metadata.jsonl", "metadata.csv")
NOT_FOOD_CLASSES = frozenset({"not food", "non food", "no food", "other"})  # names of class folders that hold neither food nor drink
NOTHING = {"is_food": 0, "image_title": "", "food_items": [], "drink_items": []}


class DatasetError(ValueError):
    """A data set that cannot be built or read; the message names the place and the remedy."""


@dataclass(frozen=True)
class Sample:
    """One labelled picture on its way into a data set. `split` is set only where the source fixes it."""

    name: str
    read: Callable[[], bytes]
    label: dict[str, Any]  # the four keys of a record, as found
    source: str
    licence: str
    category: str = ""
    group: str = ""
    split: Split | None = None


@dataclass(frozen=True)
class Reject:
    """One row that was read and not kept."""

    name: str
    reason: str


Rows = Iterator[Sample | Reject]


# ------------------------------------------------------------------------------------------------------------------------------- offline


def scenes(seed: int = 42, train: int = 8000, test: int = 600) -> Rows:
    """Drawn scenes. Their splits come fixed, because the test split has non-food objects of its own."""
    for split, count in (("train", train), ("test", test)):
        for index in range(count):
            objects, _ = plan_scene(seed, split, index)
            yield Sample(
                name=f"scene-{seed}-{split}-{index:06d}.png",
                read=partial(_drawn, seed, split, index),
                label=record_of(objects).model_dump(),
                source="scenes",
                licence="CC BY-SA 4.0 (OpenMoji)",
                category=" + ".join(sorted({placed.kind for placed in objects})) or "nothing",
                split=split,
            )


def _drawn(seed: int, split: Split, index: int) -> bytes:
    png = io.BytesIO()
    draw_scene(seed, split, index).image.save(png, "PNG", compress_level=1)  # noise hardly compresses; three times as fast as the default
    return png.getvalue()


def labelled_folder(folder: str | Path) -> Rows:
    """A folder of pictures with labels, found in one of three ways:

    - `metadata.jsonl`, one object a line: `file_name`, the four keys of a record, and optionally `category`, `group` (pictures to
      keep on one side of the split), `source`, `licence`, `split`
    - `metadata.csv` with the same columns; lists are JSON, or items between semicolons
    - neither, but one subfolder a class, named after what its pictures show (`not_food` for neither food nor drink)

    Raises DatasetError for a folder that has none of the three.
    """
    folder = Path(folder)
    jsonl, table = (folder / name for name in METADATA)
    if jsonl.is_file():
        return _metadata_rows(folder, _jsonl(jsonl))
    if table.is_file():
        return _metadata_rows(folder, _csv(table))
    classes = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    if any(_pictures(path) for path in classes):
        return _class_rows(folder, classes)
    raise DatasetError(
        f"{folder} has neither {' nor '.join(METADATA)} nor class-named subfolders with pictures: write one line of JSON a picture, "
        "for example\n"
        '{"file_name": "a.jpg", "is_food": 1, "image_title": "beer", "food_items": [], "drink_items": ["beer"]}'
    )


def not_food_folder(folder: str | Path) -> Rows:
    """A folder of pictures that show neither food nor drink. Raises DatasetError for one without pictures."""
    folder = Path(folder)
    pictures = _pictures(folder)
    if not pictures:
        raise DatasetError(f"{folder} has no pictures: name a folder that holds .jpg, .png, .webp … files")
    for path in pictures:
        yield Sample(_name(folder, path), path.read_bytes, dict(NOTHING), folder.name, "not stated", category="not food")


def _jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any] | Reject]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path.name} line {number}"
            try:
                row = json.loads(line)
                yield where, row if isinstance(row, dict) else Reject(where, "not a JSON object: write one object a line")
            except json.JSONDecodeError as error:
                yield where, Reject(where, f"not JSON ({error}): write one JSON object a line")


def _csv(path: Path) -> Iterator[tuple[str, dict[str, Any] | Reject]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        for number, row in enumerate(csv.DictReader(file), 2):
            where = f"{path.name} line {number}"
            try:
                flag = {"1": 1, "true": 1, "yes": 1, "0": 0, "false": 0, "no": 0}[row["is_food"].strip().lower()]
                lists = {key: _csv_list(row[key] or "") for key in ("food_items", "drink_items")}
                yield where, {**row, "is_food": flag, **lists}
            except KeyError as error:
                yield where, Reject(where, f"lacks {error}, or is_food is none of 1, 0, true, false, yes, no")
            except (AttributeError, json.JSONDecodeError) as error:
                yield where, Reject(where, f"not a row of the header's columns ({error})")


def _csv_list(cell: str) -> list[str]:
    return json.loads(cell) if cell.lstrip().startswith("[") else [item.strip() for item in cell.split(";") if item.strip()]


def _metadata_rows(folder: Path, rows: Iterator[tuple[str, dict[str, Any] | Reject]]) -> Rows:
    root = folder.resolve()
    for where, row in rows:
        if isinstance(row, Reject):
            yield row
            continue
        name = str(row.get("file_name"))
        where = f"{where} ({name})"
        if missing := [key for key in ("file_name", *FoodRecord.model_fields) if row.get(key) is None]:
            yield Reject(where, f"lacks {', '.join(missing)}: every row needs file_name and the four keys of a record")
        elif not (root / name).resolve().is_relative_to(root):
            yield Reject(where, "file_name leads out of the folder: keep pictures below it")
        elif not (folder / name).is_file():
            yield Reject(where, f"there is no such file: put it into {folder.name} or remove the line")
        else:
            yield Sample(
                name=name,
                read=(folder / name).read_bytes,
                label={key: row[key] for key in FoodRecord.model_fields},
                source=str(row.get("source") or folder.name),
                licence=str(row.get("licence") or "not stated"),
                category=str(row.get("category") or ""),
                group=str(row.get("group") or ""),
                split=row.get("split") if row.get("split") in ("train", "test") else None,
            )


def _class_rows(folder: Path, classes: list[Path]) -> Rows:
    for path in classes:
        name = " ".join(path.name.replace("_", " ").replace("-", " ").lower().split())
        label = dict(NOTHING) if name in NOT_FOOD_CLASSES else {"is_food": 1, "image_title": name, "food_items": [name], "drink_items": []}
        for picture in _pictures(path):
            yield Sample(_name(folder, picture), picture.read_bytes, label, folder.name, "not stated", category=name)


def _pictures(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())


def _name(folder: Path, path: Path) -> str:
    return path.relative_to(folder).as_posix()


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
