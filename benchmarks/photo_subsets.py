"""What more photographs are worth, and what those without a permissive license add: train on parts, score each.

    python benchmarks/photo_subsets.py PHOTOS OUT

reads the data set, the features and the base in OUT (see experiments/photo_base/README.md), trains a base and stage 1
from scratch on each part with equally many steps, answers the held-out photographs, and writes
results/photo_subsets.json. Every part has all drawn scenes and no collages. Rerun to resume.
"""

import hashlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import datasets
import torch
import typer

from foodextract.data.dataset import load, record_of
from foodextract.evaluation import evaluate
from foodextract.evaluation.results import Row, make_row, read_results, write_results
from foodextract.inference.extractor import Extractor
from foodextract.models.loading import load_model, load_processor
from foodextract.models.training_data import DRAWN
from foodextract.schema import EXHAUSTIVE, FoodRecord
from foodextract.training import cache
from foodextract.training.config import PROFILES
from foodextract.training.run import train_stage
from photographs import KNOWN, ROOT

sys.path.append(str(ROOT / "experiments" / "photo_base"))
import make_base
from photos import COLLAGE, Photo, is_derived, learned_names, read_photos

METRICS = ("is_food_accuracy", "item_recall_micro", "hallucination_rate", "strict_json_rate")


def parts(split: datasets.Dataset) -> Iterator[tuple[str, list[int]]]:
    """The parts by name, as row numbers. The smaller ones are whole groups in an order that does not change."""
    rows = [row | {"number": number} for number, row in enumerate(split.remove_columns("image"))]
    scenes = [row["number"] for row in rows if row["source"] == DRAWN]
    photos = [row for row in rows if row["source"] not in (DRAWN, COLLAGE)]
    permissive = [row for row in photos if row["license"].startswith("permissive")]
    count = sum(not is_derived(row) for row in permissive)
    for name, some, most in (
        ("1,700 photographs", photos, 1700),
        ("5,000 photographs", photos, 5000),
        (f"{count:,} photographs, all sources", photos, count),
        (f"{count:,} photographs, permissive sources", permissive, count),
        ("all photographs", photos, len(photos)),
    ):
        yield name, sorted(scenes + _whole_groups(some, most))


def _whole_groups(rows: list[dict], most: int) -> list[int]:
    """The rows of as many groups as hold `most` photographs."""
    ordered = sorted(rows, key=lambda row: hashlib.sha256(f"part {row['group']}".encode()).digest())
    chosen, count = [], 0
    for row in ordered:
        if count >= most and row["group"] != ordered[len(chosen) - 1]["group"]:
            break
        chosen.append(row["number"])
        count += not is_derived(row)
    return chosen


def trained(split: datasets.Dataset, features: torch.Tensor, out: Path, folder: Path, steps: int) -> Path:
    """Train a base and stage 1 on the rows of a part in `folder`; returns the folder of the model."""
    processor = load_processor(out / "base")
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(make_base.SEED)
    stage = replace(PROFILES["photo"].stage1, bf16=features.dtype is torch.bfloat16)
    if not (folder / "base").is_dir():
        model = make_base.make_model(processor, out / "tower")
        rows = [(record_of(row), row["label_scope"] == EXHAUSTIVE) for row in split.remove_columns("image")]
        batch = stage.per_device_train_batch_size
        make_base.train(model, processor, rows, features, folder, steps // 4 * batch / len(rows), batch, 1e-3)
        make_base.save(model, processor, folder / "base")
    model = load_model(folder / "base", torch.device("cpu"), training=True)
    path = cache.features_file(cache.home_of(split, processor, folder), model, features.dtype)
    if not cache.are_stored(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.from_file(str(path), shared=True, size=features.numel(), dtype=features.dtype).copy_(features.flatten())
        cache.prepare(split, processor, folder, with_pixels=False)
        path.with_suffix(".done").touch()
    train_stage(model, processor, stage, split, folder, max_steps=steps)
    path.unlink()
    return folder / stage.name


def scored(subject: str, photos: list[Photo], model: Path, known: set[str], trained_on: int, command: str) -> list[Row]:
    """The figures of a part, with the number of its photographs."""
    texts = evaluate.predict(
        Extractor.from_pretrained(model, "cpu").generate_texts, [p.path for p in photos], 32, subject
    )
    labels, scopes = [FoodRecord(**photo.label) for photo in photos], [photo.label_scope for photo in photos]
    metrics = [metric for metric in evaluate.score(labels, texts, scopes) if metric.name in METRICS]
    if recall := evaluate.known_item_recall(labels, texts, known):
        metrics.append(recall)
    rows = evaluate.to_rows("photo_subsets", subject, metrics, command)
    count = make_row("photo_subsets", subject, "photographs", trained_on, unit="images", n=trained_on, command=command)
    return [*rows, count]


def main(
    folder: Annotated[Path, typer.Argument(help="Folder with `manifest.jsonl`.")],
    out: Annotated[Path, typer.Argument(help="Folder of the data set, the features and the base.")],
    steps: Annotated[int, typer.Option(min=4, help="Steps of stage 1; the base takes a quarter of them.")] = 1000,
    bf16: Annotated[bool, typer.Option(help="The features are in bf16.")] = False,
    result: Annotated[Path, typer.Option(help="The results file.")] = ROOT / "results" / "photo_subsets.json",
) -> None:
    """Train on parts of the photographs, and score each."""
    command = " ".join(["python benchmarks/photo_subsets.py PHOTOS OUT", *sys.argv[3:]])
    photos, split = read_photos(folder), load(out / "dataset")["train"]
    test = [photo for photo in photos if photo.split == "test"]
    known = {name for name, count in learned_names(photos).items() if count >= KNOWN}
    base, processor = load_model(out / "base", torch.device("cpu"), training=True), load_processor(out / "base")
    dtype = torch.bfloat16 if bf16 else torch.float32
    path = cache.features_file(cache.home_of(split, processor, out), base, dtype)
    features = cache.vision_features(base, cache.prepare(split, processor, out, with_pixels=False), path, dtype)
    rows = read_results(result) if result.exists() else []
    for name, numbers in parts(split):
        if any(row.subject == name for row in rows):
            continue
        part = split.select(numbers)
        print(f"{name}: {len(part)} rows", flush=True)
        place = out / "subsets" / name.replace(" ", "-").replace(",", "")
        model = trained(part, features[torch.tensor(numbers)], out, place, steps)
        drawn = sum(row["source"] == DRAWN or is_derived(row) for row in part.remove_columns("image"))
        rows += scored(name, test, model, known, len(part) - drawn, command)
        write_results(result, rows)


if __name__ == "__main__":
    typer.run(main)
