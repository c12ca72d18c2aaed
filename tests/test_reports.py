"""Tables, sentences and figures, from rows and answers whose rendering is known."""

import base64
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

import ablation
import baselines
import comparison
import page_tables
import pages
from foodextract.evaluation import evaluate
from foodextract.evaluation.calibration import Bin
from foodextract.evaluation.results import Row, make_row, read_results, write_results
from foodextract.evaluation.scoring import Counts
from foodextract.reporting import figures, tables
from foodextract.schema import FoodRecord

ROOT = Path(__file__).parents[1]
NOTHING = FoodRecord(is_food=0, image_title="", food_items=[], drink_items=[])
PIE = FoodRecord(is_food=1, image_title="pie", food_items=["pie"], drink_items=[])
TEA = FoodRecord(is_food=1, image_title="tea", food_items=[], drink_items=["tea"])


def row(subject, metric, value, low=None, high=None, n=9, unit="share"):
    return make_row("b", subject, metric, value, low=low, high=high, n=n, unit=unit, command="c")


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def test_table_shows_every_figure_with_its_interval(tmp_path):
    write_results(
        tmp_path / "r.json",
        [row("base", "is_food_accuracy", 0.5, 0.4, 0.6), row("base | 1 item", "is_food_accuracy", 0.1)],
    )
    assert tables.metric_table(read_results(tmp_path / "r.json")).splitlines() == [
        "| n = 9 | base |",
        "| --- | --- |",
        "| `is_food` accuracy | 50.0 % (40.0–60.0) |",
    ]
    assert list(Row.__dataclass_fields__) == list(json.loads((tmp_path / "r.json").read_text())[0])


def test_cells_are_formatted_by_unit():
    rows = [
        row("base", "answer_characters", 77.8, 73.6, 82.2, unit="characters"),
        row("base", "is_food_mcc", -0.25, -0.5, 0, unit="correlation"),
        row("base", "is_food_balanced_accuracy", 0.5),
    ]
    table = tables.metric_table(rows, tables.MORE_NAMES)
    assert "| characters per answer | 78 (74–82) |" in table
    assert "| `is_food` correlation (MCC) | -0.250 (-0.500–0.000) |" in table
    assert "| `is_food` balanced accuracy | 50.0 % |" in table


def test_mode_table_has_two_columns_per_subject():
    rows = [
        row("base", "strict_json_rate", 0),
        row("stage2", "strict_json_rate", 0.9),
        row("stage2 constrained", "strict_json_rate", 1),
    ]
    assert page_tables.mode_table(rows, metrics=["strict_json_rate"]).splitlines() == [
        "|  | base, free | base, constrained | after stage 2, free | after stage 2, constrained |",
        "| --- | --- | --- | --- | --- |",
        "| strict JSON that fits the schema | 0.0 % | – | 90.0 % | 100.0 % |",
    ]
    assert "after stage 2, constrained" in tables.metric_table(rows)


def test_item_table_has_micro_and_macro_exact_and_soft():
    rows = evaluate.to_rows("b", "base", evaluate.score([PIE, TEA], [PIE.to_json(), PIE.to_json()]), "c")
    head, _, *lines = tables.item_table(rows, "base").splitlines()
    assert (
        head == "| base | precision, micro | recall, micro | F1, micro | precision, macro | recall, macro | F1, macro |"
    )
    assert [line.split(" | ")[0] for line in lines] == [
        f"| {name}, {match}" for name in ("food and drink", "food", "drink") for match in ("exact", "similar spelling")
    ]
    assert lines[0].startswith("| food and drink, exact | 0.500 (")


def test_group_table_has_one_line_per_group():
    groups = baselines.breakdown([PIE, TEA, TEA], [PIE.to_json()] * 3, ["b", "a", "a"])
    rows = [r for group, metrics in groups.items() for r in evaluate.to_rows("b", f"base | {group}", metrics, "c")]
    lines = page_tables.group_table(rows, "item_f1_micro").splitlines()
    assert lines[0] == "| item F1 (micro, exact name) | base |"
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| a, n = 2", "| b, n = 1"]
    assert lines[3].endswith("| 1.000 (1.000–1.000) |")


def test_difference_table_has_interval_and_p():
    differences = comparison.compare(
        [PIE, TEA] * 6, [PIE.to_json(), TEA.to_json()] * 6, [PIE.to_json()] * 12, metrics=["item_f1_micro"]
    )
    rows = comparison.difference_rows("b", "tuned minus nearest", differences, "c")
    [head, _, line] = page_tables.difference_table(rows).splitlines()
    assert head == "|  | tuned minus nearest image |"
    assert line.startswith("| item F1 (micro, exact name) | +0.500 (+0.")
    assert "p = 0.031" in line  # 2 of the 64 ways to exchange the 6 pairs that differ
    rate = [
        row("a minus b", "is_food_accuracy_difference", -0.125, -0.2, -0.05),
        row("a minus b", "is_food_accuracy_p", 0.0001),
    ]
    assert "| -12.5 points (-20.0 to -5.0), p < 0.001 |" in page_tables.difference_table(rate)


def test_baselines_are_free_in_one_table_and_by_mode_in_another():
    subjects = ("majority", "base", "base constrained", "tuned", "tuned constrained")
    rows = [row(subject, "strict_json_rate", 0.5, 0.4, 0.6) for subject in subjects]
    headers = [line for line in page_tables.baselines(rows).splitlines() if "base" in line]
    assert headers == [
        "| n = 9 | majority | base | tuned |",
        "|  | base, free | base, constrained | tuned, free | tuned, constrained |",
    ]


def test_every_metric_is_shown_on_some_page(tmp_path):
    metrics = evaluate.score([PIE, TEA, NOTHING], [PIE.to_json(), PIE.to_json(), NOTHING.to_json()])
    rows = [r for subject in ("base", "stage2", "tuned") for r in evaluate.to_rows("b", subject, metrics, "c")]
    rows += [replace(r, subject="tuned | 1 item") for r in rows if r.subject == "tuned"]
    (tmp_path / "results").mkdir()
    write_results(tmp_path / "results" / "offline.json", rows)
    offline = pages.offline_table(tmp_path) + page_tables.offline_in_full(rows)
    for text in (offline, page_tables.baselines(rows) + page_tables.baselines_in_full(rows)):
        for metric in metrics:
            if not re.match("(item|food|drink)_(precision|recall|f1)", metric.name):  # those have a table of their own
                assert page_tables.ALL_NAMES[metric.name] in text, metric.name
        assert "| drink, similar spelling |" in text
    assert "| 1 item, n = 3 |" in text


def test_readme_table_has_at_most_six_rows():
    assert len(pages.offline_table(ROOT).splitlines()) <= 2 + 6


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        ((0.80, 0.85), (0.84, 0.90), "no measurable difference, the intervals overlap"),
        ((0.80, 0.85), (0.86, 0.90), "better"),
        ((0.80, 0.85), (0.70, 0.79), "worse"),
    ],
)
def test_stage_comparison_claims_only_what_the_intervals_show(before, after, verdict):
    rows = [
        row(stage, metric, sum(bounds) / 2, *bounds)
        for stage, bounds in (("stage1", before), ("stage2", after))
        for metric in ("item_f1_micro", "hallucination_rate")
    ]
    items, invented = tables.stage_comparison(rows).split(". The ")
    assert items.endswith(f"n = 9: {verdict}")
    assert items.startswith("Item F1 is 0.825 (0.800–0.850) after stage 1")
    opposite = {"better": "worse", "worse": "better"}.get(verdict, verdict)  # fewer invented items are better
    assert invented.endswith(f"n = 9: {opposite}.")
    assert tables.stage_comparison([row("stage1", "item_f1_micro", 0.5, 0.4, 0.6)]) == ""


def test_effect_table_shows_differences_below_means():
    rows = [
        row("reference", "item_f1_micro", 0.5, 0.4, 0.6, n=3),
        row("5 tiles", "item_f1_micro", 0.625, 0.5, 0.75, n=3),
        row("5 tiles minus reference", "item_f1_micro_difference", 0.125, -0.05, 0.3, n=3),
        row("5 tiles | seed 1", "item_f1_micro", 0.6, 0.5, 0.7),
    ]
    lines = page_tables.effect_table(rows).splitlines()
    assert lines[0].startswith("| 3 seeds | against | strict JSON that fits the schema |")
    assert lines[2] == "| reference |  | – | – | 0.500 (0.400–0.600) | – |"
    assert lines[3] == "| 5 tiles | reference | – | – | 0.625 (0.500–0.750)<br>+0.125 (-0.050 to +0.300) | – |"
    [axis] = ablation.effects(rows, "item_f1_micro").axes
    assert [tick.get_text() for tick in axis.get_yticklabels()] == ["5 tiles minus reference"]


def test_effect_sentences_claim_only_what_the_intervals_show():
    def change(metric, value, low, high):
        return row("LoRA minus one stage", f"{metric}_difference", value, low, high, n=3)

    rows = [row("LoRA", "strict_json_rate", 0.5, 0.4, 0.6, n=3), change("strict_json_rate", -0.25, -0.5, 0.0)]
    assert page_tables.effect_sentences([*rows, change("item_f1_micro_lenient", -0.2, -0.3, -0.1)]) == (
        "- **LoRA** instead of *one stage*: strict JSON -25.0 points (-50.0 to +0.0), no difference shown; "
        "item F1 (lenient parser) -0.200 (-0.300 to -0.100), worse."
    )
    assert page_tables.effect_sentences([*rows, change("item_f1_micro_lenient", 0.2, 0.1, 0.3)]).endswith(", better.")


def test_outcome_table_has_one_line_per_subject():
    rows = [
        row("base", "strict_json_rate", 0),
        row("tuned", "loss_first", 2),
        row("tuned", "loss_last", 0.25),
        row("tuned", "seconds", 9),
    ]
    rows += [row("tuned", "class_accuracy", 0.5, 0.4, 0.6)]
    lines = page_tables.outcome_table(rows).splitlines()
    assert lines[2] == "| `b` | base, n = 9 | – | 0.0 % | – | – | – | – |"
    assert lines[3] == "| `b` | tuned, n = 9 | 2.000 → 0.250 | – | – | – | – | 50.0 % (40.0–60.0) |"


def test_before_after_draws_what_there_is():
    rows = [
        row("base", "is_food_accuracy", 0.1, 0, 0.2),
        row("nearest", "item_f1_micro", 0.5, 0.4, 0.7),
        row("a | b", "item_f1_micro", 1, 1, 1),
    ]
    [axis] = figures.before_after(rows).axes
    assert [round(bar.get_height(), 3) for bar in axis.patches] == [0.1, 0.5]
    assert [text.get_text() for text in axis.figure.legends[0].get_texts()] == ["base", "nearest image"]
    published = [r for r in read_results(ROOT / "results" / "offline.json") if r.low is not None]
    assert len(figures.before_after(published).axes[0].patches) == sum(r.metric in tables.NAMES for r in published)


def test_reliability_names_each_subject_with_its_error():
    above, below = figures.reliability(
        {"base": [Bin(0.5, 0.25, 0.1, 0.5, 8)], "stage2": [Bin(0.9, 0.9, 0.8, 1, 5)]}
    ).axes
    assert [text.get_text() for text in above.get_legend().get_texts()] == [
        "base, ECE 0.250",
        "after stage 2, ECE 0.000",
    ]
    assert [bar.get_height() for bar in below.patches] == [8, 5]


def test_heat_map_has_every_wanted_name_once():
    classes = {f"food {number}": Counts(found=number, missed=1) for number in range(5)} | {
        "invented": Counts(invented=1)
    }
    axes = figures.class_heat_map(classes, rows=3).axes
    assert [tick.get_text() for axis in axes for tick in axis.get_yticklabels()] == [
        f"food {n} ({n + 1})" for n in range(5)
    ]
    assert [text.get_text() for text in axes[1].texts] == ["1.00", "0.75", "0.86", "1.00", "0.80", "0.89"]


def test_worst_cases_say_what_is_wrong():
    answers = [
        TEA.to_json(),
        "I see <pie>, $5 and a very long list of things " * 9,
        NOTHING.to_json(),
        NOTHING.to_json(),
    ]
    figure = figures.worst_cases([Image.new("RGB", (9, 9))] * 4, [PIE, PIE, PIE, NOTHING], answers)
    captions = [[text.get_text() for text in axis.texts if text.get_text().strip()] for axis in figure.axes]
    assert captions[0] == ["− pie (food, missed)", "+ tea (drink, not there)"]
    assert captions[1][0] == "not strict JSON:"
    assert captions[1][-2].endswith(" …")
    assert captions[1][-1] == "shows: pie"
    assert captions[2] == ["says there is none", "− pie (food, missed)"]
    assert captions[3] == ["✓ no food or drink"]


def test_items_that_a_label_need_not_name_are_no_errors():
    both = PIE.model_copy(update={"drink_items": ["tea"]})
    assert figures.verdict(PIE, both.to_json()) == [
        ("✓ pie", figures.RIGHT),
        ("+ tea (drink, not there)", figures.INVENTED),
    ]
    found = figures.verdict(PIE, both.to_json(), "primary")
    assert found == [("✓ pie", figures.RIGHT), ("+ tea (drink, not labeled)", figures.GRAY)]
    assert figures.verdict(PIE, TEA.to_json(), "primary")[1] == ("+ tea (drink, not there)", figures.INVENTED)


def test_token_mask_marks_what_the_loss_sees_and_shortens_runs():
    tokens = [("System", False), ("\n", False), *[("<image>", False)] * 64, ("$", True), (" tea", True)]
    [axis] = figures.token_mask(tokens).axes
    assert [text.get_text() for text in axis.texts] == ["System", "↵", "<image> × 64", "$", " tea"]
    assert [text.get_position()[1] for text in axis.texts] == [0, 0, 1, 1, 1]
    colors = [bar.get_facecolor() for bar in axis.patches]
    assert colors[3:] == [colors[3]] * 2 != colors[:2]
    assert colors[:3] == [colors[0]] * 3


def test_loss_curves_show_each_part_in_a_row_and_each_stage_in_a_column():
    [axis] = figures.loss_curves({"text decoder": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]}).axes
    assert (axis.get_title(), axis.get_ylabel()) == ("text decoder", "loss")
    log = [{"step": step, "loss": 3.1, "answer_loss": 0.1, "unlikelihood_loss": 0.01} for step in (1, 2)]
    axes = figures.loss_curves({"stage1": log, "stage2": log}).axes
    assert [axis.get_title() for axis in axes[:2]] == ["during stage 1", "during stage 2"]
    assert [axis.get_ylabel() for axis in axes[::2]] == list(figures.LOSSES.values())
    assert [axis.lines[0].get_ydata()[0] for axis in axes] == [0.1, 0.1, 0.01, 0.01]
    alone = [{"step": 1, "loss": 2.0, "answer_loss": 2.0, "unlikelihood_loss": 0.0}]
    assert len(figures.loss_curves({"stage1": alone}).axes) == 1
    figures.loss_curves({"stage1": log, "stage2": alone})  # only one stage with an unlikelihood loss


def test_contact_sheet_has_readable_captions_within_the_width_of_a_page():
    image = Image.new("RGB", (9, 9))
    figure = figures.contact_sheet([image] * 5, ["$5 a\nb", "a very long caption of many words"] + [[("c", "red")]] * 3)
    assert [len(axis.texts) for axis in figure.axes] == [2, 2, 1, 1, 1]
    assert figure.get_figwidth() * 100 <= 800
    assert all(text.get_fontsize() * 100 / 72 >= 11 for axis in figure.axes for text in axis.texts)
    assert figure.axes[2].texts[0].get_color() == "red"
    assert figures.bars([("pie", 3), ("tea", 1)], "items").axes[0].get_title() == "items"


def test_an_output_keeps_its_smallest_image():
    def png(pixels):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        return base64.b64encode(file.getvalue()).decode()

    photograph = np.random.default_rng(1).integers(0, 255, (80, 80, 3), np.uint8)
    data = {"image/png": png(photograph), "text/plain": "<Figure>"}
    pages._shrink(data)
    assert set(data) == {"image/jpeg", "text/plain"}
    assert Image.open(io.BytesIO(base64.b64decode(data["image/jpeg"]))).size == (80, 80)
    drawing = {"image/png": png(np.zeros((80, 80, 3), np.uint8))}
    pages._shrink(drawing)
    assert set(drawing) == {"image/png"}
