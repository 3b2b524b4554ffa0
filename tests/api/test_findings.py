"""What numbers say to do: each sentence against numbers that call for it, and against those that do not."""

from __future__ import annotations

from typing import Any

import pytest

from dstill.api.compare import Row
from dstill.api.findings import difference, of_comparison, of_judgement, of_run
from dstill.api.judge import Judged
from dstill.artifacts.record import Curve
from dstill.artifacts.result import Cost, ProtocolId, Result, Score


def around(mean: float, spread: float = 0.01, n: int = 4) -> Score:
    """A score of `n` networks, half of them above the mean and half below."""
    return Score.of([[mean - spread, mean + spread] * (n // 2)])


def result(accuracy: Score, **changes: Any) -> Result:
    fields: dict[str, Any] = {
        **{"method": "dm", "data": "tiny", "data_fingerprint": "0" * 16, "ipc": 1, "sets": 1, "measured_on": "test"},
        **{"protocol": ProtocolId(name="ast", version=1), "accuracy": accuracy, "nets": {"convnet": accuracy}},
        **{"stored_bytes": 2048, "whole_bytes": 10**6, "seconds": 1.0, "alpha": None, "labels": "hard", "dstill": "0"},
        **{"random": None, "whole": None, "stages": {}},
    }
    return Result(**{**fields, **changes})


def test_a_difference_has_the_standard_error_of_two_means() -> None:
    points, error = difference(around(0.6, 0.02, 4), around(0.5, 0.03, 16))
    # Sample standard deviations 0.02 √(4/3) and 0.03 √(16/15), over 2 and 4.
    assert (points, error) == pytest.approx((10.0, 100 * (0.02**2 / 3 + 0.03**2 / 15) ** 0.5))
    assert difference(Score.of([[0.6]]), around(0.5))[1] == float("inf")


def test_a_run_that_random_images_equal_is_said_to_be_so() -> None:
    assert of_run(result(around(0.5), random=around(0.4)), None) == []
    (line,) = of_run(result(around(0.5), random=around(0.495)), None)
    assert "no better than random real images (+0.5 points)" in line
    assert "(-10.0 points)" in of_run(result(around(0.4), random=around(0.5)), None)[0]
    assert of_run(result(Score.of([[0.5]]), random=around(0.4)), None) == [], "one network, whose spread is not known"
    assert "(-10.0 points)" in of_run(result(Score.of([[0.4]]), random=around(0.5)), None)[0]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ((0.1, 0.2, 0.3, 0.31, 0.40, 0.41), "by +10.0 points{}: more iterations {} help"),
        (
            (0.1, 0.2, 0.40, 0.42, 0.41, 0.42),
            "by +0.5 points{}, which is within its noise: more iterations would not help much",
        ),
        ((0.1, 0.2, 0.40, 0.41, 0.30, 0.31), "by -10.0 points{}: fewer iterations would do"),
    ],
)
def test_the_validation_curve_says_whether_to_go_on(values: tuple[float, ...], words: str) -> None:
    curve, where = Curve(iterations=tuple(range(6)), values=values), ", on images that the run has also trained on"
    (line,) = of_run(result(around(0.5)), curve)
    assert line.endswith(words.format(where, "may"))
    (line,) = of_run(result(around(0.5), measured_on="validation"), curve)
    assert line.endswith(words.format("", "would"))
    assert of_run(result(around(0.5)), Curve(iterations=tuple(range(5)), values=values[1:])) == [], "too few looks"


def judged(labels: str, augmentation: str, validation: Score | None, net: str = "convnet") -> Judged:
    return Judged(net=net, labels=labels, augmentation=augmentation, result=result(around(0.5)), validation=validation)


def test_another_way_of_training_is_advised_if_it_is_clearly_better_on_the_validation_part() -> None:
    own = judged("soft", "flip", around(0.40))
    assert of_judgement([own, judged("soft", "none", around(0.44))]) == [
        "convnet: augmentation none is better than flip by 4.0 ± 0.8 points on the validation part"
    ]
    assert of_judgement([own, judged("hard", "flip", around(0.5))]) == [
        "convnet: labels hard is better than soft by 10.0 ± 0.8 points on the validation part"
    ]
    for other in (
        judged("soft", "none", around(0.41)),
        judged("hard", "none", around(0.5)),  # two things differ
        judged("soft", "none", around(0.5), net="vgg11"),
        judged("soft", "none", None),
    ):
        assert of_judgement([own, other]) == []


def row(method: str, mean: float, seconds: float, **changes: Any) -> Row:
    found = result(around(mean), method=method, cost=Cost(seconds=seconds, peak_bytes=None), **changes)
    return Row(method=method, ipc=changes.get("ipc", 1), result=found)


def test_a_comparison_names_who_is_ahead_at_equal_bytes_and_at_equal_time() -> None:
    failed = Row(method="dc", ipc=1, result=None, reason="no")
    rows = [row("random", 0.2, 0.0), row("dm", 0.5, 20.0), row("mtt", 0.7, 300.0), row("ast", 0.6, 200.0), failed]
    assert of_comparison([*rows, row("ftd", 0.65, 400.0)]) == [
        "IPC 1, family raw (2.0 KiB): mtt is ahead with 70.0 ± 1.2 % (n = 4), 5.0 ± 0.8 points above ftd",
        "at equal time of distilling: random from 0 s (20.0), dm from 20 s (50.0), ast from 3 min 20 s (60.0), "
        "mtt from 5 min 0 s (70.0)",
    ]
    level = of_comparison([*rows, row("ftd", 0.695, 400.0), row("datm", 0.69, 1.0)])[0]
    assert level.endswith("mtt is ahead with 70.0 ± 1.2 % (n = 4), not distinguishable from ftd, datm")


def test_rows_of_another_family_or_ipc_are_not_compared() -> None:
    rows = [row("dm", 0.5, 20.0), row("datm", 0.9, 20.0, labels="soft"), row("mtt", 0.9, 30.0, ipc=10)]
    assert of_comparison(rows) == []
    (line,) = of_comparison([*rows, row("frepo", 0.8, 20.0, labels="soft")])
    assert line.startswith("IPC 1, family labels") and "datm is ahead" in line
