"""What a source hands over: one `Sample` a picture, or a `Reject` where it cannot."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from foodextract.scenes import Split
from foodextract.schema import EXHAUSTIVE

METADATA = ("metadata.jsonl", "metadata.csv")  # where a folder keeps its labels
NOTHING = {"is_food": 0, "image_title": "", "food_items": [], "drink_items": []}


class DatasetError(ValueError):
    """A data set that cannot be built or read; the message names the place and the remedy."""


@dataclass(frozen=True)
class Sample:
    """One labelled picture on its way into a data set. `split` is set only where the source fixes it.

    `label_scope` says what the label names: everything ("exhaustive"), or for example only the main item ("primary").
    """

    name: str
    read: Callable[[], bytes]
    label: dict[str, Any]  # the four keys of a record, as found
    source: str
    licence: str
    category: str = ""
    group: str = ""
    split: Split | None = None
    label_scope: str = EXHAUSTIVE


@dataclass(frozen=True)
class Reject:
    """One row that was read and not kept."""

    name: str
    reason: str


Rows = Iterator[Sample | Reject]
