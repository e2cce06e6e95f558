"""Whose weights a server has: what is asked at the same time, and in what order weights are written."""

import asyncio
import contextlib

import pytest

from es_trainer.engines.vllm_members import WeightsInUse


class Engine:
    """Notes the weights that are written, and those that are there while somebody uses them."""

    def __init__(self):
        self.written = []
        self.fails = False
        self.weights = WeightsInUse(self.write)

    async def write(self, member):
        await asyncio.sleep(0)
        self.written.append(member)
        return [{"error": "no memory"} if self.fails else {}]

    async def use(self, member, until=None):
        async with self.weights.of(member) as (salt, _):
            assert self.written[-1] == member
            if until is not None:
                await until.wait()
            await asyncio.sleep(0)
            assert self.written[-1] == member  # nobody has written others meanwhile
            return salt


ONE, OTHER, NONE = ("perturb", (1, 1, 0.5)), ("perturb", (1, -1, 0.5)), ("restore", ())


def run(test):
    asyncio.run(asyncio.wait_for(test(), 20))


def test_weights_are_written_if_they_are_not_there():
    async def test():
        engine = Engine()
        for member in (ONE, ONE, OTHER, NONE, NONE, ONE):
            await engine.use(member)
        assert engine.written == [ONE, OTHER, NONE, ONE]

    run(test)


def test_requests_of_a_member_share_its_weights_and_others_wait():
    async def test():
        engine, until = Engine(), asyncio.Event()
        first = asyncio.create_task(engine.use(ONE, until))
        await asyncio.sleep(0.01)
        other = asyncio.create_task(engine.use(OTHER))
        await asyncio.wait_for(engine.use(ONE), 5)
        await asyncio.sleep(0.01)
        assert not other.done() and engine.written == [ONE]
        until.set()
        await asyncio.gather(first, other)
        assert engine.written == [ONE, OTHER]

    run(test)


def test_a_step_waits_for_requests_that_are_cancelled():
    async def test():
        engine, aborted = Engine(), []

        async def request():
            async with engine.weights.of(ONE):
                try:
                    await asyncio.Event().wait()
                finally:
                    await asyncio.sleep(0.01)  # the time of the abort
                    aborted.append(True)

        async def update():
            async with engine.weights.changed():
                assert aborted

        task = asyncio.create_task(request())
        await asyncio.sleep(0.01)
        step = asyncio.create_task(update())
        await asyncio.sleep(0.01)
        assert not step.done()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await step
        await engine.use(ONE)
        assert engine.written == [ONE, ONE]  # what the update left there is not known

    run(test)


def test_salts_are_of_the_step_and_the_member():
    async def test():
        engine = Engine()
        salts = [await engine.use(member) for member in (ONE, OTHER, NONE, ONE)]
        async with engine.weights.changed():
            pass
        salts += [await engine.use(member) for member in (ONE, OTHER, NONE)]
        assert salts[3] == salts[0] and len(set(salts)) == 6

    run(test)


@pytest.mark.parametrize("member", [ONE, NONE])
def test_weights_that_could_not_be_written_are_written_again(member):
    async def test():
        engine = Engine()
        engine.fails = True
        async with engine.weights.of(member) as (_, written):
            assert written == [{"error": "no memory"}]
        engine.fails = False
        await engine.use(member)
        assert engine.written == [member, member]

    run(test)
