"""For the reward `code`, the last fenced block of a completion is a program, which its row's tests judge.

Programs in Python run in the sandbox (sandbox/programs.py), those in other languages on a Sandbox Fusion
server. What is expected is compared here, in the verifier, and never enters a process that runs a program.
A wrong program has 0, as has one that is too slow or needs too much memory. Where our own machinery failed,
or the row has no tests that can be read, there is no reward.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.verifiers import RewardConfig, VerifiersConfig
from gvpo_ray.groups import NO_ANSWER
from gvpo_ray.sandbox.functions import OutOfReach, Score
from gvpo_ray.sandbox.programs import Programs, Result, StoppedError
from gvpo_ray.verifiers.code_tests import (
    COLUMNS,
    Asserts,
    Calls,
    Runs,
    helpers,
    read_tests,
    same_output,
    same_value,
)
from gvpo_ray.verifiers.http_reward import HttpReward

ARGUMENTS: dict[str, type] = {"share": bool, "max_tests": int, "language": str, "sandbox_fusion": str}
"""Arguments of the reward in the config. `share`: the reward is the share of tests that pass, not 1 where all
do and else 0. `max_tests`: only so many of a row's tests are run, the first. `language`: of rows without a
column of this name, python by default. `sandbox_fusion`: address of a server that runs other languages."""

FREE_BYTES = 1 << 16
"""How much a program may print beyond twice what is expected; more is wrong, and is not read."""

ROW_LIMITS = 10
"""How many times the limit on time of one test all tests of a row may take together."""

_LANGUAGES = {"c++": "cpp", "c#": "csharp", "javascript": "nodejs", "js": "nodejs", "golang": "go"} | {
    "r": "R",
    "d_ut": "D_ut",
}
"""Names of languages in data sets, in small letters, and how Sandbox Fusion spells them."""

_PYTHON = re.compile(r"(?:c?python|py|pypy)[\s_-]*(?:3[\d.]*)?(?:-64)?")
"""Names of Python 3."""

_FENCE = re.compile(r"[ \t]*(`{3,}|~{3,})(.*)")


class CodeReward:
    """The reward function `code`. It runs in the verifier's process, and starts processes of its own.

    Args:
        name: its name in verifiers.rewards.
        config: the limits, which hold for each test; for asserts, for all of them together.
        reward: the section, with ARGUMENTS; its time limit and retries hold for the Sandbox Fusion server.
        columns: key of a data set -> its columns; None: they are not checked.

    Raises:
        ConfigError: an argument is none or of another type, or a data set has no column with tests.
        SandboxError: the sandbox's processes do not start.
    """

    def __init__(
        self,
        name: str,
        config: VerifiersConfig,
        reward: RewardConfig,
        columns: Mapping[str, Any] | None = None,
    ) -> None:
        arguments = reward.arguments
        for argument, value in arguments.items():
            kind = ARGUMENTS.get(argument)
            if kind is None:
                near = difflib.get_close_matches(argument, ARGUMENTS, n=1)
                hint = f"; did you mean {near[0]}?" if near else f"; it takes {', '.join(ARGUMENTS)}"
                raise ConfigError(f"verifiers.rewards.{name}: no argument {argument!r}{hint}")
            if type(value) is not kind or (isinstance(value, int) and kind is int and value < 1):
                wanted = {bool: "true or false", int: "a number from 1 on", str: "text"}[kind]
                raise ConfigError(f"verifiers.rewards.{name}: {argument} must be {wanted} (got {value!r})")
        for key, names in (columns or {}).items():
            if not set(COLUMNS) & set(names):
                raise ConfigError(
                    f"verifiers.rewards.{name}: {key} has no tests: none of {', '.join(COLUMNS)}; it has "
                    f"{', '.join(names) or 'no further columns'}"
                )
        self._share, self._max_tests = arguments.get("share", False), arguments.get("max_tests")
        self._language = _spelled(arguments.get("language", "python"))
        url = arguments.get("sandbox_fusion")
        if url is not None and not url.startswith(("http://", "https://")):
            raise ConfigError(f"verifiers.rewards.{name}: sandbox_fusion must start with http:// or https://")
        if url is None and self._language != "python":
            raise ConfigError(
                f"verifiers.rewards.{name}: programs in {self._language} need sandbox_fusion, the address of "
                "a Sandbox Fusion server"
            )
        self._fusion = None if url is None else _SandboxFusion(url, reward, config)
        self._row_s = ROW_LIMITS * config.timeout_s
        self._programs = Programs(
            timeout_s=config.timeout_s, cpu_s=config.cpu_s, memory_gib=config.memory_gib
        )
        self.unprotected = self._programs.unprotected

    def __call__(self, prompts: list[str], completions: list[str], **columns: Any) -> list[Score]:
        """Return a score per completion; the columns are lists of the same length.

        Raises:
            OutOfReach: the Sandbox Fusion server does not answer.
        """
        scores: list[Score] = []
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            row = {name: values[i] for name, values in columns.items()}
            program = last_block(completion, prompt)
            try:
                tests = read_tests(row)
            except ValueError as error:
                scores.append((None, f"code: {error}"))
                continue
            if program is None:
                scores.append((0.0, f"code: {NO_ANSWER}: no fenced block that is closed"))
                continue
            found = self._result(prompt, program, tests, _spelled(row.get("language") or self._language))
            scores.append(self._score(found))
        return scores

    def close(self) -> None:
        """End the processes and close the connections."""
        self._programs.close()
        if self._fusion is not None:
            self._fusion.close()

    def _score(self, result: Result) -> Score:
        if result.fault is not None:
            return None, result.fault
        share = result.num_passed / result.num_tests
        value = share if self._share else float(share == 1)
        if share == 1:
            return value
        # only what is known: the rest of the tests may not have run
        return value, f"code: {result.remark or 'not all tests passed'}"

    def _result(self, prompt: str, program: str, tests: Runs | Calls | Asserts, language: str) -> Result:
        if language != "python" and (self._fusion is None or not isinstance(tests, Runs)):
            why = "no sandbox_fusion is given" if self._fusion is None else "its tests are Python's"
            return Result(0, 1, f"code: a program in {language} cannot be run: {why}")
        if isinstance(tests, Asserts):
            asserts = tests.asserts[: self._max_tests]
            given = helpers(prompt, tests.setup, asserts, tests.entry_point)
            texts = [*tests.setup, *asserts]
            return self._programs.test(program, texts, tests.entry_point, not self._share, given)
        golds: list[Any] = list(tests.outputs[: self._max_tests])
        found: Iterator[Any]
        is_same: Callable[[Any, Any], bool]
        if isinstance(tests, Calls):
            found = self._programs.call(program, tests.name, tests.inputs[: self._max_tests])
            is_same = partial(same_value, may_be_wrapped=tests.may_be_wrapped)
        else:
            texts = tests.inputs[: self._max_tests]
            found = (
                self._printed(program, text, gold, language) for text, gold in zip(texts, golds, strict=True)
            )
            is_same = partial(same_output, style=tests.style)
        num_passed, remark, used_s = 0, None, 0.0
        runner = self._programs if language == "python" else self._fusion
        assert runner is not None
        for number, (gold, value) in enumerate(zip(golds, found, strict=False), 1):
            if isinstance(value, StoppedError):
                if value.is_fault:
                    return Result(0, len(golds), str(value))
                remark = remark or f"test {number}: {value}"
            elif is_same(value, gold):
                num_passed += 1
            else:
                remark = remark or f"test {number}: another output than expected"
            used_s += runner.used_s
            if used_s > self._row_s and number < len(golds):
                remark = remark or f"test {number}: up to here its tests took more than {self._row_s:g} s"
                break
            if remark and not self._share:
                break
        return Result(num_passed, len(golds), None, remark)

    def _printed(self, program: str, stdin: str, gold: str, language: str) -> str | StoppedError:
        """Return what a program prints, or why it did not come to its end."""
        try:
            if language != "python":
                assert self._fusion is not None
                return self._fusion.run(program, stdin, language)
            return self._programs.run(program, stdin, 2 * len(gold.encode("utf-8", "replace")) + FREE_BYTES)
        except StoppedError as stopped:
            return stopped


class _SandboxFusion(HttpReward):
    """A _SandboxFusion asks a Sandbox Fusion server: POST /run_code runs a program once."""

    def __init__(self, url: str, reward: RewardConfig, config: VerifiersConfig) -> None:
        super().__init__(reward.model_copy(update={"url": url.rstrip("/") + "/run_code"}))
        self._limits = {
            "compile_timeout": config.timeout_s,
            "run_timeout": config.timeout_s,
            "memory_limit_MB": int(config.memory_gib * 1024),
        }
        self.used_s = 0.0
        """Seconds that the last test took, as the server says."""

    def run(self, program: str, stdin: str, language: str) -> str:
        """Run a program with an input; return what it printed.

        Raises:
            StoppedError: it was not compiled, came to a limit or ended with another status than 0; the
                server's own failures are a fault.
            OutOfReach: the server does not answer.
        """
        body = {"code": program, "stdin": stdin, "language": language, **self._limits}
        (answer,) = self._loop.run_until_complete(self._rewards(body, 1))
        if not isinstance(answer, dict) or answer.get("status") not in ("Success", "Failed", "SandboxError"):
            raise OutOfReach("sandbox_fusion gave an answer of another form", is_answer=True, is_own=True)
        if answer["status"] == "SandboxError":
            raise StoppedError(f"code: sandbox_fusion failed: {str(answer.get('message'))[:200]}", True)
        self.used_s = 0.0
        for step in ("compile_result", "run_result"):
            result = answer.get(step) or {}
            is_late = result.get("status") == "TimeLimitExceeded"
            seconds = self._limits["run_timeout"] if is_late else result.get("execution_time")
            self.used_s += seconds if isinstance(seconds, (int, float)) else 0.0
            if is_late:
                raise StoppedError(f"{step}: it took more than {self._limits['run_timeout']:g} s")
            if result.get("return_code"):
                raise StoppedError(f"{step}: it exited with {result['return_code']}")
        if answer["status"] == "Failed" or not answer.get("run_result"):
            raise StoppedError("it failed")
        return str(answer["run_result"].get("stdout") or "")

    async def _post(self, body: dict[str, Any]) -> tuple[int, str, str]:
        """Send one request; put the answer into a list, as rewards are."""
        status, head, text = await super()._post(body)
        return status, head, f"[{text}]" if status < 400 else text


def _spelled(language: Any) -> str:
    """Return a language's name as Sandbox Fusion spells it; data sets have other spellings."""
    name = " ".join(str(language).lower().split())
    return "python" if _PYTHON.fullmatch(name) else _LANGUAGES.get(name, name)


def last_block(completion: str, prompt: str = "") -> str | None:
    """Return the content of the last closed fenced block behind the thoughts; None: there is none.

    A prompt that ends within a fence has opened the completion's first block.
    """
    text = completion.rpartition("</think>")[2]
    found, _ = _blocks(text, "")
    if found is None and (fence := _blocks(prompt, "")[1]):
        found, _ = _blocks(text, fence)
    return found


def _blocks(text: str, fence: str) -> tuple[str | None, str]:
    """Return the last closed block of a text, and the fence that is open at its end."""
    found, lines = None, list[str]()
    for line in text.split("\n"):
        mark = _FENCE.match(line)
        if not fence:
            if mark:
                fence, lines = mark[1], []
        elif mark and mark[1].startswith(fence) and not mark[2].strip():
            found, fence = "\n".join(lines), ""
        else:
            lines.append(line.rstrip("\r"))
    return found, fence
