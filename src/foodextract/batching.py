"""A bounded queue before one model thread: batches, deadlines, cancellation, draining. Knows the extractor, and nothing of HTTP.

All state lives in the event loop, so there are no locks. Two threads open and resize pictures, one asks the model:

    place → prepare (threads) → shelf, at most PREPARED batches beside the one before the model → model (thread) → result

A picture that nobody waits for any more is dropped wherever it is: before it is opened, on the shelf, or between two tokens of its answer.
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

from foodextract.captioner import Answerer
from foodextract.extractor import PREPARED, Confidence
from foodextract.schema import FoodRecord
from foodextract.telemetry import LOG, Meters

FATAL_FAILURES = 3  # batches in a row that the model could not answer: a broken GPU, say, which only a new process can mend


@dataclass(frozen=True)
class Limits:
    """How much is taken on at once, and for how long."""

    places: int = 64  # pictures in the house: being uploaded, waiting, before the model
    batch: int = 8  # pictures the model sees at once
    wait: float = 0.01  # seconds that the first picture of a batch waits for others
    deadline: float = 30.0  # seconds from the whole upload to the answer
    preparers: int = 2  # threads; each holds one picture of up to `pictures.MAX_PIXELS`, which takes 0.9 GB until it is resized


class FullError(Exception):
    """Every place is taken; `retry_after` is when one should be free, in whole seconds."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"all places are taken: try again in {retry_after} s")
        self.retry_after = retry_after


class UnavailableError(Exception):
    """Nothing is accepted: the model is still loading, or the server is on its way out."""


class ModelFailure(RuntimeError):
    """The model could not answer a batch; its log line says why."""


@dataclass(frozen=True)
class Answered:
    """A record, how sure the model was of it, and the seconds spent by phase: prepare, queue, model."""

    record: FoodRecord
    confidence: Confidence | None
    seconds: dict[str, float]


@dataclass
class _Job:
    inputs: BatchFeature
    result: asyncio.Future = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    seconds: float = 0.0  # before the model


class Batcher:
    """Answers pictures one by one, asking the model about several at once. Use it within `running()`."""

    def __init__(self, load: Callable[[], Answerer], limits: Limits, meters: Meters) -> None:
        self.limits, self.meters = limits, meters
        self.draining = False  # set it, and nothing more is accepted
        self.guests = 0  # places taken
        self.failures = 0  # of the model, since its last answer
        self.error: Exception | None = None  # why the model did not load
        self._load = load
        self._extractor: Answerer | None = None
        self._pace = 0.0  # seconds a picture, lately
        self._ready: asyncio.Queue[_Job] = asyncio.Queue()
        self._shelf = asyncio.Semaphore((1 + PREPARED) * limits.batch)
        self._preparers = ThreadPoolExecutor(limits.preparers, "prepare")
        self._model = ThreadPoolExecutor(1, "model")
        self._answering = 0  # pictures before the model
        meters.in_flight.set_function(lambda: self._answering)
        meters.queue_depth.set_function(lambda: max(0, self.guests - self._answering))

    @property
    def unavailable(self) -> str | None:
        """Why nothing is accepted, or None."""
        return "draining" if self.draining else "loading" if self._extractor is None else None

    @property
    def healthy(self) -> bool:
        """Is there hope without a new process?"""
        return self.error is None and self.failures < FATAL_FAILURES

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
        """Hold a place for one picture. Take it before its bytes come in, and memory is bounded. Raises UnavailableError or FullError."""
        if reason := self.unavailable:
            raise UnavailableError(reason)
        if self.guests >= self.limits.places:
            raise FullError(max(1, ceil(self._pace * self.guests)))
        self.guests += 1
        try:
            yield
        finally:
            self.guests -= 1

    async def answer(self, picture: bytes) -> Answered:
        """The record of one picture that has a place. Cancel it when nobody waits any more.

        Raises PictureError, AnswerError, ModelFailure, or TimeoutError at the deadline.
        """
        loop = asyncio.get_running_loop()
        start = loop.time()
        async with asyncio.timeout(self.limits.deadline), self._shelf:
            inputs, preparing = await loop.run_in_executor(self._preparers, self._timed, self._extractor.read, picture)
            job = _Job(inputs)
            self._ready.put_nowait(job)
            record, confidence = await job.result  # cancelled with us
        seconds = {"prepare": preparing, "queue": loop.time() - start - preparing - job.seconds, "model": job.seconds}
        for phase, spent in seconds.items():
            self.meters.phases.labels(phase).observe(spent)
        return Answered(record, confidence, seconds)

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            self._extractor, seconds = await loop.run_in_executor(self._model, self._timed, self._load_and_warm_up)
        except Exception as error:  # a missing folder, no memory, a driver: the owner of the process decides
            LOG.exception("model not loaded")
            self.error = error
            return
        LOG.info("ready", extra={"facts": {"seconds": round(seconds, 3)}})
        while True:
            if batch := await self._next_batch():
                await self._answer(batch)

    def _load_and_warm_up(self) -> Answerer:
        extractor = self._load()
        blank = extractor.read(Image.new("RGB", (64, 64)))
        extractor.answer_read([blank], lambda number: False)  # one token: compiles the grammar, and kernels where there are any
        return extractor

    async def _next_batch(self) -> list[_Job]:
        batch = [await self._ready.get()]
        with suppress(TimeoutError):
            async with asyncio.timeout(self.limits.wait):
                while len(batch) < self.limits.batch:
                    batch.append(await self._ready.get())
        return [job for job in batch if not job.result.done()]

    async def _answer(self, batch: list[_Job]) -> None:
        pictures = [job.inputs for job in batch]
        ask = (self._extractor.answer_read, pictures, lambda number: not batch[number].result.done())
        self.meters.batch_size.observe(len(batch))
        self._answering = len(batch)
        try:
            results, seconds = await asyncio.get_running_loop().run_in_executor(self._model, self._timed, *ask)
        except Exception:  # a driver's, say; the queue goes on
            LOG.exception("the model failed", extra={"facts": {"batch": len(batch)}})
            self.failures += 1
            results, seconds = [ModelFailure("the model failed on this batch")] * len(batch), 0.0
        else:
            self.failures = 0
            self._pace = 0.8 * self._pace + 0.2 * seconds / len(batch)
        self._answering = 0
        for job, result in zip(batch, results, strict=True):
            job.seconds = seconds
            if not job.result.done():
                job.result.set_exception(result) if isinstance(result, Exception) else job.result.set_result(result)

    @staticmethod
    def _timed(function: Callable, *args: object) -> tuple:
        start = time.perf_counter()
        return function(*args), time.perf_counter() - start
