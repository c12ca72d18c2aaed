"""Tables and pictures from what was measured. Knows the results format, not how a number came to be."""

import base64
import html
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import matplotlib.pyplot as plt
import nbformat
import typer
from matplotlib.figure import Figure
from PIL import Image

from foodextract.results import Row, read_results

NAMES = {
    "strict_json_rate": "strict JSON that fits the schema",
    "schema_valid_rate": "valid JSON of the right shape, any spacing",
    "is_food_accuracy": "`is_food` accuracy",
    "item_f1_micro": "item F1 (micro, exact name)",
    "food_f1_micro": "food F1",
    "drink_f1_micro": "drink F1",
    "hallucination_rate": "items named where there are none (lower is better)",
}
SUBJECTS = {"base": "base", "stage1": "after stage 1", "stage2": "after stage 2"}


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; bars inside cells are escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def metric_table(rows: Sequence[Row]) -> str:
    """Markdown: one line a metric, one column a subject, every figure with its 95 % interval, n in the head."""
    subjects = list(dict.fromkeys(row.subject for row in rows))
    figures = {(row.metric, row.subject): row for row in rows}
    n = max(row.n for row in rows)
    lines = []
    for metric, name in NAMES.items():
        of = {figures[metric, subject].n for subject in subjects if (metric, subject) in figures}
        if of:
            note = "" if of == {n} else f", n = {', '.join(map(str, sorted(of)))}"
            lines.append([name + note, *(_cell(figures.get((metric, subject))) for subject in subjects)])
    return markdown_table([f"n = {n}", *(SUBJECTS.get(subject, subject) for subject in subjects)], lines)


def _cell(row: Row | None) -> str:
    if row is None:
        return "–"
    percent = row.unit == "share" and not row.metric.endswith("f1_micro")
    shown = [f"{100 * v:.1f}" if percent else f"{v:.3f}" for v in (row.value, row.low, row.high) if v is not None]
    interval = f" ({shown[1]}–{shown[2]})" if len(shown) == 3 else ""
    return f"{shown[0]}{' %' if percent else ''}{interval}"


def fill_in(path: str | Path, name: str, text: str) -> bool:
    """Put `text` between `<!-- name -->` and `<!-- /name -->` of a Markdown file; True when that changed it."""
    path = Path(path)
    old = path.read_text(encoding="utf-8")
    new = _filled(old, name, text, path)
    path.write_text(new, encoding="utf-8")
    return new != old


def _filled(page: str, name: str, text: str, path: Path) -> str:
    new, found = re.subn(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", lambda m: f"{m[1]}{text}\n{m[2]}", page, flags=re.DOTALL)
    if not found:
        raise ValueError(f"{path} has no place named {name}: add <!-- {name} --> and <!-- /{name} -->")
    return new


def contact_sheet(pictures: Sequence[Image.Image], captions: Sequence[str], columns: int = 6, wrap: int = 30) -> Figure:
    """Pictures in a grid, each above its caption."""
    columns = max(1, min(columns, len(pictures)))
    rows = -(-len(pictures) // columns)
    longest = max((_wrapped(caption, wrap).count("\n") + 1 for caption in captions), default=1)
    figure, axes = plt.subplots(rows, columns, figsize=(2.5 * columns, (2.4 + 0.17 * longest) * rows), squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for axis, picture, caption in zip(axes.flat, pictures, captions, strict=False):
        axis.imshow(picture)
        axis.text(0.5, -0.03, _wrapped(caption, wrap), transform=axis.transAxes, ha="center", va="top", fontsize=8, parse_math=False)
    return figure


def _wrapped(text: str, width: int) -> str:
    lines = [[text[i : i + width] for i in range(0, len(text), width)] or [""] for text in text.split("\n")]
    return "\n".join(part for line in lines for part in line)


def bars(counts: Sequence[tuple[str, int]], title: str) -> Figure:
    """Horizontal bars, the largest on top."""
    figure, axis = plt.subplots(figsize=(6, 0.22 * len(counts) + 0.8), layout="constrained")
    names, values = zip(*reversed(counts), strict=True) if counts else ((), ())
    axis.bar_label(axis.barh(names, values, color="#4c78a8"), padding=3, fontsize=8)
    axis.set_title(title)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def loss_curves(logs: dict[str, list[dict[str, float]]]) -> Figure:
    """Training loss by optimizer step, one panel a stage, on a log scale."""
    figure, axes = plt.subplots(1, len(logs), figsize=(5 * len(logs), 3), squeeze=False, layout="constrained")
    for axis, (name, log) in zip(axes.flat, logs.items(), strict=True):
        axis.plot([entry["step"] for entry in log], [entry["loss"] for entry in log], marker=".", color="#4c78a8")
        axis.set(title=SUBJECTS.get(name, name), xlabel="optimizer step", ylabel="loss on the answer", yscale="log")
        axis.grid(alpha=0.3)
    return figure


def before_after(rows: Sequence[Row]) -> Figure:
    """Bars with 95 % intervals: every metric, base beside stage 1 beside stage 2."""
    metrics = [metric for metric in NAMES if any(row.metric == metric for row in rows)]
    subjects = list(dict.fromkeys(row.subject for row in rows))
    figures = {(row.metric, row.subject): row for row in rows}
    figure, axis = plt.subplots(figsize=(9, 3.6), layout="constrained")
    for i, (subject, colour) in enumerate(zip(subjects, ("#bab0ac", "#9ecae9", "#4c78a8"), strict=False)):
        mine = [figures[metric, subject] for metric in metrics]
        values = [row.value for row in mine]
        errors = [[row.value - row.low for row in mine], [row.high - row.value for row in mine]]
        places = [position + (i - (len(subjects) - 1) / 2) * 0.27 for position in range(len(metrics))]
        axis.bar(places, values, 0.25, yerr=errors, color=colour, label=SUBJECTS.get(subject, subject), capsize=2)
    axis.set_xticks(range(len(metrics)), [metric.replace("_", "\n", 1).replace("_", " ") for metric in metrics], fontsize=8)
    axis.set_ylim(0, 1.05)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, ncols=len(subjects), loc="upper center", bbox_to_anchor=(0.5, 1.15))
    return figure


def token_colours(tokens: Sequence[tuple[str, bool]]) -> str:
    """HTML of a label audit: tokens the loss sees on green, all others grey; runs of one image token are shortened."""
    parts: list[str] = []
    previous, run = None, 0
    for text, supervised in [*tokens, (None, False)]:
        if text == previous and text is not None and not supervised:
            run += 1
            continue
        if run:
            parts.append(f'<span style="color:#888"> × {run + 1} </span>')
        previous, run = text, 0
        if text is not None:
            style = "background:#bfe3b4;color:#000;border-radius:3px" if supervised else "color:#888"
            shown = html.escape(text).replace("\n", "⏎<br>").replace(" ", "&nbsp;" if supervised else " ")
            parts.append(f'<span style="{style}">{shown}</span>' + ("<wbr>" if supervised else ""))
    return f'<div style="font-family:monospace;line-height:1.7">{"".join(parts)}</div>'


# ------------------------------------------------------------------------------------------------------- bringing the repository up to date

TABLE = "offline"  # the place in README and notebook 01 that shows results/offline.json


def offline_table(root: Path) -> str:
    """The before/after table of the last `make demo`."""
    return metric_table([row for row in read_results(root / "results" / "offline.json") if row.low is not None])


def publish(root: Path) -> None:
    """Take what the last `make demo` made into the repository: executed notebooks, the tuned tiny model, README's pictures."""
    made = root / "outputs"
    for executed in sorted((made / "notebooks").glob("*.ipynb")):
        notebook = nbformat.read(executed, as_version=4)
        for cell in notebook.cells:
            if "showcase" in cell.metadata.get("tags", []):
                [png] = [output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {})]
                (root / "results" / "before_after.png").write_bytes(base64.b64decode(png))
            cell.metadata = {"tags": cell.metadata["tags"]} if cell.metadata.get("tags") else {}
            if cell.cell_type == "code":
                cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]  # progress bars
        notebook.metadata = {"kernelspec": notebook.metadata.kernelspec, "language_info": {"name": "python"}}
        nbformat.write(notebook, root / executed.name)
        row = read_results(root / "results" / "offline.json")[0]
        where = f"The outputs below come from one run of `{row.command}`: profile `offline`, on {row.device}, at commit {row.commit}."
        _fill_first_cell(root / executed.name, "run", where)
    _fill_first_cell(root / "01_fine_tune_vlm_v3_smolVLM_500m.ipynb", TABLE, offline_table(root))
    tuned = Path(__file__).parent / "bundled" / "tiny-tuned"
    shutil.rmtree(tuned, ignore_errors=True)
    shutil.copytree(made / "offline" / "stage2", tuned, ignore=shutil.ignore_patterns("training.json", "README.md"))


def _fill_first_cell(path: Path, name: str, text: str) -> None:
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[0].source = _filled(notebook.cells[0].source, name, text, path)
    nbformat.write(notebook, path)


def main(
    publish_too: Annotated[bool, typer.Option("--publish", help="Also take executed notebooks and the tuned model into the tree.")] = False,
) -> None:
    """Print the before/after table of results/offline.json and bring README.md up to date with it."""
    root = Path.cwd()
    fill_in(root / "README.md", TABLE, offline_table(root))
    if publish_too:
        publish(root)
    print(offline_table(root))


if __name__ == "__main__":
    typer.run(main)
