r"""The group table is the data contract: one row is one prompt with its m completions.

Only this room spells column names. A group is sampled, verified, logged, packed and normalised as a unit;
every stage is `Table -> Table` and columns only accumulate. The table below shows one real row as the learner
gets it (m = 2), and the room that fills each column:

    group_id            17                               data
    prompt              "What is 3 + 4?"                 data
    answer              "7"                              data      (the gold answer, always text)
    dataset             "quickstart"                     data
    prompt_ids          [12, 5, 9]                       data      (templated and tokenised; with an agent
                                                                    engines: what all completions begin
                                                                    with)
    data                '{"columns": {"level": 2}}'      data      (the row's other columns as JSON, for the
                                                                    reward functions. Optional)
    completions         ["\boxed{7}", "\boxed{8}"]       engines   (text, special tokens removed)
    completion_ids      [[4, 7, 1], [4, 8, 1]]           engines   (end-of-sequence token included)
    finish_reasons      ["stop", "stop"]                 engines   ("stop" | "length")
    sources             ["policy", "policy"]             engines   ("policy" | "replay" | "offline:<name>"; in
                                                                    the learner also "weak:<group_id>")
    version_min         [3, 3]                           engines   (oldest weights that sampled a token; null:
                                                                    not sampled by this run's engines)
    version_max         [3, 4]                           engines   (newest weights that sampled a token)
    sampling_logprobs   [[-0.1, -0.3, -0.0], [...]]      engines   (one per completion token, temperature 1,
                                                                    and 0 where none was sampled; null:
                                                                    external, without log-probs)
    trained_tokens      [[true, true, true], null]       engines   (whether the policy sampled each token, so
                                                                    that it is trained: the others, of tools
                                                                    and environments, are context; null:
                                                                    every token was sampled. Optional)
    rewards             [1.0, 0.0]                       verifiers (null: could not be verified, left out of
                                                                    training)
    reward_parts        {"math": [1.0, 0.0]}             verifiers (each reward before weighting)
    reward_reasons      [null, null]                     verifiers (why a reward is null, or what the verifier
                                                                    noticed; one reason per line)
    reference_logprobs  [-0.4, -0.9]                     learner   (float64 sum over the completion's tokens;
                                                                    by verifiers where another model scores)
    reference_versions  [0, 0]                           learner   (version of the reference's weights, below
                                                                    0 for another model; null: not scored)
    episodes            ['{"turns": 3, ...}', null]      engines   (JSON: name, turns, tool_calls,
                                                                    tool_errors, end, and of an agent's
                                                                    further branches their number; null:
                                                                    no episode. Optional)
    routed_experts      [b"\x01\x05...", null]           engines   (mixtures of experts: those that the engine
                                                                    chose, see experts.py; null: not known.
                                                                    Optional)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gvpo_ray.config.verifiers import ReasonKind
from gvpo_ray.errors import GvpoError

MASK = pa.list_(pa.bool_())
"""The type of one completion's entry in `trained_tokens`."""

SCHEMA = pa.schema(
    [
        ("group_id", pa.int64()),
        ("prompt", pa.string()),
        ("answer", pa.string()),
        ("dataset", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("data", pa.string()),
        ("completions", pa.list_(pa.string())),
        ("completion_ids", pa.list_(pa.list_(pa.int32()))),
        ("finish_reasons", pa.list_(pa.string())),
        ("sources", pa.list_(pa.string())),
        ("version_min", pa.list_(pa.int32())),
        ("version_max", pa.list_(pa.int32())),
        ("sampling_logprobs", pa.list_(pa.list_(pa.float32()))),
        ("trained_tokens", pa.list_(MASK)),
        ("rewards", pa.list_(pa.float32())),
        ("reward_parts", pa.map_(pa.string(), pa.list_(pa.float32()))),
        ("reward_reasons", pa.list_(pa.string())),
        ("reference_logprobs", pa.list_(pa.float64())),
        ("reference_versions", pa.list_(pa.int32())),
        ("episodes", pa.list_(pa.string())),
        ("routed_experts", pa.list_(pa.binary())),
    ]
)

PROMPT_COLUMNS = ("group_id", "prompt", "answer", "dataset", "prompt_ids")
DATA_COLUMNS = ("data",)
"""Optional column of the prompt: a group whose data set has no further columns has none, or a null."""
COMPLETION_COLUMNS = (
    "completions",
    "completion_ids",
    "finish_reasons",
    "sources",
    "version_min",
    "version_max",
    "sampling_logprobs",
)
MASK_COLUMNS = ("trained_tokens",)
"""Optional columns of the completions: a group without them, or with a null, trains every token.

A completion of which no token is trained is left out of training (`batching.trainable_completions`).
"""
EPISODE_COLUMNS = ("episodes",)
"""Optional column of the completions: only those of an environment have it."""
EXPERT_COLUMNS = ("routed_experts",)
"""Optional column of the completions: only those of a mixture of experts have it."""
REWARD_COLUMNS = ("rewards", "reward_parts", "reward_reasons")
REFERENCE_COLUMNS = ("reference_logprobs", "reference_versions")
"""Columns of log-probs under a separate reference model.

They stay with a group, so that training on it again needs no forward pass of the reference.
"""
PER_COMPLETION_COLUMNS = (
    *COMPLETION_COLUMNS,
    *MASK_COLUMNS,
    "rewards",
    "reward_reasons",
    *REFERENCE_COLUMNS,
    *EPISODE_COLUMNS,
    *EXPERT_COLUMNS,
)
"""Columns whose lists have one entry per completion (`reward_parts` holds such lists by name)."""
LOGGED_COLUMNS = PROMPT_COLUMNS + COMPLETION_COLUMNS + REWARD_COLUMNS
"""Columns that a group needs to be logged: all but the optional ones and the reference's, which the learner
computes."""
LOG_COLUMNS = (
    *(*PROMPT_COLUMNS, *DATA_COLUMNS, *COMPLETION_COLUMNS, *MASK_COLUMNS, *REWARD_COLUMNS),
    *(*REFERENCE_COLUMNS, *EPISODE_COLUMNS, *EXPERT_COLUMNS),
)
"""Columns of the durable log; a reference is null until it is computed, and replayed completions bring theirs
along."""

Row = Mapping[str, Any]
"""One group as Python objects by column, as `rows` yields it."""

NO_ANSWER = "no answer found in the completion"
"""The entry of `reward_reasons` for a completion in which a reward function found no answer."""

UNTRAINED = "untrained: the policy sampled no token of the completion"
"""The entry of `reward_reasons` for a completion whose tokens are all context."""


class GroupError(GvpoError, ValueError):
    """A table that breaks the data contract raises this; the message names the column and the row."""


def table(rows: Iterable[Mapping[str, Any]]) -> pa.Table:
    """Build a group table from Python rows; the columns are those of the first row, in schema order.

    Raises:
        GroupError: a row has a column that the schema does not know, lacks one that the first row has, or
            holds a value of another type.
    """
    rows = list(rows)
    names = [name for name in SCHEMA.names if rows and name in rows[0]]
    for i, row in enumerate(rows):
        if set(row) != set(names):
            raise GroupError(f"row {i}: columns {sorted(row)} are not {sorted(names)}")
    arrays = [_array(name, [row[name] for row in rows]) for name in names]
    return pa.Table.from_arrays(arrays, schema=pa.schema([SCHEMA.field(n) for n in names]))


def with_columns(groups: pa.Table, **columns: Sequence[Any]) -> pa.Table:
    """Return the table with columns added or replaced, typed by the schema; one value per group each.

    Raises:
        GroupError: a column is not in the schema, or its values have another type or number.
    """
    for name, values in columns.items():
        array = _array(name, values)
        if len(array) != len(groups):
            raise GroupError(f"column {name!r} has {len(array)} entries for {len(groups)} groups")
        field, index = SCHEMA.field(name), groups.schema.get_field_index(name)
        groups = groups.append_column(field, array) if index < 0 else groups.set_column(index, field, array)
    return groups


def log_columns(groups: pa.Table) -> pa.Table:
    """Return the groups with exactly LOG_COLUMNS.

    Optional columns and references that a table lacks, as new groups and older logs do, are null.
    """
    if groups.schema.equals(SCHEMA):
        return groups
    optional = (*DATA_COLUMNS, *MASK_COLUMNS, *REFERENCE_COLUMNS, *EPISODE_COLUMNS, *EXPERT_COLUMNS)
    missing = [name for name in optional if name not in groups.schema.names]
    return (
        with_columns(groups, **{name: [None] * len(groups) for name in missing})
        .select(list(LOG_COLUMNS))
        .cast(SCHEMA)
    )


def limit_of(text: str | None) -> ReasonKind | None:
    """Return the limit of its verifier that a check hit, by an entry of `reward_reasons`; None: none."""
    reasons = (text or "").split("\n")
    kinds = (kind for reason in reasons for kind in ReasonKind if reason.startswith(f"{kind}:"))
    return next(kinds, None)


def has_all_rewards(group: pa.Table) -> bool:
    """Return whether every completion of a group came with its reward, as those of some files do."""
    return "rewards" in group.column_names and None not in (group["rewards"][0].as_py() or [None])


def all_cut_off(group: pa.Table) -> bool:
    """Return whether the checks of all completions of a group hit a limit of their verifier."""
    reasons = group["reward_reasons"][0].as_py()
    no_reward = all(reward is None for reward in group["rewards"][0].as_py())
    return no_reward and bool(reasons) and all(limit_of(reason) is not None for reason in reasons)


def all_late(group: pa.Table) -> bool:
    """Return whether the environment of each episode of a group did not answer in time, by a clock.

    A machine that is too busy makes that happen to any prompt.
    """
    reasons = group["reward_reasons"][0].as_py() or []
    begins = f"{ReasonKind.TIMEOUT}: environment: "
    return all_cut_off(group) and all(
        any(part.startswith(begins) for part in reason.split("\n")) for reason in reasons
    )


def any_episode_well(group: pa.Table) -> bool:
    """Return whether the environment of an episode that was played for this group has come to a reward.

    Completions from elsewhere, replayed ones and lost episodes say nothing about the environment.
    """
    episodes = group["episodes"][0].as_py() if "episodes" in group.column_names else None
    rewards, sources = group["rewards"][0].as_py(), group["sources"][0].as_py()
    return episodes is not None and any(
        reward is not None and episode is not None and source != "replay"
        for reward, episode, source in zip(rewards, episodes, sources, strict=True)
    )


def _array(name: str, values: Sequence[Any]) -> pa.Array:
    if name not in SCHEMA.names:
        raise GroupError(f"column {name!r} is not one of {SCHEMA.names}")
    try:
        return pa.array(values, type=SCHEMA.field(name).type)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise GroupError(f"column {name!r}: {error}") from error


def empty(columns: Sequence[str] = LOGGED_COLUMNS) -> pa.Table:
    """Return a table of no groups with the given columns."""
    return pa.schema([SCHEMA.field(name) for name in columns]).empty_table()


def validate(groups: pa.Table, columns: Sequence[str]) -> pa.Table:
    """Return the table if it has these columns with their types, and lists of matching lengths.

    Each per-completion list has one entry per completion, and `sampling_logprobs` one per token.
    `trained_tokens` is checked too where the table has it and it is not null; it holds no null for a token.

    Raises:
        GroupError: the message names the column, and where lengths differ the row and its group_id.
    """
    for name in columns:
        index = groups.schema.get_field_index(name)
        if index < 0:
            raise GroupError(f"column {name!r} is missing; the table has {groups.schema.names}")
        if not groups.schema.field(index).type.equals(SCHEMA.field(name).type):
            raise GroupError(
                f"column {name!r} is {groups.schema.field(index).type}, not {SCHEMA.field(name).type}"
            )
    per_completion = [n for n in PER_COMPLETION_COLUMNS if n in columns]
    sizes = {name: pc.list_value_length(groups.column(name)).to_pylist() for name in per_completion}
    for name in per_completion:
        first = per_completion[0]
        for row, (got, want) in enumerate(zip(sizes[name], sizes[first], strict=True)):
            if got is None and name in (*MASK_COLUMNS, *EPISODE_COLUMNS, *EXPERT_COLUMNS):
                continue
            if got is None or got != want:
                raise GroupError(
                    f"{_place(groups, row)}: {name} "
                    + ("is null" if got is None else f"has {got} entries, {first} has {want}")
                )
    if "completion_ids" in columns:
        if "sampling_logprobs" in columns:
            _check_lengths(groups, "sampling_logprobs")
        for name in (name for name in MASK_COLUMNS if name in groups.schema.names):
            _check_lengths(groups, name)
            _check_no_null(groups, name)
    return groups


def _place(groups: pa.Table, row: int) -> str:
    """Name a row of a table for an error message, with its group_id where the table has that."""
    known = groups["group_id"][row].as_py() if "group_id" in groups.schema.names else None
    return f"row {row}" if known is None else f"row {row} (group {known})"


def _check_lengths(groups: pa.Table, name: str) -> None:
    """Check that a column of nested lists has one value per token of each completion, or null."""
    sizes = zip(_sizes(groups, "completion_ids"), _sizes(groups, name), strict=True)
    for row, (ids, values) in enumerate(sizes):
        if values is None and name in MASK_COLUMNS:
            continue
        if values is None or ids is None or len(values) != len(ids):
            raise GroupError(
                f"{_place(groups, row)}: {name} and completion_ids have not the same number of completions"
            )
        for i, (tokens, got) in enumerate(zip(ids, values, strict=True)):
            if got is not None and got != tokens:
                raise GroupError(
                    f"{_place(groups, row)}: {name}[{i}] has {got} entries, completion_ids[{i}] has {tokens}"
                )


def _check_no_null(groups: pa.Table, name: str) -> None:
    """Check that the inner lists of a list<list> column hold no null, which would be neither yes nor no."""
    if not pc.list_flatten(pc.list_flatten(groups[name])).null_count:
        return
    for row, lists in enumerate(groups[name].to_pylist()):
        for i, values in enumerate(lists or ()):
            if None in (values or ()):
                raise GroupError(f"{_place(groups, row)}: {name}[{i}] is null for token {values.index(None)}")


def _sizes(groups: pa.Table, name: str) -> list[list[int | None] | None]:
    """Return the lengths of the inner lists of a list<list> column, per group; null lists give None."""
    flat = iter(pc.list_value_length(pc.list_flatten(groups.column(name))).to_pylist())
    return [
        None if size is None else list(islice(flat, size))
        for size in pc.list_value_length(groups.column(name)).to_pylist()
    ]


def rows(groups: pa.Table) -> Iterator[dict[str, Any]]:
    """Yield the groups as Python dictionaries, with `reward_parts` as a dictionary of lists."""
    for row in groups.to_pylist():
        if row.get("reward_parts") is not None:
            row["reward_parts"] = dict(row["reward_parts"])
        yield row


def num_completion_tokens(groups: pa.Table) -> int:
    """Return the number of tokens of all completions of a table."""
    return pc.sum(pc.list_value_length(pc.list_flatten(groups["completion_ids"]))).as_py() or 0


def num_sampled_tokens(groups: pa.Table) -> int:
    """Return the number of those tokens of all completions that a policy has sampled."""
    if "trained_tokens" not in groups.schema.names:
        return num_completion_tokens(groups)
    flags = pc.list_flatten(pc.list_flatten(groups["trained_tokens"]))
    return num_completion_tokens(groups) - len(flags) + (pc.sum(flags).as_py() or 0)


def join(prompt: pa.Table, *parts: pa.Table) -> pa.Table:
    """Return one group of a prompt with the completions of all the one-row tables `parts`, in order.

    It has rewards, references or trained_tokens if some part has them; the entries of other parts are null.
    """
    group = prompt.select(list(PROMPT_COLUMNS) + [name for name in DATA_COLUMNS if _has(prompt, name)])
    optional = (*MASK_COLUMNS, *REWARD_COLUMNS, *REFERENCE_COLUMNS, *EPISODE_COLUMNS, *EXPERT_COLUMNS)
    for name in (*COMPLETION_COLUMNS, *optional):
        if name in COMPLETION_COLUMNS or any(_has(part, name) for part in parts):
            group = group.append_column(
                SCHEMA.field(name),
                _joined_reward_parts(parts) if name == "reward_parts" else _joined(parts, name),
            )
    return group


def take(group: pa.Table, completions: Sequence[int]) -> pa.Table:
    """Return the one-row group with only these of its completions, in this order."""
    for name in (name for name in PER_COMPLETION_COLUMNS if _has(group, name)):
        index = group.schema.get_field_index(name)
        group = group.set_column(
            index,
            SCHEMA.field(name),
            _one_list(name, [_entries(group, name).take(pa.array(completions, pa.int64()))]),
        )
    if _has(group, "reward_parts"):
        parts = {name: [values[i] for i in completions] for name, values in group["reward_parts"][0].as_py()}
        group = with_columns(group, reward_parts=[parts])
    return group


def replayable(groups: pa.Table) -> list[list[int | None]]:
    """Return version_max of each completion that may be replayed in a later group, and None for the others.

    Those are the policy's own completions that can be trained on: they have a reward, a trained token and
    the sampler's log-probs. Lengths and `trained_tokens` are read, and no tokens.
    """
    logprobs, rewards, sources, versions = (
        pc.list_flatten(groups[name]) for name in ("sampling_logprobs", "rewards", "sources", "version_max")
    )
    can_be = pc.and_(pc.is_valid(rewards), _have_trained_tokens(groups))
    is_own = pc.and_(pc.equal(sources, "policy"), pc.is_valid(logprobs))
    flat = iter(pc.if_else(pc.and_(can_be, is_own), versions, pa.scalar(None, versions.type)).to_pylist())
    return [list(islice(flat, size)) for size in pc.list_value_length(groups["completions"]).to_pylist()]


def _have_trained_tokens(groups: pa.Table) -> pa.Array:
    """Return whether each completion of a table has a trained token, one bool per completion of all rows."""
    ids = groups["completion_ids"]
    result = np.array(pc.greater(pc.list_value_length(pc.list_flatten(ids)), 0))
    if "trained_tokens" in groups.schema.names:
        row_has_masks = np.array(pc.is_valid(groups["trained_tokens"]))
        masks = pa.concat_arrays(pc.list_flatten(groups["trained_tokens"]).chunks or [pa.nulls(0, MASK)])
        is_trained = np.array(pc.list_flatten(masks), bool)
        counts = np.bincount(np.array(pc.list_parent_indices(masks))[is_trained], minlength=len(masks))
        with_masks = np.flatnonzero(np.repeat(row_has_masks, np.array(pc.list_value_length(ids))))
        result[with_masks] &= (counts > 0) | np.array(pc.is_null(masks))
    return pa.array(result)


def _has(group: pa.Table, name: str) -> bool:
    return name in group.schema.names and group[name].null_count == 0


def _entries(group: pa.Table, name: str) -> pa.Array:
    """Return a column's entries of a one-row group, one per completion; all null if it lacks the column."""
    if _has(group, name):
        return group[name].combine_chunks().flatten()
    return pa.nulls(len(group["completions"][0]), SCHEMA.field(name).type.value_type)


def _one_list(name: str, entries: Sequence[pa.Array]) -> pa.Array:
    flat = pa.concat_arrays([pa.nulls(0, SCHEMA.field(name).type.value_type), *entries])
    return pa.ListArray.from_arrays(pa.array([0, len(flat)], pa.int32()), flat)


def _joined(parts: Sequence[pa.Table], name: str) -> pa.Array:
    return _one_list(name, [_entries(part, name) for part in parts])


def _joined_reward_parts(parts: Sequence[pa.Table]) -> pa.Array:
    nothing = [[None] * len(part["completions"][0]) for part in parts]
    by_part = [dict(part["reward_parts"][0].as_py()) if _has(part, "reward_parts") else {} for part in parts]
    names = dict.fromkeys(name for values in by_part for name in values)  # keeps the order, unlike a set
    pairs = list(zip(by_part, nothing, strict=True))
    return _array(
        "reward_parts",
        [{name: [x for values, none in pairs for x in values.get(name, none)] for name in names}],
    )
