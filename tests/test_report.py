"""The page of a run: what it shows, what it leaves out, and that nothing in a run can make it do anything."""

import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from tiny import make_group

from gvpo_ray import groups, report
from gvpo_ray.config import ConfigError

LINE = {
    "reward/mean": 0.5, "loss": 0.125, "gvpo/residual_var": 0.25, "policy/kl_ref": 0.0, "staleness/mean": 1.0, "tokens/trained": 3000.0,
    "time/step": 2.0, "time/wait_for_groups": 0.5,
}  # fmt: skip
STARTED = {"time": 0, "step": 0, "who": "run", "name": "started", "why": ""}
DIED = {"time": 86400, "step": 2, "who": "engine", "name": "engine-1", "why": "node lost"}
VOID = {"meta", "br"}


class Page(HTMLParser):
    """Tags with their attributes, and text by the tag it is in; fails on a tag that is not closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.texts = [], [], {}
        self.feed(text)
        self.close()
        assert not self.open
        self.charts = {}
        for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
            root = ElementTree.fromstring(svg)
            self.charts[root.attrib["aria-label"]] = root

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
            self.texts.setdefault(self.open[-1], []).append(data)

    def points(self, name):
        """Of a chart's line, in the units of the picture."""
        return [tuple(map(float, point.split(","))) for point in self.charts[name].find("polyline").attrib["points"].split()]

    def marks(self, name):
        return [mark.find("title").text for mark in self.charts[name].iter("g")]


def page(run_dir, lines=(), events=(), config=None):
    """The report of a run with these files."""
    run_dir.mkdir(exist_ok=True)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if events:
        (run_dir / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    if config is not None:
        (run_dir / "config.yaml").write_text(config)
    assert report.write(str(run_dir)) == run_dir / "report.html"
    return Page((run_dir / "report.html").read_text(encoding="utf-8"))


def test_every_metric_is_a_chart_and_first_and_last_are_a_table(tmp_path):
    lines = [{"step": 0, "eval/x/pass@1": 0.25}, *({"step": step, **LINE, "reward/mean": step / 4} for step in (1, 2, 3))]
    lines.append({"step": 3, "eval/x/pass@1": 0.75})
    got = page(tmp_path / "my-run", lines, config="num_steps: 3\n")
    assert list(got.charts) == [
        "reward/mean", "eval/x/pass@1", "loss", "gvpo/residual_var", "policy/kl_ref", "staleness/mean", "tokens/trained / time/step",
        "time/wait_for_groups / time/step",
    ]  # fmt: skip
    assert got.texts["h1"] == got.texts["title"][:1] == ["my-run"] and "3 of 3 steps trained: complete" in got.texts["p"]
    # Steps 0..3 lie on 62..612, values from 0.25 to 0.75 with a twentieth on both sides on 176..8: the ends are 168 / 22 inside.
    assert got.points("reward/mean") == [(245.3, 168.4), (428.7, 92), (612, 15.6)]
    assert got.points("eval/x/pass@1") == [(62, 168.4), (612, 15.6)] and len(list(got.charts["eval/x/pass@1"].iter("circle"))) == 2
    cells = got.texts["td"]
    assert cells[cells.index("reward/mean") :][:5] == ["reward/mean", "0.25", "1", "0.75", "3"]
    assert got.texts["span"][-2:] == ["1,500", "0.25"]  # tokens per second; share of the step that was waited
    assert "No evaluation." in got.texts["p"]  # its completions are not there


def test_a_run_that_has_only_begun_has_a_page(tmp_path):
    assert "0 steps trained: not complete" in page(tmp_path, []).texts["p"]
    assert "0 of 5 steps trained: running, or killed" in page(tmp_path, [], [STARTED], "num_steps: 5").texts["p"]
    events = [STARTED, {**STARTED, "name": "stopped"}]
    got = page(tmp_path, [{"step": 1, **LINE}], events, "num_steps: 5")
    assert "1 of 5 steps trained: stopped before its end" in got.texts["p"]
    assert got.points("loss") == [(62, 92)] and len(list(got.charts["loss"].iter("circle"))) == 1
    assert "0 recoveries" in got.texts["p"] and got.texts["td"][:4] == ["1970-01-01 00:00:00 UTC", "0", "run", "started"]


def test_ten_thousand_steps_are_a_thousand_bucket_means(tmp_path):
    got = page(tmp_path, ({"step": step, **LINE, "loss": step % 10} for step in range(1, 10_001)))
    points = got.points("loss")
    assert len(points) == 1000 and len({y for _, y in points}) == 1  # the mean of ten neighbours is always 4.5
    assert points[0][0] == pytest.approx(62 + 550 * 4.5 / 9999, abs=0.1) and points[-1][0] == pytest.approx(612 - 550 * 4.5 / 9999, abs=0.1)
    assert (tmp_path / "report.html").stat().st_size < 400_000
    assert report.thin([(1, 2), (3, 4), (5, 9)], num=2) == [(2, 3), (5, 9)]


def test_recoveries_are_marks_in_every_chart_and_counted_by_kind_while_starts_are_only_listed(tmp_path):
    verifier = {**DIED, "step": 3, "who": "verifier", "name": "verifier-0", "why": "out of memory"}
    with_events = [STARTED, DIED, verifier, {**verifier, "name": "verifier-1"}, {**DIED, "step": 99}]
    got = page(tmp_path, [{"step": step, **LINE} for step in range(1, 6)], with_events)
    assert "4 recoveries: engine 2, verifier 2" in got.texts["p"]
    for name in got.charts:
        assert got.marks(name) == [
            "step 2: engine engine-1: node lost",
            "step 3: verifier verifier-0: out of memory\nstep 3: verifier verifier-1: out of memory",
            "step 99: engine engine-1: node lost",
        ]
    marks = [mark.find("path").attrib["d"] for mark in got.charts["loss"].iter("g")]
    assert marks == ["M200 8V176", "M337 8V176", "M612 8V176"]  # steps 1..5 on 62..612; what lies beyond is at the edge
    cells = got.texts["td"]
    assert cells[cells.index("1970-01-02 00:00:00 UTC") :][:5] == ["1970-01-02 00:00:00 UTC", "2", "engine", "engine-1", "node lost"]
    assert "started" in cells


def test_a_thousand_recoveries_of_one_step_are_one_mark_that_says_how_many(tmp_path):
    got = page(tmp_path, [{"step": 1, **LINE}, {"step": 2, **LINE}], [DIED] * 1000)
    assert [mark.splitlines()[-1] for mark in got.marks("loss")] == ["and 992 more"] and "1000 recoveries: engine 1000" in got.texts["p"]


def test_torn_lines_and_what_is_no_number_are_left_out(tmp_path):
    page(tmp_path, [{"step": 1, **LINE}], [STARTED, DIED])
    strange = ['{"step": 2, "loss": NaN, "reward/mean": Infinity, "grad_norm": "?"}', '{"step": NaN, "loss": 1}', "7", '{"step": 3, "lo']
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write("\n".join([json.dumps({"step": 2, **LINE, "time/step": 0.0, "loss": 1e308}), *strange]))
    with open(tmp_path / "events.jsonl", "a") as file:
        file.write('{"who": "node", "step": null, "time": 1e99}\n{"time": 9, "step": 9, "who": "dri')
    text = report.write(tmp_path).read_text()
    got = Page(text)
    assert not re.search(r"\b(nan|inf)\b", text, re.IGNORECASE)
    assert got.points("loss") == got.points("tokens/trained / time/step") == [(62, 92)] and len(got.points("reward/mean")) == 2
    assert "2 recoveries: engine 1, node 1" in got.texts["p"] and "grad_norm" not in got.texts["td"]


@pytest.mark.parametrize("value", [0.0, -3.0, 1e-300, 1e16, -1e299, 12345.678])
def test_a_metric_that_never_changes_is_a_level_line(tmp_path, value):
    got = page(tmp_path, [{"step": step, "loss": value} for step in (1, 2)])
    assert got.points("loss") == [(62, 92), (612, 92)]


@pytest.mark.parametrize("values", [(0.0, 1e-20), (-1e299, 1e299), (1.0, 1.0 + 1e-7), (-3.0, 5.0), (0.1, 0.1 + 1e-10)])
def test_an_axis_has_some_round_numbers_whatever_the_scale(tmp_path, values):
    got = page(tmp_path, [{"step": step, "loss": value} for step, value in enumerate(values)])
    labels = [text.text for text in got.charts["loss"].iter("text") if "class" not in text.attrib]
    assert 2 <= len(labels) <= 6
    assert all(8 <= y <= 176 for _, y in got.points("loss"))


HOSTILE = "</pre></td><script>alert(1)</script><img src=x onerror='alert(1)'>\"&amp;\x00\x1b\u202e"


def test_text_of_models_prompts_and_events_is_shown_and_never_obeyed(tmp_path):
    row = make_group(0, rewards=(1.0, 0.0), prompt=HOSTILE, answer=HOSTILE, completions=[HOSTILE] * 2)
    run_dir = tmp_path / "<script>run"
    (run_dir / "evaluations").mkdir(parents=True)
    groups.save(groups.table([row]), run_dir / "evaluations" / "<b>x-step-000001.arrow")
    event = {**DIED, "who": HOSTILE, "name": HOSTILE, "why": HOSTILE + "\ud800"}
    lines = [{"step": 1, **LINE, "eval/<img src=y>/pass@1": 0.5, HOSTILE: 1.0}]
    got = page(run_dir, lines, [event], f"run_dir: {json.dumps(HOSTILE)}\nnum_steps: <i>3</i>\n")
    tags = {tag for tag, _ in got.tags}
    assert not tags & {"script", "img", "i", "link", "iframe", "object", "form", "a"}
    assert not [name for _, attributes in got.tags for name in attributes if name.startswith("on") or name in ("src", "href", "style")]
    assert ("meta", {"http-equiv": "Content-Security-Policy", "content": "default-src 'none'; style-src 'unsafe-inline'"}) in got.tags
    shown = HOSTILE.replace("\x00", "\ufffd").replace("\x1b", "\ufffd")
    assert got.texts["pre"].count(shown) == 4  # a prompt and a completion, best and worst
    assert shown in got.texts["td"] and got.texts["h3"] == ["<b>x, step 1"] and got.texts["h1"] == ["<script>run"]


def test_the_best_and_the_worst_of_the_last_evaluation_are_shown_one_per_prompt(tmp_path):
    folder = tmp_path / "evaluations"
    folder.mkdir()
    rows = [
        make_group(0, rewards=(1.0, 0.875, None), completions=["a0", "a1", "a2"]),
        make_group(1, rewards=(0.5, -1.0, 0.25), completions=["b0", "b1", "b2"]),
        make_group(2, rewards=(None, None, None), completions=["c0", "c1", "c2"]),
        make_group(3, rewards=(float("nan"), 0.0, 0.75), completions=["d0", "d1", "d" * 5000]),
    ]
    groups.save(groups.table([make_group(9, completions=["old"] * 3)]), folder / "x-step-000009.arrow")
    groups.save(groups.table(rows), folder / "x-step-000010.arrow")
    groups.save(groups.table([make_group(4, rewards=(2.0,), completions=["only"])]), folder / "w-step-000010.arrow")
    groups.save(groups.table(rows[2:3]), folder / "y-step-000010.arrow")
    (folder / "z-step-000010.arrow").write_bytes(b"ARROW1\0\0 torn")
    got = page(tmp_path, [{"step": 10, "eval/x/pass@1": 0.5}])
    assert got.texts["h4"] == [f"{kind}: reward {value}" for kind, value in (
        ("best", 2), ("best", 1), ("best", 0.75), ("best", 0.5), ("worst", -1), ("worst", 0), ("worst", 0.875),
    )]  # fmt: skip
    assert got.texts["pre"][1::2] == ["only", "a0", "d" * 4000 + " … (5,000 characters)", "b0", "b1", "d1", "a1"]
    assert got.texts["h3"] == ["w, step 10", "x, step 10", "y, step 10", "z, step 10"] and "No completion has a reward." in got.texts["p"]
    assert any("z-step-000010.arrow is not an Arrow IPC file" in text for text in got.texts["p"])


def test_the_page_is_alone_and_reads_in_light_and_dark(tmp_path):
    got = page(tmp_path, [{"step": 1, **LINE}], config="num_steps: 4\nloss:\n  beta: 0.1\n")
    text = (tmp_path / "report.html").read_text()
    assert "://" not in text and "url(" not in text and "@import" not in text and "prefers-color-scheme: dark" in text
    assert "num_steps: 4\nloss:\n  beta: 0.1\n" in got.texts["pre"] and "config.yaml" in got.texts["summary"]
    assert [file.name for file in tmp_path.glob("*report*")] == ["report.html"]


def test_a_folder_that_is_no_run_is_refused_in_one_line(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ConfigError) as caught:
            report.write(folder)
        assert str(caught.value) == f"{folder}: no metrics.jsonl: not the directory of a run"
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / ".report.html.part").mkdir()
    with pytest.raises(ConfigError, match=r"^.*: cannot write report.html: Is a directory$"):
        report.write(tmp_path)
