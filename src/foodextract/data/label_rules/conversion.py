"""Convert the values of a label to the types of a record."""

import ast
import json
import re
from collections.abc import Mapping
from typing import Any

from foodextract.schema import FIELDS, FoodRecord

ABSENT = frozenset({"", "-", "n/a", "na", "nan", "nil", "none", "null", "nothing", "()", "{}", "set()"})
FLAGS = {"1": 1, "true": 1, "yes": 1, "t": 1, "y": 1, "0": 0, "false": 0, "no": 0, "f": 0, "n": 0}


def flag_of(value: object) -> int | None:
    """Return the flag that a value means ("Yes", 1.0, "1,00"), None for any other."""
    return FLAGS.get(re.sub(r"[.,]0+$", "", str(value).strip().lower()))


def convert(raw: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Convert the four values to the types of a record where possible, and say what was converted."""
    values, reasons = {name: raw.get(name) for name in FoodRecord.model_fields}, []

    def absent(name: str) -> str:
        return f"{name} is None" if name in raw else f"it lacks {name}"

    flag = values["is_food"]
    if type(flag) in (bool, float, str) and (number := flag_of(flag)) is not None:
        reasons.append(f"is_food is {flag!r}, read as {number}")
        values["is_food"] = number
    if values["image_title"] is None:
        reasons.append(f"{absent('image_title')}, read as an empty title")
        values["image_title"] = ""
    for name in FIELDS:
        items = values[name]
        if items is None:
            reasons.append(f"{absent(name)}, read as an empty list")
            items = []
        elif isinstance(items, str):
            reasons.append(f"{name} is {items!r}, a text, read as a list")
            items = split_items(items)
        if isinstance(items, list | tuple):
            if None in items:
                reasons.append(f"{name} has an item that is None, left out")
            items = [item for item in items if item is not None]
        values[name] = items
    return values, reasons


def split_items(text: str, marks: str = "") -> Any:
    """Read a list written as a text: JSON, a Python or numpy repr, or items between `marks` (default: `separators`).

    A comma separates no digits, and nothing within brackets. Returns the text itself when its list has no end.
    """
    text = text.strip()
    if text.startswith("array("):
        text = re.sub(r"^array\(|(, dtype=[^)]*)?\)$", "", text)
    if re.match(r"""[({]\s*['"].*['"],?\s*[)}]$""", text, re.DOTALL):  # the repr of a tuple or a set
        text = f"[{text[1:-1]}]"
    if text.startswith("["):
        quoted = re.sub(r"""(?<=['"])\s+(?=['"])""", ", ", text)  # numpy writes no commas
        for read, form in ((json.loads, text), (ast.literal_eval, quoted)):
            try:
                return read(form)
            except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
                continue
        if not text.endswith("]") or "[" in text[1:] or '"' in text:
            return text
        text = text[1:-1]
    marks = re.escape(marks or separators(text))
    items = (item.strip() for item in re.split(rf"(?:[{marks}\n])(?![^()]*\))(?!(?<=\d,)\d)", text))
    return [item for item in items if item.lower().strip(".") not in ABSENT]


def separators(text: str) -> str:
    """Return the marks that separate items: semicolons or bars where there are any, since names may have commas."""
    return next((mark for mark in ";|" if mark in text), ",")


def shape_fault(values: Mapping[str, Any], raw: Mapping[str, Any]) -> str:
    """Return why the values are not those of a record, "" when they are."""
    if "is_food" not in raw:
        return f"it lacks {', '.join(name for name in FoodRecord.model_fields if name not in raw)}"
    if type(values["is_food"]) is not int or values["is_food"] not in (0, 1):
        return f"is_food is {values['is_food']!r}, neither 0 nor 1"
    if not isinstance(values["image_title"], str):
        return f"image_title is {values['image_title']!r}, not a text"
    for name in FIELDS:
        if not isinstance(values[name], list) or not all(isinstance(item, str) for item in values[name]):
            return f"{name} is {raw[name]!r}, not a list of texts"
    return ""
