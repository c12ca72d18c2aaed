import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import SmolVLMForConditionalGeneration, SmolVLMProcessor

from foodextract.models import loading, precision, quantization
from foodextract.models.loading import ModelError
from foodextract.models.precision import choose_precision
from foodextract.models.training_data import TrainingData

BUNDLED = {  # bytes at most; the base reads the photo model's vision tower
    loading.TINY_BASE: 12_000_000,
    loading.TINY_TUNED: 12_000_000,
    loading.PHOTO: 64_000_000,
    loading.PHOTO_BASE: 20_000_000,
}


@pytest.mark.parametrize("folder", BUNDLED, ids=lambda folder: folder.name)
def test_bundled_models_are_smolvlms_and_small(folder):
    assert type(loading.load_model(folder)) is SmolVLMForConditionalGeneration
    assert type(loading.load_processor(folder)) is SmolVLMProcessor
    assert sum(file.stat().st_size for file in folder.iterdir()) <= BUNDLED[folder]
    assert not {file.suffix for file in folder.iterdir()} - {".json", ".safetensors", ".jinja"}


def test_the_photo_models_are_plain_checkpoints_that_share_their_vision_tower():
    tuned, base = map(SmolVLMForConditionalGeneration.from_pretrained, (loading.PHOTO, loading.PHOTO_BASE))
    assert tuned.num_parameters() <= 32_000_000
    weights = dict(base.named_parameters())
    same = {name for name, weight in tuned.named_parameters() if torch.equal(weight, weights[name])}
    assert same == {name for name in weights if "vision_model" in name}
    shards = sorted(path.name for path in loading.PHOTO.glob("*.safetensors"))
    assert shards == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert all((loading.PHOTO / shard).stat().st_size < 50_000_000 for shard in shards)


def test_image_budget_survives_saving(tmp_path, rows):
    processor = loading.load_processor(loading.TINY_BASE)
    tile = processor.image_processor.max_image_size["longest_edge"]
    tiles = {}
    for budget in (17, 5, 1):
        loading.set_image_budget(processor, budget)
        processor.save_pretrained(tmp_path / str(budget))
        loaded = loading.load_processor(tmp_path / str(budget))
        pixels = loaded(text=["<image>"], images=[[rows["train"][0]["image"]]], return_tensors="pt")["pixel_values"]
        tiles[budget] = pixels.shape[1]
        assert pixels.shape[-2:] == (tile, tile)
    assert tiles == {17: 17, 5: 5, 1: 1}
    with pytest.raises(ModelError, match="3 tiles"):
        loading.set_image_budget(processor, 3)


def test_precision_keeps_master_weights_in_fp32(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert choose_precision(cpu, training=True).weights is torch.float32
    for capability, autocast in (((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16), ((7, 5), torch.float16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        chosen = choose_precision(gpu, training=True)
        assert (chosen.weights, chosen.autocast) == (torch.float32, autocast)
        assert choose_precision(gpu, training=False).weights is autocast


AMX = {"many": {"fp32": 5.6, "bf16": 1.0, "int8": 2.8}, "one": {"fp32": 4.0, "bf16": 2.0, "int8": 1.0}}
AVX512 = {"many": {"fp32": 3.0, "bf16": 2.0, "int8": 1.0}, "one": {"fp32": 2.0, "bf16": 1.9, "int8": 1.0}}
AVX2 = {"many": {"fp32": 2.0, "int8": 1.0}, "one": {"fp32": 1.0, "int8": 0.9}}  # bf16 is emulated, int8 gains little


@pytest.mark.parametrize(
    ("seconds", "parameters", "many", "one", "trains"),
    [
        (AMX, 507_482_304, "bf16", "int8", "bf16"),
        (AMX, 26_000_000, "bf16", "bf16", "bf16"),
        (AVX512, 507_482_304, "int8", "int8", "bf16"),
        (AVX512, 26_000_000, "bf16", "fp32", "bf16"),
        (AVX2, 507_482_304, "int8", "fp32", "fp32"),
        (AVX2, 26_000_000, "fp32", "fp32", "fp32"),
    ],
)
def test_the_precision_of_a_cpu_is_what_was_measured(seconds, parameters, many, one, trains):
    """By made-up times."""
    cpu = torch.device("cpu")
    answering, training = (choose_precision(cpu, kind, parameters, lambda: seconds) for kind in (False, True))
    assert (answering.many, answering.one, answering.weights) == (many, one, torch.float32)
    assert answering.reason.startswith(f"{many} for images and prompts, {one} for decoding (speed here")
    assert training.weights is torch.float32
    assert training.autocast == (torch.bfloat16 if trains == "bf16" else None)


def test_the_most_exact_of_similarly_fast_formats_is_taken():
    assert precision.fastest({"fp32": 1.3, "bf16": 1.1, "int8": 0.9}) == "bf16"
    assert precision.fastest({"fp32": 1.1, "bf16": 1.2, "int8": 0.9}) == "fp32"
    assert precision.fastest({"fp32": 1.0}) == "fp32"


def test_small_models_are_exact_and_nothing_is_measured():
    for training in (False, True):
        chosen = choose_precision(torch.device("cpu"), training, 2_886_560, pytest.fail)
        assert (chosen.many, chosen.one, chosen.autocast) == ("fp32", "fp32", None)


def test_measured_times_are_kept_and_an_emulated_format_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kinds, calls = (
        {torch.nn.Linear: 1.0, quantization.Bf16: 9.0, quantization.Int8: 0.5, quantization.TokenByToken: 0.5},
        [],
    )
    monkeypatch.setattr(precision, "_seconds", lambda layers, tokens: calls.append(tokens) or kinds[type(layers[0])])
    precision.measured.cache_clear()
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    found = precision.measured((8, 16), (16, 8))
    assert torch.equal(torch.get_rng_state(), state)  # else the first training here would differ from the second
    assert torch.get_num_threads() == threads
    assert found == {phase: {"fp32": 1.0, "int8": 0.5} for phase in ("many", "one")}
    assert {tokens.shape for tokens in calls} == {(4, 8), (96, 8), (4, 16), (1, 16)}
    calls.clear()
    precision.measured.cache_clear()
    assert precision.measured((8, 16), (16, 8)) == found
    assert not calls  # another process reads the file
    precision.measured((8, 32), (32, 8))
    precision.measured.cache_clear()
    calls.clear()
    assert precision.measured((8, 16), (16, 8)) == found
    assert not calls  # times of other shapes do not displace it
    precision.measured.cache_clear()
    [kept] = tmp_path.glob("*/*.json")
    of_each = json.loads(kept.read_text())
    for damaged in (
        '{"damaged',
        "[]",
        *(json.dumps(dict.fromkeys(of_each, times)) for times in (None, {}, {"many": {}})),
    ):
        kept.write_text(damaged)
        assert precision.measured((8, 16), (16, 8)) == found
        precision.measured.cache_clear()


@pytest.mark.parametrize(
    ("units", "int8"), [({"avx512_vnni": True}, quantization.Int8), ({"avx2": True}, quantization.TokenByToken)]
)
def test_layers_are_converted_by_phase(units, int8, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units)

    def layers(**settings):
        model = loading.load_model(loading.TINY_BASE, **settings)
        return {name: type(module) for name, module in model.named_modules()}, model

    text, vision = "model.text_model.layers.0.mlp.up_proj", "model.vision_model.encoder.layers.0.mlp.fc1"
    plain, model = layers()
    assert {plain[text], plain[vision], plain["lm_head"]} == {torch.nn.Linear}
    assert model.precision.startswith("fp32: at this size")
    monkeypatch.setattr(precision, "MIN_MEASURED_PARAMETERS", 1_000_000)
    monkeypatch.setattr(precision, "MIN_INT8_PARAMETERS", 1_000_000)
    monkeypatch.setattr(precision, "measured", lambda many, one: AMX)
    split, model = layers()
    assert split[text] is quantization.ByPhase
    assert [type(part) for part in model.get_submodule(text).children()] == [quantization.Bf16, int8]
    assert (split[vision], split["lm_head"]) == (quantization.Bf16, int8)
    assert model.size == 2_886_560
    assert model.dtype is torch.float32
    assert quantization.Bf16 not in layers(training=True)[0].values()
    assert quantization.Bf16 not in layers(precision="fp32")[0].values()
    assert int8 in layers(precision="int8")[0].values()


def test_other_models_are_refused(tmp_path):
    with pytest.raises(ModelError, match=r"no config\.json"):
        loading.load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ModelError, match="'llama' model, not a SmolVLM"):
        loading.load_model(tmp_path)
    (tmp_path / "config.json").write_text("{broken")
    with pytest.raises(ModelError, match=f"{tmp_path} cannot be loaded"):
        loading.load_model(tmp_path)


def test_damaged_weights_are_refused(tmp_path):
    loading.load_model(loading.TINY_BASE).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot be loaded"):
        loading.load_model(tmp_path)


def tuned_as(folder, rename, config=None):
    """The tuned tiny model with other names of its weights; a weight without a name is left out."""
    shutil.copytree(loading.TINY_TUNED, folder)
    weights = {rename(name): weight for name, weight in load_file(folder / "model.safetensors").items()}
    weights.pop(None, None)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | (config or {})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
@pytest.mark.parametrize(
    "rename",
    [
        "_orig_mod.{}".format,
        "module._orig_mod.{}".format,
        "base_model.model.{}".format,
        lambda name: name.replace("_model.", "_model._orig_mod.").replace(".self_attn", "._orig_mod.self_attn"),
        lambda name: name.removeprefix("model."),  # saved without the head
    ],
    ids=["compiled", "data parallel", "PEFT", "nested", "base only"],
)
@pytest.mark.parametrize("training", [False, True], ids=["extract", "train"])
def test_names_of_wrappers_are_taken_off(rename, training, sharded, tmp_path):
    folder = tuned_as(tmp_path / "wrapped", rename)
    if sharded:
        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        halves = list(weights)[::2], list(weights)[1::2]
        for number, names in enumerate(halves):
            save_file({name: weights[name] for name in names}, folder / f"{number}.safetensors", {"format": "pt"})
        files = {name: f"{number}.safetensors" for number, names in enumerate(halves) for name in names}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    cpu, plain = torch.device("cpu"), load_file(loading.TINY_TUNED / "model.safetensors")
    model = loading.load_model(folder, cpu, training)
    state = model.state_dict()
    assert all(torch.equal(state[name], weight) for name, weight in plain.items())
    model.save_pretrained(tmp_path / "saved")
    assert load_file(tmp_path / "saved" / "model.safetensors").keys() == plain.keys()


@pytest.mark.parametrize(
    ("rename", "config", "words"),
    [
        (lambda name: None if "vision_model" in name else name, {}, r"8\d missing \(model\.vision_model"),
        (lambda name: f"vlm.{name}", {}, r"missing .*; 124 unknown \(vlm\.model"),
        (lambda name: f"{name}.lora_A" if name.endswith("0.mlp.fc1.weight") else name, {}, "1 missing .*; 1 unknown"),
        (lambda name: name, {"tie_word_embeddings": False}, r"1 missing \(lm_head\.weight"),
        (lambda name: name, {"scale_factor": 8}, r"1 of another shape \(model\.connector"),
    ],
    ids=["no vision", "unknown prefix", "adapter", "no head", "other shape"],
)
def test_weights_that_do_not_match_are_refused(rename, config, words, tmp_path):
    folder = tuned_as(tmp_path / "odd", rename, config)
    for training in (False, True):
        with pytest.raises(ModelError, match=words) as caught:
            loading.load_model(folder, torch.device("cpu"), training)
        assert str(folder) in str(caught.value)
        assert "save_pretrained" in str(caught.value)


def test_an_adapter_alone_is_refused_with_the_remedy(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"holds an adapter: .*merge_and_unload"):
        loading.load_model(tmp_path)


@pytest.mark.parametrize("load", [loading.load_model, loading.load_processor])
def test_unreachable_hub_is_named(load):
    with pytest.raises(ModelError, match=r"nobody/nothing.*check the name and the connection, or give a folder"):
        load("nobody/nothing")
    with pytest.raises(ModelError, match="neither a folder nor a Hub id"):
        load("/no/such/folder")


def test_missing_device_is_named():
    with pytest.raises(ModelError, match="'cuda:99' is not available"):
        loading.choose_device("cuda:99")
    with pytest.raises(ModelError, match="'gpu'"):
        loading.choose_device("gpu")


def test_newest_finished_training_is_the_default(tmp_path):
    assert loading.find_model(outputs=tmp_path) == loading.PHOTO
    (tmp_path / "run" / "stage2").mkdir(parents=True)
    assert loading.find_model(outputs=tmp_path) == loading.PHOTO
    (tmp_path / "run" / "stage2" / loading.FINISHED).write_text("{}")
    assert loading.find_model(outputs=tmp_path) == tmp_path / "run" / "stage2"


def test_a_model_that_has_seen_drawings_alone_is_never_the_default(tmp_path):
    for name, drawings in (("photographs", 3), ("drawings", 10)):
        (tmp_path / name / "stage2").mkdir(parents=True)
        TrainingData(10, drawings, {}, {}).write(tmp_path / name / "stage2")
        (tmp_path / name / "stage2" / loading.FINISHED).write_text("{}")
        os.utime(tmp_path / name / "stage2" / loading.FINISHED, (drawings, drawings))  # the drawings' is newer
    assert loading.find_model(outputs=tmp_path) == tmp_path / "photographs" / "stage2"
    assert loading.find_model(tmp_path / "drawings" / "stage2") == str(tmp_path / "drawings" / "stage2")


def test_bundled_models_go_by_their_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert loading.find_model("photo") == loading.PHOTO
    assert loading.find_model("tiny-tuned") == loading.TINY_TUNED
    assert loading.find_model("owner/name") == "owner/name"
    assert loading.find_model("../bundled") == "../bundled"
    (tmp_path / "photo").mkdir()
    assert loading.find_model("photo") == "photo"  # the user's own folder
