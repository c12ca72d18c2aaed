import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import SmolVLMForConditionalGeneration, SmolVLMProcessor

from foodextract.models import loading
from foodextract.models.loading import ModelError

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
    assert loading.choose_precision(cpu, training=True).weights is torch.float32
    for capability, autocast in (((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16), ((7, 5), torch.float16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        chosen = loading.choose_precision(gpu, training=True)
        assert (chosen.weights, chosen.autocast) == (torch.float32, autocast)
        assert loading.choose_precision(gpu, training=False).weights is autocast


def test_cpu_with_amx_trains_large_models_in_bf16(monkeypatch):
    cpu = torch.device("cpu")
    for units, training, parameters, autocast in (
        ({"amx_bf16": True}, True, 256_484_928, torch.bfloat16),  # SmolVLM2-256M
        ({"amx_bf16": True}, True, 2_886_560, None),  # the tiny one
        ({"amx_bf16": True}, False, 256_484_928, None),  # answering, in int8
        ({"amx_bf16": False}, True, 256_484_928, None),
        ({"neon": True}, True, 256_484_928, None),  # a processor of another kind
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda units=units: units)
        chosen = loading.choose_precision(cpu, training, parameters)
        assert (chosen.weights, chosen.autocast) == (torch.float32, autocast)
        assert ("bf16 autocast" in chosen.reason) == (autocast is not None)
        assert chosen.int8 == (not training)


def test_cpu_runs_large_models_in_int8(monkeypatch):
    def kinds(**settings):
        return {
            type(module).__module__.split(".")[1]
            for module in loading.load_model(loading.TINY_BASE, **settings).modules()
        }

    assert "ao" not in kinds()
    monkeypatch.setattr(loading, "INT8_PAYS", 1_000_000)
    assert "ao" in kinds()
    assert "ao" not in kinds(training=True) | kinds(precision="fp32") | kinds(precision="bf16")


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
    assert loading.newest_tuned(tmp_path) == loading.PHOTO
    (tmp_path / "run" / "stage2").mkdir(parents=True)
    assert loading.newest_tuned(tmp_path) == loading.PHOTO
    (tmp_path / "run" / "stage2" / loading.FINISHED).write_text("{}")
    assert loading.newest_tuned(tmp_path) == tmp_path / "run" / "stage2"
