"""`gvpo-ray bench learner` compares a step of the learner with plain trainers on the same groups.

    ours      learner.step.train_step: packed forward pass, chunked head, GVPO loss, backward pass, clipping,
              AdamW, metrics
    padded    each completion with its prompt, right-padded, logits of all positions, log-softmax; the same
              loss, clipping and AdamW
    trl       as padded, with the per-token log-probs of TRL's trainers (its fused head), if trl is installed
              (the `bench` extra)

A second table is of SFT, beside TRL's SFTTrainer with packing (experiments/sft.py).

Each measurement is made in a process of its own, so that its peak memory is its own too. The ways take turns,
in several rounds, and the table has the median and the range of the rounds: other load on the machine then
shows, and does not decide. Ratios are of measurements of the same round. Precision is float32 on a CPU and
bfloat16 on a GPU.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM

from gvpo_ray.bench.experiments import sft
from gvpo_ray.bench.gpu.models import QWEN_7B, QWEN_15B, Shape, make_folder, make_rows
from gvpo_ray.bench.gpu.steps import settings
from gvpo_ray.config.model import ModelConfig
from gvpo_ray.groups import Row
from gvpo_ray.learner.policy import Policy
from gvpo_ray.learner.step import train_step
from gvpo_ray.losses.gvpo import gvpo_loss

Measured = TypeVar("Measured")

SHAPES = [
    (prompt, completion, k) for prompt, completion in ((64, 64), (256, 64), (512, 512)) for k in (4, 8, 16)
]
"""Tokens of the prompt, tokens of each completion, and number of completions."""

CPU_MODELS = {"small": Shape("qwen2", 4, 2, 64, 4, 704, vocab=8192)}
GPU_MODELS = {"1.5B": QWEN_15B, "7B": dataclasses.replace(QWEN_7B, tied=True, vocab=QWEN_15B.vocab)}
"""Sizes of Qwen2.5 models; the weights are random."""

BIG_VOCABULARY = QWEN_15B.vocab

ROUNDS = 3
"""How often each way is measured."""


def main(tokens_per_step: int = 4096, rounds: int = ROUNDS) -> None:
    """Run the benchmark and print a table for each model.

    Args:
        tokens_per_step: tokens of one step, a prompt counted once per group.
        rounds: how often each way is measured, in turn.
    """
    on_gpu = torch.cuda.is_available()
    console = Console(highlight=False)
    console.width = max(console.width, 170)
    peak = _in_process(_matmul_peak)
    ways: dict[str, Callable[..., Any]] = {"ours": ours, "padded": padded}
    if importlib.util.find_spec("trl"):
        ways["trl"] = partial(padded, with_trl=True)
    others = [name for name in ways if name != "ours"]
    for size, shape in (GPU_MODELS if on_gpu else CPU_MODELS).items():
        table = Table(
            title=f"bench learner: {size} model on {'GPU' if on_gpu else 'CPU'}, vocabulary {shape.vocab:,}",
            title_justify="left",
        )
        headings = [
            "prompt/completion, k",
            *(f"{name} tokens/s" for name in ways),
            *(f"ours / {name}" for name in others),
        ]
        headings += [*(f"{name} of peak" for name in ways), *(f"{name} GiB" for name in ways), "own code"]
        for heading in headings:
            table.add_column(heading, justify="right", no_wrap=heading == headings[0])
        with tempfile.TemporaryDirectory(prefix="gvpo_bench_") as folder:
            big = dataclasses.replace(shape, vocab=BIG_VOCABULARY)
            cases = [(shape, *case) for case in SHAPES] + ([] if on_gpu else [(big, 64, 64, 8)])
            for model in {model.vocab: model for model in (shape, big)}.values():
                make_model(Path(folder) / str(model.vocab), model)
            for model, prompt, completion, k in track(
                cases, description=f"{size} model", console=console, transient=True
            ):
                num_groups = max(1, tokens_per_step // (prompt + k * completion))
                rows = make_rows([(prompt, [completion] * k)] * num_groups, model.vocab, version=None)
                calls = {
                    name: partial(_in_process, work, str(Path(folder) / str(model.vocab)), rows)
                    for name, work in ways.items()
                }
                results = in_turn(calls, rounds)
                # A prompt's tokens count once per group, even where a way computes them k times.
                tokens = num_groups * (prompt + k * completion)
                flops = num_groups * model.flops(prompt, completion, k)
                mine, found = results["ours"], list(results.values())
                ratios = [ratios_of(results[name], mine) for name in others]
                table.add_row(
                    f"{prompt}/{completion}, {k}" + ("" if model == shape else f", V={model.vocab:,}"),
                    *(spread("{:,.0f}", [tokens / seconds for seconds, *_ in way]) for way in found),
                    *(spread("{:.2f}", values) for values in ratios),
                    *(spread("{:.0f} %", [100 * flops / one[0] / peak for one in way]) for way in found),
                    *(spread("{:.2f}", [one[1] / 2**30 for one in way]) for way in found),
                    spread("{:.1f} %", [100 * one[2] for one in mine]),
                )
        console.print(table)
        console.print(sft_table(size, shape, tokens_per_step, rounds))
    console.print(
        f"median (least to most) of {rounds} rounds · peak: {peak / 1e9:,.0f} GFLOP/s of a large matrix "
        "product here · GiB: at most, beyond the model's and its optimizer's\n"
        "own code: of a step, what is neither the model's forward and backward nor the optimizer"
    )


def sft_table(size: str, shape: Shape, tokens: int, rounds: int) -> Table:
    """Measure SFT on ragged rows, beside TRL's SFTTrainer with packing if trl is installed.

    Args:
        size: name of the model.
        shape: its sizes.
        tokens: of an update.
        rounds: how often each way is measured, in turn.
    """
    ways: dict[str, Callable[..., tuple[float]]] = {"ours": sft.ours}
    if importlib.util.find_spec("trl"):
        ways["SFTTrainer, packing"] = sft.trl
    with tempfile.TemporaryDirectory(prefix="gvpo_bench_") as folder:
        make_model(Path(folder), shape)
        batches = sft.ragged_rows(sft.WARM + sft.MEASURED, tokens, shape.vocab)
        results = in_turn(
            {name: partial(_in_process, way, folder, batches, tokens) for name, way in ways.items()}, rounds
        )
    table = Table(
        title=f"bench learner: SFT of the {size} model, rows of ragged lengths", title_justify="left"
    )
    for name in ways:
        table.add_column(f"{name} tokens/s", justify="right")
    for name in list(ways)[1:]:
        table.add_column(f"ours / {name}", justify="right")
    table.add_row(
        *(spread("{:,.0f}", [1 / seconds for (seconds,) in of_way]) for of_way in results.values()),
        *(spread("{:.2f}", ratios_of(results[name], results["ours"])) for name in list(ways)[1:]),
    )
    return table


def in_turn(ways: Mapping[str, Callable[[], Measured | None]], rounds: int) -> dict[str, list[Measured]]:
    """Call each of the ways once per round; return the results by round.

    A way that returns None, because memory did not suffice, is not called again and has no results.
    """
    results: dict[str, list[Measured]] = {name: [] for name in ways}
    failed: set[str] = set()
    for _ in range(rounds):
        for name, way in ways.items():
            result = None if name in failed else way()
            if result is None:
                failed.add(name)
                results[name] = []
            else:
                results[name].append(result)
    return results


def ratios_of(others: Sequence[tuple[float, ...]], ours: Sequence[tuple[float, ...]]) -> list[float]:
    """Return another way's seconds over ours, round by round; [] where one of them has no results."""
    return [other[0] / mine[0] for other, mine in zip(others, ours, strict=False)]


def spread(form: str, values: Sequence[float]) -> str:
    """Write the median of some numbers with their range; of none that memory did not suffice."""
    if not values:
        return "no memory"
    median, low, high = (form.format(f(values)) for f in (statistics.median, min, max))
    return median if low == high else f"{median} ({low} to {high})"


def make_model(folder: Path, shape: Shape) -> None:
    """Write a model with random weights, and a tokenizer that is not used, to a folder."""
    make_folder(folder, shape.config())
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(shape.config()).save_pretrained(folder)  # type: ignore[no-untyped-call]


def _loss(logprobs: Tensor, rows: Sequence[Row]) -> Tensor:
    rewards = torch.tensor(
        [reward for row in rows for reward in row["rewards"]], dtype=torch.float64, device=logprobs.device
    )
    ids = torch.tensor([i for i, row in enumerate(rows) for _ in row["rewards"]], device=logprobs.device)
    return gvpo_loss(logprobs, logprobs.detach(), rewards, ids, beta=0.1)[0]


def ours(folder: str, rows: Sequence[dict[str, Any]]) -> tuple[float, float, float] | None:
    """Measure a step of our learner.

    Returns:
        Its seconds, its peak memory in bytes beyond what was held before, and the share of its time outside
        the model's passes and the optimizer. None: the GPU's memory did not suffice.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = ModelConfig(path=folder, dtype="bfloat16" if device == "cuda" else "float32")
    given = settings(folder, learning_rate=1e-6, micro_batch_tokens=10**9)
    in_library = 0.0

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal in_library
            begin = _now()
            result = function(*arguments, **options)
            in_library += _now() - begin
            return result

        return call

    def work() -> tuple[float, float, float]:
        policy = Policy(model, given.learner, folder, device)
        usual = {name: getattr(policy._backend, name) for name in ("forward", "backward", "step")}
        seconds, memory = _measure(lambda: train_step(policy, rows, given))
        for name, function in usual.items():
            setattr(policy._backend, name, timed(function))
        begin = _now()
        train_step(policy, rows, given)
        return seconds, memory, 1 - in_library / (_now() - begin)

    return _unless_out_of_memory(work)


def padded(folder: str, rows: Sequence[Row], with_trl: bool = False) -> tuple[float, float] | None:
    """Measure a step of a plain trainer on padded completions; `with_trl`: with TRL's fused head.

    Returns:
        Its seconds, and its peak memory in bytes beyond what was held before. None: the GPU's memory did not
        suffice.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    texts = [row["prompt_ids"] + ids for row in rows for ids in row["completion_ids"]]
    starts = [len(row["prompt_ids"]) for row in rows for _ in row["completion_ids"]]
    width = max(map(len, texts))
    ids = torch.zeros(len(texts), width, dtype=torch.long, device=device)
    for i, text in enumerate(texts):
        ids[i, : len(text)] = torch.tensor(text)
    places = torch.arange(width, device=device)
    lengths, begins = (
        torch.tensor(values, device=device)[:, None] for values in ([len(text) for text in texts], starts)
    )
    mask, is_completion = (places < lengths).long(), (places >= begins) & (places < lengths)

    load: Any = AutoModelForCausalLM.from_pretrained

    def work() -> tuple[float, float]:
        model = load(folder, dtype=torch.float32).to(device).eval()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
        if with_trl:
            from trl.trainer.utils import add_fused_lm_head

            add_fused_lm_head(model)

        def step() -> None:
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                if with_trl:
                    labels = ids.masked_fill(~is_completion, -100)
                    tokens = model(
                        input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True
                    ).log_probs
                else:
                    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
                    tokens = torch.log_softmax(logits.float(), dim=-1).gather(2, ids[:, 1:, None]).squeeze(2)
            loss = _loss((tokens * is_completion[:, 1:]).double().sum(1), rows)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        return _measure(step)

    return _unless_out_of_memory(work)


def _unless_out_of_memory(work: Callable[[], Measured]) -> Measured | None:
    try:
        return work()
    except torch.cuda.OutOfMemoryError:
        return None


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _measure(step: Any, repeats: int = 3) -> tuple[float, float]:
    """Return the median seconds of a few steps, and peak memory in bytes, after a step that warms up."""
    on_gpu = torch.cuda.is_available()
    step()
    before = torch.cuda.memory_allocated() if on_gpu else _resident()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(repeats):
        begin = _now()
        step()
        seconds.append(_now() - begin)
    peak = (
        torch.cuda.max_memory_allocated()
        if on_gpu
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    return statistics.median(seconds), float(peak - before)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()


def _matmul_peak() -> float:
    """Return FLOP/s of a large matrix product, the best of a few."""
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
