"""Tables and plots of what `extract.py`, `extract_onnx.py`, `photo_precision.py`, `valid.py` and `memory.py` measured;
`tools/pages.py` shows them.

python benchmarks/extract_report.py         # draw the plot again from results/extract_cpu.json
"""

from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from foodextract.evaluation.results import Row, read_results
from foodextract.reporting.tables import markdown_table
from reports import save_plot, with_interval

ROOT = Path(__file__).resolve().parents[1]
PHASES = ("open", "preprocess", "vision", "prefill", "tokens")
# The seed's subject goes on with its number format. Ours ends with DEFAULT if it is what this processor gets.
SEED, DEFAULT = "seed: pipeline, 17 tiles", " (default)"
COLORS = ("#b0b0b0", "#f2b134", "#4c78a8", "#72b7b2", "#e45756")
NAMES = {
    "schema_valid_rate": "answers that are records",
    "same_answer_rate": "identical answer",
    "same_is_food_rate": "same `is_food`",
}

Figures = dict[str, dict[str, Row]]  # by subject and metric


def by_size(rows: list[Row]) -> dict[str, Figures]:
    """Group rows by model size, in the order of measurement; the size is stripped from the subjects."""
    sizes: dict[str, Figures] = {}
    for row in rows:
        size, subject = row.subject.split(", ", 1)
        sizes.setdefault(size, {}).setdefault(subject, {})[row.metric] = row
    return sizes


def by_device(rows: list[Row]) -> list[list[Row]]:
    """Rows by processor, those of the last measurement first."""
    return [[row for row in rows if row.device == device] for device in dict.fromkeys(row.device for row in rows)]


def costs(rows: list[Row], speedup: str, title: str) -> str:
    """Return tables of CPU-seconds per image by phase, one per size; `title` heads the column of `speedup`."""
    tables = []
    for size, subjects in by_size(rows).items():
        head = [size.upper(), "CPU-s per image", title, *PHASES, "n"]
        lines = [
            [
                name,
                with_interval(of["cpu_seconds_per_image"]),
                with_interval(of[speedup]),
                *(f"{of[f'{phase}_cpu_seconds'].value:.3g}" for phase in PHASES),
                of["cpu_seconds_per_image"].n,
            ]
            for name, of in subjects.items()
            if "cpu_seconds_per_image" in of
        ]
        tables.append(markdown_table(head, lines))
    return "\n\n".join(tables)


def batches(rows: list[Row]) -> str:
    """Return one paragraph per size on what forced tokens and batches gain."""
    parts = []
    for size, subjects in by_size(rows).items():
        tokens, forced = subjects["answer"]["answer_tokens"], subjects["forced tokens alone"]["decode_speedup"]
        part = f"{size.upper()}: forced tokens make decoding {with_interval(forced)} times faster "
        part += f"({tokens.value:.0f} tokens)."
        for name, of in subjects.items():
            if "batch_decode_speedup" in of:
                decode, whole = of["batch_decode_speedup"], of["batch_image_speedup"]
                part += f" {name[0].upper()}{name[1:]}: {with_interval(decode)} times the tokens per CPU-second "
                part += f"of a single image, and {with_interval(whole)} times the images."
        parts.append(part)
    return "\n\n".join(parts)


def plot(rows: list[Row]) -> Figure:
    """Plot CPU-seconds per image by phase and tokens per CPU-second by batch size, one row of panels per model size."""
    sizes = by_size(rows)
    figure, axes = plt.subplots(
        len(sizes),
        2,
        figsize=(11, 3 * len(sizes)),
        squeeze=False,
        layout="constrained",
        gridspec_kw={"width_ratios": [2, 1]},
    )
    for (left, right), (size, subjects) in zip(axes, sizes.items(), strict=True):
        whole = {name: of for name, of in subjects.items() if "cpu_seconds_per_image" in of}
        start = np.zeros(len(whole))
        for phase, color in zip(PHASES, COLORS, strict=True):
            values = np.array([of[f"{phase}_cpu_seconds"].value for of in whole.values()])
            bars = left.barh(list(whole), values, 0.7, start, color=color, label=phase)
            start += values
        left.bar_label(bars, [f"{total:.3g}" for total in start], padding=3, fontsize=8)
        left.invert_yaxis()
        left.margins(x=0.1)
        left.set(xlabel="CPU-seconds per image", title=size.upper())
        curves: dict[str, list[tuple[int, float]]] = {}
        for name, of in subjects.items():
            if "decoded_tokens_per_cpu_second" in of:
                subject, batch = name.rsplit(", batch ", 1)
                curves.setdefault(subject, []).append((int(batch), of["decoded_tokens_per_cpu_second"].value))
        for subject, curve in curves.items():
            right.plot(*zip(*sorted(curve), strict=True), marker="o", label=subject)
        right.set(xlabel="batch size", ylabel="tokens per CPU-second", ylim=(0, None), title="decode")
        right.legend(frameon=False, fontsize=7)
        for axis in (left, right):
            axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def rates(rows: list[Row]) -> str:
    """Return a table of shares with their intervals."""
    shares = [row for row in rows if row.metric in NAMES]
    lines = [[row.subject.replace(" or ", " vs "), NAMES[row.metric], _percent(row, digits=2), row.n] for row in shares]
    return markdown_table(["subject", "measured", "share", "n"], lines)


def memory(rows: list[Row]) -> str:
    """Say how much memory was used, and how much it grew."""
    of = {row.metric: row for row in rows}
    peak, growth = of["peak_memory_gib"], of["memory_growth_share"]
    return (
        f"{peak.n:,} images of many sizes through `extract_many`: at most {peak.value:.2f} GiB resident, "
        f"and {100 * growth.value:+.1f} % from the second tenth of the images to the last."
    )


def headline(rows: list[Row]) -> str:
    """Say what an image costs here and in the original project, by model size."""
    parts = []
    for size, subjects in by_size(rows).items():
        seed = next(of for name, of in subjects.items() if name.startswith(SEED))
        ours = next(of for name, of in subjects.items() if name.endswith(DEFAULT))
        seconds, before = (of["cpu_seconds_per_image"].value for of in (ours, seed))
        times = with_interval(ours["speedup_vs_seed"])
        at = f"at the size of SmolVLM2-{size.upper()}"
        parts.append(f"{seconds:.2g} CPU-seconds instead of {before:.3g} {at}, {times} times fewer")
    comparison = "The comparison is `transformers.pipeline` with 17 tiles, as in the original."
    return f"An answer takes {'; '.join(parts)}. {comparison}"


def _cost_parts(rows: list[Row]) -> list[str]:
    image = "![CPU-seconds per image by phase, and tokens per CPU-second by batch size](../results/extract_cpu.png)"
    first, *others = by_device(rows)
    tables = [f"On {mine[0].device}:\n\n{costs(mine, 'speedup_vs_seed', 'original ÷ this')}" for mine in others]
    return [headline(first), image, costs(first, "speedup_vs_seed", "original ÷ this"), batches(first), *tables]


def _onnx_parts(rows: list[Row]) -> list[str]:
    timed = [row for row in rows if row.metric not in NAMES]
    return [rates(rows), costs(timed, "speedup_vs_torch", "torch fp32 ÷ this")]


def _photo_precision_parts(rows: list[Row]) -> list[str]:
    parts = []
    for mine in by_device(rows):
        of = {(row.subject, row.metric): row for row in mine}
        lines = [
            [
                row.subject.removeprefix("ours "),
                with_interval(row, ".3f"),
                *(_percent(of[f"{row.subject} and fp32", metric]) for metric in list(NAMES)[1:]),
                row.n,
            ]
            for row in mine
            if row.metric == "cpu_seconds_per_image"
        ]
        head = ["precision", "CPU-s per photograph", "answers as in fp32", "`is_food` as in fp32", "n"]
        [alone] = (row for row in mine if row.subject.endswith("alone and in 32"))
        same = f"Answers that are the same alone and in a batch of 32: {_percent(alone)} of {alone.n}."
        parts += [f"On {mine[0].device}, one thread:", markdown_table(head, lines), same]
    return parts


def _percent(row: Row, digits: int = 1) -> str:
    value, low, high = (f"{100 * share:.{digits}f}" for share in (row.value, row.low, row.high))
    return f"{value} % ({low}–{high})"


def _memory_parts(rows: list[Row]) -> list[str]:
    return ["![Memory by images answered](../results/extract_memory.png)", memory(rows)]


PARTS: dict[str, tuple[str, Callable[[list[Row]], list[str]]]] = {  # results file → title, what it shows
    "extract_cpu": ("Cost per image", _cost_parts),
    "photo_precision": ("Precision of the photo model", _photo_precision_parts),
    "extract_onnx": ("ONNX Runtime", _onnx_parts),
    "extract_valid": ("Validity for any image and any weights", lambda rows: [rates(rows)]),
    "extract_memory": ("Memory", _memory_parts),
}


def text(root: Path) -> str:
    """Return the section of benchmarks/README.md."""
    parts = []
    for name, (title, render) in PARTS.items():
        rows = read_results(root / "results" / f"{name}.json")
        link = f"[`results/{name}.json`](../results/{name}.json)"
        source = f"Source: {link}, `{rows[0].command}`, commit {rows[0].commit}, {rows[0].device}."
        parts += [f"### {title}", *render(rows), source]
    return "\n\n".join(parts)


def draw(results: Path) -> None:
    """Draw the plot of the last measurement beside its results."""
    save_plot(plot(by_device(read_results(results))[0]), results)


if __name__ == "__main__":
    draw(ROOT / "results" / "extract_cpu.json")
