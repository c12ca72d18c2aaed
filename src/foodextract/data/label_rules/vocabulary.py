"""Compare and classify names: same name, food or drink, hidden ingredient, sentence.

The word lists in `words/` hold the knowledge. Each file explains its format at the top; edit them to change the rules.
"""

import re
import unicodedata
from collections.abc import Iterable
from difflib import SequenceMatcher
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

# A name ends before any of these.
CUT = re.compile(r"[,;:]| (?:with|without|in|on|from|over|for|al|alla|au|a la|en|topped|served|made) ")
AND = re.compile(r" (?:and|&|n|plus) ")
CONTAINERS = frozenset(("bottle", "box", "can", "carton", "cup", "glass", "jug", "mug", "pint", "pitcher", "pot"))
PHOTO_OF = re.compile(
    r"^(?:(?:an?|the|this|my) )?(?:[\w-]+ ){0,2}?(?:close[- ]?up|photo\w*|picture|image|snapshot|view)(?: shot)?"
    r" (?:of|showing)(?: an?| the| some)?\b(?=.)"
)
SENTENCE = re.compile(
    r"^(?:this|these|that|those|there|here|it|its|i|we|he|she|you (?:can|see)|my|our|someone|people|what|look"
    r"|the (?:image|picture))\b"
    r"|\b(?:is|are|was|were|has|have|had|will|would|should|could|shows?|depicts?)\b"
    r"|\b(?:contains?|consists?|displays?|appears?|looks?|tastes?)\b"
    r"|\b(?:sits?|lies|rests|stands|goes|comes|makes|serves|shown|seen|placed|arranged|featured|sitting|resting|lying"
    r"|holding|eating)\b"
    r"|\b(?:featuring|enjoy\w*|they|we)\b"
    r"|\b(?:on|in|at|from|against|beside|near|over|under|with|to|of) (?:an?|the|my|some|top of an?|top of the)\b"
    r"(?: [\w-]+)?"
    r" (?:table\w*|plate|platter|background|counter\w*|tray|board|surface|kitchen|restaurant|napkin|cloth)\b"
)
ARTICLES = frozenset(("a", "an", "the", "this", "my", "our", "his", "her", "their", "your"))
MAX_EXTRA, MAX_EXTRA_WITH_ARTICLE = 8, 5  # a title with more words than this beside its items is a sentence
ALIKE = 0.75  # difflib ratio from which two spellings are the same word: idli and idly
ENDS = " \t.,;:!?\"'`´*•·-–—_/\\|~#+=<>[]{}“”‘’«»…"  # stripped from both ends of a name
CACHE = 65536  # names


@lru_cache(CACHE)
def plain(text: str) -> str:
    """Normalize a text for comparison: lower case, without accents, hyphens, underscores and bracketed parts."""
    text = "".join(mark for mark in unicodedata.normalize("NFKD", text.lower()) if not unicodedata.combining(mark))
    return " ".join(re.sub(r"[^\w\s&',;:%]|_", " ", re.sub(r"\([^)]*\)", " ", text)).split())


@lru_cache(CACHE)
def stems(text: str) -> tuple[str, ...]:
    """Return the words of a text, each in the singular."""
    return tuple(_singular(word) for word in re.sub("[,;:]", " ", plain(text)).split())


def key(name: str) -> str:
    """Return one text for all names that differ only in number or spelling: "Fried eggs" and "fried-egg"."""
    return " ".join(stems(name)) or name


def trimmed(text: str) -> str:
    """Normalize a text for writing: NFC, single spaces, no invisible characters, no marks at the ends."""
    marks = (mark for mark in text.replace("\ufffd", "") if mark.isprintable() or mark.isspace())
    text = unicodedata.normalize("NFC", "".join(marks))
    if text.count("(") != text.count(")"):
        text = text.replace("(", " ").replace(")", " ")
    return " ".join(text.split()).strip(ENDS)


@lru_cache(CACHE)
def field_of(name: str) -> str | None:
    """Return "food_items" or "drink_items", or None for unknown names and for names of both ("cookies and milk").

    The last words of a name decide, except in proper names: "The Swedish Tart" is a drink.
    """
    if field := _field_by_ending(key(name), whole=True):
        return field
    if plain(name).startswith("the "):
        return None
    fields = {_field_by_ending(key(part)) for part in AND.split(CUT.split(plain(name))[0])}
    return fields.pop() if len(fields) == 1 else None


def is_hidden(item: str, beside: Iterable[str]) -> bool:
    """Tell whether a food is an invisible ingredient. `beside` holds the other items, the title and the class."""
    name = plain(item)
    always = _ending_length(name, entries("pantry", "always"))
    longest = max(_ending_length(key(item), entries(file)) for file in ("foods", "drinks"))
    if always and always >= longest:  # "bell pepper" and "dr pepper" have longer entries of their own
        return True
    if name in entries("pantry", "in bakes") and _mention(beside, entries("pantry", "bakes")):
        return True
    return name in entries("pantry", "off bread") and not _mention(beside, entries("pantry", "bread"))


def is_object(name: str) -> bool:
    """Tell whether a class of a detection data set is neither food nor drink: a person, a plate, a wine glass."""
    known = entries("objects")
    return key(name) in known or (field_of(name) is None and bool(_ending_length(key(name), known)))


def is_cooking_liquid(item: str) -> bool:
    """Tell whether an item is a drink that dishes are cooked with."""
    return plain(item) in entries("pantry", "liquids")


@lru_cache(CACHE)
def content(text: str) -> frozenset[str]:
    """Return the words that identify a food, each in the singular, without "fresh", "plate" and the like."""
    return frozenset(stems(text)) - entries("generic")


def contains(title: str, name: str) -> bool:
    """Tell whether the title contains exactly this name, in the same number."""
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", title) is not None


def share_a_word(title: str, names: list[str]) -> bool:
    """Tell whether a title mentions any of the names. True for a title without content, such as "breakfast"."""
    known = frozenset().union(*map(content, names)) | {"".join(stems(name)) for name in names}  # "hotdog" is "hot dog"
    words = {*content(title), "".join(stems(title))}
    return not content(title) or any(_alike(one, other) for one in words for other in known)


def is_sentence(title: str, names: list[str]) -> bool:
    """Tell whether a title is a sentence. The words of `names` do not count: a list of four items is not a sentence."""
    known = set(stems(" ".join(names)))
    extra = [word for word in stems(title) if word not in known]
    limit = MAX_EXTRA if ARTICLES.isdisjoint(extra) else MAX_EXTRA_WITH_ARTICLE
    return bool(SENTENCE.search(title)) or len(extra) > limit


def without_photo_of(title: str) -> str:
    """Strip an opening such as "a photo of" from a title, unless nothing would be left."""
    opening = PHOTO_OF.match(title)
    subject = trimmed(title[opening.end() :]) if opening else ""
    return without_photo_of(subject) if subject else title


@cache
def entries(file: str, section: str = "") -> frozenset[str]:
    """Return a section of a word list, to be compared with `key`, or with `plain` for the ingredients of the pantry."""
    ready = plain if section in ("always", "in bakes", "off bread", "liquids") else key
    found, current = set(), ""
    for line in _lines(file):
        if line.startswith("["):
            current = line.strip("[]")
        elif current == section:
            found |= {ready(entry) for entry in line.split(",") if entry.strip()}
    return frozenset(found)


def _lines(file: str) -> list[str]:
    text = (Path(__file__).parent / "words" / f"{file}.txt").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if not line.startswith("#")]


def _field_by_ending(name: str, whole: bool = False) -> str | None:
    """Return the field of the longest entry that the name ends with; with `whole`, the entry must be the whole name."""
    words = name.split()
    drink, food = _ending_length(name, entries("drinks")), _ending_length(name, entries("foods"))
    if drink != food and (not whole or max(drink, food) == len(words)):
        return "drink_items" if drink > food else "food_items"
    contained = " ".join(words[:-1]) if not whole and words[1:] and words[-1] in CONTAINERS else ""
    return "drink_items" if contained and _field_by_ending(contained) == "drink_items" else None


def _ending_length(name: str, known: frozenset[str]) -> int:
    """Return the number of words of the longest entry that the name ends with, 0 for none."""
    words = name.split()
    return next((len(words) - start for start in range(len(words)) if " ".join(words[start:]) in known), 0)


def _mention(texts: Iterable[str], known: frozenset[str]) -> bool:
    return any(f" {entry} " in f" {key(text)} " for text in texts for entry in known)


def _alike(one: str, other: str) -> bool:
    """Tell whether two words mean the same: burger and cheeseburger, yoghurt and yogurt."""
    short, long = sorted((one, other), key=len)
    if len(short) < 4:
        return one == other
    if long.startswith(short) or long.endswith(short):
        return True
    return one[0] == other[0] and SequenceMatcher(None, one, other).ratio() >= ALIKE


@lru_cache(CACHE)
def _singular(word: str) -> str:
    known = _plurals()
    if word in known:
        return known[word]
    if len(word) < 4 or not word.endswith("s") or word.endswith(("ss", "us", "'s")):  # watercress, hummus, bailey's
        return word
    return _inflect().singular_noun(word) or word


@cache
def _plurals() -> dict[str, str]:
    pairs = [pair.split() for line in _lines("plurals") for pair in line.split(",") if pair.strip()]
    return {plural: singular for singular, plural in pairs} | {singular: singular for singular, _ in pairs}


@cache
def _inflect() -> Any:
    import inflect  # imported here because it takes more than a second

    return inflect.engine()
