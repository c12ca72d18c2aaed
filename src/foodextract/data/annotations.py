"""Exports of annotation tools as labels: COCO JSON, YOLO text files with a list of names, and Label Studio JSON.

The items of an image are the names of its classes. Other food may be visible, so the `label_scope` is
"annotated_classes(N)" for N classes of food. Classes that are no food (see `label_rules/words/objects.txt`) are left
out. An image without a class of food is rejected: nobody stated that it shows none, unless a class is "not food".
"""

import json
import re
import sys
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

import yaml

from foodextract.data.label_rules.vocabulary import field_of, is_object
from foodextract.data.layout import NOT_FOOD, Tree, class_of, first_few, names_no_class
from foodextract.data.samples import NOTHING, DatasetError, Reject, Sample, Split, split_named
from foodextract.data.tables import decoded

NAME_LISTS = ("classes.txt", "obj.names", "_darknet.labels", "classes.names")
NO_FOOD = (
    "has no box of a food, and nobody states that it shows none: move it to a folder `not_food` of another data set "
    "if that is so"
)


@dataclass
class Boxes:
    """What exports say: their files and classes, and of each image the classes and the split."""

    files: list[Path] = field(default_factory=list)
    classes: set[str] = field(default_factory=set)
    names: dict[Path, set[str]] = field(default_factory=lambda: defaultdict(set))
    splits: dict[Path, Split | None] = field(default_factory=dict)
    rejects: list[Reject] = field(default_factory=list)

    def add(self, tree: Tree, file: Path, stated: str, names: Iterable[str]) -> None:
        """Add what a file says about an image. The file may name the folders of another machine."""
        image = tree.find(stated, file, anywhere=True)
        if isinstance(image, str):
            self.rejects.append(Reject(f"{tree.name(file)} ({first_few([stated])})", image))
            return
        self.names[image] |= set(names)
        self.splits[image] = self.splits.get(image) or tree.split_of(image) or tree.split_of(file)


def read_boxes(tree: Tree) -> Boxes | None:
    """Read all exports in a folder: those in JSON, else those of YOLO. None where there is no export.

    Raises DatasetError for a list of names that cannot be read.
    """
    boxes = Boxes()
    for file in tree.files:
        if file.suffix.lower() != ".json":
            continue
        try:
            data = json.loads(decoded(file))
        except (ValueError, RecursionError):
            continue  # `labeled_folder` says that the file is not read
        if isinstance(data, dict) and all(isinstance(data.get(key), list) for key in ("images", "categories")):
            read: Callable[[Tree, Path, Any, Boxes], None] = _read_coco
        elif isinstance(data, list) and any(map(_is_task, data)):
            read = _read_label_studio
        else:
            continue
        boxes.files.append(file)
        try:
            read(tree, file, data, boxes)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DatasetError(f"{file} is no complete export ({error!r}): export it again") from error
    if not boxes.files:
        _read_yolo(tree, boxes)
    return boxes if boxes.files else None


def box_rows(tree: Tree, boxes: Boxes) -> list[Sample | Reject]:
    """Return a row per image. Raises DatasetError when no class is a food."""
    foods = {name for name in boxes.classes if not (names_no_class(name) or is_object(name))}
    if not foods:
        classes = first_few(sorted(boxes.classes))
        reason = f"its classes are no foods ({classes})" if classes else "it holds no classes"
        raise DatasetError(
            f"{tree.root} is an export of an annotation tool ({first_few(map(tree.name, boxes.files))}), and {reason}. "
            "Its subfolders are no classes. Export it again with the names of the foods"
        )
    if others := boxes.classes - foods:
        print(f"{tree.root}: classes that name no food ({len(others)}): {first_few(sorted(others))}", file=sys.stderr)
    rows: list[Sample | Reject] = list(boxes.rejects)
    unclear = {reject.name for reject in boxes.rejects}
    for image in tree.images:
        name, found = tree.name(image), boxes.names.get(image, set())
        items = sorted(found & foods)
        if not items and not found & NOT_FOOD:
            rows += [] if name in unclear else [Reject(name, NO_FOOD)]
            continue
        drinks = [item for item in items if field_of(item) == "drink_items"]
        foods_here = [item for item in items if item not in drinks]
        label = {"is_food": 1, "image_title": "", "food_items": foods_here, "drink_items": drinks} if items else NOTHING
        group = image.name.split(".rf.")[0] if ".rf." in image.name else ""  # Roboflow's copies of one image
        scope = f"annotated_classes({len(foods)})"
        rows.append(tree.sample(image, label, group=group, split=boxes.splits.get(image), label_scope=scope))
    return rows


def _read_coco(tree: Tree, file: Path, data: dict[str, Any], boxes: Boxes) -> None:
    categories = data["categories"]
    names = {category["id"]: class_of(str(category["name"])) for category in categories}
    found = defaultdict(set)
    for box in data.get("annotations") or ():
        if box.get("category_id") in names:
            found[box.get("image_id")].add(names[box["category_id"]])
    parents = {category.get("supercategory") for category in categories}  # Roboflow lists the project as a class
    boxes.classes |= {names[category["id"]] for category in categories if category["name"] not in parents}
    boxes.classes |= set().union(*found.values())
    for image in data["images"]:
        boxes.add(tree, file, str(image.get("file_name")), found[image.get("id")])


def _is_task(task: Any) -> bool:
    return isinstance(task, dict) and (isinstance(task.get("data"), dict) or "annotation_id" in task)


def _read_label_studio(tree: Tree, file: Path, tasks: list[dict[str, Any]], boxes: Boxes) -> None:
    """Read tasks in the format JSON, or JSON-MIN, where the results are keys of the task."""
    for task in filter(_is_task, tasks):
        stated = task.get("data") or task
        done = [a for a in task.get("annotations") or task.get("completions") or () if not a.get("was_cancelled")]
        results = [result.get("value") for annotation in done for result in annotation.get("result") or ()]
        names = {class_of(name) for name in _choices(results if "data" in task else list(task.values()))}
        boxes.classes |= names
        texts = [value for value in stated.values() if isinstance(value, str)]
        image = next((text for text in (stated.get("image"), stated.get("img"), *texts) if isinstance(text, str)), "")
        path = unquote(image.partition("?d=")[2] or image)
        head, _, original = PurePosixPath(path).name.partition("-")  # uploads get a prefix of 8 digits
        known = not isinstance(tree.find(path, file, anywhere=True), str)
        boxes.add(tree, file, original if not known and len(head) == 8 and original else path, names)


def _choices(value: Any) -> Iterable[str]:
    """Yield the texts of keys such as `rectanglelabels`, `choices` and `choice`, at any depth."""
    if isinstance(value, list):
        for part in value:
            yield from _choices(part)
    elif isinstance(value, dict):
        for key, part in value.items():
            if key.endswith("labels") or key in ("choices", "choice"):
                yield from (text for text in (part if isinstance(part, list) else [part]) if isinstance(text, str))


def _read_yolo(tree: Tree, boxes: Boxes) -> None:
    found = [path for path in tree.files if path.suffix == ".txt" and path.name not in NAME_LISTS]
    texts, beside = {_pair(tree, path): path for path in found}, {path.with_suffix(""): path for path in found}
    paired = {image: beside.get(image.with_suffix("")) or texts.get(_pair(tree, image)) for image in tree.images}
    pairs = {image: text for image, text in paired.items() if text}
    labels = {image: _read_labels(text) for image, text in pairs.items()}
    if not any(isinstance(classes, set) and classes for classes in labels.values()):
        return  # text files of another kind, such as captions
    lists = {path: names for path in tree.files if (names := _names_in(path))}
    if len({json.dumps(names) for names in lists.values()}) != 1:
        raise DatasetError(
            f"{tree.root} has YOLO labels and {len(lists)} different lists of their names "
            f"({first_few(map(tree.name, lists)) or 'no data.yaml'}): read one export at a time, with its data.yaml"
        )
    names = next(iter(lists.values()))
    boxes.files += [*lists, *pairs.values()]
    boxes.classes |= set(names.values())
    stated = _stated_splits(tree, lists)
    for image, classes in labels.items():
        if isinstance(classes, set) and (unknown := classes - names.keys()):
            classes = f"class {min(unknown)} has no name in {first_few(map(tree.name, lists))}"
        if isinstance(classes, str):
            boxes.rejects.append(Reject(tree.name(image), f"{tree.name(pairs[image])}: {classes}"))
            continue
        boxes.names[image] |= {names[number] for number in classes}
        boxes.splits[image] = tree.split_of(image) or stated.get(image)


def _pair(tree: Tree, path: Path) -> tuple[str, ...]:
    """Return what an image and its label file share: `train/images/a.jpg` and `train/labels/a.txt`."""
    name = PurePosixPath(unicodedata.normalize("NFC", tree.name(path)))
    return (*(part for part in name.parts[:-1] if split_named(part) or _sets_apart(part)), name.stem)


def _sets_apart(part: str) -> bool:
    """Tell whether a folder is more than a place for images or labels: a class, or one of several ("batch_02")."""
    numbered = re.search(r"\d", part) and not re.search("im(age|g)|label|annot", part, re.IGNORECASE)
    return bool(numbered) or not names_no_class(part)


def _read_labels(path: Path) -> set[int] | str:
    """Return the classes of the boxes or polygons in a file, or the reason why it is none of YOLO."""
    found = set()
    for number, line in enumerate(decoded(path).splitlines(), 1):
        try:
            numbers = list(map(float, line.split()))
        except ValueError:
            numbers = [0.5]
        if numbers and (len(numbers) < 5 or not numbers[0].is_integer()):
            return f"line {number} is not a class with a box"
        found |= {int(value) for value in numbers[:1]}
    return found


def _names_in(path: Path) -> dict[int, str]:
    """Return the classes in a list of names, {} for any other file."""
    if path.name.lower() in NAME_LISTS:
        return dict(enumerate(class_of(line) for line in decoded(path).splitlines() if line.strip()))
    names = _yaml(path).get("names")
    pairs = names.items() if isinstance(names, dict) else enumerate(names) if isinstance(names, list) else ()
    return {int(number): class_of(str(name)) for number, name in pairs if str(number).isdecimal()}


def _yaml(path: Path) -> dict[Any, Any]:
    if path.suffix.lower() not in (".yaml", ".yml"):
        return {}
    try:
        data = yaml.safe_load(decoded(path))
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise DatasetError(f"{path} is not YAML ({' '.join(str(error).split())[:200]}): export it again") from error
    return data if isinstance(data, dict) else {}


def _stated_splits(tree: Tree, lists: Iterable[Path]) -> dict[Path, Split]:
    """Return the splits that a data.yaml states, as folders or as files that list images."""
    stated: dict[Path, Split] = {}
    entries = [(split_named(str(key)), value) for file in lists for key, value in _yaml(file).items()]
    splits: tuple[Split, Split] = ("train", "test")  # an image in both is held out
    for split in splits:
        for value in (value for named, value in entries if named == split):
            for text in map(str, value if isinstance(value, list) else [value]):
                stated |= dict.fromkeys(_listed(tree, text), split)
    return stated


def _listed(tree: Tree, stated: str) -> list[Path]:
    """Return the images in a folder, or in a list of images, as an entry of data.yaml names it."""
    parts = PurePosixPath(stated.replace("\\", "/")).parts
    inside = "/".join(part for part in parts if part not in (".", "..", "/"))
    if file := next((path for path in tree.files if f"/{tree.name(path)}".endswith(f"/{inside}")), None):
        found = [tree.find(line.strip(), file, anywhere=True) for line in decoded(file).splitlines()]
        return [image for image in found if isinstance(image, Path)]
    return [image for image in tree.images if inside and f"/{inside}/" in f"/{tree.name(image)}"]
