"""The page of a run: what it shows, what it leaves out, and that nothing in a run can make it do anything.

Those marked `browser` open it in a real headless Chromium and look at what its scripts made of it.
"""

import json
import re
from html.parser import HTMLParser

import pytest
from plotly.offline import get_plotlyjs
from tiny import make_group
from tokenizers import Tokenizer, decoders, models

from gvpo_ray import groups
from gvpo_ray.config.base import ConfigError
from gvpo_ray.observe.report import page as report
from gvpo_ray.observe.token_examples import TokenExample, write_examples

LINE = {
    "reward/mean": 0.5,
    "loss": 0.125,
    "gvpo/residual_var": 0.25,
    "policy/kl_ref": 0.0,
    "staleness/mean": 1.0,
    "tokens/trained": 3000.0,
    "time/step": 2.0,
    "time/wait_for_groups": 0.5,
}
STARTED = {"time": 0, "step": 0, "who": "run", "name": "started", "why": ""}
DIED = {"time": 86400, "step": 2, "who": "engine", "name": "engine-1", "why": "node lost"}
VOID = {"meta", "br", "input", "img", "link"}


class Page(HTMLParser):
    """Tags with their attributes, and text by the tag it is in; fails on a tag that is not closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.texts, self.scripts = [], [], {}, {}
        self.feed(text)
        self.close()
        assert not self.open
        figures = json.loads(self.scripts["figures"]) if "figures" in self.scripts else []
        self.charts = {
            attributes["aria-label"]: figures[int(attributes["data-figure"])]
            for tag, attributes in self.tags
            if "data-figure" in attributes
        }

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            data = data.removeprefix("\n") if self.open[-1] == "pre" else data  # as browsers do
            self.texts.setdefault(self.open[-1], []).append(data)
            if self.open[-1] == "script":
                self.scripts[self.tags[-1][1].get("id")] = data

    def traces(self, name, *kinds):
        return [trace for trace in self.charts[name]["traces"] if trace["meta"]["kind"] in kinds]

    def points(self, name):
        """The points of the chart's first line."""
        line = self.traces(name, "line", "faint")[0]
        return list(zip(line["x"], line["y"], strict=True))

    def marks(self, name):
        return [text for trace in self.traces(name, "mark", "calm") for text in trace["text"]]

    def labels(self, name):
        return [trace["name"] for trace in self.traces(name, "line", "faint")]


def make_run(run_dir, lines=(), events=(), config=None):
    run_dir.mkdir(exist_ok=True)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if events:
        (run_dir / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    if config is not None:
        (run_dir / "config.yaml").write_text(config)
    return run_dir


def page(run_dir, lines=(), events=(), config=None):
    """The report of a run with these files."""
    make_run(run_dir, lines, events, config)
    assert report.write(str(run_dir)) == run_dir / "report.html"
    return Page((run_dir / "report.html").read_text(encoding="utf-8"))


def save_evaluation(run_dir, name, *rows):
    (run_dir / "evaluations").mkdir(parents=True, exist_ok=True)
    groups.save(groups.table(rows), run_dir / "evaluations" / name)


def test_every_metric_is_a_chart_and_first_and_last_are_a_table(tmp_path):
    lines = [
        {"step": 0, "eval/x/pass@1": 0.25},
        *({"step": step, **LINE, "reward/mean": step / 4} for step in (1, 2, 3)),
    ]
    lines.append({"step": 3, "eval/x/pass@1": 0.75})
    got = page(tmp_path / "my-run", lines, config="num_steps: 3\n")
    assert list(got.charts) == [
        "Reward",
        "pass@k of x",
        "Loss",
        "Variances within the group",
        "KL to the reference (nats)",
        "Learner waiting",
        "Training speed (tokens/s)",
        "Staleness (steps)",
    ]
    assert (
        got.texts["h1"] == got.texts["title"][:1] == ["my-run"]
        and "3 of 3 steps trained: complete" in got.texts["p"]
    )
    assert got.points("Reward") == [(1, 0.25), (2, 0.5), (3, 0.75)]
    assert got.points("pass@k of x") == [(0, 0.25), (3, 0.75)]
    assert "reward/mean" in got.texts["code"]
    assert "mean over the verifiable completions of the step's batch" in got.texts["small"]
    cells = got.texts["td"]
    assert cells[cells.index("reward/mean") :][:5] == ["reward/mean", "0.25", "1", "0.75", "3"]
    assert cells[cells.index("tokens/trained / time/step") :][:5] == [
        "tokens/trained / time/step",
        "1,500",
        "1",
        "1,500",
        "3",
    ]
    # its completions are not there
    assert "No evaluation, and no group that was trained on." in got.texts["p"]


def test_what_is_not_drawn_first_is_folded_away_and_what_never_changed_is_in_the_table_alone(tmp_path):
    got = page(
        tmp_path,
        [
            {
                "step": step,
                **LINE,
                "weights/pause_s": step / 10,
                "verifiers/num": 2.0,
                "eval/x/length_mean": step,
            }
            for step in (1, 2)
        ],
    )
    assert "All other metrics (2)" in got.texts["summary"]
    assert (
        list(got.charts)[-2:] == ["Weight pause (s)", "Completion length of x (tokens)"]
        and "verifiers/num" in got.texts["td"]
    )
    # and the parts of the quotients
    assert "4 metrics that never changed are in the table of values alone." in got.texts["small"]


def test_the_three_terms_are_lines_of_one_chart_with_a_sentence_for_each(tmp_path):
    terms = {"gvpo/term_reward": 0.5, "gvpo/term_reference": 2.0, "gvpo/term_variance": -1.0}
    got = page(tmp_path, [{"step": step, **terms} for step in (1, 2)])
    assert got.labels("Three terms of the loss") == ["reward", "reference", "variance"]
    assert [text for text in got.texts["b"] if text in ("reward", "reference", "variance")] == [
        "reward",
        "reference",
        "variance",
    ]


def test_staleness_and_group_sizes_are_histograms_and_pools_are_lines(tmp_path):
    shares = {
        "staleness/histogram/0": 0.25,
        "staleness/histogram/1": 0.75,
        "staleness/histogram/inf": 0.0,
        "groups/size_histogram/8": 1.0,
    }
    pools = {"pools/a/engines": 2.0, "pools/b/engines": 1.0, "pools/a/tokens_per_s": 10.0}
    ages = {"gvpo/residual_var/4": 0.5, "gvpo/residual_var/external": 0.25}
    got = page(tmp_path, [{"step": step, **LINE, **shares, **pools, **ages} for step in (1, 2)])
    assert {"Staleness", "Group sizes"} <= {*got.charts}
    assert got.labels("Engines by pool") == ["a", "b"]
    assert got.labels("Sampling speed by pool (tokens/s)") == ["a"]
    assert got.labels("Residual variance by staleness") == ["3–4", "external"]
    cells = got.texts["td"]
    assert (
        cells[cells.index("25.0000%") - 1 :][:4] == ["0", "25.0000%", "1", "75.0000%"]
        and "step 2, exactly" in got.texts["summary"]
    )


def test_a_run_that_has_only_begun_has_a_page(tmp_path):
    assert "0 steps trained: not complete" in page(tmp_path, []).texts["p"]
    assert (
        "0 of 5 steps trained: running, or killed" in page(tmp_path, [], [STARTED], "num_steps: 5").texts["p"]
    )
    events = [STARTED, {**STARTED, "name": "stopped"}]
    got = page(tmp_path, [{"step": 1, **LINE}], events, "num_steps: 5")
    assert "1 of 5 steps trained: stopped before its end" in got.texts["p"]
    assert got.points("Loss") == [(1, 0.125)] and got.traces("Loss", "line")[0]["mode"] == "lines+markers"
    assert "0 recoveries" in got.texts["p"] and got.texts["td"][:4] == [
        "1970-01-01 00:00:00 UTC",
        "0",
        "run",
        "started",
    ]


def test_ten_thousand_steps_are_two_points_in_each_column_and_their_means(tmp_path):
    got = page(
        tmp_path,
        ({"step": step, **LINE, "loss": 1000 if step == 5555 else step % 10} for step in range(1, 10_001)),
    )
    points = got.points("Loss")
    # the spike is there
    assert len(points) <= 2 * 500 + 2 and {(1, 1), (5555, 1000), (10_000, 0)} <= {*points}
    assert len(got.traces("Loss", "mean")[0]["x"]) == 50
    assert (tmp_path / "report.html").stat().st_size < 6_000_000  # plotly is 4.8 MB
    assert got.texts["td"].count("10000") == len(LINE) + 2


def test_recoveries_are_marks_in_every_chart_while_starts_and_pools_are_in_the_time_line_alone(
    tmp_path,
):
    verifier = {**DIED, "step": 3, "who": "verifier", "name": "verifier-0", "why": "out of memory"}
    grown = {**DIED, "who": "pool", "name": "spot", "why": "grew"}
    with_events = [STARTED, DIED, grown, verifier, {**verifier, "name": "verifier-1"}, {**DIED, "step": 99}]
    got = page(tmp_path, [{"step": step, **LINE} for step in range(1, 6)], with_events)
    assert "4 recoveries: engine 2, verifier 2" in got.texts["p"]
    for name in set(got.charts) - {"Events"}:
        assert got.marks(name) == [
            "step 2: engine engine-1: node lost",
            "step 3: verifier verifier-0: out of memory<br>step 3: verifier verifier-1: out of memory",
            "step 99: engine engine-1: node lost",
        ]
    lanes = got.marks("Events")
    assert len(lanes) == 5 and {"step 0: run started:", "step 2: pool spot: grew"} <= {*lanes}
    assert got.charts["Events"]["rows"] == ["verifier", "run", "pool", "engine"]
    # what lies beyond the last step is at the edge
    assert got.traces("Loss", "mark")[0]["x"] == [2, 3, 5]
    cells = got.texts["td"]
    assert cells[cells.index("1970-01-02 00:00:00 UTC") :][:5] == [
        "1970-01-02 00:00:00 UTC",
        "2",
        "engine",
        "engine-1",
        "node lost",
    ]
    assert "started" in cells


def test_a_thousand_recoveries_of_one_step_are_one_mark_that_says_how_many(tmp_path):
    got = page(tmp_path, [{"step": 1, **LINE}, {"step": 2, **LINE}], [DIED] * 1000)
    assert [mark.split("<br>")[-1] for mark in got.marks("Loss")] == [
        "and 996 more"
    ] and "1000 recoveries: engine 1000" in got.texts["p"]
    assert (
        "Of 1000 events, the first and the last 250." in got.texts["p"]
        and got.texts["td"].count("node lost") == 500
    )


def test_torn_lines_and_what_is_no_number_are_left_out(tmp_path):
    page(tmp_path, [{"step": 1, **LINE}], [STARTED, DIED])
    strange = [
        '{"step": 2, "loss": NaN, "reward/mean": Infinity, "grad_norm": "?"}',
        '{"step": NaN, "loss": 1}',
        "7",
        '{"step": 3, "lo',
    ]
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write("\n".join([json.dumps({"step": 2, **LINE, "time/step": 0.0, "loss": 1e308}), *strange]))
    with open(tmp_path / "events.jsonl", "a") as file:
        file.write('{"who": "node", "step": null, "time": 1e99}\n{"time": 9, "step": 9, "who": "dri')
    text = report.write(tmp_path).read_text()
    got = Page(text)
    assert not re.search(r"\b(nan|inf|infinity)\b", got.scripts["figures"], re.IGNORECASE)
    assert got.points("Loss") == [(1, 0.125)] and len(got.points("Reward")) == 2
    assert got.points("Training speed (tokens/s)") == [(1, 1500)]
    assert "2 recoveries: engine 1, node 1" in got.texts["p"] and "grad_norm" not in got.texts["td"]


def test_two_runs_are_lines_of_the_same_charts_with_their_names_their_values_and_where_their_configs_differ(
    tmp_path,
):
    one = make_run(
        tmp_path / "one",
        [{"step": step, **LINE} for step in (1, 2)],
        [DIED],
        "num_steps: 2\nloss: {beta: 0.1, objective: gvpo}\n",
    )
    other = make_run(
        tmp_path / "other",
        [{"step": step, **LINE, "loss": 0.5} for step in (1, 2, 3)],
        (),
        "num_steps: 3\nloss: {beta: 0.1}\n",
    )
    assert report.write(one, other) == one / "compare.html"
    got = Page((one / "compare.html").read_text())
    assert got.texts["h1"] == ["one and other"]
    assert [(line["name"], line["meta"]["run"]) for line in got.traces("Loss", "line")] == [
        ("one", 0),
        ("other", 1),
    ]
    assert got.marks("Loss") == ["step 2: engine engine-1: node lost"]
    cells = got.texts["td"]
    assert cells[cells.index("loss") :][:9] == ["loss", "0.125", "1", "0.125", "2", "0.5", "1", "0.5", "3"]
    at = cells.index("num_steps")
    assert cells[at : at + 6] == ["num_steps", "2\n", "3\n", "loss.objective", "gvpo\n", "not there"]
    assert not (one / "report.html").exists()


def test_runs_of_one_name_are_told_apart_by_their_folders_and_a_run_is_not_compared_with_itself(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        make_run(tmp_path / folder / "run", [{"step": 1, **LINE}])
    assert "a/run and b/run" in report.write(tmp_path / "a/run", tmp_path / "b/run").read_text()
    with pytest.raises(ConfigError, match="are the same run"):
        report.write(tmp_path / "a/run", tmp_path / "a/../a/run")
    with pytest.raises(ConfigError, match=r"no metrics\.jsonl"):
        report.write(tmp_path / "a/run", tmp_path)


HOSTILE = (
    "</pre></td></style></script><script>alert(1)</script><img src=x onerror='alert(1)'>\"&amp;\x00\x1b\u202e"
)


def save_tokenizer(tokens, folder):
    tokenizer = Tokenizer(models.WordLevel(tokens, unk_token="<pad>"))
    tokenizer.decoder = decoders.Fuse()
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))


def example(**columns):
    """A completion of four tokens, the third of which the environment wrote."""
    return TokenExample(
        **{
            "kinds": ["less likely", "pushed down"],
            "group_id": 7,
            "completion": 1,
            "prompt": "2 + 2?",
            "answer": "4",
            "source": "policy",
            "version_min": 5,
            "version_max": 6,
            "num_tokens": 4,
            "ids": [2, 3, 4, 5],
            "policy": [-2.5, -1.0, None, -0.1],
            "sampler": [-0.5, -1.5, None, -0.1],
            "reference": None,
            "push": [-0.004, -0.002, None, 0.0],
            "sampler_ratio": -1.5,
            "reference_ratio": -1.25,
            "group_reference_ratio": 0.5,
            "reward": 0.0,
            "group_reward": 0.75,
            **columns,
        }
    )


def hostile_run(run_dir, hostile):
    """Text of an attacker wherever a run holds text."""
    row = make_group(
        0,
        rewards=(1.0, 0.0, None),
        prompt=hostile,
        answer=hostile,
        completions=[hostile] * 3,
        reward_parts={hostile: [1.0, 0.0, None]},
        reward_reasons=[hostile] * 3,
    )
    save_evaluation(run_dir, "<b>x-step-000001.arrow", row)
    one = example(prompt="p" + hostile, answer=hostile, kinds=[hostile], source=hostile, sampler_ratio=None)
    write_examples(run_dir, 1, [one])
    save_tokenizer(
        {"<pad>": 0, **{"s" * i + hostile: i for i in (2, 3, 4, 5)}}, run_dir / "checkpoints" / "step-1"
    )
    event = {**DIED, "who": hostile, "name": hostile, "why": hostile + "\ud800"}
    lines = [
        {"step": step, **LINE, "eval/<img src=y>/pass@1": 0.5, hostile: step, f"pools/{hostile}/engines": 1.0}
        for step in (1, 2)
    ]
    lines[0] |= {f"staleness/histogram/{hostile}": 0.5, "staleness/histogram/0": 0.5}
    return make_run(run_dir, lines, [event], f"run_dir: {json.dumps(hostile)}\nnum_steps: <i>3</i>\n")


def test_text_of_models_prompts_and_events_is_shown_and_never_obeyed(tmp_path):
    got = Page(report.write(hostile_run(tmp_path / "<script>run", HOSTILE)).read_text())
    tags = [tag for tag, _ in got.tags]
    assert not {*tags} & {"img", "i", "link", "iframe", "object", "form"} and (
        tags.count("script"),
        tags.count("style"),
    ) == (3, 2)
    assert not [
        name
        for _, attributes in got.tags
        for name in attributes
        if name.startswith("on") or name in ("src", "style")
    ]
    assert all(attributes["href"].startswith("#") for tag, attributes in got.tags if tag == "a")
    shown = HOSTILE.replace("\x00", "\ufffd").replace("\x1b", "\ufffd")
    assert got.texts["pre"].count(shown) == 6  # a prompt and a completion: best, worst and unverifiable
    assert (
        shown in got.texts["td"]
        and got.texts["h1"] == ["<script>run"]
        and "<b>x, step 1" in got.texts["summary"]
    )


def test_the_page_may_load_nothing_and_only_its_own_script_and_style_may_act(tmp_path):
    got = page(tmp_path, [{"step": 1, **LINE}], config="num_steps: 4\nloss:\n  beta: 0.1\n")
    text = (tmp_path / "report.html").read_text()
    policy = next(
        attributes["content"]
        for tag, attributes in got.tags
        if attributes.get("http-equiv") == "Content-Security-Policy"
    )
    assert re.fullmatch(
        r"default-src 'none'; style-src 'unsafe-hashes'( 'sha256-[^ ]+='){3}; "
        r"script-src( 'sha256-[^ ]+='){2}; img-src data: blob:; base-uri 'none'; form-action 'none'",
        policy,
    )
    own = text.replace(get_plotlyjs(), "")
    assert len(own) < len(text) - 1_000_000
    assert "url(" not in own and "@import" not in own
    assert "num_steps: 4\nloss:\n  beta: 0.1\n" in got.texts["pre"] and "config.yaml" in got.texts["summary"]
    assert [file.name for file in tmp_path.glob("*report*")] == ["report.html"]


def heads(got):
    """What is said of each completion: its kind and reward, and what it got from whom."""
    kinds = [text for text in got.texts["b"] if text.startswith(("best", "worst", "unverifiable"))]
    return list(zip(kinds, [text for text in got.texts["small"] if " · " in text], strict=True))


def test_the_best_the_worst_and_the_unverifiable_of_an_evaluation_are_shown_one_per_prompt(tmp_path):
    rows = [
        make_group(
            0,
            rewards=(1.0, 0.875, None),
            completions=["a0", "a1", "a2"],
            reward_reasons=[None, None, "timeout: 10 s"],
        ),
        make_group(
            1,
            rewards=(0.5, -1.0, 0.25),
            completions=["b0", "b1", "b2"],
            version=3,
            finish_reasons=["stop", "length", "stop"],
        ),
        make_group(2, rewards=(None, None, None), completions=["c0", "c1", "c2"]),
        make_group(3, rewards=(float("nan"), 0.0, 0.75), completions=["d0", "d1", "d" * 5000]),
    ]
    save_evaluation(tmp_path, "x-step-000010.arrow", *rows)
    got = page(tmp_path, [{"step": 10, "eval/x/pass@1": 0.5}])
    assert got.texts["pre"][1::2] == [
        "a0",
        "d" * 4000 + " … (5,000 characters)",
        "b0",
        "b1",
        "d1",
        "a1",
        "a2",
        "c0",
    ]
    said = heads(got)
    best, worst = (1, 0.75, 0.5), (-1, 0, 0.875)
    kinds = [
        *(f"best: reward {value}" for value in best),
        *(f"worst: reward {value}" for value in worst),
        "unverifiable",
        "unverifiable",
    ]
    assert [kind for kind, _ in said] == kinds
    assert (
        said[3][1] == "math -1 · version 3 · policy · length"
        and said[6][1] == "math null · version 0 · policy · stop · timeout: 10 s"
    )


def test_evaluations_are_shown_newest_first_some_of_very_many_and_the_training_from_its_newest_groups(
    tmp_path,
):
    for step in range(1, 31):
        save_evaluation(tmp_path, f"x-step-{step:06}.arrow", make_group(step, completions=[f"at {step}"] * 3))
    save_evaluation(tmp_path, "y-step-000010.arrow", make_group(2, rewards=(None,), completions=["y"]))
    (tmp_path / "evaluations" / "z-step-000010.arrow").write_bytes(b"ARROW1\0\0 torn")
    (tmp_path / "groups").mkdir()
    groups.save(
        groups.table([make_group(1, completions=["of an older file"] * 3)]),
        tmp_path / "groups" / "00000.arrow",
    )
    log = [
        make_group(i, rewards=(float(i), 0.0), completions=[f"trained {i}", "bad"]) for i in range(100, 0, -1)
    ]
    groups.save(groups.table(log), tmp_path / "groups" / "00001.arrow")
    got = page(tmp_path, [{"step": 10, "eval/x/pass@1": 0.5}])
    titles = [text for text in got.texts["summary"] if ", step " in text or "training" in text]
    assert [text for text in titles if text.startswith("x")] == [
        f"x, step {step}" for step in (30, 28, 25, 23, 20, 17, 15, 12, 9, 7, 4, 1)
    ]
    assert titles[-3:] == ["y, step 10", "z, step 10", "the newest 64 groups of the training"]
    assert "12 of the 30 evaluations of x." in got.texts["small"]
    assert any("z-step-000010.arrow is not an Arrow IPC file" in text for text in got.texts["p"])
    assert "trained 64" in got.texts["pre"] and not {"trained 65", "of an older file"} & {*got.texts["pre"]}
    # of each set, the newest
    assert [("open" in attributes) for tag, attributes in got.tags if tag == "details"].count(True) == 3


CALL = "<tool_call>{}</tool_call>"


def test_a_folder_that_is_no_run_is_refused_in_one_line(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ConfigError) as caught:
            report.write(folder)
        assert str(caught.value) == f"{folder}: no metrics.jsonl: not the directory of a run"
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(ConfigError, match=r": no metrics.jsonl: nothing to show yet: no step has ended$"):
        report.write(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / ".report.html.part").mkdir()
    with pytest.raises(ConfigError, match=r"^.*: cannot write report.html: Is a directory$"):
        report.write(tmp_path)
