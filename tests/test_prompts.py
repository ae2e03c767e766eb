"""Prompt sets: how rows are read, rendered, ordered over epochs, counted and refused."""

import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config

from gvpo_ray import groups
from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.data import PromptsConfig
from gvpo_ray.data.prompts import PromptSet, load_rows

SAMPLE = Path(__file__).parent / "data" / "gsm8k_math_sample.parquet"

CHAT = (
    "{% for m in messages %}{{ '<s>' if loop.first else '' }}{{ m['role'][0] }}:{{ m['content'] }};{% "
    "endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


def _tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """One token per byte, its id the byte's place in a fixed list; <s> (id 0) is put before every text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(
        models.WordLevel(
            {"<s>": 0, **{letter: i for i, letter in enumerate(alphabet, start=1)}}, unk_token="<s>"
        )
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            pre_tokenizers.Split("", "isolated"),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
    tokenizer.chat_template = chat_template
    return tokenizer


def _config(path: Path | str, **keys: object) -> PromptsConfig:
    return PromptsConfig(**{"path": str(path), "template": "{prompt}", **keys})


def _jsonl(folder: Path, rows: list[dict[str, object]], name: str = "data.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _sums(folder: Path, num: int) -> Path:
    return _jsonl(folder, [{"prompt": f"{i}+{i}", "answer": 2 * i} for i in range(num)])


def _set(config: PromptsConfig, max_tokens: int | None = None, **more: object) -> PromptSet:
    return PromptSet(config, _tokenizer(), **{"name": "sums", "max_tokens": max_tokens, **more})


def _error(config: PromptsConfig, max_tokens: int | None = None, **more: object) -> str:
    with pytest.raises(ConfigError) as caught:
        _set(config, max_tokens, **more)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_jsonl_and_parquet_give_the_same_rows_and_numbers_become_text(tmp_path: Path) -> None:
    lines = _jsonl(tmp_path, [{"prompt": "1+1", "answer": 2}, {"prompt": "1/2", "answer": "0.5"}])
    pq.write_table(pa.table({"prompt": ["1+1", "1/2"], "answer": ["2", "0.5"]}), tmp_path / "data.parquet")
    from_lines, from_parquet = _set(_config(lines)).all(), _set(_config(tmp_path / "data.parquet")).all()
    assert from_lines.equals(from_parquet)
    groups.validate(from_lines, groups.PROMPT_COLUMNS)
    assert from_lines.column_names == list(groups.PROMPT_COLUMNS)
    assert from_lines["answer"].to_pylist() == ["2", "0.5"]
    assert from_lines["dataset"].to_pylist() == ["sums", "sums"]
    assert from_lines["group_id"].to_pylist() == [0, 1]


def test_blank_lines_are_skipped_and_json_is_read_by_lines(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(
        '{"prompt": "a", "answer": "b"}\n\n  \n{"prompt": "c", "answer": 1.5}'
    )
    assert _set(_config(tmp_path / "data.json")).all()["answer"].to_pylist() == ["b", "1.5"]


def test_real_problems_come_through_unchanged() -> None:
    prompts = _set(_config(SAMPLE, template="Question: {prompt}\nAnswer:"))
    source = pq.read_table(SAMPLE)
    assert prompts.num_rows == len(prompts) == 20
    assert prompts.all()["prompt"].to_pylist() == source["prompt"].to_pylist()
    assert prompts.all()["answer"].to_pylist() == source["answer"].to_pylist()
    decoded = _tokenizer().convert_ids_to_tokens(prompts.all()["prompt_ids"].to_pylist()[0])
    assert len(decoded) == 1 + len(f"Question: {source['prompt'][0]}\nAnswer:".encode())


def test_a_folder_of_data_files_loads_as_a_hugging_face_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "sums").mkdir()
    for split, answer in (("train", "2"), ("test", "3")):
        pq.write_table(
            pa.table({"prompt": ["1+1"], "answer": [answer]}), tmp_path / "sums" / f"{split}.parquet"
        )
    assert _set(_config(tmp_path / "sums")).all()["answer"].to_pylist() == ["2"]
    assert _set(_config(tmp_path / "sums", split="test")).all()["answer"].to_pylist() == ["3"]
    assert "split dev" in _error(_config(tmp_path / "sums", split="dev"))


def test_a_name_goes_to_the_hub_with_its_subset_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*args: object, **keys: object) -> datasets.Dataset:
        asked.append((args, keys))
        return datasets.Dataset.from_dict({"question": ["1+1", "2+2"], "gold": [2, 4]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("gvpo_ray.data.hub.silence", lambda *_: None)
    config = _config(
        "openai/gsm8k", subset="main", split="test", prompt_column="question", answer_column="gold", limit=1
    )
    assert _set(config).all()["answer"].to_pylist() == ["2"]
    assert asked == [(("openai/gsm8k", "main"), {"split": "test"})]


def test_a_hub_name_that_does_not_load_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: object, **__: object) -> None:
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'no/such'\ndoesn't exist")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("gvpo_ray.data.hub.silence", lambda *_: None)
    assert _error(_config("no/such")) == (
        "prompts.path: no/such is no file, and no data set that loads (split train): Dataset 'no/such' "
        "doesn't exist"
    )


def test_the_template_takes_braces_in_problems_and_in_itself_as_they_are(tmp_path: Path) -> None:
    path = _jsonl(tmp_path, [{"prompt": r"\frac{1}{2} {answer} {0}", "answer": "1"}])
    text = r"{x} \frac{1}{2} {answer} {0} \boxed{}"
    prompts = _set(_config(path, template=r"{x} {prompt} \boxed{}"))
    assert prompts.all()["prompt"].to_pylist() == [r"\frac{1}{2} {answer} {0}"]
    assert prompts.all()["prompt_ids"].to_pylist() == [_tokenizer()(text)["input_ids"]]


def test_a_plain_template_gets_the_tokenizers_special_tokens_and_a_chat_its_own(tmp_path: Path) -> None:
    path = _jsonl(tmp_path, [{"prompt": "1+1", "answer": 2}])
    plain = _set(_config(path)).all()["prompt_ids"].to_pylist()[0]
    letters = _tokenizer()("1+1", add_special_tokens=False)["input_ids"]
    assert plain == [0, *letters]
    tokenizer = _tokenizer(CHAT)
    config = PromptsConfig(path=str(path), system_prompt="Be brief.")
    chat = PromptSet(config, tokenizer, name="sums", max_tokens=None).all()["prompt_ids"].to_pylist()[0]
    assert chat == tokenizer("<s>s:Be brief.;u:1+1;a:", add_special_tokens=False)["input_ids"]
    assert chat.count(0) == 1
    as_transformers_does = tokenizer.apply_chat_template(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1"}],
        add_generation_prompt=True,
        return_dict=True,
    )
    assert chat == as_transformers_does["input_ids"]


def test_each_epoch_is_a_permutation_of_its_own_that_seed_and_id_determine(tmp_path: Path) -> None:
    path = _sums(tmp_path, 20)
    prompts = _set(_config(path), seed=3)
    epochs = [[prompts.group(20 * epoch + i)["prompt"][0].as_py() for i in range(20)] for epoch in range(3)]
    in_order = [f"{i}+{i}" for i in range(20)]
    assert all(sorted(epoch) == sorted(in_order) and epoch != in_order for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    # Another instance, asked backwards: nothing depends on what was asked before.
    again = _set(_config(path), seed=3)
    assert [again.group(i)["prompt"][0].as_py() for i in reversed(range(60))][::-1] == [
        *epochs[0],
        *epochs[1],
        *epochs[2],
    ]
    assert [_set(_config(path), seed=4).group(i)["prompt"][0].as_py() for i in range(20)] != epochs[0]


def test_a_group_is_one_row_with_its_own_id(tmp_path: Path) -> None:
    row = _set(_config(_sums(tmp_path, 3))).group(7)
    assert row.num_rows == 1 and row["group_id"].to_pylist() == [7]
    groups.validate(row, groups.PROMPT_COLUMNS)
    first, operand = row["prompt"][0].as_py().split("+")
    assert row["answer"].to_pylist() == [str(int(first) + int(operand))]


def test_without_shuffle_every_epoch_keeps_the_files_order(tmp_path: Path) -> None:
    prompts = _set(_config(_sums(tmp_path, 3), shuffle=False))
    assert [prompts.group(i)["answer"][0].as_py() for i in range(6)] == ["0", "2", "4", "0", "2", "4"]


def test_all_keeps_the_files_order_whatever_shuffle_says(tmp_path: Path) -> None:
    prompts = _set(_config(_sums(tmp_path, 4)))
    assert prompts.all()["answer"].to_pylist() == ["0", "2", "4", "6"]
    assert prompts.all(limit=2)["group_id"].to_pylist() == [0, 1]


def test_prompts_that_are_too_long_are_left_out_and_counted_never_cut(tmp_path: Path) -> None:
    # <s> and the letters: 4, 6 and 8 tokens
    path = _jsonl(tmp_path, [{"prompt": text, "answer": "1"} for text in ("abc", "abcde", "abcdefg")])
    for keys, context in (
        ({"max_tokens": 6}, None),
        ({"max_tokens": 6}, 100),
        ({}, 6),
        ({"max_tokens": 100}, 6),
    ):
        prompts = _set(_config(path, **keys), context)
        assert prompts.all()["prompt"].to_pylist() == ["abc", "abcde"]
        assert (prompts.num_rows, prompts.num_too_long, prompts.longest, len(prompts)) == (3, 1, 8, 2)
    assert _set(_config(path)).num_too_long == 0


def test_when_no_prompt_fits_the_key_to_change_is_named(tmp_path: Path) -> None:
    path = _sums(tmp_path, 3)  # "0+0" with <s>: 4 tokens
    assert _error(_config(path, max_tokens=3), 100) == (
        "prompts.max_tokens: 3 tokens are too few: all 3 prompts are longer (the shortest has 4 tokens)"
    )
    message = _error(_config(path, max_tokens=50), 3)
    assert (
        "context leaves 3 tokens" in message
        and "sampling.max_tokens" in message
        and "model.max_length" in message
    )


def test_limit_takes_the_first_rows_before_it_looks_at_them(tmp_path: Path) -> None:
    path = _jsonl(
        tmp_path,
        [{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": "2"}, {"prompt": None, "answer": "3"}],
    )
    assert _set(_config(path, limit=2)).all()["prompt"].to_pylist() == ["a", "b"]


def test_the_digest_changes_with_the_data_and_with_nothing_else(tmp_path: Path) -> None:
    data = [{"prompt": "a", "answer": "b"}, {"prompt": "c", "answer": "d"}]
    digest = _set(_config(_jsonl(tmp_path, data))).digest()
    assert len(digest) == 64
    assert (
        _set(_config(_jsonl(tmp_path, data, "copy.jsonl"), template="Q {prompt}"), seed=9).digest() == digest
    )
    for other in (
        data[::-1],
        data[:1],
        [{"prompt": "a", "answer": "b!"}, data[1]],
        [{"prompt": "ab", "answer": ""}, data[1]],
    ):
        assert _set(_config(_jsonl(tmp_path, other))).digest() != digest


def test_a_missing_file_is_named_with_the_key_it_came_from(tmp_path: Path) -> None:
    assert _error(_config(tmp_path / "no.parquet")) == f"prompts.path: no file {tmp_path / 'no.parquet'}"
    assert (
        _error(_config("no.jsonl"), key="evaluation.sets.heldout")
        == "evaluation.sets.heldout.path: no file no.jsonl"
    )


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data.xls").write_text("prompt,answer\n1,2\n")
    assert "ends in .parquet, .jsonl, .json" in _error(_config(tmp_path / "data.xls"))


def test_a_missing_column_is_named_with_those_that_are_there_and_the_nearest(tmp_path: Path) -> None:
    path = _jsonl(tmp_path, [{"question": "a", "answers": "b"}])
    message = _error(_config(path, prompt_column="question"))
    assert (
        message
        == f"prompts.answer_column: {path} has no column 'answer'; it has question, answers; did you mean "
        "answers?"
    )
    assert (
        _error(_config(path))
        == f"prompts.prompt_column: {path} has no column 'prompt'; it has question, answers"
    )


def test_an_empty_data_set_is_refused(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"prompt": pa.array([], pa.string()), "answer": pa.array([], pa.string())}),
        tmp_path / "data.parquet",
    )
    for path in (tmp_path / "data.parquet", _jsonl(tmp_path, [])):
        assert _error(_config(path)) == f"prompts.path: {path} has no rows"


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"prompt": ["a"], "answer": "1"}, "row 1: prompt is list, not text or a number"),
        (
            {"prompt": "a", "answer": {"x": 1}},
            "row 1: answer has fields of its own: name one of them (answer.x)",
        ),
        (
            {"prompt": "\ud800", "answer": "1"},
            "row 1: prompt is not valid Unicode text (surrogates not allowed)",
        ),
    ],
)
def test_an_entry_that_is_not_text_or_a_number_is_named_by_its_row(
    tmp_path: Path, row: dict[str, object], complaint: str
) -> None:
    path = _jsonl(tmp_path, [{"prompt": "a", "answer": "1"}, row])
    assert _error(_config(path)) == f"prompts.path: {path}: {complaint}"


EMPTY = [None, "", " \n", float("nan"), [], [{"role": "user", "content": " "}]]
EMPTY += [[{"role": "assistant", "content": "5"}]]


def test_rows_without_a_prompt_are_left_out_and_counted(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "asks"}]
    for given in ("asks", chat, json.dumps(chat)):
        rows = [{"prompt": empty, "answer": "1"} for empty in EMPTY]
        prompts = _set(_config(_jsonl(tmp_path, [*rows, {"answer": "1"}, {"prompt": given, "answer": "1"}])))
        assert (prompts.num_rows, prompts.num_without_prompt, prompts.num_without_gold) == (9, 8, 0), given
        assert prompts.all()["prompt"].to_pylist() == ["asks"]
    for empty in EMPTY:
        path = _jsonl(tmp_path, [{"prompt": empty, "answer": "1"}] * 2)
        assert _error(_config(path)) == (
            f"prompts.path: {path}: no row has a prompt: prompt is empty in all 2 rows"
        )


def test_a_template_over_columns_that_are_all_empty_is_no_prompt(tmp_path: Path) -> None:
    rows = [
        {"q": "a", "c": None, "answer": "1"},
        {"q": None, "c": "b", "answer": "1"},
        {"q": "", "answer": "1"},
    ]
    prompts = _set(_config(_jsonl(tmp_path, rows), prompt_column="Q: {q} {c}"))
    assert prompts.all()["prompt"].to_pylist() == ["Q: a ", "Q:  b"] and prompts.num_without_prompt == 1


def test_rows_without_a_gold_are_left_out_and_counted(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["a", "b", "c"], "answer": [1, 2, None]}), tmp_path / "data.parquet")
    prompts = _set(_config(tmp_path / "data.parquet"))
    assert (prompts.num_rows, prompts.num_without_gold, len(prompts)) == (3, 1, 2)
    golds = [None, "", "  ", float("nan"), [], [None], "5"]
    rows = [{"prompt": f"p{i}", "answer": gold} for i, gold in enumerate(golds)]
    prompts = _set(_config(_jsonl(tmp_path, [*rows, {"prompt": "no key"}])))
    assert prompts.num_without_gold == 7 and prompts.all()["prompt"].to_pylist() == ["p6"]


def test_data_without_any_gold_are_refused_unless_the_config_says_so(tmp_path: Path) -> None:
    path = _jsonl(tmp_path, [{"prompt": "a", "answer": ""}, {"prompt": "b", "answer": None}])
    assert _error(_config(path)) == (
        f"prompts.path: {path}: no row has a gold answer: answer is empty in all 2 rows "
        '(prompts.answer_column: "" trains without golds, if no reward function needs them)'
    )
    prompts = _set(_config(path, answer_column=""))
    assert prompts.all()["answer"].to_pylist() == ["", ""] and prompts.num_without_gold == 0


def test_what_is_not_json_is_named_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    good = b'{"prompt": "a", "answer": "b"}\n\n'
    cases = (
        (b'{"prompt": \n', "is not JSON:"),
        (b'{"prompt": "\xff"}', "is not JSON:"),
        (b"[1, 2]\n", "is not a JSON object"),
    )
    for bad, complaint in cases:
        path.write_bytes(good + bad)
        assert f"{path}: line 3 {complaint}" in _error(_config(path))


def test_what_is_not_parquet_is_refused(tmp_path: Path) -> None:
    for content in (b"prompt,answer\n1,2\n", b"", SAMPLE.read_bytes()[:2000]):
        (tmp_path / "data.parquet").write_bytes(content)
        assert f"{tmp_path / 'data.parquet'} is not Parquet" in _error(_config(tmp_path / "data.parquet"))


def test_a_prompt_without_tokens_is_refused(tmp_path: Path) -> None:
    path = _jsonl(tmp_path, [{"prompt": "a", "answer": "1"}, {"prompt": "z", "answer": "1"}])
    tokenizer = _tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("z", "")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    with pytest.raises(ConfigError, match=r"row 1: the prompt has no tokens"):
        PromptSet(_config(path), tokenizer, name="sums", max_tokens=None)


def test_a_tokenizer_without_chat_template_needs_a_template(tmp_path: Path) -> None:
    message = _error(_config(_sums(tmp_path, 1), template=None))
    assert message.startswith("prompts.template: required, because the tokenizer has no chat template")


def test_load_rows_reads_any_columns_as_text(tmp_path: Path) -> None:
    path = _jsonl(tmp_path, [{"q": "1+1", "worked": "It is 2.", "n": 2}])
    rows = load_rows(_config(path), {"prompt": "q", "solution": "worked", "number": "n"}, "warm_start.data")
    assert rows.to_pylist() == [{"prompt": "1+1", "solution": "It is 2.", "number": "2"}]
    with pytest.raises(
        ConfigError, match=r"warm_start\.data \(solution\): .* has no column 'work'; .* did you mean worked\?"
    ):
        load_rows(_config(path), {"prompt": "q", "solution": "work"}, "warm_start.data")


def test_a_folder_of_parts_reads_like_one_file_whatever_its_name(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}+{i}", "answer": str(2 * i), "note": None if i < 3 else "n"} for i in range(6)]
    for suffix in (".parquet", ".jsonl"):
        folder = tmp_path / f"parts{suffix}"
        (folder / "_temporary").mkdir(parents=True)
        for name in ("_SUCCESS", ".part-0.crc", f"_temporary/part-9{suffix}", f".part-8{suffix}"):
            (folder / name).write_text("no data")
        for number in (1, 0):  # the second part is written first
            part = rows[3 * number : 3 * number + 3]
            if suffix == ".parquet":
                pq.write_table(pa.Table.from_pylist(part), folder / f"part-{number}.snappy{suffix}")
            else:
                _jsonl(folder, part, f"part-{number}{suffix}")
        assert _set(_config(folder)).all()["answer"].to_pylist() == [row["answer"] for row in rows]
        assert _set(_config(folder, limit=4)).all()["answer"].to_pylist() == ["0", "2", "4", "6"]


@pytest.mark.parametrize(
    ("splits", "notes"),
    [
        ("as the family does", []),
        (
            "by characters",
            [
                "the model's tokenizer does not keep the text of the first prompt: 'What is 1 + 2 ?' is read "
                "as 'Whatis1+2?'"
            ],
        ),
    ],
)
def test_a_tokenizer_that_transformers_reads_in_another_way_is_told(
    splits: str, notes: list[str], tmp_path: Path
) -> None:
    """Pins a fact of transformers 5: a Qwen2 folder's tokenizer.json keeps its tokens, not its splitting."""
    alphabet = pre_tokenizers.ByteLevel.alphabet() if splits == "as the family does" else "What is1+2?"
    tokens = {letter: i for i, letter in enumerate(["<pad>", *sorted(set(alphabet))])}
    backend = Tokenizer(models.WordLevel(tokens, unk_token="<pad>"))
    if splits == "as the family does":
        backend = Tokenizer(models.BPE(tokens, [], unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>").save_pretrained(tmp_path)
    Qwen2Config().save_pretrained(tmp_path)
    path = _jsonl(tmp_path, [{"prompt": "What is 1 + 2 ?", "answer": 3}])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert type(tokenizer).__name__ == "Qwen2Tokenizer"
    assert PromptSet(_config(path), tokenizer, name="sums", max_tokens=None).notes == notes
