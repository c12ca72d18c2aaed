"""The names that `foodextract` offers, and what its import costs."""

import subprocess
import sys

import pytest

import foodextract


@pytest.mark.parametrize("name", foodextract.__all__)
def test_public_names_exist(name):
    assert getattr(foodextract, name)
    assert name in dir(foodextract)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        foodextract.nothing  # noqa: B018


def test_import_is_cheap():
    code = (
        "import sys, foodextract; from foodextract import FoodRecord; print({'torch', 'transformers'} & {*sys.modules})"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_a_name_that_needs_an_extra_says_so():
    code = "import sys; sys.modules['datasets'] = None; from foodextract import load_dataset"
    error = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr.splitlines()[-1]
    assert error.endswith("MissingExtraError: datasets is not installed: pip install 'foodextract[data]'")
