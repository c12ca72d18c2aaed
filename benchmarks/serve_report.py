"""Tables of what the serving benchmarks measured (results/serving.json and space.json); `tools/pages.py` shows them."""

from collections.abc import Callable

from foodextract.evaluation.results import Row
from foodextract.reporting.tables import markdown_table
from reports import with_interval

Figures = dict[tuple[str, str], Row]  # by subject and metric


def serving(rows: list[Row]) -> str:
    """Return the section on the server: a part for each benchmark."""
    parts = []
    for name, render in PARTS.items():
        own = [row for row in rows if row.benchmark == name]
        parts += [render({(row.subject, row.metric): row for row in own}), _source(own[0])]
    return "\n\n".join(parts)


def space(rows: list[Row]) -> str:
    """Return the section on the Space's page."""
    of = {row.subject: row for row in rows}
    users = of["ten at once"]
    lines = [
        ["from process start to the first answer", f"{of['start'].value:.1f}"],
        [f"from requesting the page until it is usable, mean of {of['page'].n}", with_interval(of["page"], ".2f")],
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
        f"**{with_interval(faster, '.2f')} times the throughput** of the Flask server in {faster.n} alternating "
        f"rounds: {with_interval(ours, '.1f')} against {with_interval(flask, '.1f')} images per second, "
        f"{ours.n:,} and {flask.n:,} images."
    )
    lines = []
    for subject in dict.fromkeys(subject for subject, metric in of if metric == "lost_or_unexpected"):
        shares = [f"{100 * of[subject, f'status_{code}_share'].value:.1f} %" for code in (200, 429, 504)]
        lost = of[subject, "lost_or_unexpected"]
        times = [with_interval(of[subject, f"p{p}_seconds"], ".2f") for p in (50, 95, 99)]
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


PARTS: dict[str, Callable[[Figures], str]] = {"serve_load": _load, "serve_faults": _faults, "serve_start": _start}
