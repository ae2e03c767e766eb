"""`assemble` makes the parts of a run and connects them: the buffer, the engines, the verifiers and the loop.

    prompts ──► engines ──► verifiers ──► buffer ──► (learner) ──► weights, by way of the buffer

The learner comes afterwards, because it takes its batches from the buffer: GVPO.start starts Ray Train's
workers, and the scale benchmark and tests a fake one.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gvpo_ray.actors import EventCallback
from gvpo_ray.buffer.actor import BufferClient
from gvpo_ray.buffer.log import Quarantine
from gvpo_ray.config.environment import ENVIRONMENT
from gvpo_ray.config.run import GVPOConfig
from gvpo_ray.config.shown import know
from gvpo_ray.engines.actor import MakeEngine, engine_maker
from gvpo_ray.engines.pools import EngineGroup
from gvpo_ray.engines.rollout import Episodes, Rollout, one_call
from gvpo_ray.engines.serving import Serve
from gvpo_ray.environments.agent import read_agent
from gvpo_ray.environments.agent_pool import AgentGroup
from gvpo_ray.environments.contract import read_contract
from gvpo_ray.environments.pool import EnvironmentGroup
from gvpo_ray.files import kept_secret
from gvpo_ray.run.inputs import Inputs
from gvpo_ray.run.models import renderings_of, version_of
from gvpo_ray.run.rollouts import LineCallback, Ring
from gvpo_ray.run.session import Session
from gvpo_ray.verifiers.pool import VerifierGroup
from gvpo_ray.verifiers.references import ReferenceGroup
from gvpo_ray.verifiers.rewards import Rewards


@dataclass(frozen=True)
class Driver:
    """A Driver holds the callbacks by which the parts of a run reach the driver."""

    note: EventCallback
    """Called on every recovery."""
    say: LineCallback
    """Called with lines for the user."""
    state: Callable[[], dict[str, Any]]
    """Returns the driver's part of the status: step, num_steps, what it does, recoveries."""
    state_for_buffer: Callable[[], tuple[list[int], int, bool, str | None]]
    """Returns what the log does not tell a restarted buffer (see GroupBuffer.reconnect)."""
    placed: Callable[[], Awaitable[None]] | None = None
    """Awaited before the first engine takes its place in the cluster."""


@dataclass(frozen=True)
class Parts:
    """Parts holds a run's parts but for the learner. Nothing runs before `ring.run()` or `ring.watch()`."""

    buffer: BufferClient
    engines: EngineGroup
    verifiers: VerifierGroup | None
    """None: the run trains on recorded groups only."""
    ring: Ring


def assemble(
    session: Session,
    config: GVPOConfig,
    run_dir: Path,
    inputs: Inputs | None,
    driver: Driver,
    *,
    num_steps: int,
    version: int,
    quarantine: Quarantine,
    rewards: Rewards | None = None,
    make: MakeEngine | None = None,
) -> Parts:
    """Make the parts of a run; their actors end with the session.

    Args:
        session: runs the actors and the event loop.
        config: the run's.
        run_dir: folder of the log and of status.json.
        inputs: prompts and offline sources; None: there are neither engines nor verifiers, and the run trains
            on the groups that its log already has.
        driver: the driver's callbacks.
        num_steps: steps after which the run is complete.
        version: version of the weights that the learner starts from.
        quarantine: prompts that are not sampled again.
        rewards: reward functions that replace `verifiers.rewards`, by name.
        make: makes an engine's actor; default: vLLM's or a server's, as the config says.
    """
    buffer = BufferClient(
        driver.state_for_buffer,
        driver.note,
        run_dir / "groups",
        config.groups_per_step,
        num_steps,
        config.max_staleness,
        version,
        config.replay,
        takes_turns := inputs is not None and config.engines.colocated == "sleep",
    )
    model, engines, verifiers, references = config.model, config.engines, None, None
    rollout: Rollout | Episodes = one_call
    if inputs is None:
        engines = engines.model_copy(update={"num": 0, "max_num": None, "pools": {}})
    else:
        model = model.model_copy(update={"max_length": inputs.max_length})
        verifiers = VerifierGroup(config.verifiers, rewards, driver.note, driver.say)
        session.on_stop(verifiers.close)
        references = references_of(session, config, driver.note)
        rollout = rollout_of(session, config, driver.note, driver.say)
    pools = EngineGroup(
        engines,
        config.sampling.num_completions,
        make
        or engine_maker(
            model,
            engines,
            config.seed,
            False,
            config.prompts.system_prompt,
            config.prompts.template,
            rollout,
            num_completions=config.sampling.num_completions,
            serve=serve_of(session, config, run_dir),
        ),
        buffer.weights,
        driver.note,
        buffer.waits,
        driver.placed,
        buffer if takes_turns else None,
    )
    session.on_stop(pools.close)
    ring = Ring(
        inputs,
        pools,
        verifiers,
        buffer,
        quarantine,
        config.sampling,
        config.replay,
        config.watchdog_s,
        run_dir,
        driver.state,
        driver.note,
        driver.say,
        references,
    )
    return Parts(buffer, pools, verifiers, ring)


def references_of(session: Session, config: GVPOConfig, note: EventCallback) -> ReferenceGroup | None:
    """Start the actors of the other model that is the reference; None: a policy of the run is."""
    other = config.loss.reference_model
    if other is None:
        return None
    group = ReferenceGroup(other, renderings_of(config), note, version_of(other.model))
    session.on_stop(group.close)
    return group


def rollout_of(
    session: Session, config: GVPOConfig, note: EventCallback, say: Callable[[str], None]
) -> Rollout | Episodes:
    """Return what makes completions at engines: one call, or the config's environment, whose actors start."""
    if config.environment is None:
        return one_call
    if config.environment.asks_by_http:
        is_graded = [*config.verifiers.rewards] != [ENVIRONMENT]
        agent = read_agent(config.environment)
        environments: EnvironmentGroup = AgentGroup(config.environment, agent, is_graded, note, say)
    else:
        contract = read_contract(config.environment, config.verifiers)
        environments = EnvironmentGroup(config.environment, contract, note, say)
    session.on_stop(environments.close)

    async def fail(error: BaseException) -> None:
        """Do nothing: the error is already the session's cause."""

    session.spawn(environments.watch(), fail)
    return environments.episodes(config.model, config.rendered)


def serve_of(session: Session, config: GVPOConfig, run_dir: Path | None = None) -> Serve | None:
    """Return how a run's engines serve; None: they do not.

    Args:
        session: the run's.
        config: the run's.
        run_dir: folder that keeps the token for the run's owner; None: only the run itself asks the engines.
    """
    if not config.engines.serve:
        return None
    token = secrets.token_urlsafe(32)
    if run_dir is not None:
        token = kept_secret(run_dir / "serve_token", token)
    know({"token": token})
    return Serve(token, session.is_local, config.engines.serve_arguments)
