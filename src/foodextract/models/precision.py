"""Number formats of weights and arithmetic, chosen by device, size of the model, and what the processor is fast at."""

import copy
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from foodextract.models.quantization import FORMATS, in_format

FP32, BF16, INT8 = FORMATS
# Smaller models run in fp32 without measuring: the formats differ little in speed there, and fp32 is exact.
MIN_MEASURED_PARAMETERS = 20_000_000
MIN_INT8_PARAMETERS = 200_000_000  # below, decoding is not limited by reading weights
TRAINED_SHAPE = (768, 3072)  # layer timed to choose the format of training: an MLP layer of SmolVLM's vision tower
COLD = 500_000  # weights of a layer from which its model does not fit into the processor's caches
ROWS = {"many": 96, "one": 1}  # tokens at a time: of an image or a prompt, and of a decoding step
REPEATS = 3
CACHES = 40 * 2**20  # bytes, more than the caches usually hold
BYTES = {FP32: 4, BF16: 2, INT8: 1}  # of a weight
GAIN = 1.3  # a more exact format is taken unless it is this many times as slow
# Part of the key of kept times, because one processor name can cover several generations.
UNITS = ("amx", "avx", "sve", "bf16", "neon", "i8mm")
HOPELESS = 4  # a format that takes this many times as long as fp32 for a few rows is emulated

Seconds = Mapping[str, Mapping[str, float]]  # by the keys of ROWS, then by format


@dataclass(frozen=True)
class Precision:
    """Types of weights and arithmetic. `autocast` is None where both agree.

    `many` and `one` are the formats of an answering model's linear layers on a CPU: for the tokens of images and
    prompts, and for decoding, which reads all weights for one token.
    """

    weights: torch.dtype
    autocast: torch.dtype | None
    reason: str
    many: str = FP32
    one: str = FP32


def choose_precision(
    device: torch.device, training: bool, parameters: int = 0, seconds: Callable[[], Seconds] | None = None
) -> Precision:
    """Choose types by device, and on a CPU by the size of the model and by measured `seconds` (default: `measured`).

    Training keeps fp32 master weights everywhere. At stage 2's rate of 2e-6 an update is far smaller than the spacing
    of bf16 numbers: in an AdamW simulation only 3.9 % of bf16 weights moved.
    """
    fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
    if device.type == "cpu":
        if parameters < MIN_MEASURED_PARAMETERS:
            return Precision(fp32, None, "fp32: at this size a CPU gains little from 16 bits, and loses exactness")
        taken = (seconds or measured)()
        formats = FORMATS if parameters >= MIN_INT8_PARAMETERS and not training else (FP32, BF16)

        def speed(phase: str) -> str:
            rates = {name: taken[phase][FP32] / taken[phase][name] for name in formats if name in taken[phase]}
            return ", ".join(f"{name} {rate:.1f}" for name, rate in rates.items())

        reason = f"speed here with many tokens: {speed('many')}"
        if training:
            if fastest(taken["many"], formats) == BF16:
                return Precision(fp32, bf16, f"fp32 weights, bf16 autocast ({reason})")
            return Precision(fp32, None, f"fp32 ({reason})")
        many, one = (fastest(taken[phase], formats) for phase in ROWS)
        reason += f"; with one: {speed('one')}"
        return Precision(fp32, None, f"{many} for images and prompts, {one} for decoding ({reason})", many, one)
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        if training:
            return Precision(fp32, fp16, "fp32 weights, fp16 autocast with loss scaling: this GPU has no bf16 units")
        return Precision(fp16, None, "fp16: this GPU has no bf16 units")
    if training:
        return Precision(fp32, bf16, "fp32 weights, bf16 autocast: 2e-6 steps would round to nothing in bf16 weights")
    return Precision(bf16, None, "bf16: half the memory traffic, and no fp16 overflow")


def fastest(seconds: Mapping[str, float], formats: tuple[str, ...] = FORMATS) -> str:
    """The most exact format that is less than GAIN times as slow as the fastest.

    `formats` are ordered from most to least exact.
    """
    known = [name for name in formats if name in seconds]
    limit = GAIN * min(seconds[name] for name in known)
    return next(name for name in known if seconds[name] < limit)


def seconds_of(model: PreTrainedModel) -> Seconds:
    """`measured` for the widest layers of a SmolVLM's vision tower and language model."""
    parts: Any = model.model

    def widest(part: torch.nn.Module) -> tuple[int, int]:
        layers = (layer for layer in part.modules() if isinstance(layer, torch.nn.Linear))
        return max(((layer.in_features, layer.out_features) for layer in layers), key=lambda shape: shape[0] * shape[1])

    return measured(widest(parts.vision_model), widest(parts.text_model))


@lru_cache
def measured(many: tuple[int, int] = TRAINED_SHAPE, one: tuple[int, int] = TRAINED_SHAPE) -> Seconds:
    """Time linear layers of these shapes (inputs, outputs) in all formats, typically in 0.2 s.

    Processor time of one thread: other work on the machine hardly changes it. The times are kept for this processor and
    version of torch, in the user's cache folder.
    """
    processor = torch.cpu.get_capabilities()
    units = ", ".join(name for name, has in processor.items() if has and name.startswith(UNITS))
    key = f"{processor.get('cpu_name', 'this processor')} ({units}), torch {torch.__version__}, {many}, {one}"
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "foodextract" / "precision.json"
    try:
        known = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        known = {}
    with suppress(ValueError, TypeError, LookupError, AttributeError):  # not measured yet, or a damaged file
        kept = {phase: {name: float(spent) for name, spent in known[key][phase].items()} for phase in ROWS}
        if all(FP32 in times for times in kept.values()):
            return kept
    found = {phase: _times(shape, ROWS[phase]) for phase, shape in {"many": many, "one": one}.items()}
    with suppress(OSError):  # then measured again next time
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(known | {key: found}), encoding="utf-8")
        part.replace(path)
    return found


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Measure on one thread, and leave the number of threads and the random numbers as they were."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]), torch.inference_mode():
            yield
    finally:
        torch.set_num_threads(threads)


@_undisturbed()
def _times(shape: tuple[int, int], rows: int) -> dict[str, float]:
    """Seconds of one layer in every format that the processor does not emulate."""
    found: dict[str, float] = {}
    few, tokens, weights = torch.randn(4, shape[0]), torch.randn(rows, shape[0]), shape[0] * shape[1]
    limit = float("inf")
    for name in FORMATS:
        layer = in_format(torch.nn.Linear(*shape), name)
        layer(few)
        spent = min(_seconds([layer], few) for _ in range(2))
        if name == FP32:
            limit = HOPELESS * spent
        elif spent > limit:
            continue
        # A step of a large model finds no weights in the caches, so many layers take turns.
        turns = CACHES // (weights * BYTES[name]) if rows == 1 and weights >= COLD else 0
        layers = [layer, *(copy.deepcopy(layer) for _ in range(turns))]
        _seconds(layers, tokens)
        found[name] = min(_seconds(layers, tokens) for _ in range(REPEATS))
    return found


def _seconds(layers: Sequence[torch.nn.Module], tokens: torch.Tensor) -> float:
    """Processor time of one layer."""
    began = time.thread_time()
    for layer in layers:
        layer(tokens)
    return max(time.thread_time() - began, 1e-9) / len(layers)  # some clocks are coarse
