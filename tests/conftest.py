"""Shared pieces: no network, one small drawn data set, the bundled models."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["MPLBACKEND"] = "agg"

import pytest

from foodextract import dataset, models, sources
from foodextract.extractor import Extractor


@pytest.fixture(scope="session")
def drawn(tmp_path_factory):
    """A data set of 40 + 16 drawn scenes."""
    out = tmp_path_factory.mktemp("drawn") / "dataset"
    dataset.build(sources.scenes(seed=5, train=40, test=16), out)
    return out


@pytest.fixture(scope="session")
def rows(drawn):
    return dataset.load(drawn)


@pytest.fixture(scope="session")
def processor():
    return models.load_processor(models.TINY_BASE, tiles=1)


@pytest.fixture
def base():
    """The tiny base, fresh for every test, since training changes it in place."""
    return models.load_model(models.TINY_BASE, models.choose_device("cpu"), training=True)


@pytest.fixture(scope="session")
def tuned():
    return Extractor.from_pretrained(models.TINY_TUNED, "cpu")


@pytest.fixture(scope="session")
def page(tmp_path_factory):
    """The address of the Space's page, started as `make space` does, with the bundled model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("space")
    app = Path(__file__).parents[1] / "demos" / "FoodExtract-Vision" / "app.py"
    env = {**os.environ, "GRADIO_SERVER_PORT": str(port), "GRADIO_TEMP_DIR": str(folder), "FOODEXTRACT_MODEL": str(models.TINY_TUNED)}
    with (folder / "log.txt").open("w") as log, subprocess.Popen([sys.executable, app], env=env, cwd=folder, stdout=log, stderr=log) as run:
        try:
            while True:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/").close()
                    break
                except OSError:
                    assert run.poll() is None, (folder / "log.txt").read_text()
                    time.sleep(0.2)
            yield f"http://127.0.0.1:{port}/"
        finally:
            run.terminate()
