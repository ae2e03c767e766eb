"""The documentation: its site builds without a warning, and its pages hold every key and every command."""

from __future__ import annotations

import html
import re
import subprocess
import sys
from pathlib import Path

import pytest

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
    from gvpo_ray.config.base import walk
    from gvpo_ray.config.run import GVPOConfig

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
