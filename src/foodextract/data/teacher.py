"""Ask a larger model behind an OpenAI-compatible endpoint for labels."""

import asyncio
import base64
import io
import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai

from foodextract import prompts
from foodextract.images import ImageError, ImageSource, open_image
from foodextract.schema import FoodRecord

# An answer that breaks the schema is requested again at the second temperature; at 0 it would be the same. Such answers
# occur because vLLM's grammar allows endless white space (https://github.com/vllm-project/vllm/issues/38696).
TEMPERATURES = (0.0, 0.5)
MAX_TEXT = 20_000  # characters kept of a response
OPTIONAL = ("max_tokens", "response_format", "temperature")  # every answer is checked against the schema in any case
TAG = r"(?:think|thought|reason)\w*>"  # around thoughts; gpt-oss has <|message|> before each part, the answer last

Outcome = dict[str, Any]


class TeacherError(RuntimeError):
    """Labeling cannot start or continue; the message names the cause and the remedy. Finished labels are kept."""


@dataclass(frozen=True)
class Teacher:
    """A model at an endpoint, and how to ask it."""

    endpoint: str  # up to and including /v1
    model: str
    concurrency: int = 8  # requests at a time
    max_edge: int = 1024  # pixels, the longest edge of the image sent
    max_tokens: int = 1024  # the longest record, 20 items of 50 characters in both lists, takes about 700
    timeout: float = 120.0  # seconds without data from the server
    # Made by the client, with back-off: 408, 409, 429 (respecting Retry-After), 5xx, connection errors.
    retries: int = 5


def as_data_url(source: ImageSource, max_edge: int) -> str:
    """Convert an image to an upright RGB JPEG in a data URL, never enlarged. Raises ImageError."""
    image, jpeg = open_image(source), io.BytesIO()
    image.thumbnail((max_edge, max_edge))
    image.save(jpeg, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode()


def question(teacher: Teacher, url: str, temperature: float = 0.0) -> dict[str, Any]:
    """Return the body of a chat-completions request about the image at `url`, with the prompts used in training."""
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": prompts.USER}]
    schema = {"name": "FoodRecord", "schema": FoodRecord.model_json_schema(), "strict": True}
    return {
        "model": teacher.model,
        "messages": [{"role": "system", "content": prompts.SYSTEM}, {"role": "user", "content": content}],
        "response_format": {"type": "json_schema", "json_schema": schema},
        "temperature": temperature,
        "max_tokens": teacher.max_tokens,
    }


def make_client(teacher: Teacher) -> openai.AsyncOpenAI:
    """Return the client of a teacher, with the key in OPENAI_API_KEY. Raises TeacherError for a bad address or key."""
    address = urlsplit(teacher.endpoint)
    if address.scheme not in ("http", "https") or not address.hostname or "@" in address.netloc or address.query:
        message = "the endpoint must look like http://localhost:8000/v1, without a key: set OPENAI_API_KEY for that"
        raise TeacherError(message)
    if not (_key().isascii() and _key().isprintable()):
        raise TeacherError("OPENAI_API_KEY contains characters that no key has: copy it again")
    return openai.AsyncOpenAI(
        base_url=teacher.endpoint,
        api_key=_key() or "none",  # the client requires one; a local server ignores it
        max_retries=teacher.retries,
        timeout=openai.Timeout(teacher.timeout, connect=min(10.0, teacher.timeout)),
    )


class Endpoint:
    """Asks for labels, and stops a run when the endpoint cannot be expected to answer."""

    def __init__(self, client: openai.AsyncOpenAI, teacher: Teacher) -> None:
        self.client, self.teacher = client, teacher
        self.answered, self.failures = False, 0  # ever; in a row
        self.labeled, self.rejected = False, 0  # ever; before the first label
        self.patience = max(10, 2 * teacher.concurrency)
        self.left_out: set[str] = set()  # parameters that this endpoint refuses

    async def label(self, path: Path) -> Outcome:
        """Ask for the label of one image file.

        `status` is "labeled" (with `record`), "rejected" (no valid answer, or no image) or "failed" (no answer).
        `reason` and `raw` say why, and `http` is the status code of a failure, 0 without a connection.
        """
        try:
            data = await asyncio.to_thread(path.read_bytes)
            return await self._ask(await asyncio.to_thread(as_data_url, data, self.teacher.max_edge))
        except OSError as error:
            return {"status": "failed", "reason": f"cannot be read: {error.strerror}"}
        except ImageError as error:
            return {"status": "rejected", "reason": str(error)}
        except openai.APIStatusError as error:
            return _failed(error.status_code, f"HTTP {error.status_code}: {error.response.text}")
        except openai.OpenAIError as error:
            cause = f" ({type(error.__cause__).__name__}: {error.__cause__})" if error.__cause__ else ""
            return _failed(408 if isinstance(error, openai.APITimeoutError) else 0, f"{error}{cause}")

    async def _ask(self, url: str) -> Outcome:
        outcome: Outcome = {}
        usage = {"prompt_tokens": 0, "completion_tokens": 0}
        for temperature in TEMPERATURES:
            response = await self._create(question(self.teacher, url, temperature))
            try:  # parsed here, because the client accepts any JSON as a completion
                body = json.loads(response.text)
                choice, counts = body["choices"][0], body.get("usage") or {}
                finish = choice.get("finish_reason") or "stop"
                # vLLM may take an answer without thoughts for thoughts
                keys = ("content", "refusal", *(("reasoning_content", "reasoning") if finish == "stop" else ()))
                text = next(filter(None, map(choice["message"].get, keys)), "")
                usage = {name: count + int(counts.get(name) or 0) for name, count in usage.items()}
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
                reason = f"the response is no chat completion ({type(error).__name__}: {error})"
                outcome = _failed(response.status_code, reason) | {"raw": _bounded(response.text)}
                continue
            answer = {"temperature": temperature, "source": f"teacher:{self.teacher.model}", "usage": usage}
            try:
                return {"status": "labeled", "record": FoodRecord.from_json(_object_in(text)).model_dump(), **answer}
            except (ValueError, TypeError, RecursionError) as error:  # the answer may be no text, or nested too deep
                reason = f"{error}" if finish == "stop" else f"finish_reason {finish}: {error}"
                outcome = {"status": "rejected", "reason": _bounded(reason), "raw": _bounded(str(text)), **answer}
        return outcome

    async def _create(self, body: dict[str, Any]) -> Any:
        """Send a request, without the parameters that the endpoint refuses by name."""
        while True:
            sent = {name: value for name, value in body.items() if name not in self.left_out}
            if "max_tokens" in self.left_out:  # the name that newer models of OpenAI ask for
                sent["max_completion_tokens"] = body["max_tokens"]
            try:
                return await self.client.chat.completions.with_raw_response.create(**sent)
            except openai.BadRequestError as error:
                refused = next((name for name in OPTIONAL if name in sent and name in error.response.text), None)
                if refused is None:
                    raise
                if refused not in self.left_out:
                    print(f"{self.teacher.endpoint} refuses `{refused}`: asked without it", file=sys.stderr)
                self.left_out.add(refused)

    def check(self, outcome: Outcome) -> None:
        """Count failures in a row. Raises TeacherError with the remedy when further requests make no sense.

        An endpoint that has answered before may recover, or refuse a single image only. One whose first answers are no
        records ignores the schema.
        """
        if "usage" in outcome:
            self.answered, self.failures = True, 0
            self.labeled = self.labeled or outcome["status"] == "labeled"
            self.rejected += not self.labeled
        self.failures += "http" in outcome
        status, address, new = outcome.get("http"), self.teacher.endpoint, not self.answered
        if not self.labeled and self.rejected >= self.patience:
            remedy = (
                f"none of the first {self.rejected} answers is a record: it ignores `response_format`. Choose a server "
                "with JSON schemas (vLLM has them) or another model, and rerun with --retry-rejected"
            )
        elif status is None:
            return
        elif status == 401 or (status == 403 and new):
            remedy = "it refuses the key: set OPENAI_API_KEY to one that may use this model"
        elif status == 404 and new:
            models = f"{address}/models lists what it serves"
            remedy = f"check that the address ends in /v1 and that it serves {self.teacher.model!r} ({models})"
        elif status == 0 and new:
            remedy = "it cannot be reached: start the server, or check the address"
        elif self.failures >= self.patience:
            remedy = f"{self.failures} failures in a row: check the server, then rerun the command to resume"
        else:
            return
        kept = f"Finished labels are kept. The last failure: {outcome['reason'][:500]}"
        raise TeacherError(f"{address}: {remedy}. {kept}")


def _failed(status: int, reason: str) -> Outcome:
    return {"status": "failed", "http": status, "reason": _bounded(reason)}


def _object_in(text: Any) -> Any:
    """Return the JSON of the one record in an answer with fences, prose or thoughts; other answers as they are."""
    if not isinstance(text, str):
        return text
    rest = re.split(f"<{TAG}", re.split(rf"</{TAG}|<\|message\|>", text)[-1])[0][-MAX_TEXT:]
    found = set()
    while begun := re.search(r'\{\s*"', rest):  # braces of prose hold no key
        try:
            value, end = json.JSONDecoder().raw_decode(rest, begun.start())
        except (ValueError, RecursionError):
            return text
        if "is_food" in value:
            found.add(rest[begun.start() : end])
        rest = rest[end if "is_food" in value else begun.end() :]
    return found.pop() if len(found) == 1 else text


def _key() -> str:
    return os.environ.get("OPENAI_API_KEY", "").strip()


def _bounded(text: str) -> str:
    """Remove our key, which a server may repeat, and cut overlong texts."""
    return (text.replace(_key(), "***") if _key() else text)[:MAX_TEXT]
