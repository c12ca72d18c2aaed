"""Int8 linear layers for a CPU, with results that do not depend on the rest of the batch."""

import warnings

import torch
from transformers import PreTrainedModel


class TokenByToken(torch.nn.Module):
    """Scale each token to the range -1 to 1 before a linear layer, and scale its output back.

    torch's dynamic quantization rounds by the range of its whole input, so a token's rounding would depend on its
    neighbors. An extra row fixes that range at -1 to 1. Each token is then rounded by its own largest value, as in
    LLM.int8 (https://arxiv.org/abs/2208.07339).
    """

    rails: torch.Tensor

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.bias, linear.bias = linear.bias, None  # type: ignore[assignment]
        self.linear = linear
        self.register_buffer("rails", torch.tensor([[-1.0, 1.0] + [0.0] * (linear.in_features - 2)]), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, inputs) float32 → (…, outputs) float32."""
        tokens = x.flatten(0, -2)
        size = tokens.abs().amax(-1, keepdim=True).clamp_min_(torch.finfo(x.dtype).tiny)
        scaled = tokens.new_empty(len(tokens) + 1, tokens.shape[1])
        torch.div(tokens, size, out=scaled[:-1])
        scaled[-1:] = self.rails
        y = self.linear(scaled)[:-1].mul_(size)
        return (y if self.bias is None else y.add_(self.bias)).unflatten(0, x.shape[:-1])


def quantize(model: PreTrainedModel) -> None:
    """Make every linear layer of an fp32 model int8, in place.

    Weights are rounded per output channel, activations per token at run time.

    torch deprecates its dynamic quantization in favor of torchao, but torchao's kernels need `torch.compile` and have
    no fast path for the single token of a decoding step. The pinned torch has both; check again when the pin moves.
    """
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if type(module) is torch.nn.Linear:
            model.set_submodule(name, TokenByToken(module))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        per_channel = torch.ao.quantization.per_channel_dynamic_qconfig
        torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear: per_channel}, inplace=True)
