"""Checkpoints of a training: which one to go on from, and what to say when there is no room for another."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from foodextract.models import ModelError

ROOM = 2**24  # bytes: a disk with less than this is full


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that is whole: the trainer's state is what is written last."""
    whole = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json") if path.stat().st_size]
    return str(max(whole, key=lambda path: int(path.name.split("-")[1]))) if whole else None


@contextmanager
def full_disk_named(stage: str, folder: Path) -> Iterator[None]:
    """Turn the errors of a full disk into a ModelError with the remedy."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if not _is_full(folder, error):
            raise
        raise ModelError(
            f"{stage}: the disk of {folder} is full; free some of it and run this again, which takes up the last checkpoint"
        ) from error


def _is_full(folder: Path, error: Exception) -> bool:
    """Only the kernel's own errors have a number; safetensors and numpy word theirs, and torch says something else altogether."""
    numbered = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    worded = "No space left" in str(error) or "Not enough free space" in str(error)
    return numbered or worded or shutil.disk_usage(folder).free < ROOM
