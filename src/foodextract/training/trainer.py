"""SFTTrainer with the loss of this project, and micro-batches that fit into memory.

Compared with SFTTrainer, a step leaves out work that does not change its result beyond rounding:

- the LM head runs only on positions that are followed by a target token;
- tokens that all rows share (the system message) run once a batch, where a batch has their number as `shared`;
- a frozen vision tower does not run where a batch brings its features.
"""

import gc
import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import (
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from trl import SFTTrainer

from foodextract.models.loading import ModelError
from foodextract.training.cache import PreparedRows, is_real, normalize
from foodextract.training.checkpoints import full_disk_named, last_checkpoint
from foodextract.training.collate import IGNORED
from foodextract.training.config import is_sharded
from foodextract.training.throughput import wait_for

FEW_STEPS = 30  # with fewer optimizer steps, a stage says so


class FoodTrainer(SFTTrainer):
    """SFTTrainer for batches of `Collator` or `PreparedRows`; `args.output_dir` is `<stage>/checkpoints`.

    `unlikelihood_weight` weighs `unlikelihood_loss`; both parts are then logged as `answer_loss` and
    `unlikelihood_loss`. `score` returns `eval_item_f1`, where `metric_for_best_model` is "item_f1".
    """

    model: Any
    data_collator: Any
    processing_class: Any

    def __init__(
        self, *args: Any, unlikelihood_weight: float = 0, score: Callable[[], float] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.unlikelihood_weight, self.score = unlikelihood_weight, score
        self.parts: dict[str, Any] = {"answer_loss": 0.0, "unlikelihood_loss": 0.0}  # summed since the last log entry
        self.checkpoints = Path(self.args.output_dir or "")
        self.stage = self.checkpoints.parent.name
        self.progress = Progress(self.stage)
        self.remove_callback(PrinterCallback)
        self.add_callback(self.progress)

    def train(self, resume_from_checkpoint: Any = None, *rest: Any, **kwargs: Any) -> Any:
        """Train with the largest micro-batches that fit into memory; the effective batch stays.

        On a GPU, prepared rows start with the whole effective batch at once. Out of memory, training restarts from
        its last checkpoint with half as many rows at a time and twice the accumulation. Raises ModelError when not
        even one row fits, when the disk is full, and when the loss is not a number.
        """
        args = self.args
        if args.device.type == "cuda" and isinstance(self.data_collator, PreparedRows):
            args.per_device_train_batch_size *= args.gradient_accumulation_steps
            args.gradient_accumulation_steps = 1
        trainable = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        start = {} if is_sharded() else {name: p.detach().to("cpu", copy=True) for name, p in trainable.items()}
        while True:
            rows, steps = args.per_device_train_batch_size, args.gradient_accumulation_steps
            if self.is_world_process_zero():
                print(f"{self.stage}: batches of {rows} x {steps}", flush=True)
                if resume_from_checkpoint:
                    print(f"{self.stage}: resumed from {Path(resume_from_checkpoint).name}", flush=True)
            self._train_batch_size = args.train_batch_size
            try:
                with full_disk_named(self.stage, self.checkpoints):
                    return super().train(resume_from_checkpoint, *rest, **kwargs)
            except torch.OutOfMemoryError as error:
                if rows == 1 or is_sharded():
                    one = "not even one image at a time fits into memory; take fewer tiles"
                    more = f"batches of {rows} do not fit into memory; take a smaller per_device_train_batch_size"
                    raise ModelError(f"{self.stage}: {one if rows == 1 else more}") from error
            print(f"{self.stage}: out of memory, retrying with smaller batches", flush=True)
            args.per_device_train_batch_size = 1 if rows % 2 else rows // 2
            args.gradient_accumulation_steps = steps * rows // args.per_device_train_batch_size
            self.optimizer, self.model_wrapped = None, self.model
            self.parts = dict.fromkeys(self.parts, 0.0)
            for name, weights in start.items():
                trainable[name].data.copy_(weights)
            gc.collect()
            torch.cuda.empty_cache()
            set_seed(args.seed)
            resume_from_checkpoint = last_checkpoint(self.checkpoints)

    def release(self) -> None:
        """Free the optimizer, the gradients and the dataloaders, which a notebook's variable would keep."""
        handler = self.callback_handler
        handler.train_dataloader = handler.eval_dataloader = handler.optimizer = handler.lr_scheduler = None
        self.optimizer = self.lr_scheduler = None
        self.model.zero_grad()
        self.accelerator.free_memory()

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        """The held-out rows, without augmentation."""
        collator = self.data_collator
        if collator.augment:
            self.data_collator = replace(collator, augment=None)
        try:
            return super().get_eval_dataloader(*args, **kwargs)
        finally:
            self.data_collator = collator

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The loss on the held-out rows and, with `score`, the item F1 of generated answers."""
        metrics = super().evaluate(*args, **kwargs)
        if self.score and self.args.metric_for_best_model == "item_f1":
            metrics["eval_item_f1"] = self.score()
            self.log({"eval_item_f1": metrics["eval_item_f1"]})
        return metrics

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the two parts of the loss beside their sum."""
        if "loss" in logs and self.unlikelihood_weight:
            for name, value in self.parts.items():
                logs[name] = float(self.accelerator.gather(value).mean()) / self.args.logging_steps
                self.parts[name] = 0.0
        super().log(logs, *args, **kwargs)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Mean cross-entropy of the optimizer step's target tokens, as in SFTTrainer, plus the unlikelihood loss."""
        with self.accelerator.autocast():
            logits, targets = self._predict(model, inputs)
        count = len(targets) if num_items_in_batch is None else num_items_in_batch
        # `count` covers all processes, while DDP averages their gradients.
        across = self.args.average_tokens_across_devices and num_items_in_batch is not None
        scale = self.accelerator.num_processes if across else 1
        loss = F.cross_entropy(logits.float(), targets, reduction="sum") / count
        if self.unlikelihood_weight:
            rows = (inputs["labels"][:, 1:] != IGNORED).nonzero()[:, 0]
            marks = _marks(self.processing_class.tokenizer)
            repeats = self.unlikelihood_weight * unlikelihood_loss(logits, targets, rows, *marks) / count
            if model.training:
                self.parts["answer_loss"] += loss.detach() * scale
                self.parts["unlikelihood_loss"] += repeats.detach() * scale
            loss = loss + repeats
        return loss * scale if across else loss

    def _predict(self, model: PreTrainedModel, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (K, vocabulary) at the K positions before a target token, and those tokens (K,)."""
        given = dict(inputs)
        ids, labels, shared = given.pop("input_ids"), given.pop("labels"), given.pop("shared", 0)
        tiles = given.pop("tiles", None)
        inner: Any = self.accelerator.unwrap_model(model)
        inner = inner.get_base_model() if isinstance(inner, PeftModel) else inner
        if shared:
            given["past_key_values"] = past = DynamicCache(config=inner.config)
            model(input_ids=ids[:1, :shared], past_key_values=past, use_cache=True, logits_to_keep=1)
            past.batch_repeat_interleave(len(ids))
        if "features" in given:
            features = given.pop("features")
            tokens = inner.model.connector(features[is_real(tiles, features.shape[1])])
            outputs = BaseModelOutputWithPooling(pooler_output=[tokens.flatten(0, 1)])  # type: ignore[arg-type]
            given["mm_encoder_outputs"] = {"image": outputs}
        elif "pixels" in given:
            given["pixel_values"] = normalize(given.pop("pixels"), tiles, self.processing_class.image_processor)
        labels = labels[:, shared + 1 :]
        targets = labels != IGNORED
        keep = F.pad(targets, (0, 1))
        logits = model(input_ids=ids[:, shared:], use_cache=bool(shared), logits_to_keep=keep, **given).logits
        return logits, labels[targets]


def unlikelihood_loss(
    logits: torch.Tensor, targets: torch.Tensor, rows: torch.Tensor, words: torch.Tensor, opens: torch.Tensor
) -> torch.Tensor:
    """Unlikelihood of words that the current title or list already holds, summed over the K target tokens.

    Labels never name an item twice, so cross-entropy hardly punishes it, and a small model repeats what it is sure
    of. This is equation 4 of Welleck et al., Neural Text Generation with Unlikelihood Training (2020), with the words
    of the same list as candidates.

    `logits` (K, vocabulary) and `targets` (K,) as in the loss; `rows` (K,) is the row of each token; `words` and
    `opens` (vocabulary,) mark tokens with a letter and tokens that begin a list.
    """
    lists = opens.to(targets.device)[targets].cumsum(0)
    before = ((rows[:, None] == rows) & (lists[:, None] == lists)).tril(-1) & words.to(targets.device)[targets]
    repeated = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
    token, earlier = (before & (targets[:, None] != targets)).nonzero(as_tuple=True)
    repeated[token, targets[earlier]] = True
    chance = logits.float().softmax(-1)[repeated]
    return -torch.log1p(-chance.clamp(max=1 - 1e-6)).sum()


@cache
def _marks(tokenizer: PreTrainedTokenizerBase) -> tuple[torch.Tensor, torch.Tensor]:
    """(vocabulary,) bool each: tokens with a letter, and tokens that begin a list. Special tokens are neither."""
    special = set(tokenizer.all_special_ids)
    texts = ["" if number in special else tokenizer.decode([number]) for number in range(len(tokenizer))]
    return torch.tensor([any(map(str.isalpha, text)) for text in texts]), torch.tensor(["[" in text for text in texts])


class Progress(TrainerCallback):
    """A plain-text progress bar in images, for notebooks, logs and terminals alike, and the clock of a stage.

    `elapsed` in each log entry is the training time in seconds, without interruptions. The checkpoint after the last
    step is skipped, since the finished stage is saved next, unless checkpoints are compared
    (`load_best_model_at_end`).
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.seconds, self.images = 0.0, 0  # in steps, without the first one, which warms up

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        total, done = state.max_steps * self.per_step, state.global_step * self.per_step
        hidden = not state.is_world_process_zero
        self.bar = tqdm(total=total, initial=done, desc=self.name, unit="image", disable=hidden)
        self.first, self.began = state.global_step, time.perf_counter()
        self.earlier = max((entry.get("elapsed", 0) for entry in state.log_history), default=0)  # in earlier runs
        if state.max_steps < FEW_STEPS and args.max_steps < 0 and not hidden:
            self.bar.write(
                f"{self.name}: {state.max_steps} steps of {self.per_step} images may be too few to learn from; raise "
                "num_train_epochs or lower per_device_train_batch_size"
            )

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        wait_for(args.device)
        if state.global_step > self.first + 1:
            self.seconds += time.perf_counter() - self.start
            self.images += self.per_step
        self.bar.update(self.per_step)
        self.on_epoch_end(args, state, control)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step >= state.max_steps and not args.load_best_model_at_end:
            control.should_save = False

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        if state.log_history:
            state.log_history[-1]["elapsed"] = self.earlier + time.perf_counter() - self.began
        if logs and "loss" in logs:
            if not math.isfinite(loss := float(logs["loss"])):
                raise ModelError(
                    f"{self.name}: the loss became {'NaN' if math.isnan(loss) else loss} at step {state.global_step}; "
                    f"lower its learning rate ({args.learning_rate}) or look for broken labels. The last checkpoint is "
                    "kept"
                )
            self.bar.set_postfix(loss=f"{float(logs['loss']):.4f}", step=state.global_step)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.bar.close()
