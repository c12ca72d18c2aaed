"""Matplotlib figures of images, training and evaluation.

At 100 dpi no figure is wider than 800 px and no letter smaller than 11 px, so GitHub shows them unscaled in notebooks.
Images are RGB. Every function returns a figure and writes no file.
"""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ContextDecorator
from itertools import groupby
from typing import Any, cast

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from foodextract.evaluation.calibration import Bin, calibration_error
from foodextract.evaluation.results import Row
from foodextract.evaluation.scoring import Counts, is_complete, try_read
from foodextract.reporting.tables import NAMES, SUBJECTS, subject_name
from foodextract.schema import EXHAUSTIVE, FIELDS, FoodRecord

WIDTH, FONT, LINE = 7.8, 8, 0.16  # inches, points, inches; a notebook adds 0.1 inches on each side
COLORS = ("#bab0ac", "#9ecae9", "#4c78a8", "#f2b134", "#72b7b2", "#b279a2")  # base gray, stages blue, then baselines
GRAY, RIGHT, INVENTED, MISSED = "#555555", "#2e7d32", "#c62828", "#b26a00"
MANY_POINTS = 200  # of a loss curve, from which a mean is drawn
LOSSES = {"answer_loss": "loss on the answer", "unlikelihood_loss": "unlikelihood loss, weighted"}

Lines = Sequence[tuple[str, str]]  # lines of text, each with its color

STYLE: Any = {"font.size": FONT, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
_styled = cast(ContextDecorator, plt.rc_context(STYLE))


# --- images


def contact_sheet(
    images: Sequence[Image.Image], captions: Sequence[str | Lines], columns: int = 4, title: str = ""
) -> Figure:
    """Images in a grid, each above its caption."""
    side = WIDTH / columns  # inches
    letters = int(72 * side / (0.58 * FONT))
    wrapped = [_wrapped(caption, letters) for caption in captions]
    rows = [range(start, min(start + columns, len(images))) for start in range(0, len(images), columns)]
    heights = [side + LINE * (max(len(wrapped[i]) for i in row) + 1) for row in rows]
    width, height, top = side * min(columns, len(images)), sum(heights) + 0.3 * bool(title), 0.3 * bool(title)
    figure = plt.figure(figsize=(width, height))
    figure.suptitle(title, x=0.05 / width, y=1, ha="left", va="top", fontsize=FONT + 3)
    for row, row_height in zip(rows, heights, strict=True):
        for column, i in enumerate(row):
            box = (column * side / width, 1 - (top + side) / height, (side - 0.08) / width, (side - 0.08) / height)
            axis = figure.add_axes(box)
            axis.imshow(images[i])
            axis.axis("off")
            for number, (text, color) in enumerate(wrapped[i]):
                offset = (0, -4 - 72 * LINE * number)
                style: Any = {"va": "top", "fontsize": FONT, "color": color, "parse_math": False}
                axis.annotate(text, (0, 0), offset, "axes fraction", "offset points", **style)
        top += row_height
    return figure


def _wrapped(caption: str | Lines, letters: int) -> Lines:
    lines = [(line, "black") for line in caption.split("\n")] if isinstance(caption, str) else caption
    return [(part, color) for line, color in lines for part in textwrap.wrap(line, letters, subsequent_indent="  ")]


def worst_cases(
    images: Sequence[Image.Image],
    labels: Sequence[FoodRecord],
    answers: Sequence[str],
    scopes: Sequence[str] | None = None,
) -> Figure:
    """A contact sheet of images with the `verdict` on each answer."""
    cases = zip(labels, answers, scopes or [EXHAUSTIVE] * len(labels), strict=True)
    return contact_sheet(images, [verdict(*case) for case in cases])


def verdict(label: FoodRecord, text: str, scope: str = EXHAUSTIVE) -> Lines:
    """What an answer found (green), invented (red) and missed (amber), or the text if it is not strict JSON.

    Where a label of this scope need not name every item, and the answer has one that it names, further items are gray.
    """
    answer = try_read(text)
    if answer is None:
        shown = textwrap.shorten(text, 150, placeholder=" …") or "(nothing)"
        missed = f"shows: {label.image_title or 'no food or drink'}"
        return [("not strict JSON:", INVENTED), (shown, GRAY), (missed, MISSED)]
    found = any(name in getattr(answer, field) for field in FIELDS for name in getattr(label, field))
    color, note = (INVENTED, "not there") if is_complete(label, scope) or not found else (GRAY, "not labeled")
    lines = []
    if answer.is_food != label.is_food:
        lines.append(("says there is food or drink" if answer.is_food else "says there is none", INVENTED))
    for field in FIELDS:
        kind = field.removesuffix("_items")
        wanted, given = getattr(label, field), getattr(answer, field)
        lines += [(f"✓ {name}", RIGHT) for name in wanted if name in given]
        lines += [(f"+ {name} ({kind}, {note})", color) for name in given if name not in wanted]
        lines += [(f"− {name} ({kind}, missed)", MISSED) for name in wanted if name not in given]
    return lines or [("✓ food or drink" if label.is_food else "✓ no food or drink", RIGHT)]


# --- training


def token_mask(tokens: Sequence[tuple[str, bool]], columns: int = 111) -> Figure:
    """One row as tokens (see `collate.audit`): the loss sees the green ones. Runs of one image token are shortened."""
    x, y, cells = 0, 0, []
    for (token, supervised), run in groupby(tokens):
        count = len(list(run))
        text = token.replace("\n", "↵") + (f" × {count}" if count > 1 else "")
        x, y = (x, y) if x + len(text) <= columns else (0, y + 1)
        cells.append((x, y, len(text), text, supervised))
        x, y = (0, y + 1) if "\n" in token else (x + len(text), y)
    figure = plt.figure(figsize=(WIDTH, 0.19 * (y + 1)))
    axis = figure.add_axes((0, 0, 1, 1), xlim=(0, columns), ylim=(y + 0.6, -0.6))
    axis.axis("off")
    for x, y, width, text, supervised in cells:
        axis.barh(y, width, 0.86, x, color="#bfe3b4" if supervised else "#eeeeee", edgecolor="white")
        color = "black" if supervised else "#666666"
        axis.text(x, y, text, family="monospace", fontsize=FONT, color=color, va="center_baseline", parse_math=False)
    return figure


@_styled
def loss_curves(logs: Mapping[str, Sequence[Mapping[str, float]]]) -> Figure:
    """Training loss by optimizer step, on a log scale: one column a stage, one row a part of the loss."""
    parts = {key: name for key, name in LOSSES.items() if any(entry.get(key) for log in logs.values() for entry in log)}
    parts = parts or {"loss": "loss"}
    figure, axes = plt.subplots(
        len(parts), len(logs), sharex="col", sharey="row", squeeze=False, layout="constrained",
        figsize=(min(WIDTH, 5 * len(logs)), 2.4 * len(parts)),
    )  # fmt: skip
    for column, (name, log) in zip(axes.T, logs.items(), strict=True):
        for axis, part in zip(column, parts, strict=True):
            points = [(entry["step"], entry[part]) for entry in log if part in entry]
            steps, values = zip(*points, strict=True) if points else ((), ())
            if len(points) > MANY_POINTS:  # a cloud of noise, and the trend in it
                window = len(points) // 20
                mean = np.convolve(values, np.ones(window) / window, mode="valid")
                axis.plot(steps, values, color=COLORS[2], alpha=0.25, linewidth=0.8)
                axis.plot(steps[window - 1 :], mean, color=COLORS[2], label=f"mean of {window} steps")
                axis.legend()
            else:
                axis.plot(steps, values, marker=".", color=COLORS[2])
            axis.set_yscale("log")
            axis.grid(alpha=0.3)
        column[0].set_title(SUBJECTS.get(name, name).replace("after", "during"))
        column[-1].set_xlabel("optimizer step")
    for axis, label in zip(axes[:, 0], parts.values(), strict=True):
        axis.set_ylabel(label)
    return figure


# --- data and results


@_styled
def bars(counts: Sequence[tuple[str, int]], title: str) -> Figure:
    """Horizontal bars, the largest on top."""
    figure, axis = plt.subplots(figsize=(6, 0.2 * len(counts) + 0.7), layout="constrained")
    names, values = zip(*reversed(counts), strict=True) if counts else ((), ())
    axis.bar_label(axis.barh(names, values, color=COLORS[2]), padding=3)
    axis.set_title(title)
    return figure


@_styled
def before_after(rows: Sequence[Row]) -> Figure:
    """Bars with 95 % intervals: the subjects side by side for every metric. Groups are left out."""
    wanted = [row for row in rows if row.metric in NAMES and " | " not in row.subject]
    subjects = list(dict.fromkeys(row.subject for row in wanted))
    metrics = [metric for metric in NAMES if any(row.metric == metric for row in wanted)]
    figure, axis = plt.subplots(figsize=(WIDTH, 3.6), layout="constrained")
    width = 0.82 / len(subjects)
    for i, subject in enumerate(subjects):
        mine = [row for row in wanted if row.subject == subject]
        x = [metrics.index(row.metric) + (i - (len(subjects) - 1) / 2) * width for row in mine]
        axis.bar(
            x, [row.value for row in mine], 0.93 * width, yerr=_errors((row.value, *row.interval) for row in mine),
            color=COLORS[i % len(COLORS)], label=subject_name(subject), capsize=2, error_kw={"elinewidth": 1},
        )  # fmt: skip
    axis.set_xticks(range(len(metrics)), [textwrap.fill(NAMES[metric].partition(" (")[0], 14) for metric in metrics])
    axis.set_ylim(min(0, *(row.interval[0] - 0.03 * (row.interval[0] < 0) for row in wanted)), 1.05)
    figure.legend(ncols=min(4, len(subjects)), loc="outside upper center")
    return figure


@_styled
def reliability(bins: Mapping[str, Sequence[Bin]]) -> Figure:
    """Calibration of `is_food`, one line a subject with 95 % intervals; below, the number of images by probability.

    On the dashed line a model that says 70 % is right in 70 of 100 cases. ECE is the mean distance from it.
    """
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(4.6, 5.2), height_ratios=(3, 1), sharex=True, layout="constrained"
    )
    above.plot([0, 1], [0, 1], color="#888", linestyle="--", linewidth=1)
    width = 0.08 / len(bins)
    for i, (subject, mine) in enumerate(bins.items()):
        predicted, color = np.array([b.predicted for b in mine]), COLORS[(i + 2) % len(COLORS)]
        above.errorbar(
            predicted, [b.observed for b in mine], yerr=_errors((b.observed, b.low, b.high) for b in mine), color=color,
            label=f"{subject_name(subject)}, ECE {calibration_error(mine):.3f}", marker="o", markersize=4, capsize=2,
        )  # fmt: skip
        below.bar(predicted + (i - (len(bins) - 1) / 2) * width, [b.n for b in mine], width, color=color)
    above.set(ylabel="share that shows food or drink", ylim=(-0.03, 1.03), xlim=(-0.03, 1.03))
    below.set(xlabel="probability of is_food = 1", ylabel="images")
    above.legend(loc="upper left")
    return figure


def class_heat_map(classes: Mapping[str, Counts], rows: int = 28) -> Figure:
    """Precision, recall and F1 of each item name with its number of references; `rows` names a block."""
    names = [name for name, counts in classes.items() if counts.found + counts.missed]
    blocks = [names[start : start + rows] for start in range(0, len(names), rows)]
    size = min(WIDTH, 3 * len(blocks)), 0.2 * min(rows, len(names)) + 0.5
    figure, axes = plt.subplots(1, len(blocks), figsize=size, squeeze=False, layout="constrained")
    for axis, block in zip(axes.flat, blocks, strict=True):
        values = np.full((max(map(len, blocks)), 3), np.nan)
        values[: len(block)] = [(classes[name].precision, classes[name].recall, classes[name].f1) for name in block]
        axis.imshow(values, cmap="RdYlBu", vmin=0, vmax=1, aspect="auto")
        for (row, column), value in np.ndenumerate(values[: len(block)]):
            color = "white" if abs(value - 0.5) > 0.38 else "black"
            axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=FONT, color=color)
        labels = [f"{name} ({classes[name].found + classes[name].missed})" for name in block]
        axis.set_yticks(range(len(block)), labels, fontsize=FONT)
        axis.set_xticks(range(3), ["prec.", "recall", "F1"], fontsize=FONT)
        axis.xaxis.tick_top()
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    return figure


def _errors(points: Iterable[tuple[float, float, float]]) -> np.ndarray:
    """Distances from each value to its low and high end, (2, n), from (value, low, high)."""
    return np.array([(value - low, high - value) for value, low, high in points]).reshape(-1, 2).T
