"""Is every answer a record, whatever weights and image? Does the grammar, the batch or the precision change an answer?

    python benchmarks/valid.py                  # 2,000 images each for three sets of weights; writes results/extract_valid.json

The odd images are those of `odd_images.py`; the comparisons are made on drawn scenes, where the tuned model says
something. Answers that differ are printed.
"""

from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Annotated

import torch
import typer
from PIL import Image
from tqdm import tqdm
from transformers import SmolVLMForConditionalGeneration

from foodextract.data.scenes import draw_scenes
from foodextract.evaluation.evaluate import rate, to_rows
from foodextract.evaluation.results import Row, write_results
from foodextract.inference.extractor import Extractor
from foodextract.models import loading
from foodextract.schema import AnswerError, FoodRecord
from odd_images import odd_images

ROOT = Path(__file__).resolve().parents[1]


def is_record(text: str) -> bool:
    """Strict JSON that fits the schema?"""
    try:
        return bool(FoodRecord.parse(text))
    except AnswerError:
        return False


def main(
    images: Annotated[int, typer.Option(min=8, help="Odd images for each of the three models.")] = 2000,
    compared: Annotated[int, typer.Option(min=8, help="Drawn scenes for the comparisons.")] = 300,
    batch_size: Annotated[int, typer.Option(min=2, help="Images the model sees at once.")] = 16,
    model: Annotated[Path, typer.Option(help="The tuned model.")] = loading.TINY_TUNED,
    base: Annotated[
        Path, typer.Option(help="The base model; the random one has its configuration.")
    ] = loading.TINY_BASE,
    results: Annotated[Path, typer.Option(help="Where the figures go.")] = ROOT / "results" / "extract_valid.json",
) -> None:
    """Measure, print and write down."""
    tuned, untuned = (Extractor.from_pretrained(folder, "cpu", precision="fp32") for folder in (model, base))
    torch.manual_seed(0)
    nobody = Extractor(SmolVLMForConditionalGeneration(untuned.model.config).eval(), untuned.processor)
    rows: list[Row] = []

    def note(subject: str, metric: str, hits: list[bool]) -> None:
        share = rate(metric, hits)
        command = f"python benchmarks/valid.py --images {images} --compared {compared}"
        rows.extend(to_rows("extract_valid", subject, [share], command))
        print(f"{subject:28} {metric:24} {share.value:8.2%}  n = {share.n}", flush=True)

    def compare(subject: str, pairs: list[tuple[str, str]]) -> None:
        note(subject, "same_answer_rate", [a == b for a, b in pairs])
        print(*(f"  {a}\n  {b}\n" for a, b in pairs if a != b), sep="", end="")

    def ask(extractor: Extractor, stream: Iterable[Image.Image], count: int, constrained: bool) -> list[str]:
        stream, texts = iter(stream), []
        with tqdm(total=count, unit="image", leave=False) as bar:
            while batch := list(islice(stream, batch_size)):
                texts += extractor.generate_texts(batch, constrained)
                bar.update(len(batch))
        return texts

    for subject, extractor in (("tuned", tuned), ("base", untuned), ("random weights", nobody)):
        note(
            subject, "schema_valid_rate", [is_record(text) for text in ask(extractor, odd_images(images), images, True)]
        )
    scenes = [scene.image for scene in draw_scenes(91, "test", compared)]
    free, strict = (ask(tuned, scenes, compared, constrained) for constrained in (False, True))
    allowed = [(a, b) for a, b in zip(free, strict, strict=True) if is_record(a)]
    note("tuned, without the grammar", "schema_valid_rate", [is_record(text) for text in free])
    compare("grammar or none, where valid", allowed)
    for precision in ("fp32", "bf16", "int8"):
        extractor = Extractor.from_pretrained(model, "cpu", precision=precision)
        together = ask(extractor, scenes, compared, True)
        alone = [extractor.generate_texts([scene], True)[0] for scene in tqdm(scenes, leave=False)]
        compare(f"{precision}, batch of {batch_size} or 1", list(zip(together, alone, strict=True)))
        if precision != "fp32":
            compare(f"{precision} or fp32", list(zip(together, strict, strict=True)))
            pairs = [
                (FoodRecord.parse(a).is_food, FoodRecord.parse(b).is_food)
                for a, b in zip(together, strict, strict=True)
            ]
            note(f"{precision} or fp32", "same_is_food_rate", [a == b for a, b in pairs])
    write_results(results, rows)


if __name__ == "__main__":
    typer.run(main)
