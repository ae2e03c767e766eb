"""`gvpo-ray bench episodes --model` compares episodes of several turns with as many separate prompts.

    episode     read ─► written ─► read ─► written ─► …        each turn begins with all tokens before it
    separate    as many tokens, of which no prompt shares any with another

Both are sampled by one vLLM engine, turn by turn, with contexts of the same lengths. What differs is vLLM's
prefix cache: of an episode's turn it holds all blocks that the turns before have filled. The tokens that are
read are drawn at random, so the speed is measured, and no model needs to say anything.
"""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass

from gvpo_ray.config.engines import PoolConfig
from gvpo_ray.config.model import ModelConfig
from gvpo_ray.engines.vllm_engine import Engine

AT_ONCE, READ, WRITTEN = 8, 192, 32
"""Episodes at once, and tokens that each of their turns reads and writes."""


@dataclass
class Speed:
    """A Speed is what was measured of one kind."""

    tokens_per_s: float
    """Of those that were sampled."""
    hit_rate: float
    """Share of the context's tokens that were in the prefix cache."""


async def measure(engine: Engine, vocab_size: int, num_episodes: int, num_turns: int, is_one: bool) -> Speed:
    """Sample the turns of episodes.

    Args:
        engine: has started.
        vocab_size: of the model.
        num_episodes: in all.
        num_turns: of each.
        is_one: whether a turn begins with the turns before it; else with other tokens, as many.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(max_tokens=WRITTEN, ignore_eos=True, output_kind=RequestOutputKind.FINAL_ONLY)
    room, kind = asyncio.Semaphore(AT_ONCE), f"{time.monotonic_ns()}"
    sampled = context = cached = 0

    async def episode(number: int) -> None:
        nonlocal sampled, context, cached
        rng = random.Random(f"{kind}-{number}")
        ids: list[int] = []
        async with room:
            for turn in range(num_turns):
                kept = ids if is_one else [rng.randrange(vocab_size) for _ in ids]
                ids = [*kept, *(rng.randrange(vocab_size) for _ in range(READ))]
                output = await engine._final(ids, params, f"{kind}-{number}-{turn}")
                new = list(output.outputs[0].token_ids)
                sampled, context = sampled + len(new), context + len(ids)
                cached += output.num_cached_tokens or 0
                ids += new

    began = time.perf_counter()
    await asyncio.gather(*map(episode, range(num_episodes)))
    return Speed(sampled / (time.perf_counter() - began), cached / context)


def main(model: str, num_episodes: int, num_turns: int) -> tuple[Speed, Speed]:
    """Measure episodes, then separate prompts, with an engine on the CPU."""

    async def both() -> tuple[Speed, Speed]:
        engine = Engine(ModelConfig(path=model), PoolConfig(kv_cache_gib=1), "objects", 0, load_weights=True)
        await engine.start()
        try:
            vocab_size = int(engine._llm.model_config.get_vocab_size())
            for is_one in (True, False):  # the first requests are slower
                await measure(engine, vocab_size, 1, 2, is_one)
            one = await measure(engine, vocab_size, num_episodes, num_turns, True)
            return one, await measure(engine, vocab_size, num_episodes, num_turns, False)
        finally:
            await engine.close()

    return asyncio.run(both())
