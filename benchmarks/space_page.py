"""How soon the Space's page can be used, and how ten people at once are served; and its image for the README.

    python benchmarks/space_page.py                # a minute; needs Chromium; writes results/space.json and space.png
    python benchmarks/space_page.py --only-image

The app is started as `make space` does, with the bundled model. Then a headless Chromium without a cache opens it again
and again: the time is from asking for the address until heading, drawings and button are there. After that ten pages
ask about a drawing each, at once; those that show what the extractor itself says of their drawing are counted as
answered. The image shows a drawing that is answered rightly.
"""

import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated

import httpx
import typer
from playwright.async_api import Browser, Page, async_playwright, expect

from foodextract.data.scenes import draw_scenes
from foodextract.evaluation.results import make_row, write_results
from foodextract.inference.extractor import Extractor
from foodextract.models import loading
from true_size import interval

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results" / "space.json"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
USERS = 10
PATIENCE = 120_000  # milliseconds


@contextmanager
def space() -> Iterator[tuple[str, float]]:
    """The Space's address, and the seconds until it answered. Raises RuntimeError with its last words."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {
        **os.environ,
        "GRADIO_SERVER_PORT": str(port),
        "FOODEXTRACT_MODEL": str(loading.TINY_TUNED),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, str(ROOT / "demos" / "FoodExtract-Vision" / "app.py")]
    begun = time.monotonic()
    with tempfile.TemporaryFile("w+") as log, subprocess.Popen(command, env=env, stdout=log, stderr=log) as process:  # noqa: S603
        try:
            while not _answers(f"http://127.0.0.1:{port}/"):
                if process.poll() is not None:
                    log.seek(0)
                    raise RuntimeError(f"the Space did not start: {log.read()[-2000:]}")
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}/", time.monotonic() - begun
        finally:
            process.terminate()


def _answers(address: str) -> bool:
    try:
        return httpx.get(address, timeout=5, trust_env=False).is_success
    except httpx.HTTPError:
        return False


async def opened(browser: Browser, address: str) -> tuple[Page, float]:
    """A page in a fresh profile, and the seconds until it could be used."""
    page = await (await browser.new_context(viewport={"width": 1080, "height": 780})).new_page()
    page.set_default_timeout(PATIENCE)
    begun = time.monotonic()
    await page.goto(address)
    for part in (page.get_by_role("heading", name="FoodExtract Vision"), page.locator(".gallery-item").nth(5)):
        await part.wait_for()
    await expect(page.get_by_role("button", name="What is in it?")).to_be_enabled(timeout=PATIENCE)
    return page, time.monotonic() - begun


async def asked(page: Page, file: Path) -> tuple[float, str]:
    """Seconds from choosing a file to the answer on the screen, and its JSON."""
    begun = time.monotonic()
    await page.locator("input[type=file]").first.set_input_files(file)
    await page.locator(".answer h3").wait_for()
    spent = time.monotonic() - begun
    return spent, await page.locator("#json .cm-content").inner_text()


async def visit(
    address: str, loads: int, users: int, folder: Path, screenshot: Path
) -> tuple[list[float], list[tuple[float, str]]]:
    """Return the seconds of each page load, and what `asked` returns for each of several simultaneous users."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        seconds = []
        for _ in range(loads):
            page, spent = await opened(browser, address)
            seconds.append(spent)
            await page.context.close()
        page, _ = await opened(browser, address)
        await asked(page, folder / "shown.png")
        await page.wait_for_timeout(1000)  # it fades in
        await page.screenshot(path=screenshot)
        pages = [(await opened(browser, address))[0] for _ in range(users)]
        waited = await asyncio.gather(*(asked(page, folder / f"{number}.png") for number, page in enumerate(pages)))
        await browser.close()
    return seconds, waited


def main(
    loads: Annotated[int, typer.Option(min=1, help="How often the page is opened.")] = 20,
    results: Annotated[Path, typer.Option(help="Where the figures go; the image goes beside it.")] = RESULTS,
    only_image: Annotated[bool, typer.Option("--only-image", help="Measure nothing.")] = False,
) -> None:
    """Measure, print, take the image and write down."""
    row = partial(make_row, "space_page", command=f"python benchmarks/space_page.py --loads {loads}")
    extractor = Extractor.from_pretrained(loading.TINY_TUNED, "cpu")
    with tempfile.TemporaryDirectory() as name, space() as (address, start):
        folder = Path(name)
        drawings = [scene.image for scene in draw_scenes(9, "test", USERS)]
        for number, drawing in enumerate(drawings):
            drawing.save(folder / f"{number}.png")
        both = (scene for scene in draw_scenes(7, "test", 99) if scene.record.food_items and scene.record.drink_items)
        next(scene for scene in both if extractor.extract(scene.image) == scene.record).image.save(folder / "shown.png")
        effort = (0, 0) if only_image else (loads, USERS)
        seconds, answers = asyncio.run(visit(address, *effort, folder, results.with_suffix(".png")))
    if only_image:
        return
    expected = [record.model_dump() for record in extractor.extract_many(drawings)]
    right = sum(json.loads(text) == record for (_, text), record in zip(answers, expected, strict=True))
    waited = [spent for spent, _ in answers]
    print(f"first answer {start:.1f} s after start; page usable after at most {max(seconds):.2f} s in {loads} loads")
    print(f"{USERS} at once: {right} answered rightly, after {min(waited):.1f} to {max(waited):.1f} s")
    write_results(
        results,
        [
            row("start", "seconds", start, unit="s", n=1),
            row("page", "seconds", unit="s", n=loads, **interval(seconds)),
            row("page, slowest", "seconds", max(seconds), unit="s", n=loads),
            row("ten at once", "answered", right, unit="users", n=USERS),
            row("ten at once, slowest", "seconds", max(waited), unit="s", n=USERS),
        ],
    )


if __name__ == "__main__":
    typer.run(main)
