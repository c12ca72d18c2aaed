"""Everything to measure in the hour when there is a GPU, in one command meant to take ten minutes.

    python benchmarks/gpu.py                  # 500M at true size; results/train_gpu_<name>.json, extract_gpu_<name>.json
    python benchmarks/gpu.py --device cpu --size tiny --images 2 --batch 1 --batch 2 --out /tmp/gpu    # does it run?

Training is `train_step.py` with the seed's recipe and ours alone, on the same card. Extraction is timed by the wall, from
encoded image to text, in turn: `transformers.pipeline` with 17 tiles as the seed projects use it; the model's own
`generate` on one tile with a static cache, which transformers compiles to CUDA graphs; and ours, one image and many at a
time. Weights are random, so all are made to write one answer (`extract.Dictation`), or as many tokens as it has. Figures
below their target are printed.
"""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Annotated

import torch
import typer
from transformers import PreTrainedModel

import train_step
from extract import ANSWER, Dictation, Subject
from extract_report import SEED
from foodextract.data.scenes import draw_scenes
from foodextract.evaluation.results import Row, device_name, make_row, read_results, write_results
from foodextract.images import open_image
from foodextract.inference.extractor import Extractor
from foodextract.models import loading
from foodextract.models.precision import choose_precision
from foodextract.reporting.tables import markdown_table
from foodextract.training.throughput import peak_memory, reset_peak_memory, wait_for
from true_size import as_photograph, build, interval, ratio

ROOT = Path(__file__).resolve().parents[1]
STATIC, OURS = "one tile, static cache", "ours"
TARGETS = {  # by how the name of the benchmark begins, metric, and how the subject ends
    ("train", "images_per_second", "stage1, ours"): 300,
    ("train", "images_per_second", "stage2, ours"): 200,
    ("train", "mfu", "stage1, ours"): 0.3,
    ("train", "mfu", "stage2, ours"): 0.3,
    ("extract", "speedup_vs_seed", OURS): 50,
}

Ask = Callable[[Sequence[bytes]], object]


def generate_with_static_cache(extractor: Extractor, tokens: int, files: Sequence[bytes]) -> torch.Tensor:
    """Token ids (B, S) of `generate` for as many tokens as the dictated answer has."""
    inputs = extractor.prepare([open_image(file) for file in files]).to(extractor.model.device, extractor.model.dtype)
    return extractor.model.generate(
        **inputs, do_sample=False, cache_implementation="static", min_new_tokens=tokens, max_new_tokens=tokens
    )


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """A copy for hooks of its own, with the same tensors."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def subjects(size: str, device: torch.device, processor_from: Path) -> dict[str, Ask]:
    """The ways to answer a batch of encoded images, by name."""
    model, processor = build(size, processor_from)
    dtype = choose_precision(device, training=False).weights
    model = model.to(device, dtype).requires_grad_(False)
    dictation, dictated = Dictation(processor.tokenizer), twin(model)
    dictation.to(dictated)
    plain = copy.deepcopy(processor)
    loading.set_image_budget(plain, 1)
    static = partial(generate_with_static_cache, Extractor(model, plain), len(dictation.tokens))
    return {
        SEED: Subject(dictated, processor, dictation, tiles=17, constrained=False, piped=True).answer,
        STATIC: static,
        OURS: Subject(dictated, processor, dictation).answer,
    }


def seconds(ask: Ask, files: Sequence[bytes], device: torch.device) -> float:
    """Wall seconds of one batch."""
    wait_for(device)
    start = perf_counter()
    answers = ask(files)
    wait_for(device)
    spent = perf_counter() - start
    if isinstance(answers, list) and set(answers) != {ANSWER.to_json()}:
        raise SystemExit(f"the dictated answer was not written, so its cost says nothing: {answers[0]!r}")
    return spent


def extraction_rows(
    size: str, device: torch.device, files: Sequence[bytes], batches: Sequence[int], processor_from: Path, command: str
) -> list[Row]:
    """Latency of one image, and images a second by batch size, with the peak of the memory."""
    ways = subjects(size, device, processor_from)
    row = partial(make_row, "extract_gpu", command=command)
    single: dict[str, list[float]] = {name: [] for name in ways}
    for file in [files[0], *files]:  # all warm up on the first
        for name, ask in ways.items():
            single[name].append(seconds(ask, [file], device))
    rows = []
    for name, spent in single.items():
        add = partial(row, f"{size}, {name}", n=len(files))
        rows.append(add("seconds_per_image", unit="s", **interval(spent[1:])))
        rows.append(add("speedup_vs_seed", unit="x", **interval(single[SEED][1:], ratio, spent[1:])))
    for batch in batches:
        some = (list(files) * batch)[:batch]
        for name in (STATIC, OURS):
            reset_peak_memory(device)
            times = [seconds(ways[name], some, device) for _ in range(4)][1:]
            add = partial(row, f"{size}, batch {batch}, {name}", n=len(times))
            rows.append(add("images_per_second", unit="1/s", **interval([batch / spent for spent in times])))
            gain = interval([sum(single[SEED][1:]) / len(files) * batch / spent for spent in times])
            rows.append(add("speedup_vs_seed", unit="x", **gain))
            rows.append(add("peak_memory_gib", peak_memory(device) / 2**30, unit="GiB"))
    return rows


def with_rates(rows: Sequence[Row]) -> list[Row]:
    """Rows of training with images a second beside the seconds an image."""
    rates = [
        make_row(
            row.benchmark, row.subject, "images_per_second", 1 / row.value, unit="1/s", n=row.n, command=row.command
        )
        for row in rows
        if row.metric == "seconds_per_image"
    ]
    return [*rows, *rates]


def short_of_target(rows: Sequence[Row]) -> list[str]:
    """One sentence for each figure below its target."""
    found = []
    for (benchmark, metric, end), target in TARGETS.items():
        asked = [row for row in rows if row.benchmark.startswith(benchmark) and row.metric == metric]
        best = max((row for row in asked if row.subject.endswith(end)), key=lambda row: row.value)
        if best.value < target:
            found.append(f"{best.subject}: {metric} is {best.value:.3g}, {best.value / target:.0%} of {target:g}")
    return found


def main(
    size: Annotated[str, typer.Option(help="500m, 256m or tiny.")] = "500m",
    device: Annotated[str, typer.Option(help="cuda, cuda:1 … or cpu.")] = "cuda",
    images: Annotated[int, typer.Option(min=1, help="Images that are answered one at a time.")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Measured steps of training.")] = 6,
    batch: Annotated[list[int] | None, typer.Option(help="Images at once in extraction.")] = None,
    train_batch: Annotated[int | None, typer.Option(min=1, help="Images at once in training.")] = None,
    processor: Annotated[
        Path, typer.Option(help="A SmolVLM's folder to take the tokenizer from.")
    ] = loading.TINY_TUNED,
    out: Annotated[Path, typer.Option(help="Folder of the results files.")] = ROOT / "results",
) -> None:
    """Measure training and extraction on this GPU, write the figures down, and print what falls short."""
    on, began = loading.choose_device(device), perf_counter()
    name = train_step.in_file_name(device_name())
    command = f"python benchmarks/gpu.py --size {size} --device {device} --images {images} --steps {steps}"
    files = [as_photograph(scene) for scene in draw_scenes(11, "test", images)]
    with torch.inference_mode():
        extraction = extraction_rows(size, on, files, batch or [8, 32, 128], processor, command)
    write_results(out / f"extract_gpu_{name}.json", extraction)
    lines = [[row.subject, row.metric, f"{row.value:.4g} {row.unit}", row.n] for row in extraction]
    print(markdown_table(["extraction", "figure", "value", "n"], lines), flush=True)
    training = out / f"train_gpu_{name}.json"
    options = {"batch": train_batch, "seed_batch": None, "processor": processor, "results": training, "ends": True}
    train_step.main(size=[size], device=device, repeats=1, steps=steps, **options)
    rows = with_rates(read_results(training))
    write_results(training, rows)
    print(
        f"{perf_counter() - began:.0f} s. {'; '.join(short_of_target([*rows, *extraction])) or 'All targets are met'}."
    )


if __name__ == "__main__":
    typer.run(main)
