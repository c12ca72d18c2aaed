"""Unlabelled pictures → labels by a larger model behind any OpenAI-compatible endpoint (vLLM serving Qwen3-VL, say).

    python -m foodextract.teacher PICTURES --endpoint http://localhost:8000/v1 --model Qwen/Qwen3-VL-8B-Instruct

The teacher gets our prompt and our JSON schema, so its labels need no translation. Written beside the pictures:

    metadata.jsonl            the labels, as `sources.labelled_folder` reads them
    metadata.rejects.jsonl    the pictures without a label: why, and the teacher's words where there were any
    metadata.ledger.jsonl     one line an outcome, appended as it comes; a later run asks only for what is not in it
"""

import asyncio
import base64
import hashlib
import io
import json
import os
import sys
import time
from array import array
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import numpy as np
import openai
import typer
from tqdm import tqdm

from foodextract import prompts
from foodextract.pictures import PictureError, find_pictures, open_picture
from foodextract.schema import FoodRecord, json_schema

# At temperature 0 the same question gets the same answer, so one that breaks the schema is asked for again a little warmer. It pays:
# vLLM's grammar allows endless white space, and some models get lost in it (https://github.com/vllm-project/vllm/issues/38696).
TEMPERATURES = (0.0, 0.5)


class TeacherError(RuntimeError):
    """Labelling cannot start or go on; the message names the place and the remedy. What was labelled before is kept."""


@dataclass(frozen=True)
class Teacher:
    """Whom to ask, and how."""

    endpoint: str  # up to and including /v1
    model: str
    concurrency: int = 8  # requests under way at once
    max_edge: int = 1024  # pixels, the longest edge of the picture sent
    max_tokens: int = 1024  # the longest record, 20 items of 50 characters in both lists, takes about 700
    timeout: float = 120.0  # seconds without a sign of life from the server
    retries: int = 5  # the client's own, with back-off: 408, 409, 429 (heeding Retry-After), 5xx, time-outs, lost connections


@dataclass
class Summary:
    """What one run did: `pictures` = `known` + `duplicates` + `asked`, and `asked` = `labelled` + `rejected` + `failed`."""

    pictures: int = 0  # files looked at
    known: int = 0  # … whose bytes an earlier run had finished
    duplicates: int = 0  # … whose bytes this run had met before
    asked: int = 0  # … all others
    labelled: int = 0
    rejected: int = 0  # no answer that fits the schema, or a file that is no picture (never sent); final
    failed: int = 0  # the endpoint gave no answer, or the disk no file; a later run tries again
    questions: int = 0
    repeated: int = 0  # questions put again because the answer broke the schema
    requests: int = 0  # HTTP requests: questions and the client's retries
    streak: int = 0  # failures of the endpoint since its last answer
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    latencies: array = field(default_factory=lambda: array("d"), repr=False)  # seconds, one an answer, without waits before retries

    def cost(self, prompt_price: float, completion_price: float) -> float:
        """In the currency of the prices, which are for a million tokens."""
        return (self.prompt_tokens * prompt_price + self.completion_tokens * completion_price) / 1e6

    def __str__(self) -> str:
        p50, p95 = np.percentile(self.latencies or [np.nan], (50, 95))
        return (
            f"{self.pictures:,} pictures: {self.known:,} finished before, {self.duplicates:,} duplicates, {self.asked:,} asked = "
            f"{self.labelled:,} labelled + {self.rejected:,} rejected + {self.failed:,} failed\n"
            f"{self.requests:,} requests, {self.requests - self.questions:,} of them retries, {self.repeated:,} for a second answer; "
            f"latency p50 {p50:.2f} s, p95 {p95:.2f} s; {self.seconds:.1f} s, {self.asked / max(self.seconds, 1e-9):.2f} pictures/s\n"
            f"{self.prompt_tokens:,} prompt tokens, {self.completion_tokens:,} completion tokens"
        )


def as_data_url(data: bytes, max_edge: int) -> str:
    """The picture in a file's bytes as an upright RGB JPEG in a data URL, never enlarged. Raises PictureError."""
    picture, jpeg = open_picture(data), io.BytesIO()
    picture.thumbnail((max_edge, max_edge))
    picture.save(jpeg, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode()


def question(teacher: Teacher, url: str, temperature: float = 0.0) -> dict[str, Any]:
    """The body of a chat-completions request about the picture at `url`: `prompts.conversation()` in OpenAI's format."""
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": prompts.USER}]
    return {
        "model": teacher.model,
        "messages": [{"role": "system", "content": prompts.SYSTEM}, {"role": "user", "content": content}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "FoodRecord", "schema": json_schema(), "strict": True}},
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
            return {"status": "labelled", "record": record, "source": f"teacher:{teacher.model}", "temperature": temperature}
        except (ValueError, TypeError, RecursionError) as error:  # more than AnswerError: a list for a text, a 5,000-digit number, [[[[…
            reason = f"{error}" if why in ("stop", None) else f"finish_reason {why}: {error}"
            outcome = {"status": "rejected", "reason": reason, "raw": str(text)}
    return outcome


async def _outcome(client: openai.AsyncOpenAI, teacher: Teacher, data: bytes | OSError, summary: Summary) -> dict[str, Any]:
    """What becomes of one picture: `status`, with `record` or with `reason`; `http` where the endpoint failed (0: no connection)."""
    try:
        if isinstance(data, OSError):
            return {"status": "failed", "reason": f"cannot be read: {data.strerror}"}
        outcome = await _ask(client, teacher, await asyncio.to_thread(as_data_url, data, teacher.max_edge), summary)
    except PictureError as error:
        return {"status": "rejected", "reason": str(error), "raw": ""}
    except openai.APIStatusError as error:
        outcome = {"status": "failed", "http": error.status_code, "reason": f"HTTP {error.status_code}: {error.response.text}"}
    except openai.OpenAIError as error:
        cause = f" ({type(error.__cause__).__name__}: {error.__cause__})" if error.__cause__ else ""
        outcome = {"status": "failed", "http": 408 if isinstance(error, openai.APITimeoutError) else 0, "reason": f"{error}{cause}"}
    summary.streak = summary.streak + 1 if "http" in outcome else 0
    return outcome


def _stop_if_hopeless(teacher: Teacher, outcome: dict[str, Any], summary: Summary) -> None:
    status, new = outcome.get("http"), not summary.latencies  # what has answered before may recover, or object to one picture only
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
    raise TeacherError(f"{teacher.endpoint}: {remedy}. What was labelled is kept. The last failure: {outcome['reason'][:500]}")


def _key() -> str:
    return os.environ.get("OPENAI_API_KEY", "").strip()


def _bounded(text: str) -> str:
    """A server's words as we keep them: without our key, should it repeat what it was sent, and without end."""
    return (text.replace(_key(), "***") if _key() else text)[:20_000]


def _client(teacher: Teacher, summary: Summary) -> openai.AsyncOpenAI:
    address = urlsplit(teacher.endpoint)
    if address.scheme not in ("http", "https") or not address.hostname or "@" in address.netloc or address.query:
        raise TeacherError("the endpoint must look like http://localhost:8000/v1, without a key in it: that belongs in OPENAI_API_KEY")
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


def _read(path: Path) -> tuple[bytes | OSError, str]:
    try:
        data = path.read_bytes()
        return data, hashlib.sha256(data).hexdigest()
    except OSError as error:
        return error, f"unread {path}"


def _index(ledger: Path, recipe: str) -> tuple[dict[str, str], dict[str, tuple[str, int]]]:
    """File name → hash, and hash → last status and its line's offset, of this question. Torn lines count for nothing."""
    names, last, offset = {}, {}, 0
    with ledger.open("rb") as lines:
        for line in lines:
            with suppress(ValueError, LookupError, TypeError):
                entry = json.loads(line)
                if entry["recipe"] == recipe:
                    names[entry["file_name"]] = entry["sha256"]
                    if entry["status"] != "same":
                        last[entry["sha256"]] = sys.intern(entry["status"]), offset
            offset += len(line)
    return names, last


def _write_output(folder: Path, output: Path, ledger: Path, recipe: str, licence: str | None) -> None:
    names, last = _index(ledger, recipe)
    targets = [output, output.with_suffix(".rejects.jsonl")]
    partials = [target.with_name(target.name + ".partial") for target in targets]
    with ledger.open("rb") as lines, partials[0].open("w") as labels, partials[1].open("w") as rejects:
        for name in sorted(name for name, digest in names.items() if digest in last and (folder / name).is_file()):
            lines.seek(last[names[name]][1])
            entry = json.loads(lines.readline())
            if entry["status"] == "labelled":
                row = {"file_name": name, **entry["record"], "source": entry["source"]} | ({"licence": licence} if licence else {})
                print(json.dumps(row), file=labels)
            else:
                print(json.dumps({"file_name": name, **{k: entry[k] for k in ("status", "reason", "raw") if k in entry}}), file=rejects)
    for partial, target in zip(partials, targets, strict=True):
        partial.replace(target)


async def label_folder(
    teacher: Teacher,
    folder: str | Path,
    output: str | Path | None = None,
    *,
    limit: int | None = None,
    licence: str | None = None,
    retry_rejected: bool = False,
) -> Summary:
    """Label the pictures in and below `folder`: `await` it in a notebook, `asyncio.run` it elsewhere.

    `output` is FOLDER/metadata.jsonl unless given; its file names are relative to `folder` wherever it lies. At most `limit` pictures
    are asked for. Outcomes are kept by the sha256 of a file's bytes and a hash of the question, so another model or prompt starts afresh;
    `output` then holds its labels, the ledger both. In memory: `concurrency` pictures, and under a kilobyte for every picture known.
    Raises TeacherError, also when the endpoint gives out on the way; what was labelled so far is in `output` then.
    """
    folder, summary, started = Path(folder), Summary(), time.monotonic()
    output = Path(output or folder / "metadata.jsonl")
    ledger = output.with_suffix(".ledger.jsonl")
    paths = list(find_pictures([folder])) if folder.is_dir() else []
    if not paths:
        raise TeacherError(f"no pictures in {folder}: name a folder that holds .jpg, .png, .webp … files")
    if output.exists() and not ledger.exists():
        raise TeacherError(f"{output} exists and has no {ledger.name}, so its labels come from elsewhere: choose another output")
    unasked = question(teacher, "") | {"max_tokens": None, "max_edge": teacher.max_edge}
    recipe = hashlib.sha256(json.dumps(unasked).encode()).hexdigest()[:12]

    def keep(name: str, digest: str, outcome: dict[str, Any]) -> None:
        lines.write(json.dumps({"file_name": name, "sha256": digest, "recipe": recipe} | outcome).encode() + b"\n")
        lines.flush()

    async def work() -> None:
        for path in waiting:
            name = path.relative_to(folder).as_posix()
            data, digest = await asyncio.to_thread(_read, path)
            if digest in known or digest in claimed:
                summary.known += digest in known
                summary.duplicates += digest not in known
                if names.get(name) != digest:
                    keep(name, digest, {"status": "same"})
            elif summary.asked == limit:
                return
            else:
                claimed.add(digest)
                summary.asked += 1
                outcome = await _outcome(client, teacher, data, summary)
                outcome |= {key: _bounded(outcome[key]) for key in ("reason", "raw") if key in outcome}
                keep(name, digest, outcome)
                setattr(summary, outcome["status"], getattr(summary, outcome["status"]) + 1)
                _stop_if_hopeless(teacher, outcome, summary)
            summary.pictures += 1
            bar.set_postfix(labelled=summary.labelled, rejected=summary.rejected, failed=summary.failed, refresh=False)
            bar.update()

    async with _client(teacher, summary) as client:
        try:
            lines = ledger.open("ab")
        except OSError as error:
            raise TeacherError(f"cannot write {ledger}: {error.strerror}") from error
        with lines, tqdm(total=len(paths), desc="asking the teacher", unit="picture") as bar:
            if lines.tell():
                lines.write(b"\n")  # ends a line that a kill has torn; an empty one does no harm
            names, last = _index(ledger, recipe)
            final = {"labelled"} if retry_rejected else {"labelled", "rejected"}
            known, claimed = {digest for digest, (status, _) in last.items() if status in final}, set()
            waiting = iter(paths)  # all workers take from one iterator: no more tasks than requests, however many pictures there are
            try:
                async with asyncio.TaskGroup() as crew:
                    for _ in range(teacher.concurrency):
                        crew.create_task(work())
            except ExceptionGroup as group:
                raise group.exceptions[0] from None
            finally:
                lines.flush()
                summary.seconds = time.monotonic() - started
                _write_output(folder, output, ledger, recipe, licence)
    return summary


def main(
    folder: Annotated[Path, typer.Argument(help="Folder of pictures; those in its subfolders count too.")],
    endpoint: Annotated[str, typer.Option(metavar="URL", help="The API, as http://host:8000/v1; OPENAI_API_KEY holds its key.")],
    model: Annotated[str, typer.Option(help="The teacher's name at that endpoint.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Where the labels go, if not to FOLDER/metadata.jsonl.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests under way at once.")] = Teacher.concurrency,
    limit: Annotated[int | None, typer.Option(min=1, help="Ask for this many pictures at most; a later run goes on.")] = None,
    max_edge: Annotated[int, typer.Option(min=32, help="Longest edge of the picture sent, in pixels.")] = Teacher.max_edge,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer: raise it where rejects say `length`.")] = Teacher.max_tokens,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds to wait for a server that says nothing.")] = Teacher.timeout,
    retries: Annotated[int, typer.Option(min=0, help="Times a failed request is sent again.")] = Teacher.retries,
    retry_rejected: Annotated[bool, typer.Option("--retry-rejected", help="Ask again for what earlier runs rejected.")] = False,
    licence: Annotated[str | None, typer.Option(help="Licence of the pictures, noted with every label.")] = None,
    prompt_price: Annotated[float, typer.Option(min=0, help="Price of a million prompt tokens, for the cost.")] = 0,
    completion_price: Annotated[float, typer.Option(min=0, help="Price of a million completion tokens.")] = 0,
) -> None:
    """Label a folder of pictures through an OpenAI-compatible endpoint. Start it again to go on where it was stopped.

    Exit status: 0 when every picture asked for has a label, 1 when some have none (the rejects file says why), 2 when it had to stop.
    """
    teacher = Teacher(endpoint.rstrip("/"), model, concurrency, max_edge, max_tokens, timeout, retries)
    try:
        summary = asyncio.run(label_folder(teacher, folder, output, limit=limit, licence=licence, retry_rejected=retry_rejected))
    except TeacherError as error:
        print(f"foodextract.teacher: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    print(summary)
    if prompt_price or completion_price:
        print(f"cost: {summary.cost(prompt_price, completion_price):,.4f}")
    raise typer.Exit(int(summary.labelled < summary.asked))


if __name__ == "__main__":
    typer.run(main)
