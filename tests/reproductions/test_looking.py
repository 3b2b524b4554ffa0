"""What looking buys: the spread of looks is told apart into its causes, and what may choose never sees the test images."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import dstill
from dstill.artifacts.distilled import DistilledSet
from dstill.artifacts.result import Score
from dstill.data.real import RealSet
from dstill.errors import DamagedFileError, DstillError
from dstill.evaluation.networks import Trial, evaluate_set, prepared
from dstill.evaluation.protocols import load_protocol
from dstill.jobs.job import Job, Workplace
from dstill.jobs.options import Choice
from dstill.reproductions import looking
from dstill.reproductions.looking import Look, Looks, Spread, averaged, largest_of, look
from dstill.reproductions.page import looked
from dstill.reproductions.resolving import apportioned, planned_task, resolved, task_of
from dstill.reproductions.spec import load_reproduction
from dstill.support.progress import Silent

CPU = torch.device("cpu")


def test_the_largest_of_a_few_normal_numbers_is_known_in_closed_form() -> None:
    assert largest_of(1) == pytest.approx(0, abs=1e-9)
    assert largest_of(2) == pytest.approx(1 / math.sqrt(math.pi), abs=1e-4)
    assert largest_of(3) == pytest.approx(1.5 / math.sqrt(math.pi), abs=1e-4)
    assert largest_of(50) == pytest.approx(2.2491, abs=1e-3)


def test_the_spread_of_looks_is_told_apart_into_networks_and_images() -> None:
    generator, looks, networks = torch.Generator().manual_seed(0), 4000, 3
    images = 0.02 * torch.randn(looks, 1, generator=generator, dtype=torch.float64)
    values = 0.4 + images + 0.05 * torch.randn(looks, networks, generator=generator, dtype=torch.float64)
    spread = Spread.of(values.tolist())
    assert spread.mean == pytest.approx(0.4, abs=2e-3)
    assert spread.networks == pytest.approx(0.05, rel=0.03)
    assert spread.images == pytest.approx(0.02, rel=0.1)
    best = statistics.fmean(float(some.max()) for some in values.mean(1).split(40))
    assert spread.best_of(40, networks) == pytest.approx(best, abs=3e-3)
    assert spread.best_of(40, 1) == pytest.approx(statistics.fmean(float(v.max()) for v in values[:, 0].split(40)), abs=5e-3)
    assert Spread.of([[0.1, 0.3], [0.3, 0.1]]).images == 0, "a variance is not negative"
    alone = Spread.of([[0.1], [0.3], [0.5]])
    assert (alone.images, alone.networks) == (0, pytest.approx(0.2))


def test_an_average_has_the_mean_images_soft_labels_and_rate(tiny_real: RealSet, tmp_path: Path) -> None:
    one = dstill.distill(tiny_real, method="random", recipe="smoke", machine=dstill.Machine(cache=tmp_path), progress=False)
    one = replace(one, alpha=0.1)
    other = replace(one, images=one.images + 2, alpha=0.3)
    mean = averaged([one, other])
    assert torch.allclose(mean.images, one.images + 1)
    assert mean.alpha == pytest.approx(0.2)
    assert mean.labels.equal(one.labels)
    soft = [replace(one, labels=torch.full((3, 3), value)) for value in (0.0, 1.0)]
    assert averaged(soft).labels.equal(torch.full((3, 3), 0.5))
    assert averaged([replace(one, alpha=None)]).alpha is None


class Kept:
    """A run of DM that kept its set after 1, 2, 3 and 4 iterations, and saw nothing of the validation part."""

    def __init__(self, real: RealSet, folder: Path) -> None:
        settings = load_reproduction("peeking").scales["smoke"]
        data, part = apportioned(settings, real, 0)
        assert part is not None
        self.validation, place = part, Workplace.of(dstill.Machine(device="cpu", cache=folder / "cache", threads=1), False)
        short = {"name": "short", "version": 1, "passes": 9, "batch_size": 2, "momentum": 0.9, "weight_decay": 5e-4}
        self.protocol = folder / "short.yaml"
        self.protocol.write_text(json.dumps({**short, "lr": 0.05, "lr_factor": 0.5, "networks": 2}))
        changes = {"net.width": 4, "distill.iterations": 4, "distill.lr_images": 100.0, "protocol": str(self.protocol)}
        self.job = Job.resolve(data, Choice("dm", 1, "smoke", changes=changes), 0, replace(place, reporter=Silent()))
        self.folder = folder / "set"
        recording = dstill.Recording(keep_every=1)
        common: dict[str, Any] = {"recording": recording, "machine": dstill.Machine(cache=folder / "cache"), "progress": False}
        dstill.distill(data, recipe=self.job.recipe, out=self.folder, **common)

    def set_after(self, iterations: int) -> DistilledSet:
        return DistilledSet.load(self.folder / f"after-{iterations:07d}.safetensors")

    def look(self) -> Looks:
        return look(self.folder, self.job, self.validation, 2, 2)


@pytest.fixture
def kept(tiny_real: RealSet, tmp_path: Path) -> Kept:
    return Kept(tiny_real, tmp_path)


def test_the_part_that_chooses_is_neither_distilled_from_nor_tested_on(tiny_real: RealSet) -> None:
    scale = load_reproduction("peeking").scales["smoke"]
    data, part = apportioned(scale, tiny_real, 3)
    held = tiny_real.holdout(3)
    assert part is not None and part.images.equal(held.test.images)
    assert data.train.images.equal(held.train.images) and data.test.images.equal(tiny_real.test.images)
    assert data.judged_on == "test" and len({data.fingerprint, held.fingerprint, tiny_real.fingerprint}) == 3
    trials = scale.model_copy(update={"kept": 0, "judged_on": "validation"})
    chosen, none = apportioned(trials, tiny_real, 3)
    assert (chosen.fingerprint, chosen.judged_on, none) == (held.fingerprint, "validation", None)
    assert apportioned(scale.model_copy(update={"kept": 0}), tiny_real, 3) == (tiny_real, None)


def test_every_look_measures_the_same_networks_on_both_kinds_of_images(kept: Kept) -> None:
    found, protocol = kept.look(), load_protocol(kept.job.recipe.protocol)
    assert [one.iteration for one in found.each] == [1, 2, 3, 4]
    for one in found.each:
        syn = kept.set_after(one.iteration)
        for split, values in ((kept.validation, one.validation), (kept.job.real.test, one.test)):
            images = prepared(split, syn.preprocess, CPU)
            assert list(values) == evaluate_set(syn, images, protocol, networks=2, stream=("look", one.iteration))


def test_the_validation_part_chooses_and_other_networks_measure(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [
        Look(iteration=k, validation=(v, v), test=(t, t))
        for k, v, t in ((1, 0.2, 0.95), (2, 0.9, 0.3), (3, 0.4, 0.8), (4, 0.5, 0.2))
    ]
    monkeypatch.setattr(looking, "_looked", lambda *_: tuple(made))
    found = kept.look()
    assert found.best == 0.8, "the best look of the second half at the test images is another one"
    two, average = kept.set_after(2), averaged([kept.set_after(3), kept.set_after(4)])
    for score, syn in ((found.chosen, two), (found.averaged, average)):
        evaluation: dict[str, Any] = {"networks": 2, "random": False, "progress": False}
        assert score == dstill.evaluate(syn, kept.job.real, **evaluation).accuracy


def test_looks_go_on_where_they_were_interrupted(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = kept.look()
    (path,) = kept.folder.glob("looks-*.jsonl")
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    trained, train = list[Any](), looking.train_on_set

    def recorded(trial: Trial, *rest: Any) -> torch.nn.Module:
        trained.append(trial.stream[1])
        return train(trial, *rest)

    monkeypatch.setattr(looking, "train_on_set", recorded)
    assert kept.look() == whole
    assert trained == [3, 3, 4, 4]
    assert kept.look() == whole
    assert len(trained) == 4, "all are stored"
    path.write_text("no look\n")
    with pytest.raises(DamagedFileError, match="the looks are made anew"):
        kept.look()


def test_looks_of_another_protocol_or_number_of_networks_are_made_anew(kept: Kept) -> None:
    first = kept.look()
    assert len(look(kept.folder, kept.job, kept.validation, 1, 2).each[0].test) == 1
    kept.protocol.write_text(kept.protocol.read_text().replace('"passes": 9', '"passes": 3'))
    assert kept.look().each != first.each
    assert len(list(kept.folder.glob("looks-*.jsonl"))) == 3


def test_a_run_that_kept_nothing_is_refused(kept: Kept) -> None:
    for path in list(kept.folder.glob("after-*"))[2:]:
        path.unlink()
    with pytest.raises(DstillError, match=f"has 2 set.s. that were kept on the way, .*: remove {kept.folder.parent} to"):
        kept.look()


def test_a_plan_counts_the_networks_that_look(tiny_real: RealSet, tmp_path: Path) -> None:
    reproduction = load_reproduction("peeking")
    scale = reproduction.scales["smoke"].model_copy(update={"look_networks": 2})
    place = Workplace.of(dstill.Machine(device="cpu", cache=tmp_path), False)
    row = next(row for row in reproduction.rows if row.name == "dm")
    work = resolved(scale, row, scale.cases[0], apportioned(scale, tiny_real, 0), 0, place)
    assert work.validation is not None and task_of(work).recording.keep_every == work.options["keep_every"] == 1
    looks = work.job.recipe.distill.iterations
    assert planned_task(work).evaluation.networks == 3 * 1 + 2 * looks, "the last set, two others, and the looks"
    plain = load_reproduction("table3").scales["smoke"]
    without = resolved(plain, row, plain.cases[0], apportioned(plain, tiny_real, 0), 0, place)
    assert planned_task(without) == task_of(without) and "keep_every" not in without.options


def of_two_sets() -> list[Looks]:
    one = [Look(iteration=k, validation=(0.1, 0.1), test=(0.4 + 0.01 * k, 0.42 + 0.01 * k)) for k in range(4)]
    other = [Look(iteration=k, validation=(0.1, 0.1), test=(0.5, 0.5)) for k in range(4)]
    chosen, mean = Score.of([[0.4, 0.44]]), Score.of([[0.3, 0.3]])
    return [Looks(each=tuple(looks), chosen=chosen, averaged=mean) for looks in (one, other)]


def test_cells_say_what_the_looks_of_all_sets_found() -> None:
    looks = of_two_sets()
    assert looked("chosen", looks) == "42.0 ± 2.3 (n = 4; ± 0.0 between sets)"
    assert looked("averaged", looks[:1]) == "30.0 ± 0.0 (n = 2)"
    assert looked("best_look", looks) == "47.0 ± 4.2 between sets"
    assert looked("best_look", looks[:1]) == "44.0"
    assert looked("best_look", []) == "–"
    # The two looks of the second half have means 43 and 44; their networks differ by two points.
    spread = looks[0].spread
    assert spread.mean == pytest.approx(0.435)
    assert (spread.networks, spread.images) == (pytest.approx(0.02 / math.sqrt(2)), 0)
    assert looked("spread", looks[:1]) == "1.4, 0.0"
    assert looked("spread", looks) == "1.0, 0.0", "the root of the mean square"
    assert looked("predicted", looks[:1]) == f"{100 * (0.435 + largest_of(2) * 0.01):.1f}"
    above = 100 * largest_of(50) * 0.02 / math.sqrt(2)
    one, five = above, above / math.sqrt(5)
    assert looked("inflation", looks[:1]) == f"+{one:.1f} ({one:.1f}), +{five:.1f} ({five:.1f})", "all of it is networks'"
    assert looks[0].curve.iterations == (0, 1, 2, 3)
    assert looks[0].curve.values == pytest.approx([41, 42, 43, 44])


def test_looks_of_one_network_do_not_tell_networks_from_images() -> None:
    alone = Looks(
        each=tuple(Look(iteration=k, validation=(0.1,), test=(0.4 + 0.01 * k,)) for k in range(4)),
        chosen=Score.of([[0.4]]),
        averaged=Score.of([[0.3]]),
    )
    assert [looked(measure, [alone]) for measure in ("spread", "inflation", "best_look")] == ["–", "–", "43.0"]


def test_what_a_set_reaches_is_nearer_to_its_best_look_if_images_scatter() -> None:
    generator, looks = torch.Generator().manual_seed(0), 40
    sets = 0.4 + 0.01 * torch.randn(20_000, looks, generator=generator, dtype=torch.float64)
    seen = sets + 0.02 * torch.randn(sets.shape, generator=generator, dtype=torch.float64)
    best = seen.argmax(1, keepdim=True)
    illusion = float((seen.gather(1, best) - sets.gather(1, best)).mean())
    assert Spread(0.4, 0.01, 0.02).illusion_of(looks, 1) == pytest.approx(illusion, rel=0.02)
    assert Spread(0.4, 0.01, 0.04).illusion_of(looks, 4) == pytest.approx(illusion, rel=0.02)
    assert Spread(0.4, 0.0, 0.0).illusion_of(looks, 4) == 0
