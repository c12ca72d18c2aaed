"""Evaluate predictions against labels: JSON form, `is_food`, items and titles, each metric with its 95 % interval.

Anything that turns images into texts can be scored. By default only strict answers count: a text that
`FoodRecord.parse` refuses has no `is_food` and no items. For other projects' models pass
`read=FoodRecord.parse_lenient`; `strict_json_rate` stays strict.

Shares of images get Wilson's interval (1927), all other metrics the percentile interval of a bootstrap over images
(Efron & Tibshirani 1993).
"""

import hashlib
import json
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import datasets
import numpy as np
from PIL import Image
from scipy.stats import binomtest
from tqdm import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from foodextract import prompts
from foodextract.data.dataset import rows_id
from foodextract.evaluation.metrics import METRICS, Formula, f1, ratio
from foodextract.evaluation.results import Row, commit, make_row
from foodextract.evaluation.scoring import Columns, Counts, Reader, count_items, is_complete, score_answer, try_read
from foodextract.images import open_image
from foodextract.models.weights import checksum, snapshot
from foodextract.schema import EXHAUSTIVE, FIELDS, FoodRecord

CONFIDENCE = 0.95
RESAMPLES = 2000

BatchAnswer = Callable[[list[Image.Image]], list[str]]


@dataclass(frozen=True)
class Metric:
    """One metric over `n` images with its 95 % interval."""

    name: str
    value: float
    low: float
    high: float
    n: int
    unit: str = "share"


class ScoreTable:
    """Scores as an array (images, columns), with their sums over all images and over RESAMPLES bootstrap samples.

    The samples depend only on the number of images, so two models scored on the same images are resampled alike.
    """

    def __init__(self, scores: Sequence[Columns]) -> None:
        self.index = {name: number for number, name in enumerate(scores[0])}
        self.values = np.array([[float(columns[name]) for name in self.index] for columns in scores])
        self.sums = self.values.sum(0)

    @cached_property
    def resampled(self) -> np.ndarray:
        """(RESAMPLES, columns), once for all metrics; `scipy.stats.bootstrap` resamples for each and refuses n = 1."""
        rng, n, part = np.random.default_rng(0), len(self.values), RESAMPLES // 8  # in parts, to save memory
        return np.concatenate([rng.multinomial(n, np.full(n, 1 / n), part) @ self.values for _ in range(8)])

    def select(self, formula: Formula) -> list[int]:
        """The positions of its columns."""
        return [self.index[column] for column in formula.columns]

    def n(self, formula: Formula) -> int:
        """The number of images it covers."""
        return round(self.sums[self.index[formula.images]])

    def value(self, formula: Formula) -> float:
        return float(formula.of(*self.sums[self.select(formula)]))

    def samples(self, formula: Formula) -> np.ndarray:
        """Its value in every bootstrap sample, (RESAMPLES,)."""
        return formula.of(*self.resampled[:, self.select(formula)].T)

    def metric(self, name: str, formula: Formula) -> Metric:
        if formula.wilson:
            hits = round(self.sums[self.index[formula.columns[0]]])
            low, high = binomtest(hits, self.n(formula)).proportion_ci(CONFIDENCE, "wilson")
        else:
            low, high = percentile_interval(self.samples(formula))
        return Metric(name, self.value(formula), float(low), float(high), self.n(formula), formula.unit)

    def metrics(self) -> list[Metric]:
        """All metrics that cover at least one image."""
        return [self.metric(name, formula) for name, formula in METRICS.items() if self.n(formula)]


def percentile_interval(samples: np.ndarray) -> tuple[float, float]:
    """Bounds of the middle 95 %."""
    low, high = np.quantile(samples, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


# --- predicting


def predict(
    answer: BatchAnswer, images: Sequence[Image.Image], batch_size: int = 32, title: str = "model", start: int = 0
) -> list[str]:
    """Return the raw answers to `images[start:]`, with a progress bar; `images` may be a lazy dataset column."""
    answers: list[str] = []
    with tqdm(total=len(images), initial=start, desc=f"evaluating {title}", unit="image") as bar:
        for first in range(start, len(images), batch_size):
            batch = [open_image(image) for image in images[first : first + batch_size]]
            answers += answer(batch)
            bar.update(len(batch))
    return answers


def cache_key(model: PreTrainedModel, processor: ProcessorMixin, images: datasets.Dataset) -> str:
    """Hash everything the answers depend on: weights, prompt, image budget, images and the commit of this code."""
    prompt = processor.apply_chat_template(prompts.conversation(), add_generation_prompt=True)
    weights, settings = checksum(snapshot(model)), processor.to_json_string()
    parts = (weights, prompt, settings, rows_id(images), commit())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def predict_cached(
    path: str | Path,
    key: str,
    answer: BatchAnswer,
    images: Sequence[Image.Image],
    batch_size: int = 32,
    title: str = "model",
) -> tuple[list[str], float]:
    """Like `predict`, but resumable: a repeated call predicts only the answers missing in `path` (JSON lines).

    `key` is the `cache_key`; answers stored under another key are discarded. Returns the answers and the seconds they
    took in total.
    """
    path, header = Path(path), json.dumps({"key": key}) + "\n"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    # A killed run may leave half a line.
    done = [line for line in lines[1:] if lines[0] == header and line.endswith("\n")]
    if lines != [header, *done]:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(header + "".join(done), encoding="utf-8")
        partial.replace(path)
    batches = [json.loads(line) for line in done]

    def answer_and_store(batch: list[Image.Image]) -> list[str]:
        began = time.perf_counter()
        batches.append({"answers": answer(batch), "seconds": time.perf_counter() - began})
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(batches[-1]) + "\n")
        return batches[-1]["answers"]

    predict(answer_and_store, images, batch_size, title, start=sum(len(batch["answers"]) for batch in batches))
    return [text for batch in batches for text in batch["answers"]], sum(batch["seconds"] for batch in batches)


# --- scoring


def score_answers(
    labels: Sequence[FoodRecord],
    answers: Sequence[str],
    scopes: Sequence[str] | None = None,
    read: Reader = FoodRecord.parse,
) -> list[Columns]:
    """`scoring.score_answer` of every image. Raises ValueError when the lists differ in length or are empty."""
    if len(labels) != len(answers) or not labels:
        raise ValueError(f"{len(labels)} labels cannot be scored against {len(answers)} answers")
    if scopes is not None and len(scopes) != len(labels):
        raise ValueError(f"{len(labels)} labels need as many scopes, not {len(scopes)}")
    cases = zip(labels, answers, scopes or [EXHAUSTIVE] * len(labels), strict=True)
    return [score_answer(label, text, scope, read) for label, text, scope in cases]


def score(
    labels: Sequence[FoodRecord],
    answers: Sequence[str],
    scopes: Sequence[str] | None = None,
    read: Reader = FoodRecord.parse,
) -> list[Metric]:
    """Return all metrics of one model. `scopes` is the column `label_scope`, `read` the parser. Raises ValueError."""
    return ScoreTable(score_answers(labels, answers, scopes, read)).metrics()


def rate(name: str, hits: Sequence[bool]) -> Metric:
    """Return a share with its Wilson interval."""
    formula = Formula(ratio, ("hit", "images"), wilson=True)
    return ScoreTable([{"images": 1, "hit": hit} for hit in hits]).metric(name, formula)


def validation_f1(labels: Sequence[FoodRecord], answers: Sequence[str], scopes: Sequence[str] | None = None) -> float:
    """Return `item_f1_micro` that also counts found and missed items of main-item labels.

    It is for choosing a checkpoint, where few labels are complete.
    """
    scores = score_answers(labels, answers, scopes)
    columns = ("item found", "item invented, complete", "item missed")
    return float(f1(*(np.sum([row[column] for row in scores]) for column in columns)))


def known_item_recall(labels: Sequence[FoodRecord], answers: Sequence[str], known: Collection[str]) -> Metric | None:
    """Return the recall of the labeled items named in `known`, such as those seen in training; None if none is."""
    hits = [
        answer is not None and name in getattr(answer, field)
        for label, answer in zip(labels, map(try_read, answers), strict=True)
        for field in FIELDS
        for name in getattr(label, field)
        if name in known
    ]
    return rate("known_item_recall", hits) if hits else None


def to_rows(benchmark: str, subject: str, metrics: Sequence[Metric], command: str) -> list[Row]:
    """Return the metrics of one model as rows of a results file.

    `subject` names the model and, after a space, the mode (`base constrained`); a group of images follows a bar:
    `base | 2 items`.
    """
    return [
        make_row(benchmark, subject, m.name, m.value, unit=m.unit, low=m.low, high=m.high, n=m.n, command=command)
        for m in metrics
    ]


# --- error analysis


def by_class(
    labels: Sequence[FoodRecord], answers: Sequence[str], scopes: Sequence[str] | None = None
) -> dict[str, Counts]:
    """Count each item name, the most frequent label first. Under a main-item label nothing counts as invented."""
    counts: dict[str, Counts] = {}
    for label, text, scope in zip(labels, answers, scopes or [EXHAUSTIVE] * len(labels), strict=True):
        answer = try_read(text)
        for field in FIELDS:
            wanted, given = set(getattr(label, field)), set(getattr(answer, field)) if answer else set()
            for name in wanted | given if is_complete(label, scope) else wanted:
                one = Counts(int(name in wanted & given), int(name not in wanted), int(name not in given))
                counts[name] = counts.get(name, Counts()) + one
    return dict(sorted(counts.items(), key=lambda item: (-item[1].found - item[1].missed, item[0])))


def is_constant(labels: Sequence[FoodRecord], answers: Sequence[str]) -> bool:
    """Whether all answers are the same though the labels differ: training can cut the path from image to text."""
    return len(set(answers)) == 1 and len({label.to_json() for label in labels}) > 1


def worst(
    labels: Sequence[FoodRecord], answers: Sequence[str], count: int, scopes: Sequence[str] | None = None
) -> list[int]:
    """Return the positions of the `count` worst answers: unreadable ones first, then by items missed or invented."""
    errors = []
    for label, text, scope in zip(labels, answers, scopes or [EXHAUSTIVE] * len(labels), strict=True):
        counts = count_items(label, answer := try_read(text))
        errors.append((answer is None, counts.missed + is_complete(label, scope) * counts.invented))
    return sorted(range(len(answers)), key=errors.__getitem__, reverse=True)[:count]
