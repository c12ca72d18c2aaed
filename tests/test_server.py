"""The HTTP door, over the loopback: every status it can give, and what it keeps to itself."""

import asyncio
import io
import json
import logging
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
from foodextract.serving.queue import Limits
from foodextract.serving.telemetry import JsonLines
from foodextract.serving.uploads import Upload
from test_batching import SECONDS, Stub, names

KEY = "do-not-print-me"


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@contextmanager
def serving(load, **changes):
    """A server in a thread, and a client for it; drained at the end."""
    one = server.make_server(load, "a-model", Settings(**changes), "127.0.0.1", 0)
    thread = threading.Thread(target=one.run, daemon=True)
    thread.start()
    until(lambda: one.started)
    port = one.servers[0].sockets[0].getsockname()[1]
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=SECONDS, trust_env=False) as client:
        client.port, client.batcher = port, one.batcher
        yield client
    one.handle_exit(signal.SIGTERM, None)
    thread.join(SECONDS)
    assert not thread.is_alive()


@contextmanager
def stub_serving(**changes):
    stub = Stub()
    with serving(lambda: stub, **changes) as client:
        until(lambda: not client.batcher.unavailable)
        yield client, stub
        stub.go.set()


def connected(client):
    return socket.create_connection(("127.0.0.1", client.port), SECONDS)


def until(condition):
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture(scope="module")
def real(tuned):
    """A server with the bundled model."""
    with serving(lambda: tuned) as client:
        until(lambda: not client.batcher.unavailable)
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
    """A value that /metrics shows."""
    wanted = name + ("{" + ",".join(f'{key}="{value}"' for key, value in labels.items()) + "}" if labels else "")
    lines = dict(line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines() if not line.startswith("#"))
    return float(lines.get(wanted, 0))


# ------------------------------------------------------------------------------------------------------------------------------ all is well


def test_a_form_a_raw_body_and_a_batch_get_the_answers_of_the_extractor(real, tuned, images):
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
        (415, "not_a_image"),
        (422, "bad_image"),
    ]


def test_of_an_animation_the_first_frame_counts(real, tuned, images):
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
    assert sample(real, "foodextract_phase_seconds_count", phase="total") == requests  # a probe is none


def test_the_examples_of_the_documentation_are_answers(real):
    paths = real.get("/openapi.json").json()["paths"]
    for path, kind in (("/predict", Single), ("/predict/batch", Batch)):
        operation = paths[path]["post"]
        kind.model_validate(operation["responses"]["200"]["content"]["application/json"]["example"])
        assert set(operation["responses"]) == {"200", *map(str, app._REFUSALS)}
    assert real.get("/docs").status_code == 200


# ----------------------------------------------------------------------------------------------------------------------------- bad images


WRONG_TYPES = [
    b"GIF",
    b"<html></html>",
    b'{"image": "http://169.254.169.254/"}',
    b"%PDF-1.7",
    b"%!PS-Adobe-3.0 EPSF-3.0\n",
    b"\x00" * 5000,
]
PNG = encoded(Image.effect_noise((64, 64), 90).convert("RGB"))
JPEG = encoded(Image.effect_noise((64, 64), 90).convert("RGB"), "JPEG")


@pytest.mark.parametrize("body", WRONG_TYPES)
def test_what_is_no_image_is_415_whatever_it_is_called(real, body):
    assert reason(real.post("/predict", content=body, headers={"Content-Type": "image/png"}), 415) == "not_a_image"
    assert reason(real.post("/predict", files={"image": ("lunch.jpg", body, "image/jpeg")}), 415) == "not_a_image"


@pytest.mark.parametrize("body", [PNG[:-500], JPEG[:700]], ids=["png", "jpeg"])
def test_a_truncated_image_is_422(real, body):
    assert reason(real.post("/predict", content=body), 422) == "bad_image"


@pytest.mark.parametrize("side", [8_100, 60_000])
def test_too_many_pixels_are_422_before_anything_is_decoded(real, side, monkeypatch):
    assert side**2 > MAX_PIXELS
    header = bytearray(encoded(Image.new("1", (1, 1))))
    header[16:24] = side.to_bytes(4) * 2
    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4)
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    response = real.post("/predict", content=bytes(header))
    assert reason(response, 422) == "bad_image"
    assert "megapixels" in response.json()["message"]


# ----------------------------------------------------------------------------------------------------------------------------- bad requests


def test_a_body_that_is_too_large_is_413_declared_or_not():
    with stub_serving(upload=Upload(max_bytes=50_000)) as (client, stub):
        big = b"x" * 50_001
        assert reason(client.post("/predict", content=big), 413) == "body_too_large"
        assert reason(client.post("/predict", content=iter([big[:30_000], big[30_000:]])), 413) == "body_too_large"
        assert reason(client.post("/predict", files={"image": big}), 413) == "body_too_large"
        assert client.post("/predict", content=b"x" * 50_000).status_code == 200
        assert [len(image) for image in stub.read_so_far] == [50_000]
        assert client.batcher.guests == 0


def test_a_body_without_end_is_413_while_it_streams():
    with stub_serving(upload=Upload(max_bytes=50_000)) as (client, _), connected(client) as connection:
        connection.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(6):
            connection.sendall(b"2710\r\n" + b"x" * 10_000 + b"\r\n")
        assert connection.recv(12) == b"HTTP/1.1 413"  # though the last chunk has not come


@pytest.mark.parametrize(
    ("request_", "why"),
    [
        ({}, "no_image"),
        ({"files": {"image": b"x"}}, "no_image"),
        ({"data": {"image": "x"}, "files": {"other": b"x"}}, "no_image"),
        ({"content": b"x", "headers": {"Content-Type": "multipart/form-data"}}, "bad_form"),
        ({"content": b"x", "headers": {"Content-Type": "multipart/form-data; boundary=y"}}, "bad_form"),
        (
            {"content": b"--y\r\n\xff\xfe: \r\n\r\n", "headers": {"Content-Type": "multipart/form-data; boundary=y"}},
            "bad_form",
        ),
    ],
)
def test_a_request_without_one_image_is_400(real, request_, why):
    assert reason(real.post("/predict", **request_), 400) == why


def test_more_images_than_would_ever_fit_are_413():
    with stub_serving(limits=Limits(places=2)) as (client, stub):
        response = client.post("/predict/batch", files=[("images", b"x")] * 3)
        assert reason(response, 413) == "too_many_images"
        assert "2 images" in response.json()["message"]
        assert reason(client.post("/predict", files=[("image", b"x")] * 2), 413) == "too_many_images"
        assert stub.read_so_far == []
        assert len(client.post("/predict/batch", files=[("images", b"x")] * 2).json()["results"]) == 2


def test_a_slow_upload_is_408_and_gives_its_place_back():
    with stub_serving(upload=Upload(seconds=0.2), limits=Limits(places=1)) as (client, _):
        with connected(client) as connection:
            connection.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nx")
            assert connection.recv(12) == b"HTTP/1.1 408"
        assert client.post("/predict", content=b"x").status_code == 200


def test_a_connection_that_says_half_a_head_is_told_408_and_one_that_says_nothing_is_closed(monkeypatch):
    monkeypatch.setattr(server, "IDLE_SECONDS", 0.2)
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
        assert stub.read_so_far == []
        assert client.post("/predict", content=b"x", headers={"X": "y" * 8_000}).status_code == 200


def test_the_key_is_asked_for_before_the_body():
    with stub_serving(api_key=KEY) as (client, stub):
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": f"Basic {KEY}"},
            {"Authorization": b"Bearer \xff"},
        ):
            assert reason(client.post("/predict", content=b"x", headers=headers), 401) == "bad_key"
        assert client.post("/predict", content=b"x", headers={"Authorization": f"Bearer {KEY}"}).status_code == 200
        assert client.get("/ready").status_code == 200
        assert len(stub.read_so_far) == 1


def test_pages_of_listed_origins_may_ask_and_no_others():
    with stub_serving(origins=("https://food.example",)) as (client, _):
        for origin, allowed in (("https://food.example", "https://food.example"), ("https://evil.example", None)):
            asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
            assert client.options("/predict", headers=asked).headers.get("access-control-allow-origin") == allowed
        shown = client.get("/ready", headers={"Origin": "https://food.example"}).headers[
            "access-control-expose-headers"
        ]
        assert {"Retry-After", "X-Request-Id"} <= set(shown.split(", "))


# ---------------------------------------------------------------------------------------------------------------------------- overload, end


def in_background(function, *args, **options):
    results = []
    thread = threading.Thread(target=lambda: results.append(function(*args, **options)), daemon=True)
    thread.start()
    return thread, results


def test_when_all_places_are_taken_it_is_429_and_when_to_come_back():
    with stub_serving(limits=Limits(places=2, batch=1)) as (client, stub):
        stub.go.clear()
        asked = [in_background(client.post, "/predict", content=name) for name in names(2)]
        until(lambda: client.batcher.guests == 2)
        response = client.post("/predict", content=b"x")
        assert reason(response, 429) == "queue_full"
        assert int(response.headers["retry-after"]) >= 1
        assert sample(client, "foodextract_rejects_total", reason="queue_full") == 1
        stub.go.set()
        for thread, results in asked:
            thread.join(SECONDS)
            assert results[0].status_code == 200


def test_at_the_deadline_it_is_504():
    with stub_serving(limits=Limits(deadline=1.0)) as (client, stub):
        stub.go.clear()
        assert reason(client.post("/predict", content=b"late"), 504) == "deadline"
        assert [sample(client, "foodextract_phase_seconds_sum", phase=phase) > 0.5 for phase in ("model", "total")] == [
            True,
            True,
        ]
        until(lambda: stub.unwanted == [b"late"])
        assert client.batcher.guests == 0


def test_when_the_client_hangs_up_the_work_ends():
    with stub_serving() as (client, stub):
        stub.go.clear()
        with connected(client) as connection:
            connection.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\ngone")
            until(stub.asked.is_set)
        until(lambda: stub.unwanted == [b"gone"])
        until(lambda: client.batcher.guests == 0)
        assert sample(client, "foodextract_requests_total", path="/predict", status="499") == 1


def test_before_the_model_is_warm_it_is_503_and_alive():
    gate = threading.Event()
    with serving(lambda: gate.wait(SECONDS) and Stub()) as client:
        assert client.get("/health").status_code == 200
        assert client.get("/ready").status_code == 503
        response = client.post("/predict", content=b"x")
        assert reason(response, 503) == "loading"
        assert response.headers["retry-after"]
        gate.set()
        until(lambda: client.get("/ready").status_code == 200)


def test_a_model_that_keeps_failing_is_500_and_then_not_healthy():
    with stub_serving() as (client, _):
        for _ in range(3):
            assert client.get("/health").status_code == 200
            assert reason(client.post("/predict", content=b"broken"), 500) == "model_failed"
        assert client.get("/health").status_code == 503


def test_logs_and_metrics_keep_contents_names_and_keys_to_themselves(caplog, images):
    logging.getLogger("foodextract").propagate = True
    with caplog.at_level(logging.INFO, "foodextract"), stub_serving(api_key=KEY) as (client, _):
        headers = {"Authorization": f"Bearer {KEY}"}
        for content in (b"secret contents", b"bad", b"broken"):
            client.post("/predict?secret=query", files={"image": ("secret-name.jpg", content)}, headers=headers)
        client.get("/secret/path")
        told = client.get("/metrics").text + "".join(map(JsonLines().format, caplog.records))
    assert '"path": "/predict", "status": 422' in told
    assert '"reason": "bad_image"' in told
    assert '"reason": "model_failed"' in told
    assert "secret" not in told
    assert KEY not in told
    for record in caplog.records:
        assert json.loads(JsonLines().format(record))["event"]


def test_a_batch_whose_upload_has_begun_is_answered_whatever_comes():
    form = (
        b"".join(
            b'--y\r\nContent-Disposition: form-data; name="images"; filename="a"\r\n\r\n%d\r\n' % n for n in range(3)
        )
        + b"--y--\r\n"
    )
    head = b"POST /predict/batch HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=y\r\nContent-Length: %d\r\n\r\n"
    with stub_serving() as (client, _), connected(client) as connection:
        connection.sendall(head % len(form) + form[:50])
        until(lambda: client.batcher.guests == 1)
        client.batcher.draining = True
        connection.sendall(form[50:])
        assert connection.recv(12) == b"HTTP/1.1 200"


def start(*options, until="ready"):
    """A server as the command starts it, once it has said `until`; and the address that it has named."""
    command = [sys.executable, "-m", "foodextract", "serve", "--port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        event = json.loads(line)["event"]
        if "running on" in event:
            address = event.split()[3]
        if until in event:
            return process, address
    pytest.fail(f"did not start: {process.wait()}")


def test_sigterm_answers_what_was_accepted_and_ends_well(images):
    process, address = start("--model", str(TINY_TUNED), "--batch-size", "1")
    assert address.startswith("http://127.0.0.1:")  # unless told otherwise

    async def story():
        async with httpx.AsyncClient(base_url=address, timeout=SECONDS, trust_env=False) as client:
            asked = [asyncio.create_task(client.post("/predict", content=image)) for image in images * 4]
            while (
                "foodextract_queue_depth 15.0" not in (text := (await client.get("/metrics")).text)
                and "queue_depth 16.0" not in text
            ):
                assert not all(task.done() for task in asked)
            process.send_signal(signal.SIGTERM)
            return await asyncio.gather(*asked)

    assert [response.status_code for response in asyncio.run(story())] == [200] * 16
    assert process.wait(SECONDS) == 0


def test_sigterm_while_the_model_loads_ends_well_too():
    process, _ = start("--model", str(TINY_TUNED), until="running on")
    process.send_signal(signal.SIGTERM)
    process.stderr.read()
    assert process.wait(SECONDS) == 0


def test_what_cannot_start_says_why(tmp_path):
    command = [sys.executable, "-m", "foodextract", "serve", "--port", "0", "--model", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=4 * SECONDS)
    assert ended.returncode == 2
    assert f"foodextract: {tmp_path} holds no model" in ended.stderr


# --------------------------------------------------------------------------------------------------------------------------------- anything


def described(**changes):
    return schemathesis.openapi.from_dict(create_app(Stub, "a-model", Settings(**changes)).openapi())


ANY_FILE = [positive_data_acceptance]  # left out: a schema can say that a body is a file, not that it is an image
few = settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@described().parametrize()
@few
def test_whatever_is_sent_the_answer_is_as_documented(real, case):
    case.call_and_validate(base_url=str(real.base_url), excluded_checks=ANY_FILE)


@pytest.fixture(scope="module")
def keyed():
    with stub_serving(api_key=KEY) as (client, _):
        yield client


@described(api_key=KEY).include(path="/predict").parametrize()
@few
def test_so_it_is_where_a_key_is_asked_for(keyed, case):
    key = {"Authorization": f"Bearer {KEY}"}
    case.call_and_validate(base_url=str(keyed.base_url), headers=key, excluded_checks=ANY_FILE)
