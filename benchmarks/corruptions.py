"""Planting what the checks must find, into rows that are right by construction: copies of images, and faults of labels.

The benchmarks count how many are found again; notebook 00 shows them, because drawn scenes have neither copies nor faults of their own.
"""

import copy
import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from foodextract.data import scenes
from foodextract.data.samples import Reject, Rows, Sample
from foodextract.images import open_image

Raw = dict[str, Any]  # the four keys of a record

# ------------------------------------------------------------------------------------------------------------------------------- images


def resized(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """30 to 90 % of width and height."""
    share = rng.uniform(0.3, 0.9)
    return image.resize([max(1, round(edge * share)) for edge in image.size], Image.Resampling.BICUBIC)


def recompressed(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Through a JPEG of quality 20 to 69."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=int(rng.integers(20, 70)))
    return open_image(file.getvalue())


def mirrored(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Left and right exchanged."""
    return ImageOps.mirror(image)


def cropped(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """5 % of width and height gone, from either side."""
    width, height = (round(0.95 * edge) for edge in image.size)
    left, top = int(rng.integers(0, image.width - width + 1)), int(rng.integers(0, image.height - height + 1))
    return image.crop((left, top, left + width, top + height))


CHANGES: tuple[Callable[[Image.Image, np.random.Generator], Image.Image], ...] = (
    resized,
    recompressed,
    mirrored,
    cropped,
)

# --------------------------------------------------------------------------------------------------------------------------------- labels
# Each function plants one fault into a copy of a label of some class that shows food, and returns the name that the finding must be about
# ("" for none), or None where this label cannot have the fault.

SENTENCES = (
    "This is a plate of {}.",
    "A photo of {}",
    "The image shows {} on a wooden table",
    "There is {} in this picture.",
    "A close-up of {} with a blurred background",
    "Somebody is about to enjoy {} at home",
)
PANTRY = (
    "flour",
    "wheat flour",
    "baking powder",
    "baking soda",
    "vanilla extract",
    "granulated sugar",
    "yeast",
    "corn starch",
    "vegetable oil",
)


def _spelling(rng: np.random.Generator, raw: Raw, category: str) -> str | None:
    shelf, name = _pick(rng, raw)
    broken = [name.upper(), name.title(), name.replace(" ", "_"), f" {name}", f"{name}.", f'"{name}"', f"_{name}"][
        rng.integers(7)
    ]
    raw[shelf][raw[shelf].index(name)] = broken
    return broken if broken != name else None


def _duplicate(rng: np.random.Generator, raw: Raw, category: str) -> str | None:
    shelf, name = _pick(rng, raw)
    raw[shelf].insert(rng.integers(len(raw[shelf]) + 1), name)
    return name


def _plural_twin(rng: np.random.Generator, raw: Raw, category: str) -> str | None:
    shelf, name = _pick(rng, raw)
    twin = (
        name[:-1] if name.endswith("s") else name.removesuffix("y") + "ies" if name[-2:] in ("ry", "dy") else name + "s"
    )
    twin = {
        "potato": "potatoes",
        "tomato": "tomatoes",
        "mango": "mangoes",
        "cherries": "cherry",
        "blueberries": "blueberry",
    }.get(name, twin)
    twin = (
        name + "es"
        if name.endswith(("sh", "ch", "x"))
        else "fry".join(name.rsplit("fries", 1))
        if name.endswith("fries")
        else twin
    )
    if name.endswith(("ss", "us")) or twin == "strawberrys":
        return None
    raw[shelf].insert(rng.integers(len(raw[shelf]) + 1), twin)
    return twin


def _wrong_shelf(rng: np.random.Generator, raw: Raw, category: str) -> str | None:
    shelf, name = _pick(rng, raw)
    raw[shelf].remove(name)
    raw["drink_items" if shelf == "food_items" else "food_items"].append(name)
    return name


def _sentence(rng: np.random.Generator, raw: Raw, category: str) -> str | None:
    raw["image_title"] = SENTENCES[rng.integers(len(SENTENCES))].format(raw["image_title"])
    return ""


def _pantry(rng: np.random.Generator, raw: Raw, category: str) -> str | None:
    name = str(rng.choice(PANTRY))
    raw["food_items"].insert(rng.integers(len(raw["food_items"]) + 1), name)
    return name


def _contradiction(rng: np.random.Generator, raw: Raw, category: str) -> str | None:
    if rng.random() < 0.5:
        raw["is_food"] = 0
    else:
        raw["food_items"], raw["drink_items"] = [], []
    return ""


def _long_list(rng: np.random.Generator, raw: Raw, category: str) -> str | None:
    names = rng.permutation([*scenes.FOODS])[: rng.integers(10, 25)].tolist()
    raw["food_items"] += [name for name in names if name not in raw["food_items"]]
    return ""


def _pick(rng: np.random.Generator, raw: Raw) -> tuple[str, str]:
    shelf = str(rng.choice([shelf for shelf in ("food_items", "drink_items") if raw[shelf]]))
    return shelf, str(rng.choice(raw[shelf]))


FAULTS: dict[
    str, tuple[Callable[[np.random.Generator, Raw], str | None], set[str]]
] = {  # kind: how it is planted, the rules that may find it
    "spelling": (_spelling, {"underscore", "casing", "punctuation"}),
    "duplicate": (_duplicate, {"duplicate"}),
    "plural twin": (_plural_twin, {"plural_twin"}),
    "wrong shelf": (_wrong_shelf, {"wrong_shelf"}),
    "sentence title": (_sentence, {"sentence_title", "photo_of"}),
    "pantry": (_pantry, {"pantry"}),
    "contradiction": (_contradiction, {"contradiction", "empty"}),
    "long list": (_long_list, {"long_list"}),
}

# -------------------------------------------------------------------------------------------------------------------------------- samples


def planted(samples: Rows, every: int = 10, seed: int = 0) -> Iterator[Sample | Reject]:
    """The samples, with a changed copy beside every `every`-th and a fault in the label of another, each kind in turn.

    A copy is called `NAME-copy.png` and stays on its original's side of the split.
    """
    rng, copies, faults = np.random.default_rng(seed), 0, 0
    kinds = [plant for plant, _ in FAULTS.values()]
    for number, sample in enumerate(samples):
        if isinstance(sample, Sample) and number % every == every // 2 and sample.label["is_food"]:
            label = copy.deepcopy(sample.label)
            if kinds[faults % len(kinds)](rng, label, sample.category) is not None:
                sample, faults = replace(sample, label=label), faults + 1
        yield sample
        if isinstance(sample, Sample) and number % every == 0:
            change = CHANGES[copies % len(CHANGES)]
            yield replace(
                sample, name=f"{sample.name}-copy.png", read=partial(_changed, sample, change, int(rng.integers(2**31)))
            )
            copies += 1


def _changed(sample: Sample, change: Callable[[Image.Image, np.random.Generator], Image.Image], seed: int) -> bytes:
    png = io.BytesIO()
    change(open_image(sample.read()), np.random.default_rng(seed)).save(png, "PNG", compress_level=1)
    return png.getvalue()
