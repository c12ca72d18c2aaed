"""Measure the start of a replica: seconds to ready and peak memory, for the tiny model and true-size 256M and 500M.

    python benchmarks/serve_start.py                                           # adds to results/serving.json
    python benchmarks/serve_start.py --size tiny --results /tmp/serving.json   # does it run?

The large models have random weights (see `true_size.py`), saved as bf16 and loaded with the server's defaults on a CPU.
The files are in the page cache, because they have just been written; a cold disk adds its own time.
"""

import tempfile
from functools import partial
from pathlib import Path
from typing import Annotated

import httpx
import typer

from foodextract.evaluation.results import Row, make_row
from foodextract.models import loading
from served import RESULTS, drawn_images, serving, write_part
from true_size import build


def measure(size: str, repeats: int, command: str) -> list[Row]:
    """Return the longest time to ready, and the peak memory until the first answer, loading included."""
    seconds, memory = [], []
    with tempfile.TemporaryDirectory() as folder:
        model, processor = build(size, loading.TINY_TUNED)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        del model
        for _ in range(repeats):
            with serving(Path(folder), "--deadline", "300") as served:
                seconds.append(served.seconds_to_ready)
                [image] = drawn_images(1)
                httpx.post(f"{served.address}/predict", content=image, timeout=300, trust_env=False).raise_for_status()
                memory.append(served.peak())
    row = partial(make_row, "serve_start", size, n=repeats, command=command)
    print(f"{size:6} ready after {max(seconds):.1f} s, peak {max(memory):.2f} GiB")
    return [row("seconds", max(seconds), unit="s"), row("peak_memory_gib", max(memory), unit="GiB")]


def main(
    size: Annotated[list[str] | None, typer.Option(help="tiny, 256m or 500m; may be repeated.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Starts of each size.")] = 3,
    results: Annotated[Path, typer.Option(help="Where the figures go.")] = RESULTS,
) -> None:
    """Measure, print and save."""
    sizes = size or ["tiny", "256m", "500m"]
    command = f"python benchmarks/serve_start.py --repeats {repeats}" + "".join(
        f" --size {name}" for name in size or []
    )
    write_part(results, [row for name in sizes for row in measure(name, repeats, command)])


if __name__ == "__main__":
    typer.run(main)
