"""The columns of a data set that is built or published here."""

import datasets

STRINGS = ("category", "group", "source", "license", "label_scope", "pixels_sha256")
LATER = frozenset({"label_scope"})  # columns that data sets from before they were added lack
FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "name": datasets.Value("string"),
        "is_food": datasets.Value("int8"),
        "image_title": datasets.Value("string"),
        "food_items": datasets.List(datasets.Value("string")),
        "drink_items": datasets.List(datasets.Value("string")),
        **{column: datasets.Value("string") for column in STRINGS},
    }
)
