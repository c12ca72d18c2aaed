"""Checkpoints of a stage: which one to resume from, backups on another disk, and the disk space of a training."""

import errno
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    PreTrainedModel,
    ProcessorMixin,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import OPTIMIZER_NAME, TRAINER_STATE_NAME

from foodextract.models.loading import FINISHED, ModelError, image_budget
from foodextract.training.config import VISION, Stage, precision_of

FULL = 2**24  # bytes: a disk with less free space counts as full
CHECKPOINTS, RECIPE = "checkpoints", "recipe.json"
UNFINISHED = ("*.partial", "*.old")  # what a kill may leave of a backup


def whole_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, oldest first: the trainer writes its state last."""
    whole = [path.parent for path in folder.glob(f"checkpoint-*[0-9]/{TRAINER_STATE_NAME}") if path.stat().st_size]
    return sorted(whole, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def last_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint in `folder`."""
    return str(whole[-1]) if (whole := whole_checkpoints(folder)) else None


def finished_recipe(folder: Path) -> str | None:
    """The recipe of the stage that finished in `folder`, if one did."""
    return json.loads((folder / FINISHED).read_text()).get("recipe") if (folder / FINISHED).is_file() else None


def interrupted_recipe(folder: Path) -> str | None:
    """The recipe of the stage that was interrupted in `folder`, if it left a complete checkpoint."""
    recipe = folder / CHECKPOINTS / RECIPE
    return recipe.read_text() if recipe.is_file() and last_checkpoint(recipe.parent) else None


def differences(recipe: str, other: str) -> str:
    """The names of the settings in which two recipes differ, for a message."""
    mine, theirs = json.loads(recipe), json.loads(other)
    return ", ".join(sorted(name for name in {*mine, *theirs} if mine.get(name) != theirs.get(name)))


# --- backups


def check_keep_in(keep_in: str | Path | None) -> None:
    """Raise ModelError where the parent folder of `keep_in` does not exist, as for a drive that is not mounted."""
    if keep_in and not (parent := Path(keep_in).absolute().parent).is_dir():
        remedy = "mount the drive, or create that folder first"
        raise ModelError(f"keep_in is {keep_in}, but {parent} does not exist: {remedy}")


class Backup(TrainerCallback):
    """Copies a stage to a folder that outlives the machine, such as a mounted drive, and restores it on another one.

    The optimizer's moments are copied in bf16, which takes a third off a checkpoint; `torch.optim` casts them back,
    so a run resumed from a backup differs by rounding. An OSError while copying is printed, and training continues.

    `home` is the stage's folder on this machine, `kept` its backup.
    """

    def __init__(self, home: Path, kept: Path) -> None:
        self.home, self.kept = home, kept

    def restore(self, recipe: str) -> bool:
        """Copy a finished or interrupted stage of this recipe to `home`, if there is one. Raises ModelError."""
        try:
            for folder in (self.kept, *(self.kept / CHECKPOINTS).glob("checkpoint-*.old")):
                _settle(folder.with_suffix(""))
            if recipe == finished_recipe(self.kept):
                ignore: tuple[str, ...] = (CHECKPOINTS, *UNFINISHED)
                source, target = self.kept, self.home
            elif recipe == interrupted_recipe(self.kept):
                ignore, source, target = UNFINISHED, self.kept / CHECKPOINTS, self.home / CHECKPOINTS
                shutil.rmtree(self.home, ignore_errors=True)
            else:
                return False
            print(f"{self.home.name}: copying from {self.kept} …", flush=True)
            _replace(target, lambda new: shutil.copytree(source, new, ignore=shutil.ignore_patterns(*ignore)))
        except OSError as error:
            message = f"cannot restore {self.kept} ({error}): repair it, or leave keep_in out"
            raise ModelError(f"{self.home.name}: {message}") from error
        return True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Copy the new checkpoint, then delete older copies except that of the best checkpoint."""
        if not state.is_world_process_zero:
            return
        newest = Path(last_checkpoint(Path(args.output_dir or "")) or "")
        with self._continuing(newest.name):
            copies, recipe = self.kept / CHECKPOINTS, (newest.parent / RECIPE).read_text()
            if copies.is_dir() and interrupted_recipe(self.kept) != recipe:
                shutil.rmtree(copies)
            copies.mkdir(parents=True, exist_ok=True)
            (copies / RECIPE).write_text(recipe)
            _replace(copies / newest.name, lambda folder: _copy_small(newest, folder))
            for older in whole_checkpoints(copies):
                if older.name not in (newest.name, Path(state.best_model_checkpoint or "").name):
                    shutil.rmtree(older)

    def save_finished(self) -> None:
        """Replace the copied checkpoints by the finished stage, unless it was copied before."""
        kept, home = self.kept / FINISHED, self.home / FINISHED
        if not (kept.is_file() and kept.read_bytes() == home.read_bytes()):
            with self._continuing("the finished stage"):
                ignore = shutil.ignore_patterns(CHECKPOINTS)
                _replace(self.kept, lambda folder: shutil.copytree(self.home, folder, ignore=ignore))

    @contextmanager
    def _continuing(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            message = f"cannot copy {what} to {self.kept} ({error}); training continues without this copy"
            print(f"{self.home.name}: {message}", flush=True)


def _replace(folder: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a new folder, then rename it to `folder`. `_settle` completes what a kill interrupted."""
    partial, old = (folder.with_name(folder.name + suffix) for suffix in (".partial", ".old"))
    shutil.rmtree(partial, ignore_errors=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    write(partial)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _settle(folder: Path) -> None:
    """Rename the complete new folder after a kill between the two renames of `_replace`."""
    partial, old = (folder.with_name(folder.name + suffix) for suffix in (".partial", ".old"))
    if old.is_dir() and not folder.exists():
        (partial if partial.is_dir() else old).rename(folder)


def _copy_small(checkpoint: Path, folder: Path) -> None:
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns(OPTIMIZER_NAME))
    if (checkpoint / OPTIMIZER_NAME).is_file():
        optimizer = torch.load(checkpoint / OPTIMIZER_NAME, map_location="cpu", weights_only=True, mmap=True)
        for values in optimizer["state"].values():
            for name, value in values.items():
                if name != "step" and torch.is_tensor(value) and value.dtype is torch.float32:
                    values[name] = value.to(torch.bfloat16)
        torch.save(optimizer, folder / OPTIMIZER_NAME)


# --- disk


def disk_needed(
    model: PreTrainedModel, processor: ProcessorMixin, stages: Sequence[Stage], rows: int
) -> dict[str, int]:
    """The most bytes that each stage of full fine-tuning has on disk at any moment, for so many `rows`, by stage name.

    Counted are the models of earlier stages (fp32), prepared rows, and checkpoints: fp32 weights, and two fp32
    moments of each weight that trains. Features replace pixels once they are written. Data set and base model are not
    counted.
    """
    vision, images = model.config.vision_config, processor.image_processor
    weights = 4 * model.num_parameters()
    tiles = rows * image_budget(processor)
    needed, before = {}, 0
    for stage in stages:
        training = [(name, p.numel()) for name, p in model.named_parameters() if not name.startswith(stage.freeze)]
        checkpoint = weights + 8 * sum(numel for _, numel in training)
        at_once = checkpoints_at_once(stage) * checkpoint
        pixels = tiles * 3 * images.max_image_size["longest_edge"] ** 2 if stage.cache else 0
        features = 0
        if stage.cache and not stage.augment and not any(name.startswith(VISION) for name, _ in training):
            number = 2 if precision_of(stage, model.device, model.num_parameters()).autocast else 4  # bytes
            features = tiles * (vision.image_size // vision.patch_size) ** 2 * vision.hidden_size * number
        kept = features if stage.keep_features else 0
        needed[stage.name] = before + max(pixels + features, (features or pixels) + at_once, kept + at_once + weights)
        before += weights
    return needed


def checkpoints_at_once(stage: Stage) -> int:
    """How many checkpoints of a stage are on disk at a time: two while one replaces another, and the best."""
    if stage.validation_rows:
        return 3
    return 2 if stage.save_steps else min(max(math.ceil(stage.num_train_epochs) - 1, 0), 2)


@contextmanager
def full_disk_named(stage: str, folder: Path) -> Iterator[None]:
    """Turn the errors of a full disk into a ModelError with the remedy."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        # The kernel's errors have a number; safetensors and numpy have words for it; torch only fails.
        numbered = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        worded = "No space left" in str(error) or "Not enough free space" in str(error)
        if not (numbered or worded or shutil.disk_usage(folder).free < FULL):
            raise
        message = f"the disk of {folder} is full; free some space and rerun: training resumes from the last checkpoint"
        raise ModelError(f"{stage}: {message}") from error
