"""A model from nothing: what it is taught, its tokenizer, and that a folder of model.path is a whole model or
not there.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gvpo_ray.cli import main
from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.run import GVPOConfig
from gvpo_ray.data.prompts import PromptSet
from gvpo_ray.learner import warm_start as module
from gvpo_ray.learner.logprobs import CompletionLogprobs, padded_inputs
from gvpo_ray.learner.warm_start import (
    END,
    _batches,
    new_model,
    read_examples,
    seeded,
    train_tokenizer,
    warm_start,
)

JOBS = Path(__file__).parent.parent / "jobs"
NATALIA = {  # the first problem of GSM8K (MIT, see data/LICENSE.md)
    "prompt": "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in "
    "May. How many clips did Natalia sell altogether in April and May?",
    "answer": "72",
    "meta": json.dumps(
        {
            "solution": "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n"
            "Natalia sold 48+24 = <<48+24=72>>72 clips altogether in April and May.\n#### 72"
        }
    ),
}
DIGITS = [
    {"prompt": f"Say {i % 10}.", "answer": str(i % 10), "solution": f"It is {i % 10}."} for i in range(60)
]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., GVPOConfig]:
    """`config(**overrides)`: a run of which `gvpo-ray warm-start` makes the model in a second, its data in
    worked.jsonl; `__` for a dot.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "worked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in DIGITS))
    small = {
        "run_dir": "run",
        "num_steps": 1,
        "model": {"path": "models/tiny"},
        "prompts": {"path": "worked.jsonl", "template": "{prompt}\n"},
        "warm_start": {
            "data": {"path": "worked.jsonl", "template": "{prompt}\n"},
            "completion": "{solution} \\boxed{{answer}}",
            "vocab_size": 300,
            "architecture": {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "max_position_embeddings": 64,
            },
            "num_epochs": 20,
            "batch_size": 20,
            "learning_rate": 0.01,
            "num_threads": 1,
        },
    }

    def make(**overrides: Any) -> GVPOConfig:
        return GVPOConfig.from_dict(
            small, {key.replace("__", "."): value for key, value in overrides.items()}
        )

    return make


def write(name: str, *rows: dict[str, Any]) -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


# --- what it is taught --------------------------------------------------------------------------------------


def test_gsm8k_loses_its_calculator_marks_and_its_last_line_and_gets_a_box(
    config: Callable[..., GVPOConfig],
) -> None:
    """With the section of the shipped job, on a real problem."""
    job = GVPOConfig.from_file(
        JOBS / "gsm8k_cpu.yaml", {"warm_start.data.path": write("gsm8k.jsonl", NATALIA)}
    )
    assert job.warm_start is not None
    assert read_examples(job.warm_start) == [
        (
            NATALIA["prompt"] + "\n",
            "Natalia sold 48/2 = 24 clips in May.\nNatalia sold 48+24 = 72 clips altogether in April and "
            "May.\n\\boxed{72}",
        )
    ]
    assert job.prompts.template == job.warm_start.data.template == job.evaluation.sets["gsm8k_test"].template


def test_examples_are_templated_and_braces_of_the_texts_stay(config: Callable[..., GVPOConfig]) -> None:
    path = write(
        "braces.jsonl", {"question": "Is {solution} {x}?", "gold": 7, "working": "By {answer} and {prompt}. "}
    )
    section = config(
        warm_start__data={
            "path": path,
            "template": "Q: {prompt}\nA:",
            "prompt_column": "question",
            "answer_column": "gold",
        },
        warm_start__solution_column="working",
        warm_start__completion=" {solution} So {answer}: \\boxed{{answer}}",
    ).warm_start
    assert section is not None
    assert read_examples(section) == [
        ("Q: Is {solution} {x}?\nA:", " By {answer} and {prompt}. So 7: \\boxed{7}")
    ]


def test_without_template_the_prompt_is_itself(config: Callable[..., GVPOConfig]) -> None:
    section = config(
        warm_start__data={"path": "worked.jsonl", "limit": 1}, warm_start__completion="{answer}"
    ).warm_start
    assert section is not None
    assert read_examples(section) == [("Say 0.", "0")]


@pytest.mark.parametrize(
    ("row", "keys", "complaint"),
    [
        (
            {"meta": "no JSON"},
            {"solution_column": "meta.solution"},
            "warm_start.solution_column: row 1: meta is not JSON with",
        ),
        (
            {"meta": "{}"},
            {"solution_column": "meta.solution"},
            "warm_start.solution_column: row 1: meta is not JSON with",
        ),
        (
            {"meta": "[1]"},
            {"solution_column": "meta.solution"},
            "warm_start.solution_column: row 1: meta is not JSON with",
        ),
        (
            {"meta": '{"solution": 3}'},
            {"solution_column": "meta.solution"},
            "row 1: 'solution' in meta is int, not text",
        ),
        (
            {"meta": '{"solution": null}'},
            {"solution_column": "meta.solution"},
            "row 1: 'solution' in meta is NoneType, not text",
        ),
        (
            {},
            {"solution_column": "solutoin"},
            "warm_start.data (solution): x.jsonl has no column 'solutoin'; it has prompt, answer, meta",
        ),
        (
            {},
            {"solution_column": "answer", "remove": "(<<"},
            "warm_start.remove: '(<<' is not a regular expression",
        ),
        ({}, {"data.path": "nowhere.parquet"}, "warm_start.data.path: no file nowhere.parquet"),
        ({}, {"data.answer_column": "gold"}, "warm_start.data.answer_column: x.jsonl has no column 'gold'"),
        (
            {"answer": None},
            {"solution_column": "meta"},
            "warm_start.data.path: x.jsonl: row 1: answer is empty (null)",
        ),
    ],
)
def test_bad_data_is_one_line_that_names_the_row(
    config: Callable[..., GVPOConfig], row: dict[str, Any], keys: dict[str, Any], complaint: str
) -> None:
    write("x.jsonl", NATALIA, {**NATALIA, **row})
    section = config(
        **{
            "warm_start__data__path": "x.jsonl",
            **{f"warm_start__{key}": value for key, value in keys.items()},
        }
    ).warm_start
    assert section is not None
    with pytest.raises(ConfigError, match=re.escape(complaint)) as error:
        read_examples(section)
    assert "\n" not in str(error.value)


# --- its tokenizer ------------------------------------------------------------------------------------------

TEXTS = ["What is 48 + 24?\n", "Natalia sold 48/2 = 24 clips in May.\n\\boxed{72}", "2024 2024 2024 2024"]


def test_every_digit_is_a_token_of_its_own(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS * 50, 400)
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("in 2024: 48/2=24").input_ids)
    assert [token for token in tokens if re.search(r"\d", token)] == list("202448224")
    assert not [token for token in tokenizer.get_vocab() if len(re.findall(r"\d", token)) and len(token) > 1]
    assert any(token.endswith("clips") for token in tokenizer.get_vocab())  # words do become tokens


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "  two  spaces ",
        "a\n\n\tb\r\n",
        "Überlege: 数学 ✓ 🎉",
        "\\frac{1}{2} $x^{10}$ 3,000.50",
        "don't 's . , !",
        "\x00\x7f",
    ],
)
def test_decoding_gives_back_the_text(text: str, tmp_path: Path) -> None:
    """Also after a round through the folder, where engines and learner find it."""
    tokenizer = train_tokenizer(TEXTS, 300)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(text).input_ids == tokenizer(text).input_ids
    for each in (tokenizer, loaded):
        assert each.decode(each(text).input_ids) == text
        assert (each.eos_token, each.pad_token) == (END, END)


def test_the_vocabulary_has_the_size_that_was_asked_for_or_what_the_texts_give() -> None:
    assert (
        len(
            train_tokenizer(
                [" ".join(f"w{chr(97 + i)}{chr(97 + j)}" for i in range(26) for j in range(26))], 300
            )
        )
        == 300
    )
    assert len(train_tokenizer(["1 2 3"], 4096)) < 300  # every byte, the end, and no more pairs to merge


# --- the model ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "complaint"),
    [
        ({"hiden_size": 32}, "warm_start.architecture: Qwen2Config has no hiden_size"),
        ({"hidden_size": "wide"}, "warm_start.architecture: .*'hidden_size' expected int, got str"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "warm_start.architecture: RuntimeError: "),
        ({"hidden_act": "relooo"}, "warm_start.architecture: KeyError: 'relooo'"),
        ({"vocab_size": 10}, "warm_start.architecture: IndexError: "),  # smaller than the tokenizer's
    ],
)
def test_an_architecture_that_does_not_go_is_refused(architecture: dict[str, Any], complaint: str) -> None:
    tokenizer = train_tokenizer(TEXTS, 300)
    with pytest.raises(ConfigError, match=complaint) as error:
        new_model(
            len(tokenizer),
            tokenizer,
            {
                "num_hidden_layers": 1,
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_attention_heads": 2,
                **architecture,
            },
        )
    assert "\n" not in str(error.value)


def test_what_it_writes_is_a_model_that_has_learnt_and_that_the_run_can_load(
    config: Callable[..., GVPOConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    run = config()
    folder = warm_start(run)
    printed = capsys.readouterr().out
    assert folder == Path("models/tiny") and "60 worked problems" in printed and "left out" not in printed
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]

    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    assert model.config.eos_token_id == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids(END)
    prompts = PromptSet(run.prompts, tokenizer, name="worked", max_tokens=40)
    assert len(prompts) == 60
    right = 0
    for row in prompts.all(10).to_pylist():
        ids = torch.tensor([row["prompt_ids"]])
        with torch.no_grad():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, do_sample=False
            )[0, ids.shape[1] :].tolist()
        right += tokenizer.decode(out) == f"It is {row['answer']}. \\boxed{{{row['answer']}}}{END}"
    assert right >= 9


def test_training_lowers_the_loss_and_the_same_seed_gives_the_same_model(
    config: Callable[..., GVPOConfig], tmp_path: Path
) -> None:
    def loss(model: Any) -> float:
        tokenizer = AutoTokenizer.from_pretrained("models/a")
        section = config().warm_start
        assert section is not None
        rows = [
            {
                "prompt_ids": tokenizer(prompt).input_ids,
                "completion_ids": [[*tokenizer(completion).input_ids, tokenizer.eos_token_id]],
            }
            for prompt, completion in read_examples(section)
        ]
        with torch.no_grad():
            return float(-CompletionLogprobs(model)(**padded_inputs(rows, "cpu")[0]).mean())

    few = {"warm_start__num_epochs": 10}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        warm_start(config(model__path=f"models/{name}", seed=seed, **few))
    a, b, c = (AutoModelForCausalLM.from_pretrained(f"models/{name}").eval() for name in "abc")
    untrained = new_model(
        a.config.vocab_size, AutoTokenizer.from_pretrained("models/a"), config().warm_start.architecture
    ).eval()  # type: ignore[union-attr]
    assert loss(untrained) == pytest.approx(math.log(a.config.vocab_size), abs=0.3)  # it knows nothing
    assert loss(a) < 0.5 * loss(untrained)
    same = [torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True)]
    other = [torch.equal(x, y) for x, y in zip(a.parameters(), c.parameters(), strict=True)]
    assert all(same) and not all(other)


def test_worked_problems_that_are_too_long_are_left_out_and_counted(
    config: Callable[..., GVPOConfig], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    taught: list[Any] = []
    monkeypatch.setattr(module, "imitate", lambda model, rows, section: taught.extend(rows))
    bare = {"warm_start__data__template": "{prompt}", "warm_start__completion": "{solution}"}
    # 1 + 62 + the end are 64 tokens
    fits, long = ({"prompt": "7", "answer": "7", "solution": "7" * n} for n in (62, 63))
    write("worked.jsonl", *DIGITS[:5], long, fits, long)
    warm_start(config(**bare))
    assert "2 worked problems are longer than the context of 64 tokens: left out" in capsys.readouterr().out
    assert len(taught) == 6
    assert max(len(row["prompt_ids"]) + len(row["completion_ids"][0]) for row in taught) == 64

    shutil.rmtree("models")
    write("worked.jsonl", long)
    with pytest.raises(
        ConfigError, match=r"warm_start\.data: no worked problem fits into the context of 64 tokens"
    ):
        warm_start(config(**bare))
    assert not Path("models").exists()


def test_rows_of_like_length_share_a_batch_and_each_is_seen_once_a_round() -> None:
    torch.manual_seed(0)
    lengths = [100 * (i % 8) + 10 for i in range(64)]  # 8 lengths, 8 rows of each, more than 64 apart
    batches = _batches(lengths, 4)
    first, second = ([next(batches) for _ in range(16)] for _ in range(2))
    for round in (first, second):
        assert sorted(i for batch in round for i in batch) == list(range(64))
        assert all(len({lengths[i] for i in batch}) == 1 for batch in round)
    assert first != second
    # short ones do not come first
    assert [lengths[batch[0]] for batch in first] != sorted(lengths[batch[0]] for batch in first)


# --- the folder ---------------------------------------------------------------------------------------------


def test_the_random_numbers_and_threads_of_the_callers_process_stay_as_they_are() -> None:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    with seeded(7, threads + 1):
        first = torch.rand(3)
        assert torch.get_num_threads() == threads + 1
    with seeded(7, None):
        assert torch.rand(3).equal(first) and torch.get_num_threads() == threads
    assert torch.get_num_threads() == threads and torch.get_rng_state().equal(state)


def test_again_it_does_nothing(
    config: Callable[..., GVPOConfig], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = warm_start(config(warm_start__num_epochs=1))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    monkeypatch.setattr(module, "read_examples", None)  # not even the data is read
    assert warm_start(config()) == folder
    assert capsys.readouterr().out.endswith("models/tiny is there: nothing to do\n")
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_it_prints_its_own_lines_alone_and_keeps_what_libraries_say_in_a_log(
    config: Callable[..., GVPOConfig],
) -> None:
    code = (
        "import sys\nfrom gvpo_ray.config.run import GVPOConfig\n"
        "from gvpo_ray.learner import warm_start as module\n"
        "teach = module.imitate\n"
        "def imitate(*arguments):\n"
        "    from transformers.utils import logging\n"
        "    logging.get_logger('transformers.trainer').warning('a real warning')\n"
        "    teach(*arguments)\n"
        "module.imitate = imitate\n"
        "module.warm_start(GVPOConfig.model_validate_json(sys.argv[1]))\n"
    )
    # A process of its own: DeepSpeed speaks when it is imported.
    command = [sys.executable, "-c", code, config().model_dump_json()]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True)
    assert all(line.startswith(("warm start: ", "wrote models/tiny")) for line in done.stdout.splitlines())
    said = Path("models/tiny/warm_start.log").read_text().splitlines()
    assert any(re.search("WARNING transformers.trainer: a real warning$", line) for line in said)
    assert any("WARNING DeepSpeed: Setting accelerator to CPU" in line for line in said)


@pytest.mark.parametrize("where", ["imitate", "save"])
def test_interrupted_it_leaves_nothing_and_the_next_run_makes_it_good(
    config: Callable[..., GVPOConfig], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if where == "imitate":
            patch.setattr(module, "imitate", interrupted)
        else:  # the weights are written, the tokenizer is not
            patch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", interrupted)
        with pytest.raises(KeyboardInterrupt):
            warm_start(config(warm_start__num_epochs=1))
    assert list(Path("models").iterdir()) == []
    killed = Path("models/.tiny.part")  # what a kill at that point would have left
    killed.mkdir()
    (killed / "config.json").write_text("{}")
    warm_start(config(warm_start__num_epochs=1))
    assert [path.name for path in Path("models").iterdir()] == ["tiny"]
    AutoModelForCausalLM.from_pretrained("models/tiny")


def test_a_folder_that_is_something_else_is_never_replaced(config: Callable[..., GVPOConfig]) -> None:
    Path("notes").mkdir()
    Path("notes/thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match=r"model\.path: notes is there and is no model: choose another"):
        warm_start(config(model__path="notes"))
    with pytest.raises(ConfigError, match=r"model\.path: worked.jsonl is there and is no model"):
        warm_start(config(model__path="worked.jsonl"))
    assert Path("notes/thesis.txt").read_text() == "years of work"


def test_a_path_that_cannot_be_written_is_found_before_the_training(
    config: Callable[..., GVPOConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "imitate", lambda *_: pytest.fail("trained first"))
    with pytest.raises(ConfigError, match=r"model\.path: cannot write worked.jsonl/model: Not a directory"):
        warm_start(config(model__path="worked.jsonl/model"))


def test_the_command_says_in_one_line_what_is_wrong(
    config: Callable[..., GVPOConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("run.yaml").write_text(config().dump())
    for arguments, complaint in (
        (["nowhere.yaml"], "nowhere.yaml: No such file or directory"),
        (["run.yaml", "warm_start=null"], "warm_start: this config has no such section"),
        (["run.yaml", "warm_start.data.path=x.jsonl"], "warm_start.data.path: no file x.jsonl"),
        (
            ["run.yaml", "warm_start.vocabsize=300"],
            "run.yaml: unknown key warm_start.vocabsize; did you mean warm_start.vocab_size?",
        ),
    ):
        assert main(["warm-start", *arguments]) == 2
        assert capsys.readouterr().err == f"error: {complaint}\n"
    assert not Path("models").exists()
