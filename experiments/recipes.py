"""What the archived recipes share: settings, data, and the results file."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch

from foodextract.data import dataset, sources
from foodextract.evaluation import evaluate
from foodextract.evaluation.results import Row, make_row, read_results, write_results
from foodextract.models.loading import TINY_BASE
from foodextract.reporting.tables import markdown_table
from foodextract.schema import FoodRecord
from foodextract.training.config import VISION, Lora, Stage

TINY = "tiny"  # what a recipe calls the tiny model of the same architecture
COMMAND = os.environ.get("FOODEXTRACT_COMMAND", "a notebook of experiments/")


@dataclass(frozen=True)
class Recipe:
    """One archived recipe in one profile.

    `learning_rates` has one value a stage. Of two stages the first leaves the vision tower alone; a single one is
    called `tuned`.
    """

    base: str  # Hub id or folder of the base model, or TINY
    data: str  # Hub id of the data set, or "scenes" for drawings
    learning_rates: Sequence[float]
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    num_train_epochs: float = 1
    lora: Mapping[str, Any] | None = None  # fields of `Lora`; None trains the weights themselves
    save_steps: int = 0  # steps between checkpoints; 0: one an epoch
    validation_rows: int = 0  # rows to choose the best checkpoint by; 0: the last one
    metric_for_best_model: str = "item_f1"
    cache: bool = True  # False for models other than SmolVLM
    lr_scheduler_type: str = "constant_with_warmup"
    scenes: Sequence[int] = (1600, 200)  # how many to draw for training and test

    @property
    def smolvlm(self) -> str:
        """The base as `models.load_model` takes it, the tiny SmolVLM being the bundled one."""
        return str(TINY_BASE) if self.base == TINY else self.base

    def stages(self) -> list[Stage]:
        """The stages to train, one after the other."""
        names = ("tuned",) if len(self.learning_rates) == 1 else ("stage1", "stage2")
        frozen = ((VISION,), ()) if self.cache else ((), ())
        shared = {name: getattr(self, name) for name in vars(self).keys() & Stage.__dataclass_fields__.keys()}
        shared["lora"] = Lora(**self.lora) if self.lora else None
        return [
            Stage(name, freeze, rate, **shared)
            for name, freeze, rate in zip(names, frozen, self.learning_rates, strict=False)
        ]


def open_data(recipe: Recipe, folder: Path, seed: int = 42) -> datasets.DatasetDict:
    """The recipe's data set: drawn scenes, built once in `folder`, or what `dataset.open_dataset` opens."""
    if recipe.data != "scenes":
        return dataset.open_dataset(recipe.data, folder, seed)
    drawn = folder.with_name(f"{folder.name}-{seed}-{'-'.join(map(str, recipe.scenes))}")
    if not (drawn / "report.json").is_file():
        dataset.build(sources.scenes(seed, *recipe.scenes), drawn, seed=seed)
    return dataset.load(drawn)


def profile_table(hub: Mapping[str, Any], offline: Mapping[str, Any]) -> str:
    """The settings of both profiles, side by side, in Markdown."""
    rows = [[name, hub[name], offline[name] if offline[name] != hub[name] else "the same"] for name in hub]
    return markdown_table(["", "hub (the real model)", "offline (a tiny model, drawn scenes)"], rows)


def score(experiment: str, labels: Sequence[FoodRecord], answers: Mapping[str, Sequence[str]]) -> list[Row]:
    """All figures of everybody who answered, as rows of `experiment`."""
    return [
        row
        for who, texts in answers.items()
        for row in evaluate.to_rows(experiment, who, evaluate.score(labels, texts), COMMAND)
    ]


def training_rows(
    experiment: str, logs: Mapping[str, Sequence[Mapping[str, float]]], seconds: Mapping[str, float]
) -> list[Row]:
    """The log of training: the loss of each stage's first and last step, and how long the stage took."""
    rows = []
    for stage, log in logs.items():
        for which, entry in (("loss_first", log[0]), ("loss_last", log[-1])):
            rows.append(make_row(experiment, stage, which, entry["loss"], unit="nats a token", n=1, command=COMMAND))
        rows.append(make_row(experiment, stage, "seconds", seconds[stage], unit="s", n=1, command=COMMAND))
    return rows


def keep(path: str | Path, rows: Sequence[Row]) -> None:
    """Put `rows` into the results file at `path`, in the place of all earlier ones of the same experiments."""
    path, mine = Path(path), {row.benchmark for row in rows}
    others = [row for row in read_results(path) if row.benchmark not in mine] if path.exists() else []
    write_results(path, sorted([*others, *rows], key=lambda row: row.benchmark))


def adapted_modules(model: torch.nn.Module) -> list[str]:
    """The names of the modules that have an adapter, as the plain model names them."""
    names = (name for name, _ in model.named_modules() if name.endswith(".lora_A"))
    return [name.removeprefix("base_model.model.").removesuffix(".lora_A") for name in names]
