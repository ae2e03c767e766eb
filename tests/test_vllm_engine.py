"""An engine that runs a real vLLM on the CPU."""

from __future__ import annotations

import asyncio
import copy
import json
import os
import signal
import sys
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import openai
import pytest
import tiny
import torch
from episodes import LocalClient
from sampled import PROMPT_IDS, part, prompt, row_of, sampling
from test_agents import check as check_agents
from test_agents import sequences
from test_tasksets import TASKS, ended
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from gvpo_ray import groups
from gvpo_ray.actors import Draining, cause_of
from gvpo_ray.bench import turns
from gvpo_ray.config.data import PromptsConfig
from gvpo_ray.config.engines import PoolConfig
from gvpo_ray.config.environment import ENVIRONMENT, EnvironmentConfig
from gvpo_ray.config.model import ModelConfig
from gvpo_ray.engines import rollout, vllm_engine
from gvpo_ray.engines.rollout import ModelCall, Span
from gvpo_ray.engines.serving import Serve
from gvpo_ray.engines.vllm_engine import Engine
from gvpo_ray.environments.agent import Agents, read_agent
from gvpo_ray.environments.agent_host import AgentHost


class Running:
    """An engine on an event loop of its own, which runs while it is asked something."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.engine = Engine(
            ModelConfig(path=str(folder)),
            PoolConfig(kv_cache_gib=1, num_threads=1),
            "objects",
            seed=0,
            load_weights=True,
        )
        self.runner = asyncio.Runner()
        self.run = self.runner.run
        self.report = self.run(self.engine.start())
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def check(self, row: dict[str, Any], sizes: int) -> None:
        """That log-probs are those of teacher forcing and texts those of the tokens."""
        columns = ("completions", "completion_ids", "finish_reasons", "sampling_logprobs", "sources")
        for text, ids, reason, logprobs, source in zip(*(row[name] for name in columns), strict=True):
            if source != "policy":
                continue
            assert 0 < len(ids) <= sizes and (reason in ("stop", "abort") or len(ids) == sizes)
            with torch.no_grad():
                logits = self.model(torch.tensor([PROMPT_IDS + ids])).logits[0, len(PROMPT_IDS) - 1 : -1]
            expected = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0].tolist()
            assert logprobs == pytest.approx(expected, abs=1e-3)
            assert text == self.tokenizer.decode(ids, skip_special_tokens=True) and (reason == "stop") == (
                ids[-1] == tiny.EOS
            )


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A model that vLLM runs on a CPU (heads of 32). Its completions end by themselves, but seldom within 300
    tokens: head of EOS at 0.
    """
    folder = tiny.make_model(tmp_path_factory.mktemp("model"))
    model = tiny.vllm_model(tie_word_embeddings=False, initializer_range=0.3)
    model.lm_head.weight.data[tiny.EOS] = 0
    model.save_pretrained(folder)
    before = dict(os.environ)  # the engine's settings are for a process of its own
    running = Running(folder)
    os.environ.clear()
    os.environ.update(before)
    yield running
    running.run(running.engine.close())
    running.runner.close()


async def until(condition: Callable[[], Awaitable[bool]], seconds: float = 300.0) -> None:
    end = time.monotonic() + seconds
    while not await condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.02)


def test_vllm_samples_only_what_is_missing_of_a_group(running: Running) -> None:
    assert running.report["pid"] == os.getpid()
    assert tiny.descendants("VLLM::") == tiny.descendants("VLLM::EngineCore")  # its worker is in there

    async def sample() -> list[dict[str, Any]]:
        engine, foreign = running.engine, part([9], [8], version=None, source="offline:people")
        with_kept, missing = await engine.generate(prompt(), sampling(5, 30), 0, None, foreign)
        assert missing == 0
        enough, missing = await engine.generate(prompt(), sampling(2, 30), 0, None, foreign)
        assert missing == 0 and row_of(enough)["completion_ids"] == [[9], [8]]
        seeded = [(await engine.generate(prompt(), sampling(3, 30), 0, 7))[0] for _ in range(2)]
        beside, _ = await engine.generate(prompt(), sampling(3, 30), 0, 7, groups.take(seeded[0], [1]))
        return [row_of(table) for table in (with_kept, *seeded, beside)]

    before = running.run(running.engine.status())["num_tokens"]
    with_kept, one, two, beside = running.run(sample())
    assert with_kept["completion_ids"][:2] == [[9], [8]] and len(with_kept["completion_ids"]) == 5
    assert (
        with_kept["version_max"] == [None, None, 0, 0, 0]
        and with_kept["sources"] == ["offline:people"] * 2 + ["policy"] * 3
    )
    assert one["completion_ids"] == two["completion_ids"]
    assert len({tuple(ids) for ids in one["completion_ids"] + beside["completion_ids"]}) == 3 + 2
    for row in (with_kept, one, beside):
        running.check(row, 30)
    rows = [
        with_kept["completion_ids"][2:],
        one["completion_ids"],
        two["completion_ids"],
        beside["completion_ids"][1:],
    ]
    status = running.run(running.engine.status())
    assert (
        status["num_tokens"] - before == sum(len(ids) for row in rows for ids in row)
        and status["num_completions"] == 0
    )


def test_what_a_seed_samples_is_the_same_alone_and_among_more_prompts_than_vllm_takes_at_a_time(
    running: Running,
) -> None:
    ids = [5 + i % 11 for i in range(60)]  # 60 of them are more tokens than vLLM computes in a step
    long = [groups.with_columns(prompt(i), prompt_ids=[[*ids, 5 + i % 7]]) for i in range(60)]

    async def run() -> None:
        (alone, _), (again, _) = [
            await running.engine.generate(long[59], sampling(2, 8), 0, seed) for seed in (59, 60)
        ]
        many = await asyncio.gather(
            *(running.engine.generate(group, sampling(2, 8), 0, i) for i, group in enumerate(long))
        )
        assert (
            row_of(many[59][0])["completion_ids"]
            == row_of(alone)["completion_ids"]
            != row_of(again)["completion_ids"]
        )

    running.run(run())


def test_the_prefix_cache_has_a_prompt_that_was_read_before(running: Running) -> None:
    engine = running.engine
    long = groups.with_columns(prompt(), prompt_ids=[[5 + i % 11 for i in range(300)]])

    async def counts() -> tuple[int, int]:
        before = engine.num_prompt_tokens, engine.num_cached_tokens
        await engine.generate(long, sampling(2, 4))
        status = await engine.status()
        return status["num_prompt_tokens"] - before[0], status["num_cached_tokens"] - before[1]

    assert running.run(counts())[0] == 2 * 300
    prompts, cached = running.run(counts())
    assert prompts == 600 and cached >= 2 * 128  # whole blocks, of 128 tokens on a CPU


def test_vllm_hands_over_siblings_of_a_long_group_and_goes_on_where_another_engine_was_cut_off(
    running: Running,
) -> None:
    engine = running.engine

    async def run() -> None:
        whole, _ = await engine.generate(prompt(), sampling(12, 900))
        rows = row_of(whole)
        running.check(rows, 900)
        assert "stop" in rows["finish_reasons"]
        longest = max(range(12), key=lambda i: len(rows["completion_ids"][i]))
        ids, logprobs = rows["completion_ids"][longest][:-3], rows["sampling_logprobs"][longest][:-3]
        almost = groups.take(whole, [longest])
        almost = groups.with_columns(
            almost, finish_reasons=[["abort"]], completion_ids=[[ids]], sampling_logprobs=[[logprobs]]
        )
        long = asyncio.ensure_future(engine.generate(prompt(1), sampling(12, len(ids) + 2), 0, None, almost))
        short = asyncio.ensure_future(engine.generate(prompt(2), sampling(4, 4)))
        tokens, token_at, asked_at = [], [], []
        while not long.done():
            now, status = time.time(), await engine.status()
            if status["num_completions"]:  # else it has nothing to do, yet or any more
                asked_at.append(now)
                tokens.append(status["num_tokens"])
                token_at.append(status["last_token_at"])
            if len(tokens) == 3:
                assert status["oldest"]["group_id"] == 1 and 0 < status["num_completions"] <= 12 + 4
                handing_over = asyncio.ensure_future(engine.finished())
            await asyncio.sleep(0.05)
        assert tokens == sorted(tokens) and len(set(tokens)) > 10
        for i in range(1, len(tokens)):
            assert token_at[i] >= asked_at[i] if tokens[i] > tokens[i - 1] else token_at[i] == token_at[i - 1]
        ids_handed_over, table = await handing_over
        assert ids_handed_over == [1]  # not those of the short one
        assert any(row[: len(ids)] == ids for row in row_of(table)["completion_ids"])
        running.check(row_of(table), len(ids) + 2)
        (row, missing), (_, missing_of_short) = (row_of((await long)[0]), (await long)[1]), await short
        assert missing == missing_of_short == 0 and len(row["completion_ids"]) == 12
        assert (
            row["completion_ids"][0][: len(ids)] == ids
            and row["sampling_logprobs"][0][: len(ids)] == logprobs
        )
        running.check(row, len(ids) + 2)

    running.run(run())


def test_a_drained_vllm_returns_what_it_has_and_another_goes_on_with_it(running: Running) -> None:
    engine = running.engine

    async def run() -> None:
        work = asyncio.ensure_future(engine.generate(prompt(), sampling(12, 900)))
        before = (await engine.status())["num_tokens"]

        async def has_begun() -> bool:
            return bool((await engine.status())["num_tokens"] > before + 12 * 100)

        await until(has_begun)
        assert not work.done()
        drained = asyncio.ensure_future(engine.drain(0.1))
        await asyncio.sleep(0)
        with pytest.raises(Draining):
            await engine.generate(prompt(1), sampling())
        table, missing = await work
        await drained
        cut = row_of(table)
        running.check(cut, 900)
        assert missing == cut["finish_reasons"].count("abort") > 0 and len(cut["completion_ids"]) == 12
        engine._is_draining = False  # from here on it is the other engine
        table, missing = await engine.generate(prompt(), sampling(12, 900), 0, None, table)
        whole = row_of(table)
        running.check(whole, 900)
        assert missing == 0 and "abort" not in whole["finish_reasons"]
        for ids in cut["completion_ids"]:
            assert sum(other[: len(ids)] == ids for other in whole["completion_ids"]) == 1
        # What is as long as it may be needs no engine.
        full = groups.with_columns(groups.take(table, [0]), finish_reasons=[["abort"]])
        size = len(whole["completion_ids"][0])
        assert (
            row_of((await engine.generate(prompt(), sampling(2, size), 0, None, full))[0])["completion_ids"][
                0
            ]
            == whole["completion_ids"][0]
        )

    running.run(run())


def test_vllm_holds_the_same_bits_after_deltas_as_after_the_whole(running: Running) -> None:
    engine, ids = running.engine, [5 + 7 * i % 37 for i in range(90)]
    learner, tensors = publisher(), {name: x.clone() for name, x in running.model.state_dict().items()}
    from vllm import SamplingParams

    async def bits() -> Any:
        """The log-probs of every token of a prompt, and vLLM's own checksums."""
        params = SamplingParams(max_tokens=1, prompt_logprobs=0, temperature=1.0)
        output = await engine._final(ids, params, uuid.uuid4().hex)
        logprobs = [output.prompt_logprobs[i][ids[i]].logprob for i in range(1, len(ids))]
        return logprobs, await engine._llm.compute_weight_checksums()

    def changed(share: float) -> dict[str, torch.Tensor]:
        for tensor in tensors.values():
            places = torch.randperm(tensor.numel())[: int(share * tensor.numel())]
            tensor.view(-1)[places] *= 1.25
        return tensors

    async def run() -> None:
        seen = [await bits()]
        await engine.update(1, learner.publish(1, tensors.items()))
        assert await bits() == seen[0]
        for version in (2, 3, 4):
            published = learner.publish(version, changed(0.02).items())
            assert len(published["deltas"]) == version - 1
            if version == 3:
                continue  # a version that this engine never saw
            # the node's copy is brought up to date while vLLM still runs the weights before
            _, reading = await asyncio.to_thread(engine._node_copy.take, published, list)
            assert await bits() == seen[-1]
            reading.close()
            await engine.update(version, published)
            seen.append(await bits())
            assert seen[-1] != seen[-2]
        await engine.update(5, publisher().publish(5, tensors.items()))
        assert await bits() == seen[-1]
        # the tests that follow compare with the model
        await engine.update(6, publisher().publish(6, running.model.state_dict().items()))
        assert await bits() == seen[0]

    running.run(run())


@pytest.mark.parametrize("keeps", [False, True])
def test_what_follows_new_weights_is_the_new_policys_unless_keys_and_values_are_kept(
    running: Running, keeps: bool
) -> None:
    engine, new = running.engine, copy.deepcopy(running.model)
    for tensor in new.state_dict().values():
        tensor.add_(0.1 * tensor.std() * torch.randn_like(tensor))
    pool = engine._pool
    engine._pool = pool.model_copy(update={"keep_kv": keeps})

    async def run(version: int) -> dict[str, Any]:
        before = (await engine.status())["num_tokens"]
        work = asyncio.ensure_future(engine.generate(prompt(), sampling(6, 400)))

        async def has_begun() -> bool:
            return bool((await engine.status())["num_tokens"] > before + 6 * 60)

        await until(has_begun)
        await engine.update(version, publisher().publish(version, new.state_dict().items()))
        row = row_of((await work)[0])
        await engine.update(version + 1, publisher().publish(version + 1, running.model.state_dict().items()))
        # a prompt is read with the weights of now, whatever older ones have left in the cache
        running.check(row_of((await engine.generate(prompt(), sampling(2, 20)))[0]), 20)
        return row

    row = running.run(run(10 + 2 * keeps))
    engine._pool = pool
    num_mixed = 0
    for ids, got in zip(row["completion_ids"], row["sampling_logprobs"], strict=True):
        of_old, of_new = ((torch.tensor(got) - logprobs(model, ids)).abs() for model in (running.model, new))
        begin = next((i for i, difference in enumerate(of_old) if difference > 1e-3), len(ids))
        if len(ids) - begin < 20:
            continue
        num_mixed += 1
        if keeps:
            assert of_new[begin:].mean() > 1e-2
        else:
            assert of_new[begin:].max() < 1e-3
    assert num_mixed > 0


def test_a_group_in_flight_stands_still_while_its_engine_sleeps_and_goes_on_with_its_tokens(
    running: Running,
) -> None:
    engine = running.engine

    async def run() -> None:
        before = (await engine.status())["num_tokens"]
        work = asyncio.ensure_future(engine.generate(prompt(), sampling(6, 400)))

        async def has_begun() -> bool:
            return bool((await engine.status())["num_tokens"] > before + 6 * 60)

        await until(has_begun)
        await engine.sleep()
        assert await engine._llm.is_sleeping()  # its last tokens are here before this answer
        asleep = (await engine.status())["num_tokens"]
        later = asyncio.ensure_future(engine.generate(prompt(1), sampling(2, 5)))
        for _ in range(3):  # the core answers, and computes nothing between
            assert await engine._llm.is_sleeping()
        asked_at = time.time()
        status = await engine.status()
        assert status["num_tokens"] == asleep and status["num_groups"] == 2
        assert not work.done() and not later.done() and status["last_token_at"] >= asked_at
        await engine.sleep()  # again: nothing
        await engine.wake()
        await engine.wake()
        running.check(row_of((await work)[0]), 400)
        running.check(row_of((await later)[0]), 5)

    running.run(run())


def logprobs(model: Any, ids: list[int]) -> torch.Tensor:
    """The log-probs of a completion of PROMPT_IDS under a model of transformers."""
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT_IDS + ids])).logits[0, len(PROMPT_IDS) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]


def publisher() -> Any:
    from gvpo_ray.weights.transfer import ObjectPublisher

    return ObjectPublisher(copy.deepcopy, torch.float32, is_sender=True)


def test_what_vllm_cannot_start_with_is_said_itself_and_not_pointed_to(tmp_path: Path) -> None:
    """What vLLM's core says of it is in the log of this process alone, which has to be a file."""
    folder, before = tiny.make_model(tmp_path), dict(os.environ)
    usual = [os.dup(fd) for fd in (1, 2)]
    try:
        for fd, name in ((1, "out"), (2, "err")):
            with open(tmp_path / name, "a") as file:
                os.dup2(file.fileno(), fd)
        pool = PoolConfig(kv_cache_gib=1, num_threads=1)
        with pytest.raises(RuntimeError) as raised:
            asyncio.run(Engine(ModelConfig(path=str(folder)), pool, "objects", -1, True).start())
    finally:
        for fd, kept in zip((1, 2), usual, strict=True):
            os.dup2(kept, fd)
            os.close(kept)
        os.environ.clear()
        os.environ.update(before)
    assert str(raised.value) == "vLLM did not start: ValueError: Seed must be between 0 and 2**32 - 1"


def test_vllm_is_given_what_the_pool_says_and_else_what_the_model_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.engine.async_llm import AsyncLLM

    given: list[Any] = []

    def refuse(arguments: Any) -> None:
        given.append(arguments)
        raise InterruptedError

    monkeypatch.setattr(AsyncLLM, "from_engine_args", refuse)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    folder = str(tiny.make_model(tmp_path))
    model, gpu = ModelConfig(path=folder, dtype="bfloat16"), {"num_gpus": 1, "memory_fraction": 0.5}
    for pool, drain_s in (
        (PoolConfig(), None),
        (PoolConfig(dtype="float16", quantization="fp8", vllm={"max_num_seqs": 7}, **gpu), 2.5),
    ):
        with pytest.raises(InterruptedError):
            asyncio.run(Engine(model, pool, "nccl", 3, drain_s=drain_s).start())
    plain, special = given
    assert (plain.dtype, plain.quantization, plain.seed, plain.load_format) == (
        "bfloat16",
        None,
        3,
        "dummy",
    ) and plain.shutdown_timeout == 0
    # vLLM's layer of logits reads this property, which falls back to the model's type without an error
    found = plain.create_model_config()
    assert (found.dtype, found.head_dtype) == (torch.bfloat16, torch.float32)
    assert (special.dtype, special.quantization, special.max_num_seqs, special.gpu_memory_utilization) == (
        "float16",
        "fp8",
        7,
        0.5,
    )
    assert special.shutdown_timeout == 3  # a core that gets SIGTERM itself goes on with what it has, too
    assert special.weight_transfer_config.backend == "nccl"


def test_a_layer_of_cohere_2_sees_as_many_tokens_in_vllm_as_in_the_learner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM adds one to the window of config.json, which transformers does not."""
    from transformers import Cohere2Config
    from transformers.models.cohere2.modeling_cohere2 import Cohere2Attention
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.model_executor.models.commandr import CohereAttention
    from vllm.v1.engine.async_llm import AsyncLLM

    given: list[Any] = []

    def refuse(arguments: Any) -> None:
        given.append(arguments)
        raise InterruptedError

    monkeypatch.setattr(AsyncLLM, "from_engine_args", refuse)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(parallel_state, "_TP", SimpleNamespace(world_size=1, rank_in_group=0))
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 4}
    config = Cohere2Config(**sizes, sliding_window=16, eos_token_id=tiny.EOS, max_position_embeddings=128)
    config.save_pretrained(tiny.make_model(tmp_path))
    with pytest.raises(InterruptedError):
        asyncio.run(Engine(ModelConfig(path=str(tmp_path)), PoolConfig(), "objects", 0).start())
    with set_current_vllm_config(found := given[0].create_engine_config()):
        theirs = [
            CohereAttention(found.model_config.hf_config, prefix=f"layers.{i}").attn.sliding_window
            for i in range(4)
        ]
    assert theirs == [Cohere2Attention(config, i).sliding_window for i in range(4)] == [16, 16, 16, None]
    assert AutoConfig.from_pretrained(tmp_path).sliding_window == 16


@pytest.mark.parametrize("has_head", [True, False])
def test_a_family_that_is_always_tied_gets_no_head_and_others_do(tmp_path: Path, has_head: bool) -> None:
    """vLLM has none for Gemma 2 and Cohere, and refuses the one that the learner sends."""
    from safetensors.torch import save_file

    from gvpo_ray.weights.vllm_worker import ObjectsUpdateInfo, ObjectsWeightTransferEngine

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loaded: list[str] = []
            if has_head:
                self.lm_head = torch.nn.Linear(1, 1)

        def load_weights(self, weights: Any) -> None:
            self.loaded += [name for name, _ in weights]

    wire = object.__new__(ObjectsWeightTransferEngine)
    wire.model, wire.model_config = Model(), SimpleNamespace(dtype=torch.float32)
    sent = {"lm_head.weight": torch.ones(2), "model.embed_tokens.weight": torch.ones(2)}
    save_file(sent, tmp_path / "0.safetensors")
    wire.receive_weights(ObjectsUpdateInfo(paths=[str(tmp_path / "0.safetensors")]))
    assert sorted(wire.model.loaded) == ["lm_head.weight"] * has_head + ["model.embed_tokens.weight"]


@pytest.mark.parametrize("size", [64, 45])
def test_a_head_has_the_bias_that_came_with_each_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """vLLM registers Phi's when it is loaded, and its reload takes it away again. It pads the vocabulary to a
    multiple of 64.
    """
    from safetensors.torch import save_file
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
    from vllm.model_executor.model_loader.reload import record_metadata_for_reloading
    from vllm.model_executor.models.transformers.causal import CausalMixin

    from gvpo_ray.weights.vllm_worker import ObjectsUpdateInfo, ObjectsWeightTransferEngine

    class OfTransformers(CausalMixin):
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)
            self.pp_group = SimpleNamespace(is_last_rank=True)
            self.vllm_config = SimpleNamespace(load_config=SimpleNamespace(device="cpu"))
            self.device_config = self.hf_to_vllm_mapper = None
            self.ignore_unexpected_prefixes, self.ignore_unexpected_suffixes = [], []
            self.lm_head = ParallelLMHead(size, 8)

    monkeypatch.setattr(parallel_state, "_TP", SimpleNamespace(world_size=1, rank_in_group=0))
    with set_current_vllm_config(VllmConfig()):
        model = OfTransformers()
    record_metadata_for_reloading(model)
    wire = object.__new__(ObjectsWeightTransferEngine)
    wire.model, wire.device = model, torch.device("cpu")
    wire.model_config = SimpleNamespace(dtype=torch.float32)
    for version in range(3):
        sent = {"lm_head.weight": torch.randn(size, 8), "lm_head.bias": torch.randn(size)}
        save_file(sent, tmp_path / f"{version}.safetensors")
        wire.start_weight_update()
        wire.receive_weights(ObjectsUpdateInfo(paths=[str(tmp_path / f"{version}.safetensors")]))
        wire.finish_weight_update()
        for name, tensor in sent.items():
            assert torch.equal(getattr(model.lm_head, name.removeprefix("lm_head."))[:size], tensor), name


TEMPLATE = "{% for m in messages %}{{ m['content'] }}{{ '=' if m['role'] == 'user' else '+' }}{% endfor %}"


ONE = 2 + tiny.ALPHABET.index(
    "1"
)  # as all prompts of a group, a text's begins with what the others begin with


async def asks(base_url: str, api_key: str, model: str, prompt: str) -> float:
    """An agent with the client of openai: a conversation, a stream, a text, and calls that are refused."""
    client = openai.AsyncOpenAI(base_url=base_url, api_key=api_key, max_retries=0)
    messages: list[Any] = [{"role": "user", "content": prompt}]
    for _ in range(2):
        answer = await client.chat.completions.create(
            model="gpt-5", messages=messages, max_tokens=6, temperature=0, logprobs=True
        )
        assert len(answer.choices[0].logprobs.content) == answer.usage.completion_tokens
        messages += [{"role": "assistant", "content": answer.choices[0].message.content or ""}]
        messages += [{"role": "user", "content": "2"}]
    chunks = await client.chat.completions.create(model=model, messages=messages, max_tokens=5, stream=True)
    said = "".join([chunk.choices[0].delta.content or "" async for chunk in chunks if chunk.choices])
    text = await client.completions.create(model=model, prompt=[ONE, 8, 9], max_tokens=4)
    with pytest.raises(openai.BadRequestError, match="n: "):
        await client.chat.completions.create(model=model, messages=messages, n=2)
    with pytest.raises(openai.BadRequestError, match="no room"):
        await client.completions.create(model=model, prompt=[5] * 200)
    await client.close()
    return float(len(said) + len(text.choices[0].text))


def test_an_agents_calls_of_vllms_own_server_are_trained_as_they_were_sampled(running: Running) -> None:
    engine, sampled = running.engine, list[tuple[list[int], Span]]()
    host = AgentHost(asks, 600.0, 8, False)
    environment = EnvironmentConfig(agent="a.py:asks")
    model, prompts = ModelConfig(path=str(running.folder)), PromptsConfig(path="p", template="{prompt}")
    made = Agents(environment, model, prompts, [], [LocalClient(host)])

    async def noted(call: ModelCall, span: Any = engine._span) -> Span:
        result: Span = await span(call)
        sampled.append((call.ids, result))
        return result

    async def main() -> None:
        await engine._begin_to_serve(Serve("the token", True, {"chat_template": TEMPLATE}))
        assert engine.serving is not None and (await engine.status())["address"] == engine.serving.address
        table, missing = await engine.generate(prompt(), sampling(3, 100))
        await host._session.close()
        host._runner._shutdown_timeout = 0.01
        await host._runner.cleanup()
        (row,) = groups.rows(table)
        assert not missing and row["reward_reasons"] == [None] * len(row["completions"])
        assert len(sampled) == 3 * 4 and {len(span.ids) for _, span in sampled} <= {1, 2, 3, 4, 5, 6}
        check_agents(row, sampled)
        for ids, mask, logprobs in sequences(row):
            with torch.no_grad():
                logits = running.model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
            expected = logits.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
            for is_trained, got, want in zip(mask[1:], logprobs[1:], expected, strict=True):
                assert got == (pytest.approx(want, abs=1e-3) if is_trained else 0.0)
        ends = [json.loads(one) for one in row["episodes"]]
        assert [one["end"] for one in ends] == ["length"] * len(ends)
        assert len({one["name"] for one in ends}) == 3 and {one["turns"] for one in ends} == {4}

    async def others() -> None:
        """What the server says to those who are no episode, also while new weights are swapped in."""
        assert engine.serving is not None
        url = f"{engine.serving.address}/v1"
        client = openai.AsyncOpenAI(base_url=url, api_key="the token", max_retries=0)
        assert [one.id for one in (await client.models.list()).data] == ["policy"]
        with pytest.raises(openai.AuthenticationError):
            await client.with_options(api_key="another").models.list()
        await engine._llm.pause_generation(mode="keep")
        asking = asyncio.ensure_future(
            client.completions.create(model="policy", prompt=[5, 6], max_tokens=3, n=2)
        )
        states = engine._llm.output_processor.request_states

        async def has_come() -> bool:
            return len(states) == 2 or asking.done()

        await until(has_come)
        assert not asking.done()
        await engine._llm.resume_generation()
        assert len((await asking).choices) == 2
        body = {"model": "policy", "token_ids": [5, 6], "sampling_params": {"max_tokens": 3, "logprobs": 1}}
        headers, route = {"x-api-key": "the token"}, f"{engine.serving.address}/inference/v1/generate"
        async with (
            aiohttp.ClientSession(headers=headers) as session,
            session.post(route, json=body) as response,
        ):
            (choice,) = (await response.json())["choices"]
        spelled = [(one["token_id"], one["token"]) for one in choice["logprobs"]["content"]]
        assert spelled == [(token, f"token_id:{token}") for token in choice["token_ids"]]
        assert choice["weight_versions"][0]["version"] == str(engine.version)
        await client.close()

    before = engine._rollout
    engine._rollout, engine._span = made, noted  # type: ignore[method-assign]
    try:
        running.run(main())
        running.run(others())
    finally:
        del engine._span
        engine._rollout = before
        if engine.serving is not None:
            running.run(engine.serving.close())
            engine.serving = None


def test_a_task_set_of_verifiers_is_trained_with_the_tokens_that_vllm_sampled(
    running: Running, tmp_path: Path
) -> None:
    (tmp_path / "count_tasks.py").write_text(TASKS)
    name = f"verifiers:{tmp_path / 'count_tasks.py'}"
    environment, engine = EnvironmentConfig(name=name), running.engine
    tasks: Any = read_agent(environment)
    host = AgentHost(tasks, 600.0, 8, False)
    model, prompts = ModelConfig(path=str(running.folder)), PromptsConfig(path="p", template="{prompt}")
    sampled = list[tuple[list[int], Span]]()

    async def noted(call: ModelCall, span: Any = engine._span) -> Span:
        result: Span = await span(call)
        sampled.append((call.ids, result))
        return result

    async def main() -> None:
        await engine._begin_to_serve(Serve("the token", True, {"chat_template": TEMPLATE}))
        task = json.dumps({"idx": 0, "prompt": "1", "goal": 0, "kind": "counts"})
        table, missing = await engine.generate(
            groups.with_columns(prompt(), data=[json.dumps({"columns": {"task": task}})]), sampling(3, 100)
        )
        await ended(tasks)
        await host._session.close()
        host._runner._shutdown_timeout = 0.01
        await host._runner.cleanup()
        (row,) = groups.rows(table)
        assert not missing and row["reward_reasons"] == [None] * len(row["completions"])
        assert set(row["reward_parts"][ENVIRONMENT]) <= {0.0, 2.0}
        check_agents(row, [call for call in sampled if call[1].ids])

    before = engine._rollout
    engine._rollout = Agents(environment, model, prompts, [], [LocalClient(host)])
    engine._span = noted  # type: ignore[method-assign]
    try:
        running.run(main())
    finally:
        sys.modules.pop("count_tasks", None)
        del engine._span
        engine._rollout = before
        if engine.serving is not None:
            running.run(engine.serving.close())
            engine.serving = None


class _Core:
    """As much of AsyncLLM as an update asks for."""

    def __getattr__(self, name: str) -> Any:
        async def method(*_: Any, **__: Any) -> None:
            await asyncio.sleep(0.05)

        return method


def test_an_update_is_a_sign_of_life() -> None:
    async def run() -> None:
        engine = Engine(ModelConfig(path="m"), PoolConfig(), "nccl", 0)
        core = _Core()
        core.output_processor = type("OutputProcessor", (), {"request_states": {}})
        engine._llm, engine._last_token_at = core, 0.0
        engine._death = asyncio.get_running_loop().create_future()
        running = rollout.Completions(prompt(), 2)
        with engine._at_work(running):
            engine._last_token_at = 0.0
            assert (await engine.status())["last_token_at"] == 0.0
            began = time.time()
            await engine.begin_update()
            status = await engine.status()
            assert status["updating"] and status["last_token_at"] >= began
            began = time.time()
            await engine.finish_update(4)
            status = await engine.status()
            assert (
                not status["updating"]
                and status["last_token_at"] > began
                and status["version"] == 4
                and status["num_completions"] == 2
            )
        began = time.time()
        assert (await engine.status())["last_token_at"] >= began

    asyncio.run(run())


def test_a_turn_finds_the_turns_before_it_in_the_prefix_cache_and_separate_prompts_find_nothing(
    running: Running,
) -> None:
    one, apart = turns.Speed(), turns.Speed()
    for is_one, speed in ((True, one), (False, apart)):
        running.run(turns.measure(running.engine, tiny.VOCAB_SIZE, 3, 3, is_one, speed))
    assert (
        one.context == apart.context == 3 * (192 + 416 + 640) and one.sampled == apart.sampled == 3 * 3 * 32
    )
    assert (
        one.hit_rate > 0.3 and apart.hit_rate == 0
    )  # at most (224 + 448) / (192 + 416 + 640), in whole blocks
    assert min(one.tokens_per_s, apart.tokens_per_s) > 0


def test_everyone_who_waits_for_a_dead_core_is_told_and_the_process_ends(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Last: there is no engine any more."""
    engine, ended = running.engine, []
    monkeypatch.setattr(vllm_engine, "ZOMBIE_S", 0.5)
    monkeypatch.setattr(vllm_engine.os, "_exit", ended.append)

    async def run() -> None:
        # some of 12 are long
        work = [asyncio.ensure_future(engine.generate(prompt(i), sampling(12, 900))) for i in range(3)]

        async def has_begun() -> bool:
            return bool((await engine.status())["num_groups"] == 3)

        await until(has_begun)
        (core,) = tiny.descendants("VLLM::EngineCore")
        os.kill(core, signal.SIGKILL)
        errors = await asyncio.wait_for(asyncio.gather(*work, return_exceptions=True), timeout=300)
        assert [type(error).__name__ for error in errors] == ["EngineDeadError"] * 3
        # as an update by NCCL begins
        errors += await asyncio.gather(engine.begin_update(), return_exceptions=True)
        assert (await engine.status())["num_groups"] == 0

        async def has_ended() -> bool:
            return bool(ended)

        await until(has_ended)
        await engine.close()
        assert ended == [1]
        # only now: an engine that is not closed ends this process
        how = "was ended by SIGKILL (out of memory?) and wrote no cause"
        assert [how in cause_of(error) for error in errors] == [True] * 4, cause_of(errors[0])

    running.run(run())
