"""`gvpo-ray bench episodes` measures how many episodes with a calculator one environment actor makes.

There is no model and no Ray: the tool calls are made up, and the host's calls are those that engines make.
Each episode has its process, as in a run, so the figure is what environments cost beside the model. What
several turns cost the model is measured where one is given (turns.py).
"""

from __future__ import annotations

import asyncio
import os
import random
import time

from rich.console import Console
from rich.table import Table

from gvpo_ray.data.calls import Call
from gvpo_ray.environments.forks import Forks
from gvpo_ray.environments.host import Host
from gvpo_ray.environments.world import Limits

K, AT_ONCE = 8, 8
"""Episodes of a group, and groups in flight."""


class Calculator:
    """This environment adds numbers to a total."""

    def reset(self, **row: object) -> None:
        """Begin at 0."""
        self.total = 0

    def add(self, n: int) -> int:
        """Add to the total.

        Args:
            n: What to add.
        """
        self.total += n
        return self.total

    def get_reward(self) -> float:
        """Return the total, by which the benchmark sees that nothing is lost."""
        return float(self.total)


async def play(host: Host, group_id: int, num_turns: int) -> None:
    """Play one group of episodes.

    Raises:
        RuntimeError: an episode has another total than its calls make.
    """
    rng = random.Random(group_id)

    async def episode(name: str) -> None:
        total = 0
        for turn in range(num_turns):
            n = rng.randrange(100)
            total += n
            await host.act(name, 0, turn, {}, [Call("add", {"n": n})], "")
        outcome = await host.finish(name, 0, {})
        if outcome.reward != total:
            raise RuntimeError(f"an episode gave {outcome}, and its calls make {total}")

    opened = await host.open(group_id, {"prompt": "p", "answer": "0"}, K)
    await asyncio.gather(*(episode(each.name) for each in opened))
    await host.release(group_id)


def main(num_groups: int, num_turns: int, model: str | None = None) -> float:
    """Run the benchmark and print its table; return the episodes per second.

    Args:
        num_groups: groups of K episodes with the calculator.
        num_turns: of each.
        model: folder of a model, whose turns are measured in eight episodes; None: in none.
    """
    forks = Forks(Calculator, {}, Limits())
    host = Host(forks.world)

    async def all_groups() -> float:
        await play(host, -1, num_turns)  # warm
        room, began = asyncio.Semaphore(AT_ONCE), time.perf_counter()

        async def one(group_id: int) -> None:
            async with room:
                await play(host, group_id, num_turns)

        await asyncio.gather(*map(one, range(num_groups)))
        return time.perf_counter() - began

    try:
        seconds = asyncio.run(all_groups())
    finally:
        forks.close()
    rate = num_groups * K / seconds
    title = f"bench episodes: {num_groups} groups of {K}, {AT_ONCE} at once, {os.cpu_count()} CPUs"
    table = Table(title=title, title_justify="left")
    table.add_column("figure")
    table.add_column("value", justify="right")
    table.add_row(f"episodes of {num_turns} turns with a calculator", f"{rate:,.0f} per s")
    table.add_row("tool calls", f"{rate * num_turns:,.0f} per s")
    if model is not None:
        from gvpo_ray.bench import turns

        one, apart = turns.main(model, num_turns)
        for name, speed in (
            (f"episodes of {num_turns} turns", one),
            (f"{num_turns} separate prompts", apart),
        ):
            table.add_row(f"tokens of {name}", f"{speed.tokens_per_s:,.1f} per s")
            table.add_row(f"prefix cache, {name}", f"{100 * speed.hit_rate:.0f} %")
        table.add_row("ratio of the tokens per s", f"{one.tokens_per_s / apart.tokens_per_s:.2f}")
    Console(highlight=False).print(table)
    return rate
