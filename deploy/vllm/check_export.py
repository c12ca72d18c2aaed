"""Check without a GPU that vLLM builds the same model input from an exported folder as this project.

    python deploy/vllm/check_export.py exported --vllm /path/to/its/environment/bin/vllm

`vllm launch render` takes the options of `vllm serve`, but only turns a request into the tokens of the model. The
options come from serve.sh in the folder, the request from client.py. The tokens must equal those of our extractor.
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

SHAPES = ((256, 256), (2000, 300), (90, 1200), (33, 47))  # pixels of the test images
START_TIMEOUT = 900  # seconds; vLLM imports slowly


def render_command(folder: Path, vllm: str, port: int) -> list[str]:
    """Return the command of serve.sh with another address, and `launch render` instead of `serve`."""
    [line] = [line for line in (folder / "serve.sh").read_text().splitlines() if line.startswith("exec vllm serve")]
    options = shlex.split(line.removesuffix('"$@"'))[3:]
    return [vllm, "launch", "render", *options, "--host", "127.0.0.1", "--port", str(port)]


def differences(body: dict, rendered: dict, tokens: list[int]) -> list[str]:
    """List the differences between vLLM's rendering of a request and the request."""
    wanted = {"temperature": body["temperature"], "max_tokens": ANSWER_TOKENS}
    params = rendered["sampling_params"]
    found = [
        f"{name} {params.get(name)} instead of {value}" for name, value in wanted.items() if params.get(name) != value
    ]
    guided = (params.get("structured_outputs") or {}).get("json")
    if (json.loads(guided) if isinstance(guided, str) else guided) != schema.guided_schema():
        found.append("another JSON schema")
    if rendered["token_ids"] != tokens:
        found.append(f"{len(rendered['token_ids'])} tokens instead of {len(tokens)}, or different ones")
    return found


def main(
    folder: Annotated[Path, typer.Argument(help="What `foodextract export vllm` wrote.")],
    vllm: Annotated[str, typer.Option(help="Path of the command `vllm` in its own environment.")] = "vllm",
) -> None:
    """Compare vLLM's requests with ours. Exit status: 0 if they are equal."""
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
            end = time.monotonic() + START_TIMEOUT
            while not _answers(address):
                if server.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    raise RuntimeError(f"vLLM did not start: {log.read()[-3000:]}")
                time.sleep(1)
            scene = next(draw_scenes(83, "test", 1)).image
            for shape in SHAPES:
                scene.resize(shape).save(file := io.BytesIO(), "PNG")
                body = request(file.getvalue(), "foodextract")
                rendered = httpx.post(f"{address}/v1/chat/completions/render", json=body, timeout=120, trust_env=False)
                if rendered.is_error:
                    log.seek(0)
                    raise RuntimeError(f"vLLM answered {rendered.status_code}: {rendered.text}\n{log.read()[-3000:]}")
                tokens = extractor.prepare_image(file.getvalue())["input_ids"][0].tolist()
                found = differences(body, rendered.json(), tokens)
                failed |= bool(found)
                result = "; ".join(found) or f"the same {len(tokens)} tokens, schema and limits"
                print(f"{shape[0]} x {shape[1]}: {result}", flush=True)
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
