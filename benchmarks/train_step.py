"""What training costs an image: the seed projects' recipe beside ours, and what each change between the two is worth.

    python benchmarks/train_step.py                     # 256M and 500M on a CPU, an hour; writes results/train_cpu.json
    python benchmarks/train_step.py --device cuda       # writes results/train_gpu_<name>.json
    python benchmarks/train_step.py --size tiny --results /tmp/train.json       # does it run?

The recipes are a ladder: every rung changes one thing of the rung below, so the factors multiply to the whole. Tiles
come first, because a step with 17 of them takes minutes on a CPU. All rungs are real trainers (transformers' loop
with clipping and fused AdamW), take the same images, and run one after the other, alternately, in one process. A step
is forward and backward of an image and a 32nd of the optimizer's update, since both recipes update after 32 images;
the data path is what the trainer waits for before a step. What we work out once for all epochs is written down apart,
and counted where a whole training is compared (two epochs of either stage). Shares are of a matrix product measured
beside each step, in the same number format; recomputed activations do not count as work. Where a CPU computes bf16
slower than fp32 the seed's recipe is measured in fp32, which is its best there.

Weights are random at true size (`true_size.py`). An interrupted run goes on behind the last cell that it finished.
"""

import copy
import ctypes
import gc
import json
import re
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Annotated

import datasets
import numpy as np
import torch
import typer
from tqdm import tqdm
from transformers import PreTrainedModel, PrinterCallback, ProcessorMixin, TrainerCallback
from trl import SFTConfig

from foodextract.data.dataset import as_conversations
from foodextract.data.scenes import draw_scenes
from foodextract.evaluation.results import commit, device_name, write_results
from foodextract.models import loading
from foodextract.training.cache import prepare, vision_features
from foodextract.training.collate import Collator
from foodextract.training.config import precision_of
from foodextract.training.freezing import freeze
from foodextract.training.throughput import Step, flops_per_image, matmul_rate, peak_memory, reset_peak_memory, wait_for
from foodextract.training.trainer import FoodTrainer
from train_recipes import STAGES, Recipe, SeedTrainer, ladder
from train_report import Cell, draw, summarize
from true_size import as_photograph, bf16_is_slow, build

ROOT = Path(__file__).resolve().parents[1]
UPDATE = 32  # images an optimizer step, in the seed's recipe as in ours
ROWS = 5  # batches that the data path is measured on, at least


class Clock(TrainerCallback):
    """Seconds of forward with backward, and of the update, by optimizer step."""

    def __init__(self) -> None:
        self.work, self.update = [], []

    def on_step_begin(self, args, state, control, **_):
        self.start = time.perf_counter()

    def on_pre_optimizer_step(self, args, state, control, **_):
        self.work.append(self._lap(args.device))

    def on_optimizer_step(self, args, state, control, **_):
        self.update.append(self._lap(args.device))

    def _lap(self, device: torch.device) -> float:
        wait_for(device)
        last, self.start = self.start, time.perf_counter()
        return self.start - last


def measure(
    cell: Cell,
    recipe: Recipe,
    original: PreTrainedModel,
    processor: ProcessorMixin,
    split: datasets.Dataset,
    warm: int,
    steps: int,
) -> Cell:
    """Train for some steps, and note what those behind the first `warm` cost."""
    device = torch.device(cell.device)
    settings = {"per_device_train_batch_size": cell.batch, "gradient_accumulation_steps": 1, "bf16": recipe.bf16}
    stage = replace(STAGES[cell.stage], **settings)
    processor = copy.deepcopy(processor)
    loading.set_image_budget(processor, recipe.tiles)
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)  # what earlier cells have freed must not hide what this one takes (glibc)
    reset_peak_memory(device)
    idle = peak_memory(device)
    model = copy.deepcopy(original).to(device, torch.float32 if recipe.master else torch.bfloat16).train()
    model.set_attn_implementation(recipe.attention)
    freeze(model, stage.freeze)
    if recipe.checkpointing:
        model.activation_checkpointing_enable()
    precision = precision_of(stage, device, model.num_parameters())
    dtype = (precision.autocast or precision.weights) if recipe.master else torch.bfloat16
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=str(Path(folder) / "trainer" / "checkpoints"),
            **stage.arguments(),
            max_steps=warm + steps,
            max_length=None,
            activation_checkpointing=False,
            bf16=recipe.master and precision.autocast is torch.bfloat16,
            fp16=recipe.master and precision.autocast is torch.float16,
            use_cpu=device.type == "cpu",
            dataloader_pin_memory=device.type == "cuda",
            save_strategy="no",
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        once = time.perf_counter()
        if recipe.prepared:
            rows = prepare(split, processor, folder)
            if recipe.cached:
                rows.features = vision_features(model, rows, Path(folder) / "features.bin", dtype)
            once = (time.perf_counter() - once) / len(split)
            numbers = datasets.Dataset.from_dict({"row": range(len(rows))})
            trainer = FoodTrainer(model, config, rows, numbers, processing_class=processor)
        else:
            once, collate, rows = 0.0, Collator(processor, recipe.answer_only), as_conversations(split)
            trainer = SeedTrainer(model, config, train_dataset=rows, processing_class=processor, data_collator=collate)
            trainer.answer_only = recipe.answer_only
        data = []
        for first in range(0, len(split) // cell.batch * cell.batch, cell.batch):
            start = time.perf_counter()
            batch = trainer.data_collator([trainer.train_dataset[row] for row in range(first, first + cell.batch)])
            data.append((time.perf_counter() - start) / cell.batch)
        if recipe.prepared:
            step = rows.step(cell.batch, "frozen" if stage.freeze else "trained")
        else:
            tokens, seen = batch["input_ids"].shape[1], float((batch["labels"] >= 0).sum() / cell.batch)
            head = seen if recipe.answer_only else tokens
            step = Step(batch["pixel_values"].shape[1], tokens, 0, 1, head, "frozen" if stage.freeze else "trained")
        clock = Clock()
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(clock)
        trainer.train()
        memory = peak_memory(device) - idle
    seconds = [work / cell.batch + update / UPDATE for work, update in zip(clock.work, clock.update, strict=True)]
    flops, rate = flops_per_image(model.config, step), matmul_rate(device, dtype)
    return replace(cell, step=seconds[warm:], data=data[1:], once=once, memory=memory, flops=flops, rate=rate)


def in_file_name(device: str) -> str:
    """The name of a device as part of a file name."""
    return re.sub("[^a-z0-9]+", "_", device.lower()).strip("_")


def images(count: int) -> datasets.Dataset:
    """Drawn scenes as large as photographs, with their labels."""
    scenes = list(draw_scenes(11, "test", count))
    rows = [{"image": {"bytes": as_photograph(scene), "path": None}, **scene.record.model_dump()} for scene in scenes]
    return datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())


def main(
    size: Annotated[list[str] | None, typer.Option(help="500m, 256m or tiny; may be given more than once.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 …")] = "cpu",
    repeats: Annotated[
        int, typer.Option(min=1, help="Rounds. On a CPU recipes with several tiles run in the first one alone.")
    ] = 2,
    steps: Annotated[
        int, typer.Option(min=1, help="Measured steps a round, behind one to warm up; one for several tiles on a CPU.")
    ] = 2,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Images at once in ours (default: 8 on a CPU, else 32).")
    ] = None,
    seed_batch: Annotated[
        int | None, typer.Option(min=1, help="The same in the seed's recipe (default: 1 on a CPU, else 8).")
    ] = None,
    processor: Annotated[
        Path, typer.Option(help="A SmolVLM's folder to take the tokenizer from.")
    ] = loading.TINY_TUNED,
    results: Annotated[
        Path | None, typer.Option(help="Where the figures go (default: results/train_<device>.json).")
    ] = None,
    ends: Annotated[bool, typer.Option("--ends", help="Only the seed's recipe and ours, nothing between.")] = False,
) -> None:
    """Measure, print, draw and write down."""
    on, name = loading.choose_device(device), device_name()
    slow = on.type == "cpu"
    batches = (seed_batch or (1 if slow else 8), batch or (8 if slow else 32))
    if results is None:
        results = ROOT / "results" / ("train_cpu.json" if slow else f"train_gpu_{in_file_name(name)}.json")
    built = {one: build(one, processor) for one in size or ["256m", "500m"]}
    notes = results.with_suffix(".cells.jsonl")
    notes.parent.mkdir(parents=True, exist_ok=True)
    known = [Cell(**json.loads(line)) for line in notes.read_text().splitlines()] if notes.exists() else []
    found = {cell.key: cell for cell in known}
    plan = []  # cells with their recipe, steps to warm up and to measure
    slow_bf16 = bf16_is_slow(on)
    for one, number, stage in product(built, range(repeats), STAGES.values()):
        for recipe in ladder(stage, on, built[one][0].num_parameters(), slow_bf16=slow_bf16):
            if ends and recipe.name not in ("seed_recipe", "ours"):
                continue
            long = slow and recipe.tiles > 1
            if not (long and number):
                cell = Cell(one, stage.name, recipe.name, number, commit(), str(on), batches[recipe.batched])
                warm, measured = (0, 1) if long else (1, steps)
                plan.append((cell, recipe, warm, measured))
    left = [planned for planned in plan if planned[0].key not in found]
    print(f"{len(left)} of {len(plan)} cells to measure on {name}", flush=True)
    split = images(max(ROWS, 1 + steps) * max(batches))
    for cell, recipe, warm, measured in (bar := tqdm(left, unit="cell")):
        rows = split.select(range(max(ROWS, warm + measured) * cell.batch))
        done = found[cell.key] = measure(cell, recipe, *built[cell.size], rows, warm, measured)
        with notes.open("a") as file:
            file.write(json.dumps(asdict(done)) + "\n")
        gc.collect()
        speed = f"data {np.mean(done.data):8.4f} s  step {np.mean(done.step):8.3f} s  {done.memory / 2**30:5.2f} GiB"
        bar.write(f"{cell.size:5} {cell.stage} {recipe.name:37} {speed}")
    sizes = "".join(f" --size {one}" for one in size or [])
    command = f"python benchmarks/train_step.py{sizes} --device {device} --repeats {repeats} --steps {steps}"
    command += f" --batch {batches[1]} --seed-batch {batches[0]}" + " --ends" * ends
    write_results(results, summarize([found[planned[0].key] for planned in plan], results.stem, command))
    notes.unlink()
    draw(results)


if __name__ == "__main__":
    typer.run(main)
