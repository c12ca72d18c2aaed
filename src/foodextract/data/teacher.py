"""Asking a larger model behind an OpenAI-compatible endpoint about one image, in our words and our schema, and what came of it."""

import asyncio
import base64
import io
import json
import os
from array import array
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import openai

from foodextract import prompts
from foodextract.images import ImageError, open_image
from foodextract.schema import FoodRecord, json_schema

# At temperature 0 the same question gets the same answer, so one that breaks the schema is asked for again a little warmer. It pays:
# vLLM's grammar allows endless white space, and some models get lost in it (https://github.com/vllm-project/vllm/issues/38696).
TEMPERATURES = (0.0, 0.5)


class TeacherError(RuntimeError):
    """Labeling cannot start or go on; the message names the place and the remedy. What was labeled before is kept."""


@dataclass(frozen=True)
class Teacher:
    """Whom to ask, and how."""

    endpoint: str  # up to and including /v1
    model: str
    concurrency: int = 8  # requests under way at once
    max_edge: int = 1024  # pixels, the longest edge of the image sent
    max_tokens: int = 1024  # the longest record, 20 items of 50 characters in both lists, takes about 700
    timeout: float = 120.0  # seconds without a sign of life from the server
    retries: int = (
        5  # the client's own, with back-off: 408, 409, 429 (heeding Retry-After), 5xx, time-outs, lost connections
    )


@dataclass
class Summary:
    """What one run did: `images` = `known` + `duplicates` + `asked`, and `asked` = `labeled` + `rejected` + `failed`."""

    images: int = 0  # files looked at
    known: int = 0  # … whose bytes an earlier run had finished
    duplicates: int = 0  # … whose bytes this run had met before
    asked: int = 0  # … all others
    labeled: int = 0
    rejected: int = 0  # no answer that fits the schema, or a file that is no image (never sent); final
    failed: int = 0  # the endpoint gave no answer, or the disk no file; a later run tries again
    questions: int = 0
    repeated: int = 0  # questions put again because the answer broke the schema
    requests: int = 0  # HTTP requests: questions and the client's retries
    streak: int = 0  # failures of the endpoint since its last answer
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    latencies: array = field(
        default_factory=lambda: array("d"), repr=False
    )  # seconds, one an answer, without waits before retries

    def cost(self, prompt_price: float, completion_price: float) -> float:
        """In the currency of the prices, which are for a million tokens."""
        return (self.prompt_tokens * prompt_price + self.completion_tokens * completion_price) / 1e6

    def __str__(self) -> str:
        p50, p95 = np.percentile(self.latencies or [np.nan], (50, 95))
        return (
            f"{self.images:,} images: {self.known:,} finished before, {self.duplicates:,} duplicates, {self.asked:,} asked = "
            f"{self.labeled:,} labeled + {self.rejected:,} rejected + {self.failed:,} failed\n"
            f"{self.requests:,} requests, {self.requests - self.questions:,} of them retries, {self.repeated:,} for a second answer; "
            f"latency p50 {p50:.2f} s, p95 {p95:.2f} s; {self.seconds:.1f} s, {self.asked / max(self.seconds, 1e-9):.2f} images/s\n"
            f"{self.prompt_tokens:,} prompt tokens, {self.completion_tokens:,} completion tokens"
        )


def as_data_url(data: bytes, max_edge: int) -> str:
    """The image in a file's bytes as an upright RGB JPEG in a data URL, never enlarged. Raises ImageError."""
    image, jpeg = open_image(data), io.BytesIO()
    image.thumbnail((max_edge, max_edge))
    image.save(jpeg, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode()


def question(teacher: Teacher, url: str, temperature: float = 0.0) -> dict[str, Any]:
    """The body of a chat-completions request about the image at `url`: `prompts.conversation()` in OpenAI's format."""
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": prompts.USER}]
    return {
        "model": teacher.model,
        "messages": [{"role": "system", "content": prompts.SYSTEM}, {"role": "user", "content": content}],
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "FoodRecord", "schema": json_schema(), "strict": True},
        },
        "temperature": temperature,
        "max_tokens": teacher.max_tokens,
    }


async def _ask(client: openai.AsyncOpenAI, teacher: Teacher, url: str, summary: Summary) -> dict[str, Any]:
    outcome: dict[str, Any] = {}
    for temperature in TEMPERATURES:
        summary.questions += 1
        summary.repeated += bool(outcome)
        response = await client.chat.completions.with_raw_response.create(**question(teacher, url, temperature))
        try:  # read by hand: the client's own models let any JSON pass for a completion
            body = json.loads(response.text)
            message, why = body["choices"][0]["message"], body["choices"][0].get("finish_reason")
            text = message.get("content") or message.get("refusal") or ""
            tokens = [int((body.get("usage") or {}).get(f"{kind}_tokens") or 0) for kind in ("prompt", "completion")]
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            reason = f"the response is no chat completion ({type(error).__name__}: {error})"
            outcome = {"status": "failed", "http": response.status_code, "reason": reason, "raw": response.text}
            continue
        summary.latencies.append(response.elapsed.total_seconds())
        summary.prompt_tokens += tokens[0]
        summary.completion_tokens += tokens[1]
        try:
            record = FoodRecord.from_json(text).model_dump()
            return {
                "status": "labeled",
                "record": record,
                "source": f"teacher:{teacher.model}",
                "temperature": temperature,
            }
        except (
            ValueError,
            TypeError,
            RecursionError,
        ) as error:  # more than AnswerError: a list for a text, a 5,000-digit number, [[[[…
            reason = f"{error}" if why in ("stop", None) else f"finish_reason {why}: {error}"
            outcome = {"status": "rejected", "reason": reason, "raw": str(text)}
    return outcome


async def outcome_of(
    client: openai.AsyncOpenAI, teacher: Teacher, data: bytes | OSError, summary: Summary
) -> dict[str, Any]:
    """What becomes of one image: `status`, with `record` or with `reason`; `http` where the endpoint failed (0: no connection)."""
    try:
        if isinstance(data, OSError):
            return {"status": "failed", "reason": f"cannot be read: {data.strerror}"}
        outcome = await _ask(client, teacher, await asyncio.to_thread(as_data_url, data, teacher.max_edge), summary)
    except ImageError as error:
        return {"status": "rejected", "reason": str(error), "raw": ""}
    except openai.APIStatusError as error:
        outcome = {
            "status": "failed",
            "http": error.status_code,
            "reason": f"HTTP {error.status_code}: {error.response.text}",
        }
    except openai.OpenAIError as error:
        cause = f" ({type(error.__cause__).__name__}: {error.__cause__})" if error.__cause__ else ""
        outcome = {
            "status": "failed",
            "http": 408 if isinstance(error, openai.APITimeoutError) else 0,
            "reason": f"{error}{cause}",
        }
    summary.streak = summary.streak + 1 if "http" in outcome else 0
    return outcome


def stop_if_hopeless(teacher: Teacher, outcome: dict[str, Any], summary: Summary) -> None:
    status, new = (
        outcome.get("http"),
        not summary.latencies,
    )  # what has answered before may recover, or object to one image only
    if status == 401 or (status == 403 and new):
        remedy = "it refuses the key: set OPENAI_API_KEY to one that may use this model"
    elif status == 404 and new:
        remedy = f"check that the address ends in /v1 and that it serves {teacher.model!r} ({teacher.endpoint}/models lists what it does)"
    elif status == 0 and new:
        remedy = "it cannot be reached: start the server, or check the address"
    elif summary.streak >= max(10, 2 * teacher.concurrency):
        remedy = f"{summary.streak} failures in a row: see to the server, then start the same command again"
    else:
        return
    raise TeacherError(
        f"{teacher.endpoint}: {remedy}. What was labeled is kept. The last failure: {outcome['reason'][:500]}"
    )


def _key() -> str:
    return os.environ.get("OPENAI_API_KEY", "").strip()


def bounded(text: str) -> str:
    """A server's words as we keep them: without our key, should it repeat what it was sent, and without end."""
    return (text.replace(_key(), "***") if _key() else text)[:20_000]


def make_client(teacher: Teacher, summary: Summary) -> openai.AsyncOpenAI:
    address = urlsplit(teacher.endpoint)
    if address.scheme not in ("http", "https") or not address.hostname or "@" in address.netloc or address.query:
        raise TeacherError(
            "the endpoint must look like http://localhost:8000/v1, without a key in it: that belongs in OPENAI_API_KEY"
        )
    if not (_key().isascii() and _key().isprintable()):
        raise TeacherError("OPENAI_API_KEY holds characters that no key has: copy it again")

    async def count(_: object) -> None:
        summary.requests += 1

    return openai.AsyncOpenAI(
        base_url=teacher.endpoint,
        api_key=_key() or "none",  # the client insists on one; a local server does not look at it
        max_retries=teacher.retries,
        timeout=openai.Timeout(teacher.timeout, connect=min(10.0, teacher.timeout)),
        http_client=openai.DefaultAsyncHttpxClient(event_hooks={"request": [count]}),
    )
