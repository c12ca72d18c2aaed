"""A stage of training: what it moves, its losses, its choice of a checkpoint, and its errors."""

import errno
import json
from collections import namedtuple
from dataclasses import replace

import pytest
import torch
from safetensors import SafetensorError
from trl import SFTConfig

from foodextract.data.dataset import record_of
from foodextract.evaluation import evaluate
from foodextract.evaluation.results import read_results
from foodextract.models import loading
from foodextract.models.loading import ModelError
from foodextract.models.weights import snapshot
from foodextract.names import HUB_BASE, HUB_DATASET
from foodextract.training import checkpoints, freezing
from foodextract.training import run as training
from foodextract.training.config import PROFILES, Lora, Stage, changed
from foodextract.training.rows import held_out_rows
from foodextract.training.run import StageRun, training_arguments
from foodextract.training.trainer import FoodTrainer, _marks, unlikelihood_loss

Usage = namedtuple("Usage", "total used free")
QUICK = {"num_train_epochs": 1, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}  # of 3 steps
STAGE1 = replace(PROFILES["offline"].stage1, **QUICK)
STAGE2 = replace(PROFILES["hub"].stage2, **QUICK)  # the real, very low rate of 2e-6


def equal(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def finished(folder):
    return json.loads((folder / loading.FINISHED).read_text())


def test_stage_1_leaves_vision_bit_identical_and_stage_2_moves_every_tensor(base, train, tmp_path):
    before = snapshot(base)
    by_module = {module.module: module for module in train(STAGE1, model=base).moved}
    assert by_module["vision_model"].weights_moved == 0
    for name, parameter in base.named_parameters():
        assert torch.equal(parameter, before[name]) == name.startswith("model.vision_model"), name
    moved = train(STAGE2, model=base).moved
    assert {module.module for module in moved} == set(by_module)
    for module in moved:
        assert module.tensors_moved == module.tensors, module
        assert module.weights_moved > 0.9 * module.weights, module  # bf16 weights: 4 % at this rate
    assert equal(loading.load_model(tmp_path / "out" / "stage2"), base)
    assert {p.dtype for p in base.parameters()} == {torch.float32}


def test_the_loss_falls(train, tmp_path):
    log = train(replace(STAGE1, num_train_epochs=8, gradient_accumulation_steps=1)).log
    assert log[-1]["loss"] < 0.5 * log[0]["loss"]
    assert finished(tmp_path / "out" / "stage1")["log"] == log
    for entry in log:
        assert entry["loss"] == pytest.approx(entry["answer_loss"] + entry["unlikelihood_loss"], rel=1e-5)


def test_an_interrupted_stage_ends_like_an_uninterrupted_one(train, die_in_second_epoch, tmp_path):
    stage = replace(STAGE1, num_train_epochs=2)
    whole = train(stage, "whole").model
    die_in_second_epoch(stage, "broken")
    assert not (tmp_path / "broken" / "stage1" / loading.FINISHED).exists()
    torch.testing.assert_close(snapshot(train(stage, "broken").model), snapshot(whole))


def test_another_recipe_starts_afresh(train, tmp_path):
    stale = tmp_path / "out" / "stage1" / "checkpoints"
    stale.mkdir(parents=True)
    (stale / "recipe.json").write_text("{}")
    (stale / "checkpoint-999").mkdir()
    train(STAGE1, max_steps=1)
    assert not stale.exists()


def test_nan_is_an_error_with_a_remedy(base, train, tmp_path):
    with torch.no_grad():
        base.model.connector.modality_projection.proj.weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match="stage1: the loss became NaN at step 1; lower its learning rate"):
        train(STAGE1, model=base)
    assert not (tmp_path / "out" / "stage1" / loading.FINISHED).exists()


def test_freezing_what_is_not_there_is_an_error(base):
    with pytest.raises(ModelError, match=r"nothing to freeze under 'vision'.*vision_model"):
        freezing.freeze(base, ["vision"])


def test_table_counts_every_parameter(base):
    freezing.freeze(base, STAGE1.freeze)
    table = {line["module"]: line for line in freezing.trainable_table(base)}
    assert sum(line["parameters"] for line in table.values()) == sum(p.numel() for p in base.parameters())
    assert table["vision_model"]["trainable"] == 0
    assert table["text_model"]["trainable"] == table["text_model"]["parameters"] > 0


def test_profiles_differ_from_the_original_recipe_only_where_they_say():
    hub, original = PROFILES["hub"], {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4}
    assert hub.stage1 == Stage("stage1", ("model.vision_model",), 2e-4, num_train_epochs=2, **original)
    assert hub.stage2 == Stage("stage2", (), 2e-6, num_train_epochs=2, **original)
    assert (hub.base_model, hub.dataset_id) == (HUB_BASE, HUB_DATASET)
    assert PROFILES["offline"].base_model == str(loading.TINY_BASE)
    assert hub.tiles == PROFILES["offline"].tiles == 1


def test_values_of_a_stage_may_come_as_yaml_spells_them():
    given = {"learning_rate": "2e-5", "freeze": ["model.connector"], "lora": {"r": 4}}  # 2e-5 is a string in YAML
    assert changed(STAGE1, given) == replace(STAGE1, learning_rate=2e-5, freeze=("model.connector",), lora=Lora(r=4))
    for wrong, message in (
        ({"rate": 1}, "rate: unexpected keyword"),
        ({"per_device_train_batch_size": 1.5}, "per_device_train_batch_size"),
        ({"lora": {"rank": 4}}, "lora.*rank: "),
        ({"target": "yaml"}, "target"),
        ({"name": "../stage2"}, "keeps its name"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps"),
        ({"num_train_epochs": -1}, "num_train_epochs"),
    ):
        with pytest.raises(ModelError, match=f"stage1: .*{message}"):
            changed(STAGE1, wrong)


def test_settings_that_cannot_train_are_named_before_an_image_is_prepared(train, monkeypatch):
    monkeypatch.setattr("foodextract.training.cache.prepare", lambda *_, **options: pytest.fail("prepared"))
    with pytest.raises(ModelError, match=r"stage1: validation_rows leaves none of \d+ rows to train on; lower it"):
        train(replace(STAGE1, validation_rows=10_000))
    with pytest.raises(ModelError, match="stage1: cosin is not a valid SchedulerType"):
        train(replace(STAGE1, lr_scheduler_type="cosin"))
    for tracker in ("json", "a.b"):
        with pytest.raises(ModelError, match="nothing can be reported to"):
            train(STAGE1, report_to=tracker)


# --- validation


def test_the_epoch_with_the_best_answers_is_kept(base, train, tmp_path, monkeypatch):
    scores, kept = iter([0.25, 0.75, 0.5]), {}  # after each epoch; the second is best

    def score(self):
        value = next(scores)
        kept[value] = snapshot(self.model)
        return value

    monkeypatch.setattr(StageRun, "score", score)
    train(replace(STAGE1, num_train_epochs=3, validation_rows=8, learning_rate=1e-3), model=base)
    assert all(torch.equal(a, b) for a, b in zip(snapshot(base).values(), kept[0.75].values(), strict=True))
    log = finished(tmp_path / "out" / "stage1")["log"]
    assert [entry["eval_item_f1"] for entry in log if "eval_item_f1" in entry] == [0.25, 0.75, 0.5]


def test_validation_scores_generated_answers(train, tmp_path):
    train(replace(STAGE1, validation_rows=8))
    log = finished(tmp_path / "out" / "stage1")["log"]
    assert [0 <= entry["eval_item_f1"] <= 1 for entry in log if "eval_item_f1" in entry] == [True]


def test_validation_forgives_what_a_label_does_not_claim_to_name(base, processor, rows, tmp_path, monkeypatch):
    """Answers with every item and one more are perfect only where labels name the main item alone."""
    split = rows["train"].map(lambda row: {"food_items": row["food_items"] or ["pie"], "is_food": 1})
    found = {}
    for scope in ("primary", "exhaustive"):
        scoped = split.map(lambda row, scope=scope: {"label_scope": scope})
        run = StageRun(base, processor, replace(STAGE1, validation_rows=8), scoped, tmp_path / scope)
        held = scoped.select(held_out_rows(scoped, 8)).remove_columns("image")
        generous = [
            record.model_copy(update={"drink_items": [*record.drink_items, "air"]}).to_json()
            for record in map(record_of, held)
        ]
        monkeypatch.setattr(evaluate, "predict", lambda *_, generous=generous: generous)
        found[scope] = run.score()
    assert found["primary"] == 1
    assert found["exhaustive"] < 0.9


def test_validation_rows_do_not_depend_on_order_and_keep_groups_whole(rows):
    split = rows["train"]
    chosen = held_out_rows(split, 10)
    assert 10 <= len(chosen) < 20
    assert not {split[n]["group"] for n in chosen} & {split[n]["group"] for n in range(len(split)) if n not in chosen}
    backwards = split.select(range(len(split) - 1, -1, -1))
    assert {split[n]["name"] for n in chosen} == {backwards[n]["name"] for n in held_out_rows(backwards, 10)}
    assert held_out_rows(split, 0) == []


# --- memory and disk


def test_out_of_memory_shrinks_batches_and_keeps_the_effective_batch(train, monkeypatch, capsys):
    stage, log = replace(STAGE1, per_device_train_batch_size=8, gradient_accumulation_steps=1), {}
    compute = FoodTrainer.compute_loss
    for limit in (8, 2):

        def small(self, model, inputs, *args, limit=limit, **kwargs):
            if len(inputs["input_ids"]) > limit:
                raise torch.OutOfMemoryError
            return compute(self, model, inputs, *args, **kwargs)

        monkeypatch.setattr(FoodTrainer, "compute_loss", small)
        log[limit] = train(stage, str(limit)).log
    assert "batches of 2 x 4" in capsys.readouterr().out
    for part in ("loss", "answer_loss", "unlikelihood_loss"):
        assert [entry[part] for entry in log[2]] == pytest.approx([entry[part] for entry in log[8]], rel=1e-3)


@pytest.mark.slow
def test_out_of_memory_in_a_later_step_starts_from_the_same_weights(train, monkeypatch):
    stage = replace(STAGE1, per_device_train_batch_size=8, gradient_accumulation_steps=1)
    expected, failed, compute = train(stage, "whole").log, [], FoodTrainer.compute_loss

    def once(self, model, inputs, *args, **kwargs):
        if self.state.global_step == 2 and not failed:
            failed.append(True)
            raise torch.OutOfMemoryError
        return compute(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(FoodTrainer, "compute_loss", once)
    assert [e["loss"] for e in train(stage).log] == pytest.approx([e["loss"] for e in expected], rel=1e-3)


@pytest.mark.slow
def test_not_even_one_image_fits(train, monkeypatch):
    def never(*args, **kwargs):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(FoodTrainer, "compute_loss", never)
    with pytest.raises(ModelError, match="stage1: not even one image at a time fits into memory"):
        train(STAGE1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        OSError("Not enough free space to write 40000000 bytes after offset 128"),
    ],
    ids=["kernel", "safetensors", "numpy"],
)
def test_a_full_disk_leaves_the_last_checkpoint(train, tmp_path, monkeypatch, error):
    save = FoodTrainer._save_optimizer_and_scheduler

    def full(self, folder):
        if self.state.epoch > 1.5:
            raise error
        save(self, folder)

    monkeypatch.setattr(FoodTrainer, "_save_optimizer_and_scheduler", full)
    with pytest.raises(ModelError, match=r"the disk of .* is full; free some space and rerun"):
        train(replace(STAGE1, num_train_epochs=3))  # no checkpoint is written after the last
    folder = tmp_path / "out" / "stage1" / "checkpoints"
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-6"}
    assert checkpoints.last_checkpoint(folder) == str(folder / "checkpoint-3")  # the other one is not whole


@pytest.mark.slow
def test_a_full_disk_is_named_where_torch_does_not_say_so(tmp_path, monkeypatch):
    def fail():
        with checkpoints.full_disk_named("stage1", tmp_path):
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")  # torch.save

    with pytest.raises(RuntimeError, match="unexpected pos"):
        fail()
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda _: Usage(total=10**9, used=10**9, free=0))
    with pytest.raises(ModelError, match=r"stage1: the disk of .* is full; free some space"):
        fail()


# --- augmentation and losses


@pytest.mark.parametrize("cache", [True, False])
def test_augmentation_changes_images_but_not_those_held_out(base, processor, rows, tmp_path, cache):
    stage = replace(STAGE1, augment=True, cache=cache, validation_rows=4)
    run = StageRun(base, processor, stage, rows["train"], tmp_path)
    trainer = run.build_trainer(training_arguments(run))
    images = "pixels" if cache else "pixel_values"

    def batches(data):
        return [trainer.data_collator([data[0]])[images] for _ in range(2)]

    changing = batches(trainer.train_dataset)
    assert changing[0].shape == changing[1].shape == torch.Size([1, 1, 3, 192, 192])
    assert not torch.equal(*changing)
    assert torch.equal(*(next(iter(trainer.get_eval_dataloader()))[images] for _ in range(2)))
    tiled = loading.load_processor(loading.TINY_BASE, tiles=5)
    with pytest.raises(ModelError, match="several tiles cannot be augmented"):
        StageRun(base, tiled, stage, rows["test"], tmp_path / "tiled").rows()


def test_a_word_costs_where_its_title_or_list_holds_it_already(processor):
    """Against a loop in words: the text between two brackets is one list, and a label's own next word never costs."""
    tokenizer = processor.tokenizer
    texts = [
        ' {"image_title": "red apple and apple pie", "food_items": ["red apple", "apple pie"], "drink_items": ["tea"]}',
        ' {"is_food": 0}',
    ]
    tokens = [[*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id] for text in texts]
    targets = torch.tensor([token for row in tokens for token in row])
    rows = torch.tensor([number for number, row in enumerate(tokens) for _ in row])
    logits = torch.randn(len(targets), len(tokenizer), generator=torch.Generator().manual_seed(1))
    wanted, pairs = 0.0, 0
    for row in range(len(texts)):
        said = set()
        for place in (rows == row).nonzero()[:, 0]:
            target = targets[place].item()
            text = "" if target == tokenizer.eos_token_id else tokenizer.decode([target])
            said = set() if "[" in text else said
            for word in said - {target}:
                wanted -= torch.log1p(-logits[place].softmax(-1)[word]).item()
                pairs += 1
            said |= {target} if any(map(str.isalpha, text)) else set()
    assert pairs > 50
    assert unlikelihood_loss(logits, targets, rows, *_marks(tokenizer)).item() == pytest.approx(wanted, rel=1e-5)


def test_the_unlikelihood_loss_is_part_of_the_loss(base, processor, rows, tmp_path):
    losses = []
    for weight in (0, 1, 3):
        run = StageRun(base, processor, replace(STAGE1, unlikelihood_weight=weight), rows["train"], tmp_path)
        trainer = run.build_trainer(training_arguments(run))
        batch = trainer.data_collator([{"row": number} for number in range(4)])
        losses.append(trainer.compute_loss(base, batch).item())
    assert losses[2] - losses[0] == pytest.approx(3 * (losses[1] - losses[0]), rel=1e-3)
    assert losses[1] > losses[0]


# --- settings, speed and trackers


def test_settings_reach_trl(base, processor, rows, tmp_path):
    stage = replace(STAGE1, torch_compile=True, save_steps=7, validation_rows=4)
    args = training_arguments(StageRun(base, processor, stage, rows["train"], tmp_path, max_steps=5, seed=3))
    assert isinstance(args, SFTConfig)
    assert {name: getattr(args, name) for name in stage.arguments()} == stage.arguments()
    assert (args.max_length, args.activation_checkpointing, args.torch_compile, args.seed) == (None, False, True, 3)
    assert (args.max_steps, args.save_steps, args.eval_steps) == (5, 7, 7)
    assert args.metric_for_best_model == "item_f1"


def test_the_speed_of_a_stage_is_saved(train, tmp_path):
    train(STAGE1)
    measured = {row.metric: row for row in read_results(tmp_path / "out" / "stage1" / training.PERFORMANCE)}
    assert measured["images_per_second"].subject == "stage1"
    assert measured["images_per_second"].n == 2 * 16  # three steps of 16, without the first
    assert measured["mfu"].value > 0
    assert measured["peak_memory_gib"].value > 0.1


@pytest.mark.parametrize("keep", [False, True])
def test_features_stay_on_the_disk_only_on_request(train, tmp_path, keep):
    train(replace(STAGE1, keep_features=keep), max_steps=1)
    stored = [path.suffix for path in tmp_path.glob("out/prepared-*/features-*")]
    assert sorted(stored) == ([".bin"] if keep else [])


def test_a_tracker_that_is_not_installed_is_named_before_anything_is_done(train, tmp_path):
    with pytest.raises(ModelError, match="nothing can be reported to 'tensorbored': `pip install tensorbored` first"):
        train(STAGE1, report_to="tensorbored")
    assert not (tmp_path / "out").exists()


def test_losses_can_be_watched_in_tensorboard(train, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = train(STAGE1, max_steps=2, report_to="tensorboard").log
    events = accumulator.EventAccumulator(str(tmp_path / "out" / "runs" / "stage1")).Reload()
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx([entry["loss"] for entry in log])


@pytest.mark.slow
def test_bf16_on_a_cpu_on_request(train, tmp_path):
    exact, rounded = train(STAGE1, "fp32", max_steps=1), train(replace(STAGE1, bf16=True), "bf16", max_steps=1)
    assert rounded.log[0]["loss"] != exact.log[0]["loss"]
    assert rounded.log[0]["loss"] == pytest.approx(exact.log[0]["loss"], rel=0.02)
    assert {parameter.dtype for parameter in rounded.model.parameters()} == {torch.float32}
    precision = finished(tmp_path / "bf16" / "stage1")["precision"]
    assert precision == "fp32 weights, bf16 autocast: the stage asks for it"


def test_a_finished_stage_is_not_trained_twice(train, capsys):
    once = train(STAGE1, max_steps=1)
    again = train(STAGE1, max_steps=1)
    assert (again.log, again.moved, again.seconds) == (once.log, once.moved, once.seconds)
    assert once.seconds > 0
    assert "stage1: already trained" in capsys.readouterr().out
    assert equal(again.model, once.model)
    train(STAGE1, max_steps=1, seed=7)
    assert "seed differ from the run there" in capsys.readouterr().out
    train(STAGE1, max_steps=1, seed=7, retrain=True)
    assert "already trained" not in capsys.readouterr().out
