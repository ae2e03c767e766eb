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

AT_ONCE, READ, WRITTEN = 4, 192, 32
"""Episodes at once, and tokens that each of their turns reads and writes."""
ROUNDS = (True, False, False, True)
"""In turn, so that what else the machine does slows both kinds: whether a round is of episodes."""


@dataclass
class Speed:
    """A Speed is what was measured of one kind."""

    seconds: float = 0.0
    sampled: int = 0
    """Tokens that were sampled."""
    context: int = 0
    """Tokens that they were sampled after, each turn's counted anew."""
    cached: int = 0
    """Those of the context that were in the prefix cache."""

    @property
    def tokens_per_s(self) -> float:
        """Sampled tokens per second."""
        return self.sampled / self.seconds

    @property
    def hit_rate(self) -> float:
        """Share of the context's tokens that were in the prefix cache."""
        return self.cached / self.context


async def measure(
    engine: Engine, vocab_size: int, num_episodes: int, num_turns: int, is_one: bool, speed: Speed
) -> None:
    """Sample the turns of episodes, all at once, and add what was measured.

    Args:
        engine: has started.
        vocab_size: of the model.
        num_episodes: in all.
        num_turns: of each.
        is_one: whether a turn begins with the turns before it; else with other tokens, as many.
        speed: is added to.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(max_tokens=WRITTEN, ignore_eos=True, output_kind=RequestOutputKind.FINAL_ONLY)
    kind = f"{time.monotonic_ns()}"

    async def episode(number: int) -> None:
        rng = random.Random(f"{kind}-{number}")
        ids: list[int] = []
        for turn in range(num_turns):
            kept = ids if is_one else [rng.randrange(vocab_size) for _ in ids]
            ids = [*kept, *(rng.randrange(vocab_size) for _ in range(READ))]
            output = await engine._final(ids, params, f"{kind}-{number}-{turn}")
            new = list(output.outputs[0].token_ids)
            speed.sampled += len(new)
            speed.context += len(ids)
            speed.cached += output.num_cached_tokens or 0
            ids += new

    began = time.perf_counter()
    await asyncio.gather(*map(episode, range(num_episodes)))
    speed.seconds += time.perf_counter() - began


def main(model: str, num_turns: int) -> tuple[Speed, Speed]:
    """Measure episodes and separate prompts in turn, with an engine on the CPU.

    Args:
        model: folder of a model.
        num_turns: of an episode.
    """

    async def both() -> tuple[Speed, Speed]:
        pool = PoolConfig(kv_cache_gib=1, num_threads=1)
        engine = Engine(ModelConfig(path=model), pool, "objects", 0, load_weights=True)
        await engine.start()
        try:
            vocab_size = int(engine._llm.model_config.get_vocab_size())
            for is_one in (True, False):  # the first requests are slower
                await measure(engine, vocab_size, 1, 2, is_one, Speed())
            one, apart = Speed(), Speed()
            for is_one in ROUNDS:
                await measure(engine, vocab_size, AT_ONCE, num_turns, is_one, one if is_one else apart)
            return one, apart
        finally:
            await engine.close()

    return asyncio.run(both())
