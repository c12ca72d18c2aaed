"""How well does the tuned tiny model answer scenes on which nothing was ever chosen?

    python benchmarks/other_scenes.py                                   # 3,000 of them; writes results/other_scenes.json
    python benchmarks/other_scenes.py --tuned outputs/offline/stage2    # the model that `make demo` has just made

The scenes of `make demo` were looked at while its recipe was made. Those of this seed were not, though their non-food objects are the same
ones, which no training shows.
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
    seed: Annotated[
        int, typer.Option(help="Which scenes. A seed that helped to choose something is no longer one to report.")
    ] = 90210,
    count: Annotated[int, typer.Option(min=2, help="How many.")] = 3000,
    tuned: Annotated[str, typer.Option(help="The model.")] = str(loading.TINY_TUNED),
    batch: Annotated[int, typer.Option(min=1, help="Images the model sees at once.")] = 50,
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = ROOT / "results" / "other_scenes.json",
) -> None:
    """Ask, score, print and write down."""
    extractor = Extractor.from_pretrained(tuned)
    scenes = list(draw_scenes(seed, "test", count))
    labels, images = [scene.record for scene in scenes], [scene.image for scene in scenes]
    rows = []
    for subject, constrained in (("tuned", False), ("tuned constrained", True)):
        texts = evaluate.ask(partial(extractor.generate_texts, constrained=constrained), images, batch, subject)
        command = " ".join(["python benchmarks/other_scenes.py", *sys.argv[1:]])
        rows += evaluate.to_rows("other_scenes", subject, evaluate.score(labels, texts), command)
    write_results(out, rows)
    print(tables.metric_table([row for row in rows if row.low is not None]))


if __name__ == "__main__":
    typer.run(main)
