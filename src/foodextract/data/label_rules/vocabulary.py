"""What names and titles mean: which are the same but for number or spelling, which are drinks, which no image shows, which are sentences.

The knowledge is in the text files beside this one; they are meant to be edited, and each says at its top how it is read.
"""

import re
import unicodedata
from collections.abc import Iterable
from difflib import SequenceMatcher
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal

Shelf = Literal["food_items", "drink_items"]

# what follows is no part of the name
CUT = re.compile(r"[,;:]| (?:with|without|in|on|from|over|for|al|alla|au|a la|en|topped|served|made) ")
AND = re.compile(r" (?:and|&|n|plus) ")
CONTAINERS = frozenset(("bottle", "box", "can", "carton", "cup", "glass", "jug", "mug", "pint", "pitcher", "pot"))
PHOTO_OF = re.compile(
    r"^(?:(?:an?|the|this|my) )?(?:[\w-]+ ){0,2}?(?:close[- ]?up|photo\w*|picture|image|snapshot|view)(?: shot)?"
    r" (?:of|showing)(?: an?| the| some)?\b(?=.)"
)
SENTENCE = re.compile(
    r"^(?:this|these|that|those|there|here|it|its|i|we|he|she|you (?:can|see)|my|our|someone|people|what|look|the (?:image|picture))\b"
    r"|\b(?:is|are|was|were|has|have|had|will|would|should|could|shows?|depicts?|contains?|consists?|displays?|appears?|looks?|tastes?)\b"
    r"|\b(?:sits?|lies|rests|stands|goes|comes|makes|serves|shown|seen|placed|arranged|featured|sitting|resting|lying|holding|eating)\b"
    r"|\b(?:featuring|enjoy\w*|they|we)\b"
    r"|\b(?:on|in|at|from|against|beside|near|over|under|with|to|of) (?:an?|the|my|some|top of an?|top of the)\b(?: [\w-]+)?"
    r" (?:table\w*|plate|platter|background|counter\w*|tray|board|surface|kitchen|restaurant|napkin|cloth)\b"
)
ARTICLES = frozenset(("a", "an", "the", "this", "my", "our", "his", "her", "their", "your"))
MAX_EXTRA, MAX_EXTRA_WITH_ARTICLE = 8, 5  # title words that name no item: more make a sentence
ALIKE = 0.75  # of two spellings of one word, as difflib measures it: idli and idly
ENDS = " \t.,;:!?\"'`´*•·-–—_/\\|~#+=<>[]{}“”‘’«»…"  # no name begins or ends with them
CACHE = 65536  # names; a vocabulary, not a data set


@lru_cache(CACHE)
def plain(text: str) -> str:
    """Lower case without accents, hyphens, underscores, brackets and what is inside them: for comparing, never for writing."""
    text = "".join(mark for mark in unicodedata.normalize("NFKD", text.lower()) if not unicodedata.combining(mark))
    return " ".join(re.sub(r"[^\w\s&',;:%]|_", " ", re.sub(r"\([^)]*\)", " ", text)).split())


@lru_cache(CACHE)
def stems(text: str) -> tuple[str, ...]:
    """The words of a text, each in the singular."""
    return tuple(_singular(word) for word in re.sub("[,;:]", " ", plain(text)).split())


def key(name: str) -> str:
    """The same text for all names that differ in number or spelling only: "Fried eggs" and "fried-egg"."""
    return " ".join(stems(name)) or name


def trimmed(text: str) -> str:
    """NFC, single spaces, no invisible characters, and no marks at the ends."""
    text = unicodedata.normalize("NFC", "".join(mark for mark in text if mark.isprintable() or mark.isspace()))
    if text.count("(") != text.count(")"):
        text = text.replace("(", " ").replace(")", " ")
    return " ".join(text.split()).strip(ENDS)


@lru_cache(CACHE)
def shelf_of(name: str) -> Shelf | None:
    """Which list an item belongs to; None for names that the word lists do not know, or that are both ("cookies and milk").

    The last words of a name say what it is, but not of a proper name: "The Swedish Tart" is a drink.
    """
    if shelf := _shelf_by_end(key(name), whole=True):
        return shelf
    if plain(name).startswith("the "):
        return None
    shelves = {_shelf_by_end(key(part)) for part in AND.split(CUT.split(plain(name))[0])}
    return shelves.pop() if len(shelves) == 1 else None


def is_hidden(item: str, beside: Iterable[str]) -> bool:
    """Whether a food is an ingredient that cannot be seen in a dish; `beside` are the other names of the image, title and class too."""
    name = plain(item)
    always = _end(name, entries("pantry", "always"))
    if always and always >= max(
        _end(key(item), entries("foods")), _end(key(item), entries("drinks"))
    ):  # "bell pepper", "dr pepper"
        return True
    if name in entries("pantry", "in bakes") and _speak_of(beside, entries("pantry", "bakes")):
        return True
    return name in entries("pantry", "off bread") and not _speak_of(beside, entries("pantry", "bread"))


def is_cooking_liquid(item: str) -> bool:
    """Whether it is a drink that dishes are cooked with."""
    return plain(item) in entries("pantry", "liquids")


@lru_cache(CACHE)
def content(text: str) -> frozenset[str]:
    """The words that say which food it is, each in the singular: without "fresh", "plate" and the like."""
    return frozenset(stems(text)) - entries("generic")


def holds(title: str, name: str) -> bool:
    """Whether the title has this name as it is written: no plural for a singular."""
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", title) is not None


def share_a_word(title: str, names: list[str]) -> bool:
    """Whether a title speaks of any of these names; true also for one that says nothing in particular, such as "breakfast"."""
    known = frozenset().union(*map(content, names)) | {"".join(stems(name)) for name in names}  # "hotdog" is "hot dog"
    return not content(title) or any(
        _alike(one, other) for one in {*content(title), "".join(stems(title))} for other in known
    )


def is_sentence(title: str, names: list[str]) -> bool:
    """Whether a title tells a story. The words of `names` do not count: a list of four items is no sentence."""
    known = set(stems(" ".join(names)))
    extra = [word for word in stems(title) if word not in known]
    return (
        bool(SENTENCE.search(title))
        or len(extra) > MAX_EXTRA
        or (len(extra) > MAX_EXTRA_WITH_ARTICLE and not ARTICLES.isdisjoint(extra))
    )


def without_photo_of(title: str) -> str:
    """The title without a beginning such as "a photo of"; a title that is nothing else stays."""
    opening = PHOTO_OF.match(title)
    subject = trimmed(title[opening.end() :]) if opening else ""
    return without_photo_of(subject) if subject else title


@cache
def entries(file: str, section: str = "") -> frozenset[str]:
    """A section of a word list, ready to compare with `key` (the sections of the pantry that name ingredients: with `plain`)."""
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


def _shelf_by_end(name: str, whole: bool = False) -> Shelf | None:
    words = name.split()
    drink, food = _end(name, entries("drinks")), _end(name, entries("foods"))
    if drink != food and (not whole or max(drink, food) == len(words)):
        return "drink_items" if drink > food else "food_items"
    if (
        not whole
        and len(words) > 1
        and words[-1] in CONTAINERS
        and _shelf_by_end(" ".join(words[:-1])) == "drink_items"
    ):
        return "drink_items"
    return None


def _end(name: str, known: frozenset[str]) -> int:
    """How many words the longest entry has that the name ends with, 0 for none."""
    words = name.split()
    return next((len(words) - start for start in range(len(words)) if " ".join(words[start:]) in known), 0)


def _speak_of(texts: Iterable[str], known: frozenset[str]) -> bool:
    return any(f" {entry} " in f" {key(text)} " for text in texts for entry in known)


def _alike(one: str, other: str) -> bool:
    """Whether two words mean the same thing: burger and cheeseburger, yoghurt and yogurt."""
    short, long = sorted((one, other), key=len)
    if len(short) < 4:
        return one == other
    return (
        long.startswith(short)
        or long.endswith(short)
        or (one[0] == other[0] and SequenceMatcher(None, one, other).ratio() >= ALIKE)
    )


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
    import inflect  # here and not above, for importing it takes more than a second

    return inflect.engine()
