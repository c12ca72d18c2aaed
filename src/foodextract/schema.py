"""The answer format: one record, one canonical text, one strict parser.

Whatever writes an answer (labels, model, command line, server) writes `FoodRecord.to_json()`; whatever counts an answer as
right form first asks `FoodRecord.parse()`. The lenient parser exists only to give other models' outputs a fair score. `grammar()` says the
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
EXHAUSTIVE = "exhaustive"  # the scope of a label that names everything; every other scope means that there may be more to see

Flag = Annotated[int, Field(ge=0, le=1, json_schema_extra={"enum": [0, 1]})]  # strict: true is not 1
Title = Annotated[str, StringConstraints(max_length=MAX_TITLE)]
Item = Annotated[str, StringConstraints(min_length=1, max_length=MAX_ITEM)]
Items = conlist(Item, max_length=MAX_ITEMS)


class AnswerError(ValueError):
    """A text that is not a strict answer; the message says which rule it breaks."""


class FoodRecord(BaseModel):
    """What is in one picture. `is_food` is 1 when food or drink is visible; not food means an empty title and empty lists."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    is_food: Flag
    image_title: Title
    food_items: Items
    drink_items: Items

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.is_food and (self.image_title or self.food_items or self.drink_items):
            raise ValueError("is_food is 0, so image_title, food_items and drink_items must be empty")
        for name in ("food_items", "drink_items"):
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

        Contradictions are read in favour of the items: an answer that lists food counts as food. Raises AnswerError.
        """
        for raw in objects_in(text):
            try:
                items = {key: _distinct(raw.get(key)) for key in ("food_items", "drink_items")}
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
    return json.loads(json.dumps(value, skipkeys=True, default=lambda part: sorted(map(str, part)) if isinstance(part, set) else str(part)))


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
    return "; ".join(f"{'.'.join(map(str, e['loc'])) or 'record'}: {e['msg'].removeprefix('Value error, ')}" for e in error.errors())


def json_schema() -> dict:
    """The JSON schema of a record, for constrained decoding, `structured_outputs` and the API documentation."""
    return FoodRecord.model_json_schema()


def guided_schema() -> dict:
    """`json_schema` with the separators of the canonical text, for engines that llguidance guides (vLLM's backend `guidance`).

    Other engines pass over `x-guidance`, and choose their own white space.
    """
    return json_schema() | {"x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}}


# -------------------------------------------------------------------------------------------------------- answers that are being written

# One character of a string as `json.dumps` writes it: printable ASCII, a short escape, \uXXXX in lower case, two of them above U+FFFF.
_CHARACTER = (
    r'[ !#-\[\]-~]|\\(["\\bfnrt]|u(000[0-7bef]|001[0-9a-f]|007f|00[89a-f][0-9a-f]|0[1-9a-f][0-9a-f]{2}|[1-9a-ce-f][0-9a-f]{3}'
    r"|d[0-7][0-9a-f]{2}|d[89ab][0-9a-f]{2}\\ud[c-f][0-9a-f]{2}))"
)
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')


def grammar(lead: str = "") -> str:
    """A Lark grammar of the canonical texts, behind `lead`, which a chat template may put before an answer.

    It says all that the schema says but one thing, that no item comes twice: see `without_repeats`.
    """
    return rf"""
start: {json.dumps(lead + '{"is_food": ')} (nothing | something)
nothing: "0, \"image_title\": \"\", \"food_items\": [], \"drink_items\": []}}"
something: "1, \"image_title\": " TITLE ", \"food_items\": [" items? "], \"drink_items\": [" items? "]}}"
items: ITEM (", " ITEM){{0,{MAX_ITEMS - 1}}}
TITLE: "\"" CHARACTER{{0,{MAX_TITLE}}} "\""
ITEM: "\"" CHARACTER{{1,{MAX_ITEM}}} "\""
CHARACTER: /{_CHARACTER}/
"""


def items_in(text: str, field: str) -> list[re.Match]:
    """The complete items, quotation marks included, of one list in the beginning of a canonical text."""
    items = re.search(rf'"{field}": \[((?:{_STRING.pattern}(?:, )?)*)', text)
    return list(_STRING.finditer(text, items.start(1), items.end(1))) if items else []


def without_repeats(text: str) -> str:
    """The beginning of an answer as it is, or, when an item comes twice in a list, with the list ended before the second.

    A model that repeats itself has nothing more to say. To forbid only the closing quotation mark of the second "pizza" would make it
    write "pizzas".
    """
    for field, end in (("food_items", '], "drink_items":'), ("drink_items", "]}")):
        items = items_in(text, field)
        distinct = dict.fromkeys(item[0] for item in items)
        if len(distinct) < len(items):
            return text[: items[0].start()] + ", ".join(distinct) + end
    return text


def closed(text: str) -> str:
    """The canonical answer for the beginning of one: what is complete in it, without an unfinished title or item."""
    title = re.search(rf'"image_title": ({_STRING.pattern})', text)
    return FoodRecord(
        is_food=int('"is_food": 1' in text),
        image_title=json.loads(title[1]) if title else "",
        food_items=[json.loads(item[0]) for item in items_in(text, "food_items")],
        drink_items=[json.loads(item[0]) for item in items_in(text, "drink_items")],
    ).to_json()
