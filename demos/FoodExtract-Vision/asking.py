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
from gradio.utils import get_upload_folder

from foodextract.evaluation import provenance
from foodextract.images import ImageError, open_image
from foodextract.inference import output_files
from foodextract.inference.extractor import Confidence, Extractor
from foodextract.models.loading import BUNDLED, ModelError, newest_tuned
from foodextract.reporting.tables import metric_table
from foodextract.schema import AnswerError, FoodRecord

MAX_BYTES = (
    20 * 2**20
)  # a file; `images.MAX_PIXELS` bounds what is in it. Both are looked at before anything is decoded
MAX_IMAGES = 50  # in one batch, so that others need not wait for minutes
MODEL = os.environ.get("FOODEXTRACT_MODEL") or str(newest_tuned())
PROVENANCE = provenance.find(MODEL)
BASE = os.environ.get("FOODEXTRACT_BASE") or provenance.base_of(PROVENANCE)


def load(model_id: str | None, tiles: int | None = None) -> Extractor | ModelError:
    """The model, or why there is none: the page opens all the same and says so, but not where on this machine the model should be.

    `tiles` is another image budget than the model came with.
    """
    try:
        if model_id is None:
            raise ModelError(f"{Path(MODEL).name} does not say which base it was made from: set FOODEXTRACT_BASE")
        return Extractor.from_pretrained(model_id, precision=os.environ.get("FOODEXTRACT_PRECISION"), tiles=tiles)
    except ModelError as error:
        path = Path(model_id or "")
        return ModelError(str(error).replace(str(path), path.name) if path.is_absolute() else str(error))


TUNED = load(MODEL)
UNTUNED = load(
    BASE, TUNED.tiles if isinstance(TUNED, Extractor) else None
)  # the budget at which notebook 01 measured both


def on_gpu(seconds):
    """Decorates what ZeroGPU runs in a process of its own, for at most as many seconds as `seconds` says of its arguments.

    Models are globals and not arguments. What is wrong with an image is returned: of what is raised there, only `gr.Error` arrives.
    """
    return spaces.GPU(duration=seconds) if spaces else lambda function: function


@on_gpu(lambda paths: 20 + 2 * len(paths))  # of the two minutes that a call may take
def _records(paths: list[str]) -> list[tuple[FoodRecord, Confidence] | ImageError]:
    return list(TUNED.extract_many_with_confidence(paths))


@on_gpu(lambda path: 60)
def _texts(path: str) -> list[str] | ImageError:
    try:
        image = open_image(path)
    except ImageError as error:
        return error
    return [model.generate_texts([image])[0] for model in (UNTUNED, TUNED)]


def complaint(error: Exception | str) -> gr.Error:
    """A message for the reader of the page, without a trace in the log."""
    return gr.Error(str(error)[:1].upper() + str(error)[1:] + ".", title="That did not work", print_exception=False)


def check(path: str | None, *models: Extractor | ModelError) -> None:
    """Raise what the reader should know before a model is asked."""
    for model in models:
        if isinstance(model, ModelError):
            raise complaint(f"the model cannot be loaded: {model}")
    if path is None:
        raise complaint("there is no image yet: drop one, paste one, use the camera or take an example")


def too_large(path: str) -> ImageError | None:
    """Why a file will not be opened, if so."""
    if Path(path).stat().st_size > MAX_BYTES:
        return ImageError(f"the file {Path(path).name} is larger than {MAX_BYTES / 2**20:.0f} MB: shrink it first")
    return None


def record_of(path: str | None) -> tuple[FoodRecord, Confidence, float]:
    """The answer about one image, how sure the model was, and the seconds it took."""
    check(path, TUNED)
    start = time.perf_counter()
    result = too_large(path) or _records([path])[0]
    if isinstance(result, Exception):
        raise complaint(result)
    return *result, time.perf_counter() - start


def compared(path: str | None) -> str:
    """What base and tuned model write about one image of their own accord, as HTML."""
    check(path, UNTUNED, TUNED)
    texts = too_large(path) or _texts(path)
    if isinstance(texts, ImageError):
        raise complaint(texts)
    columns = []
    for name, title, text in zip((BASE, MODEL), ("before", "after"), texts, strict=True):
        try:
            FoodRecord.parse(text)
            verdict = '<p class="right">✓ strict JSON</p>'
        except AnswerError as error:
            verdict = f'<p class="wrong">✗ {escape(str(error))}</p>'
        columns.append(
            f"<section><h3>{title}: {escape(Path(name).name)}</h3><pre>{escape(text)}</pre>{verdict}</section>"
        )
    return f'<div class="pair" role="status">{"".join(columns)}</div>'


def batch(paths: list[str] | None) -> tuple[list[list[str]], str, str]:
    """Rows of a table, and output_files.csv and output_files.jsonl among Gradio's files. An image that cannot be read has a row that says why."""
    check(paths[0] if paths else None, TUNED)
    if len(paths) > MAX_IMAGES:
        raise complaint(f"{len(paths)} images are more than the {MAX_IMAGES} we take at once: send fewer")
    refused = {path: too_large(path) for path in paths}
    light = [path for path in paths if not refused[path]]
    results = iter(_records(light) if light else ())
    rows, table = [], []
    for path in paths:
        name, result = Path(path).name, refused[path] or next(results)
        if isinstance(result, Exception):
            rows.append({"file": name, "error": str(result)})
            table.append([name, "", "", "", "", str(result)])
        else:
            record, confidence = result
            rows.append({"file": name, **record.model_dump(), "confidence": asdict(confidence)})
            verdict = ("no", "yes")[record.is_food]
            table.append(
                [name, verdict, record.image_title, ", ".join(record.food_items), ", ".join(record.drink_items), ""]
            )
    folder = Path(tempfile.mkdtemp(dir=get_upload_folder()))
    for form in ("csv", "jsonl"):
        lines = [output_files.header(form), *(output_files.as_line(row, form) for row in rows)]
        (folder / f"answers.{form}").write_text("".join(lines), encoding="utf-8")
    return table, str(folder / "answers.csv"), str(folder / "answers.jsonl")


def as_html(record: FoodRecord, confidence: Confidence, seconds: float) -> str:
    """Title, verdict and chips; every text of the model escaped."""
    facts = f"{percent(confidence.is_food)} · {seconds:.1f}&nbsp;s"
    if not record.is_food:
        return f'<div class="answer" role="status"><h3>Neither food nor drink</h3><p>sure of that: {facts}</p></div>'
    shelves = []
    for field, name in (("food_items", "Food"), ("drink_items", "Drinks")):
        pairs = zip(getattr(record, field), getattr(confidence, field), strict=True)
        chips = [
            f'<li class="chip {field}">{escape(item)} <small>{percent(exp(sure))}</small></li>' for item, sure in pairs
        ]
        shelves.append(f'<h4>{name}</h4><ul class="chips">{"".join(chips) or "<li>none</li>"}</ul>')
    sure = f"<p>sure that this is food or drink: {facts}</p>"
    return f'<div class="answer" role="status"><h3>{escape(record.image_title)}</h3>{sure}{"".join(shelves)}</div>'


def percent(share: float) -> str:
    """Never 100 %: no model is as sure as that."""
    return "&gt; 99 %" if share >= 0.995 else f"{share * 100:.0f} %"


def table_as_html(rows: list[list[str]]) -> str:
    """The rows of `batch` as a table that wraps its words and scrolls on a phone."""
    head = "".join(f'<th scope="col">{name}</th>' for name in ("file", "food or drink", "title", "foods", "drinks"))
    lines = []
    for name, *cells, problem in rows:
        told = (
            f'<td class="wrong" colspan="4">{escape(problem)}</td>'
            if problem
            else "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        )
        lines.append(f'<tr><th scope="row">{escape(name)}</th>{told}</tr>')
    return f'<div class="batch" role="status"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def problem_as_html(error: gr.Error) -> str:
    """What went wrong, where the answer would stand; a screen reader says it at once."""
    return f'<div class="problem" role="alert"><h3>{escape(error.title)}</h3><p>{escape(error.message)}</p></div>'


def notice() -> str:
    """What a visitor should know of a model that is bundled, or was made from a bundled one by drawings alone; else nothing."""
    taught = (
        PROVENANCE is not None
        and PROVENANCE.dataset == "scenes"
        and Path(provenance.base_of(PROVENANCE) or "").parent == BUNDLED
    )
    if not taught and Path(MODEL).resolve().parent != BUNDLED:
        return ""
    return "**This model knows drawings only: it has never seen a photograph.** For photographs set `FOODEXTRACT_MODEL` to another."


def figures() -> str:
    """The measured table of the model in use, as Markdown."""
    if PROVENANCE is None:
        return f"Nobody has measured `{Path(MODEL).name}` yet: a model that notebook 01 made brings its figures along."
    row = PROVENANCE.rows[0]
    return (
        f"{metric_table(PROVENANCE.scored)}\n\nHeld-out images of `{PROVENANCE.dataset}`, greedy, no grammar, the same prompt for all; 95 % "
        f"intervals in brackets. Weights `{PROVENANCE.weights}`, measured on {row.device} at commit {row.commit}."
    )
