"""Send images to a vLLM server with an exported model (see its serve.sh); print one JSON line each.

python deploy/vllm/client.py lunch.jpg --endpoint http://localhost:8000/v1
"""

import os
import sys
from pathlib import Path
from typing import Annotated

import openai
import typer

from foodextract import schema
from foodextract.data.teacher import Teacher, as_data_url, question
from foodextract.images import ImageError
from foodextract.schema import AnswerError, FoodRecord

ANSWER_TOKENS = 256  # the context length of the export allows no more


def request(image: bytes, model: str, endpoint: str = "") -> dict:
    """Return the body of a chat-completions request: our prompt, our schema, greedy. Raises ImageError."""
    body = question(Teacher(endpoint, model, max_tokens=ANSWER_TOKENS), as_data_url(image, Teacher.max_edge))
    body["response_format"]["json_schema"]["schema"] = schema.guided_schema()
    return body


def main(
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    endpoint: Annotated[
        str, typer.Option(help="Up to and including /v1; OPENAI_API_KEY holds its key.")
    ] = "http://localhost:8000/v1",
    model: Annotated[str, typer.Option(help="Name of the model at the endpoint.")] = "foodextract",
    timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds per request. Failed requests are retried twice.")
    ] = 60.0,
) -> None:
    """Print an answer for each image. Exit status: 0 if all were answered, else 1."""
    client = openai.OpenAI(base_url=endpoint, api_key=os.environ.get("OPENAI_API_KEY") or "none", timeout=timeout)
    failed = False
    for path in images:
        try:
            response = client.chat.completions.create(**request(path.read_bytes(), model, endpoint))
            print(FoodRecord.from_json(response.choices[0].message.content or "").to_json(), flush=True)
        except (ImageError, AnswerError, OSError, openai.OpenAIError) as error:
            print(f"{path}: {error}", file=sys.stderr)
            failed = True
    raise typer.Exit(int(failed))


if __name__ == "__main__":
    typer.run(main)
