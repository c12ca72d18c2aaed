"""The archived recipes: their values, their adapters, their captions, and the ablation's arithmetic."""

import json
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

import papermill
import peft
import pytest
import torch

import ablation
import blip
import captioning
import gemma
import recipes
from foodextract.data.dataset import as_conversations
from foodextract.data.sources import FOOD101
from foodextract.evaluation import evaluate
from foodextract.evaluation.results import make_row, read_results
from foodextract.inference import blip as captioner
from foodextract.inference.extractor import Extractor
from foodextract.models import loading, precision
from foodextract.models.loading import ModelError
from foodextract.names import HUB_DATASET
from foodextract.training.collate import IGNORED, Collator, audit
from foodextract.training.config import VISION, Lora, Stage
from foodextract.training.run import train_stage

EXPERIMENTS = Path(recipes.__file__).parent
SMALL_256M = "HuggingFaceTB/SmolVLM2-256M-Video-Instruct"
CPU = torch.device("cpu")


def parameters(name, profile, monkeypatch):
    """What the notebook's parameters cell says in that profile."""
    monkeypatch.setenv("FOODEXTRACT_PROFILE", profile)
    cells = json.loads((EXPERIMENTS / f"{name}.ipynb").read_text())["cells"]
    [cell] = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    found = {}
    exec("import os\n" + "".join(cell["source"]), found)
    return found


# --- recipes


@pytest.mark.parametrize(
    ("name", "base", "rates", "batches", "lora"),
    [
        ("gemma_3n_lora", "google/gemma-3n-E2B-it", [2e-5], (8, 8), (16, 8, 0.05)),
        ("smolvlm2_256m_lora", SMALL_256M, [2e-4], (4, 4), (16, 16, 0.05)),
        ("smolvlm2_256m_two_stage", SMALL_256M, [2e-4, 2e-6], (4, 4), None),
    ],
)
def test_recipes_are_those_of_the_originals(name, base, rates, batches, lora, monkeypatch):
    recipe = recipes.Recipe(**parameters(name, "hub", monkeypatch)["hub"])
    stages = recipe.stages()
    assert (recipe.base, recipe.data) == (base, HUB_DATASET)
    assert [stage.learning_rate for stage in stages] == rates
    for stage in stages:
        assert (stage.per_device_train_batch_size, stage.gradient_accumulation_steps) == batches
        assert stage.num_train_epochs == 1
        assert (stage.lora and (stage.lora.r, stage.lora.lora_alpha, stage.lora.lora_dropout)) == lora


def test_what_is_special_in_each_recipe(monkeypatch):
    [tuned] = recipes.Recipe(**parameters("gemma_3n_lora", "hub", monkeypatch)["hub"]).stages()
    assert (tuned.save_steps, tuned.metric_for_best_model) == (5, "loss")
    assert tuned.validation_rows > 0
    assert (tuned.lora.exclude_modules, tuned.lora.modules_to_save) == (None, ())
    [tuned] = recipes.Recipe(**parameters("smolvlm2_256m_lora", "hub", monkeypatch)["hub"]).stages()
    assert tuned.freeze == (VISION,)
    assert list(tuned.lora.modules_to_save) == ["lm_head", "embed_tokens"]
    first, second = recipes.Recipe(**parameters("smolvlm2_256m_two_stage", "hub", monkeypatch)["hub"]).stages()
    assert (first.freeze, second.freeze) == ((VISION,), ())
    captions = captioning.Captioning(**parameters("blip_partial", "hub", monkeypatch)["hub"])
    assert (captions.base, captions.data) == ("Salesforce/blip-image-captioning-base", FOOD101)
    assert captioning.TARGET == "a photo of delicious {}"


def test_an_experiment_replaces_its_own_rows_only(tmp_path):
    def row(experiment, value):
        return make_row(experiment, "base", "strict_json_rate", value, n=1, command="c")

    recipes.keep(tmp_path / "r.json", [row("b", 0.1)])
    recipes.keep(tmp_path / "r.json", [row("a", 0.2)])
    recipes.keep(tmp_path / "r.json", [row("b", 0.3)])
    assert [(r.benchmark, r.value) for r in read_results(tmp_path / "r.json")] == [("a", 0.2), ("b", 0.3)]


# --- adapters


LORA = Lora(4, 8, 0.0, exclude_modules=r".*vision_model.*", modules_to_save=("lm_head", "embed_tokens"))
QUICK = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
TUNE = Stage("tuned", (VISION,), 5e-3, num_train_epochs=1, lora=LORA, **QUICK)


def test_only_excluding_keeps_adapters_out_of_the_vision_tower(base):
    frozen = loading.load_model(loading.TINY_BASE, CPU, training=True)
    everywhere = recipes.adapted_modules(peft.get_peft_model(frozen, replace(LORA, exclude_modules=None).config()))
    layers = base.config.vision_config.num_hidden_layers
    assert len([name for name in everywhere if "vision_model" in name]) == 6 * layers
    names = recipes.adapted_modules(peft.get_peft_model(base, LORA.config()))
    assert "model.text_model.layers.0.self_attn.q_proj" in names
    assert not [name for name in names if "vision_model" in name]
    assert not [name for name, p in base.named_parameters() if p.requires_grad and "vision_model" in name]


@pytest.mark.slow
def test_merged_saved_and_loaded_adapters_answer_alike(base, processor, rows, train, tmp_path):
    before = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
    run = train(replace(TUNE, num_train_epochs=4), "", base)
    assert run.log[-1]["loss"] < 0.7 * run.log[0]["loss"]
    by_module = {m.module: m for m in run.moved}
    assert by_module["vision_model"].weights_moved == 0
    assert by_module["lm_head"].weights_moved > 0
    merged = dict(base.named_parameters())
    assert not torch.equal(
        merged["lm_head.weight"], merged["model.text_model.embed_tokens.weight"]
    )  # trained apart, and saved so
    assert set(before) <= set(merged)
    fresh = loading.load_model(loading.TINY_BASE, CPU)
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "tuned" / "adapter").get_base_model()
    saved = loading.load_model(tmp_path / "tuned", CPU)
    images = [row["image"].convert("RGB") for row in rows["test"].select(range(8))]
    finished = train(replace(TUNE, num_train_epochs=4), "").model  # not trained again
    assert all(torch.equal(a, b) for a, b in zip(finished.parameters(), base.parameters(), strict=True))
    answers = [Extractor(model, processor).generate_texts(images) for model in (base, saved, loaded, finished)]
    assert answers[0] == answers[1] == answers[2] == answers[3]
    assert answers[0] != Extractor(loading.load_model(loading.TINY_BASE, CPU), processor).generate_texts(images)


@pytest.mark.slow
def test_interrupted_adapters_end_like_uninterrupted_ones(train, die_in_second_epoch):
    stage = replace(TUNE, lora=replace(LORA, lora_dropout=0.05), num_train_epochs=2)
    whole = train(stage, "whole").model
    die_in_second_epoch(stage, "broken")
    torch.testing.assert_close(dict(train(stage, "broken").model.named_parameters()), dict(whole.named_parameters()))


# --- Gemma


@pytest.fixture(scope="module")
def tiny_gemma():
    return gemma.load(recipes.TINY, CPU)


def test_gemma_trains_on_the_answer_and_the_end_of_the_turn(tiny_gemma, rows):
    model, processor = tiny_gemma
    row = as_conversations(rows["train"])[0]
    batch = Collator(processor)([row])
    tokens = audit(processor, batch)
    assert (
        "".join(text for text, seen in tokens if seen) == row["completion"][0]["content"][0]["text"] + "<end_of_turn>"
    )
    assert [text for text, _ in tokens].count("<bos>") == 1
    assert [text for text, _ in tokens].count("<image_soft_token>") == model.config.vision_soft_tokens_per_image
    assert torch.isfinite(model(**batch).loss)


def test_gemma_answers_alike_alone_and_in_a_batch(tiny_gemma, rows, monkeypatch):
    monkeypatch.setattr("foodextract.inference.extractor.MAX_NEW_TOKENS", 12)
    extractor = Extractor(*tiny_gemma)
    images = [row["image"].convert("RGB") for row in rows["test"].select(range(3))]
    assert extractor.generate_texts(images) == [extractor.generate_texts([image])[0] for image in images]


@pytest.mark.slow
def test_gemma_learns_through_adapters_is_not_trained_twice_and_stops_at_nan(rows, tmp_path, capsys):
    model, processor = gemma.load(recipes.TINY, CPU)
    stage = Stage(
        "tuned",
        (),
        1e-2,
        num_train_epochs=4,
        lora=Lora(16, 8),
        save_steps=4,
        validation_rows=4,
        metric_for_best_model="loss",
        cache=False,
        **QUICK,
    )
    log = train_stage(model, processor, stage, rows["train"].select(range(20)), tmp_path).log
    assert log[-1]["loss"] < 0.9 * log[0]["loss"]
    again, _ = gemma.load(recipes.TINY, CPU)
    train_stage(again, processor, stage, rows["train"].select(range(20)), tmp_path)
    assert "already trained" in capsys.readouterr().out
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    written = json.loads((tmp_path / "tuned" / loading.FINISHED).read_text())
    assert [entry["step"] for entry in written["log"] if "eval_loss" in entry] == [4, 8]
    with torch.no_grad():
        model.model.embed_vision.embedding_projection.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="the loss became NaN at step 1"):
        train_stage(
            model, processor, replace(stage, validation_rows=0), rows["train"].select(range(8)), tmp_path / "nan"
        )


def test_gemma_refuses_a_gpu_that_has_only_fp16(monkeypatch):
    only_fp16 = precision.Precision(torch.float32, torch.float16, "")
    monkeypatch.setattr(gemma, "choose_precision", lambda *_, **__: only_fp16)
    with pytest.raises(ModelError, match="overflows fp16"):
        gemma.load(recipes.TINY, CPU)


def test_largest_activations_are_found(tiny_gemma, rows):
    model, processor = tiny_gemma
    batch = Collator(processor)([as_conversations(rows["train"])[0]])
    found = gemma.largest_activations(model, batch)
    assert {"vision_tower", "embed_vision", "language_model", "lm_head"} <= set(found)
    with torch.no_grad():
        logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    assert found["lm_head"] >= logits.abs().max() * 0.99  # softcapping comes behind the head


# --- BLIP


CLASSES = ("pizza", "banana", "apple pie")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("a photo of delicious pizza", "pizza"),
        ("A photo of delicious pizzas", "pizza"),
        ("a photo of delicious apple pies", "apple pie"),
        ("apple pie", "apple pie"),
        ("a photo of delicious 1", "banana"),  # the original's captions end in class numbers
        ("a photo of delicious 6", None),  # of three
        ("a man on a horse", None),
        ("", None),
    ],
)
def test_captions_lead_back_to_classes(text, name):
    assert captioning.to_class(text, CLASSES) == name


CAPTIONS = captioning.Captioning(
    recipes.TINY, "scenes", 1e-3, batch_size=4, steps=6, save_every=2, buffer=1, augment=True, seed=1
)


def test_streamed_scenes_show_one_food_each_and_have_named_classes():
    rows = captioning.stream(CAPTIONS, "train", CLASSES[:2])
    first = list(islice(rows, 4))
    assert captioning.class_names(rows) == ["pizza", "banana"]
    assert {row["image"].size for row in first} == {(256, 256)}
    assert [row["label"] for row in first] == [
        row["label"] for row in islice(captioning.stream(CAPTIONS, "train", CLASSES[:2]), 4)
    ]


def test_captions_are_trained_as_they_are_written():
    model, processor = blip.load(recipes.TINY, CPU)
    images = [row["image"] for row in islice(captioning.stream(CAPTIONS, "train", CLASSES[:2]), 2)]
    texts = [captioning.TARGET.format(name) for name in ("pizza", "french fries")]
    batch = captioning.make_batch(processor, images, texts, model.config.text_config.bos_token_id)
    assert set(batch["input_ids"][:, 0].tolist()) == {model.decoder_input_ids}  # what `generate` starts with
    assert (batch["labels"] == IGNORED).equal(batch["attention_mask"] == 0)
    assert processor.batch_decode(batch["input_ids"], skip_special_tokens=True) == texts


def test_blip_sees_what_the_tiny_base_sees(base):
    model, _ = blip.load(recipes.TINY, CPU)
    pixels = torch.randn(2, 3, 192, 192, generator=torch.Generator().manual_seed(0))
    theirs = base.model.vision_model(pixels).last_hidden_state.detach()
    ours = model.vision_model(pixels).last_hidden_state[:, 1:].detach()
    assert (
        torch.nn.functional.cosine_similarity(theirs, ours, dim=-1).mean() > 0.9
    )  # the class token takes a little attention


@pytest.mark.slow
def test_an_interrupted_loop_ends_like_an_uninterrupted_one(tmp_path, monkeypatch):
    def fresh():
        return blip.load(recipes.TINY, CPU), captioning.stream(CAPTIONS, "train", CLASSES[:2])

    (whole, processor), rows = fresh()
    before = {name: value.clone() for name, value in whole.state_dict().items()}
    log = captioning.train(whole, processor, CAPTIONS, rows, tmp_path / "whole")
    assert log[-1]["loss"] < log[0]["loss"]
    for name, value in whole.state_dict().items():
        assert not name.startswith("vision_model") or torch.equal(value, before[name]), name

    class Killed(Exception):
        pass

    def die(*args):
        real(*args)
        if len(args[-1]) == 4:
            raise Killed

    real = captioning.checkpoint
    (broken, _), rows = fresh()
    with monkeypatch.context() as patch:
        patch.setattr(captioning, "checkpoint", die)
        with pytest.raises(Killed):
            captioning.train(broken, processor, CAPTIONS, rows, tmp_path / "broken")
    (again, _), rows = fresh()
    assert captioning.train(again, processor, CAPTIONS, rows, tmp_path / "broken") == log
    for (name, a), b in zip(whole.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name


# --- ablation


def test_each_row_of_the_ablation_has_one_change():
    reference = [Stage("stage1", (VISION,), 5e-4, 1), Stage("stage2", (), 1e-4, 0.5)]
    assert ablation.stages_of("reference", reference) == reference
    [only] = ablation.stages_of("one stage", reference)
    assert only == replace(reference[0], num_train_epochs=1.5)  # as many images in all
    [lora] = ablation.stages_of("LoRA", reference)
    assert replace(lora, lora=None) == only
    for name, choice in ablation.CHOICES.items():
        if choice.against == "reference" and name != "one stage":
            mine = ablation.stages_of(name, reference)
            changed = [key for key, value in asdict(mine[0]).items() if value != asdict(reference[0])[key]]
            assert len(changed) + (choice.tiles != 1) + choice.bf16_stage2 == 1, name


def test_ablation_pairs_by_seed_and_has_students_interval():
    def row(name, seed, value):
        return make_row("ablation", f"{name} | seed {seed}", "item_f1_micro", value, n=9, command="c")

    runs = [row("reference", s, v) for s, v in ((1, 0.5), (2, 0.7), (3, 0.6))] + [
        row("5 tiles", s, v) for s, v in ((1, 0.6), (2, 0.7), (3, 0.8))
    ]
    found = {(r.subject, r.metric): r for r in ablation.summary(runs)}
    change = found["5 tiles minus reference", "item_f1_micro_difference"]
    assert (change.value, change.n) == (pytest.approx(0.1), 3)  # of 0.1, 0.0 and 0.2
    assert change.high - change.value == pytest.approx(
        4.302653 * 0.1 / 3**0.5, rel=1e-5
    )  # t for 2 degrees of freedom, s = 0.1
    assert found["reference", "item_f1_micro"].value == pytest.approx(0.6)
    assert ablation.interval([0.9, 1.0, 1.0], 0)[1] == 1  # no share is more than all


@pytest.mark.slow
def test_ablation_is_taken_up_where_it_was(tmp_path, monkeypatch):
    asked = []

    def run(name, seed, *_, **__):
        asked.append((name, seed))
        if len(asked) == 3:
            raise KeyboardInterrupt
        metrics = [evaluate.Metric("item_f1_micro", seed / 10, 0, 1, 9)]
        return evaluate.to_rows("ablation", f"{name} | seed {seed}", metrics, "c")

    monkeypatch.setattr(ablation, "run", run)
    settings = {
        "images": 48,
        "test": 4,
        "seeds": 2,
        "only": ["reference", "5 tiles"],
        "work": tmp_path / "w",
        "out": tmp_path / "a.json",
    }
    with pytest.raises(KeyboardInterrupt):
        ablation.main(**settings)
    ablation.main(**settings)
    assert asked == [("reference", 1), ("5 tiles", 1), ("reference", 2), ("reference", 2), ("5 tiles", 2)]
    assert (tmp_path / "a.png").stat().st_size > 0
    assert {row.n for row in read_results(tmp_path / "a.json") if " minus " in row.subject} == {2}


# --- notebooks


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_say_what_they_are_an_archive_of(path):
    first = "".join(json.loads(path.read_text())["cells"][0]["source"])
    for heading in ("Question.", "Recipe.", "Outcome of the original.", "Known defects.", "Superseded by"):
        assert f"**{heading}**" in first


TINY_RUN = {"scenes": [32, 8], "save_steps": 0, "validation_rows": 0, "num_train_epochs": 1}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes", "more"),
    [
        ("gemma_3n_lora", {**TINY_RUN, "save_steps": 2, "validation_rows": 4}, {"eval_images": 4}),
        ("smolvlm2_256m_lora", TINY_RUN, {}),
        ("smolvlm2_256m_two_stage", TINY_RUN, {}),
        ("blip_partial", {"steps": 4, "batch_size": 4}, {"eval_images": 8}),
    ],
)
def test_notebooks_run_from_top_to_bottom(name, changes, more, tmp_path, monkeypatch):
    monkeypatch.setenv("FOODEXTRACT_PROFILE", "offline")
    monkeypatch.setenv("PYTHONPATH", f"{EXPERIMENTS}:{EXPERIMENTS.parent / 'src'}")
    where = {"output": str(tmp_path / name), "results": str(tmp_path / "results.json")}
    source, executed = EXPERIMENTS / f"{name}.ipynb", tmp_path / f"{name}.ipynb"
    papermill.execute_notebook(
        source,
        executed,
        parameters={"changes": changes, **where, **more},
        cwd=tmp_path,
        progress_bar=False,
        kernel_name="python3",
    )
    rows = read_results(tmp_path / "results.json")
    assert {row.benchmark for row in rows} == {name}
    assert {"loss_first", "loss_last", "seconds"} <= {row.metric for row in rows}
    assert "base" in {row.subject for row in rows}
    if name == "blip_partial":
        assert len(captioner.load(tmp_path / name / "model", "cpu").records) == 10
