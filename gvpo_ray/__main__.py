"""The command line: each verb is one function call. `gvpo-ray VERB --help` teaches it."""

from __future__ import annotations

import argparse
import signal
import sys
from typing import Any

from gvpo_ray.config import ConfigError, GVPOConfig, cluster_address

EXAMPLE = "example: gvpo-ray {} jobs/quickstart.yaml seed=1 learner.num_workers=1"


def train(config: GVPOConfig, groups_file: str | None = None) -> None:
    """Train (or resume) a run; with `groups_file`, on recorded groups alone."""
    from gvpo_ray.console import RunConsole
    from gvpo_ray.controller import GVPO

    with GVPO(config, groups_file=groups_file) as algo:
        with RunConsole(config, algo.step, algo.num_steps) as console:
            for text in algo.story():
                console.say(text)
            console.evaluated({key: value for line in algo.metrics.lines for key, value in line.items()})
            while not algo.done:
                console.step(algo.train())
            if algo.evaluation_due:
                console.evaluated(algo.evaluate())
        console.summary(algo.run_dir, algo.metrics)


def check(config: GVPOConfig) -> None:
    """Print the resolved config and the resource plan; start nothing."""
    from rich.console import Console

    from gvpo_ray.console import plan_table
    from gvpo_ray.controller import check_paths, machine_resources

    print(config.dump())
    console = Console(highlight=False)
    console.print(plan_table(config))
    for note in check_paths(config):
        print(note)
    if cluster_address(config.ray) is None:
        cpus, gpus = machine_resources(config)
        print(f"this machine: {cpus:g} CPUs, {gpus:g} GPUs (a run that needs more is refused here; on a cluster it waits for the autoscaler)")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="gvpo-ray",
        description="Post-train a language model with GVPO on Ray: sample groups (vLLM), verify them, learn, publish the weights, again.",
        epilog="A run is one YAML file plus key=value overrides. Start with jobs/quickstart.yaml. Exit status: 0 success, 1 the run failed, "
        "2 a bad config, path, model or data file (one line says which), 130 interrupted (run it again to resume).",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, text: str, epilog: str | None = None) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=text, description=text, epilog=epilog or EXAMPLE.format(name))
        sub.add_argument("config", metavar="CONFIG", help="YAML file of the run")
        sub.add_argument("overrides", metavar="key=value", nargs="*", help="override a key of the config, e.g. loss.beta=0.5")
        return sub

    verb("train", "Train, or resume the run in run_dir: the same command goes on where it stopped.")
    rollout = verb("rollout", "Sample and verify groups with the weights of model.path into an Arrow file; no learner.",
                   "example: gvpo-ray rollout jobs/quickstart.yaml --out groups.arrow --groups 64")  # fmt: skip
    rollout.add_argument("--out", required=True, metavar="FILE.arrow", help="the Arrow IPC file to write")
    rollout.add_argument("--groups", type=int, metavar="N", help="number of groups (default: groups_per_step)")
    learn = verb("learn", "Train on recorded groups alone: no engines, no verifiers. On the log of a finished run it gives the same weights.",
                 "example: gvpo-ray learn jobs/quickstart.yaml --groups runs/quickstart/groups run_dir=runs/replay")  # fmt: skip
    learn.add_argument("--groups", required=True, metavar="FILE.arrow", help="an Arrow file, or the groups/ folder of a run")
    verb("check", "Print the resolved config and the resource plan; start nothing.")
    bench = verbs.add_parser("bench", help="Run a benchmark; it prints a table.", epilog="example: gvpo-ray bench ring jobs/quickstart.yaml")
    bench.add_argument("name", choices=["ring"], help="ring: how fast the parts of one run are, from its command to its last step")
    bench.add_argument("config", metavar="CONFIG")
    bench.add_argument("overrides", metavar="key=value", nargs="*")
    options, rest = parser.parse_known_args(arguments)
    if wrong := [text for text in rest if text.startswith("-") or "=" not in text]:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    options.overrides += rest  # argparse takes overrides before an option, and leaves those after it

    for number in (signal.SIGINT, signal.SIGTERM):  # `ray job stop` and Kubernetes end a run as Ctrl-C does; a shell's `&` has it ignored
        signal.signal(number, signal.default_int_handler)
    try:
        run(options)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command resumes the run", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        from gvpo_ray.controller import RunError

        if not isinstance(error, RunError):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def run(options: Any) -> None:
    """One verb, one call."""
    config = GVPOConfig.from_file(options.config, options.overrides)
    match options.verb:
        case "train":
            train(config)
        case "learn":
            train(config, groups_file=options.groups)
        case "check":
            check(config)
        case "rollout":
            from gvpo_ray.controller import rollout

            rollout(config, options.out, options.groups)
            print(f"wrote {options.out}")
        case "bench":
            from gvpo_ray.bench import ring

            ring.main(config)


if __name__ == "__main__":
    sys.exit(main())
