"""Markdown tables and sentences that only the repository's pages show."""

from collections.abc import Sequence
from dataclasses import replace

from foodextract.evaluation.results import Row
from foodextract.reporting.tables import (
    MORE_NAMES,
    NAMES,
    SUBJECTS,
    format_row,
    is_percentage,
    item_table,
    markdown_table,
    metric_table,
    number,
    subject_name,
)

ALL_NAMES = NAMES | MORE_NAMES | {"item_recall_micro": "labeled items named, of all names"}
OUTCOMES = ("strict_json_rate", "is_food_accuracy", "item_f1_micro")  # of an experiment that answers in JSON
CLASSES = {
    "template_rate": "captions in the trained form",
    "class_accuracy": "right class named",
}  # of one that captions
EFFECTS = (*OUTCOMES, "item_f1_micro_lenient")
MODES = ("free", "constrained")  # the subject `base` is free, `base constrained` is constrained

PHOTO_METRICS = {
    "is_food_accuracy": "`is_food` right",
    "known_item_recall": "labeled items named, of the names it knows",
    "hallucination_rate": "items invented where there is neither food nor drink (lower is better)",
    "item_precision": "named items that are right",
    "strict_json_rate": "strict JSON",
}
PHOTO_SUBJECTS = {
    "photo constrained": "photo model",
    "photo": "photo model, no grammar",
    "linear probe": "linear probe",
    "nearest": "nearest photograph",
    "drawings constrained": "drawings model",
    "majority": "most frequent label",
}
BEST_AND_WORST = 20


def photographs(rows: Sequence[Row], subjects: Sequence[str] = tuple(PHOTO_SUBJECTS)) -> str:
    """Return the table of results/photographs.json, one column per subject.

    The baselines write JSON by construction, so their share of strict JSON says nothing.
    """
    aliases = {"photo | min confidence 0": "photo constrained"}  # the precision is measured by `--min-confidence`
    cells = {(row.metric, aliases.get(row.subject, row.subject)): row for row in rows}
    for subject in set(subjects) - {"photo", "photo constrained"}:
        cells.pop(("strict_json_rate", subject), None)
    lines = []
    for metric, name in PHOTO_METRICS.items():
        n = max(cells[metric, subject].n for subject in subjects if (metric, subject) in cells)
        lines.append([f"{name}, n = {n:,}", *(format_row(cells.get((metric, subject))) for subject in subjects)])
    return markdown_table(["", *(PHOTO_SUBJECTS[subject] for subject in subjects)], lines)


def photographs_in_full(rows: Sequence[Row]) -> str:
    """Return tables of the photo model by license class and number of items, and its best and worst names."""
    ours = [row for row in rows if row.subject.startswith("photo constrained | ")]
    groups = [row for row in ours if " | from " not in row.subject and " | name " not in row.subject]
    names = [row for row in ours if " | name " in row.subject]
    names.sort(key=lambda row: (-row.value, -row.n, row.subject))
    tables = [group_table(groups, "is_food_accuracy")]
    tables.append(group_table([row for row in groups if " | 0 items" not in row.subject], "item_recall_micro"))

    def listed(some: Sequence[Row]) -> str:
        shares = ((row.subject.partition(" | name ")[2], row.value, row.n) for row in some)
        return ", ".join(f"{name} {value * 100:.0f} % of {n}" for name, value, n in shares)

    best, worst = names[:BEST_AND_WORST], names[::-1][:BEST_AND_WORST]
    return "\n\n".join([*tables, f"Best known names: {listed(best)}.", f"Worst: {listed(worst)}."])


def photo_tower(rows: Sequence[Row]) -> str:
    """How near the photo model's vision tower is to DINOv2."""
    patches, cls = ({row.metric: row for row in rows}[name] for name in ("patch_cosine", "cls_cosine"))
    return (
        f"The tower's patch features have a cosine of {patches.value:.3f} to DINOv2's own, its CLS token one of "
        f"{cls.value:.3f} ({patches.n} photographs)."
    )


def photo_scenes(rows: Sequence[Row]) -> str:
    """The photo model's answers to drawn scenes; `other_scenes.py` calls every model "tuned"."""
    return metric_table([replace(row, subject=row.subject.replace("tuned", "photo")) for row in rows])


def dataset_quality(rows: Sequence[Row]) -> str:
    """How many injected label errors the lint finds, and how often it is wrong."""
    found, alarms = (
        next(row for row in rows if (row.subject, row.metric) == ("all", metric))
        for metric in ("faults_found_share", "false_alarm_share")
    )
    kinds = sum(row.metric == found.metric for row in rows) - 1
    return (
        f"The lint finds {format_row(found)} of {found.n:,} injected label errors of {kinds} kinds, and raises a false "
        f"alarm on {format_row(alarms)} of {alarms.n:,} correct labels."
    )


def near_duplicates(rows: Sequence[Row]) -> str:
    """How many injected near-duplicates are found, and how many images are grouped by mistake."""
    found, mistaken = ({row.metric: row for row in rows}[name] for name in ("recall", "falsely_grouped_rows"))
    return (
        f"Of {found.n:,} resized, recompressed, mirrored or cropped copies, {format_row(found)} are found; of "
        f"{mistaken.n:,} different drawings, {format_row(mistaken)} are grouped by mistake."
    )


def photo_subsets(rows: Sequence[Row]) -> str:
    """What is learned from parts of the photographs, one line a part."""
    found = {(row.subject, row.metric): row for row in rows}
    named, probe, model = "labeled items named", "linear probe", "language model"
    columns = {
        f"{named}: nearest photograph": ("nearest", "known_item_recall"),
        f"{named}: {probe}": (probe, "known_item_recall"),
        f"{named}: {model}": (model, "known_item_recall"),
        f"`is_food` right: {probe}": (probe, "is_food_accuracy"),
        f"`is_food` right: {model}": (model, "is_food_accuracy"),
        f"items invented where there are none: {probe}": (probe, "hallucination_rate"),
        f"items invented where there are none: {model}": (model, "hallucination_rate"),
    }
    parts = [row.subject for row in rows if row.metric == "photographs"]
    cells = ([found.get((f"{way} | {part}", metric)) for way, metric in columns.values()] for part in parts)
    lines = [[part, *map(format_row, row)] for part, row in zip(parts, cells, strict=True)]
    return markdown_table(["trained on", *columns], lines)


def mode_table(
    rows: Sequence[Row], subjects: Sequence[str] = ("base", "stage2"), metrics: Sequence[str] = tuple(NAMES)
) -> str:
    """Return a table of metrics, free and constrained side by side, one pair of columns per subject."""
    cells = {(row.metric, row.subject): row for row in rows}
    columns = {
        f"{SUBJECTS.get(subject, subject)}, {mode}": subject if mode == "free" else f"{subject} {mode}"
        for subject in subjects
        for mode in MODES
    }
    lines = [[NAMES[m], *(format_row(cells.get((m, subject))) for subject in columns.values())] for m in metrics]
    return markdown_table(["", *columns], lines)


def group_table(rows: Sequence[Row], metric: str) -> str:
    """Return a table of one metric by group of images (subjects `name | group`), one column per name."""
    cells = {tuple(row.subject.split(" | ")): row for row in rows if row.metric == metric and " | " in row.subject}
    subjects, groups = (list(dict.fromkeys(key[part] for key in cells)) for part in (0, 1))
    lines = []
    for group in groups:
        line = [cells.get((subject, group)) for subject in subjects]
        lines.append([f"{group}, n = {max(cell.n for cell in line if cell)}", *map(format_row, line)])
    return markdown_table([ALL_NAMES.get(metric, metric), *map(subject_name, subjects)], lines)


def difference_table(rows: Sequence[Row]) -> str:
    """Return a table of paired differences with interval and p value, one column per `a minus b`."""
    cells = {(row.metric, row.subject): row for row in rows if " minus " in row.subject}
    subjects, lines = list(dict.fromkeys(subject for _, subject in cells)), []
    for metric, name in ALL_NAMES.items():
        pairs = [(cells.get((f"{metric}_difference", s)), cells.get((f"{metric}_p", s))) for s in subjects]
        if any(change and p for change, p in pairs):
            lines.append([name, *(f"{_change(c)}, {_p_value(p)}" if c and p else "–" for c, p in pairs)])
    return markdown_table(["", *(" minus ".join(map(subject_name, s.split(" minus "))) for s in subjects)], lines)


def effect_table(rows: Sequence[Row]) -> str:
    """Return a table of the ablation: the mean over seeds of each choice, above the difference to its reference."""
    rows = [row for row in rows if " | " not in row.subject]  # without the single runs
    cells = {(row.metric, row.subject): row for row in rows}
    subjects = dict.fromkeys(row.subject for row in rows)
    against = dict(subject.split(" minus ") for subject in subjects if " minus " in subject)
    lines = []
    for subject in [subject for subject in subjects if " minus " not in subject]:
        changes = [cells.get((f"{metric}_difference", f"{subject} minus {against.get(subject)}")) for metric in EFFECTS]
        means = [format_row(cells.get((metric, subject))) for metric in EFFECTS]
        both = [mean + (f"<br>{_change(row)}" if row else "") for mean, row in zip(means, changes, strict=True)]
        lines.append([subject, against.get(subject, ""), *both])
    header = [f"{max(row.n for row in rows)} seeds", "against", *(ALL_NAMES[metric] for metric in EFFECTS)]
    return markdown_table(header, lines)


def effect_sentences(rows: Sequence[Row]) -> str:
    """Return one list item per choice of the ablation: what its intervals show for form (JSON) and content (items)."""
    cells = {(row.metric, row.subject): row for row in rows if " minus " in row.subject}
    lines = []
    for subject in dict.fromkeys(subject for _, subject in cells):
        verdicts = []
        for metric, name in (
            ("strict_json_rate", "strict JSON"),
            ("item_f1_micro_lenient", "item F1 (lenient parser)"),
        ):
            row = cells[f"{metric}_difference", subject]
            verdict = "better" if row.low > 0 else "worse" if row.high < 0 else "no difference shown"
            verdicts.append(f"{name} {_change(row)}, {verdict}")
        choice, against = subject.split(" minus ")
        lines.append(f"- **{choice}** instead of *{against}*: {'; '.join(verdicts)}.")
    return "\n".join(lines)


def outcome_table(rows: Sequence[Row]) -> str:
    """Return a table of the archived experiments, one line per experiment and subject."""
    cells = {(row.benchmark, row.subject, row.metric): row for row in rows}
    names, lines = {metric: NAMES[metric] for metric in OUTCOMES} | CLASSES, []
    for experiment, subject in dict.fromkeys((row.benchmark, row.subject) for row in rows if row.metric in names):
        line = [cells.get((experiment, subject, metric)) for metric in names]
        losses = [cells.get((experiment, subject, metric)) for metric in ("loss_first", "loss_last")]
        loss = " → ".join(f"{row.value:.3f}" for row in losses if row) if all(losses) else "–"
        n = max(row.n for row in line if row)
        lines.append([f"`{experiment}`", f"{subject_name(subject)}, n = {n}", loss, *map(format_row, line)])
    return markdown_table(["experiment", "subject", "training loss, first and last step", *names.values()], lines)


def offline_in_full(rows: Sequence[Row]) -> str:
    """The metrics that README leaves out, and the items after stage 2."""
    names = {"schema_valid_rate": NAMES["schema_valid_rate"]} | MORE_NAMES
    return f"{metric_table([row for row in rows if row.low is not None], names)}\n\n{item_table(rows, 'stage2')}"


def baselines(rows: Sequence[Row]) -> str:
    """All subjects free, base and tuned model in both modes, and the lead of the tuned model."""
    free = [row for row in rows if not row.subject.endswith(" constrained")]
    return f"{metric_table(free)}\n\n{mode_table(rows, ('base', 'tuned'))}\n\n{difference_table(rows)}"


def baselines_in_full(rows: Sequence[Row]) -> str:
    """The metrics that `baselines` leaves out, and breakdowns by number of items and by source."""
    groups = [group_table(rows, metric) for metric in ("is_food_accuracy", "item_f1_micro")]
    return "\n\n".join([metric_table(rows, MORE_NAMES), item_table(rows, "tuned"), *groups])


def dialects(rows: Sequence[Row]) -> str:
    return metric_table(rows, {name: ALL_NAMES[name] for name in EFFECTS})


def batch_job(rows: Sequence[Row]) -> str:
    """Throughput and memory of deploy/ray, each with its lowest and highest run where there are several."""
    lines = []
    for row in rows:
        among = "" if row.low is None else f" ({row.low:.3g}–{row.high:.3g})"
        lines.append([row.subject, f"{row.value:.3g}{among} {row.unit}", row.n])
    source = f"`{rows[0].command}`, {rows[0].device}, commit {rows[0].commit}."
    return f"{markdown_table(['what', 'median (lowest–highest)', 'runs'], lines)}\n\n{source}"


def _change(row: Row) -> str:
    value, low, high = (number(row, v, "+") for v in (row.value, row.low, row.high))
    return f"{value}{' points' if is_percentage(row) else ''} ({low} to {high})"


def _p_value(row: Row) -> str:
    return "p < 0.001" if row.value < 0.001 else f"p = {row.value:.3f}"
