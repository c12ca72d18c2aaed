"""Label rules, the issues they report, and the statistics that tell what is usual in a data set."""

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Literal

from foodextract.data.label_rules.vocabulary import key
from foodextract.schema import FIELDS, FoodRecord

Severity = Literal["low", "medium", "high"]
Policy = Literal["fix", "flag", "reject"]

# rule: severity for a model that learns from the label, default policy
RULES: dict[str, tuple[Severity, Policy]] = {
    "shape": ("high", "reject"),  # is_food is missing, or a value cannot be converted
    "type": ("medium", "fix"),  # another type that can be converted: "true", "soup, bread", a null
    "contradiction": ("high", "fix"),  # is_food 0 beside a title or items; the items win
    "class_contradiction": ("high", "flag"),  # is_food differs from nearly all other rows of the class
    "empty": ("medium", "flag"),  # is_food 1 without items
    "underscore": ("low", "fix"),
    "casing": ("low", "fix"),
    "punctuation": ("low", "fix"),  # stray marks and spaces, invisible characters, decomposed accents
    "long_name": ("medium", "fix"),  # longer than the schema allows
    "duplicate": ("medium", "fix"),
    "plural_twin": ("medium", "fix"),  # "egg" and "eggs" in one record; the form in the title stays, else the first
    "rare_form": ("low", "fix"),  # "eggs" where the data set says "egg" five times as often
    "wrong_field": ("high", "fix"),  # a drink among the foods, or the reverse
    "pantry": ("high", "fix"),  # an ingredient that no image shows
    "outlier": ("high", "flag"),  # an item that no other row of the class has
    "long_list": ("medium", "flag"),
    "photo_of": ("low", "fix"),
    "sentence_title": ("medium", "fix"),
    "untitled": ("low", "fix"),
    "title_mismatch": ("medium", "flag"),
}
POLICIES: dict[str, Policy] = {rule: policy for rule, (_, policy) in RULES.items()}

LONG_LIST = 8  # items in one record; no drawn scene and none of 1,700 measured photographs has more than 7
MIN_SUPPORT = 8  # rows that a class needs before it can contradict one of them
SIGNATURE = 0.5  # a class whose commonest item has a smaller share of its rows is a mixture, without outliers
REGULAR = 0.2  # share of a class's rows from which an item is regular
NEWCOMERS = 0.05  # below this share of rows with an item of their own, each such item is an outlier
PRIOR_ROWS = 30  # weight of the whole data set in that share, in rows


@dataclass(frozen=True)
class Issue:
    """A fault of a label. `item` is the name or title concerned ("" for the record), `policy` what was done."""

    rule: str
    severity: Severity
    item: str
    reason: str
    policy: Policy


class Statistics:
    """Counts over a data set by class and item. Memory grows with the vocabulary, not with the rows."""

    def __init__(self) -> None:
        self.rows: Counter[str] = Counter()  # class → rows
        self.foods: Counter[str] = Counter()  # class → rows with is_food 1
        self.items: dict[str, Counter[str]] = defaultdict(Counter)  # class → key of an item → rows
        self.classes: dict[str, set[str]] = defaultdict(set)  # key → classes that have it
        self.forms: dict[str, Counter[str]] = defaultdict(Counter)  # key → names written for it → rows
        self.fields: dict[str, Counter[str]] = defaultdict(Counter)  # key → field → rows
        self._newcomers: float | None = None

    def add(self, record: FoodRecord, category: str = "") -> None:
        """Count one record of a class ("" for none). The items of an overlong list are not counted."""
        self.rows[category] += 1
        self.foods[category] += record.is_food
        self._newcomers = None
        for field in FIELDS if len(record.food_items + record.drink_items) <= LONG_LIST else ():
            for name in getattr(record, field):
                item = key(name)
                self.items[category][item] += 1
                self.classes[item].add(category)
                self.forms[item][name] += 1
                self.fields[item][field] += 1

    def is_outlier(self, item: str, category: str, alone: bool) -> bool:
        """Tell whether an item (a `key`) does not belong to a class that is frequent and uniform.

        Any of three conditions suffices, provided that no other row of the class has the item: the row shares no item
        with the class (`alone`); new items are rare in the class (Good-Turing estimate, smoothed with the whole data
        set); or the item occurs repeatedly in other classes, and those share no regular item with this one.
        """
        rows, items = self.rows[category], self.items.get(category, Counter())
        if items[item] > 1 or not self._is_uniform(category):
            return False
        if self._newcomers is None:
            uniform = [other for other in self.items if self._is_uniform(other)]
            total = sum(self.rows[other] for other in uniform)
            self._newcomers = sum(_singles(self.items[other]) for other in uniform) / max(total, 1)
        if alone or _singles(items) - items[item] + PRIOR_ROWS * self._newcomers <= NEWCOMERS * (rows + PRIOR_ROWS):
            return True
        others = [self.items[other] for other in self.classes.get(item, ()) if other != category]
        homes = [counts for counts in others if counts[item] > 1]
        regulars = [other for other, count in items.items() if count >= REGULAR * rows]
        return bool(homes) and not any(home[regular] > 1 for home in homes for regular in regulars)

    def _is_uniform(self, category: str) -> bool:
        rows, items = self.rows[category], self.items.get(category)
        if not category or not items or rows < MIN_SUPPORT:
            return False
        return items.most_common(1)[0][1] >= SIGNATURE * rows


def _singles(items: Counter[str]) -> int:
    return sum(count == 1 for count in items.values())
