"""The Gradio Space: images in, strict JSON out. This file is the page; `predict` runs the models."""

import json
import tempfile
from collections.abc import Callable
from functools import wraps
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import predict  # isort: skip  # first: on ZeroGPU it imports `spaces`, which must come before torch
import gradio as gr
import limits
from starlette.middleware import Middleware

from foodextract.data.scenes import draw_scenes
from foodextract.models.loading import ModelError

URL = "http://127.0.0.1:7860"  # in the API examples; the browser replaces it
# One event at a time, with files as they are: `foodextract.images` reads more formats than Gradio, with better errors.
MODEL = {"concurrency_id": "model", "concurrency_limit": 1, "show_progress": "minimal", "preprocess": False}
PRIVATE = {"api_visibility": "private", **MODEL}  # events of the page; only `extract` is public

API = f"""
`extract` takes an image as a file, not as a URL, and returns one line of JSON. From Python, after
`pip install gradio_client`:

```python
from gradio_client import Client, handle_file

client = Client("{URL}")
print(client.predict(handle_file("lunch.jpg"), api_name="/extract"))
```

Over HTTP in three steps: upload the file, start the call, fetch the answer.

```bash
file=$(curl -s -F files=@lunch.jpg {URL}/gradio_api/upload | tr -d '[]"')
event=$(curl -s {URL}/gradio_api/call/extract -H 'Content-Type: application/json' \\
    -d '{{"data": [{{"path": "'$file'", "meta": {{"_type": "gradio.FileData"}}}}]}}' | cut -d'"' -f4)
curl -sN {URL}/gradio_api/call/extract/$event
```

For MCP clients the same function is a tool at `{URL}/gradio_api/mcp/` (if the package `mcp` is installed);
it takes an image as a data URL. A file may have {predict.MAX_BYTES / 2**20:.0f} MB. Requests are answered one
after the other; when the queue is full, further ones are refused at once.
"""


def on_paths(function: Callable) -> Callable:
    """Turn a function of paths into an event handler, which gets files as Gradio describes them."""

    @wraps(function)
    def event(given: dict | list[dict] | None) -> Any:
        return function([file["path"] for file in given] if isinstance(given, list) else given and given["path"])

    return event


def extract(image: str) -> str:
    """Say what food and drink an image shows, as one line of JSON: is_food, image_title, food_items, drink_items."""
    return predict.predict_one(image)[0].to_json()


def show(image: str | None) -> tuple[str, str]:
    """Return the answer as HTML and as JSON, or the error as HTML."""
    try:
        record, confidence, seconds = predict.predict_one(image)
    except gr.Error as error:
        return predict.error_as_html(error), ""
    return predict.record_as_html(record, confidence, seconds), record.to_json()


def compare(image: str | None) -> str:
    """Return the answers of base and tuned model as HTML, or the error."""
    try:
        return predict.compare(image)
    except gr.Error as error:
        return predict.error_as_html(error)


def many(images: list[str] | None) -> tuple:
    """Return a table as HTML and its download buttons, or the error."""
    try:
        table, *paths = predict.predict_many(images)
    except gr.Error as error:
        return predict.error_as_html(error), *[gr.DownloadButton(interactive=False)] * 2
    csv.temp_files.update(paths)  # `delete_cache` does not see the buttons made here
    return table, *(gr.DownloadButton(value=path, interactive=True) for path in paths)


def image_input(label: str) -> gr.Image:
    """Return an input for one image."""
    return gr.Image(type="filepath", label=label, sources=["upload", "webcam", "clipboard"], height=320, buttons=[])


def drawn_examples() -> list[list[str]]:
    """Draw five scenes with food or drink and one without; no model was trained on them."""
    folder = Path(tempfile.mkdtemp())
    scenes = sorted(draw_scenes(7, "test", 20), key=lambda scene: not scene.record.is_food)  # stable
    files = [str(folder / f"drawing-{number}.png") for number in range(1, 7)]
    for file, scene in zip(files, [*scenes[:5], next(s for s in scenes if not s.record.is_food)], strict=True):
        scene.image.save(file)
    return [[file] for file in files]


EXAMPLES = drawn_examples()
WAITING = "<p>The answer appears here.</p>"

with gr.Blocks(title="FoodExtract Vision", analytics_enabled=False, delete_cache=(3600, 3600)) as demo:
    gr.Markdown(
        "# FoodExtract Vision\nGive it an image. It answers with one line of strict JSON: is food or drink visible, "
        f"a short title, the food items, the drink items. Model: `{Path(predict.MODEL).name}`."
    )
    if notice := predict.notice():
        gr.Markdown(notice)
    if isinstance(predict.TUNED, ModelError):
        gr.Markdown(f"**The model cannot be loaded, so nothing here can answer.** {predict.TUNED}")
    with gr.Tab("One image"):
        with gr.Row():
            with gr.Column(min_width=300):
                image = image_input("Image")
                ask = gr.Button("What is in it?", variant="primary")
            with gr.Column(min_width=300):
                shown = gr.HTML(WAITING, label="Answer", padding=False)
                text = gr.Code(
                    language="json", label="JSON", wrap_lines=True, interactive=False, show_line_numbers=False,
                    elem_id="json", lines=1, max_lines=9, buttons=["copy", "download"],
                )  # fmt: skip
        gr.Examples(EXAMPLES, image, label="Or one of these drawings", api_visibility="private")
    with gr.Tab("Before / after"):
        gr.Markdown("What the model writes before and after fine-tuning, without a grammar.")
        with gr.Row():
            with gr.Column(min_width=300):
                pair_image = image_input("Image to compare")
                pair_ask = gr.Button("Compare", variant="primary")
            with gr.Column(min_width=300):
                gr.Examples(EXAMPLES, pair_image, label="Or one of these drawings", api_visibility="private")
        pair = gr.HTML(WAITING, padding=False)
    with gr.Tab("Many images"):
        gr.Markdown(f"Up to {predict.MAX_IMAGES} at once. An image that cannot be read gets its own error.")
        files = gr.File(file_count="multiple", label="Images", height=180)
        files_ask = gr.Button("What is in them?", variant="primary")
        table = gr.HTML("<p>The answers appear here.</p>", padding=False)
        with gr.Row():
            csv, jsonl = (gr.DownloadButton(f"Download {form}", interactive=False) for form in ("CSV", "JSON lines"))
    with gr.Tab("How good is it?"):
        gr.Markdown(predict.figures())
    with gr.Tab("For programs"):
        programs = gr.Markdown(API)
    here = "(location.origin + location.pathname).replace(/[/]$/, '')"
    own_url = f"() => {json.dumps(API)}.replaceAll({json.dumps(URL)}, {here})"
    demo.load(None, None, programs, js=own_url, api_visibility="private")

    ask.click(on_paths(show), image, [shown, text], **PRIVATE)
    # `change`, not `input`: `input` fires before an image is removed, and is lost while another event runs.
    image.change(on_paths(lambda path: show(path) if path else (WAITING, "")), image, [shown, text], **PRIVATE)
    pair_ask.click(on_paths(compare), pair_image, pair, **PRIVATE)
    pair_image.change(on_paths(lambda path: compare(path) if path else WAITING), pair_image, pair, **PRIVATE)
    files_ask.click(on_paths(many), files, [table, csv, jsonl], **PRIVATE)
    gr.Button(visible=False).click(on_paths(extract), image, gr.Textbox(visible=False), api_name="extract", **MODEL)

demo.queue(max_size=64)

if __name__ == "__main__":
    font = ["system-ui", "sans-serif"]  # fetches nothing
    theme = gr.themes.Soft(primary_hue="amber", neutral_hue="stone", font=font, font_mono=["ui-monospace", "monospace"])
    dark_on_light = dict.fromkeys(("block_label_text_color", "block_title_text_color", "color_accent"), "*primary_800")
    fill = "button_primary_background_fill"
    light_on_dark = {
        fill: "*primary_800",
        f"{fill}_dark": "*primary_800",
        f"{fill}_hover": "*primary_900",
        f"{fill}_hover_dark": "*primary_700",
    }
    boxes = {"block_border_width": "1px", "body_background_fill": "*neutral_50"}
    demo.launch(
        app_kwargs={"middleware": [Middleware(limits.BodyLimit)]},
        mcp_server=find_spec("mcp") is not None,
        ssr_mode=False,
        css_paths=Path(__file__).with_name("style.css"),
        theme=theme.set(**dark_on_light, **light_on_dark, **boxes),
    )
