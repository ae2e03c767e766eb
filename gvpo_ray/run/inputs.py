"""What happens before any actor starts: models, prompts, files and folders are read and checked, each mistake one line with its key."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from gvpo_ray import groups
from gvpo_ray.buffer.log import GroupLog, read_assignments
from gvpo_ray.config.run import NO_PROMPTS, ConfigError, GVPOConfig, is_local
from gvpo_ray.data.offline import Mixture, OfflineSource
from gvpo_ray.data.prompts import PromptSet
from gvpo_ray.learner.checkpoints import latest_checkpoint
from gvpo_ray.verifiers.rewards import Rewards
from gvpo_ray.verifiers.verifier import validate_rewards


@dataclass
class Inputs:
    """What a run reads, checked."""

    prompts: PromptSet | None
    """None: whole groups of offline sources are all there is."""
    evaluation: dict[str, PromptSet]
    max_length: int
    """Longest prompt + completion, in tokens."""
    sources: dict[str, OfflineSource]
    mixture: Mixture
    num_offline: dict[str, int]
    """Completions of each group that a source gives, where it has some for the prompt."""

    def group(self, group_id: int) -> tuple[pa.Table, bool]:
        """The prompt of a group, or the whole group of an offline source (True). A pure function of the config and the id."""
        whole = self.mixture.of(group_id)
        if whole is not None:
            name, number = whole
            return self.sources[name].group(group_id, number), True
        assert self.prompts is not None
        return groups.with_columns(self.prompts.group(self.mixture.ordinary(group_id)), group_id=[group_id]), False

    def offline(self, prompt: pa.Table) -> list[pa.Table]:
        """Completions from offline sources that join the prompt's group."""
        found = [self.sources[name].completions(prompt, num) for name, num in self.num_offline.items()]
        return [completions for completions in found if completions is not None]

    def story(self) -> Iterator[str]:
        """What a person should know of them before the first step."""
        named = {"prompts": self.prompts} if self.prompts is not None else {}
        for key, prompts in {**named, **self.evaluation}.items():
            left_out = f", {prompts.num_too_long} longer than the context allows: left out" if prompts.num_too_long else ""
            yield f"{key}: {len(prompts)} prompts (longest {prompts.longest} tokens{left_out})"
        for name, source in self.sources.items():
            left_out = f", {source.num_too_long} longer than the context allows: left out" if source.num_too_long else ""
            single = f", {source.num_single} prompts have one completion and make no group" if source.num_single else ""
            yield f"{name}: {source.num_rows} offline completions{left_out}{single}"


def read_inputs(config: GVPOConfig, rewards: Rewards | None = None) -> Inputs:
    """Load tokenizer, prompts and offline completions, and check that model, data and rewards are there and fit together.

    Raises:
        ConfigError: one line that names the key.
    """
    max_length, tokenizer = read_model(config)
    room = max_length - config.sampling.max_tokens
    if room < 1:
        raise ConfigError(f"sampling.max_tokens: {config.sampling.max_tokens} tokens leave no room for a prompt in a context of {max_length}")
    validate_rewards(config.verifiers, rewards)
    prompts = None
    if config.prompts.path != NO_PROMPTS:
        prompts = PromptSet(config.prompts, tokenizer, name=Path(config.prompts.path).stem, max_tokens=room, seed=config.seed, key="prompts")
    elif any(pool.num or pool.max_num for pool in config.engines.all_pools().values()):
        raise ConfigError("prompts: required, and not given")
    sources = {
        name: OfflineSource(
            source, tokenizer, name=name, template=config.prompts.template, system_prompt=config.prompts.system_prompt, max_tokens=None,
            max_length=max_length, num_completions=config.sampling.num_completions, seed=config.seed,
        )
        for name, source in config.sources.items()
    }  # fmt: skip
    return Inputs(
        prompts=prompts,
        evaluation=read_evaluation_sets(config, max_length, tokenizer),
        max_length=max_length,
        sources=sources,
        mixture=Mixture({name: source.group_share for name, source in config.sources.items() if source.group_share}),
        num_offline={name: round(source.share * config.sampling.num_completions) for name, source in config.sources.items() if source.share},
    )


def read_evaluation_sets(config: GVPOConfig, max_length: int, tokenizer: Any) -> dict[str, PromptSet]:
    """The prompts of evaluation.sets by name.

    Raises:
        ConfigError: one line that names the key.
    """
    prompts = {}
    for name, section in config.evaluation.sets.items():
        key, max_tokens = f"evaluation.sets.{name}", config.evaluation.of(name)[2] or config.sampling.max_tokens
        if max_tokens >= max_length:
            raise ConfigError(f"{key}.max_completion_tokens: {max_tokens} tokens leave no room for a prompt in a context of {max_length}")
        prompts[name] = PromptSet(section, tokenizer, name=name, max_tokens=max_length - max_tokens, seed=config.seed, key=key)
    return prompts


def read_model(config: GVPOConfig) -> tuple[int, Any]:
    """Context length and tokenizer of model.path."""
    from transformers import AutoConfig, AutoTokenizer

    path, trust = config.model.path, config.model.trust_remote_code
    if is_local(path) and not Path(path).is_dir():
        hint = "; make it with: python jobs/warm_start.py CONFIG" if config.warm_start else ""
        raise ConfigError(f"model.path: no folder {path}{hint}")
    if Path(path).is_dir():
        if not (Path(path) / "config.json").is_file():
            raise ConfigError(f"model.path: {path} has no config.json")
        if not any((Path(path) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")):
            raise ConfigError(f"model.path: {path} has no tokenizer (tokenizer.json): save the model's tokenizer beside it")
        if not any(Path(path).glob("*.safetensors")):
            raise ConfigError(f"model.path: {path} has no weights (*.safetensors)")
    try:
        model = AutoConfig.from_pretrained(path, trust_remote_code=trust)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path: cannot load {path}: {str(error).strip().splitlines()[0]}") from error
    if not tokenizer("1 + 2 = 3")["input_ids"]:  # transformers makes an empty one where the vocabulary's file is missing
        raise ConfigError(f"model.path: {path} has no tokenizer (tokenizer.json): the one that loads turns text into no tokens")
    context = getattr(model, "max_position_embeddings", None) or config.model.max_length
    if context is None:
        raise ConfigError(f"model.max_length: {path} does not say its context length: give it here")
    if config.model.max_length and config.model.max_length > context:
        raise ConfigError(f"model.max_length: {config.model.max_length} is more than the model's context of {context}")
    return config.model.max_length or context, tokenizer


def check_paths(config: GVPOConfig) -> Iterator[str]:
    """For `check`: what of the run's inputs is here. Hub names are not looked up."""
    validate_rewards(config.verifiers)
    training = [("prompts.path", config.prompts.path)] if config.prompts.path != NO_PROMPTS else []
    training += [(f"sources.{name}.path", source.path) for name, source in config.sources.items()]
    for key, path in (("model.path", config.model.path), *training,
                      *((f"evaluation.sets.{name}.path", section.path) for name, section in config.evaluation.sets.items())):  # fmt: skip
        if Path(path).exists():
            yield f"{key}: {path} is here"
        elif is_local(path):
            hint = "; make it with: python jobs/warm_start.py CONFIG" if key == "model.path" and config.warm_start else ""
            raise ConfigError(f"{key}: nothing at {path}{hint}")
        else:
            yield f"{key}: {path} is a Hugging Face name, looked up when the run starts"


RESUMABLE = (
    "num_steps", "max_staleness", "engines", "verifiers", "learner", "evaluation", "checkpoint", "ray", "warm_start", "run_dir", "loss", "replay",
    "watchdog_s", "tracking", "root",
)  # fmt: skip
"""Keys that may change when a run is resumed. The others say what its log and its checkpoints mean."""


@contextlib.contextmanager
def open_run_dir(config: GVPOConfig) -> Iterator[Path]:
    """Make or take up the run directory, alone: writes config.yaml; refuses one that another process uses or that is another run's.

    Raises:
        ConfigError: names the key that differs, or run_dir and why it cannot be written.
    """
    path = Path(config.run_dir)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = open(path / ".lock", "a")  # noqa: SIM115 - held as long as the run
    except OSError as error:
        raise ConfigError(f"run_dir: cannot write {path}: {error.strerror}") from error
    with lock:
        for attempt in range(10):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if attempt == 9:
                    raise ConfigError(f"run_dir: another process is running in {path}") from error
                time.sleep(0.1)  # `gvpo-ray status` looks at the lock, too
        kept = path / "config.yaml"
        if kept.exists():
            try:
                old, new = GVPOConfig.from_file(kept).model_dump(mode="json"), config.model_dump(mode="json")
            except ConfigError as error:
                raise ConfigError(f"run_dir: {kept} is not the config of a run ({error}); use another run_dir") from error
            changed = [key for key in new if key not in RESUMABLE and old[key] != new[key]]
            if changed:
                raise ConfigError(f"{changed[0]}: {path} holds a run with other values of it (see its config.yaml); use another run_dir")
        part = path / ".config.yaml.part"
        try:
            part.write_text(config.dump())
        except OSError as error:
            raise ConfigError(f"run_dir: cannot write {path}: {error.strerror}") from error
        part.replace(kept)
        yield path


def machine_resources(config: GVPOConfig) -> tuple[float, float]:
    """CPUs and GPUs that an embedded Ray would have."""
    from ray._private.accelerators.nvidia_gpu import NvidiaGPUAcceleratorManager

    return float(config.ray.num_cpus or len(os.sched_getaffinity(0))), float(NvidiaGPUAcceleratorManager.get_current_node_num_accelerators())


def evaluation_name(model: Path, run_dir: Path) -> str:
    """step-80, or quickstart-step-80 of another run's checkpoint: one config may evaluate several runs."""
    is_others = model.parent.name == "checkpoints" and model.parent.parent != run_dir
    return f"{model.parent.parent.name}-{model.name}" if is_others else model.name


def checkpoint_folder(path: str) -> str:
    if (Path(path) / "config.json").is_file():
        return str(Path(path).absolute())
    newest = latest_checkpoint(path)
    if newest is None:
        raise ConfigError(f"--checkpoint: no checkpoint in {path}")
    return str(newest[1].absolute())


def read_recorded(source: Path, groups_per_step: int, folder: Path) -> tuple[pa.Table, dict[int, tuple[int, int]], int]:
    """Recorded groups, their assignment to steps, and how many steps they make. `folder`: the log of the run that is to learn from them.

    The log of a finished run brings its own assignment; a file of groups is cut in its order.

    Raises:
        ConfigError: no groups there, too few, or the folder's log has others.
    """
    try:
        recorded = groups.validate(groups.load(source), groups.LOGGED_COLUMNS)
        here = len(groups.load(folder)) if any(folder.glob("*.arrow")) else 0
    except groups.GroupError as error:
        raise ConfigError(f"--groups: {error}") from error
    except OSError as error:
        raise ConfigError(f"--groups: {source} cannot be read: {error.strerror or error}") from error
    if here not in (0, len(recorded)):
        raise ConfigError(f"run_dir: {folder} holds {here} groups, {source} has {len(recorded)}: use another run_dir")
    assignments = source / "assignments.jsonl"  # only read: the run may still be going on
    assigned = read_assignments(assignments)[0] if assignments.is_file() else {}
    end = max((end for _, end in assigned.values()), default=0)
    steps = max(assigned, default=0) + (len(recorded) - end) // groups_per_step
    if steps == 0:
        raise ConfigError(f"--groups: {source} has {len(recorded)} groups, fewer than groups_per_step ({groups_per_step})")
    return recorded, assigned, steps


def import_groups(recorded: pa.Table, assigned: Mapping[int, tuple[int, int]], folder: Path) -> None:
    """Make recorded groups the log of a run that only learns; a log that has them already stays."""
    log = GroupLog(folder)
    if len(log) == 0:
        for i in range(len(recorded)):
            log.append(recorded.slice(i, 1).select(list(groups.LOGGED_COLUMNS)))
        for step, (begin, end) in assigned.items():
            log.assign(step, begin, end)
