"""A model with a tokenizer of its own scores texts: as a reference, and as an aligned model of PoFT."""

from __future__ import annotations

import asyncio
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import learners
import pyarrow as pa
import pytest
import tiny
import torch
from buffers import make
from torch import Tensor
from transformers import AutoTokenizer

from gvpo_ray import GVPOConfig, groups
from gvpo_ray.buffer.log import GroupLog
from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.data import ReplayConfig
from gvpo_ray.config.loss import loss_config
from gvpo_ray.config.model import ScoringModelConfig
from gvpo_ray.config.plan import check_resources
from gvpo_ray.data.hub import revision_of
from gvpo_ray.evaluation.folder import model_digest
from gvpo_ray.learner.step import train_step
from gvpo_ray.losses import gvpo_loss
from gvpo_ray.run.models import check_recorded, reference_digest, version_of
from gvpo_ray.run.run_dir import open_run_dir
from gvpo_ray.run.session import placement_notes
from gvpo_ray.verifiers.scoring_model import PROMPTS, Score, ScoringModel, Text, with_references

CHAT = (
    "{% for m in messages %}{{ m.role }}{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)
PLAIN = {"template": "q{prompt}=", "system_prompt": None, "template_arguments": {}}


def make_teacher(folder: Path, pairs: list[str], chat: bool = False, context: int = 24) -> Path:
    """Write a random model whose tokens are the tiny alphabet's letters, and some pairs of these."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyz0123456789+= "
    tokens = ["<unk>", "<eos>", *letters, *pairs]
    merges = [(pair[0], pair[1]) for pair in pairs]
    backend = Tokenizer(
        models.BPE({token: i for i, token in enumerate(tokens)}, merges, unk_token="<unk>", fuse_unk=False)
    )
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>")
    tokenizer.chat_template = CHAT if chat else None
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=context,
        initializer_range=0.5,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("teacher"), ["ab", "ba", "aa"])


@pytest.fixture(scope="module")
def teacher(teacher_folder: Path) -> ScoringModel:
    return ScoringModel(str(teacher_folder), {PROMPTS: PLAIN}, batch_size=3)


def by_hand(teacher: ScoringModel, prompt: str, pieces: list[str], num: int) -> float:
    """The log-prob of the last `num` tokens, in a pass of one text that is spelled in tokens."""
    tokenizer = teacher._renderers[PROMPTS]._tokenizer
    ids = tokenizer.convert_tokens_to_ids([*prompt, *pieces])
    with torch.no_grad():
        logprobs = teacher._model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(float(logprobs[t - 1, ids[t]]) for t in range(len(ids) - num, len(ids)))


def test_texts_are_scored_in_the_models_own_tokens_whatever_lies_beside_them_in_a_batch(
    teacher: ScoringModel,
) -> None:
    spelled = {
        "ab": ["ab"],
        "aba": ["ab", "a"],
        "1": ["1"],
        "c" * 9: ["c"] * 9,
        "bab": ["b", "ab"],
        "zz a": [*"zz a"],
        "baa": ["ba", "a"],
    }
    texts = [Text("x" * (1 + i % 3), None, text) for i, text in enumerate(spelled)]
    scores = teacher.score(texts)  # seven: two full batches and one of one
    for text, got, tokens in zip(texts, scores, spelled.values(), strict=True):
        want = by_hand(teacher, f"q{text.prompt}=", [*tokens, "<eos>"], len(tokens) + 1)
        assert got == Score(pytest.approx(want, abs=1e-4), len(tokens) + 1)
    cut = teacher.score([replace(texts[1], is_ended=False)])
    assert cut == [Score(pytest.approx(by_hand(teacher, "qxx=", ["ab", "a"], 2), abs=1e-4), 2)]


def test_what_a_model_cannot_score_has_a_reason_and_no_number(teacher: ScoringModel) -> None:
    """The context of 24 holds "q", 21 letters, "=" and the end, and nothing longer."""
    fits, too_long, unknown, empty = teacher.score(
        [
            Text("p", None, "x" * 20),
            Text("p", None, "x" * 21),
            Text("p", None, "caf\N{LATIN SMALL LETTER E WITH ACUTE}"),
            Text("p", None, "", is_ended=False),
        ]
    )
    assert fits.logprob is not None and fits.num_tokens == 21
    assert too_long == Score(None, reason="25 tokens do not fit into its context of 24")
    assert unknown == Score(None, reason="its tokenizer has no tokens for a part of the text")
    assert empty == Score(None, reason="the completion has no tokens")


def test_a_text_with_a_token_that_the_model_lacks_has_a_reason_and_no_number(tmp_path: Path) -> None:
    path = make_teacher(tmp_path, ["ab"])
    tokenizer = AutoTokenizer.from_pretrained(path)
    size = len(tokenizer)
    tokenizer.add_tokens(["<think>"])
    tokenizer.save_pretrained(path)
    teacher = ScoringModel(str(path), {PROMPTS: PLAIN}, batch_size=3)
    fits, has_more = teacher.score([Text("p", None, "ab"), Text("p", None, "a<think>b")])
    assert fits.logprob is not None
    has = f"token {size}, and the model has {size} (vocab_size of its config.json)"
    assert has_more == Score(None, reason=f"its tokenizer writes {has}")


def test_a_conversation_is_written_by_the_models_own_template_and_the_assistants_turns_are_scored(
    tmp_path: Path,
) -> None:
    chat = {"template": None, "system_prompt": None, "template_arguments": {}}
    path = make_teacher(tmp_path, ["ab"], chat=True, context=99)
    teacher = ScoringModel(str(path), {"sources.talk": chat}, batch_size=3)
    turns = [
        {"role": "assistant", "content": "ab"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]
    one, several = teacher.score([Text("q", None, "ab"), Text("q", None, turns)], "sources.talk")
    teacher._renderers[PROMPTS] = teacher._renderers["sources.talk"]
    begin = [*"userq", "<eos>", *"assistant"]
    first = by_hand(teacher, "", [*begin, "ab", "<eos>"], 2)
    second = by_hand(teacher, "", [*begin, "ab", "<eos>", *"userc", "<eos>", *"assistant", "d", "<eos>"], 2)
    assert one == Score(pytest.approx(first, abs=1e-4), 2)
    assert several == Score(pytest.approx(first + second, abs=1e-4), 4)


def scored_group(**columns: Any) -> pa.Table:
    row = tiny.make_group(7, (1.0, None, 0.0, 0.5))
    return tiny.table({**row, "prompt": "p", "completions": ["ab", "b", "x" * 30, "ba"], **columns})


def test_a_group_gets_the_references_log_probs_and_what_cannot_be_scored_is_left_out(
    teacher: ScoringModel,
) -> None:
    (row,) = groups.rows(with_references(scored_group(), teacher, -5))
    first, last = teacher.score([Text("p", None, "ab"), Text("p", None, "ba")])
    assert row["reference_logprobs"] == [first.logprob, None, None, last.logprob]
    assert row["reference_versions"] == [-5, None, None, -5]
    assert row["rewards"] == [1.0, None, None, 0.5]
    reason = "reference: 34 tokens do not fit into its context of 24"
    assert row["reward_reasons"] == [None, None, reason, None]
    kept = groups.trainable(row)
    assert kept is not None and kept["reference_logprobs"] == [first.logprob, last.logprob]


def test_a_completion_that_the_same_model_has_scored_is_not_scored_again(teacher: ScoringModel) -> None:
    group = groups.with_columns(
        scored_group(),
        reference_logprobs=[[-1.0, None, None, -2.0]],
        reference_versions=[[-5, None, None, -6]],
    )
    (row,) = groups.rows(with_references(group, teacher, -5))
    (last,) = teacher.score([Text("p", None, "ba")])
    assert row["reference_logprobs"] == [-1.0, None, None, last.logprob]


def test_a_completion_of_several_turns_is_left_out(teacher: ScoringModel) -> None:
    masks = [None, None, None, [False, *[True] * 4]]
    ids = [[2, 1], [2, 1], [2, 1], [2, 3, 4, 5, 1]]
    group = scored_group(
        completions=["ab", "b", "aab", "ba"],
        completion_ids=ids,
        sampling_logprobs=[None] * 4,
        trained_tokens=masks,
    )
    (row,) = groups.rows(with_references(group, teacher, -5))
    assert row["rewards"] == [1.0, None, 0.0, None]
    assert row["reward_reasons"][3].startswith("reference: a completion of several turns")


# ------------------------------------------------------------------------------------------ the optimum


TEXTS = ["a", "b", "aa", "ab", "ba", "bb", "aaa", "aab", "aba", "abb", "baa", "bab", "bba", "bbb"]


def student_logprobs(logits: dict[str, Tensor]) -> Tensor:
    """Log-probs of TEXTS by a policy whose tokens are letters: a table of the next one, or the end."""

    def of(text: str) -> Tensor:
        steps = [logits[text[:t]].log_softmax(0)["ab".index(text[t])] for t in range(len(text))]
        end = [logits[text].log_softmax(0)[2]] if len(text) < 3 else []
        return torch.stack([*steps, *end]).sum()

    return torch.stack([of(text) for text in TEXTS])


@pytest.mark.parametrize("beta", [1.0, 0.25])
@pytest.mark.parametrize("rewarded", [False, True])
def test_with_a_teacher_of_another_tokenizer_the_optimum_is_its_distribution_times_the_rewards(
    teacher: ScoringModel, beta: float, rewarded: bool
) -> None:
    """Equal rewards are distillation: the student becomes the teacher, as far as the texts are these."""
    known = torch.tensor([s.logprob for s in teacher.score([Text("p", None, text) for text in TEXTS])])
    rewards = torch.tensor([len(text) / 3 if rewarded else 0.5 for text in TEXTS], dtype=torch.float64)
    target = (known.double() + rewards / beta).log_softmax(0)
    prefixes = ["", *(text for text in TEXTS if len(text) < 3)]
    logits = {p: torch.zeros(3 if p else 2, dtype=torch.float64, requires_grad=True) for p in prefixes}
    optimizer = torch.optim.LBFGS(list(logits.values()), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        logprobs = student_logprobs(logits)
        loss, _ = gvpo_loss(logprobs, known, rewards, torch.zeros(len(TEXTS)), beta)
        loss.backward()
        return loss

    student = student_logprobs(logits).detach()
    assert (student.exp() * (student - target)).sum() > 0.3
    optimizer.step(closure)
    student = student_logprobs(logits).detach()
    assert student.exp().sum() == pytest.approx(1)
    assert (student.exp() * (student - target)).sum() < 1e-6
    assert (target.exp() * (target - student)).sum() < 1e-6


def test_the_learner_compares_with_the_log_probs_that_came_with_the_groups(tmp_path: Path) -> None:
    tiny.make_model(tmp_path / "model")
    given = replace(
        learners.settings(tmp_path),
        loss=loss_config(beta=0.5, reference={"model": "teacher"}, importance_cap=None),
    )
    policy = learners.load(tmp_path / "model", given)
    rows = [tiny.make_group(i, (1.0, 0.0, None)) for i in range(2)]
    own = [sum(t.tolist()) for row in rows for t in policy.token_logprobs([row])]
    for i, row in enumerate(rows):
        row["reference_logprobs"] = [-3.0 - i, -5.0, None]
        row["reference_versions"] = [-9, -9, None]
    want, _ = gvpo_loss(
        torch.tensor([own[0], own[1], own[3], own[4]]).double(),
        torch.tensor([-3.0, -5.0, -4.0, -5.0]),
        torch.tensor([1.0, 0.0, 1.0, 0.0]),
        torch.tensor([0, 0, 1, 1]),
        0.5,
    )
    line = train_step(policy, rows, given)
    assert line["loss"] == pytest.approx(float(want), rel=1e-4) and not policy.reference.exists
    assert rows[0]["reference_logprobs"] == [-3.0, -5.0, None]
    rows[1]["reference_logprobs"][0] = None
    with pytest.raises(groups.GroupError, match=r"^group 1: completion 0 has no log-prob of the other model"):
        train_step(policy, rows, given)


# ------------------------------------------------------------------------------------- the run around it


def test_replayed_completions_bring_the_other_models_log_probs_along(tmp_path: Path) -> None:
    async def main() -> pa.Table:
        buffer = make(tmp_path, replay=ReplayConfig(share=0.5))
        row = {**tiny.make_group(0, (1.0, 0.0), 1), "reference_logprobs": [-1.5, None]}
        await buffer.put(groups.table([{**row, "reference_versions": [-7, None]}]))
        return await buffer.history(tiny.table(row).select(list(groups.PROMPT_COLUMNS)), 2)

    row = next(groups.rows(asyncio.run(main())))
    assert row["reference_logprobs"] == [-1.5, None] and row["reference_versions"] == [-7, None]


def test_a_model_is_told_from_another_by_what_is_in_its_folder(tmp_path: Path, teacher_folder: Path) -> None:
    first, second = teacher_folder, tmp_path / "copy"
    shutil.copytree(first, second)
    assert version_of(str(first)) == version_of(str(second)) < 0
    weights = second / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    assert version_of(str(first)) != version_of(str(second))
    assert version_of("org/one") != version_of("org/two")


def test_two_commits_of_a_name_on_the_hub_share_no_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, teacher_folder: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    unknown = version_of("org/name")
    versions, digests = [], []
    place = tmp_path / "models--org--name"
    for commit in ("a" * 40, "b" * 40):
        shutil.copytree(teacher_folder, place / "snapshots" / commit)
        (place / "refs").mkdir(exist_ok=True)
        (place / "refs" / "main").write_text(commit)
        assert revision_of("org/name") == commit
        versions.append(version_of("org/name"))
        digests.append(model_digest("org/name"))
    assert len({unknown, *versions}) == 3 and max(versions) < 0
    assert digests == [f"org/name@{'a' * 40}", f"org/name@{'b' * 40}"]
    # an actor that starts later has the same weights, whatever main is then
    ScoringModel("org/name", {PROMPTS: PLAIN}, 1, revision="a" * 40)
    with pytest.raises(OSError, match="cached files"):
        ScoringModel("org/name", {PROMPTS: PLAIN}, 1, revision="c" * 40)
    assert revision_of(str(teacher_folder)) == "main" == revision_of("no/name/of/the/hub")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["loss.reference={model: nowhere/at/all}"], "loss.reference.model: no folder nowhere/at/all"),
        (["loss.reference={model: model, nums: 2}"], "loss.reference: unknown key nums; did you mean num?"),
        (["loss.reference={model: model, num: 0}"], "loss.reference: num: Input should be greater than"),
        (["loss.reference={model: model, num: 2, max_num: 1}"], "max_num (1) is less than num (2)"),
        (["loss.reference={model: model}", "loss.objective=grpo"], "grpo is not compared with another model"),
        (["loss={objective: epa, num_weak: 1, reference: {model: model}}"], "does not score weak negatives"),
        (["loss.reference={model: model}", "sampling.stop=['.']"], "one of the texts of sampling.stop"),
        (["loss.reference={model: .}"], "has no config.json"),
        (["loss.reference={model: chatless}", "prompts.template=null"], "has no chat template"),
    ],
)
def test_a_model_that_cannot_be_the_reference_is_refused_before_anything_starts(
    refused: Any, folder: Path, teacher_folder: Path, overrides: list[str], said: str
) -> None:
    shutil.copytree(teacher_folder, folder / "chatless")
    (folder / "model" / "chat_template.jinja").write_text(CHAT)
    assert said in refused("train", "config.yaml", *overrides)


def test_a_run_goes_on_with_the_reference_that_has_scored_its_groups(
    tmp_path: Path, teacher_folder: Path
) -> None:
    """The groups of its log that wait for the learner have that model's log-probs, or none at all."""

    def go_on(name: str, reference: Any) -> None:
        base = {"num_steps": 1, "model": {"path": "model"}, "prompts": {"path": "p", "template": "{prompt}"}}
        config = GVPOConfig.from_dict({**base, "run_dir": str(tmp_path / name)})
        config.loss = loss_config(reference=reference)
        with open_run_dir(config, reference_digest(config)):
            pass

    first, second, other = teacher_folder, tmp_path / "copy", tmp_path / "other"
    for folder in (second, other):
        shutil.copytree(first, folder)
    (other / "config.json").write_text((other / "config.json").read_text() + " ")
    go_on("scored", {"model": str(first)})
    go_on("scored", {"model": str(second), "num": 2})  # the same model in another folder
    with pytest.raises(
        ConfigError, match=r"^loss\.reference\.model: what is in it differs from what the run"
    ):
        go_on("scored", {"model": str(other)})
    go_on("unscored", "initial")
    with pytest.raises(ConfigError, match=r"^loss\.reference: the groups of the run in .* were not scored"):
        go_on("unscored", {"model": str(first)})


def test_recorded_groups_that_the_model_has_not_scored_are_refused(
    teacher_folder: Path, tmp_path: Path
) -> None:
    path = teacher_folder
    config = GVPOConfig.from_dict(
        {
            "run_dir": "run",
            "num_steps": 1,
            "model": {"path": "model"},
            "prompts": {"path": "p.jsonl", "template": "{prompt}"},
            "loss": {"reference": {"model": str(path)}},
        }
    )
    assert config.loss.reference_model == ScoringModelConfig(model=str(path))
    known = {"reference_logprobs": [-1.0, None], "reference_versions": [version_of(str(path)), None]}
    good = groups.table([{**tiny.make_group(3, (1.0, None)), **known}])
    check_recorded(config, good)
    with pytest.raises(ConfigError, match=r"^--groups: group 3: completion 0 has no log-prob of loss"):
        check_recorded(config, groups.with_columns(good, reference_versions=[[-1, None]]))
    with pytest.raises(ConfigError, match=r"^--groups: group 4: completion 1 has no log-prob of loss"):
        check_recorded(config, tiny.table(tiny.make_group(4, (None, 1.0))))
    log = GroupLog(tmp_path / "groups")  # that of a run, as `learn --groups RUN/groups` reads it
    log.append(groups.log_columns(good))
    check_recorded(config, log)
    log.append(groups.log_columns(tiny.table(tiny.make_group(4, (None, 1.0)))))
    with pytest.raises(ConfigError, match=r"^--groups: group 4: completion 1 has no log-prob of loss"):
        check_recorded(config, log)


def test_only_what_starts_the_reference_has_to_have_room_for_it() -> None:
    base = {"run_dir": "run", "num_steps": 1, "model": {"path": "model"}, "prompts": {"path": "p"}}
    loss = {"reference": {"model": "teacher", "num": 3, "num_cpus": 0.5, "num_gpus": 1}}
    config = GVPOConfig.from_dict({**base, "loss": loss})
    check_resources(config, 64, 3)
    for arguments in ({"engines": False}, {"references": False}):
        check_resources(config, 64, 0, **arguments)
    with pytest.raises(ConfigError, match=r"^loss\.reference\.num: 3 x 1 GPUs are more than the 2 GPUs"):
        check_resources(config, 64, 2)


def test_a_reference_that_no_node_could_hold_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    base = {"run_dir": "run", "num_steps": 1, "model": {"path": "model"}, "prompts": {"path": "p"}}
    config = GVPOConfig.from_dict({**base, "loss": {"reference": {"model": "teacher", "num_gpus": 1}}})
    node: dict[str, Any] = {"Alive": True, "Resources": {"CPU": 64.0}}
    monkeypatch.setattr("ray.nodes", lambda: [node])
    (note,) = placement_notes(config, engines=True)
    assert "has {CPU: 1, GPU: 1} for a reference: it waits" in note
    node["Resources"]["GPU"] = 1.0
    assert list(placement_notes(config, engines=True)) == []
