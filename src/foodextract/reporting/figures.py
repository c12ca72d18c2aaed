"""Figures: images with captions, and what an evaluation shows beyond its table, such as how sure a model is and where it fails.

Images are RGB. Every function gives a matplotlib figure (or HTML) and writes nothing.
"""

import html
import textwrap
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from foodextract.evaluation.calibration import Bin, calibration_error
from foodextract.evaluation.results import Row
from foodextract.evaluation.scoring import FIELDS, Counts, try_read
from foodextract.reporting.tables import MORE_NAMES, NAMES, SUBJECTS, subject_name
from foodextract.schema import FoodRecord

COLORS = (
    "#bab0ac",
    "#9ecae9",
    "#4c78a8",
    "#f2b134",
    "#72b7b2",
    "#b279a2",
)  # before gray, after blue, then whoever else
RIGHT, INVENTED, MISSED = "#2e7d32", "#c62828", "#b26a00"


def contact_sheet(
    images: Sequence[Image.Image], captions: Sequence[str], columns: int = 6, wrap: int = 30, title: str = ""
) -> Figure:
    """Images in a grid, each above its caption."""
    columns = max(1, min(columns, len(images)))
    rows = -(-len(images) // columns)
    told = [_wrapped(caption, wrap) for caption in captions]
    side, line, letter = 2.2, 0.16, 0.066  # inches: an image, and a line and a letter of its caption
    below = line * (max((caption.count("\n") + 1 for caption in told), default=1) + 1)
    wide = max(side, letter * wrap) + 0.15
    height = (side + below) * rows + 0.35 * bool(title)
    figure, axes = plt.subplots(rows, columns, figsize=(wide * columns, height), squeeze=False)
    figure.subplots_adjust(0, below / height, 1, 1 - 0.35 * bool(title) / height, wspace=0, hspace=below / side)
    figure.suptitle(title, y=1 - 0.03 / height, va="top")
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, caption in zip(axes.flat, images, told, strict=False):
        axis.imshow(image)
        axis.annotate(
            caption,
            (0.5, 0),
            (0, -4),
            "axes fraction",
            "offset points",
            ha="center",
            va="top",
            fontsize=8,
            parse_math=False,
        )
    return figure


def _wrapped(text: str, width: int) -> str:
    return "\n".join(part for line in text.split("\n") for part in textwrap.wrap(line, width) or [""])


def bars(counts: Sequence[tuple[str, int]], title: str) -> Figure:
    """Horizontal bars, the largest on top."""
    figure, axis = plt.subplots(figsize=(6, 0.22 * len(counts) + 0.8), layout="constrained")
    names, values = zip(*reversed(counts), strict=True) if counts else ((), ())
    axis.bar_label(axis.barh(names, values, color="#4c78a8"), padding=3, fontsize=8)
    axis.set_title(title)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def loss_curves(logs: dict[str, list[dict[str, float]]]) -> Figure:
    """Training loss by optimizer step, one panel a stage, on a log scale."""
    figure, axes = plt.subplots(1, len(logs), figsize=(5 * len(logs), 3), squeeze=False, layout="constrained")
    for axis, (name, log) in zip(axes.flat, logs.items(), strict=True):
        axis.plot([entry["step"] for entry in log], [entry["loss"] for entry in log], marker=".", color="#4c78a8")
        axis.set(title=SUBJECTS.get(name, name), xlabel="optimizer step", ylabel="loss on the answer", yscale="log")
        axis.grid(alpha=0.3)
    return figure


def before_after(rows: Sequence[Row], names: Mapping[str, str] = NAMES) -> Figure:
    """Bars with 95 % intervals: every metric, the subjects side by side. What was not measured is left out; so are groups, and lengths."""
    wanted = [row for row in rows if row.metric in names and " | " not in row.subject and row.unit != "characters"]
    figures = {(row.metric, row.subject): row for row in wanted}
    subjects = list(dict.fromkeys(subject for _, subject in figures))
    metrics = [metric for metric in names if any(metric == name for name, _ in figures)]
    figure, axis = plt.subplots(figsize=(max(9, 1.3 * len(metrics)), 3.6), layout="constrained")
    width = 0.82 / len(subjects)
    for i, subject in enumerate(subjects):
        mine = [
            (place, figures[metric, subject]) for place, metric in enumerate(metrics) if (metric, subject) in figures
        ]
        places = [place + (i - (len(subjects) - 1) / 2) * width for place, _ in mine]
        errors = [[row.value - row.low for _, row in mine], [row.high - row.value for _, row in mine]]
        color = COLORS[i % len(COLORS)]
        axis.bar(
            places, [row.value for _, row in mine], 0.93 * width, yerr=errors, color=color, label=subject_name(subject), capsize=2,
            error_kw={"elinewidth": 1},
        )  # fmt: skip
    broken = [metric.replace("is_food_", "is food_").replace("_", "\n", 1).replace("_", " ") for metric in metrics]
    axis.set_xticks(range(len(metrics)), broken, fontsize=8)
    axis.set_ylim(min([0, *(row.low - 0.03 for row in wanted if row.low < 0)]), 1.05)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, ncols=len(subjects), loc="upper center", bbox_to_anchor=(0.5, 1.15))
    return figure


def effects(rows: Sequence[Row], metric: str) -> Figure:
    """What each choice changes, with its 95 % interval: one line a `who minus whom`. An interval across the gray line may be nothing."""
    mine = [row for row in rows if row.metric == f"{metric}_difference"][::-1]
    figure, axis = plt.subplots(figsize=(8, 0.42 * len(mine) + 1), layout="constrained")
    errors = [[row.value - row.low for row in mine], [row.high - row.value for row in mine]]
    axis.errorbar([row.value for row in mine], range(len(mine)), xerr=errors, fmt="o", color=COLORS[2], capsize=3)
    axis.axvline(0, color="#888", linewidth=1)
    axis.set_yticks(range(len(mine)), [row.subject for row in mine], fontsize=8)
    axis.set(xlabel=f"difference in {({**NAMES, **MORE_NAMES})[metric]}", ylim=(-0.6, len(mine) - 0.4))
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def token_colors(tokens: Sequence[tuple[str, bool]]) -> str:
    """HTML of a label audit: tokens the loss sees on green, all others gray; runs of one image token are shortened."""
    parts: list[str] = []
    previous, run = None, 0
    for text, supervised in [*tokens, (None, False)]:
        if text == previous and text is not None and not supervised:
            run += 1
            continue
        if run:
            parts.append(f'<span style="color:#888"> × {run + 1} </span>')
        previous, run = text, 0
        if text is not None:
            style = "background:#bfe3b4;color:#000;border-radius:3px" if supervised else "color:#888"
            shown = html.escape(text).replace("\n", "⏎<br>").replace(" ", "&nbsp;" if supervised else " ")
            parts.append(f'<span style="{style}">{shown}</span>' + ("<wbr>" if supervised else ""))
    return f'<div style="font-family:monospace;line-height:1.7">{"".join(parts)}</div>'


def reliability(bins: Mapping[str, Sequence[Bin]]) -> Figure:
    """What `is_food` claims against what is there, one line a subject with 95 % intervals; below, how many images claim how much.

    On the dashed line a model that says 70 % is right in 70 of 100 cases. ECE is the mean distance from it.
    """
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(4.6, 5.4), height_ratios=(3, 1), sharex=True, layout="constrained"
    )
    above.plot([0, 1], [0, 1], color="#888", linestyle="--", linewidth=1)
    width = 0.08 / len(bins)
    for number, (subject, mine) in enumerate(bins.items()):
        color = COLORS[number % len(COLORS)]
        errors = [[b.observed - b.low for b in mine], [b.high - b.observed for b in mine]]
        said = [b.predicted for b in mine]
        name = f"{subject_name(subject)}, ECE {calibration_error(mine):.3f}"
        above.errorbar(
            said, [b.observed for b in mine], yerr=errors, color=color, marker="o", markersize=4, capsize=2, label=name
        )
        below.bar([x + (number - (len(bins) - 1) / 2) * width for x in said], [b.n for b in mine], width, color=color)
    above.set(ylabel="share that shows food or drink", ylim=(-0.03, 1.03), xlim=(-0.03, 1.03))
    below.set(xlabel="probability of is_food = 1", ylabel="images")
    above.legend(frameon=False, loc="upper left", fontsize=8)
    for axis in (above, below):
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def class_heat_map(classes: Mapping[str, Counts], rows: int = 28) -> Figure:
    """Precision, recall and F1 of each item name, the most wanted first, with how often it was wanted; `rows` names a block."""
    names = [name for name, counts in classes.items() if counts.found + counts.missed]
    blocks = [names[start : start + rows] for start in range(0, len(names), rows)]
    height = 0.24 * min(rows, len(names)) + 0.7
    figure, axes = plt.subplots(
        1, len(blocks), figsize=(3.4 * len(blocks), height), squeeze=False, layout="constrained"
    )
    for axis, block in zip(axes.flat, blocks, strict=True):
        values = np.full((max(map(len, blocks)), 3), np.nan)
        values[: len(block)] = [(classes[name].precision, classes[name].recall, classes[name].f1) for name in block]
        axis.imshow(values, cmap="RdYlBu", vmin=0, vmax=1, aspect="auto")
        for (row, column), value in np.ndenumerate(values):
            if not np.isnan(value):
                color = "white" if abs(value - 0.5) > 0.38 else "black"
                axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=color)
        labels = [f"{name} ({classes[name].found + classes[name].missed})" for name in block]
        axis.set_yticks(range(len(block)), labels, fontsize=8)
        axis.set_xticks(range(3), ["precision", "recall", "F1"], fontsize=8)
        axis.xaxis.tick_top()
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    return figure


def worst_cases(
    images: Sequence[Image.Image], labels: Sequence[FoodRecord], answers: Sequence[str], columns: int = 4
) -> Figure:
    """Images in a grid, each above what its answer has found (green), invented (red) and missed (amber), or the text nobody can read."""
    captions = [_verdict(label, text) for label, text in zip(labels, answers, strict=True)]
    columns = max(1, min(columns, len(images)))
    rows, longest = -(-len(images) // columns), max(map(len, captions), default=1)
    side, line = 2.4, 0.155  # inches: an image, a line of its caption
    below = line * (longest + 1)
    figure, axes = plt.subplots(rows, columns, figsize=((side + 0.1) * columns, (side + below) * rows), squeeze=False)
    figure.subplots_adjust(0.005, below / (side + below) / rows, 0.995, 0.995, wspace=0.05, hspace=below / side)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, caption in zip(axes.flat, images, captions, strict=False):
        axis.imshow(image)
        for number, (text, color) in enumerate(caption):
            place = {"xytext": (0, -4 - 72 * line * number), "textcoords": "offset points", "va": "top"}
            axis.annotate(text, (0, 0), xycoords="axes fraction", fontsize=8, color=color, parse_math=False, **place)
    return figure


def _verdict(label: FoodRecord, text: str, width: int = 38) -> list[tuple[str, str]]:
    """Lines of a caption with their colors."""
    answer = try_read(text)
    if answer is None:
        shown = textwrap.shorten(text, 4 * width, placeholder=" …") or "(nothing)"
        told = [
            ("not strict JSON:", INVENTED),
            (shown, "#555"),
            (f"shows: {label.image_title or 'no food or drink'}", MISSED),
        ]
    else:
        told = []
        if answer.is_food != label.is_food:
            told.append(("says there is food or drink" if answer.is_food else "says there is none", INVENTED))
        for field in FIELDS:
            kind = "drink" if field == "drink_items" else "food"
            wanted, given = getattr(label, field), getattr(answer, field)
            told += [(f"✓ {name}", RIGHT) for name in wanted if name in given]
            told += [(f"+ {name} ({kind}, not there)", INVENTED) for name in given if name not in wanted]
            told += [(f"− {name} ({kind}, missed)", MISSED) for name in wanted if name not in given]
    told = told or [("✓ no food or drink" if not label.is_food else "✓ food or drink", RIGHT)]
    return [(line, color) for part, color in told for line in textwrap.wrap(part, width, subsequent_indent="  ")]
