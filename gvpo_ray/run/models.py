"""The models that a run reads are checked before any actor starts: the policy, and those that score texts."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import Any

from gvpo_ray import groups
from gvpo_ray.config.base import ConfigError, is_local
from gvpo_ray.config.data import NO_PROMPTS
from gvpo_ray.config.model import ModelConfig
from gvpo_ray.config.plan import cluster_address
from gvpo_ray.config.run import GVPOConfig
from gvpo_ray.config.verifiers import VerifiersConfig
from gvpo_ray.data.hub import hub, revision_of
from gvpo_ray.data.rendering import rendering_options
from gvpo_ray.data.transcripts import Transcripts
from gvpo_ray.data.vocabulary import check_vocabulary
from gvpo_ray.run.run_dir import Recorded, parts_of
from gvpo_ray.verifiers.scoring_model import PROMPTS, Renderings


def read_model(config: GVPOConfig) -> tuple[int, Any]:
    """Return context length (tokens) and tokenizer of model.path, after checking that it can be loaded.

    Raises:
        ConfigError: one line that names the key.
    """
    path = config.model.path
    hint = "; make it with: gvpo-ray warm-start CONFIG" if config.warm_start else ""
    model, tokenizer = _read_folder("model.path", path, hint, config.model.trust_remote_code)
    text = model.get_text_config()  # of a model with images, its part
    context = getattr(text, "max_position_embeddings", None) or config.model.max_length
    if context is None:
        raise ConfigError(f"model.max_length: {path} does not say its context length: give it here")
    if config.model.max_length and config.model.max_length > context:
        raise ConfigError(
            f"model.max_length: {config.model.max_length} is more than the model's context of {context}"
        )
    return config.model.max_length or context, tokenizer


def _read_folder(key: str, path: str, hint: str = "", trust_remote_code: bool = False) -> tuple[Any, Any]:
    """Return config and tokenizer of a model, after checking that it can be loaded.

    Raises:
        ConfigError: one line that names the key.
    """
    from transformers import AutoConfig, AutoTokenizer

    if is_local(path) and not Path(path).is_dir():
        raise ConfigError(f"{key}: no folder {path}{hint}")
    if Path(path).is_dir():
        if not (Path(path) / "config.json").is_file():
            raise ConfigError(f"{key}: {path} has no config.json")
        if not any(
            (Path(path) / name).is_file()
            for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
        ):
            raise ConfigError(
                f"{key}: {path} has no tokenizer (tokenizer.json): save the model's tokenizer beside it"
            )
        if not any(Path(path).glob("*.safetensors")):
            raise ConfigError(f"{key}: {path} has no weights (*.safetensors)")
    with hub(key, path, "model"):
        model, tokenizer = (
            _loaded(key, kind, path, trust_remote_code) for kind in (AutoConfig, AutoTokenizer)
        )
    # transformers makes an empty tokenizer where the vocabulary's file is missing.
    if not tokenizer("1 + 2 = 3")["input_ids"]:
        raise ConfigError(
            f"{key}: {path} has no tokenizer (tokenizer.json): the one that loads turns text into no tokens"
        )
    return model, tokenizer


def _loaded(key: str, kind: Any, path: str, trust_remote_code: bool = False) -> Any:
    """Load the config or the tokenizer of a model, whose path stands at `key` in the run's config.

    Raises:
        ConfigError: one line that names the key, the folder and the first cause.
    """
    what = {"AutoConfig": "config.json", "AutoTokenizer": "the tokenizer"}[kind.__name__]
    try:
        loaded = kind.from_pretrained(path, trust_remote_code=trust_remote_code)
    # A broken file raises KeyError, AttributeError and more in transformers, and the Rust library of
    # tokenizers raises Exception itself.
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        is_plain = isinstance(error, (OSError, ValueError)) and lines[0]
        why = lines[0] if is_plain else f"{type(error).__name__}: {lines[0]}".rstrip(": ")
        raise ConfigError(f"{key}: cannot load {what} of {path}: {why}") from error
    return loaded


def check_class(config: GVPOConfig) -> None:
    """Refuse a model with images where this machine's engines cannot load it, though they read text alone.

    Raises:
        ConfigError: one line with the class and what to install.
    """
    from transformers import AutoConfig

    path = config.model.path
    if not config.engines.has_own_engines or cluster_address(config.ray) is not None:
        return  # the nodes of a cluster may have more than this machine
    if importlib.util.find_spec("torchvision") is not None:
        return
    model = AutoConfig.from_pretrained(path, trust_remote_code=config.model.trust_remote_code)
    # vLLM has Qwen 3.5's text model in one module with that of images
    if getattr(model, "vision_config", None) is not None or model.model_type == "qwen3_5_text":
        raise ConfigError(
            f"model.path: {path} is of a family with images ({model.model_type}), which vLLM loads only with "
            "the package torchvision, and it is not installed: add the build that fits torch, or use a model "
            "of text"
        )


def check_reward_models(config: VerifiersConfig) -> None:
    """Refuse a reward model whose config.json does not load here.

    It is treated as model.path is: a folder has to be where the driver and its actors see it, wherever those
    are.

    Raises:
        ConfigError: one line that names the key.
    """
    from transformers import AutoConfig

    for name, reward in config.rewards.items():
        if reward.model is not None:
            key = f"verifiers.rewards.{name}.model"
            if is_local(reward.model) and not Path(reward.model).is_dir():
                raise ConfigError(f"{key}: no folder {reward.model} here: {EVERY_NODE}")
            with hub(key, reward.model, "model"):
                _loaded(key, AutoConfig, reward.model)


EVERY_NODE = (
    "like model.path it has to be on a file system that the driver and every node see; a hub name is loaded "
    "by each"
)
"""What a model's place has to be."""


def renderings_of(config: GVPOConfig) -> dict[str, dict[str, Any]]:
    """Return how the prompts of each data set of a run are written, for models that score texts."""
    own = {} if config.prompts.path == NO_PROMPTS else {PROMPTS: rendering_options(config.prompts)}
    return own | {f"sources.{name}": rendering_options(one) for name, one in config.sources.items()}


def check_scoring_model(key: str, path: str, renderings: Renderings) -> None:
    """Refuse a model that cannot score the run's texts.

    Args:
        key: of the model in the config, for messages.
        path: folder or hub name.
        renderings: how the prompts of each data set are written.

    Raises:
        ConfigError: one line that names the key.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    model, tokenizer = _read_folder(key, path)
    if type(model) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ConfigError(f"{key}: {path} ({model.model_type}) is no causal language model")
    for name, options in renderings.items():
        if options["template"] is None and not tokenizer.chat_template:
            raise ConfigError(
                f"{key}: {path} has no chat template, and {name}.template is null: neither says how it reads "
                "a prompt"
            )
        try:
            Transcripts(tokenizer, **options, key=name).render([{"prompt": "1 + 2 = 3"}])
        except ConfigError as error:
            raise ConfigError(f"{key}: {path}: {error}") from error


def version_of(path: str) -> int:
    """Return the number that stands for a model in `reference_versions`: negative, unlike the run's own.

    It depends on what is in the folder: the names and sizes of its files, and how the weights begin and end;
    of a name on the hub, on its commit.
    """
    content = hashlib.sha256()
    folder = Path(path)
    if not folder.is_dir():
        content.update(f"{path}@{revision_of(path)}".encode())  # a name on the hub
    for file in sorted(folder.glob("*")) if folder.is_dir() else ():
        if file.suffix in (".json", ".safetensors", ".model", ".jinja", ".txt") and file.is_file():
            size = file.stat().st_size
            content.update(f"{file.name} {size} ".encode())
            with file.open("rb") as read:
                content.update(read.read(ENDS))
                read.seek(max(0, size - ENDS))
                content.update(read.read(ENDS))
    return -1 - int.from_bytes(content.digest()[:4], "big") % (2**31 - 1)


ENDS = 1 << 22
"""Bytes at both ends of a model's file by which it is told from another; of most files this is all."""


def reference_digest(config: GVPOConfig) -> dict[str, str]:
    """Return a digest of the other model that is the reference, by its key; nothing where there is none."""
    other = config.loss.reference_model
    return {} if other is None else {REFERENCE_KEY: str(version_of(other.model))}


REFERENCE_KEY = "loss.reference.model"


def check_reference(config: GVPOConfig) -> None:
    """Refuse another model as reference that cannot score the run's completions.

    Raises:
        ConfigError: one line that names the key.
    """
    other = config.loss.reference_model
    if other is not None:
        check_scoring_model(REFERENCE_KEY, other.model, renderings_of(config))


def check_recorded_tokens(model: ModelConfig, tokenizer: Any, recorded: Recorded) -> None:
    """Refuse recorded groups with a token that the model lacks.

    Raises:
        ConfigError: one line that names the token and the column.
    """
    for part in parts_of(recorded):
        lists = {f"the {name} of --groups": part[name] for name in ("prompt_ids", "completion_ids")}
        check_vocabulary(model, lists, tokenizer)


def check_recorded(config: GVPOConfig, recorded: Recorded) -> None:
    """Refuse recorded groups that the other model that is the reference has not scored.

    Raises:
        ConfigError: one line that names the group.
    """
    other = config.loss.reference_model
    if other is None:
        return
    version = version_of(other.model)
    names = ["group_id", "completion_ids", "rewards", *groups.MASK_COLUMNS, "reference_versions"]
    parts = (groups.log_columns(part).select(names) for part in parts_of(recorded))
    for row in (row for part in parts for row in groups.rows(part)):
        versions = row["reference_versions"] or [None] * len(row["rewards"])
        for i in groups.trainable_completions(row):
            if versions[i] != version:
                raise ConfigError(
                    f"--groups: group {row['group_id']}: completion {i} has no log-prob of {REFERENCE_KEY} "
                    f"({other.model}), which a rollout with this config writes"
                )
