"""The usage pings of the libraries, asked for at a Hub on this machine."""

import os
import subprocess
import sys

import pytest

from hub_server import environment, running_hub

TRAIN = """
import {first}
from foodextract.data import dataset
from foodextract.models import loading
from foodextract.training import config as presets
from foodextract.training import run as training

stage = presets.PROFILES["offline"].stage1
model = loading.load_model(loading.TINY_BASE, loading.choose_device("cpu"), training=True)
processor = loading.load_processor(loading.TINY_BASE)
training.train_stage(model, processor, stage, dataset.load({rows!r})["train"], {out!r}, max_steps=1)

from huggingface_hub.utils import _telemetry
_telemetry._TELEMETRY_QUEUE.join()  # a thread sends them
"""


def pings_of_a_training(drawn, tmp_path, first, **choice):
    unset = {"HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY", "DO_NOT_TRACK", "CI"}  # trl sends nothing from a CI
    with running_hub() as hub:
        env = {key: value for key, value in os.environ.items() if key not in unset} | environment(hub) | choice
        script = TRAIN.format(first=first, rows=str(drawn), out=str(tmp_path / "out"))
        run = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr[-3000:]
        return [path for _, path in hub.requests if "telemetry" in path]


@pytest.mark.slow
@pytest.mark.parametrize("first", ["foodextract", "trl"])  # notebook 01 imports trl first
def test_a_training_sends_no_usage_ping(drawn, tmp_path, first):
    assert pings_of_a_training(drawn, tmp_path, first) == []


@pytest.mark.slow
def test_the_user_can_choose_to_send_them(drawn, tmp_path):
    """This also shows that the test above could fail."""
    assert pings_of_a_training(drawn, tmp_path, "trl", HF_HUB_DISABLE_TELEMETRY="0")


@pytest.mark.slow
def test_download_counts_and_gradio_are_silent_unless_the_user_chooses_otherwise():
    ask = (
        "import foodextract, os; from datasets import config; "
        "print(config.HF_UPDATE_DOWNLOAD_COUNTS, os.environ['GRADIO_ANALYTICS_ENABLED'])"
    )
    chosen = {"HF_UPDATE_DOWNLOAD_COUNTS": "TRUE", "GRADIO_ANALYTICS_ENABLED": "True"}
    env = {key: value for key, value in os.environ.items() if key not in chosen}
    output = [
        subprocess.run([sys.executable, "-c", ask], env=env | extra, capture_output=True, text=True).stdout
        for extra in ({}, chosen)
    ]
    assert [text.split() for text in output] == [["False", "False"], ["True", "True"]]
