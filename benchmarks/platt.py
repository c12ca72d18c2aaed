"""Fit the confidence of a model to labeled images: Platt scaling (Platt 1999) of `is_food` and of the named items."""

from collections.abc import Sequence

from sklearn.linear_model import LogisticRegression

from foodextract.evaluation.scoring import is_complete
from foodextract.inference.confidence import Calibration, Confidence, chance_of_food, logit
from foodextract.schema import FIELDS, FoodRecord

LEAST_SLOPE = 0.05  # a calibrated model stays more sure of what it was more sure of


def judged_items(
    labels: Sequence[FoodRecord], answers: Sequence[tuple[FoodRecord, Confidence]], scopes: Sequence[str]
) -> tuple[list[bool], list[float]]:
    """Whether each named item is right, and its confidence.

    Under a label of the main item only, further items are left out where that item is named: they may be right.
    """
    right, sure = [], []
    for label, (record, confidence), scope in zip(labels, answers, scopes, strict=True):
        wanted = {(field, name) for field in FIELDS for name in getattr(label, field)}
        named = [
            ((field, name), value)
            for field in FIELDS
            for name, value in zip(getattr(record, field), getattr(confidence, field), strict=True)
        ]
        found = any(item in wanted for item, _ in named)
        for item, value in named:
            if item in wanted or not found or is_complete(label, scope):
                right.append(item in wanted)
                sure.append(value)
    return right, sure


def fit(
    labels: Sequence[FoodRecord], answers: Sequence[tuple[FoodRecord, Confidence]], scopes: Sequence[str]
) -> Calibration:
    """Fit a `Calibration` to raw confidences on images that were not trained on.

    Nothing can be fitted, and the raw values stay, where all images show food or none does; and likewise for items
    where all that are named are right, or all wrong.
    """
    edible, chances = [label.is_food == 1 for label in labels], [chance_of_food(*answer) for answer in answers]
    slope, intercept = _platt(edible, chances, intercept=True)
    if intercept > 0:  # no answer could become one that names food
        slope, intercept = _platt(edible, chances, intercept=False)
    return Calibration(slope, intercept, *_platt(*judged_items(labels, answers, scopes), intercept=True), len(labels))


def _platt(right: Sequence[bool], probabilities: Sequence[float], intercept: bool) -> tuple[float, float]:
    if len(set(right)) < 2:
        return 1.0, 0.0
    model = LogisticRegression(C=1e6, fit_intercept=intercept)
    model.fit([[logit(probability)] for probability in probabilities], right)
    return max(float(model.coef_[0, 0]), LEAST_SLOPE), float(model.intercept_[0]) if intercept else 0.0
