"""SFTTrainer fed with prepared rows: the same loss as the plain path, with far less arithmetic.

What is left out of a step, without changing its result beyond rounding:

- the system message, the same in all rows, runs through the text model once a step, not once a row (its keys and values are shared);
- the LM head sees only positions that are followed by a token of the answer;
- a frozen vision tower is not run at all: its features were computed once;
- resizing, normalising and tokenising were done before (`prepared`).
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import datasets
import torch
from peft import PeftModel
from torch.nn import functional as F
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel, TrainerCallback
from transformers.modeling_outputs import BaseModelOutputWithPooling
from trl import SFTTrainer

from foodextract.collate import IGNORED
from foodextract.models import ModelError
from foodextract.performance import Step, wait_for
from foodextract.prepared import Prepared, normalise, real


class PreparedTrainer(SFTTrainer):
    """An SFTTrainer whose data set is row numbers of a `Prepared`, and whose step takes the shortcuts above.

    `held_out` rows are not trained on; `evaluate` takes their loss and, as `eval_item_f1`, what `score` returns.
    """

    def __init__(
        self, *args: Any, prepared: Prepared, held_out: Sequence[int] = (), score: Callable[[], float] | None = None, **kwargs: Any
    ) -> None:
        self.prepared, self.prefix, self.score = prepared, prepared.prefix, score
        unseen, as_they_are = set(held_out), replace(prepared, augment=None)  # what is measured is not augmented

        def collate(rows: list[dict[str, int]]) -> dict[str, torch.Tensor]:
            numbers = [row["row"] for row in rows]
            return (as_they_are if numbers[0] in unseen else prepared).gather(numbers)

        super().__init__(
            *args,
            train_dataset=datasets.Dataset.from_dict({"row": sorted(set(range(len(prepared))) - unseen)}),
            eval_dataset=datasets.Dataset.from_dict({"row": list(held_out)}) if held_out else None,
            data_collator=collate,
            **kwargs,
        )

    def step_of(self, model: PreTrainedModel, batch: int) -> Step:
        """What a picture puts through the model, on average."""
        start, end = self.prepared.answers.mean(0)
        trains = any(parameter.requires_grad for parameter in model.model.vision_model.parameters())
        vision = "cached" if self.prepared.features is not None else "trained" if trains else "frozen"
        return Step(float(self.prepared.tiles.mean()), float(end), self.prefix.shape[1], batch, float(end - start), vision)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The loss on the held-out rows and, what decides which checkpoint is best, the F1 of the items in generated answers."""
        metrics = super().evaluate(*args, **kwargs)
        if self.score:
            metrics["eval_item_f1"] = self.score()
            self.log({"eval_item_f1": metrics["eval_item_f1"]})
        return metrics

    def compute_loss(
        self,
        model: PreTrainedModel,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Mean cross-entropy over the answer tokens of all rows of the optimizer step, as in SFTTrainer."""
        with self.accelerator.autocast():
            logits, targets = self._answers(model, inputs)
        count = len(targets) if num_items_in_batch is None else num_items_in_batch
        loss = F.cross_entropy(logits.float(), targets, reduction="sum") / count
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # `count` is of all processes, and DDP takes the mean of their gradients
        return loss

    def _answers(self, model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (K, vocabulary) at the K positions before an answer token, and those tokens (K,)."""
        ids, labels, tiles = inputs["input_ids"], inputs["labels"], inputs["tiles"]
        inner = self.accelerator.unwrap_model(model)
        inner = inner.get_base_model() if isinstance(inner, PeftModel) else inner
        cache = DynamicCache(config=inner.config)
        if self.prefix.shape[1]:
            model(input_ids=self.prefix.to(ids.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache.batch_repeat_interleave(len(ids))
        if "features" in inputs:
            tokens = inner.model.connector(inputs["features"][real(tiles, inputs["features"].shape[1])])
            pictures = {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=[tokens.flatten(0, 1)])}}
        else:
            pictures = {"pixel_values": normalise(inputs["pixels"], tiles, self.processing_class.image_processor)}
        answered = labels[:, 1:] != IGNORED
        logits = model(
            input_ids=ids,
            attention_mask=inputs["attention_mask"],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=F.pad(answered, (0, 1)),
            **pictures,
        ).logits
        return logits, labels[:, 1:][answered]


class Progress(TrainerCallback):
    """One bar a stage, in pictures, with the last loss: plain text, so that notebooks, logs and terminals all show it.

    Keeps the time that steps took. Raises ModelError at the first loss that is not a number, which ends the stage.
    """

    def __init__(self, name: str, learning_rate: float) -> None:
        self.name, self.learning_rate = name, learning_rate
        self.seconds, self.pictures = 0.0, 0  # spent in steps, the first one left out: it warms up

    def on_train_begin(self, args, state, control, **_):
        self.per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        hidden = not state.is_world_process_zero
        total, done = state.max_steps * self.per_step, state.global_step * self.per_step
        self.bar = tqdm(total=total, initial=done, desc=self.name, unit="picture", disable=hidden)
        self.first = state.global_step

    def on_step_begin(self, args, state, control, **_):
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **_):
        wait_for(args.device)
        if state.global_step > self.first + 1:
            self.seconds += time.perf_counter() - self.start
            self.pictures += self.per_step
        self.bar.update(self.per_step)

    def on_log(self, args, state, control, logs=None, **_):
        if logs and "loss" in logs:
            if not math.isfinite(float(logs["loss"])):
                raise ModelError(
                    f"{self.name}: the loss became NaN at step {state.global_step}; lower its learning rate ({self.learning_rate}) "
                    "or look for broken labels. The last checkpoint is kept"
                )
            self.bar.set_postfix(loss=f"{float(logs['loss']):.4f}", step=state.global_step)

    def on_train_end(self, args, state, control, **_):
        self.bar.close()
