"""The Space as a program: its functions, its doors for other programs, ten users at once. What people see is in test_browser.py."""

import asyncio
import base64
import csv
import io
import json
import os
import re
import subprocess
import sys
import urllib.request
from pathlib import Path

import gradio as gr
import httpx
import pytest
import yaml
from gradio_client import Client

from foodextract import models, profiles, scenes
from foodextract.results import read_results
from foodextract.schema import FoodRecord
from foodextract.tables import metric_table

ROOT = Path(__file__).parents[1]
SPACE = ROOT / "demos" / "FoodExtract-Vision"


@pytest.fixture(scope="module")
def demo():
    """The page's modules, loaded as `python app.py` finds them."""
    sys.path.insert(0, str(SPACE))
    import app
    import asking

    yield app, asking
    sys.path.remove(str(SPACE))


@pytest.fixture
def picture(tmp_path):
    scenes.draw_scene(7, "test", 0).image.save(tmp_path / "a.png")
    return str(tmp_path / "a.png")


def test_the_space_answers_like_the_command_line(demo, tuned, picture):
    app, asking = demo
    assert Path(asking.MODEL) == models.newest_tuned()
    if Path(asking.MODEL) == models.TINY_TUNED:
        assert FoodRecord.parse(app.extract(picture)) == tuned.extract(picture)
    html, text = app.show(picture)
    record = FoodRecord.parse(text)
    assert [item for item in re.findall(r'<li class="chip \w+">(.*?) <small>', html)] == record.food_items + record.drink_items


def test_bad_input_is_a_friendly_message(demo, tmp_path, picture, monkeypatch):
    app, asking = demo
    (tmp_path / "b.png").write_bytes(b"no picture")
    with pytest.raises(gr.Error, match="format"):
        app.extract(str(tmp_path / "b.png"))
    with pytest.raises(gr.Error, match="format"):
        asking.compared(str(tmp_path / "b.png"))
    with pytest.raises(gr.Error, match="There is no picture yet"):
        app.extract(None)
    monkeypatch.setattr(asking, "MAX_BYTES", 5)
    with pytest.raises(gr.Error, match="shrink it first"):
        app.extract(picture)


def test_a_model_that_cannot_be_loaded_is_a_friendly_message(demo, picture, monkeypatch):
    app, asking = demo
    for broken in ("/no/such/folder", None):
        monkeypatch.setattr(asking, "TUNED", asking.load(broken))
        with pytest.raises(gr.Error, match=r"neither a folder nor a Hub id|FOODEXTRACT_BASE"):
            app.extract(picture)


def test_what_the_model_writes_cannot_become_markup(demo):
    _, asking = demo
    record = FoodRecord(is_food=1, image_title="<script>", food_items=["<b>"], drink_items=[])
    html = asking.as_html(record, asking.Confidence(0.5, [-0.1], []), 1)
    assert "<script>" not in html
    assert "&lt;b&gt;" in html


def test_a_broken_file_does_not_spoil_the_batch(demo, tmp_path, picture):
    _, asking = demo
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing")
    table, as_csv, as_jsonl = asking.batch([picture, str(tmp_path / "broken.jpg"), picture])
    assert [bool(row[5]) for row in table] == [False, True, False]
    rows = [json.loads(line) for line in Path(as_jsonl).read_text().splitlines()]
    with open(as_csv, newline="") as lines:
        cells = list(csv.DictReader(lines))
    assert [row["file"] for row in rows] == [row["file"] for row in cells] == ["a.png", "broken.jpg", "a.png"]
    assert rows[1].keys() == {"file", "error"}
    assert json.loads(cells[0]["food_items"]) == rows[0]["food_items"]
    with pytest.raises(gr.Error, match="more than the 50"):
        asking.batch([picture] * 51)


def test_the_page_shows_the_figures_of_its_model(demo, monkeypatch):
    _, asking = demo
    measured = asking.evidence.find(models.TINY_TUNED)
    monkeypatch.setattr(asking, "EVIDENCE", measured)
    assert metric_table([row for row in read_results(ROOT / "results" / "offline.json") if row.low is not None]) in asking.figures()
    assert asking.evidence.base_of(measured) == str(models.TINY_BASE)
    monkeypatch.setattr(asking, "EVIDENCE", None)
    assert "Nobody has measured" in asking.figures()


# -------------------------------------------------------------------------------------------------------------------- other programs


def test_ten_users_at_once_all_get_their_own_answers_in_the_order_in_which_they_asked(page, tuned):
    made = list(scenes.draw_scenes(9, "test", 10))

    async def ask(user, file):
        """Upload, and stand in the queue; the number that the queue gave."""
        [path] = (await user.post("upload", files={"files": ("a.png", file)})).json()
        picture = {"path": path, "meta": {"_type": "gradio.FileData"}}
        return (await user.post("call/extract", json={"data": [picture]})).json()["event_id"]

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


def test_only_extract_is_for_programs(page):
    assert list(Client(page, verbose=False).view_api(return_format="dict")["named_endpoints"]) == ["/extract"]


def test_the_http_example_of_the_page_works(demo, page, tuned, picture, tmp_path):
    app, _ = demo
    example = re.search(r"```bash\n(.*?)```", app.API, re.DOTALL)[1].replace(app.URL, page.rstrip("/")).replace("lunch.jpg", picture)
    run = subprocess.run(["bash", "-c", example], capture_output=True, text=True, check=True)
    [answer] = json.loads(run.stdout.partition("data: ")[2])
    assert FoodRecord.parse(answer) == tuned.extract(picture)


def test_the_mcp_door_has_the_tool(page, picture, tuned):
    """Without a library for it: the two messages that a client sends to a server that keeps no session."""

    def ask(method, **params):
        body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params}).encode()
        head = {"Content-Type": "application/json", "Accept": "application/json, text/event-stream"}
        with urllib.request.urlopen(urllib.request.Request(f"{page}gradio_api/mcp/", body, head)) as answer:
            return json.loads(answer.read().decode().partition("data: ")[2])["result"]

    [tool] = ask("tools/list")["tools"]
    assert "one line of JSON" in tool["description"]
    data = f"data:image/png;base64,{base64.b64encode(Path(picture).read_bytes()).decode()}"
    answer = ask("tools/call", name=tool["name"], arguments={next(iter(tool["inputSchema"]["properties"])): data})
    assert FoodRecord.parse(answer["content"][0]["text"]) == tuned.extract(picture)


@pytest.mark.parametrize(
    ("settings", "offline"), [({}, "1"), ({"FOODEXTRACT_MODEL": "a/b"}, "0"), ({"HF_HUB_OFFLINE": "1", "FOODEXTRACT_MODEL": "a/b"}, "1")]
)
def test_a_model_that_is_named_may_be_fetched(settings, offline):
    unset = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "FOODEXTRACT_MODEL", "FOODEXTRACT_BASE")}
    command = ["make", "--silent", "--eval", "what: ; @echo $$HF_HUB_OFFLINE.", "what"]
    assert subprocess.run(command, cwd=ROOT, env=unset | settings, capture_output=True, text=True).stdout == f"{offline}.\n"


# ---------------------------------------------------------------------------------------------------------------------- front matter


def test_front_matter_and_pins_agree():
    front = yaml.safe_load((SPACE / "README.md").read_text().split("---")[1])
    ours, theirs = (dict(re.findall(r"^([\w-]+)(?:\[\w+\])?==(\S+)$", path.read_text(), re.MULTILINE)) for path in (
        ROOT / "requirements.txt", SPACE / "requirements.txt"
    ))  # fmt: skip
    assert front["sdk_version"] == ours["gradio"]
    assert front["python_version"] == "3.12.12"
    assert front["models"] == [profiles.HUB_MODEL, models.HUB_BASE]
    assert front["datasets"] == [profiles.HUB_DATASET]
    assert front["thumbnail"].endswith(f"/{profiles.HUB_SPACE}/resolve/main/thumbnail.png")
    assert len(front["short_description"]) <= 60
    assert {name for name in theirs if theirs[name] != ours.get(name)} == {"pydantic"}
    assert (SPACE / "thumbnail.png").is_file()
