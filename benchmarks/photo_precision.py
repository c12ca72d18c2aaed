"""Does the photo model answer the same in every precision, and what does each cost?

    python benchmarks/photo_precision.py FOLDER    # a folder with a manifest, see experiments/photo_base/photos.py

writes results/photo_precision.json. Held-out photographs are processed one at a time, in all precisions in turn, by one
thread; `(default)` marks the one that this processor gets. Then the default answers them in batches of 32. Rows of other
processors stay.
"""

import sys
import time
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from tqdm import tqdm

from extract import title
from foodextract.evaluation import evaluate
from foodextract.evaluation.results import device_name, make_row
from foodextract.inference.extractor import Extractor
from foodextract.models import loading
from foodextract.models.precision import choose_precision, seconds_of
from foodextract.models.quantization import convert
from reports import write_beside
from true_size import interval

sys.path.append(str(Path(__file__).resolve().parents[1] / "experiments" / "photo_base"))
from photos import read_photos

ROOT = Path(__file__).resolve().parents[1]
EXACT = ("fp32", "fp32")
FORMATS = (EXACT, ("bf16", "fp32"), ("bf16", "bf16"), ("int8", "int8"))


def main(
    folder: Annotated[Path, typer.Argument(help="Folder with `manifest.jsonl`.")],
    count: Annotated[int, typer.Option(min=1, help="Photographs of the test split.")] = 400,
    model: Annotated[Path, typer.Option(help="The photo model.")] = loading.PHOTO,
    out: Annotated[Path, typer.Option(help="The results file.")] = ROOT / "results" / "photo_precision.json",
) -> None:
    """Compare the precisions of the photo model."""
    torch.set_num_threads(1)
    exact = Extractor.from_pretrained(model, "cpu", precision="fp32")
    chosen = choose_precision(
        torch.device("cpu"), training=False, parameters=exact.model.size, seconds=partial(seconds_of, exact.model)
    )
    print(chosen.reason)
    default = (chosen.many, chosen.one)
    extractors = {}
    for formats in dict.fromkeys([*FORMATS, default]):
        extractors[formats] = exact if formats == EXACT else Extractor.from_pretrained(model, "cpu", precision="fp32")
        if formats != EXACT:
            convert(extractors[formats].model, *formats)
    paths = [photo.path for photo in read_photos(folder) if photo.split == "test"][:count]
    spent, answers = defaultdict(list), defaultdict(list)
    for number, path in enumerate(tqdm([paths[0], *paths], unit="photograph")):
        for formats, extractor in extractors.items():
            began = time.process_time()
            record = extractor.extract(path)
            if number:  # the first one warms up
                spent[formats].append(time.process_time() - began)
                answers[formats].append(record)
    rows = []
    make = partial(make_row, "photo_precision", command=f"python benchmarks/photo_precision.py FOLDER --count {count}")
    for formats in extractors:
        subject = title(*formats, default)
        rows.append(make(subject, "cpu_seconds_per_image", unit="s", n=len(paths), **interval(spent[formats])))
        for metric, of in {"same_answer_rate": lambda record: record, "same_is_food_rate": lambda r: r.is_food}.items():
            pairs = zip(answers[formats], answers[EXACT], strict=True)
            same = evaluate.rate(metric, [of(mine) == of(theirs) for mine, theirs in pairs])
            rows += evaluate.to_rows("photo_precision", f"{subject} and fp32", [same], rows[0].command)
    together = extractors[default].extract_many(paths, 32)
    same = evaluate.rate("same_answer_rate", [a == b for a, b in zip(together, answers[default], strict=True)])
    rows += evaluate.to_rows("photo_precision", f"{title(*default, default)}: alone and in 32", [same], rows[0].command)
    write_beside(out, rows, lambda row: row.device != device_name())
    for one in rows:
        print(f"{one.subject:>50} {one.metric} {one.value:.4g} ({one.low:.4g} to {one.high:.4g}), n = {one.n}")


if __name__ == "__main__":
    typer.run(main)
