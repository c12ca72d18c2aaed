"""Unlabeled images → labels by a larger model behind any OpenAI-compatible endpoint (vLLM serving Qwen3-VL, say).

    python -m foodextract.data.labeling IMAGES --endpoint http://localhost:8000/v1 --model Qwen/Qwen3-VL-8B-Instruct

The teacher gets our prompt and our JSON schema, so its labels need no translation. Written beside the images:

    metadata.jsonl            the labels, as `sources.labeled_folder` reads them
    metadata.rejects.jsonl    the images without a label: why, and the teacher's words where there were any
    metadata.ledger.jsonl     one line an outcome, appended as it comes; a later run asks only for what is not in it
"""

import asyncio
import hashlib
import json
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from tqdm import tqdm

from foodextract.data.teacher import (
    Summary,
    Teacher,
    TeacherError,
    bounded,
    make_client,
    outcome_of,
    question,
    stop_if_hopeless,
)
from foodextract.images import find_images


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


def _write_output(folder: Path, output: Path, ledger: Path, recipe: str, license: str | None) -> None:
    names, last = _index(ledger, recipe)
    targets = [output, output.with_suffix(".rejects.jsonl")]
    partials = [target.with_name(target.name + ".partial") for target in targets]
    with ledger.open("rb") as lines, partials[0].open("w") as labels, partials[1].open("w") as rejects:
        for name in sorted(name for name, digest in names.items() if digest in last and (folder / name).is_file()):
            lines.seek(last[names[name]][1])
            entry = json.loads(lines.readline())
            if entry["status"] == "labeled":
                row = {"file_name": name, **entry["record"], "source": entry["source"]} | (
                    {"license": license} if license else {}
                )
                print(json.dumps(row), file=labels)
            else:
                print(
                    json.dumps({"file_name": name, **{k: entry[k] for k in ("status", "reason", "raw") if k in entry}}),
                    file=rejects,
                )
    for partial, target in zip(partials, targets, strict=True):
        partial.replace(target)


async def label_folder(
    teacher: Teacher,
    folder: str | Path,
    output: str | Path | None = None,
    *,
    limit: int | None = None,
    license: str | None = None,
    retry_rejected: bool = False,
) -> Summary:
    """Label the images in and below `folder`: `await` it in a notebook, `asyncio.run` it elsewhere.

    `output` is FOLDER/metadata.jsonl unless given; its file names are relative to `folder` wherever it lies. At most `limit` images
    are asked for. Outcomes are kept by the sha256 of a file's bytes and a hash of the question, so another model or prompt starts afresh;
    `output` then holds its labels, the ledger both. In memory: `concurrency` images, and under a kilobyte for every image known.
    Raises TeacherError, also when the endpoint gives out on the way; what was labeled so far is in `output` then.
    """
    folder, summary, started = Path(folder), Summary(), time.monotonic()
    output = Path(output or folder / "metadata.jsonl")
    ledger = output.with_suffix(".ledger.jsonl")
    paths = list(find_images([folder])) if folder.is_dir() else []
    if not paths:
        raise TeacherError(f"no images in {folder}: name a folder that holds .jpg, .png, .webp … files")
    if output.exists() and not ledger.exists():
        raise TeacherError(
            f"{output} exists and has no {ledger.name}, so its labels come from elsewhere: choose another output"
        )
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
                outcome = await outcome_of(client, teacher, data, summary)
                outcome |= {key: bounded(outcome[key]) for key in ("reason", "raw") if key in outcome}
                keep(name, digest, outcome)
                setattr(summary, outcome["status"], getattr(summary, outcome["status"]) + 1)
                stop_if_hopeless(teacher, outcome, summary)
            summary.images += 1
            bar.set_postfix(labeled=summary.labeled, rejected=summary.rejected, failed=summary.failed, refresh=False)
            bar.update()

    async with make_client(teacher, summary) as client:
        try:
            lines = ledger.open("ab")
        except OSError as error:
            raise TeacherError(f"cannot write {ledger}: {error.strerror}") from error
        with lines, tqdm(total=len(paths), desc="asking the teacher", unit="image") as bar:
            if lines.tell():
                lines.write(b"\n")  # ends a line that a kill has torn; an empty one does no harm
            names, last = _index(ledger, recipe)
            final = {"labeled"} if retry_rejected else {"labeled", "rejected"}
            known, claimed = {digest for digest, (status, _) in last.items() if status in final}, set()
            waiting = iter(
                paths
            )  # all workers take from one iterator: no more tasks than requests, however many images there are
            try:
                async with asyncio.TaskGroup() as crew:
                    for _ in range(teacher.concurrency):
                        crew.create_task(work())
            except ExceptionGroup as group:
                raise group.exceptions[0] from None
            finally:
                lines.flush()
                summary.seconds = time.monotonic() - started
                _write_output(folder, output, ledger, recipe, license)
    return summary


def main(
    folder: Annotated[Path, typer.Argument(help="Folder of images; those in its subfolders count too.")],
    endpoint: Annotated[
        str, typer.Option(metavar="URL", help="The API, as http://host:8000/v1; OPENAI_API_KEY holds its key.")
    ],
    model: Annotated[str, typer.Option(help="The teacher's name at that endpoint.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where the labels go, if not to FOLDER/metadata.jsonl.")
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests under way at once.")] = Teacher.concurrency,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Ask for this many images at most; a later run goes on.")
    ] = None,
    max_edge: Annotated[
        int, typer.Option(min=32, help="Longest edge of the image sent, in pixels.")
    ] = Teacher.max_edge,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Longest answer: raise it where rejects say `length`.")
    ] = Teacher.max_tokens,
    timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds to wait for a server that says nothing.")
    ] = Teacher.timeout,
    retries: Annotated[int, typer.Option(min=0, help="Times a failed request is sent again.")] = Teacher.retries,
    retry_rejected: Annotated[
        bool, typer.Option("--retry-rejected", help="Ask again for what earlier runs rejected.")
    ] = False,
    license: Annotated[str | None, typer.Option(help="License of the images, noted with every label.")] = None,
    prompt_price: Annotated[float, typer.Option(min=0, help="Price of a million prompt tokens, for the cost.")] = 0,
    completion_price: Annotated[float, typer.Option(min=0, help="Price of a million completion tokens.")] = 0,
) -> None:
    """Label a folder of images through an OpenAI-compatible endpoint. Start it again to go on where it was stopped.

    Exit status: 0 when every image asked for has a label, 1 when some have none (the rejects file says why), 2 when it had to stop.
    """
    teacher = Teacher(endpoint.rstrip("/"), model, concurrency, max_edge, max_tokens, timeout, retries)
    try:
        summary = asyncio.run(
            label_folder(teacher, folder, output, limit=limit, license=license, retry_rejected=retry_rejected)
        )
    except TeacherError as error:
        print(f"foodextract.data.labeling: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    print(summary)
    if prompt_price or completion_price:
        print(f"cost: {summary.cost(prompt_price, completion_price):,.4f}")
    raise typer.Exit(int(summary.labeled < summary.asked))


if __name__ == "__main__":
    typer.run(main)
