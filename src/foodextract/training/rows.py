"""The rows of a stage: those to train on, those held out to choose a checkpoint, and their collator."""

import hashlib
import shutil
from typing import TYPE_CHECKING

import datasets
from accelerate import PartialState

from foodextract.data.dataset import as_conversations, record_of, scopes_of
from foodextract.evaluation import evaluate
from foodextract.inference.extractor import Extractor
from foodextract.models.loading import ModelError, image_budget
from foodextract.training import cache
from foodextract.training.collate import Collator, augmentation
from foodextract.training.config import is_sharded, trains_vision

if TYPE_CHECKING:
    from foodextract.training.run import StageRun

Rows = tuple[datasets.Dataset, datasets.Dataset | None, Collator | cache.PreparedRows]


def open_rows(run: "StageRun") -> Rows:
    """Rows to train on, held-out rows, and their collator: `PreparedRows` with `stage.cache`, else `Collator`.

    Raises ModelError for images of several tiles that should be augmented, and for validation with sharded weights or
    on all rows.
    """
    stage, split = run.stage, run.split
    if stage.validation_rows and is_sharded():
        message = "validation generates answers, which takes whole weights: leave it out, or use configs/ddp.yaml"
        raise ModelError(f"{stage.name}: {message}")
    if stage.augment and image_budget(run.processor) > 1:
        raise ModelError(
            "several tiles cannot be augmented, since the tiles of an image must fit together: take 1 tile"
        )
    held_out = held_out_rows(split, stage.validation_rows)
    if len(held_out) == len(split):
        raise ModelError(f"{stage.name}: validation_rows leaves none of {len(split)} rows to train on; lower it")
    collator: Collator | cache.PreparedRows
    if stage.cache:
        rows = datasets.Dataset.from_dict({"row": range(len(split))})
        collator = _prepare(run)
    else:
        rows = as_conversations(split, stage.target)
        collator = Collator(run.processor, stage.completion_only_loss)
    if stage.augment:
        collator.augment = augmentation(run.processor.image_processor.max_image_size["longest_edge"])
    train_rows = rows.select(sorted(set(range(len(rows))) - set(held_out)))
    return train_rows, rows.select(held_out) if held_out else None, collator


def held_out_rows(split: datasets.Dataset, count: int) -> list[int]:
    """About `count` rows by whole groups of look-alikes, independent of the order of the rows."""
    groups: dict[str, list[int]] = {}
    for number, group in enumerate(split["group"] if count else ()):
        groups.setdefault(group, []).append(number)
    chosen: list[int] = []
    for group in sorted(groups, key=lambda group: hashlib.sha256(f"validation {group}".encode()).digest()):
        if len(chosen) < count:
            chosen += groups[group]
    return sorted(chosen)


def held_out_f1(run: "StageRun") -> float:
    """The item F1 of the model's answers to the held-out images."""
    rows = run.split.select(held_out_rows(run.split, run.stage.validation_rows))
    labels, scopes = [record_of(row) for row in rows.remove_columns("image")], scopes_of(rows)
    generate, batch = Extractor(run.model, run.processor).generate_texts, run.stage.per_device_train_batch_size
    return evaluate.validation_f1(labels, evaluate.predict(generate, rows["image"], batch, "validation"), scopes)


def _prepare(run: "StageRun") -> cache.PreparedRows:
    """Prepare rows once for all stages. Features of a frozen tower replace pixels if the disk has room for both."""
    model, stage, dtype, processes = run.model, run.stage, run.dtype, PartialState()
    with processes.main_process_first():  # one folder for all stages
        folder = run.folder.parent
        home = cache.home_of(run.split, run.processor, folder, stage.target)
        frozen = not (stage.augment or is_sharded() or trains_vision(model))
        path = cache.features_file(home, model, dtype) if frozen else None
        # Another process may be writing the unfinished file.
        for old in set(home.glob("features-*")) - ({path, path.with_suffix(".partial")} if path else set()):
            old.unlink()  # features of other weights, or for another stage
        stored = path is not None and path.is_file()
        rows = cache.prepare(
            run.split,
            run.processor,
            folder,
            stage.target,
            completion_only_loss=stage.completion_only_loss,
            with_pixels=not stored,
        )
    if is_sharded():
        rows.shared = 0  # a forward in two parts needs whole weights
    if not path:
        return rows
    needed = cache.features_shape(model, rows).numel() * dtype.itemsize
    if not stored and needed > 0.5 * shutil.disk_usage(path.parent).free:
        print(f"features are not cached: their {needed / 1e9:.0f} GB would fill more than half of the free disk")
        return rows
    with processes.main_process_first():
        rows.features = cache.vision_features(model, rows, path, dtype)
    processes.wait_for_everyone()
    rows.pixels = None
    if processes.is_main_process:
        (rows.home / cache.PIXELS).unlink(missing_ok=True)  # `prepare` writes them again for stage 2
    return rows
