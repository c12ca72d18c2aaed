"""Ways to train, from the seed projects' to ours, one change at a time; and the trainer of those that are not ours."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel
from trl import SFTTrainer

from foodextract.training.collate import IGNORED
from foodextract.training.config import PROFILES, Stage, precision_of

STAGES = {stage.name: stage for stage in (PROFILES["hub"].stage1, PROFILES["hub"].stage2)}
SHARED = "batches that share the system message"  # the last change in stage 2
CACHED = "frozen vision computed once"  # the last change in stage 1


@dataclass(frozen=True)
class Recipe:
    """A way to train. The defaults are the seed's."""

    name: str = "seed_recipe"
    tiles: int = 17
    checkpointing: bool = True
    attention: str = "eager"
    answer_only: bool = False  # loss and LM head where an answer token follows, or on all text
    master: bool = False  # fp32 weights with the device's autocast, or bf16 weights
    prepared: bool = False
    batched: bool = False
    cached: bool = False  # what the frozen vision tower sees
    bf16: bool = False  # autocast where it is not the default


def ladder(stage: Stage, device: torch.device, parameters: int = 0, slow_bf16: bool = False) -> list[Recipe]:
    """From the seed's recipe to ours, one change a rung; also bf16 autocast on a CPU that trains such a model in fp32.

    Where a device computes bf16 slower than fp32 (a CPU without AVX-512), the seed's recipe has fp32 weights: it is
    measured at its best, and no rung changes the number format.
    """
    changes: list[tuple[str, dict[str, Any]]] = [
        ("5 tiles", {"tiles": 5}),
        ("1 tile", {"tiles": 1}),
        ("no checkpointing", {"checkpointing": False}),
        ("SDPA attention", {"attention": "sdpa"}),
        ("loss on the answer only", {"answer_only": True}),
        *([] if slow_bf16 else [("fp32 master weights", {"master": True})]),
        ("rows prepared once", {"prepared": True}),
        (SHARED, {"batched": True}),
    ]
    if stage.freeze:
        changes.append((CACHED, {"cached": True}))
    changes[-1] = ("ours", changes[-1][1])
    if device.type == "cpu" and not slow_bf16 and precision_of(stage, device, parameters).autocast is None:
        changes.append(("ours with bf16 autocast", {"bf16": True}))
    rungs = [Recipe(master=slow_bf16)]
    for name, change in changes:
        rungs.append(replace(rungs[-1], name=name, **change))
    return rungs


class SeedTrainer(SFTTrainer):
    """The model's own loss on everything but padding and image tokens, or on answers, with the LM head nowhere else."""

    answer_only = False

    def compute_loss(self, model: PreTrainedModel, inputs: dict[str, torch.Tensor], *_: Any, **__: Any) -> torch.Tensor:
        if not self.answer_only:
            return model(**inputs).loss
        labels = inputs.pop("labels")
        answered = labels[:, 1:] != IGNORED
        logits = model(**inputs, logits_to_keep=F.pad(answered, (0, 1))).logits
        return F.cross_entropy(logits.float(), labels[:, 1:][answered])
