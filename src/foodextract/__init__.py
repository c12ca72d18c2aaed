"""FoodExtract Vision: a small vision-language model that answers any image with one line of strict JSON.

The names in `__all__` are the public API. Each is imported on first use, so `import foodextract` stays cheap.
"""

import importlib
import os
import sys
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from foodextract.extras import extra

if TYPE_CHECKING:
    from foodextract.data.dataset import open_dataset as load_dataset
    from foodextract.data.samples import DatasetError
    from foodextract.extras import MissingExtraError
    from foodextract.images import FormatError, ImageError
    from foodextract.inference.confidence import Confidence
    from foodextract.inference.extractor import Extractor
    from foodextract.models.loading import ModelError
    from foodextract.schema import AnswerError, FoodRecord

__version__ = "0.1.0"
__all__ = [
    "AnswerError",
    "Confidence",
    "DatasetError",
    "Extractor",
    "FoodRecord",
    "FormatError",
    "ImageError",
    "MissingExtraError",
    "ModelError",
    "__version__",
    "load_dataset",
]

_HOMES = {
    "AnswerError": "schema",
    "Confidence": "inference.confidence",
    "DatasetError": "data.samples",
    "Extractor": "inference.extractor",
    "FoodRecord": "schema",
    "FormatError": "images",
    "ImageError": "images",
    "MissingExtraError": "extras",
    "ModelError": "models.loading",
    "load_dataset": "data.dataset",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with extra("data") if _HOMES[name].startswith("data.") else nullcontext():
        module = importlib.import_module(f"{__name__}.{_HOMES[name]}")
    value = getattr(module, "open_dataset" if name == "load_dataset" else name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _disable_telemetry() -> None:
    """Turn off the usage pings of gradio, huggingface_hub (also used by trl and transformers) and datasets.

    An environment variable that the user has set wins. The libraries read the environment at import, so the constant
    of a library that is already imported is set as well.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    for module, constant, off, choices in (
        ("huggingface_hub.constants", "HF_HUB_DISABLE_TELEMETRY", True, ("DISABLE_TELEMETRY", "DO_NOT_TRACK")),
        ("datasets.config", "HF_UPDATE_DOWNLOAD_COUNTS", False, ()),
    ):
        if not any(variable in os.environ for variable in (constant, *choices)):
            os.environ[constant] = str(off)
            if module in sys.modules:
                setattr(sys.modules[module], constant, off)


_disable_telemetry()
