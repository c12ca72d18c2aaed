"""Checkpoints of a training: which one to resume from, copies that outlive the machine, and how much disk all of it takes."""

import errno
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel, ProcessorMixin, TrainerCallback
from transformers.trainer import OPTIMIZER_NAME, TRAINER_STATE_NAME

from foodextract.models.loading import FINISHED, ModelError
from foodextract.training.cache import most_tiles
from foodextract.training.config import Stage, precision_of

ROOM = 2**24  # bytes: a disk with less than this is full
CHECKPOINTS, RECIPE = "checkpoints", "recipe.json"
UNFINISHED = ("*.partial", "*.old")  # what a kill may leave of a copy


def whole_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, oldest first: the trainer's state is what is written last, and a copy is renamed last."""
    whole = [path.parent for path in folder.glob(f"checkpoint-*/{TRAINER_STATE_NAME}") if path.stat().st_size]
    numbers = {int(step): path for path in whole if (step := path.name.removeprefix("checkpoint-")).isdigit()}
    return [numbers[step] for step in sorted(numbers)]


def last_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint in `folder`."""
    return str(whole[-1]) if (whole := whole_checkpoints(folder)) else None


def finished_recipe(folder: Path) -> str | None:
    """The recipe of the stage that finished in `folder`, if one did."""
    return json.loads((folder / FINISHED).read_text()).get("recipe") if (folder / FINISHED).is_file() else None


def interrupted_recipe(folder: Path) -> str | None:
    """The recipe of the stage that was interrupted in `folder`, if it left a complete checkpoint."""
    recipe = folder / CHECKPOINTS / RECIPE
    return recipe.read_text() if recipe.is_file() and last_checkpoint(folder / CHECKPOINTS) else None


def differences(recipe: str, other: str) -> str:
    """What differs between two recipes, for a message: names of settings."""
    mine, theirs = json.loads(recipe), json.loads(other)
    return ", ".join(sorted(name for name in {*mine, *theirs} if mine.get(name) != theirs.get(name)))


# ------------------------------------------------------------------------------------------------------- copies that outlive the machine


def check_keep_in(keep_in: str | Path | None) -> None:
    """Raise ModelError where the parent folder of `keep_in` does not exist, which is what a drive that is not mounted looks like."""
    if keep_in and not (parent := Path(keep_in).absolute().parent).is_dir():
        raise ModelError(
            f"keep_in is {keep_in}, but {parent} does not exist: mount the drive, or create that folder first"
        )


class Keeper(TrainerCallback):
    """Copies a stage to a folder that outlives the machine (a mounted drive, say), and reads it back on the next machine.

    A finished stage is copied as it is. A checkpoint is copied with the moments of its optimizer in bf16, which takes a third off its
    size; `torch.optim` casts them back when it loads them. A resume from the copy therefore differs from a resume on the same machine by
    rounding, as any change of the machine does.

    `home` is the stage's folder on this machine, `kept` the one for its copies. An OSError while copying is printed, and training goes on.
    """

    def __init__(self, home: Path, kept: Path) -> None:
        self.home, self.kept = home, kept

    def read_back(self, recipe: str) -> bool:
        """Copy a stage of this recipe back to `home`, finished or interrupted. True if there was one. Raises ModelError."""
        try:
            for folder in (self.kept, *(self.kept / CHECKPOINTS).glob("checkpoint-*.old")):
                _settle(folder.with_suffix(""))
            if recipe == finished_recipe(self.kept):
                leave_out = shutil.ignore_patterns(CHECKPOINTS, *UNFINISHED)
                source, target = self.kept, self.home
            elif recipe == interrupted_recipe(self.kept):
                leave_out = shutil.ignore_patterns(*UNFINISHED)
                source, target = self.kept / CHECKPOINTS, self.home / CHECKPOINTS
                shutil.rmtree(self.home, ignore_errors=True)
            else:
                return False
            print(f"{self.home.name}: copying from {self.kept} …", flush=True)
            _replace(target, lambda folder: shutil.copytree(source, folder, ignore=leave_out))
        except OSError as error:
            raise ModelError(
                f"{self.home.name}: cannot read {self.kept} back ({error}): mend that, or leave keep_in out"
            ) from error
        return True

    def on_save(self, args, state, control, **_):
        """Copy the checkpoint that was just written, then delete the older copies but that of the best one."""
        if not state.is_world_process_zero:
            return
        newest = Path(last_checkpoint(Path(args.output_dir)))
        with self._unless_full(newest.name):
            copies, recipe = self.kept / CHECKPOINTS, (newest.parent / RECIPE).read_text()
            if copies.is_dir() and not ((copies / RECIPE).is_file() and (copies / RECIPE).read_text() == recipe):
                shutil.rmtree(copies)  # of another recipe
            copies.mkdir(parents=True, exist_ok=True)
            (copies / RECIPE).write_text(recipe)
            _replace(copies / newest.name, lambda folder: _copy_small(newest, folder))
            spared = {newest.name, Path(state.best_model_checkpoint or "").name}
            for older in whole_checkpoints(copies):
                if older.name not in spared:
                    shutil.rmtree(older)

    def keep_finished(self) -> None:
        """Copy the finished stage in place of its checkpoints, unless it is there already."""
        if (self.kept / FINISHED).is_file() and (self.kept / FINISHED).read_bytes() == (
            self.home / FINISHED
        ).read_bytes():
            return
        with self._unless_full("the finished stage"):
            without = shutil.ignore_patterns(CHECKPOINTS)
            _replace(self.kept, lambda folder: shutil.copytree(self.home, folder, ignore=without))

    @contextmanager
    def _unless_full(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            print(
                f"{self.home.name}: cannot copy {what} to {self.kept} ({error}); training goes on without this copy",
                flush=True,
            )


def _replace(folder: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a new folder and put it in the place of `folder`. `_settle` completes what a kill interrupted."""
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
    """Where a kill hit `_replace` between its two renames, put the complete new folder in its place."""
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


# ------------------------------------------------------------------------------------------------------------------------------- disk


def disk_needed(
    model: PreTrainedModel, processor: ProcessorMixin, stages: Sequence[Stage], rows: int
) -> dict[str, int]:
    """The most bytes that each stage of full fine-tuning has on disk at any moment, by its name, for so many `rows`.

    This counts the models of earlier stages (fp32), what is prepared, and the checkpoints: fp32 weights with two fp32 moments of each
    weight that trains. A frozen vision tower's features replace the pixels once they are written. Data set and base model come on top.
    """
    vision, images = model.config.vision_config, processor.image_processor
    weights = 4 * model.num_parameters()
    tiles, edge = most_tiles(images), images.max_image_size["longest_edge"]
    pixels = rows * tiles * 3 * edge**2
    needed, before = {}, 0
    for stage in stages:
        trained = sum(p.numel() for name, p in model.named_parameters() if not name.startswith(stage.freeze))
        frozen = all(
            name.startswith(stage.freeze)
            for name, _ in model.named_parameters()
            if name.startswith("model.vision_model")
        )
        checkpoint, at_once = weights + 8 * trained, checkpoints_at_once(stage)
        features = 0
        if frozen and stage.fast and not stage.augment:
            number = 2 if precision_of(stage, model.device, model.num_parameters()).autocast else 4  # bytes
            features = rows * tiles * (vision.image_size // vision.patch_size) ** 2 * vision.hidden_size * number
        preparing, training = pixels + features, (features or pixels) + at_once * checkpoint
        if not stage.fast:
            preparing, training = 0, at_once * checkpoint
        needed[stage.name] = before + max(preparing, training, at_once * checkpoint + weights)
        before += weights
    return needed


def checkpoints_at_once(stage: Stage) -> int:
    """How many checkpoints of a stage are on disk at the same time: one while none is replaced, and the best beside the last."""
    if stage.validation:
        return 3
    return 2 if stage.every else min(max(math.ceil(stage.epochs) - 1, 0), 2)


@contextmanager
def full_disk_named(stage: str, folder: Path) -> Iterator[None]:
    """Turn the errors of a full disk into a ModelError with the remedy."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if not _is_full(folder, error):
            raise
        raise ModelError(
            f"{stage}: the disk of {folder} is full; free some space and rerun: training resumes from the last checkpoint"
        ) from error


def _is_full(folder: Path, error: Exception) -> bool:
    """Only the kernel's own errors have a number; safetensors and numpy word theirs, and torch says something else altogether."""
    numbered = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    worded = "No space left" in str(error) or "Not enough free space" in str(error)
    return numbered or worded or shutil.disk_usage(folder).free < ROOM
