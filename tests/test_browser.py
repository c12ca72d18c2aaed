"""The Space as people meet it: a headless Chromium drops pictures, presses keys and reads the answers off the screen.

Screenshots are left in outputs/screens/. Without a browser these tests are skipped and say so; where REQUIRE_BROWSER is set, as in the
repository's workflow, they fail instead.
"""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import expect, sync_playwright

from foodextract import scenes
from foodextract.pictures import MAX_PIXELS

SCREENS = Path(__file__).parents[1] / "outputs" / "screens"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WAIT = 60_000  # milliseconds that a slow machine may take


@pytest.fixture(scope="module")
def browser():
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        (pytest.fail if os.environ.get("REQUIRE_BROWSER") else pytest.skip)(f"no browser: none of {', '.join(BROWSERS)} is installed")
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])


@pytest.fixture(params=[{"width": 1280, "height": 900}], ids=["desktop"])
def opened(browser, page, request):
    """The page in a window of its own; `param` are options of the window."""
    options = request.param if "viewport" in request.param else {"viewport": request.param}
    context = browser.new_context(accept_downloads=True, **options)
    tab = context.new_page()
    tab.set_default_timeout(WAIT)
    tab.foreign = []
    tab.on("request", lambda request: tab.foreign.append(request.url) if not request.url.startswith((page, "data:", "blob:")) else None)
    tab.goto(page)
    expect(tab.get_by_role("heading", name="FoodExtract Vision")).to_be_visible(timeout=WAIT)
    yield tab
    context.close()


@pytest.fixture
def drawing(tmp_path):
    """A drawing of food and drink, and its file."""
    scene = next(scene for scene in scenes.draw_scenes(7, "test", 99) if scene.record.food_items and scene.record.drink_items)
    scene.image.save(tmp_path / "lunch.png")
    return scene, tmp_path / "lunch.png"


def shot(tab, name):
    SCREENS.mkdir(parents=True, exist_ok=True)
    tab.screenshot(path=SCREENS / f"{name}.png", full_page=True)


def drop(tab, file, label="Picture"):
    """Put files into the place of this label."""
    place = tab.locator(".block", has=tab.get_by_text(label, exact=True)).filter(has=tab.locator("input[type=file]"))
    place.locator("input[type=file]").first.set_input_files(file)


def answer_on_screen(tab):
    """The JSON under the picture, once there is one."""
    code = tab.locator(".cm-content").first
    expect(code).to_contain_text("is_food", timeout=WAIT)
    return json.loads(code.inner_text())


def test_a_dropped_picture_is_answered(opened, drawing, tuned):
    scene, file = drawing
    drop(opened, file)
    record = tuned.extract(scene.image)
    assert answer_on_screen(opened) == record.model_dump()
    expect(opened.locator(".answer h3")).to_have_text(record.image_title)
    assert [re.sub(r"\s+\d+%$", "", chip) for chip in opened.locator(".chip").all_inner_texts()] == record.food_items + record.drink_items
    expect(opened.locator(".answer p")).to_have_text(re.compile(r"\d+% sure · \d+\.\d s"))
    shot(opened, "answer")
    assert opened.foreign == [], "the page fetches nothing from elsewhere"


def test_an_example_is_answered(opened, tuned):
    first = next(scene for scene in scenes.draw_scenes(7, "test", 20) if scene.record.is_food)
    opened.locator(".gallery-item").first.click()
    assert answer_on_screen(opened) == tuned.extract(first.image).model_dump()


def test_before_and_after(opened, drawing):
    opened.get_by_role("tab", name="Before / after").click()
    drop(opened, drawing[1], "Picture to compare")
    expect(opened.locator(".pair section")).to_have_count(2, timeout=WAIT)
    expect(opened.locator(".pair .wrong")).to_contain_text("not JSON")
    expect(opened.locator(".pair .right")).to_have_text("✓ strict JSON")
    shot(opened, "before_after")


def test_a_batch_of_five_with_a_broken_one(opened, tmp_path, tuned):
    made = list(scenes.draw_scenes(8, "test", 4))
    files = [tmp_path / f"{name}.png" for name in ("a", "b", "c", "d", "e")]
    for file, scene in zip((files[0], files[1], files[3], files[4]), made, strict=True):
        scene.image.save(file)
    files[2].write_bytes(b"no picture at all")
    opened.get_by_role("tab", name="Many pictures").click()
    drop(opened, files, "Pictures")
    expect(opened.get_by_text("e.png").or_(opened.get_by_text("e", exact=True)).first).to_be_visible(timeout=WAIT)
    opened.get_by_role("button", name="What is in them?").click()
    expect(opened.get_by_text("not a picture in a format we read").filter(visible=True).first).to_be_visible(timeout=WAIT)
    shot(opened, "batch")
    with opened.expect_download() as download:
        opened.get_by_role("button", name="Download JSON lines").or_(opened.get_by_role("link", name="Download JSON lines")).first.click()
    rows = [json.loads(line) for line in download.value.path().read_text().splitlines()]
    assert [row["file"] for row in rows] == [file.name for file in files]
    assert "error" in rows[2]
    answered = [{key: row[key] for key in ("is_food", "image_title", "food_items", "drink_items")} for row in rows if "error" not in row]
    assert answered == [record.model_dump() for record in tuned.extract_many([scene.image for scene in made])]


def test_by_keyboard_alone(opened, drawing, tuned):
    """Tab to the upload, choose a file with Enter, tab on to the button, press it; then on to the next tab."""

    def until(name):
        for _ in range(60):
            opened.keyboard.press("Tab")
            label = opened.locator("button:focus, a:focus, input:focus").evaluate_all(
                "found => found.map(element => element.innerText + ' ' + (element.getAttribute('aria-label') || '')).join()"
            )  # never the page itself, which has the focus after its last control, and every text in it
            if re.search(name, label, re.IGNORECASE):
                return
        raise AssertionError(f"sixty times Tab did not lead to {name}")

    opened.on("filechooser", lambda chooser: None)  # long before Enter: who begins to listen as it is pressed may come too late
    expect(opened.get_by_text("Click to Upload").first).to_be_visible(timeout=WAIT)  # comes a moment after the heading
    until("click to upload")
    with opened.expect_file_chooser(timeout=WAIT) as chooser:
        opened.keyboard.press("Enter")
    chooser.value.set_files(drawing[1])
    record = tuned.extract(drawing[0].image).model_dump()
    assert answer_on_screen(opened) == record
    until("What is in it")
    opened.keyboard.press("Enter")
    assert answer_on_screen(opened) == record
    until("Before / after")
    opened.keyboard.press("Enter")
    expect(opened.get_by_role("button", name="Compare")).to_be_visible()


@pytest.mark.parametrize(
    "opened",
    [{"viewport": {"width": 390, "height": 844}, "has_touch": True, "color_scheme": scheme} for scheme in ("light", "dark")],
    indirect=True,
    ids=["phone", "phone-dark"],
)
def test_on_a_phone_nothing_sticks_out(opened, drawing, request):
    drop(opened, drawing[1])
    answer_on_screen(opened)
    names = ["One picture", "Before / after", "Many pictures", "How good is it?", "For programs"]
    for number, name in enumerate(names):
        tab = opened.get_by_role("tab", name=name)
        if not tab.is_visible():
            opened.locator(".overflow-menu > button").click()
            tab = opened.locator(".overflow-dropdown button", has_text=name)
        tab.click()
        assert opened.evaluate("document.documentElement.scrollWidth") <= 390, name
        shot(opened, f"{request.node.callspec.id}-{number + 1}")


def test_error_messages_are_friendly(opened, tmp_path):
    problem = opened.locator(".problem")
    opened.get_by_role("button", name="What is in it?").click()
    expect(problem).to_contain_text("There is no picture yet", timeout=WAIT)
    expect(problem).to_have_attribute("role", "alert")
    (tmp_path / "text.png").write_text("this is no picture")
    drop(opened, tmp_path / "text.png")
    expect(problem).to_contain_text("Not a picture in a format we read", timeout=WAIT)
    shot(opened, "no_picture")
    side = int(MAX_PIXELS**0.5) + 100
    Image.new("1", (side, side)).save(tmp_path / "huge.png")
    opened.reload()
    drop(opened, tmp_path / "huge.png")
    expect(problem).to_contain_text("megapixels are more than", timeout=WAIT)
    (tmp_path / "heavy.jpg").write_bytes(b"\xff\xd8" + bytes(21 * 2**20))
    opened.reload()
    drop(opened, tmp_path / "heavy.jpg")
    expect(opened.locator(".toast-body").last).to_contain_text("exceed the maximum allowed size of 20", timeout=WAIT)
    shot(opened, "too_large")
