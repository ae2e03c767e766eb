"""`gvpo-ray bench learner`: a learner's update beside what a plain trainer does, same model, same groups, in one run.

    ours      group-packed forward, chunked head, GVPO loss, backward, AdamW (policy.py, as train_step uses it)
    padded    every completion with its prompt, right-padded, logits of all positions, log-softmax, the same loss

Every figure comes from a process of its own: its peak memory is its own too. float32 on CPU, bfloat16 on a GPU.
"""

from __future__ import annotations

import multiprocessing
import resource
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from gvpo_ray.config import LearnerConfig, ModelConfig
from gvpo_ray.losses.gvpo import gvpo_loss

SHAPES = [(prompt, completion, k) for prompt, completion in ((64, 64), (256, 64), (512, 512)) for k in (4, 8, 16)]
"""Tokens of the prompt, of each completion, completions."""

CPU_MODEL = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
GPU_MODEL = {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2}
"""Qwen2.5-1.5B's."""

BIG_VOCABULARY = 151_936

Row = Mapping[str, Any]


def main(tokens_per_step: int = 4096) -> None:
    on_gpu = torch.cuda.is_available()
    vocab_size = BIG_VOCABULARY if on_gpu else 8192
    console = Console(highlight=False)
    peak = _in_process(_matmul_peak)
    table = Table(title=f"bench learner: {'GPU' if on_gpu else 'CPU'}, vocabulary {vocab_size:,}", title_justify="left")
    for column in ("prompt/completion", "k", "ours tokens/s", "padded tokens/s", "ratio", "ours of peak", "padded of peak", "ours GiB", "padded GiB"):
        table.add_column(column, justify="right", no_wrap=True)
    with tempfile.TemporaryDirectory(prefix="gvpo_bench_") as folder:
        for vocabulary in sorted({vocab_size, BIG_VOCABULARY}):
            make_model(Path(folder) / str(vocabulary), vocabulary, GPU_MODEL if on_gpu else CPU_MODEL)
        cases = [(vocab_size, *shape) for shape in SHAPES] + ([(BIG_VOCABULARY, 64, 64, 8)] if not on_gpu else [])
        for vocabulary, prompt, completion, k in cases:
            num_groups = max(1, tokens_per_step // (prompt + k * completion))
            rows = groups(num_groups, prompt, completion, k, vocabulary)
            results = [_in_process(work, str(Path(folder) / str(vocabulary)), rows) for work in (ours, padded)]
            # A token counts once, whoever computes it how often: the prompt's, and the completions'.
            tokens = num_groups * (prompt + k * completion)
            rates = [tokens / seconds for seconds, _ in results]
            flops = num_groups * useful_flops(GPU_MODEL if on_gpu else CPU_MODEL, vocabulary, prompt, completion, k)
            shares = [flops / seconds / peak for seconds, _ in results]
            name = f"{prompt}/{completion}" + ("" if vocabulary == vocab_size else f", {vocabulary:,} words")
            table.add_row(
                name, str(k), *(f"{rate:,.0f}" for rate in rates), f"{rates[0] / rates[1]:.2f}",
                *(f"{100 * share:.0f} %" for share in shares), *(f"{memory / 2**30:.2f}" for _, memory in results),
            )  # fmt: skip
    console.print(table)
    console.print(f"peak of a matrix product here: {peak / 1e9:,.0f} GFLOP/s; memory beyond the model and its optimizer's, at most")


def useful_flops(model: Mapping[str, int], vocab_size: int, prompt: int, completion: int, k: int) -> float:
    """Of forward and backward of one group, each token once: 6 per weight, the head on completion tokens alone, and causal attention."""
    hidden, layers = model["hidden_size"], model["num_hidden_layers"]
    head_size = hidden // model["num_attention_heads"]
    attention = 2 * hidden * hidden + 2 * hidden * model["num_key_value_heads"] * head_size
    weights = layers * (attention + 3 * hidden * model["intermediate_size"])
    seen = prompt * prompt / 2 + k * (completion * prompt + completion * completion / 2)
    return 6.0 * (weights * (prompt + k * completion) + vocab_size * hidden * k * completion) + 12.0 * layers * hidden * seen


def make_model(folder: Path, vocab_size: int, shape: Mapping[str, int]) -> None:
    """A Qwen2 of random weights with a tokenizer that nobody reads."""
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

    tokenizer = Tokenizer(models.WordLevel({"<eos>": 0, "<unk>": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen2Config(**shape, vocab_size=vocab_size, max_position_embeddings=2048, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def groups(num: int, prompt: int, completion: int, k: int, vocab_size: int) -> list[Row]:
    generator = torch.Generator().manual_seed(0)

    def tokens(size: int) -> list[int]:
        return torch.randint(2, vocab_size, (size,), generator=generator).tolist()

    return [
        {"prompt_ids": tokens(prompt), "completion_ids": [tokens(completion) for _ in range(k)], "rewards": [float(i % 2) for i in range(k)]}
        for _ in range(num)
    ]


def _loss(logprobs: Tensor, rows: Sequence[Row]) -> Tensor:
    rewards = torch.tensor([reward for row in rows for reward in row["rewards"]], dtype=torch.float64, device=logprobs.device)
    ids = torch.tensor([i for i, row in enumerate(rows) for _ in row["rewards"]], device=logprobs.device)
    return gvpo_loss(logprobs, logprobs.detach(), rewards, ids, beta=0.1)[0]


def ours(folder: str, rows: Sequence[Row]) -> tuple[float, float]:
    """Seconds of an update, and the peak of its memory beyond the model's, in bytes."""
    from gvpo_ray.policy import Policy

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = ModelConfig(path=folder, dtype="bfloat16" if device == "cuda" else "float32")
    policy = Policy(model, LearnerConfig(backend="ddp", learning_rate=1e-6), folder, device)

    def step() -> None:
        policy.backward(_loss(policy.logprobs(rows), rows), is_last=True)
        policy.update(1e-6)

    return _measure(step)


def padded(folder: str, rows: Sequence[Row]) -> tuple[float, float]:
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    texts = [row["prompt_ids"] + ids for row in rows for ids in row["completion_ids"]]
    starts = [len(row["prompt_ids"]) for row in rows for _ in row["completion_ids"]]
    width = max(map(len, texts))
    ids = torch.zeros(len(texts), width, dtype=torch.long, device=device)
    for i, text in enumerate(texts):
        ids[i, : len(text)] = torch.tensor(text)
    places = torch.arange(width, device=device)
    lengths, begins = (torch.tensor(values, device=device)[:, None] for values in ([len(text) for text in texts], starts))
    mask, is_completion = (places < lengths).long(), (places >= begins) & (places < lengths)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        tokens = torch.log_softmax(logits.float(), dim=-1).gather(2, ids[:, 1:, None]).squeeze(2)
        _loss((tokens * is_completion[:, 1:]).double().sum(1), rows).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return _measure(step)


def _measure(step: Any, repeats: int = 3) -> tuple[float, float]:
    """The fastest of a few, after one that warms up (and makes the optimizer's state)."""
    on_gpu = torch.cuda.is_available()
    step()
    before = torch.cuda.memory_allocated() if on_gpu else _resident()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        step()
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return min(seconds), float(peak - before)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _matmul_peak() -> float:
    """FLOP/s of a large matrix product, the best of a few."""
    on_gpu = torch.cuda.is_available()
    size, dtype = (8192, torch.bfloat16) if on_gpu else (1536, torch.float32)
    a = torch.randn(size, size, device="cuda" if on_gpu else "cpu", dtype=dtype)
    best = 0.0
    for _ in range(8):
        begin = time.perf_counter()
        a @ a
        if on_gpu:
            torch.cuda.synchronize()
        best = max(best, 2 * size**3 / (time.perf_counter() - begin))
    return best


def _in_process(work: Any, *arguments: Any) -> Any:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, arguments)
