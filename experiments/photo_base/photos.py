"""Labeled photographs of a manifest: reading them, splitting them, and the data set that the photo model is trained on.

A manifest is a `manifest.jsonl` with one line an image: `file`, `is_food`, `food_items`, `drink_items`, `label_scope`,
`group`, `source`, `licence`, `licence_class` and, for some drinks, `drink_family`.

    python experiments/photo_base/photos.py PHOTOS OUT

writes the data set to OUT: photographs, collages of them, and drawn scenes. Rerun to resume.
"""

import hashlib
import io
import json
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from threading import Lock
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image, ImageOps
from pydantic import ValidationError
from torchvision.transforms import v2

from foodextract.data.build import build
from foodextract.data.samples import PRIMARY, Rows, Sample
from foodextract.data.sources import scenes
from foodextract.images import open_image
from foodextract.schema import EXHAUSTIVE, FoodRecord, listing

TEST, VALIDATION = 0.09, 0.04  # shares of the groups
RARE = 5  # a name with fewer photographs than this is not learned
COMMON, MOST_VIEWS = 40, 3  # photographs of less common names are shown in up to so many changed views, others in one
RARE_DRINK = 10  # below this, a drink goes by its family
MERGED = {"doughnut": "donut", "carrot eggs": "carrot and egg", "hamburger": "burger"}
FAMILIES = {"cocktail (other)": "cocktail", "other": "drink"}
COLLAGE = "collage"  # the source of collages
SCENE_SEED = 7  # another one than that of the offline data set


@dataclass(frozen=True)
class Photo:
    """One labeled photograph. `split` is "train", "validation" or "test"; `exhaustive`: the lists name all there is."""

    path: Path
    label: dict[str, Any]
    split: str
    group: str
    source: str
    license: str
    license_class: str
    label_scope: str

    @property
    def exhaustive(self) -> bool:
        return self.label_scope == EXHAUSTIVE

    @property
    def items(self) -> list[str]:
        return self.label["food_items"] + self.label["drink_items"]


def read_photos(folder: Path) -> list[Photo]:
    """The photographs of a manifest, in its order.

    Those that say no more than that there is food are left out, and those whose label does not fit into a record.
    """
    lines = (folder / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    drinks = Counter(name for row in rows for name in row["drink_items"])
    stated = [row for row in rows if not row["is_food"] or row["food_items"] + row["drink_items"]]
    return [photo for row in stated if _fits((photo := _photo(folder, row, drinks)).label)]


def _fits(label: dict[str, Any]) -> bool:
    try:
        FoodRecord(**label)
    except ValidationError:
        return False
    return True


def _photo(folder: Path, row: dict[str, Any], drinks: Counter[str]) -> Photo:
    foods = [MERGED.get(name, name) for name in row["food_items"]]
    families = [FAMILIES.get(name, name) for name in row.get("drink_family") or ()]
    if all(drinks[name] >= RARE_DRINK for name in row["drink_items"]) or not families:
        named = row["drink_items"]
    else:
        named = families
    scope = row["label_scope"]
    if not row["is_food"] or (scope.startswith(EXHAUSTIVE) and "for COCO" not in scope):
        scope = EXHAUSTIVE
    elif scope.startswith(PRIMARY):
        scope = PRIMARY
    label = _label(foods, named)
    return Photo(
        folder / row["file"],
        label,
        split_of(row["group"]),
        row["group"],
        row["source"],
        row["licence"],
        row["licence_class"],
        scope,
    )


def _label(foods: Sequence[str], drinks: Sequence[str]) -> dict[str, Any]:
    foods, drinks = sorted(dict.fromkeys(foods)), sorted(dict.fromkeys(drinks))
    title = listing(sorted([*foods, *drinks]))
    return {"is_food": int(bool(title)), "image_title": title, "food_items": foods, "drink_items": drinks}


def split_of(group: str) -> str:
    """The split of a group of photographs. It depends on the name of the group alone."""
    place = int.from_bytes(hashlib.sha256(f"photographs {group}".encode()).digest()[:8]) / 2**64
    return "test" if place < TEST else "validation" if place < TEST + VALIDATION else "train"


def learned_names(photos: Sequence[Photo]) -> Counter[str]:
    """The names that the photographs of the training split show often enough to be learned, with their counts."""
    counts = Counter(name for photo in photos if photo.split == "train" for name in photo.items)
    return Counter({name: count for name, count in counts.items() if count >= RARE})


def samples(photos: Sequence[Photo]) -> Iterator[Sample]:
    """Photographs as a source of `build`. Of the training split, those that show a rare name are left out."""
    names = learned_names(photos)
    for photo in photos:
        if photo.split == "train" and any(name not in names for name in photo.items):
            continue
        yield Sample(
            photo.path.name,
            photo.path.read_bytes,
            photo.label,
            source=photo.source,
            license=f"{photo.license_class}: {photo.license}",
            category=photo.label["image_title"] or "not food",
            group=photo.group,
            split="train" if photo.split == "train" else "test",
            label_scope=photo.label_scope,
        )


def view(least: float) -> v2.Compose:
    """A mirrored, cropped and lit copy that shows at least this share of the image's area."""
    return v2.Compose(
        [
            v2.RandomHorizontalFlip(0.7),
            v2.RandomResizedCrop(224, (least, 1.0), (0.75, 1.33), interpolation=v2.InterpolationMode.BICUBIC),
            v2.ColorJitter(0.25, 0.25, 0.2),
        ]
    )


WIDE, CLOSE = view(0.85), view(0.5)  # a close view may lose one of several items
RANDOM = Lock()  # the transforms draw from torch's global generator, and `build` reads images in threads


def is_derived(row: Mapping[str, Any]) -> bool:
    """Whether a row of the data set is a changed view or a collage of photographs that it holds as well."""
    return row["source"] == COLLAGE or "-view" in row["name"]


def views(photos: Sequence[Photo]) -> Iterator[Sample]:
    """Changed views of the training photographs, more of those whose only item has a name that few others show."""
    names = learned_names(photos)
    for photo in photos:
        if photo.split != "train" or any(name not in names for name in photo.items):
            continue
        rarity = COMMON // names[photo.items[0]] - 1 if len(photo.items) == 1 else 1
        for number in range(min(MOST_VIEWS, max(1, rarity))):
            yield Sample(
                f"{photo.path.stem}-view{number}.jpg",
                partial(_view, photo.path, number, WIDE if len(photo.items) > 1 else CLOSE),
                photo.label,
                source=photo.source,
                license=f"{photo.license_class}: {photo.license}",
                category=photo.label["image_title"] or "not food",
                group=photo.group,
                split="train",
                label_scope=photo.label_scope,
            )


def _view(path: Path, number: int, transform: v2.Compose) -> bytes:
    with RANDOM, torch.random.fork_rng():
        torch.manual_seed(zlib.crc32(f"{path.name} {number}".encode()))
        changed = transform(open_image(path))
    return _jpeg(changed)


def _jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=92)
    return file.getvalue()


def collages(photos: Sequence[Photo], count: int, seed: int = 11) -> Iterator[Sample]:
    """Two or three training photographs side by side: most labels name one item, and an answer is a list of all."""
    names = learned_names(photos)
    train = [photo for photo in photos if photo.split == "train" and all(name in names for name in photo.items)]
    shown = [photo for photo in train if 1 <= len(photo.items) <= 3]
    empty = [photo for photo in train if not photo.items]
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        parts = [shown[index] for index in rng.choice(len(shown), rng.choice([2, 3], p=[0.65, 0.35]), replace=False)]
        if rng.random() < 0.25:
            parts[int(rng.integers(len(parts)))] = empty[int(rng.integers(len(empty)))]
        label = _label(
            *([name for part in parts for name in part.label[field]] for field in ("food_items", "drink_items"))
        )
        yield Sample(
            f"collage-{number:05d}.jpg",
            partial(_collage, [part.path for part in parts], bool(rng.random() < 0.5)),
            label,
            source=COLLAGE,
            license="; ".join(sorted({f"{part.license_class}: {part.license}" for part in parts})),
            category="collage",
            split="train",
            label_scope=PRIMARY,
        )


def _collage(paths: Sequence[Path], upright: bool, edge: int = 336) -> bytes:
    """The images next to each other, each cropped to its cell, as JPEG."""
    canvas = Image.new("RGB", (edge, edge))
    cuts = np.linspace(0, edge, len(paths) + 1).round().astype(int).tolist()
    for path, start, end in zip(paths, cuts, cuts[1:], strict=False):
        size, corner = ((end - start, edge), (start, 0)) if upright else ((edge, end - start), (0, start))
        canvas.paste(ImageOps.fit(open_image(path), size), corner)
    return _jpeg(canvas)


def main(
    folder: Annotated[Path, typer.Argument(help="Folder with `manifest.jsonl`.")],
    out: Annotated[Path, typer.Argument(help="Folder of the data set.")],
    collage_count: Annotated[int, typer.Option(help="Collages of two or three photographs.")] = 2000,
    scene_count: Annotated[int, typer.Option(help="Drawn scenes.")] = 3500,
    changed_views: Annotated[bool, typer.Option("--views/--no-views", help="Changed views of the photographs.")] = True,
) -> None:
    """Build the data set of the photo model: photographs, collages and drawn scenes."""
    photos = read_photos(folder)
    drawn = scenes(SCENE_SEED, scene_count, 0)
    changed = views(photos) if changed_views else ()
    parts = [list(samples(photos)), list(changed), list(collages(photos, collage_count)), list(drawn)]
    report = build(Rows(chain(*parts), total=sum(map(len, parts))), out, policy={"outlier": "flag", "pantry": "flag"})
    kept = {
        key: report[key] for key in ("read", "kept", "rejected", "train", "test", "near_duplicate_groups", "issues")
    }
    print(json.dumps(kept, indent=1))


if __name__ == "__main__":
    typer.run(main)
