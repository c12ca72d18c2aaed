"""Images to records: the extractor that command line, Space, server and evaluation share."""

import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import Any, Self

import torch
from PIL import Image
from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

from foodextract import prompts
from foodextract.images import ImageError, ImageSource, find_images, open_image
from foodextract.inference.confidence import Calibration, Confidence, confidence_of, with_fitting_title, with_sure_items
from foodextract.inference.decoding import ALWAYS, Answer, Decoder, Guide, Wanted
from foodextract.inference.grammar import Dialect, recognize, undecided
from foodextract.inference.onnx import GraphModel, is_exported
from foodextract.models.loading import (
    ModelError,
    check_image_tokens,
    choose_device,
    find_model,
    image_budget,
    load_model,
    load_processor,
)
from foodextract.models.training_data import TrainingData
from foodextract.schema import AnswerError, FoodRecord

LOG = logging.getLogger("foodextract")
MAX_NEW_TOKENS = 256
MAX_PROBE_TOKENS = 80  # of the free answer that shows a model's dialect
PROBE = Image.new("RGB", (256, 256), "white")  # a constant image, so that no batch changes the answers of another
PREPARED = 2  # batches that may be ready ahead of the model

Result = tuple[FoodRecord, Confidence | None] | AnswerError


class Extractor:
    """A model and its processor, asked with the one prompt.

    `extract` and `extract_many` decode under a grammar, so their answers are always records, whatever the weights. The
    grammar follows the model's own `dialect`. With `constrained=False`, an answer that is not canonical JSON is an
    AnswerError, and confidence is None.

    `calibration` turns raw probabilities into confidence. Items below `min_confidence` are left out. `training_data`
    says what the model knows, and no title names another of those foods and drinks than the items do. `from_pretrained`
    finds both beside the weights. `Extractor()` takes the default of `loading.find_model`.
    """

    calibration: Calibration | None = None
    training_data: TrainingData | None = None
    min_confidence: float = 0.0

    def __init__(
        self,
        model: PreTrainedModel | GraphModel | None = None,
        processor: ProcessorMixin | None = None,
        constrained: bool = True,
    ) -> None:
        if processor is None:
            if model is not None:
                raise TypeError("a model needs its processor: Extractor(model, processor)")
            source = find_model()
            model, processor = load_model(source).requires_grad_(False), load_processor(source)
            self.calibration, self.training_data = Calibration.find(source), TrainingData.find(source)
        self.model: Any = model
        self.processor, self.constrained = processor, constrained
        self.tiles = image_budget(processor)  # the most that one image takes
        self._prompt: str = processor.apply_chat_template(prompts.conversation(), add_generation_prompt=True)
        with_answer = processor.apply_chat_template(prompts.conversation() + prompts.answer(prompts.NOTHING))
        lead, answer, _ = with_answer.removeprefix(self._prompt).partition(prompts.NOTHING.to_json())
        # What the chat template puts before an answer: a space in SmolVLM's, nothing in others.
        self._lead = lead if answer and with_answer.startswith(self._prompt) else ""
        image = getattr(processor, "image_token", None)
        constant = self._prompt.partition(image)[0] if image and image in self._prompt else ""
        prefix = processor.tokenizer(constant, add_special_tokens=False)["input_ids"]
        self._decoder = Decoder(model, processor.tokenizer, prefix)
        self._detected: Dialect | None = None
        self._guides: dict[Dialect, Guide] = {}
        self._warned = False

    @classmethod
    def from_pretrained(
        cls,
        model_id: str | os.PathLike[str],
        device: str | None = None,
        precision: str | None = None,
        constrained: bool = True,
        tiles: int | None = None,
        min_confidence: float = 0.0,
    ) -> Self:
        """Load a folder, a Hub id or a bundled model by its name. Raises ModelError.

        `precision` is one of `loading.PRECISIONS`, or the device's default.

        `tiles` sets another image budget: 1, 5 or 17. Without it, a budget of several tiles is logged as a warning.
        ONNX Runtime runs a folder that `foodextract export onnx` wrote, on a CPU and with the budget of the export.
        """
        model: PreTrainedModel | GraphModel
        model_id = find_model(model_id)
        if is_exported(model_id):
            processor = load_processor(model_id)
            if tiles not in (None, budget := image_budget(processor)):
                raise ModelError(
                    f"{model_id} was exported for {budget} tiles an image, not {tiles}: leave the tiles out, or export "
                    f"the model again (`foodextract export onnx --tiles {tiles}`)"
                )
            model = GraphModel(model_id, device, precision)
        else:
            model = load_model(model_id, choose_device(device), precision=precision).requires_grad_(False)
            processor = load_processor(model_id, tiles)
            check_image_tokens(model, processor)
        extractor = cls(model, processor, constrained)
        extractor.calibration, extractor.training_data = Calibration.find(model_id), TrainingData.find(model_id)
        extractor.min_confidence = min_confidence
        if tiles is None and extractor.tiles > 1:
            most, one = extractor.tiles, processor.image_seq_len  # type: ignore[attr-defined]
            LOG.warning(
                f"{model_id} cuts an image into up to {most} tiles ({most * one:,} image tokens; one tile has {one}), "
                "and each counts towards the batch size: --tiles 1 (in Python tiles=1) costs far less, but may change "
                "the answers of a model that was trained on more"
            )
        return extractor

    def extract(self, image: ImageSource) -> FoodRecord:
        """Return the record of one image. Raises ImageError, or AnswerError when unconstrained."""
        return self.extract_with_confidence(image)[0]

    def extract_with_confidence(self, image: ImageSource) -> tuple[FoodRecord, Confidence | None]:
        """Return the record of one image and its confidence. Raises ImageError, or AnswerError when unconstrained."""
        [result] = self.extract_many_with_confidence([image], 1)
        if isinstance(result, Exception):
            raise result
        return result

    def extract_many(
        self, images: Iterable[ImageSource] | str | os.PathLike[str], batch_size: int = 8
    ) -> Iterator[FoodRecord | ImageError | AnswerError]:
        """Yield one result per image, in order: its record or its error. An error does not affect other images.

        `images` may be endless, or a folder, whose images are read in path order. A batch holds at most `batch_size`
        tiles, but at least one image; every image counts as `tiles`. A thread prepares up to `PREPARED` batches
        ahead.
        """
        for result in self.extract_many_with_confidence(images, batch_size):
            yield result if isinstance(result, Exception) else result[0]

    def extract_many_with_confidence(
        self, images: Iterable[ImageSource] | str | os.PathLike[str], batch_size: int = 8
    ) -> Iterator[Result | ImageError]:
        """Like `extract_many`, but each record comes with its confidence."""
        stream = iter(find_images([images]) if isinstance(images, str | os.PathLike) else images)
        worker = ThreadPoolExecutor(1)
        ahead: deque[Future[tuple[list[ImageError | None], BatchFeature | None]]] = deque()
        capacity = max(1, batch_size // self.tiles)
        try:
            while True:
                while len(ahead) <= PREPARED and (batch := list(islice(stream, capacity))):
                    ahead.append(worker.submit(self._open_and_prepare, batch))
                if not ahead:
                    return
                errors, inputs = ahead.popleft().result()
                results = iter(self._results(inputs) if inputs else [])
                for error in errors:
                    yield error or next(results)
        finally:
            worker.shutdown(cancel_futures=True)

    def prepare_image(self, image: ImageSource) -> BatchFeature:
        """Open and preprocess one image for `extract_prepared`. Raises ImageError."""
        return self.prepare([open_image(image)])

    def extract_prepared(
        self, images: Sequence[BatchFeature], wanted: Callable[[int], bool] = lambda number: True, batch_size: int = 8
    ) -> list[Result]:
        """Return the results for images from `prepare_image`, in order.

        Images of equal shapes share batches of at most `batch_size` tiles, but at least one image. `wanted` is called
        between two tokens with the number of an image; the answer ends there if it returns False.
        """
        alike: dict[tuple[torch.Size, ...], list[int]] = {}
        for number, image in enumerate(images):
            alike.setdefault(tuple(image[name].shape for name in sorted(image)), []).append(number)
        capacity = max(1, batch_size // self.tiles)
        batches = [group[i : i + capacity] for group in alike.values() for i in range(0, len(group), capacity)]
        results: dict[int, Result] = {}
        for batch in batches:
            inputs = BatchFeature({name: torch.cat([images[number][name] for number in batch]) for name in images[0]})
            found = self._results(inputs, partial(_wanted_row, wanted, batch))
            results |= zip(batch, found, strict=True)
        return [results[number] for number in range(len(images))]

    def generate_texts(self, images: list[Image.Image], constrained: bool = False) -> list[str]:
        """Generate greedily and return what the model writes about RGB images, without the template's lead.

        With `constrained=True`, each text is the canonical JSON of a record.
        """
        inputs = self.prepare(images)
        return [record.to_json() for record, _ in self._constrained(inputs)] if constrained else self._free(inputs)

    def prepare(self, images: list[Image.Image]) -> BatchFeature:
        """Return the model's inputs for B RGB images.

        `input_ids` and `attention_mask` (B, S) int64 are padded on the left; `pixel_values` is (B, T, 3, P, P)
        float32 for T tiles of P x P pixels.
        """
        return self.processor(
            text=[self._prompt] * len(images),
            images=[[image] for image in images],
            add_special_tokens=False,  # the template has written them
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )

    @property
    def dialect(self) -> Dialect:
        """How the model writes a record, as its free answer about `PROBE` shows; canonical JSON if that is no record.

        Detected once, or every time while the model trains (a parameter requires a gradient).
        """
        if any(parameter.requires_grad for parameter in self.model.parameters()):
            self._detected = None
            return self._probe()
        if self._detected is None:
            self._detected = self._probe()
        return self._detected

    def _probe(self) -> Dialect:
        text_of = self._decoder.raw_text
        inputs = self.prepare([PROBE])
        [answer] = self._generate(inputs, MAX_PROBE_TOKENS, None, lambda _, answer: undecided(text_of(answer)))
        text = text_of(answer)
        dialect = recognize(text)
        if dialect is None and "{" in text and not self._warned:
            self._warned = True
            LOG.warning(
                f"the model writes a form that is not recognized ({text[:60].strip()!r} …): it is constrained to "
                "canonical JSON, and may lose items; compare with --free"
            )
        return Dialect(self._lead) if dialect is None or dialect.canonical else dialect

    def _guide(self, dialect: Dialect) -> Guide:
        if dialect not in self._guides:
            if not dialect.canonical:
                LOG.warning(
                    f"the model writes {dialect}: it is constrained to that form, and its answers are converted to "
                    "canonical JSON"
                )
            self._guides[dialect] = self._decoder.guide(dialect.grammar(), dialect.without_repeats)
        return self._guides[dialect]

    def _open_and_prepare(self, images: list[ImageSource]) -> tuple[list[ImageError | None], BatchFeature | None]:
        """The error of each image, if any, and the model's inputs for the others."""
        readable: list[Image.Image] = []
        errors: list[ImageError | None] = []
        for image in images:
            try:
                readable.append(open_image(image))
                errors.append(None)
            except ImageError as error:
                errors.append(error)
        return errors, self.prepare(readable) if readable else None

    def _results(self, inputs: BatchFeature, wanted: Wanted = ALWAYS) -> Sequence[Result]:
        if self.constrained:
            return self._constrained(inputs, wanted)
        return [_parsed(text) for text in self._free(inputs, wanted)]

    def _constrained(self, inputs: BatchFeature, wanted: Wanted = ALWAYS) -> list[tuple[FoodRecord, Confidence]]:
        dialect, decoder = self.dialect, self._decoder
        answers = self._generate(inputs, MAX_NEW_TOKENS, self._guide(dialect), wanted)
        pairs = ((dialect.read(decoder.raw_text(a)), confidence_of(decoder.pieces(a), dialect)) for a in answers)
        return [self._finished(*pair) for pair in pairs]

    def _finished(self, record: FoodRecord, confidence: Confidence) -> tuple[FoodRecord, Confidence]:
        """Calibrate, leave unsure items out, and let the title fit the items."""
        if self.calibration:
            record, confidence = self.calibration.apply(record, confidence)
        record, confidence = with_sure_items(record, confidence, self.min_confidence)
        names = self.training_data.all_names if self.training_data else set()
        return with_fitting_title(record, names), confidence

    def _free(self, inputs: BatchFeature, wanted: Wanted = ALWAYS) -> list[str]:
        answers = self._generate(inputs, MAX_NEW_TOKENS, None, wanted)
        return [self._decoder.text(answer).removeprefix(self._lead) for answer in answers]

    def _generate(self, inputs: BatchFeature, limit: int, guide: Guide | None, wanted: Wanted) -> list[Answer]:
        training = self.model.training
        self.model.eval()
        answers = self._decoder.generate(inputs.to(self.model.device, self.model.dtype), limit, guide, wanted)
        self.model.train(training)
        return answers


def _wanted_row(wanted: Callable[[int], bool], batch: list[int], row: int, answer: Answer) -> bool:
    return wanted(batch[row])


def _parsed(text: str) -> Result:
    try:
        return FoodRecord.parse(text), None
    except AnswerError as error:
        return AnswerError(f"the model's answer is {error}; it wrote {text!r}")
