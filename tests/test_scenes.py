import numpy as np
import pytest

from foodextract.data import scenes
from foodextract.data.scenes import DRINKS, FOODS, MIN_VISIBLE, OTHERS, draw_scene, draw_scenes, others_of


def test_there_is_enough_to_draw():
    assert len(FOODS) >= 60
    assert len(DRINKS) == 14
    assert len(OTHERS) >= 500
    drawings = scenes.get_openmoji_svg_data()
    everything = [*FOODS.values(), *DRINKS.values(), *OTHERS]
    assert len(set(everything)) == len(everything)
    assert all((drawings / f"{code}.svg").is_file() for code in everything)


def test_non_food_of_the_test_split_is_never_seen_in_training():
    train, test = set(others_of("train")), set(others_of("test"))
    assert not train & test
    assert train | test == set(OTHERS)
    assert len(test) >= 100
    for split, allowed in (("train", train), ("test", test)):
        drawn = {placed.code for scene in draw_scenes(3, split, 40) for placed in scene.objects if placed.name is None}
        assert drawn
        assert drawn <= allowed


def test_same_seed_same_bytes_in_any_order():
    first = [scene.image.tobytes() for scene in draw_scenes(1, "train", 4)]
    again = [draw_scene(1, "train", index).image.tobytes() for index in (3, 2, 1, 0)]
    assert first == again[::-1]
    others = {draw_scene(2, "train", 0).image.tobytes(), draw_scene(1, "test", 0).image.tobytes(), *first}
    assert len(others) == 6


def test_labels_are_exact_and_complete():
    found = list(draw_scenes(9, "train", 60))
    for scene in found:
        assert set(scene.record.food_items) == {placed.name for placed in scene.objects if placed.kind == "food"}
        assert set(scene.record.drink_items) == {placed.name for placed in scene.objects if placed.kind == "drink"}
        assert set(np.unique(scene.owner)) == set(range(len(scene.objects) + 1))
    assert {len(scene.objects) for scene in found} == {0, 1, 2, 3, 4}
    assert 0.4 < np.mean([scene.record.is_food for scene in found]) < 0.8


def test_every_object_can_be_seen():
    """What is drawn last covers others; what is left of each object, redrawn alone, must be most of it."""
    rng = np.random.default_rng(0)
    for scene in (s for s in draw_scenes(9, "train", 60) if len(s.objects) == 4):
        layers, owner = scenes._place(rng, list(scene.objects))
        for number, (drawing, _) in enumerate(layers, 1):
            ink = (np.asarray(drawing)[..., 3] > 127).sum()
            assert (owner == number).sum() >= MIN_VISIBLE * ink


@pytest.mark.parametrize(
    ("names", "title"),
    [([], ""), (["tea"], "tea"), (["tea", "pie"], "pie and tea"), (["tea", "pie", "egg"], "egg, pie and tea")],
)
def test_titles_read_like_a_list(names, title):
    placed = [scenes.Placed("0", "drink" if name in DRINKS else "food", name) for name in names]
    assert scenes.record_of(placed).image_title == title
