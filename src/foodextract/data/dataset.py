"""Samples → one clean, deduplicated, split data set on disk, and its rows as conversations.

`build` works in three steps and a killed run takes up where it was:

1. ingest: one image at a time is read, decoded, hashed and stored, and noted in a ledger, in constant memory;
2. judge: labels are cleaned and linted, exact duplicates dropped, near-duplicates grouped, groups split; no images are touched;
3. write, all or nothing:

    OUT/train/*.png, OUT/train/metadata.jsonl    an ordinary image folder: `load_dataset("imagefolder", data_dir=OUT)` reads it
    OUT/test/…                                   the same for the held-out fifth
    OUT/arrow/                                   the same rows as a saved DatasetDict, ready for `push_to_hub`
    OUT/rejects.jsonl                            every row that was read and not kept, and why
    OUT/findings.jsonl                           what the label lint fixed, flagged or rejected, and why
    OUT/near_duplicates.jsonl                    groups of images that look alike; a group is never split
    OUT/report.json                              counts, and a fingerprint that depends on content alone
"""

import hashlib
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
from tqdm import tqdm

from foodextract import prompts
from foodextract.data import near_duplicates
from foodextract.data.columns import FEATURES
from foodextract.data.folders import labeled_folder
from foodextract.data.hub_source import HubDataset, HubUnreachableError, newest_revision
from foodextract.data.ingest import IMAGES, LEDGER, identity, ingest
from foodextract.data.samples import METADATA, DatasetError, Reject, Sample, split_named
from foodextract.data.scenes import Split
from foodextract.data.selection import SPLITS, TEST_SHARE, Judged, accept, judge
from foodextract.data.sources import hub_rows
from foodextract.images import ImageError, find_images, open_image
from foodextract.schema import EXHAUSTIVE, FoodRecord

ORIGIN = "origin.json"  # beside what `open_dataset` built: which data set or folder it was built from


def build(
    samples: Iterable[Sample | Reject],
    out: str | Path,
    *,
    seed: int = 42,
    test_share: float = TEST_SHARE,
    policy: Mapping[str, str] | None = None,
    total: int | None = None,
) -> dict[str, Any]:
    """Write the data set to `out` and return its report. `policy` says what happens to label faults where it is not `cleaning.POLICIES`.

    The same samples and seed give the same data set, byte for byte, in whatever order they come and however often the run was killed.
    Raises DatasetError when a split would be empty, and when `out` holds something that is not a data set built here.
    """
    return _build(samples, out, partial(judge, seed=seed, test_share=test_share, policy=policy), seed=seed, total=total)


def _build(
    samples: Iterable[Sample | Reject],
    out: str | Path,
    decide: Callable[[list[dict[str, Any]]], Judged],
    *,
    seed: int | None,
    total: int | None = None,
    origin: dict[str, Any] | None = None,
    published: str = "",
    held_out: str | None = None,
) -> dict[str, Any]:
    """`build` with any second step.

    `origin` is kept beside the data set. `published` is the Hub id of one that is taken as it is; `held_out` then says how it was split.
    """
    out = Path(out)
    if out.exists() and not (out / "report.json").exists() and (not out.is_dir() or any(out.iterdir())):
        raise DatasetError(f"{out} exists and is not a data set built here: choose another folder or empty it")
    unfinished = out.with_name(out.name + ".partial")
    _begin(unfinished, origin)
    entries = ingest(samples, unfinished, total)
    judged = decide(entries)
    if not all(judged.rows.values()):
        counts = ", ".join(f"{len(rows)} {split}" for split, rows in judged.rows.items())
        reasons = "".join(f"\n  {reject.name}: {reject.reason}" for reject in judged.rejects[:5])
        raise DatasetError(
            f"too few usable images ({counts}, {len(judged.rejects)} rejected): add images or mend labels{reasons}"
        )
    stated = {entry["pixels"] for entry in entries if entry.get("split")}
    split_here = any(row["pixels_sha256"] not in stated for row in judged.rows["test"])
    held_out = held_out or (f"split by foodextract with seed {seed}" if split_here else "as the source states")
    report = _report(judged, len(entries), published) | {"held_out": held_out}
    _write(unfinished, judged, report, published)
    shutil.rmtree(out, ignore_errors=True)
    unfinished.rename(out)
    return report


# ----------------------------------------------------------------------------------------------------------------------------------- write


def _report(judged: Judged, read: int, published: str) -> dict[str, Any]:
    everything = list(chain(*judged.rows.values()))
    told = sorted(
        json.dumps({key: value for key, value in row.items() if key != "stored"}, sort_keys=True) for row in everything
    )
    by_category = {split: Counter(row["category"] for row in rows) for split, rows in judged.rows.items()}
    return {
        "read": read,
        "kept": len(everything),
        "rejected": len(judged.rejects),
        "duplicates": sum(reject.reason.startswith("duplicate") for reject in judged.rejects),
        "near_duplicate_groups": len(judged.near),
        "train": len(judged.rows["train"]),
        "test": len(judged.rows["test"]),
        "is_food": {split: sum(row["is_food"] for row in rows) for split, rows in judged.rows.items()},
        "findings": Counter(f"{finding['rule']}: {finding['policy']}" for finding in judged.findings).most_common(),
        "categories": {
            name: [by_category[split][name] for split in SPLITS] for name in sorted(set(chain(*by_category.values())))
        },
        "food_items": Counter(item for row in everything for item in row["food_items"]).most_common(),
        "drink_items": Counter(item for row in everything for item in row["drink_items"]).most_common(),
        "sources": Counter(published or row["source"] for row in everything).most_common(),
        "licenses": Counter(row["license"] for row in everything).most_common(),
        "fingerprint": hashlib.sha256("\n".join(told).encode()).hexdigest(),
    }


def _write(folder: Path, judged: Judged, report: dict[str, Any], published: str) -> None:
    info = datasets.DatasetInfo(report["held_out"], features=FEATURES, dataset_name=published or None)
    splits = {}
    for split, rows in judged.rows.items():
        shutil.rmtree(folder / split, ignore_errors=True)
        (folder / split).mkdir()
        with (folder / split / METADATA[0]).open("w", encoding="utf-8") as metadata:
            for row in tqdm(rows, desc=f"writing {split}", unit="image"):
                _link(folder / row["stored"], folder / split / row["file_name"])
                metadata.write(json.dumps({key: value for key, value in row.items() if key != "stored"}) + "\n")
        print_of = f"{report['fingerprint'][:16]}-{split}"
        splits[split] = _arrow(folder, split, rows, print_of, info)
    shutil.rmtree(folder / "arrow", ignore_errors=True)
    datasets.DatasetDict(splits).save_to_disk(folder / "arrow")  # the images' bytes go in with them
    for name, lines in (
        ("rejects", map(asdict, judged.rejects)),
        ("findings", judged.findings),
        ("near_duplicates", judged.near),
    ):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (folder / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    (folder / LEDGER).unlink()  # first: without it a run that is killed here starts anew instead of missing images
    for leftover in ("cache", IMAGES):
        shutil.rmtree(folder / leftover, ignore_errors=True)


def _arrow(
    folder: Path, split: Split, rows: list[dict[str, Any]], fingerprint: str, info: datasets.DatasetInfo
) -> datasets.Dataset:
    def told() -> Iterator[dict[str, Any]]:
        for row in rows:
            yield {"image": str(folder / split / row["file_name"])} | {
                key: row[key] for key in FEATURES if key != "image"
            }

    made = datasets.Dataset.from_generator(told, features=FEATURES, cache_dir=str(folder / "cache"))
    return datasets.Dataset(made.data, info, fingerprint=fingerprint)  # no trace of when and where


def _link(stored: Path, target: Path) -> None:
    try:
        os.link(stored, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(stored, target)


# ------------------------------------------------------------------------------------------------------------------------------------ read


def load(folder: str | Path) -> datasets.DatasetDict:
    """The data set that `build` wrote to `folder`. Raises DatasetError for a folder without one."""
    arrow = Path(folder) / "arrow"
    if not (arrow / "dataset_dict.json").is_file():
        raise DatasetError(
            f"{folder} holds no data set: run 00_create_vlm_dataset.ipynb with this folder as its output first"
        )
    return datasets.load_from_disk(arrow)


def open_dataset(where: str | Path, build_in: str | Path, seed: int = 42) -> datasets.DatasetDict:
    """A data set by whatever names it: a folder that `build` wrote, a labeled image folder, or a Hub id (see `sources.hub`).

    The latter two are built in `build_in`, once: as long as the folder, or the newest revision on the Hub, and the seed are the same, what
    was built is used again. A data set that this project published keeps its rows and splits as they are. When the Hub cannot be reached,
    what was built from this data set before is used, and a line on stderr says so. Raises DatasetError.
    """
    where, name, build_in = Path(where), str(where), Path(build_in)
    if (where / "arrow").is_dir() or (where.exists() and not where.is_dir()):
        return load(where)
    if where.is_dir():
        origin = {"folder": _state_of(where), "seed": seed}
        if _origin_of(build_in) != origin:
            _build(labeled_folder(where), build_in, partial(judge, seed=seed), seed=seed, origin=origin)
    elif name.count("/") == 1 and not where.is_absolute():
        _fetch(name, build_in, seed)
    else:
        return load(where)
    return load(build_in)


def _fetch(name: str, build_in: Path, seed: int) -> None:
    there = _origin_of(build_in)
    usable = there.get("dataset") == name and there["seed"] in (seed, None)
    try:
        revision = newest_revision(name)
        if usable and there["revision"] == revision:
            return
        found = HubDataset.open(name, revision)
    except HubUnreachableError as error:
        if not usable:
            raise
        print(
            f"{error}\n{build_in} holds revision {there['revision'][:12]} of {name}: this is used now", file=sys.stderr
        )
        return
    as_it_is = found.kind == "published" and {split_named(split) for split in found.streams} == {"train", "test"}
    origin = {
        "dataset": name,
        "revision": revision,
        "seed": None if as_it_is else seed,
    }  # published splits have no seed
    if as_it_is:
        held_out = "test" if "test" in found.streams else "as the source states"
        _build(
            found.samples(),
            build_in,
            accept,
            seed=None,
            total=found.total(),
            origin=origin,
            published=name,
            held_out=held_out,
        )
    else:
        _build(hub_rows(found), build_in, partial(judge, seed=seed), seed=seed, origin=origin)


def _origin_of(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / ORIGIN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _begin(unfinished: Path, origin: dict[str, Any] | None) -> None:
    """Note what is built from now on. What an interrupted build has read from another revision, or another state of a folder, goes."""
    if _origin_of(unfinished) == (origin or {}):
        return
    if origin is None:  # `build` compares the ledger with what its source says
        (unfinished / ORIGIN).unlink()
        return
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    (unfinished / ORIGIN).write_text(json.dumps(origin), encoding="utf-8")


def _state_of(folder: Path) -> str:
    """A hash of what a labeled folder holds: changes with any label, and with name, size or time of any image."""
    state = hashlib.sha256()
    for row in labeled_folder(folder):
        state.update(identity(row).encode())
        if isinstance(row, Sample):
            file = (folder / row.name).stat()
            state.update(f"{file.st_size} {file.st_mtime_ns}".encode())
    return state.hexdigest()


def leaks(folder: str | Path, other: str | Path) -> list[tuple[str, str]]:
    """Images of the data set in `folder` that look like one below `other` (any folder of images): pairs of file names.

    Run it against whatever a model was trained on before its scores on this data set are believed.
    """
    prints, names = [], []
    for root in (Path(folder), Path(other)):
        for path in tqdm(list(find_images([root])), desc=f"looking at {root.name}", unit="image"):
            try:
                prints.append(near_duplicates.fingerprint(open_image(path)))
                names.append((root == Path(other), path.relative_to(root).as_posix()))
            except ImageError:
                continue  # unreadable images were named when the data set was built
    groups: dict[int, list[tuple[bool, str]]] = {}
    for first, name in zip(near_duplicates.group_near(prints), names, strict=True):
        groups.setdefault(first, []).append(name)
    return [(a, b) for group in groups.values() for mine, a in group if not mine for theirs, b in group if theirs]


# ------------------------------------------------------------------------------------------------------------------------------------ rows


def record_of(row: dict[str, Any]) -> FoodRecord:
    """The label of one row."""
    return FoodRecord(**{key: row[key] for key in FoodRecord.model_fields})


def scopes_of(split: datasets.Dataset) -> list[str]:
    """What the label of each row names, as `Sample.label_scope` says; everything, in data sets that were built before it was noted."""
    return list(split["label_scope"]) if "label_scope" in split.column_names else [EXHAUSTIVE] * len(split)


def as_conversations(split: datasets.Dataset, target: str = "json") -> datasets.Dataset:
    """The rows a trainer takes, made on access so that no image is held in memory: `images`, `prompt`, `completion`.

    `target` is what answers are written as; see `prompts.answer`.
    """

    def conversations(batch: dict[str, list]) -> dict[str, list]:
        records = [record_of(dict(zip(batch, values, strict=True))) for values in zip(*batch.values(), strict=True)]
        return {
            "images": [[open_image(image)] for image in batch["image"]],
            "prompt": [prompts.conversation() for _ in records],
            "completion": [prompts.answer(record, target) for record in records],
        }

    return split.with_transform(conversations)
