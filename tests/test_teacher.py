"""Labeling against a local server with chat completions and faults."""

import asyncio
import base64
import hashlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from foodextract import prompts
from foodextract.cli import app
from foodextract.data import scenes, sources
from foodextract.data.labeling import label_folder
from foodextract.data.teacher import Teacher, TeacherError, as_data_url
from foodextract.schema import FoodRecord

pytestmark = pytest.mark.timeout(240)
KEY = "sk-do-not-print-me-0123456789"
IMAGES = 6


@dataclass(frozen=True)
class Request:
    body: dict
    url: str  # the image
    number: int  # how many requests there have been, this one included
    nth: int  # how many about this image
    key: str
    at: float


@dataclass(frozen=True)
class Reply:
    body: str
    status: int = 200
    headers: dict = field(default_factory=dict)
    seconds: float = 0.0
    cut: bool = False  # close the connection half-way through the body


def label_of(url):
    """Another label for every image, so that a mix-up shows."""
    digest = hashlib.sha256(url.encode()).hexdigest()[:8]
    return FoodRecord(is_food=1, image_title=f"dish {digest}", food_items=[f"food {digest}"], drink_items=[])


def completion(text, finish="stop", tokens=(1000, 40)):
    usage = dict(zip(("prompt_tokens", "completion_tokens"), tokens, strict=True)) if tokens else None
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text}}
    return json.dumps(
        {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice], "usage": usage}
    )


def right(request):
    return Reply(completion(label_of(request.url).to_json()))


class Endpoint:
    """`behave` maps a request to its reply; all requests are kept, and how many were under way at once."""

    def __init__(self):
        self.requests, self.active, self.most_active = [], 0, 0
        self.behave = right
        self.lock, self.over = threading.Lock(), threading.Event()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with endpoint.lock:
                    endpoint.active += 1
                    endpoint.most_active = max(endpoint.most_active, endpoint.active)
                    url = next(
                        part["image_url"]["url"]
                        for part in body["messages"][-1]["content"]
                        if part["type"] == "image_url"
                    )
                    nth = 1 + sum(request.url == url for request in endpoint.requests)
                    request = Request(
                        body, url, len(endpoint.requests) + 1, nth, self.headers["Authorization"], time.monotonic()
                    )
                    endpoint.requests.append(request)
                reply = endpoint.behave(request) if self.path == "/v1/chat/completions" else Reply("not here", 404)
                endpoint.over.wait(reply.seconds)
                with endpoint.lock:
                    endpoint.active -= 1
                data = reply.body.encode()
                try:
                    self.send_response(reply.status)
                    for name, value in (
                        {"Content-Type": "application/json", "Content-Length": len(data)} | reply.headers
                    ).items():
                        self.send_header(name, str(value))
                    self.end_headers()
                    self.wfile.write(data[: len(data) // 2] if reply.cut else data)
                    self.close_connection = reply.cut or self.close_connection
                except OSError:
                    pass  # the client has gone

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.handle_error = lambda *_: None  # a client that hangs up is no news
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()
        self.address = f"http://127.0.0.1:{self.server.server_port}/v1"

    def asked(self):
        """Data URL → how often."""
        return Counter(request.url for request in self.requests)

    def close(self):
        self.over.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join(5)


@pytest.fixture
def endpoint(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    endpoint = Endpoint()
    yield endpoint
    endpoint.close()


@pytest.fixture(scope="module")
def drawn_files():
    files = []
    for scene in scenes.draw_scenes(31, "train", IMAGES):
        png = io.BytesIO()
        scene.image.resize((96, 64)).save(png, "PNG")
        files.append(png.getvalue())
    return files


@pytest.fixture
def folder(tmp_path, drawn_files):
    """0.png … 5.png, the last of them in a subfolder."""
    folder = tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    for number, data in enumerate(drawn_files):
        (folder / ("more" if number == IMAGES - 1 else "") / f"{number}.png").write_bytes(data)
    return folder


@pytest.fixture
def ask(endpoint, folder):
    """Run it, and check what holds after every complete run."""

    def ask(output=None, limit=None, license=None, retry_rejected=False, **changes):
        teacher = replace(Teacher(endpoint.address, "big-model", retries=1, timeout=10), **changes)
        summary = asyncio.run(
            label_folder(teacher, folder, output, limit=limit, license=license, retry_rejected=retry_rejected)
        )
        assert summary.asked == summary.labeled + summary.rejected + summary.failed
        assert summary.images == summary.known + summary.duplicates + summary.asked
        if limit is None:
            assert summary.images == len(list(folder.rglob("*.png")))
            assert len(labels(folder)) + len(rejects(folder)) == summary.images
        assert not list(folder.rglob("*.partial"))
        return summary

    return ask


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines() if line]


def labels(folder):
    return {row["file_name"]: row for row in lines(folder / "metadata.jsonl")}


def rejects(folder):
    return {row["file_name"]: row for row in lines(folder / "metadata.rejects.jsonl")}


def ledger(folder):
    return [entry for entry in lines(folder / "metadata.ledger.jsonl") if "written" not in entry]


def url_of(path, max_edge=1024):
    return as_data_url(path.read_bytes(), max_edge)


# all is well


def test_every_image_gets_its_own_label_and_the_labeled_folder_can_be_read(ask, folder, endpoint):
    summary = ask(license="CC0")
    assert (summary.asked, summary.labeled, len(endpoint.requests)) == (6, 6, 6)
    samples = list(sources.labeled_folder(folder))
    assert all(isinstance(sample, sources.Sample) for sample in samples)
    assert [sample.name for sample in samples] == ["0.png", "1.png", "2.png", "3.png", "4.png", "more/5.png"]
    for sample in samples:
        assert FoodRecord(**sample.label) == label_of(url_of(folder / sample.name))
        assert sample.read() == (folder / sample.name).read_bytes()
        assert (sample.source, sample.license) == ("teacher:big-model", "CC0")
    assert set(endpoint.asked().values()) == {1}


def test_the_request_carries_schema_prompts_and_a_decodable_jpeg(ask, folder, endpoint):
    scene = scenes.draw_scene(32, "train", 0).image.resize((300, 150))
    scene.convert("RGBA").save(folder / "wide.png")
    ask(max_edge=128)
    for request in endpoint.requests:
        body = request.body
        assert body["response_format"]["type"] == "json_schema"
        assert body["response_format"]["json_schema"]["strict"] is True
        assert body["response_format"]["json_schema"]["schema"] == FoodRecord.model_json_schema()
        assert (body["model"], body["temperature"]) == ("big-model", 0)
        flat = [(m["role"], p["type"].removesuffix("_url"), p.get("text")) for m in body["messages"] for p in parts(m)]
        assert flat == [(m["role"], p["type"], p.get("text")) for m in prompts.conversation() for p in m["content"]]
    head, _, payload = next(r.url for r in endpoint.requests if r.url == url_of(folder / "wide.png", 128)).partition(
        ","
    )
    assert head == "data:image/jpeg;base64"
    sent = Image.open(io.BytesIO(base64.b64decode(payload, validate=True)))
    assert (sent.format, sent.mode, sent.size) == ("JPEG", "RGB", (128, 64))
    expected = np.asarray(scene.resize((128, 64)), float)
    assert np.abs(np.asarray(sent, float) - expected).mean() < 8  # of 255; another scene is at 30 or more


def parts(message):
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def test_a_small_image_is_not_enlarged(folder):
    assert Image.open(io.BytesIO(base64.b64decode(url_of(folder / "0.png").partition(",")[2]))).size == (96, 64)


def test_concurrency_is_used_and_never_exceeded(ask, endpoint):
    endpoint.behave = lambda request: replace(right(request), seconds=0.1)
    ask(concurrency=3)
    assert endpoint.most_active == 3


def test_there_are_as_many_tasks_as_requests(folder, endpoint, drawn_files):
    for number in range(20):
        (folder / f"more/{number}-x.png").write_bytes(drawn_files[0] + bytes([number]))  # another file, the same image
    endpoint.behave = lambda request: replace(right(request), seconds=0.01)

    async def watched():
        most = 0
        run = asyncio.create_task(label_folder(Teacher(endpoint.address, "m", concurrency=2), folder))
        while not run.done():
            most = max(most, len(asyncio.all_tasks()))
            await asyncio.sleep(0.005)
        return most, await run

    most, summary = asyncio.run(watched())
    assert summary.labeled == IMAGES + 20
    assert most <= 6  # two workers, this test, the run, and what the client starts for itself


def test_tokens_and_cost_add_up(ask):
    summary = ask()
    assert (summary.prompt_tokens, summary.completion_tokens) == (6000, 240)
    assert "6 asked = 6 labeled + 0 rejected + 0 failed" in str(summary)
    assert "6,000 prompt tokens" in str(summary)
    assert summary.cost(2.0, 10.0) == pytest.approx(6000 * 2 / 1e6 + 240 * 10 / 1e6)


def test_a_server_that_does_not_count_tokens(ask, endpoint):
    endpoint.behave = lambda request: Reply(completion(label_of(request.url).to_json(), tokens=None))
    assert ask().prompt_tokens == 0


# the endpoint misbehaves


@pytest.mark.parametrize(
    "bad",
    [
        Reply("{}", 500),
        Reply("{}", 503),
        Reply("{}", 408),
        Reply(completion("late"), seconds=4.0),
        Reply(completion("cut"), cut=True),
    ],
    ids=["500", "503", "408", "time-out", "cut"],
)
def test_temporary_faults_are_retried(bad, ask, folder, endpoint):
    affected = url_of(folder / "2.png")
    endpoint.behave = lambda request: bad if request.url == affected and request.nth == 1 else right(request)
    summary = ask(timeout=1.5)
    assert summary.labeled == 6
    assert len(endpoint.requests) == 7
    assert endpoint.asked()[affected] == 2


def test_retry_after_is_respected(ask, folder, endpoint):
    affected = url_of(folder / "2.png")
    busy = Reply("{}", 429, {"Retry-After": "1.5"})  # the client's own first wait is half a second at most
    endpoint.behave = lambda request: busy if request.url == affected and request.nth == 1 else right(request)
    assert ask().labeled == 6
    first, second = (request.at for request in endpoint.requests if request.url == affected)
    assert 1.5 <= second - first < 10


@pytest.mark.parametrize("status", [400, 413, 500, 403, 404])
def test_a_failure_of_one_image_does_not_stop_the_others(status, ask, folder, endpoint):
    """Also 403 and 404 once others have been answered: some gateways refuse a single image with them."""
    affected = url_of(folder / "more/5.png")
    endpoint.behave = lambda request: (
        Reply('{"error": "too spicy"}', status) if request.url == affected else right(request)
    )
    summary = ask(retries=0, concurrency=1)
    assert (summary.labeled, summary.rejected, summary.failed) == (5, 0, 1)
    assert list(rejects(folder)) == ["more/5.png"]
    assert str(status) in rejects(folder)["more/5.png"]["reason"]
    assert "too spicy" in rejects(folder)["more/5.png"]["reason"]
    endpoint.behave = right
    endpoint.requests.clear()
    assert ask().labeled == 1  # what failed is asked for again, and only that
    assert list(endpoint.asked()) == [affected]
    assert len(labels(folder)) == 6


@pytest.mark.parametrize(
    "body",
    [
        '{"choices": []}',
        '{"error": {"message": "upstream"}}',
        "<html>proxy</html>",
        "[]",
        '{"choices": [{"message": null}]}',
        "[" * 99_999,
    ],
    ids=["no choices", "error in 200", "html", "list", "no message", "deep"],
)
def test_a_response_without_an_answer_is_a_failure(body, ask, folder, endpoint):
    affected = url_of(folder / "0.png")
    endpoint.behave = lambda request: Reply(body) if request.url == affected else right(request)
    summary = ask()
    assert (summary.labeled, summary.failed) == (5, 1)
    assert endpoint.asked()[affected] == 2
    assert rejects(folder)["0.png"]["raw"] == body[:20_000]
    assert "no chat completion" in rejects(folder)["0.png"]["reason"]


NOTHING = {"is_food": 0, "image_title": "", "food_items": [], "drink_items": []}
BAD_ANSWERS = {
    "truncated": ('{"is_food": 1, "image_title": "pi', "finish_reason length: not JSON"),
    "white space": ('{"is_food":' + "\n" * 500, "finish_reason length: not JSON"),
    "prose": ("This looks like a lovely pie.", "not JSON"),
    "two objects": (f"{json.dumps(NOTHING)} or {json.dumps(NOTHING | {'is_food': 1})}", "not JSON"),
    "in a cut object": ('{"answer": ' + json.dumps(NOTHING), "finish_reason length: not JSON"),
    "unfinished thoughts": (f"<think>perhaps {json.dumps(NOTHING)}", "finish_reason length: not JSON"),
    "wrong types": (json.dumps(NOTHING | {"is_food": "yes", "food_items": "pie"}), "is_food"),
    "boolean": (json.dumps(NOTHING | {"is_food": False}), "is_food"),
    "other schema": ('{"food": true}', "breaks the schema"),
    "extra key": (json.dumps(NOTHING | {"calories": 3}), "calories"),
    "contradiction": (json.dumps(NOTHING | {"food_items": ["pie"]}), "must be empty"),
    "too long": (json.dumps(NOTHING | {"is_food": 1, "image_title": "x" * 101}), "image_title"),
    "empty": ("", "not JSON"),
    "null": (None, "not JSON"),
    "not text": ([{"type": "text", "text": "{}"}], "list"),
    "huge number": ('{"is_food": ' + "1" * 5000 + "}", "4300"),
    "deep": ("[" * 99_999, "recursion"),
    "lone surrogate": ("\ud800", "not JSON"),
}


@pytest.mark.parametrize(("text", "reason"), BAD_ANSWERS.values(), ids=BAD_ANSWERS)
def test_an_answer_that_breaks_the_schema_is_rejected(text, reason, ask, folder, endpoint):
    affected = url_of(folder / "1.png")
    finish = "length" if "length" in reason else "stop"
    endpoint.behave = lambda request: Reply(completion(text, finish)) if request.url == affected else right(request)
    summary = ask()
    assert (summary.labeled, summary.rejected, len(endpoint.requests)) == (5, 1, 7)
    assert summary.prompt_tokens == 7000  # those of a useless answer are paid for too
    assert [request.body["temperature"] for request in endpoint.requests if request.url == affected] == [0, 0.5]
    (row,) = rejects(folder).values()
    assert (row["file_name"], row["status"]) == ("1.png", "rejected")
    assert row["raw"] == (text[:20_000] if isinstance(text, str) else str(text or ""))
    assert reason in row["reason"]
    assert len(list(sources.labeled_folder(folder))) == 5


@pytest.mark.parametrize(
    "wrapped",
    [
        "```json\n{}\n```",
        "Here is the JSON:\n{}\nEnjoy your meal",
        '<think>\n{{"is_food": 0}}?\n</think>\n\n{}',
        "I see\n</think>{}",
        '<thinking>{{"is_food": 0}}</thinking>{}',
        '<|channel|>analysis<|message|>{{"is_food": 0}}<|end|><|channel|>final<|message|>{}',
        "The set {{pizza, beer}}:\n{}\nNote: {{}} is empty",
        '{{"answer": {}}}',
    ],
    ids=["fence", "prose", "think", "thoughts begun in the prompt", "thinking", "channels", "braces", "wrapped"],
)
def test_the_one_object_of_an_answer_is_taken(wrapped, ask, folder, endpoint):
    endpoint.behave = lambda request: Reply(completion(wrapped.format(label_of(request.url).to_json())))
    assert (ask().labeled, len(endpoint.requests)) == (6, 6)
    for name, row in labels(folder).items():
        assert row["image_title"] == label_of(url_of(folder / name)).image_title


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("max_tokens", "'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."),
        ("temperature", "'temperature' does not support 0 with this model. Only the default (1) value is supported."),
        ("response_format", "'response_format.type' must be 'json_object' or 'text'"),
    ],
)
def test_a_parameter_that_an_endpoint_refuses_is_left_out(name, message, ask, endpoint, capsys):
    refusal = Reply(json.dumps({"error": {"message": message}}), 400)
    endpoint.behave = lambda request: refusal if name in request.body else right(request)
    assert ask(concurrency=1).labeled == 6
    assert len(endpoint.requests) == 7  # refused once
    assert ("max_completion_tokens" in endpoint.requests[-1].body) == (name == "max_tokens")
    assert f"refuses `{name}`" in capsys.readouterr().err


@pytest.mark.parametrize(("finish", "labeled"), [("stop", 6), ("length", 0)])
def test_an_answer_taken_for_thoughts_counts_when_it_is_finished(finish, labeled, ask, endpoint):
    def behave(request):
        body = json.loads(completion(None, finish))
        body["choices"][0]["message"]["reasoning_content"] = label_of(request.url).to_json()
        return Reply(json.dumps(body))

    endpoint.behave = behave
    assert ask().labeled == labeled


@pytest.mark.parametrize("text", ["A pie.", json.dumps(NOTHING | {"is_food": False})], ids=["prose", "boolean"])
def test_an_endpoint_that_ignores_the_schema_stops_the_run(text, ask, folder, endpoint, drawn_files):
    for number in range(20):
        (folder / f"more/x{number}.png").write_bytes(drawn_files[0] + bytes([number]))
    endpoint.behave = lambda request: Reply(completion(text))
    with pytest.raises(
        TeacherError, match=r"none of the first 10 answers .* ignores `response_format`.*--retry-rejected"
    ):
        ask(concurrency=1)
    assert len(endpoint.requests) == 20
    assert len(rejects(folder)) == 10
    endpoint.behave = lambda request: right(request) if request.number == 21 else Reply(completion(text))
    assert ask(concurrency=1).rejected == 15  # one label shows that it can


def test_a_good_second_answer_counts_and_its_temperature_is_noted(ask, folder, endpoint):
    affected = url_of(folder / "1.png")
    endpoint.behave = lambda request: (
        Reply(completion("hm")) if request.url == affected and request.nth == 1 else right(request)
    )
    summary = ask()
    assert (summary.labeled, len(endpoint.requests)) == (6, 7)
    assert {entry["file_name"]: entry["temperature"] for entry in ledger(folder)}["1.png"] == 0.5


def test_a_refusal_is_kept(ask, folder, endpoint):
    message = {"choices": [{"finish_reason": "stop", "message": {"content": None, "refusal": "I would rather not."}}]}
    endpoint.behave = lambda request: Reply(json.dumps(message))
    assert ask().rejected == 6
    assert {row["raw"] for row in rejects(folder).values()} == {"I would rather not."}


def test_rejected_images_are_asked_again_only_on_request(ask, folder, endpoint):
    endpoint.behave = lambda request: Reply(completion("prose"))
    assert ask().rejected == 6
    endpoint.behave = right
    endpoint.requests.clear()
    assert ask().known == 6
    assert not endpoint.requests
    assert ask(retry_rejected=True).labeled == 6
    assert not rejects(folder)
    assert len(labels(folder)) == 6


# it gives up


@pytest.mark.parametrize(
    ("status", "words"),
    [(401, "set OPENAI_API_KEY"), (403, "set OPENAI_API_KEY"), (404, "'big-model'")],
    ids=["401", "403", "404"],
)
def test_hopeless_endpoints_stop_the_run_at_once(status, words, ask, endpoint):
    endpoint.behave = lambda request: Reply('{"error": {"message": "go away"}}', status)
    with pytest.raises(TeacherError, match=words) as caught:
        ask(concurrency=1)
    assert endpoint.address in str(caught.value)
    assert "go away" in str(caught.value)
    assert len(endpoint.requests) == 1


def test_a_key_that_expires_stops_the_run_and_keeps_the_labels(ask, folder, endpoint):
    endpoint.behave = lambda request: right(request) if request.number <= 3 else Reply("{}", 401)
    with pytest.raises(TeacherError, match="refuses the key"):
        ask(concurrency=1)
    assert list(labels(folder)) == ["0.png", "1.png", "2.png"]
    endpoint.behave = right
    endpoint.requests.clear()
    assert (ask().labeled, len(endpoint.requests)) == (3, 3)


def test_an_unreachable_endpoint_stops_the_run(ask):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        address = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        began = time.monotonic()
        with pytest.raises(TeacherError, match="cannot be reached: start the server") as caught:
            ask(endpoint=address)
    assert address in str(caught.value)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    "bad", [Reply("{}", 500), Reply("<html>", 200), Reply("{}", cut=True)], ids=["500", "html", "cut"]
)
def test_an_endpoint_that_dies_stops_the_run_and_keeps_the_labels(bad, ask, folder, endpoint, drawn_files):
    for number in range(20):
        (folder / f"more/x{number}.png").write_bytes(drawn_files[0] + bytes([number]))
    (folder / "more/broken.png").write_bytes(b"")  # says nothing about the endpoint either way
    endpoint.behave = lambda request: right(request) if request.number <= 3 else bad
    with pytest.raises(TeacherError, match="failures in a row"):
        ask(retries=0, concurrency=1)
    assert list(labels(folder)) == ["0.png", "1.png", "2.png"]
    assert len([row for row in rejects(folder).values() if row["status"] == "failed"]) == 10
    assert len(endpoint.requests) <= 3 + 2 * 10
    endpoint.behave = right
    before = {request.url for request in endpoint.requests[:3]}
    endpoint.requests.clear()
    summary = ask()
    assert (summary.known, summary.failed, len(labels(folder))) == (4, 0, 26)
    assert not before & set(endpoint.asked()) - {url_of(folder / "0.png")}  # the 20 show the same image as 0.png


@pytest.mark.parametrize(
    "address",
    ["localhost:8000/v1", "ftp://x/v1", "http://", "http://me:secret@h/v1", "http://h/v1?key=secret"],
    ids=lambda a: a[:12],
)
def test_addresses_that_cannot_work_are_refused_before_anything_is_written(address, ask, folder):
    before = sorted(folder.rglob("*"))
    with pytest.raises(TeacherError, match="http://localhost:8000/v1") as caught:
        ask(endpoint=address)
    assert "secret" not in str(caught.value)
    assert sorted(folder.rglob("*")) == before


def test_labels_from_elsewhere_are_not_overwritten(ask, folder, endpoint):
    (folder / "metadata.jsonl").write_text("by hand")
    with pytest.raises(TeacherError, match="labels of another origin"):
        ask()
    assert (folder / "metadata.jsonl").read_text() == "by hand"
    assert not endpoint.requests


def test_folders_and_outputs_that_cannot_work(endpoint, tmp_path, folder):
    teacher = Teacher(endpoint.address, "m")
    for place in (tmp_path / "nowhere", folder / "0.png", tmp_path):
        if place == tmp_path:
            place = tmp_path / "empty"
            place.mkdir()
        with pytest.raises(TeacherError, match="no images in"):
            asyncio.run(label_folder(teacher, place))
    with pytest.raises(TeacherError, match="cannot write"):
        asyncio.run(label_folder(teacher, folder, tmp_path / "no/such/place.jsonl"))
    assert not endpoint.requests


# going on


def test_finished_images_are_not_asked_again(ask, folder, endpoint):
    assert ask(limit=4).labeled == 4
    assert len(labels(folder)) == len(endpoint.requests) == 4
    summary = ask()
    assert (summary.known, summary.labeled) == (4, 2)
    whole = (folder / "metadata.jsonl").read_bytes()
    assert ask().known == 6
    assert set(endpoint.asked().values()) == {1}
    assert len(endpoint.requests) == 6
    assert (folder / "metadata.jsonl").read_bytes() == whole


@pytest.mark.parametrize("lost", [1, 2, 30])
def test_a_torn_last_line_is_done_again_and_nothing_else(lost, ask, folder, endpoint):
    ask(concurrency=1)
    whole = (folder / "metadata.jsonl").read_bytes()
    path = folder / "metadata.ledger.jsonl"
    answers = [line for line in path.read_bytes().splitlines(keepends=True) if b'"written"' not in line]
    path.write_bytes(b"".join(answers)[:-lost])
    endpoint.requests.clear()
    summary = ask(concurrency=1)
    torn = lost > 1  # without its newline alone a line is still whole
    assert (summary.known, summary.labeled) == ((5, 1) if torn else (6, 0))
    assert list(endpoint.asked()) == ([url_of(folder / "more/5.png")] if torn else [])
    assert (folder / "metadata.jsonl").read_bytes() == whole
    endpoint.requests.clear()
    assert ask().known == 6  # the line written after the torn one can be read
    assert not endpoint.requests


@pytest.mark.slow
def test_a_killed_run_resumes(folder, endpoint):
    endpoint.behave = lambda request: replace(right(request), seconds=0.0 if request.number <= 3 else 600.0)
    command = [
        sys.executable,
        "-m",
        "foodextract",
        "label",
        str(folder),
        "--endpoint",
        endpoint.address,
        "--model",
        "m",
        "--concurrency",
        "2",
    ]
    path = folder / "metadata.ledger.jsonl"
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 100
        while (
            time.monotonic() < until
            and process.poll() is None
            and (not path.exists() or path.read_bytes().count(b"\n") < 3)
        ):
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.wait(10)
    assert not (folder / "metadata.jsonl").exists()
    finished = [entry["file_name"] for entry in ledger(folder)]
    assert len(finished) == 3
    with path.open("ab") as torn:
        torn.write(b'{"file_name": "3.png", "sha2')
    endpoint.behave = right
    endpoint.requests.clear()
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "6 images: 3 finished before, 0 duplicates, 3 asked = 3 labeled" in done.stdout
    assert "6/6" in done.stderr  # the progress bar
    assert set(endpoint.asked()) == {
        url_of(folder / name) for name in ("0.png", "1.png", "2.png", "3.png", "4.png", "more/5.png")
    } - {url_of(folder / name) for name in finished}
    assert {name: row["image_title"] for name, row in labels(folder).items()} == {
        name: label_of(url_of(folder / name)).image_title for name in labels(folder)
    }
    assert len(labels(folder)) == 6


def test_an_interrupted_run_writes_its_labels(folder, endpoint):
    endpoint.behave = lambda request: replace(right(request), seconds=0.0 if request.number <= 2 else 600.0)

    async def interrupted():
        run = asyncio.create_task(label_folder(Teacher(endpoint.address, "m", concurrency=1), folder))
        for _ in range(2000):
            await asyncio.sleep(0.02)
            if len(endpoint.requests) == 3:
                break
        run.cancel()  # what asyncio.run does on Ctrl-C
        await run

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(interrupted())
    assert list(labels(folder)) == ["0.png", "1.png"]


def test_another_model_starts_afresh_and_keeps_the_first_labels(ask, folder, endpoint):
    ask()
    ask(model="bigger", limit=2)
    assert {row["source"] for row in labels(folder).values()} == {"teacher:bigger"}
    assert len(labels(folder)) == 2
    endpoint.requests.clear()
    assert ask().known == 6
    assert {row["source"] for row in labels(folder).values()} == {"teacher:big-model"}
    assert ask(max_tokens=77).known == 6  # not a matter of what is asked
    assert not endpoint.requests


def test_corrected_labels_are_not_overwritten(ask, folder):
    ask()
    path = folder / "metadata.jsonl"
    corrected = path.read_text().replace('"image_title": "', '"image_title": "my ')
    path.write_text(corrected)
    with pytest.raises(TeacherError, match=r"metadata.jsonl was edited: rename it to keep the changes"):
        ask()
    assert path.read_text() == corrected


def test_a_start_that_fails_leaves_the_labels_of_another_model(ask, folder, endpoint):
    ask()
    before = (folder / "metadata.jsonl").read_text()
    endpoint.behave = lambda request: Reply("{}", 401)
    with pytest.raises(TeacherError):
        ask(model="other")
    assert (folder / "metadata.jsonl").read_text() == before


def test_copies_are_asked_once_and_all_labeled(ask, folder, endpoint, drawn_files):
    for name in ("a.png", "more/b.png", "z.png"):
        (folder / name).write_bytes(drawn_files[0])
    summary = ask()
    assert (summary.asked, summary.duplicates, summary.labeled) == (6, 3, 6)
    assert set(endpoint.asked().values()) == {1}
    assert len({labels(folder)[name]["image_title"] for name in ("0.png", "a.png", "more/b.png", "z.png")}) == 1
    assert len(labels(folder)) == 9
    again = ask()
    assert (again.known, again.duplicates, len(endpoint.requests)) == (9, 0, 6)


def test_renamed_removed_and_changed_files(ask, folder, endpoint, drawn_files):
    ask()
    (folder / "0.png").rename(folder / "zero.png")
    (folder / "1.png").unlink()
    (folder / "2.png").write_bytes(drawn_files[2] + b"changed")
    endpoint.requests.clear()
    endpoint.behave = lambda request: Reply(completion(json.dumps(NOTHING)))
    assert ask().labeled == 1
    assert list(endpoint.asked()) == [url_of(folder / "2.png")]
    assert list(labels(folder)) == ["2.png", "3.png", "4.png", "more/5.png", "zero.png"]
    assert labels(folder)["2.png"]["is_food"] == 0
    assert labels(folder)["zero.png"]["is_food"] == 1


def test_broken_images_are_rejected_unsent_and_the_others_go_on(ask, folder, endpoint, drawn_files, monkeypatch):
    avif = io.BytesIO()
    scenes.draw_scene(33, "train", 0).image.save(avif, "AVIF")
    damaged = avif.getvalue()[:280] + b"\xff" * 20 + avif.getvalue()[300:]
    broken = {
        "empty.png": b"",
        "empty too.png": b"",
        "cut.png": drawn_files[0][:900],
        "text.png": b"hello",
        "damaged.png": damaged,
    }
    for name, data in broken.items():
        (folder / name).write_bytes(data)
    read = Path.read_bytes

    def locked(path):
        if path.name == "3.png":
            raise PermissionError(13, "Permission denied")
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", locked)
        summary = ask()
    assert (summary.labeled, summary.rejected, summary.failed, summary.duplicates) == (5, 4, 1, 1)
    assert len(endpoint.requests) == 5
    assert set(rejects(folder)) == {*broken, "3.png"}
    for name, word in {
        "empty.png": "empty",
        "cut.png": "truncated",
        "text.png": "not an image",
        "damaged.png": "damaged",
    }.items():
        assert word in rejects(folder)[name]["reason"]
    assert rejects(folder)["3.png"]["status"] == "failed"
    assert "Permission denied" in rejects(folder)["3.png"]["reason"]
    assert ask().labeled == 1  # it can be read now
    assert len(endpoint.requests) == 6


def test_output_elsewhere(ask, folder, tmp_path, endpoint):
    summary = asyncio.run(label_folder(Teacher(endpoint.address, "m"), folder, tmp_path / "labels.jsonl"))
    assert summary.labeled == 6
    assert [row["file_name"] for row in lines(tmp_path / "labels.jsonl")][-1] == "more/5.png"
    assert (tmp_path / "labels.ledger.jsonl").exists()
    assert (tmp_path / "labels.rejects.jsonl").read_text() == ""
    assert not list(folder.glob("*.jsonl"))


# key and command line


def run(folder, *args):
    return CliRunner().invoke(app, ["label", str(folder), "--model", "m", *map(str, args)])


@pytest.mark.parametrize(
    "echo",
    [
        lambda key: Reply(json.dumps({"error": {"message": f"bad key {key}"}}), 401),
        lambda key: Reply(json.dumps({"error": {"message": f"bad key {key}"}}), 400),
        lambda key: Reply(f"<html>{key}</html>"),
        lambda key: Reply(completion(f"you sent {key}")),
    ],
    ids=["401", "400", "html", "answer"],
)
def test_the_key_is_sent_and_never_written(echo, folder, endpoint, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY + "\n")
    endpoint.behave = lambda request: echo(request.key)
    result = run(folder, "--endpoint", endpoint.address, "--retries", 0)
    assert result.exit_code in (1, 2)
    assert {request.key for request in endpoint.requests} == {f"Bearer {KEY}"}
    written = result.output + "".join(path.read_text() for path in folder.rglob("*.jsonl*"))
    assert KEY not in written
    assert "***" in written
    assert f"{Teacher(endpoint.address, 'm')}".count(KEY) == 0


def test_a_local_server_needs_no_key(folder, endpoint):
    assert run(folder, "--endpoint", endpoint.address).exit_code == 0
    assert {request.key for request in endpoint.requests} == {"Bearer none"}


def test_a_key_with_odd_characters_is_an_error_that_hides_it(folder, endpoint, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-“quoted”")
    result = run(folder, "--endpoint", endpoint.address)
    assert result.exit_code == 2
    assert "copy it again" in result.output
    assert "quoted" not in result.output


def test_command_line(folder, endpoint):
    where = ["--endpoint", endpoint.address + "/"]
    result = run(folder, *where, "--limit", 2, "--prompt-price", 1, "--completion-price", 5)
    assert result.exit_code == 0, result.output
    assert "2 asked = 2 labeled" in result.stdout
    assert "cost: 0.0024" in result.stdout
    endpoint.behave = lambda request: Reply(completion("prose"))
    result = run(folder, *where, "--license", "CC0", "--max-edge", 64, "--max-tokens", 99)
    assert result.exit_code == 1  # max_edge is part of the question: all are asked for again
    assert "6 asked = 0 labeled + 6 rejected" in result.stdout
    assert {request.body["max_tokens"] for request in endpoint.requests} == {1024, 99}
    endpoint.behave = lambda request: Reply("{}", 401)
    result = run(folder, *where, "--model", "other")
    assert result.exit_code == 2
    assert "refuses the key" in result.stderr
    assert "Traceback" not in result.output


def test_it_needs_neither_torch_nor_datasets():
    heavy = "{'torch', 'datasets', 'transformers', 'trl'}"
    code = f"import sys, foodextract.data.labeling; print(*{heavy} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
