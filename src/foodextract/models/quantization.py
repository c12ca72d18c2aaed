"""Linear layers for a CPU in bf16 and int8, by phase: prompts and images, or decoding.

Each takes (…, inputs) float32 and returns (…, outputs) float32.
"""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from transformers import PreTrainedModel

FORMATS = ("fp32", "bf16", "int8")  # from exact to less so
VNNI = ("avx512_vnni", "avx_vnni", "amx_int8")  # units that multiply int8
LARGEST, TINY = 127, torch.finfo(torch.float32).tiny
DECODING = ContextVar("decoding", default=False)  # whether this thread reads tokens that the model has written


class Int8(torch.nn.Module):
    """A linear layer with int8 weights, scaled by output channel, and int8 activations, scaled by token.

    Each token is rounded by its own largest value, as in LLM.int8 without its outliers
    (https://arxiv.org/abs/2208.07339), so its output does not depend on its neighbors. `torch._int_mm` is private, but
    torchao relies on it and there is no public equivalent.
    """

    weight: torch.Tensor
    scale: torch.Tensor

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1).div(LARGEST).clamp_min_(TINY)
        rounded = (linear.weight.detach() / scale[:, None]).round().to(torch.int8)
        self.register_buffer("weight", rounded.t(), persistent=False)  # (inputs, outputs), channel by channel
        self.register_buffer("scale", scale, persistent=False)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(0, -2)
        size = tokens.abs().amax(-1, keepdim=True).div_(LARGEST).clamp_min_(TINY)
        y = torch._int_mm((tokens / size).round_().to(torch.int8), self.weight) * self.scale
        y = y.mul_(size) if self.bias is None else torch.addcmul(self.bias, y, size, out=y)
        return y.unflatten(0, x.shape[:-1])


class TokenByToken(torch.nn.Module):
    """Like `Int8`, but for processors without VNNI, where torch's dynamic quantization is faster.

    It uses 7 bits for activations on x86, so it is less exact, and it rounds by the range of its whole input. So each
    token is scaled to the range -1 to 1, an extra row fixes that range, and the output is scaled back.

    torch deprecates them in favor of torchao, but torchao's kernels need `torch.compile` and have no fast path for the
    single token of a decoding step. The pinned torch has both; check again when the pin moves.
    """

    rails: torch.Tensor

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.bias, linear.bias = linear.bias, None  # type: ignore[assignment]
        self.linear = linear
        self.register_buffer("rails", torch.tensor([[-1.0, 1.0] + [0.0] * (linear.in_features - 2)]), persistent=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            per_channel = torch.ao.quantization.per_channel_dynamic_qconfig
            torch.ao.quantization.quantize_dynamic(self, {torch.nn.Linear: per_channel}, inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(0, -2)
        size = tokens.abs().amax(-1, keepdim=True).clamp_min_(TINY)
        scaled = tokens.new_empty(len(tokens) + 1, tokens.shape[1])
        torch.div(tokens, size, out=scaled[:-1])
        scaled[-1:] = self.rails
        y = self.linear(scaled)[:-1].mul_(size)
        return (y if self.bias is None else y.add_(self.bias)).unflatten(0, x.shape[:-1])


class Bf16(torch.nn.Module):
    """A linear layer in bf16 between fp32 ones."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        weight, bias = linear.weight.detach().bfloat16(), linear.bias  # copies: embeddings may share a head's weight
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else torch.nn.Parameter(bias.detach().bfloat16(), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x.bfloat16(), self.weight, self.bias).float()


class ByPhase(torch.nn.Module):
    """A linear layer in two formats: one for the tokens of images and prompts, one for decoding.

    The phase decides, not the number of tokens: the answer to an image is the same alone and in a batch.
    """

    def __init__(self, many: torch.nn.Module, one: torch.nn.Module) -> None:
        super().__init__()
        self.many, self.one = many, one

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.one(x) if DECODING.get() else self.many(x)


@contextmanager
def decoding(started: bool) -> Iterator[None]:
    """Set the phase for layers that run inside this context, in this thread."""
    token = DECODING.set(started)
    try:
        yield
    finally:
        DECODING.reset(token)


def in_format(linear: torch.nn.Linear, name: str) -> torch.nn.Module:
    """Return an fp32 layer in one of FORMATS. Do not use `linear` afterwards: it may have been changed."""
    linear.requires_grad_(False)
    if name == "int8":
        units = torch.cpu.get_capabilities()
        return Int8(linear) if any(units.get(unit) for unit in VNNI) else TokenByToken(linear)
    return Bf16(linear) if name == "bf16" else linear


def convert(model: PreTrainedModel, many: str, one: str) -> None:
    """Convert the linear layers of an fp32 SmolVLM in place, to one of FORMATS for each phase.

    The vision tower and the connector run only before decoding, so they use `many`. The head handles one token per
    image at a time, so it uses `one`.
    """
    model.requires_grad_(False)
    for name, layer in list(model.named_modules()):
        if type(layer) is not torch.nn.Linear:
            continue
        if name == "lm_head" or many == one:
            converted = in_format(layer, one)
        elif name.startswith("model.text_model."):
            converted = ByPhase(in_format(copy.deepcopy(layer), many), in_format(layer, one))
        else:
            converted = in_format(layer, many)
        model.set_submodule(name, converted)
