"""The answer format: one record, one canonical text, one strict parser.

Whatever writes an answer (labels, model, command line, server) writes `FoodRecord.to_json()`; whatever counts an answer as
right form first asks `FoodRecord.parse()`. The lenient parser exists only to give other models' outputs a fair score. `dialects` says the
same to a decoder, which can then write nothing else.
"""

import ast
import json
import re
from collections.abc import Iterator
from itertools import chain
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, conlist, model_validator

# Small models loop when nothing bounds them. The bounds leave room: the 3,698 Hub rows and all photographs we measured fit.
MAX_TITLE, MAX_ITEM, MAX_ITEMS = 100, 50, 20
FIELDS = ("food_items", "drink_items")  # the lists of a record
EXHAUSTIVE = (
    "exhaustive"  # the scope of a label that names everything; every other scope means that there may be more to see
)

Flag = Annotated[int, Field(ge=0, le=1, json_schema_extra={"enum": [0, 1]})]  # strict: true is not 1
Title = Annotated[str, StringConstraints(max_length=MAX_TITLE)]
Item = Annotated[str, StringConstraints(min_length=1, max_length=MAX_ITEM)]
Items = conlist(Item, max_length=MAX_ITEMS)


class AnswerError(ValueError):
    """A text that is not a strict answer; the message says which rule it breaks."""


class FoodRecord(BaseModel):
    """What is in one image. `is_food` is 1 when food or drink is visible; not food means an empty title and empty lists."""

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
        """The canonical text: `json.dumps` with its default separators, keys in the order of the fields, ASCII only."""
        return json.dumps(self.model_dump())

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read any JSON text of the right shape, however it is spaced. Raises AnswerError."""
        try:
            return cls.model_validate(json.loads(text))
        except json.JSONDecodeError as error:
            raise AnswerError(f"not JSON: {error}") from error
        except ValidationError as error:
            raise AnswerError(f"breaks the schema: {_reasons(error)}") from error

    @classmethod
    def parse(cls, text: str) -> Self:
        """The strict parser: accepts exactly the texts that `to_json` writes. Raises AnswerError for all others."""
        record = cls.from_json(text)
        if record.to_json() != text:
            raise AnswerError("valid JSON, but not in the canonical key order and spacing")
        return record

    @classmethod
    def parse_lenient(cls, text: str) -> Self:
        """Find a record in chatty output: code fences, Python reprs, prose around it. For scoring other models only.

        Contradictions are read in favor of the items: an answer that lists food counts as food. Raises AnswerError.
        """
        for raw in objects_in(text):
            try:
                items = {key: _distinct(raw.get(key)) for key in FIELDS}
                is_food = int(bool(raw.get("is_food")) or any(items.values()))
                title = str(raw.get("image_title") or "")[:MAX_TITLE] if is_food else ""
                return cls(is_food=is_food, image_title=title, **items)
            except (ValueError, TypeError, RecursionError, MemoryError):
                continue
        raise AnswerError("no object that could be read as a record")


def objects_in(text: str) -> Iterator[dict]:
    """The objects without nested ones in a text, in JSON or as Python reprs, one after the other."""
    for found in re.findall(r"\{.*?\}", text, re.DOTALL):
        yield from _read(found)


def label_in(value: object) -> dict:
    """A label as it was written, with no value changed: a mapping, or the first object in a text. Raises AnswerError where there is none.

    The whole text is tried first, so that braces in a title do no harm. A set becomes a list, and what JSON does not know becomes text.
    """
    if isinstance(value, str):
        value = next(chain(_read(value), objects_in(value)), None)
    if not isinstance(value, dict):
        raise AnswerError("no object that could be read as a record")
    return json.loads(
        json.dumps(
            value, skipkeys=True, default=lambda part: sorted(map(str, part)) if isinstance(part, set) else str(part)
        )
    )


def _read(text: str) -> Iterator[dict]:
    for read in (json.loads, ast.literal_eval):
        try:
            raw = read(text)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
        if isinstance(raw, dict):
            yield raw


def _distinct(items: object) -> list[str]:
    texts = (str(item).strip()[:MAX_ITEM] for item in (items if isinstance(items, list) else []))
    return list(dict.fromkeys(text for text in texts if text))[:MAX_ITEMS]


def _reasons(error: ValidationError) -> str:
    return "; ".join(
        f"{'.'.join(map(str, e['loc'])) or 'record'}: {e['msg'].removeprefix('Value error, ')}" for e in error.errors()
    )


def json_schema() -> dict:
    """The JSON schema of a record, for constrained decoding, `structured_outputs` and the API documentation."""
    return FoodRecord.model_json_schema()


def guided_schema() -> dict:
    """`json_schema` with the separators of the canonical text, for engines that llguidance guides (vLLM's backend `guidance`).

    Other engines pass over `x-guidance`, and choose their own white space.
    """
    return json_schema() | {"x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}}
