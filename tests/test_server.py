"""The HTTP server over the loopback: every status it can give, and what stays out of logs and metrics."""

import asyncio
import base64
import io
import json
import logging
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from contextlib import contextmanager

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from PIL import Image
from schemathesis.specs.openapi.checks import positive_data_acceptance

from foodextract.data import scenes
from foodextract.images import MAX_PIXELS, open_image
from foodextract.models.loading import TINY_TUNED
from foodextract.serving import app, server
from foodextract.serving.app import Batch, Settings, Single, create_app
from foodextract.serving.queue import QueueLimits
from foodextract.serving.telemetry import FORMATTER
from foodextract.serving.uploads import UploadLimits
from test_queue import TIMEOUT, Stub, names

KEY = "do-not-print-me"


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@contextmanager
def serving(load, **changes):
    """A client of a server in a thread, drained at the end."""
    one = server.make_server(load, "a-model", Settings(**changes), "127.0.0.1", 0)
    thread = threading.Thread(target=one.run, daemon=True)
    thread.start()
    until(lambda: one.started)
    port = one.servers[0].sockets[0].getsockname()[1]
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=TIMEOUT, trust_env=False) as client:
        client.port, client.queue = port, one.queue
        yield client
    one.handle_exit(signal.SIGTERM, None)
    thread.join(TIMEOUT)
    assert not thread.is_alive()


@contextmanager
def stub_serving(**changes):
    stub = Stub()
    with serving(lambda: stub, **changes) as client:
        until(lambda: not client.queue.unavailable)
        yield client, stub
        stub.go.set()


def connected(client):
    return socket.create_connection(("127.0.0.1", client.port), TIMEOUT)


def until(condition):
    end = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture(scope="module")
def real(tuned):
    """A server with the bundled model."""
    with serving(lambda: tuned) as client:
        until(lambda: not client.queue.unavailable)
        yield client


@pytest.fixture(scope="module")
def images():
    return [encoded(scene.image) for scene in scenes.draw_scenes(82, "test", 4)]


def reason(response, status):
    assert response.status_code == status, response.text
    body = response.json()
    assert body["status"] == status
    assert body["message"]
    return body["reason"]


def sample(client, name, **labels):
    """One value of /metrics."""
    wanted = name + ("{" + ",".join(f'{key}="{value}"' for key, value in labels.items()) + "}" if labels else "")
    lines = dict(line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines() if not line.startswith("#"))
    return float(lines.get(wanted, 0))


def test_form_raw_body_and_batch_get_the_answers_of_the_extractor(real, tuned, images):
    expected = [tuned.extract(image) for image in images]
    form = Single.model_validate(real.post("/predict", files={"image": ("x.exe", images[0], "text/plain")}).json())
    assert form.record == expected[0]
    assert form.model == "a-model"
    assert set(form.seconds) == {"prepare", "queue", "model"}
    raw = real.post("/predict", content=images[1])
    assert Single.model_validate(raw.json()).record == expected[1]
    assert raw.headers["x-request-id"]
    files = [("images", image) for image in (*images, b"no image", b"")]
    batch = Batch.model_validate(real.post("/predict/batch", files=files).json())
    assert [result.record for result in batch.results[:4]] == expected
    assert [(result.status, result.reason) for result in batch.results[4:]] == [
        (415, "not_an_image"),
        (422, "bad_image"),
    ]


def as_base64(image):
    return base64.b64encode(image).decode()


def test_json_with_base64_or_a_data_url_gets_the_same_answers(real, images):
    alone = [real.post("/predict", content=image).json()["record"] for image in images[:2]]
    url = f"data:image/png;base64,{as_base64(images[1])}"
    assert real.post("/predict", json={"image": as_base64(images[0]), "model": "any"}).json()["record"] == alone[0]
    assert real.post("/predict", json={"image": url}).json()["record"] == alone[1]
    wrapped = base64.encodebytes(images[0]).decode()  # in lines
    results = real.post("/predict/batch", json={"images": [wrapped, url, as_base64(b"no image")]}).json()["results"]
    assert [result["record"] for result in results[:2]] == alone
    assert results[2]["reason"] == "not_an_image"


@pytest.mark.parametrize(
    ("body", "status", "why"),
    [
        (b"{", 400, "bad_json"),
        (b"[]", 400, "bad_json"),
        (b'"x"', 400, "bad_json"),
        (b"\xff", 400, "bad_json"),
        (b'{"picture": "aGk="}', 400, "bad_json"),
        (b'{"image": 5}', 400, "bad_json"),
        (b'{"image": ["aGk="]}', 400, "bad_json"),
        (b'{"image": "https://example.org/lunch.jpg"}', 400, "bad_base64"),
        (b'{"image": "data:image/png;base64,%%%"}', 400, "bad_base64"),
        (b'{"image": "aGk="}', 415, "not_an_image"),
    ],
)
def test_json_without_an_image_says_what_to_send(real, body, status, why):
    response = real.post("/predict", content=body, headers={"Content-Type": "application/json; charset=utf-8"})
    assert reason(response, status) == why
    if why.startswith("bad"):
        assert '{"image": "…"}' in response.json()["message"]


def test_json_without_images_or_with_too_many():
    with stub_serving(queue=QueueLimits(size=2)) as (client, _):
        assert reason(client.post("/predict/batch", json={"images": []}), 400) == "no_image"
        assert reason(client.post("/predict/batch", json={"images": ["aGk="] * 3}), 413) == "too_many_images"
        assert reason(client.post("/predict/batch", json={"images": "aGk="}), 400) == "bad_json"


def test_probes_answer_head(real):
    for path in ("/health", "/ready", "/metrics"):
        response = real.head(path)
        assert (response.status_code, response.text) == (200, "")
    assert real.head("/predict").status_code == 405


def test_the_documentation_needs_no_other_server_and_knows_its_prefix():
    with stub_serving(root_path="/food") as (client, _):
        page = client.get("/docs").text
        addresses = re.findall(r"(?:src|href|url)['\"]?[=:] ?['\"]([^'\"]+)", page)
        assert len(addresses) >= 4
        assert all(address.startswith("/food/") for address in addresses), addresses
        for address in addresses:
            assert client.get(address.removeprefix("/food")).status_code == 200
        assert client.get("/openapi.json").json()["servers"] == [{"url": "/food"}]


def test_an_animation_counts_as_its_first_frame(real, tuned, images):
    frame = open_image(images[0]).quantize(255)
    animation = encoded(frame, "GIF", save_all=True, append_images=[Image.new("P", frame.size)] * 50)
    assert real.post("/predict", content=animation).json()["record"] == tuned.extract(animation).model_dump()


def test_health_readiness_and_metrics(real, images):
    assert (real.get("/health").text, real.get("/ready").text) == ("ok", "ready")
    before = sample(real, "foodextract_requests_total", path="/predict", status="200")
    assert real.post("/predict", content=images[0]).status_code == 200
    assert sample(real, "foodextract_requests_total", path="/predict", status="200") == before + 1
    assert sample(real, "foodextract_queue_depth") == sample(real, "foodextract_in_flight") == 0
    for phase in ("upload", "prepare", "queue", "model", "total"):
        assert sample(real, "foodextract_phase_seconds_count", phase=phase) > 0
    assert sample(real, "foodextract_batch_size_count") > 0
    requests = sample(real, "foodextract_phase_seconds_count", phase="total")
    assert real.get("/health").status_code == 200
    assert sample(real, "foodextract_phase_seconds_count", phase="total") == requests  # probes do not count


def test_the_documented_examples_are_valid_answers(real):
    paths = real.get("/openapi.json").json()["paths"]
    for path, kind in (("/predict", Single), ("/predict/batch", Batch)):
        operation = paths[path]["post"]
        kind.model_validate(operation["responses"]["200"]["content"]["application/json"]["example"])
        assert set(operation["responses"]) == {"200", *map(str, app.STATUSES)}
    assert real.get("/docs").status_code == 200


HTML, URL, EPS = b"<html></html>", b'{"image": "http://169.254.169.254/"}', b"%!PS-Adobe-3.0 EPSF-3.0\n"
FORM = "multipart/form-data"
PNG = encoded(Image.effect_noise((64, 64), 90).convert("RGB"))
JPEG = encoded(Image.effect_noise((64, 64), 90).convert("RGB"), "JPEG")


@pytest.mark.parametrize("body", [b"GIF", HTML, URL, b"%PDF-1.7", EPS, bytes(5000)])
def test_bytes_that_are_not_an_image_are_415_whatever_their_name_and_type(real, body):
    assert reason(real.post("/predict", content=body, headers={"Content-Type": "image/png"}), 415) == "not_an_image"
    assert reason(real.post("/predict", files={"image": ("lunch.jpg", body, "image/jpeg")}), 415) == "not_an_image"


@pytest.mark.parametrize(
    ("body", "remedy"),
    [
        (b' {"image": "x"}', "Content-Type: application/json"),
        (b"image=@lunch.jpg", "curl -F image=@lunch.jpg"),
        (b"data:image/jpeg;base64,AAAA", '{"image": "data:'),
        (base64.b64encode(JPEG), '{"image": "/9j/'),
        (base64.b64encode(PNG), '{"image": "iVBORw0KGgo'),
    ],
)
def test_texts_are_415_with_the_remedy_that_fits(real, body, remedy):
    response = real.post("/predict", content=body, headers={"Content-Type": "application/x-www-form-urlencoded"})
    assert reason(response, 415) == "not_an_image"
    assert remedy in response.json()["message"]


@pytest.mark.parametrize("body", [PNG[:-500], JPEG[:700]], ids=["png", "jpeg"])
def test_a_truncated_image_is_422(real, body):
    assert reason(real.post("/predict", content=body), 422) == "bad_image"


@pytest.mark.parametrize("side", [8_100, 60_000])
def test_too_many_pixels_are_422_before_decoding(real, side, monkeypatch):
    assert side**2 > MAX_PIXELS
    header = bytearray(encoded(Image.new("1", (1, 1))))
    header[16:24] = side.to_bytes(4) * 2
    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4)
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    response = real.post("/predict", content=bytes(header))
    assert reason(response, 422) == "bad_image"
    assert "megapixels" in response.json()["message"]


def test_a_large_body_is_413_with_and_without_a_declared_length():
    with stub_serving(upload=UploadLimits(max_bytes=50_000)) as (client, stub):
        big = b"x" * 50_001
        assert reason(client.post("/predict", content=big), 413) == "body_too_large"
        assert reason(client.post("/predict", content=iter([big[:30_000], big[30_000:]])), 413) == "body_too_large"
        assert reason(client.post("/predict", files={"image": big}), 413) == "body_too_large"
        assert client.post("/predict", content=b"x" * 50_000).status_code == 200
        assert [len(image) for image in stub.images_read] == [50_000]
        assert client.queue.accepted == 0


def test_an_endless_body_is_413_while_it_streams():
    with stub_serving(upload=UploadLimits(max_bytes=50_000)) as (client, _), connected(client) as connection:
        connection.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(6):
            connection.sendall(b"2710\r\n" + b"x" * 10_000 + b"\r\n")
        assert connection.recv(12) == b"HTTP/1.1 413"  # before the last chunk


@pytest.mark.parametrize(
    ("request_", "why"),
    [
        ({}, "no_image"),
        ({"files": {"photo": b"x"}}, "no_image"),
        ({"data": {"image": "x"}, "files": {"other": b"x"}}, "no_image"),
        ({"content": b"x", "headers": {"Content-Type": FORM}}, "bad_form"),
        ({"content": b"x", "headers": {"Content-Type": f"{FORM}; boundary=y"}}, "bad_form"),
        ({"content": b"--y\r\n\xff\xfe: \r\n\r\n", "headers": {"Content-Type": f"{FORM}; boundary=y"}}, "bad_form"),
    ],
)
def test_a_request_without_an_image_is_400(real, request_, why):
    assert reason(real.post("/predict", **request_), 400) == why


def test_too_many_images_are_413():
    with stub_serving(queue=QueueLimits(size=2)) as (client, stub):
        response = client.post("/predict/batch", files=[("images", b"x")] * 3)
        assert reason(response, 413) == "too_many_images"
        assert "2 images" in response.json()["message"]
        assert reason(client.post("/predict", files=[("image", b"x")] * 2), 413) == "too_many_images"
        assert stub.images_read == []
        assert len(client.post("/predict/batch", files=[("images", b"x")] * 2).json()["results"]) == 2


def test_a_slow_upload_is_408_and_frees_its_slot():
    with stub_serving(upload=UploadLimits(timeout=0.2), queue=QueueLimits(size=1)) as (client, _):
        with connected(client) as connection:
            connection.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nx")
            assert connection.recv(12) == b"HTTP/1.1 408"
        assert client.post("/predict", content=b"x").status_code == 200


def test_half_a_head_is_408_and_a_silent_connection_is_closed(monkeypatch):
    monkeypatch.setattr(server, "HEAD_TIMEOUT", 0.2)
    with stub_serving() as (client, _), connected(client) as slow, connected(client) as silent:
        slow.sendall(b"POST /predict HTTP/1.1\r\nX-Slow: ")
        assert slow.recv(12) == b"HTTP/1.1 408"
        while slow.recv(1000):
            pass
        assert silent.recv(100) == b""
        assert client.post("/predict", content=b"x").status_code == 200


def test_too_many_headers_are_431():
    with stub_serving() as (client, stub):
        response = client.post("/predict", content=b"x", headers={"X": "y" * 16_384})
        assert reason(response, 431) == "head_too_large"
        assert stub.images_read == []
        assert client.post("/predict", content=b"x", headers={"X": "y" * 8_000}).status_code == 200


def test_the_key_is_checked_before_the_body():
    with stub_serving(api_key=KEY) as (client, stub):
        for value in (None, "Bearer wrong", f"Basic {KEY}", b"Bearer \xff"):
            headers = {"Authorization": value} if value else {}
            assert reason(client.post("/predict", content=b"x", headers=headers), 401) == "bad_key"
        assert client.post("/predict", content=b"x", headers={"Authorization": f"Bearer {KEY}"}).status_code == 200
        assert client.get("/ready").status_code == 200
        assert len(stub.images_read) == 1


def test_only_pages_of_listed_origins_may_call():
    with stub_serving(origins=("https://food.example",)) as (client, _):
        for origin, allowed in (("https://food.example", "https://food.example"), ("https://evil.example", None)):
            asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
            assert client.options("/predict", headers=asked).headers.get("access-control-allow-origin") == allowed
        headers = client.get("/ready", headers={"Origin": "https://food.example"}).headers
        assert {"Retry-After", "X-Request-Id"} <= set(headers["access-control-expose-headers"].split(", "))


def in_background(function, *args, **options):
    results = []
    thread = threading.Thread(target=lambda: results.append(function(*args, **options)), daemon=True)
    thread.start()
    return thread, results


def test_a_full_queue_is_429_with_retry_after():
    with stub_serving(queue=QueueLimits(size=2, batch_size=1)) as (client, stub):
        stub.go.clear()
        tasks = [in_background(client.post, "/predict", content=name) for name in names(2)]
        until(lambda: client.queue.accepted == 2)
        response = client.post("/predict", content=b"x")
        assert reason(response, 429) == "queue_full"
        assert int(response.headers["retry-after"]) >= 1
        assert sample(client, "foodextract_rejects_total", reason="queue_full") == 1
        stub.go.set()
        for thread, results in tasks:
            thread.join(TIMEOUT)
            assert results[0].status_code == 200


def test_a_missed_deadline_is_504():
    with stub_serving(queue=QueueLimits(deadline=1.0)) as (client, stub):
        stub.go.clear()
        assert reason(client.post("/predict", content=b"late"), 504) == "deadline"
        for phase in ("model", "total"):
            assert sample(client, "foodextract_phase_seconds_sum", phase=phase) > 0.5
        until(lambda: stub.unwanted == [b"late"])
        assert client.queue.accepted == 0


def test_a_disconnect_ends_the_work():
    with stub_serving() as (client, stub):
        stub.go.clear()
        with connected(client) as connection:
            connection.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\ngone")
            until(stub.called.is_set)
        until(lambda: stub.unwanted == [b"gone"])
        until(lambda: client.queue.accepted == 0)
        assert sample(client, "foodextract_requests_total", path="/predict", status="499") == 1


def test_a_loading_server_is_503_and_healthy():
    gate = threading.Event()
    with serving(lambda: gate.wait(TIMEOUT) and Stub()) as client:
        assert client.get("/health").status_code == 200
        assert client.get("/ready").status_code == 503
        response = client.post("/predict", content=b"x")
        assert reason(response, 503) == "loading"
        assert response.headers["retry-after"]
        gate.set()
        until(lambda: client.get("/ready").status_code == 200)


def test_a_model_that_keeps_failing_is_500_and_then_unhealthy():
    with stub_serving() as (client, _):
        for _ in range(3):
            assert client.get("/health").status_code == 200
            assert reason(client.post("/predict", content=b"broken"), 500) == "model_failed"
        assert client.get("/health").status_code == 503


def test_logs_and_metrics_hold_no_contents_names_or_keys(caplog, images):
    logging.getLogger("foodextract").propagate = True
    with caplog.at_level(logging.INFO, "foodextract"), stub_serving(api_key=KEY) as (client, _):
        headers = {"Authorization": f"Bearer {KEY}"}
        for content in (b"secret contents", b"bad", b"broken"):
            client.post("/predict?secret=query", files={"image": ("secret-name.jpg", content)}, headers=headers)
        client.get("/secret/path")
        text = client.get("/metrics").text + "".join(map(FORMATTER.format, caplog.records))
    assert '"path": "/predict", "status": 422' in text
    assert '"reason": "bad_image"' in text
    assert '"reason": "model_failed"' in text
    assert "secret" not in text
    assert KEY not in text
    for record in caplog.records:
        assert json.loads(FORMATTER.format(record))["event"]


def test_a_batch_whose_upload_has_begun_is_answered_while_draining():
    part = b'--y\r\nContent-Disposition: form-data; name="images"; filename="a"\r\n\r\n%d\r\n'
    form = b"".join(part % number for number in range(3)) + b"--y--\r\n"
    head = (
        b"POST /predict/batch HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=y\r\n"
        b"Content-Length: %d\r\n\r\n"
    )
    with stub_serving() as (client, _), connected(client) as connection:
        connection.sendall(head % len(form) + form[:50])
        until(lambda: client.queue.accepted == 1)
        client.queue.draining = True
        connection.sendall(form[50:])
        assert connection.recv(12) == b"HTTP/1.1 200"


def start(*options, until="ready"):
    """Start `foodextract serve` and wait for an event. Returns the process and its address."""
    command = [sys.executable, "-m", "foodextract", "serve", "--port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        event = json.loads(line)["event"]
        if "running on" in event:
            address = event.split()[3]
        if until in event:
            return process, address
    pytest.fail(f"did not start: {process.wait()}")


def test_sigterm_answers_accepted_requests_and_exits_with_0(images):
    process, address = start("--model", str(TINY_TUNED), "--batch-size", "1")
    assert address.startswith("http://127.0.0.1:")  # the default

    async def story():
        async with httpx.AsyncClient(base_url=address, timeout=TIMEOUT, trust_env=False) as client:
            tasks = [asyncio.create_task(client.post("/predict", content=image)) for image in images * 4]
            while not re.search(r"foodextract_queue_depth 1[56]\.0", (await client.get("/metrics")).text):
                assert not all(task.done() for task in tasks)
            process.send_signal(signal.SIGTERM)
            return await asyncio.gather(*tasks)

    assert [response.status_code for response in asyncio.run(story())] == [200] * 16
    assert process.wait(TIMEOUT) == 0


@pytest.mark.slow
def test_sigterm_while_loading_exits_with_0():
    process, _ = start("--model", str(TINY_TUNED), until="running on")
    process.send_signal(signal.SIGTERM)
    process.stderr.read()
    assert process.wait(TIMEOUT) == 0


@pytest.mark.slow
def test_a_server_that_cannot_start_says_why(tmp_path):
    command = [sys.executable, "-m", "foodextract", "serve", "--port", "0", "--model", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=4 * TIMEOUT)
    assert ended.returncode == 2
    assert f"foodextract: {tmp_path} holds no model" in ended.stderr


def described(**changes):
    return schemathesis.openapi.from_dict(create_app(Stub, "a-model", Settings(**changes)).openapi())


ANY_FILE = [positive_data_acceptance]  # a schema says that a body is a file, not that it is an image
few = settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@described().parametrize()
@few
def test_answers_are_as_documented_whatever_is_sent(real, case):
    case.call_and_validate(base_url=str(real.base_url), excluded_checks=ANY_FILE)


@pytest.fixture(scope="module")
def keyed():
    with stub_serving(api_key=KEY) as (client, _):
        yield client


@described(api_key=KEY).include(path="/predict").parametrize()
@few
def test_answers_are_as_documented_where_a_key_is_required(keyed, case):
    key = {"Authorization": f"Bearer {KEY}"}
    case.call_and_validate(base_url=str(keyed.base_url), headers=key, excluded_checks=ANY_FILE)
