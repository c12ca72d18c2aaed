"""How sure is the model that an image shows food or drink, and how often is it right when it is that sure?

`Extractor.extract_many_with_confidence` answers the first question (the probability of the value it chose, so 1 minus it
where that is 0); whoever gives a probability an image can be put to the second.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from foodextract.evaluation.evaluate import rate
from foodextract.schema import FoodRecord


@dataclass(frozen=True)
class Bin:
    """Images of about the same probability: its mean, and the share that really shows food or drink with its 95 % interval."""

    predicted: float
    observed: float
    low: float
    high: float
    n: int


def reliability(labels: Sequence[FoodRecord], probabilities: Sequence[float], bins: int = 10) -> list[Bin]:
    """Images by their probability of `is_food` = 1, in bins of equal width; empty ones are left out."""
    truth, said = np.array([bool(label.is_food) for label in labels]), np.asarray(probabilities)
    place = np.minimum((said * bins).astype(int), bins - 1)
    found = []
    for number in np.unique(place):
        share = rate("", truth[place == number].tolist())
        found.append(Bin(float(said[place == number].mean()), share.value, share.low, share.high, share.n))
    return found


def calibration_error(bins: Sequence[Bin]) -> float:
    """The expected calibration error (Naeini et al. 2015): by how much the probabilities are off, on average over images."""
    return sum(b.n * abs(b.predicted - b.observed) for b in bins) / sum(b.n for b in bins)
