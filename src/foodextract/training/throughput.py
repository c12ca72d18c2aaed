"""How much arithmetic a training step needs, and how much of what the device can do is achieved.

One multiplication with its addition counts as two operations. A backward pass costs as much as the forward for the gradient of what comes
in, and as much again for the gradient of the weights.
"""

import ctypes
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import PretrainedConfig

from foodextract.evaluation.results import Row, make_row


@dataclass(frozen=True)
class Step:
    """What one image puts through the model in training."""

    tiles: float  # tiles of the image
    own_tokens: float  # tokens of its own: image, question, answer
    shared_tokens: float  # tokens that a whole batch shares
    batch: int  # rows that share them
    answer_tokens: float  # positions that the LM head sees
    vision: str  # "cached", "frozen" (forward only) or "trained"


def flops_per_image(config: PretrainedConfig, step: Step) -> float:
    """Floating point operations of forward and backward for one image.

    >>> from transformers import SmolVLMConfig
    >>> vision = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "image_size": 512, "patch_size": 16}
    >>> text = {"model_type": "llama", "hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32, "head_dim": 64}
    >>> text |= {"num_attention_heads": 15, "num_key_value_heads": 5, "vocab_size": 49280}
    >>> config = SmolVLMConfig(vision_config=vision, text_config=text, scale_factor=4)
    >>> f"{flops_per_image(config, Step(1, 255, 0, 1, 60, 'frozen')) / 1e12:.3f} TFLOP"  # SmolVLM2-500M, one tile, stage 1
    '0.727 TFLOP'
    """
    v, t = config.vision_config, config.get_text_config()
    patches, d = (v.image_size // v.patch_size) ** 2, v.hidden_size
    layer = 8 * patches * d**2 + 4 * patches * d * v.intermediate_size + 4 * patches**2 * d
    seeing = step.tiles * (v.num_hidden_layers * layer + 2 * patches * v.num_channels * v.patch_size**2 * d)
    shuffle = config.scale_factor**2
    connecting = step.tiles * 2 * (patches / shuffle) * (d * shuffle) * t.hidden_size
    heads = t.num_attention_heads * t.head_dim
    weights = t.hidden_size * (2 * heads + 2 * t.num_key_value_heads * t.head_dim + 3 * t.intermediate_size)
    tokens = step.own_tokens + step.shared_tokens / step.batch
    looking_back = step.own_tokens * (step.shared_tokens + step.own_tokens / 2) + step.shared_tokens**2 / 2 / step.batch
    layers = t.num_hidden_layers * (2 * weights * tokens + 4 * heads * looking_back)
    writing = layers + 2 * t.hidden_size * t.vocab_size * step.answer_tokens
    seeings, connectings = {"cached": (0, 2), "frozen": (1, 2), "trained": (3, 3)}[step.vision]
    return seeings * seeing + connectings * connecting + 3 * writing


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int | None = None, seconds: float = 0.5) -> float:
    """Operations a second that the device reaches here and now in a square matrix product: what "share of the peak" refers to."""
    size = size or (8192 if device.type == "cuda" else 1536)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    a @ b  # the first one sets things up
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        wait_for(device)
        start = time.perf_counter()
        a @ b
        wait_for(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def wait_for(device: torch.device) -> None:
    """Until the device has done what it was told; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak_memory(device: torch.device) -> None:
    """Let `peak_memory` count from here; on a CPU that works on Linux only."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that was allocated on a GPU since the last reset; elsewhere the most main memory that this process held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextmanager
def memory_kept(device: torch.device) -> Iterator[None]:
    """Keep what is freed in here for the next tensor, on a CPU with glibc; nothing changes elsewhere.

    glibc gives tensors of more than some MB back to the kernel, which fills every page with zeros when the next one asks for it. The
    numbers are those of mallopt(3); in the end stand the values that glibc comes to by itself, and the memory is given back.
    """
    if device.type != "cpu" or not hasattr(libc := ctypes.CDLL(None), "mallopt"):
        yield
        return
    trim_threshold, mmap_threshold, mmap_max = -1, -3, -4
    libc.mallopt(mmap_max, 0)
    libc.mallopt(trim_threshold, 2**31 - 1)
    try:
        yield
    finally:
        libc.mallopt(mmap_max, 65536)
        libc.mallopt(mmap_threshold, 32 * 2**20)
        libc.mallopt(trim_threshold, 64 * 2**20)
        libc.malloc_trim(0)


def performance_rows(
    stage: str,
    config: PretrainedConfig,
    step: Step,
    images: int,
    seconds: float,
    devices: int,
    device: torch.device,
    dtype: torch.dtype,
) -> list[Row]:
    """How fast training was that took `images` through each of `devices` in `seconds`; the rate of a matrix product is measured here."""
    rate, flops = images * devices / seconds, flops_per_image(config, step)
    row = partial(make_row, "training", stage, n=images * devices, command="foodextract train")
    return [
        row("images_per_second", rate, unit="1/s"),
        row("tokens_per_second", rate * (step.own_tokens + step.shared_tokens), unit="1/s"),
        row("peak_memory_gib", peak_memory(device) / 2**30, unit="GiB"),
        row("tflop_per_image", flops / 1e12, unit="TFLOP"),
        row("tflop_per_second", rate * flops / 1e12, unit="TFLOP/s"),
        row("mfu", rate * flops / matmul_rate(device, dtype) / devices, unit="share of a matrix product's rate"),
    ]
