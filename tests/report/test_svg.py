import math
import re

import pytest

from deltaloom.report import numbers, svg
from deltaloom.report.axes import Scale, log_ticks, ticks
from deltaloom.report.labels import label_places


def test_ticks_are_round_and_inside():
    assert ticks(0.0, 1.0) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(-0.031, 0.052) == [-0.02, 0.0, 0.02, 0.04]
    assert ticks(3.0, 3.0) == [3.0]
    assert log_ticks(3e3, 4e6) == [1e4, 1e5, 1e6]
    assert all(3e13 <= value <= 7e13 for value in log_ticks(3e13, 7e13))


def test_scale_of_equal_values_has_room():
    scale = Scale.around([0.5, 0.5])
    assert scale(0.5) == pytest.approx(50)
    assert Scale.around([]).low < Scale.around([]).high


def test_intervals_sit_where_their_values_are():
    rows = [
        svg.Interval("a", 0.5, 0.4, 0.6, "0.5"),
        svg.Interval("b", 0.2, -math.inf, math.inf, ""),
    ]
    chart = svg.intervals(rows, 0.2, "two models")
    assert 'role="img" aria-label="two models"' in chart
    places = [float(x) for x in re.findall(r'cx="([\d.]+)%"', chart)]
    assert 0 < places[1] < places[0] < 100
    assert 'x1="0.00%"' in chart  # an unknown end is drawn to the edge
    assert "nan" not in chart
    assert "inf" not in chart


def test_every_chart_escapes_its_texts():
    bad = "<script>x</script>\"'"
    charts = [
        svg.intervals([svg.Interval(bad, 1, 0, 2, bad)], None, bad),
        svg.lines([svg.Series(bad, [(1, 2), (2, 3)], dots=True)], bad, bad),
        svg.bars([svg.Bars(bad, [(1, bad)])], bad),
        svg.scatter([svg.Point(bad, 1, 1, 0, 2, bad)], [(bad, 1)], bad, bad, bad),
        svg.histogram([(1, 2), (0, 3)], [0, 1, 2], 1.0, bad, bad),
    ]
    for chart in charts:
        assert "<script" not in chart
        assert '"\'"' not in chart
        assert chart.count("<svg") == chart.count("</svg>")


def test_more_series_than_colours_are_dashed():
    chart = svg.lines([svg.Series(str(k), [(0, k), (1, k)], k) for k in range(8)], "n", "x")
    assert chart.count("dashed") == 2


def test_cheap_and_dear_models_share_a_log_axis():
    points = [svg.Point(str(x), x, 0.5, 0.4, 0.6, "") for x in (1e10, 1e13)]
    assert "(log scale)" in svg.scatter(points, [], "n", "FLOPs", "accuracy")
    near = [svg.Point(str(x), x, 0.5, 0.4, 0.6, "") for x in (1e10, 2e10)]
    assert "(log scale)" not in svg.scatter(near, [], "n", "FLOPs", "accuracy")


def test_labels_of_near_points_do_not_lie_on_one_another():
    spots = [(30.0, 100.0, 90.0, 110.0), (32.0, 102.0, 92.0, 112.0), (90.0, 50.0, 40.0, 60.0)]
    places = label_places(spots, ["tuned-less", "tuned-random", "tuned-all"], 200)
    assert len({(y, anchor) for _, y, anchor in places}) == 3
    assert places[2][2] == "end"  # no room at the right


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (numbers.short(1_234_567), "1.2 M"),
        (numbers.short(999_999), "1 M"),
        (numbers.short(34.0), "34"),
        (numbers.short(0.0), "0"),
        (numbers.flops(4.1e12), "4.1 TFLOP"),
        (numbers.size(3 * 2**30), "3.0 GiB"),
        (numbers.seconds(0.42), "0.4 s"),
        (numbers.seconds(38.2), "38 s"),
        (numbers.seconds(125), "2 min 05 s"),
        (numbers.seconds(12_000), "3 h 20 min"),
        (numbers.interval(0.22, 0.40), "[0.220, 0.400]"),
        (numbers.interval(-math.inf, math.inf), "[unknown]"),
        (numbers.interval(0.5, math.inf), "[0.500, unknown]"),
        (numbers.signed(0.31, 2), "+0.31"),
        (numbers.signed(-0.31, 2), "−0.31"),
        (numbers.signed(-0.001, 2), "0.00"),
        (numbers.probability(0.0002), "< 0.001"),
        (numbers.share(1, 24), "4.2 %"),
        (numbers.share(0, 0), "0 %"),
        (numbers.tick(-0.5), "−0.5"),
    ],
)
def test_numbers_for_people(text, wanted):
    assert text == wanted
