"""One answer against one label: what it got right and wrong, as numbers that can be added up over images.

A label may name everything that is visible, or only the main item (`scope`). Where it names only the main item, finding that item counts
and further items are no errors: such images have a part in recall, none in precision and F1. A label that says "not food" is always
complete: there is nothing to name.
"""

import json
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

from pydantic_core import from_json
from rapidfuzz import fuzz, process, utils
from scipy.optimize import linear_sum_assignment

from foodextract.schema import EXHAUSTIVE, FIELDS, AnswerError, FoodRecord

SHELVES = {"item": FIELDS, "food": FIELDS[:1], "drink": FIELDS[1:]}
THRESHOLD = (
    80  # rapidfuzz's token_sort_ratio, 0 to 100: eggs is egg (86), burger is hamburger (80); but rice is ice, too (86)
)
LOOP = re.compile(r"(.{4,60}?)\1{2,}", re.DOTALL)  # the same 4 to 60 characters three times in a row

Reader = Callable[[str], FoodRecord]
Columns = dict[str, float]


@dataclass(frozen=True)
class Counts:
    """Items found, items invented, items missed. A share whose denominator is 0 is 0, but 1 where nothing was wanted and nothing given."""

    found: int = 0
    invented: int = 0
    missed: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(self.found + other.found, self.invented + other.invented, self.missed + other.missed)

    @property
    def precision(self) -> float:
        return self._share(self.found, self.found + self.invented)

    @property
    def recall(self) -> float:
        return self._share(self.found, self.found + self.missed)

    @property
    def f1(self) -> float:
        return self._share(2 * self.found, 2 * self.found + self.invented + self.missed)

    def _share(self, part: int, whole: int) -> float:
        return part / whole if whole else float(self == Counts())


def exact(wanted: Collection[str], given: Collection[str]) -> Counts:
    """Two lists of names as sets, compared letter by letter."""
    found = len(set(wanted) & set(given))
    return Counts(found, len(set(given)) - found, len(set(wanted)) - found)


def soft(wanted: Collection[str], given: Collection[str]) -> Counts:
    """The same, but names spelled alike (THRESHOLD; case and punctuation aside) match: one to one, as many pairs as there can be."""
    wanted, given = sorted(set(wanted)), sorted(set(given))
    if not wanted or not given:
        return exact(wanted, given)
    alike = process.cdist(wanted, given, scorer=fuzz.token_sort_ratio, processor=utils.default_process) >= THRESHOLD
    found = int(alike[linear_sum_assignment(alike, maximize=True)].sum())
    return Counts(found, len(given) - found, len(wanted) - found)


def count_items(label: FoodRecord, answer: FoodRecord | None, fields: tuple[str, ...] = FIELDS, match=exact) -> Counts:
    """Field by field: a drink filed under foods is one invented and one missed. No answer misses everything."""
    return sum((match(getattr(label, field), getattr(answer, field) if answer else ()) for field in fields), Counts())


def is_complete(label: FoodRecord, scope: str) -> bool:
    """Does the label name everything, so that what it does not name is an error?"""
    return scope == EXHAUSTIVE or not label.is_food


def try_read(text: str, read: Reader = FoodRecord.parse) -> FoodRecord | None:
    """The record in `text`, None where `read` finds none."""
    try:
        return read(text)
    except AnswerError:
        return None


def truncated(text: str) -> bool:
    """Does it begin a JSON object and end before the object does? That is what a limit on new tokens leaves. Broken JSON is not meant."""
    begun = text[text.find("{") :] if "{" in text else ""
    try:
        json.JSONDecoder().raw_decode(begun)
    except (json.JSONDecodeError, RecursionError):
        return isinstance(_begun(text), dict)
    return False


def repeats(text: str) -> bool:
    """Does it name an item twice, in whatever lists, or write the same 4 to 60 characters three times in a row?"""
    record = _begun(text)
    lists = (
        [record[field] for field in FIELDS if isinstance(record.get(field), list)] if isinstance(record, dict) else []
    )
    names = [str(name).casefold().strip() for items in lists for name in items]
    return len(set(names)) < len(names) or LOOP.search(text) is not None


def _begun(text: str) -> object:
    """What can be read of the JSON that starts at the first brace, however far it goes; None where it is not JSON."""
    try:
        return from_json(text[text.index("{") :], allow_partial="trailing-strings")
    except ValueError:
        return None


def judge(label: FoodRecord, text: str, scope: str = EXHAUSTIVE, read: Reader = FoodRecord.parse) -> Columns:
    """Everything the metrics need to know of one answer, so that a metric is a function of these columns' sums.

    `read` decides what the answer says (is it food, which items): the strict parser, or for other people's models the lenient one.
    A text that it cannot read says nothing: not 0, not 1, no items.
    """
    answer = try_read(text, read)
    complete = is_complete(label, scope)
    columns = {
        "images": 1.0,
        "strict": try_read(text) is not None,
        "shaped": try_read(text, FoodRecord.from_json) is not None,
        "truncated": truncated(text),
        "repeats": repeats(text),
        "characters": len(text),
        "right": answer is not None and answer.is_food == label.is_food,
        "not food": not label.is_food,
        "hallucinated": not label.is_food and answer is not None and bool(answer.food_items or answer.drink_items),
        "titled": bool(label.image_title),
        "title": _title_similarity(label, answer),
        "complete": complete,
    }
    for truth in (0, 1):
        for told in (0, 1, None):
            columns[f"{truth} told {told}"] = label.is_food == truth and told == (answer.is_food if answer else None)
    for shelf, fields in SHELVES.items():
        asked = complete or any(getattr(label, field) for field in fields)
        columns[f"{shelf} asked"] = asked
        for name, match in ((shelf, exact), (f"{shelf} soft", soft)):
            counts, readable = count_items(label, answer, fields, match), answer is not None
            columns |= {
                f"{name} found": counts.found,
                f"{name} missed": counts.missed,
                f"{name} found of complete": complete * counts.found,
                f"{name} invented of complete": complete * counts.invented,
                f"{name} missed of complete": complete * counts.missed,
                f"{name} precision": complete * readable * counts.precision,
                f"{name} recall": asked * readable * counts.recall,
                f"{name} f1": complete * readable * counts.f1,
            }
    return columns


def _title_similarity(label: FoodRecord, answer: FoodRecord | None) -> float:
    """0 to 1; titles in another order of words are the same. Images without a title in their label do not count."""
    if not label.image_title or answer is None:
        return 0.0
    return fuzz.token_sort_ratio(label.image_title, answer.image_title, processor=utils.default_process) / 100
