"""The config: every mistake is one line that names the key; what is dumped reads back the same."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml

from gvpo_ray.config.base import DECIDES_SCORES, RESUMABLE, ConfigError, is_marked, paths, walk
from gvpo_ray.config.data import NO_PROMPTS
from gvpo_ray.config.engines import PoolConfig, SamplingConfig
from gvpo_ray.config.loss import loss_config
from gvpo_ray.config.plan import check_resources, cluster_address, resource_plan
from gvpo_ray.config.run import GVPOConfig
from gvpo_ray.config.verifiers import RewardConfig

SMALL: dict[str, Any] = {
    "run_dir": "runs/x",
    "num_steps": 3,
    "model": {"path": "models/x"},
    "prompts": {"path": "data/x.jsonl"},
}
JOBS = Path(__file__).parents[1] / "jobs"
DIGITS = "1" * 5000  # more than Python makes a number of
SETS = {"heldout": {"path": "data/y.jsonl"}}


def config(**overrides: Any) -> GVPOConfig:
    return GVPOConfig.from_dict(SMALL, {key.replace("__", "."): value for key, value in overrides.items()})


def refusal(overrides: list[str] | dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as error:
        GVPOConfig.from_dict(SMALL, overrides)
    message = str(error.value)
    assert "\n" not in message
    return message


# ---------------------------------------------------------------------------------------------- what is right


@pytest.mark.parametrize(
    "job", sorted({*JOBS.glob("*.yaml")} - {JOBS / "eval_paper.yaml"}), ids=lambda job: job.stem
)
def test_what_a_run_of_a_job_writes_down_is_read_again_as_the_same_config(job: Path, tmp_path: Path) -> None:
    """Else no run of it could be resumed. All keys are written, also those that the file does not name."""
    first = GVPOConfig.from_file(job)
    (tmp_path / "config.yaml").write_text(first.dump())
    assert GVPOConfig.from_file(tmp_path / "config.yaml").dump() == first.dump()


def test_the_smallest_config_has_the_papers_loss_and_a_full_support_sampler():
    small = config()
    assert (small.loss.beta, small.loss.start_beta, small.loss.reference, small.loss.reference_every) == (
        "auto",
        0.1,
        "behaviour",
        None,
    )
    assert (small.sampling.temperature, small.sampling.top_p, small.sampling.top_k, small.sampling.min_p) == (
        1.0,
        1.0,
        0,
        0.0,
    )
    assert (
        small.max_staleness == 0
        and small.learner.num_mini_batches > 1
        and small.learner.learning_rate == 1e-6
    )


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {
            "max_staleness": None,
            "loss.reference": {"every": 3},
            "learner.adam_betas": [0.9, 0.95],
            "learner.learning_rate": 3e-7,
        },
        {
            "evaluation.sets": {**SETS, "two": {"path": "z", "template": "Q: {prompt}\nA:"}},
            "evaluation.every": 5,
        },
        {
            "verifiers.rewards": {"math": 1.0, "my.module:reward": -0.5, "rewards.py:length": 0.1},
            "engines.vllm": {"x": [1, None]},
        },
        {
            "warm_start.data.path": "solutions.jsonl",
            "warm_start.architecture": {"hidden_size": 64},
            "warm_start.vocab_size": 400,
        },
        {"prompts.system_prompt": "Überlege: 数学 ✓ #no comment", "run_dir": "runs/a: b"},
    ],
    ids=lambda overrides: next(iter(overrides), "defaults"),
)
def test_dump_reads_back_equal(overrides, tmp_path):
    first = GVPOConfig.from_dict(SMALL, overrides)
    assert GVPOConfig.from_dict(yaml.safe_load(first.dump())) == first
    (tmp_path / "config.yaml").write_text(first.dump(), encoding="utf-8")
    again = GVPOConfig.from_file(tmp_path / "config.yaml")
    assert again == first and again.dump() == first.dump()


def test_configs_share_no_defaults_and_from_dict_leaves_its_argument_alone():
    before = copy.deepcopy(SMALL)
    one, two = config(model__dtype="bfloat16", loss__beta=0.5), config()
    one.verifiers.rewards["length.py:reward"] = RewardConfig()
    one.learner.num_workers = 7
    assert two.verifiers.rewards == {"math": RewardConfig()} and two.learner.num_workers == 1
    assert before == SMALL and two.model.dtype == "float32"


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("num_steps=7", lambda c: c.num_steps, 7),
        ("loss.beta=0.25", lambda c: c.loss.beta, 0.25),
        ("learner.learning_rate=1e-5", lambda c: c.learner.learning_rate, 1e-5),  # YAML reads this as text
        ("max_staleness=null", lambda c: c.max_staleness, None),
        ("prompts.shuffle=false", lambda c: c.prompts.shuffle, False),
        ("loss.reference=every: 4", lambda c: c.loss.reference_every, 4),
        ("loss.reference=every:4", lambda c: c.loss.reference_every, 4),
        ("loss.reference=initial", lambda c: c.loss.reference_every, None),
        (
            "verifiers.rewards={math: 0.5, x.py:f: 2}",
            lambda c: {k: r.weight for k, r in c.verifiers.rewards.items()},
            {"math": 0.5, "x.py:f": 2},
        ),
        ("verifiers.rewards.math=3", lambda c: c.verifiers.rewards, {"math": RewardConfig(weight=3)}),
        ("evaluation.sets.heldout.path=y.jsonl", lambda c: c.evaluation.sets["heldout"].path, "y.jsonl"),
        ("warm_start.data.path=z", lambda c: c.warm_start.data.path, "z"),
        ("engines.vllm.max_num_seqs=9", lambda c: c.engines.vllm, {"max_num_seqs": 9}),
        # only the first = divides
        ("prompts.template=Q={prompt}", lambda c: c.prompts.template, "Q={prompt}"),
        # what YAML takes for another type, for a comment or for nothing, is text where the key takes texts
        *(
            (f"prompts.template={text}", lambda c: c.prompts.template, read)
            for text, read in (
                ("{prompt}", "{prompt}"),
                ("Question: {prompt}", "Question: {prompt}"),
                ("Q: {prompt}\nA: ", "Q: {prompt}\nA: "),
                ("# {prompt}", "# {prompt}"),
                ("{prompt} # one line", "{prompt} # one line"),
                ("- {prompt}", "- {prompt}"),
                ("*{prompt}", "*{prompt}"),
                ("'# {prompt}'", "# {prompt}"),
                ('"{prompt}\\n"', "{prompt}\n"),
                ("|\n  {prompt} # one\n", "{prompt} # one\n"),
                ("null", None),
                ("", None),
            )
        ),
        ("run_dir=2026-11-27", lambda c: c.run_dir, "2026-11-27"),
        ("run_dir=2026-02-30", lambda c: c.run_dir, "2026-02-30"),
        *(
            (f"run_dir={text}", lambda c: c.run_dir, text)
            for text in (
                "5",
                "010",
                "0x10",
                "1.50",
                "1:30",
                "1_0",
                "yes",
                "5 # five",
                "yes # or no",
                "2026 #1",
            )
        ),
        ("num_steps=5 # five", lambda c: c.num_steps, 5),  # a comment, where the key takes no text
        ("run_dir=\u00a0", lambda c: c.run_dir, "\u00a0"),  # text in YAML, and space in Python
        ("prompts.path=['a #1.jsonl', b.jsonl]", lambda c: c.prompts.path, ["a #1.jsonl", "b.jsonl"]),
        ("prompts.path={a}.jsonl", lambda c: c.prompts.path, "{a}.jsonl"),
        ("evaluation.sets.heldout={path: y}", lambda c: c.evaluation.sets["heldout"].path, "y"),
        ("verifiers.rewards.f.function=x.py:f", lambda c: c.verifiers.rewards["f"].function, "x.py:f"),
        (" num_steps = 7", lambda c: c.num_steps, 7),
        ("sampling.top_k=-1", lambda c: c.sampling.top_k, -1),
    ],
    ids=lambda value: "" if callable(value) else str(value),  # a function's name differs between processes
)
def test_overrides_reach_their_keys(override, read, value):
    assert read(GVPOConfig.from_dict(SMALL, [override])) == value


def test_an_overrides_section_is_not_written_into():
    overrides = {"loss": {}, "loss.objective": "grpo"}
    assert GVPOConfig.from_dict(SMALL, overrides).loss.objective == "grpo" and overrides == {
        "loss": {},
        "loss.objective": "grpo",
    }


def test_later_overrides_win_and_stand_above_the_file(tmp_path):
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({**SMALL, "loss": {"beta": 0.3, "reference": "initial"}}))
    read = GVPOConfig.from_file(tmp_path / "a.yaml", ["loss.beta=0.4", "loss.beta=0.5"])
    assert (read.loss.beta, read.loss.reference) == (0.5, "initial")


def test_an_override_fills_a_section_that_the_file_leaves_empty(tmp_path):
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(SMALL) + "loss:\n  # beta: 0.3\n")
    assert GVPOConfig.from_file(str(tmp_path / "a.yaml"), {"loss.beta": 0.4}).loss.beta == 0.4


def test_beta_is_a_number_or_adapted_from_the_papers():
    assert (loss_config(beta="1e-2").beta, loss_config(beta=1).beta) == (0.01, 1.0)
    assert (loss_config(beta=0.5).start_beta, loss_config().start_beta) == (0.5, 0.1)
    assert loss_config().adapts_beta
    others = ({"beta": 0.1}, {"reference": "initial"}, {"objective": "grpo"})
    assert not any(loss_config(**other).adapts_beta for other in others)


def test_options_of_another_objective_may_be_written_out_with_their_defaults():
    written = loss_config().model_dump() | {"objective": "rloo"}  # as a run's config.yaml has them
    assert loss_config(**written) == loss_config(objective="rloo")
    assert loss_config(**loss_config(objective="grpo", clip_low=0.3).model_dump()).clip_low == 0.3


def test_the_paper_is_one_line_and_contradicts_nothing_that_is_written_beside_it():
    paper = loss_config(preset="paper")
    assert (paper.beta, paper.reference, paper.importance_cap, paper.damped) == (0.1, "previous", None, False)
    assert not paper.adapts_beta and not paper.is_damped
    assert loss_config(**paper.model_dump()) == paper
    assert loss_config(preset="paper", beta=0.05).beta == 0.05
    for key, value in (
        ("damped", "true"),
        ("importance_cap", "1.0"),
        ("reference", "initial"),
        ("beta", "auto"),
    ):
        with pytest.raises(
            ConfigError, match=f"loss: preset: paper has {key}: .*{value} is given: leave one"
        ):
            GVPOConfig.from_dict(SMALL, [f"loss.{key}={value}", "loss.preset=paper"])


# --------------------------------------------------------------------------------- the opt-out, the resources


def test_truncated_support_can_be_accepted_and_then_warns():
    with pytest.warns(UserWarning, match=r"sampling: top_p=0\.9, top_k=20 cuts the sampler's support"):
        allowed = SamplingConfig(top_p=0.9, top_k=20, allow_truncated_support=True)
    assert allowed.top_p == 0.9
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SamplingConfig(allow_truncated_support=True, temperature=0.7)  # nothing is cut: nothing to say


def test_the_plan_is_what_the_config_asks_for():
    plan = resource_plan(
        config(
            learner__num_workers=2, learner__num_gpus=1, engines__num=3, engines__num_cpus=2, verifiers__num=4
        )
    )
    assert plan == [("learner worker", 2, 0.25, 1.0), ("engine", 3, 2.0, 0.0), ("verifier", 4, 0.1, 0.0)]


@pytest.mark.parametrize(
    ("overrides", "num_cpus", "num_gpus", "says"),
    [
        # the defaults ask for 0.25 + 1 + 2 * 0.1 = 1.45 CPUs
        ({}, 1.45, 0, None),
        (
            {},
            1.4,
            0,
            "the run asks for 1.45 CPUs in all (see `gvpo-ray check`), this machine has 1.4: lower "
            "engines.num",
        ),
        ({"engines.num": 3}, 2, 0, "engines.num: 3 x 1 CPUs are more than the 2 CPUs of this machine"),
        (
            {"learner.num_workers": 9},
            2,
            0,
            "learner.num_workers: 9 x 0.25 CPUs are more than the 2 CPUs of this machine",
        ),
        (
            {"verifiers.num": 30},
            2,
            0,
            "verifiers.num: 30 x 0.1 CPUs are more than the 2 CPUs of this machine",
        ),
        ({"engines.num_gpus": 1}, 8, 0, "engines.num: 1 x 1 GPUs are more than the 0 GPUs of this machine"),
        ({"engines.num_gpus": 1, "learner.num_gpus": 1}, 8, 1, "the run asks for 2 GPUs in all"),
        ({"engines.num_gpus": 0.5, "learner.num_gpus": 0.5}, 8, 1, None),
        ({"engines.num": 2, "engines.num_gpus": 4, "engines.tensor_parallel_size": 4}, 8, 8, None),
    ],
)
def test_a_plan_that_can_never_be_placed_is_refused_with_the_key_to_lower(
    overrides, num_cpus, num_gpus, says
):
    wanted = GVPOConfig.from_dict(SMALL, overrides)
    if says is None:
        check_resources(wanted, num_cpus, num_gpus)
    else:
        with pytest.raises(ConfigError) as error:
            check_resources(wanted, num_cpus, num_gpus)
        assert str(error.value).startswith(says) and "\n" not in str(error.value)


def test_the_address_of_the_config_comes_before_the_environments(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert cluster_address(config().ray) is None
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert cluster_address(config().ray) == "10.0.0.1:6379"
    assert cluster_address(config(ray__address="10.0.0.2:6379").ray) == "10.0.0.2:6379"


def test_a_pool_has_what_it_says_and_for_the_rest_what_the_section_says():
    pools = {"slow": {"dtype": "bfloat16"}, "fast": {"num": 3, "num_threads": 2}}
    config = GVPOConfig.from_dict(SMALL | {"engines": {"num_threads": 1, "hang_s": 9, "pools": pools}})
    slow, fast = config.engines.all_pools().values()
    assert (slow.num, slow.num_threads, slow.dtype) == (1, 1, "bfloat16") and (
        fast.num,
        fast.num_threads,
        fast.dtype,
    ) == (3, 2, None)
    assert GVPOConfig.from_dict(config.model_dump(mode="json")) == config
    (only,) = (
        GVPOConfig.from_dict(SMALL | {"engines": {"num": 2, "dtype": "float16"}}).engines.all_pools().items()
    )
    assert only == ("engines", PoolConfig(num=2, dtype="float16"))


def test_a_run_on_offline_sources_alone_needs_no_prompts():
    offline = {key: value for key, value in SMALL.items() if key != "prompts"} | {"engines": {"num": 0}}
    config = GVPOConfig.from_dict(
        offline | {"sources": {"people": {"path": "worked.jsonl", "group_share": 1.0}}}
    )
    assert config.prompts.path == NO_PROMPTS
    with pytest.raises(ConfigError, match="prompts: required"):
        GVPOConfig.from_dict({key: value for key, value in SMALL.items() if key != "prompts"})


def test_relative_paths_begin_at_the_root(tmp_path):
    (tmp_path / "here").mkdir()
    values = {
        "root": str(tmp_path),
        "run_dir": "runs/x",
        "model.path": "here",
        "prompts.path": "data/train.parquet",
    }
    values |= {"verifiers.rewards": {"mine.py:f": 1.0}}
    config = GVPOConfig.from_dict(SMALL, values)
    paths = (config.run_dir, config.model.path, config.prompts.path)
    assert paths == (f"{tmp_path}/runs/x", f"{tmp_path}/here", f"{tmp_path}/data/train.parquet")
    assert config.verifiers.rewards["mine.py:f"].function == f"{tmp_path}/mine.py:f"
    elsewhere = GVPOConfig.from_dict(
        SMALL, values | {"run_dir": "/there", "model.path": "Qwen/Qwen2.5-Math-7B"}
    )
    # neither is relative
    assert (elsewhere.run_dir, elsewhere.model.path) == ("/there", "Qwen/Qwen2.5-Math-7B")
    assert GVPOConfig.from_dict(yaml.safe_load(elsewhere.dump())) == elsewhere


def test_every_key_whose_help_speaks_of_a_file_or_folder_to_read_is_marked_as_a_path():
    read = GVPOConfig.from_dict(
        SMALL,
        {
            "sources": {"people": {"path": "a.jsonl", "share": 0.5}},
            "evaluation.sets": SETS,
            "verifiers.rewards": {"mine.py:f": 1, "judge": {"model": "./judge"}, "math": 1},
            "warm_start.data.path": "b.jsonl",
        },
    )
    found = {key: (value, rule.kind) for key, value, rule in paths(read)}
    assert found == {
        "run_dir": ("runs/x", "output"),
        "model.path": ("models/x", "input"),
        "prompts.path": ("data/x.jsonl", "input"),
        "sources.people.path": ("a.jsonl", "input"),
        "evaluation.sets.heldout.path": ("data/y.jsonl", "input"),
        "verifiers.rewards.mine.py:f.function": ("mine.py:f", "function"),
        "verifiers.rewards.judge.model": ("./judge", "input"),
        "warm_start.data.path": ("b.jsonl", "input"),
    }


def test_what_may_not_change_on_resuming_is_what_the_log_and_the_checkpoints_stand_on():
    fixed = {key for key, field in GVPOConfig.model_fields.items() if not is_marked(field, RESUMABLE)}
    assert fixed == {*("seed", "groups_per_step", "model", "prompts", "sampling", "sources", "environment")}


def test_the_keys_that_scores_depend_on_are_marked():
    marked = {
        key for key, _, field in walk(config(evaluation__sets=SETS)) if is_marked(field, DECIDES_SCORES)
    }
    assert marked == {
        "seed",
        "engines.vllm",
        "engines.serve_arguments",
        *(f"model.{key}" for key in ("dtype", "max_length")),
        *(f"sampling.{key}" for key in ("top_p", "top_k", "min_p", "stop", "stop_token_ids")),
        *(f"verifiers.{key}" for key in ("timeout_s", "cpu_s", "memory_gib", "rewards")),
    }


def test_an_environments_own_reward_is_not_turned_round() -> None:
    data = {
        "run_dir": "r",
        "num_steps": 1,
        "model": {"path": "m"},
        "prompts": {"path": "p"},
        "environment": {"name": "m:C"},
    }
    assert GVPOConfig.from_dict(data | {"verifiers": {"rewards": {"environment": 0.5}}})
    with pytest.raises(ConfigError, match=r"verifiers.rewards.environment: below 0"):
        GVPOConfig.from_dict(data | {"verifiers": {"rewards": {"environment": -1}}})


def test_held_out_sets_and_sources_are_rendered_as_the_prompts_unless_they_say_anything_themselves() -> None:
    def rendering(prompts: dict[str, Any], one: dict[str, Any]) -> list[tuple[Any, Any]]:
        data = {
            "run_dir": "r",
            "num_steps": 1,
            "model": {"path": "m"},
            "prompts": {"path": "p", **prompts},
            "evaluation": {"sets": {"held": {"path": "e", **one}}},
            "sources": {"people": {"path": "s", "share": 0.5, **one}},
        }
        config = GVPOConfig.from_dict(data)
        assert GVPOConfig.from_dict(yaml.safe_load(config.dump())) == config
        both = (config.evaluation.sets["held"], config.sources["people"])
        return list({(section.template, section.system_prompt) for section in both})

    template, chat = {"template": "Q: {prompt}"}, {"system_prompt": "Be brief."}
    assert rendering(template, {}) == [("Q: {prompt}", None)]
    assert rendering(chat, {}) == [(None, "Be brief.")]
    assert rendering(template, chat) == [(None, "Be brief.")]  # a chat of its own
    assert rendering(chat, template) == [("Q: {prompt}", None)]
    assert rendering(template, {"template": None}) == [(None, None)]
    assert rendering({}, {}) == [(None, None)]
    thinks = {"template_arguments": {"enable_thinking": False}}
    assert rendering(thinks, template) == [("Q: {prompt}", None)]  # a template has none beside it
    assert rendering(template, {"template": None, **thinks}) == [(None, None)]
    with pytest.raises(
        ConfigError, match=r"people\.template_arguments are not used beside the template of prompts"
    ):
        rendering(template, thinks)


@pytest.mark.parametrize(
    "engines", ["{url: 'http://h/v1'}", "{pools: {a: {url: 'http://h/v1'}, b: {num: 0}}}"]
)
def test_servers_alone_evaluate_nothing(engines: str) -> None:
    overrides = [f"engines={engines}", "evaluation={every: 5, sets: {held: {path: e.jsonl}}}"]
    assert "evaluation.every needs engines of the policy, and all engines are servers (url)" in refusal(
        overrides
    )
