"""The documentation: its site builds without a warning, and every key, command and example in it holds.

Commands are read and checked here, and not run: a long one would take hours. What a reader cannot run on two
CPU cores with this project alone has a comment `<!-- needs: … -->` before its block.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import html
import re
import runpy
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import typer
import yaml

from gvpo_ray import cli
from gvpo_ray.config.base import TASKSET, walk
from gvpo_ray.config.learner import LearnerConfig
from gvpo_ray.config.loading import packaged_jobs
from gvpo_ray.config.plan import resource_plan
from gvpo_ray.config.run import GVPOConfig, verifiers_config
from gvpo_ray.losses.registry import OBJECTIVES

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as `mkdocs build --strict` makes it: a link to nothing, or a page without a place, fails."""
    folder = tmp_path_factory.mktemp("site")
    command = ["-m", "mkdocs", "build", "--strict", "-f", ROOT / "docs" / "mkdocs.yml", "-d", folder]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return folder


def text_of(page: Path) -> str:
    return html.unescape(re.sub(r"<[^>]*>", "", page.read_text()))


def test_the_reference_has_every_key_of_the_config(site: Path) -> None:
    page = text_of(site / "reference" / "config.html")
    named = r"^(evaluation\.sets|verifiers\.rewards)\.\w+"  # their entries have names of the user's
    config = GVPOConfig.from_file(ROOT / "jobs" / "quickstart.yaml")
    keys = {re.sub(named, r"\1.NAME", key) for key, *_ in walk(config)}
    keys = {key for key in keys if not key.startswith("warm_start.data.")}
    assert {"loss.beta", "evaluation.sets.NAME.num_samples", "verifiers.rewards.NAME.url"} <= keys
    missing = [key for key in keys if not re.search(rf"(?<![\w.]){re.escape(key)}(?![\w.])", page)]
    assert missing == []
    assert "Its keys are those of prompts." in page  # warm_start.data


def test_the_reference_has_every_command_with_its_options(site: Path) -> None:
    page = text_of(site / "reference" / "commands.html")
    for words in (
        "gvpo-ray train",
        "gvpo-ray bench staleness",
        "--checkpoint PATH",
        "example",
        "--gold-column",
    ):
        assert words.lower() in page.lower()


def test_the_reference_has_every_metric_with_its_name_in_prometheus(site: Path) -> None:
    from gvpo_ray.observe.metrics import METRICS

    page = text_of(site / "reference" / "metrics.html")
    names = [metric.name for metric in METRICS if " / " not in metric.name]
    assert [name for name in names if name not in page] == []
    assert "ray_gvpo_eval_pass_ratio{set, k}" in page


def test_the_site_says_what_commands_need_and_shows_what_is_outside_its_folder(site: Path) -> None:
    assert "Needs GPUs:" in text_of(site / "guides" / "first-run.html")
    assert (
        'href="guides/first-run.html"' in (site / "index.html").read_text()
    )  # README.md: docs/guides/first-run.md
    examples = (site / "examples.html").read_text()  # jobs/README.md
    assert "<p>The others need data" in examples and 'href="quickstart.yaml"' not in examples


def test_every_job_has_a_row_in_the_table_and_a_section_and_the_curves_are_there() -> None:
    text = (ROOT / "jobs" / "README.md").read_text()
    jobs = [path.stem for path in (ROOT / "jobs").glob("*.yaml")]
    assert len(jobs) > 8
    rows = re.findall(r"^\| \[(\w[\w.]*?)\.(?:yaml|py)\]\(.*\|$", text, re.MULTILINE)
    heads = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert heads == [row for row in rows if row in heads] and {*jobs} <= {*heads}
    assert all((ROOT / "jobs" / path).is_file() for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text))


# ------------------------------------------------------------------------------------------------ the pages


class Block(NamedTuple):
    """A fenced block of a page."""

    page: Path
    needs: str | None
    """What a reader must have to run it, as the comment before it says."""
    language: str
    title: str | None
    text: str


FENCE = re.compile(
    r"(?:^<!-- needs: (?P<needs>[^>]+) -->\n)?^```(?P<language>\w+)(?: title=\"(?P<title>[^\"]+)\")?\n"
    r"(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


def blocks_of(page: Path) -> list[Block]:
    return [
        Block(page, *match.group("needs", "language", "title", "text"))
        for match in FENCE.finditer(page.read_text())
    ]


PAGES = [
    ROOT / "README.md",
    ROOT / "jobs" / "README.md",
    *(page for page in sorted((ROOT / "docs").rglob("*.md")) if page.parent.name != "changes"),
]
BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def of(language: str) -> list[Any]:
    return [
        pytest.param(block, id=f"{block.page.relative_to(ROOT)}-{i}")
        for i, block in enumerate(BLOCKS)
        if block.language == language
    ]


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command of a shell block, without comments; `&&` and `&` part two of them."""
    for line in text.replace("\\\n", " ").splitlines():
        words: list[str] = []
        for word in [*shlex.split(line, comments=True), "&&"]:
            if word not in ("&&", "&"):
                words.append(word)
            elif words:
                yield words
                words = []


def parsed(arguments: list[str]) -> tuple[str, dict[str, Any]]:
    """The verb of a command line and its parameters, as typer reads them; nothing is run."""
    command: Any = typer.main.get_command(cli.app)
    name, parent = "gvpo-ray", None
    while hasattr(command, "resolve_command"):
        parent = typer.Context(command, info_name=name, parent=parent)
        name, command, arguments = command.resolve_command(parent, arguments)
    return name, command.make_context(name, list(arguments), parent=parent).params


def config_of(path: str, overrides: list[str], page: Path, is_evaluation: bool = False) -> GVPOConfig:
    """The config of a command: a file of the project, or one that the page shows under this title."""
    path = path.removeprefix("/opt/gvpo-ray/")  # where the images have the project
    shown = [block.text for block in blocks_of(page) if block.title == path]
    if shown:
        return GVPOConfig.from_dict(yaml.safe_load(shown[0]), overrides)
    is_name = path in packaged_jobs()
    return GVPOConfig.from_file(path if is_name else ROOT / path, overrides, is_evaluation)


def data_of(config: GVPOConfig) -> set[Path]:
    """The files of data that a run with a warm start reads."""
    start = config.warm_start
    named = [config.prompts.path, *(each.path for each in config.evaluation.sets.values())]
    named += [start.data.path] if start is not None and start.data is not None else []
    given = [path for each in named for path in ([each] if isinstance(each, str) else each)]
    return {Path(path) for path in given if not (path.startswith(TASKSET) and path.endswith(".py"))}


@functools.cache
def made_by_tools_cpu() -> set[Path]:
    """The files that jobs/tools_cpu.py writes, by the paths that it writes them to."""
    main = runpy.run_path(str(ROOT / "jobs" / "tools_cpu.py"))["main"]
    (folder,) = main.__defaults__
    with tempfile.TemporaryDirectory() as elsewhere, contextlib.redirect_stdout(None):
        main(Path(elsewhere))
        return {folder / path.relative_to(elsewhere) for path in Path(elsewhere).rglob("*") if path.is_file()}


class NotHere(Exception):
    """A command needs more than two CPU cores and this project."""


def check(words: list[str], page: Path) -> None:
    """Check a command of a page; what it asks for has to exist.

    Raises:
        NotHere: it is right, and a reader needs more for it.
    """
    config = None
    match words:
        case ["gvpo-ray", *arguments]:
            verb, given = parsed(arguments)
            overrides = given.get("overrides") or []
            if verb == "verify":
                verifiers_config(overrides)
                if not (ROOT / given["input"]).is_file():
                    raise NotHere
            if "config" in given:
                config = config_of(given["config"], overrides, page, verb in ("evaluate", "check"))
        case ["./jobs/quickstart.sh", *overrides]:
            config = config_of("jobs/quickstart.yaml", overrides, page)
        case ["python", "jobs/gvpo_in_one_file.py"]:
            pass
        case ["python", "jobs/tools_cpu.py" | "jobs/family_cpu.py" | "jobs/smollm2_tools_cpu.py"]:
            pass
        case ["python", script, path, *overrides]:
            assert (ROOT / script.removeprefix("/opt/gvpo-ray/")).is_file(), script
            config = config_of(path, overrides, page, script.endswith("evaluate.py"))
        case ["ray", "job", "submit", *options] if "--" in options:
            words = options[options.index("--") + 1 :]
            check(words, page)
            if words[1].startswith("/opt/"):
                raise NotHere
        case ["mkdocs", *options]:
            assert (ROOT / options[options.index("-f") + 1]).is_file()
        case ["./tests/run.sh"] | ["./tests/run.sh", "unit"] | ["./tests/run.sh", "-k", _]:
            pass
        case ["./cluster/local.sh"] | ["source", "runs/cluster/env"] | ["ray", "job", "stop", _]:
            pass
        case ["./jobs/setup.sh", "cuda"] | ["pip", "install" | "uninstall", *_]:
            raise NotHere
        case ["docker" | "kubectl" | "$EDITOR" | "export" | "ray", *arguments]:
            for word in arguments:
                assert not word.startswith("cluster/") or (ROOT / word).exists(), word
            raise NotHere
        case _:
            pytest.fail(f"nobody knows the command {shlex.join(words)}")
    if config is not None:
        start = config.warm_start
        is_made = start is not None and (start.task is not None or data_of(config) <= made_by_tools_cpu())
        if not is_made or any(gpus for *_, gpus in resource_plan(config)):
            raise NotHere


@pytest.mark.parametrize("block", of("bash"))
def test_every_command_is_right_and_says_what_it_needs_beyond_two_cores(block: Block) -> None:
    needs_more = []
    for words in commands(block.text):
        try:
            check(words, block.page)
        except NotHere:
            needs_more.append(words)
    assert bool(needs_more) == bool(block.needs), needs_more


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("gvpo-ray trian jobs/quickstart.yaml", "No such command"),
        ("gvpo-ray train jobs/quickstart.yaml --nope", "No such option"),
        ("gvpo-ray train jobs/nowhere.yaml", "No such file"),
        ("gvpo-ray train jobs/quickstart.yaml learner.lerning_rate=1", "did you mean learner.learning_rate"),
        ("ray job submit -- python jobs/train.py jobs/quickstart.yaml sed=1", "did you mean seed"),
        ("gvpo-ray verify a.jsonl --out b.jsonl timeout=3", "did you mean"),
        ("make all", "nobody knows"),
    ],
)
def test_a_wrong_command_in_a_page_would_be_found(line: str, complaint: str) -> None:
    (words,) = commands(line)
    with pytest.raises((Exception, pytest.fail.Exception), match=complaint):
        check(words, ROOT / "README.md")


def test_a_command_that_needs_a_gpu_is_known_by_its_plan() -> None:
    with pytest.raises(NotHere):
        check(["gvpo-ray", "train", "jobs/qwen2.5_math_1.5b_1gpu.yaml"], ROOT / "README.md")
    check(["gvpo-ray", "train", "jobs/quickstart.yaml"], ROOT / "README.md")


def test_a_job_whose_data_no_script_makes_is_known_by_their_paths() -> None:
    job = ["gvpo-ray", "train", "jobs/tools_cpu.yaml"]
    check(job, ROOT / "README.md")
    for other in (
        "prompts.path=runs/tools/data/own.parquet",
        "warm_start.data.path=runs/other/data/worked.parquet",
        "evaluation.sets.heldout.path=runs/tools/data/test.parquet",
    ):
        with pytest.raises(NotHere):
            check([*job, other], ROOT / "README.md")


def test_a_job_uploads_the_code_and_the_jobs_alone() -> None:
    rules = [line for name in (".rayignore", ".gitignore") for line in (ROOT / name).read_text().splitlines()]
    left_out = {rule.strip("/") for rule in rules}
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and path.name[0] != "."}
    uploaded = {name for name in folders - left_out if not name.endswith(".egg-info")}
    assert uploaded == {"gvpo_ray", "jobs"}


@pytest.mark.parametrize("block", of("yaml"))
def test_every_piece_of_config_is_one(block: Block) -> None:
    piece = yaml.safe_load(block.text)
    rest = {} if block.title else yaml.safe_load((ROOT / "jobs" / "quickstart.yaml").read_text())
    GVPOConfig.from_dict(rest | piece)


@pytest.mark.parametrize("block", of("python"))
def test_every_piece_of_python_compiles_and_imports_what_is_there(block: Block) -> None:
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("gvpo_ray"):
            for name in node.names:
                exec(f"from {node.module} import {name.name}", {})


def test_the_tree_names_every_module_in_its_room_and_the_table_every_job() -> None:
    tree = (ROOT / "docs" / "CONTRIBUTING.md").read_text().partition("## The tree")[2].split("```")[1]
    _, *parts = re.split(r"^  (\w+)/ ", tree, flags=re.MULTILINE)
    rooms = dict(zip(parts[::2], parts[1::2], strict=True))
    package = ROOT / "gvpo_ray"
    missing = []
    for path in sorted(package.rglob("*.py")):
        room = path.relative_to(package).parts[0]
        named = re.findall(r"\w+\.py", rooms[room] if path.parent != package else tree)
        missing += [path] if path.name[0] != "_" and path.name not in named else []
    assert missing == []
    table = (ROOT / "jobs" / "README.md").read_text()
    jobs = {path.name for path in (ROOT / "jobs").iterdir()} - {"README.md", "__pycache__"}
    assert [name for name in sorted(jobs) if f"]({name})" not in table] == []


# -------------------------------------------------------------------------------------------- the examples


def example(page: str, title: str) -> dict[str, Any]:
    """What a page's block with this title defines."""
    (block,) = (block for block in blocks_of(ROOT / "docs" / page) if block.title == title)
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(block.text, title, "exec"), names)
    return names


def test_the_rewards_of_the_pages_give_what_they_say() -> None:
    brevity = example("guides/rewards.md", "my_rewards.py")["brevity"]
    assert brevity(["p"] * 3, ["one", "one\ntwo", "1\n2\n3\n4\n"]) == [1, 1 / 2, 1 / 4]
    last = example("guides/extending.md", "my_rewards.py")["ends_with_a_number"]
    assert last(["p"] * 3, ["is 7", "7 or 8", "none"], answer=["7", "7", "7"]) == [1.0, 0.0, None]


def test_the_page_of_the_algorithm_names_every_objective() -> None:
    page = (ROOT / "docs" / "concepts" / "algorithm.md").read_text()
    assert [name for name in OBJECTIVES if not re.search(rf"\b{name}\b", page)] == []


def test_the_objective_of_the_page_is_the_formula_in_its_docstring() -> None:
    loss = example("guides/extending.md", "gvpo_ray/losses/brief.py")["brief_loss"]
    logprobs = torch.tensor([-1.0, -2.0, -2.0, -1.0, -0.5], dtype=torch.float64, requires_grad=True)
    completions, groups = torch.tensor([0, 1, 1, 1, 1]), torch.tensor([0, 0])
    value, _ = loss(
        logprobs, logprobs.detach(), logprobs.detach(), completions, torch.tensor([1.0, 0.0]), groups
    )
    # -1/1 1/2 [ 1 (1 - 1/2) (-1) + 4^-1/2 (0 - 1/2) (-5.5) ]
    assert float(value.detach()) == pytest.approx(-0.5 * (-0.5 + 0.5 * 0.5 * 5.5))
    value.backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx([-0.25, 0.125, 0.125, 0.125, 0.125])


def test_the_backend_of_the_page_makes_a_step_of_sgd() -> None:
    backend = example("guides/extending.md", "gvpo_ray/learner/backends/sgd.py")["SGDBackend"]
    config = LearnerConfig(backend="ddp", learning_rate=0.5, max_grad_norm=100.0)
    this = backend(config, torch.float32, torch.device("cpu"))
    module = this.load(lambda: torch.nn.Linear(1, 1, bias=False))
    this.wrap(module)
    this.fill(module.weight, torch.tensor([[3.0]]))
    loss = this.forward({"input": torch.tensor([[2.0]])}, is_last=True).sum()  # 2 w
    this.backward(loss, is_last=True)
    assert this.step(0.5) == 2.0
    assert module.weight.item() == 3.0 - 0.5 * 2.0
    this.init_state(1)
    assert this.get_state(module.weight) == {"master": module.weight}
