"""What `train_step.py` measured: rows for results/, and tables and a plot made from them.

python benchmarks/train_report.py         # draw the plots again from results/train_*.json
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from foodextract.evaluation.results import Row, make_row, read_results
from foodextract.reporting.tables import markdown_table
from reports import save_plot, with_interval
from train_recipes import CACHED, SHARED, STAGES
from true_size import interval, ratio

EPOCHS = 2  # of each stage, as in the original project


@dataclass(frozen=True)
class Cell:
    """The cost of one recipe in one round. Seconds and operations are per image."""

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
    rate: float = 0.0  # operations per second of a matrix product

    @property
    def key(self) -> tuple:
        """Cells with the same key need not be measured again."""
        return self.size, self.stage, self.recipe, self.round, self.commit, self.device, self.batch


def summarize(cells: list[Cell], benchmark: str, command: str) -> list[Row]:
    """Return rows with the subject `size, stage, recipe`, pooled over rounds and compared with the original recipe."""
    groups: dict[tuple[str, str, str], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.size, cell.stage, cell.recipe), []).append(cell)
    row, rows, whole = partial(make_row, benchmark, command=command), [], {}
    for (size, stage, recipe), rounds in groups.items():
        steps, data = ([second for cell in rounds for second in getattr(cell, name)] for name in ("step", "data"))
        seconds = whole[size, stage, recipe] = [second + float(np.mean(data)) for second in steps]
        seed = groups[size, stage, "seed_recipe"]
        theirs, theirs_data = whole[size, stage, "seed_recipe"], [second for cell in seed for second in cell.data]
        add = partial(row, f"{size}, {stage}, {recipe}", n=len(steps))
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
            # Preparation is paid once: stage 2 reuses the rows of stage 1.
            once = max(np.mean([cell.once for cell in groups[size, stage, recipe]]) for stage in STAGES)
            total[recipe] = once + EPOCHS * sum(float(np.mean(whole[size, stage, recipe])) for stage in STAGES)
            rows.append(row(f"{size}, whole training, {recipe}", "seconds_per_image", total[recipe], unit="s", n=1))
        speedup = total["seed_recipe"] / total["ours"]
        rows.append(row(f"{size}, whole training, ours", "speedup_vs_seed", speedup, unit="x", n=1))
    return rows


def _speedup(theirs: list[float], ours: list[float]) -> dict[str, float | None]:
    """Return the ratio, with an interval where both were measured equally often."""
    if len(theirs) == len(ours):
        return interval(theirs, ratio, ours)
    return {"value": float(np.mean(theirs) / np.mean(ours)), "low": None, "high": None}


def _ladders(rows: list[Row]) -> dict[tuple[str, str], dict[str, dict[str, Row]]]:
    """Group rows by size and stage, then by recipe in the order of measurement."""
    ladders: dict[tuple[str, str], dict[str, dict[str, Row]]] = {}
    for row in rows:
        size, stage, *recipe = row.subject.split(", ")
        if recipe and stage in STAGES:
            ladders.setdefault((size, stage), {}).setdefault(", ".join(recipe), {})[row.metric] = row
    return ladders


def tables(rows: list[Row]) -> str:
    """Return one table per size and stage with one line per recipe, and the cost of a whole training."""
    parts = []
    for (size, stage), recipes in _ladders(rows).items():
        lines, previous = [], None
        for name, of in recipes.items():
            seconds = of["seconds_per_image"].value
            line = [_name(stage, name)]
            line += [with_interval(of[f"{part}_seconds_per_image"]) for part in ("data", "step")]
            line += [with_interval(of["speedup_vs_seed"], ".1f"), f"{previous / seconds:.2f}" if previous else ""]
            line += [f"{of['peak_memory_gib'].value:.1f}", f"{100 * of['mfu'].value:.0f} %", of["seconds_per_image"].n]
            lines.append(line)
            previous = seconds
        header = [f"{size.upper()}, {stage.replace('stage', 'stage ')}", "data path, s", "step, s", "original ÷ this"]
        parts.append(markdown_table([*header, "row above ÷ this", "GiB", "MFU", "n"], lines))
    whole = {(row.subject, row.metric): row.value for row in rows if ", whole training, " in row.subject}
    for size in dict.fromkeys(subject.split(", ")[0] for subject, _ in whole):
        seed, ours = (whole[f"{size}, whole training, {name}", "seconds_per_image"] for name in ("seed_recipe", "ours"))
        times = whole[f"{size}, whole training, ours", "speedup_vs_seed"]
        parts.append(
            f"A whole training of {size.upper()} ({EPOCHS} epochs of each stage, with preparation) takes "
            f"{ours:.3g} s per image instead of {seed:.4g} s, {times:.0f} times faster."
        )
    return "\n\n".join(parts)


def plot(rows: list[Row]) -> Figure:
    """Plot seconds per image by recipe on a log scale, step and data path, one panel per size and stage."""
    ladders = _ladders(rows)
    sizes, stages = (list(dict.fromkeys(key[place] for key in ladders)) for place in (0, 1))
    height = 0.34 * max(map(len, ladders.values())) + 1
    figure, axes = plt.subplots(
        len(sizes), len(stages), figsize=(5.6 * len(stages), height * len(sizes)), squeeze=False, layout="constrained"
    )
    for (size, stage), recipes in ladders.items():
        axis = axes[sizes.index(size)][stages.index(stage)]
        places = range(len(recipes))
        for metric, label, color in (
            ("data_seconds_per_image", "data path", "#f2b134"),
            ("step_seconds_per_image", "step", "#4c78a8"),
        ):
            values = [of[metric].value for of in recipes.values()]
            axis.plot(values, places, "o", color=color, label=label)
            for place, value in zip(places, values, strict=True):
                text = f"{value:.0f}" if value >= 100 else f"{value:.2g}"
                axis.annotate(text, (value, place), (6, -3), textcoords="offset points", fontsize=7)
        axis.grid(axis="x", alpha=0.3)
        axis.set_yticks(places, [_name(stage, name) for name in recipes], fontsize=8)
        axis.invert_yaxis()
        axis.set(xscale="log", xlabel="seconds per image", title=f"{size.upper()}, {stage.replace('stage', 'stage ')}")
        axis.margins(x=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0][0].get_legend_handles_labels(), frameon=False, loc="outside upper left", ncols=2, fontsize=8)
    return figure


def text(root: Path) -> str:
    """Return the section of benchmarks/README.md: plot and tables of every device that was measured."""
    parts = []
    for path in sorted((root / "results").glob("train_*.json")):
        rows = read_results(path)
        image = f"![Seconds per image by recipe](../results/{path.stem}.png)"
        source = (
            f"Source: [`results/{path.name}`](../results/{path.name}), `{rows[0].command}`, commit {rows[0].commit}."
        )
        parts += [f"### {rows[0].device}", image, tables(rows), source]
    return "\n\n".join(parts)


def draw(results: Path) -> None:
    """Draw the plot beside its results."""
    save_plot(plot(read_results(results)), results)


def _name(stage: str, recipe: str) -> str:
    """Name a recipe for readers: ours is the one after its last change."""
    return {"seed_recipe": "the original recipe", "ours": f"{CACHED if STAGES[stage].freeze else SHARED}: ours"}.get(
        recipe, recipe
    )


if __name__ == "__main__":
    for path in (Path(__file__).resolve().parents[1] / "results").glob("train_*.json"):
        draw(path)
