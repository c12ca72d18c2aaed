"""Tables of what the serving benchmarks measured (results/serving.json and space.json); `tools/pages.py` shows them."""

from collections.abc import Callable
from pathlib import Path

from foodextract.evaluation.results import Row, read_results
from foodextract.reporting.tables import markdown_table

Figures = dict[tuple[str, str], Row]  # by subject and metric


def serving(root: Path) -> str:
    """Return the section on the server: a part for each benchmark that has run."""
    path = root / "results" / "serving.json"
    rows = read_results(path) if path.exists() else []
    parts = []
    for name, render in PARTS.items():
        own = [row for row in rows if row.benchmark == name]
        if own:
            parts += [render({(row.subject, row.metric): row for row in own}), _source(own[0])]
        else:
            parts.append(f"Not measured yet: `.venv/bin/python benchmarks/{name}.py` does it.")
    return "\n\n".join(parts)


def space(root: Path) -> str:
    """Return the section on the Space's page."""
    path = root / "results" / "space.json"
    if not path.exists():
        return "Not measured yet: `.venv/bin/python benchmarks/space_page.py` does it."
    rows = read_results(path)
    of = {row.subject: row for row in rows}
    users = of["ten at once"]
    lines = [
        ["from process start to the first answer", f"{of['start'].value:.1f}"],
        [f"from requesting the page until it is usable, mean of {of['page'].n}", _with_interval(of["page"], 2)],
        ["the same, slowest", f"{of['page, slowest'].value:.2f}"],
        [
            f"{users.value:.0f} of {users.n} simultaneous users answered, the last after",
            f"{of['ten at once, slowest'].value:.1f}",
        ],
    ]
    return f"{markdown_table(['what', 'seconds'], lines)}\n\n{_source(rows[0])}"


def _source(row: Row) -> str:
    return f"`{row.command}`, {row.device}, commit {row.commit}."


def _load(of: Figures) -> str:
    ours, flask = (of[name, "images_per_second"] for name in ("ours", "flask, one at a time"))
    faster = of["ours", "speedup_vs_flask"]
    throughput = (
        f"**{_with_interval(faster, 2)} times the throughput** of the Flask server in {faster.n} alternating rounds: "
        f"{_with_interval(ours, 1)} against {_with_interval(flask, 1)} images per second, "
        f"{ours.n:,} and {flask.n:,} images."
    )
    lines = []
    for subject in dict.fromkeys(subject for subject, metric in of if metric == "lost_or_unexpected"):
        shares = [f"{100 * of[subject, f'status_{code}_share'].value:.1f} %" for code in (200, 429, 504)]
        lost = of[subject, "lost_or_unexpected"]
        times = [_with_interval(of[subject, f"p{p}_seconds"], 2) for p in (50, 95, 99)]
        load = subject.removeprefix("ours, ").removesuffix(" load")
        lines.append([load, f"{lost.n:,}", *shares, f"{lost.value:.0f}", *times])
    header = ["load", "requests", "200", "429", "504", "lost or other status", "p50, s", "p95, s", "p99, s"]
    memory, grown = (of["ours, 2 x load", metric] for metric in ("peak_memory_gib", "memory_growth_share"))
    peak = f"Memory at 2 x load: at most {memory.value:.2f} GiB, "
    peak += f"{100 * grown.value:+.1f} % from the second tenth of the run to the last."
    plot = "![Seconds to an answer, and statuses, by load](../results/serving.png)"
    return "\n\n".join([throughput, markdown_table(header, lines), plot, peak])


def _faults(of: Figures) -> str:
    def count(subject: str, metric: str) -> str:
        row = of[subject, metric]
        return f"{row.value:,.0f} of {row.n:,}"

    changed, grown = of["honest among them", "spoilt"], of["hostile uploads", "memory_growth_share"]
    refused, back = of["hostile uploads", "refused_share"], of["SIGKILL", "seconds"]
    lines = [
        ["SIGTERM under load", "accepted requests lost", count("SIGTERM", "lost")],
        ["", "statuses other than 200 and 503", count("SIGTERM", "unexpected")],
        ["", "exit statuses other than 0", count("SIGTERM", "ended_badly")],
        ["SIGKILL", f"ready again after, longest of {back.n}", f"{back.value:.1f} s"],
        ["", "answers that differ from before", count("SIGKILL", "answers_changed")],
        ["hostile uploads", "refused with 4xx", f"{100 * refused.value:.1f} % of {refused.n:,}"],
        ["", "crashes", f"{of['hostile uploads', 'crashes'].value:.0f}"],
        ["", "memory growth", f"{100 * grown.value:+.1f} %"],
        ["", "valid images among them whose answer changed", f"{changed.value:.0f} of {changed.n}"],
        ["schemathesis", "failures, by requests made", count("schemathesis", "findings")],
    ]
    return markdown_table(["", "what", "measured"], lines)


def _start(of: Figures) -> str:
    sizes = dict.fromkeys(subject for subject, _ in of)
    lines = [[s, f"{of[s, 'seconds'].value:.1f}", f"{of[s, 'peak_memory_gib'].value:.2f}"] for s in sizes]
    most = f"size (maximum of {max(row.n for row in of.values())} starts)"
    return markdown_table([most, "start to ready, s", "peak memory until the first answer, GiB"], lines)


def _with_interval(row: Row, digits: int) -> str:
    bounds = f" ({row.low:.{digits}f}–{row.high:.{digits}f})" if row.low is not None else ""
    return f"{row.value:.{digits}f}{bounds}"


PARTS: dict[str, Callable[[Figures], str]] = {"serve_load": _load, "serve_faults": _faults, "serve_start": _start}
