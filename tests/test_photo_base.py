"""The data, the training and the measurement of the photo model, on drawings in the place of photographs."""

import io
import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from foodextract.data import dataset
from foodextract.evaluation.results import read_results
from foodextract.models import loading
from foodextract.models.training_data import TrainingData
from foodextract.training.config import PROFILES
from foodextract.training.run import train_stage

sys.path.append(str(Path(__file__).parents[1] / "experiments" / "photo_base"))
import make_base
import photos

import photo_subsets
import photographs

VISION = "model.vision_model."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A manifest of 160 pictures of noise, in pairs that belong to one group: six names and none."""
    folder = tmp_path_factory.mktemp("photographs")
    rng, lines = np.random.default_rng(0), []
    for number in range(160):
        Image.fromarray(rng.integers(0, 256, (9, 9, 3), np.uint8)).resize((99, 90)).save(folder / f"{number}.png")
        name = ["pizza", "soup", "cake", "plum", "beer", "tea", "", "rare soup" if number < 40 else ""][number // 2 % 8]
        row = {"file": f"{number}.png", "source": "noise", "licence": "MIT", "group": f"group {number // 2}"}
        row |= {"licence_class": "permissive" if number % 2 else "research", "label_scope": "primary"}
        drink = name in ("beer", "tea")
        row |= {"is_food": int(bool(name)), "food_items": [name] * (bool(name) and not drink)}
        lines.append(json.dumps(row | {"drink_items": [name] * drink}))
    (folder / "manifest.jsonl").write_text("\n".join(lines))
    return folder


def test_groups_stay_in_one_split_and_rare_names_out_of_training(folder):
    found = photos.read_photos(folder)
    assert {photo.split for photo in found} == {"train", "validation", "test"}
    splits = {(photo.group, photo.split) for photo in found}
    assert len(splits) == len({photo.group for photo in found})
    names = photos.learned_names(found)
    shown = Counter(name for photo in found if photo.split == "train" for name in photo.items)
    assert names == {name: count for name, count in shown.items() if count >= photos.RARE}
    kept = [sample for sample in photos.samples(found) if sample.split == "train"]
    assert {name for sample in kept for name in sample.label["food_items"] + sample.label["drink_items"]} == set(names)
    assert "rare soup" in shown
    assert "rare soup" not in names


def test_views_keep_the_label_and_are_the_same_every_time(folder):
    found = photos.read_photos(folder)
    labels = {photo.path.stem: photo.label for photo in found if photo.split == "train"}
    views = list(photos.views(found))
    assert {view.name.partition("-view")[0] for view in views} == {
        sample.name.removesuffix(".png") for sample in photos.samples(found) if sample.split == "train"
    }
    assert all(view.label == labels[view.name.partition("-view")[0]] for view in views)
    assert views[0].read() == next(iter(photos.views(found))).read()
    numbers = Counter(view.name.partition("-view")[0] for view in views)
    assert max(numbers.values()) <= photos.MOST_VIEWS


def test_a_collage_lists_the_items_of_all_its_parts(folder):
    found = photos.read_photos(folder)
    made = list(photos.collages(found, 30))
    assert any(len(sample.label["food_items"]) > 1 for sample in made)
    by_group = {photo.path.name: photo for photo in found}
    for sample in made:
        paths = sample.read.args[0]
        assert all(by_group[path.name].split == "train" for path in paths)
        wanted = {item for path in paths for item in by_group[path.name].items}
        assert set(sample.label["food_items"] + sample.label["drink_items"]) == wanted
    assert Image.open(io.BytesIO(made[0].read())).size == (336, 336)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_photographs_become_a_model_with_figures(folder, tmp_path):
    """The commands of experiments/photo_base/README.md, in order, with a few steps each."""
    out = tmp_path / "photo"
    photos.main(folder, out / "dataset", collage_count=8, scene_count=8)
    rows = dataset.load(out / "dataset")["train"].remove_columns("image")
    derived = sum(map(photos.is_derived, rows))
    data = TrainingData.of(row for row in rows if not photos.is_derived(row))
    assert derived > 0
    assert (data.images, data.drawings) == (len(rows) - derived, 8)
    tower = {
        name.removeprefix(VISION): value
        for name, value in load_file(loading.PHOTO / make_base.TOWER_SHARD).items()
        if name.startswith(VISION)
    }
    (out / "tower").mkdir()
    save_file(tower, out / "tower" / "tower.safetensors")
    make_base.main(out / "dataset", out / "tower", out, epochs=0.2, batch=8)
    model, processor = loading.load_model(out / "base", training=True), loading.load_processor(out / "base")
    stage = replace(PROFILES["photo"].stage1, per_device_train_batch_size=8)
    train_stage(model, processor, stage, dataset.load(out / "dataset")["train"], out, max_steps=2)
    [features] = out.glob("prepared-*/features-*.bin")
    figures = tmp_path / "photographs.json"
    arguments = [str(folder), "--model", str(out / "stage1"), "--base", str(out / "base"), "--batch", "8"]
    arguments += ["--features", str(tmp_path / "features.npz"), "--out", str(figures)]
    app = photographs.typer.Typer()
    app.command()(photographs.main)
    for extra in (["--calibrate", "--split", "validation"], []):
        result = CliRunner().invoke(app, arguments + extra, catch_exceptions=False)
        assert result.exit_code == 0
    found = {(row.subject, row.metric) for row in read_results(figures)}
    test = sum(photo.split == "test" for photo in photos.read_photos(folder))
    assert {row.n for row in read_results(figures) if row.metric == "strict_json_rate"} == {test}
    for subject in (
        "photo",
        "photo constrained",
        "base",
        "drawings constrained",
        "majority",
        "nearest",
        "linear probe",
    ):
        assert (subject, "is_food_accuracy") in found
    assert {("photo | batch 8", "cpu_seconds"), ("photo | min confidence 0.9", "item_precision")} - found <= {
        ("photo | min confidence 0.9", "item_precision")  # where nothing is that sure
    }
    assert figures.with_suffix(".png").is_file()
    parts = dict(photo_subsets.parts(dataset.load(out / "dataset")["train"]))
    assert parts["all photographs"] == [number for number, row in enumerate(rows) if row["source"] != photos.COLLAGE]
    assert features.is_file()
