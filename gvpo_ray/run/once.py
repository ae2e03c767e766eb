"""Every row of a table is sampled and verified once, without a learner, for rollouts and evaluations."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
from ray.exceptions import RayError

from gvpo_ray import groups
from gvpo_ray.actors import is_lost
from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.engines import SamplingConfig
from gvpo_ray.config.run import GVPOConfig
from gvpo_ray.config.shown import visible
from gvpo_ray.data.rendering import completion_renderer
from gvpo_ray.engines.actor import engine_maker
from gvpo_ray.engines.pools import EngineGroup
from gvpo_ray.files import part_of
from gvpo_ray.observe.samples import sample_lines
from gvpo_ray.run.inputs import read_inputs
from gvpo_ray.run.machine import check_machine
from gvpo_ray.run.session import Session
from gvpo_ray.run.wiring import references_of, rollout_of, serve_of
from gvpo_ray.verifiers.pool import VerifierGroup
from gvpo_ray.verifiers.references import ReferenceGroup
from gvpo_ray.verifiers.rewards import Rewards


def evaluation_sampling(config: GVPOConfig, name: str) -> SamplingConfig:
    """Return the sampling settings of an evaluation set."""
    num_samples, temperature, max_tokens = config.evaluation.of(name)
    values = {
        "num_completions": num_samples,
        "temperature": temperature,
        "max_tokens": max_tokens or config.sampling.max_tokens,
    }
    return config.sampling.model_copy(update=values)


def rollout(
    config: GVPOConfig, out: str | Path, num_groups: int | None = None, reward: Rewards | None = None
) -> pa.Table:
    """Sample and verify groups with the weights of model.path, and write them to an Arrow file.

    There is no learner.

    Args:
        config: the run's config.
        out: the file.
        num_groups: number of groups; None: groups_per_step.
        reward: reward functions that replace `verifiers.rewards`, by name.

    Returns:
        The scored groups.

    Raises:
        ConfigError: a mistake of the user; before any actor starts.
        RunError: the first cause that stopped the sampling.
    """
    config = config.absolute()
    check_machine(config, learner=False)
    if num_groups is not None and num_groups < 1:
        raise ConfigError(f"--groups: {num_groups}: must be at least 1")
    if not config.engines.has_own_engines:
        raise ConfigError(NO_OWN)
    inputs = read_inputs(config, reward)
    if inputs.prompts is None:
        raise ConfigError("prompts: required, and not given")
    part = part_of(Path(out))
    if Path(out).is_dir():
        raise ConfigError(f"--out: {out} is a folder")
    try:
        part.write_bytes(b"")  # fails now rather than after the sampling
    except OSError as error:
        raise ConfigError(f"--out: {out}: {error.strerror}") from error
    session = Session(config.ray)
    try:
        engines, verifiers = without_learner(session, config, inputs.max_length, reward)
        references = references_of(session, config, _note)
        prompts = pa.concat_tables(
            [inputs.prompts.group(i) for i in range(num_groups or config.groups_per_step)]
        )
        table = session.guard(
            run_through(prompts, engines, verifiers, config.sampling, 0, references=references)
        )
        groups.save(groups.log_columns(table), part)
        part.replace(out)
        return table
    finally:
        session.stop()
        part.unlink(missing_ok=True)


def sample(config: GVPOConfig, num_prompts: int) -> Iterator[str]:
    """Sample the first prompts of the training with one engine, verify them, and yield lines about them.

    This is for people to read before they train: see observe/samples.py.

    Args:
        config: the run's config.
        num_prompts: number of prompts, each with sampling.num_completions completions.

    Raises:
        ConfigError: a mistake of the user; before any actor starts.
        RunError: the first cause that stopped the sampling.
    """
    config = config.absolute()
    own = {name: pool for name, pool in config.engines.all_pools().items() if pool.url is None}
    if not config.engines.has_own_engines:
        raise ConfigError(NO_OWN)
    name, pool = next((name, pool) for name, pool in own.items() if pool.num or pool.max_num)
    one = {"num": 1, "max_num": None}
    pools = {name: pool.model_copy(update=one)}
    engines_config = config.engines.model_copy(update={**one, "pools": pools, "weight_transfer": "objects"})
    verifiers_config = config.verifiers.model_copy(update=one)
    config = config.model_copy(update={"engines": engines_config, "verifiers": verifiers_config})
    check_machine(config, learner=False, references=False)
    inputs = read_inputs(config)
    if inputs.prompts is None:
        raise ConfigError("prompts: required, and not given")
    prompts = pa.concat_tables(
        [inputs.prompts.group(i) for i in range(min(num_prompts, len(inputs.prompts)))]
    )
    renderer = completion_renderer(config.model)
    session = Session(config.ray)
    try:
        engines, verifiers = without_learner(session, config, inputs.max_length, None)
        table = session.guard(run_through(prompts, engines, verifiers, config.sampling, 0, config.seed))
    finally:
        session.stop()
    yield from sample_lines(
        list(groups.rows(table)),
        lambda ids: renderer.text(ids, with_special=True),
        config.sampling.max_tokens,
    )


def without_learner(
    session: Session, config: GVPOConfig, max_length: int, rewards: Rewards | None
) -> tuple[EngineGroup, VerifierGroup]:
    """Start engines with the weights of model.path, and verifiers, on a session; return both."""

    async def fail(error: BaseException) -> None:
        """Do nothing: the error is already the session's cause."""

    make = engine_maker(
        config.model.model_copy(update={"max_length": max_length}),
        config.engines,
        config.seed,
        True,
        None,
        rollout=rollout_of(session, config, _note, _say),
        num_completions=config.sampling.num_completions,
        serve=serve_of(session, config),
    )
    engines = EngineGroup(config.engines, config.sampling.num_completions, make, None, _note)
    session.on_stop(engines.close)
    verifiers = VerifierGroup(config.verifiers, rewards, _note, _say)
    session.on_stop(verifiers.close)
    session.spawn(engines.run(), fail)
    return engines, verifiers


def _say(line: str) -> None:
    print(visible(line), file=sys.stderr)


def _note(who: str, name: str, why: str) -> None:
    _say(f"recovery of {name}: {why}")


async def run_through(
    prompts: pa.Table,
    engines: EngineGroup,
    verifiers: VerifierGroup,
    sampling: SamplingConfig,
    min_version: int,
    seed: int | None = None,
    on_done: Callable[[pa.Table], None] = lambda group: None,
    references: ReferenceGroup | None = None,
) -> pa.Table:
    """Sample and verify every row once; return the scored rows in their order.

    It may run beside a training, which waits for it.

    Args:
        prompts: rows with groups.PROMPT_COLUMNS.
        engines: sample; only engines of our own are used, not servers.
        verifiers: score.
        sampling: number of completions, temperature, and so on.
        min_version: oldest version of the weights that may sample.
        seed: makes every prompt's samples reproducible, by a seed per prompt; None: unseeded.
        on_done: called with each scored group as it arrives.
        references: add the log-probs of another model that is the reference.

    Raises:
        ConfigError: there is no engine of our own.
    """
    if all(not slot.is_ours for slot in engines.slots):
        raise ConfigError(NO_OWN)

    async def one(i: int) -> pa.Table:
        own_seed = (
            None
            if seed is None
            else prompt_seed(seed, prompts["dataset"][i].as_py(), prompts["group_id"][i].as_py())
        )
        # Negative ids keep them apart from the groups of a training that the engines also have.
        prompt = groups.with_columns(prompts.slice(i, 1), group_id=[-1 - next(_numbers)])
        while True:
            try:
                sampled = await engines.sample(prompt, sampling, min_version, own_seed, only_ours=True)
                result = await verifiers.score(sampled)
                result = result if references is None else await references.score(result)
                scored = groups.from_wire(await result)
                break
            except RayError as error:
                if not is_lost(error):
                    raise
        scored = groups.with_columns(scored, group_id=[prompts["group_id"][i].as_py()])
        on_done(scored)
        return scored

    async with asyncio.TaskGroup() as tasks:
        scored = [tasks.create_task(one(i)) for i in range(len(prompts))]
    return pa.concat_tables([task.result() for task in scored])


NO_OWN = "engines.num: no engine of our own is there to sample with"

_numbers = itertools.count()


def prompt_seed(seed: int, dataset: str, group_id: int) -> int:
    """Return the seed of one prompt's samples, in 48 bits.

    vLLM gives sample i of a request the seed + i. So seeds of neighbouring prompts must lie far apart, or
    their samples would use the same random numbers. The same prompt of the same set has the same seed for
    every model, which narrows paired differences.
    """
    return int.from_bytes(hashlib.sha256(json.dumps([seed, dataset, group_id]).encode()).digest()[:6], "big")
