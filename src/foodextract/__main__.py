"""The `foodextract` command."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # before transformers is imported
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import typer

app = typer.Typer(
    name="foodextract", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Pictures in, strict JSON out."
)


@app.callback()
def main() -> None:
    """Pictures in, strict JSON out."""


@app.command()
def extract(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH…", help="Pictures, or folders to search for pictures.")],
    model: Annotated[
        str | None, typer.Option(help="Model folder or Hub id (default: the model trained last in outputs/, else the bundled tiny one).")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the lines here instead of to standard output.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures the model sees at once.")] = 8,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps … (default: the best there is)")] = None,
) -> None:
    """One line of JSON a picture: {"file", "is_food", "image_title", "food_items", "drink_items"}, or {"file", "error"}.

    Exit status: 0 when all pictures were answered, 1 when some could not be (the others are answered all the same), 2 when nothing could
    start.
    """
    from tqdm import tqdm  # the imports below take seconds, which `--help` should not

    from foodextract.extractor import Extractor
    from foodextract.models import ModelError, newest_tuned
    from foodextract.pictures import find_pictures
    from foodextract.schema import FoodRecord

    files = list(find_pictures(paths))
    if not files:
        _stop(f"no pictures in {', '.join(map(str, paths))}: name files, or folders that hold .jpg, .png, .webp … files")
    try:
        source = model or newest_tuned()
        print(f"model: {source}", file=sys.stderr)
        extractor = Extractor.from_pretrained(source, device)
    except ModelError as error:
        _stop(str(error))
    partial = output.with_name(output.name + ".partial") if output else None
    failed = 0
    try:
        lines = partial.open("w", encoding="utf-8") if partial else sys.stdout
    except OSError as error:
        _stop(f"cannot write {output}: {error.strerror}")
    results = extractor.extract_many(files, batch_size)
    for file, result in zip(files, tqdm(results, total=len(files), unit="picture", file=sys.stderr), strict=True):
        answered = isinstance(result, FoodRecord)
        failed += not answered
        print(json.dumps({"file": str(file), **(result.model_dump() if answered else {"error": str(result)})}), file=lines, flush=True)
    if partial:
        lines.close()
        partial.replace(output)
    if failed:
        print(f"{failed} of {len(files)} pictures could not be answered; their lines say why", file=sys.stderr)
        raise typer.Exit(1)


@app.command()
def train(
    dataset: Annotated[str, typer.Argument(help="A data set from notebook 00, a labelled picture folder, or a Hub id.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where models and checkpoints go.")] = Path("outputs/train"),
    profile: Annotated[str, typer.Option(help="Whose base model and rates: hub or offline.")] = "hub",
    base: Annotated[str | None, typer.Option(help="Hub id or folder of another base model.")] = None,
    stage1: Annotated[str, typer.Option(help='What differs in stage 1, as JSON: {"epochs": 1, "learning_rate": 1e-4}')] = "{}",
    stage2: Annotated[str, typer.Option(help="The same for stage 2.")] = "{}",
    seed: Annotated[int, typer.Option(help="Order of the pictures.")] = 42,
    max_steps: Annotated[int, typer.Option(help="Stop each stage after so many optimizer steps; -1: never.")] = -1,
) -> None:
    """Both stages of fine-tuning without a notebook, on one device or, under `accelerate launch`, on several.

    With N processes every optimizer step takes N times the pictures; divide `batch_size` or `accumulation` by N for the same training.
    An interrupted run takes up its last checkpoint when it is started again.
    """
    from accelerate import PartialState

    from foodextract.dataset import open_dataset
    from foodextract.models import ModelError, choose_device, load_model, load_processor
    from foodextract.profiles import PROFILES
    from foodextract.sources import DatasetError
    from foodextract.training import train_stage

    if profile not in PROFILES:
        _stop(f"there is no profile {profile!r}: take one of {', '.join(PROFILES)}")
    settings = PROFILES[profile]
    try:
        stages = [replace(settings.stage1, **json.loads(stage1)), replace(settings.stage2, **json.loads(stage2))]
    except (TypeError, json.JSONDecodeError) as error:
        _stop(f"--stage1 and --stage2 take JSON with values of a stage, such as '{{\"epochs\": 1}}' ({error})")
    processes = PartialState()
    try:
        with processes.main_process_first():
            rows = open_dataset(dataset, build_in=out / "dataset", seed=seed)
        device = processes.device if processes.num_processes > 1 else choose_device()
        model = load_model(base or settings.base_model, device, training=True)
        processor = load_processor(base or settings.base_model, tiles=settings.tiles)
        for stage in stages:
            train_stage(model, processor, stage, rows["train"], out, seed=seed, max_steps=max_steps)
    except (ModelError, DatasetError) as error:
        _stop(str(error))
    if processes.is_main_process:
        print(out / stages[-1].name)


def _stop(message: str) -> None:
    print(f"foodextract: {message}", file=sys.stderr)
    raise typer.Exit(2)


if __name__ == "__main__":
    app()
