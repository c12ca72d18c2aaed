"""Images → answers: the one door between a model and everybody who asks it."""

import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, islice
from math import exp
from typing import Self

import torch
from PIL import Image
from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

from foodextract import prompts
from foodextract.images import ImageError, ImageSource, find_images, open_image
from foodextract.inference.decoding import Answer, Decoder
from foodextract.inference.grammar import Dialect, recognize, undecided
from foodextract.inference.onnx import GraphModel, is_exported
from foodextract.models.loading import ModelError, choose_device, image_budget, load_model, load_processor
from foodextract.schema import FIELDS, AnswerError, FoodRecord

LOG = logging.getLogger("foodextract")
MAX_NEW_TOKENS = 256
MAX_PROBE_TOKENS = 80  # of the free answer that tells a model's dialect
PROBE = Image.new(
    "RGB", (256, 256), "white"
)  # what that answer is about: always the same, so that no batch changes another's answers
PREPARED = 2  # batches that may be ready before the model asks for them


@dataclass(frozen=True)
class Confidence:
    """How sure the model was; not calibrated.

    `is_food`: the probability of the value it chose, among 0 and 1. The lists: for each item, the mean natural logarithm of the
    probabilities of its tokens among those the grammar allowed there, up to the closing quotation mark (0 is certain).
    """

    is_food: float
    food_items: list[float]
    drink_items: list[float]


@dataclass(frozen=True)
class Extractor:
    """A model and its processor, asked with the one prompt.

    `extract` and `extract_many` keep the answer on the rails of a grammar, so that it is always a record, whatever the weights say. The
    grammar is that of the model's own dialect (see `dialects`). With `constrained=False` an answer that is not canonical JSON is an
    AnswerError, and confidence is None. `answer` is what the model writes of its own accord.
    """

    model: PreTrainedModel
    processor: ProcessorMixin
    constrained: bool = True

    @classmethod
    def from_pretrained(
        cls,
        model_id: str | os.PathLike,
        device: str | None = None,
        precision: str | None = None,
        constrained: bool = True,
        tiles: int | None = None,
    ) -> Self:
        """Load a folder or a Hub id, in one of `models.PRECISIONS` or the device's default. Raises ModelError.

        `tiles` is another image budget than the model came with: 1, 5 or 17. A budget of several tiles that nobody asked for is logged.
        A folder that `foodextract export onnx` wrote is answered by ONNX Runtime, on a CPU, with the budget of the export.
        """
        if is_exported(model_id):
            processor = load_processor(model_id)
            if tiles not in (None, budget := image_budget(processor)):
                raise ModelError(
                    f"{model_id} was exported for {budget} tiles an image, not {tiles}: leave the tiles out, or export the model again "
                    f"(`foodextract export onnx --tiles {tiles}`)"
                )
            model = GraphModel(model_id, device, precision)
        else:
            model = load_model(model_id, choose_device(device), precision=precision).requires_grad_(False)
            processor = load_processor(model_id, tiles)
        extractor = cls(model, processor, constrained)
        if tiles is None and extractor.tiles > 1:
            tokens = processor.image_seq_len
            LOG.warning(
                f"{model_id} cuts an image into up to {extractor.tiles} tiles ({extractor.tiles * tokens:,} image tokens; one tile has "
                f"{tokens}), and each counts towards the batch size: --tiles 1 (in Python tiles=1) costs far less, but may change "
                "the answers of a model that was trained on more"
            )
        return extractor

    @cached_property
    def tiles(self) -> int:
        """The most tiles that one image takes."""
        return image_budget(self.processor)

    def extract(self, image: ImageSource) -> FoodRecord:
        """The record of one image. Raises ImageError, or AnswerError when unconstrained."""
        return self.extract_with_confidence(image)[0]

    def extract_with_confidence(self, image: ImageSource) -> tuple[FoodRecord, Confidence | None]:
        """The record of one image, and how sure the model was. Raises ImageError, or AnswerError when unconstrained."""
        [result] = self.extract_many_with_confidence([image], 1)
        if isinstance(result, Exception):
            raise result
        return result

    def extract_many(
        self, images: Iterable[ImageSource] | str | os.PathLike, batch_size: int = 8
    ) -> Iterator[FoodRecord | ImageError | AnswerError]:
        """One result an image, in order: its record, or the error that this image met. Others in its batch are answered all the same.

        A batch holds at most `batch_size` tiles, but at least one image; an image counts `tiles`, whatever its shape.
        `images` may be endless, or a folder, whose images are then answered in the order of their paths. While the model is busy, a
        thread opens and resizes the next `PREPARED` batches and no more; they are asked for before the first answer comes.
        """
        for result in self.extract_many_with_confidence(images, batch_size):
            yield result if isinstance(result, Exception) else result[0]

    def extract_many_with_confidence(
        self, images: Iterable[ImageSource] | str | os.PathLike, batch_size: int = 8
    ) -> Iterator[tuple[FoodRecord, Confidence | None] | ImageError | AnswerError]:
        """As `extract_many`, each record with its confidence."""
        stream = iter(find_images([images]) if isinstance(images, str | os.PathLike) else images)
        worker = ThreadPoolExecutor(1)
        ahead: deque[Future] = deque()
        capacity = max(1, batch_size // self.tiles)
        try:
            while True:
                while len(ahead) <= PREPARED and (batch := list(islice(stream, capacity))):
                    ahead.append(worker.submit(self._open_and_prepare, batch))
                if not ahead:
                    return
                opened, inputs = ahead.popleft().result()
                answers = iter(self._generate(inputs, self.constrained) if inputs else [])
                for image in opened:
                    yield image if image else self._read(next(answers))
        finally:
            worker.shutdown(cancel_futures=True)

    def read(self, image: ImageSource) -> BatchFeature:
        """One image as the model takes it, for `answer_read`. Raises ImageError."""
        return self.prepare([open_image(image)])

    def answer_read(
        self, images: Sequence[BatchFeature], wanted: Callable[[int], bool] = lambda number: True, batch_size: int = 8
    ) -> list[tuple[FoodRecord, Confidence | None] | AnswerError]:
        """The results for images that `read` has prepared, in order: those of equal shapes (with one tile all have them) share a batch
        of at most `batch_size` tiles, but at least one image.

        `wanted` is asked between two tokens whether anybody still waits for image 0, 1, …; the answer to one that nobody waits for
        ends where it is.
        """
        alike: dict[tuple, list[int]] = {}
        for number, image in enumerate(images):
            alike.setdefault(tuple(image[name].shape for name in sorted(image)), []).append(number)
        capacity = max(1, batch_size // self.tiles)
        results = {}
        for numbers in (
            group[first : first + capacity] for group in alike.values() for first in range(0, len(group), capacity)
        ):
            together = BatchFeature(
                {name: torch.cat([images[number][name] for number in numbers]) for name in images[numbers[0]]}
            )
            answers = self._generate(together, self.constrained, lambda row, numbers=numbers: wanted(numbers[row]))
            results |= {number: self._read(answer) for number, answer in zip(numbers, answers, strict=True)}
        return [results[number] for number in range(len(images))]

    def answer(self, images: list[Image.Image], constrained: bool = False) -> list[str]:
        """What the model writes about each RGB image: greedy, exactly as written but for what the template puts before an answer.

        Unconstrained unless asked otherwise: this is what is measured. Constrained answers are canonical JSON, whatever the dialect.
        """
        return [said.text for said in self._generate(self.prepare(images), constrained)]

    def prepare(self, images: list[Image.Image]) -> BatchFeature:
        """What the model's forward takes for B RGB images: prompts of S tokens padded on the left, `input_ids` and `attention_mask`
        (B, S) int64, and `pixel_values` (B, T, 3, P, P) float32 for T tiles of P x P pixels.
        """
        return self.processor(
            text=[self._prompt] * len(images),
            images=[[image] for image in images],
            add_special_tokens=False,  # the template has written them
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )

    @cached_property
    def _prompt(self) -> str:
        return self.processor.apply_chat_template(prompts.conversation(), add_generation_prompt=True)

    @cached_property
    def _prefix(self) -> list[int]:
        """The tokens before the image, the system message above all: the same in every prompt, and most of its text."""
        image = getattr(self.processor, "image_token", None)
        text = self._prompt.partition(image)[0] if image and image in self._prompt else ""
        return self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]

    @cached_property
    def _lead(self) -> str:
        """What the chat template puts between the generation prompt and an answer: SmolVLM's a space, others' nothing."""
        nothing = FoodRecord(is_food=0, image_title="", food_items=[], drink_items=[])
        whole = self.processor.apply_chat_template(prompts.conversation() + prompts.answer(nothing))
        return (
            whole.removeprefix(self._prompt).partition(nothing.to_json())[0] if whole.startswith(self._prompt) else ""
        )

    @cached_property
    def _free(self) -> Decoder:
        return Decoder.build(self.model, self.processor.tokenizer, prefix=self._prefix)

    @property
    def dialect(self) -> Dialect:
        """How the model writes records of its own accord: what its free answer about `PROBE` shows, or canonical JSON where that is no
        record.

        A model that trains (a parameter asks for a gradient) is probed every time: its weights may be others now.
        """
        if any(parameter.requires_grad for parameter in self.model.parameters()):
            self._dialects.clear()
            return self._probe()
        if not self._dialects:
            self._dialects.append(self._probe())
        return self._dialects[0]

    @cached_property
    def _dialects(self) -> list[Dialect]:
        return []  # the dialect, once it is known

    @cached_property
    def _decoders(self) -> dict[Dialect, Decoder]:
        return {}

    def _probe(self) -> Dialect:
        texts = [""]
        listening = replace(self._free, amend=lambda text: texts.append(text) or text)
        self._run(listening, self.prepare([PROBE]), MAX_PROBE_TOKENS, lambda number: undecided(texts[-1]))
        dialect = recognize(texts[-1])
        if dialect is None and "{" in texts[-1]:
            self._warn(
                f"the model writes a form that is not recognized ({texts[-1][:60].strip()!r} …): it is constrained to canonical JSON, "
                "and may lose items; compare with --free"
            )
        return Dialect(self._lead) if dialect is None or dialect.canonical else dialect

    def _warn(self, message: str) -> None:
        """Log a warning, once."""
        if message not in self._warned:
            self._warned.add(message)
            LOG.warning(message)

    @cached_property
    def _warned(self) -> set[str]:
        return set()

    def _guided(self, dialect: Dialect) -> Decoder:
        """The model under the grammar of a dialect. The first use of one that is not canonical is logged."""
        if dialect not in self._decoders:
            if not dialect.canonical:
                self._warn(
                    f"the model writes {dialect}: it is constrained to that form, and its answers are converted to canonical JSON"
                )
            self._decoders[dialect] = self._free.under(dialect.grammar(), dialect.without_repeats)
        return self._decoders[dialect]

    def _open_and_prepare(self, images: list[ImageSource]) -> tuple[list[ImageError | None], BatchFeature | None]:
        """The error of each image that cannot be read, and what the model takes for the others."""
        readable, errors = [], []
        for image in images:
            try:
                readable.append(open_image(image))
                errors.append(None)
            except ImageError as error:
                errors.append(error)
        return errors, self.prepare(readable) if readable else None

    def _generate(
        self, inputs: BatchFeature, constrained: bool, wanted: Callable[[int], bool] = lambda number: True
    ) -> list["_Said"]:
        dialect = self.dialect if constrained else None
        decoder = self._guided(dialect) if dialect else self._free
        answers = self._run(decoder, inputs, MAX_NEW_TOKENS, wanted)
        return [_Said(self._text(answer, dialect), answer, dialect) for answer in answers]

    def _run(
        self, decoder: Decoder, inputs: BatchFeature, max_new_tokens: int, wanted: Callable[[int], bool]
    ) -> list[Answer]:
        training = self.model.training
        self.model.eval()
        answers = decoder.generate(inputs.to(self.model.device, self.model.dtype), max_new_tokens, wanted)
        self.model.train(training)
        return answers

    def _text(self, answer: Answer, dialect: Dialect | None) -> str:
        """An answer as it is written, or in a dialect the canonical JSON of it."""
        if dialect:
            return dialect.read(self._free.written(answer.tokens)).to_json()
        return self._free.text(answer).removeprefix(self._lead)

    def _read(self, said: "_Said") -> tuple[FoodRecord, Confidence | None] | AnswerError:
        try:
            return FoodRecord.parse(said.text), self._confidence(said.answer, said.dialect) if said.dialect else None
        except AnswerError as error:
            return AnswerError(f"the model's answer is {error}; it wrote {said.text!r}")

    def _confidence(self, answer: Answer, dialect: Dialect) -> Confidence:
        pieces = self._free.pieces(answer)
        written = b"".join(piece for piece, _ in pieces)
        text = written.decode(errors="replace")  # the last character may be unfinished
        places = list(accumulate((len(character.encode()) for character in text), initial=0))  # character → byte
        owner = [number for number, (piece, _) in enumerate(pieces) for _ in piece]  # byte → token

        def mean(start: int, end: int) -> float:
            chosen = [pieces[number][1] for number in sorted(set(owner[places[start] : places[end]]))]
            chosen = [logprob for logprob in chosen if logprob is not None]
            return sum(chosen) / len(chosen) if chosen else 0.0

        spans = dialect.spans(text)
        [is_food] = spans["is_food"] or [(0, 0)]  # nobody waits for an answer that ends before it
        return Confidence(
            exp(mean(*is_food)), **{field: [mean(start + 1, end) for start, end in spans[field]] for field in FIELDS}
        )


@dataclass(frozen=True)
class _Said:
    """One answer: its text, canonical where it was written in a dialect; its tokens; and the dialect that guided it, if any."""

    text: str
    answer: Answer
    dialect: Dialect | None
