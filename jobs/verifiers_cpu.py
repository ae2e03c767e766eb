"""The task set of jobs/verifiers_cpu.yaml, in the v1 interface of the package verifiers: find a number.

    pip install 'gvpo-ray[environments]'              # verifiers; what jobs/setup.sh makes has it
    python jobs/tools_cpu.py                          # writes what the small model learns to ask from
    gvpo-ray train jobs/verifiers_cpu.yaml

It knows nothing of this project: a task set says what is asked, an environment answers the policy and gives
the reward, and a harness asks the model. The harness is here because verifiers' own chat harness, `null`,
installs a program with uv at its first start; with that one the class Talk goes away.
"""

import json
import re

import aiohttp
import verifiers.v1 as vf
from verifiers.v1.dialects.chat import message_to_wire

MOST, QUESTIONS = 7, 3


class NumberData(vf.TaskData):
    secret: int


class Number(vf.Task[NumberData]):
    pass


class NumbersConfig(vf.TasksetConfig):
    most: int = MOST


class Numbers(vf.Taskset[Number, NumbersConfig]):
    def load(self):
        for secret in range(1, self.config.most + 1):
            prompt = f"Find the number from 1 to {self.config.most}."
            yield Number(NumberData(prompt=prompt, secret=secret), self.config.task)


class SearchConfig(vf.EnvConfig):
    agent: vf.AgentConfig = vf.AgentConfig()


class Search(vf.Env[SearchConfig]):
    async def run(self, task, agents):
        secret, is_found = task.data.secret, False
        async with agents.agent.interaction(task) as interaction:
            segment = await interaction.turn()  # the task speaks first
            for _ in range(QUESTIONS - 1):
                if segment.terminated or is_found:
                    break
                n = asked(segment.last_reply)
                is_found = n == secret
                told = "Error: that is no call" if n is None else "less" if secret < n else "more"
                if not is_found:
                    segment = await interaction.turn(f"<tool_response>\n{told}\n</tool_response>")
            is_found = is_found or (not segment.terminated and asked(segment.last_reply) == secret)
        interaction.trace.record_reward("found", float(is_found))


def asked(said: str) -> int | None:
    call = re.search(r"<tool_call>.*\"n\": (\d+)\}\}</tool_call>", said)
    return int(call[1]) if call else None


class TalkConfig(vf.HarnessConfig):
    pass


class Talk(vf.Harness[TalkConfig]):
    """One call of the model for what was said so far, in this process."""

    APPENDS_SYSTEM_PROMPT = SUPPORTS_RESUME = True
    EXECUTES_CODE = NEEDS_CONTAINER = False

    async def launch(self, ctx, trace, runtime, endpoint, secret, mcp_urls, data):
        system, prompt = self.resolve_prompt(data)
        messages = [{"role": "system", "content": system}] if system else []
        if isinstance(prompt, str):
            messages.append({"role": "user", "content": prompt})
        else:
            messages += [message_to_wire(message) for message in prompt]
        body = {"model": ctx.model, "messages": messages}
        async with (
            aiohttp.ClientSession(headers={"Authorization": f"Bearer {secret}"}) as http,
            http.post(f"{endpoint}/chat/completions", json=body) as answer,
        ):
            failed = "" if answer.status == 200 else json.dumps(await answer.json())
        return vf.ProgramResult(1 if failed else 0, "", failed)


__all__ = ["Numbers", "Search", "Talk"]
