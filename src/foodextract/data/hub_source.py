"""A data set on the Hub at one revision: whose columns it has, how many rows, and its rows as samples.

Three kinds are known by their columns: what this project publishes, another author's records, and the original project's `output_json`.
A Hub that gives out raises a DatasetError at once or after a few attempts, each of which is logged.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import datasets
import pyarrow.parquet
from datasets.utils.file_utils import xopen
from huggingface_hub import HfApi, HfFileSystem
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError

from foodextract.data.columns import FEATURES, LATER
from foodextract.data.samples import DatasetError, Reject, Sample, split_named
from foodextract.data.scenes import Split
from foodextract.schema import EXHAUSTIVE, AnswerError, FoodRecord, label_in

Kind = Literal["published", "records", "original"]
NEEDED: dict[Kind, frozenset[str]] = {
    "published": frozenset(FEATURES) - LATER,
    "records": frozenset({"image", *FoodRecord.model_fields}),
    "original": frozenset({"image", "output_json"}),
}
FAULTS = (OSError, HTTPError)  # of the network or the Hub
SECONDS = 10  # to wait for the Hub to say which revision is the newest

# datasets tries 20 times at intervals of up to a minute. huggingface_hub has tried each of them for half a minute before.
datasets.config.STREAMING_READ_MAX_RETRIES = datasets.config.STREAMING_OPEN_MAX_RETRIES = 3
datasets.config.STREAMING_READ_SERVER_UNAVAILABLE_RETRY_INTERVAL = (
    datasets.config.STREAMING_READ_RATE_LIMIT_RETRY_INTERVAL
) = 10


class HubUnreachableError(DatasetError):
    """The Hub did not answer, or it had a fault. What is here already can still be used."""


def newest_revision(repo_id: str) -> str:
    """The commit that is the newest of a data set. Raises DatasetError, and HubUnreachableError when the Hub gives no answer."""
    try:
        return HfApi().dataset_info(repo_id, timeout=SECONDS).sha
    except (*FAULTS, ValueError) as error:
        raise _unread(repo_id, error) from error


@dataclass(frozen=True)
class HubDataset:
    """A data set on the Hub at one revision. `streams` are its splits, the train split first, with images as bytes."""

    repo_id: str
    revision: str
    streams: dict[str, datasets.IterableDataset]
    files: Mapping[str, list[str]]  # of each split

    @classmethod
    def open(cls, repo_id: str, revision: str | None = None) -> "HubDataset":
        """The data set as it is now, or at a commit. No row is read. Raises DatasetError."""
        revision = revision or newest_revision(repo_id)
        try:
            builder = datasets.load_dataset_builder(repo_id, revision=revision)
            if hasattr(builder.config, "decode_num_threads"):
                builder.config.decode_num_threads = (
                    0  # threads would decode images before it can be said that nothing is to be decoded
                )
            streams = {str(name): stream for name, stream in builder.as_streaming_dataset().items()}
            for name in streams:
                if "image" in (streams[name].features or ()):
                    streams[name] = streams[name].cast_column("image", datasets.Image(decode=False))
        except (
            *FAULTS,
            ValueError,
            RuntimeError,
            datasets.exceptions.DatasetsError,
        ) as error:  # a RuntimeError for loading scripts
            raise _unread(repo_id, error) from error
        files = {str(name): list(paths) for name, paths in (getattr(builder.config, "data_files", None) or {}).items()}
        return cls(
            repo_id,
            revision,
            dict(sorted(streams.items(), key=lambda stream: split_named(stream[0]) != "train")),
            files,
        )

    @property
    def kind(self) -> Kind:
        """Whose columns it has. Raises DatasetError for columns that cannot be read as labeled images."""
        found = {column for stream in self.streams.values() for column in stream.features or ()}
        for kind, needed in NEEDED.items():
            if needed <= found:
                return kind
        raise DatasetError(
            f"{self.repo_id!r} has the columns {', '.join(sorted(found)) or '(none)'}: it needs "
            f"{' and '.join(sorted(NEEDED['records']))}, or image and output_json"
        )

    def total(self, *names: str) -> int | None:
        """How many rows these splits have, all of them by default: from the data set's card or its parquet files, None if neither tells."""
        counts = [self._count(name) for name in names or self.streams]
        return sum(counts) if None not in counts else None

    def rows(self, *names: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Split and row, for these splits or all. Raises DatasetError where the Hub or a file fails."""
        count = 0
        try:
            for name in names or self.streams:
                for row in self.streams[name]:
                    yield name, row
                    count += 1
        except (*FAULTS, ValueError, datasets.exceptions.DatasetsError) as error:
            if (
                isinstance(error, FAULTS) and type(error) is not OSError
            ):  # a bare OSError is how Arrow reports a damaged file
                raise _broke_off(self.repo_id, f"after {count:,} rows", error) from error
            raise DatasetError(
                f"row {count:,} of {self.repo_id!r} cannot be read ({_first_line(error)}): report it to the data set's author"
            ) from error

    def samples(self) -> Iterator[Sample | Reject]:
        """All rows, with their values as they are. A split that it states is kept, unless it has a train split and no other."""
        kind, stated = self.kind, len(self.streams) > 1 or split_named(next(iter(self.streams), "train")) != "train"
        for index, (name, row) in enumerate(self.rows()):
            side = split_named(name) if stated else None
            if kind == "published":
                yield self._published(index, row, side)
            else:
                yield self._sample(index, row, side, kind)

    def _published(self, index: int, row: dict[str, Any], side: Split | None) -> Sample:
        return Sample(
            name=row["name"] or f"{index:06d}",
            read=partial(self._bytes, row["image"]),
            label={key: row[key] for key in FoodRecord.model_fields},
            split=side,
            label_scope=row.get("label_scope") or EXHAUSTIVE,
            **{key: row[key] or "" for key in ("source", "license", "category", "group")},
        )

    def _sample(self, index: int, row: dict[str, Any], side: Split | None, kind: Kind) -> Sample | Reject:
        named = next((str(row[key]) for key in ("image_name", "image_id", "file_name", "name") if row.get(key)), "row")
        name = f"{index:06d}-{Path(named).stem}"
        try:
            label = (
                label_in(row["output_json"])
                if kind == "original"
                else {key: row[key] for key in FoodRecord.model_fields}
            )
        except AnswerError as error:
            return Reject(name, f"output_json is no record: {error}")
        return Sample(
            name=name + suffix_of(row["image"]),
            read=partial(self._bytes, row["image"]),
            label=label,
            source=str((row.get("image_source") if kind == "original" else None) or self.repo_id),
            license=str((row.get("license") if kind == "records" else None) or f"see {self.repo_id}"),
            category=str((row.get("food270_class_name") if kind == "original" else None) or row.get("category") or ""),
            group=str((row.get("group") if kind == "records" else None) or ""),
            split=side,
            label_scope=str((row.get("label_scope") if kind == "records" else None) or EXHAUSTIVE),
        )

    def _bytes(self, image: dict[str, Any] | None) -> bytes:
        return image_bytes(self.repo_id, image)

    def _count(self, name: str) -> int | None:
        told = self.streams[name].info.splits
        if told and name in told and told[name].num_examples:
            return told[name].num_examples
        files = self.files.get(name, [])
        if not files or not all(file.endswith(".parquet") for file in files):
            return None
        try:
            return sum(_parquet_rows(file) for file in files)
        except (*FAULTS, ValueError):
            return None  # a bar without a total is no reason to stop


def image_bytes(repo_id: str, image: dict[str, Any] | None) -> bytes:
    """The encoded image of a row. Raises OSError for a row without one, and DatasetError where the Hub fails."""
    if image and image["bytes"] is not None:
        return image["bytes"]
    path = (image or {}).get("path") or ""
    member, _, file = path.rpartition("::")  # of an archive, where there is one
    if not file.startswith(f"hf://datasets/{repo_id}@") or not re.fullmatch(r"(zip://[^:]*)?", member):
        raise OSError("the row has no image")  # a row does not choose a file of this machine or of another place
    try:
        with xopen(path, "rb") as file:
            return file.read()
    except FAULTS as error:
        raise _broke_off(repo_id, f"at {path.rpartition('/')[2]}", error) from error


def suffix_of(image: dict[str, Any] | None) -> str:
    """The suffix of the file that a row's image comes from, .jpg where it is unknown."""
    return Path((image or {}).get("path") or "").suffix.lower() or ".jpg"


def _parquet_rows(file: str) -> int:
    with HfFileSystem().open(file) as opened:
        return pyarrow.parquet.ParquetFile(opened).metadata.num_rows


def _unread(repo_id: str, error: Exception) -> DatasetError:
    status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None
    missing = isinstance(error, FileNotFoundError | ValueError | RuntimeError) and not isinstance(
        error, LocalEntryNotFoundError
    )
    missing = missing or (status is not None and status < 500 and status != 429)
    return (DatasetError if missing else HubUnreachableError)(
        f"cannot read {repo_id!r} from the Hub ({_first_line(error)}): check the name and the connection, or use drawn scenes or a folder"
    )


def _broke_off(repo_id: str, where: str, error: Exception) -> HubUnreachableError:
    return HubUnreachableError(
        f"the connection to the Hub failed {where} of {repo_id!r} ({_first_line(error)}): rerun the command to resume"
    )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}".removesuffix(": ")
