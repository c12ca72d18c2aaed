"""Loading SmolVLM, base or tuned, from a folder or the Hub: its precision, its image budget, and errors that help."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

from foodextract.models.quantization import quantize
from foodextract.models.startup import SkipInitialization

BUNDLED = Path(__file__).parent / "bundled"
TINY_BASE, TINY_TUNED = BUNDLED / "tiny-base", BUNDLED / "tiny-tuned"
OUTPUTS = Path("outputs")
FINISHED = "training.json"  # written last by a finished training, so its presence marks a model that is whole
PRECISIONS = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.float32,
}  # name → what is loaded
AMX_PAYS = 30_000_000  # parameters; chosen, not measured: it lies between the tiny model (2.9 M) and the SmolVLMs (256 M and more)
INT8_PAYS = 200_000_000  # parameters; measured at 256 M and 507 M, see results/extract_cpu.json
TILE_BUDGETS = {
    1: 1,
    5: 2,
    17: 4,
}  # tiles an image → longest edge in tiles: one overview, and 2 × 2 or 4 × 4 details with it


class ModelError(ValueError):
    """A model that cannot be loaded or used; the message names it and the remedy."""


@dataclass(frozen=True)
class Precision:
    """How a model is held and computed. `autocast` is None where weights and arithmetic have the same type. `int8`: see `int8.quantize`."""

    weights: torch.dtype
    autocast: torch.dtype | None
    reason: str
    int8: bool = False


def choose_device(wanted: str | None = None) -> torch.device:
    """The wanted device, else the first GPU, Apple's GPU, or the CPU. Raises ModelError for one that is not there."""
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(wanted or best)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"device {wanted!r} is not available here ({error}): leave it out to use {best!r}") from error
    return device


def choose_precision(device: torch.device, training: bool, parameters: int = 0) -> Precision:
    """Types by device, with the reason; a CPU's depend on the size of the model, too.

    Training keeps fp32 master weights everywhere: at stage 2's rate of 2e-6 an update is far smaller than the spacing of bf16 numbers,
    so bf16 weights hardly move (in an AdamW simulation 3.9 % of them did).
    """
    if device.type == "cpu" and not training and parameters >= INT8_PAYS:
        return Precision(
            torch.float32, None, "int8: less than half the time of fp32, and the same answers but for a few", int8=True
        )
    if device.type == "cpu" and training and parameters >= AMX_PAYS and torch.cpu.get_capabilities().get("amx_bf16"):
        return Precision(
            torch.float32,
            torch.bfloat16,
            "fp32 weights, bf16 autocast: this CPU multiplies bf16 matrices several times faster",
        )
    if device.type == "cpu":
        return Precision(
            torch.float32, None, "fp32: a CPU gains little from 16 bits at these sizes, and loses exactness"
        )
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        if training:
            return Precision(
                torch.float32,
                torch.float16,
                "fp32 weights, fp16 autocast with loss scaling: this GPU has no bf16 units",
            )
        return Precision(torch.float16, None, "fp16: this GPU has no bf16 units")
    if training:
        return Precision(
            torch.float32,
            torch.bfloat16,
            "fp32 weights, bf16 autocast: 2e-6 steps would round to nothing in bf16 weights",
        )
    return Precision(torch.bfloat16, None, "bf16: half the memory traffic, and no fp16 overflow")


def load_processor(model_id: str | os.PathLike, tiles: int | None = None) -> ProcessorMixin:
    """The processor that came with the model; `tiles` sets another image budget. Raises ModelError."""
    with _loading(model_id, "processor_config.json"):
        processor = AutoProcessor.from_pretrained(model_id)
    if tiles is not None:
        set_image_budget(processor, tiles)
    return processor


def set_image_budget(processor: ProcessorMixin, tiles: int) -> None:
    """Spend 1, 5 or 17 tiles on an image. SmolVLM2 ships with 17 (1,088 image tokens), and scales even small images up to them.

    Both settings are needed for one tile: without splitting alone an image is still resized to 2048 pixels first. The budget is saved
    with the processor, so serving agrees with training. Raises ModelError for other numbers.
    """
    if tiles not in TILE_BUDGETS:
        raise ModelError(
            f"an image budget of {tiles} tiles is not possible: choose one of {', '.join(map(str, TILE_BUDGETS))}"
        )
    image_processor = processor.image_processor
    tile = image_processor.max_image_size["longest_edge"]
    image_processor.do_image_splitting = tiles > 1
    image_processor.size = {"longest_edge": TILE_BUDGETS[tiles] * tile}


def image_budget(processor: ProcessorMixin) -> int:
    """The most tiles that one image takes; 1 for a processor that splits none."""
    image_processor = processor.image_processor
    if not getattr(image_processor, "do_image_splitting", False):
        return 1
    edge = -(
        -image_processor.size["longest_edge"] // image_processor.max_image_size["longest_edge"]
    )  # in tiles, rounded up
    return edge * edge + 1 if edge > 1 else 1


def load_model(
    model_id: str | os.PathLike,
    device: torch.device | None = None,
    training: bool = False,
    precision: str | None = None,
) -> PreTrainedModel:
    """SmolVLM weights on `device`, in one of `PRECISIONS`, else in the one that `choose_precision` names. Raises ModelError."""
    device = device or choose_device()
    if precision not in (None, *PRECISIONS):
        raise ModelError(f"precision {precision!r} is not known: choose one of {', '.join(PRECISIONS)}")
    if precision == "int8" and (device.type != "cpu" or training):
        raise ModelError("precision 'int8' is for answering on a CPU: choose another, or the device 'cpu'")
    with _loading(model_id):
        config = AutoConfig.from_pretrained(model_id)
        if config.model_type not in ("smolvlm", "idefics3"):
            raise ModelError(
                f"{model_id} is a {config.model_type!r} model, not a SmolVLM: give a SmolVLM folder or Hub id"
            )
        dtype = PRECISIONS[precision] if precision else choose_precision(device, training).weights
        with nullcontext() if training else SkipInitialization():
            model = AutoModelForImageTextToText.from_pretrained(model_id, dtype=dtype, attn_implementation="sdpa")
    if precision == "int8" or (precision is None and choose_precision(device, training, model.num_parameters()).int8):
        quantize(model)
    return model.to(device).train(training)


def newest_tuned(outputs: Path = OUTPUTS) -> Path:
    """The model trained last below `outputs`, else the tuned tiny model that comes with the package."""
    found = [
        path for path in outputs.glob(f"**/{FINISHED}") if path.parent.suffix not in (".partial", ".old")
    ]  # a copy that a kill left
    finished = sorted(found, key=lambda path: path.stat().st_mtime)
    return finished[-1].parent if finished else TINY_TUNED


@contextmanager
def _loading(model_id: str | os.PathLike, needs: str = "config.json") -> Iterator[None]:
    """Turn what goes wrong between a model id and its weights into a ModelError."""
    path = Path(model_id)
    if path.is_dir() and not (path / needs).is_file():
        raise ModelError(
            f"{path} holds no model (no {needs}): give the folder that a training or `save_pretrained` wrote"
        )
    if not path.is_dir() and (path.is_absolute() or str(model_id).count("/") != 1):
        raise ModelError(f"{model_id} is neither a folder nor a Hub id (owner/name): check the path")
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # transformers, safetensors and the Hub client raise some twenty types here
        details = f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), 'no details')}"
        if path.is_dir():
            raise ModelError(
                f"{model_id} cannot be loaded as a SmolVLM ({details}): save or download it again"
            ) from error
        raise ModelError(
            f"{str(model_id)!r} cannot be fetched from the Hub ({details}): check the name and the connection, or give a folder"
        ) from error
