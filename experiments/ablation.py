"""What each choice of the recipe is worth: the same images, seen equally often, one change a row, several seeds.

    python experiments/ablation.py          # drawn scenes and the tiny base; writes results/ablation.json and .png
    python experiments/ablation.py --base HuggingFaceTB/SmolVLM2-500M-Video-Instruct \\
        --dataset berkeruveyik/vlm-food-4k-not-food-dataset --rate1 2e-4 --rate2 2e-6 --images 6000 \\
        --out results/ablation_500m.json        # the same at true size, on a GPU

A row is finished for a seed when its figures are in the working folder. Rerun the command to resume.
"""

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import datasets
import matplotlib.pyplot as plt
import numpy as np
import torch
import typer
from matplotlib.figure import Figure
from scipy.stats import t as student

from foodextract.data.dataset import record_of
from foodextract.evaluation import evaluate
from foodextract.evaluation.results import Row, make_row, read_results, write_results
from foodextract.inference.extractor import Extractor
from foodextract.models import loading
from foodextract.reporting import tables
from foodextract.schema import FoodRecord
from foodextract.training.config import VISION, Lora, Stage
from foodextract.training.run import train_stage
from recipes import Recipe, open_data

ROOT = Path(__file__).parents[1]
COMMAND = "python experiments/ablation.py"
BENCHMARK = "ablation"
METRICS = ("strict_json_rate", "is_food_accuracy", "item_f1_micro", "hallucination_rate")
LENIENT = (
    "item_f1_micro_lenient"  # items of whatever can be read as a record: what was learned, apart from how it is written
)
REFERENCE, ONE_STAGE = "reference", "one stage"


@dataclass(frozen=True)
class Choice:
    """One row: what differs from the row `against`."""

    against: str | None
    stages: Callable[[list[Stage]], list[Stage]] = lambda stages: stages  # of the row `against`
    tiles: int = 1
    bf16_stage2: bool = False  # weights held in bf16 while stage 2 trains them


def with_lora(factor: float) -> Callable[[list[Stage]], list[Stage]]:
    """Adapters everywhere but in the vision tower, at `factor` times the rate."""
    lora = Lora(exclude_modules=r".*vision_model.*")
    return lambda stages: [replace(stage, lora=lora, learning_rate=factor * stage.learning_rate) for stage in stages]


def with_all(**values: object) -> Callable[[list[Stage]], list[Stage]]:
    return lambda stages: [replace(stage, **values) for stage in stages]


CHOICES = {
    REFERENCE: Choice(None),  # two stages, all weights, loss on the answer, JSON, one tile, fp32 master weights
    ONE_STAGE: Choice(
        REFERENCE, lambda stages: [replace(stages[0], num_train_epochs=sum(stage.num_train_epochs for stage in stages))]
    ),
    "LoRA": Choice(ONE_STAGE, with_lora(1)),
    "LoRA at ten times the rate": Choice(ONE_STAGE, with_lora(10)),  # as is customary: a fair chance
    "prompt in the loss": Choice(REFERENCE, with_all(completion_only_loss=False)),
    "bf16 weights in stage 2": Choice(REFERENCE, bf16_stage2=True),
    "Python repr as target": Choice(REFERENCE, with_all(target="repr")),
    "5 tiles": Choice(REFERENCE, tiles=5),
}


def stages_of(name: str, reference: list[Stage]) -> list[Stage]:
    """The stages of a row: those of the row it is measured against, with its one change."""
    choice = CHOICES[name]
    return choice.stages(stages_of(choice.against, reference) if choice.against else reference)


def steps_of(stage: Stage, images: int) -> int:
    """Optimizer steps that see `images` images `stage.num_train_epochs` times."""
    batch = stage.per_device_train_batch_size * stage.gradient_accumulation_steps
    return max(1, round(stage.num_train_epochs * images / batch))


def run(
    name: str, seed: int, base: str, reference: list[Stage], rows: datasets.DatasetDict, work: Path, batch: int
) -> list[Row]:
    """Train one row with one seed and score it on the held-out images."""
    choice = CHOICES[name]
    device = loading.choose_device()
    model, processor = loading.load_model(base, device, training=True), loading.load_processor(base, choice.tiles)
    for stage in stages_of(name, reference):
        coarse = choice.bf16_stage2 and stage.name == "stage2"
        model.to(torch.bfloat16 if coarse else torch.float32)
        mine = replace(stage, name=f"{name}, seed {seed}, {stage.name}")
        train_stage(
            model, processor, mine, rows["train"], work, seed=seed, max_steps=steps_of(stage, len(rows["train"]))
        )
        shutil.rmtree(work / mine.name)  # its figures are what is kept; at true size twenty models would fill a disk
    model.float()
    labels = [record_of(row) for row in rows["test"].remove_columns("image")]
    answers = evaluate.predict(Extractor(model, processor).generate_texts, rows["test"]["image"], batch, name)
    metrics = {metric.name: metric for metric in evaluate.score(labels, answers)}
    lenient = {metric.name: metric for metric in evaluate.score(labels, answers, read=FoodRecord.parse_lenient)}
    kept = [metrics[metric] for metric in METRICS if metric in metrics] + [
        replace(lenient["item_f1_micro"], name=LENIENT)
    ]
    return evaluate.to_rows(BENCHMARK, f"{name} | seed {seed}", kept, " ".join([COMMAND, *sys.argv[1:]]))


def interval(values: Sequence[float], least: float) -> tuple[float, float]:
    """Student's 95 % interval of the mean of a few runs, clipped to `least` and 1. One run has no width."""
    if len(values) < 2:
        return values[0], values[0]
    half = student.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return max(least, float(np.mean(values) - half)), min(1, float(np.mean(values) + half))


def summary(runs: list[Row]) -> list[Row]:
    """The mean of each row's metrics over seeds, and of the paired difference to the row it is measured against."""
    of: dict[tuple[str, str], dict[str, float]] = {}
    for row in runs:
        name, seed = row.subject.split(" | ")
        of.setdefault((name, row.metric), {})[seed] = row.value
    found = []
    for (name, metric), by_seed in of.items():
        against = CHOICES[name].against
        theirs = of.get((against, metric), {})
        means = [(name, metric, list(by_seed.values()), 0)]
        shared = [by_seed[seed] - theirs[seed] for seed in by_seed if seed in theirs]
        if shared:
            means.append((f"{name} minus {against}", f"{metric}_difference", shared, -1))
        for subject, figure, values, least in means:
            low, high = interval(values, least)
            found.append(
                make_row(
                    BENCHMARK,
                    subject,
                    figure,
                    np.mean(values),
                    low=low,
                    high=high,
                    n=len(values),
                    command=runs[0].command,
                )
            )
    return found


def effects(rows: Sequence[Row], metric: str) -> Figure:
    """One line a difference `A minus B` with its 95 % interval. An interval across the gray line shows nothing."""
    mine = [row for row in rows if row.metric == f"{metric}_difference"][::-1]
    figure, axis = plt.subplots(figsize=(8, 0.42 * len(mine) + 1), layout="constrained")
    errors = [[row.value - row.low for row in mine], [row.high - row.value for row in mine]]
    axis.errorbar([row.value for row in mine], range(len(mine)), xerr=errors, fmt="o", color="#4c78a8", capsize=3)
    axis.axvline(0, color="#888", linewidth=1)
    axis.set_yticks(range(len(mine)), [row.subject for row in mine], fontsize=8)
    axis.set(xlabel=f"difference in {(tables.NAMES | tables.MORE_NAMES)[metric]}", ylim=(-0.6, len(mine) - 0.4))
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def main(
    base: Annotated[str, typer.Option(help="Hub id or folder of the base model.")] = str(loading.TINY_BASE),
    data: Annotated[str, typer.Option("--dataset", help="`scenes`, a folder or a Hub id.")] = "scenes",
    images: Annotated[
        int, typer.Option(min=16, help="Images a run sees in all, two thirds of them in stage 1.")
    ] = 1200,
    test: Annotated[int, typer.Option(min=2, help="Held-out images.")] = 200,
    seeds: Annotated[int, typer.Option(min=1, help="Runs a row.")] = 3,
    rate1: Annotated[float, typer.Option(help="Learning rate of stage 1.")] = 1e-3,
    rate2: Annotated[float, typer.Option(help="Learning rate of stage 2.")] = 2e-4,
    batch: Annotated[int, typer.Option(min=2, help="Images an optimizer step.")] = 8,
    only: Annotated[list[str] | None, typer.Option(help="Rows to run; all by default.")] = None,
    work: Annotated[Path, typer.Option(help="Where finished runs are kept.")] = ROOT / "outputs" / "ablation",
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = ROOT / "results" / "ablation.json",
) -> None:
    """Run what is missing and write the table."""
    settings = {"base": base, "data": data, "images": images, "test": test, "rates": [rate1, rate2], "batch": batch}
    work = work / hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]
    shared = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": 1, "lr_scheduler_type": "cosine"}
    drawn = open_data(Recipe(base, data, (), batch, 1, scenes=(images * 2 // 3, test)), work / "dataset")
    rows = datasets.DatasetDict(
        train=drawn["train"].select(range(min(images * 2 // 3, len(drawn["train"])))),
        test=drawn["test"].select(range(min(test, len(drawn["test"])))),
    )
    share = images / 3 / len(rows["train"])
    reference = [Stage("stage1", (VISION,), rate1, 2 * share, **shared), Stage("stage2", (), rate2, share, **shared)]
    runs: list[Row] = []
    for seed in range(1, seeds + 1):
        for name in only or CHOICES:
            done = work / f"{name}-{seed}.json".replace(" ", "_")
            if not done.exists():
                write_results(done, run(name, seed, base, reference, rows, work, batch=50))
            runs += read_results(done)
            write_results(out, [*summary(runs), *runs])
    print(tables.metric_table(summary(runs), tables.NAMES | tables.MORE_NAMES))
    effects(summary(runs), "item_f1_micro").savefig(out.with_suffix(".png"), dpi=130)
    plt.close("all")


if __name__ == "__main__":
    typer.run(main)
