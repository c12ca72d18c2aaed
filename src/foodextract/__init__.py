"""FoodExtract Vision: a small vision-language model that answers any picture with one line of strict JSON."""

__version__ = "0.1.0"
