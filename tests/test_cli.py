import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from foodextract import scenes
from foodextract.__main__ import app


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Run where no outputs/ folder is, so that the bundled model answers."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, scene in enumerate(scenes.draw_scenes(78, "test", 3)):
        scene.image.save(folder / f"{number}.png")
    return folder


def run(*args):
    return CliRunner().invoke(app, ["extract", *map(str, args)])


def test_one_line_of_json_a_picture(pictures):
    result = run(pictures)
    assert result.exit_code == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["file"] for line in lines] == [str(pictures / f"{n}.png") for n in range(3)]
    assert all(list(line) == ["file", "is_food", "image_title", "food_items", "drink_items"] for line in lines)
    assert "tiny-tuned" in result.stderr


def test_a_broken_picture_has_its_line_and_sets_the_status(pictures):
    (pictures / "1b.jpg").write_bytes(b"")
    result = run(pictures, "--output", "answers.jsonl")
    assert result.exit_code == 1
    assert result.stdout == ""
    lines = [json.loads(line) for line in Path("answers.jsonl").read_text().splitlines()]
    assert [list(line)[1] for line in lines] == ["is_food", "is_food", "error", "is_food"]
    assert "empty" in lines[2]["error"]
    assert "1 of 4" in result.stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["nothing-here"], "no pictures in"),
        (["--model", "nowhere"], "neither a folder nor a Hub id"),
        (["--model", "nobody/nothing"], "check the name and the connection"),
        (["--device", "cuda:99"], "not available"),
        (["--output", "no/such/folder/out.jsonl"], "cannot write"),
    ],
)
def test_what_cannot_start_says_why(pictures, tmp_path, args, words):
    (tmp_path / "nothing-here").mkdir()
    result = run(*(args if args[0] == "nothing-here" else [pictures, *args]))
    assert result.exit_code == 2
    assert words in result.stderr
    assert "Traceback" not in result.output


def test_an_interrupted_run_leaves_no_half_written_output(pictures, tmp_path, monkeypatch):
    from foodextract.extractor import Extractor

    def interrupted(self, files, batch_size):
        raise KeyboardInterrupt
        yield

    (tmp_path / "out.jsonl").write_text("old\n")
    monkeypatch.setattr(Extractor, "extract_many", interrupted)
    run(pictures, "--output", "out.jsonl")
    assert (tmp_path / "out.jsonl").read_text() == "old\n"


def test_the_module_is_the_command_and_help_is_quick_to_read():
    shown = subprocess.run([sys.executable, "-m", "foodextract", "extract", "--help"], capture_output=True, text=True, check=True).stdout
    for option in ("--model", "--output", "--batch-size", "--device", "Exit status"):
        assert option in shown
