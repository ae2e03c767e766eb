"""Metric names, and how they are computed from groups. Every number a run reports is named here or in
losses/.

    reward/mean, reward/std          over the verifiable completions of the step's batch
    groups/size_mean                 completions with a reward, per group
    groups/untrainable               groups with fewer than two of them (counted, not trained on)
    completions/correct              share of completions that are right: by the first reward function, more
                                     than 0
    completions/unverifiable         share of completions without a reward; why, as shares of all completions,
                                     in
    unverifiable/timeout, /memory, /crash   a limit of the verifier's child was hit, or it died
    unverifiable/other               no gold answer, or a reward function that failed or gave None
    completions/length_mean          tokens
    completions/truncated            share that reached max_tokens
    sources/policy, /replay, /offline    share of the completions by where they are from;
                                         sources/offline:<name> of each
    groups/size_histogram/EDGE       share of the groups with so many completions with a reward: from the edge
                                     before to this one
    staleness/histogram/EDGE         share of our own completions by staleness: from the edge before to this
                                     one (STALENESS_EDGES, then inf)
    gvpo/residual_var/EDGE           mean squared residual of the trained completions of that staleness, each
                                     counted once (gvpo/residual_var weighs groups alike);
                                     gvpo/residual_var/foreign: of completions that no version of ours wrote
    staleness/mean, staleness/max    steps between the oldest weights that wrote a completion and the step's
                                     start
    tokens/trained                   completion tokens of the trained groups
    loss, gvpo/*, policy/*           losses/gvpo.py, over all mini-batches of the step
    grad_norm                        before clipping, mean over the step's updates
    learning_rate, updates           of the step; optimizer updates since the run began
    updates/skipped                  of the step's updates, those whose gradient was not a number (not in
                                     loss, gvpo/*, policy/*)
    gvpo/beta                        of the step (loss.beta: auto adapts it)
    policy/clipped                   share of tokens whose gradient clipping set to zero (objectives other
                                     than gvpo)
    time/step                        seconds from the learner's asking for the batch to its weights being
                                     published
    time/wait_for_groups             of these, seconds the learner had no batch
    time/train, time/publish         of these, passes and updates; gathering and publishing weights
    weights/bytes                    of one version
    weights/copy_s, weights/pause_s  seconds of an engine's newest weight update: while it generated on, and
                                     while it did not
    weights/parity_mean, /parity_max difference of its log-probs from the learner's in nats per token, where
                                     that update was checked
    tokens/generated, tokens/generated_per_s    by all engines since the step before, evaluations included
    pools/<name>/engines, /tokens_per_s, /token_share    running engines of a pool; what they wrote, and their
                                                         share of what all wrote
    recoveries/engine, /verifier, /learner, /buffer, /driver    deaths that the run has survived so far
                                                                (events.jsonl says which and why)
    verifiers/num                    verifier actors
    prompts/quarantined              prompts on which every check hit its limit: not sampled again
                                     (quarantine.jsonl)
    eval/<name>/pass@1               share of right completions, mean over the held-out prompts; pass@k beside
                                     it where there are k samples
    eval/<name>/stderr               of pass@1, over prompts
    eval/<name>/extracted            share of completions in which an answer was found (1 where no reward
                                     function looks for one)
    eval/<name>/length_mean, truncated, unverifiable, num_prompts
"""

from __future__ import annotations

import bisect
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gvpo_ray.groups import NO_ANSWER, Row


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean; 0.0 of nothing."""
    return math.fsum(values) / len(values) if values else 0.0


def batch_metrics(rows: Sequence[Row], version: int) -> dict[str, float]:
    """What a batch of groups says by itself, before it is trained on by weights of `version`."""
    rewards = [reward for row in rows for reward in row["rewards"] if reward is not None]
    total = sum(len(row["rewards"]) for row in rows)
    sizes = [sum(reward is not None for reward in row["rewards"]) for row in rows]
    ages = [version - oldest for row in rows for oldest in row["version_min"] if oldest is not None]
    average = mean(rewards)
    sources = Counter(source for row in rows for source in row.get("sources") or ())
    offline = sum(number for source, number in sources.items() if source.startswith("offline:"))
    return {
        "reward/mean": average,
        "reward/std": math.sqrt(mean([(reward - average) ** 2 for reward in rewards])),
        "groups/size_mean": mean(sizes),
        "groups/untrainable": float(sum(size < 2 for size in sizes)),
        "completions/correct": sum(sum(is_correct(row)) for row in rows) / max(1, total),
        "completions/unverifiable": 1 - len(rewards) / max(1, total),
        **{f"unverifiable/{kind}": count / max(1, total) for kind, count in _unverifiable(rows).items()},
        "completions/length_mean": mean([len(ids) for row in rows for ids in row["completion_ids"]]),
        "completions/truncated": mean(
            [reason == "length" for row in rows for reason in row["finish_reasons"]]
        ),
        "staleness/mean": mean(ages),
        "staleness/max": float(max(ages, default=0)),
        **_histogram("staleness/histogram", ages),
        **_histogram("groups/size_histogram", sizes),
        **{
            f"sources/{name}": sources[name] / max(1, total)
            for name in ("policy", "replay", *sorted(set(sources) - {"policy", "replay"}))
        },
        "sources/offline": offline / max(1, total),
    }


STALENESS_EDGES = (0, 1, 2, 4, 8, 16, 32, 64)
"""The largest of each bucket; one more is open."""


def age_bucket(version_min: int | None, version: int) -> int:
    """Index of the staleness bucket of a completion; the last, after the open one, is for those that no
    version of ours wrote.
    """
    return (
        len(STALENESS_EDGES) + 1
        if version_min is None
        else bisect.bisect_left(STALENESS_EDGES, version - version_min)
    )


def _histogram(name: str, values: Sequence[int]) -> dict[str, float]:
    counts = Counter(bisect.bisect_left(STALENESS_EDGES, value) for value in values)
    return {
        f"{name}/{edge}": counts[i] / max(1, len(values)) for i, edge in enumerate((*STALENESS_EDGES, "inf"))
    }


def _unverifiable(rows: Sequence[Row]) -> dict[str, int]:
    """Completions without a reward, by what their reason begins with."""
    counts = dict.fromkeys(("timeout", "memory", "crash", "other"), 0)
    for row in rows:
        for reward, reason in zip(
            row["rewards"], row.get("reward_reasons") or [None] * len(row["rewards"]), strict=True
        ):
            if reward is None:
                kind = str(reason).partition(":")[0]
                counts[kind if kind in counts else "other"] += 1
    return counts


BINDING_STEPS, BINDING_SHARE = 20, 0.01


def beta_hint(lines: Sequence[Mapping[str, Any]]) -> str | None:
    """What to say of training lines in the last BINDING_STEPS of which beta bound next to nothing, or all
    that there was; None: nothing.
    """
    recent = lines[-BINDING_STEPS:]
    rewards, implied, fit = (
        mean([line[f"gvpo/{name}"] for line in recent])
        for name in ("reward_var", "implicit_reward_var", "reward_correlation")
    )
    if len(recent) < BINDING_STEPS or rewards == 0:
        return None  # no signal at all: nothing that beta could be compared with
    beta = recent[-1]["gvpo/beta"]
    if implied > rewards and fit < 0.5:
        # What D says besides the rewards is where the policy went for no reason, or for those of other
        # prompts, and beta wants all of it undone.
        fitting = beta * math.sqrt(rewards / implied) / 2
        return (
            f"in {BINDING_STEPS} steps the policy went further than the rewards sent it: beta ({beta:g}) "
            f"times its log-ratios varies {math.sqrt(implied / rewards):.1f} times as much as they do, with "
            f"a correlation of {fit:.2f}, so most of what is learned is to go back; a smaller "
            f"learner.learning_rate keeps it nearer, or loss.beta of some {fitting:.2g} lets it go"
        )
    if any(line["gvpo/binding"] >= BINDING_SHARE for line in recent) or beta != recent[0]["gvpo/beta"]:
        return None  # one that is steered gets there by itself
    start = (
        f"in {BINDING_STEPS} steps beta ({beta:g}) bound hardly any completion (gvpo/binding "
        f"{recent[-1]['gvpo/binding']:.3f})"
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


def is_correct(row: Row) -> list[bool]:
    """Whether each completion of a group is right: by the first reward function, more than 0. Unverifiable
    ones count as wrong.
    """
    parts = row.get("reward_parts")
    first = next(iter(parts.values())) if parts else row["rewards"]
    return [
        reward is not None and part is not None and part > 0
        for reward, part in zip(row["rewards"], first, strict=True)
    ]


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples is right, from n of which c are: 1 - C(n - c, k)
    / C(n, k).

    Chen et al. 2021 (arXiv 2107.03374), equation 1.
    """
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def bootstrap_interval(
    values: Sequence[float], confidence: float = 0.95, num_resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the mean of `values` (one per prompt), by resampling them."""
    if not values:
        return 0.0, 0.0
    data, generator = np.asarray(values, dtype=np.float64), np.random.default_rng(seed)
    # Of a resample only the counts matter, and of the values only the distinct ones, which are few: right or
    # wrong.
    levels, counts = np.unique(data, return_counts=True)
    means = generator.multinomial(len(data), counts / len(data), size=num_resamples) @ levels / len(data)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def evaluation_metrics(name: str, rows: Sequence[Row], pass_k: Sequence[int] = (1,)) -> dict[str, float]:
    """One held-out set: pass@k as the mean over prompts, for every k that all of them have samples for."""
    correct = [is_correct(row) for row in rows]
    per_prompt = [mean(row) for row in correct]
    average = mean(per_prompt)
    variance = math.fsum((value - average) ** 2 for value in per_prompt) / max(1, len(per_prompt) - 1)
    fewest = min(map(len, correct), default=1)
    total = max(1, sum(map(len, correct)))
    reasons = [reason for row in rows for reason in row.get("reward_reasons") or []]
    return {
        f"eval/{name}/pass@1": average,
        **{
            f"eval/{name}/pass@{k}": mean([pass_at_k(len(row), sum(row), k) for row in correct])
            for k in pass_k
            if 1 < k <= fewest
        },
        f"eval/{name}/stderr": math.sqrt(variance / max(1, len(per_prompt))),
        f"eval/{name}/num_prompts": float(len(per_prompt)),
        f"eval/{name}/extracted": 1 - sum(NO_ANSWER in (reason or "") for reason in reasons) / total,
        f"eval/{name}/length_mean": mean([len(ids) for row in rows for ids in row["completion_ids"]]),
        f"eval/{name}/truncated": mean(
            [reason == "length" for row in rows for reason in row["finish_reasons"]]
        ),
        f"eval/{name}/unverifiable": mean([reward is None for row in rows for reward in row["rewards"]]),
    }
