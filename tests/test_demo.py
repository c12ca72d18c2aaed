"""The Space as a program: its functions, its API, ten users at once. What people see is in test_browser.py."""

import asyncio
import base64
import csv
import dataclasses
import io
import json
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import gradio as gr
import httpx
import pytest
import yaml
from gradio.route_utils import delete_files_created_by_app
from gradio_client import Client
from PIL import Image

from foodextract import names
from foodextract.data import scenes
from foodextract.evaluation.results import read_results
from foodextract.models import loading
from foodextract.reporting.tables import metric_table
from foodextract.schema import FoodRecord

ROOT = Path(__file__).parents[1]
SPACE = ROOT / "demos" / "FoodExtract-Vision"


@pytest.fixture(scope="module")
def demo():
    """The page's modules, loaded as `python app.py` finds them."""
    sys.path.insert(0, str(SPACE))
    import app
    import predict

    yield app, predict
    sys.path.remove(str(SPACE))


@pytest.fixture
def image(tmp_path):
    scenes.draw_scene(7, "test", 0).image.save(tmp_path / "a.png")
    return str(tmp_path / "a.png")


def test_the_space_answers_like_the_command_line(demo, tuned, image):
    app, predict = demo
    assert Path(predict.MODEL) == loading.newest_tuned()
    if Path(predict.MODEL) == loading.TINY_TUNED:
        assert FoodRecord.parse(app.extract(image)) == tuned.extract(image)
    html, text = app.show(image)
    record = FoodRecord.parse(text)
    assert [
        item for item in re.findall(r'<li class="chip \w+">(.*?) <small>', html)
    ] == record.food_items + record.drink_items


@pytest.mark.parametrize("tiles", [1, 5])
def test_both_models_have_the_image_budget_of_the_tuned_one(tiles, tmp_path, monkeypatch):
    """The base comes with 17 tiles, as SmolVLM2 does, but notebook 01 measures both alike."""
    for name, folder, budget in (("MODEL", loading.TINY_TUNED, tiles), ("BASE", loading.TINY_BASE, 17)):
        shutil.copytree(folder, tmp_path / name)
        loading.load_processor(folder, budget).save_pretrained(tmp_path / name)
        monkeypatch.setenv(f"FOODEXTRACT_{name}", str(tmp_path / name))
    predict = runpy.run_path(str(SPACE / "predict.py"))
    before, after = (predict[name].prepare([Image.new("RGB", (64, 64))]) for name in ("UNTUNED", "TUNED"))
    assert before["pixel_values"].shape[1] == after["pixel_values"].shape[1] == tiles
    assert before["input_ids"].tolist() == after["input_ids"].tolist()


def test_bad_input_is_a_friendly_message(demo, tmp_path, image, monkeypatch):
    app, predict = demo
    (tmp_path / "b.png").write_bytes(b"no image")
    with pytest.raises(gr.Error, match="format"):
        app.extract(str(tmp_path / "b.png"))
    with pytest.raises(gr.Error, match="format"):
        predict.compare(str(tmp_path / "b.png"))
    with pytest.raises(gr.Error, match="There is no image yet"):
        app.extract(None)
    monkeypatch.setattr(predict, "MAX_BYTES", 5)
    for ask in (predict.predict_one, predict.compare):
        with pytest.raises(gr.Error, match=r"The file a\.png is larger than 0 MB: shrink it first"):
            ask(image)


def test_a_model_that_cannot_be_loaded_is_a_friendly_message(demo, image, monkeypatch):
    app, predict = demo
    for broken in ("/no/such/folder", None):
        monkeypatch.setattr(predict, "TUNED", predict.load(broken))
        with pytest.raises(
            gr.Error, match=r"cannot be loaded: (folder is neither a folder nor a Hub id|.*FOODEXTRACT_BASE)"
        ):
            app.extract(image)


def test_what_the_model_writes_cannot_become_markup(demo):
    _, predict = demo
    record = FoodRecord(is_food=1, image_title="<script>", food_items=["<b>"], drink_items=[])
    html = predict.record_as_html(record, predict.Confidence(0.5, [-0.1], []), 1)
    assert "<script>" not in html
    assert "&lt;b&gt;" in html


def test_confidence_is_never_100_percent(demo):
    _, predict = demo
    shares = {0.5: "50 %", 0.994: "99 %", 0.995: "&gt; 99 %", 1.0: "&gt; 99 %"}
    assert {share: predict.percent(share) for share in shares} == shares
    food = FoodRecord(is_food=1, image_title="tea", food_items=[], drink_items=["tea"])
    assert "sure that this is food or drink: &gt; 99 %" in predict.record_as_html(
        food, predict.Confidence(0.999, [], [0.0]), 1
    )
    neither = FoodRecord(is_food=0, image_title="", food_items=[], drink_items=[])
    assert "sure of that: 80 %" in predict.record_as_html(neither, predict.Confidence(0.8, [], []), 1)


def test_a_model_that_knows_drawings_only_says_so(demo, monkeypatch):
    _, predict = demo
    measured = predict.provenance.find(loading.TINY_TUNED)
    photographs = dataclasses.replace(measured, dataset="somebody/photographs")
    for model, evidence, known in (
        (loading.TINY_TUNED, measured, True),
        (loading.TINY_BASE, None, True),
        ("outputs/offline/stage2", measured, True),
        ("outputs/mine/stage2", photographs, False),
        ("owner/name", None, False),
        ("owner/name", dataclasses.replace(measured, base_model=names.HUB_BASE), False),
    ):
        monkeypatch.setattr(predict, "MODEL", str(model))
        monkeypatch.setattr(predict, "PROVENANCE", evidence)
        assert ("never seen a photograph" in predict.notice()) == known, model


def test_a_broken_file_in_a_batch_affects_no_other(demo, tmp_path, image):
    _, predict = demo
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing")
    html, as_csv, as_jsonl = predict.predict_many([image, str(tmp_path / "broken.jpg"), image])
    assert re.findall(r"<tr><th scope=.row.>.*?</th><td( class=.wrong.)?", html) == ["", ' class="wrong"', ""]
    rows = [json.loads(line) for line in Path(as_jsonl).read_text().splitlines()]
    with open(as_csv, newline="") as lines:
        cells = list(csv.DictReader(lines))
    assert [row["file"] for row in rows] == [row["file"] for row in cells] == ["a.png", "broken.jpg", "a.png"]
    assert rows[1].keys() == {"file", "error"}
    assert json.loads(cells[0]["food_items"]) == rows[0]["food_items"]
    with pytest.raises(gr.Error, match="more than the 50"):
        predict.predict_many([image] * 51)


def answers(outputs):
    """The lines of answers.jsonl."""
    return [json.loads(line) for line in Path(outputs[2]).read_text().splitlines()]


@pytest.mark.parametrize("place", [0, 1])
def test_a_large_file_in_a_batch_is_not_opened_and_affects_no_other(demo, tmp_path, image, monkeypatch, place):
    _, predict = demo
    heavy = tmp_path / "heavy.png"
    heavy.write_bytes(Path(image).read_bytes() + bytes(100_000))
    monkeypatch.setattr(predict, "MAX_BYTES", 90_000)
    paths = [image, image]
    paths.insert(place, str(heavy))
    rows = answers(predict.predict_many(paths))
    assert [row["file"] for row in rows if "error" in row] == ["heavy.png"]
    assert rows[place]["error"].startswith("the file heavy.png is larger than 0 MB")
    assert sum("is_food" in row for row in rows) == 2
    [alone] = answers(predict.predict_many([str(heavy)]))
    assert alone["error"]


def test_downloads_are_deleted_with_uploads(demo, image):
    app, _ = demo
    _, as_csv, as_jsonl = app.many([image])
    paths = [Path(button.value["path"]) for button in (as_csv, as_jsonl)]
    assert all(path.is_file() for path in paths)
    delete_files_created_by_app(app.demo, age=None)
    assert not any(path.exists() for path in paths)


FORKED = """
import json, os, pickle, sys, types
import gradio as gr

def GPU(duration):
    def decorate(function):
        def asked(*arguments):
            durations.append(duration(*arguments))
            read, write = os.pipe()
            if not os.fork():
                try:
                    result = function(*arguments)
                except gr.Error as error:
                    result = error
                except Exception:
                    result = gr.Error("GPU task error")
                os.write(write, pickle.dumps(result))
                os._exit(0)
            os.close(write)
            result = pickle.loads(open(read, "rb").read())
            if isinstance(result, gr.Error):
                raise result
            return result
        return asked
    return decorate

durations = []
sys.modules["spaces"] = types.SimpleNamespace(GPU=GPU)
import predict
for ask in (predict.predict_one, predict.compare):
    try:
        ask(sys.argv[2])
    except gr.Error as error:
        print(error.message)
first, second = map(json.loads, open(predict.predict_many(sys.argv[1:])[2]))
print(first["is_food"], second["error"])
print(*durations)
"""


@pytest.mark.slow
def test_errors_are_the_same_on_zero_gpu(tmp_path, image):
    """ZeroGPU runs a function in a process of its own, from which only results and `gr.Error` come back."""
    (tmp_path / "b.png").write_bytes(b"no image")
    env = {
        **os.environ,
        "PYTHONPATH": f"{SPACE}:{ROOT / 'src'}",
        "OMP_NUM_THREADS": "1",
        "FOODEXTRACT_MODEL": str(loading.TINY_TUNED),
    }
    command = [sys.executable, "-c", FORKED, image, str(tmp_path / "b.png")]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    alone, compared, both, durations = run.stdout.splitlines()
    assert alone.startswith("Not an image in a format we read")
    assert compared == alone
    assert re.match("[01] not an image in a format we read", both)
    assert durations == "22 60 24"


def test_the_page_shows_the_figures_of_its_model(demo, monkeypatch):
    _, predict = demo
    measured = predict.provenance.find(loading.TINY_TUNED)
    monkeypatch.setattr(predict, "PROVENANCE", measured)
    assert (
        metric_table([row for row in read_results(ROOT / "results" / "offline.json") if row.low is not None])
        in predict.figures()
    )
    assert predict.provenance.base_of(measured) == str(loading.TINY_BASE)
    monkeypatch.setattr(predict, "PROVENANCE", None)
    assert "has no evaluation" in predict.figures()


def test_ten_users_at_once_get_their_own_answers_in_order(page, tuned):
    made = list(scenes.draw_scenes(9, "test", 10))

    async def ask(user, file):
        """Upload, and stand in the queue; the number that the queue gave."""
        [path] = (await user.post("upload", files={"files": ("a.png", file)})).json()
        image = {"path": path, "meta": {"_type": "gradio.FileData"}}
        return (await user.post("call/extract", json={"data": [image]})).json()["event_id"]

    async def answer(user, event, done):
        async with user.stream("GET", f"call/extract/{event}") as lines:
            [data] = [line async for line in lines.aiter_lines() if line.startswith("data: ")]
        done.append(event)
        return json.loads(data.removeprefix("data: "))[0]

    async def story():
        done, files = [], []
        for scene in made:
            scene.image.save(file := io.BytesIO(), "PNG")
            files.append(file.getvalue())
        users = [httpx.AsyncClient(base_url=f"{page}gradio_api/", timeout=120, trust_env=False) for _ in made]
        events = [await ask(user, file) for user, file in zip(users, files, strict=True)]
        texts = await asyncio.gather(*(answer(user, event, done) for user, event in zip(users, events, strict=True)))
        return texts, events, done

    texts, events, done = asyncio.run(story())
    assert [FoodRecord.parse(text) for text in texts] == list(tuned.extract_many([scene.image for scene in made]))
    assert done == events


def test_only_extract_is_public(page):
    assert list(Client(page, verbose=False).view_api(return_format="dict")["named_endpoints"]) == ["/extract"]


def test_the_http_example_of_the_page_works(demo, page, tuned, image, tmp_path):
    app, _ = demo
    assert app.URL in app.API
    example = (
        re.search(r"```bash\n(.*?)```", app.API, re.DOTALL)[1]
        .replace(app.URL, page.rstrip("/"))
        .replace("lunch.jpg", image)
    )
    run = subprocess.run(["bash", "-c", example], capture_output=True, text=True, check=True)
    [answer] = json.loads(run.stdout.partition("data: ")[2])
    assert FoodRecord.parse(answer) == tuned.extract(image)


def test_mcp_offers_the_tool(page, image, tuned):
    """Send the two messages of a client to a stateless server, without a library."""

    def ask(method, **params):
        body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params}).encode()
        head = {"Content-Type": "application/json", "Accept": "application/json, text/event-stream"}
        with urllib.request.urlopen(urllib.request.Request(f"{page}gradio_api/mcp/", body, head)) as answer:
            return json.loads(answer.read().decode().partition("data: ")[2])["result"]

    [tool] = ask("tools/list")["tools"]
    assert "one line of JSON" in tool["description"]
    data = f"data:image/png;base64,{base64.b64encode(Path(image).read_bytes()).decode()}"
    answer = ask("tools/call", name=tool["name"], arguments={next(iter(tool["inputSchema"]["properties"])): data})
    assert FoodRecord.parse(answer["content"][0]["text"]) == tuned.extract(image)
    refused = ask(
        "tools/call", name=tool["name"], arguments={next(iter(tool["inputSchema"]["properties"])): f"{page}lunch.png"}
    )
    assert refused["isError"]
    assert "send the image itself" in refused["content"][0]["text"]


def answer_to(page, data):
    """What `extract` says over HTTP about what it is given as an image: the kind of event, and its data."""
    image = {**data, "meta": {"_type": "gradio.FileData"}}
    event = httpx.post(f"{page}gradio_api/call/extract", json={"data": [image]}, trust_env=False).json()["event_id"]
    text = httpx.get(f"{page}gradio_api/call/extract/{event}", timeout=60, trust_env=False).text
    return re.search("event: (.*)", text)[1], json.loads(re.search("data: (.*)", text)[1])


@pytest.mark.parametrize("stream", [False, True])
def test_a_url_is_not_fetched(page, stream):
    """A listening server gets no connection, and the error names the remedy."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0.5)
        address = f"http://127.0.0.1:{listening.getsockname()[1]}/lunch.png"
        event, answer = answer_to(page, {"path": address, "is_stream": stream})
        assert event == "error"
        assert stream or "send the image itself" in answer["error"]
        with pytest.raises(TimeoutError):
            listening.accept()


def test_neither_data_in_a_path_nor_files_of_the_machine_are_read(page, image):
    data = f"data:image/png;base64,{base64.b64encode(Path(image).read_bytes()).decode()}"
    for path in (data, "/etc/hostname"):
        assert answer_to(page, {"path": path})[0] == "error"


def test_large_bodies_are_rejected_before_they_are_read(page):
    """By their declared or their actual length; files may be larger than text."""
    for path in ("mcp/", "call/extract"):
        for content in (bytes(40 * 2**20), iter([bytes(2**20)] * 40)):
            assert (
                httpx.post(f"{page}gradio_api/{path}", content=content, timeout=60, trust_env=False).status_code == 413
            )
    file = httpx.post(
        f"{page}gradio_api/upload", files={"files": ("a.png", bytes(40 * 2**20))}, timeout=60, trust_env=False
    )
    assert file.status_code == 200
    assert "larger than 20 MB: shrink it first" in answer_to(page, {"path": file.json()[0]})[1]["error"]


def test_a_full_queue_is_503(page, image):
    """The page turns 503 into "currently busy, please try again"."""
    path = httpx.post(f"{page}gradio_api/upload", files={"files": Path(image).read_bytes()}, trust_env=False).json()[0]
    body = {"data": [{"path": path, "meta": {"_type": "gradio.FileData"}}]}

    async def ask(number):
        async with httpx.AsyncClient(base_url=page, timeout=120, trust_env=False) as user:
            return await user.post("gradio_api/call/extract", json=body)

    async def rush():
        return await asyncio.gather(*map(ask, range(150)))

    answers = asyncio.run(rush())
    refused = [answer for answer in answers if answer.status_code == 503]
    assert refused
    assert "Queue is full" in refused[0].json()["detail"]
    assert len(answers) - len(refused) >= 64
    assert all(answer.is_success for answer in answers if answer not in refused)


@pytest.mark.parametrize(
    ("settings", "offline"),
    [({}, "1"), ({"FOODEXTRACT_MODEL": "a/b"}, "0"), ({"HF_HUB_OFFLINE": "1", "FOODEXTRACT_MODEL": "a/b"}, "1")],
)
def test_make_space_allows_downloads_for_a_named_model(settings, offline):
    unset = {
        name: value
        for name, value in os.environ.items()
        if name not in ("HF_HUB_OFFLINE", "FOODEXTRACT_MODEL", "FOODEXTRACT_BASE")
    }
    command = ["make", "--silent", "--eval", "what: ; @echo $$HF_HUB_OFFLINE.", "what"]
    assert (
        subprocess.run(command, cwd=ROOT, env=unset | settings, capture_output=True, text=True).stdout
        == f"{offline}.\n"
    )


def test_front_matter_and_pins_agree():
    front = yaml.safe_load((SPACE / "README.md").read_text().split("---")[1])
    ours, theirs = (dict(re.findall(r"^([\w-]+)(?:\[\w+\])?==(\S+)$", path.read_text(), re.MULTILINE)) for path in (
        ROOT / "requirements.txt", SPACE / "requirements.txt"
    ))  # fmt: skip
    assert front["sdk_version"] == ours["gradio"]
    assert front["python_version"] == "3.12.12"
    assert front["models"] == [names.HUB_MODEL, names.HUB_BASE]
    assert front["datasets"] == [names.HUB_DATASET]
    assert front["thumbnail"].endswith(f"/{names.HUB_SPACE}/resolve/main/thumbnail.png")
    assert len(front["short_description"]) <= 60
    assert {name for name in theirs if theirs[name] != ours.get(name)} == {"pydantic"}
    assert (SPACE / "thumbnail.png").is_file()
