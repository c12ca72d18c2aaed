"""The rules that a label can break, what is said about a breach, and what is usual in a data set."""

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Literal

from foodextract.data.label_rules.vocabulary import Shelf, key
from foodextract.schema import FoodRecord

Severity = Literal["low", "medium", "high"]
Policy = Literal["fix", "flag", "reject"]
SHELVES: tuple[Shelf, Shelf] = ("food_items", "drink_items")

# rule: how bad it is for a model that learns from the label, and what is done about it unless the caller says otherwise
RULES: dict[str, tuple[Severity, Policy]] = {
    "shape": ("high", "reject"),  # no is_food, or a value that cannot be read as what it should be
    "type": (
        "medium",
        "fix",
    ),  # another type that can be read: "true" for 1, "soup, bread" for a list, null for a title, a list or an item
    "contradiction": (
        "high",
        "fix",
    ),  # is_food 0 beside a title or items; the items win, as in `FoodRecord.parse_lenient`
    "class_contradiction": ("high", "flag"),  # is_food differs from (nearly) all other rows of the class
    "empty": ("medium", "flag"),  # is_food 1 and nothing listed
    "underscore": ("low", "fix"),
    "casing": ("low", "fix"),
    "punctuation": (
        "low",
        "fix",
    ),  # stray marks and spaces at the ends or doubled, invisible characters, decomposed accents
    "long_name": ("medium", "fix"),  # longer than the schema allows
    "duplicate": ("medium", "fix"),
    "plural_twin": (
        "medium",
        "fix",
    ),  # "egg" and "eggs" in one record: the form that the title uses stays, else the first
    "rare_form": ("low", "fix"),  # "eggs" where the data set says "egg" five times as often
    "wrong_shelf": ("high", "fix"),
    "pantry": ("high", "fix"),
    "stranger": ("high", "flag"),  # an item that its class has nowhere else
    "long_list": ("medium", "flag"),
    "photo_of": ("low", "fix"),
    "sentence_title": ("medium", "fix"),
    "untitled": ("low", "fix"),
    "title_mismatch": ("medium", "flag"),
}
POLICIES: dict[str, Policy] = {rule: policy for rule, (_, policy) in RULES.items()}

LONG_LIST = 8  # items in one record; of 1,700 measured photographs and all drawn scenes none has more than 7
MIN_SUPPORT = 8  # rows of a class before its other rows may speak against one of them
SIGNATURE = 0.5  # share of a class's rows that its commonest item must reach: else the class is a mixture and nothing is strange in it
REGULAR = 0.2  # share of a class's rows that makes an item one of its regulars
NEWCOMERS = 0.05  # where a smaller share of rows than this brings an item that its class has nowhere else, each such item is strange
PRIOR_ROWS = 30  # rows' worth of the whole data set that are counted with those of a class when judging that share
RARE = 5  # the other form, or the other shelf, must be this many times as common before the data set overrules one row
AGREED = 0.95  # share of the other rows of a class that must agree on is_food to contradict one row


@dataclass(frozen=True)
class Finding:
    """One fault of one label. `item` is the name (or the title) it is about, "" for the record; `policy` is what was done about it."""

    rule: str
    severity: Severity
    item: str
    reason: str
    policy: Policy


class Statistics:
    """Counts over a data set, by class and item: what is usual in it. Grows with the vocabulary, not with the rows."""

    def __init__(self) -> None:
        self.rows: Counter[str] = Counter()  # class → rows
        self.foods: Counter[str] = Counter()  # class → rows with is_food 1
        self.items: dict[str, Counter[str]] = defaultdict(Counter)  # class → key of an item → rows
        self.classes: dict[str, set[str]] = defaultdict(set)  # key → classes that have it
        self.forms: dict[str, Counter[str]] = defaultdict(Counter)  # key → the names that were written for it → rows
        self.shelves: dict[str, Counter[str]] = defaultdict(Counter)  # key → shelf → rows
        self._newcomers: float | None = None

    def add(self, record: FoodRecord, category: str = "") -> None:
        """Count one kept record of a class ("" for none). The items of a list that is itself in doubt for its length are left out."""
        self.rows[category] += 1
        self.foods[category] += record.is_food
        self._newcomers = None
        for shelf in SHELVES if len(record.food_items + record.drink_items) <= LONG_LIST else ():
            for name in getattr(record, shelf):
                item = key(name)
                self.items[category][item] += 1
                self.classes[item].add(category)
                self.forms[item][name] += 1
                self.shelves[item][shelf] += 1

    def is_strange(self, item: str, category: str, alone: bool) -> bool:
        """Whether a class that is seen often, and much the same every time, has this item (a `key`) nowhere else, and rightly so.

        Three kinds of evidence. The row is `alone`: it shares no item at all with the others. Or so few rows bring an item that the others
        of their class lack that any newcomer is a surprise (Good and Turing's estimate; a class of few rows is judged together with the
        whole data set). Or the item is at home in other classes, and those share no regular item with this one.
        """
        rows, items = self.rows[category], self.items.get(category, Counter())
        if items[item] > 1 or not self._is_regular(category):
            return False
        if self._newcomers is None:
            judged = [other for other in self.items if self._is_regular(other)]
            self._newcomers = sum(_singles(self.items[other]) for other in judged) / max(
                sum(self.rows[other] for other in judged), 1
            )
        if alone or _singles(items) - items[item] + PRIOR_ROWS * self._newcomers <= NEWCOMERS * (rows + PRIOR_ROWS):
            return True
        homes = [
            self.items[other]
            for other in self.classes.get(item, ())
            if other != category and self.items[other][item] > 1
        ]
        regulars = [other for other, count in items.items() if count >= REGULAR * rows]
        return bool(homes) and not any(home[regular] > 1 for home in homes for regular in regulars)

    def _is_regular(self, category: str) -> bool:
        rows, items = self.rows[category], self.items.get(category)
        return bool(category and items) and rows >= MIN_SUPPORT and items.most_common(1)[0][1] >= SIGNATURE * rows


def _singles(items: Counter[str]) -> int:
    return sum(count == 1 for count in items.values())
