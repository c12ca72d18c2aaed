"""Output files with one image per line, as JSON lines or CSV.

Every write is a whole line, so an interrupted run can resume.
"""

import csv
import io
import json
import os
import shutil
from collections.abc import Container, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from foodextract.schema import FoodRecord

Format = Literal["jsonl", "csv"]
PLAIN = ("file", *FoodRecord.model_fields, "error")  # the columns of a CSV file; lists are JSON
CONFIDENT = ("file", *FoodRecord.model_fields, "confidence", "error")  # those with confidence, also as JSON
# A spreadsheet may run a cell that begins so (OWASP), so it gets an apostrophe in front. A cell with an apostrophe of
# its own gets another, so that reading can always remove one.
ESCAPED = ("=", "+", "-", "@", "\t", "\r", "'")


class AnswerFileError(ValueError):
    """An output file that cannot be written or resumed. The message names it and the remedy."""


def as_line(row: dict[str, Any], form: Format, confidence: bool = False) -> str:
    """Format one row with its newline: `file`, and either the fields of a record or `error`.

    `confidence` adds its column to a CSV file.
    """
    if form == "jsonl":
        return json.dumps(row) + "\n"
    text = io.StringIO()
    csv.DictWriter(text, _columns(confidence)).writerow({key: _cell(value) for key, value in row.items()})
    return text.getvalue().removesuffix("\r\n") + "\n"  # with lineterminator="\n", csv would leave "\r" unquoted


def _cell(value: Any) -> str | int:
    if isinstance(value, str):
        return f"'{value}" if value.startswith(ESCAPED) else value
    return value if isinstance(value, int) else json.dumps(value)


def header(form: Format, confidence: bool = False) -> str:
    """The first line of a new file, if the format has one."""
    return ",".join(_columns(confidence)) + "\n" if form == "csv" else ""


def _columns(confidence: bool) -> tuple[str, ...]:
    return CONFIDENT if confidence else PLAIN


def resume(path: Path, form: Format, confidence: bool = False, files: Container[str] = ()) -> set[str]:
    """Prepare `path` for appending and return the names of the files answered in it. Raises AnswerFileError.

    Drops an incomplete line, and the lines of those of `files` that failed, so that they are tried again.
    """
    if path.exists() and not path.is_file():
        raise AnswerFileError(f"{path} is not a file: name another, or leave --output out to print the answers")
    answered = set()
    target = path.resolve()  # what a link points to
    partial = target.with_name(target.name + ".partial")
    try:
        with partial.open("w", encoding="utf-8", errors="surrogateescape", newline="") as kept:
            kept.write(header(form, confidence))
            for row in _rows(path, form, confidence) if path.exists() else ():
                succeeded = row.get("is_food") not in (None, "")  # "" in a CSV line that was cut between two cells
                if succeeded:
                    answered.add(row["file"])
                if succeeded or (row.get("error") and row["file"] not in files):
                    kept.write(as_line(row, form, confidence))
        if path.exists():
            shutil.copymode(path, partial)
        partial.replace(target)
    except OSError as error:
        raise AnswerFileError(f"cannot write {path}: {error.strerror}") from error
    finally:
        with suppress(OSError):
            partial.unlink()
    return answered


def append(path: Path, line: str) -> None:
    """Append one line in a single write, which a kill cannot cut in two. Raises AnswerFileError."""
    data = line.encode("utf-8", "surrogateescape")
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            while data:  # a full disk takes a part, and says why at the next write
                data = data[os.write(descriptor, data) :]
        finally:
            os.close(descriptor)
    except OSError as error:
        raise AnswerFileError(f"cannot write {path}: {error.strerror}. Rerun to resume") from error


def _rows(path: Path, form: Format, confidence: bool) -> Iterator[dict[str, Any]]:
    """Yield the complete rows of a file. Raises AnswerFileError for a file that this command did not write."""
    problem = f"{path} is not a {form} output of this command, so it is left alone"
    foreign = AnswerFileError(f"{problem}: name another file, or move it away")
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as lines:
        if form == "jsonl":
            for line in lines:
                try:
                    row = json.loads(line)
                except ValueError:
                    if line.endswith("\n"):
                        raise foreign from None
                    return  # the last line, cut off
                named = isinstance(row, dict) and isinstance(row.get("file"), str)
                if not named or not {"is_food", "error"} & row.keys():
                    raise foreign
                yield row
            return
        table = csv.DictReader(lines, strict=True)
        found = tuple(table.fieldnames or ())
        if found == _columns(not confidence):
            remedy = "leave --confidence out" if confidence else "add --confidence"
            raise AnswerFileError(f"{path} was written {'without' if confidence else 'with'} --confidence: {remedy}")
        if found not in ((), _columns(confidence)):
            raise foreign
        try:
            for cells in table:
                if None in cells or None in cells.values():  # too many cells or too few: the last line may be cut off
                    if next(table, None) is not None:
                        raise foreign
                    return
                yield {key: value.removeprefix("'") for key, value in cells.items()}
        except csv.Error:  # the file ends within a quoted cell
            if next(lines, None) is not None:
                raise foreign from None
