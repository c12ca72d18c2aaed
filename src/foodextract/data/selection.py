"""Step 2 of a build: clean labels, drop duplicates, group near-duplicates and split the groups.

Works on the entries of the ledger and reads no image.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, get_args

import numpy as np
from pydantic import ValidationError
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from foodextract.data.ingest import Entry
from foodextract.data.label_rules.cleaning import clean
from foodextract.data.label_rules.issues import POLICIES, Policy, Statistics
from foodextract.data.near_duplicates import group_near
from foodextract.data.samples import DatasetError, Reject
from foodextract.data.scenes import Split
from foodextract.schema import FoodRecord

TEST_SHARE = 0.2
MAX_STEM = 200  # bytes of a file name that are kept; file systems allow 255 in all
UNUSUAL = re.compile(r'[\\/:*?"<>|\x00-\x1f]')  # characters that some file systems lack
SPLITS: tuple[Split, ...] = ("train", "test")


@dataclass
class Selection:
    """The rows of each split, the rejects, the issues of the labels, and the groups of near-duplicates."""

    rows: dict[Split, list[dict[str, Any]]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    rejects: list[Reject] = field(default_factory=list)
    issues: list[dict[str, Any]] = field(default_factory=list)
    near_duplicates: list[dict[str, Any]] = field(default_factory=list)

    def reject(self, entry: Entry, reason: str) -> None:
        self.rejects.append(Reject(entry["name"], reason))

    def add(self, split: Split, entry: Entry, record: FoodRecord, group: str) -> None:
        stem = UNUSUAL.sub("_", Path(entry["name"]).stem).encode()[:MAX_STEM].decode(errors="ignore")
        file_name = f"{stem}-{entry['pixels'][:8]}{Path(entry['stored']).suffix}"
        row = {"file_name": file_name, "name": entry["name"], **record.model_dump()}
        row |= {"category": entry["category"], "group": group, "source": entry["source"], "license": entry["license"]}
        row |= {"label_scope": entry["label_scope"], "pixels_sha256": entry["pixels"], "stored": entry["stored"]}
        self.rows[split].append(row)

    def sort(self) -> "Selection":
        for rows in self.rows.values():
            rows.sort(key=lambda row: row["file_name"])
        self.rejects.sort(key=lambda reject: (reject.name, reject.reason))
        return self


def split_of(group: str, seed: int) -> Split:
    """Return the split of a group. It depends on the group's hash alone, so added images move no other."""
    digest = hashlib.sha256(f"{seed}:{group}".encode()).digest()
    return "test" if int.from_bytes(digest[:8]) < TEST_SHARE * 2**64 else "train"


def select(entries: list[Entry], *, seed: int, policy: Mapping[str, Policy] | None = None) -> Selection:
    """Clean, deduplicate, group and split the entries, independently of their order. Raises DatasetError."""
    selection = Selection()
    unique = _deduplicated(entries, selection)
    labeled = _cleaned(unique, selection, policy or {})
    components = _components([entry for entry, _ in labeled], selection)
    held_out = any(entry["split"] == "test" for entry, _ in labeled)  # a train split that stands alone is none
    for (entry, record), component in zip(labeled, components, strict=True):
        split = (component["split"] if held_out else None) or split_of(component["key"], seed)
        if not held_out or entry["split"] in (None, split):
            selection.add(split, entry, record, component["key"])
        else:
            selection.reject(entry, f"near-duplicate of an image held out, {component['held_out']}")
    return selection.sort()


def accept(entries: list[Entry]) -> Selection:
    """Take every entry as it is, in the split that it states: for a data set that was selected before publication."""
    selection = Selection()
    for entry in entries:
        if "reject" in entry:
            selection.reject(entry, entry["reject"])
            continue
        try:
            selection.add(entry["split"] or "train", entry, FoodRecord(**entry["label"]), entry["group"])
        except ValidationError:
            selection.reject(entry, f"the label breaks the schema: {entry['label']}")
    return selection.sort()


def _deduplicated(entries: list[Entry], selection: Selection) -> list[Entry]:
    """Return the entries with different pixels, sorted by their hash."""
    for entry in entries:
        if "reject" in entry:
            selection.reject(entry, entry["reject"])
    decoded = [entry for entry in entries if "pixels" in entry]
    decoded.sort(key=lambda entry: (entry["pixels"], entry["split"] != "test", entry["name"]))  # held-out copies stay
    unique = []
    for _, copies in groupby(decoded, key=lambda entry: entry["pixels"]):
        first, *others = copies
        unique.append(first)
        for other in others:
            differs = "" if other["label"] == first["label"] else ", labeled differently"
            selection.reject(other, f"duplicate of {first['name']}{differs}")
    return unique


def _cleaned(
    entries: list[Entry], selection: Selection, policy: Mapping[str, Policy]
) -> list[tuple[Entry, FoodRecord]]:
    """Clean the labels in two passes: collect the statistics of the data set, then apply all rules."""
    policies = POLICIES | dict(policy)
    if unknown := sorted(set(policy) - set(POLICIES)):
        raise DatasetError(f"no label rule is called {', '.join(unknown)}: choose among {', '.join(POLICIES)}")
    if unknown := sorted({*policy.values()} - {*get_args(Policy)}):
        raise DatasetError(f"no action is called {', '.join(unknown)}: choose among {', '.join(get_args(Policy))}")
    statistics = Statistics()
    for entry in entries:
        record, _ = clean(entry["label"], entry["category"], policies=policies)
        if record is not None:
            statistics.add(record, entry["category"])
    cleaned = []
    for entry in entries:
        record, issues = clean(entry["label"], entry["category"], statistics, policies)
        selection.issues += [{"name": entry["name"], **asdict(issue)} for issue in issues]
        if record is not None:
            cleaned.append((entry, record))
        else:
            reasons = [f"{issue.rule}: {issue.reason}" for issue in issues if issue.policy == "reject"]
            selection.reject(entry, "; ".join(reasons))
    return cleaned


def _components(entries: list[Entry], selection: Selection) -> list[dict[str, Any]]:
    """Return the component of every entry: near-duplicates, and images that their source puts into one group.

    `key` is the component's smallest pixel hash, `split` what a source states ("test" where it states both), and
    `held_out` the name of a row that it holds out.
    """
    if not entries:
        return []
    near = group_near([bytes.fromhex(entry["print"]) for entry in entries])
    groups: dict[str, int] = {}  # declared group → first member
    names = [f"{e['source']}/{e['group']}" if e["group"] else f"#{i}" for i, e in enumerate(entries)]
    declared = [groups.setdefault(name, i) for i, name in enumerate(names)]
    here = np.arange(len(entries))
    edges = coo_array(
        (np.ones(2 * len(entries)), (np.r_[here, here], np.r_[near, declared])), shape=(len(entries),) * 2
    )
    numbers = connected_components(edges, directed=False)[1].tolist()
    components: dict[int, dict[str, Any]] = {}
    for entry, number in zip(entries, numbers, strict=True):  # sorted by pixel hash, so the first has the smallest
        component = components.setdefault(number, {"key": entry["pixels"], "split": None, "held_out": None})
        if entry["split"] == "test" and component["split"] != "test":
            component |= {"split": "test", "held_out": entry["name"]}
        component["split"] = component["split"] or entry["split"]
    alike: dict[int, list[str]] = {}
    for entry, first in zip(entries, near, strict=True):
        alike.setdefault(first, []).append(entry["name"])
    selection.near_duplicates = [{"names": sorted(names)} for names in alike.values() if len(names) > 1]
    return [components[number] for number in numbers]
