"""What several benchmarks share to write, draw and report their results."""

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from foodextract.evaluation.results import Row, read_results, write_results


def write_beside(path: Path, rows: Sequence[Row], kept: Callable[[Row], bool]) -> None:
    """Replace a results file by `rows` and those of its own that are `kept`."""
    found = read_results(path) if path.exists() else []
    write_results(path, [*rows, *filter(kept, found)])


def with_interval(row: Row, digits: str = ".3g") -> str:
    """Write a figure and, where it has one, its interval; `digits` is a format."""
    bounds = f" ({row.low:{digits}}–{row.high:{digits}})" if row.low is not None else ""
    return f"{row.value:{digits}}{bounds}"


def save_plot(figure: Figure, results: Path) -> None:
    """Save a plot beside its results file."""
    figure.savefig(results.with_suffix(".png"), dpi=110)
    plt.close(figure)
