r"""The ways models write a record: canonical JSON, other JSON, or a Python repr, each perhaps behind a short lead.

`recognize` detects the dialect of a free answer. A `Dialect` provides what constrained decoding needs: a grammar, the
one rule that no grammar expresses, and a parser for complete and incomplete answers. Every dialect has the keys of
`FoodRecord` in their order; other orders are not recognized.
"""

import ast
import json
import re
from dataclasses import dataclass
from functools import cached_property

from foodextract.schema import FIELDS, MAX_ITEM, MAX_ITEMS, MAX_TITLE, UNSPOKEN, FoodRecord

MAX_LEAD = 120  # characters before the opening brace: a fence, or "Here is the JSON: "
MAX_HEAD = 64  # characters from the opening brace to the second key
MAX_SPACE = 32  # characters of white space between two tokens

# One character of a title or an item, as a regular expression for both Python and llguidance. UNSPOKEN ones are none,
# escaped or not; no label of ours has them.
# Written by `json.dumps`: printable ASCII, \uXXXX in lower case, or two of them above U+FFFF.
_CANONICAL = (
    r"[ !#-9;-Z^`a-z|~]|\\u(00[89a-f][0-9a-f]|0[1-9a-f][0-9a-f]{2}"
    r"|[1-9a-ce-f][0-9a-f]{3}|d[0-7][0-9a-f]{2}|d[89ab][0-9a-f]{2}\\ud[c-f][0-9a-f]{2})"
)
# In any JSON; surrogates come in pairs.
_JSON = (
    rf"[^{UNSPOKEN}]|\\(\/|u(00[89a-fA-F][0-9a-fA-F]|0[1-9a-fA-F][0-9a-fA-F]{{2}}"
    r"|([1-9a-cefA-CEF][0-9a-fA-F]|[dD][0-7])[0-9a-fA-F]{2}"
    r"|[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}))"
)
# Written by `repr` between single or double quotation marks.
_ESCAPE = r"\\('|x[89a-f][0-9a-f]|u(0[1-9a-f]|[1-9a-cef][0-9a-f]|d[0-7])[0-9a-f]{2}|U00(0[1-9a-f]|10)[0-9a-f]{4})"
_SINGLE, _DOUBLE = (rf"[^{UNSPOKEN}{quote}]|{_ESCAPE}" for quote in ("'", ""))

_TITLE, _FOOD, _DRINK = ', "image_title": ', ', "food_items": [', '], "drink_items": ['  # before these values
_SPACE = r"[ \t\r\n]"
_STRINGS = {"'": r"'(?:[^'\\]|\\.)*'", '"': r'"(?:[^"\\]|\\.)*"'}
_WORDS = (("0", "1"), ("false", "true"), ("False", "True"), ('"0"', '"1"'), ("'0'", "'1'"))
_FLAGS = {flag: flags for flags in _WORDS for flag in flags}
_HEAD = re.compile(
    rf"""(?P<lead>[^{{}}]{{0,{MAX_LEAD}}})\{{(?P<gap>{_SPACE}*)(?P<quote>["'])is_food(?P=quote)"""
    rf"(?P<colon>{_SPACE}*:{_SPACE}*)"
    rf"(?P<flag>{'|'.join(_FLAGS)})(?P<comma>{_SPACE}*,{_SPACE}*)(?P=quote)image_title(?P=quote)"
)


@dataclass(frozen=True)
class Dialect:
    """One way to write a record. The default is the canonical JSON of `FoodRecord.to_json`.

    `lead` is the text before the opening brace, `flags` the words for 0 and 1. With `python`, strings are those of
    `repr`: in single quotes, or in double quotes around an apostrophe. With `spaced`, any white space may stand
    between tokens.
    """

    lead: str = ""
    flags: tuple[str, str] = ("0", "1")
    python: bool = False
    spaced: bool = False

    @property
    def canonical(self) -> bool:
        """Whether `FoodRecord.to_json` writes these texts, except for white space before them."""
        return not self.lead.strip() and self == Dialect(self.lead)

    def __str__(self) -> str:
        json_form = "canonical JSON" if self == Dialect(self.lead) else "JSON of another form"
        form = "Python reprs" if self.python else json_form
        return form + (f" behind {self.lead.lstrip()!r}" if self.lead.strip() else "")

    def grammar(self) -> str:
        """A Lark grammar for llguidance: the schema, with the characters above.

        Items may repeat (see `without_repeats`).
        """
        opening, key = json.dumps(self.lead + "{"), self._lark('"is_food": ')
        nothing = self._lark(', "image_title": "", "food_items": [], "drink_items": []')
        title, food, drink, closing, comma = map(self._lark, (_TITLE, _FOOD, _DRINK, "]", ", "))
        no, yes = map(json.dumps, self.flags)
        terminals = {"TITLE": self._string(0, MAX_TITLE), "ITEM": self._string(1, MAX_ITEM)}
        terminals |= {name: f"/{characters}/" for name, characters in self._characters.values()}
        terminals |= {"SPACE": f"/{_SPACE}{{1,{MAX_SPACE}}}/"} if self.spaced else {}
        rules = [
            f'start: {opening} {key} (nothing | something) "}}"',
            f"nothing: {no} {nothing}",
            f"something: {yes} {title} TITLE {food} items? {drink} items? {closing}",
            f"items: ITEM ({comma} ITEM){{0,{MAX_ITEMS - 1}}}",
            *(f"{name}: {expression}" for name, expression in terminals.items()),
        ]
        return "\n".join(rules) + "\n"

    def spans(self, text: str) -> dict[str, list[tuple[int, int]]]:
        """Find the complete values of each field in an answer, or in the beginning of one.

        Returns start and end of each value; strings include their quotation marks.
        """
        record = self._record.match(text)
        found = {field: [record.span(field)] if record and record[field] else [] for field in FoodRecord.model_fields}
        for field in FIELDS:
            found[field] = [
                item.span() for start, end in found[field] for item in self._item.finditer(text, start, end)
            ]
        return found

    def read(self, text: str) -> FoodRecord:
        """Parse an answer, or the beginning of one. An unfinished title or item is left out."""
        values = {field: [text[slice(*span)] for span in spans] for field, spans in self.spans(text).items()}
        return FoodRecord(
            is_food=int(values["is_food"] == [self.flags[1]]),
            image_title=self._value(values["image_title"][0]) if values["image_title"] else "",
            **{field: [self._value(item) for item in values[field]] for field in FIELDS},
        )

    def without_repeats(self, text: str) -> str:
        """Return the beginning of an answer, with the list closed before an item that it already holds.

        A model that repeats itself has nothing more to say. Forbidding only the last token of a second "pizza" would
        yield "pizzas".
        """
        spans = self.spans(text)
        for field, end in zip(FIELDS, ('], "drink_items":', "]}"), strict=True):
            distinct: dict[str, str] = {}
            for item in (text[slice(*span)] for span in spans[field]):
                distinct.setdefault(self._value(item), item)
            if len(distinct) < len(spans[field]):
                return text[: spans[field][0][0]] + ", ".join(distinct.values()) + self._quoted(end)
        return text

    def _quoted(self, canonical: str) -> str:
        """Convert a piece of canonical JSON between two values to the quotation marks of this dialect."""
        return canonical.replace('"', "'") if self.python else canonical

    def _tokens(self, canonical: str) -> list[str]:
        """Split such a piece where white space is free, or keep it whole."""
        text = self._quoted(canonical)
        return ["", *re.findall(r"""["']\w*["']|\S""", text), ""] if self.spaced else [text]

    def _lark(self, canonical: str) -> str:
        return " SPACE? ".join(json.dumps(token) if token else "" for token in self._tokens(canonical))

    def _pattern(self, canonical: str) -> str:
        return rf"{_SPACE}*".join(map(re.escape, self._tokens(canonical)))

    @property
    def _characters(self) -> dict[str, tuple[str, str]]:
        """Name and regular expression of the terminal for one character, by quotation mark."""
        if self.python:
            return {"'": ("SINGLE", _SINGLE), '"': ("DOUBLE", _DOUBLE)}
        return {'"': ("CHARACTER", _CANONICAL if self.canonical else _JSON)}

    def _string(self, least: int, most: int) -> str:
        """A Lark expression for a string of `least` to `most` characters."""
        names = {json.dumps(quote): name for quote, (name, _) in self._characters.items()}
        return " | ".join(f"{quote} {name}{{{least},{most}}} {quote}" for quote, name in names.items())

    def _value(self, string: str) -> str:
        return ast.literal_eval(string) if self.python else json.loads(string)

    @cached_property
    def _item(self) -> re.Pattern[str]:
        return re.compile("|".join(_STRINGS[quote] for quote in self._characters))

    @cached_property
    def _record(self) -> re.Pattern[str]:
        """Matches the beginning of a record, with a group for each field."""
        string, more = f"(?:{self._item.pattern})", self._pattern(", ")
        food, drink = (rf"(?P<{field}>(?:{string}(?:{more})?)*)" for field in FIELDS)
        title = f"(?P<image_title>{string})"
        to_title, to_food, to_drink = map(self._pattern, (_TITLE, _FOOD, _DRINK))
        rest = f"(?:{to_title}{title}(?:{to_food}{food}(?:{to_drink}{drink})?)?)?"
        opening = re.escape(self.lead + "{") + self._pattern('"is_food": ')
        return re.compile(f"{opening}(?P<is_food>{'|'.join(self.flags)}){rest}")


def recognize(text: str) -> Dialect | None:
    """Detect the dialect of a free answer, or of the beginning of one."""
    head = _HEAD.match(text)
    if not head:
        return None
    spaced = (head["gap"], head["colon"], head["comma"]) != ("", ": ", ", ")
    return Dialect(head["lead"], _FLAGS[head["flag"]], head["quote"] == "'", spaced)


def undecided(text: str) -> bool:
    """Whether the rest of a free answer may still show its dialect."""
    lead, brace, head = text.partition("{")
    return recognize(text) is None and (len(head) <= MAX_HEAD if brace else len(lead) <= MAX_LEAD)
