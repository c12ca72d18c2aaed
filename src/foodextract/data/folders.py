"""Labeled folders of images: tables of labels, exports of annotation tools, or one subfolder per class."""

import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from foodextract.data.annotations import Boxes, box_rows, read_boxes
from foodextract.data.label_rules.conversion import flag_of, split_items
from foodextract.data.label_rules.vocabulary import is_object
from foodextract.data.layout import MISSING, NOT_FOOD, PLAIN_FILES, Tree, class_of, first_few, names_no_class
from foodextract.data.samples import NOTHING, PRIMARY, DatasetError, Reject, Rows, Sample, label_of, normalize_split
from foodextract.data.scenes import Split
from foodextract.data.tables import TABLES, Row, decoded, read_table
from foodextract.schema import FIELDS, FoodRecord

NOT_FOOD_CLASSES = NOT_FOOD | {"other", "others", "background", "negative", "negatives"}
CLASS_COLUMNS = (
    *("label", "labels", "label_name", "class", "class_name", "classname", "class_label", "category", "category_name"),
    *("food", "food_name", "food_class", "food_type", "dish", "dish_name", "item"),
)
BOX_COLUMNS = frozenset(("xmin", "x_min", "x1", "bbox", "bbox_x", "x_center", "xcenter"))
DATA_FILES = frozenset((*TABLES, ".xml", ".yaml", ".yml", ".xlsx", ".xls", ".ods"))
OWN_FILES = ("metadata.ledger.jsonl", "metadata.rejects.jsonl")  # of `foodextract label`
REMEDY = (
    "write metadata.jsonl with one line of JSON per image, for example\n"
    '{"file_name": "a.jpg", "is_food": 1, "image_title": "beer", "food_items": [], "drink_items": ["beer"]}\n'
    "or save a spreadsheet as CSV, put the images into one subfolder per food, or export boxes as COCO JSON"
)


def labeled_folder(folder: str | Path) -> Rows:
    """Read a folder of labeled images. The labels are in the first of these that is there; see README.md:

    - tables called `metadata`, here and in subfolders
    - tables of other names, with the same columns, or with a file and a class per row
    - exports of annotation tools, see `annotations`
    - one subfolder per class; the class is the main item, so the `label_scope` of food is "primary"

    Values of JSON are not converted; the label rules do that. Files that are not read are named on stderr.
    Raises DatasetError for a folder without labels, and for one whose labels are in no form that is read.
    """
    tree = Tree.scan(Path(folder))
    if not tree.root.is_dir():
        raise DatasetError(f"{folder} is no folder: check the path")
    tables = [path for path in tree.files if path.stem.lower() == "metadata" and path.suffix.lower() in TABLES]
    if tables:
        tables.sort(key=lambda path: (path.parent, TABLES.index(path.suffix.lower())))
        rows, used = _table_rows(tree, {path: read_table(path) for path in tables}), tables
    elif others := _other_tables(tree):
        rows, used = _table_rows(tree, others), list(others)
    elif boxes := read_boxes(tree):
        rows, used = box_rows(tree, boxes), boxes.files
    else:
        rows, used = _class_rows(tree), []
    _report(tree, rows, used)
    return Rows(rows, total=len(rows))


def not_food_folder(folder: str | Path) -> Rows:
    """Read a folder of images that show neither food nor drink. Raises DatasetError for a folder without images."""
    tree = Tree.scan(Path(folder))
    if not tree.images:
        raise DatasetError(f"{folder} has no images: name a folder with .jpg, .png, .webp … files")
    _report(tree, (), [])
    return Rows((_class_sample(tree, "not food", image) for image in tree.images), total=len(tree.images))


def class_label(name: str) -> dict[str, Any]:
    """Return the label of an image whose class of food is all that is known."""
    return {"is_food": 1, "image_title": name, "food_items": [name], "drink_items": []}


def _other_tables(tree: Tree) -> dict[Path, list[tuple[int, Row]]]:
    """Return the tables that name files and say what they show. A file that is there tells them from other tables."""
    named = [path for path in tree.files if path.suffix.lower() in TABLES and path.name not in OWN_FILES]
    tables = {path: read_table(path) for path in named}
    labeled = {path: rows for path, rows in tables.items() if any(_is_labeled(row) for _, row in rows)}
    return {path: rows for path, rows in labeled.items() if any(_names_file(tree, path, row) for _, row in rows)}


def _names_file(tree: Tree, table: Path, row: Row) -> bool:
    return isinstance(row, dict) and not str(tree.find(str(row.get("file_name")), table)).startswith(MISSING)


def _is_labeled(row: Row) -> bool:
    if isinstance(row, str) or "file_name" not in row or "annotation_id" in row:  # the latter is of Label Studio
        return False
    return any(name in row for name in FIELDS) or any(isinstance(row.get(name), str | list) for name in CLASS_COLUMNS)


def _table_rows(tree: Tree, tables: dict[Path, list[tuple[int, Row]]]) -> list[Sample | Reject]:
    found: list[Sample | Reject] = []
    boxes = Boxes()
    for path, rows in tables.items():
        by_class = [row for _, row in rows if isinstance(row, dict) and not {"is_food", *FIELDS} & row.keys()]
        if by_class and any(_is_labeled(row) for row in by_class):
            boxes.files.append(path)
            _read_classes(tree, path, rows, boxes)
        else:
            found += [_metadata_row(tree, path, number, row) for number, row in rows]
    columns = {name for path in boxes.files for _, row in tables[path] if isinstance(row, dict) for name in row}
    if BOX_COLUMNS & columns or any(len(names) > 1 for names in boxes.names.values()):
        known = {row.name for row in found}
        return found + [row for row in box_rows(tree, boxes) if row.name not in known]
    alone = [_class_sample(tree, name, image, boxes.splits[image]) for image, [name] in boxes.names.items()]
    return found + boxes.rejects + alone


def _metadata_row(tree: Tree, table: Path, number: int, row: Row) -> Sample | Reject:
    where = f"{tree.name(table)} line {number}"
    if isinstance(row, str):
        return Reject(where, row)
    stated, row = str(row.get("file_name")), {"image_title": ""} | row
    where = f"{where} ({first_few([stated])})"
    if missing := [key for key in ("file_name", *FoodRecord.model_fields) if key not in row]:
        return Reject(where, f"lacks {', '.join(missing)}: add file_name, is_food, food_items and drink_items")
    if isinstance(image := tree.find(stated, table), str):
        return Reject(where, image)
    stated_too = ("source", "license", "label_scope", "category", "group")
    texts = {key: str(row[key]) for key in stated_too if row.get(key) not in (None, "")}
    return tree.sample(image, label_of(row), split=_stated_split(tree, table, row, image), **texts)


def _stated_split(tree: Tree, table: Path, row: dict[str, Any], image: Path) -> Split | None:
    return normalize_split(row.get("split")) or tree.split_of(image) or tree.split_of(table)


def _read_classes(tree: Tree, table: Path, rows: list[tuple[int, Row]], boxes: Boxes) -> None:
    """Read rows of a file and a class. Several rows of an image, or boxes, name all that is annotated."""
    for number, row in rows:
        where = f"{tree.name(table)} line {number}"
        if isinstance(row, str):
            boxes.rejects.append(Reject(where, row))
            continue
        stated = str(row.get("file_name"))
        where, image = f"{where} ({first_few([stated])})", tree.find(stated, table)
        cell = str(next((row[name] for name in CLASS_COLUMNS if row.get(name)), ""))
        items = split_items(cell)
        found = {class_of(str(item)) for item in items} if isinstance(items, list) else set()
        if isinstance(image, str):
            boxes.rejects.append(Reject(where, image))
        elif not found or any(names_no_class(name) or flag_of(name) is not None for name in found):
            boxes.rejects.append(Reject(where, f"the class {cell!r} names no food: write its name"))
        else:
            boxes.names[image] |= found
            boxes.classes |= found
            boxes.splits[image] = _stated_split(tree, table, row, image)


def _class_rows(tree: Tree) -> list[Sample | Reject]:
    root = _without_wrapper(tree)
    classes = {image: _class_folder(image.relative_to(root).parent.parts) for image in tree.images}
    named = sorted({parts for parts in classes.values() if parts})
    if not named:
        inside = first_few(sorted({tree.name(image.parent) for image in tree.images})) or "nothing"
        data = first_few(tree.name(path) for path in tree.files if path.suffix.lower() in DATA_FILES)
        beside = f" and files that hold no labels of them that we read ({data})" if data else ""
        raise DatasetError(
            f"{tree.root} has neither metadata.jsonl nor metadata.csv nor class-named subfolders with images: it has "
            f"images in {inside}{beside}. {REMEDY}"
        )
    _refuse_unclear(tree, root, classes, named)
    names = {class_of(parts[-1]) for parts in named} - NOT_FOOD_CLASSES
    if objects := sorted(filter(is_object, names)):
        print(
            f"{tree.root}: classes that seem to name no food ({len(objects)}): {first_few(objects)}; if they are none, "
            "move their images into a folder not_food",
            file=sys.stderr,
        )
    return [
        _class_sample(tree, class_of(parts[-1]), image, tree.split_of(image))
        if (parts := classes[image])
        else Reject(tree.name(image), "lies in no folder that is named after a class: move it into one")
        for image in tree.images
    ]


def _without_wrapper(tree: Tree) -> Path:
    """Return the folder that holds the classes: archives often unpack into a single folder around them."""
    root = tree.root
    while True:
        tops = {image.relative_to(root).parts[0] for image in tree.images}
        if len(tops) != 1 or (below := root / next(iter(tops))) in tree.images or names_no_class(below.name):
            return root
        if any(image.parent == below for image in tree.images):
            return root
        root = below


def _class_folder(parts: tuple[str, ...]) -> tuple[str, ...]:
    """Return the path of the folder that names the class: after the last split, else the first that is no container."""
    ends = [index for index, part in enumerate(parts, 1) if not names_no_class(part)]
    last = max((index for index, part in enumerate(parts, 1) if names_no_class(part)), default=0)
    return parts[: next((end for end in ends if end > last), ends[0] if ends else 0)]


def _refuse_unclear(tree: Tree, root: Path, classes: dict[Path, tuple[str, ...]], named: list[tuple[str, ...]]) -> None:
    below: dict[tuple[str, ...], set[str]] = defaultdict(set)  # class → its subfolders, "" for itself
    for image, parts in classes.items():
        rest = [part for part in image.relative_to(root).parts[len(parts) : -1] if not names_no_class(part)]
        below[parts].add(rest[0] if rest else "")
    for parts in named:
        if len(below[parts]) > 1 and "" not in below[parts] and class_of(parts[-1]) not in NOT_FOOD_CLASSES:
            inside = first_few(sorted(below[parts]))
            raise DatasetError(
                f"{'/'.join(parts)} in {root} has subfolders ({inside}) and no images of its own: if they are the "
                "classes, move them up; if not, move their images up"
            )
    images = {image.with_suffix("") for image in tree.images}
    sure = [path for path in tree.files if _holds_labels(path, path.with_suffix("") in images)]
    if len({class_of(parts[-1]) for parts in named}) == 1:
        first = tree.images[0].name
        lists = (path for path in tree.files if path.suffix.lower() == ".txt" and first in decoded(path))
        sure += [path for path in tree.files if path.suffix.lower() in DATA_FILES] + list(lists)
    if sure:
        names = first_few(dict.fromkeys(map(tree.name, sure)))
        raise DatasetError(
            f"{tree.root} has files that may hold the labels and that we do not read ({names}): {REMEDY}"
        )


def _holds_labels(path: Path, beside_image: bool) -> bool:
    """Tell whether a file of a format that we do not read holds labels: Pascal VOC, CVAT, LabelMe, spreadsheets."""
    stem, suffix = path.stem.lower(), path.suffix.lower()
    if suffix == ".json":
        return beside_image and '"shapes"' in decoded(path)
    if suffix == ".xml":
        return beside_image or stem.startswith("annotation")
    return stem == "metadata" and suffix in DATA_FILES


def _class_sample(tree: Tree, name: str, image: Path, split: Split | None = None) -> Sample:
    if name in NOT_FOOD_CLASSES:
        return tree.sample(image, NOTHING, category=name, split=split)
    return tree.sample(image, class_label(name), category=name, split=split, label_scope=PRIMARY)


def _report(tree: Tree, rows: Iterable[Sample | Reject], used: list[Path]) -> None:
    """Name on stderr what is not read: images that no label names, and files that are neither images nor labels."""
    known = {row.name for row in rows}
    unnamed = [name for image in tree.images if (name := tree.name(image)) not in known]
    rest = sorted({*tree.files}.difference(used))
    passed = [path for path in rest if path.name not in OWN_FILES and not PLAIN_FILES.fullmatch(path.name)]
    if unnamed and used:
        print(f"{tree.root}: images that no label names ({len(unnamed):,}): {first_few(unnamed)}", file=sys.stderr)
    if passed:
        print(f"{tree.root}: files passed over ({len(passed):,}): {first_few(map(tree.name, passed))}", file=sys.stderr)
