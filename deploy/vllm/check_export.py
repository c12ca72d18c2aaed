"""Ask vLLM itself, without a GPU, whether it reads an exported folder as this project does.

    python deploy/vllm/check_export.py exported --vllm /path/to/its/environment/bin/vllm

`vllm launch render` takes the options of `vllm serve` and stops short of the model: it turns a request into the tokens that the model would
be given. The options are those of the folder's serve.sh, the request is the client's, and the tokens must be those of our extractor.
"""

import io
import json
import os
import shlex
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Annotated

import httpx
import typer
from client import ANSWER_TOKENS, request

from foodextract import schema
from foodextract.data.scenes import draw_scenes
from foodextract.inference.extractor import Extractor

SHAPES = ((256, 256), (2000, 300), (90, 1200), (33, 47))  # pixels of the images that are asked about
PATIENCE = 900  # seconds until vLLM has started: it imports a great deal


def render_command(folder: Path, vllm: str, port: int) -> list[str]:
    """What serve.sh would run, but for the address, and for `launch render` in place of `serve`."""
    [line] = [line for line in (folder / "serve.sh").read_text().splitlines() if line.startswith("exec vllm serve")]
    options = shlex.split(line.removesuffix('"$@"'))[3:]
    return [vllm, "launch", "render", *options, "--host", "127.0.0.1", "--port", str(port)]


def differences(asked: dict, told: dict, tokens: list[int]) -> list[str]:
    """In what vLLM's reading of a request differs from what was meant."""
    wanted = {"temperature": asked["temperature"], "max_tokens": ANSWER_TOKENS}
    params = told["sampling_params"]
    found = [
        f"{name} {params.get(name)} instead of {value}" for name, value in wanted.items() if params.get(name) != value
    ]
    guided = (params.get("structured_outputs") or {}).get("json")
    if (json.loads(guided) if isinstance(guided, str) else guided) != schema.guided_schema():
        found.append("another JSON schema")
    if told["token_ids"] != tokens:
        found.append(f"{len(told['token_ids'])} tokens instead of {len(tokens)}, or others")
    return found


def main(
    folder: Annotated[Path, typer.Argument(help="What `foodextract export vllm` wrote.")],
    vllm: Annotated[str, typer.Option(help="The command `vllm`, of an environment of its own.")] = "vllm",
) -> None:
    """Exit status: 0 when every request is read as it was meant."""
    extractor = Extractor.from_pretrained(folder, "cpu")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address, failed = f"http://127.0.0.1:{port}", False
    environment = {**os.environ, "VLLM_NO_USAGE_STATS": "1", "VLLM_TARGET_DEVICE": "cpu", "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(  # noqa: S603
            render_command(folder, vllm, port), cwd=folder, env=environment, stdout=log, stderr=log
        ) as server,
    ):
        try:
            end = time.monotonic() + PATIENCE
            while not _answers(address):
                if server.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    raise RuntimeError(f"vLLM did not start: {log.read()[-3000:]}")
                time.sleep(1)
            scene = next(draw_scenes(83, "test", 1)).image
            for shape in SHAPES:
                scene.resize(shape).save(file := io.BytesIO(), "PNG")
                asked = request(file.getvalue(), "foodextract")
                told = httpx.post(f"{address}/v1/chat/completions/render", json=asked, timeout=120, trust_env=False)
                if told.is_error:
                    log.seek(0)
                    raise RuntimeError(f"vLLM answered {told.status_code}: {told.text}\n{log.read()[-3000:]}")
                tokens = extractor.prepare_image(file.getvalue())["input_ids"][0].tolist()
                found = differences(asked, told.json(), tokens)
                failed |= bool(found)
                print(
                    f"{shape[0]} x {shape[1]}: {'; '.join(found) or f'the same {len(tokens)} tokens, schema and limits'}",
                    flush=True,
                )
        finally:
            server.terminate()
    raise typer.Exit(int(failed))


def _answers(address: str) -> bool:
    try:
        return httpx.get(f"{address}/health", timeout=5, trust_env=False).is_success
    except httpx.HTTPError:
        return False


if __name__ == "__main__":
    typer.run(main)
