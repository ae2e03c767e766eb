"""What a run shows: a secret is planted in every field of the config that may hold one, and looked for in
every output.
"""

from __future__ import annotations

import functools
import io
import json
import sys
import time
import types
import typing
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from pydantic import ValidationError
from rich.console import Console

from gvpo_ray import groups
from gvpo_ray.actors import cause_of
from gvpo_ray.cli import main
from gvpo_ray.config import shown
from gvpo_ray.config.base import LocalPath, Section
from gvpo_ray.config.loading import set_key
from gvpo_ray.config.run import GVPOConfig
from gvpo_ray.config.shown import MASK, hide, is_secret, know, mask, visible
from gvpo_ray.evaluation.folder import _settings
from gvpo_ray.observe.console import RunConsole
from gvpo_ray.observe.report import page
from gvpo_ray.observe.trackers import WandB, parameters_of
from gvpo_ray.run.events import EventLog
from gvpo_ray.verifiers.verifier import Verifier


def test_a_text_full_of_beginnings_of_urls_is_masked_in_linear_time() -> None:
    for part in ("://a:", "://a@", "a=b ", "--a ", "eyJ.", "?a="):
        begin = time.process_time()
        mask(part * 20_000)
        assert time.process_time() - begin < 5, part


@pytest.fixture(autouse=True)
def unknowing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Secrets that another test made known are known no more, nor are those of this one afterwards."""
    monkeypatch.setattr(shown, "_known", set())
    monkeypatch.setattr(shown, "_pattern", None)


MINIMAL: dict[str, Any] = {
    "run_dir": "run",
    "num_steps": 1,
    "model": {"path": "m"},
    "prompts": {"path": "p.jsonl"},
    "warm_start": {"data": {"path": "w.jsonl"}},
    "sources": {"people": {"path": "s.jsonl", "share": 0.5}},
    "evaluation": {"sets": {"held": {"path": "e.jsonl"}}},
    "verifiers": {"rewards": {"judge": {"url": "http://judge"}}},
    "engines": {"pools": {"own": {}, "served": {"url": "http://served/v1"}}},
    "tracking": {"tensorboard": {}, "wandb": {}, "mlflow": {}},
}
"""A config that has every section."""


def fields(section: Section, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of a config with the field's type, through sections and dictionaries of sections."""
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if not any(isinstance(mark, LocalPath) for mark in field.metadata):
            yield prefix + name, field.annotation
        children = value.items() if isinstance(value, dict) else [("", value)]
        for key, child in children:
            if isinstance(child, Section):
                yield from fields(child, f"{prefix}{name}.{key}." if key else f"{prefix}{name}.")


def holds(annotation: Any, kind: type) -> bool:
    """Whether a type, or a part of it, is `kind`; what is inside of a Literal is no type."""
    if typing.get_origin(annotation) is typing.Literal:
        return False
    parts = typing.get_args(annotation)
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated)
    return (
        annotation is kind
        or typing.get_origin(annotation) is kind
        or (is_union and any(holds(part, kind) for part in parts))
    )


@functools.cache
def planted() -> tuple[dict[str, Any], list[str], list[str]]:
    """A config with a secret in every key that takes a text or a free dictionary; the keys, the secrets."""
    data, keys, secrets = json.loads(json.dumps(MINIMAL)), [], []

    def secret() -> str:
        secrets.append(f"Plant{len(secrets):03d}ed")
        return secrets[-1]

    for key, annotation in fields(GVPOConfig.from_dict(MINIMAL)):
        tries: list[Any] = []
        if holds(annotation, str):
            tries = [
                f"https://user:{secret()}@host/{{prompt}}?k=2&key={secret()}",
                f"api_key={secret()}",
            ]
        if holds(annotation, dict):
            inner = {"token": secret(), "Authorization": f"Bearer {secret()}", "url": f"ftp://{secret()}@h/"}
            tries += [{"api_key": secret(), "nested": [{"headers": inner}], "auth": {"who": [secret()]}}]
            tries += [{"api_key": secret()}]
        for value in tries:
            changed = json.loads(json.dumps(data))
            set_key(changed, key, value)
            try:
                GVPOConfig.model_validate(changed)
            except ValidationError:
                continue  # a key of limited values
            data, keys = changed, [*keys, key]
            break
    text = json.dumps(data)
    return data, keys, [secret for secret in secrets if secret in text]


def test_what_the_config_holds_is_nowhere_in_what_a_run_shows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, keys, secrets = planted()
    config = GVPOConfig.from_dict(data)
    assert {
        "verifiers.rewards.judge.url",
        "verifiers.rewards.judge.arguments",
        "engines.pools.served.url",
        "engines.pools.own.vllm",
        "tracking.wandb",
        "tracking.tensorboard",
        "tracking.mlflow.tracking_uri",
        "tracking.mlflow.tags",
        "prompts.template",
        "warm_start.architecture",
        "ray.address",
    } <= set(keys)
    assert len(secrets) > 60
    outputs: dict[str, str] = {}

    outputs["check"] = config.dump(with_secrets=False)
    outputs["parameters"] = json.dumps(parameters_of(config), ensure_ascii=False)
    outputs["evaluation.yaml"] = json.dumps(_settings(config), ensure_ascii=False)

    everywhere = " ".join(secrets)
    row = tiny.make_group(3, completions=[f"I saw {everywhere}"] * 3, reward_reasons=[everywhere] * 3)
    run_dirs = []
    for name in ("run", "other"):
        run_dirs.append(run_dir := tmp_path / name)
        (run_dir / "evaluations").mkdir(parents=True)
        (run_dir / "config.yaml").write_text(config.model_copy(update={"seed": len(name)}).dump())
        (run_dir / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
        groups.save(groups.table([row]), run_dir / "evaluations" / "held-step-000000.arrow")
        EventLog(run_dir / "events.jsonl").add(1, "engine", "engines-0", f"no answer: {everywhere}")
        outputs[f"events.jsonl of {name}"] = (run_dir / "events.jsonl").read_text()
    outputs["report.html"] = page.write(run_dirs[0]).read_text()
    outputs["compare.html"] = page.write(*run_dirs).read_text()
    assert "judge" in outputs["report.html"] and "I saw" in outputs["report.html"]

    outputs["a cause"] = cause_of(RuntimeError(everywhere))
    assert main(["report", str(tmp_path / everywhere.replace(" ", "/"))]) == 2
    assert main(["check", str(run_dirs[0] / "config.yaml"), f"ray.num_cpu={secrets[0]}"]) == 2
    assert main(["check", str(run_dirs[0] / "config.yaml"), "loss.beta=0", f"seed={secrets[1]}"]) == 2
    status = {"time": 0, "step": 1, "num_steps": 1, "doing": f"fails: {everywhere}", "buffer": None}
    status |= {"engines": [], "verifiers": {}, "oldest": None, "resources": {}, "recoveries": {}}
    (run_dirs[0] / "status.json").write_text(json.dumps(status))
    assert main(["status", str(run_dirs[0])]) == 0
    said = capsys.readouterr()
    outputs["the command line"] = said.out + said.err
    assert "no metrics.jsonl" in said.err and "fails: " in said.out

    found = {name: [secret for secret in secrets if secret in text] for name, text in outputs.items()}
    assert found == {name: [] for name in outputs}
    assert all(MASK in text or "\\u2026" in text for text in outputs.values())


def test_the_resolved_config_keeps_what_the_run_needs_and_shows_the_rest() -> None:
    data, _, secrets = planted()
    config = GVPOConfig.from_dict(data)
    text = config.dump()
    assert GVPOConfig.from_dict(yaml.safe_load(text)) == config
    assert all(secret in text for secret in secrets)
    plain = GVPOConfig.from_dict(MINIMAL)
    assert plain.dump(with_secrets=False) == plain.dump()


def test_no_key_of_the_config_itself_looks_like_a_secret() -> None:
    assert [key for key, _ in fields(GVPOConfig.from_dict(MINIMAL)) if is_secret(key)] == []


FAILING = """
def failing(prompts, completions, api_key, **columns):
    raise ValueError(f"401 for key {api_key}: {'x' * 240} {api_key}")
"""


@pytest.mark.components
def test_reasons_hold_no_secret_whatever_raises_and_wherever_it_is_cut(
    free_port: int, tmp_path: Path
) -> None:
    own = f"{tmp_path}/own.py:failing"
    (tmp_path / "own.py").write_text(FAILING)
    url = f"http://bob:hunter22@127.0.0.1:{free_port}/score?key=Plant001ed"
    rewards = {
        "judge": {"url": url, "num_retries": 0, "arguments": {"token": "Plant002ed"}},
        "own": {"function": own, "arguments": {"api_key": "Plant003ed"}},
        "here": {"function": own, "arguments": {"api_key": "Plant004ed"}, "trusted": True},
    }
    data = {**MINIMAL, "verifiers": {"rewards": rewards}}
    with Verifier(GVPOConfig.from_dict(data).verifiers) as verifier:
        (check,) = verifier.check(["1 + 1"], ["2"], {"answer": ["2"]}, without=["judge"])
    assert check.reward is None and check.reason is not None
    for name in rewards:
        assert f"{name} raised" in check.reason
    assert f"key {MASK}: xxx" in check.reason
    assert not [text for text in ("hunter22", "Plant", "bob") if text in check.reason], check.reason


@pytest.mark.parametrize(
    "text",
    [
        "api_key='Plant001ed'",
        'api_key = "Plant001ed"',
        "api_key:   'Plant001ed'",
        "Authorization: Token Plant001ed",
        "github_pat_Plant001edPlant001ed",
        "glpat-Plant001edPlant001ed",
        "AIzaPlant001edPlant001edPlant001edabc",
        "gsk_Plant001edPlant001ed",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJQbGFudCJ9.Plant001ed",
        "sk_live_Plant001edPlant001ed",
        "xapp-1-Plant001ed",
        "glsa_Plant001edPlant001edPlant001edab_0a1b2c3d",
        "hvs.Plant001edPlant001edPlant",
        "dapi" + "0123456789abcdef" * 2,
        "curl -u bob:Plant001ed https://host/x",
        "curl -ubob:Plant001ed",
        "curl --user 'bob:Plant001ed' --proxy-user=me:Plant002ed h",
        "['curl', '-u', 'bob:Plant001ed']",
        '["curl", "--user", "bob:Plant001ed"]',
        "-----BEGIN RSA PRIVATE KEY-----\nPlant001ed\nPlant002ed\n-----END RSA PRIVATE KEY-----",
        "Set-Cookie: id=Plant001ed; token=Plant002ed",
        "vllm serve m --api-key Plant001ed --port 1",
        "Command '['vllm', '--api-key', 'Plant001ed']' failed",
        '["--hf-token", "Plant001ed"]',
        "--token=Plant001ed",
        "--token plantedletters",
        "--password=Plant001ed,Plant002ed",
    ],
)
def test_a_secret_that_nobody_knows_is_masked_by_its_name_or_form_in_quotes_too(text: str) -> None:
    assert "Plant" not in mask(text) and "abcdef" not in mask(text) and MASK in mask(text)


def test_a_user_and_a_password_in_a_list_of_arguments_are_hidden() -> None:
    hidden = hide(["curl", "-u", "bob:Plant001ed", "--user", "1000:1000", "-u", "x.py", "h"])
    assert hidden == ["curl", "-u", MASK, "--user", "1000:1000", "-u", "x.py", "h"]


@pytest.mark.parametrize("most", [60, 500])
def test_of_a_long_text_little_is_read_and_no_secret_is_shown_wherever_it_is_cut(
    monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    secret = "Plant001ed" * 12
    know({"api_key": secret})
    read: list[int] = []
    real = shown.mask
    monkeypatch.setattr(shown, "mask", lambda text: (read.append(len(text)), real(text))[1])
    end = most + shown.ROOM
    for at in (0, most - 60, most - 1, most, end - 120, end - 60, end - 1, end):
        text = "a" * at + secret + "b" * (1 << 20)
        assert shown.masked(text, most) == (text[:at] + MASK + "b" * most)[:most]
    # what becomes much shorter brings the end of what is read into view
    secrets = ("hf_" + "c" * 1000) + " "
    for size in (0, 30, 60, 120):
        text = secrets * (end // len(secrets)) + "a" * (end % len(secrets) - size) + secret + "b" * (1 << 20)
        assert "Plant" not in shown.masked(text, most)
    assert max(read) == end
    # a short text is shown whole
    assert shown.masked(f"key {secret}", most) == f"key {MASK}"


def test_a_known_secret_is_masked_however_json_and_urls_write_it() -> None:
    secret = 'it\'s "so" se/crét'
    know({"api_key": secret})
    for text in (secret, repr(secret), json.dumps(secret), urllib.parse.quote(secret, safe="")):
        assert mask(text).strip("'\"") == MASK


@pytest.mark.parametrize("name", ["tokens", "keys", "creds", "pass", "db_pass", "cookies", "Cookie", "pwd"])
def test_a_name_of_secrets_in_data_hides_all_below_it(name: str) -> None:
    data = {"arguments": {name: ["Plant001ed", {"of": "Plant002ed"}]}}
    know(data)
    assert "Plant" not in str(hide(data)) and mask("Plant001ed Plant002ed") == f"{MASK} {MASK}"


def test_a_secret_in_small_letters_is_hidden_unless_it_may_be_a_word() -> None:
    secrets = {"token": "plantedletters", "key": "correct-horse-battery", "pass": "hunter", "auth": "q" * 20}
    words = {"key": "conversations", "auth": "certificate", "sort": {"key": "problem.gold_answer"}}
    know([secrets, words])
    assert mask(" ".join(secrets.values())) == " ".join([MASK] * 4)
    text = "the certificate of problem.gold_answer in conversations"
    assert mask(text) == text


def test_the_values_of_a_command_lines_flags_are_hidden_by_the_flags_names() -> None:
    command = ["vllm", "--api-key", "planted two", "--max-tokens", 5, "--token", "--verbose", "--key=a"]
    data = {"command": command}
    know(data)
    assert hide(data) == {"command": [*command[:2], MASK, *command[3:]]}
    assert mask("said: planted two") == f"said: {MASK}"


def test_lists_of_keys_are_secret() -> None:
    data = {"arguments": {"api_keys": ["Plant001ed", "Plant002ed"]}}
    know(data)
    assert "Plant" not in str(hide(data)) and mask("Plant002ed") == MASK


@pytest.fixture
def free_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.mark.components
def test_wandb_gets_neither_parameters_nor_a_command_line_with_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    given = ["gvpo-ray", "train", "x", "a.api_key=Plant001ed", "--hf-token", "Plant003ed"]
    monkeypatch.setattr(sys, "argv", given)
    data = {**MINIMAL, "engines": {"vllm": {"hf_token": "Plant002ed"}}}
    config = GVPOConfig.from_dict(data)
    tracker = WandB({"mode": "offline", "project": "p"}, tmp_path, None, parameters_of(config))
    tracker.log(1, 1, {"loss": 1.0})
    tracker.close()
    wandb.teardown()
    assert sys.argv == given
    files = [file for file in (tmp_path / "wandb").rglob("*") if file.is_file()]
    assert any(b"gvpo-ray" in file.read_bytes() for file in files)
    assert not [file for file in files if b"Plant" in file.read_bytes()]


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("https://bob:hunter2@judge/score?key=S1&k=2", f"https://{MASK}@judge/score?key={MASK}&k=2"),
        ("https://u:p@ss/w@h/x", f"https://{MASK}@h/x"),  # nobody encoded the password
        ("HTTPError: 500 for url: http://h:1/s?key=S1", f"HTTPError: 500 for url: http://h:1/s?key={MASK}"),
        ("http://h/x?q=1&X-Amz-Signature=abc#top", f"http://h/x?q=1&X-Amz-Signature={MASK}#top"),
        ('{"api_key": "a b", "n": 1}', f'{{"api_key": "{MASK}", "n": 1}}'),
        (r"said {\"apiKey\": \"abc\"} here", rf"said {{\"apiKey\": \"{MASK}\"}} here"),
        ("headers: {'Authorization': 'Bearer abc.def'}", f"headers: {{'Authorization': '{MASK}'}}"),
        ("Authorization: Bearer abc.def.ghi", f"Authorization: {MASK}"),
        ("Incorrect key: sk-abcdefgh12345678", f"Incorrect key: {MASK}"),
        ("hf_token=abc failed", f"hf_token={MASK} failed"),
        # what is no secret stays
        ("http://host:8000/a@b and me@mail.org", "http://host:8000/a@b and me@mail.org"),
        ("sorted(words, key=len), max_tokens=3", "sorted(words, key=len), max_tokens=3"),
        ("monkey=5&x=2; the token: 7", "monkey=5&x=2; the token: 7"),
        ("cookies: 12, cookies = 36 to pass: 60", "cookies: 12, cookies = 36 to pass: 60"),
        ("sort --key 2 --max-tokens 512, a - token is", "sort --key 2 --max-tokens 512, a - token is"),
    ],
)
def test_secrets_are_masked_in_text(text: str, masked: str) -> None:
    assert mask(text) == masked
    assert mask(masked) == masked


def test_a_known_secret_is_masked_in_any_spelling_and_a_word_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf-of-the-environment")
    monkeypatch.setenv("SSH_AUTH", "/tmp/a-path-that-is-shown")
    know({"password": "s3cret%2Fx", "a": [{"key": "answer"}], "secret": 12345, "flag": {"token": True}})
    know({"url": "https://bob:hunt@judge/x"})
    assert mask("s3cret%2Fx s3cret/x hf-of-the-environment 12345 hunt") == " ".join([MASK] * 5)
    text = "the answer is True: 123456 hunters went to /tmp/a-path-that-is-shown"
    assert mask(text) == text


def test_hidden_data_keeps_its_form() -> None:
    data = {"api_key": "x", "n": 3, "none": {"token": None}, "list": [{"password": 5}, "plain", 1.5, True]}
    assert hide(data) == {
        "api_key": MASK,
        "n": 3,
        "none": {"token": None},
        "list": [{"password": MASK}, "plain", 1.5, True],
    }


def test_what_acts_on_a_terminal_is_spelled_out() -> None:
    assert visible("a\x1b]0;owned\x07\x1b[2J\tb\nc\r\x9b1m\u202e\ud83d é数✓") == (
        "a\\x1b]0;owned\\x07\\x1b[2J\tb\nc\\r\\x9b1m\\u202e\\ud83d é数✓"
    )


def test_a_line_of_a_run_is_printed_as_it_is_and_acts_on_no_terminal() -> None:
    out = io.StringIO()
    run = RunConsole(GVPOConfig.from_dict(MINIMAL), 0, 2)
    run.console = Console(file=out, force_terminal=True, highlight=False, soft_wrap=True)
    run.say("after: [bold]1[/] :100: \x1b]0;owned\x07\x1b[2J  ?api_key=Plant001ed")
    assert out.getvalue() == f"after: [bold]1[/] :100: \\x1b]0;owned\\x07\\x1b[2J  ?api_key={MASK}\n"
