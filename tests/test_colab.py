"""What a Colab badge starts: the set-up cell of every notebook, in a kernel that has loaded Pillow as `google.colab`
does.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from jupyter_client.manager import KernelManager

from foodextract.models import loading
from foodextract.models.loading import ModelError
from foodextract.names import CODE
from foodextract.training import config as presets
from foodextract.training.config import PROFILES

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted([*ROOT.glob("*.ipynb"), *ROOT.glob("experiments/*.ipynb")])
# What Colab has loaded before the first cell runs, or may have. A package replaced under a running kernel breaks it.
PRELOADED = {
    "pillow",
    "numpy",
    "pandas",
    "pyarrow",
    "matplotlib",
    "scipy",
    "scikit-learn",
    "torch",
    "torchvision",
    "ipython",
    "tornado",
}


def cells(path: Path) -> list[str]:
    return ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


def packages_of(cell: str) -> str:
    return "".join(re.findall(r'packages \+?= "([^"]+)"', cell))


def installed_by(cell: str) -> list[str]:
    """The pinned lines of requirements.txt that the cell's `grep` selects."""
    return [
        line
        for line in (ROOT / "requirements.txt").read_text().splitlines()
        if re.match(f"({packages_of(cell)})==", line)
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_setup_cell_names_no_loaded_package_and_no_editable_install(path):
    cell = cells(path)[0]
    pins = installed_by(cell)
    names = [pin.split("==")[0] for pin in pins]
    assert sorted(names) == sorted(packages_of(cell).split("|"))  # each is pinned
    assert not {name.lower() for name in names} & PRELOADED
    assert "pip install -q --no-deps" in cell
    assert not re.search(r"pip install[^\n]*(-e|--editable)\b", cell)
    assert f'repository = "{CODE}"\n' in cell
    assert "git clone -q --depth 1 $repository " in cell


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_badge_opens_a_gpu_runtime(path):
    metadata = json.loads(path.read_text())["metadata"]
    assert metadata["accelerator"] == "GPU"
    assert metadata["colab"]["gpuType"] == ("A100" if "gemma" in path.name else "T4")


def test_gemma_says_that_a_t4_is_refused():
    first = json.loads((ROOT / "experiments" / "gemma_3n_lora.ipynb").read_text())["cells"][0]
    assert "A T4 is refused" in "".join(first["source"])


def test_a_profile_that_needs_a_gpu_stops_without_one_and_says_how_to_get_one(monkeypatch):
    monkeypatch.setattr(presets, "choose_device", lambda: loading.torch.device("cpu"))
    with pytest.raises(ModelError, match="Runtime > Change runtime type > T4 GPU"):
        PROFILES["hub"].require_gpu()
    PROFILES["hub"].require_gpu(allow_cpu=True)
    PROFILES["offline"].require_gpu()
    monkeypatch.setattr(presets, "choose_device", lambda: loading.torch.device("cuda"))
    PROFILES["hub"].require_gpu()


class Kernel:
    """One kernel with a stand-in `google.colab`, a `pip` that only notes what it is asked, and no other foodextract
    than the clone's.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked = folder, folder / "asked.txt"
        stand_in = folder / "site" / "google" / "colab"
        stand_in.mkdir(parents=True)
        (stand_in / "__init__.py").write_text("import PIL.Image\n")
        (folder / "bin").mkdir()
        (folder / "bin" / "pip").write_text(f'#!/bin/sh\necho "$@" >> {self.asked}\n')
        (folder / "bin" / "pip").chmod(0o755)
        launch = folder / "launch.py"
        launch.write_text(
            "import google.colab, sys\nfrom ipykernel.kernelapp import launch_new_instance\n"
            f"sys.path[:] = [path for path in sys.path if path != {str(ROOT / 'src')!r}]\nlaunch_new_instance()\n"
        )
        self.content = folder / "content"
        self.content.mkdir()
        redirect = {
            "GIT_CONFIG_COUNT": "1",
            "GIT_CONFIG_KEY_0": f"url.{ROOT.as_uri()}.insteadOf",
            "GIT_CONFIG_VALUE_0": CODE,
        }
        self.environment = {
            **os.environ,
            **redirect,
            "PYTHONPATH": str(folder / "site"),
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        }
        self.start()

    def start(self) -> None:
        self.manager = KernelManager(kernel_name="python3")
        self.manager.kernel_spec.argv = [sys.executable, str(self.folder / "launch.py"), "-f", "{connection_file}"]
        self.manager.start_kernel(env=self.environment, cwd=str(self.content))
        self.client = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=120)

    def restart(self) -> None:
        self.manager.shutdown_kernel(now=True)
        self.start()

    def run(self, source: str) -> str:
        """What a cell printed. Raises AssertionError with the cell's own error."""
        printed = []
        reply = self.client.execute_interactive(
            source,
            timeout=300,
            output_hook=lambda m: printed.append(m["content"].get("text", "")) if m["msg_type"] == "stream" else None,
        )
        assert reply["content"]["status"] == "ok", (reply["content"].get("evalue"), "".join(printed))
        return "".join(printed)


@pytest.fixture
def kernel(tmp_path):
    kernel = Kernel(tmp_path)
    yield kernel
    kernel.manager.shutdown_kernel(now=True)


@pytest.mark.slow
@pytest.mark.parametrize("path", [NOTEBOOKS[1], NOTEBOOKS[2]], ids=lambda path: path.name)
def test_setup_cell_leaves_a_kernel_in_which_the_imports_work(path, kernel):
    setup, parameters, imports = cells(path)[:3]
    assert "from foodextract" in imports
    kernel.run(setup)
    kernel.run(setup)  # as people do
    kernel.run(parameters)
    kernel.run(imports)
    clone = kernel.content / "FoodExtract-Vision"
    assert kernel.run("import foodextract; print(foodextract.__file__)").strip() == str(
        clone / "src" / "foodextract" / "__init__.py"
    )
    kernel.restart()
    for cell in (setup, parameters, imports):
        kernel.run(cell)
    assert [found.parent for found in kernel.content.rglob(".git")] == [clone]
    asked = kernel.asked.read_text().splitlines()
    assert asked == ["install -q --no-deps " + " ".join(installed_by(setup)), "uninstall -q -y torchao"] * 3


@pytest.mark.slow
def test_a_failed_installation_stops_the_cell(kernel):
    (kernel.folder / "bin" / "pip").write_text("#!/bin/sh\necho no connection >&2\nexit 1\n")
    with pytest.raises(AssertionError, match="pip failed: read its message"):
        kernel.run(cells(NOTEBOOKS[0])[0])


def test_floors_hold_what_colab_has_loaded():
    """`make test-floors` installs requirements.txt with these versions instead."""
    floors = dict(
        line.split("==")
        for line in (ROOT / "requirements-floors.txt").read_text().splitlines()
        if not line.startswith("#")
    )
    assert {"pillow", "numpy", "pandas", "pyarrow", "matplotlib", "scipy", "scikit-learn"} <= set(floors)
    assert not {pin.split("==")[0] for path in NOTEBOOKS for pin in installed_by(cells(path)[0])} & set(floors)
    git = subprocess.run(
        ["git", "grep", "-l", "requirements-floors.txt", "--", "Makefile"], cwd=ROOT, capture_output=True, text=True
    )
    assert git.stdout.strip() == "Makefile"
