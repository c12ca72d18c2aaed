"""The `foodextract` command."""

import json
import os
import sys
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


def _stop(message: str) -> None:
    print(f"foodextract: {message}", file=sys.stderr)
    raise typer.Exit(2)


if __name__ == "__main__":
    app()
