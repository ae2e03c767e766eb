"""Each benchmark is a verb of `gvpo-ray bench`, which is defined here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gvpo_ray.cli.app import Config, Overrides, at_least_one, bench, names_of, read_config, verb


@verb("ring jobs/quickstart.yaml num_steps=20", bench)
def bench_ring(config: Config, overrides: Overrides = None) -> None:
    """Measure how fast the parts of one run are.

    The measurement goes from the run's command to its last step, in a folder of its own.
    """
    read = read_config(config, overrides)
    from gvpo_ray.bench import ring

    ring.main(read)


@verb("verifiers answers.jsonl", bench)
def bench_verifiers(
    input: Annotated[
        str, typer.Argument(metavar="INPUT", help="a .jsonl file with response and gold in each row")
    ],
    rows: Annotated[int, typer.Option(metavar="N", help="rows, spread evenly over the file")] = 2000,
) -> None:
    """Measure checks per second beside plain math-verify.

    Both check the same rows. A second measurement says what poisonous rows cost.
    """
    from gvpo_ray.bench import verifiers

    verifiers.main(input, rows)


@verb("learner --tokens 4096", bench)
def bench_learner(
    tokens: Annotated[int, typer.Option(metavar="N", help="tokens of one step, a shared prompt once")] = 4096,
) -> None:
    """Measure a training step: speed, share of peak, memory.

    It is compared with a padded transformers loop and with TRL's log-probs.
    """
    from gvpo_ray.bench import learner

    learner.main(tokens)


@verb("traffic", bench)
def bench_traffic() -> None:
    """Count what the learner's workers send in a step, by layout.

    Processes on this machine's CPUs are the workers; in float32 GPUs would send the same.
    """
    from gvpo_ray.bench import traffic

    traffic.main()


@verb("weights --share 0.25", bench)
def bench_weights(
    share: Annotated[float, typer.Option(metavar="X", help="share of a model of 1.5B")] = 1.0,
) -> None:
    """Measure the way of new weights from learner to engine.

    Each stage is compared with a plain copy of memory. A real step of AdamW says how many bytes a delta has.
    """
    from gvpo_ray.config.base import ConfigError

    if not 0 < share <= 1:
        raise ConfigError(f"--share: {share:g}: must be more than 0 and at most 1")
    from gvpo_ray.bench import weights

    weights.main(share)


@verb("gpu --out runs/bench_gpu --sections probe,train_step,speed", bench)
def bench_gpu(
    out: Annotated[
        str, typer.Option(metavar="DIR", help="folder of gpu.jsonl and traces")
    ] = "runs/bench_gpu",
    seconds: Annotated[float, typer.Option(metavar="S", help="time for all sections")] = 450.0,
    sections: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="the sections to run, in order (default: all)")
    ] = None,
) -> None:
    """Check that the learner is right and fast on one GPU.

    Each section has its share of the time, and a failure is a result. The exit status is 1 where a decision
    rule does not hold or anything failed. Without a GPU the sizes are toys.
    """
    from gvpo_ray.bench.gpu import main as gpu

    names = names_of("--sections", sections, list(gpu.SECTIONS))
    raise typer.Exit(gpu.main(out, seconds, names))


@verb("chaos jobs/quickstart.yaml --kills 7", bench)
def bench_chaos(
    config: Config,
    overrides: Overrides = None,
    kills: Annotated[int, typer.Option(metavar="N", help="processes to kill, each kind in turn")] = 12,
    seed: Annotated[int, typer.Option(metavar="N", help="seed of the schedule")] = 0,
) -> None:
    """Kill processes of a real run; check that nothing is lost.

    The run has a folder of its own, and its processes are killed at random moments. Nothing may be lost or
    done twice.
    """
    read_config(config, overrides)
    from gvpo_ray.actors import RunError
    from gvpo_ray.bench import chaos

    if wrong := chaos.main(config, overrides or [], kills, seed):
        raise RunError(f"{wrong} things went wrong")


@verb("episodes --turns 5", bench)
def bench_episodes(
    groups: Annotated[int, typer.Option(metavar="N", help="groups of 8 episodes")] = 100,
    turns: Annotated[int, typer.Option(metavar="N", help="turns of an episode")] = 5,
    model: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="also its tokens per second, beside separate prompts")
    ] = None,
) -> None:
    """Measure episodes with a calculator, and what turns cost."""
    at_least_one("--groups", groups)
    at_least_one("--turns", turns)
    from gvpo_ray.config.base import ConfigError

    if model is not None and not (Path(model) / "config.json").is_file():
        raise ConfigError(f"--model: {model} has no config.json")
    from gvpo_ray.bench import episodes

    episodes.main(groups, turns, model)


@verb("scale --engines 8,64", bench)
def bench_scale(
    engines: Annotated[str, typer.Option(metavar="N,...", help="sizes of fleets")] = "1,8,32,128,256",
    seconds: Annotated[float, typer.Option(metavar="S", help="measured for each")] = 30.0,
    turns: Annotated[int, typer.Option(metavar="N", help="turns of an episode")] = 1,
) -> None:
    """Run the training loop with 1 to 256 fake engines.

    It measures groups per second, CPU time of the driver and recovery times.
    """
    from gvpo_ray.config.base import ConfigError

    sizes = engines.split(",")
    if not all(size.strip().isdigit() and int(size) for size in sizes):
        raise ConfigError(f"--engines: {engines}: must be numbers such as 8,64")
    at_least_one("--turns", turns)
    from gvpo_ray.bench import scale

    scale.main([int(size) for size in sizes], seconds, turns)


TASKS = ["arithmetic", "chain", "sort"]
Tasks = Annotated[
    str | None, typer.Option(metavar="TASK,...", help=f"some of {', '.join(TASKS)} (default: all)")
]
Seeds = Annotated[int, typer.Option(metavar="N", help="runs of each cell")]
BenchDir = Annotated[
    str,
    typer.Option(
        metavar="DIR",
        help="runs, results.parquet, tables and pictures, of both benches; processes that share it share "
        "the work",
    ),
]


@verb("paper --tasks arithmetic", bench)
def bench_paper(tasks: Tasks = None, seeds: Seeds = 3, out: BenchDir = "runs/bench") -> None:
    """Repeat the paper's table and figures in miniature.

    The table compares methods, the figures vary beta, k and history. This takes hours; the same command
    resumes it.
    """
    names = names_of("--tasks", tasks, TASKS)
    at_least_one("--seeds", seeds)
    from gvpo_ray.bench.experiments import paper

    paper.main(names, seeds, Path(out).absolute())


STALE = ["gvpo", "grpo", "dr_grpo", "oapl", "gspo"]


@verb("staleness --tasks arithmetic --seeds 1", bench)
def bench_staleness(
    tasks: Tasks = None,
    seeds: Seeds = 3,
    out: BenchDir = "runs/bench",
    objectives: Annotated[
        str | None, typer.Option(metavar="NAME,...", help=f"some of {', '.join(STALE)} (default: all)")
    ] = None,
) -> None:
    """Measure what each objective learns from data of a given age.

    This takes hours; the same command resumes it.
    """
    names = names_of("--tasks", tasks, TASKS)
    compared = names_of("--objectives", objectives, STALE)
    at_least_one("--seeds", seeds)
    from gvpo_ray.bench.experiments import staleness

    staleness.main(names, seeds, Path(out).absolute(), compared)


FAMILY = ["preferences", "noise", "distillation"]


@verb("family --sections noise --seeds 1", bench)
def bench_family(
    sections: Annotated[
        str | None, typer.Option(metavar="NAME,...", help=f"some of {', '.join(FAMILY)} (default: all)")
    ] = None,
    seeds: Seeds = 3,
    out: Annotated[
        str, typer.Option(metavar="DIR", help="folder of family.jsonl, a row per run, and family.md")
    ] = "runs/bench_family",
) -> None:
    """Measure preferences, noisy data and a teacher on a small task.

    EPA, DPO and GVPO on preferences of one reward, PoFT beside SFT where a third is noise, and a teacher
    beside rewards alone. Neither Ray nor an engine starts; some minutes each. The same command resumes it.
    """
    names = names_of("--sections", sections, FAMILY)
    at_least_one("--seeds", seeds)
    from gvpo_ray.bench.experiments import family

    family.main(names, seeds, Path(out).absolute())
