"""Two stages of full fine-tuning with TRL: what each one freezes, how it runs, and proof of which weights it moved."""

import json
import math
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import datasets
import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PrinterCallback, ProcessorMixin, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer

from foodextract.collate import Collator
from foodextract.dataset import as_conversations
from foodextract.models import FINISHED, ModelError, choose_precision


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


@dataclass(frozen=True)
class Moved:
    """What a stage did to one module: how many of its weights, and of its tensors, are no longer what they were."""

    module: str
    weights: int
    weights_moved: int
    tensors: int
    tensors_moved: int


def freeze(model: PreTrainedModel, prefixes: Iterable[str]) -> None:
    """Make exactly the parameters under `prefixes` constant. Raises ModelError for a prefix that no parameter has."""
    model.requires_grad_(True)
    for prefix in prefixes:
        frozen = [parameter for name, parameter in model.named_parameters() if name.startswith(prefix)]
        if not frozen:
            raise ModelError(f"nothing to freeze under {prefix!r}: the model's modules are {', '.join(sorted(modules_of(model)))}")
        for parameter in frozen:
            parameter.requires_grad_(False)


def modules_of(model: PreTrainedModel) -> dict[str, list[tuple[str, torch.nn.Parameter]]]:
    """Parameters by the part of the model they belong to: vision_model, connector, text_model, lm_head (unless tied)."""
    modules: dict[str, list[tuple[str, torch.nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        modules.setdefault(name.removeprefix("model.").split(".")[0], []).append((name, parameter))
    return modules


def trainable_table(model: PreTrainedModel) -> list[dict[str, str | int]]:
    """One row a module: its parameters and how many of them train."""
    return [
        {
            "module": module,
            "parameters": sum(p.numel() for _, p in parameters),
            "trainable": sum(p.numel() for _, p in parameters if p.requires_grad),
        }
        for module, parameters in modules_of(model).items()
    ]


def snapshot(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """A copy of all weights on the CPU, to compare with later."""
    return {name: parameter.detach().to("cpu", copy=True) for name, parameter in model.named_parameters()}


def weights_moved(model: PreTrainedModel, before: dict[str, torch.Tensor]) -> list[Moved]:
    """Compare, bit for bit, every weight with its value in `before`."""
    table = []
    for module, parameters in modules_of(model).items():
        changed = [int((parameter.detach().cpu() != before[name]).sum()) for name, parameter in parameters]
        weights = sum(parameter.numel() for _, parameter in parameters)
        table.append(Moved(module, weights, sum(changed), len(changed), sum(map(bool, changed))))
    return table


class _Progress(TrainerCallback):
    """One bar a stage, in pictures, with the last loss: plain text, so that notebooks, logs and terminals all show it.

    Stops the stage with a ModelError at the first loss that is not a number.
    """

    def __init__(self, stage: Stage) -> None:
        self.stage, self.bar = stage, None

    def on_train_begin(self, args, state, control, **_):
        per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        self.bar = tqdm(total=state.max_steps * per_step, initial=state.global_step * per_step, desc=self.stage.name, unit="picture")
        self.per_step = per_step

    def on_step_end(self, args, state, control, **_):
        self.bar.update(self.per_step)

    def on_log(self, args, state, control, logs=None, **_):
        if logs and "loss" in logs:
            if not math.isfinite(float(logs["loss"])):
                raise ModelError(
                    f"{self.stage.name}: the loss became NaN at step {state.global_step}; lower its learning rate "
                    f"({self.stage.learning_rate}) or look for broken labels. The last checkpoint is kept"
                )
            self.bar.set_postfix(loss=f"{float(logs['loss']):.4f}", step=state.global_step)

    def on_train_end(self, args, state, control, **_):
        self.bar.close()


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

    Every stage starts with a fresh optimizer. An interrupted stage leaves a checkpoint an epoch, and the same call takes it up again.
    Returns the log (loss, learning rate, gradient norm by step) and the table of moved weights. Raises ModelError when the loss stops
    being a number; the folder then keeps its last checkpoint.
    """
    folder = Path(out) / stage.name
    checkpoints = folder / "checkpoints"
    recipe = json.dumps({**asdict(stage), "seed": seed, "max_steps": max_steps, "rows": split._fingerprint})
    resumable = (checkpoints / "recipe.json").is_file() and (checkpoints / "recipe.json").read_text() == recipe
    if not resumable:
        shutil.rmtree(folder, ignore_errors=True)
        checkpoints.mkdir(parents=True)
        (checkpoints / "recipe.json").write_text(recipe)
    freeze(model, stage.freeze)
    before = snapshot(model)
    precision = choose_precision(model.device, training=True)
    config = SFTConfig(
        output_dir=str(checkpoints),
        num_train_epochs=stage.epochs,
        max_steps=max_steps,
        per_device_train_batch_size=stage.batch_size,
        gradient_accumulation_steps=stage.accumulation,
        learning_rate=stage.learning_rate,
        lr_scheduler_type="constant_with_warmup",  # "constant" would ignore the warm-up
        warmup_steps=stage.warmup,
        max_length=None,  # the default of 1024 cuts image tokens off
        activation_checkpointing=False,  # on by default in TRL, and not needed with one tile a picture
        bf16=precision.autocast is torch.bfloat16,
        fp16=precision.autocast is torch.float16,
        use_cpu=model.device.type == "cpu",
        save_strategy="epoch",
        save_total_limit=1,
        logging_steps=1,
        logging_nan_inf_filter=False,  # a NaN must be seen
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=model.device.type == "cuda",
        seed=seed,
    )
    trainer = SFTTrainer(
        model, config, train_dataset=as_conversations(split), processing_class=processor, data_collator=Collator(processor)
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_Progress(stage))
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(checkpoints)) if resumable else None)
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    moved = weights_moved(model, before)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    shutil.rmtree(checkpoints)
    finished = {**asdict(stage), "seed": seed, "precision": precision.reason, "log": log, "moved": [asdict(m) for m in moved]}
    (folder / FINISHED).write_text(json.dumps(finished, indent=1))
    return log, moved
