"""SFTTrainer fed with prepared rows: the same loss as the plain path, with far less arithmetic.

What is left out of a step, without changing its result beyond rounding:

- the system message, the same in all rows, runs through the text model once a step, not once a row (its keys and values are shared);
- the LM head sees only positions that are followed by a token of the answer;
- a frozen vision tower is not run at all: its features were computed once;
- resizing, normalizing and tokenizing were done before (`prepared`).
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import datasets
import torch
from peft import PeftModel
from torch.nn import functional as F
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.modeling_outputs import BaseModelOutputWithPooling
from trl import SFTTrainer

from foodextract.models.loading import ModelError
from foodextract.training.cache import Prepared, normalize, real
from foodextract.training.collate import IGNORED
from foodextract.training.throughput import Step, wait_for


class PreparedTrainer(SFTTrainer):
    """An SFTTrainer whose data set is row numbers of a `Prepared`, and whose step takes the shortcuts above.

    `held_out` rows are not trained on; `evaluate` takes their loss and, as `eval_item_f1`, what `score` returns. `against_repeats` weighs
    a second loss, `said_again`.
    """

    def __init__(
        self,
        *args: Any,
        prepared: Prepared,
        held_out: Sequence[int] = (),
        score: Callable[[], float] | None = None,
        against_repeats: float = 0,
        **kwargs: Any,
    ) -> None:
        self.prepared, self.prefix, self.score, self.against_repeats = prepared, prepared.prefix, score, against_repeats
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
        """What an image puts through the model, on average."""
        start, end = self.prepared.answers.mean(0)
        trains = any(parameter.requires_grad for parameter in model.model.vision_model.parameters())
        vision = "cached" if self.prepared.features is not None else "trained" if trains else "frozen"
        return Step(
            float(self.prepared.tiles.mean()), float(end), self.prefix.shape[1], batch, float(end - start), vision
        )

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
        """Mean cross-entropy over the answer tokens of all rows of the optimizer step, as in SFTTrainer; and what repeats cost."""
        with self.accelerator.autocast():
            logits, targets = self._answers(model, inputs)
        count = len(targets) if num_items_in_batch is None else num_items_in_batch
        loss = F.cross_entropy(logits.float(), targets, reduction="sum") / count
        if self.against_repeats:
            rows = (inputs["labels"][:, 1:] != IGNORED).nonzero()[:, 0]
            loss = (
                loss
                + self.against_repeats
                * said_again(logits, targets, rows, *_marks(self.processing_class.tokenizer))
                / count
            )
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = (
                loss * self.accelerator.num_processes
            )  # `count` is of all processes, and DDP takes the mean of their gradients
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
            images = {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=[tokens.flatten(0, 1)])}}
        else:
            images = {"pixel_values": normalize(inputs["pixels"], tiles, self.processing_class.image_processor)}
        answered = labels[:, 1:] != IGNORED
        logits = model(
            input_ids=ids,
            attention_mask=inputs["attention_mask"],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=F.pad(answered, (0, 1)),
            **images,
        ).logits
        return logits, labels[:, 1:][answered]


def said_again(
    logits: torch.Tensor, targets: torch.Tensor, rows: torch.Tensor, words: torch.Tensor, opens: torch.Tensor
) -> torch.Tensor:
    """Unlikelihood of words that the title or list in hand holds already, summed over the K answer tokens.

    Cross-entropy says little against naming an item twice: labels never do. Asked what else there is in an image that it cannot read, a
    small model then says once more what it is sure of. Equation 4 of Welleck et al., Neural Text Generation with Unlikelihood
    Training, 2020, with words of the same list as candidates.

    `logits` (K, vocabulary) and `targets` (K,) as in the loss; `rows` (K,) says whose answer a token is of; `words` and `opens`
    (vocabulary,) mark tokens with a letter, and those that begin a list.
    """
    lists = opens.to(targets.device)[targets].cumsum(0)
    before = ((rows[:, None] == rows) & (lists[:, None] == lists)).tril(-1) & words.to(targets.device)[targets]
    said = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
    token, earlier = (before & (targets[:, None] != targets)).nonzero(as_tuple=True)
    said[token, targets[earlier]] = True
    chance = logits.float().softmax(-1)[said]
    return -torch.log1p(-chance.clamp(max=1 - 1e-6)).sum()


@cache
def _marks(tokenizer: PreTrainedTokenizerBase) -> tuple[torch.Tensor, torch.Tensor]:
    """(vocabulary,) bool each: tokens with a letter, and tokens that begin a list. Special tokens are neither."""
    texts = [
        "" if number in tokenizer.all_special_ids else tokenizer.decode([number]) for number in range(len(tokenizer))
    ]
    return torch.tensor([any(map(str.isalpha, text)) for text in texts]), torch.tensor(["[" in text for text in texts])


class Progress(TrainerCallback):
    """One bar a stage, in images, with the last loss: plain text, so that notebooks, logs and terminals all show it.

    Keeps the time that steps took, and writes to each entry of the log how long the stage has run, interruptions left out (`elapsed`,
    seconds). Skips the checkpoint after the last step, since the finished stage is saved next; when checkpoints are compared
    (`load_best_model_at_end`), the last one is written too. Raises ModelError at the first loss that is not a number.
    """

    def __init__(self, name: str, learning_rate: float) -> None:
        self.name, self.learning_rate = name, learning_rate
        self.seconds, self.images = 0.0, 0  # spent in steps, the first one left out: it warms up

    def on_train_begin(self, args, state, control, **_):
        self.per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        hidden = not state.is_world_process_zero
        total, done = state.max_steps * self.per_step, state.global_step * self.per_step
        self.bar = tqdm(total=total, initial=done, desc=self.name, unit="image", disable=hidden)
        self.first = state.global_step
        self.began = time.perf_counter()
        self.earlier = max(
            (entry.get("elapsed", 0) for entry in state.log_history), default=0
        )  # of the runs before an interruption

    def on_step_begin(self, args, state, control, **_):
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **_):
        wait_for(args.device)
        if state.global_step > self.first + 1:
            self.seconds += time.perf_counter() - self.start
            self.images += self.per_step
        self.bar.update(self.per_step)
        self._skip_last_checkpoint(args, state, control)

    def on_epoch_end(self, args, state, control, **_):
        self._skip_last_checkpoint(args, state, control)

    def _skip_last_checkpoint(self, args, state, control):
        if state.global_step >= state.max_steps and not args.load_best_model_at_end:
            control.should_save = False

    def on_log(self, args, state, control, logs=None, **_):
        if state.log_history:
            state.log_history[-1]["elapsed"] = self.earlier + time.perf_counter() - self.began
        if logs and "loss" in logs:
            if not math.isfinite(float(logs["loss"])):
                raise ModelError(
                    f"{self.name}: the loss became NaN at step {state.global_step}; lower its learning rate ({self.learning_rate}) "
                    "or look for broken labels. The last checkpoint is kept"
                )
            self.bar.set_postfix(loss=f"{float(logs['loss']):.4f}", step=state.global_step)

    def on_train_end(self, args, state, control, **_):
        self.bar.close()
