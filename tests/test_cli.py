import csv
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from foodextract import cli
from foodextract.__main__ import app
from foodextract.data import scenes
from foodextract.images import ImageError, open_image
from foodextract.inference import output_files
from foodextract.inference.extractor import Extractor
from foodextract.inference.grammar import Dialect
from foodextract.models.loading import TINY_TUNED
from foodextract.models.training_data import TrainingData
from foodextract.schema import FoodRecord

EXAMPLES = Path(__file__).parents[1] / "demos" / "FoodExtract-Vision" / "examples"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Run where no outputs/ folder is, so that the bundled model answers."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number, scene in enumerate(scenes.draw_scenes(78, "test", 3)):
        scene.image.save(folder / f"{number}.png")
    return folder


@pytest.fixture(autouse=True)
def no_model_of_the_caller(monkeypatch):
    monkeypatch.delenv("FOODEXTRACT_MODEL", raising=False)


def run(*args):
    return CliRunner().invoke(app, ["extract", "--model", str(TINY_TUNED), *map(str, args)])


def test_without_a_model_the_bundled_photo_model_answers():
    shown = {"pizza": "pizza", "pancakes": "pancake", "cookies": "cookie", "coffee": "coffee", "cat": "", "rocket": ""}
    result = CliRunner().invoke(app, ["extract", *(str(EXAMPLES / f"{name}.jpg") for name in shown)])
    assert result.exit_code == 0
    assert "model: photo, 26 M parameters; trained on" in result.stderr
    for line, name in zip(result.stdout.splitlines(), shown.values(), strict=True):
        answer = json.loads(line)
        assert answer["is_food"] == bool(name)
        assert name in [*answer["food_items"], *answer["drink_items"], ""]
        assert name or not answer["image_title"]


def test_the_model_may_come_from_the_environment(images, monkeypatch):
    monkeypatch.setenv("FOODEXTRACT_MODEL", "tiny-tuned")
    result = CliRunner().invoke(app, ["extract", str(images / "0.png")])
    assert "model: tiny-tuned" in result.stderr
    assert "model: photo" in CliRunner().invoke(app, ["extract", "--model", "photo", str(images / "0.png")]).stderr


def test_the_folder_a_command_runs_in_has_its_name(images, tmp_path, monkeypatch):
    shutil.copytree(TINY_TUNED, tmp_path / "mine")
    monkeypatch.chdir(tmp_path / "mine")
    assert "model: mine, 3 M parameters" in run("--model", ".", images / "0.png").stderr


def test_a_model_for_drawings_says_so(images):
    assert "it has never seen a photograph" in run(images / "0.png").stderr


def test_one_line_of_json_a_image(images):
    result = run(images)
    assert result.exit_code == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["file"] for line in lines] == [str(images / f"{n}.png") for n in range(3)]
    assert all(list(line) == ["file", "is_food", "image_title", "food_items", "drink_items"] for line in lines)
    assert "tiny-tuned" in result.stderr


def test_a_broken_image_has_its_line_and_sets_the_status(images):
    (images / "1b.jpg").write_bytes(b"")
    result = run(images, "--output", "answers.jsonl")
    assert result.exit_code == 1
    assert result.stdout == ""
    lines = [json.loads(line) for line in Path("answers.jsonl").read_text().splitlines()]
    assert [list(line)[1] for line in lines] == ["is_food", "is_food", "error", "is_food"]
    assert "empty" in lines[2]["error"]
    assert "1 of 4" in result.stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["nothing-here"], "no images in"),
        (["--model", "nowhere"], "neither a folder nor a Hub id"),
        (["--model", "nobody/nothing"], "check the name and the connection"),
        (["--device", "cuda:99"], "not available"),
        (["--precision", "int4"], "'int4' is not known"),
        (["--free", "--confidence"], "leave out --free"),
        (["--free", "--min-confidence", "0.5"], "leave out --free"),
        (["--output", "no/such/folder/out.jsonl"], "cannot write"),
    ],
)
def test_what_cannot_start_says_why(images, tmp_path, args, words):
    (tmp_path / "nothing-here").mkdir()
    result = run(*(args if args[0] == "nothing-here" else [images, *args]))
    assert result.exit_code == 2
    assert words in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_wherever_a_run_is_killed_it_is_taken_up_again(images, monkeypatch, form):
    """The output is cut after every few bytes; each time the same command makes it whole, and asks only for what is
    missing.
    """
    asked = []

    def at_once(self, files, batch_size):
        asked.extend(files)
        for file in files:
            record = FoodRecord(is_food=1, image_title='a, "b"\n' + Path(file).stem, food_items=["c"], drink_items=[])
            yield ImageError("no\nimage") if "1b" in file else (record, None)

    monkeypatch.setattr(Extractor, "extract_many_with_confidence", at_once)
    monkeypatch.setattr(Extractor, "from_pretrained", lambda *args, **options: object.__new__(Extractor))
    (images / "1b.png").write_bytes(b"")
    command = (images, "--output", "out", "--format", form)
    assert run(*command).exit_code == 1
    whole = Path("out").read_bytes()
    lines = sorted(whole.splitlines())
    for cut in (
        0,
        *range(len(output_files.header(form)), len(whole), 2 if form == "csv" else 7),
    ):  # the header is put there whole
        Path("out").write_bytes(whole[:cut])
        asked.clear()
        assert run(*command).exit_code == 1
        assert sorted(Path("out").read_bytes().splitlines()) == lines, cut
        done = sum(f"{number}.png".encode() in whole[:cut] for number in range(3))
        assert 4 - done <= len(asked) <= 5 - done


def test_lines_of_images_that_are_not_asked_for_stay(images, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "bad.png").write_bytes(b"")
    assert run(other, "--output", "out.jsonl").exit_code == 1
    assert run(images, "--output", "out.jsonl").exit_code == 0
    rows = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert [row["file"] for row in rows if "error" in row] == [str(other / "bad.png")]
    assert len(rows) == 4
    (other / "bad.png").write_bytes((images / "0.png").read_bytes())
    assert run(other, "--output", "out.jsonl").exit_code == 0
    assert "error" not in Path("out.jsonl").read_text()


def test_a_linked_output_keeps_its_link_and_permissions(images, tmp_path):
    (tmp_path / "kept.jsonl").touch(mode=0o600)
    Path("link.jsonl").symlink_to(tmp_path / "kept.jsonl")
    assert run(images, "--output", "link.jsonl").exit_code == 0
    assert Path("link.jsonl").is_symlink()
    assert (tmp_path / "kept.jsonl").stat().st_mode & 0o777 == 0o600
    assert len((tmp_path / "kept.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("where", ["/dev/null", "."])
def test_an_output_that_is_not_a_file_is_left_alone(images, where):
    result = run(images, "--output", where)
    assert result.exit_code == 2
    assert f"{where} is not a file: name another" in result.stderr


def test_a_full_disk_is_named(images, monkeypatch):
    def write(descriptor, data):
        if len(data) > 10:
            return real(descriptor, data[:10])
        raise OSError(28, "No space left on device")

    real = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        result = run(images, "--output", "out.jsonl")
    assert result.exit_code == 2
    assert "cannot write out.jsonl: No space left on device. Rerun to resume" in result.stderr
    assert run(images, "--output", "out.jsonl").exit_code == 0  # the line that was cut is written anew
    assert len(Path("out.jsonl").read_text().splitlines()) == 3


def test_drawing_into_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    result = CliRunner().invoke(app, ["draw", str(tmp_path / "file")])
    assert result.exit_code == 2
    assert "File exists" in result.stderr


def test_what_failed_is_tried_again_and_nothing_else(images):
    broken = images / "1b.png"
    broken.write_bytes(b"")
    assert run(images, "--output", "out.jsonl").exit_code == 1
    broken.write_bytes((images / "0.png").read_bytes())
    again = run(images, "--output", "out.jsonl")
    assert again.exit_code == 0
    assert "out.jsonl already has answers for 3 of 4 images" in again.stderr
    assert sorted(json.loads(line)["file"] for line in Path("out.jsonl").read_text().splitlines()) == sorted(
        map(str, images.iterdir())
    )
    assert "loading" not in run(images, "--output", "out.jsonl").stderr  # nothing left to ask


@pytest.mark.parametrize(
    ("form", "text"), [("jsonl", "milk\n"), ("csv", "milk,\neggs\n"), ("jsonl", '{"file": "a.png", "label": 1}\n')]
)
def test_a_file_that_is_not_ours_is_left_alone(images, form, text):
    Path("notes").write_text(text)
    result = run(images, "--output", "notes", "--format", form)
    assert result.exit_code == 2
    assert "left alone" in result.stderr
    assert Path("notes").read_text() == text
    assert not Path("notes.partial").exists()


def test_damage_in_the_middle_is_not_mistaken_for_the_end():
    good = output_files.as_line(
        {"file": "a.png", "is_food": 0, "image_title": "", "food_items": [], "drink_items": []}, "csv"
    )
    for bad in ('"b"c,0,,[],[],,\n', "b.png,0\n"):
        Path("out.csv").write_text(output_files.header("csv") + bad + good)
        with pytest.raises(output_files.AnswerFileError, match="left alone"):
            output_files.resume(Path("out.csv"), "csv")
        assert Path("out.csv").read_text().endswith(bad + good)


def test_no_cell_is_a_formula_and_its_text_comes_back(tmp_path):
    titles = ["=1+1", "+1", "-1", "@SUM(A1)", "\tx", "\r=1", "'quoted'", "plain = text"]
    rows = [
        {"file": title, "is_food": 1, "image_title": title, "food_items": ["=1"], "drink_items": []} for title in titles
    ]
    (tmp_path / "out.csv").write_text(
        output_files.header("csv") + "".join(output_files.as_line(row, "csv") for row in rows), newline=""
    )
    before = (tmp_path / "out.csv").read_bytes()
    for row in list(csv.reader(io.StringIO(before.decode(), newline="")))[1:-1]:
        assert not any(cell.startswith(("=", "+", "-", "@", "\t", "\r")) for cell in row)
    assert output_files.resume(tmp_path / "out.csv", "csv") == set(titles)
    assert (tmp_path / "out.csv").read_bytes() == before
    assert "'" not in output_files.as_line(rows[0], "jsonl")


def test_the_form_that_a_model_writes_is_told_once_on_stderr(images, monkeypatch):
    monkeypatch.setattr(Extractor, "_probe", lambda self: Dialect(" ", python=True))
    result = run(images, "--batch-size", "1")
    assert result.stderr.count("the model writes Python reprs") == 1
    assert all(
        FoodRecord(**{key: line[key] for key in FoodRecord.model_fields})
        for line in map(json.loads, result.stdout.splitlines())
    )


def test_csv_with_confidence(images):
    (images / "1b.png").write_bytes(b"")
    result = run(images, "--format", "csv", "--confidence")
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    assert list(rows[0]) == ["file", "is_food", "image_title", "food_items", "drink_items", "confidence", "error"]
    assert [bool(row["error"]) for row in rows] == [False, False, True, False]
    for row in rows[:2]:
        assert len(json.loads(row["food_items"])) == len(json.loads(row["confidence"])["food_items"])
    plain = list(csv.DictReader(io.StringIO(run(images, "--format", "csv").stdout)))
    assert list(plain[0]) == ["file", "is_food", "image_title", "food_items", "drink_items", "error"]


def test_one_csv_file_has_one_form(images):
    assert run(images, "--format", "csv", "-o", "out.csv").exit_code == 0
    (images / "3.png").write_bytes((images / "0.png").read_bytes())
    for others, words in ((["--confidence"], "leave --confidence out"), ([], "already has answers for 3 of 4")):
        result = run(images, "--format", "csv", "-o", "out.csv", *others)
        assert words in result.stderr
        assert result.exit_code == (2 if others else 0)


def test_a_missing_path_is_named_before_a_model_is_loaded(images, monkeypatch):
    monkeypatch.setattr(Extractor, "from_pretrained", lambda *args, **options: pytest.fail("loaded"))
    result = run("lunch.jpg", "dinner.jpg")
    assert result.exit_code == 2
    assert "there is no lunch.jpg, dinner.jpg" in result.stderr


def test_a_missing_path_beside_good_ones_has_its_line(images):
    result = run(images / "0.png", "lunch.jpg")
    assert result.exit_code == 1
    first, second = map(json.loads, result.stdout.splitlines())
    assert "is_food" in first
    assert second["file"] == "lunch.jpg"
    assert result.stderr.index("there is no lunch.jpg") < result.stderr.index("loading")


def test_one_image_has_no_progress_bar(images):
    assert "image/s" not in run(images / "0.png").stderr
    assert "3/3" in run(images).stderr


def test_a_bar_is_shown_only_beside_a_file(tmp_path):
    read, write = os.pipe()
    with (tmp_path / "answers.jsonl").open("w") as file, os.fdopen(read), os.fdopen(write, "w") as pipe:
        assert (cli._may_share_terminal(file), cli._may_share_terminal(pipe)) == (False, True)


def test_unsure_items_are_left_out_and_the_title_follows(images):
    edible = [scene for scene in scenes.draw_scenes(7, "test", 12) if scene.record.is_food]
    for number, scene in enumerate(edible):
        scene.image.save(images / f"edible-{number}.png")
    everything, nothing = (
        [json.loads(line) for line in run(images, "--min-confidence", least).stdout.splitlines()] for least in (0, 1)
    )
    assert any(line["food_items"] or line["drink_items"] for line in everything)
    for before, after in zip(everything, nothing, strict=True):
        assert after["is_food"] == before["is_food"]
        assert not after["food_items"] + after["drink_items"]
        assert after["image_title"] == ("food or drink" if before["food_items"] + before["drink_items"] else "")


def test_a_redirected_output_is_utf8(images):
    """Windows gives a redirected process another encoding. JSON lines are ASCII."""
    shutil.move(images / "0.png", images / "crème 🍮.png")
    command = [
        sys.executable,
        "-m",
        "foodextract",
        "extract",
        str(images),
        "--format",
        "csv",
        "--model",
        str(TINY_TUNED),
    ]
    environment = os.environ | {"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}
    done = subprocess.run(command, capture_output=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert str(images / "crème 🍮.png") in done.stdout.decode()


def test_names_lists_what_a_model_knows(tmp_path):
    TrainingData.of(
        [
            {"source": "scenes", "food_items": ["pizza"], "drink_items": ["tea"] if number < 9 else []}
            for number in range(10)
        ]
    ).write(tmp_path)
    result = CliRunner().invoke(app, ["names", "--model", str(tmp_path)])
    assert result.exit_code == 0
    assert result.stdout == "pizza\t10\n"
    assert "never seen a photograph" in result.stderr
    assert CliRunner().invoke(app, ["names", "--model", str(tmp_path / "other")]).exit_code == 2


def test_free_answers_are_those_without_the_grammar(images, tuned):
    lines = [json.loads(line) for line in run(images, "--free").stdout.splitlines()]
    for line in lines:
        [said] = tuned.generate_texts([open_image(line.pop("file"))])
        assert json.dumps(line) == said or repr(said) in line["error"]


def test_the_module_is_the_command_and_help_is_quick_to_read():
    shown = subprocess.run(
        [sys.executable, "-m", "foodextract", "extract", "--help"], capture_output=True, text=True, check=True
    ).stdout
    for option in (
        "--model",
        "--output",
        "--format",
        "--batch-size",
        "--tiles",
        "--device",
        "--confidence",
        "--free",
        "Exit status",
    ):
        assert option in shown
