"""Read a labeled data set on the Hub at one revision.

The columns tell three kinds apart: data sets that this project published, other records, and the original project's
`output_json`. Failed requests are retried a few times and then raise a DatasetError.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import datasets
import fsspec
import pyarrow.parquet
from huggingface_hub import HfApi, HfFileSystem
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError

from foodextract.data.samples import FEATURES, DatasetError, Reject, Sample, label_of, normalize_split
from foodextract.schema import EXHAUSTIVE, AnswerError, FoodRecord, label_in

Kind = Literal["published", "records", "original"]
NEEDED: dict[Kind, frozenset[str]] = {
    "published": frozenset(FEATURES) - {"label_scope"},  # older published data sets lack this column
    "records": frozenset({"image", *FoodRecord.model_fields}),
    "original": frozenset({"image", "output_json"}),
}
NAMES = ("image_name", "image_id", "file_name", "name")  # columns that may name an image
HUB_ERRORS = (OSError, HTTPError)
TIMEOUT = 10  # seconds, for the newest revision

# datasets retries 20 times at up to a minute, and huggingface_hub spends half a minute on each of these attempts.
datasets.config.STREAMING_READ_MAX_RETRIES = datasets.config.STREAMING_OPEN_MAX_RETRIES = 3
datasets.config.STREAMING_READ_SERVER_UNAVAILABLE_RETRY_INTERVAL = 10
datasets.config.STREAMING_READ_RATE_LIMIT_RETRY_INTERVAL = 10


class HubUnreachableError(DatasetError):
    """The Hub does not answer or has a fault. What was built before can still be used."""


def newest_revision(repo_id: str) -> str:
    """Return the newest commit of a data set. Raises DatasetError; HubUnreachableError without an answer."""
    try:
        return HfApi().dataset_info(repo_id, timeout=TIMEOUT).sha or "main"
    except (*HUB_ERRORS, ValueError) as error:
        raise _unreadable(repo_id, error) from error


@dataclass(frozen=True)
class HubDataset:
    """A data set on the Hub at one revision. `streams` holds its splits, train first, with images as bytes."""

    repo_id: str
    revision: str
    streams: dict[str, datasets.IterableDataset]
    files: Mapping[str, list[str]]  # split → data files

    @classmethod
    def open(cls, repo_id: str, revision: str | None = None) -> "HubDataset":
        """Open the newest or a given revision without reading a row. Raises DatasetError."""
        revision = revision or newest_revision(repo_id)
        try:
            builder = datasets.load_dataset_builder(repo_id, revision=revision)
            if hasattr(builder.config, "decode_num_threads"):
                builder.config.decode_num_threads = 0  # its threads would decode images before the cast below
            streams = {str(name): _uniform(stream) for name, stream in builder.as_streaming_dataset().items()}
        except (*HUB_ERRORS, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            raise _unreadable(repo_id, error) from error  # a RuntimeError for loading scripts
        files = {str(name): list(paths) for name, paths in (builder.config.data_files or {}).items()}
        train_first = sorted(streams.items(), key=lambda stream: normalize_split(stream[0]) != "train")
        return cls(repo_id, revision, dict(train_first), files)

    @property
    def kind(self) -> Kind:
        """The kind of its columns. Raises DatasetError for columns that hold no labeled images."""
        found = {column for stream in self.streams.values() for column in stream.features or ()}
        for kind, needed in NEEDED.items():
            if needed <= found:
                return kind
        raise DatasetError(
            f"{self.repo_id!r} has the columns {', '.join(sorted(found)) or '(none)'}: it needs "
            f"{' and '.join(sorted(NEEDED['records']))}, or image and output_json"
        )

    def total(self) -> int | None:
        """Count the rows by the card or the parquet footers; None if neither tells."""
        counts = [self._count(name) for name in self.streams]
        return None if None in counts else sum(filter(None, counts))

    def rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield (split, row). Raises DatasetError where the Hub or a file fails."""
        count = 0
        try:
            for split, stream in self.streams.items():
                for row in stream:
                    yield split, row
                    count += 1
        except (*HUB_ERRORS, ValueError, datasets.exceptions.DatasetsError) as error:
            if isinstance(error, HUB_ERRORS) and type(error) is not OSError:  # Arrow raises OSError for damaged files
                raise _interrupted(self.repo_id, f"after {count:,} rows", error) from error
            reason = f"row {count:,} of {self.repo_id!r} cannot be read ({_first_line(error)})"
            raise DatasetError(f"{reason}: report it to the data set's author") from error

    def samples(self) -> Iterator[Sample | Reject]:
        """Yield all rows with their values as found. Splits are kept, except a train split that stands alone."""
        kind, stated = self.kind, [normalize_split(name) for name in self.streams] != ["train"]
        for index, (split, row) in enumerate(self.rows()):
            name = f"{index:06d}"
            if kind == "published":
                name = row["name"] or name
            else:
                name += f"-{Path(next((str(row[key]) for key in NAMES if row.get(key)), 'row')).stem}"
            try:
                label = label_in(row["output_json"]) if kind == "original" else label_of(row)
            except AnswerError as error:
                yield Reject(name, f"output_json holds no record: {error}")
                continue
            yield Sample(
                name if kind == "published" else name + suffix_of(row["image"]),
                partial(image_bytes, self.repo_id, row["image"]),
                label,
                split=normalize_split(split) if stated else None,
                **self._texts(kind, row),
            )

    def _texts(self, kind: Kind, row: dict[str, Any]) -> dict[str, str]:
        defaults = {"source": "", "license": "", "category": "", "group": "", "label_scope": EXHAUSTIVE}
        if kind != "published":
            defaults |= {"source": self.repo_id, "license": f"see {self.repo_id}"}
            row = row | {"source": None}
        if kind == "original":
            category = row.get("food270_class_name") or row.get("category")
            row = {"source": row.get("image_source"), "category": category}
        return {key: default if row.get(key) in (None, "") else str(row[key]) for key, default in defaults.items()}

    def _count(self, name: str) -> int | None:
        splits = self.streams[name].info.splits
        if splits and name in splits and splits[name].num_examples:
            return splits[name].num_examples
        files = self.files.get(name, [])
        if not files or not all(file.endswith(".parquet") for file in files):
            return None
        try:
            return sum(_parquet_rows(file) for file in files)
        except (*HUB_ERRORS, ValueError):
            return None  # the progress bar does without


def image_bytes(repo_id: str, image: dict[str, Any] | None) -> bytes:
    """Return the image file of a row. Raises OSError for a row without one, and DatasetError where the Hub fails.

    Only paths into the same data set are opened, so that a row cannot name a local file or another address.
    """
    if image and image["bytes"] is not None:
        return image["bytes"]
    path = (image or {}).get("path") or ""
    member, _, file = path.rpartition("::")  # "zip://a.png" for a file in an archive
    if not file.startswith(f"hf://datasets/{repo_id}@") or not re.fullmatch(r"(zip://[^:]*)?", member):
        raise OSError("the row has no image")
    try:
        with fsspec.open(path, "rb") as opened:
            return opened.read()
    except HUB_ERRORS as error:
        raise _interrupted(repo_id, f"at {path.rpartition('/')[2]}", error) from error


def suffix_of(image: dict[str, Any] | None) -> str:
    """Return the suffix of a row's image file, .jpg where it is unknown."""
    return Path((image or {}).get("path") or "").suffix.lower() or ".jpg"


def _uniform(stream: datasets.IterableDataset) -> datasets.IterableDataset:
    """Keep images as bytes, and rename a column that earlier releases spelled otherwise."""
    columns = stream.features or {}
    if "image" in columns:
        stream = stream.cast_column("image", datasets.Image(decode=False))
    return stream.rename_column("licence", "license") if "licence" in columns and "license" not in columns else stream


def _parquet_rows(file: str) -> int:
    with HfFileSystem().open(file) as opened:
        return pyarrow.parquet.ParquetFile(opened).metadata.num_rows


def _unreadable(repo_id: str, error: Exception) -> DatasetError:
    status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None
    local = isinstance(error, FileNotFoundError | ValueError | RuntimeError)
    missing = local and not isinstance(error, LocalEntryNotFoundError)
    refused = status is not None and status < 500 and status != 429
    return (DatasetError if missing or refused else HubUnreachableError)(
        f"cannot read {repo_id!r} from the Hub ({_first_line(error)}): check the name and the connection, "
        "or use drawn scenes or a folder"
    )


def _interrupted(repo_id: str, where: str, error: Exception) -> HubUnreachableError:
    return HubUnreachableError(
        f"the connection to the Hub failed {where} of {repo_id!r} ({_first_line(error)}): rerun the command to resume"
    )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}".removesuffix(": ")
