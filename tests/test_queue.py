"""The queue in front of the model. A stub replaces the extractor, so that the model can be held at any moment."""

import asyncio
import threading
from contextlib import asynccontextmanager

import pytest
from PIL import Image

from foodextract.data import scenes
from foodextract.images import ImageError
from foodextract.inference.extractor import PREPARED
from foodextract.models.loading import ModelError
from foodextract.schema import FoodRecord
from foodextract.serving.errors import RequestError
from foodextract.serving.queue import HANG_DEADLINES, MAX_FAILURES, Prediction, Queue, QueueLimits
from foodextract.serving.telemetry import ServerMetrics

TIMEOUT = 30  # seconds, far more than any of this takes


class Stub:
    """An extractor that answers with the bytes of an image as its title. It waits at each batch until `go` is set."""

    tiles = 1

    def __init__(self):
        self.images_read, self.batches, self.unwanted = [], [], []
        self.go, self.called = threading.Event(), threading.Event()
        self.go.set()

    def prepare_image(self, image):
        if isinstance(image, Image.Image):
            return b"warm-up"
        self.images_read.append(image)
        if image == b"bad":
            raise ImageError("bad")
        return image

    def extract_prepared(self, images, wanted=lambda number: True, batch_size=8):
        if images == [b"warm-up"]:
            return [None]
        self.batches.append(images)
        self.called.set()
        while not self.go.wait(0.01) and any(wanted(number) for number in range(len(images))):
            pass
        self.unwanted += [image for number, image in enumerate(images) if not wanted(number)]
        if b"broken" in images:
            raise RuntimeError("no kernel image")
        titles = [image[:20].decode("latin-1") for image in images]
        return [(FoodRecord(is_food=1, image_title=title, food_items=[], drink_items=[]), None) for title in titles]


class Story:
    """A running queue, its stub, and short words for what tests do with them."""

    def __init__(self, queue, stub):
        self.queue, self.stub = queue, stub

    async def ask(self, image):
        """The title of the answer, or the reason of the error."""
        try:
            with self.queue.slot():
                result = await self.queue.answer(image)
        except RequestError as error:
            result = error
        return result.record.image_title if isinstance(result, Prediction) else result.problem.reason

    def start(self, *images):
        return [asyncio.create_task(self.ask(image)) for image in images]


@asynccontextmanager
async def running(stub=None, held=False, **limits):
    stub = stub or Stub()
    queue = Queue(lambda: stub, QueueLimits(**limits), ServerMetrics())
    async with queue.running():
        await until(lambda: not queue.unavailable)
        if held:
            stub.go.clear()
        yield Story(queue, stub)


async def until(condition):
    async with asyncio.timeout(TIMEOUT):
        while not condition():
            await asyncio.sleep(0.005)


def names(count):
    return [b"image %d" % number for number in range(count)]


def texts(images):
    return [image.decode() for image in images]


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, TIMEOUT))


def story(**options):
    """Run an async test inside a running queue."""

    def decorate(test):
        def test_in_loop():
            async def main():
                async with running(**options) as one:
                    await test(one)

            run(main())

        test_in_loop.__name__ = test.__name__
        return test_in_loop

    return decorate


@story(held=True, batch_size=4, max_wait=0.0)
async def test_waiting_images_share_a_batch_and_each_gets_its_own_answer(one):
    [first] = one.start(b"first")
    await until(one.stub.called.is_set)
    others = one.start(*names(6))
    await until(lambda: one.queue._ready.qsize() == 6)
    one.stub.go.set()
    assert await first == "first"
    assert await asyncio.gather(*others) == texts(names(6))
    assert [len(batch) for batch in one.stub.batches] == [1, 4, 2]


@story(batch_size=3, max_wait=TIMEOUT)  # so long that only a full batch starts
async def test_a_batch_waits_a_moment_for_more_images(one):
    assert await asyncio.gather(*one.start(*names(3))) == texts(names(3))
    assert [len(batch) for batch in one.stub.batches] == [3]


@story(held=True, batch_size=2, max_wait=TIMEOUT)
async def test_an_image_that_has_waited_already_starts_at_once(one):
    both = one.start(*names(2))
    await until(one.stub.called.is_set)
    [third] = one.start(b"third")
    await until(lambda: one.queue._ready.qsize() == 1)
    one.queue._ready._queue[0].ready -= TIMEOUT
    one.stub.go.set()
    await asyncio.gather(*both)
    assert await third == "third"


@story(held=True, size=12, batch_size=2, max_wait=0.0)
async def test_accepted_and_prepared_images_are_bounded(one):
    tasks = one.start(*names(12))
    await until(lambda: len(one.stub.images_read) == (1 + PREPARED) * 2)
    await asyncio.sleep(0.05)
    assert len(one.stub.images_read) == (1 + PREPARED) * 2
    assert one.queue.accepted == 12
    depth = one.queue.metrics.registry.get_sample_value("foodextract_queue_depth")
    assert depth + len(one.stub.batches[0]) == 12
    with pytest.raises(RequestError, match="try again in") as full, one.queue.slot():
        pass
    assert int(full.value.headers["Retry-After"]) >= 1
    one.stub.go.set()
    await asyncio.gather(*tasks)
    assert one.queue.accepted == 0
    assert await one.ask(b"later") == "later"


@story(deadline=10.0, batch_size=1)
async def test_an_image_that_would_miss_the_deadline_is_not_accepted(one):
    one.stub.go.clear()
    waiting = one.start(*names(3))
    await until(lambda: one.queue.accepted == 3)
    one.queue._seconds_per_image = 4.0
    with pytest.raises(RequestError) as full, one.queue.slot():
        pass
    assert full.value.headers["Retry-After"] == "12"
    one.stub.go.set()
    assert await asyncio.gather(*waiting) == texts(names(3))
    assert await one.ask(b"later") == "later"


@story()
async def test_the_seconds_per_image_are_measured(one):
    one.stub.go.clear()
    [task] = one.start(b"slow")
    await until(one.stub.called.is_set)
    await asyncio.sleep(0.1)
    one.stub.go.set()
    await task
    assert one.queue._seconds_per_image >= 0.1


@story(held=True, deadline=1.0, batch_size=1)
async def test_at_the_deadline_the_work_ends_too(one):
    assert await asyncio.gather(*one.start(*names(5))) == ["deadline"] * 5
    await until(lambda: one.stub.unwanted)
    one.stub.go.set()
    assert await one.ask(b"next") == "next"
    assert one.stub.batches.pop() == [b"next"]
    assert [[image] for image in one.stub.unwanted] == one.stub.batches  # the model stops what it had begun


@story(held=True, batch_size=1)
async def test_a_cancelled_image_never_reaches_the_model(one):
    tasks = one.start(*names(3))
    await until(lambda: one.stub.called.is_set() and one.queue._ready.qsize() == 2)
    [at_model] = one.stub.batches[0]
    waiting = [task for task, name in zip(tasks, names(3), strict=True) if name != at_model]
    waiting[0].cancel()
    await until(lambda: one.queue.accepted == 2)
    one.stub.go.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert [task.cancelled() for task in waiting] == [True, False]
    assert len(one.stub.batches) == 2


@story(held=True, batch_size=2)
async def test_draining_answers_accepted_images_and_rejects_others(one):
    tasks = one.start(*names(5))
    await until(one.stub.called.is_set)
    one.queue.draining = True
    assert await one.ask(b"late") == "draining"
    one.stub.go.set()
    assert await asyncio.gather(*tasks) == texts(names(5))


def test_no_image_is_accepted_before_the_model_is_warm():
    async def main():
        gate = threading.Event()
        queue = Queue(lambda: gate.wait(TIMEOUT) and Stub(), QueueLimits(), ServerMetrics())
        one = Story(queue, None)
        async with queue.running():
            assert await one.ask(b"early") == "loading"
            assert queue.healthy
            gate.set()
            await until(lambda: not queue.unavailable)
            assert await one.ask(b"now") == "now"

    run(main())


def test_a_model_that_does_not_load_ends_the_process():
    def load():
        raise ModelError("no such model")

    async def main():
        queue = Queue(load, QueueLimits(), ServerMetrics())
        async with queue.running():
            await until(lambda: queue.error)
            assert str(queue.error) == "no such model"
            assert not queue.healthy
            assert queue.unavailable == "loading"

    run(main())


def test_a_queue_that_breaks_ends_the_process():
    class Forgetful(Stub):
        def extract_prepared(self, images, wanted=None, batch_size=8):
            return []

    async def main():
        async with running(Forgetful(), deadline=1.0) as one:
            assert await one.ask(b"x") == "deadline"
            assert isinstance(one.queue.error, ValueError)
            assert not one.queue.healthy

    run(main())


def test_a_model_that_hangs_is_not_healthy():
    class Hanging(Stub):
        def extract_prepared(self, images, wanted=None, batch_size=8):
            self.go.wait(TIMEOUT)  # `wanted` is ignored
            return super().extract_prepared(images)

    async def main():
        async with running(Hanging(), held=True, deadline=0.1) as one:
            start = asyncio.get_running_loop().time()
            assert await one.ask(b"x") == "deadline"
            await until(lambda: not one.queue.healthy)
            assert asyncio.get_running_loop().time() - start > HANG_DEADLINES * 0.1
            one.stub.go.set()
            await until(lambda: one.queue.healthy)

    run(main())


@story(batch_size=3, max_wait=TIMEOUT)
async def test_an_image_that_breaks_the_model_does_not_affect_its_batch(one):
    assert await asyncio.gather(*one.start(b"1", b"broken", b"2")) == ["1", "model_failed", "2"]
    assert one.queue.healthy


@story(batch_size=1)
async def test_the_queue_is_unhealthy_after_consecutive_failures(one):
    for good in (b"1", b"2"):
        assert await one.ask(b"broken") == "model_failed"
        assert await one.ask(good) == good.decode()
    for _ in range(MAX_FAILURES):
        assert one.queue.healthy
        assert await one.ask(b"broken") == "model_failed"
    assert not one.queue.healthy


@story()
async def test_a_bad_image_gets_its_own_error(one):
    assert await asyncio.gather(*one.start(b"1", b"bad", b"2")) == ["1", "bad_image", "2"]
    assert one.queue.accepted == 0


def test_answers_are_those_of_the_extractor(tuned):
    images = [scene.image for scene in scenes.draw_scenes(81, "test", 9)]

    async def main():
        async with running(tuned, batch_size=4) as one:
            return await asyncio.gather(*map(one.queue.answer, images))

    answers, alone = run(main()), list(tuned.extract_many_with_confidence(images))
    assert [answer.record for answer in answers] == [record for record, _ in alone]
    assert [answer.confidence.is_food for answer in answers] == pytest.approx(
        [confidence.is_food for _, confidence in alone], rel=1e-4
    )
    for answer in answers:
        assert set(answer.seconds) == {"prepare", "queue", "model"}
        assert min(answer.seconds.values()) >= 0
