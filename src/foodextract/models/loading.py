"""Loading SmolVLM checkpoints, base or tuned, from a folder or the Hub: device, precision and image budget."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

from foodextract.models.precision import FP32, choose_precision, seconds_of
from foodextract.models.quantization import convert
from foodextract.models.startup import SkipInitialization
from foodextract.models.training_data import TrainingData

BUNDLED = Path(__file__).parent / "bundled"
TINY_BASE, TINY_TUNED = BUNDLED / "tiny-base", BUNDLED / "tiny-tuned"
PHOTO, PHOTO_BASE = BUNDLED / "photo", BUNDLED / "photo-base"
FINISHED = "training.json"  # a training writes it last, so its presence marks a complete model
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.float32}  # to load
# What torch.compile, DistributedDataParallel, FSDP, DeepSpeed and PEFT put into the names of the weights they wrap.
WRAPPERS = re.compile(
    r"(?<![^.])(_orig_mod|module|base_model\.model|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\."
)
TILE_BUDGETS = {1: 1, 5: 2, 17: 4}  # tiles per image → longest edge in tiles: an overview, plus 2 x 2 or 4 x 4 details


class ModelError(ValueError):
    """A model that cannot be loaded or used. The message names it and the remedy."""


def choose_device(wanted: str | None = None) -> torch.device:
    """Return the wanted device, or the first GPU, Apple's GPU or the CPU. Raises ModelError if it is not available."""
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(wanted or best)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"device {wanted!r} is not available here ({error}): leave it out to use {best!r}") from error
    return device


def load_processor(model_id: str | os.PathLike[str], tiles: int | None = None) -> ProcessorMixin:
    """Load the processor saved with a model. `tiles` sets another image budget. Raises ModelError."""
    with _named_errors(model_id, "processor_config.json"):
        processor = AutoProcessor.from_pretrained(model_id)
    if tiles is not None:
        set_image_budget(processor, tiles)
    return processor


def set_image_budget(processor: ProcessorMixin, tiles: int) -> None:
    """Spend at most 1, 5 or 17 tiles on an image. Raises ModelError for other numbers.

    SmolVLM2 ships with 17 tiles (1,088 image tokens) and scales small images up to them. One tile needs both
    settings: with `do_image_splitting=False` alone, an image is still resized to 2048 pixels first. The budget is
    saved with the processor.
    """
    if tiles not in TILE_BUDGETS:
        choices = ", ".join(map(str, TILE_BUDGETS))
        raise ModelError(f"an image budget of {tiles} tiles is not possible: choose one of {choices}")
    image_processor = processor.image_processor
    image_processor.do_image_splitting = tiles > 1
    image_processor.size = {"longest_edge": TILE_BUDGETS[tiles] * image_processor.max_image_size["longest_edge"]}


def image_budget(processor: ProcessorMixin) -> int:
    """The most tiles that one image takes. A processor that does not split images takes 1."""
    image_processor = processor.image_processor
    if not getattr(image_processor, "do_image_splitting", False):
        return 1
    return most_tiles(image_processor.size["longest_edge"], image_processor.max_image_size["longest_edge"])


def most_tiles(longest_edge: int, tile: int) -> int:
    """The most tiles of `tile` pixels into which an image is split: details, and an overview if there are several."""
    edge = -(-longest_edge // tile)  # rounded up
    return edge * edge + 1 if edge > 1 else 1


def check_image_tokens(model: PreTrainedModel, processor: Any) -> None:
    """Check that the processor writes as many image tokens for a tile as the model has features. Raises ModelError."""
    vision, tile = model.config.vision_config, processor.image_processor.max_image_size["longest_edge"]
    features = (tile // vision.patch_size) ** 2 // model.config.scale_factor**2
    if features != processor.image_seq_len:
        raise ModelError(
            f"the processor writes {processor.image_seq_len} tokens a tile, but the model has {features} features: "
            "use the processor that was saved with the model"
        )


def load_model(
    model_id: str | os.PathLike[str],
    device: torch.device | None = None,
    training: bool = False,
    precision: str | None = None,
) -> PreTrainedModel:
    """Load SmolVLM weights on `device`, in one of `PRECISIONS` or as `choose_precision` says. Raises ModelError.

    `model.precision` says in words what was chosen and why, `model.size` is the number of its parameters.
    """
    device = device or choose_device()
    if precision not in (None, *PRECISIONS):
        raise ModelError(f"precision {precision!r} is not known: choose one of {', '.join(PRECISIONS)}")
    if precision == "int8" and (device.type != "cpu" or training):
        raise ModelError("precision 'int8' is for inference on a CPU: choose another, or the device 'cpu'")
    with _named_errors(model_id, "config.json"):
        kind = AutoConfig.from_pretrained(model_id).model_type
        if kind not in ("smolvlm", "idefics3"):
            raise ModelError(f"{model_id} is a {kind!r} model, not a SmolVLM: give a SmolVLM folder or Hub id")
        dtype = PRECISIONS[precision] if precision else choose_precision(device, training).weights
        with nullcontext() if training else SkipInitialization():
            model = load_weights(AutoModelForImageTextToText, model_id, dtype=dtype, attn_implementation="sdpa")
    size, reason = model.num_parameters(), f"{precision}, as asked for"
    if precision == "int8":
        convert(model, precision, precision)
    elif precision is None:
        chosen = choose_precision(device, training, size, partial(seconds_of, model))
        reason = chosen.reason
        if (chosen.many, chosen.one) != (FP32, FP32):
            convert(model, chosen.many, chosen.one)
    model.precision, model.size = reason, size
    return model.to(device).train(training)


def load_weights(kind: Any, model_id: str | os.PathLike[str], **options: Any) -> Any:
    """Call `kind.from_pretrained`, which would fill the gaps of a checkpoint with random weights.

    The names of `WRAPPERS` are taken off. Raises ModelError if a weight is then missing, unknown or of another shape.
    """
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, info = kind.from_pretrained(model_id, **options)
    if wrapped := {key: name for key in info["unexpected_keys"] if (name := WRAPPERS.sub("", key)) != key}:
        names = {f"^{re.escape(key)}$": name for key, name in wrapped.items()}
        model, info = kind.from_pretrained(model_id, key_mapping=names, **options)
        model._weight_conversions = []  # else saving would put the wrappers back
    reshaped = {key for key, *_ in info["mismatched_keys"]}
    wrong = {"missing": info["missing_keys"], "unknown": info["unexpected_keys"], "of another shape": reshaped}
    if reasons := [f"{len(keys)} {how} ({', '.join(sorted(keys)[:3])}, …)" for how, keys in wrong.items() if keys]:
        raise ModelError(
            f"{model_id} does not hold the weights of its config.json: {'; '.join(reasons)}: save the whole model with "
            "`save_pretrained`, with adapters merged, or download it again"
        )
    return model


def find_model(wanted: str | os.PathLike[str] | None = None, outputs: Path = Path("outputs")) -> str | Path:
    """The folder or Hub id of the model that a user asks for, who may name a bundled one ("photo", "tiny-tuned").

    The default is the model below `outputs` that was trained last and has seen photographs, or else the photo model.
    """
    if wanted is not None:
        names_bundled = wanted in ("photo", "photo-base", "tiny-tuned", "tiny-base") and not Path(wanted).exists()
        return BUNDLED / wanted if names_bundled else os.fspath(wanted)
    unfinished = (".partial", ".old")  # copies that an interrupted training left
    finished = [path for path in outputs.glob(f"**/{FINISHED}") if path.parent.suffix not in unfinished]
    for path in sorted(finished, key=lambda path: path.stat().st_mtime, reverse=True):
        data = TrainingData.find(path.parent)
        if data is None or not data.drawings_only:
            return path.parent
    return PHOTO


def check_target(model_id: str | os.PathLike[str], out: Path) -> None:
    """Raise ModelError where an export to `out` would overwrite the model itself."""
    if out.resolve() == Path(model_id).resolve():
        raise ModelError(f"{out} holds the model itself: name another folder for the export")


@contextmanager
def _named_errors(model_id: str | os.PathLike[str], needs: str) -> Iterator[None]:
    """Turn every error of loading into a ModelError that names the model. `needs` is a file that a folder must hold."""
    path = Path(model_id)
    if (path / "adapter_config.json").is_file():
        raise ModelError(f"{path} holds an adapter: load it with PEFT, `merge_and_unload()`, and save the whole model")
    if path.is_dir() and not (path / needs).is_file():
        raise ModelError(f"{path} holds no model (no {needs}): give the folder that `save_pretrained` wrote")
    if not path.is_dir() and (path.is_absolute() or str(model_id).count("/") != 1):
        raise ModelError(f"{model_id} is neither a folder nor a Hub id (owner/name): check the path")
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # transformers, safetensors and the Hub client raise some twenty types here
        details = f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), 'no details')}"
        if path.is_dir():
            message = f"{model_id} cannot be loaded as a SmolVLM ({details}): save or download it again"
        else:
            remedy = "check the name and the connection, or give a folder"
            message = f"{str(model_id)!r} cannot be fetched from the Hub ({details}): {remedy}"
        raise ModelError(message) from error
