"""A SmolVLM as ONNX graphs: the same logits, the same answers, and errors that say what is missing."""

import json
import shutil
import sys

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from foodextract.__main__ import app
from foodextract.data import scenes
from foodextract.inference import onnx
from foodextract.inference.confidence import Calibration
from foodextract.inference.extractor import Extractor
from foodextract.models import loading
from foodextract.models.loading import ModelError
from foodextract.models.training_data import TrainingData
from foodextract.serving import server

CALIBRATION = Calibration(item_slope=0.5, images=7)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    source, folder = tmp_path_factory.mktemp("source") / "model", tmp_path_factory.mktemp("graphs") / "model"
    shutil.copytree(loading.TINY_TUNED, source)
    CALIBRATION.write(source)
    result = CliRunner().invoke(app, ["export", "onnx", str(folder), "--model", str(source)])
    assert result.exit_code == 0, result.output
    assert "decoder_model_merged_quantized.onnx" in result.stdout
    return folder


@pytest.fixture(scope="module")
def images():
    return [scene.image for scene in scenes.draw_scenes(77, "test", 12)]


@torch.inference_mode()
def logits(model, inputs, blocks):
    """Behind a prompt, and behind each of the blocks that follow it."""
    inputs, cache, out = dict(inputs), None, []
    mask = inputs.pop("attention_mask")
    for ids in (inputs.pop("input_ids"), *blocks):
        mask = torch.nn.functional.pad(mask, (0, ids.shape[1])) if cache else mask
        if cache:
            mask[:, -ids.shape[1] :] = ids != 2
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        output = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **inputs,
        )
        inputs, cache = {}, output.past_key_values
        out.append(output.logits)
    cache.batch_select_indices(torch.tensor([1]))
    last = model(
        input_ids=torch.tensor([[7]]),
        attention_mask=torch.nn.functional.pad(mask[1:2], (0, 1), value=1),
        position_ids=mask[1:2].sum(-1, keepdim=True),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return [*out, last.logits]


@pytest.mark.parametrize("tiles", [1, 17])
def test_graphs_compute_the_logits_of_the_model(exported, tuned, images, tiles):
    """Two prompts of different lengths where there are 17 tiles, blocks padded on the left, a row that leaves the
    batch.
    """
    processor = loading.load_processor(loading.TINY_TUNED, tiles)
    inputs = Extractor(tuned.model, processor).prepare([images[0], Image.new("RGB", (400, 90), "red")])
    assert (inputs["attention_mask"].min() == 0) == (tiles > 1)
    blocks = [torch.tensor([[5, 6, 7], [2, 2, 9]]), torch.tensor([[8], [9]])]  # 2 is padding
    for theirs, ours in zip(
        logits(tuned.model, inputs, blocks), logits(onnx.GraphModel(exported), inputs, blocks), strict=True
    ):
        assert theirs.shape == ours.shape
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-4)


def test_graphs_give_the_answers_of_the_model(exported, tuned, images):
    extractor = Extractor.from_pretrained(exported)
    assert extractor.generate_texts(images) == tuned.generate_texts(images)
    assert list(extractor.extract_many(images, 5)) == list(tuned.extract_many(images, 5))
    assert extractor.extract(images[0]) == tuned.extract(images[0])


def test_graphs_keep_what_is_stated_beside_the_weights(exported):
    """Without the calibration, the export of the photo model would name food where the model itself is not sure."""
    extractor = Extractor.from_pretrained(exported)
    assert extractor.calibration == CALIBRATION
    assert extractor.training_data == TrainingData.find(loading.TINY_TUNED)


def test_int8_graphs_are_smaller_and_answer_alike(exported, tuned, images):
    quantized = Extractor.from_pretrained(exported, precision="int8")
    same = [
        ours.is_food == theirs.is_food
        for ours, theirs in zip(*(e.extract_many(images) for e in (quantized, tuned)), strict=True)
    ]
    assert sum(same) >= len(images) - 2
    for name in (onnx.VISION, onnx.TEXT):
        whole = (exported / "onnx" / f"{name}.onnx.data").stat().st_size
        assert (exported / "onnx" / f"{name}{onnx.QUANTIZED}.onnx").stat().st_size < 0.45 * whole


def test_extract_command_takes_the_exported_folder(exported, tuned, images, tmp_path):
    images[1].save(tmp_path / "a.png")
    result = CliRunner().invoke(app, ["extract", str(tmp_path), "--model", str(exported), "--precision", "fp32"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {"file": str(tmp_path / "a.png"), **tuned.extract(images[1]).model_dump()}


def test_weights_beside_graphs_of_another_form_are_what_answers(tmp_path):
    shutil.copytree(loading.TINY_TUNED, tmp_path / "model")
    (tmp_path / "model" / "onnx").mkdir()
    assert not onnx.is_exported(tmp_path / "model")


def test_a_server_without_onnxruntime_names_the_extra(exported, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr(server, "run", lambda load, *_: load())
    result = CliRunner().invoke(app, ["serve", "--model", str(exported)])
    assert result.exit_code == 2
    assert "onnxruntime is not installed: pip install 'foodextract[onnx]'" in result.stderr


def test_errors_name_the_remedy(exported, tmp_path, monkeypatch):
    with pytest.raises(ModelError, match="no precision 'bf16': choose fp32 or int8"):
        Extractor.from_pretrained(exported, precision="bf16")
    with pytest.raises(ModelError, match="on a CPU here, not on 'cuda'"):
        Extractor.from_pretrained(exported, "cuda")
    with pytest.raises(ModelError, match="holds the model itself: name another folder for the export"):
        onnx.export_onnx(loading.TINY_TUNED, loading.TINY_TUNED)
    (tmp_path / "onnx").mkdir()
    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).write_bytes((exported / name).read_bytes())
    with pytest.raises(ModelError, match=r"vision_encoder.onnx cannot be loaded .*: export the model again"):
        onnx.GraphModel(tmp_path)
    for missing in ("onnxscript", "onnxruntime"):
        monkeypatch.setitem(sys.modules, missing, None)
        result = CliRunner().invoke(app, ["export", "onnx", str(tmp_path / "out"), "--model", str(loading.TINY_TUNED)])
        assert result.exit_code == 2
        assert f"{missing} is not installed: pip install 'foodextract[onnx]'" in result.stderr
        monkeypatch.undo()
