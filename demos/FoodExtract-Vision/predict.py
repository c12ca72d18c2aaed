"""Run the tuned and the base model for the page, and format their answers as HTML."""

import base64
import io
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
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

from foodextract import names
from foodextract.evaluation import provenance
from foodextract.images import ImageError, open_image
from foodextract.inference import output_files
from foodextract.inference.extractor import Confidence, Extractor
from foodextract.models.loading import BUNDLED, PHOTO, PHOTO_BASE, ModelError, find_model
from foodextract.models.training_data import TrainingData
from foodextract.schema import FIELDS, AnswerError, FoodRecord

MAX_BYTES = 20 * 2**20  # of a file; checked before decoding, as is `images.MAX_PIXELS`
MAX_IMAGES = 50  # in one batch, so that others wait no more than a minute or so
MODEL = str(find_model(os.environ.get("FOODEXTRACT_MODEL") or None))
PROVENANCE = provenance.Provenance.find(MODEL)
BUNDLED_BASE = str(PHOTO_BASE) if Path(MODEL) == PHOTO else None
BASE = os.environ.get("FOODEXTRACT_BASE") or provenance.base_of(PROVENANCE) or BUNDLED_BASE
COLUMNS = ("food or drink", "title", "foods", "drinks")  # of the table of a batch, after image and file
LINK_HOURS = 24  # that uploads are kept, and with them links to answers
THUMBNAIL = 96  # pixels
Answer = tuple[FoodRecord, Confidence]


FIGURES = {  # metrics, what they mean, and the error that they leave
    "is_food_accuracy": (
        "right on whether an image shows food or drink",
        "the question whether there is food or drink at all: {} of the answers are wrong.",
    ),
    "item_precision_micro": (
        "of the items it names are in the image",
        "a wrong name, mostly of something that looks alike: {} of the items it names are not in the image.",
    ),
    "item_recall_micro": (
        "of the items in the image are named",
        "an item that it misses: {} of the items in the image are not named.",
    ),
}


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
def _records(paths: list[str]) -> Iterator[Answer | ImageError]:
    batch = 1 if TUNED.model.device.type == "cpu" else 8  # a CPU gains little from more, and shows each row sooner
    yield from TUNED.extract_many_with_confidence(paths, batch)


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


def predict_one(path: str | None) -> tuple[FoodRecord, Confidence | None, float]:
    """Return record, calibrated confidence (None without a calibration) and seconds for one image. Raises gr.Error."""
    check(path, TUNED)
    start = time.perf_counter()
    result = too_large(path) or next(iter(_records([path])))
    if isinstance(result, Exception):
        raise user_error(result)
    return result[0], result[1] if TUNED.calibration else None, time.perf_counter() - start


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
        columns += f"<section><h2>{heading}</h2><pre>{escape(text)}</pre>{verdict}</section>"
    return f'<div class="pair" role="status">{columns}</div>'


def predict_many(paths: list[str] | None) -> Iterator[dict[str, Any]]:
    """Yield a row per image as soon as it is answered: its file, and the record or the error. Raises gr.Error."""
    check(paths[0] if paths else None, TUNED)
    if len(paths) > MAX_IMAGES:
        raise user_error(f"{len(paths)} images are more than the {MAX_IMAGES} we take at once: send fewer")
    errors = {path: too_large(path) for path in paths}
    light = [path for path in paths if not errors[path]]
    results = iter(_records(light) if light else ())
    for path in paths:
        result = errors[path] or next(results)
        row: dict[str, Any] = {"file": Path(path).name}
        if isinstance(result, Exception):
            yield row | {"error": str(result)}
        else:
            confidence = {"confidence": asdict(result[1])} if TUNED.calibration else {}
            yield row | result[0].model_dump() | confidence


def write_files(rows: list[dict[str, Any]]) -> list[str]:
    """Write answers.csv and answers.jsonl to the upload folder; return their paths."""
    folder, confidence = Path(tempfile.mkdtemp(dir=get_upload_folder())), TUNED.calibration is not None
    for form in ("csv", "jsonl"):
        lines = [output_files.header(form, confidence), *(output_files.as_line(row, form, confidence) for row in rows)]
        (folder / f"answers.{form}").write_text("".join(lines), encoding="utf-8")
    return [str(folder / "answers.csv"), str(folder / "answers.jsonl")]


def small_jpeg(path: str, side: int) -> bytes:
    """Return a copy of an image with sides of at most `side` pixels, b"" if it cannot be read."""
    try:
        if too_large(path):
            return b""
        image = open_image(path)
    except ImageError:
        return b""
    image.thumbnail((side, side))
    image.save(data := io.BytesIO(), "JPEG")
    return data.getvalue()


def thumbnail(path: str) -> str:
    """Return a thumbnail of an image as a data URL, "" if it cannot be read."""
    data = small_jpeg(path, THUMBNAIL)
    return f"data:image/jpeg;base64,{base64.b64encode(data).decode()}" if data else ""


def row_as_html(row: dict[str, Any], source: str) -> str:
    """Format an output row as a row of the table, with its thumbnail; on a phone, `data-label` names each cell."""
    image = f'<img src="{source}" alt="">' if source else ""
    head = f'<tr><td class="thumbnail">{image}</td><th scope="row">{escape(row["file"])}</th>'
    if "error" in row:
        return f'{head}<td class="wrong" colspan="4">{escape(row["error"])}</td></tr>'
    items = (", ".join(row[field]) for field in FIELDS)
    texts = (("no", "yes")[row["is_food"]], row["image_title"], *items)
    cells = (f'<td data-label="{name}">{escape(text)}</td>' for name, text in zip(COLUMNS, texts, strict=True))
    return f"{head}{''.join(cells)}</tr>"


def table_as_html(rows: str, done: int, total: int) -> str:
    """Format rows as a table, which CSS turns into cards on a phone."""
    head = "".join(f'<th scope="col">{name}</th>' for name in ("image", "file", *COLUMNS))
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return f'<div class="batch"><p role="status">{done} of {total} images answered</p>{table}</div>'


def record_as_html(record: FoodRecord, confidence: Confidence | None, seconds: float) -> str:
    """Format title, items and, where it is calibrated, confidence. All model text is escaped."""
    sure = f"{percent(confidence.is_food)} sure · " if confidence else ""
    if not record.is_food:
        facts = f"<p>{sure}{seconds:.1f}&nbsp;s</p>"
        return f'<div class="answer" role="status"><h2>Neither food nor drink</h2>{facts}</div>'
    lists = ""
    for field, name in (("food_items", "Food"), ("drink_items", "Drinks")):
        items = getattr(record, field)
        shares = map(percent, getattr(confidence, field)) if confidence else [""] * len(items)
        chips = "".join(
            f'<li class="chip {field}">{escape(item)} <small>{share}</small></li>'
            for item, share in zip(items, shares, strict=True)
        )
        lists += f'<h3>{name}</h3><ul class="chips">{chips or "<li>none</li>"}</ul>'
    facts = f"<p>Food or drink · {sure}{seconds:.1f}&nbsp;s</p>"
    return f'<div class="answer" role="status"><h2>{escape(record.image_title)}</h2>{facts}{lists}</div>'


def percent(share: float) -> str:
    """Format a probability, never as 100 %."""
    return "&gt; 99 %" if share >= 0.995 else f"{share * 100:.0f} %"


def error_as_html(error: gr.Error) -> str:
    """Format an error for the place of the answer; screen readers announce it."""
    return f'<div class="problem" role="alert"><h2>{escape(error.title)}</h2><p>{escape(error.message)}</p></div>'


def about() -> str:
    """Say what answers: name, size, and what it was trained on, as Markdown."""
    name = "photo model" if Path(MODEL) == PHOTO else f"model `{Path(MODEL).name}`"
    count = getattr(getattr(TUNED, "model", None), "size", None)  # an exported model does not say
    size = f", {count / 1e6:.0f} M parameters" if count else ""
    known = ""
    if data := TrainingData.find(MODEL):
        known = f", {data.describe()}"
    elif drawings_only():
        known = ", trained on drawings: it has never seen a photograph, so do not trust it on one"
    return f"The {name}{size}{known}."


def drawings_only() -> bool:
    """Whether the model has seen no photograph: it says so, is a bundled one, or was trained from one on drawings."""
    if data := TrainingData.find(MODEL):
        return data.drawings_only
    from_bundled = Path(provenance.base_of(PROVENANCE) or "").parent == BUNDLED
    drawn = PROVENANCE is not None and PROVENANCE.dataset == "scenes"
    return (drawn and from_bundled) or Path(MODEL).resolve().parent == BUNDLED


def links() -> str:
    """Link the code, the model that answers, its data and, where it has one, its card, as Markdown."""
    bundled, hub = f"{names.CODE}/tree/main/src/foodextract/models/bundled", "https://huggingface.co"
    found = {"Code": names.CODE}
    if Path(MODEL).resolve().parent == BUNDLED:
        here = f"{bundled}/{Path(MODEL).name}"
        found |= {"Model": here, "Training data": f"{here}/training_data.json"}
        if Path(MODEL) == PHOTO:
            found["Model card"] = f"{names.CODE}/tree/main/experiments/photo_base#readme"
    elif provenance.is_hub_id(MODEL):
        data = PROVENANCE.dataset if PROVENANCE and provenance.is_hub_id(PROVENANCE.dataset) else names.HUB_DATASET
        card = f"{hub}/{MODEL}"
        found |= {"Model": f"{card}/tree/main", "Dataset": f"{hub}/datasets/{data}", "Model card": card}
    return " · ".join(f"[{name}]({address})" for name, address in found.items())


def figures() -> str:
    """Return the three main figures of the model and its most frequent error as HTML."""
    if PROVENANCE is None or not PROVENANCE.own:
        return f"<p>{escape(Path(MODEL).name)} has no evaluation: notebook 01 writes one for the model it trains.</p>"
    last = PROVENANCE.stages[-1]["name"]
    rows = {row.metric: row for row in PROVENANCE.own}
    rows |= {row.metric: row for row in PROVENANCE.scored if row.subject == f"{last} constrained"}  # as the page asks
    shown, errors = "", {}
    for metric, (meaning, error) in FIGURES.items():
        if row := rows.get(metric):
            low, high = (f"{100 * bound:.0f}" for bound in row.interval)
            shown += (
                f"<div><dt>{meaning} <small>95 % interval {low}–{high} %, n = {row.n}</small></dt>"
                f"<dd>{100 * row.value:.0f} %</dd></div>"
            )
            errors[error] = 1 - row.value
    typical = max(errors, key=errors.__getitem__)
    source = {"scenes": "drawn scenes"}.get(PROVENANCE.dataset, PROVENANCE.dataset)
    share = f"{100 * errors[typical]:.0f} %"
    return (
        f'<dl class="figures">{shown}</dl><p>The typical error is {typical.format(share)}</p>'
        f"<p>Measured on held-out images of {escape(source)}, weights {PROVENANCE.weights}.</p>"
    )


def calibrated() -> str:
    """Say what the percentages beside an answer mean, as Markdown."""
    calibration = getattr(TUNED, "calibration", None)
    if calibration is None:
        return "The page shows no confidence, since that of this model has not been calibrated."
    return (
        "The percentages beside an answer are calibrated: of the answers marked 80 %, about 80 % are right. "
        f"They were fitted on {calibration.images:,} validation images."
    )


def delete_old_links() -> None:
    """Delete the answers behind links that are older than LINK_HOURS; Gradio deletes only the images."""
    for file in Path(get_upload_folder(), "deep_links").glob("*/state.json"):
        if time.time() - file.stat().st_mtime > LINK_HOURS * 3600:
            shutil.rmtree(file.parent, ignore_errors=True)
