"""The Space as a program: its functions, its API, ten users at once. What people see is in test_browser.py."""

import asyncio
import base64
import contextlib
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
import time
from pathlib import Path

import gradio as gr
import httpx
import pytest
import yaml
from gradio.route_utils import delete_files_created_by_app
from gradio.utils import get_upload_folder
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from mcp import ClientSession, StdioServerParameters
from mcp.client.stdio import stdio_client
from mcp.client.streamable_http import streamablehttp_client
from PIL import Image

from foodextract import images, names
from foodextract.data import scenes
from foodextract.inference.confidence import Calibration
from foodextract.models import loading
from foodextract.models.training_data import TrainingData
from foodextract.schema import FoodRecord

ROOT = Path(__file__).parents[1]
SPACE = ROOT / "demos" / "FoodExtract-Vision"


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The page's modules, loaded as `python app.py` finds them, where no model in outputs/ is newer than the bundled."""
    sys.path.insert(0, str(SPACE))
    with contextlib.chdir(tmp_path_factory.mktemp("elsewhere")):
        import app
        import predict

    yield app, predict
    sys.path.remove(str(SPACE))


@pytest.fixture
def image(tmp_path):
    scenes.draw_scene(7, "test", 0).image.save(tmp_path / "a.png")
    return str(tmp_path / "a.png")


def test_the_space_answers_like_the_command_line(demo, tuned, image, tmp_path):
    app, predict = demo
    assert Path(predict.MODEL) == loading.find_model(outputs=tmp_path)
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
    assert "Food or drink · &gt; 99 % sure" in predict.record_as_html(food, predict.Confidence(0.999, [], [0.0]), 1)
    neither = FoodRecord(is_food=0, image_title="", food_items=[], drink_items=[])
    assert "80 % sure" in predict.record_as_html(neither, predict.Confidence(0.8, [], []), 1)


@pytest.mark.parametrize("calibration", [None, Calibration(item_slope=0.5, images=1234)])
def test_confidence_is_shown_only_if_it_is_calibrated(demo, image, monkeypatch, calibration):
    app, predict = demo
    monkeypatch.setattr(predict.TUNED, "calibration", calibration)
    shown = calibration is not None
    assert ("%" in app.show(image)[0]) == shown
    assert ("fitted on 1,234 validation images" in predict.calibrated()) == shown
    rows = list(predict.predict_many([image]))
    assert ("confidence" in rows[0]) == shown
    for path in predict.write_files(rows):
        assert ("confidence" in Path(path).read_text()) == shown


def test_a_model_that_knows_drawings_only_says_so(demo, monkeypatch):
    _, predict = demo
    measured = predict.provenance.Provenance.find(loading.TINY_TUNED)
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
        assert ("never seen a photograph" in predict.about()) == known, model


def test_the_page_and_the_tool_say_what_answers(demo):
    app, predict = demo
    data = TrainingData.find(predict.MODEL)
    size = predict.TUNED.model.size / 1e6
    assert f"The photo model, {size:.0f} M parameters, {data.describe()}." == predict.about()
    assert predict.about() in app.DESCRIPTION
    texts = [block.value for block in app.demo.blocks.values() if isinstance(block, gr.Markdown)]
    assert ", ".join(data.names) in texts
    assert predict.about() in texts[0]


@pytest.mark.parametrize(
    ("model", "linked"),
    [
        (loading.PHOTO, ["Code", "Model", "Training data", "Model card"]),
        (loading.TINY_TUNED, ["Code", "Model", "Training data"]),
        (names.HUB_MODEL, ["Code", "Model", "Dataset", "Model card"]),
    ],
)
def test_code_model_data_and_card_are_linked(demo, monkeypatch, model, linked):
    _, predict = demo
    monkeypatch.setattr(predict, "MODEL", str(model))
    addresses = dict(re.findall(r"\[(.*?)\]\((.*?)\)", predict.links()))
    assert list(addresses) == linked
    for address in addresses.values():
        page, _, part = address.partition("#")
        if file := page.removeprefix(f"{names.CODE}/tree/main/").removeprefix(names.CODE):
            assert (
                file.startswith(f"https://huggingface.co/{names.OWNER}/")
                or "datasets/" in file
                or (ROOT / file / ("README.md" if part == "readme" else "")).exists()
            )


def test_examples_have_labels_and_images(demo):
    app, _ = demo
    labels = list(app.EXAMPLES)
    assert labels[:6] == ["pizza", "coffee", "pancakes", "cookies", "eggs benedict", "cat"]
    assert len(labels) == 9
    assert all(label.startswith("drawing: ") for label in labels[6:])
    assert all(Path(file).is_file() for file in app.EXAMPLES.values())
    assert app.thumbnails().count("url(data:image/jpeg;base64,") == 9


def test_a_broken_file_in_a_batch_affects_no_other(demo, tmp_path, image):
    app, predict = demo
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing")
    *_, (html, _, _), (_, as_csv, as_jsonl) = app.many([image, str(tmp_path / "broken.jpg"), image])
    as_csv, as_jsonl = as_csv.value["path"], as_jsonl.value["path"]
    assert re.findall(r"<th scope=.row.>.*?</th><td( class=.wrong.)?", html) == ["", ' class="wrong"', ""]
    rows = [json.loads(line) for line in Path(as_jsonl).read_text().splitlines()]
    with open(as_csv, newline="") as lines:
        cells = list(csv.DictReader(lines))
    assert [row["file"] for row in rows] == [row["file"] for row in cells] == ["a.png", "broken.jpg", "a.png"]
    assert rows[1].keys() == {"file", "error"}
    assert json.loads(cells[0]["food_items"]) == rows[0]["food_items"]
    with pytest.raises(gr.Error, match="more than the 50"):
        list(predict.predict_many([image] * 51))


def test_a_batch_is_answered_row_by_row(demo, image, heic):
    app, _ = demo
    steps = list(app.many([image, heic, image]))
    for number, (html, *buttons) in enumerate(steps[:3], 1):
        assert f"{number} of 3 images answered" in html
        assert html.count('<th scope="row">') == html.count('<img src="data:image/jpeg;base64,') == number
        assert not any(button.interactive for button in buttons)
    assert len(steps) == 4
    assert all(button.interactive for button in steps[3][1:])


def test_a_preview_is_made_of_what_browsers_do_not_show(demo, image, heic, tmp_path, monkeypatch):
    """Not of a file or an image that is too large."""
    app, predict = demo
    jpeg = app.previews.jpeg.__wrapped__
    Image.new("RGB", (2048, 512)).save(tmp_path / "wide.tiff")
    assert jpeg(Path(image)) == b""
    assert jpeg(Path(heic))[:2] == b"\xff\xd8"
    assert Image.open(io.BytesIO(jpeg(tmp_path / "wide.tiff"))).size == (1024, 256)
    with monkeypatch.context() as patch:
        patch.setattr(images, "MAX_PIXELS", 1000)
        assert jpeg(Path(heic)) == b""
    monkeypatch.setattr(predict, "MAX_BYTES", 5)
    monkeypatch.setattr(predict, "open_image", None)
    assert jpeg(Path(heic)) == b""


@pytest.mark.parametrize("place", [0, 1])
def test_a_large_file_in_a_batch_is_not_opened_and_affects_no_other(demo, tmp_path, image, monkeypatch, place):
    _, predict = demo
    heavy = tmp_path / "heavy.png"
    heavy.write_bytes(Path(image).read_bytes() + bytes(100_000))
    monkeypatch.setattr(predict, "MAX_BYTES", 90_000)
    paths = [image, image]
    paths.insert(place, str(heavy))
    rows = list(predict.predict_many(paths))
    assert [row["file"] for row in rows if "error" in row] == ["heavy.png"]
    assert rows[place]["error"].startswith("the file heavy.png is larger than 0 MB")
    assert sum("is_food" in row for row in rows) == 2
    [alone] = predict.predict_many([str(heavy)])
    assert alone["error"]


def test_downloads_are_deleted_with_uploads(demo, image):
    app, _ = demo
    *_, (_, as_csv, as_jsonl) = app.many([image])
    paths = [Path(button.value["path"]) for button in (as_csv, as_jsonl)]
    assert all(path.is_file() for path in paths)
    delete_files_created_by_app(app.demo, age=None)
    assert not any(path.exists() for path in paths)


FORKED = """
import inspect, json, os, pickle, sys, types
import gradio as gr

def GPU(duration):
    def decorate(function):
        def asked(*arguments):
            durations.append(duration(*arguments))
            read, write = os.pipe()
            if not os.fork():
                try:
                    result = function(*arguments)
                    result = list(result) if inspect.isgenerator(result) else result
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
first, second = predict.predict_many(sys.argv[1:])
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


def test_the_page_shows_three_figures_and_the_typical_error(demo, monkeypatch):
    _, predict = demo
    measured = predict.provenance.Provenance.find(loading.TINY_TUNED)
    assert predict.provenance.base_of(measured) == str(loading.TINY_BASE)
    rows = {row.metric: row for row in measured.rows if row.subject == "stage2 constrained"}

    def shown():
        return re.findall(r"interval (\d+)–(\d+) %, n = (\d+)</small></dt><dd>(\d+) %", predict.figures())

    monkeypatch.setattr(predict, "PROVENANCE", measured)
    assert shown() == [
        (f"{100 * row.low:.0f}", f"{100 * row.high:.0f}", str(row.n), f"{100 * row.value:.0f}")
        for row in (rows[metric] for metric in ("is_food_accuracy", "item_precision_micro", "item_recall_micro"))
    ]
    assert f"an item that it misses: {100 - 100 * rows['item_recall_micro'].value:.0f} % of" in predict.figures()
    worse = [
        dataclasses.replace(row, value=0.3, low=0.2, high=0.4) if row.metric == "item_precision_micro" else row
        for row in measured.rows
    ]
    monkeypatch.setattr(predict, "PROVENANCE", dataclasses.replace(measured, rows=worse))
    assert "a wrong name, mostly of something that looks alike: 70 % of" in predict.figures()
    monkeypatch.setattr(predict, "PROVENANCE", None)
    assert "has no evaluation" in predict.figures()


def test_links_to_answers_are_deleted_after_a_day(demo, tmp_path, monkeypatch):
    _, predict = demo
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    for name, hours in (("old", 25), ("new", 23)):
        file = tmp_path / "deep_links" / name / "state.json"
        file.parent.mkdir(parents=True)
        file.touch()
        os.utime(file, (time.time() - hours * 3600,) * 2)
    predict.delete_old_links()
    assert [path.name for path in (tmp_path / "deep_links").iterdir()] == ["new"]


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


def test_only_extract_and_extract_many_are_public(page):
    endpoints = Client(page, verbose=False).view_api(return_format="dict")["named_endpoints"]
    assert list(endpoints) == ["/extract", "/extract_many"]


def test_a_batch_over_the_client(page, tuned, image, heic, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    files = [image, str(tmp_path / "broken.jpg"), heic]
    client = Client(page, verbose=False)
    rows = client.predict(list(map(handle_file, files)), api_name="/extract_many")
    assert [row.pop("file") for row in rows] == ["a.png", "broken.jpg", "IMG_0001.HEIC"]
    assert "not an image in a format we read" in rows[1]["error"]
    assert [rows[0], rows[2]] == [tuned.extract(file).model_dump() for file in (image, heic)]
    with pytest.raises(AppError, match="51 images are more than the 50 we take at once"):
        client.predict([handle_file(image)] * 51, api_name="/extract_many")


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


def test_an_mcp_client_uploads_an_image_and_asks_about_it(demo, page, image, tuned):
    """With the official client and the settings on the page: upload, then pass on the address; or send a data URL."""
    app, _ = demo
    block = re.search(r"```json\n(.*?)```", app.API, re.DOTALL)[1]
    folder = str(Path(image).parent)
    servers = json.loads(block.replace(app.URL, page.rstrip("/")).replace("<folder>", folder))["mcpServers"]
    *_, command, address, allowed = servers["upload_files_to_gradio"]["args"]
    uploader = StdioServerParameters(
        command=str(Path(sys.executable).with_name("gradio")), args=[command, address, allowed]
    )
    data = f"data:image/png;base64,{base64.b64encode(Path(image).read_bytes()).decode()}"

    async def story():
        async with stdio_client(uploader) as streams, ClientSession(*streams) as session:
            await session.initialize()
            uploaded = (await session.call_tool("upload_file_to_gradio", {"file": image})).content[0].text
        async with (
            streamablehttp_client(servers["foodextract"]["url"]) as (read, write, _),
            ClientSession(read, write) as session,
        ):
            await session.initialize()
            tools = (await session.list_tools()).tools
            asked = [await session.call_tool("extract", {"image": one}) for one in (uploaded, data, f"{page}lunch.png")]
        return tools, asked

    [tool], (by_address, by_data, refused) = asyncio.run(story())
    assert "one line of JSON" in tool.description
    assert "never seen a photograph" in tool.description
    assert "Address of an image that was uploaded" in tool.inputSchema["properties"]["image"]["description"]
    for answer in (by_address, by_data):
        assert FoodRecord.parse(answer.content[0].text) == tuned.extract(image)
    assert refused.isError
    assert "upload the image to this server first" in refused.content[0].text


def test_only_addresses_of_uploads_are_resolved(demo, tmp_path, monkeypatch):
    app, _ = demo
    uploads = tmp_path / "uploads"
    (uploads / "a b").mkdir(parents=True)
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(uploads))
    assert get_upload_folder() == str(uploads)
    for file in (uploads / "a b" / "é.png", tmp_path / "secret.png"):
        file.touch()
    (uploads / "link.png").symlink_to(tmp_path / "secret.png")

    def resolved(path, server="https://x.hf.space"):
        return asyncio.run(app.limits.resolve_url(f"{server}/gradio_api/file={path}", str(uploads)))

    assert resolved(f"{uploads}/a%20b/%C3%A9.png") == resolved(f"{uploads}/a b/é.png") == f"{uploads}/a b/é.png"
    for path in (
        f"{tmp_path}/secret.png", f"{uploads}/../secret.png", f"{uploads}/%2e%2e/secret.png", f"{uploads}/link.png",
        f"{uploads}/none.png", str(uploads), "a b/é.png", "",
    ):  # fmt: skip
        with pytest.raises(gr.Error, match="is not fetched: upload the image"):
            resolved(path)
    with pytest.raises(gr.Error, match="is not fetched"):
        asyncio.run(app.limits.resolve_url("http://169.254.169.254/latest/meta-data", str(uploads)))


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
        assert stream or "upload the image to this server first" in answer["error"]
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
