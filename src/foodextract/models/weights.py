"""Which weights train, and proof of which ones did."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from foodextract.models.loading import ModelError


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
            raise ModelError(
                f"nothing to freeze under {prefix!r}: the model's modules are {', '.join(sorted(modules_of(model)))}"
            )
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


def whole(weights: torch.Tensor) -> torch.Tensor:
    """The weights that FSDP2 may have spread over processes, all of which have to ask for them."""
    return weights.detach().full_tensor() if isinstance(weights, DTensor) else weights.detach()


def whole_state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The state dict with whole weights, in which tied ones are still one tensor."""
    weights = {id(parameter): whole(parameter) for parameter in model.parameters()}
    return model.state_dict() | {name: weights[id(one)] for name, one in model.named_parameters(remove_duplicate=False)}


def snapshot(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """A copy of all weights on the CPU, to compare with later."""
    return {name: whole(parameter).to("cpu", copy=True) for name, parameter in model.named_parameters()}


def weights_moved(model: PreTrainedModel, before: dict[str, torch.Tensor]) -> list[Moved]:
    """Compare, bit for bit, every weight with its value in `before`."""
    table = []
    for module, parameters in modules_of(model).items():
        changed = [int((whole(parameter).cpu() != before[name]).sum()) for name, parameter in parameters]
        weights = sum(parameter.numel() for _, parameter in parameters)
        table.append(Moved(module, weights, sum(changed), len(changed), sum(map(bool, changed))))
    return table


def checksum(weights: dict[str, torch.Tensor]) -> str:
    """16 hexadecimal digits that change with any bit of the weights."""
    digest = hashlib.blake2b(digest_size=8)
    for tensor in weights.values():
        digest.update(tensor.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
