"""Linear layers in int8 for a CPU, so that what else is in a batch changes no answer."""

import warnings

import torch
from transformers import PreTrainedModel


class TokenByToken(torch.nn.Module):
    """Gives a linear layer each token at a range of -1 to 1, and takes its range back afterwards.

    torch's dynamic quantization rounds by the range of everything that it is given: alone or beside others, a token would be rounded
    differently. Here that range is always -1 to 1, for which one more row sees to it, so a token is rounded by its own largest value,
    as LLM.int8 does it (https://arxiv.org/abs/2208.07339).
    """

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.bias, linear.bias = linear.bias, None
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
    """Make every linear layer of an fp32 model int8, in place: weights by output channel, activations by token at run time.

    torch calls its dynamic quantization deprecated in favor of torchao, whose kernels are made for `torch.compile`: run without, it
    has no fast one for the one token a step that an answer is written in. The pinned torch has both; look again when the pin moves.
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
