"""What more photographs are worth, and what those without a permissive license add.

    python benchmarks/photo_subsets.py FOLDER    # a folder with a manifest, see experiments/photo_base/photos.py

writes results/photo_subsets.json. Training the language model on each part would take half an hour a part. Instead, the
nearest training photograph and a linear probe answer, on the features of the photo model's tower, with parts of the
training photographs: what they gain from more photographs is what the tower can tell apart. A part is made of whole
groups. Recall is that of the same names for all parts. The features are shared with photographs.py, and kept.
"""

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from foodextract.evaluation import evaluate
from foodextract.evaluation.results import Row, make_row, write_results
from foodextract.inference.extractor import Extractor
from foodextract.models import loading
from foodextract.reporting.tables import metric_table
from photographs import KNOWN, ROOT, Features, Photo, labels_of, learned_names, linear_probe, nearest, read_photos

SIZES = (1700, 5000)
METRICS = ("is_food_accuracy", "hallucination_rate")


def parts(photos: Sequence[Photo]) -> dict[str, list[Photo]]:
    """Training photographs by the name of their part. A larger part holds the smaller ones."""
    permissive = [photo for photo in photos if photo.license_class == "permissive"]
    alike = f"{len(permissive):,} photographs"
    found = {f"{size:,} photographs": whole_groups(photos, size) for size in SIZES}
    found |= {f"{alike}, all sources": whole_groups(photos, len(permissive)), f"{alike}, permissive": permissive}
    return found | {f"{len(photos):,} photographs": list(photos)}


def whole_groups(photos: Sequence[Photo], most: int) -> list[Photo]:
    """The photographs of as many whole groups as hold `most` of them, in an order that does not change."""
    ordered = sorted(photos, key=lambda photo: hashlib.sha256(f"part {photo.group}".encode()).digest())
    count = most
    while 0 < count < len(ordered) and ordered[count].group == ordered[count - 1].group:
        count += 1
    return ordered[:count]


def main(
    folder: Annotated[Path, typer.Argument(help="Folder with `manifest.jsonl`.")],
    model: Annotated[Path, typer.Option(help="The photo model, for its vision tower.")] = loading.PHOTO,
    features: Annotated[Path, typer.Option(help="File that keeps the features.")] = ROOT / "outputs/photo/features.npz",
    out: Annotated[Path, typer.Option(help="The results file.")] = ROOT / "results" / "photo_subsets.json",
) -> None:
    """Score what can be learned from parts of the photographs."""
    command = " ".join(["python benchmarks/photo_subsets.py FOLDER", *sys.argv[2:]])
    photos = read_photos(folder)
    train, test = ([photo for photo in photos if photo.split == split] for split in ("train", "test"))
    known = {name for name, count in learned_names(photos).items() if count >= KNOWN}
    seen = Features(Extractor.from_pretrained(model, "cpu"), features)
    asked = seen.of(test)
    labels, scopes = labels_of(test)
    rows: list[Row] = []
    for name, part in parts(train).items():
        trained = seen.of(part)
        answers = {"nearest": nearest(part, trained, asked), "linear probe": linear_probe(part, trained, asked)}
        for subject, texts in answers.items():
            metrics = [metric for metric in evaluate.score(labels, texts, scopes) if metric.name in METRICS]
            metrics += [recall] if (recall := evaluate.known_item_recall(labels, texts, known)) else []
            rows += evaluate.to_rows("photo_subsets", f"{subject} | {name}", metrics, command)
        rows.append(make_row("photo_subsets", name, "photographs", len(part), unit="images", n=1, command=command))
        write_results(out, rows)
    print(metric_table([row for row in rows if row.low is not None]))


if __name__ == "__main__":
    typer.run(main)
