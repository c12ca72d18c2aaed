"""How each metric comes from sums over images of the columns that `judging.judge` fills: the whole list, in one place.

Names: *micro* is over all items together, *macro* the mean over images, *soft* counts names that are spelled alike as found.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from foodextract.evaluation.scoring import SHELVES

Sums = np.ndarray  # of any shape: one number for all images, or one a bootstrap sample


@dataclass(frozen=True)
class Measure:
    """A formula and the columns whose sums it takes."""

    of: Callable[..., np.ndarray]
    columns: tuple[str, ...]
    images: str = "images"  # the column that says which images it is about
    unit: str = "share"
    wilson: bool = False  # a share of images, which has an interval of its own


def ratio(part: Sums, whole: Sums) -> np.ndarray:
    """part / whole, and 0 where there is nothing."""
    part, whole = np.broadcast_arrays(np.asarray(part, float), np.asarray(whole, float))
    return np.divide(part, whole, out=np.zeros(part.shape), where=whole > 0)


def fraction(hits: Sums, faults: Sums) -> np.ndarray:
    """Precision (found, invented) or recall (found, missed)."""
    return ratio(hits, hits + faults)


def f1(found: Sums, invented: Sums, missed: Sums) -> np.ndarray:
    return ratio(2 * found, 2 * found + invented + missed)


# What is true (0, 1) by what was told (0, 1, nothing). "Nothing" is a third class, one that no image has: an unreadable answer is wrong
# about either, and says neither.
CONFUSION = tuple(f"{truth} told {told}" for truth in (0, 1) for told in (0, 1, None))


def balanced_accuracy(*confusion: Sums) -> np.ndarray:
    """The mean recall of the classes that occur."""
    truths = [confusion[:3], confusion[3:]]
    recalls = [ratio(row[truth], sum(row)) for truth, row in enumerate(truths)]
    return ratio(sum(recalls), sum(np.asarray(sum(row) > 0, float) for row in truths))


def yes_f1(*confusion: Sums) -> np.ndarray:
    """F1 of "there is food or drink"."""
    return f1(confusion[4], confusion[1], confusion[3] + confusion[5])


def mcc(*confusion: Sums) -> np.ndarray:
    """Matthews' correlation in its form for several classes (Gorodkin 2004), −1 to 1; 0 for whoever always says the same."""
    cells = np.array(confusion, float).reshape(2, 3, *np.shape(confusion[0]))
    truths, told, n = cells.sum(1), cells.sum(0), cells.sum((0, 1))
    covariance = n * (cells[0, 0] + cells[1, 1]) - (truths * told[:2]).sum(0)
    spread = (n**2 - (truths**2).sum(0)) * (n**2 - (told**2).sum(0))
    return np.divide(covariance, np.sqrt(spread), out=np.zeros(np.shape(n)), where=spread > 0)


def _rate(column: str, images: str = "images") -> Measure:
    return Measure(ratio, (column, images), images, wilson=True)


def _item_measures() -> dict[str, Measure]:
    found = {}
    for shelf in SHELVES:
        asked = f"{shelf} asked"
        for name, tail in ((shelf, ""), (f"{shelf} soft", "_soft")):
            hits, faults, misses = (f"{name} {what} of complete" for what in ("found", "invented", "missed"))
            found |= {
                f"{shelf}_precision_micro{tail}": Measure(fraction, (hits, faults), "complete"),
                f"{shelf}_recall_micro{tail}": Measure(fraction, (f"{name} found", f"{name} missed"), asked),
                f"{shelf}_f1_micro{tail}": Measure(f1, (hits, faults, misses), "complete"),
                f"{shelf}_precision_macro{tail}": Measure(ratio, (f"{name} precision", "complete"), "complete"),
                f"{shelf}_recall_macro{tail}": Measure(ratio, (f"{name} recall", asked), asked),
                f"{shelf}_f1_macro{tail}": Measure(ratio, (f"{name} f1", "complete"), "complete"),
            }
    return found


MEASURES: dict[str, Measure] = {
    "strict_json_rate": _rate("strict"),
    "schema_valid_rate": _rate("shaped"),
    "is_food_accuracy": _rate("right"),
    "is_food_balanced_accuracy": Measure(balanced_accuracy, CONFUSION),
    "is_food_f1": Measure(yes_f1, CONFUSION),
    "is_food_mcc": Measure(mcc, CONFUSION, unit="correlation"),
    **_item_measures(),
    "title_similarity": Measure(ratio, ("title", "titled"), "titled"),
    "hallucination_rate": _rate("hallucinated", "not food"),
    "repetition_rate": _rate("repeats"),
    "truncation_rate": _rate("truncated"),
    "answer_characters": Measure(ratio, ("characters", "images"), unit="characters"),
}
