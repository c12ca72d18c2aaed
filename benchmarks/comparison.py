"""Two models on the same images: the difference of their figures, how sure it is, and whether chance would do.

The interval is a paired bootstrap's: both models are resampled with the same images. The p value is of a paired permutation test
(Noreen 1989; Yeh 2000 for F1 of labeled items): were the models equal, each pair of answers could as well have come the other way round.
For a share of images that is McNemar's test (1947).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import permutation_test

from foodextract.evaluation.evaluate import Metric, Table, judge_all, middle, to_rows
from foodextract.evaluation.metrics import MEASURES, Measure
from foodextract.evaluation.results import Row
from foodextract.evaluation.scoring import Reader
from foodextract.schema import FoodRecord

PERMUTATIONS = (
    9999  # the smallest p is 2 / (PERMUTATIONS + 1) = 0.0002, unless all permutations of few images can be tried
)
COMPARED = (
    "strict_json_rate", "is_food_accuracy", "is_food_mcc", "item_f1_micro", "item_f1_micro_soft", "item_f1_macro", "title_similarity",
    "hallucination_rate",
)  # fmt: skip


@dataclass(frozen=True)
class Difference:
    """Ours minus theirs, over the images that the metric is about. `p` is two-sided."""

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
    """One difference a metric; metrics that no image here is about are left out. Raises ValueError for lists of different lengths."""
    our, their = (Table(judge_all(labels, answers, scopes, read)) for answers in (ours, theirs))
    return [_difference(name, MEASURES[name], our, their) for name in metrics if our.n(MEASURES[name])]


def _difference(name: str, measure: Measure, our: Table, their: Table) -> Difference:
    low, high = middle(our.samples(measure) - their.samples(measure))
    value = our.value(measure) - their.value(measure)
    return Difference(
        Metric(name, value, float(low), float(high), our.n(measure), measure.unit), _p_value(measure, our, their)
    )


def _p_value(measure: Measure, our: Table, their: Table) -> float:
    about = our.values[:, our.place[measure.images]] > 0
    rows = np.concatenate([table.values[about][:, table.places(measure)] for table in (our, their)])  # (2 n, columns)

    def difference(mine: np.ndarray, others: np.ndarray, axis: int = -1) -> np.ndarray:
        """Both (…, n): which rows are ours, and which theirs."""
        return measure.of(*np.moveaxis(rows[mine].sum(-2), -1, 0)) - measure.of(
            *np.moveaxis(rows[others].sum(-2), -1, 0)
        )

    pairs = np.arange(len(rows)).reshape(2, -1)
    if len(pairs[0]) < 2 or np.array_equal(*rows[pairs]):
        return 1.0  # nothing to exchange
    found = permutation_test(
        pairs, difference, permutation_type="samples", n_resamples=PERMUTATIONS, batch=200, vectorized=True, rng=0
    )
    return float(found.pvalue)


def difference_rows(benchmark: str, subject: str, differences: Sequence[Difference], command: str) -> list[Row]:
    """Two rows a difference: `<metric>_difference` with its interval, and `<metric>_p`. `subject` says who minus whom."""
    figures = []
    for difference in differences:
        m = difference.metric
        figures.append(Metric(f"{m.name}_difference", m.value, m.low, m.high, m.n, m.unit))
        figures.append(Metric(f"{m.name}_p", difference.p, None, None, m.n, "probability"))
    return to_rows(benchmark, subject, figures, command)
