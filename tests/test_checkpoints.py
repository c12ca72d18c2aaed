"""A training that is interrupted, moved to another machine or short of disk loses nothing that was finished."""

import json
import os
import shutil
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from foodextract.models import loading
from foodextract.models.loading import FINISHED, ModelError
from foodextract.training import checkpoints
from foodextract.training import run as training
from foodextract.training.config import PROFILES, Stage
from foodextract.training.trainer import FoodTrainer

STAGE1 = Stage(
    "stage1",
    freeze=("model.vision_model",),
    learning_rate=7e-4,
    num_train_epochs=2,
    per_device_train_batch_size=8,
    gradient_accumulation_steps=1,
)
STAGE2 = replace(STAGE1, name="stage2", freeze=(), learning_rate=1e-5)


def fresh():
    return loading.load_model(loading.TINY_BASE, torch.device("cpu"), training=True)


def losses(folder):
    return [entry["loss"] for entry in json.loads((folder / FINISHED).read_text())["log"]]


def outcome(run):
    return run.log, run.moved


def resumed_at(monkeypatch):
    """The checkpoints from which the following trainings resume, by stage."""
    found, train = {}, FoodTrainer.train

    def note(self, resume_from_checkpoint=None):
        found[self.args.output_dir.split("/")[-2]] = resume_from_checkpoint and resume_from_checkpoint.split("/")[-1]
        return train(self, resume_from_checkpoint=resume_from_checkpoint)

    monkeypatch.setattr(FoodTrainer, "train", note)
    return found


@pytest.fixture(scope="module")
def whole(rows, processor, tmp_path_factory):
    """Both stages without an interruption."""
    out, model = tmp_path_factory.mktemp("whole"), fresh()
    for stage in (STAGE1, STAGE2):
        training.train_stage(model, processor, stage, rows["train"], out)
    return out


@pytest.mark.slow
def test_a_start_that_was_computed_again_does_not_cost_the_checkpoint_of_the_next_stage(
    train, tmp_path, die_in_second_epoch, monkeypatch
):
    """On a GPU, stage 1 trained again gives other last bits. The checkpoint of stage 2 must survive that."""
    model = fresh()
    train(STAGE1, "", model)
    die_in_second_epoch(STAGE2, "", model)
    shutil.rmtree(tmp_path / "stage1")
    count = training.weights_moved

    def other_bits(model, before):
        with torch.no_grad():
            model.model.connector.modality_projection.proj.weight += 1e-7
        return count(model, before)

    model = fresh()
    with monkeypatch.context() as patch:
        patch.setattr(training, "weights_moved", other_bits)
        train(STAGE1, "", model)
    found = resumed_at(monkeypatch)
    train(STAGE2, "", model)
    assert found == {"stage2": "checkpoint-5"}  # 5 steps an epoch


def test_a_stage_of_few_steps_says_so(train, capsys):
    train(STAGE1, "")
    assert "stage1: 10 steps of 8 images may be too few to learn from" in capsys.readouterr().out
    train(STAGE1, "asked", max_steps=1)
    assert "too few" not in capsys.readouterr().out


@pytest.mark.slow
def test_weights_that_were_changed_between_the_stages_are_another_start(train, tmp_path, capsys):
    model = fresh()
    train(STAGE1, "", model, max_steps=1)
    train(STAGE2, "", model, max_steps=1)
    model = loading.load_model(tmp_path / "stage1", torch.device("cpu"), training=True)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    train(STAGE2, "", model, max_steps=1)
    assert f"stage2: retraining, and replacing {tmp_path / 'stage2'}: start differ" in capsys.readouterr().out


@pytest.mark.slow
def test_a_new_machine_resumes_from_the_copies(train, tmp_path, die_in_second_epoch, monkeypatch, capsys, whole):
    drive = tmp_path / "drive" / "FoodExtract"
    drive.parent.mkdir()
    options = {"keep_in": drive}
    model = fresh()
    train(STAGE1, "one", model, **options)
    die_in_second_epoch(STAGE2, "one", model, **options)
    sizes = [
        (home / "stage2" / "checkpoints" / "checkpoint-5" / "optimizer.pt").stat().st_size
        for home in (drive, tmp_path / "one")
    ]
    assert sizes[0] < 0.55 * sizes[1]  # bf16 moments
    assert not list(drive.glob("**/features*"))
    shutil.rmtree(tmp_path / "one")  # the machine is gone

    found, model = resumed_at(monkeypatch), fresh()
    for stage in (STAGE1, STAGE2):
        train(stage, "two", model, **options)
    assert found == {"stage2": "checkpoint-5"}
    assert "stage1: already trained" in capsys.readouterr().out
    assert losses(tmp_path / "two" / "stage1") == losses(whole / "stage1")
    assert losses(tmp_path / "two" / "stage2") == pytest.approx(losses(whole / "stage2"), rel=1e-2)
    for stage in ("stage1", "stage2"):
        assert (drive / stage / FINISHED).read_bytes() == (tmp_path / "two" / stage / FINISHED).read_bytes()
        assert not (drive / stage / "checkpoints").exists()  # the finished stage replaces them


@pytest.mark.slow
def test_a_stage_whose_cell_is_run_again_is_not_trained_on_top_of_itself(train, tmp_path, capsys):
    model, drive = fresh(), tmp_path / "drive"
    options = {"max_steps": 1, "keep_in": drive}
    once = outcome(train(STAGE1, "", model, **options))
    first = {name: weights.clone() for name, weights in model.state_dict().items()}
    train(STAGE2, "", model, **options)
    second = outcome(train(STAGE2, "", model, **options))  # the same cell
    assert outcome(train(STAGE1, "", model, **options)) == once  # an earlier cell
    assert capsys.readouterr().out.count("already trained") == 2
    assert all(torch.equal(weights, first[name]) for name, weights in model.state_dict().items())
    assert outcome(train(STAGE2, "", model, **options)) == second
    for other in ({"retrain": True}, {"seed": 7}):
        with pytest.raises(
            ModelError, match="stage2: the model in memory has been through this stage; load the base again"
        ):
            train(STAGE2, "", model, max_steps=1, **other)
    assert (tmp_path / "stage2" / FINISHED).read_bytes() == (drive / "stage2" / FINISHED).read_bytes()


@pytest.mark.slow
def test_a_stage_that_is_trained_again_replaces_its_copy(train, tmp_path, capsys):
    drive = tmp_path / "drive"
    for options in ({}, {"retrain": True}, {"seed": 7}):
        train(STAGE1, "out", max_steps=1, keep_in=drive, **options)
        assert (tmp_path / "out" / "stage1" / FINISHED).read_bytes() == (drive / "stage1" / FINISHED).read_bytes()
    assert f"retraining, and replacing {drive / 'stage1'}: seed differ" in capsys.readouterr().out


@pytest.mark.slow
def test_a_kill_after_the_model_was_saved_costs_nothing(train, tmp_path, monkeypatch, capsys):
    """Killed while `training.json` is written, before it is renamed, and before the checkpoints are deleted."""

    class Killed(Exception):
        pass

    replace = Path.replace

    def die(self, target):
        if self.name.startswith(FINISHED):
            raise Killed
        return replace(self, target)

    for place, dying in (("write_text", _dies_at_the_end(Killed)), ("replace", die)):
        with monkeypatch.context() as patch:
            patch.setattr(Path, place, dying)
            with pytest.raises(Killed):
                train(STAGE1, place)
        train(STAGE1, place)
        assert "stage1: resumed from checkpoint-5" in capsys.readouterr().out

    def die_at_checkpoints(path, **_):
        if path.name == "checkpoints" and (path.parent / FINISHED).exists():
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(training.shutil, "rmtree", die_at_checkpoints)
        with pytest.raises(Killed):
            train(STAGE1, "rmtree")
    train(STAGE1, "rmtree")
    assert "already trained" in capsys.readouterr().out
    assert not (tmp_path / "rmtree" / "stage1" / "checkpoints").exists()


def _dies_at_the_end(error):
    write = Path.write_text

    def write_text(self, text, *args, **kwargs):
        if self.name.startswith(FINISHED):
            write(self, text[: len(text) // 2])
            raise error
        return write(self, text, *args, **kwargs)

    return write_text


@pytest.mark.parametrize("step", range(3))
def test_a_kill_while_a_copy_takes_its_place_leaves_one_of_both(tmp_path, monkeypatch, step):
    folder = tmp_path / "stage1"
    folder.mkdir()
    (folder / "a").write_text("old")
    rename, done = Path.rename, []

    def dying(self, target):
        if len(done) == step:
            raise KeyboardInterrupt
        done.append(target)
        return rename(self, target)

    def write(new):
        new.mkdir()
        (new / "a").write_text("new")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", dying)
        if step < 2:
            with pytest.raises(KeyboardInterrupt):
                checkpoints._replace(folder, write)
        else:
            checkpoints._replace(folder, write)
    checkpoints._settle(folder)
    assert (folder / "a").read_text() == ("old" if step == 0 else "new")
    checkpoints._replace(folder, write)
    assert [path.name for path in tmp_path.iterdir()] == ["stage1"]


@pytest.mark.slow
def test_a_copy_is_never_resumed_under_another_recipe(train, tmp_path, die_in_second_epoch, monkeypatch):
    """The first copy under a new recipe fails. The checkpoint of the old one must not pass for it."""
    drive = tmp_path / "drive"
    die_in_second_epoch(STAGE1, "one", keep_in=drive)
    with monkeypatch.context() as patch:
        patch.setattr(
            checkpoints, "_copy_small", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        )
        die_in_second_epoch(STAGE1, "two", seed=7, keep_in=drive)
    found = resumed_at(monkeypatch)
    train(STAGE1, "three", seed=7, keep_in=drive)
    assert found == {"stage1": None}


@pytest.mark.slow
def test_a_full_drive_does_not_end_the_training(train, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "_replace", full)
    train(STAGE1, "out", keep_in=tmp_path / "drive")
    said = capsys.readouterr().out
    assert "stage1: cannot copy checkpoint-5 to" in said
    assert "stage1: cannot copy the finished stage to" in said
    assert (tmp_path / "out" / "stage1" / FINISHED).is_file()


def test_a_drive_that_is_not_mounted_is_named_before_anything_is_done(train, tmp_path):
    with pytest.raises(ModelError, match=r"keep_in is .*MyDrive/x, but .*MyDrive does not exist: mount the drive"):
        train(STAGE1, "out", keep_in=tmp_path / "MyDrive" / "x")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_seconds_add_up_over_an_interruption(train, tmp_path, die_in_second_epoch):
    die_in_second_epoch(STAGE1, "")
    state = json.loads((tmp_path / "stage1" / "checkpoints" / "checkpoint-5" / "trainer_state.json").read_text())
    first = state["log_history"][-1]["elapsed"]
    run = train(STAGE1, "")
    elapsed = [entry["elapsed"] for entry in json.loads((tmp_path / "stage1" / FINISHED).read_text())["log"]]
    assert elapsed == sorted(elapsed)
    assert elapsed[4] == first
    assert run.seconds > elapsed[-1] > first > 0


@pytest.mark.slow
def test_disk_is_what_was_computed(train, processor, rows, tmp_path):
    """The largest sum of file sizes that a thread sees while both stages train, against the computed one."""
    stages = STAGE1, STAGE2
    peak, done = dict.fromkeys((stage.name for stage in stages), 0), threading.Event()
    now = [stages[0].name]

    def look():
        while not done.is_set():
            found = [Path(folder) / name for folder, _, names in os.walk(tmp_path) for name in names]
            with suppress(FileNotFoundError):  # deleted meanwhile: look again
                peak[now[0]] = max(peak[now[0]], sum(path.stat().st_size for path in found))

    watcher = threading.Thread(target=look)
    watcher.start()
    model = fresh()
    try:
        for stage in stages:
            now[0] = stage.name
            train(stage, "", model)
    finally:
        done.set()
        watcher.join()
    needed = checkpoints.disk_needed(model, processor, stages, len(rows["train"]))
    for name, most in peak.items():
        assert most == pytest.approx(needed[name], rel=0.1), name  # tokenizer files and logs come on top


def test_the_profile_hub_needs_at_most_12_gb():
    """SmolVLM2-500M's own config and the 2,958 training rows of the original."""
    config = AutoConfig.for_model("smolvlm", **HUB_CONFIG)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    assert model.num_parameters() == 507_482_304
    processor = loading.load_processor(loading.TINY_BASE)
    processor.image_processor.max_image_size = {"longest_edge": 512}
    loading.set_image_budget(processor, 1)
    hub = PROFILES["hub"]
    halves = [replace(stage, bf16=True) for stage in (hub.stage1, hub.stage2)]  # a GPU takes features in 16 bits
    needed = checkpoints.disk_needed(model, processor, halves, 2958)
    assert max(needed.values()) < 11e9  # one more for the base and the data set
    assert checkpoints.disk_needed(model, processor, [replace(hub.stage1, num_train_epochs=4)], 2958)["stage1"] > 12e9


HUB_CONFIG = {
    "vision_config": {
        "model_type": "smolvlm_vision", "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "patch_size": 16, "image_size": 512,
    },
    "text_config": {
        "model_type": "llama", "hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32,
        "num_attention_heads": 15,
        "num_key_value_heads": 5, "head_dim": 64, "vocab_size": 49280, "tie_word_embeddings": False,
    },
    "scale_factor": 4, "tie_word_embeddings": False,
}  # fmt: skip
