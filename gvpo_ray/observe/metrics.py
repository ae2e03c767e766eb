"""All metrics are registered here, and those of a batch and of an evaluation are computed.

A new metric is one line of METRICS. Its name in Ray and Prometheus, its place and caption in the report and
the description of its Grafana panel come from that line.
"""

from __future__ import annotations

import bisect
import functools
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gvpo_ray.groups import NO_ANSWER, Row, broken_episodes, limit_of, untrained_completions
from gvpo_ray.observe.episodes import episode_metrics, tries_of


@dataclass(frozen=True)
class Metric:
    """A Metric describes a metric of metrics.jsonl, or the quotient of two, which only the report draws."""

    name: str
    """Key in metrics.jsonl. `{set}` is a free part, which becomes a label in Prometheus."""
    unit: str
    """Unit, or "" for a plain number. Those in SUFFIXES end the name in Prometheus."""
    label: str
    """Short title for people."""
    text: str
    """Caption: what the metric measures."""
    section: str = ""
    """Section of the report: "curves", "terms", "histograms" or "engines"; "": that of all other metrics."""
    chart: str = ""
    """Title of the chart that the metric shares with others; "": it has a chart of its own."""
    series: str = ""
    """Name in Prometheus without `gvpo_`, where it does not follow from `name` and `unit`."""

    @functools.cached_property
    def pattern(self) -> re.Pattern[str]:
        """Return the pattern of the keys of metrics.jsonl that are this metric; each free part is a group."""
        parts = re.split(r"\{(\w+)\}", self.name)
        return re.compile(
            "".join(
                (rf"(?P<{part}>\d+)" if part == "k" else f"(?P<{part}>.+)") if i % 2 else re.escape(part)
                for i, part in enumerate(parts)
            )
        )


SUFFIXES = {
    "ratio": "ratio",
    "nats": "nats",
    "steps": "steps",
    "tokens": "tokens",
    "s": "seconds",
    "tokens/s": "per_second",
    "bytes": "bytes",
}
"""Ends of names in Prometheus, by unit."""

CURVES, TERMS, HISTOGRAMS, ENGINES = "curves", "terms", "histograms", "engines"
THREE_TERMS, VARIANCES = "Three terms of the loss", "Variances within the group"

METRICS = (
    Metric("reward/mean", "", "Reward", "mean over the verifiable completions of the step's batch", CURVES),
    Metric("eval/{set}/pass@{k}", "ratio", "pass@{k}",
           "share of right completions, mean over the held-out prompts; band: one standard error up and down",
           CURVES, "pass@k of {set}"),
    Metric("loss", "", "Loss", "of the configured objective, over all mini-batches of the step", CURVES),
    Metric("gvpo/residual_var", "", "residual",
           "what of the reward's variance the policy does not explain: 0 at the optimum", CURVES, VARIANCES),
    Metric("gvpo/reward_var", "", "reward", "what there is to explain", CURVES, VARIANCES),
    Metric("gvpo/implicit_reward_var", "", "implicit reward",
           "of βD: what the policy says", CURVES, VARIANCES),
    Metric("policy/kl_ref", "nats", "KL to the reference", "KL(reference || policy) per completion", CURVES),
    Metric("grad_norm", "", "Gradient norm", "before clipping, mean over the step's updates", CURVES),
    Metric("time/wait_for_groups / time/step", "ratio", "Learner waiting",
           "share of the step in which the learner had no batch", CURVES),
    Metric("tokens/trained / time/step", "tokens/s", "Training speed",
           "completion tokens trained per second", CURVES),
    Metric("pools/{pool}/tokens_per_s", "tokens/s", "Sampling speed by pool",
           "completion tokens that the engines of each "
           "pool wrote per second", CURVES, series="pool_tokens_per_second"),
    Metric("staleness/mean", "steps", "Staleness",
           "from the oldest weights that wrote a completion to the step's start, mean", CURVES),
    Metric("gvpo/residual_var/{staleness}", "", "Residual variance by staleness",
           "mean squared residual of the trained completions of each staleness; external: no version of ours "
           "wrote them", CURVES, series="residual_var_by_staleness"),
    Metric("gvpo/term_reward", "", "reward",
           "The advantage term, Cov(R, log π): raises the log-probability of the completions that are better "
           "than their group's mean.", TERMS, THREE_TERMS),
    Metric("gvpo/term_reference", "", "reference",
           "The covariance with the reference, β Cov(log π_ref, log π): keeps the order of the completions "
           "as the reference has it.", TERMS, THREE_TERMS),
    Metric("gvpo/term_variance", "", "variance",
           "The variance, −β/2 Var(log π): holds the completions' log-probabilities together, so that none "
           "runs away from the others.", TERMS, THREE_TERMS),
    Metric("gvpo/reward_correlation", "", "Reward correlation",
           "of the implicit reward βD with the reward: 1 at the optimum", TERMS),
    Metric("gvpo/kl_active_share", "ratio", "KL active",
           "share of the residuals in which β counts: near 0, nothing "
           "holds the policy near its reference", TERMS),
    Metric("gvpo/beta", "", "β",
           "reward units per nat of log-ratio; loss.beta: auto adapts it until βD varies half as much as the "
           "rewards", TERMS),
    Metric("gvpo/effective_share", "ratio", "Effective share",
           "share of the completions that the current policy would still write", TERMS),
    Metric("gvpo/likelihood_floor", "ratio", "Likelihood floor",
           "what is left of the likelihood of right completions since they were sampled; below 1, wrong ones "
           "are pushed down less", TERMS),
    Metric("gvpo/damping", "ratio", "Damping",
           "factor on the learning rate: the share of the residuals that the rewards explain", TERMS),
    Metric("staleness/histogram/{edge}", "ratio", "Staleness",
           "shares of our own completions, by the steps between the oldest weights that wrote them and their "
           "training", HISTOGRAMS),
    Metric("groups/size_histogram/{edge}", "ratio", "Group sizes",
           "shares of the groups, by their number of completions with a reward", HISTOGRAMS),
    Metric("gvpo/residual_histogram/{edge}", "ratio", "Residuals",
           "shares of the completions by their residual, in units of reward: all "
           "in the middle at the optimum", HISTOGRAMS),
    Metric("pools/{pool}/engines", "", "Engines by pool",
           "running engines of each pool", ENGINES, series="pool_engines"),
    Metric("step", "", "Step", "steps trained so far"),
    Metric("reward/std", "", "Reward, standard deviation",
           "over the verifiable completions of the step's batch"),
    Metric("groups/size_mean", "", "Group size", "completions with a reward per group, mean"),
    Metric("groups/untrainable", "", "Untrainable groups",
           "groups with too few completions with a reward, which are not trained on: fewer than two where "
           "completions are compared"),
    Metric("groups/equal", "ratio", "Groups of equal rewards",
           "share of the groups with two or more rewards in which all are equal: they say nothing about "
           "what is better"),
    Metric("completions/correct", "ratio", "Right completions",
           "share for which the first reward function gave more than 0"),
    Metric("completions/extracted", "ratio", "Answers found",
           "share of the completions; 1 where no reward function looks for an answer"),
    Metric("completions/unverifiable", "ratio", "Unverifiable completions", "share without a reward"),
    Metric("unverifiable/{reason}", "ratio", "Unverifiable: {reason}",
           "share of all completions; timeout, memory and crash: limits of the verifier's child; untrained: "
           "the policy sampled none of its tokens; other: no gold answer, or a reward function that failed"),
    Metric("completions/length_mean", "tokens", "Completion length", "mean over the step's batch"),
    Metric("completions/truncated", "ratio", "Truncated completions", "share that reached max_tokens"),
    Metric("sources/{source}", "ratio", "Source: {source}",
           "share of the completions that came from this source"),
    Metric("staleness/max", "steps", "Staleness, largest",
           "from the oldest weights that wrote a completion to the step's start"),
    Metric("tokens/trained", "tokens", "Tokens trained",
           "of the trained groups' completions, those that the policy sampled"),
    Metric("policy/log_ratio_rms", "nats", "Log-ratio", "root mean square of log π/π_ref per completion"),
    Metric("policy/mismatch_mean", "nats", "Mismatch, mean",
           "learner's log-prob less the engine's, per token of what the current policy wrote"),
    Metric("policy/mismatch_rms", "nats", "Mismatch, rms",
           "learner's log-prob less the engine's, per token of what the current policy wrote; none where all "
           "is older, or the loss needs no log-probs of the sampler (preset paper, and most objectives but "
           "gvpo and those that clip)"),
    Metric("experts/replayed", "ratio", "Experts replayed",
           "share of completions that come with the experts that their engine chose; none where no one does"),
    Metric("experts/aux_loss", "", "Auxiliary loss",
           "of the experts' load, without its coefficient, mean over updates: the number of experts per "
           "token where the load is even (model.router_aux_loss); not part of `loss`"),
    Metric("policy/clipped", "ratio", "Clipped tokens",
           "share of the tokens whose gradient clipping set to zero (objectives other than gvpo)"),
    Metric("pairs/ordered", "ratio", "Pairs in order",
           "share of a group's pairs that the implicit reward orders as the rewards do; a tie is half (dpo)"),
    Metric("pairs/margin", "", "Margin of pairs", "mean difference of the implicit rewards of a pair (dpo)"),
    Metric("epa/positive_share", "ratio", "Positive's share",
           "probability of the positive among its candidates, mean over groups (epa)"),
    Metric("poft/weight", "ratio", "Weight of completions",
           "weight with which a completion is imitated, mean over completions (poft)"),
    Metric("gvpo/num_groups", "", "Groups trained", "groups in the loss of the step"),
    Metric("gvpo/num_singletons", "", "Singletons", "groups of one completion, whose loss is 0"),
    Metric("learning_rate", "", "Learning rate", "of the step"),
    Metric("updates", "", "Updates", "optimizer updates since the run began"),
    Metric("updates/skipped", "", "Skipped updates", "updates of the step whose gradient was not a number"),
    Metric("time/step", "s", "Step time",
           "from the learner's asking for the batch to its weights' being published"),
    Metric("time/wait_for_groups", "s", "Waiting", "part of the step in which the learner had no batch"),
    Metric("time/train", "s", "Training", "part of the step in forward and backward passes and updates"),
    Metric("time/publish", "s", "Publishing",
           "part of the step in which weights are gathered, and published unless a thread does that"),
    Metric("time/publish_behind", "s", "Publishing behind",
           "of the version before, in a thread, while the learner went on"),
    Metric("time/checkpoint", "s", "Checkpoint",
           "for which a checkpoint of the step before held training up; the last one's is not there"),
    Metric("weights/bytes", "bytes", "Bytes of one version",
           "what the step's weights added to the object store: the words that changed, or all weights"),
    Metric("weights/changed", "ratio", "Changed weights",
           "share of the words of 16 bits that the step's weights changed, as engines get them"),
    Metric("weights/copy_s", "s", "Weight copy", "of an engine's newest update, while it generated on"),
    Metric("weights/pause_s", "s", "Weight pause", "of an engine's newest update, while it did not generate"),
    Metric("weights/parity_mean", "nats", "Parity, mean",
           "difference of an engine's log-probs from the learner's per token, where an update was checked"),
    Metric("weights/parity_rms", "nats", "Parity, root mean square",
           "difference of an engine's log-probs from the learner's per token, where an update was checked: "
           "0.02 was published of bfloat16 engines and learners of 7B with heads in float32"),
    Metric("weights/parity_max", "nats", "Parity, largest",
           "difference of an engine's log-probs from the learner's per token, where an update was checked"),
    Metric("tokens/generated", "tokens", "Tokens generated",
           "by all engines since the step before, evaluations included"),
    Metric("tokens/generated_per_s", "tokens/s", "Sampling speed",
           "of all engines since the step before, evaluations included"),
    Metric("engines/prefix_cache_hit_rate", "ratio", "Prefix cache",
           "share of the tokens of prompts that vLLM's prefix cache held, over the requests of all engines "
           "since the step before: near (k - 1) / k of the whole blocks of a prompt for groups of k"),
    Metric("pools/{pool}/token_share", "ratio", "Tokens: pool {pool}",
           "share of what all engines wrote", series="pool_token_ratio"),
    Metric("recoveries/{who}", "", "Recoveries: {who}",
           "deaths that the run has survived so far; events.jsonl says which and why"),
    Metric("verifiers/num", "", "Verifiers", "verifier actors"),
    Metric("prompts/quarantined", "", "Quarantined prompts",
           "on which every check hit its limit; they are not sampled again"),
    Metric("episodes/turns_mean", "", "Turns", "of the policy per episode, mean over the step's batch"),
    Metric("episodes/tool_calls_mean", "", "Tool calls", "per episode, malformed ones included, mean"),
    Metric("episodes/tool_errors", "", "Tool errors",
           "calls of the step's batch that were malformed or failed; the policy reads why"),
    Metric("episodes/tool_hung", "", "Tool calls that hung",
           "calls of the step's batch without an answer within environment.timeout_s; the policy reads that"),
    Metric("episodes/tool_refused", "", "Tool calls not made",
           "calls of the step's batch beyond environment.max_calls in a turn; the policy reads that"),
    Metric("episodes/max_turns", "ratio", "Episodes out of turns",
           "share that environment.max_turns has ended"),
    Metric("episodes/no_room", "ratio", "Episodes out of room",
           "share that sampling.max_tokens or the context has ended"),
    Metric("episodes/renderer", "ratio", "Episodes that did not go on",
           "share that ended because environment.renderer's family cannot go on from what was written"),
    Metric("episodes/lost", "ratio", "Lost episodes",
           "share without a reward: the environment failed or its actor died"),
    Metric("episodes/broken", "ratio", "Broken environments",
           "share whose environment a tool call of the policy brought down: worth no more than their group"),
    Metric("eval/{set}/turns_mean", "", "Turns in {set}", "of the policy per episode, mean"),
    Metric("eval/{set}/tool_calls_mean", "", "Tool calls in {set}", "per episode, mean"),
    Metric("eval/{set}/tool_errors", "", "Tool errors in {set}", "calls that were malformed or failed"),
    Metric("eval/{set}/tool_hung", "", "Tool calls that hung in {set}", "calls without an answer in time"),
    Metric("eval/{set}/tool_refused", "", "Tool calls not made in {set}", "too many in a turn"),
    Metric("eval/{set}/max_turns", "ratio", "Episodes out of turns in {set}", "share"),
    Metric("eval/{set}/no_room", "ratio", "Episodes out of room in {set}", "share"),
    Metric("eval/{set}/renderer", "ratio", "Episodes that did not go on in {set}", "share"),
    Metric("eval/{set}/lost", "ratio", "Lost episodes in {set}", "share without a reward"),
    Metric("eval/{set}/broken", "ratio", "Broken environments in {set}", "share, by a tool call"),
    Metric("eval/{set}/stderr", "ratio", "Standard error of {set}", "of pass@1, over prompts"),
    Metric("eval/{set}/extracted", "ratio", "Answers found in {set}",
           "share of the completions; 1 where no reward function looks for an answer"),
    Metric("eval/{set}/length_mean", "tokens", "Completion length of {set}",
           "mean over the held-out prompts"),
    Metric("eval/{set}/truncated", "ratio", "Truncated completions of {set}",
           "share that reached max_tokens"),
    Metric("eval/{set}/unverifiable", "ratio", "Unverifiable completions of {set}", "share without a reward"),
    Metric("eval/{set}/num_prompts", "", "Prompts of {set}", "held-out prompts"),
)  # fmt: skip
"""All metrics, in the order in which the report shows them."""

_BY_NAME = {metric.name: metric for metric in METRICS}


@functools.lru_cache(maxsize=4096)
def find(name: str) -> tuple[Metric | None, dict[str, str]]:
    """Find the metric of a key of metrics.jsonl.

    Returns the metric and the values of its free parts; (None, {}) for a key that is not registered.
    """
    if name in _BY_NAME and "{" not in name:
        return _BY_NAME[name], {}
    for metric in METRICS:
        if "{" in metric.name and (match := metric.pattern.fullmatch(name)):
            return metric, match.groupdict()
    return None, {}


def mean(values: Sequence[float]) -> float:
    """Return the arithmetic mean; 0.0 where there are no values."""
    return math.fsum(values) / len(values) if values else 0.0


def batch_metrics(rows: Sequence[Row], version: int, least: int = 2) -> dict[str, float]:
    """Compute the metrics of a batch of groups that do not depend on training.

    Args:
        rows: the groups.
        version: the weights with which the step begins, from which staleness counts.
        least: fewest completions of a group that is trained on.
    """
    total = sum(len(row["rewards"]) for row in rows)
    rewards_of = [_known_rewards(row) for row in rows]
    rewards, sizes = [reward for known in rewards_of for reward in known], [len(x) for x in rewards_of]
    ages = [version - oldest for row in rows for oldest in row["version_min"] if oldest is not None]
    average = mean(rewards)
    sources = Counter(source for row in rows for source in row.get("sources") or ())
    offline = sum(number for source, number in sources.items() if source.startswith("offline:"))
    experts = [entry is not None for row in rows for entry in row.get("routed_experts") or ()]
    return {
        "reward/mean": average,
        "reward/std": math.sqrt(mean([(reward - average) ** 2 for reward in rewards])),
        "groups/size_mean": mean(sizes),
        "groups/untrainable": float(sum(size < least for size in sizes)),
        "groups/equal": mean([len(set(known)) == 1 for known in rewards_of if len(known) > 1]),
        "completions/correct": sum(sum(is_correct(row)) for row in rows) / max(1, total),
        "completions/extracted": _extracted(rows, total),
        "completions/unverifiable": 1 - len(rewards) / max(1, total),
        **{f"unverifiable/{kind}": count / max(1, total) for kind, count in _unverifiable(rows).items()},
        **_lengths("completions", rows),
        "staleness/mean": mean(ages),
        "staleness/max": float(max(ages, default=0)),
        **_histogram("staleness/histogram", ages),
        **_histogram("groups/size_histogram", sizes),
        **{
            f"sources/{name}": sources[name] / max(1, total)
            for name in ("policy", "replay", *sorted(set(sources) - {"policy", "replay"}))
        },
        "sources/offline": offline / max(1, total),
        **episode_metrics("episodes", rows),
        **({"experts/replayed": sum(experts) / max(1, total)} if experts else {}),
    }


STALENESS_EDGES = (0, 1, 2, 4, 8, 16, 32, 64)
"""Largest value of each bucket; one more bucket holds all larger values. Group sizes share the edges."""


def age_bucket(version_min: int | None, version: int) -> int:
    """Return the index of a completion's staleness bucket.

    External completions (version_min None) have a bucket of their own, after the one of all larger values.
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


def _lengths(name: str, rows: Sequence[Row]) -> dict[str, float]:
    return {
        f"{name}/length_mean": mean([len(ids) for row in rows for ids in row["completion_ids"]]),
        f"{name}/truncated": mean([why == "length" for row in rows for why in row["finish_reasons"]]),
    }


def _extracted(rows: Sequence[Row], total: int) -> float:
    """Return the share of `total` completions in which an answer was found, as far as one was looked for."""
    reasons = [reason or "" for row in rows for reason in row.get("reward_reasons") or []]
    return 1 - sum(NO_ANSWER in reason for reason in reasons) / max(1, total)


def _known_rewards(row: Row) -> list[float]:
    """Return the rewards of a group's completions, without those of which no token is trained."""
    untrained = untrained_completions(row)
    return [reward for i, reward in enumerate(row["rewards"]) if reward is not None and i not in untrained]


def _unverifiable(rows: Sequence[Row]) -> dict[str, int]:
    """Count the completions without a reward by the limit that their check hit, or as untrained."""
    counts = dict.fromkeys(("timeout", "memory", "crash", "untrained", "other"), 0)
    for row in rows:
        untrained = untrained_completions(row)
        counts["untrained"] += len(untrained)
        reasons = row.get("reward_reasons") or [None] * len(row["rewards"])
        for i, (reward, reason) in enumerate(zip(row["rewards"], reasons, strict=True)):
            if reward is None and i not in untrained:
                counts[limit_of(reason) or "other"] += 1
    return counts


def is_correct(row: Row) -> list[bool]:
    """Return for each completion of a group whether the first reward function gave more than 0.

    Completions without a reward count as wrong, and so do episodes whose environment a tool call brought
    down. A reward that a completion came with, so that no function was called, counts itself.
    """
    parts = row.get("reward_parts")
    first = next(iter(parts.values())) if parts else row["rewards"]
    return [
        reward is not None and (reward if part is None else part) > 0 and not is_broken
        for reward, part, is_broken in zip(row["rewards"], first, broken_episodes(row), strict=True)
    ]


def right_tries(row: Row) -> list[bool]:
    """Return for each try at a group's prompt whether it is right: whether one of its completions is.

    Only an agent's episode has several completions, its branches. They share its reward, which a branch that
    no group can hold lacks.
    """
    correct = is_correct(row)
    return [any(correct[i] for i in indices) for indices in tries_of(row)]


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Estimate without bias the chance that at least one of k samples is right.

    Of n samples c are right: 1 - C(n - c, k) / C(n, k) (Chen et al. 2021, arXiv 2107.03374, equation 1).
    """
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def bootstrap_interval(
    values: Sequence[float], confidence: float = 0.95, num_resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Return the bootstrap percentile interval of the mean of `values`, one per prompt; (0, 0) of none."""
    if not values:
        return 0.0, 0.0
    data, generator = np.asarray(values, dtype=np.float64), np.random.default_rng(seed)
    # The mean of a resample depends only on how often it has each distinct value, and there are few of these:
    # multinomial counts are enough.
    levels, counts = np.unique(data, return_counts=True)
    means = generator.multinomial(len(data), counts / len(data), size=num_resamples) @ levels / len(data)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def evaluation_metrics(name: str, rows: Sequence[Row], pass_k: Sequence[int] = (1,)) -> dict[str, float]:
    """Compute the metrics of one held-out set.

    pass@k is the mean over prompts, for each of `pass_k` that is at most the fewest tries at a prompt: an
    agent's episode is one try, however many branches it has. Lengths and the shares of completions that are
    cut off or without a reward are over completions, each branch counted.
    """
    correct = [right_tries(row) for row in rows]
    per_prompt = [mean(row) for row in correct]
    average = mean(per_prompt)
    variance = math.fsum((value - average) ** 2 for value in per_prompt) / max(1, len(per_prompt) - 1)
    fewest = min(map(len, correct), default=1)
    return {
        f"eval/{name}/pass@1": average,
        **{
            f"eval/{name}/pass@{k}": mean([pass_at_k(len(row), sum(row), k) for row in correct])
            for k in pass_k
            if 1 < k <= fewest
        },
        f"eval/{name}/stderr": math.sqrt(variance / max(1, len(per_prompt))),
        f"eval/{name}/num_prompts": float(len(per_prompt)),
        f"eval/{name}/extracted": _extracted(rows, sum(len(row["rewards"]) for row in rows)),
        **_lengths(f"eval/{name}", rows),
        f"eval/{name}/unverifiable": mean([reward is None for row in rows for reward in row["rewards"]]),
        **episode_metrics(f"eval/{name}", rows),
    }
