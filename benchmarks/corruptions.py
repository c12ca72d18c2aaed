"""Corrupt samples on purpose: changed copies of images and faulty labels, to measure how many are found.

Notebook 00 shows the result, because drawn scenes have neither copies nor faults of their own.
"""

import copy
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from foodextract.data import scenes
from foodextract.data.samples import Reject, Rows, Sample
from foodextract.images import open_image
from foodextract.schema import FIELDS

COPY = "-copy.png"  # suffix of the name of a copy
Raw = dict[str, Any]  # the four keys of a record
ImageCorruption = Callable[[Image.Image, np.random.Generator], Image.Image]
LabelCorruption = Callable[[np.random.Generator, Raw, str], str | None]


def resized(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Scale to 30 to 90 % of width and height."""
    share = rng.uniform(0.3, 0.9)
    return image.resize([max(1, round(edge * share)) for edge in image.size], Image.Resampling.BICUBIC)


def recompressed(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Save as a JPEG of quality 20 to 69."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=int(rng.integers(20, 70)))
    return open_image(file.getvalue())


def mirrored(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Exchange left and right."""
    return ImageOps.mirror(image)


def cropped(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Cut 5 % of width and height, from random sides."""
    width, height = (round(0.95 * edge) for edge in image.size)
    left, top = int(rng.integers(0, image.width - width + 1)), int(rng.integers(0, image.height - height + 1))
    return image.crop((left, top, left + width, top + height))


IMAGE_CORRUPTIONS: tuple[ImageCorruption, ...] = (resized, recompressed, mirrored, cropped)

# A label corruption changes a label of a class in place. It returns the name that the issue must concern ("" for none),
# or None for a label that cannot have the fault.

SENTENCES = (
    "This is a plate of {}.",
    "A photo of {}",
    "The image shows {} on a wooden table",
    "There is {} in this picture.",
    "A close-up of {} with a blurred background",
    "Somebody is about to enjoy {} at home",
)
PANTRY = [
    "flour", "wheat flour", "baking powder", "baking soda", "vanilla extract", "granulated sugar", "yeast",
    "corn starch", "vegetable oil",
]  # fmt: skip
IRREGULAR = {
    "potato": "potatoes",
    "tomato": "tomatoes",
    "mango": "mangoes",
    "cherries": "cherry",
    "blueberries": "blueberry",
}


def _spelling(rng: np.random.Generator, raw: Raw, category: str) -> str | None:
    field, name = _pick(rng, raw)
    forms = (name.upper(), name.title(), name.replace(" ", "_"), f" {name}", f"{name}.", f'"{name}"', f"_{name}")
    broken = forms[rng.integers(7)]
    raw[field][raw[field].index(name)] = broken
    return broken if broken != name else None


def _duplicate(rng: np.random.Generator, raw: Raw, category: str) -> str | None:
    field, name = _pick(rng, raw)
    raw[field].insert(rng.integers(len(raw[field]) + 1), name)
    return name


def _plural_twin(rng: np.random.Generator, raw: Raw, category: str) -> str | None:
    field, name = _pick(rng, raw)
    twin = _other_number(name)
    if name.endswith(("ss", "us")) or twin == "strawberrys":
        return None
    raw[field].insert(rng.integers(len(raw[field]) + 1), twin)
    return twin


def _other_number(name: str) -> str:
    if name.endswith(("sh", "ch", "x")):
        return name + "es"
    if name.endswith("fries"):
        return "fry".join(name.rsplit("fries", 1))
    if name in IRREGULAR:
        return IRREGULAR[name]
    if name.endswith("s"):
        return name[:-1]
    return name.removesuffix("y") + "ies" if name[-2:] in ("ry", "dy") else name + "s"


def _wrong_field(rng: np.random.Generator, raw: Raw, category: str) -> str | None:
    field, name = _pick(rng, raw)
    raw[field].remove(name)
    raw["drink_items" if field == "food_items" else "food_items"].append(name)
    return name


def _sentence(rng: np.random.Generator, raw: Raw, category: str) -> str | None:
    raw["image_title"] = SENTENCES[rng.integers(len(SENTENCES))].format(raw["image_title"])
    return ""


def _pantry(rng: np.random.Generator, raw: Raw, category: str) -> str | None:
    name = str(rng.choice(PANTRY))
    raw["food_items"].insert(rng.integers(len(raw["food_items"]) + 1), name)
    return name


def _contradiction(rng: np.random.Generator, raw: Raw, category: str) -> str | None:
    raw.update({"is_food": 0} if rng.random() < 0.5 else {"food_items": [], "drink_items": []})
    return ""


def _long_list(rng: np.random.Generator, raw: Raw, category: str) -> str | None:
    names = rng.permutation([*scenes.FOODS])[: rng.integers(10, 25)].tolist()
    raw["food_items"] += [name for name in names if name not in raw["food_items"]]
    return ""


def _pick(rng: np.random.Generator, raw: Raw) -> tuple[str, str]:
    field = str(rng.choice([field for field in FIELDS if raw[field]]))
    return field, str(rng.choice(raw[field]))


LABEL_CORRUPTIONS: dict[str, tuple[LabelCorruption, set[str]]] = {  # kind: corruption, rules that count as finding it
    "spelling": (_spelling, {"underscore", "casing", "punctuation"}),
    "duplicate": (_duplicate, {"duplicate"}),
    "plural twin": (_plural_twin, {"plural_twin"}),
    "wrong field": (_wrong_field, {"wrong_field"}),
    "sentence title": (_sentence, {"sentence_title", "photo_of"}),
    "pantry": (_pantry, {"pantry"}),
    "contradiction": (_contradiction, {"contradiction", "empty"}),
    "long list": (_long_list, {"long_list"}),
}


def corrupted(
    samples: Rows, every: int = 10, seed: int = 0, log: list[tuple[str, str]] | None = None
) -> Iterator[Sample | Reject]:
    """Yield the samples with a changed copy after every `every`-th and a faulty label in another, each kind in turn.

    A copy is called `NAME-copy.png` and keeps the split of its original. `log` receives the kind of each corruption and
    the name of its sample; see `count_found`.
    """
    rng, log = np.random.default_rng(seed), [] if log is None else log
    labels, images = cycle(LABEL_CORRUPTIONS), cycle(IMAGE_CORRUPTIONS)
    label_kind = next(labels)
    for number, sample in enumerate(samples):
        if isinstance(sample, Sample) and number % every == every // 2 and sample.label["is_food"]:
            label = copy.deepcopy(sample.label)
            if LABEL_CORRUPTIONS[label_kind][0](rng, label, sample.category) is not None:
                sample = replace(sample, label=label)
                log.append((label_kind, sample.name))
                label_kind = next(labels)
        yield sample
        if isinstance(sample, Sample) and number % every == 0:
            change = next(images)
            read = partial(_changed, sample, change, int(rng.integers(2**31)))
            yield replace(sample, name=f"{sample.name}{COPY}", read=read)
            log.append((f"{change.__name__} copy", f"{sample.name}{COPY}"))


def count_found(log: list[tuple[str, str]], folder: Path) -> list[tuple[str, int, int]]:
    """Return kind, number and number found of the corruptions in `log`, for the dataset built in `folder`.

    A label corruption is found by an issue of one of its rules. A copy is found in one group with its original, or when
    it is rejected as a duplicate.
    """

    def rows(name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]

    issues = {(issue["name"], issue["rule"]) for issue in rows("issues")}
    groups = [set(group["names"]) for group in rows("near_duplicates")]
    duplicates = {reject["name"] for reject in rows("rejects") if "duplicate" in reject["reason"]}
    kinds = [*LABEL_CORRUPTIONS, *(f"{change.__name__} copy" for change in IMAGE_CORRUPTIONS)]
    number, found = Counter(kind for kind, _ in log), Counter[str]()
    for kind, name in log:
        if kind in LABEL_CORRUPTIONS:
            found[kind] += any((name, rule) in issues for rule in LABEL_CORRUPTIONS[kind][1])
        else:
            found[kind] += name in duplicates or any({name, name.removesuffix(COPY)} <= group for group in groups)
    return [(kind, number[kind], found[kind]) for kind in kinds]


def _changed(sample: Sample, change: ImageCorruption, seed: int) -> bytes:
    png = io.BytesIO()
    change(open_image(sample.read()), np.random.default_rng(seed)).save(png, "PNG", compress_level=1)
    return png.getvalue()
