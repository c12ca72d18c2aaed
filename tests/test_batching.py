"""The queue before the model: a stub stands in for the extractor, so that every moment can be held still."""

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
from foodextract.serving.queue import FATAL_FAILURES, STUCK, Batcher, FullError, Limits, ModelFailure, UnavailableError
from foodextract.serving.telemetry import Meters

SECONDS = 30  # far more than any of this takes


class Stub:
    """An extractor whose answer to an image is the image's bytes; it waits before every batch while `go` is not set."""

    tiles = 1

    def __init__(self):
        self.read_so_far, self.batches, self.unwanted = [], [], []
        self.go, self.asked = threading.Event(), threading.Event()
        self.go.set()

    def prepare_image(self, image):
        if isinstance(image, Image.Image):
            return b"warm-up"
        self.read_so_far.append(image)
        if image == b"bad":
            raise ImageError("bad")
        return image

    def extract_prepared(self, images, wanted=lambda number: True, batch_size=8):
        if images == [b"warm-up"]:
            return [None]
        self.batches.append(images)
        self.asked.set()
        while not self.go.wait(0.01) and any(wanted(number) for number in range(len(images))):
            pass
        self.unwanted += [image for number, image in enumerate(images) if not wanted(number)]
        if b"broken" in images:
            raise RuntimeError("no kernel image")
        titles = [image[:20].decode("latin-1") for image in images]
        return [(FoodRecord(is_food=1, image_title=title, food_items=[], drink_items=[]), None) for title in titles]


@asynccontextmanager
async def batching(extractor, **limits):
    batcher = Batcher(lambda: extractor, Limits(**limits), Meters())
    async with batcher.running():
        while batcher.unavailable:
            await asyncio.sleep(0.005)
        yield batcher


async def ask(batcher, image):
    with batcher.place():
        return (await batcher.answer(image)).record.image_title


async def until(condition):
    async with asyncio.timeout(SECONDS):
        while not condition():
            await asyncio.sleep(0.005)


def names(count):
    return [b"image %d" % number for number in range(count)]


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, SECONDS))


def test_images_that_wait_together_share_a_batch_and_each_gets_its_own_answer():
    async def story():
        stub = Stub()
        stub.go.clear()
        async with batching(stub, batch=4, wait=0.0) as batcher:
            first = asyncio.create_task(ask(batcher, b"first"))
            await until(stub.asked.is_set)
            others = [asyncio.create_task(ask(batcher, name)) for name in names(6)]
            await until(lambda: batcher._ready.qsize() == 6)
            stub.go.set()
            assert await first == "first"
            assert await asyncio.gather(*others) == [name.decode() for name in names(6)]
        assert [len(batch) for batch in stub.batches] == [1, 4, 2]
        assert {image for batch in stub.batches for image in batch} == {b"first", *names(6)}

    run(story())


def test_a_batch_waits_a_moment_for_company():
    async def story():
        stub = Stub()
        async with batching(
            stub, batch=3, wait=SECONDS
        ) as batcher:  # so long that only a full batch is a reason to begin
            assert await asyncio.gather(*(ask(batcher, name) for name in names(3))) == [
                name.decode() for name in names(3)
            ]
        assert [len(batch) for batch in stub.batches] == [3]

    run(story())


def test_no_more_images_than_places_and_no_more_prepared_than_the_shelf_holds():
    async def story():
        stub = Stub()
        stub.go.clear()
        async with batching(stub, places=12, batch=2, wait=0.0) as batcher:
            tasks = [asyncio.create_task(ask(batcher, name)) for name in names(12)]
            await until(lambda: len(stub.read_so_far) == (1 + PREPARED) * 2)
            await asyncio.sleep(0.05)
            assert len(stub.read_so_far) == (1 + PREPARED) * 2
            assert batcher.guests == 12
            assert batcher.meters.registry.get_sample_value("foodextract_queue_depth") + len(stub.batches[0]) == 12
            with pytest.raises(FullError) as full:
                await ask(batcher, b"one too many")
            assert full.value.retry_after >= 1
            stub.go.set()
            await asyncio.gather(*tasks)
            assert batcher.guests == 0
            assert await ask(batcher, b"later") == "later"
        assert b"one too many" not in stub.read_so_far

    run(story())


def test_at_the_deadline_the_work_ends_too():
    async def story():
        stub = Stub()
        stub.go.clear()
        async with batching(stub, deadline=1.0, batch=1) as batcher:
            results = await asyncio.gather(*(ask(batcher, name) for name in names(5)), return_exceptions=True)
            assert [type(result) for result in results] == [TimeoutError] * 5
            await until(lambda: stub.unwanted)
            stub.go.set()
            assert await ask(batcher, b"next") == "next"
        assert stub.batches.pop() == [b"next"]
        assert [
            [image] for image in stub.unwanted
        ] == stub.batches  # of each that the model had begun with, it was told

    run(story())


def test_what_is_cancelled_never_reaches_the_model():
    async def story():
        stub = Stub()
        stub.go.clear()
        async with batching(stub, batch=1) as batcher:
            tasks = [asyncio.create_task(ask(batcher, name)) for name in names(3)]
            await until(lambda: stub.asked.is_set() and batcher._ready.qsize() == 2)
            [before] = stub.batches[0]
            waiting = [task for task, name in zip(tasks, names(3), strict=True) if name != before]
            waiting[0].cancel()
            await until(lambda: batcher.guests == 2)
            stub.go.set()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert [task.cancelled() for task in waiting] == [True, False]
        assert len(stub.batches) == 2

    run(story())


def test_draining_answers_what_was_accepted_and_nothing_else():
    async def story():
        stub = Stub()
        stub.go.clear()
        async with batching(stub, batch=2) as batcher:
            tasks = [asyncio.create_task(ask(batcher, name)) for name in names(5)]
            await until(stub.asked.is_set)
            batcher.draining = True
            with pytest.raises(UnavailableError, match="draining"):
                await ask(batcher, b"late")
            stub.go.set()
            assert await asyncio.gather(*tasks) == [name.decode() for name in names(5)]

    run(story())


def test_nothing_is_accepted_before_the_model_is_warm():
    async def story():
        gate = threading.Event()
        batcher = Batcher(lambda: gate.wait(SECONDS) and Stub(), Limits(), Meters())
        async with batcher.running():
            with pytest.raises(UnavailableError, match="loading"):
                await ask(batcher, b"early")
            assert batcher.healthy
            gate.set()
            await until(lambda: not batcher.unavailable)
            assert await ask(batcher, b"now") == "now"

    run(story())


def test_a_model_that_does_not_load_is_an_error_of_the_process():
    def load():
        raise ModelError("no such model")

    async def story():
        batcher = Batcher(load, Limits(), Meters())
        async with batcher.running():
            await until(lambda: batcher.error)
            assert str(batcher.error) == "no such model"
            assert not batcher.healthy
            assert batcher.unavailable == "loading"

    run(story())


def test_a_queue_that_breaks_is_an_error_of_the_process():
    class Forgetful(Stub):
        def extract_prepared(self, images, wanted=None, batch_size=8):
            return []

    async def story():
        async with batching(Forgetful(), deadline=1.0) as batcher:
            with pytest.raises(TimeoutError):
                await ask(batcher, b"x")
            assert isinstance(batcher.error, ValueError)
            assert not batcher.healthy

    run(story())


def test_a_model_that_hangs_is_not_healthy():
    class Hanging(Stub):
        def extract_prepared(self, images, wanted=None, batch_size=8):
            self.go.wait(SECONDS)  # whether or not anybody waits
            return super().extract_prepared(images)

    async def story():
        stub = Hanging()
        async with batching(stub, deadline=0.1) as batcher:
            stub.go.clear()
            start = asyncio.get_running_loop().time()
            with pytest.raises(TimeoutError):
                await ask(batcher, b"x")
            await until(lambda: not batcher.healthy)
            assert asyncio.get_running_loop().time() - start > STUCK * 0.1
            stub.go.set()
            await until(lambda: batcher.healthy)

    run(story())


def test_nobody_is_let_in_to_wait_for_longer_than_the_deadline():
    async def story():
        stub = Stub()
        async with batching(stub, deadline=10.0, batch=1) as batcher:
            batcher._timed = lambda function, *given: (function(*given), 4.0)  # seconds, that an image seems to take
            assert await ask(batcher, b"first") == "first"
            stub.go.clear()
            waiting = [asyncio.create_task(ask(batcher, name)) for name in names(3)]
            await until(lambda: batcher.guests == 3)
            with pytest.raises(FullError) as full:
                await ask(batcher, b"stale")
            assert full.value.retry_after == 12
            stub.go.set()
            assert await asyncio.gather(*waiting) == [name.decode() for name in names(3)]
            assert await ask(batcher, b"later") == "later"

    run(story())


def test_who_has_waited_already_waits_for_no_company():
    async def story():
        stub = Stub()
        stub.go.clear()
        async with batching(stub, batch=2, wait=SECONDS) as batcher:
            both = [asyncio.create_task(ask(batcher, name)) for name in names(2)]
            await until(stub.asked.is_set)
            third = asyncio.create_task(ask(batcher, b"third"))
            await until(lambda: batcher._ready.qsize() == 1)
            batcher._ready._queue[0].ready -= SECONDS
            stub.go.set()
            await asyncio.gather(*both)
            assert await third == "third"

    run(story())


def test_one_image_that_breaks_the_model_spoils_no_other():
    async def story():
        async with batching(Stub(), batch=3, wait=SECONDS) as batcher:
            results = await asyncio.gather(
                *(ask(batcher, name) for name in (b"1", b"broken", b"2")), return_exceptions=True
            )
            assert results[::2] == ["1", "2"]
            assert isinstance(results[1], ModelFailure)
            assert batcher.healthy

    run(story())


def test_a_failing_model_is_asked_again_until_it_fails_again_and_again():
    async def story():
        async with batching(Stub(), batch=1) as batcher:
            for good in (b"1", b"2"):
                with pytest.raises(ModelFailure):
                    await ask(batcher, b"broken")
                assert await ask(batcher, good) == good.decode()
            for _ in range(FATAL_FAILURES):
                assert batcher.healthy
                with pytest.raises(ModelFailure):
                    await ask(batcher, b"broken")
            assert not batcher.healthy

    run(story())


def test_a_bad_image_is_told_alone():
    async def story():
        async with batching(Stub()) as batcher:
            results = await asyncio.gather(
                *(ask(batcher, name) for name in (b"1", b"bad", b"2")), return_exceptions=True
            )
            assert [str(result) for result in results] == ["1", "bad", "2"]
            assert batcher.guests == 0

    run(story())


def test_answers_are_those_of_the_extractor(tuned):
    images = [scene.image for scene in scenes.draw_scenes(81, "test", 9)]

    async def story():
        async with batching(tuned, batch=4) as batcher:
            return await asyncio.gather(*map(batcher.answer, images))

    answered, alone = run(story()), list(tuned.extract_many_with_confidence(images))
    assert [one.record for one in answered] == [record for record, _ in alone]
    assert [one.confidence.is_food for one in answered] == pytest.approx(
        [confidence.is_food for _, confidence in alone], rel=1e-4
    )
    for one in answered:
        assert set(one.seconds) == {"prepare", "queue", "model"}
        assert min(one.seconds.values()) >= 0
