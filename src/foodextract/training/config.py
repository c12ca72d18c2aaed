"""The settings of a stage of training, and the presets of the profiles."""

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import ConfigDict, Field, PositiveInt, TypeAdapter, ValidationError

from foodextract.models.loading import BUNDLED, ModelError, choose_device
from foodextract.models.precision import Precision, choose_precision

if TYPE_CHECKING:
    from peft import LoraConfig

VISION = "model.vision_model"  # the name prefix of the vision tower's parameters
PRESETS = Path(__file__).parent / "presets"
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class Lora:
    """LoRA adapters on all linear layers, with the names of peft's LoraConfig.

    Freezing does not keep adapters out of a module; `exclude_modules`, a regular expression for whole names, does.
    """

    r: int = 16
    lora_alpha: int = 16
    lora_dropout: float = 0.05
    exclude_modules: str | None = None
    modules_to_save: tuple[str, ...] = ()  # trained as a whole and saved with the adapters

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")

    def config(self) -> "LoraConfig":
        from peft import LoraConfig  # here, so that reading the presets needs only the core dependencies

        values = vars(self) | {"modules_to_save": list(self.modules_to_save) or None}
        return LoraConfig(target_modules="all-linear", **values)


@dataclass(frozen=True)
class Stage:
    """The settings of one stage. Those that TRL or transformers have keep their names."""

    name: str
    freeze: tuple[str, ...]  # name prefixes of the parameters that do not train
    learning_rate: Positive
    num_train_epochs: Positive = 2
    per_device_train_batch_size: PositiveInt = 8
    gradient_accumulation_steps: PositiveInt = 4
    warmup_steps: float = 0.03  # below 1: a share of all steps
    lr_scheduler_type: str = "constant_with_warmup"
    save_steps: int = 0  # optimizer steps between checkpoints; 0: one checkpoint an epoch
    validation_rows: int = 0  # rows held out to choose the best checkpoint; 0: keep the last
    metric_for_best_model: Literal["item_f1", "loss"] = "item_f1"
    lora: Lora | None = None  # train adapters instead of the weights, and merge them at the end
    target: Literal["json", "repr"] = "json"  # how answers are written; "repr" is the form of the original projects
    completion_only_loss: bool = True  # False: loss on the prompt too, as in the original projects
    unlikelihood_weight: float = 0  # weight of the loss on repeated words, see `trainer.unlikelihood_loss`
    augment: bool = False  # change images at random; their features are then not cached
    cache: bool = True  # read rows that were prepared once; the losses stay the same
    keep_features: bool = False  # of a frozen tower, for a next stage that freezes it, too
    bf16: bool = False  # bf16 autocast, also where `choose_precision` prefers fp32
    torch_compile: bool = False

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")

    def arguments(self) -> dict[str, Any]:
        """The settings that SFTConfig takes as they are."""
        names = ("learning_rate", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps")
        return {name: getattr(self, name) for name in (*names, "warmup_steps", "lr_scheduler_type")}


@dataclass(frozen=True)
class Profile:
    """The presets of one environment: a GPU with the Hub, or a CPU without either."""

    base_model: str
    source: str
    dataset_id: str  # read where `source` is the Hub
    stage1: Stage
    stage2: Stage
    tiles: int = 1  # image budget
    needs_gpu: bool = False

    def require_gpu(self, allow_cpu: bool = False, gpu: str = "T4") -> None:
        """Raise ModelError where a GPU is needed but missing, unless `allow_cpu`. `gpu` is the choice in Colab."""
        if self.needs_gpu and not allow_cpu and choose_device().type == "cpu":
            raise ModelError(
                "this profile needs a GPU, and there is none here. In Colab choose Runtime > Change runtime type > "
                f"{gpu} GPU and run all cells again. To run on the CPU anyway, which takes days, set allow_cpu = True"
            )


def _load_profile(path: Path) -> Profile:
    values = tomllib.loads(path.read_text(encoding="utf-8"))
    for name in ("stage1", "stage2"):
        values[name]["name"] = name
    if (BUNDLED / values["base_model"]).is_dir():
        values["base_model"] = str(BUNDLED / values["base_model"])
    return TypeAdapter(Profile).validate_python(values)


PROFILES = {name: _load_profile(PRESETS / f"{name}.toml") for name in ("hub", "offline", "photo")}


def changed(stage: Stage, values: Mapping[str, Any]) -> Stage:
    """The stage with other `values`, as JSON or YAML spells them, but its own name, which is that of its folder.

    Raises ModelError for a value that the stage cannot use.

    >>> changed(Stage("stage1", (), 2e-4), {"learning_rate": "1e-4"}).learning_rate  # a string in YAML
    0.0001
    """
    names = ", ".join(name for name in vars(stage) if name != "name")
    if "name" in values:
        raise ModelError(f"{stage.name}: a stage keeps its name (the values of a stage are {names})")
    try:
        return TypeAdapter(Stage).validate_python(vars(stage) | dict(values))
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg'].lower()}" for fault in error.errors())
        raise ModelError(f"{stage.name}: {faults} (the values of a stage are {names})") from error


def trains_vision(model: torch.nn.Module) -> bool:
    """Whether any weight of the vision tower trains."""
    return any(p.requires_grad for name, p in model.named_parameters() if name.startswith(VISION))


def is_sharded() -> bool:
    """Whether accelerate shards the weights over processes. Parts of the model then cannot run alone."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def precision_of(stage: Stage, device: torch.device, parameters: int) -> Precision:
    """The precision for the device and a model of so many parameters, or bf16 autocast where the stage sets `bf16`."""
    chosen = choose_precision(device, training=True, parameters=parameters)
    if not stage.bf16 or chosen.autocast is torch.bfloat16:
        return chosen
    return replace(chosen, autocast=torch.bfloat16, reason="fp32 weights, bf16 autocast: the stage asks for it")
