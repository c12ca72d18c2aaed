"""What the HTTP server does under load, beside a Flask server that answers one request at a time with the same weights.

    python benchmarks/serve_load.py                          # some five minutes; adds to results/serving.json, and draws serving.png
    python benchmarks/serve_load.py --seconds 5 --overload-seconds 5 --results /tmp/serving.json      # does it run?

First both servers are kept busy by as many callers as our batch holds twice (throughput). Then requests arrive at our server by the clock,
whether or not it keeps up, at several multiples of that throughput: the last, twice as many as it can answer, is the overload. All over
the loopback, with callers and server on the same cores.
"""

import asyncio
import socket
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Annotated

import httpx
import matplotlib.pyplot as plt
import numpy as np
import typer

from foodextract import models
from foodextract.results import make_row
from served import RESULTS, drawn_pictures, growth, serving, started, write_part

LOADS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)  # multiples of the throughput
BATCH = 8
FLASK = Path(__file__).with_name("flask_server.py")
Outcome = tuple[int, float]  # status, 0 where no answer came, and seconds


async def post(client: httpx.AsyncClient, picture: bytes) -> Outcome:
    """Ask once."""
    start = time.perf_counter()
    try:
        status = (await client.post("/predict", files={"image": picture})).status_code
    except httpx.HTTPError:
        status = 0
    return status, time.perf_counter() - start


async def with_client(address: str, story: Callable[[httpx.AsyncClient], Awaitable[list[Outcome]]]) -> list[Outcome]:
    """Run a story with a client of many connections."""
    limits = httpx.Limits(max_connections=400, max_keepalive_connections=100)
    async with httpx.AsyncClient(base_url=address, timeout=120, limits=limits, trust_env=False) as client:
        return await story(client)


async def busy(pictures: list[bytes], callers: int, seconds: float, client: httpx.AsyncClient) -> list[Outcome]:
    """Each caller asks again as soon as it is answered."""
    end, outcomes, supply = time.monotonic() + seconds, [], cycle(pictures)

    async def call() -> None:
        while time.monotonic() < end:
            outcomes.append(await post(client, next(supply)))

    await asyncio.gather(*(call() for _ in range(callers)))
    return outcomes


async def by_the_clock(pictures: list[bytes], rate: float, seconds: float, client: httpx.AsyncClient) -> list[Outcome]:
    """Requests arrive `rate` times a second, evenly, whether or not earlier ones are answered."""
    start, supply, asked = time.monotonic(), cycle(pictures), []
    for number in range(int(rate * seconds)):
        await asyncio.sleep(max(0.0, start + number / rate - time.monotonic()))
        asked.append(asyncio.create_task(post(client, next(supply))))
    return await asyncio.gather(*asked)


def throughput(address: str, pictures: list[bytes], seconds: float, callers: int) -> tuple[float, int]:
    """Pictures answered a second, and how many."""
    asyncio.run(with_client(address, partial(busy, pictures, callers, seconds / 4)))  # warm-up
    start = time.monotonic()
    outcomes = asyncio.run(with_client(address, partial(busy, pictures, callers, seconds)))
    answered = sum(status == 200 for status, _ in outcomes)
    return answered / (time.monotonic() - start), answered


def flask_throughput(model: Path, pictures: list[bytes], seconds: float) -> tuple[float, int]:
    """The same of the Flask server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with started([sys.executable, str(FLASK), str(model), str(port)], port) as flask:
        return throughput(flask.address, pictures, seconds, 2 * BATCH)


def main(
    model: Annotated[Path, typer.Option(help="Folder of the model that both serve.")] = models.TINY_TUNED,
    seconds: Annotated[float, typer.Option(min=1, help="For each throughput and each load but the last.")] = 20,
    overload_seconds: Annotated[float, typer.Option(min=1, help="For the last load, twice the throughput.")] = 60,
    results: Annotated[Path, typer.Option(help="Where the figures go; the plot goes beside it.")] = RESULTS,
) -> None:
    """Measure, print, draw and write down."""
    pictures = drawn_pictures(16)
    command = f"python benchmarks/serve_load.py --seconds {seconds:g} --overload-seconds {overload_seconds:g}"
    row = partial(make_row, "serve_load", command=command)
    flask, flask_n = flask_throughput(model, pictures, seconds)
    rows, curve = [row("flask, one at a time", "images_per_second", flask, unit="1/s", n=flask_n)], []
    with serving(model, "--batch-size", str(BATCH)) as server:
        rate, n = throughput(server.address, pictures, seconds, 2 * BATCH)
        rows.append(row("ours", "images_per_second", rate, unit="1/s", n=n))
        rows.append(row("ours", "speedup_vs_flask", rate / flask, unit="x", n=n))
        print(f"ours {rate:.2f} pictures/s, flask {flask:.2f}: {rate / flask:.2f} x")
        for load in LOADS:
            before = len(server.memory)
            duration = overload_seconds if load == LOADS[-1] else seconds
            outcomes = asyncio.run(with_client(server.address, partial(by_the_clock, pictures, load * rate, duration)))
            statuses, label = Counter(status for status, _ in outcomes), f"ours, {load:g} x load"
            latencies = [spent for status, spent in outcomes if status == 200]
            curve.append(np.percentile(latencies, (50, 95, 99)))
            rows += [row(label, f"p{p}_seconds", v, unit="s", n=len(latencies)) for p, v in zip((50, 95, 99), curve[-1], strict=True)]
            rows += [row(label, f"status_{code}_share", statuses[code] / len(outcomes), n=len(outcomes)) for code in (200, 429, 504)]
            unexpected = len(outcomes) - statuses[200] - statuses[429] - statuses[504]
            rows.append(row(label, "lost_or_unexpected", unexpected, unit="requests", n=len(outcomes)))
            print(f"{label:16} p50 {curve[-1][0]:.2f} s, p95 {curve[-1][1]:.2f} s, p99 {curve[-1][2]:.2f} s, statuses {dict(statuses)}")
        memory = server.memory[before:]
        rows.append(row("ours, 2 x load", "peak_memory_gib", max(memory), unit="GiB", n=len(memory)))
        rows.append(row("ours, 2 x load", "memory_growth_share", growth(memory), n=len(memory)))
        print(f"memory under overload: peak {max(memory):.2f} GiB, growth {growth(memory):+.1%}")
    write_part(results, rows)
    figure, axis = plt.subplots(figsize=(6, 3.4), layout="constrained")
    for name, values, colour in zip(("p50", "p95", "p99"), np.array(curve).T, ("#4c78a8", "#f2b134", "#c62828"), strict=True):
        axis.plot(LOADS, values, marker="o", color=colour, label=name)
    axis.set(xlabel=f"arrivals, multiples of {rate:.1f} pictures/s", ylabel="seconds to an answer (200)", ylim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    figure.savefig(results.with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    typer.run(main)
