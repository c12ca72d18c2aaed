"""What a source yields: one `Sample` per image, or a `Reject` with the reason; and the columns of a built data set."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import datasets

from foodextract.data.scenes import Split
from foodextract.schema import EXHAUSTIVE, FoodRecord

PRIMARY = "primary"  # label_scope of a label that names the main item only
NOTHING = {"is_food": 0, "image_title": "", "food_items": [], "drink_items": []}
SPLIT_NAME = re.compile(
    r"(?:(?:images?|imgs?|data|obj|split|set|public|private|my|mini|x|y) ?)?"
    r"(?:(?P<train>train|training|trainval)|val|valid|validation|validate|dev|devel|development|test|testing|tst"
    r"|eval|evaluation|hold ?out|held ?out|unseen|minival)"
    r"(?: ?(?:images?|imgs?|data|split|set|photos?|val|valid|x|y|a|b|c|mini|small|full|final|labels?|annotations?))?"
)
TEXT_COLUMNS = ("category", "group", "source", "license", "label_scope", "pixels_sha256")
FEATURES = datasets.Features(
    {"image": datasets.Image(), "name": datasets.Value("string"), "is_food": datasets.Value("int8")}
    | {"image_title": datasets.Value("string")}
    | {column: datasets.List(datasets.Value("string")) for column in ("food_items", "drink_items")}
    | {column: datasets.Value("string") for column in TEXT_COLUMNS}
)


class DatasetError(ValueError):
    """A data set that cannot be built or read; the message names it and the remedy."""


@dataclass(frozen=True)
class Sample:
    """One labeled image of a source.

    `read` returns the bytes of the image file, `label` holds the values of a record as found. `split` is set only where
    the source states it. `label_scope` is "exhaustive", or another word ("primary") where the label may lack items.
    """

    name: str
    read: Callable[[], bytes]
    label: dict[str, Any]
    source: str
    license: str
    category: str = ""
    group: str = ""
    split: Split | None = None
    label_scope: str = EXHAUSTIVE


@dataclass(frozen=True)
class Reject:
    """A row that cannot be used."""

    name: str
    reason: str


@dataclass
class Rows(Iterable[Sample | Reject]):
    """The rows of a source. `total` is their number, None where it is unknown; progress bars show it."""

    rows: Iterable[Sample | Reject]
    total: int | None = None

    def __iter__(self) -> Iterator[Sample | Reject]:
        return iter(self.rows)


def normalize_split(name: object) -> Split | None:
    """Map the name of a split to "train", or to "test" for any other; None where no split is stated."""
    stated = str(name if name is not None else "").strip().lower()
    if stated in ("", "nan", "none", "null", "n/a", "na", "-"):
        return None
    return "train" if split_named(stated) == "train" else "test"


def split_named(name: str) -> Split | None:
    """Return the split that a usual name means ("train2017", "Valid", "test_images"); None for any other name."""
    found = SPLIT_NAME.fullmatch(" ".join(re.sub(r"[\W\d_]+", " ", name.lower()).split()))
    return ("train" if found["train"] else "test") if found else None


def readable(text: str) -> str:
    """Return a text that UTF-8 can write. Bytes of a file name in another encoding are read as cp1252."""
    return re.sub("[\ud800-\udfff]", _replaced, text)


def _replaced(half: re.Match[str]) -> str:
    code = ord(half[0])
    return bytes([code & 0xFF]).decode("cp1252", "replace") if 0xDC80 <= code <= 0xDCFF else "\ufffd"


def label_of(row: dict[str, Any]) -> dict[str, Any]:
    """Return the four keys of a record from a row, with their values as they are."""
    return {key: row[key] for key in FoodRecord.model_fields}
