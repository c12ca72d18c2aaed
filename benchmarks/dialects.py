"""Measure whether `extract` keeps the accuracy of a checkpoint that writes another form than canonical JSON.

    python benchmarks/dialects.py                                # ten minutes on one core; writes results/dialects.json
    python benchmarks/dialects.py --repr owner/name --json ""    # another checkpoint of that form, and no JSON one

The bundled tuned model is trained further with each target text (`Stage.target`) on the same drawings. Each model then
answers in three ways: free, parsed by `FoodRecord.parse_lenient`; as `extract` answers; and under the grammar of
canonical JSON, whatever form it writes.
"""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from datasets import DatasetDict
from PIL import Image

from foodextract.data import dataset, sources
from foodextract.evaluation import evaluate
from foodextract.evaluation.results import Row, write_results
from foodextract.inference.extractor import Extractor
from foodextract.inference.grammar import Dialect
from foodextract.models import loading
from foodextract.schema import FoodRecord
from foodextract.training.config import PROFILES
from foodextract.training.run import train_stage

ROOT = Path(__file__).resolve().parents[1]
METRICS = ("strict_json_rate", "is_food_accuracy", "item_f1_micro")
LENIENT = "item_f1_micro_lenient"  # with the lenient parser


def trained(target: str, rows: DatasetDict, work: Path, rate: float, seed: int) -> Path:
    """Train the bundled tuned model for one more epoch with another target text; return its folder."""
    model = loading.load_model(loading.TINY_TUNED, loading.choose_device("cpu"), training=True)
    processor = loading.load_processor(loading.TINY_TUNED)
    stage = replace(PROFILES["offline"].stage1, name=target, learning_rate=rate, num_train_epochs=1, target=target)
    train_stage(model, processor, stage, rows["train"], work, seed=seed)
    return work / target


def under_json(extractor: Extractor) -> Extractor:
    """Return the same model under the grammar of canonical JSON."""
    forced = Extractor(extractor.model, extractor.processor)
    forced._detected = Dialect(forced._lead)
    return forced


def measure(
    name: str, folder: str | Path, images: list[Image.Image], labels: list[FoodRecord], command: str
) -> list[Row]:
    """Return the rows of one checkpoint."""
    extractor = Extractor.from_pretrained(folder, "cpu")
    print(f"{name}: writes {extractor.dialect}")
    modes = {
        "free": extractor.generate_texts,
        "extract": partial(extractor.generate_texts, constrained=True),
        "JSON grammar": partial(under_json(extractor).generate_texts, constrained=True),
    }
    rows = []
    for mode, answer in modes.items():
        texts = evaluate.predict(answer, images, 25, f"{name} {mode}")
        kept = [metric for metric in evaluate.score(labels, texts) if metric.name in METRICS]
        if mode == "free":
            lenient = evaluate.score(labels, texts, read=FoodRecord.parse_lenient)
            kept += [replace(metric, name=LENIENT) for metric in lenient if metric.name == "item_f1_micro"]
        rows += evaluate.to_rows("dialects", f"{name} {mode}", kept, command)
    return rows


def main(
    json_model: Annotated[
        str, typer.Option("--json", help="A model trained on JSON; `train` makes one; empty skips it.")
    ] = "train",
    repr_model: Annotated[str, typer.Option("--repr", help="The same for Python reprs.")] = "train",
    train: Annotated[int, typer.Option(min=16, help="Drawings to train on.")] = 3600,
    test: Annotated[int, typer.Option(min=2, help="Held-out drawings.")] = 300,
    rate: Annotated[float, typer.Option(help="Learning rate.")] = 7e-4,
    seed: Annotated[int, typer.Option(help="Of the drawings and their order.")] = 5,
    work: Annotated[Path, typer.Option(help="Where models and drawings are kept.")] = ROOT / "outputs" / "dialects",
    out: Annotated[Path, typer.Option(help="The results file.")] = ROOT / "results" / "dialects.json",
) -> None:
    """Train, predict, score, print and write."""
    if not (work / "dataset").exists():
        dataset.build(sources.scenes(seed=seed, train=train, test=test), work / "dataset")
    drawn = dataset.load(work / "dataset")
    images = list(drawn["test"]["image"])
    labels = [dataset.record_of(row) for row in drawn["test"].remove_columns("image")]
    rows: list[Row] = []
    for name, model in (("json", json_model), ("repr", repr_model)):
        if model:
            folder = trained(name, drawn, work, rate, seed) if model == "train" else model
            rows += measure(name, folder, images, labels, " ".join(["python benchmarks/dialects.py", *sys.argv[1:]]))
            write_results(out, rows)
    for row in rows:
        print(f"{row.subject:24} {row.metric:24} {row.value:8.3f} ({row.low:.3f} to {row.high:.3f})  n = {row.n}")


if __name__ == "__main__":
    typer.run(main)
