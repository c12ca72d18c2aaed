import copy
import io
import re
from contextlib import redirect_stdout
from itertools import count
from math import log
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from foodextract import prompts
from foodextract.data import scenes
from foodextract.images import ImageError
from foodextract.inference.decoding import Decoder
from foodextract.inference.extractor import PREPARED, Extractor
from foodextract.models import loading
from foodextract.models.loading import TINY_BASE, ModelError
from foodextract.models.quantization import Int8, TokenByToken, convert
from foodextract.schema import AnswerError, FoodRecord

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def images():
    return [scene.image for scene in scenes.draw_scenes(77, "test", 12)]


def test_batch_answer_is_single_answer(tuned, images):
    assert tuned.generate_texts(images) == [tuned.generate_texts([image])[0] for image in images]


def test_a_model_without_its_processor_is_refused(tuned):
    with pytest.raises(TypeError, match="a model needs its processor"):
        Extractor(tuned.model)


def test_base_model_writes_prose(images):
    answers = Extractor.from_pretrained(TINY_BASE, "cpu").generate_texts(images)
    assert not any("{" in text for text in answers)
    assert len({text for text in answers if " " in text}) >= 6


def test_bad_image_does_not_affect_its_batch(tuned, images):
    results = list(tuned.extract_many([images[0], b"", images[1], "nowhere.jpg", images[2]], batch_size=3))
    expected = [FoodRecord, ImageError, FoodRecord, ImageError, FoodRecord]
    assert [isinstance(result, kind) for result, kind in zip(results, expected, strict=True)] == [True] * 5
    assert results[::2] == [tuned.extract(image) for image in images[:3]]
    assert all(isinstance(result, ImageError) for result in tuned.extract_many([b"", b"x"], batch_size=1))
    with pytest.raises(ImageError, match="empty"):
        tuned.extract(b"")


def test_unconstrained_answer_that_is_not_strict_is_an_error(tuned, monkeypatch):
    monkeypatch.setattr(Decoder, "text", lambda self, answer: "{'is_food': 1}")
    [result] = Extractor(tuned.model, tuned.processor, constrained=False).extract_many([Image.new("RGB", (9, 9))])
    assert isinstance(result, AnswerError)
    assert "{'is_food': 1}" in str(result)


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (1200, 30)])
def test_any_image_size_is_answered(tuned, size):
    assert tuned.extract(Image.new("RGB", size, "white")).is_food in (0, 1)


def test_all_image_sources_give_the_same_answer(tuned, images, tmp_path):
    file, image = tmp_path / "a.png", images[1]
    image.save(file)
    turned = tmp_path / "b.png"  # stored on its side, with the EXIF tag that says so
    exif = Image.Exif()
    exif[0x0112] = 6
    image.transpose(Image.Transpose.ROTATE_90).save(turned, exif=exif)
    kinds = [image, str(file), file, file.read_bytes(), np.asarray(image), turned]
    assert list(tuned.extract_many(iter(kinds), batch_size=4)) == [tuned.extract(image)] * len(kinds)
    assert list(tuned.extract_many(tmp_path)) == list(tuned.extract_many([file, turned]))


def test_inputs_equal_those_of_the_processor(tuned, images):
    """One preprocessing: what the processor alone makes of a chat with an image is what the model gets."""
    own, chat = tuned.prepare([images[0]]), prompts.conversation()
    chat[1]["content"][0]["image"] = images[0]
    theirs = tuned.processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert set(own) == set(theirs)
    for key in own:
        assert torch.equal(own[key], theirs[key]), key


def test_unwanted_image_leaves_the_batch_without_changing_other_answers(tuned, images):
    read = [tuned.prepare_image(image) for image in images[:4]]
    whole = [record for record, _ in tuned.extract_prepared(read)]
    assert whole == list(tuned.extract_many(images[:4]))
    gone, asked = next(number for number, record in enumerate(whole) if record.is_food), []
    left = [record for record, _ in tuned.extract_prepared(read, lambda number: asked.append(number) or number != gone)]
    assert left.pop(gone).image_title == ""
    assert left == whole[:gone] + whole[gone + 1 :]
    assert asked.count(gone) == 1


def test_endless_stream_is_read_only_slightly_ahead(tuned, images):
    read = count()
    results = tuned.extract_many((images[next(read) % 2] for _ in count()), batch_size=2)
    for _ in range(5):
        next(results)
    assert next(read) <= 2 * (3 + PREPARED)
    results.close()


def test_confidence_has_one_value_per_item(tuned, images):
    results = list(tuned.extract_many_with_confidence(images))
    for record, confidence in results:
        assert 0.5 <= confidence.is_food <= 1
        for field in ("food_items", "drink_items"):
            assert len(getattr(record, field)) == len(getattr(confidence, field))
            assert all(0 < value <= 1 for value in getattr(confidence, field))
    assert len({confidence.is_food for _, confidence in results}) > 6
    free = next(
        result
        for result in Extractor(tuned.model, tuned.processor, constrained=False).extract_many_with_confidence(images)
        if isinstance(result, tuple)
    )
    assert free[1] is None


def test_is_food_confidence_is_a_probability_among_both_values(tuned, images):
    [(record, confidence)] = tuned.extract_many_with_confidence(images[:1])
    tokenizer = tuned.processor.tokenizer
    inputs = tuned.prepare(images[:1])
    begun = tokenizer(' {"is_food": ', add_special_tokens=False, return_tensors="pt").input_ids
    ids = torch.cat([inputs.pop("input_ids"), begun], 1)
    inputs.pop("attention_mask")
    with torch.inference_mode():
        logits = tuned.model(input_ids=ids, **inputs).logits[0, -1]
    both = logits[[tokenizer.convert_tokens_to_ids("0"), tokenizer.convert_tokens_to_ids("1")]].log_softmax(0)
    assert log(confidence.is_food) == pytest.approx(float(both[record.is_food]), abs=1e-4)


@pytest.mark.parametrize(("vnni", "kind"), [(True, Int8), (False, TokenByToken)])
def test_int8_answers_like_fp32(vnni, kind, images, tuned, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_vnni": vnni})
    quantized = Extractor.from_pretrained(loading.TINY_TUNED, "cpu", precision="int8")
    layers = [module for module in quantized.model.modules() if isinstance(module, kind)]
    assert len(layers) == sum(isinstance(module, torch.nn.Linear) for module in tuned.model.modules())
    assert vnni or all(type(layer.linear).__module__.startswith("torch.ao") for layer in layers)
    alone = [quantized.extract(image) for image in images]
    assert (
        sum(record.is_food == tuned.extract(image).is_food for record, image in zip(alone, images, strict=True))
        >= len(images) - 2
    )
    assert list(quantized.extract_many(images, len(images))) == alone


@pytest.mark.parametrize(("many", "one"), [("bf16", "int8"), ("int8", "fp32"), ("fp32", "bf16")])
def test_the_phase_decides_the_format_and_an_answer_does_not_depend_on_its_batch(many, one, images, monkeypatch):
    model = loading.load_model(loading.TINY_TUNED, torch.device("cpu"))
    embeddings = model.get_input_embeddings().weight
    convert(model, many, one)
    assert embeddings.dtype is torch.float32  # although the head shares them
    mixed, used = Extractor(model, loading.load_processor(loading.TINY_TUNED)), []
    layer = model.get_submodule("model.text_model.layers.0.mlp.up_proj")
    for name, part in layer.named_children():
        part.register_forward_hook(lambda _, args, __, name=name: used.append((name, args[0].shape[1])))
    alone = [mixed.extract(image) for image in images]
    first, *steps = [name for name, _ in used[used.index(max(used, key=lambda pair: pair[1])) :]]
    assert first == "many"
    assert steps.count("one") > len(images)
    assert all(name == "many" for name, tokens in used if tokens > 60)  # a prompt with an image
    assert list(mixed.extract_many(images, len(images))) == alone


@pytest.mark.parametrize("vnni", [True, False])
@torch.inference_mode()
def test_int8_rounding_does_not_depend_on_other_tokens(vnni, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_vnni": vnni})
    torch.manual_seed(0)
    for bias in (True, False):
        exact = torch.nn.Linear(96, 40, bias)
        rounded = torch.nn.Sequential(copy.deepcopy(exact))
        convert(rounded, "int8", "int8")
        x = torch.randn(2, 5, 96) * torch.logspace(-3, 3, 10).view(2, 5, 1)  # tokens of very different sizes
        x[1, 2] = 0
        together = rounded(x)
        assert torch.equal(
            together, torch.stack([torch.stack([rounded(token[None])[0] for token in row]) for row in x])
        )
        assert ((together - exact(x)).norm(dim=-1) <= 0.03 * exact(x).norm(dim=-1)).all()


def test_unknown_precision_is_named(monkeypatch):
    with pytest.raises(ModelError, match="'int4' is not known: choose one of fp32"):
        Extractor.from_pretrained(loading.TINY_TUNED, "cpu", precision="int4")
    with pytest.raises(ModelError, match="'int8' is for inference on a CPU"):
        loading.load_model(loading.TINY_TUNED, torch.device("cuda"), precision="int8")
    assert Extractor.from_pretrained(loading.TINY_TUNED, "cpu", precision="bf16").model.dtype is torch.bfloat16


def test_transformers_pipeline_gives_the_same_answer(tuned, images, tmp_path, monkeypatch):
    [snippet] = re.findall(
        r"```python\n(from transformers import pipeline\n.*?)```",
        (ROOT / "experiments" / "README.md").read_text(),
        re.DOTALL,
    )
    images[1].save(tmp_path / "lunch.png")
    monkeypatch.chdir(tmp_path)
    said = io.StringIO()
    with redirect_stdout(said):
        exec(snippet.replace("outputs/offline/stage2", str(loading.TINY_TUNED)).replace("lunch.jpg", "lunch.png"), {})
    assert said.getvalue().strip() == tuned.generate_texts([images[1]])[0]
