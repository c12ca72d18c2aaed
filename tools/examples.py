"""Answer the example photographs with a model: results/examples.png, and the answers on the terminal.

The Space's thumbnail is made of the same photographs.

python tools/examples.py --model FOLDER
"""

from pathlib import Path
from typing import Annotated

import typer
from PIL import Image, ImageOps

from foodextract.inference.confidence import Confidence
from foodextract.inference.extractor import Extractor
from foodextract.models import loading
from foodextract.reporting.figures import GRAY, INVENTED, RIGHT, contact_sheet
from foodextract.schema import FIELDS, FoodRecord

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "demos" / "FoodExtract-Vision" / "examples"
SHOWN = {  # what each shows
    "pizza": "pizza",
    "pancakes": "pancake",
    "cookies": "cookie",
    "eggs_benedict": "eggs Benedict",
    "coffee": "coffee",
    "cat": "",
}


def _percent(share: float) -> str:
    return "> 99%" if share >= 0.995 else f"{share:.0%}"


def caption(record: FoodRecord, confidence: Confidence, shown: str) -> list[tuple[str, str]]:
    """One line for `is_food` and one for each item, with its confidence; what is not `shown` is marked as wrong."""
    verdict = "food or drink" if record.is_food else "neither food nor drink"
    color = GRAY if record.is_food == bool(shown) else INVENTED
    lines = [(f"{verdict}, {_percent(confidence.is_food)} sure", color)]
    for field in FIELDS:
        kind = field.removesuffix("_items")
        pairs = zip(getattr(record, field), getattr(confidence, field), strict=True)
        for item, sure in pairs:
            right = item == shown
            mark, color, truth = ("✓", RIGHT, "") if right else ("✗", INVENTED, f"; it is {shown or 'neither'}")
            lines.append((f"{mark} {kind}: {item}, {_percent(sure)} sure{truth}", color))
    return lines


def main(
    model: Annotated[Path, typer.Option(help="The model.")] = loading.PHOTO,
    out: Annotated[Path, typer.Option(help="The image to write.")] = ROOT / "results" / "examples.png",
) -> None:
    """Answer the example photographs."""
    extractor = Extractor.from_pretrained(model, "cpu")
    images, captions = [], []
    for name, shown in SHOWN.items():
        with Image.open(EXAMPLES / f"{name}.jpg") as file:
            image = file.convert("RGB")
        [(record, confidence)] = extractor.extract_many_with_confidence([image])
        print(f"{name}.jpg {record.to_json()}")
        images.append(ImageOps.fit(image, (300, 300)))
        captions.append(caption(record, confidence, shown))
    contact_sheet(images, captions, columns=3).savefig(out, dpi=100)
    save_thumbnail()


def save_thumbnail() -> None:
    """Eight photographs side by side, 1200 x 600 pixels, for the Space's card."""
    sheet = Image.new("RGB", (1200, 600))
    for number, path in enumerate(sorted(EXAMPLES.glob("*.jpg"))[:8]):
        with Image.open(path) as file:
            sheet.paste(ImageOps.fit(file.convert("RGB"), (300, 300)), (number % 4 * 300, number // 4 * 300))
    sheet.quantize(128).save(EXAMPLES.parent / "thumbnail.png", optimize=True)


if __name__ == "__main__":
    typer.run(main)
