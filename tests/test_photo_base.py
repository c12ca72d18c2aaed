"""The data of the photo model, on pictures of noise in the place of photographs."""

import io
import json
import sys
from collections import Counter
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

from foodextract.evaluation.results import read_results
from foodextract.models import loading
from foodextract.training.config import VISION

sys.path.append(str(Path(__file__).parents[1] / "experiments" / "photo_base"))
import average
import photos

import photo_subsets


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


def test_parts_are_whole_groups_and_hold_one_another(folder):
    found = [photo for photo in photos.read_photos(folder) if photo.split == "train"]
    small, large = (photo_subsets.whole_groups(found, most) for most in (11, 40))
    assert (len(small), len(large)) == (12, 40)  # groups are pairs
    assert {photo.path for photo in small} < {photo.path for photo in large}
    assert all(count == 2 for count in Counter(photo.group for photo in small).values())
    assert photo_subsets.whole_groups(found, len(found)) == photo_subsets.whole_groups(found, 1000)


@pytest.mark.slow
def test_a_language_model_is_trained_from_scratch_on_each_part(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(photo_subsets, "SIZES", (20,))
    photos.main(folder, tmp_path / "data", collage_count=2, scene_count=2, changed_views=False)
    options = {"model": loading.PHOTO, "train_on": tmp_path / "data", "work": tmp_path, "steps": 2}
    with monkeypatch.context() as patch:
        patch.setattr(photo_subsets, "scores", Mock(side_effect=[[], KeyboardInterrupt]))
        with pytest.raises(KeyboardInterrupt):
            photo_subsets.main(folder, **options, out=tmp_path / "rows.json")
    [first] = tmp_path.glob("rows-1?")
    tower, trained = (dict(loading.load_model(where).named_parameters()) for where in (loading.PHOTO, first))
    equal = {name for name, p in trained.items() if torch.equal(p, tower[name].to(p.dtype))}
    assert equal == {name for name in trained if name.startswith(VISION)}
    capsys.readouterr()
    photo_subsets.main(folder, **options, out=tmp_path / "rows.json")
    assert capsys.readouterr().out.count("already trained") == 2
    sizes = [row.value for row in read_results(tmp_path / "rows.json") if row.metric == "rows"]
    known = sum(sample.split == "train" for sample in photos.samples(photos.read_photos(folder)))
    assert sizes == [int(first.name.removeprefix("rows-")), known]
    assert not list(tmp_path.glob("rows-*"))


def test_the_mean_of_two_models_moves_tied_weights_once(tmp_path):
    first, second = loading.TINY_BASE, loading.TINY_TUNED
    average.main(first, second, tmp_path, share=0.25)
    found, *both = (dict(loading.load_model(folder).named_parameters()) for folder in (tmp_path, first, second))
    for name, tensor in found.items():
        wanted = 0.75 * both[0][name].float() + 0.25 * both[1][name].float()
        assert torch.allclose(tensor.float(), wanted, rtol=0.01, atol=1e-4), name  # bf16 on the disk
    with pytest.raises(ValueError, match="different shapes"):
        average.average(first, loading.PHOTO, 0.5)
