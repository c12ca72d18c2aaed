"""Measure what happens to the HTTP server and its callers under faults.

    python benchmarks/serve_faults.py   # adds to results/serving.json
    python benchmarks/serve_faults.py --hostile 64 --rounds 1 --results /tmp/serving.json   # does it run?

SIGTERM under load: every accepted request must be answered, and the exit status must be 0. SIGKILL under load:
restarted on the same port, the server must become ready and give the same answers. Hostile uploads (`hostile.py`):
each must get 4xx; the server must survive, answer honest images as before, and not grow. Finally schemathesis
generates requests from the OpenAPI page and looks for answers that the page does not document.
"""

import asyncio
import re
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated

import httpx
import typer

from foodextract.evaluation.results import Row, make_row
from foodextract.models import loading
from hostile import hostile
from served import RESULTS, Served, drawn_images, growth, serving, write_part

CALLERS = 24
SLOW = 2.0  # seconds between two bytes of a slow caller; the server waits for 10 s
AT_ONCE = 16
NO_IMAGE = "positive_data_acceptance"  # a schema can say that a body is a file, not that it is an image


def sigterm(model: Path, images: list[bytes]) -> Counter[str]:
    """Send SIGTERM under load and count the outcomes of the requests."""
    outcomes: Counter[str] = Counter()

    async def call(client: httpx.AsyncClient, signaled: asyncio.Event, over: asyncio.Event) -> None:
        while not over.is_set():
            late = signaled.is_set()  # a request after the signal may get 503 or no connection
            try:
                status = (await client.post("/predict", content=images[0])).status_code
                outcomes["answered" if status == 200 else "turned away" if late or status == 503 else "unexpected"] += 1
            except httpx.HTTPError:
                outcomes["turned away" if late else "lost"] += 1
                await asyncio.sleep(0.05)

    async def story(served: Served) -> None:
        signaled, over, no_keep_alive = asyncio.Event(), asyncio.Event(), httpx.Limits(max_keepalive_connections=0)
        async with httpx.AsyncClient(
            base_url=served.address, timeout=60, limits=no_keep_alive, trust_env=False
        ) as client:
            callers = [asyncio.create_task(call(client, signaled, over)) for _ in range(CALLERS)]
            await asyncio.sleep(3)
            signaled.set()
            served.process.send_signal(signal.SIGTERM)
            await asyncio.sleep(0.5)  # callers continue while it drains
            over.set()
            await asyncio.gather(*callers)

    with serving(model) as served:
        asyncio.run(story(served))
        outcomes["ended badly"] += served.process.wait(60) != 0
    return outcomes


def sigkill(model: Path, images: list[bytes]) -> tuple[float, int]:
    """Kill the server under load and restart it; return seconds to ready, and how many answers differ from before."""

    def ask(served: Served) -> list[dict]:
        return [
            httpx.post(f"{served.address}/predict", content=p, timeout=60, trust_env=False).json()["record"]
            for p in images
        ]

    with serving(model) as served:
        before = ask(served)
        with ThreadPoolExecutor(CALLERS) as callers:
            for _ in range(CALLERS):
                callers.submit(ask, served)  # their outcomes do not matter
            while not _metric(served, "foodextract_in_flight"):
                pass
            served.process.kill()
    with serving(model, port=served.port) as served:
        return served.seconds_to_ready, sum(a != b for a, b in zip(before, ask(served), strict=True))


async def send(port: int, kind: str, request: bytes) -> str:
    """Send one hostile request; return the status it gets, or `hung up`."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    reply = asyncio.create_task(reader.read(12))
    try:
        head = request.index(b"\r\n\r\n") + 4 if b"\r\n\r\n" in request else len(request)
        if kind.startswith("slow"):
            start = head + 1 if kind == "slow body" else 30
            writer.write(request[:start])
            for place in range(start, len(request)):
                if (await asyncio.wait([reply], timeout=SLOW))[0]:
                    break
                writer.write(request[place : place + 1])
        else:
            writer.write(request)
            await writer.drain()
            if kind == "no HTTP":
                writer.write_eof()
        answer = await asyncio.wait_for(reply, 60)
        return answer[9:12].decode() or "hung up"
    except (ConnectionError, TimeoutError) as error:
        return reply.result()[9:12].decode() if reply.done() and not reply.exception() else type(error).__name__
    finally:
        reply.cancel()
        writer.close()


async def attack(served: Served, count: int, image: bytes) -> Counter[tuple[str, str]]:
    """Send hostile requests, a few at once, with honest images among them; count the outcomes."""
    outcomes: Counter[tuple[str, str]] = Counter()
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(kind: str, request: bytes) -> None:
        outcomes[kind, await send(served.port, kind, request)] += 1
        gate.release()

    async with httpx.AsyncClient(base_url=served.address, timeout=60, trust_env=False) as client:
        expected = (await client.post("/predict", content=image)).json()["record"]
        supply = hostile(count)
        for _ in range(4):
            waiting = []
            for kind, request in islice(supply, count // 4):
                await gate.acquire()
                waiting.append(asyncio.create_task(one(kind, request)))
            honest = await client.post("/predict", content=image)
            outcomes[
                "honest", "as before" if honest.status_code == 200 and honest.json()["record"] == expected else "spoilt"
            ] += 1
            await asyncio.gather(*waiting)
    return outcomes


def contract(served: Served, examples: int) -> tuple[int, int]:
    """Run schemathesis on the OpenAPI page; return its findings and how many requests it made."""
    before = _metric(served, "foodextract_requests_total")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        tool, page = Path(sys.executable).with_name("schemathesis"), f"{served.address}/openapi.json"
        command = [tool, "run", page, "--seed", "0", "--max-examples", str(examples), "--exclude-checks", NO_IMAGE]
        command += ["--report", "junit", "--report-junit-path", report]
        run = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)  # noqa: S603
        suites = ElementTree.parse(report).getroot().iter("testsuite")  # noqa: S314 - written just now
        findings = sum(int(suite.get(kind, 0)) for suite in suites for kind in ("failures", "errors"))
    if findings or run.returncode:
        print(run.stdout)
    return max(findings, run.returncode), _metric(served, "foodextract_requests_total") - before


def _metric(served: Served, name: str) -> int:
    """Return the sum of a metric over its labels."""
    lines = httpx.get(f"{served.address}/metrics", timeout=60, trust_env=False).text.splitlines()
    return int(sum(float(line.rsplit(" ", 1)[1]) for line in lines if re.match(rf"{name}[ {{]", line)))


def main(
    model: Annotated[Path, typer.Option(help="Folder of the model.")] = loading.TINY_TUNED,
    rounds: Annotated[int, typer.Option(min=1, help="Repetitions of SIGTERM and SIGKILL.")] = 5,
    uploads: Annotated[int, typer.Option("--hostile", min=64, help="Hostile uploads.")] = 1000,
    examples: Annotated[int, typer.Option(min=1, help="Requests of schemathesis per kind of test and path.")] = 100,
    results: Annotated[Path, typer.Option(help="Where the figures go.")] = RESULTS,
) -> None:
    """Measure, print and save."""
    images = drawn_images(4)
    row = partial(
        make_row,
        "serve_faults",
        command=f"python benchmarks/serve_faults.py --rounds {rounds} --hostile {uploads} --examples {examples}",
    )
    rows: list[Row] = []
    drained: Counter[str] = Counter()
    for _ in range(rounds):
        drained += sigterm(model, images)
    n = sum(drained.values())
    for name in ("answered", "turned away", "lost", "unexpected"):
        rows.append(row("SIGTERM", name.replace(" ", "_"), drained[name], unit="requests", n=n))
    rows.append(row("SIGTERM", "ended_badly", drained["ended badly"], unit="processes", n=rounds))
    print("SIGTERM:", dict(drained))
    killed = [sigkill(model, images) for _ in range(rounds)]
    rows.append(row("SIGKILL", "seconds", max(seconds for seconds, _ in killed), unit="s", n=rounds))
    rows.append(
        row("SIGKILL", "answers_changed", sum(changed for _, changed in killed), unit="answers", n=rounds * len(images))
    )
    print("SIGKILL: seconds to ready, answers changed:", killed)
    with serving(model, "--deadline", "60") as served:
        asyncio.run(attack(served, 64, images[0]))  # warm-up
        begun, before = time.monotonic(), served.resident()
        outcomes = asyncio.run(attack(served, uploads, images[0]))
        grown, alive = growth(served.memory[-int(2 * (time.monotonic() - begun)) :]), served.process.poll() is None
        print(f"hostile: {before:.2f} GiB before, {served.resident():.2f} after; growth {grown:+.1%}")
        findings, requests = contract(served, examples)
        print(f"schemathesis: {findings} findings in {requests} requests")
    sent = {pair: count for pair, count in outcomes.items() if pair[0] != "honest"}
    n = sum(sent.values())
    right = sum(count for (kind, status), count in sent.items() if status.startswith("4"))
    rows += [
        row("hostile uploads", "refused_share", right / n, n=n),
        row("hostile uploads", "crashes", 1 - alive, unit="processes", n=1),
    ]
    rows.append(row("hostile uploads", "memory_growth_share", grown, n=n))
    rows.append(row("honest among them", "spoilt", outcomes["honest", "spoilt"], unit="answers", n=4))
    rows.append(row("schemathesis", "findings", findings, unit="findings", n=requests))
    for (kind, status), count in sorted(outcomes.items()):
        print(f"  {kind:22} {status:16} {count:5}")
    write_part(results, rows)


if __name__ == "__main__":
    typer.run(main)
