"""Files from others: whatever they contain, the result is a correct object or a one-sentence error, never a traceback."""

from __future__ import annotations

import io
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

import dstill
from dstill import DistilledSet, DstillError, load_real
from dstill.artifacts import files, importing
from dstill.artifacts.importing import import_set
from dstill.artifacts.record import RunRecord
from dstill.artifacts.result import Result
from dstill.config.recipes import load_recipe
from dstill.config.settings import Settings
from dstill.config.yamls import dump
from dstill.data.preprocess import Standardise
from dstill.data.real import RealSet
from dstill.evaluation.protocols import load_protocol
from dstill.experts.importing import import_experts
from dstill.experts.trajectory import Trajectories

# Values of a wrong kind that a file may contain.
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**40), 10**40),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["off", "os:system", "../../x", "1e5", "\x1b[2J", "<script>"]),
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)


def answered(call: Callable[[], Any]) -> Any:
    """The result of a call, or None if it fails with a one-sentence error."""
    try:
        return call()
    except DstillError as error:
        assert str(error)
        return None


def paths(values: dict[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in values.items():
        yield (*above, key)
        if isinstance(value, dict):
            yield from paths(value, (*above, key))


def changed(values: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    copy = deepcopy(values)
    target = copy
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    return copy


def flipped(content: bytes, data: st.DataObject) -> bytes:
    """The content with a few bits changed, or truncated."""
    damaged = bytearray(content)
    for _ in range(data.draw(st.integers(0, 3))):
        damaged[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    return bytes(damaged[: data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))])


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A folder for files that every example writes again."""
    path = Path(tempfile.mkdtemp(prefix="dstill-hostile-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def stored(folder: Path, tiny_real: RealSet) -> Path:
    """A distilled set."""
    dstill.distill(tiny_real, method="random", recipe="smoke", out=folder / "set")
    return folder / "set" / "distilled.safetensors"


# --- settings ---------------------------------------------------------------------------------------------------------

RECIPE = load_recipe("cifar10/ast-ipc1").model_dump(mode="json")


@settings(max_examples=400)
@given(path=st.sampled_from(sorted(paths(RECIPE))), value=VALUES)
def test_a_recipe_with_any_value_anywhere(folder: Path, path: tuple[str, ...], value: Any) -> None:
    file = folder / "recipe.yaml"
    try:
        file.write_text(dump(changed(RECIPE, path, value)), encoding="utf-8")
    except UnicodeEncodeError:
        return
    recipe = answered(lambda: load_recipe(str(file)))
    if recipe is not None:
        assert all(abs(number) < float("inf") for number in _numbers(recipe.model_dump()))


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        for inner in value.values():
            yield from _numbers(inner)
    elif isinstance(value, int | float):
        yield value


@settings(max_examples=300)
@given(text=st.text(alphabet="ab01:-[]{}&*!|>'\"%@#?,.~<=\n\t ", max_size=60))
def test_any_text_as_a_recipe_or_a_protocol(folder: Path, text: str) -> None:
    file = folder / "any.yaml"
    file.write_text(text, encoding="utf-8")
    assert answered(lambda: load_recipe(str(file))) is None
    assert answered(lambda: load_protocol(str(file))) is None


@pytest.mark.parametrize(
    "text",
    [
        "a: &x [1, 1]\nb: *x",
        "\n".join(["a0: &a0 [1, 1]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30))]),
        "[" * 5000 + "]" * 5000,
        "a: " + "9" * 5000,
        "!!timestamp x",
        "!!float x",
        "\x00",
        "<<: 3",
    ],
    ids=["alias", "aliases of aliases", "deep", "digits", "timestamp", "float", "nul", "merge"],
)
def test_yaml_that_takes_its_reader_apart_is_refused(folder: Path, text: str) -> None:
    file = folder / "bomb.yaml"
    file.write_text(text)
    with pytest.raises(DstillError, match="bomb"):
        load_recipe(str(file))


def test_every_settings_class_refuses_numbers_that_are_not_finite() -> None:
    assert Settings.model_config["allow_inf_nan"] is False


# --- our own files ----------------------------------------------------------------------------------------------------


@settings(max_examples=300)
@given(data=st.data())
def test_a_header_with_any_value_anywhere(folder: Path, stored: Path, data: st.DataObject) -> None:
    header, tensors = files.load(stored, None)
    path = data.draw(st.sampled_from(sorted(paths(header))))
    header = changed(header, path, data.draw(VALUES))
    file = folder / "changed.safetensors"
    save_file(tensors, file, metadata={"dstill": json.dumps(header)})
    found = answered(lambda: DistilledSet.load(file))
    if found is not None:
        assert found.pixels().shape == found.images.shape
        assert len(found.class_ids) == len(found.images)
        found.export("hf", folder / "exported")


@pytest.mark.parametrize("name", ["images", "labels", "preprocess.mean", "preprocess.basis", "preprocess.variance"])
def test_a_tensor_of_any_kind_in_the_place_of_another(folder: Path, stored: Path, name: str) -> None:
    header, tensors = files.load(DistilledSet.load(stored).save(folder / "whole", whole=True), None)
    header.pop("sha256")
    file, right = folder / "changed.safetensors", tensors[name]
    for other in (
        *(torch.zeros(shape) for shape in ((0,), (3,), (2, 3, 4, 5, 6))),
        *(torch.full(right.shape, value) for value in (float("nan"), float("inf"))),
        *(torch.full(right.shape, -5, dtype=kind) for kind in (torch.int64, torch.float16)),
        torch.zeros(()),
    ):
        if other.shape == right.shape and other.dtype == torch.float16:
            continue  # a number like any other
        save_file({**tensors, name: other}, file, metadata={"dstill": json.dumps(header)})
        found = answered(lambda: DistilledSet.load(file))
        assert found is None or name.startswith("preprocess"), (name, other.dtype, other.shape)
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, file, metadata={"dstill": json.dumps(header)})
    assert answered(lambda: DistilledSet.load(file)) is None


@pytest.mark.parametrize("name", ["mean", "basis", "variance"])
def test_a_whitening_of_any_kind_beside_a_set(folder: Path, stored: Path, name: str) -> None:
    beside = folder / "beside"
    beside.mkdir(exist_ok=True)
    shutil.copy(stored, beside)
    one = DistilledSet.load(stored)
    fingerprint, right = str(files.load(stored, None)[0]["whitening"]), one.preprocess.tensors()
    for other in (torch.zeros(0), torch.zeros(3, 3), torch.full(right[name].shape, float("nan"))):
        files.save(beside / f"zca-{fingerprint}.safetensors", "preprocessing", {**right, name: other}, {"data": fingerprint})
        assert answered(lambda: DistilledSet.load(beside)) is None, (name, other.shape)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a/b", "a\x00b", "", "x" * 300, 3, ["x"]])
def test_the_name_of_a_whitening_leads_nowhere_else(folder: Path, stored: Path, name: object) -> None:
    header, tensors = files.load(stored, None)
    file = folder / "changed.safetensors"
    save_file(tensors, file, metadata={"dstill": json.dumps({**header, "whitening": name})})
    with pytest.raises(DstillError, match="whitening"):
        DistilledSet.load(file)


@settings(max_examples=200)
@given(
    header=st.dictionaries(st.sampled_from(["record", "index", "format"]), VALUES), shape=st.sampled_from([(0,), (3,), (2, 3)])
)
def test_an_expert_with_any_header(folder: Path, header: dict[str, Any], shape: tuple[int, ...]) -> None:
    file = folder / "experts" / "expert-000.safetensors"
    file.parent.mkdir(exist_ok=True)
    full = {"format": 1, "kind": "expert trajectory", **header}
    save_file({"trajectory": torch.zeros(shape)}, file, metadata={"dstill": json.dumps(full)})
    answered(lambda: Trajectories(file.parent).summary())


@settings(max_examples=200)
@given(text=st.one_of(st.text(max_size=40), VALUES.map(json.dumps)))
def test_any_text_in_the_files_of_a_run(folder: Path, text: str) -> None:
    for name in ("result.json", "recipe.yaml", "metrics.jsonl", "experts.json", "initialisation.json", "cost.json"):
        run = folder / "run"
        shutil.rmtree(run, ignore_errors=True)
        run.mkdir()
        try:
            (run / name).write_text(text + "\n", encoding="utf-8")
        except UnicodeEncodeError:
            return
        answered(lambda run=run: RunRecord.read(run))
    answered(lambda: Result.load(folder / "run" / "cost.json"))


# --- files of others --------------------------------------------------------------------------------------------------

TENSORS = st.sampled_from(
    [
        torch.zeros(3, 3, 8, 8),
        torch.full((3, 3, 8, 8), float("nan")),
        torch.zeros(3, 3, 8, 8, dtype=torch.complex64),
        torch.zeros(0),
        torch.tensor(0.1),
        torch.arange(3),
        torch.arange(3) - 1,
        torch.zeros(3, 3),
        torch.zeros(3, 5),
    ]
)
CONTENT = st.recursive(
    st.one_of(st.none(), st.integers(-3, 3), st.floats(), st.text(max_size=3), TENSORS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["data", "x"]), inner, max_size=2),
    max_leaves=6,
)


@settings(max_examples=300)
@given(images=st.one_of(TENSORS, CONTENT), labels=st.one_of(TENSORS, CONTENT), rate=st.one_of(TENSORS, CONTENT))
def test_published_sets_that_hold_anything(folder: Path, tiny_real: RealSet, images: Any, labels: Any, rate: Any) -> None:
    preprocess = Standardise(torch.zeros(3), torch.ones(3))
    for name, content in (("images", images), ("labels", labels), ("lr", rate)):
        torch.save(content, folder / f"{name}_best.pt")
    found = answered(lambda: import_set(folder, tiny_real, preprocess=preprocess))
    if found is not None:
        answered(lambda: found.save(folder / "imported"))


@settings(max_examples=200)
@given(content=st.one_of(CONTENT, st.lists(st.lists(st.lists(TENSORS, max_size=2), max_size=3), max_size=2)))
def test_a_buffer_that_holds_anything(folder: Path, content: Any) -> None:
    torch.save(content, folder / "replay_buffer_0.pt")
    answered(lambda: import_experts([folder / "replay_buffer_0.pt"], folder / "buffers"))


@settings(max_examples=150)
@given(data=st.data())
def test_a_published_set_with_flipped_bits(folder: Path, tiny_real: RealSet, data: st.DataObject) -> None:
    buffer = io.BytesIO()
    torch.save(torch.zeros(3, 3, 8, 8), buffer)
    (folder / "images_best.pt").write_bytes(flipped(buffer.getvalue(), data))
    torch.save(torch.arange(3), folder / "labels_best.pt")
    (folder / "lr_best.pt").unlink(missing_ok=True)
    answered(lambda: import_set(folder, tiny_real, preprocess=Standardise(torch.zeros(3), torch.ones(3))))


@settings(max_examples=200)
@given(data=st.data())
def test_arrays_with_flipped_bits(folder: Path, stored: Path, tiny_real: RealSet, data: st.DataObject) -> None:
    right = DistilledSet.load(stored)
    content = (right.export("npz", folder / "arrays") / "distilled.npz").read_bytes()
    file = folder / "flipped.npz"
    file.write_bytes(flipped(content, data))
    found = answered(lambda: import_set(file, tiny_real, preprocess=right.preprocess))
    if found is not None:
        assert found.images.equal(right.images) and found.labels.equal(right.labels)


def test_arrays_that_unfold_to_gigabytes_are_refused_before_they_do(
    folder: Path, tiny_real: RealSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importing, "LARGEST_BYTES", 2**20)
    file = folder / "bomb.npz"
    np.savez_compressed(file, images=np.zeros(2**22, dtype=np.uint8))
    assert file.stat().st_size < 2**13
    with pytest.raises(DstillError, match="more than a distilled set"):
        import_set(file, tiny_real, preprocess=Standardise(torch.zeros(3), torch.ones(3)))


@pytest.fixture(scope="module")
def table(folder: Path) -> bytes:
    """A Parquet file of nine images, whose test file lies in the folder."""
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["a", "<b>", "../c"])})
    images = [Image.new("RGB", (8, 8), (value, 0, 0)) for value in range(9)]
    train = Dataset.from_dict({"image": images, "label": [0, 1, 2] * 3}, features=features)
    for name in ("train", "test"):
        train.to_parquet(folder / f"x-{name}.parquet")
    return (folder / "x-train.parquet").read_bytes()


@settings(max_examples=60)
@given(data=st.data())
def test_a_table_with_flipped_bits(folder: Path, table: bytes, data: st.DataObject) -> None:
    train = folder / "x-train.parquet"
    train.write_bytes(flipped(table, data))
    found = answered(lambda: load_real(train))
    if found is not None:
        assert found.train.images.shape[1:] == (3, 8, 8)
        assert int(found.train.labels.max()) < found.classes
