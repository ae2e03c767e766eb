"""The warm start makes a small model: tokenizer, Qwen2 weights, supervised learning on worked problems.

GVPO starts from it where there is no pretrained model (the quickstart, tests); with one, leave the warm start
out. It is one process on any device, and its learning is the learner's own, with `objective: sft`.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.learner import CheckpointConfig, LearnerConfig
from gvpo_ray.config.loss import SftLoss
from gvpo_ray.config.model import ModelConfig, WarmStartConfig
from gvpo_ray.config.run import GVPOConfig
from gvpo_ray.data.prompts import load_rows
from gvpo_ray.data.tasks import make
from gvpo_ray.files import new_folder
from gvpo_ray.learner.policy import Policy
from gvpo_ray.learner.step import Settings, train_step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

END = "<|endoftext|>"
"""The token at the end of a sequence, also used as padding."""


def warm_start(config: GVPOConfig) -> Path:
    """Make the task's data and then the model, as the config section `warm_start` says.

    Data and model that exist already stay as they are.

    Returns:
        The model's folder, model.path.

    Raises:
        ConfigError: there is no section `warm_start`, its data cannot be read, or model.path cannot be
            written; raised before anything is trained.
    """
    if config.warm_start is None:
        raise ConfigError("warm_start: this config has no such section")
    paths = config.warm_start.data.path
    data = Path(paths if isinstance(paths, str) else paths[0]).expanduser().parent
    if config.warm_start.task and not data.exists():
        try:
            make(config.warm_start.task, data)
        except OSError as error:
            raise ConfigError(f"warm_start.data.path: cannot write {data}: {error.strerror}") from error
    folder = Path(config.model.path).expanduser()
    if (folder / "config.json").exists():
        print(f"{folder} is there: nothing to do")
        return folder
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ConfigError(f"model.path: {folder} is there and is no model: choose another")
    with seeded(config.seed, config.warm_start.num_threads):
        make_model(config.warm_start, folder)
    return folder


@contextlib.contextmanager
def seeded(seed: int, num_threads: int | None) -> Iterator[None]:
    """Seed torch within this context, and set its threads; the caller's process may do other things after it.

    Args:
        seed: of torch's random numbers.
        num_threads: number of torch's threads; None: as they are.
    """
    before = torch.get_num_threads()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        torch.set_num_threads(num_threads or before)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def make_model(section: WarmStartConfig, folder: Path) -> None:
    """Train a model on worked problems and write it to a folder.

    Raises:
        ConfigError: the data cannot be read, or the folder cannot be written.
    """
    examples = read_examples(section)
    tokenizer = train_tokenizer([prompt + completion for prompt, completion in examples], section.vocab_size)
    model = new_model(len(tokenizer), tokenizer, section.architecture)
    size = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"warm start: {len(examples):,} worked problems, {len(tokenizer)} tokens, {size / 1e6:.2f} M "
        f"parameters, on {DEVICE}",
        flush=True,
    )
    prompts = tokenizer([prompt for prompt, _ in examples]).input_ids
    completions = tokenizer([completion for _, completion in examples], add_special_tokens=False).input_ids
    rows = [
        {"prompt_ids": x, "completion_ids": [[*y, tokenizer.eos_token_id]]}
        for x, y in zip(prompts, completions, strict=True)
    ]
    context = model.config.max_position_embeddings
    fitting = [row for row in rows if len(row["prompt_ids"]) + len(row["completion_ids"][0]) <= context]
    if len(fitting) < len(rows):
        print(
            f"{len(rows) - len(fitting)} worked problems are longer than the context of {context} tokens: "
            "left out"
        )
    if not fitting:
        raise ConfigError(f"warm_start.data: no worked problem fits into the context of {context} tokens")
    with contextlib.ExitStack() as stack:
        try:
            part = stack.enter_context(new_folder(folder))
        except OSError as error:
            raise ConfigError(f"model.path: cannot write {folder}: {error.strerror}") from error
        stack.enter_context(libraries_write_to(part / "warm_start.log"))
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        imitate(part, fitting, section)
    print(f"wrote {folder}")


@contextlib.contextmanager
def libraries_write_to(path: Path) -> Iterator[None]:
    """Send what transformers and DeepSpeed log within this context to a file, and show no progress bars.

    The first line makes the file. Saving a model imports DeepSpeed, whose logger prints from its import on,
    so the filter is set before that.
    """
    from transformers.utils import logging as of_transformers

    file = logging.FileHandler(path, delay=True)
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))

    def to_file(record: logging.LogRecord) -> bool:
        file.handle(record)
        return False

    of_deepspeed, bars = logging.getLogger("DeepSpeed"), of_transformers.is_progress_bar_enabled()
    of_transformers.disable_progress_bar()  # type: ignore[no-untyped-call]
    of_transformers.disable_default_handler()
    of_transformers.add_handler(file)
    of_deepspeed.addFilter(to_file)
    try:
        yield
    finally:
        of_deepspeed.removeFilter(to_file)
        of_transformers.remove_handler(file)
        of_transformers.enable_default_handler()
        if bars:
            of_transformers.enable_progress_bar()  # type: ignore[no-untyped-call]
        file.close()


def read_examples(section: WarmStartConfig) -> list[tuple[str, str]]:
    """Return (templated prompt, completion) of every worked problem.

    Raises:
        ConfigError: the data cannot be read, a row lacks the solution, or `remove` is not a regular
            expression.
    """
    try:
        remove = re.compile(section.remove or r"(?!)")  # the default matches nowhere
    except re.error as error:
        raise ConfigError(
            f"warm_start.remove: {section.remove!r} is not a regular expression: {error}"
        ) from error
    column, _, inside = section.solution_column.partition(".")
    data = section.data
    table = load_rows(
        data,
        {
            "prompt": data.prompt_column or "prompt",
            "answer": data.answer_column or "answer",
            "solution": column,
        },
        "warm_start.data",
    )
    examples = []
    for i, row in enumerate(table.to_pylist()):
        solution = row["solution"]
        if inside:
            try:
                solution = json.loads(solution)[inside]
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(
                    f"warm_start.solution_column: row {i}: {column} is not JSON with a key {inside!r}"
                ) from error
            if not isinstance(solution, str):
                raise ConfigError(
                    f"warm_start.solution_column: row {i}: {inside!r} in {column} is "
                    f"{type(solution).__name__}, not text"
                )
        parts: dict[str, str] = {"{solution}": remove.sub("", solution).strip(), "{answer}": row["answer"]}
        # Split, not replaced one after the other, because solutions may contain braces.
        completion = "".join(
            parts.get(part, part) for part in re.split(r"(\{solution\}|\{answer\})", section.completion)
        )
        examples.append(((data.template or "{prompt}").replace("{prompt}", row["prompt"]), completion))
    return examples


def train_tokenizer(texts: list[str], vocab_size: int) -> Any:
    """Train a byte-level BPE tokenizer in which each digit is a token.

    End of sequence and padding are the same token.

    Args:
        texts: what it is trained on.
        vocab_size: the largest number of tokens.

    Returns:
        A `PreTrainedTokenizerFast`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size, initial_alphabet=alphabet, special_tokens=[END], show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=bpe, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False
    )


def new_model(vocab_size: int, tokenizer: Any, architecture: dict[str, Any]) -> Any:
    """Make a randomly initialised Qwen2 model.

    Args:
        vocab_size: the number of tokens.
        tokenizer: has the end of sequence.
        architecture: arguments of Qwen2Config.

    Returns:
        A `Qwen2ForCausalLM`.

    Raises:
        ConfigError: Qwen2Config does not take an argument, or the values do not fit together.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import Qwen2Config, Qwen2ForCausalLM

    if unknown := [name for name in architecture if name not in Qwen2Config().to_dict()]:
        raise ConfigError(f"warm_start.architecture: Qwen2Config has no {unknown[0]}")
    end = tokenizer.eos_token_id
    arguments = {
        "vocab_size": vocab_size,
        "bos_token_id": None,
        "eos_token_id": end,
        "pad_token_id": end,
        **architecture,
    }
    try:
        model = Qwen2ForCausalLM(Qwen2Config(**arguments))  # type: ignore[no-untyped-call]
        with torch.no_grad():
            model(input_ids=torch.tensor([[vocab_size - 1, 0]]))  # some errors show only in a forward pass
    except (ValueError, RuntimeError, LookupError, StrictDataclassError) as error:
        raise ConfigError(
            f"warm_start.architecture: {type(error).__name__}: {' '.join(str(error).split())}"
        ) from error
    return model


def imitate(folder: Path, rows: list[dict[str, Any]], section: WarmStartConfig) -> None:
    """Train the model in a folder with `objective: sft`, in the learner's steps on groups of one.

    Args:
        folder: of the model and its tokenizer; the weights there are replaced.
        rows: each with `prompt_ids` and one completion in `completion_ids`.
        section: the config section `warm_start`.
    """
    num_updates = max(1, round(section.num_epochs * len(rows) / section.batch_size))
    learner = LearnerConfig(
        backend="ddp",
        learning_rate=section.learning_rate,
        schedule="linear",
        warmup_steps=num_updates // 20,
        adam_betas=(0.9, 0.99),
        num_mini_batches=1,
        micro_batch_tokens=1 << 16,
    )
    model = ModelConfig(path=str(folder))
    policy = Policy(model, learner, folder, DEVICE)
    settings = Settings(
        run_dir=str(folder),
        num_steps=num_updates,
        last_step=num_updates,
        loss=SftLoss(),
        learner=learner,
        checkpoint=CheckpointConfig(),
        model_path=str(folder),
        parity_every=0,
    )
    began = said = time.monotonic()
    lengths = [len(row["prompt_ids"]) + len(row["completion_ids"][0]) for row in rows]
    batches = itertools.islice(_batches(lengths, section.batch_size), num_updates)
    for update, batch in enumerate(batches, start=1):
        line = train_step(policy, [{**GROUP, **rows[i], "group_id": i} for i in batch], settings)
        if (now := time.monotonic()) - said > 5 or update == num_updates:
            left = (now - began) / update * (num_updates - update)
            print(
                f"warm start: update {update}/{num_updates} · loss {line['loss']:.3f} nats per token · "
                f"{left:.0f} s left",
                flush=True,
            )
            said = now
    trained: Any = AutoModelForCausalLM.from_pretrained(folder)
    trained.load_state_dict(dict(policy.named_tensors()))
    trained.save_pretrained(folder)


GROUP: dict[str, Any] = {
    "prompt": "",
    "completions": [""],
    "finish_reasons": ["stop"],
    "sources": ["offline:worked"],
    "version_min": [None],
    "version_max": [None],
    "sampling_logprobs": [None],
    "rewards": [1.0],
    "reward_reasons": [None],
}
"""What a group of one worked problem has beside its tokens."""

POOL, LIKE = 16, 64
"""So many batches are sorted by length together, in which lengths within LIKE tokens count as equal."""


def _batches(lengths: list[int], size: int) -> Iterator[list[int]]:
    """Yield the indices of batches without end, each of rows of similar length, which halves the padding.

    The order is new in each epoch.

    Args:
        lengths: each row's number of tokens.
        size: rows of a batch.
    """
    order: list[int] = []
    while True:
        while len(order) < POOL * size:
            order += torch.randperm(len(lengths)).tolist()
        pool, order = sorted(order[: POOL * size], key=lambda i: lengths[i] // LIKE), order[POOL * size :]
        for i in torch.randperm(POOL).tolist():
            yield pool[i * size : (i + 1) * size]
