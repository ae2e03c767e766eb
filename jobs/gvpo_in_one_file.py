"""This file is GVPO complete: Algorithm 1 of arXiv 2504.19599 with torch and transformers alone.

    python jobs/gvpo_in_one_file.py [MODEL] [NUM_STEPS]

It trains a model to add two-digit numbers, the quickstart's task, on a CPU in some minutes. MODEL is a folder
that can answer some of them: by default the small one in docs/results/models; the quickstart leaves its own
in runs/quickstart/model. The rest of this repository does the same on many machines, and a test holds its
learner to `train_on`, weight by weight.
"""

from __future__ import annotations

import random
import re
import sys
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

BETA = 0.1  # reward units per nat: the optimum is pi_ref exp(R / beta) / Z
PROMPTS_PER_STEP, COMPLETIONS_PER_PROMPT, MINI_BATCHES = 64, 8, 4
LEARNING_RATE, MAX_GRAD_NORM, MAX_TOKENS = 4e-4, 1.0, 32


@dataclass
class Group:
    """A Group is one prompt with its m completions."""

    prompt_ids: list[int]
    completion_ids: list[list[int]]
    rewards: list[float]
    reference_logprobs: Tensor  # [m] log pi_ref(y_i|x)


def sequence_logprobs(model: torch.nn.Module, prompt: list[int], completions: list[list[int]]) -> Tensor:
    """Return log pi(y_i|x) of m completions of a prompt, summed over their tokens; [m] float64."""
    width = max(map(len, completions))
    padded = torch.tensor([ids + [0] * (width - len(ids)) for ids in completions])
    is_token = torch.tensor([[t < len(ids) for t in range(width)] for ids in completions])
    prompts = torch.tensor([prompt] * len(completions))
    mask = torch.cat([torch.ones_like(prompts), is_token.long()], 1)
    logits = model(torch.cat([prompts, padded], 1), attention_mask=mask).logits[:, len(prompt) - 1 : -1]
    tokens = torch.log_softmax(logits, -1).gather(2, padded[:, :, None])[:, :, 0].double()
    return torch.where(is_token, tokens, 0.0).sum(1)


def gvpo_loss(logprobs: Tensor, reference_logprobs: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """Return 1/(m - 1) sum_i 1/2 [ beta (D_i - mean D) - (R_i - mean R) ]^2, D = log pi - log pi_ref."""
    log_ratios = logprobs - reference_logprobs
    bracket = beta * (log_ratios - log_ratios.mean()) - (rewards - rewards.mean())
    return (bracket.square() / 2).sum() / (len(rewards) - 1)


def train_on(model: torch.nn.Module, optimizer: torch.optim.Optimizer, groups: list[Group]) -> float:
    """Make one update on a mini-batch of groups; return the gradient's norm before clipping."""
    optimizer.zero_grad()
    for group in groups:
        logprobs = sequence_logprobs(model, group.prompt_ids, group.completion_ids)
        rewards = torch.tensor(group.rewards, dtype=torch.float64)
        (gvpo_loss(logprobs, group.reference_logprobs, rewards, BETA) / len(groups)).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
    optimizer.step()
    return float(norm)


@torch.no_grad()
def sample(model: torch.nn.Module, tokenizer: AutoTokenizer, sums: list[tuple[int, int]]) -> list[Group]:
    """Let the policy, which is also the reference, answer each prompt m times; reward 1 if right, else 0."""
    prompts = [f"What is {a} + {b}?\n" for a, b in sums]
    inputs = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
    inputs.pop("token_type_ids", None)
    # Sample from the whole distribution: GVPO's theory needs a sampler that covers the reference's support.
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": MAX_TOKENS}
    sampled = model.generate(**inputs, **options, num_return_sequences=COMPLETIONS_PER_PROMPT)
    end, groups = tokenizer.eos_token_id, []
    for i, (a, b) in enumerate(sums):
        rows = sampled[i * COMPLETIONS_PER_PROMPT :][:COMPLETIONS_PER_PROMPT, inputs.input_ids.shape[1] :]
        completions = [ids[: ids.index(end) + 1] if end in ids else ids for ids in rows.tolist()]
        texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
        answers = [re.findall(r"\\boxed\{(\d+)\}", text)[-1:] for text in texts]
        rewards = [float(answer == [str(a + b)]) for answer in answers]
        prompt = tokenizer(prompts[i]).input_ids
        groups.append(Group(prompt, completions, rewards, sequence_logprobs(model, prompt, completions)))
    return groups


def main(path: str = "docs/results/models/arithmetic", num_steps: int = 40) -> None:
    """Run Algorithm 1: sample with the policy, fix it as the reference, update on mini-batches; repeat."""
    torch.manual_seed(0)
    numbers = random.Random(0)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()  # no dropout
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0)
    for step in range(1, num_steps + 1):
        sums = [(numbers.randint(10, 99), numbers.randint(10, 99)) for _ in range(PROMPTS_PER_STEP)]
        groups = sample(model, tokenizer, sums)
        size = PROMPTS_PER_STEP // MINI_BATCHES
        norms = [train_on(model, optimizer, groups[i : i + size]) for i in range(0, len(groups), size)]
        reward = sum(sum(group.rewards) / len(group.rewards) for group in groups) / len(groups)
        print(
            f"step {step:3} · reward {reward:.3f} · gradient norm {sum(norms) / len(norms):.4f}", flush=True
        )


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:3]))
