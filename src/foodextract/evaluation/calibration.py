"""Calibration: how often the model is right at each level of its own confidence."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from foodextract.evaluation.evaluate import rate


@dataclass(frozen=True)
class Bin:
    """Predictions of similar probability: its mean, the share that is right with its interval, n."""

    predicted: float
    observed: float
    low: float
    high: float
    n: int


def reliability(right: Sequence[bool], probabilities: Sequence[float], bins: int = 10) -> list[Bin]:
    """Group predictions by probability into bins of equal width; empty bins are left out.

    The means are those of sklearn's `calibration_curve`, which returns no counts; intervals and ECE need them.
    """
    truth, predicted = np.asarray(right, bool), np.asarray(probabilities)
    number = np.minimum((predicted * bins).astype(int), bins - 1)
    result = []
    for one in np.unique(number):
        share = rate("", truth[number == one].tolist())
        result.append(Bin(float(predicted[number == one].mean()), share.value, share.low, share.high, share.n))
    return result


def calibration_error(bins: Sequence[Bin]) -> float:
    """Return the expected calibration error (ECE, Naeini et al. 2015): mean |predicted - observed| over predictions."""
    return sum(b.n * abs(b.predicted - b.observed) for b in bins) / sum(b.n for b in bins)
