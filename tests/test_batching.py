"""What the learner trains of groups, how they are dealt to ranks, and how passes are filled."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from test_groups import ROW, row
from tiny import make_group

from gvpo_ray import groups
from gvpo_ray.groups.experts import merged_experts


def test_trainable_leaves_out_completions_without_reward_in_every_column():
    left = groups.trainable(ROW)
    assert left is not None
    assert left == ROW | {
        "completions": ["\\boxed{7}", "\\boxed{8}"],
        "completion_ids": [[4, 7, 1], [4, 8]],
        "finish_reasons": ["stop", "length"],
        "sources": ["policy", "policy"],
        "version_min": [3, 3],
        "version_max": [3, 4],
        "sampling_logprobs": [[-0.5, -0.25, 0.0], [-1.0, -2.0]],
        "trained_tokens": [[True, False, True], None],
        "rewards": [1.0, 0.0],
        "reward_parts": {"math": [1.0, 0.0], "style": [0.5, 0.25]},
        "reward_reasons": [None, None],
        "reference_logprobs": [-0.75, -3.0],
        "reference_versions": [0, 2],
        "episodes": ['{"turns": 2}', None],
        "routed_experts": [b"\x00\x03\x01\x02", None],
        "prompt_experts": (b"\x00\x03\x01\x02",),
    }
    assert left.pop("prompt_experts")  # no column: it is there for the group's passes
    assert len(ROW["rewards"]) == 3  # and the row itself stays
    groups.validate(groups.table([left]), groups.SCHEMA.names)


def test_all_parts_of_a_group_merge_the_same_entries_for_the_experts_of_its_prompt():
    """Of a token that the first completion found in the prefix cache, another one may know the experts."""
    cached, other = np.array([[[-1]], [[-1]], [[1]], [[2]]]), np.array([[[3]], [[-1]], [[0]]])
    entries = [None, groups.experts_entry(cached, 4), groups.experts_entry(other, 4)]
    group = {**ROW, "routed_experts": entries}
    for part in (groups.only(group, [0]), groups.only(groups.only(group, [2, 1]), [0])):
        merged = merged_experts(part["prompt_experts"], 3, (1, 1), 4)
        assert merged is not None and merged.ravel().tolist() == [3, -1, 1]
    assert merged_experts([b"\x04"], 3, (1, 1), 4) is None
    nothing = merged_experts([], 3, (1, 1), 4)
    assert nothing is not None and nothing.ravel().tolist() == [-1] * 3


@pytest.mark.parametrize(
    ("rewards", "completion_ids", "kept"),
    [
        ([1.0, 0.0, 0.0], [[1], [2], [3]], [1.0, 0.0, 0.0]),  # 0.0 is a reward
        ([0.0, None, 0.0], [[1], [2], [3]], [0.0, 0.0]),
        ([1.0, 0.5, 0.0], [[1], [], [3]], [1.0, 0.0]),  # no tokens, nothing to train
        ([1.0, None, None], [[1], [2], [3]], None),
        ([None, None, None], [[1], [2], [3]], None),
        ([1.0, 0.0, None], [[1], [], [3]], None),
    ],
)
def test_trainable_needs_two_completions_with_reward_and_tokens(rewards, completion_ids, kept):
    bare = {"group_id": 1, "prompt_ids": [1], "completion_ids": completion_ids, "rewards": rewards}
    left = groups.trainable(bare)
    assert (left and left["rewards"]) == kept


@pytest.mark.parametrize(
    ("masks", "kept"),
    [
        (None, [0, 1, 2]),
        ([None, None, None], [0, 1, 2]),
        ([[True], [False, True], [True, False, False]], [0, 1, 2]),
        ([[False], [False, True], None], [1, 2]),  # all of it is context
        ([None, [False, False], [False] * 3], None),
    ],
)
def test_a_completion_whose_tokens_are_all_context_is_not_trained_nor_replayed(masks, kept):
    bare = ROW | {
        "rewards": [1.0, 0.0, 0.5],
        "completion_ids": [[4], [4, 8], [3, 3, 3]],
        "sampling_logprobs": [[-1.0], [-1.0] * 2, [-1.0] * 3],
        "sources": ["policy"] * 3,
        "version_max": [3, 4, 5],
        "trained_tokens": masks,
    }
    left = groups.trainable(bare)
    assert (left and left["version_max"]) == (kept and [3 + i for i in kept])
    untrained = groups.untrained_completions(bare)
    assert untrained == [i for i, mask in enumerate(masks or ()) if mask and not any(mask)]
    newest = [None if i in untrained else 3 + i for i in range(3)]
    other = bare | {"trained_tokens": None}
    for table in ([bare], [other, bare], [bare, other]):
        of_rows = groups.replayable(groups.table(table))
        assert of_rows == [newest if row is bare else [3, 4, 5] for row in table]
    apart = pa.concat_tables([groups.table([bare]), groups.table([other]), groups.table([bare])])
    assert groups.replayable(apart) == [newest, [3, 4, 5], newest]


def test_tokens_of_a_group_count_the_prompt_once():
    assert groups.num_tokens(ROW) == 3 + 3 + 2 + 4


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_groups_are_dealt_to_ranks_once_in_order_and_balanced(num_ranks):
    table = [row(i, num_completions=2 + i % 7, prompt=5, completion=1 + (37 * i) % 101) for i in range(64)]
    ranks = groups.split_over_ranks(table, num_ranks, 1000)
    assert len(ranks) == num_ranks and sorted(i for rank in ranks for i in rank) == list(range(64))
    assert all(rank == sorted(rank) for rank in ranks)
    assert ranks == groups.split_over_ranks(table, num_ranks, 1000)
    loads = [sum(groups.num_tokens(table[i]) for i in rank) for rank in ranks]
    assert max(loads) <= 1.06 * sum(loads) / num_ranks


def test_groups_are_dealt_to_ranks_by_hand():
    # tokens 2 * (0 + 8, 6, 4, 2): 16 to rank 0; 12 and then 8 to rank 1, which has fewer; 4 to rank 0: 20
    # and 20
    table = [row(i, prompt=0, completion=length) for i, length in enumerate([4, 8, 2, 6])]
    assert groups.split_over_ranks(table, 2, 100) == [[1, 2], [0, 3]]


def test_ranks_get_no_group_when_there_are_too_few():
    assert groups.split_over_ranks([row(0), row(1)], 4, 100) == [[0], [1], [], []]
    assert groups.split_over_ranks([], 2, 100) == [[], []]


def test_groups_are_swapped_where_fewer_passes_then_hold_them():
    # the longest first, to the emptiest, gives 5 + 4 and 5 + 3 + 3: the second does not fit into a pass of 10
    table = [row(i, num_completions=1, prompt=0, completion=size) for i, size in enumerate([5, 5, 4, 3, 3])]
    ranks = groups.split_over_ranks(table, 2, 10)
    assert sorted(ranks) == [[0, 1], [2, 3, 4]]
    cut = groups.cut_into_passes([[table[i] for i in rank] for rank in ranks], 10)
    assert [len(passes) for passes in cut] == [1, 1]


def sizes_of(table: list[dict[str, Any]], passes: list[list[Any]], packed: bool = True) -> list[int]:
    """Tokens of each pass of a rank, padding included."""
    sizes = []
    for parts in passes:
        lengths = [
            (part.row, len(table[part.row]["completion_ids"][i])) for part in parts for i in part.completions
        ]
        prompts = [len(table[part.row]["prompt_ids"]) for part in parts]
        if packed:
            sizes.append(sum(prompts) + sum(length for _, length in lengths))
        else:
            longest = max((len(table[g]["prompt_ids"]) + length for g, length in lengths), default=0)
            sizes.append(longest * len(lengths))
    return sizes


@pytest.mark.parametrize("max_tokens", [1, 60, 200, 1000, 10**9])
@pytest.mark.parametrize("packed", [True, False])
def test_passes_have_every_completion_once_keep_the_bound_and_are_as_many_on_every_rank(packed, max_tokens):
    table = [
        row(i, num_completions=2 + i % 5, prompt=3 + i % 4, completion=1 + (13 * i) % 29) for i in range(40)
    ]
    ranks = [[table[i] for i in rank] for rank in groups.split_over_ranks(table, 3, max_tokens, packed)]
    cut = groups.cut_into_passes(ranks, max_tokens, packed)
    assert len({len(passes) for passes in cut}) == 1
    for own, passes in zip(ranks, cut, strict=True):
        seen = [(part.row, i) for parts in passes for part in parts for i in part.completions]
        assert sorted(seen) == [(g, i) for g, one in enumerate(own) for i in range(len(one["rewards"]))]
        sizes = sizes_of(own, passes, packed)
        assert sizes == sorted(sizes, reverse=True)
        for parts, size in zip(passes, sizes, strict=True):
            assert size <= max_tokens or sum(len(part.completions) for part in parts) == 1
            for part in parts:
                alone = sizes_of(
                    own, [[groups.Part(part.row, list(range(len(own[part.row]["rewards"]))))]], packed
                )
                # only a group that is larger than a pass is in several
                assert len(part.completions) == len(own[part.row]["rewards"]) or alone[0] > max_tokens


def test_passes_by_hand():
    # 2 completions of 3 + 4 tokens: 14 padded tokens each, so 28 hold two of them; 2 x (3 + 10) = 26, too
    # wide to share
    def rows_of(table: list[dict[str, Any]], *arguments: Any) -> list[list[int]]:
        (passes,) = groups.cut_into_passes([table], *arguments)
        return sorted(sorted(part.row for part in parts) for parts in passes)

    table = [row(0), row(1), row(2), row(3, completion=10), row(4)]
    assert rows_of(table, 28, False) == [[0, 2], [1, 4], [3]]
    assert rows_of(table, 27, False) == [[0], [1], [2], [3], [4]]
    # packed: 3 + 2 x 4 = 11 tokens each, and 3 + 2 x 10 = 23
    assert rows_of(table, 34) == [[0, 1, 2], [3, 4]]
    assert rows_of(table, 33) == [[0, 2], [1, 4], [3]]
    assert groups.cut_into_passes([[], []], 28) == [[], []]


@pytest.mark.parametrize("packed", [True, False])
def test_a_group_larger_than_a_pass_fills_passes_up_to_one_level(packed):
    table = [make_group(1, tuple(float(i) for i in range(8)))]
    for max_tokens, num in ((1, 8), (1000, 1)):
        ((*passes,),) = groups.cut_into_passes([table], max_tokens, packed)
        assert len(passes) == num
    # beside a whole group the parts of a large one come first
    small = row(2, prompt=2, completion=2)
    ((*passes,),) = groups.cut_into_passes([[small, *table]], 24, packed)
    shared = [parts for parts in passes if len(parts) > 1]
    assert all(len(parts[0].completions) < 8 and parts[0].row == 1 for parts in shared)
    sizes = sizes_of([small, *table], passes, packed)
    assert max(sizes) <= 24 and min(sizes) > 0


CASES_OF_THE_PLANNER = {
    "7B: 32 groups, k=8, 4 ranks, 16384": (32, 8, 600, 2048, 150, 4, 16384),
    "1.5B: 16 groups, k=8, 1 rank, 8192": (16, 8, 450, 1024, 150, 1, 8192),
    "k=16 of 2048, 32 groups, 8 ranks, 16384": (32, 16, 800, 2048, 300, 8, 16384),
    "k=16 of 2048, 32 groups, 8 ranks, 32768": (32, 16, 800, 2048, 300, 8, 32768),
}


@pytest.mark.parametrize("case", CASES_OF_THE_PLANNER)
def test_passes_of_all_ranks_take_at_most_8_percent_longer_than_the_ideal(case):
    """Lengths of completions as in a run: log-normal around a length of their prompt. Passes in the order of
    arrival took 1.00 to 1.51 of the ideal.
    """
    num, k, median, longest, prompt, num_ranks, max_tokens = CASES_OF_THE_PLANNER[case]
    random, ratios = np.random.default_rng(0), []
    for _ in range(6):
        table = []
        for _ in range(num):
            base = random.lognormal(np.log(median), 0.49)
            lengths = np.clip(random.lognormal(np.log(base), 0.49, k), 20, longest).astype(int)
            table.append({"prompt_ids": range(prompt), "completion_ids": [range(x) for x in lengths]})
        dealt = groups.split_over_ranks(table, num_ranks, max_tokens)
        ranks = [[table[i] for i in rank] for rank in dealt]
        cut = groups.cut_into_passes(ranks, max_tokens)
        sizes = [sizes_of(own, passes) for own, passes in zip(ranks, cut, strict=True)]
        tokens = sum(map(groups.num_tokens, table))
        ratios.append(sum(map(max, zip(*sizes, strict=True))) * num_ranks / tokens)
    assert sum(ratios) / len(ratios) <= 1.08
