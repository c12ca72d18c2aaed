"""Write the tables of README.md in this folder from results/serving.json and results/space.json.

python benchmarks/serve_report.py      # after the benchmarks have run elsewhere
"""

from collections.abc import Callable
from pathlib import Path

from foodextract.evaluation.results import Row, read_results
from foodextract.reporting.tables import markdown_table
from pages import fill_in

Figures = dict[tuple[str, str], Row]  # by subject and metric


def serving(root: Path) -> str:
    """Return the section of the serving benchmarks, one part for each."""
    results = root / "results" / "serving.json"
    rows = read_results(results) if results.exists() else []
    parts = []
    for name, part in PARTS.items():
        own = [row for row in rows if row.benchmark == name]
        how = (
            f"`{own[0].command}`, {own[0].device}, commit {own[0].commit}"
            if own
            else f"run `.venv/bin/python benchmarks/{name}.py`"
        )
        parts.append(
            f"{part({(row.subject, row.metric): row for row in own})}\n\n{how}."
            if own
            else f"`{name}` is not measured yet: {how}."
        )
    return "\n\n".join(parts)


def space(root: Path) -> str:
    """Return the section of the Space's page."""
    results = root / "results" / "space.json"
    if not results.exists():
        return "Not measured yet: run `.venv/bin/python benchmarks/space_page.py`."
    rows = read_results(results)
    of = {row.subject: row for row in rows}
    lines = [
        ["from process start to first answer", f"{of['start'].value:.1f}"],
        [f"from request of the page until it is usable, mean of {of['page'].n}", _with_interval(of["page"], 2)],
        ["the same, slowest", f"{of['page, slowest'].value:.2f}"],
        [
            f"{of['ten at once'].value:.0f} of {of['ten at once'].n} simultaneous users answered, the last after",
            f"{of['ten at once, slowest'].value:.1f}",
        ],
    ]
    table = markdown_table(["what", "seconds"], lines)
    return f"{table}\n\n`{rows[0].command}`, {rows[0].device}, commit {rows[0].commit}."


SECTIONS: dict[str, Callable[[Path], str]] = {"serving": serving, "space": space}  # in benchmarks/README.md


def render(root: Path) -> None:
    """Update benchmarks/README.md."""
    for name, of in SECTIONS.items():
        fill_in(root / "benchmarks" / "README.md", name, of(root))


def _load(of: Figures) -> str:
    ours, flask = (of[name, "images_per_second"] for name in ("ours", "flask, one at a time"))
    faster = of["ours", "speedup_vs_flask"]
    claim = (
        f"**{_with_interval(faster, 2)} times the throughput** of the Flask server in {faster.n} rounds in which the "
        f"two took turns: {_with_interval(ours, 1)} against {_with_interval(flask, 1)} images a second, {ours.n:,} and "
        f"{flask.n:,} images."
    )
    lines = []
    for subject in dict.fromkeys(subject for subject, metric in of if metric == "lost_or_unexpected"):
        shares = [f"{100 * of[subject, f'status_{code}_share'].value:.1f} %" for code in (200, 429, 504)]
        lost, times = (
            of[subject, "lost_or_unexpected"],
            [_with_interval(of[subject, f"p{p}_seconds"], 2) for p in (50, 95, 99)],
        )
        lines.append(
            [subject.removeprefix("ours, ").removesuffix(" load"), f"{lost.n:,}", *shares, f"{lost.value:.0f}", *times]
        )
    head = ["load", "requests", "200", "429", "504", "lost, or another status", "p50, s", "p95, s", "p99, s"]
    memory, grown = (of["ours, 2 x load", metric] for metric in ("peak_memory_gib", "memory_growth_share"))
    change = f"{100 * grown.value:+.1f} % from the second tenth of the time to the last"
    under = f"Memory under twice the load: {memory.value:.2f} GiB at most, {change}."
    plot = "![Seconds to an answer, and statuses, by load](../results/serving.png)"
    return "\n\n".join([claim, markdown_table(head, lines), plot, under])


def _faults(of: Figures) -> str:
    def count(subject: str, metric: str) -> str:
        row = of[subject, metric]
        return f"{row.value:,.0f} of {row.n:,}"

    spoilt, grown = of["honest among them", "spoilt"], of["hostile uploads", "memory_growth_share"]
    refused, back = of["hostile uploads", "refused_share"], of["SIGKILL", "seconds"]
    lines = [
        ["SIGTERM under load", "accepted requests lost", count("SIGTERM", "lost")],
        ["", "answers other than 200 and 503", count("SIGTERM", "unexpected")],
        ["", "exit status other than 0", count("SIGTERM", "ended_badly")],
        ["SIGKILL", f"ready again after, longest of {back.n}", f"{back.value:.1f} s"],
        ["", "answers that differ from before", count("SIGKILL", "answers_changed")],
        ["hostile uploads", "rejected with 4xx", f"{100 * refused.value:.1f} % of {refused.n:,}"],
        ["", "crashes", f"{of['hostile uploads', 'crashes'].value:.0f}"],
        ["", "growth of memory", f"{100 * grown.value:+.1f} %"],
        ["", "honest images among them with a changed answer", f"{spoilt.value:.0f} of {spoilt.n}"],
        ["schemathesis", "findings, by requests made", count("schemathesis", "findings")],
    ]
    return markdown_table(["", "what", "measured"], lines)


def _start(of: Figures) -> str:
    sizes = dict.fromkeys(subject for subject, _ in of)
    lines = [
        [size, *(f"{of[size, metric].value:.{digits}f}" for metric, digits in (("seconds", 1), ("peak_memory_gib", 2)))]
        for size in sizes
    ]
    n = max(row.n for row in of.values())
    return markdown_table(
        [f"size (longest and most of {n} starts)", "start to ready, s", "most memory until one answer, GiB"], lines
    )


def _with_interval(row: Row, digits: int) -> str:
    bounds = f" ({row.low:.{digits}f}–{row.high:.{digits}f})" if row.low is not None else ""
    return f"{row.value:.{digits}f}{bounds}"


PARTS: dict[str, Callable[[Figures], str]] = {"serve_load": _load, "serve_faults": _faults, "serve_start": _start}


if __name__ == "__main__":
    render(Path(__file__).resolve().parents[1])
