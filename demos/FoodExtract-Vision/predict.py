"""Run the tuned and the base model for the page, and format their answers as HTML."""

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

try:
    import spaces  # GPU per call on ZeroGPU; must be imported before torch
except ImportError:
    spaces = None

import gradio as gr
from gradio.utils import get_upload_folder

from foodextract.evaluation import provenance
from foodextract.images import ImageError, open_image
from foodextract.inference import output_files
from foodextract.inference.extractor import Confidence, Extractor
from foodextract.models.loading import BUNDLED, PHOTO, PHOTO_BASE, ModelError, newest_tuned
from foodextract.models.training_data import TrainingData
from foodextract.reporting.tables import metric_table
from foodextract.schema import AnswerError, FoodRecord

MAX_BYTES = 20 * 2**20  # of a file; checked before decoding, as is `images.MAX_PIXELS`
MAX_IMAGES = 50  # in one batch, so that others wait no more than a minute or so
MODEL = os.environ.get("FOODEXTRACT_MODEL") or str(newest_tuned())
PROVENANCE = provenance.find(MODEL)
BUNDLED_BASE = str(PHOTO_BASE) if Path(MODEL) == PHOTO else None
BASE = os.environ.get("FOODEXTRACT_BASE") or provenance.base_of(PROVENANCE) or BUNDLED_BASE
Answer = tuple[FoodRecord, Confidence]


def load(model_id: str | None, tiles: int | None = None) -> Extractor | ModelError:
    """Load a model, or return why it cannot be loaded, without local paths: the page opens and says so.

    `tiles` overrides the image budget of the checkpoint.
    """
    try:
        if model_id is None:
            raise ModelError(f"{Path(MODEL).name} does not name its base: set FOODEXTRACT_BASE")
        return Extractor.from_pretrained(model_id, precision=os.environ.get("FOODEXTRACT_PRECISION"), tiles=tiles)
    except ModelError as error:
        path = Path(model_id or "")
        return ModelError(str(error).replace(str(path), path.name) if path.is_absolute() else str(error))


TUNED = load(MODEL)
# Both models get the budget of the tuned one, as in notebook 01.
UNTUNED = load(BASE, TUNED.tiles if isinstance(TUNED, Extractor) else None)


def on_gpu(seconds: Callable[..., int]) -> Callable[[Callable], Callable]:
    """Decorate a function that ZeroGPU runs in a process of its own, for at most `seconds(*arguments)`.

    Models must be globals there, and only `gr.Error` can be raised: other errors are returned.
    """
    return spaces.GPU(duration=seconds) if spaces else lambda function: function


@on_gpu(lambda paths: 20 + 2 * len(paths))  # ZeroGPU allows two minutes
def _records(paths: list[str]) -> list[Answer | ImageError]:
    return list(TUNED.extract_many_with_confidence(paths))


@on_gpu(lambda path: 60)
def _texts(path: str) -> list[str] | ImageError:
    try:
        image = open_image(path)
    except ImageError as error:
        return error
    return [model.generate_texts([image])[0] for model in (UNTUNED, TUNED)]


def user_error(error: Exception | str) -> gr.Error:
    """Return an error that the page shows and the log does not trace."""
    return gr.Error(str(error)[:1].upper() + str(error)[1:] + ".", title="That did not work", print_exception=False)


def check(path: str | None, *models: Extractor | ModelError) -> None:
    """Raise gr.Error if a model is missing or there is no image."""
    for model in models:
        if isinstance(model, ModelError):
            raise user_error(f"the model cannot be loaded: {model}")
    if path is None:
        raise user_error("there is no image yet: drop one, paste one, use the camera or take an example")


def too_large(path: str) -> ImageError | None:
    """Return an error if the file exceeds MAX_BYTES."""
    if Path(path).stat().st_size > MAX_BYTES:
        return ImageError(f"the file {Path(path).name} is larger than {MAX_BYTES / 2**20:.0f} MB: shrink it first")
    return None


def predict_one(path: str | None) -> tuple[FoodRecord, Confidence, float]:
    """Return record, confidence and seconds for one image. Raises gr.Error."""
    check(path, TUNED)
    start = time.perf_counter()
    result = too_large(path) or _records([path])[0]
    if isinstance(result, Exception):
        raise user_error(result)
    return *result, time.perf_counter() - start


def compare(path: str | None) -> str:
    """Return what base and tuned model write about one image without a grammar, as HTML. Raises gr.Error."""
    check(path, UNTUNED, TUNED)
    texts = too_large(path) or _texts(path)
    if isinstance(texts, ImageError):
        raise user_error(texts)
    columns = ""
    for name, title, text in zip((BASE, MODEL), ("before", "after"), texts, strict=True):
        try:
            FoodRecord.parse(text)
            verdict = '<p class="right">✓ strict JSON</p>'
        except AnswerError as error:
            verdict = f'<p class="wrong">✗ {escape(str(error))}</p>'
        heading = f"{title}: {escape(Path(name).name)}"
        columns += f"<section><h3>{heading}</h3><pre>{escape(text)}</pre>{verdict}</section>"
    return f'<div class="pair" role="status">{columns}</div>'


def predict_many(paths: list[str] | None) -> tuple[str, str, str]:
    """Return an HTML table and the paths of answers.csv and answers.jsonl. Raises gr.Error.

    An image that cannot be read gets a row with the reason.
    """
    check(paths[0] if paths else None, TUNED)
    if len(paths) > MAX_IMAGES:
        raise user_error(f"{len(paths)} images are more than the {MAX_IMAGES} we take at once: send fewer")
    errors = {path: too_large(path) for path in paths}
    light = [path for path in paths if not errors[path]]
    results = iter(_records(light) if light else ())
    rows: list[dict[str, Any]] = []
    for path in paths:
        result = errors[path] or next(results)
        row: dict[str, Any] = {"file": Path(path).name}
        if isinstance(result, Exception):
            rows.append(row | {"error": str(result)})
        else:
            rows.append(row | result[0].model_dump() | {"confidence": asdict(result[1])})
    folder = Path(tempfile.mkdtemp(dir=get_upload_folder()))
    for form in ("csv", "jsonl"):
        lines = [output_files.header(form, True), *(output_files.as_line(row, form, True) for row in rows)]
        (folder / f"answers.{form}").write_text("".join(lines), encoding="utf-8")
    return rows_as_html(rows), str(folder / "answers.csv"), str(folder / "answers.jsonl")


def rows_as_html(rows: list[dict[str, Any]]) -> str:
    """Format output rows as a table that wraps its words and scrolls on a phone."""
    head = "".join(f'<th scope="col">{name}</th>' for name in ("file", "food or drink", "title", "foods", "drinks"))
    body = ""
    for row in rows:
        if "error" in row:
            cells = f'<td class="wrong" colspan="4">{escape(row["error"])}</td>'
        else:
            items = (", ".join(row[field]) for field in ("food_items", "drink_items"))
            texts = (("no", "yes")[row["is_food"]], row["image_title"], *items)
            cells = "".join(f"<td>{escape(text)}</td>" for text in texts)
        body += f'<tr><th scope="row">{escape(row["file"])}</th>{cells}</tr>'
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="batch" role="status">{table}</div>'


def record_as_html(record: FoodRecord, confidence: Confidence, seconds: float) -> str:
    """Format title, confidence and items; all model text is escaped."""
    facts = f"{percent(confidence.is_food)} · {seconds:.1f}&nbsp;s"
    if not record.is_food:
        return f'<div class="answer" role="status"><h3>Neither food nor drink</h3><p>sure of that: {facts}</p></div>'
    lists = ""
    for field, name in (("food_items", "Food"), ("drink_items", "Drinks")):
        chips = "".join(
            f'<li class="chip {field}">{escape(item)} <small>{percent(probability)}</small></li>'
            for item, probability in zip(getattr(record, field), getattr(confidence, field), strict=True)
        )
        lists += f'<h4>{name}</h4><ul class="chips">{chips or "<li>none</li>"}</ul>'
    sure = f"<p>sure that this is food or drink: {facts}</p>"
    return f'<div class="answer" role="status"><h3>{escape(record.image_title)}</h3>{sure}{lists}</div>'


def percent(share: float) -> str:
    """Format a probability, never as 100 %."""
    return "&gt; 99 %" if share >= 0.995 else f"{share * 100:.0f} %"


def error_as_html(error: gr.Error) -> str:
    """Format an error for the place of the answer; screen readers announce it."""
    return f'<div class="problem" role="alert"><h3>{escape(error.title)}</h3><p>{escape(error.message)}</p></div>'


def notice() -> str:
    """Return a warning if the model is bundled, or was trained from a bundled one on drawings alone; else ""."""
    drawn = PROVENANCE is not None and PROVENANCE.dataset == "scenes"
    from_bundled = drawn and Path(provenance.base_of(PROVENANCE) or "").parent == BUNDLED
    if data := TrainingData.find(MODEL):
        if not data.drawings_only:
            return f"The model was {data.describe()}."
    elif not from_bundled and Path(MODEL).resolve().parent != BUNDLED:
        return ""
    warning = "**This model knows drawings only: it has never seen a photograph.**"
    return f"{warning} For photographs set `FOODEXTRACT_MODEL` to another."


def figures() -> str:
    """Return the measured table of the model as Markdown."""
    if PROVENANCE is None:
        return f"`{Path(MODEL).name}` has no evaluation: notebook 01 writes one for the model it trains."
    row = PROVENANCE.rows[0]
    return (
        f"{metric_table(PROVENANCE.scored)}\n\nHeld-out images of `{PROVENANCE.dataset}`, greedy decoding without a "
        f"grammar, the same prompt for all; 95 % intervals in brackets. Weights `{PROVENANCE.weights}`, measured on "
        f"{row.device} at commit {row.commit}."
    )
