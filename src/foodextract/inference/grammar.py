r"""How a model writes a record: canonical JSON, JSON of another form, or a Python repr, each perhaps behind a short lead.

`recognize` detects the dialect of an unconstrained answer. A `Dialect` holds what guided decoding needs: a grammar, the one rule that no
grammar expresses, and the reading of an answer, finished or not. The default is the canonical JSON of `FoodRecord.to_json`.

Every dialect has the keys of `FoodRecord` in their order. Other orders are not recognized.
"""

import ast
import json
import re
from dataclasses import dataclass
from functools import cached_property

from foodextract.schema import FIELDS, MAX_ITEM, MAX_ITEMS, MAX_TITLE, FoodRecord

MAX_LEAD = 120  # characters before the opening brace: a fence, or "Here is the JSON: "
MAX_HEAD = 64  # characters after it within which the second key must begin
MAX_SPACE = 32  # white space between two tokens

# One character of a string, as a regular expression that both Python and llguidance read.
# As `json.dumps` writes it: printable ASCII, a short escape, \uXXXX in lower case, two of them above U+FFFF.
_CANONICAL = (
    r'[ !#-\[\]-~]|\\(["\\bfnrt]|u(000[0-7bef]|001[0-9a-f]|007f|00[89a-f][0-9a-f]|0[1-9a-f][0-9a-f]{2}|[1-9a-ce-f][0-9a-f]{3}'
    r"|d[0-7][0-9a-f]{2}|d[89ab][0-9a-f]{2}\\ud[c-f][0-9a-f]{2}))"
)
# As any JSON may have it; a surrogate comes with the other of its pair.
_JSON = (
    r'[^"\\\x00-\x1f]|\\(["\\\/bfnrt]|u([0-9a-cefA-CEF][0-9a-fA-F]{3}|[dD][0-7][0-9a-fA-F]{2}'
    r"|[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}))"
)
# As `repr` writes it between single or double quotation marks.
_ESCAPE = r"""\\(['"\\nrt]|x[0-9a-f]{2}|u([0-9a-cef][0-9a-f]{3}|d[0-7][0-9a-f]{2})|U00(0[1-9a-f]|10)[0-9a-f]{4})"""
_SINGLE, _DOUBLE = (rf"[^{quote}\\\x00-\x1f\x7f]|{_ESCAPE}" for quote in "'\"")

_SPACE = r"[ \t\r\n]"
_STRINGS = {"'": r"'(?:[^'\\]|\\.)*'", '"': r'"(?:[^"\\]|\\.)*"'}
_WORDS = (("0", "1"), ("false", "true"), ("False", "True"), ('"0"', '"1"'), ("'0'", "'1'"))
_FLAGS = {flag: flags for flags in _WORDS for flag in flags}
_HEAD = re.compile(
    rf"""(?P<lead>[^{{}}]{{0,{MAX_LEAD}}})\{{(?P<gap>{_SPACE}*)(?P<quote>["'])is_food(?P=quote)(?P<colon>{_SPACE}*:{_SPACE}*)"""
    rf"(?P<flag>{'|'.join(_FLAGS)})(?P<comma>{_SPACE}*,{_SPACE}*)(?P=quote)image_title(?P=quote)"
)


@dataclass(frozen=True)
class Dialect:
    """One way to write a record.

    `lead` is what comes before the opening brace. `flags` are the words for 0 and 1. `python` means the strings of `repr`: in single
    quotes, or in double quotes for the sake of an apostrophe. `spaced` means any white space between tokens.
    """

    lead: str = ""
    flags: tuple[str, str] = ("0", "1")
    python: bool = False
    spaced: bool = False

    @property
    def canonical(self) -> bool:
        """Whether `FoodRecord.to_json` writes these texts, but for white space before them."""
        return not self.lead.strip() and self == Dialect(self.lead)

    def __str__(self) -> str:
        form = (
            "Python reprs"
            if self.python
            else "canonical JSON"
            if self == Dialect(self.lead)
            else "JSON of another form"
        )
        return form + (f" behind {self.lead.lstrip()!r}" if self.lead.strip() else "")

    def grammar(self) -> str:
        """A Lark grammar of the texts, for llguidance: the whole schema, except that an item may repeat (see `without_repeats`)."""
        opening, key = json.dumps(self.lead + "{"), self._lark('"is_food": ')
        nothing = self._lark(', "image_title": "", "food_items": [], "drink_items": []')
        between = (', "image_title": ', ', "food_items": [', '], "drink_items": [', "]", ", ")
        title, food, drink, closing, comma = map(self._lark, between)
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
        """Start and end of the complete values of each field in an answer or the beginning of one; strings include their quotes."""
        record = self._record.match(text)
        found = {field: [record.span(field)] if record and record[field] else [] for field in FoodRecord.model_fields}
        for field in FIELDS:
            found[field] = [
                item.span() for start, end in found[field] for item in self._item.finditer(text, start, end)
            ]
        return found

    def read(self, text: str) -> FoodRecord:
        """The record of an answer, or of what is complete in the beginning of one: no unfinished title or item."""
        values = {field: [text[slice(*span)] for span in spans] for field, spans in self.spans(text).items()}
        return FoodRecord(
            is_food=int(values["is_food"] == [self.flags[1]]),
            image_title=self._value(values["image_title"][0]) if values["image_title"] else "",
            **{field: [self._value(item) for item in values[field]] for field in FIELDS},
        )

    def without_repeats(self, text: str) -> str:
        """The beginning of an answer as it is, or, when an item comes twice in a list, with the list ended before the second.

        A model that repeats itself has nothing more to say. To forbid only the closing quotation mark of the second "pizza" would make
        it write "pizzas".
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
        """What stands between values in the canonical JSON, with the quotation marks of this dialect."""
        return canonical.replace('"', "'") if self.python else canonical

    def _tokens(self, canonical: str) -> list[str]:
        """The same as pieces between which white space is free, or in one piece."""
        text = self._quoted(canonical)
        return ["", *re.findall(r"""["']\w*["']|\S""", text), ""] if self.spaced else [text]

    def _lark(self, canonical: str) -> str:
        return " SPACE? ".join(json.dumps(token) if token else "" for token in self._tokens(canonical))

    def _pattern(self, canonical: str) -> str:
        return rf"{_SPACE}*".join(map(re.escape, self._tokens(canonical)))

    @property
    def _characters(self) -> dict[str, tuple[str, str]]:
        """The terminal and the regular expression of one character, by quotation mark."""
        if self.python:
            return {"'": ("SINGLE", _SINGLE), '"': ("DOUBLE", _DOUBLE)}
        return {'"': ("CHARACTER", _CANONICAL if self.canonical else _JSON)}

    def _string(self, least: int, most: int) -> str:
        """A Lark expression of a string of so many characters."""
        names = {json.dumps(quote): name for quote, (name, _) in self._characters.items()}
        return " | ".join(f"{quote} {name}{{{least},{most}}} {quote}" for quote, name in names.items())

    def _value(self, string: str) -> str:
        return ast.literal_eval(string) if self.python else json.loads(string)

    @cached_property
    def _item(self) -> re.Pattern:
        return re.compile("|".join(_STRINGS[quote] for quote in self._characters))

    @cached_property
    def _record(self) -> re.Pattern:
        """A record as far as it is written, with a group for each field."""
        string, more = f"(?:{self._item.pattern})", self._pattern(", ")
        food, drink = (rf"(?P<{field}>(?:{string}(?:{more})?)*)" for field in FIELDS)
        title = f"(?P<image_title>{string})"
        between = [self._pattern(part) for part in (', "image_title": ', ', "food_items": [', '], "drink_items": [')]
        lists = f"(?:{between[0]}{title}(?:{between[1]}{food}(?:{between[2]}{drink})?)?)?"
        opening = re.escape(self.lead + "{") + self._pattern('"is_food": ')
        return re.compile(f"{opening}(?P<is_food>{'|'.join(self.flags)}){lists}")


def recognize(text: str) -> Dialect | None:
    """The dialect of an unconstrained answer or of the beginning of one, or None."""
    head = _HEAD.match(text)
    if not head:
        return None
    spaced = (head["gap"], head["colon"], head["comma"]) != ("", ": ", ", ")
    return Dialect(head["lead"], _FLAGS[head["flag"]], head["quote"] == "'", spaced)


def undecided(text: str) -> bool:
    """Whether more of a free answer may still tell its dialect."""
    lead, brace, head = text.partition("{")
    return recognize(text) is None and (len(head) <= MAX_HEAD if brace else len(lead) <= MAX_LEAD)
