"""Labelled folders of pictures, one `Sample` at a time: `metadata.jsonl`, `metadata.csv`, or one subfolder a class."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from foodextract.pictures import SUFFIXES
from foodextract.samples import METADATA, NOTHING, DatasetError, Reject, Rows, Sample
from foodextract.schema import EXHAUSTIVE, FoodRecord

NOT_FOOD_CLASSES = frozenset({"not food", "non food", "no food", "other"})  # names of class folders that hold neither food nor drink


def labelled_folder(folder: str | Path) -> Rows:
    """A folder of pictures with labels, found in one of three ways:

    - `metadata.jsonl`, one object a line: `file_name`, the four keys of a record (without `image_title`, the items make the title), and
      optionally `category`, `group` (pictures to keep on one side of the split), `label_scope` ("exhaustive", or anything else where
      more than what is listed may be seen), `source`, `licence`, `split`
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
    for where, row in rows:
        if isinstance(row, Reject):
            yield row
            continue
        name = str(row.get("file_name"))
        where = f"{where} ({name})"
        row = {"image_title": ""} | {key: value for key, value in row.items() if value is not None}
        if missing := [key for key in ("file_name", *FoodRecord.model_fields) if key not in row]:
            yield Reject(where, f"lacks {', '.join(missing)}: every row needs file_name, is_food, food_items and drink_items")
        elif Path(name).is_absolute() or ".." in Path(name).parts:  # links that its owner put into the folder are welcome
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
                label_scope=str(row.get("label_scope") or EXHAUSTIVE),
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
