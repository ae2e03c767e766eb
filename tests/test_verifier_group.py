"""Groups of verifier actors on a real, embedded Ray: growing, shrinking, dying, and a reward model beside
them.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import tiny
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from gvpo_ray import groups
from gvpo_ray.config.run import RayConfig
from gvpo_ray.config.verifiers import VerifiersConfig
from gvpo_ray.run.session import Session
from gvpo_ray.verifiers import pool as verifier_group
from gvpo_ray.verifiers.pool import VerifierGroup


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    session = Session(RayConfig(num_cpus=2, object_store_gib=0.2))
    yield session
    session.stop()


def _group(config: VerifiersConfig) -> VerifierGroup:
    return VerifierGroup(config, None, lambda *_: None, print)


def _sampled(number: int, completions: list[str]) -> Any:
    return groups.table([{"group_id": number, "prompt": "p", "answer": "7", "completions": completions}])


async def _score_all(verifiers: VerifierGroup, tables: list[Any]) -> list[Any]:
    refs = await asyncio.gather(*(verifiers.score(ray.put(groups.to_wire(table))) for table in tables))
    return [groups.from_wire(await ref) for ref in refs]


def test_a_fleet_grows_while_groups_wait_loses_none_to_a_kill_and_shrinks_when_idle(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slow.py").write_text(
        "import time\ndef reward(prompts, completions, **columns):\n    time.sleep(0.1)\n    return "
        "[float(len(completions[0]))]\n"
    )
    config = VerifiersConfig(num=1, max_num=3, num_cpus=0.1, rewards={f"{tmp_path}/slow.py:reward": {}})
    verifiers = _group(config)
    tables = [_sampled(i, ["x" * (i % 5), "yy"]) for i in range(60)]
    work = asyncio.run_coroutine_threadsafe(_score_all(verifiers, tables), session.loop)
    killed = None
    while killed is None:
        time.sleep(0.1)
        killed = next(iter(tiny.descendants("ray::_VerifierActor.score_group")), None)
    os.kill(killed, signal.SIGKILL)
    scored = work.result(timeout=300)
    assert [table["group_id"][0].as_py() for table in scored] == list(range(60))
    assert [table["rewards"][0].as_py() for table in scored] == [[float(i % 5), 2.0] for i in range(60)]
    assert len(verifiers.actors) == 3
    monkeypatch.setattr(verifier_group, "IDLE_S", 0.0)
    session.call(_score_all(verifiers, tables[:1]))
    session.call(_score_all(verifiers, tables[:1]))
    assert len(verifiers.actors) == 1
    session.call(asyncio.wait(list(verifiers._endings)) if verifiers._endings else asyncio.sleep(0))
    while len(tiny.descendants("ray::_VerifierActor")) > 1:
        time.sleep(0.1)
    left = set()
    # an actor that Ray starts again whenever it ends would come back for ever, as another process
    for _ in range(30):
        left |= set(tiny.descendants("ray::_VerifierActor"))
        time.sleep(0.1)
    assert len(left) == 1
    # another fleet of the same Ray, as in a notebook where a run that was stopped just now is going down
    beside = _group(VerifiersConfig(num=1, num_cpus=0.1, rewards={"exact_match": 1.0}))
    (scored_beside,) = session.call(_score_all(beside, [_sampled(0, ["\\boxed{7}"])]))
    (scored_here,) = session.call(_score_all(verifiers, tables[:1]))
    assert scored_beside["rewards"][0].as_py() == [1.0] and scored_here["rewards"] == scored[0]["rewards"]
    session.call(beside.close())
    session.call(verifiers.close())
    while tiny.descendants("ray::_VerifierActor"):  # `verifiers` still has its handle
        time.sleep(0.1)


def test_a_reward_model_scores_in_actors_of_its_own(session: Session, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tiny.make_model(tmp_path / "tokenizer"))
    config = LlamaConfig(
        vocab_size=tiny.VOCAB_SIZE,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=1,
        max_position_embeddings=32,
    )
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    rewards: dict[str, Any] = {
        "exact_match": 1.0,
        "rm": {"model": str(tmp_path / "rm"), "weight": 2.0, "num": 2, "num_cpus": 0.1},
    }
    verifiers = _group(VerifiersConfig(num=1, num_cpus=0.1, rewards=rewards))
    scored = session.call(_score_all(verifiers, [_sampled(i, ["7", "7" * 40, "8"]) for i in range(3)]))
    from gvpo_ray.verifiers.reward_model import RewardModel

    first, _, third = RewardModel(str(tmp_path / "rm"), batch_size=4).score(["p"] * 3, ["7", "7" * 40, "8"])
    for table in scored:
        assert table["rewards"][0].as_py() == pytest.approx([1 + 2 * first, None, 2 * third], abs=1e-5)
        assert "41 tokens do not fit into the reward model" in table["reward_reasons"][0].as_py()[1]
    session.call(verifiers.close())
