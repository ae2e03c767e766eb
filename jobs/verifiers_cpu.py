"""The task set of jobs/verifiers_cpu.yaml, in the v1 interface of the package verifiers: follow a trail.

    pip install 'gvpo-ray[environments]'              # verifiers; what jobs/setup.sh makes has it
    python jobs/tools_cpu.py                          # writes what the small model learns to ask from
    gvpo-ray train jobs/verifiers_cpu.yaml

It knows nothing of this project: a task set says what is asked, an environment answers the policy and gives
the reward, and a harness asks the model. The harness is here because verifiers' own chat harness, `null`,
installs a program with uv at its first start; with that one the class Talk goes away.
"""

import itertools
import json
import random
import re

import aiohttp
import verifiers.v1 as vf
from verifiers.v1.dialects.chat import message_to_wire

BOXES, LENGTH = 9, 3


class TrailData(vf.TaskData):
    trail: list[int]


class Trail(vf.Task[TrailData]):
    pass


class TrailsConfig(vf.TasksetConfig):
    boxes: int = BOXES


class Trails(vf.Taskset[Trail, TrailsConfig]):
    def load(self):
        every = list(itertools.permutations(range(1, self.config.boxes + 1), LENGTH))
        random.Random(0).shuffle(every)
        for trail in every:
            prompt = f"The trail begins at box {trail[0]}."
            yield Trail(TrailData(prompt=prompt, trail=list(trail)), self.config.task)


class SearchConfig(vf.EnvConfig):
    agent: vf.AgentConfig = vf.AgentConfig()


class Search(vf.Env[SearchConfig]):
    async def run(self, task, agents):
        left = list(task.data.trail)
        async with agents.agent.interaction(task) as interaction:
            segment = await interaction.turn()  # the task speaks first
            for turn in range(LENGTH):
                if segment.terminated:
                    break
                n = asked(segment.last_reply)
                told = "Error: that is no call" if n is None else "empty"
                if n == left[0]:
                    del left[0]
                    told = f"go to {left[0]}" if left else ""
                if not left or turn == LENGTH - 1:
                    break
                segment = await interaction.turn(f"<tool_response>\n{told}\n</tool_response>")
        interaction.trace.record_reward("found", float(not left))


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


__all__ = ["Search", "Talk", "Trails"]
