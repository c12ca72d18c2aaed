"""FoodExtract Vision: a small vision-language model that answers any image with one line of strict JSON."""

import os
import sys

__version__ = "0.1.0"

# library module: the constant that turns its usage pings off, and the environment variables in which a user chooses otherwise
PINGS = {
    "huggingface_hub.constants": (
        "HF_HUB_DISABLE_TELEMETRY",
        True,
        ("HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY", "DO_NOT_TRACK"),
    ),
    "datasets.config": ("HF_UPDATE_DOWNLOAD_COUNTS", False, ("HF_UPDATE_DOWNLOAD_COUNTS",)),
}


def _disable_telemetry() -> None:
    """Turn off the usage pings of trl, transformers, datasets and gradio, unless the user has made a choice.

    The libraries read the environment once, at import. The constant of a library that is imported already is set as well.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    for module, (name, off, variables) in PINGS.items():
        if not any(variable in os.environ for variable in variables):
            os.environ[name] = str(off)
            if module in sys.modules:
                setattr(sys.modules[module], name, off)


_disable_telemetry()
