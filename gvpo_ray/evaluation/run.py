"""An evaluation samples and verifies the evaluation sets with one model, without a learner.

Groups that its folder already holds are not sampled again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa

from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.run import GVPOConfig
from gvpo_ray.evaluation.folder import EvaluationDir
from gvpo_ray.learner.checkpoints import latest_checkpoint
from gvpo_ray.run.inputs import columns_by_key, read_evaluation_sets
from gvpo_ray.run.machine import check_machine
from gvpo_ray.run.models import check_class, check_reward_models, read_model
from gvpo_ray.run.once import NO_OWN, evaluation_sampling, run_through, without_learner
from gvpo_ray.run.session import Session
from gvpo_ray.verifiers.rewards import Rewards
from gvpo_ray.verifiers.verifier import validate_rewards


def evaluate(
    config: GVPOConfig, checkpoint: str | None = None, out: str | None = None, reward: Rewards | None = None
) -> dict[str, Any]:
    """Sample and verify `evaluation.sets` with one model, and write the numbers into a folder.

    Groups that the folder already holds are not sampled again. There is no learner.

    Args:
        config: the run's config.
        checkpoint: a run directory (its newest checkpoint) or a checkpoint's folder; None: model.path.
        out: the folder; None: run_dir/eval/<name of the model's folder>, prefixed by the name of its run if
            that is another run.
        reward: reward functions that replace `verifiers.rewards`, by name.

    Returns:
        The content of eval.json (see folder.py), its folder, and num_sampled: prompts that were not there
            before.

    Raises:
        ConfigError: a mistake of the user; before any actor starts.
        RunError: the first cause that stopped the sampling; finished groups are kept.
    """
    from gvpo_ray.observe.console import evaluation_progress

    config = config.absolute()
    if not config.evaluation.sets:
        raise ConfigError("evaluation.sets: name at least one prompt file")
    if not config.engines.has_own_engines:
        raise ConfigError(NO_OWN)
    if checkpoint is not None:
        config = config.model_copy(
            update={"model": config.model.model_copy(update={"path": checkpoint_folder(checkpoint)})}
        )
    check_machine(config, learner=False, references=False)
    max_length, tokenizer = read_model(config)
    check_class(config)
    sets = read_evaluation_sets(config, max_length, tokenizer)
    validate_rewards(config.verifiers, reward, columns_by_key({}, sets, {}))
    check_reward_models(config.verifiers)
    model = config.model.path
    folder = (
        Path(out)
        if out is not None
        else Path(config.run_dir) / "eval" / evaluation_name(Path(model), Path(config.run_dir))
    )
    with EvaluationDir(
        folder, config, model, {name: prompts.digest() for name, prompts in sets.items()}
    ) as results:
        missing = {name: results.missing(name, prompts.all()) for name, prompts in sets.items()}
        if any(map(len, missing.values())):
            session = Session(config.ray)
            try:
                engines, verifiers = without_learner(session, config, max_length, reward)
                with evaluation_progress(
                    {name: (len(sets[name]), len(rows)) for name, rows in missing.items()}
                ) as advance:
                    for name, prompts in missing.items():

                        def on_done(group: pa.Table, name: str = name) -> None:
                            results.add(name, group)
                            advance(name)

                        if len(prompts):
                            sampling = evaluation_sampling(config, name)
                            session.guard(
                                run_through(prompts, engines, verifiers, sampling, 0, config.seed, on_done)
                            )
            finally:
                session.stop()
        left_out = {name: prompts.num_too_long for name, prompts in sets.items()}
        return {"num_sampled": sum(map(len, missing.values())), **results.finish(config, model, left_out)}


def evaluation_name(model: Path, run_dir: Path) -> str:
    """Return the name of the folder of a model's evaluation, such as step-80.

    A checkpoint of another run gets that run's name as a prefix, such as quickstart-step-80, because one
    config may evaluate several runs.
    """
    is_others = model.parent.name == "checkpoints" and model.parent.parent != run_dir
    return f"{model.parent.parent.name}-{model.name}" if is_others else model.name


def checkpoint_folder(path: str) -> str:
    """Return the absolute path of a checkpoint's folder, or of the newest checkpoint of a run directory.

    Raises:
        ConfigError: there is no checkpoint.
    """
    if (Path(path) / "config.json").is_file():
        return str(Path(path).absolute())
    newest = latest_checkpoint(path)
    if newest is None:
        raise ConfigError(f"--checkpoint: no checkpoint in {path}")
    return str(newest[1].absolute())
