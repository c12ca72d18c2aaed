"""The Space in a browser: a headless Chromium drops images, presses keys and reads the answers off the screen.

Screenshots go to outputs/screens/. Without a browser these tests are skipped; if REQUIRE_BROWSER is set, as in CI, they
fail instead.
"""

import base64
import csv
import json
import os
import re
import shutil
from functools import partial
from pathlib import Path

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import expect, sync_playwright

from foodextract.data import scenes
from foodextract.images import MAX_PIXELS, open_image
from foodextract.schema import FoodRecord

SCREENS = Path(__file__).parents[1] / "outputs" / "screens"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CAMERA = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")  # a moving test image
WAIT = 60_000  # milliseconds that a slow machine may take
TABS = ("One image", "Before / after", "Many images", "How good is it?", "For programs")
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True}


@pytest.fixture(scope="module")
def browser():
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        (pytest.fail if os.environ.get("REQUIRE_BROWSER") else pytest.skip)(
            f"no browser: none of {', '.join(BROWSERS)} is installed"
        )
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=found, args=["--no-sandbox", *CAMERA])


@pytest.fixture(params=[{"width": 1280, "height": 900}], ids=["desktop"])
def opened(browser, page, request):
    """The page in a new window; `param` holds options of the window."""
    options = request.param if "viewport" in request.param else {"viewport": request.param}
    context = browser.new_context(
        accept_downloads=True, permissions=["camera", "clipboard-read", "clipboard-write"], **options
    )
    tab = context.new_page()
    tab.set_default_timeout(WAIT)
    tab.foreign = []
    tab.on(
        "request",
        lambda request: (
            tab.foreign.append(request.url) if not request.url.startswith((page, "data:", "blob:")) else None
        ),
    )
    tab.goto(page)
    expect(tab.get_by_role("heading", name="FoodExtract Vision")).to_be_visible(timeout=WAIT)
    yield tab
    context.close()


@pytest.fixture
def drawing(tmp_path):
    """A drawing of food and drink, and its file."""
    scene = next(
        scene for scene in scenes.draw_scenes(7, "test", 99) if scene.record.food_items and scene.record.drink_items
    )
    scene.image.save(tmp_path / "lunch.png")
    return scene, tmp_path / "lunch.png"


def shot(tab, name):
    SCREENS.mkdir(parents=True, exist_ok=True)
    tab.screenshot(path=SCREENS / f"{name}.png", full_page=True)


def drop(tab, file, label="Image"):
    """Choose files for the input with this label."""
    place = tab.locator(".block", has=tab.get_by_text(label, exact=True)).filter(has=tab.locator("input[type=file]"))
    place.locator("input[type=file]").first.set_input_files(file)


def answer_on_screen(tab):
    """Wait for the JSON under the image and parse it."""
    code = tab.locator(".cm-content").first
    expect(code).to_contain_text("is_food", timeout=WAIT)
    return json.loads(code.inner_text())


def choose_tab(tab, name):
    """Open a tab, from the menu where the window is too narrow for all."""
    button = tab.get_by_role("tab", name=name)
    if not button.is_visible():
        tab.locator(".overflow-menu > button").click()
        button = tab.locator(".overflow-dropdown button", has_text=name)
    button.click()


def test_a_dropped_image_is_answered(opened, drawing, tuned):
    scene, file = drawing
    drop(opened, file)
    record = tuned.extract(scene.image)
    assert answer_on_screen(opened) == record.model_dump()
    expect(opened.locator(".answer h2")).to_have_text(record.image_title)
    assert [
        chip.strip() for chip in opened.locator(".chip").all_inner_texts()
    ] == record.food_items + record.drink_items
    expect(opened.locator(".answer p")).to_have_text(re.compile(r"Food or drink · \d+\.\d\ss"))
    shot(opened, "answer")
    assert opened.foreign == [], "the page fetches nothing from elsewhere"


@pytest.mark.slow
def test_an_example_is_answered(opened, tuned):
    first = next(scene for scene in scenes.draw_scenes(7, "test", 20) if scene.record.is_food)
    opened.get_by_role("button", name=f"drawing: {first.record.image_title}").first.click()
    assert answer_on_screen(opened) == tuned.extract(first.image).model_dump()


def test_before_and_after(opened, drawing):
    opened.get_by_role("tab", name="Before / after").click()
    drop(opened, drawing[1], "Image to compare")
    expect(opened.locator(".pair section")).to_have_count(2, timeout=WAIT)
    expect(opened.locator(".pair .wrong")).to_contain_text("not JSON")
    expect(opened.locator(".pair .right")).to_have_text("✓ strict JSON")
    shot(opened, "before_after")


def as_data_transfer(tab, file, media_type="image/png"):
    """Return the data transfer of a dragged file."""
    return tab.evaluate_handle(
        """([data, name, type]) => {
            const bytes = Uint8Array.from(atob(data), one => one.charCodeAt(0)), transfer = new DataTransfer();
            transfer.items.add(new File([bytes], name, {type}));
            return transfer;
        }""",
        [base64.b64encode(file.read_bytes()).decode(), file.name, media_type],
    )


@pytest.mark.slow
def test_an_image_can_be_dragged(opened, drawing, tuned):
    opened.get_by_label("Drop an image file here to upload").first.dispatch_event(
        "drop", {"dataTransfer": as_data_transfer(opened, drawing[1])}
    )
    assert answer_on_screen(opened) == tuned.extract(drawing[0].image).model_dump()


@pytest.mark.parametrize("how", ["dropped", "chosen"])
def test_a_heic_of_a_phone_is_answered_and_shown(opened, heic, tuned, how):
    """Chromium cannot show it and gives it no type. A download is the file itself."""
    heic = Path(heic)
    if how == "chosen":
        drop(opened, heic)
    else:
        opened.get_by_label("Drop an image file here to upload").first.dispatch_event(
            "drop", {"dataTransfer": as_data_transfer(opened, heic, media_type="")}
        )
    assert answer_on_screen(opened) == tuned.extract(heic).model_dump()
    preview = opened.locator("img[src$='IMG_0001.HEIC']").first
    expect(preview).to_be_visible(timeout=WAIT)
    width, height = preview.evaluate("image => image.decode().then(() => [image.naturalWidth, image.naturalHeight])")
    upright = open_image(heic)
    assert width / height == pytest.approx(upright.width / upright.height, rel=0.01)
    assert httpx.get(preview.get_attribute("src"), trust_env=False).content == heic.read_bytes()


@pytest.mark.slow
def test_an_image_can_be_pasted(opened, drawing, tuned):
    transfer = as_data_transfer(opened, drawing[1])
    opened.evaluate(
        "transfer => navigator.clipboard.write([new ClipboardItem({'image/png': transfer.files[0]})])", transfer
    )
    opened.get_by_role("button", name="Paste from clipboard").first.click()
    assert answer_on_screen(opened) == tuned.extract(drawing[0].image).model_dump()


@pytest.mark.slow
def test_an_image_can_be_taken_with_the_camera(opened):
    opened.get_by_role("button", name="Capture from camera").first.click()
    opened.get_by_text("Click to Access Webcam").click()
    opened.wait_for_function("document.querySelector('video').videoWidth > 0")
    opened.get_by_role("button", name="capture photo").click()
    assert answer_on_screen(opened).keys() == FoodRecord.model_fields.keys()


@pytest.mark.slow
def test_the_json_can_be_copied(opened, drawing):
    drop(opened, drawing[1])
    record = answer_on_screen(opened)
    opened.locator("#json").get_by_role("button", name="Copy").click()
    assert FoodRecord.parse(opened.evaluate("navigator.clipboard.readText()")).model_dump() == record


def hold_back(tab, address):
    """Hold back requests. Returns a function that waits for the next one: handlers run only while Playwright waits."""
    held = []
    tab.route(address, lambda route: held.append(route))

    def next_one():
        while not held:
            tab.wait_for_timeout(50)
        return held.pop(0)

    return next_one


def second_question(opened, drawing):
    """Let the page answer, ask again, and hold the question back. Returns the button and the request."""
    drop(opened, drawing[1])
    answer_on_screen(opened)
    button, question = opened.get_by_role("button", name="What is in it?"), hold_back(opened, "**/queue/join*")
    expect(button).to_be_enabled(timeout=WAIT)
    button.click()
    return button, question()


@pytest.mark.slow
def test_an_old_answer_is_cleared_and_the_button_waits(opened, drawing, tuned):
    """While the browser holds the second question back, then after its answer."""
    button, held = second_question(opened, drawing)
    expect(opened.get_by_text("Looking …")).to_be_visible(timeout=WAIT)
    expect(opened.locator(".answer")).to_have_count(0)
    expect(opened.locator(".cm-content", has_text="is_food")).to_have_count(0)
    expect(button).to_be_disabled()
    held.continue_()
    expect(button).to_be_enabled(timeout=WAIT)
    assert answer_on_screen(opened) == tuned.extract(drawing[0].image).model_dump()


@pytest.mark.slow
def test_the_button_waits_no_longer_after_a_refusal(opened, drawing):
    button, held = second_question(opened, drawing)
    expect(button).to_be_disabled(timeout=WAIT)
    held.fulfill(status=503, json={"detail": "Queue is full."})
    expect(button).to_be_enabled(timeout=WAIT)
    expect(opened.get_by_text("Looking …")).to_have_count(0)
    expect(opened.get_by_text("Ask again in a minute")).to_be_visible()


@pytest.mark.slow
def test_an_image_replaced_while_it_waits_gets_the_last_word(opened, drawing, tuned):
    question = hold_back(opened, "**/queue/join*")
    opened.locator(".gallery-item").first.click()
    held = question()
    opened.get_by_role("button", name="Remove Image").first.click()
    drop(opened, drawing[1])
    expect(opened.locator("img[src*='lunch.png']").first).to_be_visible(timeout=WAIT)
    held.continue_()
    question().continue_()  # asked once the first is answered
    expect(opened.locator(".answer h2")).to_have_text(tuned.extract(drawing[0].image).image_title, timeout=WAIT)


@pytest.mark.slow
def test_a_link_leads_to_the_answer(opened, drawing):
    drop(opened, drawing[1])
    record = answer_on_screen(opened)
    opened.get_by_role("button", name="Copy a link to this answer").click()
    opened.wait_for_function("navigator.clipboard.readText().then(text => text.includes('deep_link='))")
    other = opened.context.new_page()
    other.goto(opened.evaluate("navigator.clipboard.readText()"))
    assert answer_on_screen(other) == record
    expect(other.locator(".answer h2")).to_have_text(record["image_title"])
    image = other.locator("[data-testid=image] img, .image-frame img").first
    expect(image).to_be_visible(timeout=WAIT)
    assert image.evaluate("image => image.decode().then(() => image.naturalWidth)") > 0


@pytest.mark.slow
def test_removing_an_image_removes_its_answer(opened, drawing):
    """And shows no error."""
    for name, label, answer in (("One image", "Image", ".answer"), ("Before / after", "Image to compare", ".pair")):
        opened.get_by_role("tab", name=name).click()
        waiting = opened.get_by_text("The answer appears here.").filter(visible=True)
        expect(waiting).to_be_visible()
        example = opened.locator(".gallery-item").filter(visible=True).first
        for give in (partial(drop, opened, drawing[1], label), example.click):
            give()
            expect(opened.locator(answer)).to_be_visible(timeout=WAIT)
            expect(waiting).to_be_hidden()
            opened.get_by_role("button", name="Remove Image").filter(visible=True).click()
            expect(waiting).to_be_visible(timeout=WAIT)
            expect(opened.locator(".problem")).to_have_count(0)


@pytest.mark.slow
def test_api_examples_have_the_url_of_this_page(opened, page):
    opened.get_by_role("tab", name="For programs").click()
    expect(opened.get_by_text(f"{page}gradio_api/mcp/").filter(visible=True)).to_be_visible()
    assert "127.0.0.1:7860" not in opened.locator("body").inner_text()


@pytest.mark.slow
def test_a_full_queue_is_a_friendly_message(opened):
    """The browser fakes the server's 503, which test_demo.py provokes."""
    opened.route(
        "**/queue/join*",
        lambda route: route.fulfill(status=503, json={"detail": "Queue is full. Max size is 64 and size is 64."}),
    )
    opened.get_by_role("button", name="What is in it?").click()
    expect(opened.locator(".toast-body").last).to_contain_text("currently busy. Please try again", timeout=WAIT)


@pytest.mark.slow
def test_a_page_without_a_model_says_why(browser, page_without_model):
    tab = browser.new_page()
    tab.goto(page_without_model)
    expect(tab.get_by_text("The model cannot be loaded, so nothing here can answer.")).to_be_visible(timeout=WAIT)
    tab.get_by_role("button", name="What is in it?").click()
    expect(tab.locator(".problem")).to_contain_text("folder is neither a folder nor a Hub id", timeout=WAIT)
    assert "/no/such" not in tab.content()
    tab.close()


WATCH = """() => {  // notes each state of the line above the table
    window.seen = [];
    new MutationObserver(() => {
        const line = document.querySelector('.batch [role=status]')?.innerText;
        if (line && line !== seen.at(-1)) seen.push(line);
    }).observe(document.body, {childList: true, subtree: true, characterData: true});
}"""


@pytest.mark.slow
@pytest.mark.parametrize("opened", [PHONE], indirect=True, ids=["phone"])
def test_a_batch_is_cards_on_a_phone(opened, drawing):
    choose_tab(opened, "Many images")
    drop(opened, drawing[1], "Images")
    opened.get_by_role("button", name="What is in them?").click()
    card = opened.locator(".batch tbody tr")
    expect(card).to_have_count(1, timeout=WAIT)
    expect(opened.locator(".batch thead")).to_be_hidden()
    cells = card.locator("td[data-label]")
    assert [cell.get_attribute("data-label") for cell in cells.all()] == ["food or drink", "title", "foods", "drinks"]
    assert "none" not in cells.evaluate_all("cells => cells.map(cell => getComputedStyle(cell, '::before').content)")
    boxes = [cell.bounding_box() for cell in cells.all()]
    assert all(box["x"] >= 0 and box["x"] + box["width"] <= 390 for box in boxes)
    assert [box["y"] for box in boxes] == sorted({box["y"] for box in boxes}), "one below the other"


@pytest.mark.slow
def test_a_batch_with_a_broken_and_a_large_file(opened, tmp_path, tuned):
    made = list(scenes.draw_scenes(8, "test", 4))
    files = [tmp_path / f"{name}.png" for name in ("a", "b", "c", "d", "e", "f")]
    for file, scene in zip((files[0], files[1], files[3], files[4]), made, strict=True):
        scene.image.save(file)
    files[2].write_bytes(b"no image at all")
    files[5].write_bytes(b"\xff\xd8" + bytes(21 * 2**20))
    opened.get_by_role("tab", name="Many images").click()
    drop(opened, files, "Images")
    expect(opened.get_by_text("f.png").or_(opened.get_by_text("f", exact=True)).first).to_be_visible(timeout=WAIT)
    opened.evaluate(WATCH)
    opened.get_by_role("button", name="What is in them?").click()
    expect(opened.get_by_text("not an image in a format we read").filter(visible=True).first).to_be_visible(
        timeout=WAIT
    )
    expect(opened.get_by_role("status").filter(has_text="6 of 6 images answered")).to_be_visible(timeout=WAIT)
    assert opened.evaluate("seen")[0] == "1 of 6 images answered"
    assert len(opened.evaluate("seen")) > 2, "rows come one by one"
    expect(opened.locator(".batch img")).to_have_count(4)
    shot(opened, "batch")

    def downloaded(form):
        name = f"Download {form}"
        with opened.expect_download() as download:
            opened.get_by_role("button", name=name).or_(opened.get_by_role("link", name=name)).first.click()
        return download.value.path().read_text().splitlines()

    rows = [json.loads(line) for line in downloaded("JSON lines")]
    cells = list(csv.DictReader(downloaded("CSV")))
    assert [(cell["file"], bool(cell["error"])) for cell in cells] == [(row["file"], "error" in row) for row in rows]
    assert [row["file"] for row in rows] == [file.name for file in files]
    assert "format" in rows[2]["error"]
    assert rows[5]["error"] == "the file f.png is larger than 20 MB: shrink it first"
    answered = [
        {key: row[key] for key in ("is_food", "image_title", "food_items", "drink_items")}
        for row in rows
        if "error" not in row
    ]
    assert answered == [record.model_dump() for record in tuned.extract_many([scene.image for scene in made])]


@pytest.mark.slow
def test_keyboard_alone_is_enough(opened, drawing, tuned):
    """Tab to the upload, choose a file with Enter, tab on to the button, press it; then on to the next tab."""

    def until(name):
        for _ in range(60):
            opened.keyboard.press("Tab")
            label = opened.locator("button:focus, a:focus, input:focus").evaluate_all(
                "found => found.map(one => one.innerText + ' ' + (one.getAttribute('aria-label') || '')).join()"
            )  # not the page itself, which has the focus after its last control
            if re.search(name, label, re.IGNORECASE):
                return
        raise AssertionError(f"sixty times Tab did not lead to {name}")

    opened.on(
        "filechooser", lambda chooser: None
    )  # long before Enter: who begins to listen as it is pressed may come too late
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "opened",
    [PHONE | {"color_scheme": scheme} for scheme in ("light", "dark")],
    indirect=True,
    ids=["phone", "phone-dark"],
)
def test_nothing_overflows_on_a_phone(opened, drawing, request):
    drop(opened, drawing[1])
    answer_on_screen(opened)
    for number, name in enumerate(TABS):
        choose_tab(opened, name)
        assert opened.evaluate("document.documentElement.scrollWidth") <= 390, name
        shot(opened, f"{request.node.callspec.id}-{number + 1}")


@pytest.mark.slow
@pytest.mark.parametrize(
    "opened",
    [
        {"viewport": {"width": width, "height": 900}, "color_scheme": scheme}
        for width in (1440, 390)
        for scheme in ("light", "dark")
    ],
    indirect=True,
    ids=["desktop-light", "desktop-dark", "phone-light", "phone-dark"],
)
def test_every_tab_is_accessible(opened, drawing):
    """axe-core has no finding of impact "serious" or "critical", and headings are in order."""
    drop(opened, drawing[1])
    answer_on_screen(opened)
    for name in TABS:
        choose_tab(opened, name)
        if name == "Before / after":
            drop(opened, drawing[1], "Image to compare")
            expect(opened.locator(".pair section")).to_have_count(2, timeout=WAIT)
        if name == "Many images":
            drop(opened, drawing[1], "Images")
            opened.get_by_role("button", name="What is in them?").click()
            expect(opened.locator(".batch tbody tr")).to_have_count(1, timeout=WAIT)
        opened.wait_for_timeout(1000)  # it fades in
        found = Axe().run(opened).response["violations"]
        serious = [one for one in found if one["impact"] in ("serious", "critical") or one["id"] == "heading-order"]
        assert not serious, [(name, one["id"], [node["html"] for node in one["nodes"]]) for one in serious]


CONTRAST = """texts => {
    const brush = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
    const over = (color, ground) => {
        brush.fillStyle = `rgb(${ground})`;
        brush.fillRect(0, 0, 1, 1);
        brush.fillStyle = color;
        brush.fillRect(0, 0, 1, 1);
        return [...brush.getImageData(0, 0, 1, 1).data].slice(0, 3);
    };
    const ground = one =>
        one ? over(getComputedStyle(one).backgroundColor, ground(one.parentElement)) : [255, 255, 255];
    const linear = one => one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4;
    const light = rgb => rgb.reduce((sum, one, at) => sum + linear(one / 255) * [0.2126, 0.7152, 0.0722][at], 0);
    const contrast = text => {
        const colors = [over(getComputedStyle(text).color, ground(text)), ground(text)];
        const [low, high] = colors.map(light).sort((a, b) => a - b);
        return (high + 0.05) / (low + 0.05);
    };
    return {page: light(ground(document.body)), worst: Math.min(...texts.map(contrast)), texts: texts.length};
}"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "opened",
    [{"viewport": {"width": 1280, "height": 900}, "color_scheme": name} for name in ("light", "dark")],
    indirect=True,
)
def test_answers_are_readable_in_light_and_dark_mode(opened, drawing, request):
    drop(opened, drawing[1])
    answer_on_screen(opened)
    opened.wait_for_timeout(1000)  # it fades in
    measured = opened.locator(".answer :is(h2, h3, p, li)").evaluate_all(CONTRAST)
    assert measured["texts"] >= 6
    assert measured["worst"] >= 4.5
    shot(opened, scheme := request.node.callspec.params["opened"]["color_scheme"])
    assert (measured["page"] < 0.1) if scheme == "dark" else (measured["page"] > 0.8)


@pytest.mark.slow
def test_error_messages_are_friendly(opened, tmp_path):
    problem = opened.locator(".problem")
    opened.get_by_role("button", name="What is in it?").click()
    expect(problem).to_contain_text("There is no image yet", timeout=WAIT)
    expect(problem).to_have_attribute("role", "alert")
    (tmp_path / "text.png").write_text("this is no image")
    drop(opened, tmp_path / "text.png")
    expect(problem).to_contain_text("Not an image in a format we read", timeout=WAIT)
    shot(opened, "no_image")
    side = int(MAX_PIXELS**0.5) + 100
    Image.new("1", (side, side)).save(tmp_path / "huge.png")
    opened.reload()
    drop(opened, tmp_path / "huge.png")
    expect(problem).to_contain_text("megapixels are more than", timeout=WAIT)
    (tmp_path / "heavy.jpg").write_bytes(b"\xff\xd8" + bytes(21 * 2**20))
    opened.reload()
    drop(opened, tmp_path / "heavy.jpg")
    expect(problem).to_contain_text("The file heavy.jpg is larger than 20 MB: shrink it first", timeout=WAIT)
    shot(opened, "too_large")


@pytest.mark.slow
def test_an_upload_after_an_example_is_checked_too(opened, tmp_path):
    opened.locator(".gallery-item").first.click()
    answer_on_screen(opened)
    opened.get_by_role("button", name="Remove Image").first.click()
    (tmp_path / "text.png").write_text("this is no image")
    drop(opened, tmp_path / "text.png")
    expect(opened.locator(".problem")).to_contain_text("Not an image in a format we read", timeout=WAIT)
