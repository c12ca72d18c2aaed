"""Build a data set on disk from samples.

1. `ingest` decodes, hashes and stores one image at a time.
2. `select` cleans labels, drops duplicates, groups near-duplicates and splits the groups.
3. The result is written to OUT.partial and then renamed:

    OUT/train/*.png, OUT/train/metadata.parquet  an image folder: `load_dataset("imagefolder", data_dir=OUT)` reads it
    OUT/test/…                                   the same for the held-out fifth
    OUT/arrow/                                   the same rows as a saved DatasetDict, ready for `push_to_hub`
    OUT/rejects.jsonl                            every row that was left out, and why
    OUT/issues.jsonl                             what the label rules fixed, flagged or rejected, and why
    OUT/near_duplicates.jsonl                    groups of images that look alike; a group is never split
    OUT/report.json                              counts, and a fingerprint of the content

The metadata is Parquet because its columns have types: `imagefolder` guesses those of JSON lines, and fails where all
lists of one split are empty.

A killed build resumes when it is rerun.
"""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet
from tqdm import tqdm

from foodextract.data.ingest import IMAGES, LEDGER, ingest
from foodextract.data.label_rules.issues import Policy
from foodextract.data.samples import FEATURES, DatasetError, Reject, Sample
from foodextract.data.selection import SPLITS, Selection, accept, select
from foodextract.schema import FIELDS

ORIGIN = "origin.json"  # states which folder, or which revision on the Hub, a data set was built from
# Without the features of `datasets`, whose older versions know no `List` and would refuse to read the file.
METADATA = pyarrow.schema(
    [("file_name", pyarrow.string()), *(field for field in FEATURES.arrow_schema if field.name != "image")]
)

Origin = dict[str, Any]


def build(
    samples: Iterable[Sample | Reject],
    out: str | Path,
    *,
    seed: int = 42,
    policy: Mapping[str, Policy] | None = None,
    origin: Origin | None = None,
    published: str = "",
    held_out: str = "as the source states",
) -> dict[str, Any]:
    """Write the data set to `out` and return its report. `policy` overrides `POLICIES` of the label rules.

    `origin` is stored beside the data set. `published` is the name of a data set that this project published: its rows
    and splits are kept, and `held_out` names its test split.

    The same samples and seed give the same bytes, in whatever order the samples come and however often the build was
    killed. Raises DatasetError when a split would be empty, and when `out` holds anything but a data set built here.
    """
    out = Path(out)
    if out.exists() and not (out / "arrow").is_dir() and (not out.is_dir() or any(out.iterdir())):
        raise DatasetError(f"{out} exists and is not a data set built here: choose another folder or empty it")
    unfinished = out.with_name(out.name + ".partial")
    _start(unfinished, origin)
    entries = ingest(samples, unfinished)
    selection = accept(entries) if published else select(entries, seed=seed, policy=policy)
    if not all(selection.rows.values()):
        counts = ", ".join(f"{len(rows)} {split}" for split, rows in selection.rows.items())
        reasons = "".join(f"\n  {reject.name}: {reject.reason}" for reject in selection.rejects[:5])
        rejected = f"{len(selection.rejects)} rejected"
        raise DatasetError(f"too few usable images ({counts}, {rejected}): add images or correct labels{reasons}")
    stated = {entry["pixels"] for entry in entries if entry.get("split") == "test"}
    if not published and any(row["pixels_sha256"] not in stated for row in selection.rows["test"]):
        held_out = f"split by foodextract with seed {seed}"
    report = _report(selection, len(entries), published) | {"held_out": held_out}
    _write(unfinished, selection, report, published)
    shutil.rmtree(out, ignore_errors=True)
    unfinished.rename(out)
    return report


def origin_of(folder: Path) -> Origin:
    """Return what the data set in `folder` was built from, {} when it does not say."""
    try:
        return json.loads((folder / ORIGIN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _start(unfinished: Path, origin: Origin | None) -> None:
    """Write the origin, and delete what an interrupted build read from another one."""
    if origin_of(unfinished) == (origin or {}):
        return
    if origin is None:  # the ledger compares the samples
        (unfinished / ORIGIN).unlink()
        return
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    (unfinished / ORIGIN).write_text(json.dumps(origin), encoding="utf-8")


def _report(selection: Selection, read: int, published: str) -> dict[str, Any]:
    rows = list(chain(*selection.rows.values()))
    content = sorted(json.dumps({key: row[key] for key in row if key != "stored"}, sort_keys=True) for row in rows)
    by_category = {split: Counter(row["category"] for row in part) for split, part in selection.rows.items()}
    categories = sorted(set(chain(*by_category.values())))
    return {
        "read": read,
        "kept": len(rows),
        "rejected": len(selection.rejects),
        "duplicates": sum(reject.reason.startswith("duplicate") for reject in selection.rejects),
        "near_duplicate_groups": len(selection.near_duplicates),
        **{split: len(part) for split, part in selection.rows.items()},
        "is_food": {split: sum(row["is_food"] for row in part) for split, part in selection.rows.items()},
        "issues": Counter(f"{issue['rule']}: {issue['policy']}" for issue in selection.issues).most_common(),
        "categories": {name: [by_category[split][name] for split in SPLITS] for name in categories},
        **{field: Counter(item for row in rows for item in row[field]).most_common() for field in FIELDS},
        "sources": Counter(published or row["source"] for row in rows).most_common(),
        "licenses": Counter(row["license"] for row in rows).most_common(),
        "fingerprint": hashlib.sha256("\n".join(content).encode()).hexdigest(),
    }


def _write(folder: Path, selection: Selection, report: dict[str, Any], published: str) -> None:
    info = datasets.DatasetInfo(report["held_out"], features=FEATURES, dataset_name=published or None)
    splits = {}
    for split, rows in selection.rows.items():
        shutil.rmtree(folder / split, ignore_errors=True)
        (folder / split).mkdir()
        for row in tqdm(rows, desc=f"writing {split}", unit="image"):
            _link(folder / row["stored"], folder / split / row["file_name"])
        metadata = pyarrow.Table.from_pylist(rows, METADATA)
        pyarrow.parquet.write_table(metadata, folder / split / "metadata.parquet")
        columns = [row | {"image": str(folder / split / row["file_name"])} for row in rows]
        table = datasets.Dataset.from_list([{key: row[key] for key in FEATURES} for row in columns], features=FEATURES)
        fingerprint = f"{report['fingerprint'][:16]}-{split}"
        splits[split] = datasets.Dataset(table.data, info, fingerprint=fingerprint)  # without time and place
    shutil.rmtree(folder / "arrow", ignore_errors=True)
    datasets.DatasetDict(splits).save_to_disk(folder / "arrow")  # embeds the bytes of the images
    _write_lines(folder / "rejects.jsonl", map(asdict, selection.rejects))
    _write_lines(folder / "issues.jsonl", selection.issues)
    _write_lines(folder / "near_duplicates.jsonl", selection.near_duplicates)
    (folder / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    (folder / LEDGER).unlink()  # before the images, so that a killed run does not trust a ledger without images
    shutil.rmtree(folder / IMAGES, ignore_errors=True)


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _link(stored: Path, target: Path) -> None:
    try:
        os.link(stored, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(stored, target)
