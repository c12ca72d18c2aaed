"""What a model was trained on: `training_data.json` beside its weights.

A model names what it has seen named, so every way to ask it says what that was.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from foodextract.models.beside_weights import BesideWeights

DRAWN = "scenes"  # the source of drawn scenes
KNOWN = 10  # images of a name from which a model is said to know it


@dataclass(frozen=True)
class TrainingData(BesideWeights):
    """The number of training images, of drawings among them, and of images by the name of a food or a drink."""

    FILE: ClassVar[str] = "training_data.json"

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

    @property
    def drawings_only(self) -> bool:
        return self.images > 0 and self.drawings == self.images

    @property
    def all_names(self) -> set[str]:
        """Every name in the training labels, however rare."""
        return {*self.food_items, *self.drink_items}

    @property
    def names(self) -> list[str]:
        """The names of foods and drinks that the model knows, in alphabetical order."""
        counts = Counter(self.food_items) + Counter(self.drink_items)
        return sorted(name for name, count in counts.items() if count >= KNOWN)

    def describe(self) -> str:
        """One sentence for the user of the model."""
        if self.drawings_only:
            return f"trained on {self.drawings:,} drawings: it has never seen a photograph, so do not trust it on one"
        drawn = f", {self.drawings:,} of them drawings" if self.drawings else ""
        known = f"knows {len(self.names)} names of foods and drinks, and gives anything else the closest of them"
        return f"trained on {self.images:,} images{drawn}; it {known}"
