"""Markdown tables of what was measured. Knows the results format, not how a number came to be."""

from collections.abc import Iterable, Mapping, Sequence

from foodextract.evaluation.results import Row

NAMES = {  # the few figures that stand in README and cards
    "strict_json_rate": "strict JSON that fits the schema",
    "schema_valid_rate": "valid JSON of the right shape, any spacing",
    "is_food_accuracy": "`is_food` accuracy",
    "item_f1_micro": "item F1 (micro, exact name)",
    "food_f1_micro": "food F1",
    "drink_f1_micro": "drink F1",
    "hallucination_rate": "items named where there are none (lower is better)",
}
MORE_NAMES = {  # the others, but precision, recall and F1 of the items, which `item_table` shows
    "is_food_balanced_accuracy": "`is_food` balanced accuracy",
    "is_food_f1": "`is_food` F1",
    "is_food_mcc": "`is_food` correlation (MCC)",
    "item_f1_micro_soft": "item F1 (names spelled alike count)",
    "item_f1_micro_lenient": "item F1 (of whatever can be read)",
    "item_f1_macro": "item F1 (mean over images)",
    "title_similarity": "title similarity",
    "repetition_rate": "answers that repeat themselves (lower is better)",
    "truncation_rate": "answers cut off (lower is better)",
    "answer_characters": "characters an answer",
}
OUTCOMES = ("strict_json_rate", "is_food_accuracy", "item_f1_micro")  # of an experiment that answers in JSON
CLASSES = {
    "template_rate": "captions in the trained form",
    "class_accuracy": "right class named",
}  # of one that captions
EFFECTS = ("strict_json_rate", "is_food_accuracy", "item_f1_micro", "item_f1_micro_lenient")
SUBJECTS = {"base": "base", "stage1": "after stage 1", "stage2": "after stage 2", "nearest": "nearest image"}
MODES = ("free", "constrained")  # free is the plain subject, such as `base`; constrained is `base constrained`


def subject_name(subject: str) -> str:
    """`stage2 constrained` → `after stage 2, constrained`."""
    who, *how = subject.split()
    return ", ".join([SUBJECTS.get(who, who), *([" ".join(how)] if how else [])])


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; bars inside cells are escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def metric_table(rows: Sequence[Row], names: Mapping[str, str] = NAMES) -> str:
    """Markdown: one line a metric, one column a subject, every figure with its 95 % interval, n in the head. Groups are left out."""
    rows = [row for row in rows if row.metric in names and " | " not in row.subject]
    subjects = list(dict.fromkeys(row.subject for row in rows))
    figures = {(row.metric, row.subject): row for row in rows}
    n = max(row.n for row in rows)
    lines = []
    for metric, name in names.items():
        of = {figures[metric, subject].n for subject in subjects if (metric, subject) in figures}
        if of:
            note = "" if of == {n} else f", n = {', '.join(map(str, sorted(of)))}"
            lines.append([name + note, *(_cell(figures.get((metric, subject))) for subject in subjects)])
    return markdown_table([f"n = {n}", *map(subject_name, subjects)], lines)


def mode_table(
    rows: Sequence[Row], subjects: Sequence[str] = ("base", "stage2"), metrics: Sequence[str] = tuple(NAMES)
) -> str:
    """Markdown: each of a few metrics free and constrained side by side, one pair of columns a subject. A cell not measured is a dash."""
    figures = {(row.metric, row.subject): row for row in rows}
    asked = [subject if mode == "free" else f"{subject} {mode}" for subject in subjects for mode in MODES]
    head = [f"{SUBJECTS.get(subject, subject)}, {mode}" for subject in subjects for mode in MODES]
    lines = [[NAMES[metric], *(_cell(figures.get((metric, subject))) for subject in asked)] for metric in metrics]
    return markdown_table(["", *head], lines)


def item_table(rows: Sequence[Row], subject: str) -> str:
    """Markdown: precision, recall and F1 of one subject's items, foods and drinks; over all items (micro) and over images (macro)."""
    figures = {row.metric: row for row in rows if row.subject == subject}
    lines = []
    for shelf, name in (("item", "food and drink"), ("food", "food"), ("drink", "drink")):
        for tail, match in (("", "exact"), ("_soft", "spelled alike")):
            cells = [
                figures.get(f"{shelf}_{what}_{over}{tail}")
                for over in ("micro", "macro")
                for what in ("precision", "recall", "f1")
            ]
            lines.append([f"{name}, {match}", *map(_cell, cells)])
    return markdown_table(
        [subject_name(subject), *(f"{w}, {o}" for o in ("micro", "macro") for w in ("precision", "recall", "F1"))],
        lines,
    )


def group_table(rows: Sequence[Row], metric: str) -> str:
    """Markdown: one metric by groups of images (rows whose subject is `subject | group`), one line a group, one column a subject."""
    figures = {tuple(row.subject.split(" | ")): row for row in rows if row.metric == metric and " | " in row.subject}
    subjects, groups = (list(dict.fromkeys(key[place] for key in figures)) for place in (0, 1))
    lines = []
    for group in groups:
        cells = [figures.get((subject, group)) for subject in subjects]
        lines.append([f"{group}, n = {max(cell.n for cell in cells if cell)}", *map(_cell, cells)])
    return markdown_table([{**NAMES, **MORE_NAMES}.get(metric, metric), *map(subject_name, subjects)], lines)


def difference_table(rows: Sequence[Row]) -> str:
    """Markdown: one line a metric, one column a `who minus whom`, each difference with its paired 95 % interval and p value."""
    figures = {(row.metric, row.subject): row for row in rows if " minus " in row.subject}
    subjects = list(dict.fromkeys(subject for _, subject in figures))
    lines = []
    for metric, name in {**NAMES, **MORE_NAMES}.items():
        cells = [
            _difference_cell(figures.get((f"{metric}_difference", s)), figures.get((f"{metric}_p", s)))
            for s in subjects
        ]
        if any(cell != "–" for cell in cells):
            lines.append([name, *cells])
    return markdown_table(
        ["", *(" minus ".join(map(subject_name, subject.split(" minus "))) for subject in subjects)], lines
    )


def effect_table(rows: Sequence[Row]) -> str:
    """Markdown: one line a choice, one column a metric: the mean over seeds, and below it the difference to what it is measured against."""
    rows = [row for row in rows if " | " not in row.subject]  # single runs
    figures = {(row.metric, row.subject): row for row in rows}
    everything = dict.fromkeys(row.subject for row in rows)
    against = dict(subject.split(" minus ") for subject in everything if " minus " in subject)
    lines = []
    for subject in [subject for subject in everything if " minus " not in subject]:
        changes = [
            figures.get((f"{metric}_difference", f"{subject} minus {against.get(subject)}")) for metric in EFFECTS
        ]
        cells = [
            _cell(figures.get((metric, subject))) + (f"<br>{_change(row)}" if row else "")
            for metric, row in zip(EFFECTS, changes, strict=True)
        ]
        lines.append([subject, against.get(subject, ""), *cells])
    n = max(row.n for row in rows)
    return markdown_table([f"{n} seeds", "against", *({**NAMES, **MORE_NAMES}[metric] for metric in EFFECTS)], lines)


def effect_sentences(rows: Sequence[Row]) -> str:
    """Markdown: one line a choice, with what its interval allows to say of form (strict JSON) and of content (items, read leniently)."""
    figures = {(row.metric, row.subject): row for row in rows if " minus " in row.subject}
    lines = []
    for subject in dict.fromkeys(subject for _, subject in figures):
        told = []
        for metric, name in (
            ("strict_json_rate", "strict JSON"),
            ("item_f1_micro_lenient", "item F1, however written"),
        ):
            row = figures[f"{metric}_difference", subject]
            verdict = "better" if row.low > 0 else "worse" if row.high < 0 else "no difference shown"
            told.append(f"{name} {_change(row)}, {verdict}")
        choice, against = subject.split(" minus ")
        lines.append(f"- **{choice}** instead of *{against}*: {'; '.join(told)}.")
    return "\n".join(lines)


def outcome_table(rows: Sequence[Row]) -> str:
    """Markdown: one line for everybody who answered in an experiment. What an experiment does not measure is a dash."""
    figures = {(row.benchmark, row.subject, row.metric): row for row in rows}
    names = {metric: NAMES[metric] for metric in OUTCOMES} | CLASSES
    lines = []
    for experiment, subject in dict.fromkeys((row.benchmark, row.subject) for row in rows if row.metric in names):
        answered = [figures.get((experiment, subject, metric)) for metric in names]
        losses = [figures.get((experiment, subject, metric)) for metric in ("loss_first", "loss_last")]
        loss = " → ".join(f"{row.value:.3f}" for row in losses) if all(losses) else "–"
        n = max(row.n for row in answered if row)
        lines.append([f"`{experiment}`", f"{subject_name(subject)}, n = {n}", loss, *map(_cell, answered)])
    return markdown_table(["experiment", "who", "training loss, first and last step", *names.values()], lines)


def _cell(row: Row | None) -> str:
    if row is None:
        return "–"
    low_to_high = f" ({_number(row, row.low)}–{_number(row, row.high)})" if row.low is not None else ""
    return f"{_number(row, row.value)}{' %' if _in_percent(row) else ''}{low_to_high}"


def _difference_cell(row: Row | None, p: Row | None) -> str:
    if row is None or p is None:
        return "–"
    return f"{_change(row)}, p {'< 0.001' if p.value < 0.001 else f'= {p.value:.3f}'}"


def _change(row: Row) -> str:
    value, low, high = (_number(row, v, "+") for v in (row.value, row.low, row.high))
    return f"{value}{' points' if _in_percent(row) else ''} ({low} to {high})"


def _in_percent(row: Row) -> bool:
    return row.metric.removesuffix("_difference").endswith(("_rate", "_accuracy", "_share"))


def _number(row: Row, value: float, sign: str = "") -> str:
    if _in_percent(row):
        return f"{100 * value:{sign}.1f}"
    return f"{value:{sign}.{0 if row.unit == 'characters' else 3}f}"
