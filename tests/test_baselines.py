import pytest
import torch

import baselines
import other_scenes
from baseline_models import Majority, Nearest, vision_features
from foodextract.data.dataset import record_of
from foodextract.evaluation.results import read_results
from foodextract.images import open_image
from foodextract.schema import FoodRecord

PIE, EGG = (FoodRecord(is_food=1, image_title=name, food_items=[name], drink_items=[]) for name in ("pie", "egg"))


@pytest.fixture(scope="module")
def images(rows):
    return [open_image(image) for image in rows["train"]["image"][:6]]


@pytest.fixture(scope="module")
def records(rows):
    return [record_of(row) for row in rows["train"].select(range(6)).remove_columns("image")]


def test_majority_is_the_most_frequent_record(images):
    assert Majority.fit([PIE, EGG, EGG]).answer(images[:2]) == [EGG.to_json()] * 2
    assert Majority.fit([PIE, EGG]).answer(images[:1]) == [PIE.to_json()]
    with pytest.raises(ValueError, match="no training records"):
        Majority.fit([])


def test_nearest_to_a_training_image_is_itself(tuned, images, records):
    nearest = Nearest.fit(tuned, images, records, batch=4)
    assert [FoodRecord.parse(text) for text in nearest.answer(images)] == records
    changed = images[2].resize((200, 200)).point(lambda value: min(255, value + 6))
    assert nearest.answer([changed]) == [records[2].to_json()]


def test_majority_of_neighbors_wins_and_ties_go_to_the_nearest(tuned, images):
    copies = [images[0], images[0].resize((250, 250)), images[0].resize((240, 240))]
    assert Nearest.fit(tuned, [*copies, images[3]], [PIE, EGG, EGG, PIE], k=3).answer(images[:1]) == [EGG.to_json()]
    assert Nearest.fit(tuned, [copies[0], copies[2]], [PIE, EGG], k=2).answer(images[:1]) == [PIE.to_json()]


def test_features_do_not_depend_on_the_batch_and_carry_no_gradient(tuned, images):
    together, alone = vision_features(tuned, images[:3]), vision_features(tuned, images[2:3])
    assert together.shape == (3, tuned.model.config.vision_config.hidden_size)
    torch.testing.assert_close(together[2:], alone, rtol=1e-4, atol=1e-5)
    assert not together.requires_grad


def test_mistakes_are_named(tuned, images, records):
    with pytest.raises(ValueError, match="1 nearest of 2 images with 6 records"):
        Nearest.fit(tuned, images[:2], records)
    with pytest.raises(ValueError, match="3 nearest of 2 images"):
        Nearest.fit(tuned, images[:2], records[:2], k=3)


def food(*foods, drinks=()):
    return FoodRecord(is_food=1, image_title="x", food_items=list(foods), drink_items=list(drinks))


def test_number_of_items():
    labels = [FoodRecord(is_food=0, image_title="", food_items=[], drink_items=[]), food("a"), food("a", drinks=["c"])]
    assert [baselines.number_of_items(label) for label in labels] == ["0 items", "1 item", "2 items"]
    assert baselines.number_of_items(food("a", "b", drinks=["c", "d"])) == "3 or more items"


def test_groups_are_scored_separately():
    labels, answers = [PIE, PIE, EGG], [PIE.to_json(), EGG.to_json(), EGG.to_json()]
    groups = baselines.breakdown(labels, answers, ["b", "a", "b"])
    found = {group: {metric.name: metric for metric in metrics} for group, metrics in groups.items()}
    assert list(found) == ["a", "b"]
    assert (found["b"]["strict_json_rate"].n, found["b"]["item_f1_micro"].value) == (2, 1)
    assert (found["a"]["strict_json_rate"].n, found["a"]["item_f1_micro"].value) == (1, 0)
    assert "hallucination_rate" not in found["b"]  # no image without food or drink


def test_all_models_answer_the_same_images_and_are_compared(rows):
    held_out = rows["test"].select(range(8))
    labels = [record_of(row) for row in held_out.remove_columns("image")]
    held_out = held_out.remove_columns("source").add_column("source", ["a"] * 3 + ["b"] * 5)
    right = iter([label.to_json() for label in labels])
    models = {"majority": Majority.fit([PIE]).answer, "tuned": lambda images: [next(right) for _ in images]}
    found = {(row.subject, row.metric): row for row in baselines.measure(models, "tuned", held_out, 4, "c")}
    assert found["tuned", "item_f1_micro"].value == 1
    assert found["majority", "strict_json_rate"].n == 8
    assert found["tuned minus majority", "item_f1_micro_difference"].value > 0
    assert found["tuned minus majority", "item_f1_micro_p"].value < 0.05
    assert (found["tuned | from a", "is_food_accuracy"].n, found["tuned | from b", "is_food_accuracy"].n) == (3, 5)
    groups = [
        row.n for (subject, name), row in found.items() if subject[:8] == "tuned | " and name == "is_food_accuracy"
    ]
    assert sum(groups) == 2 * 8  # by number of items, and by source


@pytest.mark.parametrize(
    ("scope", "metrics"), [("exhaustive", {"item_recall_micro", "item_f1_micro"}), ("primary", {"item_recall_micro"})]
)
def test_main_item_labels_count_for_recall_alone(rows, scope, metrics):
    held_out = rows["test"].filter(lambda row: row["is_food"]).select(range(4))
    labels = [record_of(row) for row in held_out.remove_columns("image")]
    more = [label.model_copy(update={"food_items": [*label.food_items, "another"]}).to_json() for label in labels]
    scoped = held_out.remove_columns("label_scope") if "label_scope" in held_out.column_names else held_out
    scoped = scoped.add_column("label_scope", [scope] * 4)
    found = baselines.measure({"tuned": lambda images: more}, "tuned", scoped, 4, "c")
    values = {row.metric: row.value for row in found if row.subject == "tuned"}
    assert {"item_recall_micro", "item_f1_micro"} & set(values) == metrics
    assert values["item_recall_micro"] == 1


def test_other_scenes_are_scored_free_and_constrained(tmp_path):
    other_scenes.main(count=12, out=tmp_path / "other_scenes.json")
    rows = {(row.subject, row.metric): row for row in read_results(tmp_path / "other_scenes.json")}
    assert rows["tuned constrained", "strict_json_rate"].value == 1
    assert rows["tuned", "is_food_accuracy"].value > 0.7
    assert {row.n for (_, metric), row in rows.items() if metric == "is_food_accuracy"} == {12}
