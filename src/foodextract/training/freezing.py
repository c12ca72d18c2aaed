"""Which weights a stage trains, and a bit-for-bit count of those that changed."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from foodextract.models.loading import ModelError
from foodextract.models.weights import modules_of, whole


@dataclass(frozen=True)
class Moved:
    """How many weights and tensors of one module a stage changed."""

    module: str
    weights: int
    weights_moved: int
    tensors: int
    tensors_moved: int


def freeze(model: PreTrainedModel, prefixes: Iterable[str]) -> None:
    """Freeze the parameters whose names start with one of `prefixes`, and train all others.

    Raises ModelError for a prefix that no parameter has.
    """
    model.requires_grad_(True)
    for prefix in prefixes:
        frozen = [parameter for name, parameter in model.named_parameters() if name.startswith(prefix)]
        if not frozen:
            modules = ", ".join(sorted(modules_of(model)))
            raise ModelError(f"nothing to freeze under {prefix!r}: the model's modules are {modules}")
        for parameter in frozen:
            parameter.requires_grad_(False)


def trainable_table(model: PreTrainedModel) -> list[dict[str, str | int]]:
    """One row per module: its parameters and how many of them train."""
    return [
        {
            "module": module,
            "parameters": sum(p.numel() for _, p in parameters),
            "trainable": sum(p.numel() for _, p in parameters if p.requires_grad),
        }
        for module, parameters in modules_of(model).items()
    ]


def weights_moved(model: PreTrainedModel, before: dict[str, torch.Tensor]) -> list[Moved]:
    """Compare every weight with its value in `before`, bit for bit."""
    table = []
    for module, parameters in modules_of(model).items():
        changed = [int((whole(parameter).cpu() != before[name]).sum()) for name, parameter in parameters]
        weights = sum(parameter.numel() for _, parameter in parameters)
        table.append(Moved(module, weights, sum(changed), len(changed), sum(map(bool, changed))))
    return table
