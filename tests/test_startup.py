"""What the first answer costs: no import that extraction does not use, and nothing broken for who uses it later."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForImageTextToText

from foodextract.data import scenes
from foodextract.inference.extractor import Extractor
from foodextract.models import loading
from foodextract.models.loading import ModelError

HEAVY = [
    *("accelerate", "datasets", "fastapi", "gradio", "inflect", "jupyter_core", "matplotlib", "num2words", "onnx"),
    *("onnxruntime", "openai", "pandas", "peft", "pyarrow", "scipy", "sklearn", "sympy"),
    *("timm", "torch._dynamo", "trl"),
]
EXTRACT = """
import json, sys
from typer.testing import CliRunner
from foodextract.cli import app

result = CliRunner().invoke(app, ["extract", {image!r}])
loaded = [name for name in {heavy!r} if name in sys.modules]

import accelerate.utils, scipy.optimize, torch, torchvision
from transformers import modeling_utils
from transformers.loss import loss_for_object_detection

model = torch.nn.Linear(1, 1)
later = [
    modeling_utils.extract_model_from_parallel(model) is model,
    len(loss_for_object_detection.linear_sum_assignment([[1, 2], [2, 1]])) == 2,
    callable(torchvision.models.resnet18),
    len(torchvision.ops.nms(torch.tensor([[0.0, 0, 1, 1]]), torch.ones(1), 0.5)) == 1,
    torch.compile(model, backend="eager")(torch.ones(1, 1)).shape == (1, 1),
    scipy.optimize.linear_sum_assignment.__module__ != "foodextract.models.startup",
]
print(json.dumps([result.exit_code, result.stdout, loaded, later]))
"""


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("one") / "one.png"
    next(iter(scenes.draw_scenes(78, "test", 1))).image.save(path)
    return path


@pytest.mark.slow
def test_an_extraction_imports_only_what_it_uses_and_the_rest_works_afterwards(image, tmp_path):
    code = EXTRACT.format(image=str(image), heavy=HEAVY)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-3000:]
    status, printed, loaded, later = json.loads(run.stdout.splitlines()[-1])
    assert (status, loaded) == (0, [])
    assert all(later), later
    [answer] = Extractor.from_pretrained(loading.TINY_TUNED).extract_many([image])
    assert json.loads(printed) == {"file": str(image), **answer.model_dump()}


def test_help_imports_neither_torch_nor_transformers():
    code = (
        "import sys, foodextract.cli; print([one for one in ('torch', 'transformers', 'numpy') if one in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert shown.stdout.strip() == "[]", shown.stderr


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_model_loaded_without_initial_values_is_the_same(precision):
    ours = loading.load_model(loading.TINY_TUNED, torch.device("cpu"), precision=precision)
    dtype = loading.PRECISIONS[precision]
    theirs = AutoModelForImageTextToText.from_pretrained(loading.TINY_TUNED, dtype=dtype, attn_implementation="sdpa")
    ours, theirs = (dict(model.named_parameters()) | dict(model.named_buffers()) for model in (ours, theirs))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in ours)


def test_a_processor_of_another_model_is_noticed(tuned):
    processor = loading.load_processor(loading.TINY_TUNED)
    loading.check_image_tokens(tuned.model, processor)
    processor.image_seq_len += 1
    with pytest.raises(ModelError, match="use the processor that was saved with the model"):
        loading.check_image_tokens(tuned.model, processor)
