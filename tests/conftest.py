"""Shared pieces: no network, one small drawn data set, the bundled models."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["MPLBACKEND"] = "agg"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # one worker a core: threads of several workers would only wait for one another

import datasets as hf_datasets
import huggingface_hub
import pytest
from PIL import Image
from pillow_heif import register_heif_opener

from foodextract.data import dataset, sources
from foodextract.inference.extractor import Extractor
from foodextract.models import loading
from foodextract.training import run as training
from foodextract.training.trainer import Progress
from hub_server import TOKEN, running_hub

SPACE = Path(__file__).parents[1] / "demos" / "FoodExtract-Vision"


def pytest_collection_modifyitems(items):
    """Run the longest tests first: at the end, one worker would run them alone."""
    items.sort(key=lambda item: item.get_closest_marker("timeout") is None)


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
    return loading.load_processor(loading.TINY_BASE, tiles=1)


@pytest.fixture
def base():
    """The tiny base, fresh for every test, since training changes it in place."""
    return load_base()


def load_base():
    return loading.load_model(loading.TINY_BASE, loading.choose_device("cpu"), training=True)


@pytest.fixture
def train(processor, rows, tmp_path):
    """Train a stage in a folder of the test, from a fresh tiny base unless a model is given."""

    def run(stage, folder="out", model=None, split=None, **options):
        arguments = model or load_base(), processor, stage, split or rows["train"], tmp_path / folder
        return training.train_stage(*arguments, **options)

    return run


@pytest.fixture
def die_in_second_epoch(train, monkeypatch):
    """Call `train` and kill it a third into its second epoch."""

    class Killed(Exception):
        pass

    def die(self, args, state, control, **_):
        if state.epoch > 1.3:
            raise Killed

    def run(*arguments, **options):
        with monkeypatch.context() as patch:
            patch.setattr(Progress, "on_step_end", die)
            with pytest.raises(Killed):
                train(*arguments, **options)

    return run


@pytest.fixture(scope="session")
def tuned():
    return Extractor.from_pretrained(loading.TINY_TUNED, "cpu")


@pytest.fixture
def online(monkeypatch, tmp_path):
    """A Hub on this machine that this very process reaches by ids, as it would reach the real one; no wait between
    attempts.
    """
    http = sys.modules["huggingface_hub.utils._http"]
    monkeypatch.setattr(http, "time", SimpleNamespace(**{**vars(time), "sleep": lambda _: None}))
    constants, config = huggingface_hub.constants, hf_datasets.config
    for interval in ("READ_RETRY", "READ_SERVER_UNAVAILABLE_RETRY", "READ_RATE_LIMIT_RETRY", "OPEN_RETRY"):
        monkeypatch.setattr(
            config, f"STREAMING_{interval}_INTERVAL", 0, raising=False
        )  # datasets 4.0 has fewer of them
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with running_hub() as server:
        for module in (constants, config):
            monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(config, "HF_ENDPOINT", server.url)
        monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
        huggingface_hub.HfFileSystem.clear_instance_cache()
        yield server
    huggingface_hub.HfFileSystem.clear_instance_cache()


@pytest.fixture
def heic(tmp_path):
    """A photograph as an iPhone stores it: HEIC, turned by its Exif data."""
    register_heif_opener()
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn clockwise
    with Image.open(SPACE / "examples" / "coffee.jpg") as photo:
        photo.rotate(90, expand=True).save(tmp_path / "IMG_0001.HEIC", exif=exif)
    return str(tmp_path / "IMG_0001.HEIC")


@contextmanager
def space(folder, model):
    """The address of the Space's page, started as `make space` does; what it writes goes into `folder`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {
        **os.environ,
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_TEMP_DIR": str(folder),
        "FOODEXTRACT_MODEL": str(model),
    }
    with (
        (folder / "log.txt").open("w") as log,
        subprocess.Popen([sys.executable, SPACE / "app.py"], env=env, cwd=folder, stdout=log, stderr=log) as run,
    ):
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


@pytest.fixture(scope="session")
def page(tmp_path_factory):
    """The address of the Space's page with the bundled model."""
    with space(tmp_path_factory.mktemp("space"), loading.TINY_TUNED) as address:
        yield address


@pytest.fixture(scope="session")
def page_without_model(tmp_path_factory):
    """The same, where the model cannot be loaded."""
    with space(tmp_path_factory.mktemp("space"), "/no/such/folder") as address:
        yield address
