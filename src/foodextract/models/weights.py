"""Weights of a model: by module, as a copy, and as a checksum."""

import hashlib
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel


def modules_of(model: PreTrainedModel) -> dict[str, list[tuple[str, torch.nn.Parameter]]]:
    """Group parameters by module: vision_model, connector, text_model, and lm_head unless it is tied."""
    modules: dict[str, list[tuple[str, torch.nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        modules.setdefault(name.removeprefix("model.").split(".")[0], []).append((name, parameter))
    return modules


def whole(weights: torch.Tensor) -> torch.Tensor:
    """Gather a tensor that FSDP2 may have sharded. Every process must call this."""
    detached: Any = weights.detach()
    return detached.full_tensor() if isinstance(weights, DTensor) else detached


def whole_state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The state dict with gathered weights. Tied weights stay one tensor."""
    weights = {id(parameter): whole(parameter) for parameter in model.parameters()}
    return model.state_dict() | {name: weights[id(one)] for name, one in model.named_parameters(remove_duplicate=False)}


def snapshot(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Copy all weights to the CPU, for a later comparison."""
    return {name: whole(parameter).to("cpu", copy=True) for name, parameter in model.named_parameters()}


def checksum(weights: dict[str, torch.Tensor]) -> str:
    """16 hexadecimal digits that change with any bit of the weights."""
    digest = hashlib.blake2b(digest_size=8)
    for tensor in weights.values():
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
