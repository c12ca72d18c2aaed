import errno
import json
from collections import namedtuple
from dataclasses import replace

import pytest
import torch
from safetensors import SafetensorError
from trl import SFTConfig

from foodextract.data.dataset import record_of
from foodextract.evaluation.results import read_results
from foodextract.models import loading, weights
from foodextract.models.loading import ModelError
from foodextract.training import checkpoints, freezing
from foodextract.training import run as training
from foodextract.training.config import Stage, changed, training_config
from foodextract.training.lora import Lora
from foodextract.training.presets import PROFILES
from foodextract.training.trainer import PreparedTrainer, _marks, said_again

Usage = namedtuple("Usage", "total used free")
QUICK = {"epochs": 1, "batch_size": 8, "accumulation": 2}
STAGE1 = replace(PROFILES["offline"].stage1, **QUICK)
CPU = loading.choose_precision(torch.device("cpu"), training=True)
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
        assert m.weights_moved > 0.9 * m.weights, (
            m
        )  # pure bf16 weights move 4 % at this rate; fp32 master weights move nearly all
    saved = loading.load_model(tmp_path / "stage2")
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), base.parameters(), strict=True))
    assert {p.dtype for p in base.parameters()} == {torch.float32}


def test_the_loss_falls(base, processor, rows, tmp_path):
    log, _ = training.train_stage(base, processor, replace(STAGE1, epochs=8, accumulation=1), rows["train"], tmp_path)
    assert log[-1]["loss"] < 0.5 * log[0]["loss"]
    written = json.loads((tmp_path / "stage1" / loading.FINISHED).read_text())
    assert written["log"] == log


def test_an_interrupted_stage_ends_like_an_uninterrupted_one(processor, rows, tmp_path, die_in_second_epoch):
    stage = replace(STAGE1, epochs=2)
    whole = loading.load_model(loading.TINY_BASE, torch.device("cpu"), training=True)
    training.train_stage(whole, processor, stage, rows["train"], tmp_path / "whole")

    broken = loading.load_model(loading.TINY_BASE, torch.device("cpu"), training=True)
    die_in_second_epoch(broken, processor, stage, rows["train"], tmp_path / "broken")
    assert not (tmp_path / "broken" / "stage1" / loading.FINISHED).exists()
    again = loading.load_model(loading.TINY_BASE, torch.device("cpu"), training=True)
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
    assert not (tmp_path / "stage1" / loading.FINISHED).exists()


def test_freezing_what_is_not_there_is_an_error(base):
    with pytest.raises(ModelError, match=r"nothing to freeze under 'vision'.*vision_model"):
        freezing.freeze(base, ["vision"])


def test_table_counts_every_parameter(base):
    freezing.freeze(base, STAGE1.freeze)
    table = {line["module"]: line for line in freezing.trainable_table(base)}
    assert sum(line["parameters"] for line in table.values()) == sum(p.numel() for p in base.parameters())
    assert table["vision_model"]["trainable"] == 0
    assert table["text_model"]["trainable"] == table["text_model"]["parameters"] > 0


def test_profiles_differ_from_the_originals_recipe_only_where_they_say():
    hub = PROFILES["hub"]
    assert hub.stage1 == Stage(
        "stage1", freeze=("model.vision_model",), learning_rate=2e-4, epochs=2, batch_size=8, accumulation=4
    )
    assert hub.stage2 == Stage("stage2", freeze=(), learning_rate=2e-6, epochs=2, batch_size=8, accumulation=4)
    assert hub.tiles == PROFILES["offline"].tiles == 1


def test_the_epoch_with_the_best_answers_is_kept(base, processor, rows, tmp_path, monkeypatch):
    scores = iter([0.25, 0.75, 0.5])  # after each epoch; the second is best
    kept = {}

    def score(trainer):
        value = next(scores)
        kept[value] = weights.snapshot(trainer.model)
        return value

    evaluate = PreparedTrainer.evaluate

    def evaluated(self, *args, **kwargs):
        self.score = lambda: score(self)
        return evaluate(self, *args, **kwargs)

    monkeypatch.setattr(PreparedTrainer, "evaluate", evaluated)
    stage = replace(STAGE1, epochs=3, validation=8, learning_rate=1e-3)
    training.train_stage(base, processor, stage, rows["train"], tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(weights.snapshot(base).values(), kept[0.75].values(), strict=True))
    log = json.loads((tmp_path / "stage1" / loading.FINISHED).read_text())["log"]
    assert [entry["eval_item_f1"] for entry in log if "eval_item_f1" in entry] == [0.25, 0.75, 0.5]


def test_validation_scores_generated_answers(base, processor, rows, tmp_path):
    stage = replace(STAGE1, validation=8)
    training.train_stage(base, processor, stage, rows["train"], tmp_path)
    log = json.loads((tmp_path / "stage1" / loading.FINISHED).read_text())["log"]
    assert [0 <= entry["eval_item_f1"] <= 1 for entry in log if "eval_item_f1" in entry] == [True]


def test_validation_forgives_what_a_label_does_not_claim_to_name(base, processor, rows, tmp_path, monkeypatch):
    """Answers that name every item and one more: perfect where labels name only the main item, and not so where they name all."""
    split = rows["train"].map(lambda row: {"food_items": row["food_items"] or ["pie"], "is_food": 1})
    found = {}
    for scope in ("primary", "exhaustive"):
        scoped = split.map(lambda row, scope=scope: {"label_scope": scope})
        held = scoped.select(training.validation_rows(scoped, 8)).remove_columns("image")
        generous = [
            record.model_copy(update={"drink_items": [*record.drink_items, "air"]}).to_json()
            for record in map(record_of, held)
        ]
        monkeypatch.setattr(training.evaluation, "ask", lambda *_, generous=generous: generous)
        training.train_stage(base, processor, replace(STAGE1, validation=8), scoped, tmp_path / scope, max_steps=1)
        log = json.loads((tmp_path / scope / "stage1" / loading.FINISHED).read_text())["log"]
        found[scope] = next(entry["eval_item_f1"] for entry in log if "eval_item_f1" in entry)
    assert found["primary"] == 1
    assert found["exhaustive"] < 0.9


def test_values_of_a_stage_may_come_as_yaml_spells_them():
    given = {
        "learning_rate": "2e-5",
        "epochs": 3,
        "freeze": ["model.connector"],
        "lora": {"rank": 4},
    }  # 2e-5 is a text in YAML
    stage = changed(STAGE1, given)
    assert stage == replace(STAGE1, learning_rate=2e-5, epochs=3, freeze=("model.connector",), lora=Lora(rank=4))
    for wrong, message in (
        ({"rate": 1}, "rate: unexpected keyword"),
        ({"batch_size": 1.5}, "batch_size"),
        ({"lora": {"r": 4}}, "lora.*r: "),
    ):
        with pytest.raises(ModelError, match=f"stage1: .*{message}"):
            changed(STAGE1, wrong)


def test_validation_rows_do_not_depend_on_order_and_keep_groups_whole(rows):
    split = rows["train"]
    chosen = training.validation_rows(split, 10)
    assert 10 <= len(chosen) < 20
    assert not {split[n]["group"] for n in chosen} & {split[n]["group"] for n in range(len(split)) if n not in chosen}
    backwards = split.select(range(len(split) - 1, -1, -1))
    assert {split[n]["name"] for n in chosen} == {backwards[n]["name"] for n in training.validation_rows(backwards, 10)}
    assert training.validation_rows(split, 0) == []


def test_when_memory_does_not_suffice_batches_shrink_and_the_effective_batch_stays(
    processor, rows, tmp_path, monkeypatch, capsys
):
    stage = replace(STAGE1, batch_size=8, accumulation=1)
    log = {}
    for limit in (8, 2):
        compute = PreparedTrainer.compute_loss

        def small(self, model, inputs, *args, limit=limit, compute=compute, **kwargs):
            if len(inputs["input_ids"]) > limit:
                raise torch.OutOfMemoryError
            return compute(self, model, inputs, *args, **kwargs)

        model = loading.load_model(loading.TINY_BASE, torch.device("cpu"), training=True)
        with monkeypatch.context() as patch:
            patch.setattr(PreparedTrainer, "compute_loss", small)
            log[limit], _ = training.train_stage(model, processor, stage, rows["train"], tmp_path / str(limit))
    assert "going on with batches of 2 x 4" in capsys.readouterr().out
    assert [entry["loss"] for entry in log[2]] == pytest.approx([entry["loss"] for entry in log[8]], rel=1e-3)


def test_not_even_one_image_fits(base, processor, rows, tmp_path, monkeypatch):
    def never(*args, **kwargs):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(PreparedTrainer, "compute_loss", never)
    with pytest.raises(ModelError, match="stage1: not even one image at a time fits into memory"):
        training.train_stage(base, processor, STAGE1, rows["train"], tmp_path)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        OSError("Not enough free space to write 40000000 bytes after offset 128"),
    ],
    ids=["kernel", "safetensors", "numpy"],
)
def test_a_full_disk_leaves_the_last_checkpoint(base, processor, rows, tmp_path, monkeypatch, error):
    stage = replace(STAGE1, epochs=3)  # no checkpoint is written after the last
    save = PreparedTrainer._save_optimizer_and_scheduler

    def full(self, folder):
        if self.state.epoch > 1.5:
            raise error
        save(self, folder)

    with monkeypatch.context() as patch:
        patch.setattr(PreparedTrainer, "_save_optimizer_and_scheduler", full)
        with pytest.raises(ModelError, match=r"the disk of .* is full; free some space and rerun"):
            training.train_stage(base, processor, stage, rows["train"], tmp_path)
    folder = tmp_path / "stage1" / "checkpoints"
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-6"}  # 3 steps an epoch
    assert checkpoints.last_checkpoint(folder) == str(folder / "checkpoint-3")  # the other one is not whole


def test_torch_does_not_say_that_the_disk_is_full_but_it_is(tmp_path, monkeypatch):
    def fail():
        with checkpoints.full_disk_named("stage1", tmp_path):
            raise RuntimeError(
                "[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"
            )  # what torch.save then says

    with pytest.raises(RuntimeError, match="unexpected pos"):
        fail()
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda _: Usage(total=10**9, used=10**9, free=0))
    with pytest.raises(ModelError, match=r"stage1: the disk of .* is full; free some space"):
        fail()


def test_augmentation_changes_images_and_leaves_no_features(base, processor, rows, tmp_path):
    ready = training._prepared(base, processor, replace(STAGE1, augment=True), rows["train"], _folder(tmp_path), CPU)
    assert ready.features is None
    first, second = ready.gather([0])["pixels"], ready.gather([0])["pixels"]
    assert first.shape == second.shape == torch.Size([1, 1, 3, 192, 192])
    assert not torch.equal(first, second)
    trainer = PreparedTrainer(base, _config(tmp_path), prepared=ready, held_out=[1], processing_class=processor)
    still = [trainer.data_collator([{"row": 1}])["pixels"] for _ in range(2)]
    assert torch.equal(still[0], still[1])  # what is measured is not augmented
    assert not torch.equal(trainer.data_collator([{"row": 0}])["pixels"], trainer.data_collator([{"row": 0}])["pixels"])
    tiled = loading.load_processor(loading.TINY_BASE, tiles=5)
    with pytest.raises(ModelError, match="several tiles cannot be augmented"):
        training._prepared(base, tiled, replace(STAGE1, augment=True), rows["test"], _folder(tmp_path), CPU)


def test_a_word_costs_where_its_title_or_list_holds_it_already(processor):
    """Against a loop in words: whatever stands between two brackets is one list, and a label's own next word never costs."""
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
    assert said_again(logits, targets, rows, *_marks(tokenizer)).item() == pytest.approx(wanted, rel=1e-5)


def test_what_costs_repeats_is_part_of_the_loss(base, processor, rows, tmp_path):
    ready = training._prepared(base, processor, STAGE1, rows["train"], _folder(tmp_path), CPU)
    batch = ready.gather([0, 1, 2, 3])
    losses = []
    for weight in (0, 1, 3):
        trainer = PreparedTrainer(
            base, _config(tmp_path), prepared=ready, against_repeats=weight, processing_class=processor
        )
        losses.append(trainer.compute_loss(base, dict(batch)).item())
    assert losses[2] - losses[0] == pytest.approx(3 * (losses[1] - losses[0]), rel=1e-3)
    assert losses[1] > losses[0]


def test_the_plain_path_refuses_what_only_the_fast_one_has(base, processor, rows, tmp_path):
    for only in ({"augment": True}, {"against_repeats": 1.0}, {"whole_text": True}, {"target": "repr"}):
        with pytest.raises(ModelError, match="belong to the fast path"):
            training.train_stage(
                base,
                processor,
                replace(STAGE1, **{"against_repeats": 0, "fast": False, **only}),
                rows["train"],
                tmp_path,
            )


def _config(tmp_path):
    return SFTConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        report_to="none",
        remove_unused_columns=False,
        activation_checkpointing=False,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
    )


def _folder(tmp_path):
    folder = tmp_path / "stage1" / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def test_what_was_fast_is_written_down(base, processor, rows, tmp_path):
    training.train_stage(base, processor, STAGE1, rows["train"], tmp_path)
    measured = {row.metric: row for row in read_results(tmp_path / "stage1" / training.PERFORMANCE)}
    assert measured["images_per_second"].subject == "stage1"
    assert measured["images_per_second"].n == 2 * 16  # three steps of 16, the last of 8; the first is left out
    assert measured["mfu"].value > 0
    assert measured["peak_memory_gib"].value > 0.1


def test_a_tracker_that_is_not_installed_is_named_before_anything_is_done(base, processor, rows, tmp_path):
    with pytest.raises(ModelError, match="nothing can be reported to 'tensorbored': `pip install tensorbored` first"):
        training.train_stage(base, processor, STAGE1, rows["train"], tmp_path / "out", report_to="tensorbored")
    assert not (tmp_path / "out").exists()


def test_losses_can_be_watched_in_tensorboard(base, processor, rows, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log, _ = training.train_stage(
        base, processor, STAGE1, rows["train"], tmp_path, max_steps=2, report_to="tensorboard"
    )
    events = accumulator.EventAccumulator(str(tmp_path / "runs" / "stage1")).Reload()
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx([entry["loss"] for entry in log])


def test_bf16_on_a_cpu_on_request(base, processor, rows, tmp_path):
    exact, _ = training.train_stage(base, processor, STAGE1, rows["train"], tmp_path / "fp32", max_steps=1)
    again = loading.load_model(loading.TINY_BASE, torch.device("cpu"), training=True)
    rounded, _ = training.train_stage(
        again, processor, replace(STAGE1, bf16=True), rows["train"], tmp_path / "bf16", max_steps=1
    )
    assert rounded[0]["loss"] != exact[0]["loss"]
    assert rounded[0]["loss"] == pytest.approx(exact[0]["loss"], rel=0.02)
    assert {parameter.dtype for parameter in again.parameters()} == {torch.float32}
    written = json.loads((tmp_path / "bf16" / "stage1" / loading.FINISHED).read_text())
    assert written["precision"] == "fp32 weights, bf16 autocast: the stage asks for it"


def test_compiling_is_left_to_transformers(tmp_path):
    for wanted in (True, False):
        config = training_config(replace(STAGE1, compile=wanted), CPU, torch.device("cpu"), tmp_path)
        assert config.torch_compile is wanted


def test_a_finished_stage_is_not_trained_twice(base, processor, rows, tmp_path, capsys):
    once = training.train_stage(base, processor, STAGE1, rows["train"], tmp_path, max_steps=1)
    seconds = training.seconds_of(tmp_path / "stage1")
    again = fresh()
    assert training.train_stage(again, processor, STAGE1, rows["train"], tmp_path, max_steps=1) == once
    assert "stage1: already trained" in capsys.readouterr().out
    assert training.seconds_of(tmp_path / "stage1") == seconds > 0
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), base.parameters(), strict=True))
    training.train_stage(fresh(), processor, STAGE1, rows["train"], tmp_path, max_steps=1, seed=7)
    assert "seed differ from the run there" in capsys.readouterr().out
    training.train_stage(fresh(), processor, STAGE1, rows["train"], tmp_path, max_steps=1, seed=7, retrain=True)
    assert "already trained" not in capsys.readouterr().out


def fresh():
    return loading.load_model(loading.TINY_BASE, torch.device("cpu"), training=True)
