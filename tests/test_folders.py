"""Labeled folders as people have them. Every test makes its own small input."""

import csv
import io
import json
import os
import unicodedata
from datetime import datetime

import datasets
import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from foodextract.data import dataset, sources
from foodextract.data.samples import DatasetError, Reject, Sample, normalize_split, split_named

NAMES = ("pizza", "ramen", "beer", "salad")
RNG = np.random.default_rng()


@pytest.fixture(autouse=True)
def same_images():
    """Draw the same images in whatever order tests run: the split of an image follows from its pixels."""
    RNG.bit_generator.state = np.random.default_rng(0).bit_generator.state


def image(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(RNG.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(path, "PNG")


def records(folder, names=tuple(f"{n}.png" for n in range(6))):
    """Make images, and return the rows that label them."""
    image(*(folder / name for name in names))
    items = [NAMES[n % 4] for n in range(len(names))]
    return [
        {"file_name": name, "is_food": 1, "image_title": item}
        | {"food_items": [] if item == "beer" else [item], "drink_items": [item] if item == "beer" else []}
        for name, item in zip(names, items, strict=True)
    ]


def write_lines(path, rows, encoding="utf-8"):
    path.write_bytes("".join(json.dumps(row) + "\n" for row in rows).encode(encoding))


def write_csv(path, rows, delimiter=",", encoding="utf-8", items=";".join):
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter)
    writer.writerow(rows[0])
    writer.writerows([items(value) if isinstance(value, list) else value for value in row.values()] for row in rows)
    path.write_bytes(text.getvalue().encode(encoding))


def write_parquet(path, rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def read(folder):
    """Return the labels by name, and the rejects."""
    rows = list(sources.labeled_folder(folder))
    samples = {row.name: row for row in rows if isinstance(row, Sample)}
    return samples, [row for row in rows if isinstance(row, Reject)]


def items(sample):
    return sample.label["food_items"] + sample.label["drink_items"]


# a folder is not always a class


@pytest.mark.parametrize("layout", ["{split}/{name}", "{name}/{split}", "images/{split}/{name}", "v1/{split}/{name}"])
@pytest.mark.parametrize("held_out", ["val", "Valid", "validation", "dev", "TEST", "test_images", "holdout", "val2017"])
def test_split_folders_hold_out_and_name_no_food(tmp_path, layout, held_out):
    for split in ("train", held_out):
        for name in ("pizza", "apple_pie", "not_food"):
            image(*(tmp_path / layout.format(split=split, name=name) / f"{split}-{n}.png" for n in range(2)))
    samples, rejects = read(tmp_path)
    assert {(row.category, row.split) for row in samples.values()} == {
        (name, split) for name in ("pizza", "apple pie", "not food") for split in ("train", "test")
    }
    assert (len(samples), rejects) == (12, [])
    assert all(("train" in name) == (row.split == "train") for name, row in samples.items())


def test_a_train_folder_that_stands_alone_states_no_split(tmp_path):
    folder = tmp_path / "in"
    image(*(folder / "train" / name / f"{number}.png" for name in ("pizza", "ramen") for number in range(8)))
    built = dataset.open_dataset(folder, tmp_path / "out")
    assert {row["category"] for split in built.values() for row in split} == {"pizza", "ramen"}
    assert (len(built["train"]) + len(built["test"]), min(len(built["train"]), len(built["test"])) > 0) == (16, True)


@pytest.mark.parametrize("inner", ["metadata.jsonl", "metadata.csv"])
def test_tables_in_split_folders_state_the_split(tmp_path, inner):
    for split in ("train", "val"):
        rows = records(tmp_path / split)
        (write_lines if inner.endswith("jsonl") else write_csv)(tmp_path / split / inner, rows)
    samples, rejects = read(tmp_path)
    assert (len(samples), rejects) == (12, [])
    assert {name.split("/")[0]: row.split for name, row in samples.items()} == {"train": "train", "val": "test"}


def test_split_folders_below_a_table_state_the_split(tmp_path):
    names = ("train/1.png", "Dev/1.png")
    write_lines(tmp_path / "metadata.jsonl", records(tmp_path, names))
    assert {name: row.split for name, row in read(tmp_path)[0].items()} == {names[0]: "train", names[1]: "test"}


@pytest.mark.parametrize("suffix", ["csv", "ndjson", "parquet"])
def test_tables_named_after_splits_state_the_split(tmp_path, suffix):
    write = {"csv": write_csv, "ndjson": write_lines, "parquet": write_parquet}[suffix]
    rows = records(tmp_path / "images")
    write(tmp_path / f"train.{suffix}", rows[:4])
    write(tmp_path / f"val.{suffix}", rows[4:])
    assert [row.split for row in read(tmp_path)[0].values()] == ["train"] * 4 + ["test"] * 2


@pytest.mark.parametrize("name", ["images", "train", "data", "JPEGImages", "0", "batch_1", "food", "IMG"])
def test_images_in_a_folder_that_names_no_class_are_refused(tmp_path, name):
    image(tmp_path / name / "1.png", tmp_path / "valid" / "2.png")
    with pytest.raises(DatasetError, match=r"(?s)neither metadata.jsonl nor .* one subfolder per food"):
        sources.labeled_folder(tmp_path)


def test_loose_images_beside_classes_are_rejected_by_name(tmp_path):
    image(tmp_path / "pizza" / "1.png", tmp_path / "2.png", tmp_path / "test" / "3.png")
    samples, rejects = read(tmp_path)
    assert list(samples) == ["pizza/1.png"]
    assert [(row.name, "no folder" in row.reason) for row in rejects] == [("2.png", True), ("test/3.png", True)]


@pytest.mark.parametrize(
    "system",
    [".git", "__MACOSX", ".thumbnails", "@eaDir", "__pycache__", ".cache", "Thumbs", "_cache", "thumb", "RECYCLER"],
)
def test_folders_of_systems_are_no_classes(tmp_path, system):
    image(tmp_path / "pizza" / "1.png", tmp_path / system / "2.png", tmp_path / "pizza" / system / "3.png")
    (tmp_path / system / "metadata.jsonl").write_text("{}\n")
    assert list(read(tmp_path)[0]) == ["pizza/1.png"]
    assert [row.name for row in sources.not_food_folder(tmp_path)] == ["pizza/1.png"]


def test_a_data_set_built_inside_the_folder_is_not_read_again(tmp_path):
    for number in range(20):
        image(tmp_path / ("pizza" if number % 2 else "ramen") / f"{number}.png")
    for _ in range(2):
        opened = dataset.open_dataset(tmp_path, tmp_path / "out" / "dataset")
    assert {row["category"] for split in opened.values() for row in split} == {"pizza", "ramen"}
    assert len(read(tmp_path)[0]) == 20


def test_a_folder_around_the_classes_is_no_class(tmp_path):
    image(tmp_path / "food-101" / "images" / "pizza" / "1.png", tmp_path / "food-101" / "images" / "ramen" / "2.png")
    assert [row.category for row in read(tmp_path)[0].values()] == ["pizza", "ramen"]
    image(tmp_path / "b" / "my photos" / "pizza" / "1.png", tmp_path / "b" / "my photos" / "ramen" / "2.png")
    assert [row.category for row in read(tmp_path / "b")[0].values()] == ["pizza", "ramen"]


def test_groups_of_classes_are_refused(tmp_path):
    image(tmp_path / "asian" / "ramen" / "1.png", tmp_path / "asian" / "sushi" / "2.png", tmp_path / "pizza" / "3.png")
    with pytest.raises(DatasetError, match=r"asian .* has subfolders \(ramen, sushi\).* move them up"):
        sources.labeled_folder(tmp_path)
    image(tmp_path / "asian" / "4.png")  # with images of its own it is a class
    assert {row.category for row in read(tmp_path)[0].values()} == {"asian", "pizza"}


@pytest.mark.parametrize("labels", ["labels.xlsx", "export.json", "Annotations/1.xml", "my_shots/1.xml"])
def test_a_lone_folder_beside_labels_we_do_not_read_is_no_class(tmp_path, labels):
    image(tmp_path / "my_shots" / "1.png", tmp_path / "photos" / "1.png")
    (tmp_path / labels).parent.mkdir(exist_ok=True)
    (tmp_path / labels).write_text("{}")
    with pytest.raises(DatasetError, match=f"do not read .*{labels.split('/')[-1]}"):
        sources.labeled_folder(tmp_path)


@pytest.mark.parametrize(
    ("file", "text"),
    [("metadata.xlsx", ""), ("annotations.xml", ""), ("a/1.xml", ""), ("a/1.json", '{"shapes": [], "imagePath": "1"}')],
)
def test_folders_beside_labels_we_do_not_read_are_no_classes(tmp_path, file, text):
    image(tmp_path / "a" / "1.png", tmp_path / "b" / "2.png")
    (tmp_path / file).write_text(text)
    with pytest.raises(DatasetError, match=rf"(?s)do not read \({file}\).*spreadsheet as CSV"):
        sources.labeled_folder(tmp_path)


def test_a_list_of_images_and_labels_in_a_text_is_named(tmp_path):
    image(tmp_path / "holiday" / "1.png", tmp_path / "holiday" / "2.png")
    (tmp_path / "holiday" / "notes.txt").write_text("a sunny day")
    assert {row.category for row in read(tmp_path)[0].values()} == {"holiday"}
    (tmp_path / "labels.txt").write_text("1.png pizza\n2.png ramen\n")
    with pytest.raises(DatasetError, match=r"do not read \(labels\.txt\)"):
        sources.labeled_folder(tmp_path)


def test_classes_that_are_objects_are_named(tmp_path, capsys):
    image(*(tmp_path / name / "1.png" for name in ("pizza", "hot dog", "poke bowl", "cars", "people", "not_food")))
    assert len(read(tmp_path)[0]) == 6
    assert "classes that seem to name no food (2): cars, people" in capsys.readouterr().err


def test_files_passed_over_are_counted_and_named_once(tmp_path, capsys, caplog):
    image(tmp_path / "pizza" / "1.png", tmp_path / "ramen" / "2.png")
    for name in ("pizza/a.psd", "ramen/b.mov", "README.md"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "pizza" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    sources.not_food_folder(tmp_path)
    samples, _ = read(tmp_path)
    assert "pizza/gone.png" in samples  # rejected with a reason when it is opened
    line = f"{tmp_path}: files passed over (2): pizza/a.psd, ramen/b.mov\n"
    assert (capsys.readouterr().err, caplog.messages) == (line * 2, [])


# exports of annotation tools


def coco(folder, images, classes=("pizza", "beer", "fork"), **categories):
    """Write an export with the classes of each image, and the images."""
    image(*(folder / name for name in images))
    content = {
        "images": [{"id": n, "file_name": name, "width": 8, "height": 8} for n, name in enumerate(images)],
        "categories": [{"id": n, "name": name} | categories for n, name in enumerate(classes)],
        "annotations": [
            {"id": 0, "image_id": n, "category_id": classes.index(item), "bbox": [0, 0, 4, 4]}
            for n, names in enumerate(images.values())
            for item in names
        ],
    }
    (folder / "_annotations.coco.json").write_text(json.dumps(content))


def test_coco_boxes_of_each_split(tmp_path):
    coco(tmp_path / "train", {"a_jpg.rf.1.jpg": ["pizza", "beer", "pizza"], "a_jpg.rf.2.jpg": ["pizza", "fork"]})
    coco(tmp_path / "valid", {"b.jpg": ["beer"], "c.jpg": [], "d.jpg": ["fork"]})
    samples, rejects = read(tmp_path)
    labels = {name: (row.label["food_items"], row.label["drink_items"], row.split) for name, row in samples.items()}
    assert labels == {
        "train/a_jpg.rf.1.jpg": (["pizza"], ["beer"], "train"),
        "train/a_jpg.rf.2.jpg": (["pizza"], [], "train"),
        "valid/b.jpg": ([], ["beer"], "test"),
    }
    assert {row.label_scope for row in samples.values()} == {"annotated_classes(2)"}  # a fork is no food
    assert samples["train/a_jpg.rf.1.jpg"].group == samples["train/a_jpg.rf.2.jpg"].group != ""
    assert [row.name for row in rejects] == ["valid/c.jpg", "valid/d.jpg"]
    assert "nobody states that it shows none" in rejects[0].reason


def test_coco_in_a_folder_of_its_own(tmp_path):
    for split, item in (("train2017", "pizza"), ("val2017", "hot dog")):
        coco(tmp_path / split, {"1.jpg": [item], "2.jpg": ["person"]}, ("pizza", "hot dog", "person", "wine glass"))
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / split / "_annotations.coco.json").rename(tmp_path / "annotations" / f"instances_{split}.json")
    samples, rejects = read(tmp_path)
    assert {name: (items(row), row.split) for name, row in samples.items()} == {
        "train2017/1.jpg": (["pizza"], "train"),
        "val2017/1.jpg": (["hot dog"], "test"),
    }
    assert len(rejects) == 2


def test_an_export_without_names_of_food_is_refused(tmp_path):
    coco(tmp_path / "train", {"1.jpg": ["person"]}, ("person", "0"))
    with pytest.raises(DatasetError, match=r"its classes are no foods \(0, person\)"):
        sources.labeled_folder(tmp_path)
    (tmp_path / "train" / "_annotations.coco.json").write_text('{"images": [], "annotations": [], "categories": []}')
    with pytest.raises(DatasetError, match="it holds no classes"):
        sources.labeled_folder(tmp_path)
    (tmp_path / "train" / "_annotations.coco.json").write_text('{"images": [7], "annotations": 7, "categories": [{}]}')
    with pytest.raises(DatasetError, match="no complete export"):
        sources.labeled_folder(tmp_path)


def test_a_box_of_a_missing_image_costs_that_image_only(tmp_path):
    coco(tmp_path, {"a.jpg": ["pizza"], "b.jpg": ["beer"]})
    (tmp_path / "b.jpg").unlink()
    samples, [reject] = read(tmp_path)
    assert list(samples) == ["a.jpg"]
    assert "b.jpg" in reject.name
    assert "no such file" in reject.reason


def test_an_odd_entry_of_coco_costs_that_entry_only(tmp_path):
    coco(tmp_path, {"a.jpg": ["pizza"]})
    export = json.loads((tmp_path / "_annotations.coco.json").read_text())
    export["images"] += [{"id": 7}, {"id": 8, "file_name": None}, {"file_name": "x.jpg"}]
    export["annotations"] += [{"id": 7}, {"image_id": 99, "category_id": 0}, {"image_id": 0, "category_id": 99}]
    (tmp_path / "_annotations.coco.json").write_text(json.dumps(export))
    samples, rejects = read(tmp_path)
    assert ([items(row) for row in samples.values()], len(rejects)) == ([["pizza"]], 3)


@pytest.mark.parametrize("layout", ["{split}/{kind}", "{kind}/{split}"])
@pytest.mark.parametrize(
    "names", ["names: [pizza, Beer, plate]\nnc: 3\n", "names:\n  0: pizza\n  1: beer\n  2: plate\n"]
)
def test_yolo_boxes(tmp_path, layout, names):
    (tmp_path / "data.yaml").write_text(f"train: ../train/images\nval: ../valid/images\n{names}")
    for split in ("train", "valid"):
        pictures, labels = (tmp_path / layout.format(split=split, kind=kind) for kind in ("images", "labels"))
        image(*(pictures / f"{n}.jpg" for n in range(5)))
        labels.mkdir(parents=True)
        texts = ["0 .5 .5 .1 .1\n1 .5 .5 .1 .1\n", "1 .1 .1 .2 .1 .2 .2\n", "", "9 .5 .5 .1 .1", "2 .5 .5 .1 .1"]
        for n, text in enumerate(texts):
            (labels / f"{n}.txt").write_text(text)
    samples, rejects = read(tmp_path)
    assert sorted((items(row), row.split) for row in samples.values()) == [
        (["beer"], "test"), (["beer"], "train"), (["pizza", "beer"], "test"), (["pizza", "beer"], "train"),
    ]  # fmt: skip
    assert {row.label_scope for row in samples.values()} == {"annotated_classes(2)"}
    assert sorted("class 9 has no name" in row.reason for row in rejects) == [False] * 4 + [True] * 2


def test_yolo_labels_of_several_batches_stay_apart(tmp_path):
    (tmp_path / "data.yaml").write_text("names: [pizza, salad]\n")
    for number, folders in enumerate((("batch_01/images", "batch_01/labels"), ("batch_02/images", "batch_02/labels"))):
        image(tmp_path / folders[0] / "0001.jpg")
        (tmp_path / folders[1]).mkdir(parents=True)
        (tmp_path / folders[1] / "0001.txt").write_text(f"{number} .5 .5 .1 .1\n")
    for number, folder in enumerate(("raw", "processed")):
        image(tmp_path / folder / "2.jpg")
        (tmp_path / folder / "2.txt").write_text(f"{number} .5 .5 .1 .1\n")
    found = {name: items(row) for name, row in read(tmp_path)[0].items()}
    assert found == {
        "batch_01/images/0001.jpg": ["pizza"], "batch_02/images/0001.jpg": ["salad"],
        "raw/2.jpg": ["pizza"], "processed/2.jpg": ["salad"],
    }  # fmt: skip


def test_group_zero_is_a_group(tmp_path):
    rows = records(tmp_path)
    write_lines(tmp_path / "metadata.jsonl", [row | {"group": number % 3} for number, row in enumerate(rows)])
    assert sorted({row.group for row in read(tmp_path)[0].values()}) == ["0", "1", "2"]


def test_a_parquet_table_may_have_columns_that_json_lacks(tmp_path):
    rows = [row | {"taken": datetime(2026, 1, 1), "thumbnail": b"x"} for row in records(tmp_path)]
    write_parquet(tmp_path / "metadata.parquet", rows)
    assert len(read(tmp_path)[0]) == 6


def test_empty_tuples_in_cells_are_empty_lists(tmp_path):
    rows = [row | {"is_food": 0, "image_title": "", "food_items": [], "drink_items": []} for row in records(tmp_path)]
    write_csv(tmp_path / "metadata.csv", rows, items=lambda value: str(tuple(value)))
    assert {row.label["is_food"] for row in read(tmp_path)[0].values()} == {0}
    report = dataset.build(sources.labeled_folder(tmp_path), tmp_path.parent / f"{tmp_path.name}-out")
    built = dataset.load(tmp_path.parent / f"{tmp_path.name}-out")
    assert {row["is_food"] for split in built.values() for row in split.remove_columns("image")} == {0}
    assert report["kept"] == 6


def test_yolo_with_classes_txt_beside_the_labels_and_without_names(tmp_path):
    name = unicodedata.normalize("NFD", "crème")
    image(tmp_path / "images" / f"{name}.jpg")
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "crème.txt").write_text("1 .5 .5 .1 .1")
    with pytest.raises(DatasetError, match=r"no data.yaml.*its data.yaml"):
        sources.labeled_folder(tmp_path)
    (tmp_path / "labels" / "classes.txt").write_text("pizza\napple_pie\n")
    assert items(read(tmp_path)[0][f"images/{name}.jpg"]) == ["apple pie"]


@pytest.mark.parametrize("number", ["nan", "inf", "-1", "1.5", "x"])
def test_an_odd_line_of_yolo_costs_that_image_only(tmp_path, number):
    image(tmp_path / "images" / "a.jpg", tmp_path / "images" / "b.jpg")
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "a.txt").write_text("0 .5 .5 .1 .1")
    (tmp_path / "labels" / "b.txt").write_text(f"{number} .5 .5 .1 .1")
    (tmp_path / "data.yaml").write_text("names: [pizza]")
    samples, [reject] = read(tmp_path)
    assert (list(samples), reject.name) == (["images/a.jpg"], "images/b.jpg")


def test_other_yaml_beside_classes_is_passed_over(tmp_path):
    image(tmp_path / "pizza" / "1.png", tmp_path / "ramen" / "2.png")
    (tmp_path / "mkdocs.yml").write_text("emoji: !!python/name:emoji\n b: [")
    assert len(read(tmp_path)[0]) == 2


def test_roboflow_tables_of_each_split(tmp_path):
    for split in ("train", "valid"):
        names = [f"{n}_jpg.rf.{split}.jpg" for n in range(2)]
        image(*(tmp_path / split / name for name in names))
        boxes = [{"filename": name, "class": item, "xmin": 1} for name in names for item in ("Pizza", "Beer")]
        write_csv(tmp_path / split / "_annotations.csv", boxes)
    samples, rejects = read(tmp_path)
    assert {(row.split, *items(row)) for row in samples.values()} == {
        ("train", "pizza", "beer"), ("test", "pizza", "beer"),
    }  # fmt: skip
    assert (len(samples), rejects) == (4, [])


def test_splits_that_data_yaml_states_as_folders_or_lists(tmp_path):
    image(*(tmp_path / part / f"{part}.jpg" for part in ("monday", "sunday")))
    for part in ("monday", "sunday"):
        (tmp_path / part / f"{part}.txt").write_text("0 .5 .5 .1 .1")
    (tmp_path / "data.yaml").write_text("names: [pizza]\ntrain: monday\nval: ./sunday\n")
    expected = {"monday/monday.jpg": "train", "sunday/sunday.jpg": "test"}
    assert {name: row.split for name, row in read(tmp_path)[0].items()} == expected
    (tmp_path / "data.yaml").write_text("names: [pizza]\ntrain: monday\nval: held.txt\n")
    (tmp_path / "held.txt").write_text("./sunday/sunday.jpg\n")
    assert {name: row.split for name, row in read(tmp_path)[0].items()} == expected


def test_label_studio(tmp_path):
    image(tmp_path / "images" / "0a1b2c3d-a.png", tmp_path / "images" / "b.png", tmp_path / "images" / "c d.png")

    def task(path, *names, kind="rectanglelabels", **more):
        results = [{"type": kind, "value": {kind: [name], "x": 1}} for name in names]
        return {"data": {"image": path}, "annotations": [{"result": results} | more]}

    tasks = [
        task("/data/upload/1/0a1b2c3d-a.png", "Pizza", "Beer"),
        task("/data/upload/1/9a1b2c3d-b.png", "pizza", kind="choices"),
        task("/data/local-files/?d=images/c%20d.png", "Beer", was_cancelled=True),
    ]
    (tmp_path / "project-1.json").write_text(json.dumps(tasks))
    samples, [reject] = read(tmp_path)
    assert {name: items(row) for name, row in samples.items()} == {
        "images/0a1b2c3d-a.png": ["pizza", "beer"],
        "images/b.png": ["pizza"],
    }
    assert reject.name == "images/c d.png"
    small = [{"annotation_id": 1, "image": "b.png", "label": [{"rectanglelabels": ["Ramen"], "x": 1}]}]
    (tmp_path / "project-1.json").write_text(json.dumps(small))
    assert {name: items(row) for name, row in read(tmp_path)[0].items()} == {"images/b.png": ["ramen"]}
    (tmp_path / "project-1.json").write_text(
        json.dumps([*small, task("images/c d.png", "Not food", kind="choices"), task("0a1b2c3d-a.png", "Fork")])
    )
    samples, [reject] = read(tmp_path)
    stated = {name: (row.label["is_food"], row.label_scope) for name, row in samples.items()}
    assert stated == {"images/b.png": (1, "annotated_classes(1)"), "images/c d.png": (0, "annotated_classes(1)")}
    assert reject.name == "images/0a1b2c3d-a.png"


# splits


@pytest.mark.parametrize("stated", ["val", "Valid", "VALIDATION", "dev", "test", "eval", "holdout", "hold-out", "x", 2])
def test_other_splits_are_held_out(stated):
    assert normalize_split(stated) == "test"


def test_names_of_train_and_of_no_split():
    assert {normalize_split(name) for name in ("train", "Training", "train2017", " TRAINSET ", "train_set")} == {
        "train"
    }
    assert {normalize_split(name) for name in ("", None, float("nan"), "none", "-")} == {None}
    assert {split_named(name) for name in ("pizza", "testament", "trainer", "devilled eggs", "eval")} == {None, "test"}
    assert {split_named(name) for name in ("taste test", "validated cheese", "x", "b")} == {None}
    assert {split_named(name) for name in ("train_val", "train-full", "X_train", "train_labels", "my_train")} == {
        "train"
    }
    others = (
        "PublicTest",
        "testA",
        "test-b",
        "public_test",
        "X_test",
        "test (1)",
        "minival",
        "unseen",
        "val_small",
        "test_labels",
    )
    assert {split_named(name) for name in others} == {"test"}


@pytest.mark.parametrize("column", ["Split", "subset", "set", "partition", "Usage", "phase", "dataset", "group"])
def test_a_split_column_of_any_name(tmp_path, column):
    rows = [row | {column: "holdout" if n < 2 else "Train"} for n, row in enumerate(records(tmp_path))]
    write_csv(tmp_path / "metadata.csv", rows)
    assert [row.split for row in read(tmp_path)[0].values()] == ["test"] * 2 + ["train"] * 4


@pytest.mark.parametrize(
    ("column", "held", "rest"),
    [("is_valid", True, False), ("Is Test", 1, ""), ("is_val", "1.0", "0.0"), ("is_train", "no", "yes")],
)
def test_a_flag_may_state_the_split(tmp_path, column, held, rest):
    write_csv(
        tmp_path / "metadata.csv", [row | {column: rest if n else held} for n, row in enumerate(records(tmp_path))]
    )
    assert [row.split for row in read(tmp_path)[0].values()] == ["test"] + ["train"] * 5


def test_labels_of_the_training_images_only(tmp_path):
    folder, names = tmp_path / "in", [f"{n}.png" for n in range(16)]
    image(*(folder / split / name for split in ("train", "test") for name in names))
    write_csv(folder / "train.csv", [{"filename": name, "label": NAMES[n % 4]} for n, name in enumerate(names)])
    (folder / "sample_submission.csv").write_text("id,label\n0,pizza\n")
    built = dataset.open_dataset(folder, tmp_path / "out")
    assert all(len(split) for split in built.values())
    assert {row["name"].split("/")[0] for split in built.values() for row in split} == {"train"}


# tables as people save them


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "lines"])
def test_encodings_and_delimiters(tmp_path, encoding, delimiter):
    rows = records(tmp_path)
    rows[0] |= {"image_title": "crème brûlée", "food_items": ["crème brûlée", "寿司"]}
    if delimiter == "lines":
        write_lines(tmp_path / "metadata.jsonl", rows, encoding)
    else:
        write_csv(tmp_path / "metadata.csv", rows, delimiter, encoding, ", ".join)
    samples, rejects = read(tmp_path)
    assert (len(samples), rejects) == (6, [])
    assert samples["0.png"].label["food_items"] == ["crème brûlée", "寿司"]


def test_joined_files_keep_no_byte_order_marks(tmp_path):
    rows = records(tmp_path)
    for part in (rows[:3], rows[3:]):
        write_lines(tmp_path / "part", part, "utf-8-sig")
        with (tmp_path / "metadata.jsonl").open("ab") as joined:
            joined.write((tmp_path / "part").read_bytes())
    assert [len(found) for found in read(tmp_path)] == [6, 0]


def test_half_a_character_in_a_class_is_no_part_of_its_item(tmp_path):
    image(*(tmp_path / "in" / f"{n}.png" for n in range(20)))
    rows = [{"file_name": f"{n}.png", "label": NAMES[0] + "\ud83c" * (n == 3)} for n in range(20)]
    write_lines(tmp_path / "in" / "labels.jsonl", rows)
    report = dataset.build(sources.labeled_folder(tmp_path / "in"), tmp_path / "out")
    assert report["food_items"] == [(NAMES[0], 20)]


def test_cp1252_is_read_and_said(tmp_path, capsys):
    rows = records(tmp_path)
    rows[0] |= {"food_items": ["crème brûlée", "Süßkartoffel", "jalapeño"]}
    write_csv(tmp_path / "metadata.csv", rows, encoding="cp1252")
    assert read(tmp_path)[0]["0.png"].label["food_items"] == ["crème brûlée", "Süßkartoffel", "jalapeño"]
    assert "read as cp1252" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("encoding", "name"),
    [
        ("cp1251", "борщ"),
        ("mac_roman", "crème"),
        ("shift_jis", "寿司"),
        ("gbk", "饺子"),
        ("cp1250", "gołąbki"),
        ("cp1254", "şiş"),
    ],
)
def test_names_in_other_encodings_are_rejected_and_never_guessed(tmp_path, encoding, name):
    rows = records(tmp_path)
    rows[1]["food_items"] = [name]
    write_csv(tmp_path / "metadata.csv", rows, encoding=encoding)
    samples, [reject] = read(tmp_path)
    assert len(samples) == 5
    assert "not UTF-8" in reject.reason


def test_one_line_in_another_encoding_costs_that_line(tmp_path):
    rows = records(tmp_path)
    lines = [json.dumps(row | {"food_items": ["crème"]}, ensure_ascii=False) for row in rows]
    text = "\n".join(lines).encode().split(b"\n")
    text[2] = lines[2].encode("cp1252")
    (tmp_path / "metadata.jsonl").write_bytes(b"\n".join(text))
    samples, [reject] = read(tmp_path)
    assert (len(samples), reject.name) == (5, "metadata.jsonl line 3")


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ("pizza, fries", ["pizza", "fries"]),
        ("pizza;fries", ["pizza", "fries"]),
        ("pizza | fries", ["pizza", "fries"]),
        ("['pizza', 'fries']", ["pizza", "fries"]),
        ("['pizza' 'fries']", ["pizza", "fries"]),  # as numpy prints
        ("[pizza, fries]", ["pizza", "fries"]),
        ("('pizza', 'fries')", ["pizza", "fries"]),
        ("('pizza',)", ["pizza"]),
        ("{'pizza'}", ["pizza"]),
        ('["rice, fried"]', ["rice, fried"]),
        ("rice, fried; peas", ["rice, fried", "peas"]),
        ("pizza (ham, cheese), 1,5 l soup", ["pizza (ham, cheese)", "1,5 l soup"]),
        ("mac and cheese", ["mac and cheese"]),
        ("[]", []),
        ("nan", []),
    ],
)
def test_lists_in_a_cell(tmp_path, cell, expected):
    image(tmp_path / "a.png")
    write_csv(tmp_path / "metadata.csv", [{"file_name": "a.png", "is_food": 1, "food_items": cell, "drink_items": ""}])
    assert read(tmp_path)[0]["a.png"].label["food_items"] == expected


def test_cells_without_a_value(tmp_path):
    rows = [
        row | {"group": empty, "image_title": empty}
        for row, empty in zip(records(tmp_path), ["nan", "NA", ""] * 2, strict=True)
    ]
    write_csv(tmp_path / "metadata.csv", rows)
    assert {(row.group, row.label["image_title"]) for row in read(tmp_path)[0].values()} == {("", "")}
    write_lines(tmp_path / "metadata.jsonl", [row | {"group": float("nan")} for row in rows])
    (tmp_path / "metadata.csv").unlink()
    assert {row.group for row in read(tmp_path)[0].values()} == {""}


def test_captions_beside_images_are_no_boxes(tmp_path, capsys):
    image(tmp_path / "pizza" / "1.png", tmp_path / "ramen" / "2.png")
    (tmp_path / "pizza" / "1.txt").write_text("a photo of pizza")
    (tmp_path / "ramen" / "2.txt").write_text("")
    assert [row.category for row in read(tmp_path)[0].values()] == ["pizza", "ramen"]
    assert "files passed over (2)" in capsys.readouterr().err


def test_classes_of_an_export_that_are_no_food_are_named(tmp_path, capsys):
    coco(tmp_path, {"a.jpg": ["pizza", "fork", "paper plate"]}, ("pizza", "fork", "paper plate", "poke bowl"))
    assert read(tmp_path)[0]["a.jpg"].label_scope == "annotated_classes(2)"
    assert "classes that name no food (2): fork, paper plate" in capsys.readouterr().err


def test_semicolons_anywhere_keep_commas_in_names(tmp_path):
    rows = records(tmp_path)
    rows[0]["food_items"], rows[1]["food_items"] = ["pizza", "fries"], ["rice, fried"]
    write_csv(tmp_path / "metadata.csv", rows)
    assert read(tmp_path)[0]["1.png"].label["food_items"] == ["rice, fried"]


@pytest.mark.parametrize("flag", [1, "1.0", "TRUE", " yes ", "1,00", "y", "T"])
@pytest.mark.parametrize(
    "file", ["file_name", "File Name", "image", "FILENAME", "path", "image_path", "img", "Image_ID"]
)
def test_columns_and_flags_by_other_names(tmp_path, flag, file):
    image(tmp_path / "a.png")
    row = {file: "a.png", "Is Food": flag, " Food_Items": "pizza", "drink-items": "", "Image Title": "Pie"}
    write_csv(tmp_path / "metadata.csv", [row])
    label = {"is_food": 1, "image_title": "Pie", "food_items": ["pizza"], "drink_items": []}
    assert read(tmp_path)[0]["a.png"].label == label


def test_excel_and_array_files(tmp_path):
    rows = records(tmp_path)
    write_csv(tmp_path / "metadata.csv", rows, ";")
    (tmp_path / "metadata.csv").write_text("sep=;\n" + (tmp_path / "metadata.csv").read_text() + ";;;;\n")
    assert len(read(tmp_path)[0]) == 6
    (tmp_path / "metadata.csv").unlink()
    for form in (rows, {"version": 1, "data": rows}):
        (tmp_path / "metadata.json").write_text(json.dumps(form, indent=1))
        assert len(read(tmp_path)[0]) == 6
    (tmp_path / "metadata.json").write_text(json.dumps(rows[0], indent=1))
    assert list(read(tmp_path)[0]) == ["0.png"]


@pytest.mark.parametrize("name", ["labels.csv", "annotations.json", "train_labels.tsv", "data.jsonl"])
def test_a_table_beside_a_folder_of_images(tmp_path, name):
    rows = records(tmp_path / "images")
    if name.endswith("json"):
        (tmp_path / name).write_text(json.dumps(rows))
    elif name.endswith("jsonl"):
        write_lines(tmp_path / name, rows)
    else:
        write_csv(tmp_path / name, rows, "\t" if name.endswith("tsv") else ",")
    samples, rejects = read(tmp_path)
    assert ([items(row) for row in samples.values()], rejects) == ([[r["image_title"]] for r in rows], [])
    assert next(iter(samples)) == "images/0.png"


@pytest.mark.parametrize("column", ["label", "class", "food", "Dish Name", "ClassName"])
def test_tables_name_files_with_and_without_their_suffix(tmp_path, column):
    image(tmp_path / "images" / "a.png", tmp_path / "images" / "b.png", tmp_path / "images" / "c.png")
    rows = [{"id": name, column: label} for name, label in (("a", "pizza"), (" b.png ", "ramen"), ("c", "yes"))]
    write_csv(tmp_path / "labels.csv", rows)
    samples, [reject] = read(tmp_path)
    assert [row.category for row in samples.values()] == ["pizza", "ramen"]
    assert "'yes' names no food" in reject.reason


def test_tables_of_other_things_are_no_labels(tmp_path):
    image(tmp_path / "pizza" / "1.png", tmp_path / "ramen" / "2.png")
    write_csv(tmp_path / "classes.csv", [{"id": 1, "class": "ramen"}, {"id": 5, "class": "pizza"}])
    assert [row.category for row in read(tmp_path)[0].values()] == ["pizza", "ramen"]


def test_tables_of_files_and_classes(tmp_path):
    image(*(tmp_path / "images" / f"{n}.png" for n in range(4)))
    classes = ["Apple_Pie", "ramen", "not food", "3"]
    write_csv(tmp_path / "labels.csv", [{"filename": f"{n}.png", "label": c} for n, c in enumerate(classes)])
    samples, [reject] = read(tmp_path)
    assert [(row.category, row.label["is_food"], row.label_scope) for row in samples.values()] == [
        ("apple pie", 1, "primary"), ("ramen", 1, "primary"), ("not food", 0, "exhaustive"),
    ]  # fmt: skip
    assert "'3' names no food" in reject.reason
    boxes = [{"filename": f"{n // 2}.png", "class": c, "xmin": 1} for n, c in enumerate(["pizza", "beer", "fork"])]
    write_csv(tmp_path / "labels.csv", boxes)
    samples, rejects = read(tmp_path)
    assert {name: (items(row), row.label_scope) for name, row in samples.items()} == {
        "images/0.png": (["pizza", "beer"], "annotated_classes(2)")
    }
    assert [row.name for row in rejects] == ["images/1.png", "images/2.png", "images/3.png"]


# one odd row never costs the build


def test_odd_file_names(tmp_path):
    names = ["images/a.png", unicodedata.normalize("NFD", "crème.png"), "B.PNG", os.fsdecode(b"cr\xe8me2.png")]
    names.append("10.00\u202fPM.png")  # of a screenshot on macOS
    rows = records(tmp_path, names)
    rows[0]["file_name"] = "images\\a.png"
    rows[1]["file_name"] = "crème.png"
    rows[2]["file_name"] = "b.png"
    rows[4]["file_name"] = "10.00 PM.png"
    odd = [
        "data:image/png;base64," + "QUFB" * 900,
        "x" * 5000,
        "a\0b",
        "\ud83c.png",
        "https://x.org/a.png",
        "C:\\a.png",
        "",
    ]
    write_lines(tmp_path / "metadata.jsonl", rows + [rows[0] | {"file_name": name} for name in odd])
    samples, rejects = read(tmp_path)
    assert list(samples) == names
    assert len(rejects) == len(odd)
    assert all(len(reject.name) < 120 for reject in rejects)


def test_names_of_any_length_and_encoding_are_built(tmp_path):
    names = [os.fsdecode(b"cr\xe8me.png"), "x" * 250 + ".png", "images\\a.png", "a\nb.png"]
    image(*(tmp_path / "in" / "pizza" / name for name in [*names, *(f"{n}.png" for n in range(16))]))
    image(tmp_path / "in" / os.fsdecode(b"cr\xeape") / "1.png")
    dataset.open_dataset(tmp_path / "in", tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["kept"], report["rejected"]) == (21, 0)
    assert "crêpe" in report["categories"]
    loaded = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    assert sum(map(len, loaded.values())) == 21
    assert "pizza/crème.png" in {row["name"] for split in loaded.values() for row in split}


@pytest.mark.parametrize(
    "key", ["category", "group", "source", "license", "split", "label_scope", "image_title", "other"]
)
@pytest.mark.parametrize("odd", ["ramen \ud83c", "\udc94 x", "a\0b", [1], {"a": None}, float("nan"), 10**400])
def test_odd_values_cost_their_row_at_most(tmp_path, key, odd):
    rows = records(tmp_path / "in", [f"{n}.png" for n in range(20)])
    rows[0]["split"] = "test"
    rows[3][key] = odd
    write_lines(tmp_path / "in" / "metadata.jsonl", rows)
    report = dataset.build(sources.labeled_folder(tmp_path / "in"), tmp_path / "out")
    assert report["kept"] >= 19
    assert report["kept"] + report["rejected"] == 20


@pytest.mark.parametrize("line", ["1" * 5000, "[" * 100_000, '{"file_name": ' + "[" * 100_000, "\0"])
def test_odd_lines_of_json(tmp_path, line):
    rows = records(tmp_path)
    write_lines(tmp_path / "metadata.jsonl", rows)
    path = tmp_path / "metadata.jsonl"
    path.write_text(path.read_text() + line + "\n")
    samples, [reject] = read(tmp_path)
    assert len(samples) == 6
    assert reject.name.startswith("metadata.jsonl line 7")


@pytest.mark.parametrize("bad", ['1.png,1,"pizza', '1.png,1,"piz"za",x,', "1.png,1,pizza,pizza,fries,,", "1.png,1"])
def test_a_bad_row_of_csv_costs_that_row(tmp_path, bad):
    rows = records(tmp_path)
    write_csv(tmp_path / "metadata.csv", rows, items=json.dumps)
    lines = (tmp_path / "metadata.csv").read_text().splitlines()
    lines[2] = bad
    (tmp_path / "metadata.csv").write_text("\n".join(lines))
    samples, [reject] = read(tmp_path)
    assert list(samples) == ["0.png", "2.png", "3.png", "4.png", "5.png"]
    assert reject.name.startswith("metadata.csv line 3")


def test_cells_of_any_length(tmp_path):
    rows = [row | {"image_base64": "A" * 200_000 * (n == 0)} for n, row in enumerate(records(tmp_path))]
    write_csv(tmp_path / "metadata.csv", rows)
    assert len(read(tmp_path)[0]) == 6


# nothing is ignored silently


def test_all_metadata_is_read(tmp_path):
    rows = records(tmp_path)
    write_lines(tmp_path / "metadata.jsonl", rows[:4])
    write_csv(tmp_path / "metadata.csv", rows[4:])
    image(tmp_path / "more" / "x.png")
    write_lines(tmp_path / "more" / "metadata.jsonl", records(tmp_path / "more"))
    samples, rejects = read(tmp_path)
    assert (len(samples), rejects) == (10 + 2, [])
    assert items(samples["more/0.png"]) == ["pizza"]


def test_images_and_tables_that_are_not_read_are_named(tmp_path, capsys):
    rows = records(tmp_path)
    write_lines(tmp_path / "metadata.jsonl", rows[:4])
    write_csv(tmp_path / "labels.csv", rows[4:])
    assert len(read(tmp_path)[0]) == 4
    said = capsys.readouterr().err
    assert "images that no label names (2): 4.png, 5.png" in said
    assert "files passed over (1): labels.csv" in said


def test_an_image_name_in_two_folders_is_rejected(tmp_path):
    rows = records(tmp_path / "a")
    records(tmp_path / "b")
    write_csv(tmp_path / "labels.csv", rows[:1])
    samples, [reject] = read(tmp_path)
    assert (samples, "2 images have this name" in reject.reason) == ({}, True)
