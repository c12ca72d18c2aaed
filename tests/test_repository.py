"""README, notebooks, figures and the bundled model must agree with each other."""

import json
import re
from pathlib import Path

import pytest

import pages
from foodextract.data import scenes
from foodextract.evaluation import evaluate
from foodextract.evaluation.results import read_results
from foodextract.inference.extractor import Extractor
from foodextract.models.loading import TINY_BASE
from foodextract.names import GITHUB, HUB_DATASET, HUB_MODEL, HUB_PUBLISHED_DATASET, HUB_SPACE

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted([*ROOT.glob("*.ipynb"), *ROOT.glob("experiments/*.ipynb")])
PAGES = [page for where in ("", "[!.]*/", "demos/*/", "src/**/") for page in ROOT.glob(f"{where}*.md")]
PAGES = [page for page in PAGES if page.parent.name != "templates"]
OFFLINE = ROOT / "results" / "offline.json"


def figures_of(path, subject):
    return {row.metric: row for row in read_results(path) if row.subject == subject}


@pytest.mark.docs
def test_results_have_the_one_format():
    files = sorted((ROOT / "results").glob("*.json"))
    assert OFFLINE in files
    for file in files:
        for row in read_results(file):
            assert row.n >= 1
            assert row.command
            assert row.low is None or row.low <= row.value <= row.high, (file.name, row)


@pytest.mark.docs
def test_the_tuned_model_writes_json_and_the_base_does_not():
    base, tuned = figures_of(OFFLINE, "base"), figures_of(OFFLINE, "stage2")
    assert tuned["strict_json_rate"].n >= 400
    assert base["strict_json_rate"].high <= 0.05
    assert tuned["strict_json_rate"].low >= 0.97
    assert tuned["is_food_accuracy"].low >= 0.95
    assert tuned["item_f1_micro"].low >= 0.85
    assert figures_of(OFFLINE, "stage2 constrained")["strict_json_rate"].value == 1


@pytest.mark.docs
@pytest.mark.parametrize(
    ("metric", "target"), [("strict_json_rate", 0.99), ("is_food_accuracy", 0.97), ("item_f1_micro", 0.85)]
)
def test_offline_figures_meet_their_targets(metric, target):
    assert figures_of(OFFLINE, "stage2")[metric].value >= target


@pytest.mark.docs
def test_extract_keeps_the_items_of_a_repr_checkpoint_and_the_answers_of_a_json_one():
    path = ROOT / "results" / "dialects.json"
    lenient = figures_of(path, "repr free")["item_f1_micro_lenient"]
    guided, under_json = (figures_of(path, f"repr {way}")["item_f1_micro"] for way in ("extract", "JSON grammar"))
    assert guided.low <= lenient.value <= guided.high
    assert under_json.high < guided.low
    assert lenient.value >= 0.8
    same = [
        {name: row.value for name, row in figures_of(path, f"json {way}").items()}
        for way in ("extract", "JSON grammar")
    ]
    assert same[0] == same[1]


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """The held-out scenes of `make demo`."""
    found = list(scenes.draw_scenes(42, "test", 600))
    return [scene.record for scene in found], [scene.image for scene in found]


def scored(extractor, held_out):
    labels, images = held_out
    texts = evaluate.predict(extractor.generate_texts, images, 50)
    return {metric.name: metric for metric in evaluate.score(labels, texts)}


@pytest.mark.slow
def test_bundled_model_answers_as_make_demo_measured(tuned, held_out):
    """Its figures lie within the intervals that `make demo` wrote, so a regression of its answers shows here."""
    found = scored(tuned, held_out)
    measured = {name: row for name, row in figures_of(OFFLINE, "stage2").items() if name in found}
    assert {"strict_json_rate", "is_food_accuracy", "item_f1_micro"} <= set(measured)
    for name, row in measured.items():
        assert row.n == found[name].n
        assert row.low <= found[name].value <= row.high, name


def test_bundled_base_does_not_write_json(held_out):
    labels, images = held_out
    found = scored(Extractor.from_pretrained(TINY_BASE, "cpu"), (labels[:100], images[:100]))
    assert found["schema_valid_rate"].value == figures_of(OFFLINE, "base")["schema_valid_rate"].value


@pytest.mark.docs
@pytest.mark.parametrize("page", pages.PAGES)
def test_pages_show_the_measured_figures(page):
    text = (ROOT / page).read_text()
    for name, render in pages.PAGES[page].items():
        assert f"<!-- {name} -->\n{render(ROOT)}\n<!-- /{name} -->" in text, (
            f"run `python tools/pages.py`: {name} is outdated"
        )


@pytest.mark.docs
def test_readme_is_short_and_names_its_commands():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    for command in ("make demo", "make test", "foodextract extract"):
        assert command in text


def anchors_of(page):
    """The anchors that GitHub gives to the headings of a page."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.docs
@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!http)([^)]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target), link


@pytest.mark.docs
def test_contributing_lists_every_module():
    package = ROOT / "src" / "foodextract"
    modules = [path.name for path in package.rglob("*.py") if not path.name.startswith("__")]
    listed = re.findall(r"^ +(\w+\.py) +#", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(modules)


@pytest.mark.docs
@pytest.mark.parametrize("page", [*PAGES, ROOT / "CITATION.cff"], ids=lambda path: str(path.relative_to(ROOT)))
def test_addresses_are_those_of_the_project(page):
    text = page.read_text()
    assert set(re.findall(r"github(?:\.com)?/(berk[\w-]*/[\w-]+)", text)) <= {GITHUB}
    hub = {HUB_MODEL, HUB_SPACE, HUB_DATASET, HUB_PUBLISHED_DATASET}
    assert set(re.findall(r"huggingface\.co/(?:spaces/|datasets/)?(berk[\w-]*/[\w-]+)", text)) <= hub


@pytest.mark.docs
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook_hygiene(path):
    notebook = json.loads(path.read_text())
    cells = notebook["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    first = "".join(cells[0]["source"])
    assert cells[0]["cell_type"] == "markdown"
    assert first.startswith("# ")
    assert f"colab.research.google.com/github/{GITHUB}/blob/main/{path.relative_to(ROOT)}" in first
    assert "profile `offline`" in first
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert not [out for cell in code for out in cell["outputs"] if out["output_type"] == "error"]
    assert sum("parameters" in cell["metadata"].get("tags", []) for cell in code) == 1
    assert max(len(cell["source"]) for cell in code) <= 25
    assert not any("%%writefile" in "".join(cell["source"]) for cell in code)
    assert "widgets" not in notebook["metadata"]
    assert path.stat().st_size <= 800_000
    assert "application/vnd.jupyter.widget" not in path.read_text()
    for out in (out for cell in code for out in cell["outputs"]):  # in the letters of an image any short path may stand
        out["data"] = {kind: what for kind, what in out.get("data", {}).items() if not kind.startswith("image/")}
    assert str(ROOT.parent) not in json.dumps(notebook)


def test_filling_a_marker_is_idempotent(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- x -->\nold\n<!-- /x -->\nb\n")
    for _ in range(2):
        pages.fill_in(page, "x", r"new \1")
        assert page.read_text() == "a\n<!-- x -->\nnew \\1\n<!-- /x -->\nb\n"
    with pytest.raises(ValueError, match="no marker named y"):
        pages.fill_in(page, "y", "")
