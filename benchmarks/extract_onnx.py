"""Do the ONNX graphs answer as the model does, and what does an answer cost?

    python benchmarks/extract_onnx.py           # parity of the tuned model, latency at 500M and 256M; writes results/extract_onnx.json
    python benchmarks/extract_onnx.py --size tiny --compared 8 --images 2 --results /tmp/onnx.json        # does it run?

Parity: the tuned tiny model on drawn scenes, torch in fp32 beside the graphs in fp32 and int8. Latency: as in
`extract.py`, random weights at true size that write a dictated answer under the grammar, CPU-seconds, all subjects
alternately on the same images.
"""

import copy
import gc
import tempfile
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer

from extract import Dictation, Subject, alternately, cost_rows
from foodextract.data.scenes import draw_scenes
from foodextract.evaluation.evaluate import rate, to_rows
from foodextract.evaluation.results import Row, make_row, write_results
from foodextract.inference.extractor import Extractor
from foodextract.inference.onnx import GraphModel, export_onnx, write_graphs
from foodextract.models import loading
from foodextract.models.quantization import convert
from foodextract.schema import FoodRecord
from true_size import as_photograph, build

ROOT = Path(__file__).resolve().parents[1]


def parity(model: Path, count: int, batch_size: int, command: str) -> list[Row]:
    """How often the graphs give the very answer of torch in fp32, and its `is_food`."""
    scenes = [scene.image for scene in draw_scenes(91, "test", count)]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        export_onnx(model, Path(folder))
        ways = {"torch": Extractor.from_pretrained(model, "cpu", "fp32")}
        ways |= {
            f"ONNX {precision}": Extractor.from_pretrained(folder, precision=precision)
            for precision in ("fp32", "int8")
        }
        answers = {name: [way.generate_texts([scene], True)[0] for scene in scenes] for name, way in ways.items()}
        batches = [scenes[first : first + batch_size] for first in range(0, count, batch_size)]
        together = {
            name: [text for batch in batches for text in way.generate_texts(batch, True)] for name, way in ways.items()
        }
    for name in list(ways)[1:]:
        pairs, alone = (list(zip(answers[name], others, strict=True)) for others in (answers["torch"], together[name]))
        for subject, metric, hits in (
            (f"{name} or torch fp32", "same_answer_rate", [a == b for a, b in pairs]),
            (
                f"{name} or torch fp32",
                "same_is_food_rate",
                [FoodRecord.parse(a).is_food == FoodRecord.parse(b).is_food for a, b in pairs],
            ),
            (f"{name}, batch of {batch_size} or 1", "same_answer_rate", [a == b for a, b in alone]),
        ):
            share = rate(metric, hits)
            rows += to_rows("extract_onnx", subject, [share], command)
            print(f"{subject:32} {metric:20} {share.value:8.2%}  n = {share.n}", flush=True)
    return rows


def latency(size: str, images: list[bytes], processor_from: Path, command: str) -> list[Row]:
    """CPU-seconds an image through torch and through the graphs."""
    bf16, processor = build(size, processor_from)
    fp32 = copy.deepcopy(bf16).float()
    with tempfile.TemporaryDirectory() as folder:
        write_graphs(fp32, Path(folder))
        gc.collect()
        int8 = copy.deepcopy(fp32)
        convert(int8, "int8", "int8")
        ways = {"torch fp32": fp32, "torch bf16": bf16, "torch int8": int8}
        ways |= {f"ONNX {precision}": GraphModel(folder, precision=precision) for precision in ("fp32", "int8")}
        dictation = Dictation(processor.tokenizer)
        for model in ways.values():
            dictation.to(model)
        subjects = {name: Subject(model, processor, dictation) for name, model in ways.items()}
        spent = alternately(subjects, images)
    return cost_rows(size, subjects, spent, "speedup_vs_torch", partial(make_row, "extract_onnx", command=command))


def main(
    size: Annotated[list[str] | None, typer.Option(help="500m, 256m or tiny; may be given more than once.")] = None,
    compared: Annotated[int, typer.Option(min=1, help="Drawn scenes for the parity.")] = 300,
    images: Annotated[int, typer.Option(min=1, help="How many images every subject answers for the latency.")] = 5,
    batch_size: Annotated[
        int, typer.Option(min=2, help="Images at once, where a batch is compared with single images.")
    ] = 16,
    threads: Annotated[
        int, typer.Option(min=1, help="Threads of torch and of ONNX Runtime; CPU-seconds are the sum over them.")
    ] = 1,
    model: Annotated[Path, typer.Option(help="The tuned model.")] = loading.TINY_TUNED,
    results: Annotated[Path, typer.Option(help="Where the figures go.")] = ROOT / "results" / "extract_onnx.json",
) -> None:
    """Measure, print and write down."""
    torch.set_num_threads(threads)
    command = f"python benchmarks/extract_onnx.py --compared {compared} --images {images} --threads {threads}"
    rows = parity(model, compared, batch_size, command)
    files = [as_photograph(scene) for scene in draw_scenes(11, "test", images)]
    for one in size or ["500m", "256m"]:
        rows += latency(one, files, model, command)
        gc.collect()
    write_results(results, rows)


if __name__ == "__main__":
    typer.run(main)
