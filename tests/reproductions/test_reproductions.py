"""Every table and figure resolves at every scale, and tables show what their runs recorded."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

import dstill
from dstill import DstillError
from dstill.api.apart import environment
from dstill.artifacts.record import Curve, ExpertCurves, RunRecord, SetRecord
from dstill.artifacts.result import Cost, ProtocolId, Result, Score
from dstill.config import recipes
from dstill.config.registry import methods
from dstill.config.settings import Recipe
from dstill.data.catalog import DATASETS
from dstill.errors import CollapseError
from dstill.jobs.job import Workplace
from dstill.reproductions.drawing import draw
from dstill.reproductions.page import Entry, Sets, cell, page, paired_difference, seconds, table, verdict
from dstill.reproductions.resolving import applies
from dstill.reproductions.resolving import resolved as from_row
from dstill.reproductions.run import plan_reproduction
from dstill.reproductions.spec import Case, Row, Scale, ScaleName, load_reproduction, reproduction_names

SCALES: tuple[ScaleName, ...] = ("smoke", "cpu", "paper")
NAMES = [*(f"table{k}" for k in range(1, 9)), *(f"fig{k}" for k in range(3, 12)), "peeking", "untried", "against-mtt"]


def test_all_tables_figures_and_experiments_are_there() -> None:
    assert reproduction_names() == NAMES
    with pytest.raises(DstillError, match="table3"):
        load_reproduction("tabel3")


@pytest.mark.parametrize("what", NAMES)
def test_a_file_names_what_exists(what: str) -> None:
    reproduction = load_reproduction(what)
    names = [row.name for row in reproduction.rows]
    assert len(set(names)) == len(names)
    assert set(SCALES) <= set(reproduction.scales) <= {*SCALES, "gpu"}
    assert {row.method for row in reproduction.rows} <= set(methods())
    assert bool(reproduction.paper) == what.startswith(("table", "fig"))
    for scale in reproduction.scales.values():
        assert {*scale.rows, *scale.row_changes} <= set(names)
        assert {case.data for case in scale.cases} <= set(DATASETS)
        assert set(scale.case_changes) <= {case.name for case in scale.cases}
    at_paper_scale = {case.name for case in reproduction.scales["paper"].cases}
    assert {case for row in reproduction.rows for case in row.published} <= at_paper_scale


@pytest.mark.parametrize("what", NAMES)
def test_every_shared_change_changes_some_row(what: str) -> None:
    reproduction = load_reproduction(what)
    for name, scale in reproduction.scales.items():
        found = [resolved(row, case) for row in reproduction.rows_at(name) for case in scale.cases]
        for change in scale.changes:
            assert any(applies(change, recipe) for recipe in found), change
        for case in scale.cases:
            for change in scale.case_changes.get(case.name, []):
                assert any(applies(change, resolved(row, case)) for row in reproduction.rows_at(name)), change


def resolved(row: Row, case: Case) -> Recipe:
    shape = DATASETS[case.data].shape
    assert shape is not None
    return recipes.resolve(None, case.data, shape, method=row.method, ipc=case.ipc)[0]


@pytest.mark.parametrize("what", ["fig4", "table4"])
def test_the_sets_of_table3_are_shown_without_being_distilled_again(what: str) -> None:
    def changes(name: str, row: str) -> set[str]:
        scale = load_reproduction(name).scales["cpu"]
        return {*scale.changes, *scale.row_changes.get(row, [])}

    assert changes(what, "mtt") == changes("table3", "mtt")
    assert changes(what, "ast") == changes("table3", "ast")


@pytest.mark.usefixtures("no_calibration")
@pytest.mark.parametrize(("what", "scale"), [(what, scale) for what in NAMES for scale in load_reproduction(what).scales])
def test_every_scale_can_be_planned(what: str, scale: ScaleName, tmp_path: Path) -> None:
    reproduction = load_reproduction(what)
    plan = plan_reproduction(what, scale=scale, machine=dstill.Machine(device="cpu", cache=tmp_path))
    assert len(plan.stages) == len(reproduction.rows_at(scale)) * len(reproduction.scales[scale].cases)
    assert 0 < plan.seconds < math.inf


@pytest.mark.usefixtures("no_calibration")
def test_rows_can_be_chosen(tmp_path: Path) -> None:
    plan = plan_reproduction("table3", only=["mtt", "random"], machine=dstill.Machine(device="cpu", cache=tmp_path))
    assert [stage.name for stage in plan.stages] == ["Random, digits, IPC 1", "MTT, digits, IPC 1"]
    with pytest.raises(DstillError, match="no row 'mt'"):
        plan_reproduction("table3", only=["mt"], machine=dstill.Machine(device="cpu", cache=tmp_path))
    with pytest.raises(DstillError, match="table1 has no scale 'gpu': take one of smoke, cpu, paper"):
        plan_reproduction("table1", scale="gpu", machine=dstill.Machine(device="cpu", cache=tmp_path))


@pytest.mark.usefixtures("no_calibration")
def test_cases_can_be_chosen(tmp_path: Path) -> None:
    where: dict[str, Any] = {"only": ["dm"], "machine": dstill.Machine(device="cpu", cache=tmp_path)}
    plan = plan_reproduction("table3", scale="paper", cases=["cifar100-ipc1", "cifar10-ipc10"], **where)
    assert [stage.name for stage in plan.stages] == ["DM, cifar10, IPC 10", "DM, cifar100, IPC 1"], "in the order of the file"
    with pytest.raises(DstillError, match=r"table3 at scale paper has no case 'cifar10-ipc100'; .*cifar10-ipc10"):
        plan_reproduction("table3", scale="paper", cases=["cifar10-ipc100"], **where)


def test_a_row_has_the_last_word_on_its_settings(tmp_path: Path) -> None:
    place = Workplace.of(dstill.Machine(device="cpu", cache=tmp_path), False)
    scale = Scale(
        says="",
        cases=[Case(data="cifar100", ipc=1), Case(data="cifar10", ipc=1)],
        changes=["protocol=quick", "distill.iterations=1", "distill.student_steps=1", "distill.lr_images=1", "experts.count=1"],
        case_changes={
            "cifar100-ipc1": ["distill.iterations=2", "distill.student_steps=2", "distill.lr_images=2", "experts.count=2"]
        },
        row_changes={"a": ["distill.lr_images=4"]},
    )
    row = Row(name="a", title="A", method="mtt", changes=["distill.student_steps=3", "distill.lr_images=3"])

    def settings(case: Case) -> tuple[float, ...]:
        recipe = from_row(scale, row, case, None, 0, place).job.recipe
        distill = recipe.distill.model_dump()
        assert recipe.protocol == "quick"
        return (*(distill[key] for key in ("iterations", "student_steps", "lr_images")), recipe.expert_config.count)

    assert settings(scale.cases[0]) == (2, 3, 4, 2)
    assert settings(scale.cases[1]) == (1, 3, 4, 1), "another case's changes are not its own"
    without = from_row(scale, Row(name="b", title="B", method="dm"), scale.cases[0], None, 0, place).job.recipe
    assert (without.distill.iterations, without.experts) == (2, None), "DM has neither experts nor student steps"


def test_a_case_can_have_its_own_number_of_looks(tmp_path: Path) -> None:
    place = Workplace.of(dstill.Machine(device="cpu", cache=tmp_path), False)
    cases = [Case(data="cifar100", ipc=1), Case(data="cifar100", ipc=10, looks=3), Case(data="cifar10", ipc=1, looks=0)]
    scale = Scale(says="", cases=cases, changes=["distill.iterations=300"], looks=10)
    row = Row(name="a", title="A", method="mtt")
    every = [from_row(scale, row, case, None, 0, place).options["validate_every"] for case in cases]
    assert every == [30, 100, 0]


@pytest.mark.usefixtures("no_calibration")
def test_the_number_of_sets_can_be_chosen(tmp_path: Path) -> None:
    one, two = (
        plan_reproduction("table3", only=["dm"], sets=sets, machine=dstill.Machine(device="cpu", cache=tmp_path))
        for sets in (1, 2)
    )
    assert one.seconds < two.seconds <= 2 * one.seconds
    with pytest.raises(DstillError, match="sets must be at least 1, got 0"):
        plan_reproduction("table3", sets=0, machine=dstill.Machine(device="cpu", cache=tmp_path))


def sets(
    row: str,
    by_set: Sequence[Sequence[float]],
    *,
    lost: Mapping[int, str] = {},
    iterations: int = 10,
    steps: int = 30,
    following: tuple[float, ...] = (),
    looks: tuple[float, ...] = (),
    note: str = "",
) -> Sets:
    """A row with the accuracies of each set's networks; the sets in `lost` collapsed instead, for the reason given there."""
    curves = {"alpha": Curve(iterations=(1, 2), values=(0.01, 0.02))}
    if looks:
        curves["validation_accuracy"] = Curve(iterations=tuple(range(3, 3 * len(looks) + 3, 3)), values=looks)
    passed = Curve(iterations=(1, 9), values=(20.0, 180.0))
    entries = []
    for index, values in enumerate(by_set):
        reason = lost.get(index, "")
        record = RunRecord(
            recipe={"note": note, "distill": {"student_steps": steps}},
            result=None if reason else result(values),
            reason=reason,
            collapsed=bool(reason),
            experts=ExpertCurves(count=3, accuracy=(0.2, 0.5), step_lengths=(3.0, 1.0)),
            sets=(SetRecord(curves=curves, seconds=passed, inner_loss={0: 1.0}, iterations=iterations, skipped=0),),
            cost=Cost(seconds=25.0, peak_bytes=3 * 2**20),
        )
        beside = {"following": following, "environment": {"processor": "one", "torch": "2"}}
        entries.append(Entry(row=row, case="cifar100-ipc10", set=index, request={}, record=record, **beside))
    return Sets(entries)


def result(values: Sequence[float]) -> Result:
    score = Score.of([values])
    return Result(
        method="mtt",
        data="cifar100",
        data_fingerprint="0",
        ipc=10,
        sets=1,
        protocol=ProtocolId(name="ast", version=1),
        measured_on="test",
        accuracy=score,
        random=None,
        whole=None,
        nets={"convnet": score, "vgg11": Score.of([[0.2, 0.4]])},
        confusion=((1, 2), (3, 4)),
        alpha=0.01,
        stored_bytes=1,
        seconds=1,
        stages={"distill": 0.5},
        dstill="0",
    )


def test_cells_are_what_the_run_recorded() -> None:
    one = sets("a", [[0.3, 0.5]], following=(0.1, 0.4))
    assert cell("accuracy", one, one) == "40.0 ± 14.1 (n = 2)"
    single = sets("a", [[0.3]])
    assert cell("accuracy", single, single) == "30.0 (n = 1)"
    assert cell("expert_accuracy", one, one) == "50.0 (3 experts)"
    assert cell("avg_var", one, one) == "2"
    assert cell("accumulated_error", one, one) == "0.4"
    assert cell("alpha", one, one) == "0.01 → 0.02"
    assert cell("collapsed", one, one) == "no"
    assert cell("seconds", one, one) == "2.50"
    assert cell("peak", one, one) == "3"
    assert cell("difference", one, one) == "–", "the first row differs from itself by nothing"
    lost = sets("b", [[0.0]], lost={0: "the run collapsed at iteration 7 (loss nan)"}, iterations=7)
    assert cell("accuracy", lost, one) == "–"
    assert cell("collapsed", lost, one) == "after 7 iterations"


def test_sets_of_a_row_are_put_together_from_their_own_runs() -> None:
    together = sets("a", [[0.3, 0.5], [0.4, 0.6]])
    assert together.record.result is not None
    assert together.record.result.accuracy == Score.of([[0.3, 0.5], [0.4, 0.6]])
    assert together.record.result.nets["vgg11"].n == 4
    assert together.record.result.confusion == ((2, 4), (6, 8))
    assert together.record.result.sets == len(together.record.sets) == 2
    assert together.record.result.stages == {"distill": 1.0}
    assert cell("accuracy", together, together) == "45.0 ± 12.9 (n = 4; ± 7.1 between sets)"
    assert sets("a", [[0.3, 0.5]]).record.result == result([0.3, 0.5])


def test_a_set_that_collapsed_leaves_those_beside_it_standing() -> None:
    row, first = sets("b", [[0.35], [0.0], [0.45]], lost={1: "no way"}, iterations=7), sets("a", [[0.3], [0.5], [0.4]])
    assert cell("accuracy", row, first) == "40.0 ± 7.1 (n = 2; ± 7.1 between sets)"
    assert cell("collapsed", row, first) == "1 of 3 sets, after 7 iterations"
    assert paired_difference(row, first) == "+5.0 ± 0.0 (n = 2)", "set 1 has no pair, set 2 is paired with set 2"
    reproduction = load_reproduction("table8")
    text = page("table8", reproduction, "cpu", {("base", "cifar10-ipc10"): row}, [])
    assert "- `b`, set 1: no way" in text


def test_bars_say_which_images_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = list[str]()

    def bars(values: Mapping[str, Any], label: str) -> Figure:
        labels.append(label)
        return Figure()

    monkeypatch.setattr("dstill.reporting.figures.bars", bars)
    (entry,), reproduction = sets("mtt", [[0.3]]).entries, load_reproduction("untried")
    for judged_on in ("test", "validation"):
        record = entry.record.model_copy(update={"result": result([0.3]).model_copy(update={"measured_on": judged_on})})
        one = Sets([entry.model_copy(update={"record": record})])
        case, row = Case(data="cifar100", ipc=10), reproduction.rows[0]
        assert draw(reproduction, case, [row], {("mtt", case.name): one}, tmp_path) == ["figure-cifar100-ipc10.png"]
    assert labels == ["accuracy %", "validation accuracy %"]


def test_sets_that_are_kept_are_not_judged_on_the_validation_part_alone() -> None:
    scale = load_reproduction("peeking").scales["cpu"]
    with pytest.raises(ValueError, match="judged_on must be test"):
        Scale.model_validate(scale.model_dump() | {"judged_on": "validation"})


def test_a_page_says_whether_the_paper_asks() -> None:
    assert page("table8", load_reproduction("table8"), "cpu", {}, []).startswith("# Table VIII: The parts of AST")
    own = page("peeking", load_reproduction("peeking"), "cpu", {}, [])
    assert own.startswith("# The price of looking\n\nThe question: how far above their mean")
    assert "| validation accuracy % |" in page("untried", load_reproduction("untried"), "cpu", {}, []), "and on what it judges"
    assert "| accuracy % |" in own


def test_a_page_names_the_rows_whose_settings_nobody_published() -> None:
    reproduction = load_reproduction("table5")
    case, (row,) = reproduction.scales["paper"].cases[0], (row for row in reproduction.rows if row.name == "ftd")
    recipe = resolved(row, case)
    derived, published = sets("ftd", [[0.5], [0.5]], note=recipe.note), sets("mtt", [[0.5]], note="MTT's published settings")
    text = page("table5", reproduction, "paper", {("ftd", case.name): derived, ("mtt", case.name): published}, [])
    assert text.count("no recipe was written for this case; its settings are derived from cifar10/ftd-ipc1") == 1


def test_a_failed_run_does_not_show_the_result_of_an_earlier_one(tmp_path: Path) -> None:
    earlier = result([0.3, 0.5])
    earlier.save(tmp_path / "result.json")
    assert RunRecord.read(tmp_path).result == earlier
    for error, collapsed in ((DstillError("no room"), False), (CollapseError("too large"), True)):
        record = RunRecord.read(tmp_path, error=error)
        assert (record.result, record.reason, record.collapsed) == (None, str(error), collapsed)


def test_a_reused_run_names_the_machine_that_made_it(tmp_path: Path) -> None:
    here = environment(tmp_path, torch.device("cpu"))
    assert here["torch"] == torch.__version__ and here["device"] == "cpu"
    elsewhere = {**here, "processor": "another one"}
    (tmp_path / "environment.json").write_text(json.dumps(elsewhere))
    assert environment(tmp_path, torch.device("cpu")) == elsewhere


def test_speed_is_when_the_first_rows_last_look_was_reached() -> None:
    first, fast, slow = (sets("a", [[0.3]], looks=looks) for looks in ((0.2, 0.5, 0.4), (0.1, 0.45, 0.4), (0.1, 0.2, 0.3)))
    assert cell("reached", first, first) == "6 iterations, 120 s"
    assert cell("reached", fast, first) == "6 iterations, 120 s"
    assert cell("reached", slow, first) == "never"
    assert cell("reached", sets("b", [[0.3]]), first) == "–"


def test_differences_are_paired_by_set() -> None:
    first, other = sets("a", [[0.30, 0.32], [0.50, 0.52]]), sets("b", [[0.34, 0.34], [0.53, 0.55]])
    # Gains of 3 and 3 points: the sets differ by 20 points, the gains by nothing.
    assert paired_difference(other, first) == "+3.0 ± 0.0 (n = 2)"
    assert paired_difference(sets("b", [[0.35, 0.35], [0.50, 0.52]]), first) == "+2.0 ± 2.0 (n = 2)"
    assert paired_difference(sets("b", [[0.35, 0.35]]), first) == "+4.0 (n = 1)", "the others are not there yet"


def test_fewer_steps_are_scaled_to_those_of_the_first_row() -> None:
    assert seconds(sets("b", [[0.3]], steps=3).record, sets("a", [[0.3]], steps=30).record) == pytest.approx(25.0)


def test_a_table_sets_ours_beside_the_published_ones_and_names_what_is_pending() -> None:
    rows = [
        Row(name="a", title="A", method="mtt", published={"cifar100-ipc10": {"accuracy": 39.7}}),
        Row(name="b", title="B", method="mtt"),
    ]
    entries = {("a", "cifar100-ipc10"): sets("a", [[0.3, 0.5]])}
    lines = table(["accuracy"], ["vgg11"], rows, Case(data="cifar100", ipc=10), entries)
    assert lines == [
        ["", "accuracy %", "published", "vgg11"],
        ["A", "40.0 ± 14.1 (n = 2)", "39.7", "30.0 ± 14.1 (n = 2)"],
        ["B", "pending", "–", "pending"],
    ]
    elsewhere = table(["accuracy"], [], rows, Case(data="cifar10", ipc=10), {})
    assert elsewhere[0] == ["", "accuracy %", "published (cifar100-ipc10)"]


def test_published_figures_of_one_case_alone_stand_in_a_table() -> None:
    rows = [
        Row(name="a", title="A", method="dc", published={"cifar10-ipc1": {"accuracy": 28.3, "vgg11": 1.0}}),
        Row(
            name="b",
            title="B",
            method="mtt",
            published={"cifar10-ipc1": {"accuracy": 46.2}, "cifar100-ipc1": {"accuracy": 24.3}},
        ),
    ]
    own = table(["accuracy"], ["vgg11"], rows, Case(data="cifar100", ipc=1), {})
    assert own[0] == ["", "accuracy %", "published", "vgg11"]
    assert [line[2] for line in own[1:]] == ["–", "24.3"], "DC's figure is another data set's"
    other = table(["accuracy"], ["vgg11"], rows, Case(data="cifar10", ipc=50), {})
    assert other[0] == ["", "accuracy %", "published (cifar10-ipc1)", "vgg11", "vgg11, published (cifar10-ipc1)"]
    found = {(name, "cifar100-ipc1"): sets(name, [[value]]) for name, value in {"a": 0.3, "b": 0.2}.items()}
    assert verdict(rows, Case(data="cifar100", ipc=1), found).startswith("Ours are -4.3 points from")


def test_the_verdict_counts_pairs_in_the_published_order_and_names_the_gap() -> None:
    published = {"a": 40.0, "b": 50.0, "c": 60.0}
    rows = [
        Row(name=name, title=name, method="mtt", published={"cifar100-ipc10": {"accuracy": value}})
        for name, value in published.items()
    ]
    values = {"a": 0.30, "b": 0.55, "c": 0.50}
    entries = {(name, "cifar100-ipc10"): sets(name, [[value]]) for name, value in values.items()}
    text = verdict(rows, Case(data="cifar100", ipc=10), entries)
    assert text == (
        "Ours are -10.0 to +5.0 points from the published figures, with 10 iterations and 3 experts. "
        "Of 3 pairs of rows, 2 in the published order."
    )
    assert verdict(rows, Case(data="cifar100", ipc=10), {}) == ""
    entries["c", "cifar100-ipc10"] = sets("c", [[0.0]], lost={0: "no way"})
    assert verdict(rows, Case(data="cifar100", ipc=10), entries).endswith("1 row failed and cannot be compared.")
