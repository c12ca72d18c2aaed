"""What `extract.py`, `extract_onnx.py`, `valid.py` and `memory.py` measured: tables and plots for benchmarks/README.md.

python benchmarks/extract_report.py         # once more, from what is in results/
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from foodextract.evaluation.results import Row, read_results
from foodextract.reporting.tables import markdown_table
from pages import fill_in

ROOT = Path(__file__).resolve().parents[1]
PHASES = ("open", "preprocess", "vision", "prefill", "tokens")
SEED, OURS = "seed: pipeline, 17 tiles", "ours int8"  # behind the seed stands its number format
COLORS = ("#b0b0b0", "#f2b134", "#4c78a8", "#72b7b2", "#e45756")
NAMES = {
    "schema_valid_rate": "answers that are records",
    "same_answer_rate": "same answer, letter by letter",
    "same_is_food_rate": "same `is_food`",
}

Figures = dict[str, dict[str, Row]]  # by subject and metric


def by_size(rows: list[Row]) -> dict[str, Figures]:
    """Figures by size of the model, in the order they were measured; subjects lose its name."""
    sizes: dict[str, Figures] = {}
    for row in rows:
        size, subject = row.subject.split(", ", 1)
        sizes.setdefault(size, {}).setdefault(subject, {})[row.metric] = row
    return sizes


def costs(rows: list[Row], speedup: str, told: str) -> str:
    """Markdown: CPU-seconds an image by phase, one table a size; `told` is the head of the column of `speedup`."""
    tables = []
    for size, subjects in by_size(rows).items():
        head = [size.upper(), "CPU-s an image", told, *PHASES, "n"]
        lines = [
            [
                name,
                _interval(of["cpu_seconds_per_image"]),
                _interval(of[speedup]),
                *(f"{of[f'{phase}_cpu_seconds'].value:.3g}" for phase in PHASES),
                of["cpu_seconds_per_image"].n,
            ]
            for name, of in subjects.items()
            if "cpu_seconds_per_image" in of
        ]
        tables.append(markdown_table(head, lines))
    return "\n\n".join(tables)


def batches(rows: list[Row]) -> str:
    """Markdown: what forced tokens and batches are worth, a sentence a size."""
    parts = []
    for size, subjects in by_size(rows).items():
        tokens, forced = subjects["answer"]["answer_tokens"], subjects["forced tokens alone"]["decode_speedup"]
        part = f"{size.upper()}: forced tokens alone make the decode phase, {tokens.value:.0f} tokens, {_interval(forced)} times shorter."
        for name, of in subjects.items():
            if "batch_decode_speedup" in of:
                decode, whole = of["batch_decode_speedup"], of["batch_image_speedup"]
                part += f" {name[0].upper()}{name[1:]}: {_interval(decode)} times the tokens a CPU-second of an image alone, and "
                part += f"{_interval(whole)} times the images."
        parts.append(part)
    return "\n\n".join(parts)


def plot(rows: list[Row]) -> Figure:
    """CPU-seconds an image by phase, and tokens a CPU-second by batch; one line of panels a size."""
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
        told = {name: of for name, of in subjects.items() if "cpu_seconds_per_image" in of}
        start = np.zeros(len(told))
        for phase, color in zip(PHASES, COLORS, strict=True):
            values = np.array([of[f"{phase}_cpu_seconds"].value for of in told.values()])
            bars = left.barh(list(told), values, 0.7, start, color=color, label=phase)
            start += values
        left.bar_label(bars, [f"{total:.3g}" for total in start], padding=3, fontsize=8)
        left.invert_yaxis()
        left.margins(x=0.1)
        left.set(xlabel="CPU-seconds an image", title=size.upper())
        curves: dict[str, list[tuple[int, float]]] = {}
        for name, of in subjects.items():
            if "decoded_tokens_per_cpu_second" in of:
                who, batch = name.rsplit(", batch ", 1)
                curves.setdefault(who, []).append((int(batch), of["decoded_tokens_per_cpu_second"].value))
        for who, curve in curves.items():
            right.plot(*zip(*sorted(curve), strict=True), marker="o", label=who)
        right.set(xlabel="images in a batch", ylabel="tokens a CPU-second", ylim=(0, None), title="decode")
        right.legend(frameon=False, fontsize=7)
        for axis in (left, right):
            axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def rates(rows: list[Row]) -> str:
    """Markdown: shares with their intervals."""
    lines = [
        [row.subject, NAMES[row.metric], f"{100 * row.value:.2f} % ({100 * row.low:.2f}–{100 * row.high:.2f})", row.n]
        for row in rows
        if row.metric in NAMES
    ]
    return markdown_table(["what", "share", "95 % interval", "n"], lines)


def memory(rows: list[Row]) -> str:
    """A sentence: how much, and how much more at the end."""
    of = {row.metric: row for row in rows}
    peak, growth = of["peak_memory_gib"], of["memory_growth_share"]
    told = f"{peak.n:,} images of many sizes through `extract_many`: at most {peak.value:.2f} GiB resident"
    return f"{told}, and {100 * growth.value:+.1f} % from the second tenth of the images to the last."


def text(root: Path) -> str:
    """What stands between the marks of benchmarks/README.md."""
    parts = []
    for name, title, command, tell in (
        (
            "extract_cpu",
            "Cost per image",
            "extract.py",
            lambda rows: [
                headline(rows),
                _image("extract_cpu"),
                costs(rows, "speedup_vs_seed", "seed ÷ this"),
                batches(rows),
            ],
        ),
        (
            "extract_onnx",
            "ONNX Runtime",
            "extract_onnx.py",
            lambda rows: [
                rates(rows),
                costs([row for row in rows if row.metric not in NAMES], "speedup_vs_torch", "torch fp32 ÷ this"),
            ],
        ),
        ("extract_valid", "Validity for any image and any weights", "valid.py", lambda rows: [rates(rows)]),
        ("extract_memory", "Memory", "memory.py", lambda rows: [_image("extract_memory"), memory(rows)]),
    ):
        file = root / "results" / f"{name}.json"
        parts.append(f"### {title}")
        if file.exists():
            rows = read_results(file)
            where = f"[`results/{file.name}`](../results/{file.name})"
            parts += [*tell(rows), f"Source: {where}, `{rows[0].command}`, commit {rows[0].commit}, {rows[0].device}."]
        else:
            parts.append(f"Not measured yet: `.venv/bin/python benchmarks/{command}` does it.")
    return "\n\n".join(parts)


def headline(rows: list[Row]) -> str:
    """CPU-seconds per image before and after, by model size."""
    parts = []
    for size, subjects in by_size(rows).items():
        seed, ours = (next(of for name, of in subjects.items() if name.startswith(who)) for who in (SEED, OURS))
        parts.append(
            f"{ours['cpu_seconds_per_image'].value:.2g} CPU-seconds instead of {seed['cpu_seconds_per_image'].value:.3g} "
            f"at the size of SmolVLM2-{size.upper()}, {_interval(ours['speedup_vs_seed'])} times fewer"
        )
    return f"An answer takes {'; '.join(parts)}. The comparison is `transformers.pipeline` with 17 tiles, as in the original."


def render(results: Path) -> None:
    """Draw the plot beside what `extract.py` wrote; update benchmarks/README.md if `results` is the repository's."""
    rows = read_results(results) if results.exists() else []
    if any(row.benchmark == "extract_cpu" for row in rows):
        figure = plot(rows)
        figure.savefig(results.with_suffix(".png"), dpi=110)
        plt.close(figure)
    if results.resolve().parent == ROOT / "results":
        fill_in(ROOT / "benchmarks" / "README.md", "extract", text(ROOT))


def _interval(row: Row) -> str:
    return f"{row.value:.3g}" + (f" ({row.low:.3g}–{row.high:.3g})" if row.low is not None else "")


def _image(stem: str) -> str:
    told = {
        "extract_cpu": "CPU-seconds an image by phase, and tokens a CPU-second by batch",
        "extract_memory": "Memory by images answered",
    }
    return f"![{told[stem]}](../results/{stem}.png)"


if __name__ == "__main__":
    render(ROOT / "results" / "extract_cpu.json")
