"""Arithmetic and speed of a training step.

A multiplication with its addition counts as two operations. A backward pass costs one forward for the gradient of the
input, and one more for the gradient of the weights.
"""

import resource
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel

from foodextract.evaluation.results import Row, make_row


@dataclass(frozen=True)
class Step:
    """The mean work of one image in training."""

    tiles: float
    own_tokens: float  # of image, question and answer
    shared_tokens: float  # read once a batch
    batch: int  # rows that share them
    answer_tokens: float  # positions of the LM head
    vision: str  # "cached", "frozen" (forward only) or "trained"


def flops_per_image(config: PretrainedConfig, step: Step) -> float:
    """Floating point operations of forward and backward for one image.

    >>> from transformers import SmolVLMConfig
    >>> vision = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "image_size": 512}
    >>> text = {"model_type": "llama", "hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32}
    >>> text |= {"head_dim": 64, "num_attention_heads": 15, "num_key_value_heads": 5, "vocab_size": 49280}
    >>> config = SmolVLMConfig(vision_config=vision | {"patch_size": 16}, text_config=text, scale_factor=4)
    >>> f"{flops_per_image(config, Step(1, 255, 0, 1, 60, 'frozen')) / 1e12:.3f} TFLOP"  # 500M, one tile, stage 1
    '0.727 TFLOP'
    """
    v, t = config.vision_config, config.get_text_config()
    patches, d = (v.image_size // v.patch_size) ** 2, v.hidden_size
    layer = 8 * patches * d**2 + 4 * patches * d * v.intermediate_size + 4 * patches**2 * d
    vision = step.tiles * (v.num_hidden_layers * layer + 2 * patches * v.num_channels * v.patch_size**2 * d)
    shuffle = config.scale_factor**2
    connector = step.tiles * 2 * (patches / shuffle) * (d * shuffle) * t.hidden_size
    heads = t.num_attention_heads * t.head_dim
    weights = t.hidden_size * (2 * heads + 2 * t.num_key_value_heads * t.head_dim + 3 * t.intermediate_size)
    tokens = step.own_tokens + step.shared_tokens / step.batch
    attended = step.own_tokens * (step.shared_tokens + step.own_tokens / 2) + step.shared_tokens**2 / 2 / step.batch
    layers = t.num_hidden_layers * (2 * weights * tokens + 4 * heads * attended)
    text = layers + 2 * t.hidden_size * t.vocab_size * step.answer_tokens
    visions, connectors = {"cached": (0, 2), "frozen": (1, 2), "trained": (3, 3)}[step.vision]
    return visions * vision + connectors * connector + 3 * text


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int | None = None, seconds: float = 0.5) -> float:
    """Operations per second of a square matrix product on the device, measured now. The `mfu` is a share of it."""
    size = size or (8192 if device.type == "cuda" else 1536)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    a @ b  # warm up
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        wait_for(device)
        start = time.perf_counter()
        a @ b
        wait_for(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has done its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak_memory(device: torch.device) -> None:
    """Let `peak_memory` count from here. On a CPU this works on Linux only."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """Peak bytes: allocated on the GPU since the last reset, or held by this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def performance_rows(
    stage: str, model: PreTrainedModel, step: Step, images: int, seconds: float, devices: int, dtype: torch.dtype
) -> list[Row]:
    """Result rows for a training that took `images` images through `devices` in `seconds`."""
    rate, flops = images / seconds, flops_per_image(model.config, step)
    row = partial(make_row, "training", stage, n=images, command="foodextract train")
    return [
        row("images_per_second", rate, unit="1/s"),
        row("tokens_per_second", rate * (step.own_tokens + step.shared_tokens), unit="1/s"),
        row("peak_memory_gib", peak_memory(model.device) / 2**30, unit="GiB"),
        row("tflop_per_image", flops / 1e12, unit="TFLOP"),
        row("tflop_per_second", rate * flops / 1e12, unit="TFLOP/s"),
        row("mfu", rate * flops / devices / matmul_rate(model.device, dtype), unit="share of a matrix product's rate"),
    ]
