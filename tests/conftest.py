"""Shared pieces: no network, one small drawn data set, the bundled models."""

import os

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
