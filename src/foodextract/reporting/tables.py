"""Markdown tables and sentences from results rows. Knows the results format, not how a number came to be."""

from collections.abc import Iterable, Mapping, Sequence

from foodextract.evaluation.results import Row

NAMES = {  # the metrics of cards, the Space and notebooks
    "strict_json_rate": "strict JSON that fits the schema",
    "schema_valid_rate": "valid JSON of the right shape, any spacing",
    "is_food_accuracy": "`is_food` accuracy",
    "item_f1_micro": "item F1 (micro, exact name)",
    "food_f1_micro": "food F1",
    "drink_f1_micro": "drink F1",
    "hallucination_rate": "items named where there are none (lower is better)",
}
MORE_NAMES = {  # the others, except precision, recall and F1 of items, which `item_table` shows
    "is_food_balanced_accuracy": "`is_food` balanced accuracy",
    "is_food_f1": "`is_food` F1",
    "is_food_mcc": "`is_food` correlation (MCC)",
    "item_f1_micro_soft": "item F1 (names of similar spelling match)",
    "item_f1_micro_lenient": "item F1 (lenient parser)",
    "item_f1_macro": "item F1 (mean over images)",
    "title_similarity": "title similarity",
    "title_agreement_rate": "titles that name only listed items",
    "repetition_rate": "answers that repeat themselves (lower is better)",
    "truncation_rate": "truncated answers (lower is better)",
    "answer_characters": "characters per answer",
}
SUBJECTS = {"base": "base", "stage1": "after stage 1", "stage2": "after stage 2", "nearest": "nearest image"}


def subject_name(subject: str) -> str:
    """Write a subject for readers: `stage2 constrained` becomes "after stage 2, constrained"."""
    name, *mode = subject.split()
    return ", ".join([SUBJECTS.get(name, name), *([" ".join(mode)] if mode else [])])


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table; bars inside cells are escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def metric_table(rows: Sequence[Row], names: Mapping[str, str] = NAMES) -> str:
    """Return a table with one line per metric and one column per subject; groups of images are left out."""
    rows = [row for row in rows if row.metric in names and " | " not in row.subject]
    subjects = list(dict.fromkeys(row.subject for row in rows))
    cells = {(row.metric, row.subject): row for row in rows}
    most, lines = max(row.n for row in rows), []
    for metric, name in names.items():
        counts = {cells[metric, subject].n for subject in subjects if (metric, subject) in cells}
        if counts:
            note = "" if counts == {most} else f", n = {', '.join(map(str, sorted(counts)))}"
            lines.append([name + note, *(format_row(cells.get((metric, subject))) for subject in subjects)])
    return markdown_table([f"n = {most}", *map(subject_name, subjects)], lines)


def item_table(rows: Sequence[Row], subject: str) -> str:
    """Return a table of precision, recall and F1 of one subject's foods and drinks, micro and macro."""
    cells = {row.metric: row for row in rows if row.subject == subject}
    columns = [(average, what) for average in ("micro", "macro") for what in ("precision", "recall", "f1")]
    lines = [
        [f"{name}, {match}", *(format_row(cells.get(f"{kind}_{what}_{average}{suffix}")) for average, what in columns)]
        for kind, name in (("item", "food and drink"), ("food", "food"), ("drink", "drink"))
        for suffix, match in (("", "exact"), ("_soft", "similar spelling"))
    ]
    return markdown_table(
        [subject_name(subject), *(f"{what.replace('f1', 'F1')}, {average}" for average, what in columns)], lines
    )


def stage_comparison(rows: Sequence[Row]) -> str:
    """Say what stage 2 adds to stage 1; a difference is claimed only where the intervals do not overlap."""
    cells = {(row.metric, row.subject): row for row in rows if row.low is not None}
    sentences = []
    for metric, name, sign in (
        ("item_f1_micro", "Item F1", 1),
        ("hallucination_rate", "The share of images without food or drink for which items are invented", -1),
    ):
        before, after = cells.get((metric, "stage1")), cells.get((metric, "stage2"))
        if before and after:
            (low, high), (lowest, highest) = before.interval, after.interval
            change = sign * ((lowest > high) - (highest < low))
            verdict = {1: "better", 0: "no measurable difference, the intervals overlap", -1: "worse"}[change]
            figures = f"{format_row(before)} after stage 1 and {format_row(after)} after stage 2"
            sentences.append(f"{name} is {figures}, n = {after.n}: {verdict}.")
    return " ".join(sentences)


def format_row(row: Row | None) -> str:
    """Write a figure with its interval, as a percentage where it is a rate; a dash where there is none."""
    if row is None:
        return "–"
    interval = " ({}–{})".format(*(number(row, bound) for bound in row.interval)) if row.low is not None else ""
    return f"{number(row, row.value)}{' %' if is_percentage(row) else ''}{interval}"


def is_percentage(row: Row) -> bool:
    return row.metric.removesuffix("_difference").endswith(("_rate", "_accuracy", "_share"))


def number(row: Row, value: float, sign: str = "") -> str:
    """Write a value with the digits of its metric."""
    if is_percentage(row):
        return f"{100 * value:{sign}.1f}"
    return f"{value:{sign}.{0 if row.unit == 'characters' else 3}f}"
