"""What is wrong with a config is one line that names its key."""

import copy

import pytest
import yaml
from test_config import DIGITS, SMALL, config, refusal

from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.run import GVPOConfig


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("num_step", "did you mean num_steps?"),
        ("lerner", "did you mean learner?"),
        ("loss.betta", "did you mean loss.beta?"),
        ("learner.lerning_rate", "did you mean learner.learning_rate?"),
        ("evaluation.sets.heldout.pth", "did you mean evaluation.sets.heldout.path?"),
        ("evaluation.sets.path.pth", "did you mean evaluation.sets.path.path?"),  # an entry named like a key
        ("warm_start.vocabsize", "did you mean warm_start.vocab_size?"),
        ("beta", "did you mean loss.beta?"),  # right word, wrong place
        ("learner.beta", "did you mean loss.beta?"),
        ("ray.zzz", "known here: address, num_cpus, object_store_gib, dashboard"),
        ("tracking.tensorbord", "did you mean tracking.tensorboard?"),
        ("tracking.mlflow.experment", "did you mean tracking.mlflow.experiment?"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_right_one(key, hint):
    overrides = {
        "evaluation.sets.path.path": "p",
        "evaluation.sets.heldout.path": "p",
        "warm_start.data.path": "p",
    }
    assert refusal({**overrides, key: 1}) == f"config: unknown key {key}; {hint}"


@pytest.mark.parametrize(
    ("override", "key", "says"),
    [
        # one key: its range or type
        ("sampling.num_completions=1", "sampling.num_completions", "greater than or equal to 2 (got 1)"),
        ("prompts.path=[]", "prompts.path", "is empty: name a file"),
        ("sampling.temperature=0", "sampling.temperature", "greater than 0 (got 0)"),
        ("sampling.top_k=-2", "sampling.top_k", "greater than or equal to -1 (got -2)"),
        ("sampling.top_p=1.5", "sampling.top_p", "less than or equal to 1 (got 1.5)"),
        ("sampling.max_tokens=0", "sampling.max_tokens", "greater than or equal to 1"),
        ("loss.beta=0", "loss.beta", "greater than 0 (got 0)"),
        ("loss.beta=-0.1", "loss.beta", "greater than 0 (got -0.1)"),
        ("loss.beta=.inf", "loss.beta", "finite number"),
        ("loss.beta=.nan", "loss.beta", "finite number"),
        ("loss.beta=small", "loss.beta", "valid number"),
        ("loss=0.1", "loss", "valid dictionary"),
        ("num_steps=0", "num_steps", "greater than or equal to 1 (got 0)"),
        ("num_steps=2.5", "num_steps", "valid integer"),
        ("num_steps=null", "num_steps", "valid integer"),
        ("groups_per_step=0", "groups_per_step", "greater than or equal to 1"),
        ("max_staleness=-1", "max_staleness", "greater than or equal to 0 (got -1)"),
        ("run_dir=null", "run_dir", "valid string"),
        ("model.dtype=float16", "model.dtype", "'float32' or 'bfloat16' (got 'float16')"),
        ("prompts.shuffle=maybe", "prompts.shuffle", "valid boolean"),
        (
            "prompts.template=no placeholder",
            "prompts.template",
            "must contain {prompt} (got 'no placeholder')",
        ),
        ("seed=-1", "seed", "greater than or equal to 0 (got -1)"),
        ("seed=4294967296", "seed", "less than 4294967296"),
        (
            "prompts={path: x, template: '{prompt}', system_prompt: y}",
            "prompts: system_prompt is not used beside a template",
            "write it into the template",
        ),
        (
            "prompts={path: x, template: '{prompt}', template_arguments: {a: 1}}",
            "prompts: template_arguments are not used beside a template",
            "those of the tokenizer's chat template",
        ),
        (
            "prompts={path: x, layout: verl, prompt_column: a, answer_column: b}",
            "prompts: layout is not used",
            "prompt_column and answer_column",
        ),
        ("engines.num=0", "engines.num is 0", "without engines it must be 1"),
        ("engines.max_num=0", "engines.max_num", "greater than or equal to 1"),
        ("engines={num: 3, max_num: 2}", "engines: max_num (2)", "less than num (3)"),
        ("engines.url=localhost:8000", "engines: url", "http:// or https://"),
        ("engines.quantization=fp8", "engines: quantization: fp8", "needs GPUs"),
        ("engines.pools={a b: {}}", "engines.pools", "becomes part of a metric's"),
        (
            "engines.pools={a: {num_gpus: 2}}",
            "engines.pools.a: num_gpus (2)",
            "must equal tensor_parallel_size (1)",
        ),
        ("sources={people: {path: a.jsonl}}", "sources.people", "either share"),
        ("sources={engines: {path: a.jsonl, share: 0.5}}", "sources.engines", "a pool has that name"),
        (
            "sources={a: {path: a, group_share: 0.7}, b: {path: b, group_share: 0.7}}",
            "sources: the group_share",
            "1.4, more than 1",
        ),
        ("replay.share=1", "replay.share", "less than 1"),
        (
            "learner={num_workers: 2, max_workers: 1}",
            "learner.max_workers (1)",
            "less than learner.num_workers (2)",
        ),
        ("engines.num_gpus=-1", "engines.num_gpus", "greater than or equal to 0"),
        ("engines.memory_fraction=1.1", "engines.memory_fraction", "less than or equal to 1"),
        (
            "engines.weight_transfer=ftp",
            "engines.weight_transfer",
            "'objects', 'nccl', 'ipc' or 'sharded_rdt'",
        ),
        ("verifiers.rewards={}", "verifiers.rewards", "name at least one reward function"),
        (
            "verifiers.rewards={math: much}",
            "verifiers.rewards",
            "math must be a weight or a section (got 'much')",
        ),
        (
            "verifiers.rewards={m: {wieght: 1}}",
            "unknown key verifiers.rewards.m.wieght",
            "did you mean verifiers.rewards.m.weight?",
        ),
        (
            "verifiers.rewards={j: {url: ftp://x}}",
            "verifiers.rewards.j",
            "url must start with http:// or https://",
        ),
        (
            "verifiers.rewards={j: {url: http://x, model: y}}",
            "verifiers.rewards.j",
            "url and model exclude each other",
        ),
        ("verifiers.max_num=1", "verifiers", "max_num (1) is less than num (2)"),
        ("verifiers.timeout_s=0", "verifiers.timeout_s", "greater than 0"),
        ("learner.num_workers=0", "learner.num_workers", "greater than or equal to 1"),
        ("learner.backend=zero", "learner.backend", "'deepspeed', 'ddp', 'fsdp' or 'native'"),
        ("learner.zero_stage=4", "learner.zero_stage", "less than or equal to 3"),
        ("learner.learning_rate=0", "learner.learning_rate", "greater than 0"),
        ("learner.adam_betas=[0.9, 1.0]", "learner.adam_betas.1", "less than 1 (got 1.0)"),
        ("learner.adam_betas=[0.9]", "learner.adam_betas.1", "required, and not given"),
        ("evaluation.num_samples=0", "evaluation.num_samples", "greater than or equal to 1"),
        ("evaluation.sets={a: data.jsonl}", "evaluation.sets.a", "valid dictionary"),
        ("evaluation.sets={a: {limit: 3}}", "evaluation.sets.a.path", "required, and not given"),
        ("checkpoint.keep=0", "checkpoint.keep", "greater than or equal to 1"),
        ("warm_start={}", "warm_start.data", "required, and not given"),
        # the reference's forms
        *[
            (f"loss.reference={form}", "loss.reference", "must be behaviour, previous, initial or every: N")
            for form in (
                "frozen",
                "every",
                "every: 0",
                "every: -1",
                "every: x",
                "'every: 2.5'",
                "{every: 2, a: 3}",
                "null",
                "7",
                "[x]",
            )
        ],
        # a sampler that cuts the support
        ("sampling.top_p=0.9", "sampling", "top_p=0.9 cuts the sampler's support"),
        ("sampling.top_k=50", "sampling", "top_k=50 cuts the sampler's support"),
        ("sampling.min_p=0.05", "sampling", "min_p=0.05 cuts the sampler's support"),
        ("sampling={top_p: 0.9, min_p: 0.1}", "sampling", "top_p=0.9, min_p=0.1 cuts the sampler's support"),
        # two keys
        ("groups_per_step=3", "learner.num_mini_batches (4)", "must not exceed groups_per_step (3)"),
        (
            "model.max_length=256",
            "sampling.max_tokens (256)",
            "leaves no room for a prompt in model.max_length (256)",
        ),
        (
            "engines.weight_transfer=nccl",
            "engines.weight_transfer",
            "nccl needs GPUs in engines.num_gpus and learner.num_gpus",
        ),
        ("evaluation.every=5", "evaluation.every is set", "evaluation.sets is empty"),
        ("engines.num_gpus=2", "engines: num_gpus (2)", "must equal tensor_parallel_size (1)"),
        (
            "engines={num_gpus: 0.5, tensor_parallel_size: 2}",
            "engines: num_gpus (0.5)",
            "must equal tensor_parallel_size (2)",
        ),
        (
            "learner={backend: ddp, zero_stage: 2}",
            "learner.zero_stage (2)",
            "needs learner.backend: deepspeed, not ddp",
        ),
        (
            "learner={zero_stage: 2, offload: parameters}",
            "learner.offload: parameters",
            "needs learner.zero_stage of at least 3, not 2",
        ),
        (
            "learner.offload=optimizer",
            "learner.offload: optimizer",
            "needs learner.zero_stage of at least 1, not 0",
        ),
        ("loss.beta=automatic", "loss.beta", "auto or a valid number"),
        (
            "loss={objective: grpo, beta: 0.5}",
            "loss: beta is not an option of grpo",
            "it has clip_high, clip_low, kl_coefficient, old_policy,",
        ),
        ("loss.kl_coefficient=0.1", "loss: kl_coefficient is not an option of gvpo", "it has beta,"),
    ],
    ids=str,
)
def test_a_bad_value_is_one_line_with_its_key(override, key, says):
    message = refusal([override])
    assert message.startswith(f"config: {key}") and says in message


def test_evaluation_must_leave_room_for_a_prompt_too():
    assert "evaluation.max_tokens (300) leaves no room" in refusal(
        {"model.max_length": 300, "evaluation.max_tokens": 300}
    )
    assert config(model__max_length=300, evaluation__max_tokens=299).evaluation.max_tokens == 299


@pytest.mark.parametrize("key", ["run_dir", "num_steps", "model", "model.path", "prompts", "prompts.path"])
def test_a_required_key_that_is_missing_is_named(key):
    data = copy.deepcopy(SMALL)
    *parents, last = key.split(".")
    del (data[parents[0]] if parents else data)[last]
    with pytest.raises(ConfigError, match=f"^config: {key}: required, and not given$"):
        GVPOConfig.from_dict(data)


def test_of_several_mistakes_the_unknown_key_comes_first_and_others_are_counted():
    assert refusal({"loss.beta": -1, "loss.betta": 1}).startswith("config: unknown key loss.betta")
    assert refusal({"loss.beta": -1, "num_steps": 0, "seed": "x"}).endswith("; and 2 more")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("num_steps", "override 'num_steps' is not key=value"),
        ("", "override '' is not key=value"),
        ("=5", "override '=5' is not key=value"),
        ("engines.vllm={a: [1", "override engines.vllm: '{a: [1' is not a YAML value"),
        (f"seed={DIGITS}", f"override seed: '{DIGITS}' is not a YAML value"),
        ("num_steps.more=1", "override num_steps.more: num_steps is not a section"),
        ("model.path.more=1", "override model.path.more: path is not a section"),
        (
            "ray..address=1",
            "config: unknown key ray.; known here: address, num_cpus, object_store_gib, dashboard",
        ),
        ("ray.=1", "config: unknown key ray.; known here: address, num_cpus, object_store_gib, dashboard"),
    ],
)
def test_a_bad_override_is_named(override, says):
    assert refusal([override]) == says


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "expected keys and values, found nothing"),
        (b"# only a comment\n", "expected keys and values, found nothing"),
        (b"- run_dir: x\n", "expected keys and values, found list"),
        (b"just text\n", "expected keys and values, found str"),
        (b"run_dir: [x\nnum_steps: 3\n", "not YAML: while parsing a flow sequence"),
        (b"run_dir: x\n\tnum_steps: 3\n", "not YAML: while scanning"),
        (b"run_dir: 2026-02-30\n", "not YAML: day is out of range for month"),
        (b"seed: " + b"1:" * 200 + b"0.5\n", "not YAML: int too large to convert to float"),
        (f"seed: {DIGITS}\n".encode(), "not YAML: Exceeds the limit"),
        (b"run_dir: " + b"[" * 10**4, "not YAML: maximum recursion depth"),
        (b"run_dir: \xff\xfe\n", "not UTF-8 text"),
        (yaml.safe_dump({**SMALL, 5: "x"}).encode(), "5: Keys should be strings"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_file_that_is_no_config_is_named_in_one_line(content, says, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        GVPOConfig.from_file(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and says in message and "\n" not in message


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: No such file or directory"):
        GVPOConfig.from_file(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match=f"{tmp_path}: Is a directory"):
        GVPOConfig.from_file(tmp_path)


def test_a_mistake_in_a_file_names_the_file(tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**SMALL, "num_steps": 0}))
    with pytest.raises(ConfigError, match=rf"^{tmp_path}/run\.yaml: num_steps: "):
        GVPOConfig.from_file(tmp_path / "run.yaml")
