"""Two stages of full fine-tuning with TRL: what each one freezes, how it runs, and proof of which weights it moved."""

import errno
import hashlib
import json
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import datasets
import torch
from accelerate import PartialState
from peft import PeftModel
from transformers import PreTrainedModel, PrinterCallback, ProcessorMixin, set_seed
from trl import SFTConfig, SFTTrainer

from foodextract import evaluation
from foodextract.adapters import Lora, attach, untie
from foodextract.collate import Collator
from foodextract.dataset import as_conversations, record_of
from foodextract.extractor import Extractor
from foodextract.models import FINISHED, ModelError, Precision, choose_precision
from foodextract.performance import flops_per_picture, matmul_rate, memory_used
from foodextract.prepared import Prepared, augmentation, features_shape, prepare, vision_features, whole_text
from foodextract.trainer import PreparedTrainer, Progress
from foodextract.weights import Moved, checksum, freeze, snapshot, weights_moved


@dataclass(frozen=True)
class Stage:
    """One run of training: the recipe is these values and nothing else."""

    name: str
    freeze: tuple[str, ...]  # prefixes of parameter names that stay as they are
    learning_rate: float
    epochs: float = 2
    batch_size: int = 8  # pictures on the device at once
    accumulation: int = 4  # such batches an optimizer step
    warmup: float = 0.03  # share of the steps
    schedule: str = "constant_with_warmup"  # of the learning rate, by its name in transformers; plain "constant" would ignore the warm-up
    validation: int = 0  # pictures to choose the best checkpoint by; 0: train on all, keep the last
    every: int = 0  # steps between checkpoints; 0: one an epoch
    lora: Lora | None = None  # adapters instead of the weights themselves; merged into them at the end, and saved in `adapter` as well
    target: str = "json"  # what the answer is written as: "json", or "repr" as the projects this one grew from did it
    whole_text: bool = False  # loss on prompt and tile markers too, as they did it
    augment: bool = False  # mirror, crop, turn and recolour; the vision tower then has to look at every picture every time
    fast: bool = True  # rows prepared once, shortcuts in the step: the same losses; False is the plain SFTTrainer


def train_stage(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    stage: Stage,
    split: datasets.Dataset,
    out: str | Path,
    *,
    seed: int = 42,
    max_steps: int = -1,
) -> tuple[list[dict[str, float]], list[Moved]]:
    """Train `model` in place on a split of the data set and save it, with its processor, to `out`/stage.name.

    Every stage starts with a fresh optimizer. An interrupted stage leaves a checkpoint an epoch, and the same call takes it up again. When
    a GPU's memory does not suffice, smaller batches are accumulated to the same effective batch.
    Returns the log (loss, learning rate, gradient norm by step) and the table of moved weights. Raises ModelError when the loss stops
    being a number, when the disk is full and when not even one picture fits; the folder then keeps its last whole checkpoint.
    """
    folder = Path(out) / stage.name
    checkpoints = folder / "checkpoints"
    processes = PartialState()
    freeze(model, stage.freeze)
    if stage.lora and stage.lora.also:
        untie(model)
    before = snapshot(model)
    start = {"weights": checksum(before), "rows": split._fingerprint, "seed": seed, "max_steps": max_steps}
    recipe = json.dumps({**asdict(stage), **start})
    with processes.main_process_first():
        if not ((checkpoints / "recipe.json").is_file() and (checkpoints / "recipe.json").read_text() == recipe):
            shutil.rmtree(folder, ignore_errors=True)
            checkpoints.mkdir(parents=True)
            (checkpoints / "recipe.json").write_text(recipe)
    precision = choose_precision(model.device, training=True)
    progress = Progress(stage.name, stage.learning_rate)
    run = stage
    if stage.fast and model.device.type == "cuda":  # the whole effective batch at once, if it fits
        run = replace(stage, batch_size=stage.batch_size * stage.accumulation, accumulation=1)
    while True:
        try:
            set_seed(seed)  # adapters start at random
            trained = attach(model, stage.lora) if stage.lora else model
            trainer = _trainer(model, trained, processor, run, split, checkpoints, seed, max_steps)
            trainer.remove_callback(PrinterCallback)
            trainer.add_callback(progress)
            trainer.train(resume_from_checkpoint=last_checkpoint(checkpoints))
            break
        except torch.OutOfMemoryError as error:
            if run.batch_size == 1:
                raise ModelError(f"{stage.name}: not even one picture at a time fits into memory; take fewer tiles") from error
            fewer = 1 if run.batch_size % 2 else run.batch_size // 2
            run = replace(run, batch_size=fewer, accumulation=run.accumulation * run.batch_size // fewer)
            print(f"out of memory: going on with batches of {run.batch_size} x {run.accumulation}")
            if stage.lora:
                trained.unload()
            model.load_state_dict(before, strict=False)
            torch.cuda.empty_cache()
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise ModelError(
                f"{stage.name}: the disk of {checkpoints} is full; free some of it and run this again, which takes up the last checkpoint"
            ) from error
    log = [entry for entry in trainer.state.log_history if {"loss", "eval_loss", "eval_item_f1"} & entry.keys()]
    performance = _performance(model, trainer, progress, run)
    if stage.lora:
        if processes.is_main_process:
            trained.save_pretrained(folder / "adapter")
        trained.merge_and_unload()
    moved = weights_moved(model, before)
    processes.wait_for_everyone()
    if processes.is_main_process:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        shutil.rmtree(checkpoints)
        finished = {
            **asdict(run),
            "seed": seed,
            "processes": processes.num_processes,
            "precision": precision.reason,
            "performance": performance,
            "log": log,
            "moved": [asdict(m) for m in moved],
        }
        (folder / FINISHED).write_text(json.dumps(finished, indent=1))
    processes.wait_for_everyone()
    return [entry for entry in log if "loss" in entry], moved


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that is whole: the trainer's state is what is written last."""
    whole = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json") if path.stat().st_size]
    return str(max(whole, key=lambda path: int(path.name.split("-")[1]))) if whole else None


def _trainer(
    model: PreTrainedModel,
    trained: PreTrainedModel | PeftModel,
    processor: ProcessorMixin,
    stage: Stage,
    split: datasets.Dataset,
    checkpoints: Path,
    seed: int,
    max_steps: int,
) -> SFTTrainer:
    """`trained` is the model, or the adapters around it."""
    precision = choose_precision(model.device, training=True)
    rhythm = "steps" if stage.every else "epoch"
    config = SFTConfig(
        output_dir=str(checkpoints),
        num_train_epochs=stage.epochs,
        max_steps=max_steps,
        per_device_train_batch_size=stage.batch_size,
        gradient_accumulation_steps=stage.accumulation,
        learning_rate=stage.learning_rate,
        lr_scheduler_type=stage.schedule,
        warmup_steps=stage.warmup,
        max_length=None,  # the default of 1024 cuts image tokens off
        activation_checkpointing=False,  # on by default in TRL, and not needed with one tile a picture
        bf16=precision.autocast is torch.bfloat16,
        fp16=precision.autocast is torch.float16,
        use_cpu=model.device.type == "cpu",
        save_strategy=rhythm,
        save_steps=stage.every or 500,
        save_total_limit=1,
        eval_strategy=rhythm if stage.validation else "no",
        eval_steps=stage.every or None,
        load_best_model_at_end=bool(stage.validation),
        metric_for_best_model=("item_f1" if stage.fast else "loss") if stage.validation else None,
        logging_steps=1,
        logging_nan_inf_filter=False,  # a NaN must be seen
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=model.device.type == "cuda",
        ddp_find_unused_parameters=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        seed=seed,
    )
    held_out = validation_rows(split, stage.validation)
    if not stage.fast:
        if stage.augment or stage.whole_text or stage.target != "json":
            raise ModelError(f"{stage.name}: augment, whole_text and target belong to the fast path: leave fast=False out")
        seen = sorted(set(range(len(split))) - set(held_out))
        return SFTTrainer(
            trained,
            config,
            train_dataset=as_conversations(split.select(seen)),
            eval_dataset=as_conversations(split.select(held_out)) if held_out else None,
            processing_class=processor,
            data_collator=Collator(processor),
        )
    unseen = split.select(held_out)
    labels = [record_of(row) for row in unseen.remove_columns("image")]

    def score() -> float:
        answers = evaluation.ask(Extractor(model, processor).answer, unseen["image"], stage.batch_size, "validation")
        return next(metric.value for metric in evaluation.score(labels, answers) if metric.name == "item_f1_micro")

    prepared = _prepared(model, processor, stage, split, checkpoints, precision)
    return PreparedTrainer(
        trained, config, prepared=prepared, held_out=held_out, score=score if held_out else None, processing_class=processor
    )


def validation_rows(split: datasets.Dataset, count: int) -> list[int]:
    """About `count` rows by whole groups of look-alikes, the same whatever the order of the rows."""
    groups: dict[str, list[int]] = {}
    for number, group in enumerate(split["group"] if count else ()):
        groups.setdefault(group, []).append(number)
    chosen: list[int] = []
    for group in sorted(groups, key=lambda group: hashlib.sha256(f"validation {group}".encode()).digest()):
        if len(chosen) >= count:
            break
        chosen += groups[group]
    return sorted(chosen)


def _prepared(
    model: PreTrainedModel, processor: ProcessorMixin, stage: Stage, split: datasets.Dataset, checkpoints: Path, precision: Precision
) -> Prepared:
    """The rows, once for all stages; with what the vision tower makes of them if it is frozen and the disk has room for that."""
    with PartialState().main_process_first():
        prepared = prepare(split, processor, checkpoints.parents[1], stage.target)
    if stage.whole_text:
        prepared = whole_text(prepared)
    if stage.augment:
        if prepared.pixels.shape[1] > 1:
            raise ModelError("pictures of several tiles cannot be augmented, since their tiles must fit together: take 1 tile")
        return replace(prepared, augment=augmentation(prepared.pixels.shape[-1]))
    if any(parameter.requires_grad for parameter in model.model.vision_model.parameters()):
        return prepared
    dtype = precision.autocast or precision.weights
    needed = features_shape(model, prepared).numel() * dtype.itemsize
    if needed > 0.5 * shutil.disk_usage(checkpoints).free:
        print(f"what the frozen vision tower sees would take {needed / 1e9:.0f} GB, more than half of the free disk: not stored")
        return prepared
    with PartialState().main_process_first():
        features = vision_features(model, prepared, processor.image_processor, checkpoints / "features.bin", dtype)
    return replace(prepared, features=features)


def _performance(model: PreTrainedModel, trainer: SFTTrainer, progress: Progress, stage: Stage) -> dict[str, float | str]:
    """Rates of the steps, without the first; the device's own rate is measured here and now, with a matrix product."""
    if not (stage.fast and progress.seconds):
        return {}
    step = trainer.step_of(model, stage.batch_size)
    rate = progress.pictures / progress.seconds
    flops = flops_per_picture(model.config, step)
    precision = choose_precision(model.device, training=True)
    possible = matmul_rate(model.device, precision.autocast or precision.weights)
    return {
        "pictures_per_second": rate,
        "tokens_per_second": rate * (step.own_tokens + step.shared_tokens),
        "memory_bytes": memory_used(model.device),
        "vision": step.vision,
        "flops_per_picture": flops,
        "flops_per_second": rate * flops,
        "share_of_matmul_rate": rate * flops / possible,
    }
