"""The charts of a report: which points are drawn, and how they are named."""

import pytest

from gvpo_ray.observe.report import figures


def test_of_many_points_the_lowest_and_the_highest_of_each_column_are_kept_and_no_other():
    points = [(step, step % 10) for step in range(100)]
    points[57] = (57, 1000)  # a spike
    kept = figures.thin(points, 0, 100, num_columns=10)
    assert kept == sorted(
        {
            *((10 * i, 0) for i in range(10)),
            *((10 * i + 9, 9) for i in range(10) if i != 5),
            (57, 1000),
            (99, 9),
        }
    )
    assert figures.thin(points[:20], 0, 100, num_columns=10) == points[:20]


def test_the_ends_of_a_line_are_kept_whatever_their_values():
    points = [(step, 0.0 if step == 50 else float(step == 51) * 2 + 1) for step in range(100)]
    assert figures.thin(points, 0, 100, num_columns=1) == [(0, 1.0), (50, 0.0), (51, 3.0), (99, 1.0)]


def test_the_bold_line_is_means_over_neighbours():
    assert figures.trend([(1, 2), (3, 4), (5, 9)], num=2) == [(2, 3), (5, 9)]
    assert figures.trend([(1, 2), (3, 4)], num=50) == [(1, 2), (3, 4)]


@pytest.mark.parametrize(
    ("label", "edges", "said"),
    [
        ("0", (0, 1, 2, 4), "0"),
        ("1", (0, 1, 2, 4), "1"),
        ("4", (0, 1, 2, 4), "3–4"),
        ("inf", (0, 1, 2, 4), "> 4"),
        ("external", (0, 1, 2, 4), "external"),
        ("-2.0", (-2.0, -0.5, 0.5), "≤ -2"),
        ("0.5", (-2.0, -0.5, 0.5), "≤ 0.5"),
        ("spot", (), "spot"),
    ],
)
def test_a_bucket_is_named_by_what_lies_in_it(label, edges, said):
    assert figures.bucket(label, edges) == said


def test_lines_of_one_chart_have_a_colour_by_label_and_are_named_with_their_run() -> None:
    lines = [figures.Line(label, [(0, 1.0), (1, 2.0)], run="one") for label in ("b", "a", "<i>")]
    lines.append(figures.Line("b", [(0, 1.0), (1, 2.0)], number=1, run="other"))
    traces = figures.chart("Speed", "", "", lines, (0, 1))["traces"]
    assert [(trace["name"], trace["meta"]["colour"], trace["meta"]["run"]) for trace in traces] == [
        ("one b", 2, 0),
        ("one a", 1, 0),
        ("one &lt;i&gt;", 0, 0),
        ("other b", 2, 1),
    ]


def test_a_band_is_as_high_as_the_spread() -> None:
    line = figures.Line("", [(0, 0.5), (1, 0.5)], {0: 0.5, 1: 0.25})
    band = figures.chart("pass@1", "", "", [line], (0, 1))["traces"][0]
    assert (band["meta"]["kind"], band["x"], band["y"]) == ("band", [0, 1, 1, 0], [1.0, 0.75, 0.25, 0.0])


def test_a_histogram_has_a_row_for_each_bucket_between_those_used_and_the_shares_of_each_column() -> None:
    none = [(1, 0.0), (2, 0.0)]
    shares = {"0": none, "1": [(1, 0.75), (2, 1.0)], "2": none, "4": [(1, 0.25), (2, 0.0)], "inf": none}
    figure = figures.histogram("Staleness", "", "", shares, (1, 2))
    assert figure is not None and figure["rows"] == ["1", "2", "3–4"]
    (heat,) = figure["traces"]
    assert heat["z"] == [[0.75, 1.0], [0.0, 0.0], [0.25, 0.0]] and heat["x"] == [1, 2]
    assert heat["text"][2] == ["step 1<br>3–4", "step 2<br>3–4"]
    assert figure["exact"] == [("1", "100.0000%"), ("2", "0.0000%"), ("3–4", "0.0000%")]
    assert figures.histogram("Staleness", "", "", {"0": [(1, 0.0)]}, (1, 2)) is None


def test_ten_thousand_steps_of_a_histogram_are_eighty_columns_of_means() -> None:
    steps = range(1, 10_001)
    shares = {"0": [(step, step % 2) for step in steps], "inf": [(step, 1 - step % 2) for step in steps]}
    figure = figures.histogram("Staleness", "", "", shares, (1, 10_000))
    assert figure is not None
    (heat,) = figure["traces"]
    assert len(heat["x"]) == 80 and heat["text"][0][0] == "steps 1 to 125, mean<br>0"
    assert [row[0] for row in heat["z"]] == [0.504, 0.496]  # 63 odd steps and 62 even ones


def test_events_lie_in_the_lane_of_who_they_happened_to() -> None:
    events = [
        {"step": 1, "who": "run", "name": "started", "why": ""},
        {"step": 2, "who": "engine", "name": "engines-1", "why": "lost <b>"},
    ]
    figure = figures.lanes(events, (1, 3))
    assert figure is not None and figure["rows"] == ["run", "engine"]
    found = [(trace["y"], trace["text"], trace["meta"]["kind"]) for trace in figure["traces"]]
    assert found == [
        ([0], ["step 1: run started:"], "calm"),
        ([1], ["step 2: engine engines-1: lost &lt;b&gt;"], "mark"),
    ]
    assert figures.lanes([], (1, 3)) is None
