"""The verbs about runs, evaluations and files of responses are defined here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from gvpo_ray.cli.app import Config, Overrides, at_least_one, print_table, read_config, verb

if TYPE_CHECKING:
    from gvpo_ray.config.run import GVPOConfig

RunDir = Annotated[str, typer.Argument(metavar="RUN_DIR", help="run_dir of the run")]


@verb("train jobs/quickstart.yaml seed=1 learner.num_workers=1")
def train(config: Config, overrides: Overrides = None) -> None:
    """Train, or resume the run in run_dir.

    The same command resumes a run that stopped. Where the config has a section warm_start, data and model are
    made first.
    """
    read = read_config(config, overrides)
    if read.warm_start is not None:
        _warm_start(read)
    _train(read)


@verb("rollout jobs/quickstart.yaml --out groups.arrow --groups 64")
def rollout(
    config: Config,
    out: Annotated[str, typer.Option(metavar="FILE.arrow", help="the Arrow IPC file to write")],
    overrides: Overrides = None,
    groups: Annotated[
        int | None, typer.Option(metavar="N", help="number of groups (default: groups_per_step)")
    ] = None,
) -> None:
    """Sample and verify groups into an Arrow file; no learner.

    The weights are those of model.path.
    """
    read = read_config(config, overrides)
    from gvpo_ray.run import once

    once.rollout(read, out, groups)
    print(f"wrote {out}")


@verb("learn jobs/quickstart.yaml --groups runs/quickstart/groups run_dir=runs/replay")
def learn(
    config: Config,
    groups: Annotated[
        str, typer.Option(metavar="FILE.arrow", help="an Arrow file, or the groups/ folder of a run")
    ],
    overrides: Overrides = None,
) -> None:
    """Train on recorded groups alone: no engines, no verifiers.

    On the log of a finished run it gives the same weights.
    """
    _train(read_config(config, overrides), groups_file=groups)


@verb("evaluate jobs/quickstart.yaml --checkpoint runs/quickstart")
def evaluate(
    config: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG", help="YAML file of the run, or of an evaluation alone (jobs/eval_paper.yaml)"
        ),
    ],
    overrides: Overrides = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="a run directory (its newest checkpoint) or a checkpoint; default: model.path",
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="folder of eval.json and generations.parquet; default: run_dir/eval/ and the name of the "
            "model's folder, or RUN-step-N for the checkpoint of another run",
        ),
    ] = None,
) -> None:
    """Sample a model on evaluation.sets and report its scores.

    The scores are pass@1, mean@n and pass@k with 95 % intervals. The same command resumes an evaluation that
    stopped.
    """
    read = read_config(config, overrides, for_evaluation=True)
    from gvpo_ray.evaluation import run as evaluation
    from gvpo_ray.evaluation.folder import results_table

    result = evaluation.evaluate(read, checkpoint, out)
    print_table(results_table(result), f"evaluation of {result['model']}")
    for name, values in result["sets"].items():
        if values["left_out"]:
            print(
                f"{name}: {values['left_out']} prompts are longer than the context allows: left out of "
                "every number"
            )
    if not result["num_sampled"]:
        print(f"{result['folder']} is complete: nothing was left to sample")
    print(f"wrote {result['folder']}: eval.json, generations.parquet")


@verb("compare runs/a/eval/step-80 runs/b/eval/step-80")
def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="folder of a finished evaluation")],
    b: Annotated[str, typer.Argument(metavar="B", help="folder of another one")],
) -> None:
    """Print paired differences of two finished evaluations.

    For each set: the mean difference over the prompts that both have, with its 95 % interval.
    """
    from gvpo_ray.evaluation.compare import compare as paired
    from gvpo_ray.evaluation.compare import comparison_table

    result = paired(a, b)
    print_table(comparison_table(result), f"A = {a}, B = {b}")
    for name, values in result.items():
        for note in values["notes"]:
            print(f"{name}: {note}")


@verb("export runs/quickstart --out models/arithmetic")
def export(
    run_dir: RunDir,
    out: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="the folder to make (default: RUN_DIR/export/step-N)"),
    ] = None,
    step: Annotated[
        int | None, typer.Option(metavar="N", help="step of the checkpoint (default: the newest)")
    ] = None,
) -> None:
    """Write the model of a run's checkpoint into a folder.

    It is a Hugging Face folder in the model's dtype, without the optimizer; that of a run with an adapter is
    the merged model, with the adapter in adapter/. Neither Ray nor a GPU is needed, and the run may go on.
    """
    from gvpo_ray.config.run import GVPOConfig
    from gvpo_ray.learner.export import export_model
    from gvpo_ray.run.run_dir import check_format

    check_format(run_dir)
    config = GVPOConfig.from_file(f"{run_dir}/config.yaml")
    print(f"wrote {export_model(run_dir, config.model, step, out)}")


@verb("check jobs/quickstart.yaml seed=1 learner.num_workers=1")
def check(
    config: Config,
    overrides: Overrides = None,
    sample: Annotated[
        int | None,
        typer.Option(metavar="N", help="sample and verify N prompts with one engine, and show everything"),
    ] = None,
) -> None:
    """Print resolved config, plan and data; start nothing.

    The first prompt is shown as the model sees it, special tokens included. What `train` would refuse here is
    refused in the same words, this machine last: it may be too small for a run that is meant for another one.
    With --sample, one engine and one verifier show N prompts, what the model writes, the rewards and their
    reasons, and how much is cut off: look at this before you train.
    """
    at_least_one("--sample", sample)
    read = read_config(config, overrides, for_evaluation=True)
    from rich.console import Console

    from gvpo_ray.config.data import NO_PROMPTS
    from gvpo_ray.config.memory import memory_plan
    from gvpo_ray.config.plan import cluster_address, engine_layouts
    from gvpo_ray.config.shown import visible
    from gvpo_ray.observe.console import plan_table
    from gvpo_ray.observe.trackers import check_trackers
    from gvpo_ray.run.inputs import check_paths, machine_resources
    from gvpo_ray.run.machine import check_machine, gpu_gb_here

    print(visible(read.dump(with_secrets=False)))
    Console(highlight=False).print(plan_table(read))
    for line in engine_layouts(read):
        print(visible(line))
    for line, _ in memory_plan(read, gpu_gb_here(read)):
        print(visible(line))
    for note in check_paths(read):
        print(visible(note))
    if cluster_address(read.ray) is None:
        cpus, gpus = machine_resources(read)
        print(
            f"this machine: {cpus:g} CPUs, {gpus:g} GPUs (a run that needs more is refused here; on a "
            "cluster it waits for the autoscaler)"
        )
    if sample is not None:
        from gvpo_ray.run import once

        for line in once.sample(read, sample):
            print(visible(line))
    trains = read.prompts.path != NO_PROMPTS or bool(read.sources)
    if trains:
        check_trackers(read.tracking)
    check_machine(read, learner=trains)


@verb("warm-start jobs/quickstart.yaml")
def warm_start(config: Config, overrides: Overrides = None) -> None:
    """Make model.path from scratch, by supervised learning.

    The config's section warm_start says how. Data and model that are there already stay as they are.
    """
    _warm_start(read_config(config, overrides))


@verb("jobs")
def jobs() -> None:
    """Print the jobs that come with this package.

    Each is a config; every command takes its name for CONFIG. Copy one from the folder to change it.
    """
    from gvpo_ray.config.loading import packaged_jobs

    files = packaged_jobs()
    for name, path in files.items():
        first, *_ = path.read_text(encoding="utf-8").splitlines()
        print(f"{name}: {first.partition(':')[0].strip('# .')}")
    print(f"in {next(iter(files.values())).parent}")


@verb("score poft.yaml --out scored.jsonl")
def score(
    config: Config,
    out: Annotated[str, typer.Option(metavar="FILE", help="the .jsonl or .parquet file to write")],
    overrides: Overrides = None,
) -> None:
    """Score a source with PoFT's aligned models, once.

    FILE has the source's rows with the column aligned_logps: the mean log-prob per token by name of a model
    of loss.aligned. Then train with sources.NAME.path=FILE. Rows that a model cannot score are left out.
    """
    read = read_config(config, overrides)
    from gvpo_ray.config.shown import visible
    from gvpo_ray.run import score as scoring

    for line in scoring.score(read, out):
        print(visible(line), flush=True)


@verb("status runs/quickstart")
def status(run_dir: RunDir) -> None:
    """Print what every stage of a run does or waits for now.

    It also says where the oldest group is. For a run that stopped, it prints the last status.
    """
    from gvpo_ray.config.shown import visible
    from gvpo_ray.observe.status import read_status

    print(visible("\n".join(read_status(run_dir))))


@verb("report runs/quickstart")
def report(
    run_dir: RunDir,
    compare: Annotated[
        str | None,
        typer.Option(
            metavar="OTHER_RUN_DIR",
            help="two runs in the same charts, and where their configs differ: RUN_DIR/compare.html",
        ),
    ] = None,
) -> None:
    """Write RUN_DIR/report.html, a page about a run.

    It shows curves, recoveries, completions and the config of the run, and needs no network.
    """
    from gvpo_ray.observe.report import page

    print(f"wrote {page.write(run_dir, compare)}")


@verb("verify answers.jsonl --out scored.jsonl timeout_s=3 'rewards={math: 1, my_rewards.py:brevity: 0.1}'")
def verify(
    input: Annotated[
        str, typer.Argument(metavar="INPUT", help="a .jsonl, .json, .parquet or .csv file of responses")
    ],
    out: Annotated[str, typer.Option(metavar="OUT", help="the .jsonl or .parquet file to write")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="key=value", help="keys of a config's verifiers section, e.g. timeout_s=3"),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(metavar="N", help="checks at a time (default: the CPUs of this machine)")
    ] = None,
    response_column: Annotated[
        str | None, typer.Option(metavar="PATH", help="column of the response, or a path into it")
    ] = None,
    gold_column: Annotated[
        str | None, typer.Option(metavar="PATH", help="column of the gold answer, such as reward_model.gold")
    ] = None,
) -> None:
    """Score a file of responses as the verifiers of a run would.

    Each row of INPUT gets a reward, verdict (correct, incorrect, unverifiable), reason and seconds, in the
    rows' order. Rows hold a response and a gold answer, under the names of this or other systems (response,
    prediction, output, ...; gold, answer, ground_truth, ...) or those of the options; a list of messages is a
    response too. All other columns go to the reward functions. With expected or label_correct, the agreement
    with these labels is printed, and false negatives and false positives. The same command goes on where it
    stopped.
    """
    at_least_one("--workers", workers)
    from gvpo_ray.config.run import verifiers_config

    config = verifiers_config(overrides or [])
    from gvpo_ray.verifiers import score_file

    score_file.main(input, out, config, workers, response_column, gold_column)


def _warm_start(config: GVPOConfig) -> None:
    from gvpo_ray.learner.warm_start import warm_start  # torch: not for a message about the config

    warm_start(config)


def _train(config: GVPOConfig, groups_file: str | None = None) -> None:
    from gvpo_ray.observe.console import RunConsole
    from gvpo_ray.run.algorithm import GVPO

    with GVPO(config, groups_file=groups_file) as algo:
        with RunConsole(config, algo.step, algo.num_steps) as console:
            algo.say = console.say
            for text in algo.startup_summary():
                console.say(text)
            console.evaluated({key: value for line in algo.metrics.lines for key, value in line.items()})
            while not algo.done:
                console.step(algo.train())
            if algo.evaluation_due:
                console.evaluated(algo.evaluate())
        console.summary(algo.run_dir, algo.metrics)
