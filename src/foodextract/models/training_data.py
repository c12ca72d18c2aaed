"""What a model was trained on: `training_data.json` beside its weights.

A model names what it has seen named, so every way to ask it says what that was.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from huggingface_hub import hf_hub_download

FILE = "training_data.json"
DRAWN = "scenes"  # the source of drawn scenes
KNOWN = 10  # images of a name from which a model is said to know it


@dataclass(frozen=True)
class TrainingData:
    """The number of training images, of drawings among them, and of images by the name of a food or a drink."""

    images: int
    drawings: int
    food_items: dict[str, int]
    drink_items: dict[str, int]

    @classmethod
    def of(cls, rows: Iterable[Mapping[str, Any]]) -> Self:
        """Count rows with the columns of a built data set."""
        foods: Counter[str] = Counter()
        drinks: Counter[str] = Counter()
        images = drawings = 0
        for row in rows:
            images, drawings = images + 1, drawings + (row.get("source") == DRAWN)
            foods.update(row["food_items"])
            drinks.update(row["drink_items"])
        return cls(images, drawings, dict(foods.most_common()), dict(drinks.most_common()))

    @classmethod
    def find(cls, model_id: str | os.PathLike[str]) -> Self | None:
        """The training data of a model in a folder or on the Hub, None where it is not stated."""
        try:
            path = Path(model_id) / FILE if Path(model_id).is_dir() else hf_hub_download(str(model_id), FILE)
            return cls(**json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def write(self, folder: Path) -> None:
        (folder / FILE).write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")

    @property
    def drawings_only(self) -> bool:
        return self.images > 0 and self.drawings == self.images

    @property
    def all_names(self) -> set[str]:
        """Every name in the training labels, however rare."""
        return {*self.food_items, *self.drink_items}

    @property
    def names(self) -> list[str]:
        """The foods and drinks that the model knows, in alphabetical order."""
        counts = Counter(self.food_items) + Counter(self.drink_items)
        return sorted(name for name, count in counts.items() if count >= KNOWN)

    def describe(self) -> str:
        """One sentence for the user of the model."""
        if self.drawings_only:
            return f"trained on {self.drawings:,} drawings: it has never seen a photograph, so do not trust it on one"
        drawn = f", {self.drawings:,} of them drawings" if self.drawings else ""
        known = f"knows {len(self.names)} foods and drinks, and calls any other by the nearest of their names"
        return f"trained on {self.images:,} images{drawn}; it {known}"


def copy(model_id: str | os.PathLike[str], out: Path) -> None:
    """Write the training data of a model, where it states it, into the folder of an export."""
    if data := TrainingData.find(model_id):
        data.write(out)
