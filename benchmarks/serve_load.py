"""Measure the HTTP server under load, next to a Flask server that answers one request at a time with the same weights.

    python benchmarks/serve_load.py                          # adds to results/serving.json, and draws serving.png
    python benchmarks/serve_load.py --seconds 5 --overload-seconds 5 --results /tmp/serving.json      # does it run?

First the two servers take turns under twice as many callers as our batch holds (throughput). Then requests arrive at
our server by the clock, whether or not it keeps up, at multiples of that throughput; the last load is twice what it
can answer. Callers and servers share the cores and talk over the loopback.
"""

import asyncio
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Annotated

import httpx
import matplotlib.pyplot as plt
import numpy as np
import typer
from matplotlib.figure import Figure

from foodextract.evaluation.evaluate import rate
from foodextract.evaluation.results import Row, make_row
from foodextract.models import loading
from served import RESULTS, Served, drawn_images, free_port, growth, serving, started, write_part
from true_size import interval, ratio

LOADS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)  # multiples of the throughput
PERCENTILES = (50, 95, 99)
METRICS = (*(f"p{p}_seconds" for p in PERCENTILES), *(f"status_{code}_share" for code in (200, 429, 504)))
BATCH = 8
FLASK = Path(__file__).with_name("flask_server.py")
Outcome = tuple[int, float]  # status, 0 where no answer came, and seconds


async def post(client: httpx.AsyncClient, image: bytes) -> Outcome:
    """Send one image."""
    start = time.perf_counter()
    try:
        status = (await client.post("/predict", files={"image": image})).status_code
    except httpx.HTTPError:
        status = 0
    return status, time.perf_counter() - start


async def with_client(address: str, load: Callable[[httpx.AsyncClient], Awaitable[list[Outcome]]]) -> list[Outcome]:
    """Run a load with a client of many connections."""
    limits = httpx.Limits(max_connections=400, max_keepalive_connections=100)
    async with httpx.AsyncClient(base_url=address, timeout=120, limits=limits, trust_env=False) as client:
        return await load(client)


async def busy(images: list[bytes], callers: int, seconds: float, client: httpx.AsyncClient) -> list[Outcome]:
    """Let each caller send the next request as soon as it is answered."""
    end, outcomes, supply = time.monotonic() + seconds, [], cycle(images)

    async def call() -> None:
        while time.monotonic() < end:
            outcomes.append(await post(client, next(supply)))

    await asyncio.gather(*(call() for _ in range(callers)))
    return outcomes


async def by_the_clock(images: list[bytes], rate: float, seconds: float, client: httpx.AsyncClient) -> list[Outcome]:
    """Send `rate` requests a second, evenly, whether or not earlier ones are answered."""
    start, supply, tasks = time.monotonic(), cycle(images), []
    for number in range(int(rate * seconds)):
        await asyncio.sleep(max(0.0, start + number / rate - time.monotonic()))
        tasks.append(asyncio.create_task(post(client, next(supply))))
    return await asyncio.gather(*tasks)


def throughput(address: str, images: list[bytes], seconds: float) -> tuple[float, int]:
    """Return images answered per second, and how many."""
    start = time.monotonic()
    outcomes = asyncio.run(with_client(address, partial(busy, images, 2 * BATCH, seconds)))
    answered = sum(status == 200 for status, _ in outcomes)
    return answered / (time.monotonic() - start), answered


def compared(
    addresses: Sequence[str], images: list[bytes], seconds: float, rounds: int
) -> list[list[tuple[float, int]]]:
    """Return the throughput of each address, round by round, after a warm-up."""
    for address in addresses:
        throughput(address, images, seconds / 2)
    return list(
        zip(*([throughput(address, images, seconds) for address in addresses] for _ in range(rounds)), strict=True)
    )


def flask(model: Path) -> AbstractContextManager[Served]:
    """Start the Flask server."""
    port = free_port()
    return started([sys.executable, str(FLASK), str(model), str(port)], port)


def described(load: float, outcomes: list[Outcome], row: Callable[..., Row]) -> list[Row]:
    """Return latencies of answered requests, with intervals, and the share of each status."""
    latencies = [spent for status, spent in outcomes if status == 200]
    statuses, subject = Counter(status for status, _ in outcomes), f"ours, {load:g} x load"
    row = partial(row, subject)
    rows = [
        row(f"p{p}_seconds", unit="s", n=len(latencies), **interval(latencies, partial(np.percentile, q=p)))
        for p in PERCENTILES
    ]
    for code in (200, 429, 504):
        share = rate(f"status_{code}_share", [status == code for status, _ in outcomes])
        rows.append(row(share.name, share.value, low=share.low, high=share.high, n=share.n))
    unexpected = len(outcomes) - statuses[200] - statuses[429] - statuses[504]
    rows.append(row("lost_or_unexpected", unexpected, unit="requests", n=len(outcomes)))
    print(
        f"{subject:16} " + ", ".join(f"p{p} {one.value:.2f} s" for p, one in zip(PERCENTILES, rows, strict=False)),
        dict(statuses),
    )
    return rows


def main(
    model: Annotated[Path, typer.Option(help="Folder of the model of both servers.")] = loading.TINY_TUNED,
    seconds: Annotated[float, typer.Option(min=1, help="Duration of a throughput round.")] = 6,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds in which the two servers take turns.")] = 6,
    load_seconds: Annotated[float, typer.Option(min=1, help="Duration of each load but the last.")] = 20,
    overload_seconds: Annotated[float, typer.Option(min=1, help="Duration of the last load.")] = 60,
    results: Annotated[Path, typer.Option(help="Where the figures go; the plot goes beside it.")] = RESULTS,
) -> None:
    """Measure, print, draw and save."""
    images = drawn_images(16)
    durations = f"--load-seconds {load_seconds:g} --overload-seconds {overload_seconds:g}"
    command = f"python benchmarks/serve_load.py --seconds {seconds:g} --rounds {rounds} {durations}"
    row = partial(make_row, "serve_load", command=command)
    with serving(model, "--batch-size", str(BATCH)) as server:
        with flask(model) as other:
            theirs, ours = compared((other.address, server.address), images, seconds, rounds)
        rows = []
        for name, rates in (("flask, one at a time", theirs), ("ours", ours)):
            n = sum(count for _, count in rates)
            rows.append(row(name, "images_per_second", unit="1/s", n=n, **interval([value for value, _ in rates])))
        rates = [np.array([value for value, _ in one]) for one in (ours, theirs)]
        rows.append(row("ours", "speedup_vs_flask", unit="x", n=rounds, **interval(rates[0], ratio, rates[1])))
        capacity = rows[1].value
        speedup = f"{rows[2].value:.2f} x ({rows[2].low} to {rows[2].high})"
        print(f"ours {capacity:.2f} images/s, flask {rows[0].value:.2f}: {speedup}")
        for load in LOADS:
            before = len(server.memory)
            duration = overload_seconds if load == LOADS[-1] else load_seconds
            outcomes = asyncio.run(
                with_client(server.address, partial(by_the_clock, images, load * capacity, duration))
            )
            rows += described(load, outcomes, row)
        memory = server.memory[before:]
    rows.append(row("ours, 2 x load", "peak_memory_gib", max(memory), unit="GiB", n=len(memory)))
    rows.append(row("ours, 2 x load", "memory_growth_share", growth(memory), n=len(memory)))
    print(f"memory under overload: peak {max(memory):.2f} GiB, growth {growth(memory):+.1%}")
    write_part(results, rows)
    draw(rows, capacity).savefig(results.with_suffix(".png"), dpi=120)


def draw(rows: list[Row], capacity: float) -> Figure:
    """Plot latencies and shares of the statuses by load."""
    figures = {(one.subject, one.metric): one for one in rows}
    of = [{metric: figures[f"ours, {load:g} x load", metric] for metric in METRICS} for load in LOADS]
    figure, (times, shares) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for p, color in zip(PERCENTILES, ("#4c78a8", "#f2b134", "#c62828"), strict=True):
        chosen = [one[f"p{p}_seconds"] for one in of]
        times.plot(LOADS, [one.value for one in chosen], marker="o", color=color, label=f"p{p}")
        times.fill_between(
            LOADS, [one.low for one in chosen], [one.high for one in chosen], color=color, alpha=0.15, lw=0
        )
    times.set(ylabel="seconds to an answer (200)", ylim=(0, None))
    bottom = np.zeros(len(LOADS))
    for code, color in ((200, "#59a14f"), (429, "#f2b134"), (504, "#c62828")):
        values = np.array([one[f"status_{code}_share"].value for one in of])
        shares.bar([f"{load:g}" for load in LOADS], values, bottom=bottom, color=color, label=str(code))
        bottom += values
    shares.set(ylabel="share of requests", ylim=(0, 1))
    for axis in (times, shares):
        axis.set_xlabel(f"arrivals, multiples of {capacity:.1f} images/s")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=3)
    return figure


if __name__ == "__main__":
    typer.run(main)
