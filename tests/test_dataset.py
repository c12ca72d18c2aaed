import json
import random
from dataclasses import replace

import datasets
import numpy as np
import pytest
from PIL import Image

from foodextract import dataset
from foodextract.dataset import DatasetError, Reject
from foodextract.schema import FoodRecord

NOT_FOOD = {"is_food": 0, "image_title": "", "food_items": [], "drink_items": []}


def labelled_folder(folder, count=30, **changes):
    """`count` different pictures with correct labels; `changes` replaces metadata lines by number."""
    folder.mkdir(exist_ok=True)
    lines = []
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", **NOT_FOOD}))
    for number, line in changes.items():
        lines[int(number[1:])] = line
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def test_what_is_written_is_an_ordinary_image_folder(drawn, rows):
    loaded = datasets.load_dataset("imagefolder", data_dir=str(drawn), cache_dir=str(drawn.parent / "cache"))
    assert {split: len(found) for split, found in loaded.items()} == {"train": 40, "test": 16} == {s: len(r) for s, r in rows.items()}
    by_name = {row["name"]: row for row in loaded["train"]}
    for row in rows["train"]:
        assert dataset.record_of(row) == dataset.record_of(by_name[row["name"]])
        assert row["image"].tobytes() == by_name[row["name"]]["image"].tobytes()


def test_report_accounts_for_every_row(drawn):
    report = json.loads((drawn / "report.json").read_text())
    assert report["kept"] + report["rejected"] == report["read"]
    assert report["train"] + report["test"] == report["kept"] == 56


def test_same_source_same_fingerprint_whatever_the_order(tmp_path):
    samples = list(dataset.folder_source(labelled_folder(tmp_path / "in")))
    one = dataset.build(samples, tmp_path / "one")
    random.Random(1).shuffle(samples)
    two = dataset.build(samples, tmp_path / "two")
    assert one["fingerprint"] == two["fingerprint"]
    assert dataset.build(samples[:-1], tmp_path / "three")["fingerprint"] != one["fingerprint"]


def test_splits_share_neither_pictures_nor_groups(tmp_path):
    samples = list(dataset.folder_source(labelled_folder(tmp_path / "in", 60)))
    grouped = [replace(sample, group=f"group {number // 4}") for number, sample in enumerate(samples)]
    copies = [replace(sample, name=f"copy of {sample.name}", group="") for sample in samples[:10]]
    report = dataset.build(grouped + copies, tmp_path / "out")
    rows = dataset.load(tmp_path / "out")
    for column in ("pixels_sha256", "group"):
        assert not set(rows["train"][column]) & set(rows["test"][column])
    assert report["duplicates"] == 10


def test_split_is_four_to_one_and_does_not_move_when_rows_are_added():
    groups = [f"group {number}" for number in range(5000)]
    sides = [dataset.split_of(group, seed=42) for group in groups]
    assert sides.count("test") / len(sides) == pytest.approx(0.2, abs=0.02)
    assert [dataset.split_of(group, seed=42) for group in groups[:100]] == sides[:100]
    assert [dataset.split_of(group, seed=43) for group in groups] != sides


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{not json", "not JSON"),
        ('"a string"', "lacks"),
        (json.dumps({"file_name": "3.png"}), "is_food"),
        (json.dumps(NOT_FOOD), "file_name"),
        (json.dumps({"file_name": "3.png", **NOT_FOOD, "food_items": ["pie"]}), "breaks the schema"),
        (json.dumps({"file_name": "3.png", **NOT_FOOD, "is_food": "no"}), "breaks the schema"),
        (json.dumps({"file_name": "gone.png", **NOT_FOOD}), "cannot be read"),
        (json.dumps({"file_name": "../3.png", **NOT_FOOD}), "leads out"),
        (json.dumps({"file_name": "metadata.jsonl", **NOT_FOOD}), "format"),
    ],
)
def test_a_bad_row_is_named_and_the_others_are_kept(tmp_path, line, reason):
    report = dataset.build(dataset.folder_source(labelled_folder(tmp_path / "in", _3=line)), tmp_path / "out")
    assert (report["kept"], report["rejected"]) == (29, 1)
    reject = json.loads((tmp_path / "out" / "rejects.jsonl").read_text())
    assert reason in reject["reason"]
    assert "line 4" in reject["name"] or reject["name"] == "metadata.jsonl"


def test_a_folder_without_labels_says_what_to_write(tmp_path):
    with pytest.raises(DatasetError, match=r"no metadata\.jsonl.*\n.*file_name"):
        list(dataset.folder_source(tmp_path))


def test_nothing_usable_is_an_error_and_leaves_nothing(tmp_path):
    with pytest.raises(DatasetError, match=r"too few usable pictures(.|\n)*broken"):
        dataset.build([Reject("a.png", "broken")], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_interrupted_build_leaves_the_old_data_set(tmp_path):
    samples = list(dataset.folder_source(labelled_folder(tmp_path / "in")))
    before = dataset.build(samples, tmp_path / "out")

    def interrupted():
        yield from samples[:5]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dataset.build(interrupted(), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "report.json").read_text())["fingerprint"] == before["fingerprint"]


def test_other_peoples_folders_are_not_overwritten(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(DatasetError, match="not a data set built here"):
        dataset.build([], tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_any_name_of_a_data_set_opens_it(tmp_path, drawn, monkeypatch):
    assert len(dataset.open_dataset(drawn, tmp_path / "unused")["train"]) == 40
    opened = dataset.open_dataset(labelled_folder(tmp_path / "in"), tmp_path / "built")
    assert len(opened["train"]) + len(opened["test"]) == 30
    with pytest.raises(DatasetError, match="00_create"):
        dataset.open_dataset(tmp_path / "nothing", tmp_path / "unused")
    with pytest.raises(DatasetError, match=r"nobody/nothing.*check the name and the connection"):
        dataset.open_dataset("nobody/nothing", tmp_path / "unused")
    with pytest.raises(DatasetError, match="no source 'flickr'"):
        dataset.open_source("flickr")


@pytest.mark.parametrize("as_text", [str, json.dumps, dict])
def test_hub_rows_become_samples(monkeypatch, as_text):
    """The Hub cannot be reached from a test: rows of its columns stand in for it."""
    picture = Image.new("RGB", (8, 8))
    label = {"is_food": 1, "image_title": "turkish_coffee", "food_items": [], "drink_items": ["coffee"]}
    row = {"image": picture, "output_json": as_text(label), "image_name": "a.jpg", "food270_class_name": "coffee", "image_source": "web"}
    found = datasets.Dataset.from_list([row, {**row, "output_json": as_text({})}]).to_iterable_dataset()
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: found)
    sample, *_ = dataset.hub_source()
    assert sample.record == FoodRecord(**label)
    assert (sample.name, sample.category, sample.source) == ("000000-a.jpg", "coffee", "web")
