"""Millions of images → records, on every GPU of a Ray cluster: vLLM answers, Ray Data hands out the work.

    python deploy/vllm/label_many.py IMAGES ANSWERS --model EXPORTED --gpus 8

The sorted list of files, written down once in ANSWERS/files.txt, is cut into shards. A worker loads the engine once, answers shard after
shard, and gives each answer file its name only when it is whole: ANSWERS/00000017.jsonl is finished, or is not there. Started again, the
same command does the shards that are missing. Every image gets one line, {"file", …} with its record or its error.

Where the engine fails on a shard, its images are asked about one by one; where it fails on every one of them, it is to blame, and the job
ends.

Needs an environment of its own (requirements.txt beside this file), with this package installed by `pip install --no-deps`.
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
    """What is still to do, as {"shard", "files"} rows. The list of files is made once, so that a later run cuts it in the same places."""
    answers.mkdir(parents=True, exist_ok=True)
    listed = answers / "files.txt"
    if not listed.exists():
        names = [path.relative_to(images).as_posix() for path in find_images([images])]
        _write_whole(
            listed, json.dumps({"shard_size": size}) + "\n" + "".join(json.dumps(name) + "\n" for name in names)
        )
    head, *names = map(json.loads, listed.read_text().splitlines())
    size = head["shard_size"]
    cut = [
        {"shard": number, "files": names[start : start + size]}
        for number, start in enumerate(range(0, len(names), size))
    ]
    return [row for row in cut if not _answer_file(answers, row["shard"]).exists()]


def answer_shard(row: dict[str, Any], images: Path, answers: Path, answer: Answer) -> dict[str, int]:
    """Answer one shard and write its file. How many images were answered, and how many have an error instead."""
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
    _write_whole(_answer_file(answers, row["shard"]), "".join(json.dumps(line) + "\n" for line in lines))
    failed = sum("error" in line for line in lines)
    return {"shard": row["shard"], "answered": len(lines) - failed, "failed": failed}


def _texts(conversations: list[list[dict]], answer: Answer) -> list[str | Exception]:
    """The text for each conversation, or what the engine raises when it is asked about that one alone."""
    try:
        return answer(conversations)
    except Exception as error:
        if len(conversations) == 1:
            return [error]
        told = [text for conversation in conversations for text in _texts([conversation], answer)]
        if all(isinstance(text, Exception) for text in told):
            raise
        return told


def vllm_answers(model: Path) -> Answer:
    """vLLM in this process, greedy, under the schema."""
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
    """One on each GPU: loads the engine once, then answers shards."""

    def __init__(self, images: Path, answers: Path, load: Callable[[], Answer]) -> None:
        self.images, self.answers, self.answer = images, answers, load()

    def __call__(self, row: dict[str, Any]) -> dict[str, int]:
        return answer_shard(row, self.images, self.answers, self.answer)


def label(
    images: Path, answers: Path, load: Callable[[], Answer], size: int, workers: int, gpus_each: float
) -> dict[str, int]:
    """Answer every shard that is missing; how many images this run answered, and how many have an error instead."""
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


def _write_whole(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(text)
    partial.replace(path)


def main(
    images: Annotated[Path, typer.Argument(help="Folder that every node sees; its subfolders count too.")],
    answers: Annotated[Path, typer.Argument(help="Folder for the answers.")],
    model: Annotated[Path, typer.Option(help="Folder that `foodextract export vllm` wrote.")],
    gpus: Annotated[int, typer.Option(min=1, help="Workers, one a GPU.")] = 1,
    shard: Annotated[
        int, typer.Option(min=1, help="Images a shard: what an interruption costs at most, for each worker.")
    ] = 2000,
) -> None:
    """Label IMAGES, or what is left of them."""
    model = model.resolve()  # a worker has a folder of its own
    print(json.dumps(label(images, answers, lambda: vllm_answers(model), shard, gpus, 1)))


if __name__ == "__main__":
    typer.run(main)
