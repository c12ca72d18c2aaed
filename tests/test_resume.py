"""`foodextract train` killed with SIGKILL in either stage resumes to the losses and weights of an uninterrupted run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from foodextract.__main__ import app
from foodextract.models import loading

pytestmark = pytest.mark.slow

FOUR_EPOCHS = json.dumps(
    {"num_train_epochs": 4, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
)  # of 5 steps, each of which ends with a checkpoint


def arguments(data: Path, out: Path) -> list[str]:
    return [
        "train",
        str(data),
        "-o",
        str(out),
        "--profile",
        "offline",
        "--stage1",
        FOUR_EPOCHS,
        "--stage2",
        FOUR_EPOCHS,
    ]


def run_until(data: Path, out: Path, stage: str) -> None:
    """Start a training and kill it at whatever step it is once `stage` has its first whole checkpoint."""
    process = subprocess.Popen(
        [sys.executable, "-m", "foodextract", *arguments(data, out)],
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},  # other sums round otherwise
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while not list((out / stage).glob("checkpoints/checkpoint-*/trainer_state.json")):
            assert process.poll() is None, f"the training ended before {stage} had a checkpoint"
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (out / stage / loading.FINISHED).exists()


def test_killed_in_both_stages(drawn, tmp_path):
    run_until(drawn, tmp_path / "killed", "stage1")
    run_until(drawn, tmp_path / "killed", "stage2")
    trained = (tmp_path / "killed" / "stage1" / "model.safetensors").stat().st_mtime_ns
    for out in ("killed", "whole"):
        done = CliRunner().invoke(app, arguments(drawn, tmp_path / out))
        assert done.exit_code == 0, done.output
    assert (
        tmp_path / "killed" / "stage1" / "model.safetensors"
    ).stat().st_mtime_ns == trained  # a finished stage is not trained again
    assert len(list((tmp_path / "killed").glob("prepared-*"))) == 1  # once for both stages
    for stage in ("stage1", "stage2"):
        logs = [
            json.loads((tmp_path / out / stage / loading.FINISHED).read_text())["log"] for out in ("killed", "whole")
        ]
        losses = [[entry["loss"] for entry in log] for log in logs]
        assert len(losses[0]) == 20
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
        ends = [
            loading.load_model(tmp_path / out / stage, torch.device("cpu"), training=True).state_dict()
            for out in ("killed", "whole")
        ]
        for name, weights in ends[0].items():
            torch.testing.assert_close(weights, ends[1][name], msg=name)
