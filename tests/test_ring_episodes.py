"""A run whose completions are episodes, with all real parts; an environment actor is killed in it."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from tiny import ALPHABET, make_model, vllm_model
from transformers import AutoModelForCausalLM

from gvpo_ray import GVPOConfig, groups
from gvpo_ray.bench.chaos import TITLES, descendants
from gvpo_ray.buffer.log import read_assignments
from gvpo_ray.config.environment import ENVIRONMENT

ROOT = Path(__file__).parents[1]
ECHO = '''
class Echo:
    """Says "abc" to an even number of letters, ends at an odd one, and counts them all."""

    def reset(self, prompt, answer, level):
        assert (prompt, answer, level) == ("1+1", "2", 3)
        self.letters, self.turns = 0, 0
        return "?"

    def respond(self, message):
        self.letters += len(message)
        self.turns += 1
        return None if len(message) % 2 else "abc"

    async def get_reward(self):
        return float(self.letters)
'''


@pytest.fixture
def config(tmp_path: Path) -> GVPOConfig:
    (tmp_path / "echo.py").write_text(ECHO)
    make_model(tmp_path / "model")
    vllm_model().save_pretrained(tmp_path / "model")
    (tmp_path / "p.jsonl").write_text('{"prompt": "1+1", "answer": "2", "level": 3}\n')
    return GVPOConfig.from_dict(
        {
            "run_dir": str(tmp_path / "run"),
            "num_steps": 3,
            "groups_per_step": 2,
            "model": {"path": str(tmp_path / "model")},
            "prompts": {"path": str(tmp_path / "p.jsonl"), "template": "{prompt}="},
            "environment": {
                "name": f"{tmp_path / 'echo.py'}:Echo",
                "num": 1,
                "max_turns": 3,
                "sandbox": True,
            },
            # half of the letters end a turn
            "sampling": {"num_completions": 4, "max_tokens": 60, "stop_token_ids": list(range(2, 24))},
            "engines": {"kv_cache_gib": 0.25, "num_threads": 1, "parity_every": 1},
            "verifiers": {"num": 1},
            "learner": {"num_workers": 1, "backend": "ddp", "num_mini_batches": 1},
            "evaluation": {"every": 3, "sets": {"heldout": {"path": str(tmp_path / "p.jsonl")}}},
        }
    )


def turns_mean(table: pa.Table) -> float:
    """The mean number of turns of a table's episodes, each of which counts once."""
    episodes = [json.loads(one) for row in groups.rows(table) for one in row["episodes"]]
    own = [one for one in episodes if not one.get("branch")]
    return sum(one["turns"] for one in own) / len(own)


def test_a_run_with_an_environment_trains_what_was_sampled_and_survives_its_actors_death(
    config: GVPOConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    with config.build() as algo:
        lines = [algo.train()]
        (victim,) = descendants(os.getpid(), TITLES["environment"])
        os.kill(victim, signal.SIGKILL)
        while not algo.events.counts()["environment"]:
            time.sleep(0.1)
        lines += [algo.train(), algo.train()]
        (last,) = descendants(os.getpid(), TITLES["environment"])
    whole = groups.load(Path(config.run_dir) / "groups")
    assigned = read_assignments(Path(config.run_dir) / "groups" / "assignments.jsonl")
    for step, line in enumerate(lines, 1):
        begin, end = assigned[step]
        assert line["episodes/turns_mean"] == pytest.approx(turns_mean(whole[begin:end]))
        assert line["episodes/tool_calls_mean"] == 0 and line["weights/parity_max"] < 1e-3
    assert lines[-1]["recoveries/environment"] == 1
    # Ray's words about a process that crashed, for the one that did and not for the one that was ended
    said = "".join(capfd.readouterr())
    assert f"Worker PID: {victim} " in said and f"Worker PID: {last} " not in said
    _, evaluated = groups.evaluations(Path(config.run_dir))["heldout"][-1]
    assert lines[-1]["eval/heldout/turns_mean"] == pytest.approx(turns_mean(groups.load(evaluated)))
    rows = list(groups.rows(whole))
    assert len(rows) >= 6
    alphabet = " 0123456789+=?.abcdefghijklmnopqrstuvwxyz\\{}"
    num_turns = 0
    for row in rows:
        assert "".join(alphabet[i - 2] for i in row["prompt_ids"]) == "1+1"
        for i, (ids, mask) in enumerate(zip(row["completion_ids"], row["trained_tokens"], strict=True)):
            logprobs = row["sampling_logprobs"][i]
            assert [value == 0 for value in logprobs] == [not is_trained for is_trained in mask]
            untrained = "".join(
                alphabet[t - 2] for t, is_trained in zip(ids, mask, strict=True) if not is_trained
            )
            turns = json.loads(row["episodes"][i])["turns"]
            num_turns += turns
            # a letter of the policy's that ends a turn, or the last one that there was room for
            assert turns == sum(a and not b for a, b in zip(mask, [*mask[1:], False], strict=True)) <= 3
            whole = "?=" + "abc" * turns  # the last answer is there only if there was room for another turn
            assert whole.startswith(untrained) and len(untrained) >= len(whole) - 3
            reward = row["reward_parts"][ENVIRONMENT][i]
            assert reward == row["rewards"][i]
    assert num_turns > 4 * len(rows)


def test_a_run_trains_an_agent_that_knows_an_address_and_a_key_alone(
    config: GVPOConfig, tmp_path: Path
) -> None:
    agent = (ROOT / "jobs" / "agent_cpu.py").read_text(encoding="utf-8")
    (tmp_path / "agent.py").write_text(agent.replace("<|endoftext|>", "<eos>"), encoding="utf-8")
    config = GVPOConfig.from_dict(
        {
            **config.model_dump(exclude_unset=True),
            "num_steps": 2,
            "environment": {"agent": f"{tmp_path / 'agent.py'}:find", "num": 1, "max_turns": 3},
            "sampling": {"num_completions": 4, "max_tokens": 500},
            "engines": {**config.engines.model_dump(exclude_unset=True), "serve": True},
            "evaluation": {},
        }
    )
    status = Path(config.run_dir) / "status.json"
    with config.build() as algo:
        lines = [algo.train(), algo.train()]
        while not (address := json.loads(status.read_text())["engines"][0]["address"]):
            time.sleep(0.1)
    run_dir = Path(config.run_dir)
    assert address.startswith("http://127.0.0.1:") and [line["episodes/lost"] for line in lines] == [0, 0]
    secret = run_dir / "serve_token"
    assert secret.stat().st_mode & 0o777 == 0o600
    others = [path for path in run_dir.rglob("*") if path.is_file() and path != secret]
    assert len(others) > 5
    assert not any(secret.read_bytes() in path.read_bytes() for path in others)
    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32).eval()
    whole = groups.load(run_dir / "groups")
    begin, end = read_assignments(run_dir / "groups" / "assignments.jsonl")[1]
    assert lines[0]["episodes/turns_mean"] == pytest.approx(turns_mean(whole[begin:end]))
    rows = list(groups.rows(whole))
    num = 0
    for row in rows:
        # what the agent said (its line end is no token here), and not the prompt of the data, "1+1="
        assert "".join(ALPHABET[i - 2] for i in row["prompt_ids"]) == "1+1"
        for ids, mask, logprobs, version in zip(
            row["completion_ids"],
            row["trained_tokens"],
            row["sampling_logprobs"],
            row["version_max"],
            strict=True,
        ):
            assert [value != 0 for value in logprobs] == mask
            if version:  # of weights that are gone
                continue
            whole = torch.tensor([row["prompt_ids"] + ids])
            with torch.no_grad():
                all_logprobs = model(whole).logits[0, :-1].log_softmax(-1).gather(1, whole[0, 1:, None])
            expected = all_logprobs[len(row["prompt_ids"]) - 1 :, 0]
            for is_trained, got, want in zip(mask, logprobs, expected.tolist(), strict=True):
                assert not is_trained or got == pytest.approx(want, abs=1e-3)
                num += is_trained
    assert num > 100
