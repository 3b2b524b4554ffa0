"""Experts: the loop against a hand-written one, what an expert depends on, and what an interruption leaves."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import parameters_to_vector

from dstill.artifacts import files
from dstill.config.recipes import load_recipe, recipe_names
from dstill.config.settings import DistillConfig, ExpertConfig, GsamConfig, NetConfig, Recipe
from dstill.data import preprocess as preprocessing
from dstill.data import siamese
from dstill.data.real import RealSet
from dstill.errors import DstillError
from dstill.experts.smooth import step_lengths
from dstill.experts.train import ExpertTask, lr_schedule, optimiser, train_expert, train_missing
from dstill.experts.trajectory import KIND, Trajectories, expert_path, recorded_epochs, save_expert
from dstill.methods.matching_config import MatchingConfig
from dstill.nets import networks as nets
from dstill.support import seeding
from dstill.training.checkpoint import Bookmark
from dstill.training.fit import EpochReport

CPU = torch.device("cpu")
DSA = "colour_crop_cutout_flip_scale_rotate"
MakeTask = Callable[..., ExpertTask]


@pytest.fixture
def make_task(tiny_real: RealSet) -> MakeTask:
    """Builds a task: plain SGD for two epochs in three batches each, changed by keywords of `ExpertConfig`."""
    preprocess = preprocessing.fit("standardise", tiny_real.train.images)
    net = NetConfig(width=4, depth=1)
    plain: dict[str, Any] = {
        "count": 1,
        "epochs": 2,
        "lr": 0.05,
        "momentum": 0.0,
        "weight_decay": 0.0,
        "batch_size": 20,
        "clipped_loss": "off",
        "gradient_penalty": "off",
        "lr_step": "off",
    }

    def make(*, real: RealSet = tiny_real, augmentation: str = "none", seed: int = 0, **settings: Any) -> ExpertTask:
        return ExpertTask(real, preprocess, net, ExpertConfig(**{**plain, **settings}), augmentation, seed)

    return make


def trained(task: ExpertTask, index: int = 0) -> Tensor:
    return train_expert(task, index, CPU)[0]


def by_hand(task: ExpertTask, rates: list[float], *, anew_at: int | None = None) -> Tensor:
    """Expert 0 of a plain task in plain PyTorch: one learning rate per epoch, a new optimiser before `anew_at`."""
    real, config = task.real, task.config
    generator = seeding.generator(task.seed, "expert", 0)
    net = nets.build(task.net, real.channels, real.classes, real.size, generator)
    images = task.preprocess.forward(real.train.images.float() / 255)
    options = {"momentum": config.momentum, "weight_decay": config.weight_decay}
    sgd = torch.optim.SGD(net.parameters(), lr=rates[0], **options)
    records = [parameters_to_vector(net.parameters()).detach().clone()]
    for epoch, rate in enumerate(rates):
        if epoch == anew_at:
            sgd = torch.optim.SGD(net.parameters(), lr=rate, **options)
        sgd.param_groups[0]["lr"] = rate
        for rows in torch.randperm(len(images), generator=generator).split(config.batch_size):
            batch = siamese.apply(images[rows], siamese.sample(task.augmentation, len(rows), generator))
            sgd.zero_grad()
            F.cross_entropy(net(batch), real.train.labels[rows]).backward()
            sgd.step()
        records.append(parameters_to_vector(net.parameters()).detach().clone())
    return torch.stack(records)


def test_records_are_copies_from_the_initial_weights_on(make_task: MakeTask) -> None:
    task = make_task()
    real = task.real
    fresh = nets.build(task.net, real.channels, real.classes, real.size, seeding.generator(0, "expert", 0))
    trajectory = trained(task)
    assert torch.equal(trajectory[0], parameters_to_vector(fresh.parameters()))
    assert len(trajectory) == 3
    for before, after in pairwise(trajectory):
        assert not torch.equal(before, after)


@pytest.mark.parametrize("augmentation", ["none", DSA])
@pytest.mark.parametrize(("momentum", "decay"), [(0.0, 0.0), (0.9, 1e-3)])
def test_an_sgd_expert_equals_a_hand_written_loop(
    make_task: MakeTask, augmentation: str, momentum: float, decay: float
) -> None:
    task = make_task(augmentation=augmentation, momentum=momentum, weight_decay=decay, batch_size=25)
    # The loop uses autograd, the expert hand-written derivatives: equal up to rounding.
    torch.testing.assert_close(trained(task), by_hand(task, [0.05, 0.05]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("form", "planned", "rates", "anew_at"),
    [
        ("off", 2, [0.05, 0.05, 0.05], None),
        ("paper", 2, [0.05, 0.05 * 0.5, 0.05 * 0.5], None),
        ("released", 1, [0.05, 0.05, 0.05 * 0.6], 2),
    ],
)
def test_a_learning_rate_step_acts_on_the_weights(
    make_task: MakeTask, form: str, planned: int, rates: list[float], anew_at: int | None
) -> None:
    task = make_task(lr_step=form, planned_epochs=planned, epochs=3, momentum=0.9)
    torch.testing.assert_close(trained(task), by_hand(task, rates, anew_at=anew_at), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("form", "changes_before", "factor"), [("paper", 4, 0.5), ("released", 6, 0.6), ("off", None, 1.0)])
def test_the_learning_rate_of_each_epoch_of_eight(form: str, changes_before: int | None, factor: float) -> None:
    """Released: epochs count from zero, and the change comes after epoch E/2 + 1."""
    config = ExpertConfig(planned_epochs=8, lr=0.01, lr_step=form)  # type: ignore[arg-type]
    sgd = optimiser(torch.nn.Linear(1, 1), config)
    schedule = lr_schedule(config)
    rates: list[float] = []
    for epoch in range(8):
        if schedule is not None:
            schedule(sgd, epoch)
        rates.append(sgd.param_groups[0]["lr"])
    expected = [0.01 * (factor if changes_before is not None and epoch >= changes_before else 1) for epoch in range(8)]
    assert rates == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("form", "forgotten"), [("paper", False), ("released", True)])
def test_only_the_released_step_forgets_the_momentum(form: str, forgotten: bool) -> None:
    config = ExpertConfig(planned_epochs=8, lr_step=form)  # type: ignore[arg-type]
    net = torch.nn.Linear(1, 1)
    sgd = optimiser(net, config)
    net(torch.ones(1, 1)).sum().backward()
    sgd.step()
    assert sgd.state
    schedule = lr_schedule(config)
    assert schedule is not None
    for epoch in range(8):
        schedule(sgd, epoch)
    assert (not sgd.state) == forgotten


@pytest.mark.parametrize(
    "settings", [{"optimiser": "sgd"}, {"optimiser": "sgd", "momentum": 0.9}, {"optimiser": "adam", "lr": 0.02}], ids=str
)
def test_every_switch_trains_and_leaves_weights_of_its_own(make_task: MakeTask, settings: dict[str, Any]) -> None:
    forms = ("off", "paper", "released")
    ends: list[Tensor] = []
    for clip, penalty in product(forms, forms):
        task = make_task(epochs=6, clipped_loss=clip, gradient_penalty=penalty, **settings)
        trajectory, record = train_expert(task, 0, CPU)
        assert bool(torch.isfinite(trajectory).all())
        assert record["accuracy"][-1] > 0.6, (clip, penalty)  # chance is a third
        ends.append(trajectory[-1])
    for i, j in product(range(len(ends)), range(len(ends))):
        assert i == j or not torch.equal(ends[i], ends[j])


def test_gsam_trains_and_changes_the_weights(make_task: MakeTask) -> None:
    flat, record = train_expert(make_task(epochs=6, gsam=GsamConfig(rho=0.5)), 0, CPU)
    assert record["accuracy"][-1] > 0.6
    assert not torch.equal(flat[-1], trained(make_task(epochs=6))[-1])


def test_adam_uses_the_rate_and_decay_of_the_settings() -> None:
    adam = optimiser(torch.nn.Linear(1, 1), ExpertConfig(optimiser="adam", lr=0.002, weight_decay=0.03))
    assert isinstance(adam, torch.optim.Adam)
    assert (adam.param_groups[0]["lr"], adam.param_groups[0]["weight_decay"]) == (0.002, 0.03)


def test_the_record_tells_loss_accuracy_and_step_length_of_every_epoch(make_task: MakeTask) -> None:
    trajectory, record = train_expert(make_task(epochs=4), 0, CPU)
    assert [len(record[key]) for key in ("loss", "accuracy", "step_lengths")] == [4, 4, 4]
    assert record["loss"][-1] < record["loss"][0]
    assert record["step_lengths"] == pytest.approx(step_lengths(trajectory).tolist(), rel=1e-12)


def test_an_expert_depends_on_seed_and_index_alone(make_task: MakeTask, tmp_path: Path) -> None:
    train_missing(make_task(count=3), tmp_path / "all", CPU)
    train_missing(make_task(count=50), tmp_path / "some", CPU, epochs={2: 2, 0: 2})
    everything, some = Trajectories(tmp_path / "all"), Trajectories(tmp_path / "some")
    assert [path.name for path in some.paths] == ["expert-000.safetensors", "expert-002.safetensors"]
    assert torch.equal(everything.rows(0, 0, 3), some.rows(0, 0, 3))
    assert torch.equal(everything.rows(2, 0, 3), some.rows(1, 0, 3))
    assert not torch.equal(everything.rows(0, 0, 3), everything.rows(1, 0, 3))
    assert not torch.equal(trained(make_task(seed=0)), trained(make_task(seed=1)))


def test_drawing_from_torchs_global_generator_changes_no_expert(make_task: MakeTask) -> None:
    torch.manual_seed(1)
    first = trained(make_task(augmentation=DSA))
    torch.manual_seed(2)
    assert torch.equal(first, trained(make_task(augmentation=DSA)))


def test_a_repeated_call_trains_only_the_missing_experts(make_task: MakeTask, tmp_path: Path) -> None:
    task = make_task(count=3)
    train_missing(task, tmp_path, CPU)
    files = sorted(tmp_path.iterdir())
    kept, lost = [path.read_bytes() for path in files], files[1]
    lost.unlink()
    seen: list[tuple[int, int]] = []
    train_missing(task, tmp_path, CPU, observer=lambda index, report, _: seen.append((index, report.epochs_done)))
    assert seen == [(1, 1), (1, 2)]
    assert [path.read_bytes() for path in files] == kept


@pytest.mark.parametrize("store", ["float32", "float16"])
def test_longer_experts_serve_where_shorter_ones_are_asked_for_and_shorter_ones_grow(
    make_task: MakeTask, tmp_path: Path, store: str
) -> None:
    settings = {"augmentation": DSA, "momentum": 0.9, "lr_step": "paper", "planned_epochs": 4, "store": store}
    short, long = make_task(epochs=2, **settings), make_task(epochs=5, **settings)
    train_missing(short, tmp_path, CPU)
    before = Trajectories(tmp_path)
    rows, curves = before.rows(0, 0, 3), before.curves()
    epochs: list[int] = []
    train_missing(long, tmp_path, CPU, observer=lambda _, report, __: epochs.append(report.epochs_done))
    assert epochs == [3, 4, 5], "nothing is trained twice"
    kept = expert_path(tmp_path, 0).read_bytes()
    grown, (at_once, record) = Trajectories(tmp_path), train_expert(long, 0, CPU)
    assert grown.rows(0, 0, 6).equal(at_once.float())
    assert grown.curves() == {key: [record[key]] for key in ("accuracy", "step_lengths")}
    seen: list[int] = []
    train_missing(short, tmp_path, CPU, observer=lambda index, *_: seen.append(index))
    assert not seen
    assert expert_path(tmp_path, 0).read_bytes() == kept
    prefix = Trajectories(tmp_path, epochs=2)
    assert (prefix.epochs, prefix.curves()) == (2, curves)
    assert prefix.rows(0, 0, 3).equal(rows)
    with pytest.raises(DstillError, match="needs 3 recorded epochs, the experts have 2"):
        prefix.segment(0, 1, 2)
    with pytest.raises(DstillError, match="has experts of 5 epochs, 6 are asked for"):
        Trajectories(tmp_path, epochs=6)


def test_an_interrupted_training_leaves_whole_files_only(make_task: MakeTask, tmp_path: Path) -> None:
    def stop(index: int, report: EpochReport, _: float) -> None:
        if (index, report.epochs_done) == (1, 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # before the first file is written
        train_missing(make_task(count=3), tmp_path, CPU, observer=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["expert-000.safetensors"]


class _Cut(Exception):
    """The process ends here."""


def _cut_after(epochs: int) -> Callable[[EpochReport, float], None]:
    def observer(report: EpochReport, _accuracy: float) -> None:
        if report.epochs_done == epochs:
            raise _Cut

    return observer


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"momentum": 0.9, "weight_decay": 0.01, "lr_step": "paper", "planned_epochs": 4},
        {"momentum": 0.9, "lr_step": "released", "planned_epochs": 2},
        {"optimiser": "adam", "lr": 0.001},
        {"clipped_loss": "paper", "gradient_penalty": "paper", "gsam": GsamConfig()},
    ],
)
@pytest.mark.parametrize("after", [1, 3])
def test_a_training_that_was_cut_off_goes_on_to_the_same_bits(
    make_task: MakeTask, tmp_path: Path, settings: dict[str, Any], after: int
) -> None:
    task = make_task(augmentation=DSA, epochs=4, **settings)
    whole, record = train_expert(task, 0, CPU)
    bookmark, epochs = Bookmark(expert_path(tmp_path, 0), KIND, seconds=0), []
    with pytest.raises(_Cut):
        train_expert(task, 0, CPU, _cut_after(after), bookmark)
    assert Trajectories(tmp_path).rows(0, 0, after + 1).equal(whole[: after + 1])
    again, found = train_expert(task, 0, CPU, lambda report, _: epochs.append(report.epochs_done), bookmark)
    assert epochs == list(range(after + 1, 5)), "nothing is trained twice"
    assert again.equal(whole)
    assert found == record


def test_a_damaged_or_foreign_expert_is_a_training_from_the_start(make_task: MakeTask, tmp_path: Path) -> None:
    task, path, epochs = make_task(epochs=2), expert_path(tmp_path, 0), []
    with pytest.raises(_Cut):
        train_expert(task, 0, CPU, _cut_after(1), Bookmark(path, KIND, seconds=0))
    path.write_bytes(path.read_bytes()[:-1])
    again, record = train_expert(task, 0, CPU, lambda report, _: epochs.append(report.epochs_done), Bookmark(path, KIND))
    assert again.equal(trained(task))
    save_expert(tmp_path, 0, again[:2], {"record": record})  # of another program: cannot be resumed
    train_missing(task, tmp_path, CPU, observer=lambda _, report, __: epochs.append(report.epochs_done))
    assert epochs == [1, 2, 1, 2]


def test_a_training_that_is_behind_replaces_nothing(make_task: MakeTask, tmp_path: Path) -> None:
    path = expert_path(tmp_path, 0)
    started = Bookmark(path, KIND)  # two processes at once; this is the slower one

    def overtaken(_report: EpochReport, _accuracy: float) -> None:
        if not path.exists():
            train_missing(make_task(epochs=4), tmp_path, CPU)

    train_expert(make_task(epochs=2), 0, CPU, overtaken, started)
    assert Trajectories(tmp_path).epochs == 4


def test_an_expert_that_diverges_is_refused_with_the_remedy(make_task: MakeTask, tmp_path: Path) -> None:
    with pytest.raises(DstillError, match=r"expert 0 has non-finite weights after epoch 1: lower experts\.lr"):
        train_missing(make_task(lr=1e38), tmp_path, CPU)
    assert not list(tmp_path.glob("*"))


@pytest.mark.parametrize(("store", "error"), [("float32", 0.0), ("bfloat16", 2.0**-8), ("float16", 2.0**-11)])
def test_trajectories_are_stored_in_the_type_asked_for_within_its_rounding(
    make_task: MakeTask, tmp_path: Path, store: str, error: float
) -> None:
    exact = trained(make_task())
    stored = trained(make_task(store=store))
    assert stored.dtype == getattr(torch, store)
    normal = exact.abs() > 1e-3  # smaller numbers are denormal in float16
    assert ((stored.float() - exact).abs() <= error * exact.abs())[normal].all()
    train_missing(make_task(store=store), tmp_path, CPU)
    assert torch.equal(Trajectories(tmp_path).rows(0, 0, 3), stored.float())


def test_the_fingerprint_changes_with_what_the_weights_depend_on(make_task: MakeTask, tiny_real: RealSet) -> None:
    task = make_task()
    other = replace(tiny_real, train=tiny_real.train.take(torch.arange(59)), fingerprint="")
    changed = [
        make_task(real=other),
        make_task(augmentation="crop"),
        make_task(seed=1),
        replace(task, net=NetConfig(width=5, depth=1)),
        *(
            make_task(**{key: value})
            for key, value in {
                "planned_epochs": 10,
                "optimiser": "adam",
                "lr": 0.06,
                "momentum": 0.5,
                "weight_decay": 0.1,
                "batch_size": 30,
                "clipped_loss": "paper",
                "gradient_penalty": "released",
                "lr_step": "paper",
                "gsam": GsamConfig(),
            }.items()
        ),
    ]
    names = {each.fingerprint() for each in changed} | {task.fingerprint()}
    assert len(names) == len(changed) + 1


def test_the_fingerprint_ignores_number_length_and_compilation(make_task: MakeTask) -> None:
    name = make_task().fingerprint()
    ignored = {"count": 9, "epochs": 3, "compile": True}
    assert {make_task(**{key: value}).fingerprint() for key, value in ignored.items()} == {name}
    assert make_task(store="float32").fingerprint() == name
    assert len({make_task(store=store).fingerprint() for store in ("float32", "float16", "bfloat16")}) == 3, "two round"


def test_every_setting_of_an_expert_is_either_identity_or_named_as_ignored(make_task: MakeTask) -> None:
    identity = make_task(gsam=GsamConfig()).identity()["experts"]
    assert set(ExpertConfig.model_fields) - set(identity) == {"count", "epochs", "store", "compile"}


def test_the_number_of_epochs_must_be_resolved_first(make_task: MakeTask) -> None:
    with pytest.raises(ValueError, match="expert_config"):
        trained(make_task(epochs=None))


def test_experts_are_never_trained_longer_than_the_recipe_needs() -> None:
    seen = 0
    for name in recipe_names():
        recipe = load_recipe(name)
        if not isinstance(recipe.distill, MatchingConfig):
            continue
        seen += 1
        if recipe.method == "datm" and "smooth" not in name and recipe.data != "digits":
            assert recipe.expert_config.epochs == 100, "labels and initial images come from the end of the training"
            continue
        # The last segment starts at T+ - 1 and ends M epochs later.
        assert recipe.expert_config.epochs == recipe.distill.max_start_epoch - 1 + recipe.distill.expert_epochs, name
    assert seen >= 40


def test_epochs_that_are_asked_for_are_kept_and_nothing_else_changes() -> None:
    recipe = Recipe(data="tiny", method="ast", ipc=1, experts=ExpertConfig(epochs=50), distill=MatchingConfig())
    assert recipe.expert_config == recipe.experts
    open_ended = recipe.model_copy(update={"experts": ExpertConfig()})
    assert open_ended.expert_config == ExpertConfig(epochs=21)
    assert open_ended.model_copy(update={"distill": DistillConfig()}).expert_config.epochs == ExpertConfig().planned_epochs


def test_the_number_of_workers_does_not_change_an_expert(make_task: MakeTask, tmp_path: Path) -> None:
    task = make_task(count=3, augmentation=DSA, gradient_penalty="paper")
    told: list[tuple[int, int]] = []
    train_missing(task, tmp_path / "one", CPU)
    train_missing(task, tmp_path / "two", CPU, workers=2, observer=lambda i, report, _: told.append((i, report.epochs_done)))
    one, two = Trajectories(tmp_path / "one"), Trajectories(tmp_path / "two")
    assert all(torch.equal(one.rows(i, 0, 3), two.rows(i, 0, 3)) for i in range(3))
    assert sorted(told) == [(i, epoch) for i in range(3) for epoch in (1, 2)]


def test_experts_may_need_different_numbers_of_epochs_and_the_longest_comes_first(make_task: MakeTask, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []

    def train(epochs: dict[int, int]) -> list[int]:
        told.clear()
        watch: Callable[..., None] = lambda index, report, _: told.append((index, report.epochs_done))  # noqa: E731
        train_missing(make_task(count=5), tmp_path, CPU, epochs=epochs, observer=watch)
        return [recorded_epochs(expert_path(tmp_path, index)) for index in range(5)]

    assert train({1: 2, 0: 4, 3: 3}) == [4, 2, 0, 3, 0]
    assert told == [(0, 1), (0, 2), (0, 3), (0, 4), (3, 1), (3, 2), (3, 3), (1, 1), (1, 2)]
    assert train({0: 3, 1: 3}) == [4, 3, 0, 3, 0], "a longer one is used as it is, a shorter one is trained further"
    assert told == [(1, 3)]


def test_the_way_within_an_epoch_is_told(make_task: MakeTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dstill.training.fit._TICK_SECONDS", 0.0)
    ticks: list[tuple[int, float]] = []
    train_missing(make_task(), tmp_path, CPU, tick=lambda index, epochs: ticks.append((index, epochs)))
    assert [index for index, _ in ticks] == [0] * 6  # three batches in each of two epochs
    assert [epochs for _, epochs in ticks] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2])


def test_experts_that_another_process_trains_are_left_to_it_and_not_trained_twice(make_task: MakeTask, tmp_path: Path) -> None:
    task, done, notes, seen, ticks = make_task(count=3), tmp_path / "done", list[str](), list[int](), list[tuple[int, float]]()
    train_missing(task, done, CPU)
    folder = tmp_path / "shared"
    with contextlib.ExitStack() as other:
        for index in (0, 1):
            other.enter_context(files.alone(expert_path(folder, index)))

        def note(text: str) -> None:
            """The other process ends: it has finished expert 0, and not expert 1."""
            notes.append(text)
            assert set(seen) == {2}, "what nobody trains comes first"
            shutil.copy(expert_path(done, 0), expert_path(folder, 0))
            other.close()

        train_missing(
            task,
            folder,
            CPU,
            note=note,
            observer=lambda index, *_: seen.append(index),
            tick=lambda index, epochs: ticks.append((index, epochs)),
        )
    assert notes == ["experts 0, 1 are being trained by another process, which this one waits for"]
    assert set(seen) == {1, 2} and (0, 2.0) in ticks
    for index in range(3):
        assert torch.equal(Trajectories(folder).rows(index, 0, 3), Trajectories(done).rows(index, 0, 3))
    assert not list(folder.glob(".*"))
