"""Score the photo model on held-out photographs, beside the drawings model and baselines without a language model.

    python benchmarks/photographs.py FOLDER    # a folder with a manifest, see experiments/photo_base/photos.py

writes results/photographs.json: all metrics overall, and the main ones by source, by license class, by number of items
and by name; and results/photographs.png: what `--min-confidence` does, and how far confidence can be believed. The
split is by group (`photos.split_of`) and the same as in training. `known_item_recall` counts the names that at least 20
training photographs show. Baselines are the most frequent training record, the record of the nearest training
photograph, and a linear probe on the features of the model's own vision tower; the features of the training
photographs, half an hour of work, are kept in a file, and so are all answers. Rerun to resume.

    python benchmarks/photographs.py FOLDER --calibrate --split validation    # fits calibration.json beside the weights
"""

import hashlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import numpy as np
import torch
import typer
from matplotlib.figure import Figure
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestNeighbors
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

import platt
from baseline_models import Majority
from baselines import breakdown, number_of_items
from foodextract.evaluation import calibration, evaluate
from foodextract.evaluation.results import Row, commit, make_row, read_results, write_results
from foodextract.images import open_image
from foodextract.inference.confidence import Confidence, with_sure_items
from foodextract.inference.extractor import Extractor
from foodextract.models import loading
from foodextract.models.weights import checksum, snapshot
from foodextract.reporting import figures, tables
from foodextract.schema import FIELDS, FoodRecord

sys.path.append(str(Path(__file__).resolve().parents[1] / "experiments" / "photo_base"))
from photos import Photo, learned_names, read_photos

ROOT = Path(__file__).resolve().parents[1]
KNOWN = 20  # training photographs of a name from which its recall counts
SHOWN = 8  # test photographs of a name from which it has a row
BROKEN_DOWN = ("is_food_accuracy", "item_recall_micro", "item_precision_micro", "hallucination_rate")
TIMED = 100  # photographs
BASELINES = ("drawings constrained", "majority", "nearest", "linear probe")  # they change with the tower or the data
THRESHOLDS = (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)

Answer = tuple[FoodRecord, Confidence]


class Features:
    """Pooled features of photographs, (768,) float32 each: the mean of all patches, and the patch of the CLS token.

    They are kept in `path` by the name of the photograph, and discarded when the weights of the tower change.
    """

    def __init__(self, extractor: Extractor, path: Path) -> None:
        self.tower: Any = extractor.model.model.vision_model
        self.images, self.path = extractor.processor.image_processor, path
        self.key = checksum({name: p.detach().float() for name, p in self.tower.named_parameters()})
        stored = dict(np.load(path)) if path.is_file() else {}
        same = str(stored.pop("key", "")) == self.key
        self.known: dict[str, np.ndarray] = (
            dict(zip(stored["names"].tolist(), stored["values"], strict=True)) if same else {}
        )

    @torch.inference_mode()
    def of(self, photos: Sequence[Photo]) -> np.ndarray:
        """(N, 768)."""
        missing = [photo for photo in photos if photo.path.name not in self.known]
        for start in tqdm(range(0, len(missing), 16), desc="features", unit="× 16", disable=not missing):
            part = missing[start : start + 16]
            pixels = self.images([[open_image(photo.path)] for photo in part], return_tensors="pt").pixel_values
            seen = self.tower(pixels.flatten(0, 1)).last_hidden_state
            self.add([photo.path.name for photo in part], seen)
            if start % 1600 == 0 or start + 16 >= len(missing):
                self.save()
        return np.stack([self.known[photo.path.name] for photo in photos])

    def add(self, names: Sequence[str], seen: torch.Tensor) -> None:
        """Pool and remember the tower's output (N, patches, 384) of photographs."""
        pooled = torch.cat([seen.float().mean(1), seen[:, 0].float()], -1).numpy()
        self.known.update(zip(names, pooled, strict=True))

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.with_suffix(".partial").open("wb") as file:
            np.savez(file, names=list(self.known), values=np.stack(list(self.known.values())), key=self.key)
        self.path.with_suffix(".partial").replace(self.path)


def nearest(train: Sequence[Photo], features: np.ndarray, asked: np.ndarray) -> list[str]:
    """The record of the nearest training photograph (cosine), as text."""
    index = NearestNeighbors(n_neighbors=1, metric="cosine").fit(features)
    return [FoodRecord(**train[place].label).to_json() for [place] in index.kneighbors(asked, return_distance=False)]


def linear_probe(train: Sequence[Photo], features: np.ndarray, asked: np.ndarray) -> list[str]:
    """One logistic regression for `is_food`, and one for the only item of a photograph, as records with one item."""

    def fit(rows: list[int], wanted: list[Any]) -> Any:
        return make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=200)).fit(features[rows], wanted)

    names = learned_names(train)
    single = [row for row, photo in enumerate(train) if len(photo.items) == 1 and photo.items[0] in names]
    field = {train[row].items[0]: next(f for f in FIELDS if train[row].label[f]) for row in single}
    is_food = fit(list(range(len(train))), [photo.label["is_food"] for photo in train]).predict(asked)
    item = fit(single, [train[row].items[0] for row in single]).predict(asked)

    def text(edible: int, name: str) -> str:
        lists = {one: [name] if edible and field[name] == one else [] for one in FIELDS}
        return FoodRecord(is_food=int(edible), image_title=name if edible else "", **lists).to_json()

    return list(map(text, is_food, item))


def labels_of(photos: Sequence[Photo]) -> tuple[list[FoodRecord], list[str]]:
    """Labels and their scopes."""
    return [FoodRecord(**photo.label) for photo in photos], [photo.label_scope for photo in photos]


def scored(subject: str, photos: Sequence[Photo], texts: Sequence[str], known: set[str], command: str) -> list[Row]:
    """All metrics of one subject, and those BROKEN_DOWN by group and by name."""
    labels, scopes = labels_of(photos)
    metrics = evaluate.score(labels, texts, scopes)
    if recall := evaluate.known_item_recall(labels, texts, known):
        metrics.append(recall)
    rows = evaluate.to_rows("photographs", subject, metrics, command)
    groupings = [
        [f"from {photo.source}" for photo in photos],
        [f"license class {photo.license_class}" for photo in photos],
        [number_of_items(label) for label in labels],
    ]
    for groups in groupings:
        for group, found in breakdown(labels, texts, groups, scopes).items():
            few = [metric for metric in found if metric.name in BROKEN_DOWN and metric.n >= SHOWN]
            rows += evaluate.to_rows("photographs", f"{subject} | {group}", few, command)
    for name in sorted({item for photo in photos for item in photo.items} & known):
        mine = [number for number, photo in enumerate(photos) if name in photo.items]
        if len(mine) >= SHOWN:
            found = evaluate.known_item_recall([labels[n] for n in mine], [texts[n] for n in mine], {name})
            rows += evaluate.to_rows("photographs", f"{subject} | name {name}", [found] if found else [], command)
    return rows


def cpu_seconds(extractor: Extractor, images: list[Image.Image], command: str) -> list[Row]:
    """CPU-seconds an image, one at a time and eight at a time."""
    rows = []
    for batch in (1, 8):
        list(extractor.extract_many(images[:8], batch))
        began = time.process_time()
        list(extractor.extract_many(images, batch))
        spent = (time.process_time() - began) / len(images)
        rows.append(
            make_row(
                "photographs", f"photo | batch {batch}", "cpu_seconds", spent, unit="s", n=len(images), command=command
            )
        )
    return rows


def answered(extractor: Extractor, title: str, paths: Sequence[Path], batch: int, kept: Path) -> list[Answer]:
    """Records with confidence, see `texts_of`."""

    def ask(images: list[Image.Image]) -> list[str]:
        results: Any = extractor.extract_many_with_confidence(images, batch)
        return [json.dumps([record.model_dump(), asdict(confidence)]) for record, confidence in results]

    pairs = map(json.loads, texts_of(extractor, ask, title, paths, batch, kept))
    return [(FoodRecord(**record), Confidence(**confidence)) for record, confidence in pairs]


def texts_of(
    extractor: Extractor, ask: evaluate.BatchAnswer, title: str, paths: Sequence[Path], batch: int, kept: Path
) -> list[str]:
    """One text a photograph. They are kept in a file for a rerun with the same weights, photographs and commit."""
    parts = [checksum(snapshot(extractor.model)), *(path.name for path in paths), commit()]
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    images: Any = paths
    return evaluate.predict_cached(kept / f"{title.replace(' ', '-')}.jsonl", key, ask, images, batch, title)[0]


def reliability_rows(subject: str, photos: Sequence[Photo], answers: Sequence[Answer], command: str) -> list[Row]:
    """Expected calibration error of `is_food` and of items."""
    labels, scopes = labels_of(photos)
    decided = [record.is_food == label.is_food for label, (record, _) in zip(labels, answers, strict=True)]
    pairs = {"is_food": (decided, [confidence.is_food for _, confidence in answers])}
    pairs["item"] = platt.judged_items(labels, answers, scopes)
    rows = []
    for name, (right, sure) in pairs.items():
        error = calibration.calibration_error(calibration.reliability(right, sure))
        rows.append(make_row("photographs", subject, f"{name}_calibration_error", error, n=len(right), command=command))
    return rows


def threshold_rows(photos: Sequence[Photo], answers: Sequence[Answer], known: set[str], command: str) -> list[Row]:
    """Precision of named items and recall of known names by `--min-confidence`."""
    labels, scopes = labels_of(photos)
    rows = []
    for least in THRESHOLDS:
        kept = [with_sure_items(record, confidence, least) for record, confidence in answers]
        right, _ = platt.judged_items(labels, kept, scopes)
        metrics = [evaluate.rate("item_precision", right)] if right else []
        if recall := evaluate.known_item_recall(labels, [record.to_json() for record, _ in kept], known):
            metrics.append(recall)
        rows += evaluate.to_rows("photographs", f"photo | min confidence {least:g}", metrics, command)
    return rows


def confidence_figure(rows: Sequence[Row], photos: Sequence[Photo], answers: dict[str, Sequence[Answer]]) -> Figure:
    """Left: precision and recall by `--min-confidence`. Right: how many named items are right, by their confidence."""
    labels, scopes = labels_of(photos)
    with plt.rc_context(figures.STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(figures.WIDTH, 3.4), layout="constrained")
        names = {"item_precision": "precision of named items", "known_item_recall": "recall of known names"}
        for color, (metric, name) in zip(figures.COLORS[2:], names.items(), strict=False):
            found = {row.subject: row for row in rows if row.metric == metric}
            pairs = ((least, found.get(f"photo | min confidence {least:g}")) for least in THRESHOLDS)
            line = [(least, row.value) for least, row in pairs if row]  # none where nothing is that sure
            left.plot(*zip(*line, strict=True), marker=".", color=color, label=name)
        left.set(xlabel="--min-confidence", ylabel="share", xlim=(-0.03, 1), ylim=(0, 1.03))
        left.grid(alpha=0.3)
        right.plot([0, 1], [0, 1], color=figures.GRAY, linestyle="--", linewidth=1)
        for color, (name, some) in zip(figures.COLORS[1:], answers.items(), strict=False):
            bins = calibration.reliability(*platt.judged_items(labels, some, scopes))
            label = f"{name}, ECE {calibration.calibration_error(bins):.3f}"
            right.plot([b.predicted for b in bins], [b.observed for b in bins], marker="o", color=color, label=label)
        right.set(xlabel="confidence of an item", ylabel="share that is right", xlim=(-0.03, 1.03), ylim=(0, 1.03))
        for axis in (left, right):
            axis.legend(loc="lower left" if axis is left else "upper left")
    return figure


def main(
    folder: Annotated[Path, typer.Argument(help="Folder with `manifest.jsonl`.")],
    model: Annotated[Path, typer.Option(help="The photo model.")] = loading.PHOTO,
    base: Annotated[Path | None, typer.Option(help="Its base.")] = loading.PHOTO_BASE,
    drawings: Annotated[Path, typer.Option(help="The drawings model.")] = loading.TINY_TUNED,
    features: Annotated[Path, typer.Option(help="File that keeps the features.")] = ROOT / "outputs/photo/features.npz",
    split: Annotated[str, typer.Option(help="test, or validation for a look while the recipe is still open.")] = "test",
    baselines: Annotated[bool, typer.Option(help="Score the baselines, too; else their rows in OUT stay.")] = True,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Fit the confidence on these photographs, save it, and stop.")
    ] = False,
    batch: Annotated[int, typer.Option(min=1, help="Images per batch.")] = 32,
    out: Annotated[Path, typer.Option(help="The results file.")] = ROOT / "results" / "photographs.json",
) -> None:
    """Score the photo model on held-out photographs."""
    command = " ".join(["python benchmarks/photographs.py FOLDER", *sys.argv[2:]])
    photos = read_photos(folder)
    train, test = ([photo for photo in photos if photo.split == part] for part in ("train", split))
    known = {name for name, count in learned_names(photos).items() if count >= KNOWN}
    paths: Any = [photo.path for photo in test]
    ours = Extractor.from_pretrained(model, "cpu")
    found, ours.calibration = ours.calibration, None
    options = {"paths": paths, "batch": batch, "kept": features.with_name("answers")}
    raw = answered(ours, "photo constrained", **options)
    if calibrate:
        labels, scopes = labels_of(test)
        found = platt.fit(labels, raw, scopes)
        found.write(model)
        print(found)
        return
    sure = [found.apply(*answer) if found else answer for answer in raw]
    answers = {
        "photo": texts_of(ours, ours.generate_texts, "photo", **options),
        "photo constrained": [record.to_json() for record, _ in sure],
    }
    if base:
        before = Extractor.from_pretrained(base, "cpu")
        answers["base"] = texts_of(before, before.generate_texts, "base", **options)
    kept: list[Row] = []
    if not baselines and out.is_file():
        kept = [row for row in read_results(out) if row.subject.partition(" | ")[0] in BASELINES]
    if baselines:
        seen = Features(ours, features)
        known_features, asked = seen.of(train), seen.of(test)
        theirs = Extractor.from_pretrained(drawings, "cpu")
        answers |= {
            "drawings constrained": texts_of(
                theirs, partial(theirs.generate_texts, constrained=True), "drawings", **options
            ),
            "majority": Majority.fit([FoodRecord(**photo.label) for photo in train]).answer(paths),
            "nearest": nearest(train, known_features, asked),
            "linear probe": linear_probe(train, known_features, asked),
        }
    rows = [row for subject, texts in answers.items() for row in scored(subject, test, texts, known, command)]
    rows += kept
    rows += reliability_rows("photo constrained", test, sure, command)
    rows += reliability_rows("photo constrained, uncalibrated", test, raw, command)
    rows += threshold_rows(test, sure, known, command)
    rows += cpu_seconds(ours, [open_image(path) for path in paths[:TIMED]], command)
    write_results(out, rows)
    confidence_figure(rows, test, {"raw": raw, "calibrated": sure}).savefig(out.with_suffix(".png"), dpi=100)
    overall = [row for row in rows if " | " not in row.subject]
    print(tables.metric_table([row for row in overall if row.low is not None]))
    for row in rows:
        if row.metric in ("known_item_recall", "cpu_seconds") and "name" not in row.subject:
            print(f"{row.subject:>24} {row.metric} {row.value:.3f} n = {row.n}")


if __name__ == "__main__":
    typer.run(main)
