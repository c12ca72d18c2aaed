"""Compare two models on the same images: paired differences of metrics, with interval and p value.

The interval is a paired bootstrap's: both models are resampled with the same images. The p value comes from a paired
permutation test (Noreen 1989; Yeh 2000 for F1 of labeled items), which for a share of images is McNemar's test (1947).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import permutation_test

from foodextract.evaluation.evaluate import Metric, ScoreTable, percentile_interval, score_answers
from foodextract.evaluation.metrics import METRICS, Formula
from foodextract.evaluation.results import Row, make_row
from foodextract.evaluation.scoring import Reader
from foodextract.schema import FoodRecord

PERMUTATIONS = 9999  # the smallest p is 2 / (PERMUTATIONS + 1), unless few enough images allow all permutations
COMPARED = (
    "strict_json_rate", "is_food_accuracy", "is_food_mcc", "item_f1_micro", "item_f1_micro_soft", "item_f1_macro",
    "title_similarity", "hallucination_rate",
)  # fmt: skip


@dataclass(frozen=True)
class Difference:
    """Ours minus theirs, over the images that the metric covers. `p` is two-sided."""

    metric: Metric
    p: float


def compare(
    labels: Sequence[FoodRecord],
    ours: Sequence[str],
    theirs: Sequence[str],
    scopes: Sequence[str] | None = None,
    read: Reader = FoodRecord.parse,
    metrics: Sequence[str] = COMPARED,
) -> list[Difference]:
    """Return one difference per metric that covers an image. Raises ValueError for lists of different lengths."""
    our, their = (ScoreTable(score_answers(labels, answers, scopes, read)) for answers in (ours, theirs))
    return [_difference(name, METRICS[name], our, their) for name in metrics if our.n(METRICS[name])]


def _difference(name: str, formula: Formula, our: ScoreTable, their: ScoreTable) -> Difference:
    low, high = percentile_interval(our.samples(formula) - their.samples(formula))
    value = our.value(formula) - their.value(formula)
    metric = Metric(name, value, low, high, our.n(formula), formula.unit)
    return Difference(metric, _p_value(formula, our, their))


def _p_value(formula: Formula, our: ScoreTable, their: ScoreTable) -> float:
    covered = our.values[:, our.index[formula.images]] > 0
    rows = np.concatenate([table.values[covered][:, table.select(formula)] for table in (our, their)])  # (2 n, columns)

    def value(positions: np.ndarray) -> np.ndarray:
        return formula.of(*np.moveaxis(rows[positions].sum(-2), -1, 0))

    def difference(mine: np.ndarray, others: np.ndarray, axis: int = -1) -> np.ndarray:
        """Both (…, n): the positions of our rows, and of theirs."""
        return value(mine) - value(others)

    pairs = np.arange(len(rows)).reshape(2, -1)
    if len(pairs[0]) < 2 or np.array_equal(*rows[pairs]):
        return 1.0  # nothing to permute
    found = permutation_test(
        pairs, difference, permutation_type="samples", n_resamples=PERMUTATIONS, batch=200, vectorized=True, rng=0
    )
    return float(found.pvalue)


def difference_rows(benchmark: str, subject: str, differences: Sequence[Difference], command: str) -> list[Row]:
    """Return two rows per difference, `<metric>_difference` and `<metric>_p`. `subject` has the form `a minus b`."""
    rows = []
    for difference in differences:
        m = difference.metric
        for suffix, value, low, high, unit in (
            ("difference", m.value, m.low, m.high, m.unit),
            ("p", difference.p, None, None, "probability"),
        ):
            name = f"{m.name}_{suffix}"
            rows.append(
                make_row(benchmark, subject, name, value, unit=unit, low=low, high=high, n=m.n, command=command)
            )
    return rows
