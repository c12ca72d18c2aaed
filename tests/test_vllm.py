"""What vLLM is given, and what is asked of it: against the local processor, the local grammar engine, and a stub of
its API.
"""

import base64
import json
import os
import runpy
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator
from llguidance import LLMatcher
from llguidance.hf import from_tokenizer
from PIL import Image
from pytest_httpserver import HTTPServer
from transformers import AutoConfig, AutoProcessor
from typer.testing import CliRunner
from werkzeug import Response

from foodextract import prompts, schema
from foodextract.__main__ import app
from foodextract.data import scenes
from foodextract.inference.extractor import MAX_NEW_TOKENS, Extractor
from foodextract.inference.grammar import Dialect
from foodextract.models import loading
from foodextract.schema import FoodRecord

VLLM = Path(__file__).parents[1] / "deploy" / "vllm"
client = runpy.run_path(str(VLLM / "client.py"))
RECORD = FoodRecord(is_food=1, image_title="beer", food_items=[], drink_items=["beer"])


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "model"
    result = CliRunner().invoke(app, ["export", "vllm", str(folder), "--model", str(loading.TINY_TUNED)])
    assert result.exit_code == 0, result.output
    assert str(folder / "serve.sh") in result.stdout
    return folder


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("image") / "a.png"
    next(iter(scenes.draw_scenes(83, "test", 1))).image.save(path)
    return path


def command(folder):
    """The arguments that `serve.sh` starts vllm with, as a shell reads them."""
    (folder.parent / "bin").mkdir(exist_ok=True)
    fake = folder.parent / "bin" / "vllm"
    fake.write_text('#!/bin/sh\npwd\nfor argument in "$@"; do echo "$argument"; done\n')
    fake.chmod(0o755)
    run = ["sh", str(folder / "serve.sh"), "--host", "0.0.0.0"]
    path = f"{fake.parent}:{os.environ['PATH']}"
    printed = subprocess.run(
        run, capture_output=True, text=True, check=True, cwd="/", env={"PATH": path}
    ).stdout.splitlines()
    assert printed[0] == str(folder)
    return printed[1:]


def test_folder_holds_the_exported_model(exported, tuned, image):
    assert AutoConfig.from_pretrained(exported).architectures == ["SmolVLMForConditionalGeneration"]
    assert Extractor.from_pretrained(exported, "cpu", "fp32").extract(image).is_food == tuned.extract(image).is_food
    assert (exported / "chat_template.jinja").read_text() == (loading.TINY_TUNED / "chat_template.jinja").read_text()
    assert json.loads((exported / "food_record.schema.json").read_text()) == schema.guided_schema()


def test_command_leaves_room_for_the_longest_prompt_and_answer(exported, tuned):
    arguments = command(exported)
    assert arguments[:2] == ["serve", "."]
    assert arguments[-2:] == ["--host", "0.0.0.0"]
    options = dict(zip(arguments[2:-2:2], arguments[3:-2:2], strict=True))
    longest = max(
        tuned.prepare([Image.new("RGB", size)])["input_ids"].shape[1]
        for size in ((9, 9), (3000, 40), (40, 3000), (900, 900))
    )
    assert int(options["--max-model-len"]) == longest + MAX_NEW_TOKENS
    assert json.loads(options["--limit-mm-per-prompt"]) == {"image": 1, "video": 0}
    assert (exported / options["--chat-template"]).exists()
    assert client["ANSWER_TOKENS"] == MAX_NEW_TOKENS


def test_model_of_another_dialect_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Extractor, "dialect", Dialect(" ", python=True))
    result = CliRunner().invoke(app, ["export", "vllm", str(tmp_path / "out"), "--model", str(loading.TINY_TUNED)])
    assert result.exit_code == 2
    assert "tiny-tuned writes Python reprs" in result.stderr
    assert "foodextract train --base" in result.stderr
    assert not (tmp_path / "out").exists()


def test_an_export_does_not_overwrite_its_model(tmp_path):
    shutil.copytree(loading.TINY_TUNED, tmp_path / "model")
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    folder = str(tmp_path / "model")
    result = CliRunner().invoke(app, ["export", "vllm", f"{folder}/../model", "--model", folder])
    assert result.exit_code == 2
    assert "holds the model itself: name another folder" in result.stderr
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before


@pytest.mark.parametrize("tiles", [1, 5])
def test_vllm_renders_the_same_prompt(tmp_path, tiles, tuned, image):
    """As vLLM 0.33 makes it: text wrapped into parts, the template rendered, <image> replaced by what its processor
    counts.
    """
    assert (
        CliRunner()
        .invoke(app, ["export", "vllm", str(tmp_path), "--model", str(loading.TINY_TUNED), "--tiles", str(tiles)])
        .exit_code
        == 0
    )
    processor = AutoProcessor.from_pretrained(tmp_path)
    system, user = client["request"](image.read_bytes(), "m")["messages"]
    kinds = {"image_url": {"type": "image"}, "text": {"type": "text", "text": prompts.USER}}
    wrapped = [{"role": "system", "content": [{"type": "text", "text": system["content"]}]}]
    wrapped += [{"role": "user", "content": [kinds[part["type"]] for part in user["content"]]}]
    text = processor.apply_chat_template(wrapped, add_generation_prompt=True)
    size = Image.open(image).size
    _, rows, columns = processor.image_processor.get_number_of_image_patches(size[1], size[0], {})
    tile = processor.image_token * processor.image_seq_len
    grid = "".join(
        "".join(f"{processor.fake_image_token}<row_{row}_col_{column}>{tile}" for column in range(1, columns + 1))
        + "\n"
        for row in range(1, rows + 1)
    )
    whole = f"{processor.fake_image_token}{processor.global_image_token}{tile}{processor.fake_image_token}"
    theirs = processor.tokenizer(
        text.replace("<image>", (grid + "\n" if grid else "") + whole), add_special_tokens=False
    )["input_ids"]
    ours = Extractor(tuned.model, processor).prepare([Image.open(image).convert("RGB")])["input_ids"][0].tolist()
    assert theirs == ours


def test_export_check_detects_a_wrong_prompt(exported, tuned, image, monkeypatch):
    """`check_export.py` starts vLLM's renderer with the options of serve.sh, and tells a right reading from wrong
    ones.
    """
    monkeypatch.syspath_prepend(str(VLLM))
    check = runpy.run_path(str(VLLM / "check_export.py"))
    started = check["render_command"](exported, "/there/vllm", 9)
    assert started == [
        "/there/vllm",
        "launch",
        "render",
        *command(exported)[1:-2],
        "--host",
        "127.0.0.1",
        "--port",
        "9",
    ]
    asked = client["request"](image.read_bytes(), "m")
    tokens = tuned.prepare_image(image)["input_ids"][0].tolist()
    params = {"temperature": 0.0, "max_tokens": MAX_NEW_TOKENS, "structured_outputs": {"json": schema.guided_schema()}}
    assert check["differences"](asked, {"token_ids": tokens, "sampling_params": params}, tokens) == []
    wrong = {
        "token_ids": tokens[1:],
        "sampling_params": params
        | {"temperature": 1.0, "structured_outputs": {"json": FoodRecord.model_json_schema()}},
    }
    assert len(check["differences"](asked, wrong, tokens)) == 3


def test_schema_allows_only_canonical_spacing():
    tokenizer = from_tokenizer(loading.load_processor(loading.TINY_TUNED).tokenizer)
    guided = LLMatcher.grammar_from_json_schema(
        json.dumps(schema.guided_schema()), defaults={"whitespace_flexible": True}
    )  # as vLLM calls it

    def allows(text):
        matcher = LLMatcher(tokenizer, guided)
        return matcher.consume_tokens(tokenizer.tokenize_str(text)) and matcher.is_accepting()

    for record in (RECORD, FoodRecord(is_food=0, image_title="", food_items=[], drink_items=[])):
        assert allows(record.to_json())
        assert not allows(json.dumps(record.model_dump(), separators=(",", ":")))
        assert not allows(json.dumps(record.model_dump(), indent=1))
        Draft202012Validator(schema.guided_schema()).validate(record.model_dump())
    assert not allows('{"is_food": 2, "image_title": "", "food_items": [], "drink_items": []}')
    for text, allowed in (("m&m's, 7-up (cold)", True), ("drink_items []}", False), ("a: b", False), ("", False)):
        assert allows(json.dumps(RECORD.model_dump() | {"food_items": [text]})) == allowed
    assert not allows(json.dumps(RECORD.model_dump() | {"image_title": "drink_items []}"}))


@pytest.fixture
def endpoint(monkeypatch):
    """A stub of the API: its address, the requests it got, and settings of its replies (`statuses` come before 200)."""
    monkeypatch.setenv("NO_PROXY", "localhost,127.0.0.1")
    asked, reply = [], {"statuses": [], "text": RECORD.to_json(), "seconds": 0}

    def handler(request):
        asked.append((request.path, request.get_json()))
        time.sleep(reply["seconds"])
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": reply["text"]}}
        body = {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
        status = reply["statuses"].pop(0) if reply["statuses"] else 200
        return Response(json.dumps(body), status, {"Retry-After-Ms": "1"}, content_type="application/json")

    with HTTPServer(threaded=True) as server:  # of its own: a request that timed out must not reach the next test
        server.expect_request("/v1/chat/completions").respond_with_handler(handler)
        yield server.url_for("/v1"), asked, reply


def run_client(address, *images, timeout=60.0):
    with pytest.raises(client["typer"].Exit) as ended:
        client["main"](list(images), address, "foodextract", timeout)
    return ended.value.exit_code


@pytest.mark.parametrize(("statuses", "ended"), [([429, 500], 0), ([429] * 3, 1), ([500] * 3, 1)])
def test_client_retries_a_busy_or_broken_server_twice(endpoint, image, capsys, statuses, ended):
    address, asked, reply = endpoint
    reply["statuses"] = statuses.copy()
    assert run_client(address, image) == ended
    assert len(asked) == 3
    printed = capsys.readouterr()
    assert printed.out == ("" if ended else RECORD.to_json() + "\n")
    assert f"{image}: Error code: {statuses[-1]}" in printed.err or not ended


def test_client_times_out(endpoint, image, capsys):
    address, _, reply = endpoint
    reply["seconds"] = 1
    assert run_client(address, image, timeout=0.1) == 1
    assert "timed out" in capsys.readouterr().err


def test_client_sends_an_openai_request(endpoint, image, capsys):
    address, asked, reply = endpoint

    assert run_client(address, image) == 0
    assert capsys.readouterr().out == RECORD.to_json() + "\n"
    [(path, body)] = asked
    assert path == "/v1/chat/completions"
    assert body["model"] == "foodextract"
    assert body["temperature"] == 0
    assert body["max_tokens"] == MAX_NEW_TOKENS
    assert body["response_format"]["type"] == "json_schema"
    assert body["response_format"]["json_schema"]["schema"] == schema.guided_schema()
    assert body["messages"][0] == {"role": "system", "content": prompts.SYSTEM}
    url = body["messages"][1]["content"][0]["image_url"]["url"]
    assert base64.b64decode(url.removeprefix("data:image/jpeg;base64,"))[:2] == b"\xff\xd8"
    reply["text"] = "no JSON"
    assert run_client(address, image, image.with_name("nowhere.png")) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "not JSON" in printed.err
    assert "nowhere.png" in printed.err
