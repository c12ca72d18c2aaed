"""Measure the Space's page: load time, and ten simultaneous users. Take its screenshot for the README.

    python benchmarks/space_page.py                # a minute; needs Chromium; writes results/space.json and space.png
    python benchmarks/space_page.py --only-image

The app starts as in `make space`, with the photo model. A headless Chromium without a cache opens it repeatedly: the
load time ends when heading, examples and button are there. Then ten pages submit a drawing each at once; a page counts
as answered if it shows the extractor's own answer. The screenshot shows the answer to an example photograph.
"""

import asyncio
import json
import os
import shutil
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
from served import free_port
from true_size import interval

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results" / "space.json"
SHOWN = ROOT / "demos" / "FoodExtract-Vision" / "examples" / "pizza.jpg"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
USERS = 10
TIMEOUT = 120_000  # milliseconds


@contextmanager
def space() -> Iterator[tuple[str, float]]:
    """Start the Space; yield its address and the seconds until it answered. Raises RuntimeError with its log."""
    port = free_port()
    model = {"FOODEXTRACT_MODEL": str(loading.PHOTO), "HF_HUB_OFFLINE": "1"}
    env = {**os.environ, "GRADIO_SERVER_PORT": str(port), **model}
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
    """Open a page in a fresh profile; return it and the seconds until it was usable."""
    page = await (await browser.new_context(viewport={"width": 1080, "height": 780})).new_page()
    page.set_default_timeout(TIMEOUT)
    begun = time.monotonic()
    await page.goto(address)
    for part in (page.get_by_role("heading", name="FoodExtract Vision"), page.locator(".gallery-item").nth(5)):
        await part.wait_for()
    await expect(page.get_by_role("button", name="What is in it?")).to_be_enabled(timeout=TIMEOUT)
    return page, time.monotonic() - begun


async def submit(page: Page, file: Path) -> tuple[float, str]:
    """Submit a file; return the seconds until its answer is on the screen, and the JSON."""
    begun = time.monotonic()
    await page.locator("input[type=file]").first.set_input_files(file)
    await page.locator(".answer h2").wait_for()
    spent = time.monotonic() - begun
    return spent, await page.locator("#json .cm-content").inner_text()


async def visit(
    address: str, loads: int, users: int, folder: Path, screenshot: Path
) -> tuple[list[float], list[tuple[float, str]]]:
    """Return the seconds of each load, and the results of simultaneous users; take the screenshot in between."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        seconds = []
        for _ in range(loads):
            page, spent = await opened(browser, address)
            seconds.append(spent)
            await page.context.close()
        page, _ = await opened(browser, address)
        await submit(page, SHOWN)
        await page.wait_for_timeout(1000)  # it fades in
        await page.screenshot(path=screenshot)
        pages = [(await opened(browser, address))[0] for _ in range(users)]
        waited = await asyncio.gather(*(submit(page, folder / f"{number}.png") for number, page in enumerate(pages)))
        await browser.close()
    return seconds, waited


def main(
    loads: Annotated[int, typer.Option(min=1, help="Times to open the page.")] = 20,
    results: Annotated[Path, typer.Option(help="Output file; the screenshot goes beside it.")] = RESULTS,
    only_image: Annotated[bool, typer.Option("--only-image", help="Measure nothing.")] = False,
) -> None:
    """Measure, print, take the screenshot and save."""
    row = partial(make_row, "space_page", command=f"python benchmarks/space_page.py --loads {loads}")
    extractor = Extractor.from_pretrained(loading.PHOTO, "cpu")
    with tempfile.TemporaryDirectory() as name, space() as (address, start):
        folder = Path(name)
        drawings = [scene.image for scene in draw_scenes(9, "test", USERS)]
        for number, drawing in enumerate(drawings):
            drawing.save(folder / f"{number}.png")
        effort = (0, 0) if only_image else (loads, USERS)
        seconds, answers = asyncio.run(visit(address, *effort, folder, results.with_suffix(".png")))
    if only_image:
        return
    expected = [record.model_dump() for record in extractor.extract_many(drawings)]
    right = sum(json.loads(text) == record for (_, text), record in zip(answers, expected, strict=True))
    waited = [spent for spent, _ in answers]
    print(
        f"first answer {start:.1f} s after the start; page usable after at most {max(seconds):.2f} s in {loads} loads"
    )
    print(f"{USERS} at once: {right} answered correctly, after {min(waited):.1f} to {max(waited):.1f} s")
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
