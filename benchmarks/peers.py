"""Who answers held-out images how well: a majority, the nearest training image, the base and the tuned model, free and constrained.

    python benchmarks/peers.py                                   # the scenes of `make demo`; writes results/peers.json and .png
    python benchmarks/peers.py --tuned outputs/offline/stage2    # the model that `make demo` has just made
    python benchmarks/peers.py --dataset my_images --base HuggingFaceTB/SmolVLM2-500M-Video-Instruct --tuned outputs/hub/stage2 --out …

All of them answer the same images and are scored by the same evaluation, only strict answers counting; the tuned model is compared with
each of the others, image by image. Behind a bar follow breakdowns by number of items, and by source where there are several.
"""

import sys
import tempfile
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
from foodextract.reporting import tables

COMMAND = "python benchmarks/peers.py"
OUT = Path(__file__).parents[1] / "results" / "peers.json"
BROKEN_DOWN = ("strict_json_rate", "is_food_accuracy", "item_recall_micro", "item_f1_micro")


def open_rows(data: str, seed: int, train: int, test: int, folder: Path) -> datasets.DatasetDict:
    """Drawn scenes, built in `folder`, or whatever `dataset.open_dataset` knows by that name."""
    if data != "scenes":
        return dataset.open_dataset(data, folder, seed)
    dataset.build(sources.scenes(seed, train, test), folder, seed=seed)
    return dataset.load(folder)


def measure(
    answerers: dict[str, evaluate.BatchAnswer], ours: str, held_out: datasets.Dataset, batch: int, command: str
) -> list[Row]:
    """All figures of everybody on the same images, those BROKEN_DOWN by number of items and source, and ours minus each of the others.

    Labels that name only the main item (column `label_scope`) count for recall alone.
    """
    labels = [dataset.record_of(row) for row in held_out.remove_columns("image")]
    scopes = held_out["label_scope"] if "label_scope" in held_out.column_names else None
    answers = {
        subject: evaluate.ask(answer, held_out["image"], batch, subject) for subject, answer in answerers.items()
    }
    groupings = [[evaluate.number_of_items(label) for label in labels]]
    if len(set(held_out["source"])) > 1:
        groupings.append([f"from {source}" for source in held_out["source"]])
    rows: list[Row] = []
    for subject, texts in answers.items():
        rows += evaluate.to_rows("peers", subject, evaluate.score(labels, texts, scopes), command)
        for groups in groupings:
            for group, metrics in evaluate.breakdown(labels, texts, groups, scopes).items():
                few = [metric for metric in metrics if metric.name in BROKEN_DOWN]
                rows += evaluate.to_rows("peers", f"{subject} | {group}", few, command)
    for subject, texts in answers.items():
        if subject != ours:
            rows += difference_rows(
                "peers", f"{ours} minus {subject}", compare(labels, answers[ours], texts, scopes), command
            )
    return rows


def main(
    data: Annotated[str, typer.Option("--dataset", help="`scenes`, a folder or a Hub id.")] = "scenes",
    seed: Annotated[
        int, typer.Option(help="Which scenes, and how images are split; the default is that of `make demo`.")
    ] = 42,
    train: Annotated[int, typer.Option(min=1, help="Training scenes, which the peers look up.")] = 8000,
    test: Annotated[int, typer.Option(min=2, help="Test scenes.")] = 600,
    base: Annotated[str, typer.Option(help="The base model, whose vision tower the nearest neighbor sees with.")] = str(
        loading.TINY_BASE
    ),
    tuned: Annotated[str, typer.Option(help="The tuned model.")] = str(loading.TINY_TUNED),
    neighbors: Annotated[int, typer.Option(min=1, help="How many neighbors vote.")] = 1,
    batch: Annotated[int, typer.Option(min=1, help="Images a model sees at once.")] = 50,
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = OUT,
) -> None:
    """Score the peers and write the figures."""
    with tempfile.TemporaryDirectory() as scratch:
        rows = open_rows(data, seed, train, test, Path(scratch) / "dataset")
        records = [dataset.record_of(row) for row in rows["train"].remove_columns("image")]
        extractor, ours = Extractor.from_pretrained(base), Extractor.from_pretrained(tuned)
        seen = map(open_image, rows["train"]["image"])
        answerers = {
            "majority": evaluate.each(Majority.fit(records)),
            "nearest": evaluate.each(Nearest.fit(extractor, seen, records, neighbors)),
            "base": extractor.generate_texts,
            "base constrained": partial(extractor.generate_texts, constrained=True),
            "tuned": ours.generate_texts,
            "tuned constrained": partial(ours.generate_texts, constrained=True),
        }
        figures = measure(answerers, "tuned", rows["test"], batch, " ".join([COMMAND, *sys.argv[1:]]))
    write_results(out, figures)
    figures.before_after([row for row in figures if row.low is not None]).savefig(out.with_suffix(".png"), dpi=110)
    plt.close("all")
    print(tables.metric_table([row for row in figures if row.low is not None]))


if __name__ == "__main__":
    typer.run(main)
