"""Labeled folders of images: `metadata.jsonl`, `.csv` or `.parquet`, or one subfolder per class."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet

from foodextract.data.samples import NOTHING, PRIMARY, DatasetError, Reject, Rows, Sample, label_of, normalize_split
from foodextract.images import find_images
from foodextract.schema import EXHAUSTIVE, FIELDS, FoodRecord

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
NOT_FOOD_CLASSES = frozenset({"not food", "non food", "no food", "other"})
CSV_FLAGS = {"1": 1, "true": 1, "yes": 1, "0": 0, "false": 0, "no": 0}
NOT_STATED = "not stated"


def labeled_folder(folder: str | Path) -> Rows:
    """Read a folder of labeled images. The labels are in one of:

    - `metadata.jsonl`, one object per line: `file_name`, the four keys of a record (without `image_title`, the items
      make the title), and optionally `category`, `group` (images that stay in one split), `label_scope` ("exhaustive",
      or another word where more than the listed items may be visible), `source`, `license` and `split`
    - `metadata.csv` with the same columns; lists are JSON, or items separated by semicolons
    - `metadata.parquet` with the same columns, as `build` writes it
    - one subfolder per class, named after the food that its images show (`not_food` for neither food nor drink); the
      class is the main item, so the `label_scope` of food is "primary"

    Any split other than "train" is held out. Values are not converted; the label rules do that.
    Raises DatasetError for a folder without labels.
    """
    folder = Path(folder)
    for name, read in zip(METADATA, (_read_jsonl, _read_csv, _read_parquet), strict=True):
        if (path := folder / name).is_file():
            rows = (_metadata_row(folder, f"{name} line {number}", row) for number, row in read(path))
            return Rows(rows, total=sum(1 for _ in read(path)))
    found = [image.relative_to(folder) for image in find_images([folder])] if folder.is_dir() else []
    if images := [(image.parts[0], folder / image) for image in found if len(image.parts) > 1]:
        return Rows((_class_row(folder, name, image) for name, image in images), total=len(images))
    raise DatasetError(
        f"{folder} has neither {' nor '.join(METADATA)} nor class-named subfolders with images: write one line of JSON "
        'per image, for example\n{"file_name": "a.jpg", "is_food": 1, "image_title": "beer", "food_items": [], '
        '"drink_items": ["beer"]}'
    )


def not_food_folder(folder: str | Path) -> Rows:
    """Read a folder of images that show neither food nor drink. Raises DatasetError for a folder without images."""
    folder = Path(folder)
    images = list(find_images([folder])) if folder.is_dir() else []
    if not images:
        raise DatasetError(f"{folder} has no images: name a folder with .jpg, .png, .webp … files")
    return Rows((_class_row(folder, "not_food", image) for image in images), total=len(images))


def class_label(name: str) -> dict[str, Any]:
    """Return the label of an image whose class of food is all that is known."""
    return {"is_food": 1, "image_title": name, "food_items": [name], "drink_items": []}


def _read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Yield line numbers with rows, or with the reason why a line is no row."""
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                yield number, row if isinstance(row, dict) else "not a JSON object: write one object per line"
            except json.JSONDecodeError as error:
                yield number, f"not JSON ({error}): write one JSON object per line"


def _read_csv(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        for number, row in enumerate(csv.DictReader(file), 2):
            try:
                flag = CSV_FLAGS[row["is_food"].strip().lower()]
                yield number, {**row, "is_food": flag} | {field: _csv_list(row[field] or "") for field in FIELDS}
            except KeyError as error:
                yield number, f"lacks {error}, or is_food is none of {', '.join(CSV_FLAGS)}"
            except (AttributeError, json.JSONDecodeError) as error:
                yield number, f"does not match the header's columns ({error})"


def _read_parquet(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield from enumerate((row for batch in file.iter_batches() for row in batch.to_pylist()), 1)
    except pyarrow.ArrowException as error:
        raise DatasetError(f"{path} is no Parquet file ({error}): write it again") from error


def _csv_list(cell: str) -> list[str]:
    if cell.lstrip().startswith("["):
        return json.loads(cell)
    return [item.strip() for item in cell.split(";") if item.strip()]


def _metadata_row(folder: Path, where: str, row: dict[str, Any] | str) -> Sample | Reject:
    if isinstance(row, str):
        return Reject(where, row)
    name, row = str(row.get("file_name")), {"image_title": ""} | row
    where = f"{where} ({name})"
    if missing := [key for key in ("file_name", *FoodRecord.model_fields) if key not in row]:
        return Reject(where, f"lacks {', '.join(missing)}: add file_name, is_food, food_items and drink_items")
    if Path(name).is_absolute() or ".." in Path(name).parts:  # symbolic links below the folder are allowed
        return Reject(where, "file_name leads out of the folder: keep images below it")
    if not (folder / name).is_file():
        return Reject(where, f"there is no such file: put it into {folder.name} or remove the line")
    defaults = {"source": folder.name, "license": row.get("licence") or NOT_STATED, "label_scope": EXHAUSTIVE}
    texts = {key: str(row.get(key) or default) for key, default in (defaults | {"category": "", "group": ""}).items()}
    return Sample(name, (folder / name).read_bytes, label_of(row), split=normalize_split(row.get("split")), **texts)


def _class_row(folder: Path, name: str, image: Path) -> Sample:
    name = " ".join(name.replace("_", " ").replace("-", " ").lower().split())
    food = name not in NOT_FOOD_CLASSES
    return Sample(
        image.relative_to(folder).as_posix(),
        image.read_bytes,
        class_label(name) if food else dict(NOTHING),
        folder.name,
        NOT_STATED,
        category=name,
        label_scope=PRIMARY if food else EXHAUSTIVE,
    )
