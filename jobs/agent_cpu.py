"""The agent of jobs/agent_cpu.yaml: it follows a trail of three boxes.

    python jobs/tools_cpu.py                          # writes the data, in a second
    gvpo-ray train jobs/agent_cpu.yaml                # makes the model, then trains it through this agent

It knows the address of a model and a key, and nothing of this project. Any client does: openai's,
LangChain's, a program in another process that reads OPENAI_BASE_URL. What the model writes is trained, what
the agent writes is read: a call whose prompt begins with all that was said goes on with the completion.
"""

import json
import re
import urllib.request

END = "<|endoftext|>"
"""The token that ends a turn of the small model; it is a part of what was said."""


def find(base_url: str, api_key: str, prompt: str, answer: str) -> float:
    """Return the reward: 1 if the treasure was found, in the last box of the trail `answer`."""
    text, trail = prompt + "\n", answer.split()
    for _ in range(3):
        said = complete(base_url, api_key, text)
        call = re.search(r"<tool_call>.*\"n\": (\d+)\}\}</tool_call>", said)
        if call and call[1] == trail[0]:
            del trail[0]
            if not trail:
                return 1.0
            told = f"go to {trail[0]}"
        else:
            told = "empty" if call else "Error: that is no call"
        text += f"{said}{END}<tool_response>\n{told}\n</tool_response>\n"
    return 0.0


def complete(base_url: str, api_key: str, text: str) -> str:
    body = json.dumps({"model": "any", "prompt": text, "max_tokens": 60}).encode()
    headers = {"Authorization": f"Bearer {api_key}", "Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(f"{base_url}/completions", body, headers)) as response:
        return json.load(response)["choices"][0]["text"]
