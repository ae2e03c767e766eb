"""A run's inputs (model, prompts, files, folders) are read and checked before any actor starts.

Each mistake is an error of one line that names its key.
"""

from __future__ import annotations

import glob
import hashlib
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from gvpo_ray import groups
from gvpo_ray.config.base import TASKSET, ConfigError, is_local, paths
from gvpo_ray.config.data import NO_PROMPTS
from gvpo_ray.config.engines import NUM_PROBES, PROBE_TOKENS
from gvpo_ray.config.model import ModelConfig
from gvpo_ray.config.run import GVPOConfig
from gvpo_ray.config.verifiers import VerifiersConfig
from gvpo_ray.data.dialogue import dialogue_of
from gvpo_ray.data.hub import revision_of
from gvpo_ray.data.mixture import SourceSchedule
from gvpo_ray.data.offline import OfflineSource
from gvpo_ray.data.prompts import PromptSet
from gvpo_ray.data.rendering import MakeRenderer, completion_renderer, renderer_of
from gvpo_ray.data.turns import check_stop_tokens
from gvpo_ray.data.vocabulary import check_vocabulary
from gvpo_ray.engines.vllm_arguments import check_experts
from gvpo_ray.environments.agent import described_agent, read_agent
from gvpo_ray.environments.contract import described, read_contract
from gvpo_ray.learner.families import check_trainable, digest_of
from gvpo_ray.learner.sizes import check_sizes
from gvpo_ray.observe.advice import golds_out_of_reach
from gvpo_ray.observe.samples import prompt_lines
from gvpo_ray.run.models import check_class, check_reference, check_reward_models, read_model
from gvpo_ray.run.run_dir import check_same_run
from gvpo_ray.verifiers.rewards import Rewards
from gvpo_ray.verifiers.verifier import validate_rewards


@dataclass
class Inputs:
    """The inputs are what a run reads, checked."""

    prompts: PromptSet | None
    """The prompts; None: the run has only whole groups of offline sources."""
    evaluation: dict[str, PromptSet]
    max_length: int
    """Longest prompt + completion, in tokens."""
    sources: dict[str, OfflineSource]
    mixture: SourceSchedule
    num_offline: dict[str, int]
    """Completions that a source adds to each group, where it has some for the prompt; by source."""
    verifiers: VerifiersConfig = field(default_factory=VerifiersConfig)
    """What the golds of the data are for."""

    def group(self, group_id: int) -> tuple[pa.Table, bool]:
        """Return the prompt of a group, or a whole group of an offline source, and whether it is the latter.

        The result is one row, and a pure function of the config and the id.
        """
        whole = self.mixture.source_of(group_id)
        if whole is not None:
            name, number = whole
            return self.sources[name].group(group_id, number), True
        assert self.prompts is not None
        return groups.with_columns(
            self.prompts.group(self.mixture.ordinary(group_id)), group_id=[group_id]
        ), False

    def offline(self, prompt: pa.Table) -> list[pa.Table]:
        """Return the completions of offline sources that join the prompt's group, one table per source."""
        found = [self.sources[name].completions(prompt, num) for name, num in self.num_offline.items()]
        return [completions for completions in found if completions is not None]

    def problems(self) -> dict[str | None, pa.Table]:
        """Return the prompts of the groups that come, by source of whole groups; None: ordinary groups'."""
        sets: dict[str | None, PromptSet | OfflineSource] = {}
        if self.prompts is not None:
            sets[None] = self.prompts
        for name, source in self.sources.items():
            sets[name] = source
        return {name: sets[name].all() for name in self.mixture.owners if name in sets}

    def probes(self) -> list[list[int]]:
        """Return NUM_PROBES sequences of token ids, of prompts that the run trains on, one after the other.

        Engines' log-probs of them are compared with the learner's before anything is sampled. There are none
        where there are no prompts. They are as long as a sequence may be, up to PROBE_TOKENS.
        """
        if self.prompts is None:
            return []
        length = min(PROBE_TOKENS, self.max_length - 1)
        ids: list[int] = []
        for i in range(len(self.prompts) * NUM_PROBES * length):
            if len(ids) >= NUM_PROBES * length:
                break
            ids += self.prompts.group(i)["prompt_ids"][0].as_py()
        return [ids[i * length : (i + 1) * length] for i in range(NUM_PROBES)]

    def digests(self) -> dict[str, str]:
        """Return digests of the prompts and of each source, by key; other data have others.

        A section's `path` stands for what is in the data, and `template` for what the model reads of it.
        """
        prompts = {} if self.prompts is None else {"prompts": self.prompts}
        sets = prompts | {f"sources.{name}": source for name, source in self.sources.items()}
        return {f"{key}.path": data.digest() for key, data in sets.items()} | {
            f"{key}.template": _digest_of_tokens(data.all()) for key, data in sets.items()
        }

    def startup_summary(self) -> Iterator[str]:
        """Yield lines about the inputs that a person should read before the first step."""
        sets = {} if self.prompts is None else {"prompts": self.prompts}
        sets |= {f"evaluation.sets.{name}": of_set for name, of_set in self.evaluation.items()}
        for key, prompts in sets.items():
            yield from _summary(key, prompts, self.verifiers)
        for name, source in self.sources.items():
            key = f"sources.{name}"
            single = (
                f", {source.num_single} prompts have one completion and make no group"
                if source.num_single
                else ""
            )
            yield f"{key}: {source.num_rows} offline completions{_left_out(source)}{single}"
            yield from _notes(key, source, self.verifiers)
        for name, reward in self.verifiers.rewards.items():
            if reward.model is not None and (commit := revision_of(reward.model)) != "main":
                yield f"verifiers.rewards.{name}.model: {reward.model} at its commit {commit}"


def _digest_of_tokens(prompts: pa.Table) -> str:
    """Return the SHA-256 of the prompts' token ids."""
    content = hashlib.sha256()
    for ids in prompts["prompt_ids"]:
        content.update(np.array([len(ids), *ids.as_py()], np.int32).tobytes())
    return content.hexdigest()


def _summary(key: str, prompts: PromptSet, verifiers: VerifiersConfig) -> Iterator[str]:
    yield f"{key}: {len(prompts)} prompts (longest {prompts.longest} tokens{_left_out(prompts)})"
    yield from _notes(key, prompts, verifiers)


def _notes(key: str, data: PromptSet | OfflineSource, verifiers: VerifiersConfig) -> Iterator[str]:
    for note in (data.layout, *data.notes):
        if note:
            yield f"{key}: {note}"
    if advice := golds_out_of_reach(data.all()["answer"].to_pylist(), verifiers, key):
        yield advice


def _left_out(data: PromptSet | OfflineSource) -> str:
    """Return what was left out of a data set, and why, for behind its number of rows."""
    reasons = []
    if data.num_without_prompt:
        reasons.append(f"{data.num_without_prompt} without a prompt")
    if data.num_without_gold:
        reasons.append(f"{data.num_without_gold} without a gold answer")
    if data.num_too_long:
        reasons.append(f"{data.num_too_long} longer than the context allows")
    return "".join(f", {reason}: left out" for reason in reasons)


def read_inputs(config: GVPOConfig, rewards: Rewards | None = None) -> Inputs:
    """Load tokenizer, prompts and offline completions, and check that model, data and rewards fit together.

    Args:
        config: the run's config.
        rewards: reward functions that replace `verifiers.rewards`, by name.

    Raises:
        ConfigError: one line that names the key.
    """
    if config.environment is not None and config.environment.asks_by_http:
        read_agent(config.environment)
    max_length, tokenizer = read_model(config)
    check_class(config)
    room = max_length - config.sampling.max_tokens
    if room < 1:
        raise ConfigError(
            f"sampling.max_tokens: {config.sampling.max_tokens} tokens leave no room for a prompt in a "
            f"context of {max_length}"
        )
    check_stop_tokens(config.sampling, tokenizer)
    check_reference(config)
    shares = math.fsum(source.group_share for source in config.sources.values())
    if config.loss.least == 1 and shares < 1:
        raise ConfigError(
            f"loss.objective: {config.loss.objective} imitates what it is given: the group_share of sources "
            f"must be 1 in all, and is {shares:g}"
        )
    prompts = None
    if config.prompts.path != NO_PROMPTS:
        prompts = PromptSet(
            config.prompts,
            tokenizer,
            name=Path(given if isinstance(given := config.prompts.path, str) else given[0]).stem,
            max_tokens=room,
            seed=config.seed,
            key="prompts",
            make_renderer=make_renderer_of(config),
        )
    elif config.engines.has_engines:
        raise ConfigError("prompts: required, and not given")
    sources = {
        name: OfflineSource(
            source,
            tokenizer,
            name=name,
            max_tokens=None,
            max_length=max_length,
            num_completions=config.sampling.num_completions,
            loss=config.loss,
            seed=config.seed,
        )
        for name, source in config.sources.items()
    }
    tokens = {f"the completions of sources.{name}": source.token_ids for name, source in sources.items()}
    tokens |= {f"the prompts of sources.{name}": of.all()["prompt_ids"] for name, of in sources.items()}
    if prompts is not None:
        tokens["the prompts"] = prompts.all()["prompt_ids"]
    check_vocabulary(config.model, tokens, tokenizer)
    evaluation = read_evaluation_sets(config, max_length, tokenizer)
    to_verify = {
        f"sources.{name}": source
        for name, source in sources.items()
        # completions that join the run's own prompts come with those prompts' columns
        if not source.brings_rewards and config.sources[name].group_share
    }
    of_prompts = {} if prompts is None else {"prompts": prompts}
    validate_rewards(config.verifiers, rewards, columns_by_key(of_prompts, evaluation, to_verify))
    check_reward_models(config.verifiers)
    return Inputs(
        prompts=prompts,
        evaluation=evaluation,
        max_length=max_length,
        sources=sources,
        mixture=SourceSchedule(
            {name: source.group_share for name, source in config.sources.items() if source.group_share}
        ),
        num_offline={
            name: round(source.share * config.sampling.num_completions)
            for name, source in config.sources.items()
            if source.share
        },
        verifiers=config.verifiers,
    )


def columns_by_key(
    prompts: Mapping[str, PromptSet],
    evaluation: Mapping[str, PromptSet],
    sources: Mapping[str, OfflineSource],
) -> dict[str, list[str]]:
    """Return the columns that reward functions get of each data set, by its key in the config."""
    sets = {f"evaluation.sets.{name}": of_set.columns for name, of_set in evaluation.items()}
    by_key: dict[str, PromptSet | OfflineSource] = {**prompts, **sources}
    return {key: of_key.columns for key, of_key in by_key.items()} | sets


def read_evaluation_sets(config: GVPOConfig, max_length: int, tokenizer: Any) -> dict[str, PromptSet]:
    """Return the prompts of evaluation.sets by name.

    Args:
        config: the run's config.
        max_length: the model's context, in tokens.
        tokenizer: the model's tokenizer.

    Raises:
        ConfigError: one line that names the key.
    """
    prompts = {}
    for name, section in config.evaluation.sets.items():
        key, max_tokens = (
            f"evaluation.sets.{name}",
            config.evaluation.of(name)[2] or config.sampling.max_tokens,
        )
        if max_tokens >= max_length:
            raise ConfigError(
                f"{key}.max_completion_tokens: {max_tokens} tokens leave no room for a prompt in a context "
                f"of {max_length}"
            )
        prompts[name] = PromptSet(
            section,
            tokenizer,
            name=name,
            max_tokens=max_length - max_tokens,
            seed=config.seed,
            key=key,
            make_renderer=make_renderer_of(config),
        )
    tokens = {
        f"the prompts of evaluation.sets.{name}": of.all()["prompt_ids"] for name, of in prompts.items()
    }
    check_vocabulary(config.model, tokens, tokenizer)
    return prompts


def make_renderer_of(config: GVPOConfig) -> MakeRenderer:
    """Return what makes the renderers of the data sets: with an environment's class, prompts name its tools.

    Raises:
        ConfigError: the environment's class is wrong.
    """
    if config.environment is None or config.environment.asks_by_http:
        return renderer_of
    contract = read_contract(config.environment, config.verifiers)
    return partial(dialogue_of, tools=contract.tools, family=config.environment.renderer)


def check_paths(config: GVPOConfig) -> Iterator[str]:
    """Yield a line for each input of the run that is there, for `gvpo-ray check`, then what is in the data.

    Data are read as a run reads them, if model and data are files of this machine, and the first prompt of
    each set is shown as the model sees it; hub names are not looked up.

    Raises:
        ConfigError: a local path does not exist, a reward does not load, the data do not fit, the model is
            not one that can be trained, or run_dir holds another run.
    """
    validate_rewards(config.verifiers)
    on_hub: list[str] = []
    for key, path, rule in paths(config):
        # Functions are checked above, and the warm start makes its own data.
        if rule.kind != "input" or key.startswith("warm_start.") or path == NO_PROMPTS:
            continue
        if path.startswith(TASKSET):  # it is loaded with the prompts
            yield f"{key}: {path}"
            continue
        if Path(path).exists() or glob.glob(path, recursive=True):
            yield f"{key}: {path} is here"
        elif is_local(path):
            hint = (
                "; make it with: gvpo-ray warm-start CONFIG"
                if key == "model.path" and config.warm_start
                else ""
            )
            raise ConfigError(f"{key}: nothing at {path}{hint}")
        else:
            on_hub.append(f"{key} ({path})")
    if config.environment is not None and config.environment.asks_by_http:
        yield from described_agent(config.environment)
    elif config.environment is not None:
        yield from described(read_contract(config.environment, config.verifiers), config.environment)
    trains = config.prompts.path != NO_PROMPTS or bool(config.sources)
    if trains and f"model.path ({config.model.path})" not in on_hub:
        check_trainable(config.model)
        check_sizes(config.model, config.learner)
        check_experts(config.model, config.engines)
    if on_hub:
        yield (
            f"{', '.join(on_hub)}: of the Hugging Face hub, which `check` does not ask: the data are not "
            "read and the columns not checked; give downloaded folders for that"
        )
        if trains:
            check_same_run(config.absolute(), {})
        return
    if trains:
        inputs = read_inputs(config)
        yield from inputs.startup_summary()
        for source, prompts in inputs.problems().items():
            name = "the first prompt" if source is None else f"sources.{source}: the first prompt"
            yield from _shown(name, prompts, config.model)
        check_same_run(config.absolute(), inputs.digests() | digest_of(config.model))
    else:
        max_length, tokenizer = read_model(config)
        check_class(config)
        sets = read_evaluation_sets(config, max_length, tokenizer)
        validate_rewards(config.verifiers, None, columns_by_key({}, sets, {}))
        for name, of_set in sets.items():
            yield from _summary(f"evaluation.sets.{name}", of_set, config.verifiers)
            yield from _shown(f"evaluation.sets.{name}: the first prompt", of_set.all(1), config.model)


def _shown(name: str, prompts: pa.Table, model: ModelConfig) -> Iterator[str]:
    """Yield the first of some prompts as the model sees it, with special tokens."""
    decode = partial(completion_renderer(model).text, with_special=True)
    yield from prompt_lines(name, next(groups.rows(prompts.slice(0, 1))), decode)


def machine_resources(config: GVPOConfig) -> tuple[float, float]:
    """Return the numbers of CPUs and GPUs that an embedded Ray would have."""
    from gvpo_ray.actors import num_gpus_here  # imports ray: a bad config should fail before that

    return float(config.ray.num_cpus or len(os.sched_getaffinity(0))), float(num_gpus_here())
