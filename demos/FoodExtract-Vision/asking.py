"""What the page asks the two models, and how their answers are put on it."""

import os
import tempfile
import time
from dataclasses import asdict
from html import escape
from math import exp
from pathlib import Path

try:
    import spaces  # lends a GPU by the call on ZeroGPU, and must be imported before torch
except ImportError:
    spaces = None

import gradio as gr

from foodextract import answers, evidence
from foodextract.extractor import Confidence, Extractor
from foodextract.models import ModelError, newest_tuned
from foodextract.pictures import PictureError, open_picture
from foodextract.schema import AnswerError, FoodRecord
from foodextract.tables import metric_table

MAX_BYTES = 20 * 2**20  # a file; `pictures.MAX_PIXELS` bounds what is in it. Both are looked at before anything is decoded
MAX_PICTURES = 50  # in one batch, so that others need not wait for minutes
MODEL = os.environ.get("FOODEXTRACT_MODEL") or str(newest_tuned())
EVIDENCE = evidence.find(MODEL)
BASE = os.environ.get("FOODEXTRACT_BASE") or evidence.base_of(EVIDENCE)


def load(model_id: str | None) -> Extractor | ModelError:
    """The model, or why there is none: the page opens all the same and says so."""
    try:
        if model_id is None:
            raise ModelError(f"{Path(MODEL).name} does not say which base it was made from: set FOODEXTRACT_BASE")
        return Extractor.from_pretrained(model_id, precision=os.environ.get("FOODEXTRACT_PRECISION"))
    except ModelError as error:
        return error


TUNED, UNTUNED = load(MODEL), load(BASE)


def on_gpu(function):
    """Models are globals and not arguments: ZeroGPU runs the function in a process of its own."""
    return spaces.GPU(function) if spaces else function


@on_gpu
def _records(paths: list[str]) -> list:
    return list(TUNED.extract_many_with_confidence(paths))


@on_gpu
def _texts(path: str) -> list[str]:
    picture = open_picture(path)
    return [model.answer([picture])[0] for model in (UNTUNED, TUNED)]


def complaint(error: Exception | str) -> gr.Error:
    """A message for the reader of the page, without a trace in the log."""
    return gr.Error(str(error)[:1].upper() + str(error)[1:] + ".", title="That did not work", print_exception=False)


def check(path: str | None, *models: Extractor | ModelError) -> None:
    """Raise what the reader should know before a model is asked."""
    for model in models:
        if isinstance(model, ModelError):
            raise complaint(model)
    if path is None:
        raise complaint("there is no picture yet: drop one, paste one, use the camera or take an example")
    if Path(path).stat().st_size > MAX_BYTES:
        raise complaint(f"{Path(path).name} is larger than {MAX_BYTES / 2**20:.0f} MB: shrink it first")


def record_of(path: str | None) -> tuple[FoodRecord, Confidence, float]:
    """The answer about one picture, how sure the model was, and the seconds it took."""
    check(path, TUNED)
    start = time.perf_counter()
    [result] = _records([path])
    if isinstance(result, Exception):
        raise complaint(result)
    return *result, time.perf_counter() - start


def compared(path: str | None) -> str:
    """What base and tuned model write about one picture of their own accord, as HTML."""
    check(path, UNTUNED, TUNED)
    try:
        texts = _texts(path)
    except PictureError as error:
        raise complaint(error) from error
    columns = []
    for name, title, text in zip((BASE, MODEL), ("before", "after"), texts, strict=True):
        try:
            FoodRecord.parse(text)
            verdict = '<p class="right">✓ strict JSON</p>'
        except AnswerError as error:
            verdict = f'<p class="wrong">✗ {escape(str(error))}</p>'
        columns.append(f"<section><h3>{title}: {escape(Path(name).name)}</h3><pre>{escape(text)}</pre>{verdict}</section>")
    return f'<div class="pair" role="status">{"".join(columns)}</div>'


def batch(paths: list[str] | None) -> tuple[list[list[str]], str, str]:
    """Rows of a table, and the files answers.csv and answers.jsonl. A picture that cannot be read has a row that says why."""
    check(paths[0] if paths else None, TUNED)
    if len(paths) > MAX_PICTURES:
        raise complaint(f"{len(paths)} pictures are more than the {MAX_PICTURES} we take at once: send fewer")
    rows, table = [], []
    for path, result in zip(paths, _records(paths), strict=True):
        name = Path(path).name
        if isinstance(result, Exception):
            rows.append({"file": name, "error": str(result)})
            table.append([name, "", "", "", "", str(result)])
        else:
            record, confidence = result
            rows.append({"file": name, **record.model_dump(), "confidence": asdict(confidence)})
            verdict = ("no", "yes")[record.is_food]
            table.append([name, verdict, record.image_title, ", ".join(record.food_items), ", ".join(record.drink_items), ""])
    folder = Path(tempfile.mkdtemp())
    for form in ("csv", "jsonl"):
        lines = [answers.header(form), *(answers.as_line(row, form) for row in rows)]
        (folder / f"answers.{form}").write_text("".join(lines), encoding="utf-8")
    return table, str(folder / "answers.csv"), str(folder / "answers.jsonl")


def as_html(record: FoodRecord, confidence: Confidence, seconds: float) -> str:
    """Title, verdict and chips; every text of the model escaped."""
    facts = f"{confidence.is_food:.0%} sure · {seconds:.1f} s"
    if not record.is_food:
        return f'<div class="answer" role="status"><h3>Neither food nor drink</h3><p>{facts}</p></div>'
    shelves = []
    for field, name in (("food_items", "Food"), ("drink_items", "Drinks")):
        pairs = zip(getattr(record, field), getattr(confidence, field), strict=True)
        chips = [f'<li class="chip {field}">{escape(item)} <small>{exp(sure):.0%}</small></li>' for item, sure in pairs]
        shelves.append(f'<h4>{name}</h4><ul class="chips">{"".join(chips) or "<li>none</li>"}</ul>')
    return f'<div class="answer" role="status"><h3>{escape(record.image_title)}</h3><p>{facts}</p>{"".join(shelves)}</div>'


def table_as_html(rows: list[list[str]]) -> str:
    """The rows of `batch` as a table that wraps its words and scrolls on a phone."""
    head = "".join(f'<th scope="col">{name}</th>' for name in ("file", "food or drink", "title", "foods", "drinks"))
    lines = []
    for name, *cells, problem in rows:
        told = f'<td class="wrong" colspan="4">{escape(problem)}</td>' if problem else "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        lines.append(f'<tr><th scope="row">{escape(name)}</th>{told}</tr>')
    return f'<div class="batch" role="status"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def problem_as_html(error: gr.Error) -> str:
    """What went wrong, where the answer would stand; a screen reader says it at once."""
    return f'<div class="problem" role="alert"><h3>{escape(error.title)}</h3><p>{escape(error.message)}</p></div>'


def figures() -> str:
    """The measured table of the model in use, as Markdown."""
    if EVIDENCE is None:
        return f"Nobody has measured `{Path(MODEL).name}` yet: a model that notebook 01 made brings its figures along."
    row = EVIDENCE.rows[0]
    return (
        f"{metric_table(EVIDENCE.scored)}\n\nHeld-out pictures of `{EVIDENCE.dataset}`, greedy, no grammar, the same prompt for all; 95 % "
        f"intervals in brackets. Weights `{EVIDENCE.weights}`, measured on {row.device} at commit {row.commit}."
    )
