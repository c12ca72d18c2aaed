"""The `foodextract` command."""

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from stat import S_ISREG
from typing import Annotated, Any, Literal, NoReturn

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # before transformers is imported

import typer

from foodextract import __version__
from foodextract.extras import MissingExtraError, extra

app = typer.Typer(name="foodextract", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
export = typer.Typer(no_args_is_help=True, help="Write a model for another engine.")
app.add_typer(export, name="export")

Model = Annotated[
    str | None,
    typer.Option(
        envvar="FOODEXTRACT_MODEL",
        help="Folder, Hub id, photo or tiny-tuned. Default: the latest in outputs/ trained on photographs, else photo.",
    ),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps … Default: the best available one.")]
Precision = Annotated[
    str | None, typer.Option(help="fp32, bf16, fp16, or int8 on a CPU. Default: what is fast on the device.")
]
Tiles = Annotated[
    int | None,
    typer.Option(help="Tiles per image: 1, 5 or 17. One costs the least. Default: what the model was saved with."),
]
BatchSize = Annotated[
    int, typer.Option(min=1, help="Tiles per forward pass, but at least one image. With one tile per image: images.")
]
MinConfidence = Annotated[
    float, typer.Option(min=0, max=1, help="Leave out items that the model is less sure of, also from the title.")
]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"foodextract {__version__}")
        raise typer.Exit


@app.callback()
def main(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Images in, strict JSON out."""
    if context.invoked_subcommand != "publish" or not sys.stderr.isatty():  # only an upload is worth a progress bar
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # before huggingface_hub is imported
    # A check in every forward pass that imports sympy; `loading.check_image_tokens` checks the same once.
    os.environ.setdefault("TRANSFORMERS_DISABLE_TORCH_CHECK", "1")
    for stream in (sys.stdout, sys.stderr):  # a redirected stream is not UTF-8 everywhere
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="surrogateescape")


@app.command()
def extract(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH…", help="Images, or folders to search for images.")],
    model: Model = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Append to this file. Images it has answers for are skipped.")
    ] = None,
    form: Annotated[
        Literal["jsonl", "csv"], typer.Option("--format", help="JSON lines, or CSV with lists as JSON in their cells.")
    ] = "jsonl",
    batch_size: BatchSize = 8,
    tiles: Tiles = None,
    device: Device = None,
    precision: Precision = None,
    confidence: Annotated[
        bool,
        typer.Option(
            "--confidence",
            help="Add how sure the model is of is_food and of each item, from 0 to 1. With a calibration.json beside "
            "the model, about 80 % of what is marked 0.8 is right.",
        ),
    ] = False,
    min_confidence: MinConfidence = 0.0,
    free: Annotated[
        bool, typer.Option("--free", help="Decode without the grammar. An answer that is not strict JSON is an error.")
    ] = False,
) -> None:
    """Write one line of JSON per image: {"file", "is_food", "image_title", "food_items", "drink_items"}.

    The line of an image without an answer is {"file", "error"}. Rerun the command to resume and to retry such images.

    Exit status: 0 when every image has an answer, 1 when some have none, 2 when nothing could start.
    """
    from foodextract.images import find_images
    from foodextract.inference import output_files

    if free and (confidence or min_confidence):
        _stop("confidence needs the grammar: leave out --free")
    if missing := [str(path) for path in paths if not path.exists()]:
        _note(f"there is no {', '.join(missing)}: check the spelling")
    found = dict.fromkeys(map(str, find_images(paths)))
    if not found or len(missing) == len(paths):
        _stop(f"no images in {', '.join(map(str, paths))}: name files, or folders that hold .jpg, .png, .webp … files")
    with _stop_on(output_files.AnswerFileError):
        answered = output_files.resume(output, form, confidence, found) if output else set()
    files = [file for file in found if file not in answered]
    if len(files) < len(found):
        _note(f"{output} already has answers for {len(found) - len(files)} of {len(found)} images")
    if not files:
        return
    _note("loading …")

    from foodextract.inference.extractor import Extractor
    from foodextract.models.loading import ModelError, find_model

    with _stop_on(ModelError, MissingExtraError):
        source = find_model(model)
        extractor = Extractor.from_pretrained(
            source, device, precision, constrained=not free, tiles=tiles, min_confidence=min_confidence
        )
        _note(_described(source, extractor))
    if not output:
        print(output_files.header(form, confidence), end="")
    failed = 0
    bar = len(files) > 1 and (output is not None or not _may_share_terminal(sys.stdout))  # else the lines show progress
    write = partial(output_files.append, output) if output else partial(print, end="", flush=True)
    with _stop_on(output_files.AnswerFileError):
        for row in _rows(extractor, files, batch_size, confidence, bar):
            failed += "error" in row
            write(output_files.as_line(row, form, confidence))
    if failed:
        _note(f"{failed} of {len(files)} images failed; their lines say why")
        raise typer.Exit(1)


def _may_share_terminal(stream: Any) -> bool:
    """Whether a stream may end where stderr does: on the terminal, also through a pipe such as `| tee`."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):  # a stream of a test
        return False
    return not S_ISREG(status.st_mode) or os.path.samestat(status, os.fstat(2))


def _described(source: str | Path, extractor: Any) -> str:
    """What answers: name, size, what it was trained on where the model states that, and in which precision."""
    from foodextract.models.training_data import TrainingData

    model: Any = getattr(extractor, "model", None)
    size = f", {model.size / 1e6:.0f} M parameters" if hasattr(model, "size") else ""  # an exported model does not say
    data = TrainingData.find(source)
    knows = f"; {data.describe()} (list: `foodextract names`)" if data else ""
    precision = getattr(model, "precision", "")
    return f"model: {_name(source)}{size}{knows}" + (f"\nprecision: {precision}" if precision else "")


def _name(source: str | Path) -> str:
    """A Hub id, or the last part of a local path."""
    return Path(source).absolute().name if Path(source).is_dir() else str(source)


@app.command("names")
def names_command(model: Model = None) -> None:
    """List the foods and drinks that a model knows, one per line, each with its number of training images."""
    from foodextract.models.loading import find_model
    from foodextract.models.training_data import TrainingData

    source = find_model(model)
    data = TrainingData.find(source)
    if data is None:
        _stop(f"no training_data.json of {source}: check its name, or the model does not state what it was trained on")
    _note(f"{_name(source)}: {data.describe()}")
    for name in data.names:
        print(f"{name}\t{data.food_items.get(name, 0) + data.drink_items.get(name, 0)}")


def _rows(extractor: Any, files: list[str], batch_size: int, confidence: bool, bar: bool) -> Iterator[dict[str, Any]]:
    """Yield a row per file, with a progress `bar` on stderr."""
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    from foodextract.schema import as_row

    with logging_redirect_tqdm([logging.getLogger("foodextract")]):  # log lines go above the bar
        results = extractor.extract_many_with_confidence(files, batch_size)
        results = tqdm(results, total=len(files), unit="image", file=sys.stderr, disable=not bar)
        for file, result in zip(files, results, strict=True):
            record, sureness = (result, None) if isinstance(result, Exception) else result
            yield as_row(file, record, sureness if confidence else None)


@app.command()
def train(
    dataset: Annotated[str, typer.Argument(help="A dataset from notebook 00, a labeled image folder, or a Hub id.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where models and checkpoints go.")] = Path("outputs/train"),
    profile: Annotated[str, typer.Option(help="Base model and settings: hub, photo or offline.")] = "hub",
    base: Annotated[str | None, typer.Option(help="Folder or Hub id of another base model, or photo.")] = None,
    stage1: Annotated[
        str, typer.Option(help='What differs in stage 1, as JSON: {"num_train_epochs": 1, "learning_rate": 1e-4}')
    ] = "{}",
    stage2: Annotated[str, typer.Option(help="The same for stage 2.")] = "{}",
    seed: Annotated[int, typer.Option(help="Order of the images.")] = 42,
    max_steps: Annotated[int, typer.Option(help="Optimizer steps per stage; -1 for all.")] = -1,
    report_to: Annotated[str, typer.Option(help="A tracker that is installed: tensorboard, trackio …")] = "none",
    keep_in: Annotated[
        Path | None,
        typer.Option(help="Folder for copies of finished stages and checkpoints, to resume on another machine."),
    ] = None,
    retrain: Annotated[bool, typer.Option("--retrain", help="Train finished stages again.")] = False,
) -> None:
    """Run both stages of fine-tuning. Rerun the command to resume.

    `accelerate launch -m foodextract train …` uses several devices. With N processes an optimizer step takes N times
    the images: divide `gradient_accumulation_steps` by N for the same training.
    """
    with _extra("train"):
        from accelerate import PartialState

        from foodextract.data.dataset import open_dataset
        from foodextract.data.samples import DatasetError
        from foodextract.models.loading import (
            ModelError,
            check_image_tokens,
            choose_device,
            find_model,
            load_model,
            load_processor,
        )
        from foodextract.training.config import PROFILES, changed, is_sharded
        from foodextract.training.run import train_stage

    if profile not in PROFILES:
        _stop(f"there is no profile {profile!r}: choose one of {', '.join(PROFILES)}")
    settings = PROFILES[profile]
    try:
        stages = [changed(settings.stage1, json.loads(stage1)), changed(settings.stage2, json.loads(stage2))]
    except (TypeError, ValueError) as error:  # JSON that is damaged, or no object, or has unusable values
        _stop(f"--stage1 and --stage2 take JSON settings, such as '{{\"num_train_epochs\": 1}}' ({error})")
    processes = PartialState()
    with _stop_on(ModelError, DatasetError):
        with processes.main_process_first():
            rows = open_dataset(dataset, build_in=out / "dataset", seed=seed)
        device = processes.device if processes.num_processes > 1 else choose_device()
        start = find_model(base or settings.base_model)
        model = load_model(start, device, training=True)
        processor = load_processor(start, tiles=settings.tiles)
        check_image_tokens(model, processor)
        if settings.needs_gpu and device.type == "cpu":
            _note(f"the profile {profile} is meant for a GPU: without one, training takes days")
        for last, stage in zip([None, *stages], stages, strict=False):
            if last and is_sharded():  # sharded parameters cannot be frozen differently
                model = load_model(out / last.name, device, training=True)
            options = {"max_steps": max_steps, "report_to": report_to, "keep_in": keep_in, "retrain": retrain}
            train_stage(model, processor, stage, rows["train"], out, seed=seed, **options)
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
        Path | None, typer.Option("--output", "-o", help="File of the labels. Default: FOLDER/metadata.jsonl.")
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
    prompt_price: Annotated[
        float, typer.Option(min=0, help="Price of a million prompt tokens, to print the cost.")
    ] = 0,
    completion_price: Annotated[float, typer.Option(min=0, help="Price of a million completion tokens.")] = 0,
) -> None:
    """Label a folder of images with a larger model at an OpenAI-compatible endpoint. Rerun the command to resume.

    Exit status: 0 when every image has a label, 1 when some have none (see the rejects file), 2 when it had to stop.
    """
    import asyncio

    with _extra("data"):
        from foodextract.data.labeling import label_folder
        from foodextract.data.teacher import Teacher, TeacherError

    teacher = Teacher(endpoint.rstrip("/"), model, concurrency, max_edge, max_tokens, timeout, retries)
    with _stop_on(TeacherError):
        summary = asyncio.run(
            label_folder(teacher, folder, output, limit=limit, license=license, retry_rejected=retry_rejected)
        )
    print(summary)
    if prompt_price or completion_price:
        print(f"cost: {summary.cost(prompt_price, completion_price):,.4f}")
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

    with _stop_on(OSError):
        out.mkdir(parents=True, exist_ok=True)
    for index, scene in enumerate(draw_scenes(seed, split, count)):
        path = out / f"scene-{seed}-{split}-{index:05d}.png"
        scene.image.save(path)
        print(f"{path}: {scene.record.image_title or 'no food or drink'}")


@app.command()
def publish(
    kind: Annotated[Literal["model", "dataset", "space"], typer.Argument(help="What to publish.")],
    source: Annotated[
        Path | None,
        typer.Argument(help="Its folder. Default: the latest model, outputs/hub/dataset, or demos/FoodExtract-Vision."),
    ] = None,
    to: Annotated[str | None, typer.Option(help="owner/name on the Hub. Default: this project's own.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List every file and its size; upload nothing.")] = False,
    public: Annotated[bool, typer.Option("--public", help="Publish for everybody. Default: private.")] = False,
    model: Annotated[
        str | None, typer.Option(help="Hub id of the model a Space runs. Default: this project's own.")
    ] = None,
) -> None:
    """Upload a model, a dataset or the Space to the Hub, download it again and try it.

    Log in first with `hf auth login`, or set HF_TOKEN. A model needs an evaluation of exactly these weights. Rerun the
    command to resume.
    """
    with _extra("train"):
        from foodextract import names
        from foodextract.hub import publish as publishing
        from foodextract.models.loading import find_model

    with _stop_on(publishing.PublishError):
        if kind == "model":
            plan = publishing.model_plan(find_model(source), to or names.HUB_MODEL)
        elif kind == "dataset":
            plan = publishing.dataset_plan(source or Path("outputs/hub/dataset"), to or names.HUB_PUBLISHED_DATASET)
        else:
            folder = source or Path("demos") / names.REPOSITORY
            plan = publishing.space_plan(folder, to or names.HUB_SPACE, model or names.HUB_MODEL)
        print(plan)
        if not dry_run:
            print(publishing.publish(plan, public=public))


@app.command()
def serve(
    model: Model = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 for every address of this machine.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    device: Device = None,
    precision: Precision = None,
    queue_size: Annotated[
        int, typer.Option(min=1, help="Images accepted at once, uploads included; further requests get 429.")
    ] = 64,
    batch_size: BatchSize = 8,
    tiles: Tiles = None,
    deadline: Annotated[float, typer.Option(min=0.1, help="Seconds to an answer; later ones are dropped.")] = 30.0,
    max_megabytes: Annotated[float, typer.Option(min=0.001, max=1e6, help="Largest request body.")] = 10.0,
    origin: Annotated[
        list[str] | None, typer.Option(help="Web page allowed to send requests, as https://host. Repeatable.")
    ] = None,
    root_path: Annotated[str, typer.Option(help="Prefix that a proxy strips from the path, such as /food.")] = "",
    min_confidence: MinConfidence = 0.0,
) -> None:
    """Answer images over HTTP: POST /predict and /predict/batch, GET /docs, /health, /ready, /metrics.

    The model can be a BLIP that captions images with their class: the names in its config's id2label become records.
    When FOODEXTRACT_API_KEY is set, requests need that key. SIGTERM stops the server once every accepted image has its
    answer.
    """
    with _extra("serve"):
        from foodextract.inference.blip import load
        from foodextract.models.loading import ModelError, find_model
        from foodextract.serving.app import Settings
        from foodextract.serving.queue import QueueLimits
        from foodextract.serving.server import run
        from foodextract.serving.uploads import MEGABYTE, UploadLimits

    source = find_model(model)
    settings = Settings(
        queue=QueueLimits(size=queue_size, batch_size=batch_size, deadline=deadline),
        upload=UploadLimits(max_bytes=int(max_megabytes * MEGABYTE)),
        api_key=os.environ.get("FOODEXTRACT_API_KEY") or None,
        origins=tuple(origin or ()),
        root_path=root_path.rstrip("/"),
    )

    def load_and_describe() -> Any:
        answerer: Any = load(source, device, precision, tiles)
        if min_confidence and not hasattr(answerer, "min_confidence"):
            raise ModelError(f"{_name(source)} has no confidence: leave out --min-confidence")
        answerer.min_confidence = min_confidence
        logging.getLogger("foodextract").info(_described(source, answerer))
        return answerer

    with _stop_on(ModelError, MissingExtraError):
        run(load_and_describe, _name(source), settings, host, port)


ExportFolder = Annotated[Path, typer.Argument(help="The folder to write.")]


@export.command("vllm")
def export_vllm(out: ExportFolder, model: Model = None, tiles: Tiles = None) -> None:
    """Write a folder that vLLM serves with our prompt, image budget and JSON schema. OUT/serve.sh is the command."""
    from foodextract.inference.vllm import export_vllm as write
    from foodextract.models.loading import ModelError, find_model

    with _stop_on(ModelError, OSError):
        command = write(find_model(model), out, tiles)
    print(f"sh {out / 'serve.sh'}   # {command}")


@export.command("onnx")
def export_onnx(out: ExportFolder, model: Model = None, tiles: Tiles = None) -> None:
    """Write ONNX graphs, fp32 and int8, for `foodextract extract --model OUT`. Needs the extra `onnx`."""
    from foodextract.inference.onnx import export_onnx as write
    from foodextract.models.loading import ModelError, find_model

    with _stop_on(ModelError, MissingExtraError, OSError):
        sizes = write(find_model(model), out, tiles)
    for name, megabytes in sizes.items():
        print(f"{megabytes:8.1f} MB  {name}")
    print(f"foodextract extract --model {out} --precision int8 …")


@contextmanager
def _extra(name: str) -> Iterator[None]:
    """Stop with the extra to install when an optional import fails."""
    with _stop_on(MissingExtraError), extra(name):
        yield


@contextmanager
def _stop_on(*errors: type[Exception]) -> Iterator[None]:
    """Stop with the message of any of these errors, and exit status 2."""
    try:
        yield
    except errors as error:
        _stop(str(error))


def _note(message: str) -> None:
    print(message, file=sys.stderr)


def _stop(message: str) -> NoReturn:
    _note(f"foodextract: {message}")
    raise typer.Exit(2)
