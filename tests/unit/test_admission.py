"""Places for trees: one rank each, no more than fit, the first come first."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treepo_swift.server.admission import Admission, Forecast
from treepo_swift.server.concurrency import BackgroundTasks, all_or_cancel, closed_for_good, task_group


@given(st.lists(st.integers(0, 60), min_size=1, max_size=30), st.integers(1, 4), st.sampled_from([0, 50, 100]))
@settings(max_examples=100, deadline=None)
def test_ranks_hold_no_more_than_fits_and_everybody_gets_a_place(sizes, ranks, capacity):
    load, order = [0] * ranks, []

    async def tree(admission: Admission, tokens: int) -> None:
        async with admission.admitted(lambda: tokens) as placement:
            order.append(placement.priority)
            load[placement.rank] += tokens
            # A tree that fits nowhere has its rank for itself.
            assert not capacity or load[placement.rank] <= max(capacity, tokens)
            await asyncio.sleep(0)
            load[placement.rank] -= tokens

    async def batch() -> None:
        admission = Admission(ranks=ranks, kv_tokens=capacity)
        await all_or_cancel(tree(admission, size) for size in sizes)
        assert admission.waiting == 0

    asyncio.run(batch())
    assert load == [0] * ranks and order == list(range(1, len(sizes) + 1))


def test_trees_are_spread_over_the_ranks_by_tokens():
    async def ranks() -> list[int]:
        admission, stack, taken = Admission(ranks=2, kv_tokens=0), AsyncExitStack(), []
        for tokens in (10, 4, 4, 4):
            taken.append((await stack.enter_async_context(admission.admitted(lambda t=tokens: t))).rank)
        await stack.aclose()
        return taken

    assert asyncio.run(ranks()) == [0, 1, 1, 1]


def test_trees_of_unknown_size_are_spread_too():
    async def ranks() -> list[int]:
        admission = Admission(ranks=2, kv_tokens=0)
        async with (
            admission.admitted(lambda: 0) as a,
            admission.admitted(lambda: 0) as b,
            admission.admitted(lambda: 0) as c,
        ):
            return [placement.rank for placement in (a, b, c)]

    assert asyncio.run(ranks()) == [0, 1, 0]


def test_a_tree_that_is_cancelled_while_it_waits_leaves_no_trace():
    async def batch() -> int:
        admission = Admission(ranks=1, kv_tokens=10)
        async with admission.admitted(lambda: 10):

            async def wait() -> None:
                async with admission.admitted(lambda: 10):
                    raise AssertionError('no room')

            task = asyncio.ensure_future(wait())
            await asyncio.sleep(0)
            assert admission.waiting == 1
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        async with admission.admitted(lambda: 10) as placement:
            return placement.priority

    assert asyncio.run(batch()) == 2


def test_forecasts_follow_what_was_seen():
    forecast = Forecast()
    assert forecast.decoded_tokens(unknown=500) == 500
    forecast.learn(100)
    assert forecast.decoded_tokens(unknown=500) == 100
    forecast.learn(200)
    assert forecast.decoded_tokens(unknown=500) == 110


def test_a_group_waits_for_tasks_that_its_tasks_start():
    done = []

    async def task(group: asyncio.TaskGroup, depth: int) -> None:
        await asyncio.sleep(0)
        if depth:
            group.create_task(task(group, depth - 1))
        done.append(depth)

    async def run() -> None:
        async with task_group() as group:
            group.create_task(task(group, 3))

    asyncio.run(run())
    assert sorted(done) == [0, 1, 2, 3]


def test_background_tasks_end_with_who_waits_for_them():
    ended = []

    async def background() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    async def run() -> None:
        tasks = BackgroundTasks()
        tasks.start(background())
        waiting = asyncio.ensure_future(tasks.finish())
        await asyncio.sleep(0.01)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert waiting.cancelled() and ended == [True]
        await tasks.finish()

    asyncio.run(run())


def test_an_error_in_one_task_ends_the_others_and_comes_out_as_it_is():
    ended = []

    async def forever() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    async def fails() -> None:
        await asyncio.sleep(0)
        raise KeyError('why')

    with pytest.raises(KeyError, match='why'):
        asyncio.run(all_or_cancel([forever(), fails(), forever()]))
    assert ended == [True, True]


def test_a_stream_closes_to_its_end_though_who_closes_it_is_cancelled_meanwhile():
    steps = 0

    async def stream():
        nonlocal steps
        try:
            yield 1
        finally:
            for _ in range(20):
                await asyncio.sleep(0)
                steps += 1

    async def read(closing: asyncio.Event) -> None:
        async with closed_for_good(stream()) as items:
            async for _ in items:
                closing.set()
                break

    async def run() -> None:
        closing = asyncio.Event()
        task = asyncio.create_task(read(closing))
        await closing.wait()
        for _ in range(3):
            await asyncio.sleep(0)
            task.cancel()
        await asyncio.wait({task})
        assert task.cancelled() and steps == 20

    asyncio.run(run())


def test_what_a_stream_raises_when_it_closes_is_raised():
    async def stream():
        try:
            yield 1
        finally:
            raise RuntimeError('the abort failed')

    async def read() -> None:
        async with closed_for_good(stream()) as items:
            async for _ in items:
                break

    with pytest.raises(RuntimeError, match='the abort failed'):
        asyncio.run(read())
