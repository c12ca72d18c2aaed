"""Scoring answers against labels: strict form, `is_food`, and set precision and recall of the items, each with its 95 % interval.

Only strict answers count. A text that `FoodRecord.parse` refuses has no `is_food` and no items, so it lowers every metric; a model is
never given the benefit of a repair.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy.stats import binomtest, bootstrap
from tqdm import tqdm

from foodextract.pictures import open_picture
from foodextract.results import Row, make_row
from foodextract.schema import AnswerError, FoodRecord

CONFIDENCE = 0.95
RESAMPLES = 2000
ITEMS = ("food_items", "drink_items")


@dataclass(frozen=True)
class Metric:
    """One figure over `n` pictures with its 95 % interval."""

    name: str
    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Counts:
    """What one answer got right: items found, items invented, items missed."""

    found: int
    invented: int
    missed: int


def ask(
    answer: Callable[[list[Image.Image]], list[str]], pictures: Sequence[Image.Image], batch_size: int = 32, title: str = "model"
) -> list[str]:
    """The raw answers to `pictures` (a list, or a data set's lazy image column), batch by batch behind a progress bar."""
    answers: list[str] = []
    with tqdm(total=len(pictures), desc=f"asking {title}", unit="picture") as bar:
        for start in range(0, len(pictures), batch_size):
            batch = [open_picture(picture) for picture in pictures[start : start + batch_size]]
            answers += answer(batch)
            bar.update(len(batch))
    return answers


def score(labels: list[FoodRecord], answers: list[str]) -> list[Metric]:
    """All metrics of one model. Raises ValueError when the two lists differ in length or are empty."""
    if len(labels) != len(answers) or not labels:
        raise ValueError(f"{len(labels)} labels cannot be scored against {len(answers)} answers")
    strict = [_read(FoodRecord.parse, text) for text in answers]
    shaped = [_read(FoodRecord.from_json, text) for text in answers]
    not_food = [record for label, record in zip(labels, strict, strict=True) if not label.is_food]
    return [
        rate("strict_json_rate", [record is not None for record in strict]),
        rate("schema_valid_rate", [record is not None for record in shaped]),
        rate("is_food_accuracy", [r is not None and r.is_food == label.is_food for label, r in zip(labels, strict, strict=True)]),
        *(
            micro_f1(name, [count_items(label, record, fields) for label, record in zip(labels, strict, strict=True)])
            for name, fields in (
                ("item_f1_micro", ITEMS),
                ("food_f1_micro", ("food_items",)),
                ("drink_f1_micro", ("drink_items",)),
            )
        ),
        *([rate("hallucination_rate", [bool(r and (r.food_items or r.drink_items)) for r in not_food])] if not_food else []),
    ]


def to_rows(benchmark: str, subject: str, metrics: list[Metric], command: str) -> list[Row]:
    """The metrics of one model as rows of a results file."""
    return [make_row(benchmark, subject, m.name, m.value, low=m.low, high=m.high, n=m.n, command=command) for m in metrics]


def worst(labels: list[FoodRecord], answers: list[str], count: int) -> list[int]:
    """Positions of the `count` worst answers: unreadable ones first, then by how many items are invented or missed."""
    read = [_read(FoodRecord.parse, text) for text in answers]
    counts = [count_items(label, record, ITEMS) for label, record in zip(labels, read, strict=True)]
    faults = [(record is None, count.invented + count.missed) for record, count in zip(read, counts, strict=True)]
    return sorted(range(len(answers)), key=lambda position: faults[position], reverse=True)[:count]


def count_items(label: FoodRecord, answer: FoodRecord | None, fields: tuple[str, ...]) -> Counts:
    """Exact names, as sets, list by list: a drink filed under foods is one invented and one missed."""
    found = invented = missed = 0
    for field in fields:
        wanted, given = set(getattr(label, field)), set(getattr(answer, field)) if answer else set()
        found, invented, missed = found + len(wanted & given), invented + len(given - wanted), missed + len(wanted - given)
    return Counts(found, invented, missed)


def rate(name: str, hits: list[bool]) -> Metric:
    """A share with its Wilson interval."""
    interval = binomtest(sum(hits), len(hits)).proportion_ci(CONFIDENCE, "wilson")
    return Metric(name, sum(hits) / len(hits), interval.low, interval.high, len(hits))


def micro_f1(name: str, counts: list[Counts]) -> Metric:
    """F1 = 2 found / (2 found + invented + missed) over all pictures together, with a percentile bootstrap interval over pictures."""
    columns = tuple(np.array([getattr(count, field) for count in counts]) for field in ("found", "invented", "missed"))

    def f1(found: np.ndarray, invented: np.ndarray, missed: np.ndarray, axis: int = -1) -> np.ndarray:
        hits, faults = 2 * found.sum(axis), invented.sum(axis) + missed.sum(axis)
        return np.divide(hits, hits + faults, out=np.zeros(np.shape(hits)), where=hits + faults > 0)

    value = float(f1(*columns))
    interval = bootstrap(
        columns, f1, paired=True, n_resamples=RESAMPLES, batch=100, confidence_level=CONFIDENCE, method="percentile", rng=0
    ).confidence_interval
    return Metric(name, value, float(interval.low), float(interval.high), len(counts))


def _read(parser: Callable[[str], FoodRecord], text: str) -> FoodRecord | None:
    try:
        return parser(text)
    except AnswerError:
        return None
