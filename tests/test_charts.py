"""The pictures of a report: which points are drawn, and what the words beside them are."""

import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from gvpo_ray.observe.report import charts


def picture(figure):
    return ElementTree.fromstring(re.search(r"<svg.*?</svg>", figure, re.DOTALL)[0])


def words(svg):
    return [text.text for text in svg.iter("text") if "step" not in text.attrib.get("class", "")]


def test_of_many_points_the_lowest_and_the_highest_of_each_column_are_kept_and_no_other():
    points = [(step, step % 10) for step in range(100)]
    points[57] = (57, 1000)  # a spike
    kept = charts.thin(points, 0, 100, num_columns=10)
    assert kept == sorted(
        {
            *((10 * i, 0) for i in range(10)),
            *((10 * i + 9, 9) for i in range(10) if i != 5),
            (57, 1000),
            (99, 9),
        }
    )
    assert charts.thin(points[:20], 0, 100, num_columns=10) == points[:20]


def test_the_ends_of_a_line_are_kept_whatever_their_values():
    points = [(step, 0.0 if step == 50 else float(step == 51) * 2 + 1) for step in range(100)]
    assert charts.thin(points, 0, 100, num_columns=1) == [(0, 1.0), (50, 0.0), (51, 3.0), (99, 1.0)]


def test_the_bold_line_is_means_over_neighbours():
    assert charts.trend([(1, 2), (3, 4), (5, 9)], num=2) == [(2, 3), (5, 9)]
    assert charts.trend([(1, 2), (3, 4)], num=50) == [(1, 2), (3, 4)]


@pytest.mark.parametrize(
    ("label", "edges", "said"),
    [
        ("0", (0, 1, 2, 4), "0"),
        ("1", (0, 1, 2, 4), "1"),
        ("4", (0, 1, 2, 4), "3–4"),
        ("inf", (0, 1, 2, 4), "> 4"),
        ("foreign", (0, 1, 2, 4), "foreign"),
        ("-2.0", (-2.0, -0.5, 0.5), "≤ -2"),
        ("0.5", (-2.0, -0.5, 0.5), "≤ 0.5"),
        ("spot", (), "spot"),
    ],
)
def test_a_bucket_is_named_by_what_lies_in_it(label, edges, said):
    assert charts.bucket(label, edges) == said


def test_lines_of_one_chart_are_labelled_at_their_ends_and_no_label_lies_on_another():
    lines = [
        charts.Line(label, [(0, 1.0), (1, 1.0 + i / 1000)])
        for i, label in enumerate(("b", "a", "a very long name of a pool"))
    ]
    lines.append(charts.Line("b", [(0, 1.0), (1, 2.0)], number=1, run="other"))
    svg = picture(charts.chart("pools/*/tokens_per_s", "", lines, (0, 1)))
    labels = [text for text in svg.iter("text") if "label" in text.attrib.get("class", "")]
    # of the run that has it first
    assert sorted(text.text for text in labels) == ["a", "a very long nam…", "b"]
    heights = sorted(float(text.attrib["y"]) for text in labels)
    assert all(below - above >= 12.9 for above, below in pairwise(heights))
    drawn = [path.attrib for path in svg.iter("path") if "line" in path.attrib.get("class", "")]
    assert [(path["class"], path["data-label"]) for path in drawn] == [
        ("line a c2", "b"),
        ("line a c0", "a"),
        ("line a c1", "a very long name of a pool"),
        ("line b c2", "other b"),
    ]


def test_a_band_is_as_high_as_the_spread_and_the_axis_has_room_for_it():
    svg = picture(
        charts.chart("eval/x/pass@1", "", [charts.Line("", [(0, 0.5), (1, 0.5)], {0: 0.5, 1: 0.25})], (0, 1))
    )
    band = next(path.attrib["d"] for path in svg.iter("path") if "band" in path.attrib.get("class", ""))
    # From 0 to 1 and a twentieth on both sides on 176..8: a unit is 168 / 1.1.
    assert band == "M58,15.6364 462,53.8182 462,130.182 58,168.364Z"


def test_a_histogram_has_a_row_for_each_bucket_between_those_used_and_says_the_shares_of_each_column():
    none = [(1, 0.0), (2, 0.0)]
    shares = {"0": none, "1": [(1, 0.75), (2, 1.0)], "2": none, "4": [(1, 0.25), (2, 0.0)], "inf": none}
    figure = charts.histogram("staleness/histogram", "", shares, (1, 2))
    svg = picture(figure)
    assert words(svg) == ["1", "2", "3–4"]
    columns = [column.find("title").text for column in svg.iter("g") if column.find("title") is not None]
    assert columns == ["step 1\n1: 75.0%\n3–4: 25.0%", "step 2\n1: 100.0%"]
    assert re.findall(r"<td>(.*?)</td>", figure) == ["1", "100.0000%", "2", "0.0000%", "3–4", "0.0000%"]
    assert charts.histogram("staleness/histogram", "", {"0": [(1, 0.0)]}, (1, 2)) == ""


def test_ten_thousand_steps_of_a_histogram_are_eighty_columns_of_means():
    shares = {
        "0": [(step, step % 2) for step in range(1, 10_001)],
        "inf": [(step, 1 - step % 2) for step in range(1, 10_001)],
    }
    svg = picture(charts.histogram("staleness/histogram", "", shares, (1, 10_000)))
    titles = [column.find("title").text for column in svg.iter("g") if column.find("title") is not None]
    assert (
        len(titles) == 80
        and titles[0].splitlines()[0] == "steps 1 to 125, mean"
        and titles[1].splitlines()[1:] == ["0: 49.6%", "> 0: 50.4%"]
    )


def test_events_lie_in_the_lane_of_who_they_happened_to():
    events = [
        {"step": 1, "who": "run", "name": "started", "why": ""},
        {"step": 2, "who": "engine", "name": "engines-1", "why": "lost"},
    ]
    svg = picture(charts.lanes(events, (1, 3)))
    assert words(svg) == ["engine", "run"]
    assert [mark.find("title").text for mark in svg.iter("g")] == [
        "step 2: engine engines-1: lost",
        "step 1: run started: ",
    ]
    assert charts.lanes([], (1, 3)) == ""
