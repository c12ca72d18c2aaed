"""Open data sets and read their rows."""

import hashlib
import sys
from collections import defaultdict
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any

import datasets
from tqdm import tqdm

from foodextract import prompts
from foodextract.data.build import build, origin_of
from foodextract.data.folders import labeled_folder
from foodextract.data.hub_source import HubDataset, HubUnreachableError, newest_revision
from foodextract.data.ingest import identity
from foodextract.data.near_duplicates import fingerprint, group_near
from foodextract.data.samples import DatasetError, Rows, Sample, label_of, normalize_split
from foodextract.data.sources import hub_rows
from foodextract.images import ImageError, find_images, open_image
from foodextract.schema import EXHAUSTIVE, FoodRecord


def load(folder: str | Path) -> datasets.DatasetDict:
    """Load the data set that `build` wrote to `folder`. Raises DatasetError for a folder without one."""
    arrow = Path(folder) / "arrow"
    if not (arrow / "dataset_dict.json").is_file():
        message = "holds no data set: run 00_create_vlm_dataset.ipynb with this folder as its output first"
        raise DatasetError(f"{folder} {message}")
    return datasets.load_from_disk(arrow)


def open_dataset(where: str | Path, build_in: str | Path, seed: int = 42) -> datasets.DatasetDict:
    """Open a folder that `build` wrote, a labeled image folder, or a data set on the Hub (see `sources.hub`).

    The latter two are built in `build_in`, and rebuilt only when the folder, the newest revision or the seed changes.
    Data sets that this project published keep their rows and splits. When the Hub cannot be reached, the data set that
    was built before is used, with a line on stderr. Raises DatasetError.
    """
    where, name, build_in = Path(where), str(where), Path(build_in)
    if where.is_dir() and not (where / "arrow").is_dir():
        rows = labeled_folder(where)
        origin = {"folder": _folder_state(where, rows), "seed": seed}
        if origin_of(build_in) != origin:
            build(rows, build_in, seed=seed, origin=origin)
    elif not where.exists() and name.count("/") == 1 and not where.is_absolute():
        _fetch(name, build_in, seed)
    else:
        return load(where)
    return load(build_in)


def _fetch(name: str, build_in: Path, seed: int) -> None:
    before = origin_of(build_in)
    usable = before.get("dataset") == name and before["seed"] in (seed, None)
    try:
        revision = newest_revision(name)
        if usable and before["revision"] == revision:
            return
        found = HubDataset.open(name, revision)
    except HubUnreachableError as error:
        if not usable:
            raise
        print(f"{error}\nusing revision {before['revision'][:12]} of {name} in {build_in}", file=sys.stderr)
        return
    origin = {"dataset": name, "revision": revision}
    if found.kind == "published" and {normalize_split(split) for split in found.streams} == {"train", "test"}:
        held_out = "test" if "test" in found.streams else "as the source states"
        rows = Rows(found.samples(), found.total())
        build(rows, build_in, origin=origin | {"seed": None}, published=name, held_out=held_out)
    else:
        build(hub_rows(found), build_in, seed=seed, origin=origin | {"seed": seed})


def _folder_state(folder: Path, rows: Rows) -> str:
    """Return a hash of a labeled folder. It changes with any label, and with name, size or time of any image."""
    state = hashlib.sha256()
    for row in rows:
        state.update(identity(row).encode())
        if isinstance(row, Sample):
            with suppress(OSError):  # a broken link, which `build` rejects
                file = (folder / row.name).stat()
                state.update(f"{file.st_size} {file.st_mtime_ns}".encode())
    return state.hexdigest()


def leaks(folder: str | Path, other: str | Path) -> list[tuple[str, str]]:
    """Return pairs of file names: near-duplicates between the data set in `folder` and any folder of images.

    Compare a data set with the training images of a model before believing its scores. Raises DatasetError for a path
    that is no folder.
    """
    prints, files = [], []
    for side, root in enumerate((Path(folder), Path(other))):
        if not root.is_dir():
            raise DatasetError(f"{root} is not a folder: check the path")
        for path in tqdm(list(find_images([root])), desc=f"reading {root.name}", unit="image"):
            with suppress(ImageError):  # `build` reports unreadable images
                prints.append(fingerprint(open_image(path)))
                files.append((side, path.relative_to(root).as_posix()))
    groups: dict[int, tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
    for first, (side, name) in zip(group_near(prints), files, strict=True):
        groups[first][side].append(name)
    return [pair for sides in groups.values() for pair in product(*sides)]


def rows_id(split: datasets.Dataset) -> str:
    """The fingerprint that `datasets` keeps of the rows. It has no public name."""
    return split._fingerprint


def record_of(row: dict[str, Any]) -> FoodRecord:
    """Return the label of one row."""
    return FoodRecord(**label_of(row))


def scopes_of(split: datasets.Dataset) -> list[str]:
    """Return the `label_scope` of each row: "exhaustive" in data sets from before the column was added."""
    return list(split["label_scope"]) if "label_scope" in split.column_names else [EXHAUSTIVE] * len(split)


def as_conversations(split: datasets.Dataset, target: str = "json") -> datasets.Dataset:
    """Return rows with `images`, `prompt` and `completion`, made on access so that no image stays in memory.

    `target` is the format of the answers; see `prompts.answer`.
    """

    def conversations(batch: dict[str, list]) -> dict[str, list]:
        records = [record_of(dict(zip(batch, values, strict=True))) for values in zip(*batch.values(), strict=True)]
        return {
            "images": [[open_image(image)] for image in batch["image"]],
            "prompt": [prompts.conversation() for _ in records],
            "completion": [prompts.answer(record, target) for record in records],
        }

    return split.with_transform(conversations)
