"""Fill measured figures into the README files, and take executed notebooks into the repository.

python tools/pages.py              # bring every page up to date with results/
python tools/pages.py --publish    # maintainers, after `make demo experiments`: also notebooks and the tuned tiny model
"""

import base64
import io
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import nbformat
import typer
from PIL import Image

import page_tables
from foodextract.evaluation.results import Row, read_results
from foodextract.models.training_data import TrainingData
from foodextract.reporting.tables import NAMES, metric_table, stage_comparison

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))
import extract_report  # noqa: E402
import serve_report  # noqa: E402
import train_report  # noqa: E402

BEFORE_AFTER = "offline"  # the marker in results/README.md and notebook 01 that shows results/offline.json
HEADLINES = {metric: name for metric, name in NAMES.items() if metric != "schema_valid_rate"}
PHOTO = "src/foodextract/models/bundled/photo"
NAMED_SOURCE = 50  # training photographs from which a page names their source
Render = Callable[[Path], str]


def fill_in(path: Path, name: str, text: str) -> None:
    """Put `text` between `<!-- name -->` and `<!-- /name -->` of a Markdown file."""
    path.write_text(_filled(path.read_text(encoding="utf-8"), name, text, path), encoding="utf-8")


def _filled(page: str, name: str, text: str, path: Path) -> str:
    pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
    new, found = re.subn(pattern, lambda match: f"{match[1]}{text}\n{match[2]}", page, flags=re.DOTALL)
    if not found:
        raise ValueError(f"{path} has no marker named {name}: add <!-- {name} --> and <!-- /{name} -->")
    return new


def offline_table(root: Path) -> str:
    """The before/after table of the last `make demo`, in six rows."""
    rows = read_results(root / "results" / "offline.json")
    return metric_table([row for row in rows if row.low is not None], HEADLINES)


def photo_sources(root: Path) -> str:
    """The sources of the photo model's training photographs, by license class, in one line each."""
    rows = json.loads((root / PHOTO / "sources.json").read_text(encoding="utf-8"))
    lines = []
    for kind in dict.fromkeys(row["license_class"] for row in rows):
        mine = [row for row in rows if row["license_class"] == kind]
        large = [row for row in mine if row["images"] >= NAMED_SOURCE]
        named = ", ".join(f"{row['source'].removeprefix('github:')} ({row['images']})" for row in large)
        rest = f", and {len(mine) - len(large)} with fewer than {NAMED_SOURCE} each" if len(mine) > len(large) else ""
        lines.append(f"- **{kind}**, {sum(row['images'] for row in mine):,} training photographs: {named}{rest}")
    return "\n".join(lines)


def photo_model(root: Path) -> str:
    """What the bundled photo model was trained on and what an image costs."""
    rows = read_results(root / "results" / "photo_precision.json")
    costs = [row for row in rows if row.metric == "cpu_seconds_per_image" and row.subject.endswith("(default)")]
    each = " or ".join(f"{row.value:.2f} CPU-seconds ({row.device})" for row in costs)
    return f"The photo model was {TrainingData.find(root / PHOTO).describe()}. An image takes it {each}."


def _rendered(file: str, render: Callable[[list[Row]], str]) -> Render:
    """Return a function that renders a file in results/."""
    return lambda root: render(read_results(root / "results" / file))


PAGES: dict[str, dict[str, Render]] = {
    "README.md": {"photo model": photo_model, "photographs": _rendered("photographs.json", page_tables.photographs)},
    "experiments/photo_base/README.md": {
        "photo sources": photo_sources,
        "photo tower": _rendered("photo_tower.json", page_tables.photo_tower),
    },
    "experiments/README.md": {
        "experiments": _rendered("experiments.json", page_tables.outcome_table),
        "why": _rendered("ablation.json", page_tables.effect_sentences),
        "ablation": _rendered("ablation.json", page_tables.effect_table),
    },
    "results/README.md": {
        BEFORE_AFTER: offline_table,
        "stages": _rendered("offline.json", stage_comparison),
        "photographs in full": _rendered("photographs.json", page_tables.photographs_in_full),
        "photo subsets": _rendered("photo_subsets.json", page_tables.photo_subsets),
        "photo scenes": _rendered("photo_scenes.json", page_tables.photo_scenes),
        "offline in full": _rendered("offline.json", page_tables.offline_in_full),
        "other scenes": _rendered("other_scenes.json", metric_table),
        "baselines": _rendered("baselines.json", page_tables.baselines),
        "baselines in full": _rendered("baselines.json", page_tables.baselines_in_full),
    },
    "benchmarks/README.md": {
        "train_step": train_report.text,
        "extract": extract_report.text,
        "label errors": _rendered("dataset_quality.json", page_tables.dataset_quality),
        "near-duplicates": _rendered("near_duplicates.json", page_tables.near_duplicates),
        "dialects": _rendered("dialects.json", page_tables.dialects),
        "batch job": _rendered("ray_data.json", page_tables.batch_job),
        "serving": _rendered("serving.json", serve_report.serving),
        "space": _rendered("space.json", serve_report.space),
    },
}


def publish(root: Path) -> None:
    """Take the notebooks, README's image and the tuned tiny model that `make` wrote to outputs/ into the repository."""
    made = root / "outputs"
    for executed in sorted(made.glob("*/*.ipynb")):
        archived = executed.parent.name == "experiments"
        home, results = (root / "experiments", "experiments.json") if archived else (root, "offline.json")
        notebook = nbformat.read(executed, as_version=4)
        _save_showcase(notebook, root / "results" / "before_after.png")
        _tidy(notebook)
        nbformat.write(notebook, home / executed.name)
        rows = read_results(root / "results" / results)
        row = next(row for row in rows if not archived or row.benchmark == executed.stem)
        run = f"The outputs below come from one run of `{row.command}`: profile `offline`, on {row.device}, "
        run += f"at commit {row.commit}."
        _fill_first_cell(home / executed.name, "run", run)
    _fill_first_cell(root / "01_fine_tune_vlm_v3_smolVLM_500m.ipynb", BEFORE_AFTER, offline_table(root))
    tuned = root / "src" / "foodextract" / "models" / "bundled" / "tiny-tuned"
    shutil.rmtree(tuned, ignore_errors=True)
    unwanted = shutil.ignore_patterns("training.json", "performance.json", "README.md")
    shutil.copytree(made / "offline" / "stage2", tuned, ignore=unwanted)


def _save_showcase(notebook: nbformat.NotebookNode, path: Path) -> None:
    """Write the image of the cell tagged `showcase`, where there is one."""
    for cell in notebook.cells:
        if "showcase" in cell.metadata.get("tags", []):
            [png] = [output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {})]
            path.write_bytes(base64.b64decode(png))


def _tidy(notebook: nbformat.NotebookNode) -> None:
    """Strip metadata and progress bars, and shrink images."""
    for cell in notebook.cells:
        cell.metadata = {"tags": cell.metadata["tags"]} if cell.metadata.get("tags") else {}
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not _is_progress(output)]
            for output in cell.outputs:
                _shrink(output.get("data", {}))
    runtime = {name: notebook.metadata[name] for name in ("accelerator", "colab")}  # what the Colab badge asks for
    notebook.metadata = {**runtime, "kernelspec": notebook.metadata.kernelspec, "language_info": {"name": "python"}}


def _is_progress(output: nbformat.NotebookNode) -> bool:
    """Whether an output is a progress bar, as text or as a widget (which GitHub does not render)."""
    return output.get("name") == "stderr" or any("jupyter.widget" in kind for kind in output.get("data", {}))


def _shrink(data: dict[str, str]) -> None:
    """Replace a PNG by a JPEG where that is smaller, as it is for photographs and contact sheets."""
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
        bool, typer.Option("--publish", help="Also take executed notebooks and the tuned model into the repository.")
    ] = False,
) -> None:
    """Bring the README files up to date with results/, and print the table of results/offline.json."""
    for page, markers in PAGES.items():
        for name, render in markers.items():
            fill_in(ROOT / page, name, render(ROOT))
    if publish_too:
        publish(ROOT)
    print(offline_table(ROOT))


if __name__ == "__main__":
    typer.run(main)
