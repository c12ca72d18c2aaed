"""What `train_step.py` measured: rows for results/, and from these a table and a plot for this folder's README.md."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from foodextract.evaluation.results import Row, make_row, read_results
from foodextract.reporting.tables import markdown_table
from pages import fill_in
from train_recipes import CACHED, SHARED, STAGES
from true_size import interval, ratio

EPOCHS = 2  # of each stage, likewise


@dataclass(frozen=True)
class Cell:
    """What one recipe cost in one round. Seconds and operations are of one image."""

    size: str
    stage: str
    recipe: str
    round: int
    commit: str
    device: str
    batch: int
    step: list[float] = field(default_factory=list)  # by optimizer step
    data: list[float] = field(default_factory=list)  # by batch
    once: float = 0.0  # before the first epoch
    memory: int = 0  # bytes: weights, gradients, optimizer and activations
    flops: float = 0.0
    rate: float = 0.0  # operations a second of a matrix product

    @property
    def key(self) -> tuple:
        """What makes it worth measuring again."""
        return self.size, self.stage, self.recipe, self.round, self.commit, self.device, self.batch


def summarize(cells: list[Cell], benchmark: str, command: str) -> list[Row]:
    """All rounds of a recipe in one subject, `size, stage, recipe`, beside the seed's."""
    groups: dict[tuple[str, str, str], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.size, cell.stage, cell.recipe), []).append(cell)
    row, rows, whole = partial(make_row, benchmark, command=command), [], {}
    for (size, stage, recipe), rounds in groups.items():
        steps, data = ([second for cell in rounds for second in getattr(cell, name)] for name in ("step", "data"))
        seconds = whole[size, stage, recipe] = [second + float(np.mean(data)) for second in steps]
        seed = groups[size, stage, "seed_recipe"]
        theirs, theirs_data = whole[size, stage, "seed_recipe"], [second for cell in seed for second in cell.data]
        add = partial(row, f"{size}, {stage}, {recipe}", n=len(steps) * rounds[0].batch)
        rows += [
            add("seconds_per_image", unit="s", **interval(seconds)),
            add("step_seconds_per_image", unit="s", **interval(steps)),
            add("data_seconds_per_image", unit="s", **interval(data)),
            add("once_seconds_per_image", float(np.mean([cell.once for cell in rounds])), unit="s"),
            add("speedup_vs_seed", unit="x", **_speedup(theirs, seconds)),
            add("data_speedup_vs_seed", unit="x", **_speedup(theirs_data, data)),
            add("peak_memory_gib", max(cell.memory for cell in rounds) / 2**30, unit="GiB"),
            add("tflop_per_image", rounds[0].flops / 1e12, unit="TFLOP"),
            add("mfu", float(np.mean([cell.flops / second / cell.rate for cell in rounds for second in cell.step]))),
        ]
    for size in dict.fromkeys(cell.size for cell in cells):
        total = {}
        for recipe in ("seed_recipe", "ours"):
            once = max(
                np.mean([cell.once for cell in groups[size, stage, recipe]]) for stage in STAGES
            )  # stage 2 takes stage 1's rows
            total[recipe] = once + EPOCHS * sum(float(np.mean(whole[size, stage, recipe])) for stage in STAGES)
            rows.append(row(f"{size}, whole training, {recipe}", "seconds_per_image", total[recipe], unit="s", n=1))
        rows.append(
            row(f"{size}, whole training, ours", "speedup_vs_seed", total["seed_recipe"] / total["ours"], unit="x", n=1)
        )
    return rows


def _speedup(theirs: list[float], ours: list[float]) -> dict[str, float | None]:
    """With an interval where both were measured as often."""
    if len(theirs) == len(ours):
        return interval(theirs, ratio, ours)
    return {"value": float(np.mean(theirs) / np.mean(ours)), "low": None, "high": None}


def _ladders(rows: list[Row]) -> dict[tuple[str, str], dict[str, dict[str, Row]]]:
    """By size and stage: figures by recipe, in the order they were measured."""
    ladders: dict[tuple[str, str], dict[str, dict[str, Row]]] = {}
    for row in rows:
        size, stage, *recipe = row.subject.split(", ")
        if recipe and stage in STAGES:
            ladders.setdefault((size, stage), {}).setdefault(", ".join(recipe), {})[row.metric] = row
    return ladders


def tables(rows: list[Row]) -> str:
    """Markdown: one table a size and stage, one line a recipe, and what a whole training costs."""
    parts = []
    for (size, stage), recipes in _ladders(rows).items():
        lines, last = [], None
        for name, of in recipes.items():
            told = of["seconds_per_image"].value
            factor = f"{last / told:.2f}" if last else ""
            lines.append(
                [
                    _name(stage, name),
                    _seconds(of["data_seconds_per_image"]),
                    _seconds(of["step_seconds_per_image"]),
                    _times(of["speedup_vs_seed"]),
                    factor,
                    f"{of['peak_memory_gib'].value:.1f}",
                    f"{100 * of['mfu'].value:.0f} %",
                    of["seconds_per_image"].n,
                ]
            )
            last = told
        head = [
            f"{size.upper()}, {stage.replace('stage', 'stage ')}",
            "data path, s",
            "step, s",
            "seed ÷ this",
            "rung before ÷ this",
            "GiB",
        ]
        parts.append(markdown_table([*head, "of a matrix product's rate", "n"], lines))
    whole = {(row.subject, row.metric): row.value for row in rows if ", whole training, " in row.subject}
    for size in dict.fromkeys(subject.split(", ")[0] for subject, _ in whole):
        seed, ours = (whole[f"{size}, whole training, {who}", "seconds_per_image"] for who in ("seed_recipe", "ours"))
        times = whole[f"{size}, whole training, ours", "speedup_vs_seed"]
        told = f"{seed:.4g} s an image become {ours:.3g} s, {times:.0f} times less."
        parts.append(
            f"A whole training of {size.upper()}, {EPOCHS} epochs of either stage with all preparation: {told}"
        )
    return "\n\n".join(parts)


def plot(rows: list[Row]) -> Figure:
    """Seconds an image by recipe, on a log scale: the step and the data path, one panel a size and stage."""
    ladders = _ladders(rows)
    sizes, stages = (list(dict.fromkeys(key[place] for key in ladders)) for place in (0, 1))
    tall = 0.34 * max(map(len, ladders.values())) + 1
    figure, axes = plt.subplots(
        len(sizes), len(stages), figsize=(5.6 * len(stages), tall * len(sizes)), squeeze=False, layout="constrained"
    )
    for (size, stage), recipes in ladders.items():
        axis = axes[sizes.index(size)][stages.index(stage)]
        places = np.arange(len(recipes))
        for shift, metric, label, color in (
            (-0.2, "step_seconds_per_image", "step", "#4c78a8"),
            (0.2, "data_seconds_per_image", "data path", "#f2b134"),
        ):
            values = [of[metric].value for of in recipes.values()]
            bars = axis.barh(places + shift, values, 0.38, color=color, label=label)
            axis.bar_label(
                bars, [f"{value:.0f}" if value >= 100 else f"{value:.2g}" for value in values], padding=2, fontsize=7
            )
        axis.set_yticks(places, [_name(stage, name) for name in recipes], fontsize=8)
        axis.invert_yaxis()
        axis.set(xscale="log", xlabel="seconds an image", title=f"{size.upper()}, {stage.replace('stage', 'stage ')}")
        axis.margins(x=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0][0].get_legend_handles_labels(), frameon=False, loc="outside upper left", ncols=2, fontsize=8)
    return figure


def text(root: Path) -> str:
    """What stands between the marks of benchmarks/README.md: plot and tables of every device that was measured."""
    parts = []
    for results in sorted((root / "results").glob("train_*.json")):
        rows = read_results(results)
        parts += [
            f"### {rows[0].device}",
            f"![Seconds an image by recipe](../results/{results.stem}.png)",
            tables(rows),
        ]
        parts.append(
            f"Source: [`results/{results.name}`](../results/{results.name}), `{rows[0].command}`, commit {rows[0].commit}."
        )
    return "\n\n".join(parts) or "Not measured yet: `.venv/bin/python benchmarks/train_step.py` does it."


def render(results: Path, root: Path) -> None:
    """The plot beside `results`, and the section of benchmarks/README.md if the figures are those of the repository."""
    figure = plot(read_results(results))
    figure.savefig(results.with_suffix(".png"), dpi=110)
    plt.close(figure)
    if results.resolve().parent == root / "results":
        fill_in(root / "benchmarks" / "README.md", "train_step", text(root))


def _name(stage: str, recipe: str) -> str:
    """What a reader calls a recipe: ours is where its last change leads."""
    return {"seed_recipe": "the seed's recipe", "ours": f"{CACHED if STAGES[stage].freeze else SHARED}: ours"}.get(
        recipe, recipe
    )


def _seconds(row: Row) -> str:
    return f"{row.value:.3g}" + (f" ({row.low:.3g}–{row.high:.3g})" if row.low is not None else "")


def _times(row: Row) -> str:
    return f"{row.value:.1f}" + (f" ({row.low:.1f}–{row.high:.1f})" if row.low is not None else "")
