"""Label millions of images on all GPUs of a Ray cluster: vLLM answers, Ray Data distributes the work.

    python deploy/vllm/label_many.py IMAGES ANSWERS --model EXPORTED --gpus 8

The sorted list of files, written once to ANSWERS/files.txt, is cut into shards. A worker loads the engine once and
answers shard after shard. ANSWERS/00000017.jsonl appears when it is complete. Rerun the command to do the missing
shards. Every image gets one line: {"file", …} with its record or its error.

If the engine fails on a shard, its images are sent one by one. If it fails on each of them, the job ends.

Needs an environment of its own (requirements.txt beside this file) with this package (`pip install --no-deps`).
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from foodextract import schema
from foodextract.data.teacher import Teacher, as_data_url, question
from foodextract.images import ImageError, find_images
from foodextract.schema import AnswerError, FoodRecord

ANSWER_TOKENS = 256
Answer = Callable[[list[list[dict]]], list[str]]  # conversations → texts


def shards(images: Path, answers: Path, size: int) -> list[dict[str, Any]]:
    """Return the missing shards as {"shard", "files"} rows. The list of files is fixed by the first run."""
    answers.mkdir(parents=True, exist_ok=True)
    listed = answers / "files.txt"
    if not listed.exists():
        names = [path.relative_to(images).as_posix() for path in find_images([images])]
        _write_atomically(listed, "".join(json.dumps(line) + "\n" for line in [{"shard_size": size}, *names]))
    head, *names = map(json.loads, listed.read_text().splitlines())
    size = head["shard_size"]
    cut = [
        {"shard": number, "files": names[start : start + size]}
        for number, start in enumerate(range(0, len(names), size))
    ]
    return [row for row in cut if not _answer_file(answers, row["shard"]).exists()]


def answer_shard(row: dict[str, Any], images: Path, answers: Path, answer: Answer) -> dict[str, int]:
    """Answer one shard and write its file. Returns how many images were answered, and how many failed."""
    lines, conversations = [{"file": name} for name in row["files"]], {}
    for line in lines:
        try:
            url = as_data_url((images / line["file"]).read_bytes(), Teacher.max_edge)
            conversations[line["file"]] = question(Teacher("", ""), url)["messages"]
        except (ImageError, OSError) as error:
            line["error"] = str(error)
    texts = dict(zip(conversations, _texts(list(conversations.values()), answer), strict=True)) if conversations else {}
    for line in lines:
        match texts.get(line["file"]):
            case str(text):
                try:
                    line |= FoodRecord.from_json(text).model_dump()
                except AnswerError as error:
                    line["error"] = str(error)
            case Exception() as error:
                line["error"] = f"the engine failed: {error}"
    _write_atomically(_answer_file(answers, row["shard"]), "".join(json.dumps(line) + "\n" for line in lines))
    failed = sum("error" in line for line in lines)
    return {"shard": row["shard"], "answered": len(lines) - failed, "failed": failed}


def _texts(conversations: list[list[dict]], answer: Answer) -> list[str | Exception]:
    """Return the text of each conversation, or the error the engine raises for that one alone."""
    try:
        return answer(conversations)
    except Exception as error:
        if len(conversations) == 1:
            return [error]
        texts = [text for conversation in conversations for text in _texts([conversation], answer)]
        if all(isinstance(text, Exception) for text in texts):
            raise
        return texts


def vllm_answers(model: Path) -> Answer:
    """Load vLLM in this process; it answers greedily under the schema."""
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    engine = LLM(
        model=str(model),
        limit_mm_per_prompt={"image": 1, "video": 0},
        structured_outputs_config={"backend": "guidance"},
    )
    guided = StructuredOutputsParams(json=schema.guided_schema())
    params = SamplingParams(temperature=0.0, max_tokens=ANSWER_TOKENS, structured_outputs=guided)
    template = (model / "chat_template.jinja").read_text()

    def answer(conversations: list[list[dict]]) -> list[str]:
        outputs = engine.chat(
            conversations, params, use_tqdm=False, chat_template=template, chat_template_content_format="openai"
        )
        return [output.outputs[0].text for output in outputs]

    return answer


class Worker:
    """A Ray actor, one per GPU: loads the engine once, then answers shards."""

    def __init__(self, images: Path, answers: Path, load: Callable[[], Answer]) -> None:
        self.images, self.answers, self.answer = images, answers, load()

    def __call__(self, row: dict[str, Any]) -> dict[str, int]:
        return answer_shard(row, self.images, self.answers, self.answer)


def label(
    images: Path, answers: Path, load: Callable[[], Answer], size: int, workers: int, gpus_each: float
) -> dict[str, int]:
    """Answer the missing shards. Returns how many images this run answered, and how many failed."""
    import ray

    total = {"answered": 0, "failed": 0}
    if todo := shards(images, answers, size):
        options = {
            "fn_constructor_args": (images.resolve(), answers.resolve(), load),
            "concurrency": workers,
            "num_gpus": gpus_each,
        }
        for row in ray.data.from_items(todo, override_num_blocks=len(todo)).map(Worker, **options).iter_rows():
            total = {name: count + int(row[name]) for name, count in total.items()}
    return total


def _answer_file(answers: Path, shard: int) -> Path:
    return answers / f"{shard:08}.jsonl"


def _write_atomically(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(text)
    partial.replace(path)


def main(
    images: Annotated[Path, typer.Argument(help="Folder that every node can read, with subfolders.")],
    answers: Annotated[Path, typer.Argument(help="Folder for the answers.")],
    model: Annotated[Path, typer.Option(help="Folder that `foodextract export vllm` wrote.")],
    gpus: Annotated[int, typer.Option(min=1, help="Workers, one per GPU.")] = 1,
    shard: Annotated[
        int, typer.Option(min=1, help="Images per shard: the most that an interruption costs each worker.")
    ] = 2000,
) -> None:
    """Label IMAGES, or the rest of them."""
    model = model.resolve()  # workers run in other folders
    print(json.dumps(label(images, answers, lambda: vllm_answers(model), shard, gpus, 1)))


if __name__ == "__main__":
    typer.run(main)
