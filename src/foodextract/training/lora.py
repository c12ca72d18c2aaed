"""LoRA through peft: small adapters beside frozen weights, and the way back to a plain model."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from pydantic import ConfigDict
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Lora:
    """Which adapters a stage trains; everything else stays as it is.

    `exclude` is a regular expression for whole module names. "all-linear" means all: freezing the vision tower beforehand does not keep
    adapters out of it, only excluding it does.
    """

    rank: int = 16
    alpha: int = 16
    dropout: float = 0.05
    exclude: str | None = None
    also: tuple[
        str, ...
    ] = ()  # modules that train as a whole, and are saved with the adapters (peft's `modules_to_save`)

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")  # for `stage.changed`


def attach(model: PreTrainedModel, lora: Lora) -> PeftModel:
    """Put adapters into `model`, in place, and freeze the rest. They start as no change at all, and keep fp32 weights."""
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules="all-linear",
        exclude_modules=lora.exclude,
        modules_to_save=list(lora.also) or None,
    )
    return get_peft_model(model, config)


def untie(model: PreTrainedModel) -> None:
    """Give the LM head weights of its own where it shares those of the embedding.

    Both train as copies when they are among `Lora.also`; saved as tied, one of them would be lost.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is embedding.weight:
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
    model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False


def adapted_modules(model: torch.nn.Module) -> list[str]:
    """Names of the modules that have an adapter, as the plain model calls them."""
    names = (name for name, _ in model.named_modules() if name.endswith(".lora_A"))
    return [name.removeprefix("base_model.model.").removesuffix(".lora_A") for name in names]
