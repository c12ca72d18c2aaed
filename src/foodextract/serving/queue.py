"""A bounded queue in front of one model thread: batches, deadlines, cancellation, draining. Independent of HTTP.

All state lives in the event loop, so there are no locks. Threads decode and resize images, one thread runs the model:

    slot → prepare (threads) → at most 1 + PREPARED batches ready → model (thread) → result

A cancelled image is dropped wherever it is: before decoding, while ready, or between two tokens of its answer.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from math import ceil, inf
from typing import Any

from PIL import Image
from pydantic import BaseModel, Field
from transformers import BatchFeature

from foodextract.images import FormatError, ImageError
from foodextract.inference.blip import Answerer
from foodextract.inference.extractor import PREPARED, Confidence
from foodextract.schema import AnswerError, FoodRecord
from foodextract.serving.errors import RequestError
from foodextract.serving.telemetry import LOG, ServerMetrics

MAX_FAILURES = 3  # consecutive failures on single images after which only a new process can help (a broken GPU, say)
HANG_DEADLINES = 4  # deadlines in one model call: the model stops once nobody waits, so by then it hangs


@dataclass(frozen=True)
class QueueLimits:
    """How many images are accepted at once, and for how long."""

    size: int = 64  # accepted images: uploading, waiting or at the model
    batch_size: int = 8  # tiles per model call, but at least one image
    max_wait: float = 0.01  # seconds that the first image of a batch waits for others
    deadline: float = 30.0  # seconds from the complete upload to the answer
    prepare_threads: int = 2  # each holds up to three copies of one image of at most `images.MAX_PIXELS`


class Prediction(BaseModel):
    """The record of one image."""

    record: FoodRecord
    confidence: Confidence | None = Field(description="Probabilities: of the chosen is_food, and of each item.")
    seconds: dict[str, float] = Field(description="Time per phase: prepare, queue, model.")


@dataclass
class _Job:
    inputs: BatchFeature
    ready: float  # loop time at which it was prepared
    started: float | None = None  # loop time at which the model got it
    result: asyncio.Future[Any] = field(default_factory=asyncio.Future)


class Queue:
    """Answers single images and batches them for the model. Use it inside `async with queue.running()`."""

    def __init__(self, load: Callable[[], Answerer], limits: QueueLimits, metrics: ServerMetrics) -> None:
        self.limits, self.metrics = limits, metrics
        self.draining = False  # set it to stop accepting images
        self.accepted = 0  # slots in use
        self.failures = 0  # consecutive failures of the model
        self.error: Exception | None = None  # why the model did not load or the queue ended
        self._load = load
        self._extractor: Answerer | None = None
        self._seconds_per_image = 0.0  # moving average
        self._ready: asyncio.Queue[_Job] = asyncio.Queue()
        self._batch_images = 1  # set once the model is loaded: an image may take several tiles
        self._prepared = asyncio.Semaphore(0)  # bounds the prepared images
        self._prepare_pool = ThreadPoolExecutor(limits.prepare_threads, "prepare")
        self._model_pool = ThreadPoolExecutor(1, "model")
        self._at_model = 0  # images in the current model call
        self._call_started = 0.0  # loop time of the last model call
        metrics.in_flight.set_function(lambda: self._at_model)
        metrics.queue_depth.set_function(lambda: max(0, self.accepted - self._at_model))

    @property
    def unavailable(self) -> str | None:
        """Why no image is accepted: "draining", "loading" or None."""
        return "draining" if self.draining else "loading" if self._extractor is None else None

    @property
    def healthy(self) -> bool:
        """False when only a new process can help."""
        elapsed = asyncio.get_running_loop().time() - self._call_started
        hangs = self._at_model and elapsed > HANG_DEADLINES * self.limits.deadline
        return self.error is None and self.failures < MAX_FAILURES and not hangs

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Load and warm up the model in the background, and answer until the block ends."""
        worker = asyncio.create_task(self._work())
        try:
            yield
        finally:
            worker.cancel()
            with suppress(asyncio.CancelledError):
                await worker
            for pool in (self._prepare_pool, self._model_pool):
                pool.shutdown(wait=False, cancel_futures=True)

    @contextmanager
    def slot(self) -> Iterator[None]:
        """Hold the slot of one image. Take it before reading the body, so that memory is bounded.

        Raises RequestError (429, 503).
        """
        if reason := self.unavailable:
            raise RequestError(503, reason, f"{reason}: try again in a moment", {"Retry-After": "5"})
        with self.extra_slots(1, max_wait=self.limits.deadline):
            yield

    @contextmanager
    def extra_slots(self, count: int, max_wait: float = inf) -> Iterator[None]:
        """Hold slots for more images of a request that has one, even while draining. Raises RequestError (429)."""
        wait = self._seconds_per_image * self.accepted
        if wait > max_wait or self.accepted + count > self.limits.size:
            seconds = str(max(1, ceil(wait)))
            message = f"the server is busy: try again in {seconds} s"
            raise RequestError(429, "queue_full", message, {"Retry-After": seconds})
        self.accepted += count
        try:
            yield
        finally:
            self.accepted -= count

    async def answer(self, image: bytes) -> Prediction | RequestError:
        """Answer one image that holds a slot, or return its error. Cancel the call to drop the image."""
        assert self._extractor is not None, "take a slot first"
        loop = asyncio.get_running_loop()
        start, prepare, job = loop.time(), 0.0, None

        def observe_phases() -> dict[str, float]:
            started = job.started if job and job.started else loop.time()
            seconds = {"prepare": prepare, "queue": started - start - prepare, "model": loop.time() - started}
            for phase, value in seconds.items():
                self.metrics.phases.labels(phase).observe(value)
            return seconds

        try:
            async with asyncio.timeout(self.limits.deadline), self._prepared:
                inputs, prepare = await self._timed(self._prepare_pool, self._extractor.prepare_image, image)
                job = _Job(inputs, loop.time())
                self._ready.put_nowait(job)
                record, confidence = await job.result  # cancelled together with this call
            return Prediction(record=record, confidence=confidence, seconds=observe_phases())
        except FormatError as error:
            return RequestError(415, "not_an_image", str(error))
        except ImageError as error:
            return RequestError(422, "bad_image", str(error))
        except AnswerError:  # its text quotes the model's answer, which describes the image
            return RequestError(500, "bad_answer", "the model's answer is not a record")
        except TimeoutError:
            observe_phases()
            return RequestError(504, "deadline", f"no answer within {self.limits.deadline:g} s")
        except RequestError as error:
            return error

    async def _work(self) -> None:
        try:
            extractor, seconds = await self._timed(self._model_pool, self._load_and_warm_up)
            self._batch_images = max(1, self.limits.batch_size // extractor.tiles)
            self._prepared = asyncio.Semaphore((1 + PREPARED) * self._batch_images)
            self._extractor = extractor
            LOG.info("ready", extra={"seconds": round(seconds, 3)})
            while True:
                if batch := await self._next_batch():
                    await self._run(extractor, batch)
        except Exception as error:  # a missing folder, no memory, a driver, a bug: the process decides
            LOG.exception("the queue has ended" if self._extractor else "model not loaded")
            self.error = error

    def _load_and_warm_up(self) -> Answerer:
        extractor = self._load()
        blank = extractor.prepare_image(Image.new("RGB", (64, 64)))
        extractor.extract_prepared([blank], lambda number: False)  # one token: compiles the grammar and kernels
        return extractor

    async def _next_batch(self) -> list[_Job]:
        batch = [await self._ready.get()]
        with suppress(TimeoutError):
            async with asyncio.timeout_at(batch[0].ready + self.limits.max_wait):
                while len(batch) < self._batch_images:
                    batch.append(await self._ready.get())
        return [job for job in batch if not job.result.done()]

    async def _run(self, extractor: Answerer, batch: list[_Job]) -> None:
        """Run the model on a batch and set the results. If it fails, run each image alone."""
        self.metrics.batch_size.observe(len(batch))
        self._at_model, self._call_started = len(batch), asyncio.get_running_loop().time()
        for job in batch:
            job.started = self._call_started
        images = [job.inputs for job in batch]

        def wanted(row: int) -> bool:
            return not batch[row].result.done()

        try:
            results, seconds = await self._timed(
                self._model_pool, extractor.extract_prepared, images, wanted, self.limits.batch_size
            )
        except Exception:  # a driver's error, say
            LOG.exception("the model failed", extra={"batch": len(batch)})
            if len(batch) > 1:
                for job in batch:
                    if not job.result.done():
                        await self._run(extractor, [job])
                return
            self.failures += 1
            results = [RequestError(500, "model_failed", "the model could not answer")]
        else:
            self.failures = 0
            average, latest = self._seconds_per_image, seconds / len(batch)
            self._seconds_per_image = 0.8 * average + 0.2 * latest if average else latest
        finally:
            self._at_model = 0
        for job, result in zip(batch, results, strict=True):
            if not job.result.done():
                settle = job.result.set_exception if isinstance(result, Exception) else job.result.set_result
                settle(result)

    @staticmethod
    async def _timed(pool: ThreadPoolExecutor, function: Callable[..., Any], *args: Any) -> tuple[Any, float]:
        """Run a function in a thread; return its result and the seconds it took there."""

        def run() -> tuple[Any, float]:
            start = time.perf_counter()
            return function(*args), time.perf_counter() - start

        return await asyncio.get_running_loop().run_in_executor(pool, run)
