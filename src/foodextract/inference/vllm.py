"""Export of a tuned model for vLLM: a folder, and the command that serves it with the prompt and budget of training.

Checked against vLLM 0.33, which includes SmolVLM and needs `num2words`. It takes the image budget from the saved
processor. With `--chat-template-content-format openai` it wraps text messages as the chat template expects, and its
backend `guidance` passes a request's JSON schema to llguidance.
"""

import json
import os
import shlex
from pathlib import Path

import torch
from PIL import Image

from foodextract import schema
from foodextract.inference.confidence import Calibration
from foodextract.inference.extractor import MAX_NEW_TOKENS, Extractor
from foodextract.models.loading import ModelError, check_target, load_model, load_processor
from foodextract.models.training_data import TrainingData

NAME = "foodextract"  # of the model, in requests

SCRIPT = """#!/bin/sh
# Needs vLLM 0.33 and num2words in their own environment. Takes further options, such as --host 0.0.0.0
cd "$(dirname "$0")"
exec {command} "$@"
"""


def export_vllm(model_id: str | os.PathLike[str], out: Path, tiles: int | None = None) -> str:
    """Write bf16 weights, processor, chat template, JSON schema and `serve.sh` into `out`. Returns its command.

    Raises ModelError, also for a model whose dialect is not canonical JSON: under the schema it would silently lose
    items.
    """
    check_target(model_id, out)
    processor = load_processor(model_id, tiles)
    model = load_model(model_id, torch.device("cpu"), precision="bf16")
    extractor = Extractor(model, processor)
    if not (dialect := extractor.dialect).canonical:
        raise ModelError(
            f"{model_id} writes {dialect}, and vLLM would force the JSON schema on it, which loses items: use "
            "`foodextract extract` or `foodextract serve`, which convert, or fine-tune it to JSON first "
            "(`foodextract train --base`)"
        )
    model.generation_config.do_sample = False
    model.save_pretrained(out)
    processor.save_pretrained(out)
    Calibration.copy(model_id, out)
    TrainingData.copy(model_id, out)
    (out / "food_record.schema.json").write_text(json.dumps(schema.guided_schema(), indent=2) + "\n")
    longest = extractor.prepare([Image.new("RGB", (4096, 4096))])["input_ids"].shape[1] + MAX_NEW_TOKENS
    arguments = [
        *("vllm", "serve", ".", "--served-model-name", NAME, "--host", "127.0.0.1", "--port", "8000"),
        *("--max-model-len", str(longest), "--limit-mm-per-prompt", '{"image": 1, "video": 0}'),
        *("--chat-template", "chat_template.jinja", "--chat-template-content-format", "openai"),
        *("--structured-outputs-config", '{"backend": "guidance"}'),
    ]
    command = shlex.join(arguments)
    (out / "serve.sh").write_text(SCRIPT.format(command=command))
    (out / "serve.sh").chmod(0o755)
    return command
