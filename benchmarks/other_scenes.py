"""Score the tuned tiny model on fresh scenes, on which no choice was made.

    python benchmarks/other_scenes.py                                   # 3,000 scenes; writes results/other_scenes.json
    python benchmarks/other_scenes.py --tuned outputs/offline/stage2    # the model that `make demo` has just made

The recipe was chosen with the scenes of `make demo` in view. These have another seed; their non-food objects are the
same, which no training scene shows.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from foodextract.data.scenes import draw_scenes
from foodextract.evaluation import evaluate
from foodextract.evaluation.results import write_results
from foodextract.inference.extractor import Extractor
from foodextract.models import loading
from foodextract.reporting import tables

ROOT = Path(__file__).resolve().parents[1]


def main(
    seed: Annotated[int, typer.Option(help="Of the scenes. Report only a seed that helped to choose nothing.")] = 90210,
    count: Annotated[int, typer.Option(min=2, help="Number of scenes.")] = 3000,
    tuned: Annotated[str, typer.Option(help="The model.")] = str(loading.TINY_TUNED),
    batch: Annotated[int, typer.Option(min=1, help="Images per batch.")] = 50,
    out: Annotated[Path, typer.Option(help="The results file.")] = ROOT / "results" / "other_scenes.json",
) -> None:
    """Predict, score, print and write."""
    extractor = Extractor.from_pretrained(tuned)
    scenes = list(draw_scenes(seed, "test", count))
    labels, images = [scene.record for scene in scenes], [scene.image for scene in scenes]
    command = " ".join(["python benchmarks/other_scenes.py", *sys.argv[1:]])
    rows = []
    for subject, constrained in (("tuned", False), ("tuned constrained", True)):
        texts = evaluate.predict(partial(extractor.generate_texts, constrained=constrained), images, batch, subject)
        rows += evaluate.to_rows("other_scenes", subject, evaluate.score(labels, texts), command)
    write_results(out, rows)
    print(tables.metric_table([row for row in rows if row.low is not None]))


if __name__ == "__main__":
    typer.run(main)
