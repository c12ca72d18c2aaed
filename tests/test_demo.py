import importlib.util
from pathlib import Path

import gradio as gr
import pytest

from foodextract import scenes
from foodextract.schema import FoodRecord

APP = Path(__file__).parents[1] / "demos" / "FoodExtract-Vision" / "app.py"


@pytest.fixture(scope="module")
def app():
    spec = importlib.util.spec_from_file_location("app", APP)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_space_answers_like_the_command_line(app, tuned, tmp_path):
    picture = scenes.draw_scene(7, "test", 0).image
    picture.save(tmp_path / "a.png")
    text = app.extract(str(tmp_path / "a.png"))
    assert FoodRecord.parse(text) == tuned.extract(picture)


def test_bad_input_is_a_friendly_message(app, tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(gr.Error, match="format"):
        app.extract(str(tmp_path / "a.png"))
    with pytest.raises(gr.Error, match="Choose a picture"):
        app.extract(None)


def test_front_matter_agrees_with_the_pinned_set():
    front = (APP.parent / "README.md").read_text()
    pins = (APP.parents[2] / "requirements.txt").read_text()
    version = next(line.split(": ")[1] for line in front.splitlines() if line.startswith("sdk_version"))
    assert f"gradio=={version}\n" in pins
    assert "python_version: 3.12.12" in front
