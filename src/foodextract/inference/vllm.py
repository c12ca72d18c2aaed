"""A tuned model → the folder and the command that vLLM's OpenAI-compatible server needs to ask it as it was trained.

Read against vLLM 0.33, which has SmolVLM built in and wants `num2words` beside it. It takes the image budget from the saved processor; told
`--chat-template-content-format openai`, it wraps a text message into the list of parts that the chat template expects; and its backend
`guidance` hands a request's JSON schema to llguidance.

The schema knows canonical JSON only. A checkpoint that writes anything else would lose its items under it without a word, so it is refused.
"""

import json
import os
import shlex
from pathlib import Path

import torch
from PIL import Image

from foodextract import schema
from foodextract.inference.extractor import MAX_NEW_TOKENS, Extractor
from foodextract.models.loading import ModelError, load_model, load_processor

NAME = "foodextract"  # of the model, in requests
SCHEMA_FILE, TEMPLATE_FILE = "food_record.schema.json", "chat_template.jinja"

SCRIPT = """#!/bin/sh
# vLLM 0.33 and num2words, in an environment of their own; further options may follow, such as --host 0.0.0.0
cd "$(dirname "$0")"
exec {command} "$@"
"""


def export_vllm(model_id: str | os.PathLike, out: Path, tiles: int | None = None) -> str:
    """Write bf16 weights, processor, chat template, JSON schema and `serve.sh` into `out`; the command that is in it.

    Raises ModelError, also for a model that writes another dialect than canonical JSON.
    """
    processor = load_processor(model_id, tiles)
    model = load_model(model_id, torch.device("cpu"), precision="bf16")
    extractor = Extractor(model, processor)
    if not (dialect := extractor.dialect).canonical:
        raise ModelError(
            f"{model_id} writes {dialect}, and vLLM would force the JSON schema on it, which loses items: answer with "
            "`foodextract extract` or `foodextract serve`, which convert, or fine-tune it to JSON first (`foodextract train --base`)"
        )
    model.generation_config.do_sample = False
    model.save_pretrained(out)
    processor.save_pretrained(out)
    (out / SCHEMA_FILE).write_text(json.dumps(schema.guided_schema(), indent=2) + "\n")
    command = shlex.join(arguments(extractor))
    (out / "serve.sh").write_text(SCRIPT.format(command=command))
    (out / "serve.sh").chmod(0o755)
    return command


def arguments(extractor: Extractor) -> list[str]:
    """The command, to be run in the model's folder. Its context holds the longest prompt and the longest answer, and no more."""
    longest = extractor.prepare([Image.new("RGB", (4096, 4096))])["input_ids"].shape[1] + MAX_NEW_TOKENS
    return [
        *("vllm", "serve", ".", "--served-model-name", NAME, "--host", "127.0.0.1", "--port", "8000"),
        *("--max-model-len", str(longest), "--limit-mm-per-prompt", '{"image": 1, "video": 0}'),
        *("--chat-template", TEMPLATE_FILE, "--chat-template-content-format", "openai"),
        *("--structured-outputs-config", '{"backend": "guidance"}'),
    ]
