"""What an installation brings: ranges in pyproject.toml, pins in requirements.txt, errors that name a missing extra."""

import importlib
import json
import re
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from typer.testing import CliRunner

import strip_widgets
from foodextract import names
from foodextract.cli import app
from foodextract.extras import MissingExtraError, extra

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = {key: [Requirement(line) for line in lines] for key, lines in PROJECT["optional-dependencies"].items()}
CORE = [Requirement(line) for line in PROJECT["dependencies"]]


def pins(path):
    """Name → versions of the pinned lines; the lock has two versions of a package where platforms or Pythons differ."""
    found = {}
    for line in path.read_text().splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            [specifier] = requirement.specifier
            assert specifier.operator == "=="
            found.setdefault(canonicalize_name(requirement.name), []).append(specifier.version)
    return found


LOCK, FLOORS = pins(ROOT / "requirements.txt"), pins(ROOT / "requirements-floors.txt")


def test_the_core_is_what_extracting_needs():
    heavy = {
        "accelerate",
        "datasets",
        "gradio",
        "jupyter",
        "matplotlib",
        "pandas",
        "peft",
        "scikit-learn",
        "scipy",
        "trl",
        "fastapi",
    }
    assert not {one.name for one in CORE} & heavy
    assert not any(one.name == "foodextract" for one in CORE)


@pytest.mark.parametrize("key", ["core", *EXTRAS])
def test_the_lock_has_every_dependency_at_a_version_in_its_range(key):
    for one in CORE if key == "core" else EXTRAS[key]:
        if one.name == PROJECT["name"]:
            assert one.extras <= set(EXTRAS)
            continue
        versions = LOCK[canonicalize_name(one.name)]
        assert all(one.specifier.contains(version) for version in versions), one
        floor = FLOORS.get(canonicalize_name(one.name))
        assert floor is None or one.specifier.contains(floor[0]), one


def test_the_lock_tells_the_command_that_makes_it_and_no_index():
    text = (ROOT / "requirements.txt").read_text()
    command = re.search(r"^#    (uv pip compile .+)$", text, re.M)[1]
    assert f"$(BIN)/{command}\n" in (ROOT / "Makefile").read_text()
    assert "://" not in text


def test_the_space_installs_the_core_and_the_demo_at_the_locked_versions():
    lines = (ROOT / "demos" / names.REPOSITORY / "requirements.txt").read_text().splitlines()
    space = {one.name: one for one in (Requirement(line) for line in lines if not line.startswith("#"))}
    assert {canonicalize_name(name) for name in space} == {
        canonicalize_name(one.name)
        for one in [*CORE, *EXTRAS["demo"], *EXTRAS["heic"]]
        if one.name != "mcp"  # `gradio[mcp]` brings it
    }
    assert space["gradio"].extras == {"mcp"}
    assert all(one.specifier.contains(str(space[one.name].specifier).removeprefix("==")) for one in CORE)


def test_python_versions_and_addresses_are_those_of_the_workflow_and_the_names():
    classified = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if "Python :: 3." in line]
    workflow = (ROOT / ".github" / "workflows" / "test.yml").read_text()
    assert re.findall(r'"(3\.\d+)"', workflow) == classified
    assert PROJECT["urls"]["Repository"] == names.CODE
    assert PROJECT["urls"]["Demo"].endswith(f"/spaces/{names.HUB_SPACE}")


def test_a_missing_module_is_reported_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    with (
        pytest.raises(MissingExtraError, match=r"fastapi is not installed: pip install 'foodextract\[serve\]'"),
        extra("serve"),
    ):
        importlib.import_module("fastapi")
    with pytest.raises(ModuleNotFoundError, match=r"foodextract\.nothing") as caught, extra("serve"):
        importlib.import_module("foodextract.nothing")  # a mistake of ours is not an extra
    assert not isinstance(caught.value, MissingExtraError)


@pytest.mark.parametrize(
    ("command", "module", "key"),
    [
        (["serve"], "uvicorn", "serve"),
        (["train", "somewhere"], "accelerate", "train"),
        (["publish", "model"], "datasets", "train"),
        (["export", "onnx", "out"], "onnxscript", "onnx"),
    ],
)
def test_a_command_without_its_extra_stops_and_names_it(monkeypatch, command, module, key):
    for name in [name for name in sys.modules if re.match(r"foodextract\.(serving|training|hub|evaluation)\b", name)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2
    assert f"pip install 'foodextract[{key}]'" in result.stderr


def test_widget_metadata_is_stripped_and_outputs_stay(tmp_path):
    cell = {"cell_type": "code", "source": [], "metadata": {}, "execution_count": 1, "outputs": [{"text": "ä"}]}
    notebook = {"cells": [cell], "metadata": {"widgets": {"state": 1}, "accelerator": "GPU"}}
    path = tmp_path / "one.ipynb"
    path.write_text(json.dumps(notebook))
    assert strip_widgets.strip(path)
    assert json.loads(path.read_text()) == {"cells": [cell], "metadata": {"accelerator": "GPU"}}
    assert not strip_widgets.strip(path)
