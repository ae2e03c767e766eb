"""Advice says in one line why a run learns nothing, from its data, its config and its first metrics."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from gvpo_ray.config.run import GVPOConfig
from gvpo_ray.config.verifiers import ReasonKind, VerifiersConfig
from gvpo_ray.observe.metrics import mean

FIRST_STEPS = 2
"""Number of steps after which a run is judged; a shorter run is judged at its end."""

NEARLY_ALL, MOST = 0.9, 0.5
"""Share of groups without a signal from which nothing is learned, and share that makes a likely cause."""

SMALLEST_REACH = 1e-6
"""Way of a weight over a whole run below which the policy stays as it is.

Weights are of the order of 0.02, where neighbouring bfloat16 numbers are 1e-4 apart.
"""


WORKED = re.compile(r"####|\\boxed\b")
"""What shows that a gold is a worked solution with its answer in it, as in GSM8K and MATH."""

WORKED_OUT = re.compile(r"^(?!\s*\\boxed\{[^{}]*\}\s*$).*?(?:####|\\boxed\b)", re.DOTALL)
"""The same, but for a gold that is a box alone: `numeric` reads the number in it."""

WHOLE = re.compile(r"^[+-]?\d+\.0+$")
"""A whole number as a column of floats writes it; a completion writes it without the zeros."""

TESTS = re.compile(
    r'^\s*[\[{].{0,80}?"(?:inputs?|outputs?|fn_name|testtype)"\s*:|^\s*(?:\["\s*)?(?:assert\b|def check\()',
    re.DOTALL,
)
"""How a gold begins that is the tests of a program, as in APPS, TACO, Eurus, MBPP and HumanEval."""


def golds_out_of_reach(golds: Sequence[str], verifiers: VerifiersConfig, key: str) -> str | None:
    """Return why no completion can match many of a data set's golds; None: nothing shows that.

    Args:
        golds: the gold answers.
        verifiers: the config's section.
        key: the section of the data set in the config.
    """
    functions = {reward.function or name for name, reward in verifiers.rewards.items()}
    worked = "are worked solutions"
    programs = "are tests of programs", "code in verifiers.rewards runs programs against them"
    alone = f"name a column of the answers alone in {key}.answer_column, or use math in verifiers.rewards"
    for pattern, name, why, way_out in (
        *((TESTS, name, *programs) for name in ("exact_match", "numeric", "math")),
        (WORKED, "exact_match", worked, alone),
        (WORKED_OUT, "numeric", worked, alone),
        (
            WHOLE,
            "exact_match",
            "are whole numbers with zeros behind the point, which completions do not write",
            f"use numeric or math in verifiers.rewards, or text in {key}.answer_column",
        ),
    ):
        found = [gold for gold in golds if pattern.search(gold)]
        if name in functions and len(found) > (1 - NEARLY_ALL) * len(golds):
            shown = " ".join(found[0].split())
            shown = repr(shown if len(shown) <= 30 else f"…{shown[-29:]}")
            return (
                f"{key}: {name} cannot match {len(found)} of {len(golds)} gold answers, which {why} (such as "
                f"{shown}): {way_out}"
            )
    return None


class FirstSteps:
    """FirstSteps gets each training line of a process, and says once, after the first ones, what is wrong.

    Args:
        config: the run's.
    """

    def __init__(self, config: GVPOConfig) -> None:
        self._config, self._lines = config, list[Mapping[str, Any]]()

    def judge(self, line: Mapping[str, Any]) -> str | None:
        """Return a line for the user after the last of the first steps, where they learn nothing."""
        # A step that another process trained may have no metrics (GroupBuffer.trained).
        if len(self._lines) == FIRST_STEPS or "completions/unverifiable" not in line:
            return None
        self._lines.append(line)
        return why_nothing_is_learned(self._lines, self._config)


def why_nothing_is_learned(lines: Sequence[Mapping[str, Any]], config: GVPOConfig) -> str | None:
    """Return why a run cannot learn, and the key to change; None: it can, or it is too early.

    Args:
        lines: the lines of metrics.jsonl of the first training steps, up to FIRST_STEPS of them.
        config: the run's.
    """
    if len(lines) < min(FIRST_STEPS, config.num_steps):
        return None
    means = {
        name: mean([line[name] for line in lines])
        for name in lines[0]
        if all(isinstance(line.get(name), (int, float)) for line in lines)
    }
    cause = (
        _nothing_verifiable(means, config)
        # equal rewards are distillation where another model is the reference
        or (None if config.loss.reference_model else _rewards_are_equal(means, config))
        or _weights_stay(means, config)
    )
    if cause is None:
        return None
    steps = f"{len(lines)} steps show" if len(lines) > 1 else "the first step shows"
    return f"this run cannot learn as it is, {steps}: {cause}"


def _nothing_verifiable(means: Mapping[str, float], config: GVPOConfig) -> str | None:
    share, verifiers = means["completions/unverifiable"], config.verifiers
    if share < NEARLY_ALL:
        return None
    reasons = {
        ReasonKind.TIMEOUT: f"most checks take longer than verifiers.timeout_s ({verifiers.timeout_s:g}) or "
        f"verifiers.cpu_s ({verifiers.cpu_s}): raise them, or use a faster function in verifiers.rewards",
        ReasonKind.MEMORY: f"most checks need more than verifiers.memory_gib ({verifiers.memory_gib:g})",
        ReasonKind.CRASH: "most checks crash: look at the functions in verifiers.rewards",
    }
    if means.get("unverifiable/untrained", 0.0) >= MOST:
        return (
            f"{share:.0%} of the completions have no reward; of most the policy sampled no token: "
            "trained_tokens is false for all that they hold"
        )
    most = max(reasons, key=lambda kind: means[f"unverifiable/{kind}"])
    text = (
        reasons[most]
        if means[f"unverifiable/{most}"] >= MOST
        else f"there is no gold answer in prompts.answer_column ({config.prompts.answer_column}), or a "
        f"function in verifiers.rewards ({', '.join(verifiers.rewards)}) fails on it"
    )
    return f"{share:.0%} of the completions have no reward; {text}"


def _rewards_are_equal(means: Mapping[str, float], config: GVPOConfig) -> str | None:
    equal, right, cut = (
        means[name] for name in ("groups/equal", "completions/correct", "completions/truncated")
    )
    if equal < NEARLY_ALL:
        return None
    start = f"all rewards are equal in {equal:.0%} of the groups"
    if right >= NEARLY_ALL:
        return f"{start}, and {right:.0%} of the completions are right; use harder problems in prompts.path"
    if cut >= MOST:
        return (
            f"{start}, and {cut:.0%} of the completions are cut off; raise sampling.max_tokens "
            f"({config.sampling.max_tokens})"
        )
    if means["completions/length_mean"] < 2:
        return (
            f"{start}, and the completions are empty; prompts.template is not the format that this model "
            "was trained on"
        )
    if 1 - means["completions/extracted"] >= MOST:
        return (
            f"{start}, and no answer was found in {1 - means['completions/extracted']:.0%} of the "
            "completions; say in prompts.system_prompt or prompts.template how the answer must be written, "
            f"or use other functions than {', '.join(config.verifiers.rewards)} in verifiers.rewards"
        )
    if right <= 1 - NEARLY_ALL:
        return (
            f"{start}, and {1 - right:.0%} of the completions are wrong; use easier problems in "
            f"prompts.path, or a larger sampling.num_completions ({config.sampling.num_completions})"
        )
    return (
        f"{start}, though they differ between prompts; raise sampling.num_completions "
        f"({config.sampling.num_completions}) or sampling.temperature ({config.sampling.temperature:g})"
    )


def _weights_stay(means: Mapping[str, float], config: GVPOConfig) -> str | None:
    """Return a cause where no weight can move: AdamW moves one by about the learning rate in an update."""
    if means["updates/skipped"]:
        return None  # the lines of the steps say so
    damping, learner = means["gvpo/damping"], config.learner
    num_updates = config.num_steps * learner.num_mini_batches
    peak = learner.learning_rate * min(1.0, config.num_steps / (learner.warmup_steps + 1))
    if peak * damping * num_updates >= SMALLEST_REACH:
        return None
    start = f"no weight moves by more than {peak * damping * num_updates:.0e} in {num_updates} updates"
    if peak * num_updates >= SMALLEST_REACH:
        return (
            f"{start}, because the rewards explain nothing of the residuals (gvpo/damping {damping:.0e}): "
            "the data is too old for this policy, or not its own; try loss.damped: false, or newer data"
        )
    if learner.learning_rate * num_updates >= SMALLEST_REACH:
        return f"{start}; learner.warmup_steps ({learner.warmup_steps}) is longer than the run"
    return f"{start}; raise learner.learning_rate ({learner.learning_rate:g})"


class ParityNoise:
    """ParityNoise gets each training line, and says once that engines and learner differ more than expected.

    Args:
        config: the run's.
    """

    def __init__(self, config: GVPOConfig) -> None:
        pools = [pool for pool in config.engines.all_pools().values() if pool.url is None]
        self._noise = max((pool.parity_noise(config.model.dtype) for pool in pools), default=math.inf)
        self._was_said = False

    def judge(self, line: Mapping[str, Any]) -> str | None:
        """Return a line for the user where rounding is larger than it should be, and no reason to stop."""
        mean_nats = line.get("weights/parity_mean") or 0.0
        if self._was_said or mean_nats <= self._noise:
            return None
        self._was_said = True
        return (
            f"engines and learner differ by {mean_nats:.2g} nats per token at the same weights, more than "
            f"rounding should ({self._noise:g}): the run goes on; engines.quantization, engines.dtype or a "
            "kernel of the model may be why, and engines.parity_tolerance stops a run"
        )


HINT_STEPS, ACTIVE_SHARE = 20, 0.01
"""Steps after which advice on beta is given, and the gvpo/kl_active_share below which beta is too small."""


def beta_hint(lines: Sequence[Mapping[str, Any]]) -> str | None:
    """Return advice where beta was far too small or far too large in the last HINT_STEPS training lines.

    None: beta seems right, is adapted, or there are too few lines or no differences of rewards.
    """
    recent = lines[-HINT_STEPS:]
    rewards, implied, fit = (
        mean([line[f"gvpo/{name}"] for line in recent])
        for name in ("reward_var", "implicit_reward_var", "reward_correlation")
    )
    if len(recent) < HINT_STEPS or rewards == 0:
        return None  # equal rewards say nothing about beta
    beta = recent[-1]["gvpo/beta"]
    if implied > rewards and fit < 0.5:
        # The log-ratios vary more than the rewards and follow them little: most of the update only undoes
        # earlier drift.
        fitting = beta * math.sqrt(rewards / implied) / 2
        return (
            f"in {HINT_STEPS} steps the policy went further than the rewards sent it: beta ({beta:g}) "
            f"times its log-ratios varies {math.sqrt(implied / rewards):.1f} times as much as they do, with "
            f"a correlation of {fit:.2f}, so most of what is learned is to go back; a smaller "
            f"learner.learning_rate keeps it nearer, or loss.beta of some {fitting:.2g} lets it go"
        )
    if any(line["gvpo/kl_active_share"] >= ACTIVE_SHARE for line in recent) or beta != recent[0]["gvpo/beta"]:
        return None  # a beta that is adapted gets there by itself
    start = (
        f"in {HINT_STEPS} steps beta ({beta:g}) counted in hardly any residual (gvpo/kl_active_share "
        f"{recent[-1]['gvpo/kl_active_share']:.3f})"
    )
    if implied == 0:
        return (
            f"{start}: every log-ratio is 0, as with one mini-batch per step of fresh data; use "
            "learner.num_mini_batches of 2 or more"
        )
    fitting = beta * math.sqrt(0.01 * rewards / implied)
    return (
        f"{start}: nothing holds the policy near its reference; loss.beta of some {fitting:.2g} would, "
        "at this learning rate"
    )
