"""Properties of the group table: nothing is lost, doubled or regrouped, whatever the groups look like."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from gvpo_ray import groups

TOKENS = st.lists(st.integers(2, 40), min_size=1, max_size=6)
MAX_TOKENS = st.integers(1, 60)
Row = dict[str, Any]


@st.composite
def rows(draw: st.DrawFn, group_id: int | None = None, min_size: int = 1) -> Row:
    """A group of any size; every completion has a text of its own, so that it can be told from the others."""
    number = draw(st.integers(0, 1000)) if group_id is None else group_id
    m = draw(st.integers(min_size, 6))
    name = draw(st.sampled_from("abc"))
    ids = [draw(TOKENS) for _ in range(m)]
    is_ours = draw(st.lists(st.booleans(), min_size=m, max_size=m))
    rewards = draw(st.lists(st.none() | st.sampled_from([0.0, 0.5, 1.0]), min_size=m, max_size=m))
    return {
        "group_id": number,
        "prompt": "p",
        "answer": "7",
        "dataset": "d",
        "prompt_ids": draw(TOKENS),
        "completions": [f"{name}{number}.{i}" for i in range(m)],
        "completion_ids": ids,
        "finish_reasons": ["stop"] * m,
        "sources": ["policy" if ours else "offline:x" for ours in is_ours],
        "version_min": [3 if ours else None for ours in is_ours],
        "version_max": [4 if ours else None for ours in is_ours],
        "sampling_logprobs": [
            [-0.5] * len(tokens) if ours else None for ours, tokens in zip(is_ours, ids, strict=True)
        ],
        "rewards": rewards,
        "reward_parts": {"math": list(rewards)},
        "reward_reasons": [None if reward is not None else "no answer" for reward in rewards],
    }


def first(table: Any) -> Row:
    return next(groups.rows(table))


def num_rows(parts: list[list[int]]) -> list[int]:
    return [i for part in parts for i in part]


@settings(max_examples=40, deadline=None)
@given(st.lists(rows(group_id=5, min_size=0), min_size=1, max_size=4))
def test_join_has_the_completions_of_all_parts_in_their_order(parts: list[Row]) -> None:
    tables = [groups.table([part]) for part in parts]
    joined = first(groups.validate(groups.join(tables[0], *tables), groups.LOGGED_COLUMNS))
    for name in groups.PER_COMPLETION_COLUMNS:
        if name in parts[0]:
            assert joined[name] == [value for part in parts for value in part[name]], name
    assert joined["reward_parts"]["math"] == joined["rewards"]
    assert {name: joined[name] for name in groups.PROMPT_COLUMNS} == {
        name: parts[0][name] for name in groups.PROMPT_COLUMNS
    }


@settings(max_examples=40, deadline=None)
@given(rows(), st.data())
def test_take_has_these_completions_in_this_order_with_all_that_belongs_to_them(
    row: Row, data: st.DataObject
) -> None:
    m = len(row["completions"])
    chosen = data.draw(st.lists(st.integers(0, m - 1), max_size=8))
    taken = first(groups.validate(groups.take(groups.table([row]), chosen), groups.LOGGED_COLUMNS))
    for name in groups.PER_COMPLETION_COLUMNS:
        if name in row:
            assert taken[name] == [row[name][i] for i in chosen], name
    assert taken["reward_parts"]["math"] == [row["rewards"][i] for i in chosen]


@settings(max_examples=40, deadline=None)
@given(rows(), st.data())
def test_a_group_that_is_taken_apart_and_joined_again_is_the_group(row: Row, data: st.DataObject) -> None:
    table = groups.table([row])
    m = len(row["completions"])
    cut = data.draw(st.integers(0, m))
    halves = [groups.take(table, range(cut)), groups.take(table, range(cut, m))]
    assert first(groups.join(table, *halves)) == row


@settings(max_examples=40, deadline=None)
@given(st.lists(rows(), max_size=8), st.integers(1, 5), MAX_TOKENS, st.booleans())
def test_passes_of_all_ranks_have_every_completion_once_and_hold_what_fits(
    batch: list[Row], num_ranks: int, max_tokens: int, packed: bool
) -> None:
    dealt = groups.split_over_ranks(batch, num_ranks, max_tokens, packed)
    assert len(dealt) == num_ranks and sorted(num_rows(dealt)) == list(range(len(batch)))
    assert all(rank == sorted(rank) for rank in dealt)
    cut = groups.cut_into_passes([[batch[i] for i in rank] for rank in dealt], max_tokens, packed)
    assert len({len(passes) for passes in cut}) == 1
    seen = []
    for rank, passes in zip(dealt, cut, strict=True):
        for parts in passes:
            where = [(rank[part.row], i) for part in parts for i in part.completions]
            seen += where
            assert len(where) <= 1 or size(batch, where, packed) <= max_tokens
            for part in parts:
                whole = [(rank[part.row], i) for i in range(len(batch[rank[part.row]]["completion_ids"]))]
                assert len(part.completions) == len(whole) or size(batch, whole, packed) > max_tokens
    assert sorted(seen) == [(g, i) for g, row in enumerate(batch) for i in range(len(row["completion_ids"]))]


def size(batch: list[Row], where: list[tuple[int, int]], packed: bool) -> int:
    lengths = [(g, len(batch[g]["completion_ids"][i])) for g, i in where]
    prompts = {g: len(batch[g]["prompt_ids"]) for g, _ in where}
    if packed:
        return sum(prompts.values()) + sum(length for _, length in lengths)
    return max(prompts[g] + length for g, length in lengths) * len(lengths)


@settings(max_examples=40, deadline=None)
@given(st.data(), st.integers(0, 3), st.integers(0, 5))
def test_weak_negatives_are_of_other_prompts_and_depend_on_seed_and_ids_alone(
    data: st.DataObject, num: int, seed: int
) -> None:
    batch = [data.draw(rows(group_id=i, min_size=1)) for i in range(data.draw(st.integers(1, 5)))]
    for row in batch:
        row["prompt"] = data.draw(st.sampled_from("xyz"))
        row["rewards"] = [reward or 0.25 for reward in row["rewards"]]
    given_rows = [dict(row) for row in batch]
    found = groups.with_weak_negatives(batch, num, seed, 60)
    assert batch == given_rows  # which stay as they are
    by_id = {row["group_id"]: row for row in batch}
    for before, row in zip(batch, found, strict=True):
        m = len(before["completions"])
        groups.validate(groups.table([row]), groups.LOGGED_COLUMNS)
        assert all(row[name][:m] == before[name] for name in groups.PER_COMPLETION_COLUMNS if name in before)
        sources = row["sources"][m:]
        assert len(sources) <= num and len(sources) == len(set(sources))
        for i, source in enumerate(sources, m):
            donor = by_id[int(source.removeprefix(groups.WEAK))]
            place = donor["completions"].index(row["completions"][i])
            assert row["completion_ids"][i] == donor["completion_ids"][place]
            assert donor["prompt"] != row["prompt"] and donor["prompt_ids"] != row["prompt_ids"]
            assert row["completion_ids"][i] not in before["completion_ids"]
            assert row["rewards"][i] == min(before["rewards"])
            assert row["version_min"][i] is None and row["sampling_logprobs"][i] is None
    turned = groups.with_weak_negatives(batch[::-1], num, seed, 60)[::-1]
    assert turned == found


def test_weak_negatives_are_as_many_as_asked_where_there_are_as_many_and_they_fit() -> None:
    def group(number: int, length: int, **columns: Any) -> Row:
        ids = [[number * 10 + i] * length for i in range(3)]
        return {
            "group_id": number,
            "prompt": f"p{number}",
            "prompt_ids": [1, number],
            "completions": [f"{number}.{i}" for i in range(3)],
            "completion_ids": ids,
            "sources": ["policy"] * 3,
            "rewards": [1.0, -0.5, 0.0],
            **columns,
        }

    batch = [group(i, 2) for i in range(6)]
    found = groups.with_weak_negatives(batch, 4, 7, 4)
    assert [len(row["sources"]) for row in found] == [3 + 4] * 6
    assert [len(row["sources"]) for row in groups.with_weak_negatives(batch, 9, 7, 4)] == [3 + 5] * 6
    assert groups.with_weak_negatives(batch, 4, 7, 3) == batch  # a prompt of 2 and a completion of 2 are 4
    assert groups.with_weak_negatives(batch, 4, 8, 4) != found
    masked = [group(0, 2), group(1, 2, trained_tokens=[[False, True], None, None])]
    first, second = groups.with_weak_negatives(masked, 1, 0, 9)
    taken = int(first["completions"][3][-1])
    assert first["trained_tokens"] == [None, None, None, masked[1]["trained_tokens"][taken]]
    assert second["trained_tokens"] == [[False, True], None, None, None]
    twins = [group(0, 2), group(1, 2, completions=["0.0", "0.1", "0.2"])]  # the same texts as the other's
    assert groups.with_weak_negatives(twins, 1, 0, 9) == twins
