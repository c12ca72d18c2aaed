"""`foodextract train`, alone and as two processes that talk over gloo."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import load_file
from typer.testing import CliRunner

from foodextract.__main__ import app
from foodextract.models.loading import FINISHED, TINY_BASE

CONFIGS = Path(__file__).parents[1] / "configs"
COMMON = ["--profile", "offline", "--max-steps", "3"]
SHORT = {"num_train_epochs": 1, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}


def losses(folder: Path) -> list[float]:
    return [entry["loss"] for entry in json.loads((folder / FINISHED).read_text())["log"]]


def train_in_one_process(dataset: Path, out: Path) -> None:
    """Train with the same global batch of 8 as two processes with 4 each."""
    stages = _stages(SHORT | {"gradient_accumulation_steps": 2})
    one = CliRunner().invoke(app, ["train", str(dataset), "-o", str(out), *COMMON, *stages])
    assert one.exit_code == 0, one.output


@pytest.mark.slow
def test_two_processes_train_like_one(drawn, tmp_path):
    """The same global batch of 8: one process with 2 x 4, or two with 4 each."""
    train_in_one_process(drawn, tmp_path / "one")
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
    ]  # accelerate wants MPI for CPUs
    command = [*launch, "-m", "foodextract", "train", str(drawn), "-o", str(tmp_path / "two"), *COMMON, *_stages(SHORT)]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for stage in ("stage1", "stage2"):
        assert len(losses(tmp_path / "one" / stage)) == 3
        assert losses(tmp_path / "two" / stage) == pytest.approx(losses(tmp_path / "one" / stage), rel=2e-3)
        assert json.loads((tmp_path / "two" / stage / FINISHED).read_text())["processes"] == 2


AS_ACCELERATORS = """
import runpy, sys
from accelerate import PartialState
from accelerate.utils import DistributedType

# accelerate shards over accelerators only and trains CPU processes as DDP, though torch can shard on CPUs.
PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
sys.argv[0] = "foodextract"
runpy.run_module("foodextract", run_name="__main__")
"""


@pytest.mark.slow
def test_two_processes_with_half_the_weights_each_train_like_one(drawn, tmp_path):
    """FSDP2 with the settings of configs/fsdp2.yaml, as accelerate hands them to its processes."""
    settings, *_ = _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", str(CONFIGS / "fsdp2.yaml"), "-m", "x"])
    )
    sharding = {key: value for key, value in prepare_multi_gpu_env(settings).items() if "FSDP" in key}
    assert sharding["ACCELERATE_USE_FSDP"] == "true"
    assert sharding["FSDP_VERSION"] == "2"
    train_in_one_process(drawn, tmp_path / "one")
    script = tmp_path / "sharded.py"
    script.write_text(AS_ACCELERATORS)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    command = [*launch, "train", str(drawn), "-o", str(tmp_path / "two"), *COMMON, *_stages(SHORT)]
    environment = os.environ | sharding | {"OMP_NUM_THREADS": "1", "ACCELERATE_TORCH_DEVICE": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    for stage in ("stage1", "stage2"):
        assert losses(tmp_path / "two" / stage) == pytest.approx(losses(tmp_path / "one" / stage), rel=2e-3)
        one, two = (load_file(tmp_path / out / stage / "model.safetensors") for out in ("one", "two"))
        assert one.keys() == two.keys()
        for name, weights in one.items():
            torch.testing.assert_close(two[name], weights, rtol=1e-3, atol=1e-5, msg=name)
        moved = [json.loads((tmp_path / out / stage / FINISHED).read_text())["moved"] for out in ("one", "two")]
        assert [module["tensors_moved"] for module in moved[1]] == [module["tensors_moved"] for module in moved[0]]


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_accelerate_accepts_the_configurations(name):
    settings = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert settings.num_processes == 2


def test_a_processor_that_does_not_fit_the_model_is_refused(drawn, tmp_path):
    shutil.copytree(TINY_BASE, tmp_path / "base")
    settings = json.loads((tmp_path / "base" / "processor_config.json").read_text())
    settings["image_seq_len"] += 1
    (tmp_path / "base" / "processor_config.json").write_text(json.dumps(settings))
    result = CliRunner().invoke(
        app, ["train", str(drawn), "-o", str(tmp_path / "out"), "--base", str(tmp_path / "base")]
    )
    assert result.exit_code == 2
    assert "use the processor that was saved with the model" in result.stderr


def _stages(values: dict) -> list[str]:
    return ["--stage1", json.dumps(values), "--stage2", json.dumps(values)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere holds no data set"),
        (["nowhere", "--profile", "cloud"], "there is no profile 'cloud': choose one of hub, offline"),
        (["nowhere", "--stage1", "{num_train_epochs: 1}"], "--stage1 and --stage2 take JSON"),
        (
            ["nowhere", "--stage2", '{"epoch": 1}'],
            "stage2: epoch: unexpected keyword argument (the values of a stage are freeze, learning_rate",
        ),
        (
            ["nowhere", "--stage1", '{"num_train_epochs": "many"}'],
            "stage1: num_train_epochs: input should be a valid number",
        ),
        (["nowhere", "--stage1", '{"freeze": "model.vision_model"}'], "stage1: freeze: input should be a valid tuple"),
        (["nowhere", "--stage1", '{"name": ""}'], "stage1: a stage keeps its name"),
        (["nowhere", "--stage1", '"ab"'], "--stage1 and --stage2 take JSON"),
        (["nowhere", "--stage1", '{"per_device_train_batch_size": 0}'], "stage1: per_device_train_batch_size: "),
        (["nowhere", "--stage2", '{"learning_rate": NaN}'], "stage2: learning_rate: input should be "),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    result = CliRunner().invoke(app, ["train", *arguments])
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
