"""`foodextract train`, alone and as two processes that talk over gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from foodextract.__main__ import app
from foodextract.models import FINISHED

SHORT = {"epochs": 1, "batch_size": 4, "accumulation": 1}


def losses(folder: Path) -> list[float]:
    return [entry["loss"] for entry in json.loads((folder / FINISHED).read_text())["log"]]


def test_two_processes_train_like_one(drawn, tmp_path):
    """The same global batch of 8: one process with 2 x 4, or two with 4 each."""
    common = ["--profile", "offline", "--max-steps", "3"]
    one = CliRunner().invoke(app, ["train", str(drawn), "-o", str(tmp_path / "one"), *common, *_stages(SHORT | {"accumulation": 2})])
    assert one.exit_code == 0, one.output
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]  # accelerate wants MPI for CPUs
    command = [*launch, "-m", "foodextract", "train", str(drawn), "-o", str(tmp_path / "two"), *common, *_stages(SHORT)]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    for stage in ("stage1", "stage2"):
        assert len(losses(tmp_path / "one" / stage)) == 3
        assert losses(tmp_path / "two" / stage) == pytest.approx(losses(tmp_path / "one" / stage), rel=2e-3)
        assert json.loads((tmp_path / "two" / stage / FINISHED).read_text())["processes"] == 2


def _stages(values: dict) -> list[str]:
    return ["--stage1", json.dumps(values), "--stage2", json.dumps(values)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere holds no data set"),
        (["nowhere", "--profile", "cloud"], "there is no profile 'cloud': take one of hub, offline"),
        (["nowhere", "--stage1", "{epochs: 1}"], "--stage1 and --stage2 take JSON"),
        (["nowhere", "--stage2", '{"epoch": 1}'], "unexpected keyword argument 'epoch'"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    result = CliRunner().invoke(app, ["train", *arguments])
    assert result.exit_code == 2
    assert message in result.stderr
