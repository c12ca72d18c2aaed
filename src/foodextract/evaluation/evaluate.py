"""Scoring answers against labels: form, `is_food`, items and titles, each figure with its 95 % interval.

Whoever can turn an image into a text can be scored: a model, an API, a baseline. Only strict answers count. A text that
`FoodRecord.parse` refuses has no `is_food` and no items, so it finds nothing; a model is never given the benefit of a repair. (Other
people's models may be, with `read=FoodRecord.parse_lenient`; their `strict_json_rate` says how often it was needed.)

Shares of images have Wilson's interval (1927), which holds near 0 % and 100 % too; everything else has the percentile interval of a
bootstrap over images (Efron & Tibshirani 1993).
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
from foodextract.evaluation.metrics import MEASURES, Measure, f1, ratio
from foodextract.evaluation.results import Row, commit, make_row
from foodextract.evaluation.scoring import FIELDS, Columns, Counts, Reader, count_items, is_complete, judge, try_read
from foodextract.images import open_image
from foodextract.models.weights import checksum, snapshot
from foodextract.schema import EXHAUSTIVE, FoodRecord

CONFIDENCE = 0.95
RESAMPLES = 2000

BatchAnswer = Callable[[list[Image.Image]], list[str]]


@dataclass(frozen=True)
class Metric:
    """One figure over `n` images with its 95 % interval."""

    name: str
    value: float
    low: float
    high: float
    n: int
    unit: str = "share"


class Table:
    """What was judged, as columns of numbers: their sums over all images, and over the images of RESAMPLES bootstrap samples.

    The samples depend on the number of images alone, so two models that were asked about the same images are resampled alike.
    """

    def __init__(self, judged: Sequence[Columns]) -> None:
        self.place = {name: place for place, name in enumerate(judged[0])}
        self.values = np.array(
            [[float(columns[name]) for name in self.place] for columns in judged]
        )  # (images, columns)
        self.sums = self.values.sum(0)

    @cached_property
    def resampled(self) -> np.ndarray:
        """(RESAMPLES, columns). One product for all metrics, where `scipy.stats.bootstrap` would resample for each, and refuse n = 1."""
        rng, n, part = np.random.default_rng(0), len(self.values), RESAMPLES // 8  # parts save memory
        return np.concatenate([rng.multinomial(n, np.full(n, 1 / n), part) @ self.values for _ in range(8)])

    def places(self, measure: Measure) -> list[int]:
        return [self.place[column] for column in measure.columns]

    def n(self, measure: Measure) -> int:
        """How many images it is about."""
        return round(self.sums[self.place[measure.images]])

    def value(self, measure: Measure) -> float:
        return float(measure.of(*self.sums[self.places(measure)]))

    def samples(self, measure: Measure) -> np.ndarray:
        """The figure in every bootstrap sample, (RESAMPLES,)."""
        return measure.of(*self.resampled[:, self.places(measure)].T)

    def metric(self, name: str, measure: Measure) -> Metric:
        if measure.wilson:
            hits = round(self.sums[self.place[measure.columns[0]]])
            low, high = binomtest(hits, self.n(measure)).proportion_ci(CONFIDENCE, "wilson")
        else:
            low, high = middle(self.samples(measure))
        return Metric(name, self.value(measure), float(low), float(high), self.n(measure), measure.unit)

    def metrics(self) -> list[Metric]:
        """All metrics but those that no image here is about."""
        return [self.metric(name, measure) for name, measure in MEASURES.items() if self.n(measure)]


def middle(samples: np.ndarray) -> np.ndarray:
    """Low and high end of the middle 95 %."""
    return np.quantile(samples, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])


# ---------------------------------------------------------------------------------------------------------------------------------- asking


def ask(answer: BatchAnswer, images: Sequence[Image.Image], batch_size: int = 32, title: str = "model") -> list[str]:
    """The raw answers to `images` (a list, or a data set's lazy image column), batch by batch behind a progress bar."""
    answers: list[str] = []
    with tqdm(total=len(images), desc=f"asking {title}", unit="image") as bar:
        for start in range(0, len(images), batch_size):
            batch = [open_image(image) for image in images[start : start + batch_size]]
            answers += answer(batch)
            bar.update(len(batch))
    return answers


def key_of(model: PreTrainedModel, processor: ProcessorMixin, images: datasets.Dataset) -> str:
    """What the answers of `ask_once` depend on: weights, prompt, image budget, images and this code's commit."""
    prompt = processor.apply_chat_template(prompts.conversation(), add_generation_prompt=True)
    parts = (
        checksum(snapshot(model)),
        prompt,
        processor.to_json_string(),
        images._fingerprint,
        str(len(images)),
        commit(),
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def ask_once(
    path: str | Path,
    key: str,
    answer: BatchAnswer,
    images: Sequence[Image.Image],
    batch_size: int = 32,
    title: str = "model",
) -> tuple[list[str], float]:
    """`ask`, with the answers kept at `path` (JSON lines, one a batch): an interrupted or repeated call asks only what is missing.

    `key` says what the answers depend on (`key_of`); answers under another key are deleted. Returns the answers and the seconds that
    asking took in all.
    """
    path, answers, seconds = Path(path), [], 0.0
    head = json.dumps({"key": key}) + "\n"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    whole = [
        line for line in lines[1:] if lines[0] == head and line.endswith("\n")
    ]  # a killed run may leave half a line
    if lines != [head, *whole]:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(path.name + ".partial")
        fresh.write_text(head + "".join(whole), encoding="utf-8")
        fresh.replace(path)
    for batch in map(json.loads, whole):
        answers += batch["answers"]
        seconds += batch["seconds"]
    with tqdm(total=len(images), initial=len(answers), desc=f"asking {title}", unit="image") as bar:
        for start in range(len(answers), len(images), batch_size):
            began = time.perf_counter()
            batch = answer([open_image(image) for image in images[start : start + batch_size]])
            took = time.perf_counter() - began
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"answers": batch, "seconds": took}) + "\n")
            answers += batch
            seconds += took
            bar.update(len(batch))
    return answers, seconds


def each(answer: Callable[[Image.Image], str]) -> BatchAnswer:
    """Any callable that answers one image (a baseline, an API), as `ask` takes it."""
    return lambda images: [answer(image) for image in images]


# --------------------------------------------------------------------------------------------------------------------------------- scoring


def judge_all(
    labels: Sequence[FoodRecord],
    answers: Sequence[str],
    scopes: Sequence[str] | None = None,
    read: Reader = FoodRecord.parse,
) -> list[Columns]:
    """`judging.judge` of every image. Raises ValueError when the lists differ in length or are empty."""
    if len(labels) != len(answers) or not labels:
        raise ValueError(f"{len(labels)} labels cannot be scored against {len(answers)} answers")
    if scopes is not None and len(scopes) != len(labels):
        raise ValueError(f"{len(labels)} labels need as many scopes, not {len(scopes)}")
    return [judge(*case, read) for case in zip(labels, answers, scopes or [EXHAUSTIVE] * len(labels), strict=True)]


def score(
    labels: Sequence[FoodRecord],
    answers: Sequence[str],
    scopes: Sequence[str] | None = None,
    read: Reader = FoodRecord.parse,
) -> list[Metric]:
    """All metrics of one model. `scopes` says what each label names, `read` how an answer is read; see `judging`. Raises ValueError."""
    return Table(judge_all(labels, answers, scopes, read)).metrics()


def breakdown(
    labels: Sequence[FoodRecord],
    answers: Sequence[str],
    groups: Sequence[str],
    scopes: Sequence[str] | None = None,
    read: Reader = FoodRecord.parse,
) -> dict[str, list[Metric]]:
    """`score` of each group of images. `groups` has one name an image: its source, or the `number_of_items` of its label."""
    judged = judge_all(labels, answers, scopes, read)
    return {
        group: Table([columns for columns, name in zip(judged, groups, strict=True) if name == group]).metrics()
        for group in sorted(set(groups))
    }


def number_of_items(label: FoodRecord, most: int = 3) -> str:
    """`0 items`, `1 item`, `2 items`, `3 or more items`."""
    count = len(label.food_items) + len(label.drink_items)
    return f"{most} or more items" if count >= most else f"{count} item{'s' * (count != 1)}"


def by_class(
    labels: Sequence[FoodRecord], answers: Sequence[str], scopes: Sequence[str] | None = None
) -> dict[str, Counts]:
    """What became of each item name, the most wanted first. Where a label names only the main item, nothing counts as invented."""
    counts: dict[str, Counts] = {}
    for label, text, scope in zip(labels, answers, scopes or [EXHAUSTIVE] * len(labels), strict=True):
        answer = try_read(text)
        for field in FIELDS:
            wanted, given = set(getattr(label, field)), set(getattr(answer, field)) if answer else set()
            for name in wanted | given if is_complete(label, scope) else wanted:
                one = Counts(
                    found=int(name in wanted & given), invented=int(name not in wanted), missed=int(name not in given)
                )
                counts[name] = counts.get(name, Counts()) + one
    return dict(sorted(counts.items(), key=lambda item: (-item[1].found - item[1].missed, item[0])))


def f1_of_named(labels: Sequence[FoodRecord], answers: Sequence[str], scopes: Sequence[str] | None = None) -> float:
    """`item_f1_micro` over all images, those too whose label names only some items: found and missed ones count, further ones do not.

    For choosing among models, where few labels are complete; among complete ones it is `item_f1_micro`.
    """
    judged = judge_all(labels, answers, scopes)
    return float(
        f1(
            *(
                sum(row[column] for row in judged)
                for column in ("item found", "item invented of complete", "item missed")
            )
        )
    )


def recall_of(labels: Sequence[FoodRecord], answers: Sequence[str], names: Collection[str]) -> Metric | None:
    """`known_item_recall`: of the items in `labels` that are among `names`, such as those seen in training, the share that is found.

    Over n items, exact names, with Wilson's interval; None where there is no such item.
    """
    hits = []
    for label, answer in zip(labels, map(try_read, answers), strict=True):
        for field in FIELDS:
            hits += [
                answer is not None and name in getattr(answer, field) for name in getattr(label, field) if name in names
            ]
    return rate("known_item_recall", hits) if hits else None


def looks_blind(labels: Sequence[FoodRecord], answers: Sequence[str]) -> bool:
    """Is there one answer to all images, though their labels differ? Training can break the way from image to words."""
    return len(set(answers)) == 1 and len({label.to_json() for label in labels}) > 1


def rate(name: str, hits: Sequence[bool]) -> Metric:
    """A share with its Wilson interval."""
    return Table([{"images": 1, "hit": hit} for hit in hits]).metric(
        name, Measure(ratio, ("hit", "images"), wilson=True)
    )


def micro_f1(name: str, counts: Sequence[Counts]) -> Metric:
    """F1 over all images together with its bootstrap interval; one count an image."""
    table = Table([{"images": 1, "found": c.found, "invented": c.invented, "missed": c.missed} for c in counts])
    return table.metric(name, Measure(f1, ("found", "invented", "missed")))


def worst(
    labels: Sequence[FoodRecord], answers: Sequence[str], count: int, scopes: Sequence[str] | None = None
) -> list[int]:
    """Positions of the `count` worst answers: unreadable ones first, then by how many items are invented (where `scopes` let that be
    known) or missed.
    """
    faults = []
    for label, text, scope in zip(labels, answers, scopes or [EXHAUSTIVE] * len(labels), strict=True):
        counts = count_items(label, answer := try_read(text))
        faults.append((answer is None, counts.missed + is_complete(label, scope) * counts.invented))
    return sorted(range(len(answers)), key=lambda position: faults[position], reverse=True)[:count]


def to_rows(benchmark: str, subject: str, metrics: Sequence[Metric], command: str) -> list[Row]:
    """The metrics of one model as rows of a results file.

    `subject` is who was measured and, behind spaces, how: `base`, `base constrained`; a group of images follows a bar: `base | 2 items`.
    """
    return [
        make_row(benchmark, subject, m.name, m.value, unit=m.unit, low=m.low, high=m.high, n=m.n, command=command)
        for m in metrics
    ]
