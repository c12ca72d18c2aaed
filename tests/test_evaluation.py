import json

import numpy as np
import pytest

from foodextract import evaluation
from foodextract.schema import FoodRecord

NOTHING = FoodRecord(is_food=0, image_title="", food_items=[], drink_items=[])


def food(*foods, drinks=()):
    return FoodRecord(is_food=1, image_title="x", food_items=list(foods), drink_items=list(drinks))


LABELS = [food("pie", "egg"), food("taco", drinks=["tea"]), NOTHING, NOTHING, food("egg")]
ANSWERS = [
    food("pie", "jam").to_json(),  # 1 found, 1 invented, 1 missed
    food(drinks=["taco", "tea"]).to_json(),  # tea found; taco filed under drinks is 1 invented and 1 missed
    NOTHING.to_json(),
    food("air").to_json(),  # a hallucination: 1 invented
    str(json.loads(food("egg").to_json())),  # right, but a Python repr: 1 missed
]


def by_name(labels=LABELS, answers=ANSWERS):
    return {metric.name: metric for metric in evaluation.score(labels, answers)}


def test_figures_worked_out_by_hand():
    metrics = {name: metric.value for name, metric in by_name().items()}
    assert metrics["strict_json_rate"] == 4 / 5
    assert metrics["schema_valid_rate"] == 4 / 5
    assert metrics["is_food_accuracy"] == 3 / 5
    assert metrics["item_f1_micro"] == pytest.approx(2 * 2 / (2 * 2 + 3 + 3))
    assert metrics["food_f1_micro"] == pytest.approx(2 * 1 / (2 * 1 + 2 + 3))
    assert metrics["drink_f1_micro"] == pytest.approx(2 * 1 / (2 * 1 + 1 + 0))
    assert metrics["hallucination_rate"] == 1 / 2


def test_intervals_contain_the_value_and_n_is_told():
    for name, metric in by_name().items():
        assert 0 <= metric.low <= metric.value <= metric.high <= 1, name
        assert metric.n == (2 if name == "hallucination_rate" else 5)


def test_wilson_interval_of_a_textbook_case():
    metric = evaluation.rate("x", [True] * 81 + [False] * 182)  # Newcombe 1998, table I: 0.2553 to 0.3662
    assert (metric.low, metric.high) == (pytest.approx(0.2553, abs=1e-4), pytest.approx(0.3662, abs=1e-4))


def test_bootstrap_interval_has_its_coverage():
    """Of 100 samples from a population whose F1 is known, about 95 intervals contain it."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(100):
        right = rng.random(150) < 0.8  # one item a picture: named correctly, or another one invented in its place
        metric = evaluation.micro_f1("x", [evaluation.Counts(int(r), int(not r), int(not r)) for r in right])
        hits += metric.low <= 0.8 <= metric.high
    assert 88 <= hits <= 100


def test_perfect_and_useless_answers():
    assert {m.value for m in evaluation.score(LABELS, [label.to_json() for label in LABELS]) if m.name != "hallucination_rate"} == {1.0}
    assert {m.value for m in evaluation.score(LABELS, ["I see food."] * 5)} == {0.0}


def test_other_spacing_counts_as_valid_but_not_as_strict():
    metrics = by_name(answers=[text.replace(", ", ",") for text in ANSWERS])
    assert metrics["schema_valid_rate"].value == 4 / 5
    assert metrics["strict_json_rate"].value == 0


def test_worst_cases_are_the_worst():
    assert evaluation.worst(LABELS, ANSWERS, 2) == [4, 0]


def test_lists_that_do_not_match_are_an_error():
    with pytest.raises(ValueError, match="5 labels cannot be scored against 1 answers"):
        evaluation.score(LABELS, [""])


def test_asking_keeps_the_order_over_batches(rows):
    sizes = evaluation.ask(lambda batch: [f"{len(batch)} {picture.mode}" for picture in batch], rows["test"]["image"], batch_size=6)
    assert sizes == ["6 RGB"] * 12 + ["4 RGB"] * 4
