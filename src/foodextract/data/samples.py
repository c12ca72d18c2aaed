"""What a source hands over: one `Sample` an image, or a `Reject` where it cannot."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from foodextract.data.scenes import Split
from foodextract.schema import EXHAUSTIVE

PRIMARY = "primary"  # the scope of a label that names the main item only
METADATA = ("metadata.jsonl", "metadata.csv")  # where a folder keeps its labels
NOTHING = {"is_food": 0, "image_title": "", "food_items": [], "drink_items": []}


class DatasetError(ValueError):
    """A data set that cannot be built or read; the message names the place and the remedy."""


@dataclass(frozen=True)
class Sample:
    """One labeled image on its way into a data set. `split` is set only where the source fixes it.

    `label_scope` says what the label names: everything ("exhaustive"), or for example only the main item ("primary").
    """

    name: str
    read: Callable[[], bytes]
    label: dict[str, Any]  # the four keys of a record, with their values as found
    source: str
    license: str
    category: str = ""
    group: str = ""
    split: Split | None = None
    label_scope: str = EXHAUSTIVE


@dataclass(frozen=True)
class Reject:
    """One row that was read and not kept."""

    name: str
    reason: str


@dataclass
class Rows(Iterator[Sample | Reject]):
    """The rows of a source, and how many there will be: `total` is for progress bars, and None where a source cannot know."""

    rows: Iterable[Sample | Reject]
    total: int | None = None

    def __post_init__(self) -> None:
        self.rows = iter(self.rows)

    def __next__(self) -> Sample | Reject:
        return next(self.rows)


def split_named(name: object) -> Split | None:
    """The side of a split that a source states: "train" is trained on, any other split never is, and nothing stated is None."""
    stated = str(name if name is not None else "").strip().lower()
    return ("train" if stated in ("train", "training") else "test") if stated else None
