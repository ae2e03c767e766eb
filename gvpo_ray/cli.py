"""The command line: each verb is one function call. `gvpo-ray VERB --help` teaches it."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import Any

from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.plan import cluster_address
from gvpo_ray.config.run import GVPOConfig, verifiers_config

EXAMPLE = "example: gvpo-ray {} jobs/quickstart.yaml seed=1 learner.num_workers=1"


def train(config: GVPOConfig, groups_file: str | None = None) -> None:
    """Train (or resume) a run; with `groups_file`, on recorded groups alone."""
    from gvpo_ray.observe.console import RunConsole
    from gvpo_ray.run.algorithm import GVPO

    with GVPO(config, groups_file=groups_file) as algo:
        with RunConsole(config, algo.step, algo.num_steps) as console:
            algo.say = console.say
            for text in algo.story():
                console.say(text)
            console.evaluated({key: value for line in algo.metrics.lines for key, value in line.items()})
            while not algo.done:
                console.step(algo.train())
            if algo.evaluation_due:
                console.evaluated(algo.evaluate())
        console.summary(algo.run_dir, algo.metrics)


def evaluate(config: GVPOConfig, checkpoint: str | None = None, out: str | None = None) -> None:
    """Evaluate a model or a checkpoint; go on where the folder stands."""
    from gvpo_ray.evaluation import run as evaluation
    from gvpo_ray.evaluation.folder import results_table

    result = evaluation.evaluate(config, checkpoint, out)
    _print_table(results_table(result), f"evaluation of {result['model']}")
    for name, values in result["sets"].items():
        if values["left_out"]:
            print(
                f"{name}: {values['left_out']} prompts are longer than the context allows: left out of "
                "every number"
            )
    if not result["num_sampled"]:
        print(f"{result['folder']} is complete: nothing was left to sample")
    print(f"wrote {result['folder']}: eval.json, generations.parquet")


def compare(a: str, b: str) -> None:
    """Paired differences of two finished evaluations."""
    from gvpo_ray.evaluation.compare import compare as paired
    from gvpo_ray.evaluation.compare import comparison_table

    result = paired(a, b)
    _print_table(comparison_table(result), f"A = {a}, B = {b}")
    for name, values in result.items():
        for note in values["notes"]:
            print(f"{name}: {note}")


def _print_table(table: Any, title: str) -> None:
    """In a log, where no window bounds them, lines are as long as they need to be."""
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(
            console.width, console.measure(table, options=console.options.update(max_width=1000)).maximum
        )
    console.print(title, soft_wrap=True, markup=False)
    console.print(table)


def check(config: GVPOConfig) -> None:
    """Print the resolved config and the resource plan; start nothing."""
    from rich.console import Console

    from gvpo_ray.observe.console import plan_table
    from gvpo_ray.run.inputs import check_paths, machine_resources

    print(config.dump())
    console = Console(highlight=False)
    console.print(plan_table(config))
    for note in check_paths(config):
        print(note)
    if cluster_address(config.ray) is None:
        cpus, gpus = machine_resources(config)
        print(
            f"this machine: {cpus:g} CPUs, {gpus:g} GPUs (a run that needs more is refused here; on a "
            "cluster it waits for the autoscaler)"
        )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="gvpo-ray",
        description="Post-train a language model with GVPO on Ray: sample groups (vLLM), verify them, "
        "learn, publish the weights, again.",
        epilog="A run is one YAML file plus key=value overrides. Start with jobs/quickstart.yaml. Exit "
        "status: 0 success, 1 the run failed, 2 a bad config, path, model or data file (one line says "
        "which), 130 interrupted (run it again to resume).",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, text: str, epilog: str | None = None) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=text, description=text, epilog=epilog or EXAMPLE.format(name))
        if name == "evaluate":  # --compare needs none
            sub.add_argument(
                "config",
                metavar="CONFIG",
                nargs="?",
                help="YAML file of the run, or of an evaluation alone (jobs/eval_paper.yaml)",
            )
        else:
            sub.add_argument("config", metavar="CONFIG", help="YAML file of the run")
        sub.add_argument(
            "overrides",
            metavar="key=value",
            nargs="*",
            help="override a key of the config, e.g. loss.beta=0.5",
        )
        return sub

    verb("train", "Train, or resume the run in run_dir: the same command goes on where it stopped.")
    rollout = verb(
        "rollout",
        "Sample and verify groups with the weights of model.path into an Arrow file; no learner.",
        "example: gvpo-ray rollout jobs/quickstart.yaml --out groups.arrow --groups 64",
    )
    rollout.add_argument("--out", required=True, metavar="FILE.arrow", help="the Arrow IPC file to write")
    rollout.add_argument(
        "--groups", type=int, metavar="N", help="number of groups (default: groups_per_step)"
    )
    learn = verb(
        "learn",
        "Train on recorded groups alone: no engines, no verifiers. On the log of a finished run it gives "
        "the same weights.",
        "example: gvpo-ray learn jobs/quickstart.yaml --groups runs/quickstart/groups run_dir=runs/replay",
    )
    learn.add_argument(
        "--groups", required=True, metavar="FILE.arrow", help="an Arrow file, or the groups/ folder of a run"
    )
    evaluate = verb(
        "evaluate",
        "Sample a model on the prompt files in evaluation.sets and report pass@1, mean@n and pass@k with 95 "
        "%% intervals. Stopped, the same command goes on.",
        "example: gvpo-ray evaluate jobs/quickstart.yaml --checkpoint runs/quickstart · gvpo-ray evaluate "
        "jobs/eval_paper.yaml · gvpo-ray evaluate --compare runs/a/eval/step-80 runs/b/eval/step-80",
    )
    evaluate.add_argument(
        "--checkpoint",
        metavar="PATH",
        help="a run directory (its newest checkpoint) or a checkpoint; default: model.path",
    )
    evaluate.add_argument(
        "--out",
        metavar="DIR",
        help="where to: eval.json, generations.parquet; default: run_dir/eval/<model's folder; RUN-step-N "
        "of another run>",
    )
    evaluate.add_argument(
        "--compare",
        nargs=2,
        metavar=("RUN_A", "RUN_B"),
        help="paired differences of two finished evaluations; needs no CONFIG",
    )
    verb("check", "Print the resolved config and the resource plan; start nothing.")
    for name, text in (
        (
            "status",
            "Print what every stage of a run does or waits for now, and where the oldest prompt is; of one "
            "that stopped, what it last said.",
        ),
        (
            "report",
            "Write RUN_DIR/report.html: curves, recoveries, completions and the config of a run on one "
            "page that needs no network.",
        ),
    ):
        sub = verbs.add_parser(
            name, help=text, description=text, epilog=f"example: gvpo-ray {name} runs/quickstart"
        )
        sub.add_argument("run_dir", metavar="RUN_DIR", help="run_dir of the run")
        sub.set_defaults(overrides=[])
    sub.add_argument(
        "--compare",
        metavar="OTHER_RUN_DIR",
        help="two runs in the same charts, and where their configs differ: RUN_DIR/compare.html",
    )
    verify = verbs.add_parser(
        "verify",
        help="Score a file of responses, as the verifiers of a run would, and compare with labels.",
        description="Score every row of INPUT: adds reward, verdict (correct, incorrect, unverifiable), "
        "reason and seconds, in the rows' order. Rows hold response (or prediction) and gold (or answer); "
        "prompt, finish_reason and other columns go to the reward functions; with expected or label_correct "
        "it prints the agreement, false negatives and false positives. Stopped, the same command goes on.",
        epilog="example: gvpo-ray verify answers.jsonl --out scored.jsonl timeout_s=3 'rewards={math: 1, "
        "my_rewards.py:brevity: 0.1}'",
    )
    verify.add_argument("input", metavar="INPUT", help="a .jsonl or .parquet file")
    verify.add_argument("--out", required=True, metavar="OUT", help="the .jsonl or .parquet file to write")
    verify.add_argument(
        "--workers", type=int, metavar="N", help="checks at a time (default: the CPUs of this machine)"
    )
    verify.add_argument(
        "overrides",
        metavar="key=value",
        nargs="*",
        help="keys of a config's verifiers section, e.g. timeout_s=3",
    )
    bench = verbs.add_parser(
        "bench",
        help="Run a benchmark; it prints a table.",
        epilog="example: gvpo-ray bench ring jobs/quickstart.yaml · gvpo-ray bench verifiers answers.jsonl "
        "· gvpo-ray bench learner",
    )
    benches = bench.add_subparsers(dest="name", required=True, metavar="NAME")

    def benchmark(name: str, text: str, example: str = "") -> argparse.ArgumentParser:
        description = f"{text[0].upper()}{text[1:]}."
        return benches.add_parser(
            name,
            help=text,
            description=description,
            epilog=f"example: gvpo-ray bench {name} {example}".rstrip(),
        )

    ring = benchmark(
        "ring",
        "how fast the parts of one run are, from its command to its last step",
        "jobs/quickstart.yaml num_steps=20",
    )
    verifiers = benchmark(
        "verifiers",
        "checks per second beside plain math-verify on the same rows, and what poisonous rows cost",
        "answers.jsonl",
    )
    verifiers.add_argument("input", metavar="INPUT", help="a .jsonl file with response and gold in each row")
    verifiers.add_argument(
        "--rows",
        type=int,
        default=2000,
        metavar="N",
        help="rows, spread evenly over the file (default: 2000)",
    )
    learner = benchmark(
        "learner",
        "a step beside a padded transformers loop and TRL's log-probs: speed, share of peak, memory",
    )
    learner.add_argument(
        "--tokens",
        type=int,
        default=4096,
        metavar="N",
        help="tokens of one step, a shared prompt once (default: 4096)",
    )
    what = (
        "a real run whose processes are killed at random moments; checks that nothing was lost or done twice"
    )
    chaos = benchmark("chaos", what, "jobs/quickstart.yaml --kills 7")
    for sub in (ring, chaos):
        sub.add_argument(
            "config", metavar="CONFIG", help="YAML file of the run; it goes to a folder of its own"
        )
        sub.add_argument(
            "overrides",
            metavar="key=value",
            nargs="*",
            help="override a key of the config, e.g. num_steps=20",
        )
    chaos.add_argument(
        "--kills",
        type=int,
        default=12,
        metavar="N",
        help="processes to kill, each kind in turn (default: 12)",
    )
    chaos.add_argument("--seed", type=int, default=0, metavar="N", help="of the schedule (default: 0)")
    scale = benchmark(
        "scale",
        "the ring with fake engines, from 1 to 256 of them: groups per second, driver CPU, recovery times",
        "--engines 8 64",
    )
    scale.add_argument(
        "--engines",
        type=int,
        nargs="+",
        default=[1, 8, 32, 128, 256],
        metavar="N",
        help="sizes of fleets (default: 1 8 32 128 256)",
    )
    scale.add_argument(
        "--seconds", type=float, default=30.0, metavar="S", help="measured for each (default: 30)"
    )
    paper = benchmark(
        "paper",
        "the paper's table and figures in miniature: methods, beta, k, history (hours; resumes)",
        "--tasks arithmetic",
    )
    staleness = benchmark(
        "staleness",
        "what each objective learns from data of a given age (hours; resumes)",
        "--tasks arithmetic --seeds 1",
    )
    for sub in (paper, staleness):
        tasks = ["arithmetic", "chain", "sort"]
        sub.add_argument(
            "--tasks",
            nargs="+",
            choices=tasks,
            default=tasks,
            metavar="TASK",
            help=f"{', '.join(tasks)} (default: all)",
        )
        sub.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each cell (default: 3)")
        where = (
            "runs, results.parquet, tables and pictures, of both benches; processes that share it "
            "share the work (default: runs/bench)"
        )
        sub.add_argument("--out", metavar="DIR", help=where)
    for sub in (verifiers, learner, scale, paper, staleness):
        sub.set_defaults(overrides=[])
    options, rest = parser.parse_known_args(arguments)
    if wrong := [text for text in rest if text.startswith("-") or "=" not in text]:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    options.overrides += rest  # argparse takes overrides before an option, and leaves those after it

    # `ray job stop` and Kubernetes end a run as Ctrl-C does; a shell's `&` has it ignored
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        run(options)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        resumes = options.verb in ("train", "learn", "evaluate", "verify") or (
            options.verb == "bench" and options.name in ("paper", "staleness")
        )
        print("interrupted" + ("; the same command resumes the run" if resumes else ""), file=sys.stderr)
        return 130
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        from gvpo_ray.actors import RunError
        from gvpo_ray.sandbox.process import SandboxError
        from gvpo_ray.verifiers.verifier import RewardError

        if not isinstance(error, (RunError, RewardError, SandboxError)):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def run(options: Any) -> None:
    """One verb, one call."""
    if options.verb == "status":
        from gvpo_ray.observe.status import read_status

        print("\n".join(read_status(options.run_dir)))
        return
    if options.verb == "report":
        from gvpo_ray.observe.report import page as report

        print(f"wrote {report.write(options.run_dir, options.compare)}")
        return
    if options.verb == "verify":
        from gvpo_ray.verifiers import score_file as verify

        if options.workers is not None and options.workers < 1:
            raise ConfigError(f"--workers: {options.workers}: must be at least 1")
        verify.main(options.input, options.out, verifiers_config(options.overrides), options.workers)
        return
    if options.verb == "bench" and options.name == "verifiers":
        from gvpo_ray.bench import verifiers

        verifiers.main(options.input, options.rows)
        return
    if options.verb == "bench" and options.name == "learner":
        from gvpo_ray.bench import learner

        learner.main(options.tokens)
        return
    if options.verb == "bench" and options.name == "scale":
        from gvpo_ray.bench import scale

        scale.main(options.engines, options.seconds)
        return
    if options.verb == "bench" and options.name in ("paper", "staleness"):
        if options.seeds < 1:
            raise ConfigError(f"--seeds: {options.seeds}: must be at least 1")
        from gvpo_ray.bench.experiments import paper, staleness

        {"paper": paper, "staleness": staleness}[options.name].main(
            options.tasks, options.seeds, Path(options.out or "runs/bench").absolute()
        )
        return
    if options.verb == "bench" and options.name == "chaos":
        from gvpo_ray.actors import RunError
        from gvpo_ray.bench import chaos

        if wrong := chaos.main(options.config, options.overrides, options.kills, options.seed):
            raise RunError(f"{wrong} things went wrong")
        return
    if options.verb == "evaluate" and options.compare:
        if options.config or options.overrides or options.checkpoint or options.out:
            raise ConfigError("--compare takes two finished evaluations and nothing else")
        compare(*options.compare)
        return
    if options.config is None:
        raise ConfigError("evaluate: CONFIG is missing (or --compare RUN_A RUN_B)")
    config = GVPOConfig.from_file(
        options.config, options.overrides, for_evaluation=options.verb in ("evaluate", "check")
    )
    match options.verb:
        case "evaluate":
            evaluate(config, options.checkpoint, options.out)
        case "train":
            train(config)
        case "learn":
            train(config, groups_file=options.groups)
        case "check":
            check(config)
        case "rollout":
            from gvpo_ray.run.once import rollout

            rollout(config, options.out, options.groups)
            print(f"wrote {options.out}")
        case "bench":
            from gvpo_ray.bench import ring

            ring.main(config)
