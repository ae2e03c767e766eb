"""The learner: what every Ray Train worker runs. A pure function of (initial weights, ordered log of groups).

    while the buffer orders it: batch(step) → reference → mini-batches: forward, GVPO loss, backward, update → publish

The algorithm is `train_step`; the loop around it waits for the buffer and is woken by it.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import torch
import torch.distributed as dist

from gvpo_ray import groups
from gvpo_ray.checkpoints import prune_checkpoints
from gvpo_ray.config import CheckpointConfig, LearnerConfig, LossConfig
from gvpo_ray.losses import OBJECTIVES, damping, finish, gvpo_loss, gvpo_weights, importance_weights
from gvpo_ray.metrics import STALENESS_EDGES, age_bucket, batch_metrics, mean
from gvpo_ray.policy import Policy, Row, sequence_sums

NUM_PROBES, PROBE_TOKENS = 4, 256
"""Sequences, and tokens of each, on which engines compare their log-probs with the learner's."""


class NonFiniteGradient(RuntimeError):
    """The gradient is not a number, time and again: the first cause is in those groups or in the learning rate."""


class Buffer(Protocol):
    """GroupBuffer as the learner sees it: calls that wait."""

    def learner_started(self, step: int) -> None: ...
    def order(self, step: int, saved: bool) -> str: ...
    def batch(self, step: int) -> pa.Table | None: ...
    def learned(self, version: int, references: dict[int, list[float | None]], residuals: dict[int, list[float | None]]) -> None: ...
    def published(self, version: int, weights: Any, metrics: dict[str, Any] | None) -> None: ...
    def saved(self, step: int) -> None: ...


class Publisher(Protocol):
    """The learner's end of weights.py."""

    def publish(self, version: int, named_tensors: Any) -> dict[str, Any] | None: ...


@dataclass
class Settings:
    """The parts of the config that the learner needs."""

    run_dir: str
    num_steps: int
    """Of the learning rate's schedule."""
    last_step: int
    """After which there is nothing left to train: it gets a checkpoint."""
    loss: LossConfig
    learner: LearnerConfig
    checkpoint: CheckpointConfig
    model_path: str
    parity_every: int
    reports_residuals: bool = False
    """Whether somebody replays completions and chooses them by what a step learned of them."""


def learn(
    policy: Policy,
    buffer: Buffer,
    publisher: Publisher,
    settings: Settings,
    on_checkpoint: Callable[[dict[str, Any]], None] = lambda metrics: None,
) -> None:
    """Train until the buffer says stop.

    Waits for the buffer's orders (woken by the driver's allow and save) and batches (woken by finished groups). Rank 0 talks back for all,
    but for what was learned of single completions: that each rank tells of its own groups. `on_checkpoint(metrics)` is called on every rank
    after each checkpoint that was due.
    """
    if policy.rank == 0:
        buffer.learner_started(policy.step)
    if settings.loss.reference == "initial" and not policy.has_reference:
        policy.load_reference(settings.model_path)
    rows: list[Row] = []
    publish(policy, buffer, publisher, settings, rows, metrics=None)
    saved = policy.step > 0
    while (order := buffer.order(policy.step + 1, saved)) != "stop":
        if order == "save":
            save(policy, buffer, settings)
            saved = True
            continue
        asked = time.perf_counter()
        table = buffer.batch(policy.step + 1)
        if table is None:
            break
        got = time.perf_counter()
        rows = list(groups.rows(groups.validate(table, groups.LOGGED_COLUMNS)))
        metrics = train_step(policy, rows, settings)
        trained = time.perf_counter()
        if settings.reports_residuals:
            own = [row for row in rows if "residuals" in row]
            references = {row["group_id"]: row["reference_logprobs"] for row in own if settings.loss.asks_reference_model_for_sums}
            buffer.learned(policy.reference_version, references, {row["group_id"]: row["residuals"] for row in own})
        publish(policy, buffer, publisher, settings, rows, metrics, times={"wait": got - asked, "train": trained - got, "since": asked})
        saved = policy.step % settings.checkpoint.every == 0 or policy.step == settings.last_step
        if saved:
            save(policy, buffer, settings)
            on_checkpoint({"step": policy.step, **metrics})


def train_step(policy: Policy, batch: Sequence[Row], settings: Settings) -> dict[str, Any]:
    """One step of the objective (GVPO: Algorithm 1): fix the references, then one update per mini-batch. Every rank has the whole batch.

    The rows that this rank trained get `residuals`, and where the reference is a model of its own `reference_logprobs`: per completion, None
    for one that was left out.
    """
    version, loss = policy.step, settings.loss
    every = loss.reference_every
    if every and (version % every == 0 or not policy.has_reference):
        policy.refresh_reference()
    pairs = [(row, trained) for row in batch if (trained := groups.trainable(row)) is not None]
    if loss.drop_equal_rewards:
        pairs = [(row, trained) for row, trained in pairs if len(set(trained["rewards"])) > 1]
    rows = [trained for _, trained in pairs]
    mini_batches = [part for part in _cut(rows, settings.learner.num_mini_batches) if part]
    if loss.asks_reference_model_for_sums:
        for mini_batch in mini_batches:
            _pass_reference_model(policy, mini_batch, settings.learner.micro_batch_tokens)
    plans = [_plan(policy, _shares(policy, mini_batch), settings.learner.micro_batch_tokens) for mini_batch in mini_batches]
    references = _reference_passes(policy, mini_batches, plans, loss)
    beta = policy.beta if loss.steers_beta and policy.beta is not None else loss.beta_at(version, settings.num_steps)
    objective = _Objective(loss, beta, version)
    nothing: dict[str, torch.Tensor] = objective(torch.zeros(0, device=policy.device), _Fixed.of_nothing(policy), [], num_groups=1)[1]
    sums = nothing
    norms, dampings, num_skipped = [], [], 0
    learning_rate = _learning_rate(settings.learner, version, settings.num_steps)
    for mini_batch, plan, fixed in zip(mini_batches, plans, references, strict=True):
        pulls, parts_sums = _pulls(policy, plan, fixed, objective, len(mini_batch))
        added = [*parts_sums]
        for i, micro in enumerate(plan.passes):
            is_last = i == len(plan.passes) - 1
            logprobs, _ = policy.forward(micro or [_NOTHING], is_last)
            if not micro:  # this rank has fewer passes than another: it takes part in the collectives, and adds nothing
                value = logprobs.sum() * 0
            elif i in pulls:  # a part of a group
                value = (pulls[i] * logprobs).sum()
            else:
                value, stats = objective(logprobs, fixed[i], micro, num_groups=len(mini_batch))
                added.append(stats)
            policy.backward(value, is_last)
        own = {name: value + sum(stats[name] for stats in added) for name, value in nothing.items()}
        damped = damping(_sum_over_ranks({name: own[name] for name in DAMPING}, policy)) if loss.is_damped else 1.0
        norm = policy.update(learning_rate * damped)
        if norm < float("inf"):
            norms.append(norm)
            dampings.append(damped)
            sums = {name: value + own[name] for name, value in sums.items()}
            continue
        num_skipped += 1
        for row in mini_batch:  # which may not be numbers, and were not trained on
            objective.residuals.pop(row["group_id"], None)
        if policy.num_skipped > settings.learner.max_skipped_updates:
            raise NonFiniteGradient(
                f"step {version + 1}: the gradient's norm is {norm}, for the {policy.num_skipped}. time in a row "
                f"(groups {[row['group_id'] for row in mini_batch]})"
            )
    policy.step += 1
    learned_of_all = objective.finish(_sum_over_ranks(sums, policy))
    if loss.steers_beta:
        policy.beta = steered(beta, learned_of_all["gvpo/reward_var"], learned_of_all["gvpo/implicit_reward_var"])
    for row, trained in pairs:
        which = groups.trainable_completions(row)
        learned = {"residuals": objective.residuals.get(row["group_id"])}
        if loss.asks_reference_model_for_sums:
            learned |= {name: trained.get(name) for name in groups.REFERENCE_COLUMNS}
        for name, values in learned.items():
            if values is not None and row["group_id"] in objective.residuals:
                known = dict(zip(which, values, strict=True))
                row[name] = [known.get(i) for i in range(len(row["rewards"]))]
    return {
        **batch_metrics(batch, version),
        **learned_of_all,
        "tokens/trained": float(sum(len(ids) for row in rows for ids in row["completion_ids"])),
        "grad_norm": mean(norms),
        "learning_rate": learning_rate,
        "updates": float(policy.num_updates),
        "updates/skipped": float(num_skipped),
        "gvpo/beta": objective.beta,
        "gvpo/damping": mean(dampings),
    }


DAMPING = ("reward_var", "residual_var", "covariance")
"""The sums that `damping` asks for."""

WANTED_SPREAD, STEER_BY, BETAS = 0.5, 0.1, (0.01, 1.0)


def steered(beta: float, reward_var: float, implicit_reward_var: float) -> float:
    """loss.beta: auto. beta of the next step, from what the last one saw.

    At the optimum of a generation of data beta D is R. While beta D varies half as much, the rewards still lead, and a policy that has gone
    elsewhere is called back. Where it varies more, most of what is learned is to go back, and beta falls; where less, as on fresh data,
    nothing holds the policy, and beta grows. By a tenth a step, so that it is slower than the data is old.
    """
    if reward_var <= 0 or implicit_reward_var <= 0:
        return beta  # nothing that it could be compared with
    missing = 1 - math.sqrt(implicit_reward_var / reward_var) / WANTED_SPREAD
    return min(BETAS[1], max(BETAS[0], beta * math.exp(STEER_BY * max(-2.0, missing))))


_NOTHING: Row = {"prompt_ids": [0], "completion_ids": [[0]]}


def _cut(rows: Sequence[Row], num_parts: int) -> list[list[Row]]:
    """Near-equal runs in order of arrival."""
    bounds = [round(i * len(rows) / num_parts) for i in range(num_parts + 1)]
    return [list(rows[a:b]) for a, b in itertools.pairwise(bounds)]


# --- the objective of a pass ---------------------------------------------------------------------------------------------


@dataclass
class _Fixed:
    """What a pass measures its token log-probs against, [T] each; nan: against themselves, as they are before the update."""

    old: torch.Tensor
    """Of the policy that sampled."""
    reference: torch.Tensor

    @classmethod
    def of_nothing(cls, policy: Policy) -> _Fixed:
        return cls(torch.zeros(0, device=policy.device), torch.zeros(0, device=policy.device))


class _Objective:
    """loss.objective on the groups of one pass. What gvpo reports is reported of every objective, on the same data."""

    def __init__(self, config: LossConfig, beta: float, version: int) -> None:
        self._config, self.beta, self._version = config, beta, version
        self.residuals: dict[int, list[float]] = {}
        """(R - mean R) - beta (D - mean D) of the completions of each group so far, by group id."""

    def __call__(
        self, logprobs: torch.Tensor, fixed: _Fixed, rows: Sequence[Row], num_groups: int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of these groups as a share of an update of `num_groups`, and sums for `finish`."""
        config, device = self._config, logprobs.device
        lengths = [len(ids) for row in rows for ids in row["completion_ids"]]
        rewards = torch.tensor([reward for row in rows for reward in row["rewards"]], dtype=torch.float64, device=device)
        ids = torch.tensor([j for j, row in enumerate(rows) for _ in row["rewards"]], dtype=torch.long, device=device)
        old, reference = (torch.where(given.isnan(), logprobs.detach().double(), given) for given in (fixed.old, fixed.reference))
        totals, reference_totals = sequence_sums(logprobs, lengths), sequence_sums(reference, lengths)
        importance = None
        if config.objective == "gvpo" and config.importance_cap is not None:
            importance = importance_weights(totals, sequence_sums(old, lengths), ids, config.importance_cap)
        if config.asks_reference_model_for_sums:
            known = [value for row in rows for value in row["reference_logprobs"]]
            reference_totals = torch.tensor(known, dtype=torch.float64, device=device)
        if config.length_normalised:
            sizes = torch.tensor(lengths, device=device)
            totals, reference_totals = totals / sizes, reference_totals / sizes
        loss, stats = gvpo_loss(totals, reference_totals, rewards, ids, self.beta, num_groups, config.residual_clip, importance)
        residuals = gvpo_weights(totals, reference_totals, rewards, ids, self.beta, importance)[0]
        stats |= residuals_by_age(residuals, [oldest for row in rows for oldest in row["version_min"]], self._version)
        for row, own in zip(rows, residuals.split([len(row["rewards"]) for row in rows]), strict=True):
            self.residuals[row["group_id"]] = own.tolist()
        stats["num_tokens"] = stats["clipped_tokens"] = torch.zeros((), dtype=torch.float64, device=device)
        if config.objective != "gvpo":
            owners = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.long)).to(device)
            function, options = OBJECTIVES[config.objective]
            given = {name: getattr(config, name) for name in options}
            loss, own = function(logprobs, old, reference, owners, rewards, ids, num_groups, **given)
            stats |= {"loss": own["objective"], "num_tokens": own["num_tokens"], "clipped_tokens": own["clipped_tokens"]}
        return loss, stats

    def finish(self, sums: dict[str, float]) -> dict[str, Any]:
        clipped = sums["clipped_tokens"] / max(1.0, sums["num_tokens"])
        return {**finish(sums), **finish_by_age(sums), **({} if self._config.objective == "gvpo" else {"policy/clipped": clipped})}


AGES = (*map(str, STALENESS_EDGES), "inf", "foreign")


def residuals_by_age(residuals: torch.Tensor, version_mins: Sequence[int | None], version: int) -> dict[str, torch.Tensor]:
    """Sums for `finish_by_age`: squared residuals, and completions, by their staleness (metrics.age_bucket)."""
    ages = torch.tensor([age_bucket(oldest, version) for oldest in version_mins], dtype=torch.long, device=residuals.device)
    squares = torch.zeros(len(AGES), dtype=torch.float64, device=residuals.device).index_add(0, ages, residuals.square())
    counts = torch.bincount(ages, minlength=len(AGES)).double()
    return {**{f"age_square_{i}": x for i, x in enumerate(squares)}, **{f"age_count_{i}": x for i, x in enumerate(counts)}}


def finish_by_age(sums: dict[str, float]) -> dict[str, float]:
    """gvpo/residual_var/<edge>: mean squared residual of the completions of that staleness, each counted once; only where there are some."""
    counts = {age: (sums[f"age_square_{i}"], sums[f"age_count_{i}"]) for i, age in enumerate(AGES)}
    return {f"gvpo/residual_var/{age}": square / count for age, (square, count) in counts.items() if count}


def _pulls(
    policy: Policy, plan: _Plan, fixed: Sequence[_Fixed], objective: _Objective, num_groups: int
) -> tuple[dict[int, torch.Tensor], list[dict[str, torch.Tensor]]]:
    """For passes that hold a part of a group: d loss / d log-probs of their tokens, and the sums of those groups.

    A weight depends on the whole group, but only through one number per completion: so a group that does not fit into a pass has one
    pass of each part without gradients first, and then one with them, whose loss is linear in the log-probs.
    """
    seen = []
    for i in range(plan.num_part_passes):
        parts = [part for group in plan.parts for part in group]
        seen.append(torch.cat(policy.token_logprobs(plan.passes[parts[i]] if i < len(parts) else [_NOTHING])))
    pulls: dict[int, torch.Tensor] = {}
    sums = []
    for group in plan.parts:
        tokens = [seen.pop(0) for _ in group]
        rows = [plan.passes[i][0] for i in group]
        lists = {name: [x for row in rows for x in row[name]] for name in groups.PER_COMPLETION_COLUMNS if rows[0].get(name) is not None}
        whole = {**rows[0], **lists}
        logprobs = torch.cat(tokens).requires_grad_()
        known = _Fixed(torch.cat([fixed[i].old for i in group]), torch.cat([fixed[i].reference for i in group]))
        loss, stats = objective(logprobs, known, [whole], num_groups)
        (gradient,) = torch.autograd.grad(loss, logprobs)
        pulls |= dict(zip(group, gradient.split([len(t) for t in tokens]), strict=True))
        sums.append(stats)
    return pulls, sums


# --- passes --------------------------------------------------------------------------------------------------------------


@dataclass
class _Plan:
    """This rank's passes through a mini-batch. With sharded parameters a pass is a collective: every rank makes as many."""

    passes: list[list[Row]]
    """Each some whole groups, or a part of one; [] where only another rank has something to do."""
    parts: list[list[int]]
    """Passes of each group that is larger than the token budget."""
    num_part_passes: int
    """The most that any rank has."""


def _plan(policy: Policy, shares: Sequence[Sequence[Row]], max_tokens: int) -> _Plan:
    """Every rank knows the shares of all, so they agree on the number of passes without a word."""
    plans = []
    for share in shares:
        passes: list[list[Row]] = []
        parts: list[list[int]] = []
        for micro in groups.micro_batches(share, max_tokens, policy.packs):
            pieces = groups.split_group(share[micro[0]], max_tokens, policy.packs) if len(micro) == 1 else []
            if len(pieces) > 1:
                parts.append(list(range(len(passes), len(passes) + len(pieces))))
                passes += [[piece] for piece in pieces]
            else:
                passes.append([share[i] for i in micro])
        plans.append(_Plan(passes, parts, sum(map(len, parts))))
    mine = plans[policy.rank]
    mine.passes += [[] for _ in range(max(len(plan.passes) for plan in plans) - len(mine.passes))]
    mine.num_part_passes = max(plan.num_part_passes for plan in plans)
    return mine


def _shares(policy: Policy, rows: Sequence[Any]) -> list[list[Any]]:
    """The groups of each rank."""
    return [[rows[i] for i in share] for share in groups.split_by_tokens(rows, policy.world_size)]


def _sampled(row: Row, version: int) -> list[list[float] | None]:
    """Log-probs of a completion's tokens by the policy that sampled it; None: by the policy at the start of the step.

    A completion wholly sampled by that very policy takes the learner's own pass (log-ratio exactly 0); an older or mixed one its
    engine's log-probs, exact also when weights changed in mid-completion; a foreign one the policy it meets.
    """
    return [
        logprobs if oldest is not None and logprobs is not None and not oldest == newest == version else None
        for oldest, newest, logprobs in zip(row["version_min"], row["version_max"], row["sampling_logprobs"], strict=True)
    ]


def _reference_passes(
    policy: Policy, mini_batches: Sequence[Sequence[Row]], plans: Sequence[_Plan], loss: LossConfig
) -> list[list[_Fixed]]:
    """What each pass of a step measures against, once per completion and reference version, before the first update.

    nan: the policy at the start of the step, and no pass is needed for it, because that is the policy of the completion's own forward
    pass, whose log-probs become the reference (so the log-ratio there is exactly 0). That holds in the first mini-batch; the others
    need a pass of their own, unless every completion, on every rank, brings its log-probs along.
    """
    version, result = policy.step, []
    by_token = loss.has_reference_model and not loss.asks_reference_model_for_sums
    for i, (mini_batch, plan) in enumerate(zip(mini_batches, plans, strict=True)):
        asks_start = "previous" in (loss.reference, loss.old_policy) or (
            (loss.reference == "behaviour" or loss.objective != "gvpo") and any(None in _sampled(row, version) for row in mini_batch)
        )
        fixed = []
        for micro in plan.passes:  # a rank with nothing to ask takes part
            brought = [
                [float("nan")] * len(ids) if logprobs is None else logprobs
                for row in micro
                for ids, logprobs in zip(row["completion_ids"], _sampled(row, version), strict=True)
            ]
            sampled = torch.tensor(list(itertools.chain(*brought)), dtype=torch.float64, device=policy.device)
            start = torch.full_like(sampled, float("nan"))
            if i > 0 and asks_start:
                start = _pass(policy, micro)
                sampled = torch.where(sampled.isnan(), start, sampled)
            reference = _pass(policy, micro, reference=True) if by_token else start if loss.reference == "previous" else sampled
            fixed.append(_Fixed(start if loss.old_policy == "previous" else sampled, reference))
        result.append(fixed)
    return result


def _pass_reference_model(policy: Policy, mini_batch: Sequence[dict[str, Any]], max_tokens: int) -> None:
    """Write the reference model's log-probs into the rows that this rank trains; a completion that brings them along costs nothing."""
    version = policy.reference_version
    shares = _shares(policy, mini_batch)
    asked = [[(row, which) for row in share if (which := _unknown(row, version))] for share in shares]
    sums: list[float] = []
    for micro in _plan(policy, [[groups.only(row, which) for row, which in share] for share in asked], max_tokens).passes:
        tokens = policy.token_logprobs(micro or [_NOTHING], reference=True)
        sums += sequence_sums(torch.cat(tokens), [len(t) for t in tokens]).tolist() if micro else []
    for row, which in asked[policy.rank]:
        new, sums = dict(zip(which, sums, strict=False)), sums[len(which) :]
        known = row.get("reference_logprobs") or [None] * len(row["rewards"])
        row["reference_logprobs"] = [new.get(i, value) for i, value in enumerate(known)]
        row["reference_versions"] = [version] * len(known)


def _unknown(row: Row, version: int) -> list[int]:
    """Completions of which the reference of this version has said nothing yet."""
    versions = row.get("reference_versions") or [None] * len(row["rewards"])
    return [i for i, known in enumerate(versions) if known != version]


def _pass(policy: Policy, rows: Sequence[Row], reference: bool = False) -> torch.Tensor:
    """Token log-probs of a pass, float64 [T]."""
    tokens = torch.cat(policy.token_logprobs(rows or [_NOTHING], reference)).double()
    return tokens if rows else tokens[:0]


def _learning_rate(config: LearnerConfig, version: int, num_steps: int) -> float:
    """Of the step that starts from `version`: linear warm-up, then the schedule down to zero after the last step."""
    if version < config.warmup_steps:
        return config.learning_rate * (version + 1) / (config.warmup_steps + 1)
    progress = (version - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    factor = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + float(torch.cos(torch.tensor(progress * torch.pi))))}
    return config.learning_rate * factor[config.schedule]


def _sum_over_ranks(sums: dict[str, torch.Tensor], policy: Policy) -> dict[str, float]:
    """A reduction of scalars: once per step, and before each update that is damped."""
    values = torch.stack([value.double() for value in sums.values()])
    if policy.world_size > 1:
        dist.all_reduce(values)
    return dict(zip(sums, values.tolist(), strict=True))


def publish(
    policy: Policy,
    buffer: Buffer,
    publisher: Publisher,
    settings: Settings,
    rows: Sequence[Row],
    metrics: dict[str, Any] | None,
    times: dict[str, float] | None = None,
) -> None:
    """Hand the weights of this step to the engines, now and then with log-probs to check them by, and its metrics to the driver."""
    started = time.perf_counter()
    first = metrics is None
    probe = probe_logprobs(policy, rows) if first or (settings.parity_every and policy.step % settings.parity_every == 0) else None
    weights = publisher.publish(policy.step, policy.named_tensors())
    if policy.rank != 0:
        return
    if metrics is not None and times is not None and weights is not None:
        now = time.perf_counter()
        metrics = {
            **metrics,
            "time/step": now - times["since"],
            "time/wait_for_groups": times["wait"],
            "time/train": times["train"],
            "time/publish": now - started,
            "weights/bytes": float(weights["bytes"]),
        }
    adapter = {} if policy.adapter is None else {"adapter": policy.adapter}
    buffer.published(policy.step, {**(weights or {}), **adapter, "probe": probe}, metrics)


def probe_logprobs(policy: Policy, rows: Sequence[Row]) -> dict[str, Any]:
    """A few sequences (of the last batch; before the first, random tokens) with the learner's log-probs of all but the first token."""
    if rows:
        sequences = [(row["prompt_ids"] + row["completion_ids"][0])[:PROBE_TOKENS] for row in rows[:NUM_PROBES]]
    else:
        generator = torch.Generator().manual_seed(0)
        length = min(32, policy.max_length - 1)
        sequences = [torch.randint(policy.vocab_size, (length,), generator=generator).tolist() for _ in range(NUM_PROBES)]
    probes = [{"prompt_ids": ids[:1], "completion_ids": [ids[1:]]} for ids in sequences if len(ids) > 1]
    return {
        "ids": [probe["prompt_ids"] + probe["completion_ids"][0] for probe in probes],
        "logprobs": [tokens.tolist() for tokens in policy.token_logprobs(probes)],
    }


def save(policy: Policy, buffer: Buffer, settings: Settings) -> None:
    """Write checkpoints/step-N and keep the last few."""
    policy.save(Path(settings.run_dir) / "checkpoints" / f"step-{policy.step}")
    if policy.rank == 0:
        prune_checkpoints(settings.run_dir, settings.checkpoint.keep)
        buffer.saved(policy.step)
