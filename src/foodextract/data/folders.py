"""Labeled folders of images, one `Sample` at a time: `metadata.jsonl`, `metadata.csv`, or one subfolder a class."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from foodextract.data.samples import METADATA, NOTHING, PRIMARY, DatasetError, Reject, Rows, Sample, split_named
from foodextract.images import SUFFIXES
from foodextract.schema import EXHAUSTIVE, FoodRecord

NOT_FOOD_CLASSES = frozenset(
    {"not food", "non food", "no food", "other"}
)  # names of class folders that hold neither food nor drink


def labeled_folder(folder: str | Path) -> Rows:
    """A folder of images with labels, found in one of three ways:

    - `metadata.jsonl`, one object a line: `file_name`, the four keys of a record (without `image_title`, the items make the title), and
      optionally `category`, `group` (images to keep on one side of the split), `label_scope` ("exhaustive", or anything else where
      more than what is listed may be seen), `source`, `license`, `split`
    - `metadata.csv` with the same columns; lists are JSON, or items between semicolons
    - neither, but one subfolder a class, named after what its images show (`not_food` for neither food nor drink). A class name
      says the main item only, so the `label_scope` of what shows food is "primary".

    A split other than "train" is held out, whatever it is called. Values go to the label rules as they are.

    Raises DatasetError for a folder that has none of the three.
    """
    folder = Path(folder)
    for name, read in zip(METADATA, (_jsonl, _csv), strict=True):
        if (folder / name).is_file():
            return Rows(_metadata_rows(folder, read(folder / name)), total=sum(1 for _ in read(folder / name)))
    classes = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    if images := [(path, image) for path in classes for image in _images(path)]:
        return Rows(_class_rows(folder, images), total=len(images))
    raise DatasetError(
        f"{folder} has neither {' nor '.join(METADATA)} nor class-named subfolders with images: write one line of JSON an image, "
        "for example\n"
        '{"file_name": "a.jpg", "is_food": 1, "image_title": "beer", "food_items": [], "drink_items": ["beer"]}'
    )


def not_food_folder(folder: str | Path) -> Rows:
    """A folder of images that show neither food nor drink. Raises DatasetError for one without images."""
    folder = Path(folder)
    images = _images(folder)
    if not images:
        raise DatasetError(f"{folder} has no images: name a folder that holds .jpg, .png, .webp … files")
    samples = (
        Sample(_name(folder, path), path.read_bytes, dict(NOTHING), folder.name, "not stated", category="not food")
        for path in images
    )
    return Rows(samples, total=len(images))


def _jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any] | Reject]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path.name} line {number}"
            try:
                row = json.loads(line)
                yield (
                    where,
                    row if isinstance(row, dict) else Reject(where, "not a JSON object: write one object a line"),
                )
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
    return (
        json.loads(cell)
        if cell.lstrip().startswith("[")
        else [item.strip() for item in cell.split(";") if item.strip()]
    )


def _metadata_rows(folder: Path, rows: Iterator[tuple[str, dict[str, Any] | Reject]]) -> Iterator[Sample | Reject]:
    for where, row in rows:
        if isinstance(row, Reject):
            yield row
            continue
        name = str(row.get("file_name"))
        where = f"{where} ({name})"
        row = {"image_title": ""} | row
        missing = ["file_name"] * (row.get("file_name") is None) + [
            key for key in FoodRecord.model_fields if key not in row
        ]
        if missing:
            yield Reject(
                where, f"lacks {', '.join(missing)}: every row needs file_name, is_food, food_items and drink_items"
            )
        elif (
            Path(name).is_absolute() or ".." in Path(name).parts
        ):  # links that its owner put into the folder are welcome
            yield Reject(where, "file_name leads out of the folder: keep images below it")
        elif not (folder / name).is_file():
            yield Reject(where, f"there is no such file: put it into {folder.name} or remove the line")
        else:
            yield Sample(
                name=name,
                read=(folder / name).read_bytes,
                label={key: row[key] for key in FoodRecord.model_fields},
                source=str(row.get("source") or folder.name),
                license=str(row.get("license") or "not stated"),
                category=str(row.get("category") or ""),
                group=str(row.get("group") or ""),
                split=split_named(row.get("split")),
                label_scope=str(row.get("label_scope") or EXHAUSTIVE),
            )


def _class_rows(folder: Path, images: list[tuple[Path, Path]]) -> Iterator[Sample]:
    for path, image in images:
        name = " ".join(path.name.replace("_", " ").replace("-", " ").lower().split())
        label, scope = (dict(NOTHING), EXHAUSTIVE) if name in NOT_FOOD_CLASSES else (labeled_as(name), PRIMARY)
        yield Sample(
            _name(folder, image), image.read_bytes, label, folder.name, "not stated", category=name, label_scope=scope
        )


def labeled_as(name: str) -> dict[str, Any]:
    """The label of an image of which only a class of food is known."""
    return {"is_food": 1, "image_title": name, "food_items": [name], "drink_items": []}


def _images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())


def _name(folder: Path, path: Path) -> str:
    return path.relative_to(folder).as_posix()
