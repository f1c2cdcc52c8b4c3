"""The loop of the async handlers: what one of them does to it, and what the others notice."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from flask_natspubsub.errors import HandlerInterrupted, HandlerTimeout
from flask_natspubsub.worker.async_handlers import AsyncHandlers
from tests.support.waiting import eventually


@pytest.fixture
def handlers():
    made = AsyncHandlers()
    yield made
    made.stop()


@pytest.fixture
def pool():
    with ThreadPoolExecutor(8) as made:
        yield made


async def quick():
    await asyncio.sleep(0)
    return "done"


class Block:
    """Keeps a loop from turning until it is released."""

    def __init__(self):
        self.began, self.released = threading.Event(), threading.Event()

    async def run(self):
        self.began.set()
        self.released.wait(30)

    async def run_in_a_task(self):
        await asyncio.create_task(self.run())


@pytest.fixture
def block():
    made = Block()
    yield made
    made.released.set()


async def ends_the_process(error):
    raise error


async def ends_the_process_in_a_task(error):
    await asyncio.gather(asyncio.create_task(ends_the_process(error)))


@pytest.mark.parametrize("ends", [ends_the_process, ends_the_process_in_a_task])
@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()])
def test_sys_exit_ends_its_own_handler_only(handlers, pool, ends, error):
    waiting = asyncio.Event()

    async def other():
        await waiting.wait()
        return "done"

    async def release():
        waiting.set()

    before = pool.submit(handlers.run, other(), 30)
    with pytest.raises(type(error)):
        handlers.run(ends(error), 30)
    handlers.run(release(), 30)
    assert before.result(10) == "done"
    assert handlers.run(quick(), 30) == "done"


@pytest.mark.parametrize("how", ["run", "run_in_a_task"])
def test_one_that_blocks_the_loop_runs_out_of_time_and_the_others_do_not(
    handlers, pool, block, how, caplog
):
    async def slow():
        await asyncio.sleep(30)

    begun = pool.submit(handlers.run, slow(), 0.8)
    assert handlers.run(quick(), 30) == "done"  # so the one before has begun
    blocking = pool.submit(handlers.run, getattr(block, how)(), 1.0)
    assert block.began.wait(10)
    later = [pool.submit(handlers.run, quick(), 0.6) for _ in range(3)]

    with pytest.raises(HandlerTimeout):
        blocking.result(15)
    with pytest.raises(HandlerInterrupted):
        begun.result(15)
    assert [one.result(15) for one in later] == ["done"] * 3
    assert f"Block.{how}" in caplog.text
    assert "does not await" in caplog.text


def test_the_time_of_one_stands_still_while_another_blocks_the_loop(handlers, pool, block):
    began = threading.Event()

    async def innocent():
        began.set()
        await asyncio.sleep(0.2)
        return "done"

    other = pool.submit(handlers.run, innocent(), 1.0)
    assert began.wait(10)
    blocking = pool.submit(handlers.run, block.run(), 60)
    assert block.began.wait(10)
    release = threading.Timer(2.0, block.released.set)
    release.start()

    assert other.result(15) == "done"
    assert blocking.result(15) is None
    release.join()


def test_one_that_runs_too_long_without_blocking_is_cancelled(handlers):
    cancelled = threading.Event()

    async def handler():
        try:
            await asyncio.sleep(30)
        finally:
            cancelled.set()

    began = time.monotonic()
    with pytest.raises(HandlerTimeout, match=r"longer than 0\.3 s"):
        handlers.run(handler(), 0.3)
    assert time.monotonic() - began < 5
    assert cancelled.wait(10)


def test_a_loop_that_was_given_up_ends_once_it_is_free(handlers, block):
    with pytest.raises(HandlerTimeout):
        handlers.run(block.run(), 0.3)
    assert handlers.run(quick(), 30) == "done"
    block.released.set()
    handlers.stop()
    eventually(lambda: "natspubsub-handlers" not in {one.name for one in threading.enumerate()})


def test_an_error_of_the_handlers_own_is_raised(handlers):
    async def handler():
        raise TimeoutError("mine")

    with pytest.raises(TimeoutError, match="mine"):
        handlers.run(handler(), 5)
    assert sys.exc_info() == (None, None, None)
