"""Answer the example photographs with a model: results/examples.png, and the answers on the terminal.

python tools/examples.py --model FOLDER
"""

from pathlib import Path
from typing import Annotated

import typer
from PIL import Image, ImageOps

from foodextract.inference.confidence import Confidence
from foodextract.inference.extractor import Extractor
from foodextract.models import loading
from foodextract.reporting.figures import GRAY, contact_sheet
from foodextract.schema import FIELDS, FoodRecord

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "demos" / "FoodExtract-Vision" / "examples"
SHOWN = ("pizza", "pancakes", "cookies", "eggs_benedict", "coffee", "cat")


def _percent(share: float) -> str:
    return "> 99%" if share >= 0.995 else f"{share:.0%}"


def caption(record: FoodRecord, confidence: Confidence) -> list[tuple[str, str]]:
    """One line for `is_food` and one for each item, each with its confidence."""
    verdict = "food or drink" if record.is_food else "neither food nor drink"
    lines = [(f"{verdict}, {_percent(confidence.is_food)}", GRAY)]
    for field in FIELDS:
        kind = field.removesuffix("_items")
        pairs = zip(getattr(record, field), getattr(confidence, field), strict=True)
        lines += [(f"{kind}: {item}, {_percent(sure)}", "black") for item, sure in pairs]
    return lines


def main(
    model: Annotated[Path, typer.Option(help="The model.")] = loading.PHOTO,
    out: Annotated[Path, typer.Option(help="The image to write.")] = ROOT / "results" / "examples.png",
) -> None:
    """Answer the example photographs."""
    extractor = Extractor.from_pretrained(model, "cpu")
    images, captions = [], []
    for name in SHOWN:
        with Image.open(EXAMPLES / f"{name}.jpg") as file:
            image = file.convert("RGB")
        [(record, confidence)] = extractor.extract_many_with_confidence([image])
        print(f"{name}.jpg {record.to_json()}")
        images.append(ImageOps.fit(image, (300, 300)))
        captions.append(caption(record, confidence))
    contact_sheet(images, captions, columns=3).savefig(out, dpi=100)


if __name__ == "__main__":
    typer.run(main)
