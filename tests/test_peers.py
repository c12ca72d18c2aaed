import pytest
import torch

from foodextract.dataset import record_of
from foodextract.peers import Majority, Nearest, vision_features
from foodextract.pictures import open_picture
from foodextract.schema import FoodRecord

PIE, EGG = (FoodRecord(is_food=1, image_title=name, food_items=[name], drink_items=[]) for name in ("pie", "egg"))


@pytest.fixture(scope="module")
def pictures(rows):
    return [open_picture(picture) for picture in rows["train"]["image"][:6]]


@pytest.fixture(scope="module")
def records(rows):
    return [record_of(row) for row in rows["train"].select(range(6)).remove_columns("image")]


def test_the_majority_is_the_most_frequent_record(pictures):
    assert Majority.fit([PIE, EGG, EGG])(pictures[0]) == EGG.to_json()
    assert Majority.fit([PIE, EGG])(pictures[0]) == PIE.to_json()
    with pytest.raises(ValueError, match="no training records"):
        Majority.fit([])


def test_the_nearest_to_a_training_picture_is_itself(tuned, pictures, records):
    nearest = Nearest.fit(tuned, pictures, records, batch=4)
    assert [FoodRecord.parse(nearest(picture)) for picture in pictures] == records
    changed = pictures[2].resize((200, 200)).point(lambda value: min(255, value + 6))
    assert FoodRecord.parse(nearest(changed)) == records[2]


def test_most_of_several_neighbours_win_and_equals_go_to_the_nearest(tuned, pictures):
    copies = [pictures[0], pictures[0].resize((250, 250)), pictures[0].resize((240, 240))]
    assert Nearest.fit(tuned, [*copies, pictures[3]], [PIE, EGG, EGG, PIE], k=3)(pictures[0]) == EGG.to_json()
    assert Nearest.fit(tuned, [copies[0], copies[2]], [PIE, EGG], k=2)(pictures[0]) == PIE.to_json()


def test_features_do_not_depend_on_the_batch_and_carry_no_gradient(tuned, pictures):
    together, alone = vision_features(tuned, pictures[:3]), vision_features(tuned, pictures[2:3])
    assert together.shape == (3, tuned.model.config.vision_config.hidden_size)
    torch.testing.assert_close(together[2:], alone, rtol=1e-4, atol=1e-5)
    assert not together.requires_grad


def test_mistakes_are_named(tuned, pictures, records):
    with pytest.raises(ValueError, match="1 nearest of 2 pictures with 6 records"):
        Nearest.fit(tuned, pictures[:2], records)
    with pytest.raises(ValueError, match="3 nearest of 2 pictures"):
        Nearest.fit(tuned, pictures[:2], records[:2], k=3)
