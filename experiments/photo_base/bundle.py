"""Take the base and the tuned photo model that were made in OUT into the package, and bind their figures to them.

    python experiments/photo_base/bundle.py PHOTOS OUT

writes `photo` and `photo-base` to src/foodextract/models/bundled, calibrates the model on the validation part of the
photographs, measures it with benchmarks/photographs.py and writes its evaluation.json. The base shares the file of the
vision tower with the tuned model.
"""

import json
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from make_base import REST_SHARD, TOWER_SHARD, save
from photos import is_derived, read_photos

from foodextract.data.dataset import load
from foodextract.evaluation import provenance
from foodextract.evaluation.results import read_results
from foodextract.models.loading import PHOTO, PHOTO_BASE, load_model, load_processor
from foodextract.models.training_data import TrainingData
from foodextract.training.config import PROFILES

ROOT = Path(__file__).resolve().parents[2]
# What README's second and third training state.
LONG: dict[str, Any] = {"learning_rate": 3e-4, "num_train_epochs": 1.0}
FINISH: dict[str, Any] = {"learning_rate": 3e-4, "num_train_epochs": 2.0, "bf16": True}
INDEX = "model.safetensors.index.json"


def take(source: Path, target: Path) -> None:
    """Write the model in `source` to `target`, as two shards in bf16."""
    shutil.rmtree(target, ignore_errors=True)
    save(load_model(source, torch.device("cpu"), training=True), load_processor(source), target)


def share_tower(base: Path, tuned: Path) -> None:
    """Let the base read the tower's file of the tuned model. Raises ValueError where the two differ."""
    if (base / TOWER_SHARD).read_bytes() != (tuned / TOWER_SHARD).read_bytes():
        raise ValueError(f"{base} and {tuned} have different vision towers: freeze it in both stages")
    (base / TOWER_SHARD).unlink()
    index = json.loads((base / INDEX).read_text())
    shared = f"../{tuned.name}/{TOWER_SHARD}"
    index["weight_map"] = {name: file if file == REST_SHARD else shared for name, file in index["weight_map"].items()}
    (base / INDEX).write_text(json.dumps(index, indent=1))


def main(
    photos: Annotated[Path, typer.Argument(help="Folder with `manifest.jsonl`.")],
    out: Annotated[Path, typer.Argument(help="Folder with `base`, `stage2` and `finish-dataset`.")],
    baselines: Annotated[
        bool, typer.Option(help="Measure the baselines again, for another tower or other data.")
    ] = True,
) -> None:
    """Bundle the photo model."""
    take(out / "stage2", PHOTO)
    take(out / "base", PHOTO_BASE)
    share_tower(PHOTO_BASE, PHOTO)
    rows = load(out / "finish-dataset")["train"].remove_columns("image")
    TrainingData.of(row for row in rows if not is_derived(row)).write(PHOTO)
    sources = Counter((photo.license_class, photo.source) for photo in read_photos(photos) if photo.split == "train")
    listed = [{"source": source, "license_class": kind, "images": n} for (kind, source), n in sources.most_common()]
    (PHOTO / "sources.json").write_text(json.dumps(listed, indent=1))
    for arguments in (["--calibrate", "--split", "validation"], [] if baselines else ["--no-baselines"]):
        command = [sys.executable, "benchmarks/photographs.py", str(photos), *arguments]
        subprocess.run(command, cwd=ROOT, check=True)  # noqa: S603
    profile = PROFILES["photo"]
    stages = [
        profile.stage1,
        profile.stage2,
        replace(profile.stage2, name="stage2, long", **LONG),
        replace(profile.stage1, name="finish", **FINISH),
    ]
    subjects = {"photo": "stage2", "photo constrained": "stage2 constrained", "base": "base"}
    figures = [
        replace(row, subject=subjects[row.subject])
        for row in read_results(ROOT / "results" / "photographs.json")
        if row.subject in subjects
    ]
    provenance.write(PHOTO, PHOTO_BASE, "photographs", stages, figures)


if __name__ == "__main__":
    typer.run(main)
