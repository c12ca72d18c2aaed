"""What one answer costs on this machine's CPU: ours beside `transformers.pipeline` as the seed projects use it, lever
by lever.

    python benchmarks/extract.py                # 500M and 256M at true size; writes results/extract_cpu.json
    python benchmarks/extract.py --size tiny --images 2 --results /tmp/extract.json    # does it run?

Weights are random (`true_size.py`) and would never end an answer: every subject is therefore made to write the same one
(a large number is added to the next token's logit, which costs nothing), the seed's pipeline under its 256 new tokens
too. All subjects see the same drawn images, one after the other, alternately, in one process; times are CPU-seconds of
the whole process, which other programs on the machine do not count towards. Where the CPU computes bf16 slower than
fp32, the seed's way is measured in fp32, which is its best there. Without `--processor` the prompt differs by some
tokens from the real one's (their number is written down), and a grammar mask is cheaper by some 20 microseconds a
token.
"""

import copy
import gc
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image
from transformers import PreTrainedTokenizerBase, ProcessorMixin, pipeline

from extract_report import DEFAULT, PHASES, SEED, draw
from foodextract import prompts
from foodextract.data.scenes import draw_scenes
from foodextract.evaluation.results import Row, device_name, make_row
from foodextract.images import open_image
from foodextract.inference.extractor import MAX_NEW_TOKENS, Extractor
from foodextract.inference.onnx import GraphModel
from foodextract.models import loading
from foodextract.models.precision import choose_precision, seconds_of
from foodextract.models.quantization import convert
from foodextract.schema import FoodRecord
from reports import write_beside
from true_size import as_photograph, bf16_is_slow, build, interval, ratio

ROOT = Path(__file__).resolve().parents[1]
ANSWER = FoodRecord(is_food=1, image_title="beer and pretzel", food_items=["pretzel"], drink_items=["beer"])


class Dictation:
    """Makes models write one answer, behind a prompt of `prompt_length` tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokens = tokenizer(" " + ANSWER.to_json() + tokenizer.eos_token, add_special_tokens=False).input_ids
        self.prompt_length = 0

    def to(self, model: torch.nn.Module) -> None:
        """From now on this model writes it."""

        def add(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            for row, place in enumerate(kwargs["position_ids"][:, -1].tolist()):
                output.logits[
                    row, -1, self.tokens[min(max(place + 1 - self.prompt_length, 0), len(self.tokens) - 1)]
                ] += 10_000

        model.register_forward_hook(add, with_kwargs=True)


class Clock:
    """CPU-seconds by phase of what runs within `measure`."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)

    def watch(self, model: torch.nn.Module) -> None:
        """Time the vision tower, and the first forward of an answer, less the tower where that is part of it."""
        started = {}

        def start(name: str, *_: Any) -> None:
            started[name] = time.process_time() - self.spent["vision"] * (name == "first")

        def end_vision(*_: Any) -> None:
            self.spent["vision"] += time.process_time() - started["vision"]

        def end_first(*_: Any) -> None:
            if "prefill" not in self.spent:
                self.spent["prefill"] = time.process_time() - self.spent["vision"] - started["first"]

        vision = model.vision if isinstance(model, GraphModel) else model.model.vision_model
        vision.register_forward_pre_hook(partial(start, "vision"))
        vision.register_forward_hook(end_vision)
        model.register_forward_pre_hook(partial(start, "first"))
        model.register_forward_hook(end_first)

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        begin = time.process_time()
        yield
        self.spent[name] += time.process_time() - begin

    def phases(self) -> dict[str, float]:
        """Seconds by phase; what generation does between two forwards counts to the tokens."""
        tokens = self.spent["generate"] - self.spent["vision"] - self.spent["prefill"]
        return {name: self.spent[name] for name in PHASES if name != "tokens"} | {"tokens": tokens}


class Subject:
    """One way to answer encoded images, and what it cost."""

    def __init__(
        self,
        model: torch.nn.Module,
        processor: ProcessorMixin,
        dictation: Dictation,
        tiles: int = 1,
        constrained: bool = True,
        piped: bool = False,
    ) -> None:
        self.processor, self.dictation = copy.deepcopy(processor), dictation
        loading.set_image_budget(self.processor, tiles)
        self.extractor = Extractor(model.requires_grad_(False), self.processor, constrained)
        self.clock = Clock()
        self.clock.watch(model)
        self.extractor.prepare = self.clock.measure("preprocess")(self.extractor.prepare)
        self.pipe = pipeline("image-text-to-text", model=model, processor=self.processor) if piped else None
        if self.pipe:
            self.pipe.preprocess = self.clock.measure("preprocess")(self.pipe.preprocess)
        self.prompt_length = self.extractor.prepare([Image.new("RGB", (256, 256))])["input_ids"].shape[1]

    def answer(self, files: list[bytes]) -> list[str]:
        """The texts for one batch; the pipeline takes one image at a time, as the seeds do."""
        self.clock.spent.clear()
        self.dictation.prompt_length = self.prompt_length
        with self.clock.measure("total"):
            with self.clock.measure("open"):
                images = [open_image(file) for file in files]
            if self.pipe:
                texts = [text for image in images for text in self._through_pipe(image)]
            else:
                with self.clock.measure("generate"):
                    texts = self.extractor.generate_texts(images, self.extractor.constrained)
                self.clock.spent["generate"] -= self.clock.spent["preprocess"]  # which is part of it
        return texts

    def _through_pipe(self, image: Image.Image) -> list[str]:
        chat = prompts.conversation()
        chat[1]["content"][0]["image"] = image
        with self.clock.measure("generate"):
            written = self.pipe(text=chat, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, return_full_text=False)
        self.clock.spent["generate"] -= self.clock.spent["preprocess"]  # which the pipeline did within
        return [written[0]["generated_text"].removeprefix(" ")]


def alternately(subjects: dict[str, Subject], images: list[bytes]) -> dict[str, list[dict[str, float]]]:
    """CPU-seconds by phase, and in `total`, of every subject for every image, one subject after the other; they warm up
    on the first.
    """
    spent = defaultdict(list)
    for number, file in enumerate([images[0], *images]):
        for name, subject in subjects.items():
            [text] = subject.answer([file])
            if text != ANSWER.to_json():
                raise SystemExit(f"{name} did not write the dictated answer, so its cost says nothing: {text!r}")
            if number:
                spent[name].append({**subject.clock.phases(), "total": subject.clock.spent["total"]})
                print(f"{name:45} {spent[name][-1]['total']:8.3f} CPU-s", flush=True)
    return spent


def cost_rows(
    size: str,
    subjects: dict[str, Subject],
    spent: dict[str, list[dict[str, float]]],
    speedup: str,
    row: Callable[..., Row],
) -> list[Row]:
    """What `alternately` found; `speedup` is the name for how many times a subject's cost the first one's is."""
    totals = {name: [phases["total"] for phases in spent[name]] for name in subjects}
    first, rows = next(iter(totals.values())), []
    for name, subject in subjects.items():
        add = partial(row, f"{size}, {name}", n=len(totals[name]))
        rows.append(add("cpu_seconds_per_image", unit="s", **interval(totals[name])))
        rows.append(add(speedup, unit="x", **interval(first, ratio, totals[name])))
        rows.append(add("prompt_tokens", subject.prompt_length, unit="tokens"))
        rows += [add(f"{phase}_cpu_seconds", unit="s", **interval([p[phase] for p in spent[name]])) for phase in PHASES]
    return rows


def batch_rows(
    label: str, subject: Subject, images: list[bytes], batches: list[int], row: Callable[..., Row]
) -> list[Row]:
    """Tokens and images a CPU-second by size of the batch, measured three times, one size after the other."""
    tokens, whole = defaultdict(list), defaultdict(list)
    for batch in [*batches] * 3:
        subject.answer((images * batch)[:batch])
        tokens[batch].append(batch * len(subject.dictation.tokens) / subject.clock.phases()["tokens"])
        whole[batch].append(batch / subject.clock.spent["total"])
        print(
            f"{label}, batch {batch}: {tokens[batch][-1]:8.1f} tokens, {whole[batch][-1]:8.3f} images a CPU-second",
            flush=True,
        )
    rows = []
    for batch in batches:
        add = partial(row, f"{label}, batch {batch}", n=3)
        rows.append(add("decoded_tokens_per_cpu_second", unit="1/s", **interval(tokens[batch])))
        rows.append(add("images_per_cpu_second", unit="1/s", **interval(whole[batch])))
    add = partial(row, f"{label}, batch {batches[-1]}", unit="x", n=3)
    rows.append(add("batch_decode_speedup", **interval(tokens[batches[-1]], ratio, tokens[batches[0]])))
    return [*rows, add("batch_image_speedup", **interval(whole[batches[-1]], ratio, whole[batches[0]]))]


def title(many: str, one: str, default: tuple[str, str]) -> str:
    """The subject of our way in these formats."""
    formats = many if many == one else f"{many}, decoding {one}"
    return f"ours {formats}{DEFAULT if (many, one) == default else ''}"


def measure(size: str, images: list[bytes], batches: list[int], processor_from: Path, command: str) -> list[Row]:
    """All figures of one size."""
    bf16, processor = build(size, processor_from)
    fp32, cpu = copy.deepcopy(bf16).float(), torch.device("cpu")
    chosen = choose_precision(cpu, training=False, parameters=fp32.num_parameters(), seconds=partial(seconds_of, fp32))
    print(f"{size}: {chosen.reason}", flush=True)
    default, phased = (chosen.many, chosen.one), {}
    for formats in dict.fromkeys([("int8", "int8"), ("bf16", "int8"), default]):
        if formats != ("fp32", "fp32"):
            convert(model := copy.deepcopy(fp32), *formats)
            phased[formats] = model
    dictation = Dictation(processor.tokenizer)
    plain, name = (fp32, "fp32") if bf16_is_slow(cpu) else (bf16, "bf16")
    for model in {plain, fp32, *phased.values()}:
        dictation.to(model)
    exact = plain is fp32 and default == ("fp32", "fp32")
    ours = f"ours {name}: grammar, forced tokens{DEFAULT if exact else ''}"
    subjects = {
        f"{SEED}, {name}": Subject(plain, processor, dictation, tiles=17, constrained=False, piped=True),
        "one tile": Subject(plain, processor, dictation, constrained=False, piped=True),
        "one tile, our loop": Subject(plain, processor, dictation, constrained=False),
        ours: Subject(plain, processor, dictation),
        **({title("fp32", "fp32", default): Subject(fp32, processor, dictation)} if plain is bf16 else {}),
        **{title(*formats, default): Subject(model, processor, dictation) for formats, model in phased.items()},
    }
    row = partial(make_row, "extract_cpu", command=command)
    spent = alternately(subjects, images)
    rows = cost_rows(size, subjects, spent, "speedup_vs_seed", row)
    free, forced = ([phases["tokens"] for phases in spent[name]] for name in ("one tile, our loop", ours))
    rows.append(
        row(f"{size}, forced tokens alone", "decode_speedup", unit="x", n=len(free), **interval(free, ratio, forced))
    )
    rows.append(row(f"{size}, answer", "answer_tokens", len(dictation.tokens), unit="tokens", n=1))
    for name in dict.fromkeys([ours, *(name for name in subjects if name.endswith(DEFAULT))]):
        rows += batch_rows(f"{size}, {name.split(':')[0]}", subjects[name], images, batches, row)
    return rows


def main(
    size: Annotated[list[str] | None, typer.Option(help="500m, 256m or tiny; may be given more than once.")] = None,
    images: Annotated[int, typer.Option(min=1, help="How many images every subject answers.")] = 5,
    batch: Annotated[list[int] | None, typer.Option(help="Points of the batch curve.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads torch may use; CPU-seconds are the sum over them.")] = 1,
    processor: Annotated[
        Path, typer.Option(help="A SmolVLM's folder to take the tokenizer from.")
    ] = loading.TINY_TUNED,
    results: Annotated[Path, typer.Option(help="Where the figures go.")] = ROOT / "results" / "extract_cpu.json",
) -> None:
    """Measure, print and write down."""
    torch.set_num_threads(threads)
    files = [as_photograph(scene) for scene in draw_scenes(11, "test", images)]
    command = f"python benchmarks/extract.py --images {images} --threads {threads}"
    rows: list[Row] = []
    for one in size or ["500m", "256m"]:
        rows += measure(one, files, batch or [1, 2, 4, 8], processor, command)
        write_beside(results, rows, lambda row: row.device != device_name())
        gc.collect()
    draw(results)


if __name__ == "__main__":
    typer.run(main)
