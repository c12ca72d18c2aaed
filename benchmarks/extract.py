"""What one answer costs on this machine's CPU: ours beside `transformers.pipeline` as the seed projects use it, lever by lever.

    python benchmarks/extract.py                # 500M and 256M at true size; writes results/extract_cpu.json
    python benchmarks/extract.py --size tiny --pictures 2 --results /tmp/extract.json    # does it run?

Weights are random (`true_size.py`) and would never end an answer: every subject is therefore made to write the same one (a large number
is added to the next token's logit, which costs nothing), the seed's pipeline under its 256 new tokens too. All subjects see the same drawn
pictures, one after the other, alternately, in one process; times are CPU-seconds of the whole process, which other programs on the machine
do not count towards. Without `--processor` the prompt differs by some tokens from the real one's (their number is written down), and a
grammar mask is cheaper by some 20 microseconds a token.
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

import numpy as np
import torch
import typer
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin, pipeline

from foodextract import models, prompts
from foodextract.extractor import MAX_NEW_TOKENS, Extractor
from foodextract.pictures import open_picture
from foodextract.results import Row, make_row, write_results
from foodextract.scenes import draw_scenes
from foodextract.schema import FoodRecord
from true_size import as_photograph, build, interval, ratio

ROOT = Path(__file__).resolve().parents[1]
ANSWER = FoodRecord(is_food=1, image_title="beer and pretzel", food_items=["pretzel"], drink_items=["beer"])
SEED = "seed: pipeline, 17 tiles, bf16"
PHASES = ("open", "preprocess", "vision", "prefill", "tokens")


def dictate(model: PreTrainedModel, answer: list[int], prompt_length: Callable[[], int]) -> None:
    """Make the model write `answer` behind a prompt of so many tokens."""

    def add(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        for row, place in enumerate(kwargs["position_ids"][:, -1].tolist()):
            output.logits[row, -1, answer[min(place + 1 - prompt_length(), len(answer) - 1)]] += 10_000

    model.register_forward_hook(add, with_kwargs=True)


class Clock:
    """CPU-seconds by phase of what runs within `measure`."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)

    def watch(self, model: PreTrainedModel) -> None:
        """Time the vision tower, the first forward of an answer without it, and the later ones."""
        started = {}

        def start(name: str, *_: Any) -> None:
            started[name] = time.process_time()

        def end_vision(*_: Any) -> None:
            self.spent["vision"] += time.process_time() - started["vision"]

        def end(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            if kwargs.get("pixel_values") is not None:
                self.spent["prefill"] += time.process_time() - started["all"]

        model.model.vision_model.register_forward_pre_hook(partial(start, "vision"))
        model.model.vision_model.register_forward_hook(end_vision)
        model.register_forward_pre_hook(lambda *_: start("all"))
        model.register_forward_hook(end, with_kwargs=True)

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        begin = time.process_time()
        yield
        self.spent[name] += time.process_time() - begin

    def phases(self) -> dict[str, float]:
        """Seconds by phase; what generation does between two forwards counts to the tokens."""
        spent = self.spent
        return {
            "open": spent["open"],
            "preprocess": spent["preprocess"],
            "vision": spent["vision"],
            "prefill": spent["prefill"] - spent["vision"],
            "tokens": spent["generate"] - spent["prefill"],
        }


class Subject:
    """One way to answer encoded pictures, and what it cost."""

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin, tiles: int, constrained: bool = False, piped: bool = False):
        self.processor = copy.deepcopy(processor)
        models.set_image_budget(self.processor, tiles)
        self.extractor = Extractor(model, self.processor, constrained)
        self.clock, self.seconds = Clock(), []
        self.clock.watch(model)
        self.pipe = pipeline("image-text-to-text", model=model, processor=self.processor) if piped else None
        self.prompt_length = self.extractor.prepare([Image.new("RGB", (256, 256))])["input_ids"].shape[1]

    def answer(self, files: list[bytes]) -> list[str]:
        """The texts for one batch; the pipeline takes one picture at a time, as the seeds do."""
        self.clock.spent.clear()
        with self.clock.measure("total"):
            with self.clock.measure("open"):
                pictures = [open_picture(file) for file in files]
            if self.pipe:
                texts = [text for picture in pictures for text in self._through_pipe(picture)]
            else:
                with self.clock.measure("preprocess"):
                    inputs = self.extractor.prepare(pictures)
                with self.clock.measure("generate"):
                    answers = self.extractor._generate(inputs, self.extractor.constrained)
                texts = [self.extractor._text(answer, self.extractor.constrained) for answer in answers]
        return texts

    def _through_pipe(self, picture: Image.Image) -> list[str]:
        chat = prompts.conversation()
        chat[1]["content"][0]["image"] = picture
        with self.clock.measure("generate"):  # with preprocessing, which is taken off again
            written = self.pipe(text=chat, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, return_full_text=False)
        before = self.clock.spent["preprocess"]
        with self.clock.measure("preprocess"):
            self.extractor.prepare([picture])
        again = self.clock.spent["preprocess"] - before
        self.clock.spent["generate"] -= again
        self.clock.spent["total"] -= again  # measured twice, spent once
        return [written[0]["generated_text"].removeprefix(" ")]


def measure(size: str, pictures: list[bytes], batches: list[int], processor_from: Path, command: str) -> list[Row]:
    """All figures of one size."""
    bf16, processor = build(size, processor_from)
    fp32 = copy.deepcopy(bf16).float()
    int8 = copy.deepcopy(fp32)
    models.quantise(int8)
    current: list[Subject] = []
    answer = processor.tokenizer(" " + ANSWER.to_json() + processor.tokenizer.eos_token, add_special_tokens=False).input_ids
    for model in (bf16, fp32, int8):
        dictate(model, answer, lambda: current[-1].prompt_length)
    subjects = {
        SEED: Subject(bf16, processor, 17, piped=True),
        "one tile": Subject(bf16, processor, 1, piped=True),
        "one tile, our loop": Subject(bf16, processor, 1),
        "ours bf16: grammar, forced tokens": Subject(bf16, processor, 1, constrained=True),
        "ours fp32": Subject(fp32, processor, 1, constrained=True),
        "ours int8": Subject(int8, processor, 1, constrained=True),
    }
    costs, split = defaultdict(list), defaultdict(list)
    for number, file in enumerate([pictures[0], *pictures]):  # the first is for warming up
        for name, subject in subjects.items():
            current.append(subject)
            [text] = subject.answer([file])
            if text != ANSWER.to_json():
                raise SystemExit(f"{size} {name} did not write the dictated answer, so its cost says nothing: {text!r}")
            if number:
                costs[name].append(subject.clock.spent["total"])
                split[name].append(subject.clock.phases())
    row = partial(make_row, "extract_cpu", command=command)
    rows = []
    for name, subject in subjects.items():
        label, n = f"{size}, {name}", len(costs[name])
        rows.append(row(label, "cpu_seconds_per_image", unit="s", n=n, **interval(costs[name])))
        rows.append(row(label, "speedup_vs_seed", unit="x", n=n, **interval(costs[SEED], ratio, costs[name])))
        rows.append(row(label, "prompt_tokens", subject.prompt_length, unit="tokens", n=n))
        rows += [row(label, f"{phase}_cpu_seconds", unit="s", n=n, **interval([s[phase] for s in split[name]])) for phase in PHASES]
        print(f"{label:45} {np.mean(costs[name]):8.3f} CPU-s  {ratio(costs[SEED], costs[name]):6.1f} x", flush=True)
    free, forced = ([s["tokens"] for s in split[name]] for name in ("one tile, our loop", "ours bf16: grammar, forced tokens"))
    rows.append(row(f"{size}, forced tokens alone", "decode_speedup", unit="x", n=len(free), **interval(free, ratio, forced)))
    rows.append(row(f"{size}, answer", "answer_tokens", len(answer), unit="tokens", n=1))
    for name in ("ours bf16: grammar, forced tokens", "ours int8"):
        current.append(subjects[name])
        for batch in batches:
            files = (pictures * batch)[:batch]
            subjects[name].answer(files)
            repeats = [(subjects[name].answer(files), subjects[name].clock.spent["total"], subjects[name].clock.phases()) for _ in range(3)]
            label = f"{size}, {name}, batch {batch}"
            tokens = batch * len(answer) / np.array([phases["tokens"] for _, _, phases in repeats])
            whole = batch / np.array([total for _, total, _ in repeats])
            rows.append(row(label, "decoded_tokens_per_cpu_second", unit="1/s", n=3, **interval(list(tokens))))
            rows.append(row(label, "images_per_cpu_second", unit="1/s", n=3, **interval(list(whole))))
            print(f"{label:55} {tokens.mean():8.1f} tokens/CPU-s {whole.mean():8.3f} pictures/CPU-s", flush=True)
    return rows


def main(
    size: Annotated[list[str] | None, typer.Option(help="500m, 256m or tiny; may be given more than once.")] = None,
    pictures: Annotated[int, typer.Option(min=1, help="How many pictures every subject answers.")] = 5,
    batch: Annotated[list[int] | None, typer.Option(help="Points of the batch curve.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads torch may use; CPU-seconds are the sum over them.")] = 1,
    processor: Annotated[Path, typer.Option(help="A SmolVLM's folder to take the tokenizer from.")] = models.TINY_TUNED,
    results: Annotated[Path, typer.Option(help="Where the figures go.")] = ROOT / "results" / "extract_cpu.json",
) -> None:
    """Measure, print and write down."""
    torch.set_num_threads(threads)
    files = [as_photograph(scene) for scene in draw_scenes(11, "test", pictures)]
    command = f"python benchmarks/extract.py --threads {threads}"
    rows = []
    for one in size or ["500m", "256m"]:
        rows += measure(one, files, batch or [1, 2, 4, 8], processor, command)
        gc.collect()
    write_results(results, rows)


if __name__ == "__main__":
    typer.run(main)
