"""What was measured, put where people read it: README, notebooks, cards. For notebooks, the one door to `tables` and `figures` as well."""

import base64
import io
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import nbformat
import typer
from PIL import Image

from foodextract.evaluation.results import Row, read_results
from foodextract.reporting.figures import (
    bars,
    before_after,
    class_heat_map,
    contact_sheet,
    loss_curves,
    reliability,
    token_mask,
    worst_cases,
)
from foodextract.reporting.tables import (
    EFFECTS,
    MORE_NAMES,
    NAMES,
    difference_table,
    effect_sentences,
    effect_table,
    group_table,
    item_table,
    markdown_table,
    metric_table,
    mode_table,
    outcome_table,
)

__all__ = [
    "MORE_NAMES", "NAMES", "bars", "before_after", "class_heat_map", "contact_sheet", "difference_table", "effect_sentences",
    "effect_table", "fill_in", "group_table", "item_table", "loss_curves", "markdown_table", "metric_table", "mode_table",
    "offline_table", "outcome_table", "peers_table", "publish", "reliability", "token_mask", "worst_cases",
]  # fmt: skip


def fill_in(path: str | Path, name: str, text: str) -> bool:
    """Put `text` between `<!-- name -->` and `<!-- /name -->` of a Markdown file; True when that changed it."""
    path = Path(path)
    old = path.read_text(encoding="utf-8")
    new = _filled(old, name, text, path)
    path.write_text(new, encoding="utf-8")
    return new != old


def _filled(page: str, name: str, text: str, path: Path) -> str:
    new, found = re.subn(
        rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", lambda m: f"{m[1]}{text}\n{m[2]}", page, flags=re.DOTALL
    )
    if not found:
        raise ValueError(f"{path} has no place named {name}: add <!-- {name} --> and <!-- /{name} -->")
    return new


TABLE = "offline"  # the place in README and notebook 01 that shows results/offline.json
HEADLINE = {metric: name for metric, name in NAMES.items() if metric != "schema_valid_rate"}  # six rows


def offline_table(root: Path) -> str:
    """The before/after table of the last `make demo`."""
    rows = read_results(root / "results" / "offline.json")
    return metric_table([row for row in rows if row.low is not None], HEADLINE)


def _shown(file: str, command: str, render: Callable[[list[Row]], str]) -> Callable[[Path], str]:
    """What a place shows: a results file rendered, or, before that is measured, how to do it."""

    def text(root: Path) -> str:
        measured = root / "results" / file
        return render(read_results(measured)) if measured.exists() else f"Not measured yet: `{command}` does it."

    return text


def _offline_in_full(rows: list[Row]) -> str:
    names = {metric: name for metric, name in (NAMES | MORE_NAMES).items() if metric not in HEADLINE}
    return f"{metric_table([row for row in rows if row.low is not None], names)}\n\n{item_table(rows, 'stage2')}"


def _peers(rows: list[Row]) -> str:
    """Everybody's figures, base and tuned model free and constrained, and how far the tuned model is ahead."""
    free = [row for row in rows if not row.subject.endswith(" constrained")]
    return f"{metric_table(free)}\n\n{mode_table(rows, ('base', 'tuned'))}\n\n{difference_table(rows)}"


def _peers_in_full(rows: list[Row]) -> str:
    """The figures that `_peers` leaves out, and breakdowns by number of items and source."""
    groups = [group_table(rows, metric) for metric in ("is_food_accuracy", "item_f1_micro")]
    return "\n\n".join([metric_table(rows, MORE_NAMES), item_table(rows, "tuned"), *groups])


def _dialects(rows: list[Row]) -> str:
    return metric_table(rows, {name: (NAMES | MORE_NAMES)[name] for name in EFFECTS})


ABLATION = "ablation.json", ".venv/bin/python experiments/ablation.py"
peers_table = _shown("peers.json", ".venv/bin/python benchmarks/peers.py", _peers)
Places = dict[str, Callable[[Path], str]]
PAGES: dict[str, Places] = {
    "README.md": {TABLE: offline_table},
    "experiments/README.md": {
        "why": _shown(*ABLATION, effect_sentences),
        "experiments": _shown("experiments.json", "make experiments", outcome_table),
        "ablation": _shown(*ABLATION, effect_table),
    },
    "results/README.md": {
        "other scenes": _shown("other_scenes.json", ".venv/bin/python benchmarks/other_scenes.py", metric_table),
        "peers": peers_table,
        "offline in full": _shown("offline.json", "make demo", _offline_in_full),
        "peers in full": _shown("peers.json", ".venv/bin/python benchmarks/peers.py", _peers_in_full),
    },
    "benchmarks/README.md": {"dialects": _shown("dialects.json", ".venv/bin/python benchmarks/dialects.py", _dialects)},
}


def publish(root: Path) -> None:
    """Take what `make demo` and `make experiments` made into the repository: notebooks, the tuned tiny model, README's images."""
    made = root / "outputs"
    for executed in sorted(made.glob("*/*.ipynb")):
        archived = executed.parent.name == "experiments"
        home, results = (root / "experiments", "experiments.json") if archived else (root, "offline.json")
        notebook = nbformat.read(executed, as_version=4)
        for cell in notebook.cells:
            if "showcase" in cell.metadata.get("tags", []):
                [png] = [output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {})]
                (root / "results" / "before_after.png").write_bytes(base64.b64decode(png))
            cell.metadata = {"tags": cell.metadata["tags"]} if cell.metadata.get("tags") else {}
            if cell.cell_type == "code":
                cell.outputs = [output for output in cell.outputs if not _is_progress(output)]
                for output in cell.outputs:
                    _shrink(output.get("data", {}))
        colab = {
            name: notebook.metadata[name] for name in ("accelerator", "colab")
        }  # the runtime that the badge asks for
        notebook.metadata = {**colab, "kernelspec": notebook.metadata.kernelspec, "language_info": {"name": "python"}}
        nbformat.write(notebook, home / executed.name)
        row = next(
            row for row in read_results(root / "results" / results) if not archived or row.benchmark == executed.stem
        )
        where = f"The outputs below come from one run of `{row.command}`: profile `offline`, on {row.device}, at commit {row.commit}."
        _fill_first_cell(home / executed.name, "run", where)
    _fill_first_cell(root / "01_fine_tune_vlm_v3_smolVLM_500m.ipynb", TABLE, offline_table(root))
    tuned = root / "src" / "foodextract" / "models" / "bundled" / "tiny-tuned"
    shutil.rmtree(tuned, ignore_errors=True)
    shutil.copytree(
        made / "offline" / "stage2",
        tuned,
        ignore=shutil.ignore_patterns("training.json", "performance.json", "README.md"),
    )


def _is_progress(output: nbformat.NotebookNode) -> bool:
    """A progress bar, as text or as a widget (which GitHub refuses to render)."""
    return output.get("name") == "stderr" or any("jupyter.widget" in kind for kind in output.get("data", {}))


def _shrink(data: dict[str, str]) -> None:
    """Keep one image of an output: a JPEG in place of a PNG where that is smaller, as it is for photographs and contact sheets."""
    png = data.get("image/png")
    if png is None:
        return
    jpeg = io.BytesIO()
    Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB").save(jpeg, "JPEG", quality=80, optimize=True)
    smaller = min(data.get("image/jpeg", png), base64.b64encode(jpeg.getvalue()).decode(), key=len)
    if len(smaller) < len(png):
        del data["image/png"]
        data["image/jpeg"] = smaller


def _fill_first_cell(path: Path, name: str, text: str) -> None:
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[0].source = _filled(notebook.cells[0].source, name, text, path)
    nbformat.write(notebook, path)


def main(
    publish_too: Annotated[
        bool, typer.Option("--publish", help="Also take executed notebooks and the tuned model into the tree.")
    ] = False,
) -> None:
    """Print the before/after table of results/offline.json and bring the README files up to date with results/."""
    root = Path.cwd()
    for page, places in PAGES.items():
        for name, text in places.items():
            fill_in(root / page, name, text(root))
    if publish_too:
        publish(root)
    print(offline_table(root))


if __name__ == "__main__":
    typer.run(main)
