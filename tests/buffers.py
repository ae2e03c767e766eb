"""What the tests of the buffer, of its log and of replay share: buffers, and questions that wait or are
answered at once.
"""

import asyncio
from collections.abc import Awaitable, Callable

import pyarrow as pa
from tiny import make_group, table

from gvpo_ray.buffer.buffer import GroupBuffer


def make(folder, groups_per_step=2, num_steps=100, max_staleness=None, version=0, replay=None) -> GroupBuffer:
    return GroupBuffer(folder, groups_per_step, num_steps, max_staleness, version, replay)


def make_again(before: GroupBuffer, **changes) -> GroupBuffer:
    """Another buffer on the folder of one that is gone."""
    before.release()
    return make(before.log.folder, **changes)


def put(buffer: GroupBuffer, *group_ids: int) -> Awaitable[None]:
    async def all_of_them() -> None:
        for group_id in group_ids:
            await buffer.put(table(make_group(group_id)))

    return all_of_them()


def ids(batch) -> list[int]:
    return batch.column("group_id").to_pylist()


def texts(history: pa.Table) -> list[str]:
    return history["completions"][0].as_py()


async def settle() -> None:
    """Let every task run until it waits for news."""
    for _ in range(50):
        await asyncio.sleep(0)


async def waits(question: Awaitable) -> asyncio.Task:
    """The question as a task that has no answer yet."""
    task = asyncio.ensure_future(question)
    await settle()
    assert not task.done(), f"answered {task.result()!r}, should wait"
    return task


async def answer(task: Awaitable):
    """Its answer, due at once."""
    task = asyncio.ensure_future(task)
    await settle()
    assert task.done(), "still waits"
    return task.result()


async def start_all(buffer: GroupBuffer) -> list[tuple[int, int]]:
    """Start groups until the buffer makes one wait."""
    started = []
    while True:
        task = asyncio.ensure_future(buffer.start())
        await settle()
        if not task.done():
            task.cancel()
            await settle()
            return started
        started += task.result()


def run(main: Callable[[], Awaitable]) -> None:
    asyncio.run(asyncio.wait_for(main(), timeout=300))
