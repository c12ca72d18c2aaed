"""Tables of labels as people save them: JSON lines, JSON, CSV and Parquet, in any usual encoding and spelling."""

import csv
import io
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet

from foodextract.data.label_rules.conversion import flag_of, separators, split_items
from foodextract.data.samples import DatasetError, split_named
from foodextract.schema import FIELDS

CSV, TABLES = (".csv", ".tsv"), (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")  # suffixes
COLUMNS = {  # our column: other names for it
    "file_name": (
        *("filename", "file", "image_path", "image_name", "filepath", "file_path", "path", "image", "image_file"),
        *("image_filename", "img", "img_path", "img_name", "photo", "picture", "fname", "image_id", "id"),
    ),
    "image_title": ("title",),
    "food_items": ("foods", "food_item"),
    "drink_items": ("drinks", "drink_item"),
    "license": ("licence",),
    "split": ("subset", "partition", "set", "data_split", "dataset_split"),
}
TRAIN_FLAGS, OTHER_FLAGS = {"is_train", "is_training"}, {"is_valid", "is_validation", "is_val", "is_test"}
EMPTY = frozenset(("nan", "na", "n/a", "none", "null"))  # what programs write into a cell without a value
FILE_COLUMNS = ("file_name", *COLUMNS["file_name"])  # their values need not be UTF-8
DAMAGED = re.compile("[\udc80-\udcff\ufffd]")  # bytes that are not UTF-8, or were none in an earlier copy
CP1252_LETTERS = "ÀÁÂÃÄÅÆÇÈÉÊËÌÍÎÏÑÒÓÔÕÖØÙÚÛÜßàáâãäåæçèéêëìíîïñòóôõöøùúûüŒœ"
# Text in another 8-bit encoding, read as cp1252, has other signs or long runs of accents.
NOT_CP1252 = re.compile(rf"[^\x00-\x7f{CP1252_LETTERS}‘’“”–—…°€\xa0]|[{CP1252_LETTERS}]{{3}}")

Row = dict[str, Any] | str


def read_table(path: Path) -> list[tuple[int, Row]]:
    """Return line numbers with rows, or with the reason why a line is no row. Columns have our names.

    Values of JSON stay as they are. Cells of CSV become the flag and the lists of a record. Raises DatasetError for a
    file that cannot be opened.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        found = _parquet_rows(path)
    elif suffix in CSV:
        found = _csv_rows(decoded(path))
    else:
        found = _json_rows(decoded(path))
    rows = [(number, _renamed(row)) for number, row in found]
    return _with_split(_converted(rows) if suffix in CSV else rows)


def _with_split(rows: list[tuple[int, Row]]) -> list[tuple[int, Row]]:
    """Take a column whose values are all names of splits as the split."""
    tables = [row for _, row in rows if isinstance(row, dict)]
    if any("split" in row for row in tables):
        return rows
    for name in dict.fromkeys(name for row in tables for name in row):
        stated = {row[name] if isinstance(row[name], str) else "?" for row in tables if row.get(name)}
        if stated and {split_named(value) for value in stated} in ({"train", "test"}, {"test"}):
            for row in tables:
                row["split"] = row.get(name)
            break
    return rows


def _parquet_rows(path: Path) -> Iterable[tuple[int, Row]]:
    try:
        return enumerate(pyarrow.parquet.read_table(path).to_pylist(), 1)
    except (pyarrow.ArrowException, OSError) as error:
        raise DatasetError(f"{path} is no Parquet file ({error}): write it again") from error


def decoded(path: Path) -> str:
    """Read a text as UTF-8, UTF-16 or UTF-32, or as cp1252 with a line on stderr. Other bytes become lone surrogates.

    Byte order marks are left out, also those of files that were joined.

    Raises DatasetError for a file that cannot be opened.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DatasetError(f"{path} cannot be read ({error.strerror}): check its permissions") from error
    encoding = json.detect_encoding(data)
    errors = "surrogateescape" if encoding.startswith("utf-8") else "replace"
    text = re.sub("^\ufeff+", "", data.decode(encoding, errors), flags=re.MULTILINE)
    other = [DAMAGED.search(line) is not None for line in text.split("\n") if not line.isascii()]
    if other and all(other) and "\ufffd" not in text:  # else a UTF-8 file with odd lines
        western = data.decode("cp1252", "replace")
        if not NOT_CP1252.search(western):
            print(f"{path} is not UTF-8 and is read as cp1252: save it as UTF-8 if accents are wrong", file=sys.stderr)
            return western
    return text


def _json_rows(text: str) -> Iterator[tuple[int, Row]]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):  # lines
        found = None
    if isinstance(found, dict):  # a row, or an object around the rows: {"data": […]}
        lists = [part for part in found.values() if isinstance(part, list) and isinstance((part or [0])[0], dict)]
        found = lists[0] if len(lists) == 1 and found.keys().isdisjoint(FILE_COLUMNS) else [found]
    if isinstance(found, list):
        yield from ((n, row if isinstance(row, dict) else "not a JSON object") for n, row in enumerate(found, 1))
        return
    for number, line in enumerate(io.StringIO(text, newline=None), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            yield number, row if isinstance(row, dict) else "not a JSON object: write one object per line"
        except (ValueError, RecursionError) as error:
            yield number, f"not JSON ({error}): write one JSON object per line"


def _csv_rows(text: str) -> Iterator[tuple[int, Row]]:
    """Yield the rows. After a row that is no CSV, such as one with an open quote, reading resumes at the next line."""
    csv.field_size_limit(2**31 - 1)
    lines = list(io.StringIO(text, newline=""))
    at = next((i for i, line in enumerate(lines) if line.strip() and not line.startswith("sep=")), len(lines))
    delimiter = max(",;\t|", key=lines[at].count) if at < len(lines) else ","
    header: list[str] = []
    while at < len(lines):
        rest = map(lines.__getitem__, range(at, len(lines)))
        reader, start = csv.reader(rest, delimiter=delimiter, skipinitialspace=True, strict=True), at
        reason = "a quote is not closed"
        try:
            for cells in reader:
                end = at + reader.line_num
                row = _csv_row(header or cells, cells)
                swallowed = any(line.count(delimiter) >= max(2, len(header) - 1) for line in lines[start + 1 : end])
                if end > start + 1 and (isinstance(row, str) or swallowed):
                    break
                if header and any(cell.strip() for cell in cells):
                    yield start + 1, row
                header, start = header or cells, end
            else:
                return
        except csv.Error as error:
            reason = str(error)
        yield start + 1, f"not a row of CSV ({reason}): double the quotes inside a cell, and close it"
        at = start + 1


def _csv_row(header: list[str], cells: list[str]) -> Row:
    if len(cells) != len(header):  # one more may be an unquoted comma, and would move the cells behind it
        return (
            f"does not match the header's columns ({len(cells)} cells for {len(header)}): quote cells with delimiters"
        )
    return dict(zip(header, cells, strict=True))


def _renamed(row: Row) -> Row:
    if isinstance(row, str):
        return row
    named = {
        re.sub(r"[\W_]+", "_", name.strip().lower()).strip("_"): None if value != value else value  # no NaN
        for name, value in row.items()
    }
    for name, others in COLUMNS.items():
        found = next((other for other in others if isinstance(named.get(other), str | list)), None)
        if name not in named and found:
            named[name] = named[found]
    if "split" not in named and (flags := (TRAIN_FLAGS | OTHER_FLAGS) & named.keys()):
        trained = all((flag_of(named[name]) == 1) == (name in TRAIN_FLAGS) for name in flags)
        named["split"] = "train" if trained else "test"
    rest = {name: value for name, value in named.items() if name not in FILE_COLUMNS}
    if DAMAGED.search(json.dumps(rest, ensure_ascii=False, default=str)):
        return "has characters that are not UTF-8: save the table as UTF-8"
    return named


def _converted(rows: list[tuple[int, Row]]) -> list[tuple[int, Row]]:
    """Convert the flag and the lists of CSV rows. A separator other than the comma holds for the whole table."""
    tables = [row for _, row in rows if isinstance(row, dict)]
    for row in tables:
        empty = [name for name, cell in row.items() if name not in FILE_COLUMNS and cell.strip().lower() in EMPTY]
        row.update(dict.fromkeys(empty, ""))
    marks = separators("\0".join(str(row.get(field) or "") for row in tables for field in FIELDS))
    for row in tables:
        for field in FIELDS:
            if isinstance(row.get(field), str):
                row[field] = split_items(row[field], marks)
        if isinstance(row.get("is_food"), str):
            row["is_food"] = row["is_food"] if (flag := flag_of(row["is_food"])) is None else flag
    return [(number, _fault(row) or row) for number, row in rows]


def _fault(row: Row) -> str:
    if isinstance(row, str):
        return row
    if isinstance(row.get("is_food"), str):
        return f"is_food is {row['is_food']!r}: write 1 or 0, or true or false"
    broken = next((field for field in FIELDS if isinstance(row.get(field), str)), None)
    return f"{broken} is {row[broken]!r}: write a JSON list, or items between semicolons" if broken else ""
