"""The list of metrics: each is a formula over sums of the columns that `scoring.score_answer` fills.

*micro* pools all items, *macro* averages over images, *soft* also matches names of similar spelling.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from foodextract.evaluation.scoring import CONFUSION, ITEM_KINDS

Sums = Any  # an array of any shape: one number for all images, or one per bootstrap sample


@dataclass(frozen=True)
class Formula:
    """A function and the columns whose sums it takes."""

    of: Callable[..., np.ndarray]
    columns: tuple[str, ...]
    images: str = "images"  # the column that marks the images the metric covers
    unit: str = "share"
    wilson: bool = False  # a share of images, which has Wilson's interval


def ratio(part: Sums, whole: Sums) -> np.ndarray:
    """part / whole, and 0 where whole is 0."""
    part, whole = np.broadcast_arrays(np.asarray(part, float), np.asarray(whole, float))
    return np.divide(part, whole, out=np.zeros(part.shape), where=whole > 0)


def hit_ratio(hits: Sums, errors: Sums) -> np.ndarray:
    """Precision from (found, invented), recall from (found, missed)."""
    return ratio(hits, hits + errors)


def f1(found: Sums, invented: Sums, missed: Sums) -> np.ndarray:
    return ratio(2 * found, 2 * found + invented + missed)


def balanced_accuracy(*confusion: Sums) -> np.ndarray:
    """The mean recall of the classes that occur."""
    rows = [confusion[:3], confusion[3:]]
    recalls = [ratio(row[label], sum(row)) for label, row in enumerate(rows)]
    return ratio(sum(recalls), sum(np.asarray(sum(row) > 0, float) for row in rows))


def is_food_f1(*confusion: Sums) -> np.ndarray:
    """F1 of the class "food or drink is visible"."""
    return f1(confusion[4], confusion[1], confusion[3] + confusion[5])


def mcc(*confusion: Sums) -> np.ndarray:
    """Matthews correlation for several classes (Gorodkin 2004), -1 to 1; 0 for a constant answer."""
    cells = np.array(confusion, float).reshape(2, 3, *np.shape(confusion[0]))
    labels, answers, n = cells.sum(1), cells.sum(0), cells.sum((0, 1))
    covariance = n * (cells[0, 0] + cells[1, 1]) - (labels * answers[:2]).sum(0)
    spread = (n**2 - (labels**2).sum(0)) * (n**2 - (answers**2).sum(0))
    return np.divide(covariance, np.sqrt(spread), out=np.zeros(np.shape(n)), where=spread > 0)


def _rate(column: str, images: str = "images") -> Formula:
    return Formula(ratio, (column, images), images, wilson=True)


def _item_metrics() -> dict[str, Formula]:
    metrics: dict[str, Formula] = {}
    for kind in ITEM_KINDS:
        labeled = f"{kind} labeled"
        for name, suffix in ((kind, ""), (f"{kind} soft", "_soft")):
            found, invented, missed = (f"{name} {what}, complete" for what in ("found", "invented", "missed"))
            metrics |= {
                f"{kind}_precision_micro{suffix}": Formula(hit_ratio, (found, invented), "complete"),
                f"{kind}_recall_micro{suffix}": Formula(hit_ratio, (f"{name} found", f"{name} missed"), labeled),
                f"{kind}_f1_micro{suffix}": Formula(f1, (found, invented, missed), "complete"),
                f"{kind}_precision_macro{suffix}": Formula(ratio, (f"{name} precision", "complete"), "complete"),
                f"{kind}_recall_macro{suffix}": Formula(ratio, (f"{name} recall", labeled), labeled),
                f"{kind}_f1_macro{suffix}": Formula(ratio, (f"{name} f1", "complete"), "complete"),
            }
    return metrics


METRICS: dict[str, Formula] = {
    "strict_json_rate": _rate("strict"),
    "schema_valid_rate": _rate("valid"),
    "is_food_accuracy": _rate("correct"),
    "is_food_balanced_accuracy": Formula(balanced_accuracy, tuple(CONFUSION.values())),
    "is_food_f1": Formula(is_food_f1, tuple(CONFUSION.values())),
    "is_food_mcc": Formula(mcc, tuple(CONFUSION.values()), unit="correlation"),
    **_item_metrics(),
    "title_similarity": Formula(ratio, ("title", "titled"), "titled"),
    "title_agreement_rate": _rate("title fits", "itemized"),
    "hallucination_rate": _rate("hallucinated", "not food"),
    "repetition_rate": _rate("repeats"),
    "truncation_rate": _rate("truncated"),
    "answer_characters": Formula(ratio, ("characters", "images"), unit="characters"),
}
