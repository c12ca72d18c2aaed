"""Clean labels and report every fault as an `Issue`.

`clean` fixes one label. With the `Statistics` of the data set it also finds faults that one row alone does not show:

    1. statistics.add(record, category)  # for the record of clean(label, category) of every row
    2. record, issues = clean(label, category, statistics)  # for every row again

A policy maps a rule to `fix`, `flag` or `reject`, for example `POLICIES | {"pantry": "flag"}`. A rejected row gives
None and all its issues; `flag` keeps the label. Faults that break the schema are fixed even where the policy says
`flag`, and faults without a known fix are flagged where it says `fix`. The issue states what was done.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from foodextract.data.label_rules import vocabulary
from foodextract.data.label_rules.conversion import convert, shape_fault
from foodextract.data.label_rules.issues import LONG_LIST, MIN_SUPPORT, POLICIES, RULES, Issue, Policy, Statistics
from foodextract.data.label_rules.vocabulary import key
from foodextract.schema import FIELDS, MAX_ITEM, MAX_ITEMS, MAX_TITLE, FoodRecord, listing

RARE = 5  # how many times as common the other form or field must be to overrule one row
AGREED = 0.95  # share of a class's other rows that must agree on is_food to contradict one row
Fix = Literal["can", "must", "cannot"]  # whether a rule has a fix: for any policy but `reject`, it must or cannot apply
HALF = re.compile("[\ud800-\udfff]")  # half a character, which UTF-8 cannot write
NO_STATISTICS = Statistics()


def clean(
    label: Mapping[str, Any] | FoodRecord,
    category: str = "",
    statistics: Statistics = NO_STATISTICS,
    policies: Mapping[str, Policy] = POLICIES,
) -> tuple[FoodRecord | None, list[Issue]]:
    """Fix one label. Return the record, or None where a rule rejects it, and all issues in the order of the rules.

    `label` may lack keys, hold values of other types and break the schema in any way; other keys are ignored. Cleaning
    a cleaned record again changes nothing. Raises KeyError when `policies` lacks a rule.
    """
    raw = label.model_dump() if isinstance(label, FoodRecord) else label
    values, conversions = convert(raw)
    lists = {name: values[name] for name in FIELDS}
    draft = _Draft(category, statistics, policies, values["is_food"], values["image_title"], lists)
    for reason in conversions if "is_food" in raw else ():
        draft.report("type", "", reason, "must")
    if reason := shape_fault(values, raw):
        return None, [*draft.issues, Issue("shape", RULES["shape"][0], "", reason, "reject")]
    for rule in (_spelling, _fields, _duplicates, _rare_forms, _long_list, _pantry, _outliers, _is_food, _title):
        rule(draft)
    if draft.rejected:
        return None, draft.issues
    record = FoodRecord(is_food=draft.is_food, image_title=draft.title, **draft.lists)
    if record.model_dump() == values:
        return record, draft.issues
    again, more = clean(record, category, statistics, policies)  # a fix may expose another fault
    known = {(issue.rule, issue.item) for issue in draft.issues}
    return again, draft.issues + [issue for issue in more if (issue.rule, issue.item) not in known]


@dataclass
class _Draft:
    """A label while the rules change it, and the issues so far."""

    category: str
    statistics: Statistics
    policies: Mapping[str, Policy]
    is_food: int
    title: str
    lists: dict[str, list[str]]
    issues: list[Issue] = field(default_factory=list)
    rejected: bool = False

    def report(self, rule: str, item: str, reason: str, fix: Fix = "can") -> bool:
        """Record an issue. Return True when the rule is to fix it."""
        policy = self.policies[rule]
        if policy != "reject" and fix != "can":
            policy = "fix" if fix == "must" else "flag"
        self.issues.append(Issue(rule, RULES[rule][0], item, reason, policy))
        self.rejected |= policy == "reject"
        return policy == "fix"

    @property
    def items(self) -> list[str]:
        return [item for names in self.lists.values() for item in names]

    def mentions(self, item: str) -> bool:
        """Tell whether title or class contain every word of the item."""
        return set(vocabulary.stems(item)) <= {*vocabulary.stems(self.title), *vocabulary.stems(self.category)}

    def drop(self, item: str) -> None:
        for names in self.lists.values():
            names[:] = [name for name in names if name != item]


def _spelling(draft: _Draft) -> None:
    draft.title = _spelled(draft, draft.title)
    for name, items in draft.lists.items():
        spelled = [_spelled(draft, item) for item in items]
        if "" in spelled:
            draft.report("punctuation", "", f"{name} has an item without a name", "must")
        draft.lists[name] = [_shortened(draft, item) for item in spelled if item]


def _spelled(draft: _Draft, name: str) -> str:
    for rule, step, reason in (
        ("underscore", lambda text: re.sub(r"[_\s]*_[_\s]*", " ", text).strip(), "has underscores for spaces"),
        ("casing", str.lower, "has capital letters"),
        ("punctuation", vocabulary.trimmed, "has stray marks or spaces, or accents written as separate characters"),
    ):
        fix: Fix = "must" if rule == "punctuation" and HALF.search(name) else "can"
        if (better := step(name)) != name and draft.report(rule, name, f"{name!r} {reason}", fix):
            name = better
    return name


def _shortened(draft: _Draft, name: str) -> str:
    too_long = f"{name!r} is longer than {MAX_ITEM} characters"
    if len(name) <= MAX_ITEM or not draft.report("long_name", name, too_long, "must"):
        return name
    head = re.split(r"[,;:(]| (?:with|in|on|and|topped|served) ", name)[0]
    return vocabulary.trimmed((head if len(head) <= MAX_ITEM else name)[:MAX_ITEM]) or name[:MAX_ITEM]


def _fields(draft: _Draft) -> None:
    """Move items to the field where they belong, by the word lists or else by the other rows."""
    hidden = _hidden(draft)
    for name, other in (FIELDS, FIELDS[::-1]):
        for item in [item for item in dict.fromkeys(draft.lists[name]) if name == "drink_items" or item not in hidden]:
            counts = draft.statistics.fields.get(key(item), Counter())
            if known := vocabulary.field_of(item):
                reason = f"{item!r} is a {'drink' if known == 'drink_items' else 'food'}, listed in {name}"
            elif counts[other] >= RARE * max(counts[name], 1):
                known, reason = other, f"{item!r} is in {other} in {counts[other]} other rows, and in {name} here"
            if known != other:
                continue
            dishes = [food for food in draft.lists["food_items"] if not vocabulary.is_cooking_liquid(food)]
            liquid = name == "food_items" and vocabulary.is_cooking_liquid(item) and item not in draft.lists[other]
            if draft.report("wrong_field", item, reason):
                draft.lists[other] += [found for found in draft.lists[name] if found == item]
                draft.lists[name] = [found for found in draft.lists[name] if found != item]
            if liquid and dishes and not draft.mentions(item):
                reason = f"{item!r} is listed as a food beside {dishes[0]!r}: it is in the dish, not in a glass"
                if draft.report("pantry", item, reason):
                    draft.drop(item)


def _duplicates(draft: _Draft) -> None:
    kept: dict[str, tuple[str, str]] = {}  # key → field and form of the item that stays
    for field_name, items in draft.lists.items():
        left: list[str] = []
        for item in items:
            home, twin = kept.setdefault(key(item), (field_name, item))
            in_both = home != field_name and item == twin
            if item in left:
                draft.report("duplicate", item, f"{item!r} is listed twice", "must")
            elif in_both and draft.report("duplicate", item, f"{item!r} is listed as a food and as a drink"):
                continue
            elif item == twin:
                left.append(item)
            else:
                titled, twin_titled = vocabulary.contains(draft.title, item), vocabulary.contains(draft.title, twin)
                better = home == field_name and titled and not twin_titled
                worse, stays = (twin, item) if better else (item, twin)
                if not draft.report("plural_twin", worse, f"{worse!r} is listed beside {stays!r}"):
                    left.append(item)
                elif better:
                    left[left.index(twin)], kept[key(item)] = item, (field_name, item)
        draft.lists[field_name] = left


def _rare_forms(draft: _Draft) -> None:
    for items in draft.lists.values():
        for position, item in enumerate(items):
            forms = draft.statistics.forms.get(key(item), Counter())
            common, count = forms.most_common(1)[0] if forms else (item, 0)
            rare = common != item and common not in items and count >= RARE * max(forms[item], 1)
            if rare and draft.report("rare_form", item, f"{item!r} is {common!r} in {count} other rows"):
                items[position] = common


def _long_list(draft: _Draft) -> None:
    if len(draft.items) <= LONG_LIST:
        return
    dropped = [item for items in draft.lists.values() for item in items[MAX_ITEMS:]]
    reason = f"{len(draft.items)} items are too many to check" + (f"; dropped: {', '.join(dropped)}" if dropped else "")
    draft.report("long_list", "", reason, "must" if dropped else "cannot")
    draft.lists = {name: items[:MAX_ITEMS] for name, items in draft.lists.items()}


def _hidden(draft: _Draft) -> list[str]:
    """Return the foods that cannot be seen, unless title or class mention them or nothing else is listed."""
    items, about = draft.items, [draft.title, draft.category]
    hidden = [
        food
        for food in draft.lists["food_items"]
        if not draft.mentions(food) and vocabulary.is_hidden(food, [*about, *(item for item in items if item != food)])
    ]
    return hidden if len(hidden) < len(items) else []


def _pantry(draft: _Draft) -> None:
    for item in _hidden(draft):
        reason = f"{item!r} is an ingredient that cannot be seen, and neither title nor class mention it"
        if draft.report("pantry", item, reason):
            draft.drop(item)


def _outliers(draft: _Draft) -> None:
    category, statistics = draft.category, draft.statistics
    counts = statistics.items.get(category, Counter())
    alone = not any(counts[key(item)] > 1 for item in draft.items)
    for item in draft.items:
        if vocabulary.content(item) & vocabulary.content(category):
            continue
        reason = f"no other of the {statistics.rows[category]} rows of {category!r} has {item!r}"
        if statistics.is_outlier(key(item), category, alone) and draft.report("outlier", item, reason):
            draft.drop(item)


def _is_food(draft: _Draft) -> None:
    beside = repr(draft.items[0]) if draft.items else f"the title {draft.title!r}" if draft.title else ""
    if draft.is_food and not draft.items:
        draft.report("empty", "", "is_food is 1 and nothing is listed", "cannot")
    elif not draft.is_food and beside and draft.report("contradiction", "", f"is_food is 0 beside {beside}", "must"):
        draft.is_food, draft.title = int(bool(draft.items)), draft.title if draft.items else ""
    others = draft.statistics.rows[draft.category] - 1
    share = (draft.statistics.foods[draft.category] - draft.is_food) / max(others, 1)
    if draft.category and others + 1 >= MIN_SUPPORT and abs(share - draft.is_food) >= AGREED:
        reason = f"is_food is {draft.is_food}, unlike other rows of {draft.category!r}"
        draft.report("class_contradiction", "", reason, "cannot")


def _title(draft: _Draft) -> None:
    from_items = listing(draft.items)
    if not draft.is_food or draft.title == from_items:
        return
    if not draft.title:
        if draft.report("untitled", "", "the title is empty", "can" if from_items else "cannot"):
            draft.title = from_items
        return
    subject = vocabulary.without_photo_of(draft.title)
    if subject != draft.title and draft.report("photo_of", draft.title, f"{draft.title!r} describes the image"):
        draft.title = subject
    title, names = draft.title, [*draft.items, draft.category]
    too_long = len(title) > MAX_TITLE
    reason = f"the title {title!r} shares no word with {from_items!r}, nor with the class"
    if from_items and not vocabulary.share_a_word(title, names) and draft.report("title_mismatch", title, reason):
        draft.title = from_items
    fix: Fix = "must" if too_long else "can" if from_items else "cannot"
    reason = f"{title!r} is a sentence, or too long for a title"
    if (too_long or vocabulary.is_sentence(title, names)) and draft.report("sentence_title", title, reason, fix):
        draft.title = from_items or vocabulary.trimmed(title[:MAX_TITLE].rpartition(" ")[0])
