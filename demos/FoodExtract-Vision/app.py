"""The Gradio Space: one picture in, one line of strict JSON out."""

import os

import gradio as gr

from foodextract.extractor import Extractor
from foodextract.models import newest_tuned
from foodextract.pictures import PictureError
from foodextract.scenes import draw_scenes
from foodextract.schema import AnswerError

MODEL = os.environ.get("FOODEXTRACT_MODEL") or str(newest_tuned())
extractor = Extractor.from_pretrained(MODEL)


def extract(picture: str | None) -> str:
    """Say what food and drink a picture shows, as one line of JSON with is_food, image_title, food_items and drink_items."""
    if picture is None:
        raise gr.Error("Choose a picture first.")
    try:
        return extractor.extract(picture).to_json()
    except (PictureError, AnswerError) as error:
        raise gr.Error(str(error)) from error


demo = gr.Interface(
    extract,
    gr.Image(type="filepath", label="Picture", sources=["upload", "webcam", "clipboard"]),
    gr.Code(language="json", label="Answer", wrap_lines=True),
    examples=[[scene.image] for scene in draw_scenes(7, "test", 4)],
    cache_examples=False,
    title="FoodExtract Vision",
    description=f"Give it a picture; it answers with one line of strict JSON. Model: `{os.path.basename(MODEL)}`.",
    api_name="extract",
    flagging_mode="never",
)

if __name__ == "__main__":
    demo.queue(max_size=16).launch(max_file_size="20mb")
