"""A damaged file gives a one-sentence error, wherever the damage is."""

from __future__ import annotations

import json
import os
import struct
import threading
from pathlib import Path

import pytest
import safetensors
import torch
from safetensors.torch import save_file

from dstill.artifacts import files
from dstill.errors import DamagedFileError, DstillError
from dstill.version import __version__

KIND = "distilled set"


def write(path: Path, **header: object) -> bytes:
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(3), "c": torch.ones(2, dtype=torch.bfloat16)}
    files.save(path, KIND, tensors, {"ipc": 2, "note": "αβ", **header})
    return path.read_bytes()


def test_tensors_and_header_come_back(tmp_path: Path) -> None:
    write(tmp_path / "x")
    header, tensors = files.load(tmp_path / "x", KIND)
    assert (header["ipc"], header["note"], header["kind"], header["format"]) == (2, "αβ", KIND, 1)
    assert header["dstill"] == __version__
    assert torch.equal(tensors["a"], torch.arange(6.0).view(2, 3))
    assert (tensors["b"].dtype, tensors["c"].dtype) == (torch.int64, torch.bfloat16)


def test_the_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    assert write(tmp_path / "x") == write(tmp_path / "y")


def test_a_view_into_a_larger_tensor_is_stored_alone(tmp_path: Path) -> None:
    files.save(tmp_path / "x", KIND, {"a": torch.arange(1000.0)[10:20].view(2, 5).t()}, {})
    assert torch.equal(files.load(tmp_path / "x", KIND)[1]["a"], torch.arange(10.0, 20.0).view(2, 5).t())
    assert (tmp_path / "x").stat().st_size < 1000


def test_a_file_without_a_checksum_is_read(tmp_path: Path) -> None:
    write(tmp_path / "x", sha256=None)
    assert files.load(tmp_path / "x", KIND)[0]["sha256"] is None


def test_no_flipped_bit_ever_ends_in_anything_but_a_sentence_or_the_right_tensors(tmp_path: Path) -> None:
    path = tmp_path / "x"
    content = write(path)
    _, right = files.load(path, KIND)
    refused = 0
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        try:
            _, tensors = files.load(path, KIND)
        except DstillError as error:
            refused += 1
            assert str(path) in str(error)
            continue
        # Damage to a part of the header that describes no tensor.
        assert tensors.keys() == right.keys()
        assert all(torch.equal(tensors[name], right[name]) for name in right)
    data = sum(tensor.numel() * tensor.element_size() for tensor in right.values())
    assert refused > len(content) // 2
    assert refused >= data


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x"
    content = write(path)
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        with pytest.raises(DstillError, match="damaged or not a safetensors file"):
            files.load(path, KIND)


@pytest.mark.parametrize("text", ["[]", "[1]", "3", "null", "{", "{}"])
def test_a_header_that_is_no_mapping_of_dstill_is_refused(text: str, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "x", metadata={"dstill": text})
    with pytest.raises(DstillError, match=r"another program|not a distilled set"):
        files.load(tmp_path / "x", KIND)


def test_a_huge_header_length_is_refused_without_reading_it(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(struct.pack("<Q", 2**60) + b"{}")
    with pytest.raises(DstillError, match="damaged"):
        files.load(tmp_path / "x", KIND)


def test_what_torch_save_wrote_is_refused(tmp_path: Path) -> None:
    torch.save({"images": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(DstillError, match="not a safetensors file"):
        files.load(tmp_path / "x.safetensors", KIND)


def test_a_folder_is_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(DstillError, match="does not exist"):
        files.load(tmp_path, KIND)


def test_an_interrupted_writer_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x"
    old = write(path)
    with pytest.raises(KeyboardInterrupt), files.atomic(path) as temporary:
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_a_header_that_is_not_json_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    old = write(tmp_path / "x")
    with pytest.raises(TypeError):
        write(tmp_path / "x", note=object())
    assert (tmp_path / "x").read_bytes() == old


def test_text_is_utf_8_whatever_the_locale(tmp_path: Path) -> None:
    files.write_text(tmp_path / "deep" / "x.json", json.dumps({"α": 1}, ensure_ascii=False))
    assert (tmp_path / "deep" / "x.json").read_bytes() == '{"α": 1}'.encode()


def test_a_tensor_under_another_name_is_noticed(tmp_path: Path) -> None:
    write(tmp_path / "x")
    with safetensors.safe_open(tmp_path / "x", framework="pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    tensors["d"] = tensors.pop("c")
    save_file(tensors, tmp_path / "x", metadata=metadata)
    with pytest.raises(DamagedFileError, match="its tensors have changed since they were written"):
        files.load(tmp_path / "x", KIND)


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_a_file_may_be_read_by_whom_the_users_other_files_may(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        files.write_text(tmp_path / "x", "ours")
        (tmp_path / "y").write_text("theirs")
        assert (tmp_path / "x").stat().st_mode == (tmp_path / "y").stat().st_mode
        assert os.umask(mask) == mask
    finally:
        os.umask(before)


def test_a_header_that_was_changed_is_noticed(tmp_path: Path) -> None:
    write(tmp_path / "x")
    with safetensors.safe_open(tmp_path / "x", framework="pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    header = json.loads(metadata["dstill"])
    save_file(tensors, tmp_path / "x", metadata={"dstill": json.dumps({**header, "ipc": 3})})
    with pytest.raises(DamagedFileError, match="its header has changed since it was written"):
        files.load(tmp_path / "x", KIND)


@pytest.mark.parametrize("number", [files.FORMAT + 1, 0, None])
def test_a_file_of_the_next_format_is_refused(number: int | None, tmp_path: Path) -> None:
    write(tmp_path / "x", format=number)
    with pytest.raises(DstillError, match=f"has format {number}, this dstill reads up to {files.FORMAT}: upgrade dstill"):
        files.load(tmp_path / "x", KIND)


def test_what_others_may_still_be_writing_is_left_alone(tmp_path: Path) -> None:
    fresh, old = tmp_path / ".x.1.part", tmp_path / ".x.2.part"
    for path in (fresh, old):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    files.remove_leftovers(tmp_path, older_than=3600)
    assert list(tmp_path.iterdir()) == [fresh]
    files.remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_said_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path, says in (
        (Path("/proc/nope"), "/proc/nope cannot be made or written to .No such file or directory.: pass another folder"),
        (tmp_path / ("x" * 300), "cannot be made or written to .File name too long"),
        (tmp_path / "file" / "x", "file/x is not a folder, and none can be made there"),
    ):
        for act in (files.check_writable, lambda folder: files.write_text(folder / "a.txt", "")):
            with pytest.raises(DstillError, match=says):
                act(path)


def test_what_the_machine_lacks_is_no_mistake_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with pytest.raises(OSError, match="No space left") as error:
        files.check_writable(tmp_path)
    assert not isinstance(error.value, DstillError)


def test_a_file_that_another_process_makes_is_waited_for_or_left_to_it(tmp_path: Path) -> None:
    path, order = tmp_path / "new" / "x", list[str]()

    def other() -> None:
        with files.alone(path) as mine:
            order.append(f"other {mine}")

    with files.alone(path) as mine:
        assert mine
        with files.alone(path, wait=False) as second:
            assert not second
        thread = threading.Thread(target=other)
        thread.start()
        thread.join(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "other True"]
    assert list(path.parent.iterdir()) == [], "no lock is left"
    with files.alone(path, wait=False) as mine:
        assert mine
