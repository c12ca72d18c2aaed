"""A BLIP that writes class numbers, as the original's did, served: it answers records with names."""

import json
import re
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration, BlipImageProcessor, BlipProcessor
from typer.testing import CliRunner

from captioning import make_batch
from foodextract.__main__ import app
from foodextract.inference import blip
from foodextract.inference.blip import TARGET, Captioner
from foodextract.inference.extractor import Extractor
from foodextract.models.loading import TINY_TUNED, ModelError
from foodextract.schema import AnswerError, FoodRecord
from foodextract.serving import server
from test_server import encoded, reason, serving, until

NAMES = ["grilled_salmon", "beignets", "iced_tea"]
COLORS = ["red", "green", "blue", "yellow"]
SAID = ["0", "1", "iced tea", "7"]  # numbers, a name, and a number that no class has


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small BLIP that has learned to say these four things about four colors."""
    words = sorted({*TARGET.format(" ".join(SAID)).split()})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *words]
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(vocabulary)}, bos_token="[DEC]")
    both = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1}
    ids = {"pad_token_id": 0, "sep_token_id": 3, "eos_token_id": 3, "bos_token_id": 5}
    text = both | ids | {"vocab_size": len(vocabulary), "max_position_embeddings": 16, "encoder_hidden_size": 32}
    torch.manual_seed(0)
    model = BlipForConditionalGeneration(
        BlipConfig(text_config=text, vision_config=both | {"image_size": 32, "patch_size": 16})
    )
    processor = BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer)
    batch = make_batch(processor, images(), [TARGET.format(said) for said in SAID], bos=5)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(150):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    out = tmp_path_factory.mktemp("blip")
    blip.save(model.eval(), processor, NAMES, out)
    return out


def images():
    return [Image.new("RGB", (40, 30), color) for color in COLORS]


def test_captions_become_records_of_class_names(folder):
    model = blip.load(folder, "cpu")
    assert isinstance(model, Captioner)
    read = [model.prepare_image(image) for image in images()]
    written = model.processor.batch_decode(
        model.model.generate(pixel_values=read[0]["pixel_values"], max_new_tokens=16), skip_special_tokens=True
    )
    assert written == [TARGET.format("0")]
    *answers, nothing = model.extract_prepared(read)
    assert answers == [
        (FoodRecord(is_food=1, image_title="grilled salmon", food_items=["grilled salmon"], drink_items=[]), None),
        (FoodRecord(is_food=1, image_title="beignets", food_items=["beignets"], drink_items=[]), None),
        (FoodRecord(is_food=1, image_title="iced tea", food_items=[], drink_items=["iced tea"]), None),
    ]
    assert isinstance(nothing, AnswerError)
    assert [model.extract_prepared([one])[0] for one in read[:3]] == answers


def test_number_refers_to_the_config_order(folder, tmp_path):
    model = blip.load(folder, "cpu")
    blip.save(model.model, model.processor, ["iced_tea", "iced tea", "beignets"], tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["id2label"]["7"] = "grilled_salmon"
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = blip.load(tmp_path, "cpu")
    titles = [
        answer[0].image_title for answer in again.extract_prepared([again.prepare_image(image) for image in images()])
    ]
    assert titles == ["iced tea", "iced tea", "iced tea", "grilled salmon"]  # said: 0, 1, iced tea, 7
    assert [blip.to_number(said, {2: "beignets", 7: "salmon"}) for said in ("2", "0", "beignet")] == [2, None, 2]


def test_server_serves_a_captioner(folder):
    with serving(lambda: blip.load(folder, "cpu")) as client:
        until(lambda: not client.queue.unavailable)
        files = [encoded(image) for image in images()]
        records = [client.post("/predict", content=file).json()["record"] for file in files[:3]]
        assert [record["image_title"] for record in records] == ["grilled salmon", "beignets", "iced tea"]
        assert not re.search(r"\d", json.dumps([record["food_items"] + record["drink_items"] for record in records]))
        assert reason(client.post("/predict", content=files[3]), 500) == "bad_answer"
        assert reason(client.post("/predict", content=b"no image"), 415) == "not_an_image"


def test_unusable_captioner_is_refused(folder, tmp_path, monkeypatch):
    model = blip.load(folder, "cpu")
    blip.save(model.model, model.processor, ["LABEL_0", "LABEL_1"], tmp_path)
    with pytest.raises(ModelError, match="does not name its classes"):
        blip.load(tmp_path)
    blip.save(model.model, model.processor, ["x" * 60], tmp_path)
    with pytest.raises(ModelError, match="no record can hold"):
        blip.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="cannot be loaded as a BLIP"):
        blip.load(tmp_path)
    with pytest.raises(ModelError, match="not for a BLIP"):
        blip.load(folder, precision="int8")
    monkeypatch.setattr(server, "run", lambda load, *_: load())
    result = CliRunner().invoke(app, ["serve", "--model", str(folder), "--min-confidence", "0.5"])
    assert result.exit_code == 2
    assert "has no confidence: leave out --min-confidence" in result.stderr


def test_captioner_with_weights_of_other_names_is_read_or_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    weights = load_file(folder / "model.safetensors")
    save_file({f"_orig_mod.{name}": weight for name, weight in weights.items()}, tmp_path / "model.safetensors")
    read = [blip.load(place, "cpu") for place in (folder, tmp_path)]
    assert len({model.model.state_dict()["vision_model.post_layernorm.bias"].sum().item() for model in read}) == 1
    save_file({f"vlm.{name}": weight for name, weight in weights.items()}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"missing .* unknown \(vlm\."):
        blip.load(tmp_path, "cpu")


def test_other_models_are_extractors(tmp_path):
    assert isinstance(blip.load(TINY_TUNED, "cpu"), Extractor)
    with pytest.raises(ModelError, match="holds no model"):
        blip.load(tmp_path)
