import json
import math
from fractions import Fraction
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import EOS, make_model
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from gvpo_ray import groups
from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.data import PromptsConfig, SourceConfig
from gvpo_ray.config.loss import loss_config
from gvpo_ray.config.verifiers import VerifiersConfig
from gvpo_ray.data.mixture import SourceSchedule
from gvpo_ray.data.offline import OfflineSource
from gvpo_ray.data.prompts import PromptSet
from gvpo_ray.verifiers.verifier import Verifier

IDS = {"0": 3, "1": 4, "2": 5, "3": 6, "+": 13, "=": 14, "q": 33}
"""Of tiny's tokenizer: one token per character."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(make_model(tmp_path_factory.mktemp("model")))


class Maker:
    """Writes the file and makes the source; `own`: keys of its section that are arguments of the source
    too.
    """

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        self.path, self.tokenizer = folder / "data.jsonl", tokenizer

    def __call__(
        self,
        rows: list[dict[str, object]],
        path: Path | None = None,
        own: dict[str, object] | None = None,
        **keys: object,
    ) -> OfflineSource:
        if path is None:
            self.path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        about = {
            "max_tokens": None,
            "max_length": 100,
            "num_completions": 4,
            "seed": 3,
            "loss": None,
        }
        about |= {key: keys.pop(key) for key in list(keys) if key in about}
        share = {} if "share" in keys else {"group_share": 0.5}
        said = {"path": str(path or self.path), "template": "{prompt}", **share, **keys, **(own or {})}
        config = SourceConfig(**said)
        return OfflineSource(config, self.tokenizer, name="people", **about)

    def error(self, rows: list[dict[str, object]], path: Path | None = None, **keys: object) -> str:
        with pytest.raises(ConfigError) as caught:
            self(rows, path, **keys)
        assert "\n" not in str(caught.value)
        return str(caught.value).replace(str(path or self.path), "FILE")


@pytest.fixture
def make(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Maker:
    return Maker(tmp_path, tokenizer)


def _rows(counts: dict[str, int], **more: object) -> list[dict[str, object]]:
    """So many completions per prompt: 0, 1, 2, … and the prompt's letter behind each."""
    return [
        {"prompt": p, "answer": "1", "completion": f"{i}{p}", **more}
        for p, num in counts.items()
        for i in range(num)
    ]


def _prompt(tokenizer: PreTrainedTokenizerBase, text: str, group_id: int = 0, answer: str = "2") -> pa.Table:
    row = {
        "group_id": group_id,
        "prompt": text,
        "answer": answer,
        "dataset": "sums",
        "prompt_ids": tokenizer(text)["input_ids"],
    }
    return groups.table([row])


def _completions(table: pa.Table | None) -> list[str]:
    assert table is not None
    return table["completions"][0].as_py()


def test_a_whole_group_is_a_prompt_with_its_completions_as_they_are_and_an_end_of_sequence(
    make: Maker,
) -> None:
    rows = [{"prompt": "1+1", "answer": 2, "completion": text} for text in ("2", "")]
    source = make(rows, own={"template": "q{prompt}="}, shuffle=False)
    row = source.group(17, 0)
    assert row.to_pylist() == [
        {
            "group_id": 17,
            "prompt": "1+1",
            "answer": "2",
            "dataset": "people",
            "prompt_ids": [IDS["q"], IDS["1"], IDS["+"], IDS["1"], IDS["="]],
            "completions": ["2", ""],
            "completion_ids": [[IDS["2"], EOS], [EOS]],
            "finish_reasons": ["stop", "stop"],
            "sources": ["offline:people", "offline:people"],
            "version_min": [None, None],
            "version_max": [None, None],
            "sampling_logprobs": [None, None],
        }
    ]
    groups.validate(row, groups.PROMPT_COLUMNS + groups.COMPLETION_COLUMNS)


def test_a_completion_that_has_the_end_in_its_text_does_not_get_another(make: Maker) -> None:
    source = make(
        [{"prompt": "q", "answer": "1", "completion": text} for text in ("1<eos>", "2<eos>3")], shuffle=False
    )
    ((first, second),) = source.group(0, 0)["completion_ids"].to_pylist()
    assert first == [IDS["1"], EOS]
    # in the middle of a text it is text
    assert second[0] == IDS["2"] and second[-2:] == [IDS["3"], EOS] and EOS not in second[:-1]


def test_parquet_and_jsonl_give_the_same_groups(make: Maker, tmp_path: Path) -> None:
    rows = [{"q": "1+1", "gold": "2", "text": str(i), "score": i / 4} for i in range(3)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    keys = {
        "prompt_column": "q",
        "answer_column": "gold",
        "completion_column": "text",
        "reward_column": "score",
    }
    lines, parquet = make(rows, **keys), make([], tmp_path / "data.parquet", **keys)
    assert lines.group(1, 0).equals(parquet.group(1, 0)) and lines.digest() == parquet.digest()
    assert lines.group(1, 0)["rewards"].to_pylist() == [[0.0, 0.25, 0.5]]


def test_rewards_of_the_file_need_no_answers_and_are_kept_as_they_are(make: Maker) -> None:
    rows = [
        {"prompt": "q", "completion": str(i), "reward": reward} for i, reward in enumerate((0.25, 1, True))
    ]
    row = make(rows, reward_column="reward", shuffle=False).group(0, 0)
    assert row.column_names == [
        *groups.PROMPT_COLUMNS,
        *groups.COMPLETION_COLUMNS,
        "rewards",
        "reward_reasons",
    ]
    groups.validate(row, row.column_names)
    assert row["answer"].to_pylist() == [""]
    assert row["rewards"].to_pylist() == [[0.25, 1.0, 1.0]] and row["reward_reasons"].to_pylist() == [
        [None] * 3
    ]


def test_completions_without_a_reward_are_left_to_the_verifier_and_the_others_are_not(make: Maker) -> None:
    rows = [
        {"prompt": "1+1", "answer": "2", "completion": f"\\boxed{{{i}}}", "score": score}
        for i, score in ((1, 0.75), (2, None), (3, None))
    ]
    row = make(rows, reward_column="score", shuffle=False).group(0, 0)
    assert row["rewards"].to_pylist() == [[0.75, None, None]]
    with Verifier(VerifiersConfig()) as verifier:
        scored = verifier.score(row)
        unrewarded = verifier.score(make(rows, shuffle=False).group(0, 0))
    assert scored["rewards"].to_pylist() == [[0.75, 1.0, 0.0]] and unrewarded["rewards"].to_pylist() == [
        [0.0, 1.0, 0.0]
    ]
    assert next(groups.rows(scored))["reward_parts"] == {"math": [None, 1.0, 0.0]}
    groups.validate(scored.select(list(groups.LOGGED_COLUMNS)), groups.LOGGED_COLUMNS)


def test_a_prompt_with_two_answers_is_two_problems(make: Maker) -> None:
    rows = [{"prompt": "q", "answer": str(i % 2), "completion": str(i)} for i in range(4)]
    source = make(rows, shuffle=False)
    assert [_completions(source.group(i, i)) for i in range(2)] == [["0", "2"], ["1", "3"]]
    assert [source.group(i, i)["answer"][0].as_py() for i in range(2)] == ["0", "1"]


def test_two_epochs_hold_every_completion_once_each_but_single_ones(make: Maker) -> None:
    # k = 4: 9 completions are 3 groups of 3, 5 are 3 + 2, 4 are one group, 2 are one, a single one is none.
    source = make(_rows({"a": 9, "b": 5, "c": 4, "d": 2, "e": 1}))
    assert len(source) == 3 + 2 + 1 + 1 and source.num_single == 1 and source.num_rows == 21
    epochs = [[source.group(i, i) for i in range(7 * epoch, 7 * epoch + 7)] for epoch in range(2)]
    expected = sorted(f"{i}{p}" for p, num in {"a": 9, "b": 5, "c": 4, "d": 2}.items() for i in range(num))
    for epoch in epochs:
        assert sorted(text for row in epoch for text in _completions(row)) == expected
        assert sorted(len(_completions(row)) for row in epoch) == [2, 2, 3, 3, 3, 3, 4]
        assert all(text[1] == row["prompt"][0].as_py() for row in epoch for text in _completions(row))
    orders = [[_completions(row) for row in epoch] for epoch in epochs]
    assert orders[0] != orders[1]
    assert [row["group_id"][0].as_py() for row in epochs[1]] == list(range(7, 14))


def test_the_completions_of_a_prompt_are_dealt_so_that_every_group_of_a_sorted_file_has_good_and_bad_ones(
    make: Maker,
) -> None:
    rows = [{"prompt": "q", "completion": str(i), "reward": i // 4} for i in range(8)]
    source = make(rows, reward_column="reward", shuffle=False)
    assert [source.group(i, i)["rewards"][0].as_py() for i in range(2)] == [[0.0, 0.0, 1.0, 1.0]] * 2


@pytest.mark.parametrize(
    ("k", "num", "sizes"),
    [(2, 3, [3]), (2, 5, [3, 2]), (3, 4, [2, 2]), (3, 7, [3, 2, 2]), (8, 9, [5, 4]), (8, 8, [8])],
)
def test_groups_of_one_prompt_are_near_equal_and_none_is_of_one(
    make: Maker, k: int, num: int, sizes: list[int]
) -> None:
    source = make(_rows({"q": num}), num_completions=k, shuffle=False)
    assert [len(_completions(source.group(i, i))) for i in range(len(source))] == sizes


def test_a_group_is_a_pure_function_of_seed_and_number(make: Maker) -> None:
    rows = _rows({letter: 2 for letter in "abcdefgh"})
    first, again, other = make(rows), make(rows), make(rows, seed=4)
    order = [first.group(i, i)["prompt"][0].as_py() for i in range(24)]
    assert [again.group(i, i)["prompt"][0].as_py() for i in reversed(range(24))][::-1] == order
    assert [other.group(i, i)["prompt"][0].as_py() for i in range(24)] != order
    in_order = make(rows, shuffle=False)
    assert "".join(in_order.group(i, i)["prompt"][0].as_py() for i in range(16)) == "abcdefghabcdefgh"


def test_a_share_gives_the_prompts_completions_to_the_given_row(
    make: Maker, tokenizer: PreTrainedTokenizerBase
) -> None:
    source = make(_rows({"a": 3, "b": 1}, score=0.5), share=0.5, reward_column="score")
    assert source.num_single == 0
    given = _prompt(tokenizer, "b", group_id=9)
    row = source.completions(given, 2)
    assert row is not None and row.select(list(groups.PROMPT_COLUMNS)).equals(given)
    groups.validate(row, [*groups.COMPLETION_COLUMNS, "rewards", "reward_reasons"])
    assert (
        _completions(row) == ["0b"]
        and row["sources"].to_pylist() == [["offline:people"]]
        and row["rewards"].to_pylist() == [[0.5]]
    )
    assert sorted(_completions(source.completions(_prompt(tokenizer, "a"), 9))) == ["0a", "1a", "2a"]
    assert source.completions(_prompt(tokenizer, "c"), 2) is None
    assert source.completions(given, 0) is None


def test_which_completions_join_a_group_depends_on_seed_and_id_alone_and_all_get_their_turn(
    make: Maker, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = _rows({"a": 5})

    def drawn(source: OfflineSource, ids: list[int]) -> dict[int, tuple[str, ...]]:
        return {
            i: tuple(_completions(source.completions(_prompt(tokenizer, "a", group_id=i), 2))) for i in ids
        }

    ids = list(range(0, 200, 5))  # one prompt of five, unshuffled
    first = drawn(make(rows, share=0.5), ids)
    assert all(len(set(texts)) == 2 for texts in first.values())
    assert drawn(make(rows, share=0.5), ids[::-1]) == first != drawn(make(rows, share=0.5, seed=4), ids)
    turns = [text for texts in first.values() for text in texts]
    assert all(turns.count(f"{i}a") >= 5 for i in range(5))  # 80 in all, 16 each on average


def test_what_does_not_fit_beside_the_runs_own_prompt_does_not_join(
    make: Maker, tokenizer: PreTrainedTokenizerBase
) -> None:
    source = make(
        [{"prompt": "q", "answer": "1", "completion": text} for text in ("1", "123")], share=0.5, max_length=5
    )
    longer = groups.with_columns(_prompt(tokenizer, "q"), prompt_ids=[[4, 4, 4]])
    assert _completions(source.completions(longer, 2)) == ["1"]  # 3 + 2 = 5 tokens; the other one 3 + 4


def test_rows_that_are_too_long_are_left_out_and_counted(make: Maker) -> None:
    # Prompt, completion and end-of-sequence: 1 + 2 + 1, 1 + 3 + 1, 1 + 4 + 1; 3 + 0 + 1 with a prompt of 3.
    rows = [{"prompt": "q", "answer": "1", "completion": text} for text in ("12", "123", "1234")]
    rows += [{"prompt": "1+1", "answer": "2", "completion": ""}] * 2
    for keys, num_too_long in (
        ({"max_length": 6}, 0),
        ({"max_length": 5}, 1),
        ({"max_length": 5, "max_tokens": 2}, 3),
    ):
        source = make(rows, **keys)
        assert (source.num_rows, source.num_too_long, source.num_single) == (5, num_too_long, 0)
    assert make(rows, max_length=4).num_single == 1  # q has one left
    assert _completions(make(rows, max_length=5, max_tokens=2).group(0, 0)) == ["12", "123"]


def test_the_smaller_limit_on_prompts_holds(make: Maker) -> None:
    for own, given in ((1, 50), (50, 1), (1, None), (None, 1)):
        source = make(_rows({"a": 2, "aa": 2}), own={"max_tokens": own}, max_tokens=given)
        assert source.num_too_long == 2 and len(source) == 1


def test_a_source_is_rendered_as_prompts_with_its_template_are(
    make: Maker, tokenizer: PreTrainedTokenizerBase
) -> None:
    source = make(_rows({"1+1": 2}), template="{prompt}=")
    prompts = PromptSet(
        PromptsConfig(path=str(make.path), template="{prompt}="), tokenizer, name="sums", max_tokens=None
    )
    assert source.group(0, 0)["prompt_ids"].to_pylist() == prompts.group(0)["prompt_ids"].to_pylist()
    assert "sources.people.template: required" in make.error(_rows({"1+1": 2}), template=None)


def test_a_chat_has_the_sources_system_prompt_or_that_of_the_prompts(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    (tmp_path / "data.jsonl").write_text('{"prompt": "1", "answer": "1", "completion": "2"}\n' * 2)
    chatty = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    chatty.chat_template = "{% for m in messages %}{{ m['content'] }}={% endfor %}"
    about = {
        "name": "people",
        "max_tokens": None,
        "max_length": 100,
        "num_completions": 4,
    }
    for own, first in ((None, [IDS["3"]]), ("0", [IDS["0"]]), ("", [])):
        said = {} if own is None else {"system_prompt": own}
        config = SourceConfig(path=str(tmp_path / "data.jsonl"), group_share=1, **said)
        config = config.rendered_like(PromptsConfig(path="x", system_prompt="3"), "sources.people")
        ids = OfflineSource(config, chatty, **about).group(0, 0)["prompt_ids"][0].as_py()
        assert ids == [*first, IDS["="], IDS["1"], IDS["="]]


def test_the_digest_changes_with_the_data_in_use_and_with_nothing_else(make: Maker) -> None:
    rows = _rows({"a": 3, "b": 1}, score=0.5)
    digest = make(rows, reward_column="score").digest()
    assert len(digest) == 64
    assert (
        make(
            [*rows[:3], {**rows[3], "completion": "other"}], reward_column="score", seed=9, num_completions=2
        ).digest()
        == digest
    )
    changed = [
        {**rows[0], key: value} for key, value in (("completion", "other"), ("score", 0.25), ("score", None))
    ]
    for others in (rows[2::-1], rows[:2], *([row, *rows[1:]] for row in changed)):
        assert make(others, reward_column="score").digest() != digest
    assert make(rows).digest() != digest


def test_the_digest_changes_with_a_column_that_reward_functions_read(make: Maker) -> None:
    first, same, other = (make(_rows({"a": 2}, tests=tests)).digest() for tests in ("1 == 1", "1 == 1", "1"))
    assert first == same != other


GOOD = {"prompt": "q", "answer": "1", "completion": "1", "score": 0.5}


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"prompt": ["q"]}, "row 1: prompt is list, not text or a number"),
        ({"completion": None}, "row 1: completion is empty (null)"),
        ({"completion": {"a": 1}}, "row 1: completion is dict, not text or a number"),
        ({"completion": "\ud800"}, "row 1: completion is not valid Unicode text (surrogates not allowed)"),
        ({"answer": {"a": "1"}}, "row 1: answer has fields of its own: name one of them (answer.a)"),
        ({"score": "good"}, "row 1: score is 'good', not a finite number"),
        ({"score": "0.5"}, "row 1: score is '0.5', not a finite number"),
        ({"score": float("nan")}, "row 1: score is 'nan', not a finite number"),
        ({"score": float("-inf")}, "row 1: score is '-inf', not a finite number"),
        ({"score": 1e39}, "row 1: score is '1e+39', not a finite number"),
        ({"score": 10**400}, f"row 1: score is '1{'0' * 59}', not a finite number"),
        ({"score": [1]}, "row 1: score is '[1]', not a finite number"),
    ],
)
def test_an_entry_that_is_not_right_is_named_by_its_row(
    make: Maker, row: dict[str, object], complaint: str
) -> None:
    assert (
        make.error([GOOD, {**GOOD, **row}], reward_column="score")
        == f"sources.people.path: FILE: {complaint}"
    )


def test_a_row_without_reward_and_answer_is_left_out_and_counted(make: Maker) -> None:
    rows = [{"prompt": "q", "completion": "1", "score": score} for score in (1, None, 0)]
    source = make(rows, reward_column="score")
    assert (source.num_rows, source.num_without_gold, len(source)) == (3, 1, 1)
    empty = [{**row, "answer": ""} for row in rows]
    assert make(empty, reward_column="score").num_without_gold == 1
    nothing = [{"prompt": "q", "completion": "1", "score": None}]
    assert make.error(nothing, reward_column="score").startswith(
        "sources.people.path: FILE: no row has a gold answer: answer is empty in all 1 rows"
    )


def test_a_row_without_a_prompt_is_left_out_and_counted(make: Maker) -> None:
    source = make([GOOD, GOOD, {**GOOD, "prompt": None}, {**GOOD, "prompt": ""}])
    assert (source.num_rows, source.num_without_prompt, len(source)) == (4, 2, 1)


def test_a_row_with_reward_may_lack_its_answer(make: Maker) -> None:
    source = make(
        [{**GOOD, "answer": None}, {**GOOD, "answer": None}, {**GOOD, "score": None}, {**GOOD}],
        reward_column="score",
        shuffle=False,
    )
    assert [source.group(i, i)["answer"][0].as_py() for i in range(2)] == ["", "1"]


def test_a_missing_column_is_named_by_its_key(make: Maker) -> None:
    row = {"prompt": "q", "completions": "1", "score": 1}
    had = "it has prompt, completions, score"
    assert (
        make.error([row])
        == f"sources.people.completion_column: FILE has no column 'completion'; {had}; did you mean "
        "completions?"
    )
    keys = {"completion_column": "completions"}
    assert make.error([row], **keys) == f"sources.people.answer_column: FILE has no column 'answer'; {had}"
    assert (
        make.error([row], **keys, prompt_column="text")
        == f"sources.people.prompt_column: FILE has no column 'text'; {had}"
    )
    assert (
        make.error([row], **keys, reward_column="r")
        == f"sources.people.reward_column: FILE has no column 'r'; {had}"
    )
    # With rewards the answer is optional, unless it was asked for.
    assert make.error([row], **keys, reward_column="score", answer_column="gold") == (
        f"sources.people.answer_column: FILE has no column 'gold'; {had}"
    )


def test_a_missing_file_and_an_empty_one_are_named(make: Maker, tmp_path: Path) -> None:
    assert make.error([], tmp_path / "no.jsonl") == "sources.people.path: no file FILE"
    assert make.error([]) == "sources.people.path: FILE has no rows"


def test_when_nothing_is_left_the_reason_is_named(make: Maker) -> None:
    assert make.error(_rows({"a": 2, "b": 1}), max_length=2, max_tokens=50) == (
        "sources.people.path: FILE: all 3 rows are too long: a prompt may have 2 tokens, and 2 with its "
        "completion"
    )
    rows = [*_rows({"a": 1, "b": 1}), {"prompt": "a", "answer": "1", "completion": "12345"}]
    assert make.error(rows, max_length=5) == (
        "sources.people.path: FILE: no prompt has two completions, as a group must (2 have one, 1 of 3 "
        "rows are too long)"
    )
    assert make(rows, max_length=5, share=0.5).num_too_long == 1  # one is enough to join a group


def test_a_tokenizer_without_an_end_of_sequence_is_refused(
    make: Maker, tokenizer: PreTrainedTokenizerBase
) -> None:
    make.tokenizer = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    make.tokenizer.eos_token = None
    assert make.error(_rows({"a": 2})) == (
        "sources.people: the model's tokenizer has no end-of-sequence token, and every completion must end "
        "with one"
    )


def test_limit_takes_the_first_rows_before_it_looks_at_them(make: Maker) -> None:
    assert make([*_rows({"a": 2}), {"prompt": None}], limit=2).num_rows == 2


@pytest.mark.parametrize(
    "shares",
    [
        {"a": 0.25},
        {"a": 0.1, "b": 0.3},
        {"a": 1.0},
        {"a": 0.333},
        {"a": 0.3, "b": 0.1, "c": 0.6},
        {"a": 0.05, "b": 0.5, "c": 0.11, "d": 0.07},
        {"a": 0.0, "b": 0.2},
        {},
    ],
)
def test_after_any_number_of_groups_every_source_has_had_its_share_rounded_down_or_up(
    shares: dict[str, float],
) -> None:
    mixture = SourceSchedule(shares)
    exact = {name: Fraction(str(share)) for name, share in shares.items()}
    counts, num_ordinary = dict.fromkeys(shares, 0), 0
    for group_id in range(10_000):
        assert mixture.ordinary(group_id) == num_ordinary
        whole = mixture.source_of(group_id)
        if whole is None:
            num_ordinary += 1
        else:
            name, number = whole
            assert number == counts[name]
            counts[name] += 1
        for name, share in exact.items():
            assert math.floor((group_id + 1) * share) <= counts[name] <= math.ceil((group_id + 1) * share)
    assert num_ordinary == 10_000 * (1 - sum(exact.values()))


def test_three_thirds_are_every_group() -> None:
    mixture = SourceSchedule(
        {"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}
    )  # 0.3333333333333333 each: less than 1 in all
    assert [mixture.source_of(i) for i in range(4)] == [("a", 0), ("b", 0), ("c", 0), ("a", 1)]
    assert mixture.source_of(3_000_002) == ("c", 1_000_000) and mixture.ordinary(3_000_002) == 0


def test_a_group_far_out_is_looked_up_and_no_order_of_asking_matters() -> None:
    near, far = SourceSchedule({"a": 0.1, "b": 0.3}), SourceSchedule({"a": 0.1, "b": 0.3})
    ahead = [far.source_of(i) for i in reversed(range(10_000_000, 10_000_010))][::-1]
    assert [near.source_of(i) for i in range(10)] == [
        whole and (whole[0], whole[1] - {"a": 1, "b": 3}[whole[0]] * 1_000_000) for whole in ahead
    ]
    assert far.ordinary(10_000_000) == 6_000_000


# ------------------------------------------------------------------------- objectives that take groups of one


def test_sft_trains_on_single_completions_which_need_neither_rewards_nor_golds(make: Maker) -> None:
    rows = [{"prompt": p, "completion": c} for p, c in (("q", "1"), ("q", "2"), ("1+1", "2"))]
    source = make(rows, shuffle=False, loss=loss_config(objective="sft"), num_completions=1)
    assert len(source) == 3 and source.num_single == 0 and source.brings_rewards
    table = pa.concat_tables([source.group(i, i) for i in range(3)])
    assert table["completions"].to_pylist() == [["1"], ["2"], ["2"]]
    assert table["rewards"].to_pylist() == [[1.0], [1.0], [1.0]] and table["answer"].to_pylist() == [""] * 3
    groups.validate(table, (*groups.PROMPT_COLUMNS, *groups.COMPLETION_COLUMNS))
    together = make(rows, shuffle=False, loss=loss_config(objective="sft"))  # k = 4
    assert [len(together.group(i, i)["completions"][0]) for i in range(2)] == [2, 1] and len(together) == 2
    some = [*rows[:2], {**rows[2], "answer": "2"}]
    assert make(some, loss=loss_config(objective="sft")).num_without_gold == 0
    compared = [{**row, "answer": "2"} for row in (rows[0], rows[2])]
    assert "no prompt has two completions" in make.error(compared, loss=None)


def test_poft_reads_the_aligned_models_mean_log_prob_of_every_row(make: Maker) -> None:
    poft = loss_config(objective="poft")
    rows = [{"prompt": "q", "completion": "1", "a": -0.5}, {"prompt": "1", "completion": "2", "a": -1.5}]
    source = make(rows, shuffle=False, loss=poft, reward_column="a")
    assert [source.group(i, i)["rewards"].to_pylist() for i in range(2)] == [[[-0.5]], [[-1.5]]]
    by_model = [{**row, "a": {"llama": row["a"], "yi": -1.0}} for row in rows]  # the mean over the models
    source = make(by_model, shuffle=False, loss=poft, reward_column="a")
    assert [source.group(i, i)["rewards"].to_pylist() for i in range(2)] == [[[-0.75]], [[-1.25]]]
    wrong = [rows[0], {**rows[1], "a": None}]
    assert make.error(wrong, loss=poft, reward_column="a") == (
        "sources.people.path: FILE: row 1: a is null: loss.objective poft needs it of every row"
    )
    wrong = [rows[0], {**rows[1], "a": {"yi": "x"}}]
    assert "row 1: a.yi is 'x', not a finite number" in make.error(wrong, loss=poft, reward_column="a")
    assert make.error(rows, loss=poft).startswith("sources.people.reward_column: required")
