"""The `foodextract` command."""

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal, NoReturn

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # before transformers is imported

import typer

from foodextract.extras import MissingExtraError, extra
from foodextract.inference import output_files

app = typer.Typer(
    name="foodextract",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Images in, strict JSON out.",
)


export = typer.Typer(no_args_is_help=True, help="Write a model for another engine.")
app.add_typer(export, name="export")


@app.callback()
def main(context: typer.Context) -> None:
    """Images in, strict JSON out."""
    if (
        context.invoked_subcommand != "publish" or not sys.stderr.isatty()
    ):  # gigabytes may go up there: somebody who waits sees how far
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # before huggingface_hub is imported


_BATCH_SIZE = "Tiles the model sees at once: images, where one takes one tile. At least one image."
_TILES = "Another image budget than the model came with: 1, 5 or 17 tiles an image. One tile costs the least."


class Format(StrEnum):
    """Of the output."""

    jsonl = "jsonl"
    csv = "csv"


@app.command()
def extract(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH…", help="Images, or folders to search for images.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="Model folder or Hub id (default: the model trained last in outputs/, else the bundled tiny one)."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Append the lines to this file. Images that it answers already are skipped."
        ),
    ] = None,
    form: Annotated[
        Format, typer.Option("--format", help="JSON lines, or CSV with lists as JSON in their cells.")
    ] = Format.jsonl,
    batch_size: Annotated[int, typer.Option(min=1, help=_BATCH_SIZE)] = 8,
    tiles: Annotated[int | None, typer.Option(help=_TILES)] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps … (default: the best there is)")] = None,
    precision: Annotated[
        str | None, typer.Option(help="fp32, bf16, fp16, or int8 on a CPU (default: what suits the device)")
    ] = None,
    confidence: Annotated[
        bool, typer.Option("--confidence", help="Add how sure the model was, of is_food and of each item.")
    ] = False,
    free: Annotated[
        bool, typer.Option("--free", help="No grammar: let the model write what it likes, and call it an error.")
    ] = False,
) -> None:
    """One line of JSON an image: {"file", "is_food", "image_title", "food_items", "drink_items"}, or {"file", "error"}.

    Exit status: 0 when all images were answered, 1 when some could not be (the others are answered all the same), 2 when nothing could
    start. Interrupted, the same command goes on where it was, and tries again what failed.
    """
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm  # the imports below take seconds, which `--help` should not

    from foodextract.images import find_images
    from foodextract.inference.extractor import Extractor
    from foodextract.models.loading import ModelError, newest_tuned

    if free and confidence:
        _stop("--confidence is measured among the tokens that the grammar allows: leave out --free")
    found = dict.fromkeys(map(str, find_images(paths)))
    if not found:
        _stop(f"no images in {', '.join(map(str, paths))}: name files, or folders that hold .jpg, .png, .webp … files")
    try:
        answered = output_files.resume(output, form.value) if output else set()
        files = [file for file in found if file not in answered]
        if len(files) < len(found):
            print(f"{len(found) - len(files)} of {len(found)} images are answered in {output} already", file=sys.stderr)
        if not files:
            return
        source = model or newest_tuned()
        print(f"model: {source}", file=sys.stderr)
        extractor = Extractor.from_pretrained(source, device, precision, constrained=not free, tiles=tiles)
    except (ModelError, output_files.AnswerFileError) as error:
        _stop(str(error))
    if not output:
        print(output_files.header(form.value), end="")
    failed = 0
    with logging_redirect_tqdm([logging.getLogger("foodextract")]):  # above the bar, on stderr
        results = tqdm(
            extractor.extract_many_with_confidence(files, batch_size), total=len(files), unit="image", file=sys.stderr
        )
        for file, result in zip(files, results, strict=True):
            if isinstance(result, Exception):
                failed += 1
                row = {"file": file, "error": str(result)}
            else:
                row = {
                    "file": file,
                    **result[0].model_dump(),
                    **({"confidence": asdict(result[1])} if confidence else {}),
                }
            line = output_files.as_line(row, form.value)
            if output:
                output_files.append(output, line)
            else:
                print(line, end="", flush=True)
    if failed:
        print(f"{failed} of {len(files)} images could not be answered; their lines say why", file=sys.stderr)
        raise typer.Exit(1)


@app.command()
def train(
    dataset: Annotated[str, typer.Argument(help="A data set from notebook 00, a labeled image folder, or a Hub id.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where models and checkpoints go.")] = Path("outputs/train"),
    profile: Annotated[str, typer.Option(help="Whose base model and rates: hub or offline.")] = "hub",
    base: Annotated[str | None, typer.Option(help="Hub id or folder of another base model.")] = None,
    stage1: Annotated[
        str, typer.Option(help='What differs in stage 1, as JSON: {"num_train_epochs": 1, "learning_rate": 1e-4}')
    ] = "{}",
    stage2: Annotated[str, typer.Option(help="The same for stage 2.")] = "{}",
    seed: Annotated[int, typer.Option(help="Order of the images.")] = 42,
    max_steps: Annotated[int, typer.Option(help="Stop each stage after so many optimizer steps; -1: never.")] = -1,
    report_to: Annotated[
        str, typer.Option(help="A tracker to watch the run in, if installed: tensorboard, trackio.")
    ] = "none",
    keep_in: Annotated[
        Path | None,
        typer.Option(help="A folder that outlives this machine, for copies of finished stages and checkpoints."),
    ] = None,
    retrain: Annotated[bool, typer.Option("--retrain", help="Train finished stages again.")] = False,
) -> None:
    """Both stages of fine-tuning without a notebook, on one device or, under `accelerate launch`, on several.

    With N processes every optimizer step takes N times the images; divide `gradient_accumulation_steps` by N for the same training.
    An interrupted run takes up its last checkpoint when it is started again.
    """
    with _extra("train"):
        from accelerate import PartialState

        from foodextract.data.dataset import open_dataset
        from foodextract.data.samples import DatasetError
        from foodextract.models.loading import ModelError, choose_device, load_model, load_processor
        from foodextract.training.config import PROFILES, changed, is_sharded
        from foodextract.training.run import train_stage

    if profile not in PROFILES:
        _stop(f"there is no profile {profile!r}: take one of {', '.join(PROFILES)}")
    settings = PROFILES[profile]
    try:
        stages = [changed(settings.stage1, json.loads(stage1)), changed(settings.stage2, json.loads(stage2))]
    except (TypeError, ModelError, json.JSONDecodeError) as error:
        _stop(
            f"--stage1 and --stage2 take JSON with values of a stage, such as '{{\"num_train_epochs\": 1}}' ({error})"
        )
    processes = PartialState()
    try:
        with processes.main_process_first():
            rows = open_dataset(dataset, build_in=out / "dataset", seed=seed)
        device = processes.device if processes.num_processes > 1 else choose_device()
        model = load_model(base or settings.base_model, device, training=True)
        processor = load_processor(base or settings.base_model, tiles=settings.tiles)
        for last, stage in zip([None, *stages], stages, strict=False):
            if last and is_sharded():  # what is spread over processes cannot be frozen anew
                model = load_model(out / last.name, device, training=True)
            options = {
                "seed": seed,
                "max_steps": max_steps,
                "report_to": report_to,
                "retrain": retrain,
                "keep_in": keep_in,
            }
            train_stage(model, processor, stage, rows["train"], out, **options)
    except (ModelError, DatasetError) as error:
        _stop(str(error))
    if processes.is_main_process:
        print(out / stages[-1].name)


@app.command()
def label(
    folder: Annotated[Path, typer.Argument(help="Folder of images; subfolders count too.")],
    endpoint: Annotated[
        str, typer.Option(metavar="URL", help="The API, as http://host:8000/v1; OPENAI_API_KEY holds its key.")
    ],
    model: Annotated[str, typer.Option(help="The model's name at that endpoint.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File of the labels (default: FOLDER/metadata.jsonl).")
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 8,
    limit: Annotated[int | None, typer.Option(min=1, help="Label at most this many images; rerun to continue.")] = None,
    max_edge: Annotated[int, typer.Option(min=32, help="Longest edge of the images sent, in pixels.")] = 1024,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer; raise it where rejects say `length`.")] = 1024,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds to wait for data from the server.")] = 120.0,
    retries: Annotated[int, typer.Option(min=0, help="How often a failed request is repeated.")] = 5,
    retry_rejected: Annotated[
        bool, typer.Option("--retry-rejected", help="Ask again about images that earlier runs rejected.")
    ] = False,
    license: Annotated[str | None, typer.Option(help="License of the images, written beside every label.")] = None,
) -> None:
    """Label a folder of images with a larger model behind an OpenAI-compatible endpoint. Rerun the command to resume.

    Exit status: 0 when every image has a label, 1 when some have none (the rejects file says why), 2 when it had to stop.
    """
    import asyncio

    with _extra("data"):
        from foodextract.data.labeling import label_folder
        from foodextract.data.teacher import Teacher, TeacherError

    teacher = Teacher(endpoint.rstrip("/"), model, concurrency, max_edge, max_tokens, timeout, retries)
    options = {"limit": limit, "license": license, "retry_rejected": retry_rejected}
    try:
        summary = asyncio.run(label_folder(teacher, folder, output, **options))
    except TeacherError as error:
        _stop(str(error))
    print(summary)
    raise typer.Exit(int(summary.labeled < summary.asked))


@app.command()
def draw(
    out: Annotated[Path, typer.Argument(help="Folder for the images.")],
    seed: Annotated[int, typer.Option(help="The same seed draws the same images.")] = 0,
    count: Annotated[int, typer.Option(min=1, help="Number of scenes.")] = 3,
    split: Annotated[Literal["train", "test"], typer.Option(help="Which non-food objects may appear.")] = "test",
) -> None:
    """Draw scenes as PNG files, to try a model on."""
    with _extra("data"):
        from foodextract.data.scenes import draw_scenes

    out.mkdir(parents=True, exist_ok=True)
    for index, scene in enumerate(draw_scenes(seed, split, count)):
        path = out / f"scene-{seed}-{split}-{index:05d}.png"
        scene.image.save(path)
        print(f"{path}: {scene.record.image_title or 'no food or drink'}")


class Kind(StrEnum):
    """Of what is published."""

    model = "model"
    dataset = "dataset"
    space = "space"


@app.command()
def publish(
    kind: Annotated[Kind, typer.Argument(help="What to publish.")],
    source: Annotated[
        Path | None,
        typer.Argument(
            help="Its folder (default: the model trained last; the profile hub's data set; demos/FoodExtract-Vision)."
        ),
    ] = None,
    to: Annotated[str | None, typer.Option(help="owner/name on the Hub (default: this project's own).")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List every file and its size; send nothing.")] = False,
    public: Annotated[bool, typer.Option("--public", help="Let everybody see it. Without this it is private.")] = False,
    model: Annotated[
        str | None, typer.Option(help="Hub id that a Space answers with (default: this project's own).")
    ] = None,
) -> None:
    """Put a model, a data set or the Space on the Hub, fetch it again and try it. Log in first: `hf auth login`, or set HF_TOKEN.

    A model goes only with an evaluation of these very weights. Interrupted, the same command goes on where it was.
    """
    with _extra("train"):
        from foodextract import names
        from foodextract.hub import publish as publishing
        from foodextract.models.loading import newest_tuned

    try:
        if kind is Kind.model:
            plan = publishing.model_plan(source or newest_tuned(), to or names.HUB_MODEL)
        elif kind is Kind.dataset:
            plan = publishing.dataset_plan(source or Path("outputs/hub/dataset"), to or names.HUB_PUBLISHED_DATASET)
        else:
            folder = source or Path("demos") / names.REPOSITORY
            plan = publishing.space_plan(folder, to or names.HUB_SPACE, model or names.HUB_MODEL)
        print(plan)
        if not dry_run:
            print(publishing.publish(plan, public=public))
    except publishing.PublishError as error:
        _stop(str(error))


@app.command()
def serve(
    model: Annotated[
        str | None,
        typer.Option(
            envvar="FOODEXTRACT_MODEL",
            help="Model folder or Hub id (default: the one trained last, else the bundled tiny one).",
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 is every one this machine has.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps … (default: the best there is)")] = None,
    precision: Annotated[
        str | None, typer.Option(help="fp32, bf16, fp16, or int8 on a CPU (default: what suits the device)")
    ] = None,
    queue_size: Annotated[
        int, typer.Option(min=1, help="Images accepted at once, uploads included; further requests get 429.")
    ] = 64,
    batch_size: Annotated[int, typer.Option(min=1, help=_BATCH_SIZE)] = 8,
    tiles: Annotated[int | None, typer.Option(help=_TILES)] = None,
    deadline: Annotated[float, typer.Option(min=0.1, help="Seconds to an answer; nobody waits longer.")] = 30.0,
    max_megabytes: Annotated[float, typer.Option(min=0.001, help="Largest body of a request.")] = 10.0,
    origin: Annotated[
        list[str] | None, typer.Option(help="Web page that may ask, as https://host; may be given more than once.")
    ] = None,
) -> None:
    """Answer images over HTTP: POST /predict and /predict/batch, GET /docs, /health, /ready, /metrics.

    A BLIP that captions images with their class is served too: it answers the same records, by the names in its config's id2label.
    FOODEXTRACT_API_KEY, when set, is the key that callers must send. SIGTERM stops it once all that was accepted is answered.
    """
    with _extra("serve"):
        from foodextract.inference.blip import load
        from foodextract.models.loading import ModelError, newest_tuned
        from foodextract.serving.app import Settings
        from foodextract.serving.queue import QueueLimits
        from foodextract.serving.server import run
        from foodextract.serving.uploads import MEGABYTE, UploadLimits

    source = Path(model or newest_tuned())
    name = source.name if source.is_dir() else str(source)  # strip the local path
    settings = Settings(
        queue=QueueLimits(size=queue_size, batch_size=batch_size, deadline=deadline),
        upload=UploadLimits(max_bytes=int(max_megabytes * MEGABYTE)),
        api_key=os.environ.get("FOODEXTRACT_API_KEY") or None,
        origins=tuple(origin or ()),
    )
    try:
        run(lambda: load(source, device, precision, tiles), name, settings, host, port)
    except ModelError as error:
        _stop(str(error))


@export.command("vllm")
def export_vllm(
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="Model folder or Hub id (default: the model trained last in outputs/, else the bundled tiny one)."
        ),
    ] = None,
    tiles: Annotated[int | None, typer.Option(help=_TILES)] = None,
) -> None:
    """A folder that vLLM serves with our prompt, image budget and JSON schema; OUT/serve.sh is the exact command."""
    from foodextract.inference.vllm import export_vllm as write
    from foodextract.models.loading import ModelError, newest_tuned

    try:
        command = write(model or newest_tuned(), out, tiles)
    except (ModelError, OSError) as error:
        _stop(str(error))
    print(f"sh {out / 'serve.sh'}   # {command}")


@export.command("onnx")
def export_onnx(
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="Model folder or Hub id (default: the model trained last in outputs/, else the bundled tiny one)."
        ),
    ] = None,
    tiles: Annotated[int | None, typer.Option(help=_TILES)] = None,
) -> None:
    """Vision and text as ONNX graphs, fp32 and int8: a folder that `foodextract extract --model OUT` takes. Needs the extra `onnx`."""
    from foodextract.inference.onnx import export_onnx as write
    from foodextract.models.loading import ModelError, newest_tuned

    try:
        sizes = write(model or newest_tuned(), out, tiles)
    except (ModelError, OSError) as error:
        _stop(str(error))
    for name, megabytes in sizes.items():
        print(f"{megabytes:8.1f} MB  {name}")
    print(f"foodextract extract --model {out} --precision int8 …")


@contextmanager
def _extra(name: str) -> Iterator[None]:
    """Stop with a message that names the extra to install when an optional import fails."""
    try:
        with extra(name):
            yield
    except MissingExtraError as error:
        _stop(str(error))


def _stop(message: str) -> NoReturn:
    print(f"foodextract: {message}", file=sys.stderr)
    raise typer.Exit(2)


if __name__ == "__main__":
    app()
