"""A bounded queue before one model thread: batches, deadlines, cancellation, draining. Knows the extractor, and nothing of HTTP.

All state lives in the event loop, so there are no locks. Two threads open and resize images, one asks the model:

    place → prepare (threads) → shelf, at most PREPARED batches beside the one before the model → model (thread) → result

An image that nobody waits for any more is dropped wherever it is: before it is opened, on the shelf, or between two tokens of its answer.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from math import ceil

from PIL import Image
from transformers import BatchFeature

from foodextract.inference.blip import Answerer
from foodextract.inference.extractor import PREPARED, Confidence
from foodextract.schema import FoodRecord
from foodextract.serving.telemetry import LOG, Meters

FATAL_FAILURES = (
    3  # images in a row that the model could not answer alone: a broken GPU, say, which only a new process can mend
)
STUCK = 4  # deadlines before the model: it ends where nobody waits any more, so it hangs


@dataclass(frozen=True)
class Limits:
    """How much is taken on at once, and for how long."""

    places: int = 64  # images in the house: being uploaded, waiting, before the model
    batch: int = 8  # tiles the model sees at once: images, where one takes one tile; at least one image
    wait: float = 0.01  # seconds that the first image of a batch waits for others
    deadline: float = 30.0  # seconds from the whole upload to the answer
    preparers: int = (
        2  # threads; each holds one image of up to `images.MAX_PIXELS`, held up to three times until it is resized
    )


class FullError(Exception):
    """There is no place, or the wait for an answer is longer than the deadline; in `retry_after` whole seconds it should be better."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"more is asked than can be answered: try again in {retry_after} s")
        self.retry_after = retry_after


class UnavailableError(Exception):
    """Nothing is accepted: the model is still loading, or the server is on its way out."""


class ModelFailure(RuntimeError):
    """The model could not answer an image, even alone; its log line says why."""


@dataclass(frozen=True)
class Answered:
    """A record, how sure the model was of it, and the seconds spent by phase: prepare, queue, model."""

    record: FoodRecord
    confidence: Confidence | None
    seconds: dict[str, float]


@dataclass
class _Job:
    inputs: BatchFeature
    ready: float  # when it was prepared, by the loop's clock
    begun: float | None = None  # when the model was last asked
    result: asyncio.Future = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Batcher:
    """Answers images one by one, asking the model about several at once. Use it within `running()`."""

    def __init__(self, load: Callable[[], Answerer], limits: Limits, meters: Meters) -> None:
        self.limits, self.meters = limits, meters
        self.draining = False  # set it, and nothing more is accepted
        self.guests = 0  # places taken
        self.failures = 0  # of the model, since its last answer
        self.error: Exception | None = None  # why there is no model, or no queue any more
        self._load = load
        self._extractor: Answerer | None = None
        self._pace = 0.0  # seconds an image, lately
        self._ready: asyncio.Queue[_Job] = asyncio.Queue()
        self._images = 0  # a batch, once the model is loaded: its images may take several tiles each
        self._shelf = asyncio.Semaphore(0)  # at most so many images are prepared
        self._preparers = ThreadPoolExecutor(limits.preparers, "prepare")
        self._model = ThreadPoolExecutor(1, "model")
        self._answering = 0  # images before the model
        self._asked = 0.0  # when the model was last asked, by the loop's clock
        meters.in_flight.set_function(lambda: self._answering)
        meters.queue_depth.set_function(lambda: max(0, self.guests - self._answering))

    @property
    def unavailable(self) -> str | None:
        """Why nothing is accepted, or None."""
        return "draining" if self.draining else "loading" if self._extractor is None else None

    @property
    def healthy(self) -> bool:
        """Is there hope without a new process?"""
        stuck = self._answering and asyncio.get_running_loop().time() - self._asked > STUCK * self.limits.deadline
        return self.error is None and self.failures < FATAL_FAILURES and not stuck

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Load the model in the background, warm it up, and answer until the end of the block."""
        work = asyncio.create_task(self._work())
        try:
            yield
        finally:
            work.cancel()
            with suppress(asyncio.CancelledError):
                await work
            self._preparers.shutdown(wait=False, cancel_futures=True)
            self._model.shutdown(wait=False, cancel_futures=True)

    @contextmanager
    def place(self) -> Iterator[None]:
        """Hold a place for one image. Take it before its bytes come in, and memory is bounded. Raises UnavailableError or FullError."""
        if reason := self.unavailable:
            raise UnavailableError(reason)
        if self._pace * self.guests > self.limits.deadline:
            raise self._full()
        with self.further(1):
            yield

    @contextmanager
    def further(self, count: int) -> Iterator[None]:
        """Hold places for more images of somebody who has one, and so is let in even if the server is about to stop. Raises FullError."""
        if self.guests + count > self.limits.places:
            raise self._full()
        self.guests += count
        try:
            yield
        finally:
            self.guests -= count

    def _full(self) -> FullError:
        return FullError(max(1, ceil(self._pace * self.guests)))

    async def answer(self, image: bytes) -> Answered:
        """The record of one image that has a place. Cancel it when nobody waits any more.

        Raises ImageError, AnswerError, ModelFailure, or TimeoutError at the deadline.
        """
        loop = asyncio.get_running_loop()
        start, preparing, job = loop.time(), 0.0, None

        def spent() -> dict[str, float]:
            begun = job.begun if job and job.begun else loop.time()
            seconds = {"prepare": preparing, "queue": begun - start - preparing, "model": loop.time() - begun}
            for phase, value in seconds.items():
                self.meters.phases.labels(phase).observe(value)
            return seconds

        try:
            async with asyncio.timeout(self.limits.deadline), self._shelf:
                inputs, preparing = await loop.run_in_executor(
                    self._preparers, self._timed, self._extractor.prepare_image, image
                )
                job = _Job(inputs, loop.time())
                self._ready.put_nowait(job)
                record, confidence = await job.result  # cancelled with us
        except TimeoutError:  # the longest waits are to be seen, too
            spent()
            raise
        return Answered(record, confidence, spent())

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            self._extractor, seconds = await loop.run_in_executor(self._model, self._timed, self._load_and_warm_up)
            self._images = max(1, self.limits.batch // self._extractor.tiles)
            self._shelf = asyncio.Semaphore((1 + PREPARED) * self._images)
            LOG.info("ready", extra={"facts": {"seconds": round(seconds, 3)}})
            while True:
                if batch := await self._next_batch():
                    await self._answer(batch)
        except Exception as error:  # a missing folder, no memory, a driver, a bug: the owner of the process decides
            LOG.exception("the queue has ended" if self._extractor else "model not loaded")
            self.error = error

    def _load_and_warm_up(self) -> Answerer:
        extractor = self._load()
        blank = extractor.prepare_image(Image.new("RGB", (64, 64)))
        extractor.extract_prepared(
            [blank], lambda number: False
        )  # one token: compiles the grammar, and kernels where there are any
        return extractor

    async def _next_batch(self) -> list[_Job]:
        batch = [await self._ready.get()]
        with suppress(TimeoutError):
            async with asyncio.timeout_at(batch[0].ready + self.limits.wait):
                while len(batch) < self._images:
                    batch.append(await self._ready.get())
        return [job for job in batch if not job.result.done()]

    async def _answer(self, batch: list[_Job]) -> None:
        loop = asyncio.get_running_loop()
        images = [job.inputs for job in batch]
        ask = (
            self._extractor.extract_prepared,
            images,
            lambda number: not batch[number].result.done(),
            self.limits.batch,
        )
        self.meters.batch_size.observe(len(batch))
        self._answering, self._asked = len(batch), loop.time()
        for job in batch:
            job.begun = self._asked
        try:
            results, seconds = await loop.run_in_executor(self._model, self._timed, *ask)
        except Exception:  # a driver's, say; the queue goes on
            LOG.exception("the model failed", extra={"facts": {"batch": len(batch)}})
            if len(batch) > 1:  # one of them may be to blame: the others are answered all the same
                for job in batch:
                    if not job.result.done():
                        await self._answer([job])
                return
            self.failures += 1
            results = [ModelFailure("the model failed on this image")]
        else:
            self.failures = 0
            pace = seconds / len(batch)
            self._pace = 0.8 * self._pace + 0.2 * pace if self._pace else pace
        finally:
            self._answering = 0
        for job, result in zip(batch, results, strict=True):
            if not job.result.done():
                job.result.set_exception(result) if isinstance(result, Exception) else job.result.set_result(result)

    @staticmethod
    def _timed(function: Callable, *args: object) -> tuple:
        start = time.perf_counter()
        return function(*args), time.perf_counter() - start
