import json
from dataclasses import replace

import pytest
import torch

from foodextract import models, training, weights
from foodextract.models import ModelError
from foodextract.profiles import PROFILES
from foodextract.training import Stage

QUICK = {"epochs": 1, "batch_size": 8, "accumulation": 2}
STAGE1 = replace(PROFILES["offline"].stage1, **QUICK)
STAGE2 = replace(PROFILES["hub"].stage2, **QUICK)  # the real, very low rate of 2e-6


def test_stage_1_leaves_vision_bit_identical_and_stage_2_moves_every_tensor(base, processor, rows, tmp_path):
    before = weights.snapshot(base)
    _, moved = training.train_stage(base, processor, STAGE1, rows["train"], tmp_path)
    by_module = {m.module: m for m in moved}
    assert by_module["vision_model"].weights_moved == 0
    for name, parameter in base.named_parameters():
        assert torch.equal(parameter, before[name]) == name.startswith("model.vision_model"), name
    _, moved = training.train_stage(base, processor, STAGE2, rows["train"], tmp_path)
    assert {m.module for m in moved} == set(by_module)
    for m in moved:
        assert m.tensors_moved == m.tensors, m
        assert m.weights_moved > 0.9 * m.weights, m  # pure bf16 weights move 4 % at this rate; fp32 master weights move nearly all
    saved = models.load_model(tmp_path / "stage2")
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), base.parameters(), strict=True))
    assert {p.dtype for p in base.parameters()} == {torch.float32}


def test_the_loss_falls(base, processor, rows, tmp_path):
    log, _ = training.train_stage(base, processor, replace(STAGE1, epochs=8, accumulation=1), rows["train"], tmp_path)
    assert log[-1]["loss"] < 0.5 * log[0]["loss"]
    written = json.loads((tmp_path / "stage1" / models.FINISHED).read_text())
    assert written["log"] == log


def test_an_interrupted_stage_ends_like_an_uninterrupted_one(processor, rows, tmp_path, monkeypatch):
    stage = replace(STAGE1, epochs=2)
    whole = models.load_model(models.TINY_BASE, torch.device("cpu"), training=True)
    training.train_stage(whole, processor, stage, rows["train"], tmp_path / "whole")

    class Killed(Exception):
        pass

    def die(self, args, state, control, **_):
        if state.epoch > 1.3:
            raise Killed

    broken = models.load_model(models.TINY_BASE, torch.device("cpu"), training=True)
    with monkeypatch.context() as patch:
        patch.setattr(training.Progress, "on_step_end", die)
        with pytest.raises(Killed):
            training.train_stage(broken, processor, stage, rows["train"], tmp_path / "broken")
    assert not (tmp_path / "broken" / "stage1" / models.FINISHED).exists()
    again = models.load_model(models.TINY_BASE, torch.device("cpu"), training=True)
    training.train_stage(again, processor, stage, rows["train"], tmp_path / "broken")
    for (name, a), b in zip(whole.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_another_recipe_starts_afresh(base, processor, rows, tmp_path):
    stale = tmp_path / "stage1" / "checkpoints"
    stale.mkdir(parents=True)
    (stale / "recipe.json").write_text("{}")
    (stale / "checkpoint-999").mkdir()
    training.train_stage(base, processor, STAGE1, rows["train"], tmp_path, max_steps=1)
    assert not stale.exists()


def test_nan_is_an_error_with_a_remedy(base, processor, rows, tmp_path):
    with torch.no_grad():
        base.model.connector.modality_projection.proj.weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match="stage1: the loss became NaN at step 1; lower its learning rate"):
        training.train_stage(base, processor, STAGE1, rows["train"], tmp_path)
    assert not (tmp_path / "stage1" / models.FINISHED).exists()


def test_freezing_what_is_not_there_is_an_error(base):
    with pytest.raises(ModelError, match=r"nothing to freeze under 'vision'.*vision_model"):
        weights.freeze(base, ["vision"])


def test_table_counts_every_parameter(base):
    weights.freeze(base, STAGE1.freeze)
    table = {line["module"]: line for line in weights.trainable_table(base)}
    assert sum(line["parameters"] for line in table.values()) == sum(p.numel() for p in base.parameters())
    assert table["vision_model"]["trainable"] == 0
    assert table["text_model"]["trainable"] == table["text_model"]["parameters"] > 0


def test_profiles_differ_from_the_originals_recipe_only_where_they_say():
    hub = PROFILES["hub"]
    assert hub.stage1 == Stage("stage1", freeze=("model.vision_model",), learning_rate=2e-4, epochs=2, batch_size=8, accumulation=4)
    assert hub.stage2 == Stage("stage2", freeze=(), learning_rate=2e-6, epochs=2, batch_size=8, accumulation=4)
    assert hub.tiles == PROFILES["offline"].tiles == 1
