"""The Gradio Space: images in, strict JSON out. This file is the page; `predict` runs the models."""

import json
import tempfile
from collections.abc import Callable, Iterator
from functools import wraps
from importlib.util import find_spec
from inspect import isgeneratorfunction
from pathlib import Path
from typing import Any

import predict  # isort: skip  # first: on ZeroGPU it imports `spaces`, which must come before torch
import gradio as gr
import limits
import previews
from starlette.middleware import Middleware

from foodextract import names
from foodextract.data.scenes import draw_scenes
from foodextract.models.loading import ModelError
from foodextract.models.training_data import TrainingData

URL = "http://127.0.0.1:7860"  # in the API examples; the browser replaces it
# One event at a time, with files as they are: `foodextract.images` reads more formats than Gradio, with better errors.
MODEL = {"concurrency_id": "model", "concurrency_limit": 1, "show_progress": "minimal", "preprocess": False}
NOW = {"queue": False, "show_progress": "hidden", "preprocess": False, "api_visibility": "private"}
DESCRIPTION = f"Say what food and drink an image shows, as one line of JSON. What answers: {predict.about()}"
MEGABYTES = f"{predict.MAX_BYTES / 2**20:.0f} MB"

API = f"""
## Python

`extract` takes an image file and returns one line of JSON. `extract_many` takes up to {predict.MAX_IMAGES} files and
returns a list, with an error in place of the record for a file that cannot be read. First `pip install gradio_client`:

```python
from gradio_client import Client, handle_file

client = Client("{URL}")
print(client.predict(handle_file("lunch.jpg"), api_name="/extract"))
print(client.predict([handle_file("lunch.jpg"), handle_file("tea.heic")], api_name="/extract_many"))
```

## HTTP

Upload the file, start the call, fetch the answer:

```bash
file=$(curl -s -F files=@lunch.jpg {URL}/gradio_api/upload | tr -d '[]"')
event=$(curl -s {URL}/gradio_api/call/extract -H 'Content-Type: application/json' \\
    -d '{{"data": [{{"path": "'$file'", "meta": {{"_type": "gradio.FileData"}}}}]}}' | cut -d'"' -f4)
curl -sN {URL}/gradio_api/call/extract/$event
```

## MCP

`extract` is also a tool for assistants. It takes the address that `upload_file_to_gradio` returns, or a data URL. Add
this to the settings of your MCP client, with the folder of your images in the last line:

```json
{{
  "mcpServers": {{
    "foodextract": {{"url": "{URL}/gradio_api/mcp/"}},
    "upload_files_to_gradio": {{
      "command": "uvx",
      "args": ["--from", "gradio[mcp]", "gradio", "upload-mcp", "{URL}", "<folder>"]
    }}
  }}
}}
```

A file may have up to {MEGABYTES}. Requests are answered one at a time. When the queue is full, new ones are refused.
"""


def paths_of(given: dict | list[dict] | None) -> Any:
    """Return the paths of files as Gradio describes them."""
    return [file["path"] for file in given] if isinstance(given, list) else given and given["path"]


def on_paths(function: Callable) -> Callable:
    """Turn a function of paths into an event handler; Gradio streams the results only of a generator function."""
    if isgeneratorfunction(function):

        @wraps(function)
        def event(given: dict | list[dict] | None, *more: Any) -> Any:
            yield from function(paths_of(given), *more)

    else:

        @wraps(function)
        def event(given: dict | list[dict] | None, *more: Any) -> Any:
            return function(paths_of(given), *more)

    return event


def extract(image: str) -> str:
    """Say what food and drink an image shows, as one line of JSON: is_food, image_title, food_items, drink_items.

    Args:
        image: Address of an image that was uploaded to this server, or the image as a data URL. No other is fetched.
    """
    return predict.predict_one(image)[0].to_json()


def extract_many(images: list[str]) -> list[dict]:
    """Say what food and drink each image shows: its file and is_food, image_title, food_items, drink_items, or error.

    Args:
        images: The image files.
    """
    return list(predict.predict_many(images))


extract_many._mcp_type = "none"  # private: no tool, because Gradio passes no lists of files over MCP


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


def many(images: list[str] | None, progress: gr.Progress = gr.Progress()) -> Iterator[tuple]:  # noqa: B008
    """Yield the table as HTML and its download buttons after each image, or the error."""
    rows, html, off = [], "", [gr.DownloadButton(interactive=False)] * 2
    try:
        for row in predict.predict_many(images):
            html += predict.row_as_html(row, predict.thumbnail(images[len(rows)]))
            rows.append(row)
            progress((len(rows), len(images)), unit="images")
            yield predict.table_as_html(html, len(rows), len(images)), *off
    except gr.Error as error:
        yield predict.error_as_html(error), *off
        return
    paths = predict.write_files(rows)
    csv.temp_files.update(paths)  # `delete_cache` does not see the buttons made here
    yield gr.skip(), *(gr.DownloadButton(value=path, interactive=True) for path in paths)


def answer_on(trigger: Callable, function: Callable, given: Any, outputs: list, button: gr.Button) -> None:
    """Clear the old answer and disable the button at once, wherever the event stands in the queue; then answer."""
    empty = {gr.Code: "", gr.DownloadButton: gr.update(interactive=False)}
    rest = [empty[type(output)] for output in outputs[1:]]
    last = {"trigger_mode": "always_last"}  # an image that is replaced while it waits is not the last word
    begun = trigger(
        lambda files: (WORKING if files else WAITING, *rest, gr.Button(interactive=False)),
        given, [*outputs, button], **last, **NOW,
    )  # fmt: skip
    answered = begun.then(on_paths(function), given, outputs, api_visibility="private", **last, **MODEL)
    answered.success(lambda: gr.Button(interactive=True), None, button, **NOW)
    # Gradio runs no `then` after a question that the server refuses, because too many wait.
    answered.failure(lambda: (REFUSED, gr.Button(interactive=True)), None, [outputs[0], button], **NOW)


def image_input(label: str) -> gr.Image:
    """Return an input for one image."""
    return gr.Image(type="filepath", label=label, sources=["upload", "webcam", "clipboard"], height=320, buttons=[])


def examples() -> dict[str, str]:
    """Return files by label: six photographs and three drawings; no model was trained on them."""
    folder = Path(tempfile.mkdtemp())
    scenes = sorted(draw_scenes(7, "test", 20), key=lambda scene: not scene.record.is_food)  # stable
    drawings = {scene.record.image_title: scene.image for scene in scenes[:2]} | {"no food or drink": scenes[-1].image}
    drawn = {f"drawing: {label}": str(folder / f"{number}.png") for number, label in enumerate(drawings, 1)}
    for path, image in zip(drawn.values(), drawings.values(), strict=True):
        image.save(path)
    taken = ("pizza", "coffee", "pancakes", "cookies", "eggs benedict", "cat")
    photos = {name: str(HERE / "examples" / f"{name.replace(' ', '_')}.jpg") for name in taken}
    return drawn | photos if predict.drawings_only() else photos | drawn


def example_buttons(image: gr.Image, name: str) -> None:
    """Show the examples as buttons with their labels; `thumbnails` adds the images."""
    files = [[path] for path in EXAMPLES.values()]
    label = "Or try one of these. The labels say what each shows; the model does not get all of them right."
    gr.Examples(files, image, label=label, example_labels=list(EXAMPLES), elem_id=name, api_visibility="private")


def thumbnails() -> str:
    """Return CSS that shows each example above its label."""
    button = "[id$=examples] button:nth-child({})::before {{ background-image: url({}) }}"
    return "".join(button.format(n, predict.thumbnail(path)) for n, path in enumerate(EXAMPLES.values(), 1))


HERE = Path(__file__).parent
EXAMPLES = examples()
WAITING, WORKING = "<p>The answer appears here.</p>", '<p role="status">Looking …</p>'
REFUSED = '<p role="alert">No answer came, probably because too many questions are waiting. Ask again in a minute.</p>'

with gr.Blocks(
    title="FoodExtract Vision", analytics_enabled=False, delete_cache=(3600, predict.LINK_HOURS * 3600)
) as demo:
    gr.Markdown(
        "# FoodExtract Vision\nWhat food and drink does an image show? The answer is one line of strict JSON.\n\n"
        f"{predict.links()}\n\n**What answers:** {predict.about()}"
    )
    if isinstance(predict.TUNED, ModelError):
        gr.Markdown(f"**The model cannot be loaded, so nothing here can answer.** {predict.TUNED}")
    if data := TrainingData.find(predict.MODEL):
        with gr.Accordion(f"The {len(data.names)} names that it knows", open=False):
            gr.Markdown(", ".join(data.names))
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
                gr.DeepLinkButton(f"Copy a link to this answer (kept for {predict.LINK_HOURS} hours)", size="sm")
        example_buttons(image, "examples")
    with gr.Tab("Before / after"):
        gr.Markdown("What the model writes before and after fine-tuning, without a grammar.")
        with gr.Row():
            with gr.Column(min_width=300):
                pair_image = image_input("Image to compare")
                pair_ask = gr.Button("Compare", variant="primary")
            with gr.Column(min_width=300):
                example_buttons(pair_image, "pair-examples")
        pair = gr.HTML(WAITING, padding=False)
    with gr.Tab("Many images"):
        gr.Markdown(
            f"Up to {predict.MAX_IMAGES} images of up to {MEGABYTES} each. A file that cannot be read gets an error of "
            "its own; the others are answered."
        )
        files = gr.File(file_count="multiple", label="Images", height=180)
        files_ask = gr.Button("What is in them?", variant="primary")
        table = gr.HTML(WAITING, padding=False)
        with gr.Row():
            csv, jsonl = (gr.DownloadButton(f"Download {form}", interactive=False) for form in ("CSV", "JSON lines"))
    with gr.Tab("How good is it?"):
        gr.HTML(predict.figures(), padding=False)
        gr.Markdown(f"{predict.calibrated()}\n\n[All figures]({names.CODE}/tree/main/results)")
    with gr.Tab("For programs"):
        programs = gr.Markdown(API)
    here = "(location.origin + location.pathname).replace(/[/]$/, '')"
    own_url = f"() => {json.dumps(API)}.replaceAll({json.dumps(URL)}, {here})"
    demo.load(None, None, programs, js=own_url, api_visibility="private")
    demo.unload(predict.delete_old_links)

    # `change`, not `input`: `input` fires before an image is removed, and is lost while another event runs.
    answer_on(ask.click, show, image, [shown, text], ask)
    answer_on(image.change, lambda path: show(path) if path else (WAITING, ""), image, [shown, text], ask)
    answer_on(pair_ask.click, compare, pair_image, [pair], pair_ask)
    answer_on(pair_image.change, lambda path: compare(path) if path else WAITING, pair_image, [pair], pair_ask)
    answer_on(files_ask.click, many, files, [table, csv, jsonl], files_ask)
    with gr.Row(visible=False):
        api = {"api_description": DESCRIPTION, **MODEL}
        gr.Button().click(on_paths(extract), image, gr.Textbox(), api_name="extract", **api)
        gr.Button().click(on_paths(extract_many), files, gr.JSON(), api_name="extract_many", **api)

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
    labels = dict.fromkeys(("block_label_background_fill_dark", "block_title_background_fill_dark"), "*primary_800")
    labels |= {"body_text_color_subdued": "*neutral_600", "body_text_color_subdued_dark": "*neutral_300"}
    boxes = {"block_border_width": "1px", "body_background_fill": "*neutral_50"}
    demo.launch(
        app_kwargs={"middleware": [Middleware(limits.BodyLimit), Middleware(previews.Previews)]},
        mcp_server=find_spec("mcp") is not None,
        ssr_mode=False,
        head=previews.TYPES,
        css=thumbnails(),
        css_paths=HERE / "style.css",
        theme=theme.set(**dark_on_light, **light_on_dark, **labels, **boxes),
    )
