"""What one run of training is: its values, its precision, and how TRL is told."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from trl import SFTConfig

from foodextract.models.loading import ModelError, Precision, choose_precision
from foodextract.training.lora import Lora


@dataclass(frozen=True)
class Stage:
    """One run of training: the recipe is these values and nothing else."""

    name: str
    freeze: tuple[str, ...]  # prefixes of parameter names that stay as they are
    learning_rate: float
    epochs: float = 2
    batch_size: int = 8  # images on the device at once
    accumulation: int = 4  # such batches an optimizer step
    warmup: float = 0.03  # share of the steps
    schedule: str = "constant_with_warmup"  # of the learning rate, by its name in transformers; plain "constant" would ignore the warm-up
    validation: int = 0  # images to choose the best checkpoint by; 0: train on all, keep the last
    every: int = 0  # steps between checkpoints; 0: one an epoch
    lora: Lora | None = (
        None  # adapters instead of the weights themselves; merged into them at the end, and saved in `adapter` as well
    )
    target: str = "json"  # what the answer is written as: "json", or "repr" as the projects this one grew from did it
    whole_text: bool = False  # loss on prompt and tile markers too, as they did it
    against_repeats: float = (
        0  # weight of a second loss, on words that the title or list in hand holds already; 0: none
    )
    augment: bool = False  # mirror, crop, turn and recolor; the vision tower then has to look at every image every time
    fast: bool = True  # rows prepared once, shortcuts in the step: the same losses; False is the plain SFTTrainer
    bf16: bool = False  # autocast to bf16 where `choose_precision` would not
    compile: bool = False  # torch.compile: the first step takes minutes, the later ones less than without

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")  # for `changed`


def changed(stage: Stage, values: Mapping[str, Any]) -> Stage:
    """The stage with other `values`, as JSON or YAML spells them. Raises ModelError for one that a stage does not have or cannot use.

    >>> changed(Stage("stage1", freeze=(), learning_rate=2e-4), {"learning_rate": "1e-4"}).learning_rate  # a text in YAML: it lacks a dot
    0.0001
    """
    try:
        return TypeAdapter(Stage).validate_python(vars(stage) | values)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg'].lower()}" for fault in error.errors())
        raise ModelError(f"{stage.name}: {faults} (the values of a stage are {', '.join(vars(stage))})") from error


def is_sharded() -> bool:
    """Does accelerate spread the weights over processes? Parts of the model then cannot run alone, nor a forward in two parts."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def precision_of(stage: Stage, device: torch.device, parameters: int = 0) -> Precision:
    """What suits the device and a model of so many parameters, or bf16 autocast where the stage asks for it."""
    chosen = choose_precision(device, training=True, parameters=parameters)
    if not stage.bf16 or chosen.autocast is torch.bfloat16:
        return chosen
    return replace(chosen, autocast=torch.bfloat16, reason="fp32 weights, bf16 autocast: the stage asks for it")


def training_config(
    stage: Stage,
    precision: Precision,
    device: torch.device,
    checkpoints: Path,
    seed: int = 42,
    steps: int = -1,
    report_to: str = "none",
) -> SFTConfig:
    """A stage in the words of transformers and TRL."""
    rhythm = "steps" if stage.every else "epoch"
    return SFTConfig(
        output_dir=str(checkpoints),
        num_train_epochs=stage.epochs,
        max_steps=steps,
        per_device_train_batch_size=stage.batch_size,
        gradient_accumulation_steps=stage.accumulation,
        learning_rate=stage.learning_rate,
        lr_scheduler_type=stage.schedule,
        warmup_steps=stage.warmup,
        max_length=None,  # the default of 1024 cuts image tokens off
        activation_checkpointing=False,  # on by default in TRL, and not needed with one tile an image
        bf16=precision.autocast is torch.bfloat16,
        fp16=precision.autocast is torch.float16,
        use_cpu=device.type == "cpu",
        save_strategy=rhythm,
        save_steps=stage.every or 500,
        save_total_limit=1,
        eval_strategy=rhythm if stage.validation else "no",
        eval_steps=stage.every or None,
        load_best_model_at_end=bool(stage.validation),
        metric_for_best_model=("item_f1" if stage.fast else "loss") if stage.validation else None,
        logging_steps=1,
        logging_nan_inf_filter=False,  # a NaN must be seen
        report_to=report_to,
        torch_compile=stage.compile,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
        ddp_find_unused_parameters=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        seed=seed,
    )
