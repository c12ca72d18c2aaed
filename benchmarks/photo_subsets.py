"""What more photographs are worth, and what those without a permissive license add.

    python benchmarks/photo_subsets.py FOLDER    # a folder with a manifest, see experiments/photo_base/photos.py

writes results/photo_subsets.json. The nearest training photograph and a linear probe answer, on the features of the photo
model's tower, with parts of the training photographs: what they gain from more photographs is what the tower can tell
apart. A part is made of whole groups. Recall is that of the same names for all parts. The features are shared with
photographs.py, and kept.

    python benchmarks/photo_subsets.py FOLDER --train DATASET --work outputs/photo/subsets

trains the photo model's connector and language model from scratch on three of these parts, with equally many steps, and
adds their rows: a quarter of an hour a part on two cores. DATASET is a data set of photos.py with these photographs; a
WORK that holds its features from an earlier training is quicker. Rerun to resume.
"""

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import datasets
import torch
import typer
from transformers import SmolVLMForConditionalGeneration

from foodextract.data.dataset import load
from foodextract.evaluation import evaluate
from foodextract.evaluation.results import Row, make_row
from foodextract.inference.extractor import Extractor
from foodextract.models import loading
from foodextract.reporting.tables import format_row
from foodextract.training import cache
from foodextract.training.config import PROFILES
from foodextract.training.run import StageRun, training_arguments
from photographs import KNOWN, ROOT, Features, Photo, labels_of, learned_names, linear_probe, nearest, read_photos
from reports import write_beside

SIZES = (1700, 5000)
METRICS = ("is_food_accuracy", "hallucination_rate")
TRAINED = "language model"  # the subject of what `--train` measures
SEED = 42


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


class PartRun(StageRun):
    """A stage of training on some of the rows that were prepared for a whole split."""

    numbers: Sequence[int]
    prepared: cache.PreparedRows

    def rows(self) -> tuple[datasets.Dataset, None, cache.PreparedRows]:
        return datasets.Dataset.from_dict({"row": list(self.numbers)}), None, self.prepared


def untrained(photo_model: Path) -> SmolVLMForConditionalGeneration:
    """A model of the same shape and with the same vision tower; connector and language model have random weights."""
    given: Any = loading.load_model(photo_model, torch.device("cpu"), training=True)
    torch.manual_seed(SEED)
    model = SmolVLMForConditionalGeneration(given.config)
    model.model.vision_model.load_state_dict(given.model.vision_model.state_dict())
    model.generation_config = given.generation_config
    return model


def extractor_trained_on(
    numbers: Sequence[int], split: datasets.Dataset, photo_model: Path, work: Path, steps: int
) -> Extractor:
    """Train on some rows of a split, in a folder of WORK named after their number."""
    model, processor = untrained(photo_model), loading.load_processor(photo_model)
    stage = replace(
        PROFILES["photo"].stage1, name=f"rows-{len(numbers)}", learning_rate=1e-3, save_steps=100, bf16=True
    )
    run = PartRun(model, processor, stage, split.select(numbers), work, seed=SEED, max_steps=steps)
    if not run.finished:
        path = cache.features_file(cache.home_of(split, processor, work), model, torch.bfloat16)
        run.numbers = numbers
        run.prepared = cache.prepare(split, processor, work, with_pixels=not path.is_file())
        run.prepared.features = cache.vision_features(model, run.prepared, path, torch.bfloat16)
        trainer = run.build_trainer(training_arguments(run))
        trainer.train(resume_from_checkpoint=run.checkpoint)
        run.finish(trainer)
    return Extractor(model.eval(), processor)


def trained_rows(
    photos: Sequence[Photo], dataset: Path, model: Path, work: Path, steps: int, command: str
) -> Iterator[Row]:
    """Scores of models that were trained on photographs in DATASET, from small parts to all of them."""
    split = load(dataset)["train"]
    names = split["name"]
    test = [photo for photo in photos if photo.split == "test"]
    images: Any = [photo.path for photo in test]
    known = known_names(photos)
    wanted = [photo for photo in photos if photo.split == "train"]
    for most in (*SIZES, len(wanted)):
        part = {photo.path.name for photo in whole_groups(wanted, most)}
        numbers = [number for number, name in enumerate(names) if name in part]
        extractor = extractor_trained_on(numbers, split, model, work, steps)
        texts = evaluate.predict(partial(extractor.generate_texts, constrained=True), images, title=f"{most:,}")
        subject = f"{TRAINED} | {most:,} photographs"
        yield from evaluate.to_rows("photo_subsets", subject, scores(test, texts, known), command)
        yield make_row("photo_subsets", subject, "rows", len(numbers), unit="images", n=1, command=command)
    for folder in work.glob("rows-*"):  # else `extract` would answer with the newest of them
        shutil.rmtree(folder)


def known_names(photos: Sequence[Photo]) -> set[str]:
    return {name for name, count in learned_names(photos).items() if count >= KNOWN}


def scores(photos: Sequence[Photo], texts: Sequence[str], known: set[str]) -> list[evaluate.Metric]:
    """The metrics that the page shows."""
    labels, scopes = labels_of(photos)
    found = [metric for metric in evaluate.score(labels, texts, scopes) if metric.name in METRICS]
    recall = evaluate.known_item_recall(labels, texts, known)
    return [*found, recall] if recall else found


def show(rows: Sequence[Row]) -> None:
    for row in rows:
        print(f"{row.subject:50} {row.metric:20} {format_row(row)}")


def main(
    folder: Annotated[Path, typer.Argument(help="Folder with `manifest.jsonl`.")],
    model: Annotated[Path, typer.Option(help="The photo model, for its vision tower.")] = loading.PHOTO,
    features: Annotated[Path, typer.Option(help="File that keeps the features.")] = ROOT / "outputs/photo/features.npz",
    out: Annotated[Path, typer.Option(help="The results file.")] = ROOT / "results" / "photo_subsets.json",
    train_on: Annotated[
        Path | None, typer.Option("--train", metavar="DATASET", help="Train on parts of this data set instead.")
    ] = None,
    work: Annotated[Path, typer.Option(help="Folder of the trained models.")] = ROOT / "outputs/photo/subsets",
    steps: Annotated[int, typer.Option(min=1, help="Steps of 64 images a training.")] = 400,
) -> None:
    """Score what can be learned from parts of the photographs."""
    photos = read_photos(folder)
    if train_on:
        command = f"python benchmarks/photo_subsets.py FOLDER --train DATASET --steps {steps}"
        new = list(trained_rows(photos, train_on, model, work, steps, command))
        write_beside(out, new, kept=lambda row: not row.subject.startswith(TRAINED))
        show(new)
        return
    command = "python benchmarks/photo_subsets.py FOLDER"
    train, test = ([photo for photo in photos if photo.split == split] for split in ("train", "test"))
    known = known_names(photos)
    seen = Features(Extractor.from_pretrained(model, "cpu"), features)
    asked = seen.of(test)
    rows: list[Row] = []
    for name, part in parts(train).items():
        trained = seen.of(part)
        answers = {"nearest": nearest(part, trained, asked), "linear probe": linear_probe(part, trained, asked)}
        for subject, texts in answers.items():
            rows += evaluate.to_rows("photo_subsets", f"{subject} | {name}", scores(test, texts, known), command)
        rows.append(make_row("photo_subsets", name, "photographs", len(part), unit="images", n=1, command=command))
        write_beside(out, rows, kept=lambda row: row.subject.startswith(TRAINED))
    show(rows)


if __name__ == "__main__":
    typer.run(main)
