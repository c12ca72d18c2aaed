"""The Gradio Space: images in, strict JSON out. `asking` holds what is asked; here is only the page."""

import json
import tempfile
from collections.abc import Callable
from functools import wraps
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import asking  # first: on ZeroGPU it imports `spaces`, which must come before torch
import gradio as gr
import limits
from starlette.middleware import Middleware

from foodextract.data.scenes import draw_scenes
from foodextract.models.loading import ModelError

URL = "http://127.0.0.1:7860"  # in the examples for programs, until the browser knows better
# One after the other, in order; images as the files they are: `foodextract.images` decides what can be read, and says it better.
MODEL = {"concurrency_id": "model", "concurrency_limit": 1, "show_progress": "minimal", "preprocess": False}
INSIDE = {"api_visibility": "private", **MODEL}  # events of the page; `extract` is the one for programs

CSS = """
.gradio-container { max-width: 1080px !important; margin: 0 auto !important; }
.answer h3, .pair h3, .problem h3 { margin: 0; font-size: 1.25rem; } .answer p, .pair p { margin: .2rem 0 .8rem; }
.answer h4 { margin: 0 0 .3rem; } .problem { border-left: 4px solid #b3261e; padding: .2rem 0 .2rem 1rem; }
#json { flex-grow: 0; } #json .empty { min-height: 4rem; } body:not(.dark) #json .cm-line * { color: #7c2d12 !important; }
.dark { --color-accent: var(--primary-400); --link-text-color: var(--primary-300); }
body:not(.dark) { --link-text-color: var(--primary-800); }
.chips { display: flex; flex-wrap: wrap; gap: .4rem; list-style: none; padding: 0; margin: 0 0 .8rem; }
.chip { border-radius: 999px; padding: .2rem .75rem; margin: 0 !important; font-weight: 600; } .chip small { font-weight: 400; }
.chip.food_items { background: #fde9b8; color: #5b3400; } .chip.drink_items { background: #cfe6fb; color: #06345f; }
.dark .chip.food_items { background: #5b3b07; color: #fdeecb; } .dark .chip.drink_items { background: #0f3f6b; color: #dceefd; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)); gap: 1rem; }
.pair section { border: 1px solid var(--border-color-primary); border-radius: var(--radius-lg); padding: 1rem; min-width: 0; }
.pair pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .6rem 0; font-size: .9rem; }
.right { color: #137333; } .wrong { color: #b3261e; } .dark .right { color: #7bd88f; } .dark .wrong { color: #ff9d94; }
.prose table { display: block; max-width: calc(100vw - 4rem); overflow-x: auto; border: 0 !important; }
.prose td, .prose th { white-space: nowrap; border-color: var(--border-color-primary) !important; }
.batch { max-width: calc(100vw - 4rem); overflow-x: auto; } .batch table { width: 100%; border-collapse: collapse; }
.batch tr { border-bottom: 1px solid var(--border-color-primary); }
.batch td, .batch th { text-align: left; vertical-align: top; padding: .5rem .8rem .5rem 0; }
.prose td:first-child { white-space: normal; min-width: 9rem; overflow-wrap: normal; }
.prose pre, .prose pre code { white-space: pre-wrap !important; overflow-wrap: anywhere; }
"""

API = f"""
`extract` takes an image, as a file and not as an address, and gives one line of JSON. From Python (`pip install gradio_client`):

```python
from gradio_client import Client, handle_file

client = Client("{URL}")
print(client.predict(handle_file("lunch.jpg"), api_name="/extract"))
```

Over HTTP, in three steps: send the file, ask about it, fetch the answer.

```bash
file=$(curl -s -F files=@lunch.jpg {URL}/gradio_api/upload | tr -d '[]"')
event=$(curl -s {URL}/gradio_api/call/extract -H 'Content-Type: application/json' \\
    -d '{{"data": [{{"path": "'$file'", "meta": {{"_type": "gradio.FileData"}}}}]}}' | cut -d'"' -f4)
curl -sN {URL}/gradio_api/call/extract/$event
```

For assistants that speak MCP the same function is a tool at `{URL}/gradio_api/mcp/` (where the package `mcp` is installed), which takes a
image as a data URL. A file may have {asking.MAX_BYTES / 2**20:.0f} MB; requests are answered one after the other, and when too many wait
the next is told so at once.
"""


def on_paths(function: Callable) -> Callable:
    """`function` about paths, for an event that is given files as Gradio describes them."""

    @wraps(function)
    def event(given: dict | list[dict] | None) -> Any:
        return function([file["path"] for file in given] if isinstance(given, list) else given and given["path"])

    return event


def extract(image: str) -> str:
    """Say what food and drink an image shows, as one line of JSON with is_food, image_title, food_items and drink_items."""
    return asking.record_of(image)[0].to_json()


def show(image: str | None) -> tuple[str, str]:
    """The answer as chips, and as JSON; or what went wrong, in its place."""
    try:
        record, confidence, seconds = asking.record_of(image)
    except gr.Error as error:
        return asking.problem_as_html(error), ""
    return asking.as_html(record, confidence, seconds), record.to_json()


def compare(image: str | None) -> str:
    """Base and tuned side by side, or what went wrong."""
    try:
        return asking.compared(image)
    except gr.Error as error:
        return asking.problem_as_html(error)


def many(images: list[str] | None) -> tuple:
    """A table and the buttons that download it, or what went wrong."""
    try:
        rows, *paths = asking.batch(images)
    except gr.Error as error:
        return asking.problem_as_html(error), *[gr.DownloadButton(interactive=False)] * 2
    csv.temp_files.update(paths)  # for `delete_cache`, which does not look at the buttons made here
    return asking.table_as_html(rows), *(gr.DownloadButton(value=path, interactive=True) for path in paths)


def image_input(label: str) -> gr.Image:
    """Where one image goes in."""
    return gr.Image(type="filepath", label=label, sources=["upload", "webcam", "clipboard"], height=320, buttons=[])


def drawn_examples() -> list[list[str]]:
    """Five drawings that show food or drink and one that does not; no model was trained on them."""
    folder = Path(tempfile.mkdtemp())
    scenes = list(draw_scenes(7, "test", 20))
    chosen = [
        *[scene for scene in scenes if scene.record.is_food][:5],
        next(scene for scene in scenes if not scene.record.is_food),
    ]
    files = [str(folder / f"drawing-{number}.png") for number in range(1, 7)]
    for file, scene in zip(files, chosen, strict=True):
        scene.image.save(file)
    return [[file] for file in files]


EXAMPLES = drawn_examples()
WAITING = "<p>The answer will stand here.</p>"

with gr.Blocks(title="FoodExtract Vision", analytics_enabled=False, delete_cache=(3600, 3600)) as demo:
    gr.Markdown(
        "# FoodExtract Vision\nGive it an image. It answers with one line of strict JSON: is food or drink visible, a short title, "
        f"the food items, the drink items. Model: `{Path(asking.MODEL).name}`."
    )
    if notice := asking.notice():
        gr.Markdown(notice)
    if isinstance(asking.TUNED, ModelError):
        gr.Markdown(f"**The model cannot be loaded, so nothing here can answer.** {asking.TUNED}")
    with gr.Tab("One image"):
        with gr.Row():
            with gr.Column(min_width=300):
                image = image_input("Image")
                ask = gr.Button("What is in it?", variant="primary")
            with gr.Column(min_width=300):
                shown = gr.HTML(WAITING, label="Answer", padding=False)
                text = gr.Code(
                    language="json", label="JSON", wrap_lines=True, interactive=False, show_line_numbers=False, elem_id="json",
                    lines=1, max_lines=9, buttons=["copy", "download"],
                )  # fmt: skip
        gr.Examples(EXAMPLES, image, label="Or one of these drawings", api_visibility="private")
    with gr.Tab("Before / after"):
        gr.Markdown(
            "What the model writes before and after fine-tuning, of its own accord: no grammar helps either of them."
        )
        with gr.Row():
            with gr.Column(min_width=300):
                pair_image = image_input("Image to compare")
                pair_ask = gr.Button("Compare", variant="primary")
            with gr.Column(min_width=300):
                gr.Examples(EXAMPLES, pair_image, label="Or one of these drawings", api_visibility="private")
        pair = gr.HTML(WAITING, padding=False)
    with gr.Tab("Many images"):
        gr.Markdown(
            f"Up to {asking.MAX_IMAGES} at once. One that cannot be read gets a line that says why; the others are answered."
        )
        files = gr.File(file_count="multiple", label="Images", height=180)
        files_ask = gr.Button("What is in them?", variant="primary")
        table = gr.HTML("<p>The answers will stand here.</p>", padding=False)
        with gr.Row():
            csv, jsonl = (gr.DownloadButton(f"Download {form}", interactive=False) for form in ("CSV", "JSON lines"))
    with gr.Tab("How good is it?"):
        gr.Markdown(asking.figures())
    with gr.Tab("For programs"):
        programs = gr.Markdown(API)
    here = f"() => {json.dumps(API)}.replaceAll({json.dumps(URL)}, (location.origin + location.pathname).replace(/[/]$/, ''))"
    demo.load(None, None, programs, js=here, api_visibility="private")

    ask.click(on_paths(show), image, [shown, text], **INSIDE)
    # `input` would come before an image is gone, and be lost while another is asked about; `change` tells of the last one in the end.
    image.change(on_paths(lambda path: show(path) if path else (WAITING, "")), image, [shown, text], **INSIDE)
    pair_ask.click(on_paths(compare), pair_image, pair, **INSIDE)
    pair_image.change(on_paths(lambda path: compare(path) if path else WAITING), pair_image, pair, **INSIDE)
    files_ask.click(on_paths(many), files, [table, csv, jsonl], **INSIDE)
    gr.Button(visible=False).click(on_paths(extract), image, gr.Textbox(visible=False), api_name="extract", **MODEL)

demo.queue(max_size=64)

if __name__ == "__main__":
    font = ["system-ui", "sans-serif"]  # the reader's own: nothing is fetched from elsewhere
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
        app_kwargs={"middleware": [Middleware(limits.Limited)]},
        mcp_server=find_spec("mcp") is not None,
        ssr_mode=False,
        css=CSS,
        theme=theme.set(**dark_on_light, **light_on_dark, **boxes),
    )
