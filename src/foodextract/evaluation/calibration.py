"""Calibration of `is_food`: how often the model is right at each level of its own confidence.

Take the probabilities from `Extractor.extract_many_with_confidence`: the confidence where `is_food` is 1, and 1 minus
it where it is 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from foodextract.evaluation.evaluate import rate
from foodextract.schema import FoodRecord


@dataclass(frozen=True)
class Bin:
    """Images of similar predicted probability: its mean, the share that shows food or drink with its interval, n."""

    predicted: float
    observed: float
    low: float
    high: float
    n: int


def reliability(labels: Sequence[FoodRecord], probabilities: Sequence[float], bins: int = 10) -> list[Bin]:
    """Group images by their probability of `is_food` = 1 into bins of equal width; empty bins are left out.

    The means are those of sklearn's `calibration_curve`, which returns no counts; intervals and ECE need them.
    """
    truth, predicted = np.array([bool(label.is_food) for label in labels]), np.asarray(probabilities)
    number = np.minimum((predicted * bins).astype(int), bins - 1)
    result = []
    for one in np.unique(number):
        share = rate("", truth[number == one].tolist())
        result.append(Bin(float(predicted[number == one].mean()), share.value, share.low, share.high, share.n))
    return result


def calibration_error(bins: Sequence[Bin]) -> float:
    """Return the expected calibration error (ECE, Naeini et al. 2015): mean |predicted - observed| over images."""
    return sum(b.n * abs(b.predicted - b.observed) for b in bins) / sum(b.n for b in bins)
