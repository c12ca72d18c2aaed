import pytest
import torch

import other_scenes
import peers as benchmark
from baseline_models import Majority, Nearest, vision_features
from foodextract.data.dataset import record_of
from foodextract.evaluation import evaluate
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


def test_the_majority_is_the_most_frequent_record(images):
    assert Majority.fit([PIE, EGG, EGG])(images[0]) == EGG.to_json()
    assert Majority.fit([PIE, EGG])(images[0]) == PIE.to_json()
    with pytest.raises(ValueError, match="no training records"):
        Majority.fit([])


def test_the_nearest_to_a_training_image_is_itself(tuned, images, records):
    nearest = Nearest.fit(tuned, images, records, batch=4)
    assert [FoodRecord.parse(nearest(image)) for image in images] == records
    changed = images[2].resize((200, 200)).point(lambda value: min(255, value + 6))
    assert FoodRecord.parse(nearest(changed)) == records[2]


def test_most_of_several_neighbors_win_and_equals_go_to_the_nearest(tuned, images):
    copies = [images[0], images[0].resize((250, 250)), images[0].resize((240, 240))]
    assert Nearest.fit(tuned, [*copies, images[3]], [PIE, EGG, EGG, PIE], k=3)(images[0]) == EGG.to_json()
    assert Nearest.fit(tuned, [copies[0], copies[2]], [PIE, EGG], k=2)(images[0]) == PIE.to_json()


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


def test_everybody_answers_the_same_images_and_is_compared(rows):
    held_out = rows["test"].select(range(8))
    labels = [record_of(row) for row in held_out.remove_columns("image")]
    right = iter([label.to_json() for label in labels])
    answerers = {"majority": evaluate.each(Majority.fit([PIE])), "tuned": evaluate.each(lambda _: next(right))}
    sources = ["a"] * 3 + ["b"] * 5
    held_out = held_out.remove_columns("source").add_column("source", sources)
    found = {(row.subject, row.metric): row for row in benchmark.measure(answerers, "tuned", held_out, 4, "c")}
    assert found["tuned", "item_f1_micro"].value == 1
    assert found["majority", "strict_json_rate"].n == 8
    assert found["tuned minus majority", "item_f1_micro_difference"].value > 0
    assert found["tuned minus majority", "item_f1_micro_p"].value < 0.05
    assert (found["tuned | from a", "is_food_accuracy"].n, found["tuned | from b", "is_food_accuracy"].n) == (3, 5)
    by_items = [
        row.n
        for (subject, metric), row in found.items()
        if subject.startswith("tuned | ") and metric == "is_food_accuracy"
    ]
    assert sum(by_items) == 2 * 8  # by number of items, and by source


def test_peers_honour_labels_that_name_only_the_main_item(rows):
    held_out = rows["test"].filter(lambda row: row["is_food"]).select(range(4))
    labels = [record_of(row) for row in held_out.remove_columns("image")]
    more = iter(
        [label.model_copy(update={"food_items": [*label.food_items, "nothing like it"]}).to_json() for label in labels]
        * 2
    )
    answerers = {"tuned": evaluate.each(lambda _: next(more))}
    for scope, metrics in (("exhaustive", {"item_recall_micro", "item_f1_micro"}), ("primary", {"item_recall_micro"})):
        told = held_out.remove_columns("label_scope") if "label_scope" in held_out.column_names else held_out
        found = benchmark.measure(answerers, "tuned", told.add_column("label_scope", [scope] * 4), 4, "c")
        of = {row.metric: row.value for row in found if row.subject == "tuned"}
        assert {metric for metric in ("item_recall_micro", "item_f1_micro") if metric in of} == metrics
        assert of["item_recall_micro"] == 1


def test_other_scenes_are_scored_free_and_under_the_grammar(tmp_path):
    other_scenes.main(count=12, out=tmp_path / "other_scenes.json")
    rows = {(row.subject, row.metric): row for row in read_results(tmp_path / "other_scenes.json")}
    assert rows["tuned constrained", "strict_json_rate"].value == 1
    assert rows["tuned", "is_food_accuracy"].value > 0.7
    assert {row.n for (_, metric), row in rows.items() if metric == "is_food_accuracy"} == {12}
