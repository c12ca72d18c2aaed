"""Reading every image of a source once, so that a killed run can take up where it was.

Each image is decoded, hashed and stored, and a line about it goes to a ledger. Memory does not grow with the images, only with the
lines. Nothing is judged here.
"""

import hashlib
import json
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from foodextract.data.near_duplicates import fingerprint
from foodextract.data.samples import DatasetError, Reject, Sample
from foodextract.images import SUFFIXES, ImageError, open_image

LEDGER, IMAGES = "ledger.jsonl", "images"
AHEAD = 16  # images in work or waiting to be noted


def ingest(samples: Iterable[Sample | Reject], folder: Path, total: int | None = None) -> list[dict[str, Any]]:
    """Store every image of `samples` below `folder` and return the ledger: one entry a sample, with hashes, label and provenance.

    The progress bar counts to `total`, or to what the source says of itself (`samples.Rows`).

    Entries of an earlier, killed run are kept as long as the source still yields the same samples; the first that differs, and all
    behind it, are read anew.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ledger = folder / LEDGER
    entries, kept_bytes = _read_ledger(ledger)
    total = total if total is not None else getattr(samples, "total", None)
    stream = iter(samples)
    waiting: list[Sample | Reject] = []
    with ledger.open("ab") as file, tqdm(total=total, desc="reading images", unit="image") as bar:
        for position, entry in enumerate(entries):
            sample = next(stream, None)
            if sample is None or identity(sample) != entry["id"]:
                kept_bytes = sum(entry["bytes"] for entry in entries[:position])
                entries = entries[:position]
                waiting = [sample] if sample is not None else []
                break
            bar.update()
        file.truncate(kept_bytes)
        for entry in _in_order(chain(waiting, stream), folder):
            line = json.dumps(entry).encode() + b"\n"
            file.write(line)
            file.flush()
            entries.append(entry | {"bytes": len(line)})
            bar.update()
    return entries


def _in_order(samples: Iterator[Sample | Reject], folder: Path) -> Iterator[dict[str, Any]]:
    """The entries of `samples`, one after the other, while threads work on the next few: decoding and hashing let go of the interpreter."""
    ahead: deque[Future[dict[str, Any]]] = deque()
    fault: DatasetError | None = None
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        while True:
            try:
                ahead.extend(pool.submit(_entry, sample, folder) for sample in islice(samples, AHEAD - len(ahead)))
            except DatasetError as error:  # the source gave out: what it gave before is noted first
                fault = error
            if not ahead:
                break
            yield ahead.popleft().result()
    if fault:
        raise fault


def _read_ledger(ledger: Path) -> tuple[list[dict[str, Any]], int]:
    entries, size = [], 0
    for line in ledger.open("rb") if ledger.exists() else ():
        try:
            entries.append(json.loads(line) | {"bytes": len(line)})
        except json.JSONDecodeError:  # the line that was being written when the run was killed
            break
        size += len(line)
    return entries, size


def identity(sample: Sample | Reject) -> str:
    """Changes whenever anything that the source says of a row does."""
    told = {name: value for name, value in vars(sample).items() if name != "read"}
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()


def _entry(sample: Sample | Reject, folder: Path) -> dict[str, Any]:
    entry = {"id": identity(sample), "name": sample.name}
    if isinstance(sample, Reject):
        return entry | {"reject": sample.reason}
    try:
        data = sample.read()
        image = open_image(data)
    except (ImageError, OSError) as error:
        return entry | {"reject": str(error)}
    pixels = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()
    suffix = Path(sample.name).suffix.lower()
    stored = (
        Path(IMAGES)
        / pixels[:2]
        / f"{pixels}-{hashlib.sha256(data).hexdigest()[:8]}{suffix if suffix in SUFFIXES else '.img'}"
    )
    (folder / stored).parent.mkdir(parents=True, exist_ok=True)
    (folder / stored).write_bytes(data)
    told = {name: value for name, value in vars(sample).items() if name not in ("read", "name")}
    return entry | told | {"pixels": pixels, "stored": str(stored), "print": fingerprint(image).hex()}
