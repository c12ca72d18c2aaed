"""The training cells of notebook 01 and `foodextract train` are one recipe."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import load_base
from foodextract.models.weights import checksum, snapshot
from foodextract.training.config import PROFILES
from foodextract.training.run import StageRun, training_arguments

NOTEBOOK = Path(__file__).parents[1] / "01_fine_tune_vlm_v3_smolVLM_500m.ipynb"
CELLS = {cell["id"]: "".join(cell["source"]) for cell in json.loads(NOTEBOOK.read_text())["cells"]}
BEFORE_TRAINING = {"stage1": ("cell-14", "stage1-settings"), "stage2": ("cell-17",)}
CHANGES = {"num_train_epochs": 1, "learning_rate": 1e-3}


@pytest.mark.parametrize("values", [{}, pytest.param(CHANGES, marks=pytest.mark.slow)], ids=["preset", "changed"])
def test_the_cells_train_what_the_command_trains(train, processor, rows, tmp_path, values):
    """The same frozen weights, the same arguments, and the same weights after two steps of each stage."""
    profile, model = PROFILES["offline"], load_base()
    stages = [replace(stage, **values, save_steps=1) for stage in (profile.stage1, profile.stage2)]
    notebook = {
        "stages": stages,
        "model": load_base(),
        "processor": processor,
        "rows": rows,
        "output": tmp_path / "cells",
    }
    notebook |= {"seed": 42, "keep_in": None, "retrain": False, "seconds": {}}
    exec("\n".join(re.findall("^(?:from|import) .*", CELLS["cell-04"], re.MULTILINE)), notebook)
    for stage in stages:
        for cell in BEFORE_TRAINING[stage.name]:
            exec(CELLS[cell], notebook)
        arguments = training_arguments(StageRun(model, processor, stage, rows["train"], tmp_path / "command")).to_dict()
        arguments["output_dir"] = str(tmp_path / "cells" / stage.name / "checkpoints")
        assert notebook["args"].to_dict() == arguments
        trains = [[p.requires_grad for p in each.parameters()] for each in (notebook["model"], model)]
        assert trains[0] == trains[1]
        exec(CELLS[f"{stage.name}-trainer"], notebook)
        run = train(stage, "command", model)
        assert (notebook["logs"][stage.name][-1]["loss"], notebook["moved"][stage.name]) == (
            run.log[-1]["loss"],
            run.moved,
        )
        assert checksum(snapshot(notebook["model"])) == checksum(snapshot(model))
