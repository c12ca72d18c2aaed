import numpy as np
import pytest
from sklearn.calibration import calibration_curve

from foodextract.evaluation.calibration import Bin, calibration_error, reliability
from foodextract.inference.confidence import Calibration, Confidence, logit, with_fitting_title, with_sure_items
from foodextract.schema import FoodRecord
from platt import fit, judged_items


def answer(is_food, **items):
    return FoodRecord(is_food=is_food, image_title="", **{"food_items": [], "drink_items": []} | items)


def test_bins_worked_out_by_hand():
    bins = reliability([False, True, True, True, True], [0.0, 0.05, 0.55, 0.59, 1.0])
    assert [(b.predicted, b.observed, b.n) for b in bins] == [(0.025, 0.5, 2), (pytest.approx(0.57), 1, 2), (1, 1, 1)]
    assert calibration_error(bins) == pytest.approx((2 * 0.475 + 2 * 0.43 + 0) / 5)
    assert all(b.low <= b.observed <= b.high for b in bins)


def test_bins_equal_scikit_learn():
    rng = np.random.default_rng(0)
    probabilities = rng.random(500) ** 3
    truth = rng.random(500) < probabilities
    bins = reliability(truth.tolist(), probabilities)
    observed, predicted = calibration_curve(truth, probabilities, n_bins=10)
    assert [b.observed for b in bins] == pytest.approx(observed.tolist())
    assert [b.predicted for b in bins] == pytest.approx(predicted.tolist())
    assert sum(b.n for b in bins) == 500


def test_a_perfectly_calibrated_model_has_no_error():
    assert calibration_error([Bin(0.2, 0.2, 0, 1, 10), Bin(0.9, 0.9, 0, 1, 3)]) == 0


def test_what_a_label_of_the_main_item_says_about_items():
    label = answer(1, food_items=["pizza"])
    both = answer(1, food_items=["pizza", "salad"]), Confidence(1, [0.9, 0.4], [])
    wrong = answer(1, food_items=["soup"]), Confidence(1, [0.7], [])
    assert judged_items([label], [both], ["exhaustive"]) == ([True, False], [0.9, 0.4])
    assert judged_items([label], [both], ["primary"]) == ([True], [0.9])  # the salad may be there
    assert judged_items([label], [wrong], ["primary"]) == ([False], [0.7])
    assert judged_items([answer(0)], [wrong], ["primary"]) == ([False], [0.7])


def test_calibration_makes_an_overconfident_model_honest():
    rng = np.random.default_rng(0)
    honest = rng.uniform(0.3, 0.95, 4000)
    raw = 1 / (1 + np.exp(-3 * np.log(honest / (1 - honest)) - 1))  # too sure by a factor of 3, and by 1
    right = rng.random(4000) < honest
    label = answer(1, food_items=["pizza"])
    given = [
        (answer(1, food_items=["pizza" if hit else "soup"]), Confidence(0.9, [float(p)], []))
        for hit, p in zip(right, raw, strict=True)
    ]
    found = fit([label] * 4000, given, ["exhaustive"] * 4000)
    assert found.is_food_slope == 1.0  # all right: nothing to learn
    assert found.item_slope == pytest.approx(1 / 3, abs=0.03)
    assert found.item_intercept == pytest.approx(-1 / 3, abs=0.1)
    after = [found.apply(*one)[1].food_items[0] for one in given]
    assert calibration_error(reliability(right.tolist(), after)) < 0.03
    assert calibration_error(reliability(right.tolist(), raw)) > 0.15


def test_calibration_keeps_the_order_and_a_sure_decision(tmp_path, caplog):
    found = Calibration(0.5, 0.0, 2.0, -1.0, 100)
    found.write(tmp_path)
    assert Calibration.find(tmp_path) == found
    assert Calibration.find(tmp_path / "nowhere") is None
    for damaged in ('{"is_food_slope": 0.9, "is_fo', '{"is_food_slope": "steep"}', "[]"):
        (tmp_path / "calibration.json").write_text(damaged)
        assert Calibration.find(tmp_path) is None
        assert "calibration.json is ignored, since it cannot be read: download it again" in caplog.text
        caplog.clear()
    record = answer(1, food_items=["egg", "pie", "tea", "tart"])
    same, made = found.apply(record, Confidence(0.5, [0.0, 0.5, 0.6, 1.0], []))
    assert same == record
    assert made.is_food == pytest.approx(0.5)
    assert sorted(made.food_items) == made.food_items
    assert logit(made.food_items[1]) == pytest.approx(-1)
    assert 0 < made.food_items[0] < made.food_items[-1] < 1


def test_an_answer_that_is_not_sure_of_food_becomes_neither():
    """Of answers with a chance of 0.6, 30 % show food; of those with 0.9, nearly all; those that say no are right."""
    food, none = answer(1, food_items=["pie"]), answer(0)
    labels, answers = [], []
    for chance, shows, count in ((0.6, 30, 100), (0.9, 97, 100), (0.1, 1, 100)):
        labels += [food] * shows + [none] * (count - shows)
        said = food if chance > 0.5 else none
        answers += [(said, Confidence(max(chance, 1 - chance), [0.8] * said.is_food, []))] * count
    found = fit(labels, answers, ["exhaustive"] * 300)
    assert found.is_food_intercept < 0
    assert found.apply(*answers[0]) == (none, Confidence(pytest.approx(0.7, abs=0.05), [], []))
    assert found.apply(*answers[100])[0] == food
    assert found.apply(*answers[200]) == (none, Confidence(pytest.approx(0.99, abs=0.02), [], []))
    unsure, sure = (none, Confidence(0.6, [], [])), (none, Confidence(0.9, [], []))
    labels = [food] * 60 + [none] * 40 + [food] * 30 + [none] * 70
    assert fit(labels, [unsure] * 100 + [sure] * 100, ["exhaustive"] * 200).is_food_intercept == 0


def test_a_title_that_names_something_else_lists_the_items():
    record = FoodRecord(is_food=1, image_title="pizza and tea", food_items=["pizza"], drink_items=["cola"])
    assert with_fitting_title(record, {"pizza", "tea", "cola"}).image_title == "cola and pizza"
    assert with_fitting_title(record, {"pizza", "cola"}) == record  # "tea" is no name that the model knows
    free = record.model_copy(update={"image_title": "a quiet lunch"})
    assert with_fitting_title(free, {"pizza", "tea", "cola"}) == free
    for title in ("", "rice on the bone", "tea"):
        odd = record.model_copy(update={"image_title": title})
        assert with_fitting_title(odd, {"pizza", "rice", "tea"}).image_title == "cola and pizza"
        assert with_fitting_title(odd, set()) == odd
    cake = FoodRecord(is_food=1, image_title="chocolate cake", food_items=["cake"], drink_items=[])
    assert with_fitting_title(cake, {"cake", "chocolate"}) == cake


def test_sure_items_keep_their_values():
    record = FoodRecord(is_food=1, image_title="pie, tea and egg", food_items=["pie", "egg"], drink_items=["tea"])
    left, confidence = with_sure_items(record, Confidence(0.9, [0.8, 0.3], [0.5]), 0.5)
    assert left == FoodRecord(is_food=1, image_title="pie and tea", food_items=["pie"], drink_items=["tea"])
    assert confidence == Confidence(0.9, [0.8], [0.5])
