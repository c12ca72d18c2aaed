import numpy as np
import pytest
from sklearn.calibration import calibration_curve

from foodextract.evaluation.calibration import Bin, calibration_error, reliability
from foodextract.schema import FoodRecord

NO, YES = (FoodRecord(is_food=number, image_title="", food_items=[], drink_items=[]) for number in (0, 1))


def test_bins_worked_out_by_hand():
    bins = reliability([NO, YES, YES, YES, YES], [0.0, 0.05, 0.55, 0.59, 1.0])
    assert [(b.predicted, b.observed, b.n) for b in bins] == [(0.025, 0.5, 2), (pytest.approx(0.57), 1, 2), (1, 1, 1)]
    assert calibration_error(bins) == pytest.approx((2 * 0.475 + 2 * 0.43 + 0) / 5)
    assert all(b.low <= b.observed <= b.high for b in bins)


def test_bins_equal_scikit_learn():
    rng = np.random.default_rng(0)
    probabilities = rng.random(500) ** 3
    truth = rng.random(500) < probabilities
    bins = reliability([YES if one else NO for one in truth], probabilities)
    observed, predicted = calibration_curve(truth, probabilities, n_bins=10)
    assert [b.observed for b in bins] == pytest.approx(observed.tolist())
    assert [b.predicted for b in bins] == pytest.approx(predicted.tolist())
    assert sum(b.n for b in bins) == 500


def test_a_perfectly_calibrated_model_has_no_error():
    assert calibration_error([Bin(0.2, 0.2, 0, 1, 10), Bin(0.9, 0.9, 0, 1, 3)]) == 0
