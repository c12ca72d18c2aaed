"""Cleaning labels and looking for faults in them: every fault becomes a `Finding` that says which item, why, and what was done about it.

`clean` mends one label and says what it found; given the `Statistics` of the whole data set it also judges what one row alone cannot show.
`lint` returns the findings alone. Two passes over a data set need memory for its vocabulary only, never for its rows:

    statistics = Statistics()
    for raw, category in rows: ...          # first pass:  statistics.add(record, category) for every record that clean(raw, category) gives
    for raw, category in rows: ...          # second pass: record, findings = clean(raw, category, statistics)

What to do about a fault is a dict, rule → `fix`, `flag` or `reject`: pass `POLICIES | {"pantry": "flag"}`. A row is rejected as a whole
(None comes back, with all its findings), `flag` leaves the label as it is. Two limits: what the schema does not allow is mended even where
the policy says `flag`, and what nobody can mend is flagged where it says `fix`; the finding names what really happened.

The word lists in `words/` are meant to be edited: which names are drinks, which are foods, and which ingredients no image shows.
"""

import ast
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from foodextract.data.label_rules import vocabulary
from foodextract.data.label_rules.issues import (
    AGREED,
    LONG_LIST,
    MIN_SUPPORT,
    POLICIES,
    RARE,
    RULES,
    SHELVES,
    Finding,
    Policy,
    Statistics,
)
from foodextract.data.label_rules.vocabulary import Shelf, key
from foodextract.schema import MAX_ITEM, MAX_ITEMS, MAX_TITLE, FoodRecord

NOTHING_KNOWN = Statistics()
ABSENT = frozenset({"", "-", "n/a", "na", "nan", "nil", "none", "null", "nothing"})  # words for an empty list


def clean(
    raw: Mapping[str, Any] | FoodRecord,
    category: str = "",
    statistics: Statistics | None = None,
    policies: Mapping[str, Policy] = POLICIES,
) -> tuple[FoodRecord | None, list[Finding]]:
    """Mend one label: the record (None where a rule rejects it) and everything that was found, in the order of the rules.

    `raw` is a label as it was found: it may lack keys, have values of other types and break the schema in any way; further keys are
    ignored. Cleaning a cleaned record again changes nothing. Raises KeyError when `policies` lacks a rule.
    """
    raw = raw.model_dump() if isinstance(raw, FoodRecord) else raw
    typed, reasons = _typed(raw)
    draft = _Draft(
        category,
        statistics or NOTHING_KNOWN,
        policies,
        typed["is_food"],
        typed["image_title"],
        {s: typed[s] for s in SHELVES},
    )
    for reason in reasons if "is_food" in raw else ():
        draft.found("type", "", reason, "must")
    if reason := _misshapen(typed, raw):
        return None, [*draft.findings, Finding("shape", RULES["shape"][0], "", reason, "reject")]
    for rule in (_spelling, _shelves, _twins, _forms, _long_list, _pantry, _strangers, _is_food, _title):
        rule(draft)
    if draft.rejected:
        return None, draft.findings
    record = FoodRecord(is_food=draft.is_food, image_title=draft.title, **draft.shelves)
    if any(
        value != typed[name] for name, value in record.model_dump().items()
    ):  # what one rule mended may be news to another
        record, more = clean(record, category, statistics, policies)
        known = {(finding.rule, finding.item) for finding in draft.findings}
        draft.findings += [finding for finding in more if (finding.rule, finding.item) not in known]
    return record, draft.findings


def lint(
    raw: Mapping[str, Any] | FoodRecord,
    category: str,
    statistics: Statistics,
    policies: Mapping[str, Policy] = POLICIES,
) -> list[Finding]:
    """All faults of one label, those of `clean` and those that only the rest of the data set shows."""
    return clean(raw, category, statistics, policies)[1]


# ----------------------------------------------------------------------------------------------------------------------------------- rules


@dataclass
class _Draft:
    """A label while the rules work on it, and what they found."""

    category: str
    statistics: Statistics
    policies: Mapping[str, Policy]
    is_food: int
    title: str
    shelves: dict[Shelf, list[str]]
    findings: list[Finding] = field(default_factory=list)
    rejected: bool = False

    def found(self, rule: str, item: str, reason: str, mend: Literal["can", "must", "cannot"] = "can") -> bool:
        """Note a fault; True where the rule is to mend it."""
        policy = self.policies[rule]
        if policy != "reject" and mend != "can":
            policy = "fix" if mend == "must" else "flag"
        self.findings.append(Finding(rule, RULES[rule][0], item, reason, policy))
        self.rejected |= policy == "reject"
        return policy == "fix"

    @property
    def items(self) -> list[str]:
        return self.shelves["food_items"] + self.shelves["drink_items"]

    def speaks_of(self, item: str) -> bool:
        """Whether title or class name the item, word for word."""
        return set(vocabulary.stems(item)) <= {*vocabulary.stems(self.title), *vocabulary.stems(self.category)}

    def drop(self, item: str) -> None:
        for names in self.shelves.values():
            names[:] = [name for name in names if name != item]


FLAGS = {"1": 1, "1.0": 1, "true": 1, "yes": 1, "0": 0, "0.0": 0, "false": 0, "no": 0}


def _typed(raw: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The four values in the types of a record, where they can be read so, and what was changed. Anything else stays as it is."""
    typed, reasons = {"is_food": raw.get("is_food"), "image_title": raw.get("image_title")}, []
    if (
        type(typed["is_food"]) in (bool, float, str)
        and (flag := FLAGS.get(str(typed["is_food"]).strip().lower())) is not None
    ):
        reasons.append(f"is_food is {typed['is_food']!r}, read as {flag}")
        typed["is_food"] = flag
    if typed["image_title"] is None:
        reasons.append(
            f"{'image_title is None' if 'image_title' in raw else 'it lacks image_title'}, read as an empty title"
        )
        typed["image_title"] = ""
    for shelf in SHELVES:
        items = raw.get(shelf)
        if items is None:
            reasons.append(f"{f'{shelf} is None' if shelf in raw else f'it lacks {shelf}'}, read as an empty list")
            items = []
        elif isinstance(items, str):
            reasons.append(f"{shelf} is {items!r}, a text, read as a list")
            items = _split(items)
        if isinstance(items, list | tuple):
            if None in items:
                reasons.append(f"{shelf} has an item that is None, left out")
            items = [item for item in items if item is not None]
        typed[shelf] = items
    return typed, reasons


def _split(text: str) -> Any:
    """The items of a list that was written as a text: as JSON or a Python repr, else between commas, semicolons or lines."""
    for read in (json.loads, ast.literal_eval) if text.lstrip().startswith("[") else ():
        try:
            return read(text.strip())
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
    items = (item.strip() for item in re.split(r"[,;\n]", text))
    return [item for item in items if item.lower().strip(".") not in ABSENT]


def _misshapen(typed: Mapping[str, Any], raw: Mapping[str, Any]) -> str:
    if "is_food" not in raw:
        return f"it lacks {', '.join(key for key in FoodRecord.model_fields if key not in raw)}"
    if type(typed["is_food"]) is not int or typed["is_food"] not in (0, 1):
        return f"is_food is {typed['is_food']!r}, neither 0 nor 1"
    if not isinstance(typed["image_title"], str):
        return f"image_title is {typed['image_title']!r}, not a text"
    for shelf in SHELVES:
        if not isinstance(typed[shelf], list) or not all(isinstance(item, str) for item in typed[shelf]):
            return f"{shelf} is {raw[shelf]!r}, not a list of texts"
    return ""


def _spelling(draft: _Draft) -> None:
    draft.title = _spelled(draft, draft.title)
    for shelf, names in draft.shelves.items():
        spelled = [_spelled(draft, name) for name in names]
        if "" in spelled:
            draft.found("punctuation", "", f"{shelf} has an item without a name", "must")
        draft.shelves[shelf] = [_shortened(draft, name) for name in spelled if name]


def _spelled(draft: _Draft, name: str) -> str:
    for rule, step, reason in (
        ("underscore", lambda text: re.sub(r"[_\s]*_[_\s]*", " ", text).strip(), "has underscores for spaces"),
        ("casing", str.lower, "has capital letters"),
        (
            "punctuation",
            vocabulary.trimmed,
            "has marks or spaces that do not belong to it, or accents written as separate characters",
        ),
    ):
        if (better := step(name)) != name and draft.found(rule, name, f"{name!r} {reason}"):
            name = better
    return name


def _shortened(draft: _Draft, name: str) -> str:
    if len(name) > MAX_ITEM and draft.found(
        "long_name", name, f"{name!r} is longer than {MAX_ITEM} characters", "must"
    ):
        head = re.split(r"[,;:(]| (?:with|in|on|and|topped|served) ", name)[0]
        return vocabulary.trimmed((head if len(head) <= MAX_ITEM else name)[:MAX_ITEM]) or name[:MAX_ITEM]
    return name


def _shelves(draft: _Draft) -> None:
    hidden = _hidden(draft)
    for shelf, other in (SHELVES, SHELVES[::-1]):
        for item in [
            name for name in dict.fromkeys(draft.shelves[shelf]) if shelf == "drink_items" or name not in hidden
        ]:
            counts = draft.statistics.shelves.get(key(item), Counter())
            if known := vocabulary.shelf_of(item):
                reason = f"{item!r} is a {'drink' if known == 'drink_items' else 'food'}, and stands in {shelf}"
            elif counts[other] >= RARE * max(counts[shelf], 1):
                known, reason = other, f"{item!r} stands in {other} in {counts[other]} other rows, and in {shelf} here"
            if known != other:
                continue
            dishes = [name for name in draft.shelves["food_items"] if not vocabulary.is_cooking_liquid(name)]
            liquid = shelf == "food_items" and vocabulary.is_cooking_liquid(item) and item not in draft.shelves[other]
            if draft.found("wrong_shelf", item, reason):
                draft.shelves[other] += [name for name in draft.shelves[shelf] if name == item]
                draft.shelves[shelf] = [name for name in draft.shelves[shelf] if name != item]
            cooked = liquid and dishes and not draft.speaks_of(item)
            if cooked and draft.found(
                "pantry", item, f"{item!r} is listed as a food beside {dishes[0]!r}: it is in it, not in a glass"
            ):
                draft.drop(item)


def _twins(draft: _Draft) -> None:
    kept: dict[str, tuple[Shelf, str]] = {}
    for shelf, names in draft.shelves.items():
        left: list[str] = []
        for name in names:
            home, twin = kept.setdefault(key(name), (shelf, name))
            if name in left:
                draft.found("duplicate", name, f"{name!r} is listed twice", "must")
            elif (
                home != shelf
                and name == twin
                and draft.found("duplicate", name, f"{name!r} is listed as a food and as a drink")
            ):
                continue
            elif name == twin:
                left.append(name)
            else:
                better = (
                    home == shelf and vocabulary.holds(draft.title, name) and not vocabulary.holds(draft.title, twin)
                )
                worse, stays = (twin, name) if better else (name, twin)
                if not draft.found("plural_twin", worse, f"{worse!r} is listed beside {stays!r}"):
                    left.append(name)
                elif better:
                    left[left.index(twin)], kept[key(name)] = name, (shelf, name)
        draft.shelves[shelf] = left


def _forms(draft: _Draft) -> None:
    for names in draft.shelves.values():
        for position, name in enumerate(names):
            forms = draft.statistics.forms.get(key(name), Counter())
            common, count = forms.most_common(1)[0] if forms else (name, 0)
            rare = common != name and common not in names and count >= RARE * max(forms[name], 1)
            if rare and draft.found("rare_form", name, f"{name!r} is {common!r} in {count} other rows"):
                names[position] = common


def _long_list(draft: _Draft) -> None:
    if len(draft.items) > LONG_LIST:
        too_long = any(len(names) > MAX_ITEMS for names in draft.shelves.values())
        dropped = [name for names in draft.shelves.values() for name in names[MAX_ITEMS:]]
        reason = f"{len(draft.items)} items are more than anybody checks" + (
            f"; dropped: {', '.join(dropped)}" if too_long else ""
        )
        draft.found("long_list", "", reason, "must" if too_long else "cannot")
        draft.shelves = {shelf: names[:MAX_ITEMS] for shelf, names in draft.shelves.items()}


def _hidden(draft: _Draft) -> list[str]:
    """Foods that cannot be seen, unless title or class name them or there is nothing else."""
    foods, items = draft.shelves["food_items"], draft.items
    about = [draft.title, draft.category]
    hidden = [
        food
        for food in foods
        if not draft.speaks_of(food) and vocabulary.is_hidden(food, [*about, *(i for i in items if i != food)])
    ]
    return hidden if len(hidden) < len(items) else []


def _pantry(draft: _Draft) -> None:
    for item in _hidden(draft):
        if draft.found(
            "pantry", item, f"{item!r} is an ingredient that cannot be seen, and no title or class is about it"
        ):
            draft.drop(item)


def _strangers(draft: _Draft) -> None:
    category, statistics = draft.category, draft.statistics
    alone = not any(statistics.items.get(category, Counter())[key(item)] > 1 for item in draft.items)
    for item in draft.items:
        strange = not vocabulary.content(item) & vocabulary.content(category) and statistics.is_strange(
            key(item), category, alone
        )
        if strange and draft.found(
            "stranger", item, f"no other of the {statistics.rows[category]} rows of {category!r} has {item!r}"
        ):
            draft.drop(item)


def _is_food(draft: _Draft) -> None:
    beside = repr(draft.items[0]) if draft.items else f"the title {draft.title!r}" if draft.title else ""
    if draft.is_food and not draft.items:
        draft.found("empty", "", "is_food is 1 and nothing is listed", "cannot")
    elif not draft.is_food and beside and draft.found("contradiction", "", f"is_food is 0 beside {beside}", "must"):
        draft.is_food, draft.title = int(bool(draft.items)), draft.title if draft.items else ""
    others = draft.statistics.rows[draft.category] - 1
    share = (draft.statistics.foods[draft.category] - draft.is_food) / max(others, 1)
    if draft.category and others + 1 >= MIN_SUPPORT and abs(share - draft.is_food) >= AGREED:
        draft.found(
            "class_contradiction", "", f"is_food is {draft.is_food}, unlike other rows of {draft.category!r}", "cannot"
        )


def _title(draft: _Draft) -> None:
    listing = _listing(draft.items)
    if not draft.is_food or draft.title == listing:
        return
    if not draft.title:
        if draft.found("untitled", "", "the title is empty", "can" if listing else "cannot"):
            draft.title = listing
        return
    subject = vocabulary.without_photo_of(draft.title)
    if subject != draft.title and draft.found("photo_of", draft.title, f"{draft.title!r} speaks of the image"):
        draft.title = subject
    title, names = draft.title, [*draft.items, draft.category]
    too_long = len(title) > MAX_TITLE
    reason = f"the title {title!r} shares no word with {listing!r}, nor with the class"
    if listing and not vocabulary.share_a_word(title, names) and draft.found("title_mismatch", title, reason):
        draft.title = listing
    mend = "must" if too_long else "can" if listing else "cannot"
    reason = f"{title!r} is a sentence, or too long for a title"
    if (too_long or vocabulary.is_sentence(title, names)) and draft.found("sentence_title", title, reason, mend):
        draft.title = listing or vocabulary.trimmed(title[:MAX_TITLE].rpartition(" ")[0])


def _listing(items: list[str]) -> str:
    """A title made of the items, as many as the schema has room for: "egg, pie and tea"."""
    while True:
        *start, last = items or [""]
        title = f"{', '.join(start)} and {last}" if start else last
        if len(title) <= MAX_TITLE:
            return title
        items = items[:-1]
