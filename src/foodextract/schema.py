"""The answer format: one record, its canonical text, and a strict parser.

`FoodRecord.to_json` writes every answer, and `FoodRecord.parse` accepts nothing else. The lenient parser exists to
score other models.
"""

import ast
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import chain
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

# Bounds stop small models from looping. All Hub rows and all photographs measured so far fit.
MAX_TITLE, MAX_ITEM, MAX_ITEMS = 100, 50, 20
FIELDS = ("food_items", "drink_items")  # the lists of a record
# A character class: what titles and items of a constrained answer do not hold. A confused model may write keys there.
UNSPOKEN = r'"\\\[\]{}:_\x00-\x1f\x7f'
EXHAUSTIVE = "exhaustive"  # the scope of a label that names everything; with any other scope the image may show more

Flag = Annotated[int, Field(ge=0, le=1, json_schema_extra={"enum": [0, 1]})]  # strict: true is not 1
Title = Annotated[str, StringConstraints(max_length=MAX_TITLE)]
Item = Annotated[str, StringConstraints(min_length=1, max_length=MAX_ITEM)]
Items = Annotated[list[Item], Field(max_length=MAX_ITEMS)]


class AnswerError(ValueError):
    """A text that is not a strict answer. The message names the broken rule."""


class FoodRecord(BaseModel):
    """What is in one image. `is_food` is 1 when food or drink is visible; 0 means an empty title and empty lists."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    is_food: Flag
    image_title: Title
    food_items: Items
    drink_items: Items

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.is_food and (self.image_title or self.food_items or self.drink_items):
            raise ValueError("is_food is 0, so image_title, food_items and drink_items must be empty")
        for name in FIELDS:
            items = getattr(self, name)
            if len(set(items)) < len(items):
                raise ValueError(f"{name} names an item twice")
        return self

    def to_json(self) -> str:
        """The canonical text: `json.dumps` with default separators, keys in field order, ASCII only."""
        return json.dumps(self.model_dump())

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Parse JSON of the right shape in any spacing and key order. Raises AnswerError."""
        try:
            return cls.model_validate(json.loads(text))
        except ValidationError as error:
            reasons = [(".".join(map(str, e["loc"])) or "record", e["msg"]) for e in error.errors()]
            text = "; ".join(f"{place}: {message.removeprefix('Value error, ')}" for place, message in reasons)
            raise AnswerError(f"breaks the schema: {text}") from error
        except (ValueError, RecursionError) as error:  # also nesting without end, and thousands of digits
            raise AnswerError(f"not JSON: {error}") from error

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse exactly the texts that `to_json` writes. Raises AnswerError for all others."""
        record = cls.from_json(text)
        if record.to_json() != text:
            raise AnswerError("valid JSON, but not in the canonical key order and spacing")
        return record

    @classmethod
    def parse_lenient(cls, text: str) -> Self:
        """Find a record in chatty output: code fences, Python reprs, prose around it. Only for scoring other models.

        Items override `is_food`: an answer that lists food counts as food. Raises AnswerError.
        """
        for raw in chain(_parsed(text), _objects_in(text)):
            if not {"is_food", *FIELDS} & raw.keys():
                continue
            try:
                items = {name: _distinct(raw.get(name)) for name in FIELDS}
                said = str(raw.get("is_food") or 0).lower() not in ("0", "false", "no")
                is_food = int(said or any(items.values()))
                title = str(raw.get("image_title") or "")[:MAX_TITLE] if is_food else ""
                return cls(is_food=is_food, image_title=title, **items)
            except (ValueError, TypeError, RecursionError, MemoryError):
                continue
        raise AnswerError("no object that could be read as a record")


def listing(items: Iterable[str]) -> str:
    """A title that lists the items, as many as fit: "egg, pie and tea"."""
    names = list(items)
    while True:
        *start, last = names or [""]
        title = f"{', '.join(start)} and {last}" if start else last
        if len(title) <= MAX_TITLE:
            return title
        names.pop()


def title_parts(title: str) -> list[str]:
    """What a title names: `listing` the other way round."""
    return [part for part in re.split(r",? and |, ", title) if part]


def label_in(value: object) -> dict[str, Any]:
    """Return a label with its values unchanged: a mapping, or the first object in a text.

    Raises AnswerError without one. A set becomes a sorted list, and any other value that JSON lacks becomes text.
    """
    if isinstance(value, str):  # the whole text first, so that braces in a title do no harm
        value = next(chain(_parsed(value), _objects_in(value)), None)
    if not isinstance(value, dict):
        raise AnswerError("no object that could be read as a record")
    plain = json.dumps(value, skipkeys=True, default=lambda v: sorted(map(str, v)) if isinstance(v, set) else str(v))
    return json.loads(plain)


def guided_schema() -> dict[str, Any]:
    """The JSON schema of a record with canonical separators and without UNSPOKEN characters, for llguidance.

    Other engines ignore `x-guidance`.
    """
    schema, pattern = FoodRecord.model_json_schema(), {"pattern": f"^[^{UNSPOKEN}]*$"}
    schema["properties"]["image_title"] |= pattern
    for name in FIELDS:
        schema["properties"][name]["items"] |= pattern
    return schema | {"x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}}


def _objects_in(text: str) -> Iterator[dict[str, Any]]:
    """Yield the objects in a text that hold no nested object, written in JSON or as Python reprs."""
    for found in re.findall(r"\{[^{}]*\}", text):
        yield from _parsed(found)


def _parsed(text: str) -> Iterator[dict[str, Any]]:
    for parse in (json.loads, ast.literal_eval):
        try:
            raw = parse(text)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
        if isinstance(raw, dict):
            yield raw


def _distinct(items: object) -> list[str]:
    texts = (str(item).strip()[:MAX_ITEM] for item in (items if isinstance(items, list) else []))
    return list(dict.fromkeys(text for text in texts if text))[:MAX_ITEMS]


def as_row(file: str, result: FoodRecord | Exception, confidence: Any = None) -> dict[str, Any]:
    """Return the row of an image in an output file: its record or its error, and its `Confidence` if there is one."""
    if isinstance(result, Exception):
        return {"file": file, "error": str(result)}
    return {"file": file, **result.model_dump(), **({"confidence": asdict(confidence)} if confidence else {})}
