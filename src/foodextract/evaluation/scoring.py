"""Score one answer against one label, as numbers that add up over images.

A label names either everything that is visible or only the main item (`label_scope`). Under a main-item label, finding
that item counts and further items are not errors, so the image contributes to recall but not to precision or F1. A
not-food label is always complete.
"""

import json
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

from pydantic_core import from_json
from rapidfuzz import fuzz, process, utils
from scipy.optimize import linear_sum_assignment

from foodextract.schema import EXHAUSTIVE, FIELDS, AnswerError, FoodRecord, title_parts

ITEM_KINDS = {"item": FIELDS, "food": FIELDS[:1], "drink": FIELDS[1:]}  # metric prefix → fields it covers
THRESHOLD = 80  # token_sort_ratio of a soft match, 0 to 100: egg/eggs 86, burger/hamburger 80, but also ice/rice 86
LOOP = re.compile(r"(.{4,60}?)\1{2,}", re.DOTALL)  # the same 4 to 60 characters three times in a row

# (label, answer) → column. An unreadable answer (None) is a third class that no label has: wrong for both labels.
CONFUSION = {(label, answer): f"is_food {label} as {answer}" for label in (0, 1) for answer in (0, 1, None)}

Reader = Callable[[str], FoodRecord]
Columns = dict[str, float]


@dataclass(frozen=True)
class Counts:
    """Items found, invented and missed. A ratio of 0 by 0 is 0, or 1 if nothing was wanted and nothing given."""

    found: int = 0
    invented: int = 0
    missed: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(self.found + other.found, self.invented + other.invented, self.missed + other.missed)

    @property
    def precision(self) -> float:
        return self._ratio(self.found, self.found + self.invented)

    @property
    def recall(self) -> float:
        return self._ratio(self.found, self.found + self.missed)

    @property
    def f1(self) -> float:
        return self._ratio(2 * self.found, 2 * self.found + self.invented + self.missed)

    def _ratio(self, part: int, whole: int) -> float:
        return part / whole if whole else float(self == Counts())


def match_exact(wanted: Collection[str], given: Collection[str]) -> Counts:
    """Compare two lists of names as sets, letter by letter."""
    found = len(set(wanted) & set(given))
    return Counts(found, len(set(given)) - found, len(set(wanted)) - found)


def match_soft(wanted: Collection[str], given: Collection[str]) -> Counts:
    """Match names of similar spelling (THRESHOLD; case and punctuation ignored) one to one, as many as possible."""
    wanted, given = sorted(set(wanted)), sorted(set(given))
    if not wanted or not given:
        return match_exact(wanted, given)
    alike = process.cdist(wanted, given, scorer=fuzz.token_sort_ratio, processor=utils.default_process) >= THRESHOLD
    found = int(alike[linear_sum_assignment(alike, maximize=True)].sum())
    return Counts(found, len(given) - found, len(wanted) - found)


def count_items(
    label: FoodRecord,
    answer: FoodRecord | None,
    fields: Collection[str] = FIELDS,
    match: Callable[[Collection[str], Collection[str]], Counts] = match_exact,
) -> Counts:
    """Count by field: a drink listed as food is one invented and one missed. An unreadable answer misses everything."""
    return sum((match(getattr(label, field), getattr(answer, field) if answer else ()) for field in fields), Counts())


def is_complete(label: FoodRecord, scope: str) -> bool:
    """Whether the label names everything, so that any further item is an error."""
    return scope == EXHAUSTIVE or not label.is_food


def try_read(text: str, read: Reader = FoodRecord.parse) -> FoodRecord | None:
    """Return the record in `text`, or None where `read` refuses it."""
    try:
        return read(text)
    except AnswerError:
        return None


def truncated(text: str) -> bool:
    """Whether a JSON object begins but does not end, as a token limit leaves it. Malformed JSON does not count."""
    start = text[text.find("{") :] if "{" in text else ""
    try:
        json.JSONDecoder().raw_decode(start)
    except (ValueError, RecursionError):
        return isinstance(_partial_json(text), dict)
    return False


def repeats(text: str) -> bool:
    """Whether an item is named twice, in either list, or the same 4 to 60 characters occur three times in a row."""
    record = _partial_json(text)
    lists = [record.get(field) for field in FIELDS] if isinstance(record, dict) else []
    names = [str(name).casefold().strip() for items in lists if isinstance(items, list) for name in items]
    return len(set(names)) < len(names) or LOOP.search(text) is not None


def _partial_json(text: str) -> object:
    """Parse from the first brace as far as the JSON goes; None where it is not JSON."""
    try:
        return from_json(text[text.index("{") :], allow_partial="trailing-strings")
    except ValueError:
        return None


def score_answer(label: FoodRecord, text: str, scope: str = EXHAUSTIVE, read: Reader = FoodRecord.parse) -> Columns:
    """Return every number the metrics need from one answer; `metrics.METRICS` are functions of these columns' sums.

    `read` extracts the record: the strict parser, or the lenient one for other projects' models. A text that it refuses
    has no `is_food` and no items.
    """
    answer, complete = try_read(text, read), is_complete(label, scope)
    verdict = (label.is_food, answer.is_food if answer else None)
    columns = {
        "images": 1.0,
        "strict": try_read(text) is not None,
        "valid": try_read(text, FoodRecord.from_json) is not None,
        "truncated": truncated(text),
        "repeats": repeats(text),
        "characters": len(text),
        "correct": verdict[0] == verdict[1],
        "not food": not label.is_food,
        "hallucinated": not label.is_food and answer is not None and bool(answer.food_items or answer.drink_items),
        "titled": bool(label.image_title),
        "title": _title_similarity(label, answer),
        "itemized": answer is not None and bool(answer.food_items or answer.drink_items),
        "title fits": answer is not None and title_fits(answer),
        "complete": complete,
    }
    columns |= {name: verdict == cell for cell, name in CONFUSION.items()}
    for kind, fields in ITEM_KINDS.items():
        labeled = complete or any(getattr(label, field) for field in fields)
        columns[f"{kind} labeled"] = labeled
        for name, match in ((kind, match_exact), (f"{kind} soft", match_soft)):
            counts, readable = count_items(label, answer, fields, match), answer is not None
            columns |= {
                f"{name} found": counts.found,
                f"{name} missed": counts.missed,
                f"{name} found, complete": complete * counts.found,
                f"{name} invented, complete": complete * counts.invented,
                f"{name} missed, complete": complete * counts.missed,
                f"{name} precision": complete * readable * counts.precision,
                f"{name} recall": labeled * readable * counts.recall,
                f"{name} f1": complete * readable * counts.f1,
            }
    return columns


def title_fits(record: FoodRecord) -> bool:
    """Whether the record names items, and everything that its title names shares a word with one of them."""
    known = {word for item in record.food_items + record.drink_items for word in _words(item)}
    return bool(known) and all(known & _words(part) for part in title_parts(record.image_title))


def _words(text: str) -> set[str]:
    return {word.removesuffix("s") for word in re.findall(r"\w+", text.casefold())}


def _title_similarity(label: FoodRecord, answer: FoodRecord | None) -> float:
    """From 0 to 1, ignoring word order; 0 for an image without a title in its label, which does not count."""
    if not label.image_title or answer is None:
        return 0.0
    return fuzz.token_sort_ratio(label.image_title, answer.image_title, processor=utils.default_process) / 100
