"""What becomes of every image that was read: labels cleaned, exact copies dropped, look-alikes grouped, groups split.

Works on the ledger's entries alone; no image is touched.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from foodextract.data import near_duplicates
from foodextract.data.label_rules import cleaning
from foodextract.data.samples import DatasetError, Reject
from foodextract.data.scenes import Split
from foodextract.schema import FoodRecord

TEST_SHARE = 0.2
SPLITS: tuple[Split, ...] = ("train", "test")


@dataclass
class Judged:
    """What the second step decides: rows by split, and everything that it left out or noticed."""

    rows: dict[Split, list[dict[str, Any]]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    rejects: list[Reject] = field(default_factory=list)
    findings: list[dict[str, Any]] = field(default_factory=list)
    near: list[dict[str, Any]] = field(default_factory=list)


def split_of(group: str, seed: int, test_share: float = TEST_SHARE) -> Split:
    """Which side a group falls on: by its hash alone, so that adding images moves none that is already there.

    Every class and both values of `is_food` are split in this proportion, up to chance; the notebook's split table shows by how much.
    """
    digest = hashlib.sha256(f"{seed}:{group}".encode()).digest()
    return "test" if int.from_bytes(digest[:8]) < test_share * 2**64 else "train"


def judge(
    entries: list[dict[str, Any]], *, seed: int, test_share: float = TEST_SHARE, policy: Mapping[str, str] | None = None
) -> Judged:
    """Decide what becomes of every entry, whatever their order: clean, drop, group, split."""
    judged = Judged()
    read = sorted((entry for entry in entries if "pixels" in entry), key=lambda entry: (entry["pixels"], entry["name"]))
    judged.rejects = [Reject(entry["name"], entry["reject"]) for entry in entries if "reject" in entry]
    unique = []
    for _, copies in groupby(read, key=lambda entry: entry["pixels"]):
        first, *others = copies
        unique.append(first)
        for other in others:
            differs = "" if other["label"] == first["label"] else ", labeled differently"
            judged.rejects.append(Reject(other["name"], f"duplicate of {first['name']}{differs}"))
    labeled = _clean(unique, judged, policy)
    components = _groups([entry for entry, _ in labeled], judged)
    for (entry, record), component in zip(labeled, components, strict=True):
        split = component["split"] or split_of(component["key"], seed, test_share)
        if entry["split"] not in (None, split):
            judged.rejects.append(
                Reject(entry["name"], f"near-duplicate of an image held out, {component['held_out']}")
            )
            continue
        judged.rows[split].append(_row(entry, record, component["key"]))
    return _sorted(judged)


def accept(entries: list[dict[str, Any]]) -> Judged:
    """Take every entry as it is, on the side that it states: for a data set that was judged before it was published."""
    judged = Judged(rejects=[Reject(entry["name"], entry["reject"]) for entry in entries if "reject" in entry])
    for entry in entries:
        if "pixels" not in entry:
            continue
        try:
            judged.rows[entry["split"] or "train"].append(_row(entry, FoodRecord(**entry["label"]), entry["group"]))
        except ValidationError:
            judged.rejects.append(Reject(entry["name"], f"the label breaks the schema: {entry['label']}"))
    return _sorted(judged)


def _row(entry: dict[str, Any], record: FoodRecord, group: str) -> dict[str, Any]:
    return (
        {
            "file_name": f"{Path(entry['name']).stem}-{entry['pixels'][:8]}{Path(entry['stored']).suffix}",
            "name": entry["name"],
        }
        | record.model_dump()
        | {"category": entry["category"], "group": group, "source": entry["source"], "license": entry["license"]}
        | {"label_scope": entry["label_scope"], "pixels_sha256": entry["pixels"], "stored": entry["stored"]}
    )


def _sorted(judged: Judged) -> Judged:
    for rows in judged.rows.values():
        rows.sort(key=lambda row: row["file_name"])
    judged.rejects.sort(key=lambda reject: (reject.name, reject.reason))
    return judged


def _clean(
    entries: list[dict[str, Any]], judged: Judged, policy: Mapping[str, str] | None
) -> list[tuple[dict[str, Any], FoodRecord]]:
    """Two passes over the labels: what is usual in this data set, then every label in its light."""
    policies = cleaning.POLICIES | (policy or {})
    if unknown := set(policies) - set(cleaning.POLICIES):
        raise DatasetError(
            f"no label rule is called {', '.join(sorted(unknown))}: choose among {', '.join(cleaning.POLICIES)}"
        )
    statistics = cleaning.Statistics()
    for entry in entries:
        record, _ = cleaning.clean(entry["label"], entry["category"], policies=policies)
        if record is not None:
            statistics.add(record, entry["category"])
    cleaned = []
    for entry in entries:
        record, findings = cleaning.clean(entry["label"], entry["category"], statistics, policies)
        judged.findings += [{"name": entry["name"], **asdict(finding)} for finding in findings]
        if record is not None:
            cleaned.append((entry, record))
        else:
            reasons = [f"{finding.rule}: {finding.reason}" for finding in findings if finding.policy == "reject"]
            judged.rejects.append(Reject(entry["name"], "; ".join(reasons)))
    return cleaned


def _groups(entries: list[dict[str, Any]], judged: Judged) -> list[dict[str, Any]]:
    """The component of every entry: images that look alike, or that their source puts into one group, directly or through others.

    `key` is the component's smallest pixel hash, `split` what a source fixed ("test" where it fixed both), `held_out` that row's name.
    """
    if not entries:
        return []
    near = near_duplicates.group_near([bytes.fromhex(entry["print"]) for entry in entries])
    declared: dict[str, int] = {}
    told = [
        declared.setdefault(f"{e['source']}/{e['group']}" if e["group"] else f"#{i}", i) for i, e in enumerate(entries)
    ]
    here = np.arange(len(entries))
    edges = coo_array((np.ones(2 * len(entries)), (np.r_[here, here], np.r_[near, told])), shape=(len(entries),) * 2)
    _, label = connected_components(edges, directed=False)
    components: dict[int, dict[str, Any]] = {}
    for entry, number in zip(
        entries, label, strict=True
    ):  # entries are sorted by pixel hash, so the first one's is the smallest
        component = components.setdefault(
            number, {"key": entry["pixels"], "split": None, "held_out": None, "names": []}
        )
        component["names"].append(entry["name"])
        if entry["split"] == "test" and component["split"] != "test":
            component |= {"split": "test", "held_out": entry["name"]}
        component["split"] = component["split"] or entry["split"]
    alike: dict[int, list[str]] = {}
    for entry, first in zip(entries, near, strict=True):
        alike.setdefault(first, []).append(entry["name"])
    judged.near = [{"names": sorted(names)} for names in alike.values() if len(names) > 1]
    return [components[number] for number in label]
