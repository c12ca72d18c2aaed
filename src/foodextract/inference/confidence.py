"""The confidence of a constrained answer, from the probabilities of its tokens, and what follows from it."""

from collections.abc import Collection
from dataclasses import dataclass
from itertools import accumulate
from math import exp, log
from typing import ClassVar

from foodextract.inference.grammar import Dialect
from foodextract.models.beside_weights import BesideWeights
from foodextract.prompts import NOTHING
from foodextract.schema import FIELDS, FoodRecord, listing, title_parts

SURE = 1 - 1e-6  # probabilities are kept this far from 0 and 1, so that their logits are finite


@dataclass(frozen=True)
class Confidence:
    """How sure the model is, as probabilities from 0 to 1.

    `is_food` is that of the chosen value. The lists hold one value per item: the geometric mean of the probabilities of
    its tokens, up to the closing quotation mark, among the tokens that the grammar allowed. With a `Calibration`, the
    values are the shares of right answers to expect.
    """

    is_food: float
    food_items: list[float]
    drink_items: list[float]


@dataclass(frozen=True)
class Calibration(BesideWeights):
    """Platt scaling (Platt 1999): logits of raw probabilities times a slope, plus an intercept.

    Those of `is_food` are for the probability that there is food or drink. The intercept is never positive: an answer
    that is not sure enough of what it names becomes "neither", while one that names nothing stays as it is. `images` is
    the number of images that the values were fitted on, by `benchmarks/platt.py`.
    """

    FILE: ClassVar[str] = "calibration.json"

    is_food_slope: float = 1.0
    is_food_intercept: float = 0.0
    item_slope: float = 1.0
    item_intercept: float = 0.0
    images: int = 0

    def apply(self, record: FoodRecord, raw: Confidence) -> tuple[FoodRecord, Confidence]:
        """The calibrated answer."""
        edible = _scaled(chance_of_food(record, raw), self.is_food_slope, self.is_food_intercept)
        if record.is_food and edible < 0.5:
            return NOTHING, Confidence(1 - edible, [], [])
        lists = ([_scaled(p, self.item_slope, self.item_intercept) for p in getattr(raw, name)] for name in FIELDS)
        return record, Confidence(edible if record.is_food else 1 - edible, *lists)


def chance_of_food(record: FoodRecord, confidence: Confidence) -> float:
    """The probability that there is food or drink, whatever the answer."""
    return confidence.is_food if record.is_food else 1 - confidence.is_food


def logit(probability: float) -> float:
    """log(p / (1 - p)), finite also for 0 and 1."""
    p = min(max(probability, 1 - SURE), SURE)
    return log(p / (1 - p))


def _scaled(probability: float, slope: float, intercept: float) -> float:
    return 1 / (1 + exp(-(slope * logit(probability) + intercept)))


def confidence_of(pieces: list[tuple[bytes, float | None]], dialect: Dialect) -> Confidence:
    """Compute the confidence of an answer from the bytes and the log-probability of each token (`Decoder.pieces`)."""
    text = b"".join(piece for piece, _ in pieces).decode(errors="replace")  # the last character may be incomplete
    byte_of = list(accumulate((len(character.encode()) for character in text), initial=0))  # by character
    token_of = [number for number, (piece, _) in enumerate(pieces) for _ in piece]  # by byte

    def mean(start: int, end: int) -> float:
        tokens = sorted(set(token_of[byte_of[start] : byte_of[end]]))
        logprobs = [logprob for token in tokens if (logprob := pieces[token][1]) is not None]
        return exp(sum(logprobs) / len(logprobs)) if logprobs else 1.0

    spans = dialect.spans(text)
    is_food = mean(*spans["is_food"][0]) if spans["is_food"] else 1.0  # an answer may be cut off before it
    return Confidence(is_food, *([mean(start + 1, end) for start, end in spans[name]] for name in FIELDS))


def with_sure_items(record: FoodRecord, confidence: Confidence, least: float) -> tuple[FoodRecord, Confidence]:
    """Leave out items below the confidence `least`; the title then lists the others, and `is_food` stays."""
    kept: dict[str, list[str]] = {}
    values: dict[str, list[float]] = {}
    for name in FIELDS:
        pairs = zip(getattr(record, name), getattr(confidence, name), strict=True)
        sure = [(item, value) for item, value in pairs if value >= least]
        kept[name], values[name] = [item for item, _ in sure], [value for _, value in sure]
    if all(kept[name] == getattr(record, name) for name in FIELDS):
        return record, confidence
    title = listing(sorted(kept["food_items"] + kept["drink_items"])) or "food or drink"
    return FoodRecord(is_food=record.is_food, image_title=title, **kept), Confidence(confidence.is_food, **values)


def with_fitting_title(record: FoodRecord, names: Collection[str]) -> FoodRecord:
    """Let the title list the items where it is empty, or where a part of it names one of `names` but no item.

    Without `names`, the title stays as it is.
    """
    items = record.food_items + record.drink_items
    known = {word for item in items for word in item.split()}

    def names_another(part: str) -> bool:
        mentioned = any(f" {name} " in f" {part} " for name in names)
        return (part in names and part not in items) or (mentioned and known.isdisjoint(part.split()))

    if not items or not names or (record.image_title and not any(map(names_another, title_parts(record.image_title)))):
        return record
    return record.model_copy(update={"image_title": listing(sorted(items))})
