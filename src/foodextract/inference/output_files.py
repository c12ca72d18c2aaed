"""Answers on disk, one image a line, as JSON lines or CSV: always whole lines, so that a run that was killed can be taken up again."""

import csv
import io
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from foodextract.schema import FoodRecord

Format = Literal["jsonl", "csv"]
COLUMNS = (
    "file",
    *FoodRecord.model_fields,
    "confidence",
    "error",
)  # of a CSV file; lists and confidence as JSON in their cells
# A cell of text that begins so gets an apostrophe before it, or a spreadsheet may run it (OWASP). One with an apostrophe of its own gets
# another, so that reading can always take one away.
MARKED = ("=", "+", "-", "@", "\t", "\r", "'")


class AnswerFileError(ValueError):
    """An output file that cannot be written or gone on with; the message names it and the remedy."""


def as_line(row: dict[str, Any], form: Format) -> str:
    """One row as text with its newline: `file`, and either the fields of a record or `error`."""
    if form == "jsonl":
        return json.dumps(row) + "\n"
    text = io.StringIO()
    csv.DictWriter(text, COLUMNS).writerow({key: _cell(value) for key, value in row.items()})
    return text.getvalue().removesuffix("\r\n") + "\n"  # a writer that ends its lines by "\n" would leave "\r" unquoted


def _cell(value: Any) -> str | int:
    if isinstance(value, str):
        return f"'{value}" if value.startswith(MARKED) else value
    return value if isinstance(value, int) else json.dumps(value)


def header(form: Format) -> str:
    """What a new file begins with."""
    return ",".join(COLUMNS) + "\n" if form == "csv" else ""


def resume(path: Path, form: Format) -> set[str]:
    """Make `path` ready to be appended to and return the files answered in it. Raises AnswerFileError.

    Images that could not be answered lose their lines, so that they are tried again, and so does a line that was never finished.
    """
    answered = set()
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("w", encoding="utf-8", errors="surrogateescape", newline="") as kept:
            kept.write(header(form))
            for row in _rows(path, form) if path.exists() else ():
                if row.get("is_food") not in (None, ""):  # "": a CSV line that was cut between its cells
                    answered.add(row["file"])
                    kept.write(as_line(row, form))
        partial.replace(path)
    except OSError as error:
        raise AnswerFileError(f"cannot write {path}: {error.strerror}") from error
    finally:
        with suppress(OSError):
            partial.unlink()
    return answered


def append(path: Path, line: str) -> None:
    """Add one line with a single write, so that whoever kills this process never cuts one in two."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        os.write(descriptor, line.encode("utf-8", "surrogateescape"))
    finally:
        os.close(descriptor)


def _rows(path: Path, form: Format) -> Iterator[dict[str, Any]]:
    foreign = AnswerFileError(
        f"{path} is not a {form} output of this command, so it is left alone: name another file, or move it away"
    )
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as lines:
        if form == "jsonl":
            for line in lines:
                try:
                    row = json.loads(line)
                except ValueError:
                    if line.endswith("\n"):
                        raise foreign from None
                    return  # the last line, cut off
                if (
                    not isinstance(row, dict)
                    or not isinstance(row.get("file"), str)
                    or not {"is_food", "error"} & row.keys()
                ):
                    raise foreign
                yield row
            return
        table = csv.DictReader(lines, strict=True)
        if table.fieldnames and tuple(table.fieldnames) != COLUMNS:
            raise foreign
        try:
            for row in table:
                if None in row or None in row.values():  # too many cells, or too few: cut off, unless more follows
                    if next(table, None) is not None:
                        raise foreign
                    return
                yield {key: value.removeprefix("'") for key, value in row.items()}
        except csv.Error:  # the file ends within a quoted cell
            if next(lines, None) is not None:
                raise foreign from None
