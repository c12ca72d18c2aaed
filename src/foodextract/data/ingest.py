"""Step 1 of a build: decode, hash and store every image of a source.

Each sample becomes one line of a ledger, so that a killed run can resume. Memory grows with the lines only.
"""

import hashlib
import io
import json
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from foodextract.data.near_duplicates import fingerprint
from foodextract.data.samples import DatasetError, Reject, Sample, readable
from foodextract.images import SUFFIXES, ImageError, decode

LEDGER, IMAGES = "ledger.jsonl", "images"
AHEAD = 16  # images in progress

Entry = dict[str, Any]


def ingest(samples: Iterable[Sample | Reject], folder: Path) -> list[Entry]:
    """Store the images below `folder` and return one entry per sample, with hashes, label and provenance.

    Entries of an earlier run are reused where the source yields the same sample at the same position.
    """
    folder.mkdir(parents=True, exist_ok=True)
    known, entries = _read_ledger(folder / LEDGER), []
    total = getattr(samples, "total", None)
    with (folder / LEDGER).open("ab") as ledger, tqdm(total=total, desc="reading images", unit="image") as bar:
        if ledger.tell():
            ledger.write(b"\n")  # ends a line that was cut off
        for entry in _entries(samples, known, folder):
            if entry is not known.get(entry["position"]):
                ledger.write(json.dumps(entry).encode() + b"\n")
                ledger.flush()
            entries.append(entry)
            bar.update()
    return entries


def _read_ledger(ledger: Path) -> dict[int, Entry]:
    known: dict[int, Entry] = {}
    for line in ledger.open("rb") if ledger.exists() else ():
        with suppress(json.JSONDecodeError):  # the line that was being written when the run was killed
            entry = json.loads(line)
            known[entry["position"]] = entry
    return known


def _entries(samples: Iterable[Sample | Reject], known: dict[int, Entry], folder: Path) -> Iterator[Entry]:
    """Yield the entries in order while threads work on the next few; decoding and hashing release the interpreter."""
    stream = enumerate(samples)
    ahead: deque[Future[Entry]] = deque()
    failure: DatasetError | None = None
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        while True:
            try:
                for position, sample in islice(stream, AHEAD - len(ahead)):
                    ahead.append(pool.submit(_entry, position, sample, known.get(position), folder))
            except DatasetError as error:  # the source failed: the samples before it are kept
                failure = error
            if not ahead:
                break
            yield ahead.popleft().result()
    if failure:
        raise failure


def identity(sample: Sample | Reject) -> str:
    """Return a hash of everything that the source states about a sample."""
    stated = {name: value for name, value in vars(sample).items() if name != "read"}
    return hashlib.sha256(json.dumps(stated, sort_keys=True, default=str).encode()).hexdigest()


def _as_png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _entry(position: int, sample: Sample | Reject, known: Entry | None, folder: Path) -> Entry:
    entry: Entry = {"position": position, "id": identity(sample), "name": readable(sample.name)}
    if known and known["id"] == entry["id"] and "reject" not in known:  # what was missing may be there now
        return known
    if isinstance(sample, Reject):
        return entry | {"reject": readable(sample.reason)}
    try:
        data = sample.read()
        image, plain = decode(data)
    except (ImageError, OSError) as error:
        return entry | {"reject": str(error)}
    pixels = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()
    suffix = Path(sample.name).suffix.lower()
    if not plain:  # `datasets` and its users open images with Pillow alone
        data, suffix = _as_png(image), ".png"
    file = f"{pixels}-{hashlib.sha256(data).hexdigest()[:8]}{suffix if suffix in SUFFIXES else '.img'}"
    stored = Path(IMAGES) / pixels[:2] / file
    (folder / stored).parent.mkdir(parents=True, exist_ok=True)
    (folder / stored).write_bytes(data)
    stated = {
        name: readable(value) if isinstance(value, str) else value
        for name, value in vars(sample).items()
        if name not in ("read", "name")
    }
    return entry | stated | {"pixels": pixels, "stored": str(stored), "print": fingerprint(image).hex()}
