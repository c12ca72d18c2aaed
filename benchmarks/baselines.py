"""Score baselines beside the base and the tuned model, free and constrained, on the same held-out images.

    python benchmarks/baselines.py    # the scenes of `make demo`; writes results/baselines.json and .png
    python benchmarks/baselines.py --tuned outputs/offline/stage2    # the model that `make demo` has just made
    python benchmarks/baselines.py --dataset my_images --base HuggingFaceTB/SmolVLM2-500M-Video-Instruct \\
        --tuned outputs/hub/stage2 --out my_results.json

Baselines are the most frequent training record and the record of the nearest training image. All subjects are scored
the same way, and the tuned model is compared with each of the others, paired by image. Rows are also broken down by
number of items, and by source if there are several.
"""

import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import datasets
import matplotlib.pyplot as plt
import typer

from baseline_models import Majority, Nearest
from comparison import compare, difference_rows
from foodextract.data import dataset, sources
from foodextract.evaluation import evaluate
from foodextract.evaluation.results import Row, write_results
from foodextract.images import open_image
from foodextract.inference.extractor import Extractor
from foodextract.models import loading
from foodextract.reporting import figures, tables
from foodextract.schema import FoodRecord

COMMAND = "python benchmarks/baselines.py"
OUT = Path(__file__).parents[1] / "results" / "baselines.json"
BROKEN_DOWN = ("strict_json_rate", "is_food_accuracy", "item_recall_micro", "item_f1_micro")


def open_rows(data: str, seed: int, train: int, test: int, folder: Path) -> datasets.DatasetDict:
    """Return drawn scenes, built in `folder`, or the dataset that `dataset.open_dataset` knows by that name."""
    if data != "scenes":
        return dataset.open_dataset(data, folder, seed)
    dataset.build(sources.scenes(seed, train, test), folder, seed=seed)
    return dataset.load(folder)


def number_of_items(label: FoodRecord, most: int = 3) -> str:
    """Return `0 items`, `1 item`, `2 items` or `3 or more items`."""
    count = len(label.food_items) + len(label.drink_items)
    return f"{most} or more items" if count >= most else f"{count} item{'s' * (count != 1)}"


def breakdown(
    labels: Sequence[FoodRecord], answers: Sequence[str], groups: Sequence[str], scopes: Sequence[str] | None = None
) -> dict[str, list[evaluate.Metric]]:
    """Score each group of images by itself; `groups` names the group of every image."""
    scores = evaluate.score_answers(labels, answers, scopes)
    return {
        group: evaluate.ScoreTable([row for row, name in zip(scores, groups, strict=True) if name == group]).metrics()
        for group in sorted(set(groups))
    }


def measure(
    models: dict[str, evaluate.BatchAnswer], ours: str, held_out: datasets.Dataset, batch: int, command: str
) -> list[Row]:
    """Return all metrics of every model, those BROKEN_DOWN by group, and the differences of `ours` to the others."""
    labels = [dataset.record_of(row) for row in held_out.remove_columns("image")]
    scopes = held_out["label_scope"] if "label_scope" in held_out.column_names else None
    answers = {
        subject: evaluate.predict(answer, held_out["image"], batch, subject) for subject, answer in models.items()
    }
    groupings = [[number_of_items(label) for label in labels]]
    if len(set(held_out["source"])) > 1:
        groupings.append([f"from {source}" for source in held_out["source"]])
    rows: list[Row] = []
    for subject, texts in answers.items():
        rows += evaluate.to_rows("baselines", subject, evaluate.score(labels, texts, scopes), command)
        for groups in groupings:
            for group, metrics in breakdown(labels, texts, groups, scopes).items():
                few = [metric for metric in metrics if metric.name in BROKEN_DOWN]
                rows += evaluate.to_rows("baselines", f"{subject} | {group}", few, command)
    for subject, texts in answers.items():
        if subject != ours:
            differences = compare(labels, answers[ours], texts, scopes)
            rows += difference_rows("baselines", f"{ours} minus {subject}", differences, command)
    return rows


def main(
    data: Annotated[str, typer.Option("--dataset", help="`scenes`, a folder or a Hub id.")] = "scenes",
    seed: Annotated[int, typer.Option(help="Of the scenes and the split; the default is that of `make demo`.")] = 42,
    train: Annotated[int, typer.Option(min=1, help="Training scenes, which the baselines look up.")] = 8000,
    test: Annotated[int, typer.Option(min=2, help="Test scenes.")] = 600,
    base: Annotated[str, typer.Option(help="The base model; its vision tower finds the nearest image.")] = str(
        loading.TINY_BASE
    ),
    tuned: Annotated[str, typer.Option(help="The tuned model.")] = str(loading.TINY_TUNED),
    neighbors: Annotated[int, typer.Option(min=1, help="How many neighbors vote.")] = 1,
    batch: Annotated[int, typer.Option(min=1, help="Images per batch.")] = 50,
    out: Annotated[Path, typer.Option(help="The results file; the plot goes beside it.")] = OUT,
) -> None:
    """Score baselines and models, and write the figures."""
    with tempfile.TemporaryDirectory() as scratch:
        rows = open_rows(data, seed, train, test, Path(scratch) / "dataset")
        records = [dataset.record_of(row) for row in rows["train"].remove_columns("image")]
        extractor, ours = Extractor.from_pretrained(base), Extractor.from_pretrained(tuned)
        seen = map(open_image, rows["train"]["image"])
        models = {
            "majority": Majority.fit(records).answer,
            "nearest": Nearest.fit(extractor, seen, records, neighbors).answer,
            "base": extractor.generate_texts,
            "base constrained": partial(extractor.generate_texts, constrained=True),
            "tuned": ours.generate_texts,
            "tuned constrained": partial(ours.generate_texts, constrained=True),
        }
        measured = measure(models, "tuned", rows["test"], batch, " ".join([COMMAND, *sys.argv[1:]]))
    write_results(out, measured)
    scored = [row for row in measured if row.low is not None]
    figures.before_after(scored).savefig(out.with_suffix(".png"), dpi=110)
    plt.close("all")
    print(tables.metric_table(scored))


if __name__ == "__main__":
    typer.run(main)
