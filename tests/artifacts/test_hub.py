"""A set is uploaded to a hub, here a small server on this machine that answers what the client asks of the real one."""

from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub import constants

import dstill
from dstill import DistilledSet, DstillError
from dstill.artifacts.whitening import MissingWhitening
from dstill.data.real import RealSet


class Hub(ThreadingHTTPServer):
    """Remembers what was asked, with the token, and the files of the last commit.

    Attributes:
        asked: method, path and token of each request.
        made: what the request that makes a data set says.
        committed: branch, message and files of each commit.
        held: paths of the files that the data set holds already.
        exists: whether the data set exists.
        private: whether it is private.
        status: the status of every answer.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.asked: list[tuple[str, str, str | None]] = []
        self.made: dict[str, Any] = {}
        self.committed: list[tuple[str, str, dict[str, bytes]]] = []
        self.held: list[str] = []
        self.exists, self.private, self.status = False, False, 200

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def answer(self, path: str, body: bytes) -> tuple[int, Any]:
        url = f"{self.address}/datasets/me/pets"
        if self.status != 200:
            return self.status, {"error": "This is why."}
        match path.split("?")[0].split("/")[2:]:
            case ["repos", "create"]:
                self.made = json.loads(body)
                self.private = self.private if self.exists else self.made.get("visibility") == "private"
                return (409, {"error": "It exists.", "url": url}) if self.exists else (200, {"url": url})
            case ["datasets", "me", "pets"]:
                return 200, {"id": "me/pets", "private": self.private, "sha": "0"}
            case ["datasets", "me", "pets", "branch", _] | ["validate-yaml"]:
                return 200, {}
            case ["datasets", "me", "pets", "tree", _]:
                return 200, [{"type": "file", "path": file, "size": 1, "oid": "0"} for file in self.held]
            case ["datasets", "me", "pets", "preupload", _]:
                paths = [file["path"] for file in json.loads(body)["files"]]
                return 200, {"files": [{"path": file, "uploadMode": "regular", "shouldIgnore": False} for file in paths]}
            case ["datasets", "me", "pets", "commit", branch]:
                header, *files = [json.loads(line) for line in body.splitlines()]
                contents = {file["value"]["path"]: base64.b64decode(file["value"]["content"]) for file in files}
                self.committed.append((branch, header["value"]["summary"], contents))
                return 200, {"commitUrl": f"{url}/commit/1", "commitOid": "1"}
        return 404, {"error": f"nobody expected {path}"}


class _Answers(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.asked.append((self.command, self.path, self.headers.get("authorization")))
        status, said = self.server.answer(self.path, body)
        content = json.dumps(said).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_POST = do_GET

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with Hub() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def one(tiny_real: RealSet) -> DistilledSet:
    rows = torch.cat([rows[:2] for rows in tiny_real.train.by_class(tiny_real.classes)])
    soft = torch.randn(len(rows), tiny_real.classes, generator=torch.Generator().manual_seed(1))
    return DistilledSet.from_tensors(tiny_real.train.images[rows], soft, real=tiny_real, alpha=0.02)


def test_what_is_uploaded_is_the_export_and_is_read_back_exactly(
    hub: Hub, one: DistilledSet, tiny_real: RealSet, tmp_path: Path
) -> None:
    address = one.push_to_hub("me/pets", token="hf_secret", endpoint=hub.address)
    assert address == f"{hub.address}/datasets/me/pets"
    assert (hub.made["organization"], hub.made["name"], hub.made["type"]) == ("me", "pets", "dataset")
    assert "visibility" not in hub.made and "private" not in hub.made, "an organisation may have a default of its own"
    assert {token for _, _, token in hub.asked} == {"Bearer hf_secret"}
    ((branch, message, files),) = hub.committed
    assert branch == "main" and message.startswith("Upload 6 synthetic images, 2 for each of 3 classes")
    exported = one.export("hf", tmp_path / "exported")
    expected = {file.relative_to(exported).as_posix(): file for file in exported.rglob("*") if file.is_file()}
    assert files.keys() == expected.keys() >= {"README.md", "distilled.safetensors", "data/train-00000-of-00001.parquet"}
    assert files["README.md"] == expected["README.md"].read_bytes()
    for path, content in files.items():
        target = tmp_path / "uploaded" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    back = DistilledSet.load(tmp_path / "uploaded")
    assert torch.equal(back.images, one.images) and torch.equal(back.labels, one.labels)
    assert torch.equal(back.preprocess.invert(back.images), one.preprocess.invert(one.images))
    table = pq.read_table(tmp_path / "uploaded" / "data" / "train-00000-of-00001.parquet")
    assert torch.equal(torch.tensor(table["input"].to_pylist()), one.images)


def test_a_private_set_is_made_private_and_a_branch_is_written_to(hub: Hub, one: DistilledSet) -> None:
    address = dstill.push_to_hub(one, "me/pets", private=True, revision="try", token="hf_secret", endpoint=hub.address)
    assert address == f"{hub.address}/datasets/me/pets/tree/try"
    assert hub.made.get("visibility", "private" if hub.made.get("private") else None) == "private"
    assert ("POST", "/api/datasets/me/pets/branch/try", "Bearer hf_secret") in hub.asked
    assert [branch for branch, _, _ in hub.committed] == ["try"]


def test_an_earlier_upload_is_replaced(hub: Hub, one: DistilledSet) -> None:
    hub.exists, hub.held = True, ["README.md", "data/train-00000-of-00001.parquet"]
    dstill.push_to_hub(one, "me/pets", token="hf_secret", endpoint=hub.address)
    assert len(hub.committed) == 1


def test_nothing_private_is_uploaded_to_a_public_data_set(hub: Hub, one: DistilledSet) -> None:
    hub.exists = True
    with pytest.raises(DstillError, match="me/pets exists and is public: make it private"):
        dstill.push_to_hub(one, "me/pets", private=True, token="hf_secret", endpoint=hub.address)
    assert hub.committed == []


def test_other_data_are_not_mixed_with_ours(hub: Hub, one: DistilledSet) -> None:
    hub.exists, hub.held = True, ["data/train-00000-of-00001.parquet", "data/train-00003-of-00007.parquet"]
    with pytest.raises(DstillError, match=r"holds other data \(data/train-00003-of-00007.parquet\)"):
        dstill.push_to_hub(one, "me/pets", token="hf_secret", endpoint=hub.address)
    assert hub.committed == []


@pytest.mark.parametrize(
    ("status", "sentence"),
    [
        (401, r"asks who you are \(401\): run `hf auth login`, or set HF_TOKEN"),
        (403, r"does not let you write to me/pets \(403\): use a token that may write"),
        (500, r"refused me/pets \(500\): .*500"),
    ],
)
def test_a_refusal_is_a_sentence(hub: Hub, one: DistilledSet, status: int, sentence: str) -> None:
    hub.status = status
    with pytest.raises(DstillError, match=sentence) as caught:
        dstill.push_to_hub(one, "me/pets", endpoint=hub.address)
    assert hub.address in str(caught.value) and "\n" not in str(caught.value)


def closed() -> str:
    """An address at which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def test_a_hub_that_does_not_answer_is_a_sentence(hub: Hub, one: DistilledSet) -> None:
    address = closed()
    with pytest.raises(DstillError, match=f"{address} cannot be reached: .*refused.* Is there a network"):
        dstill.push_to_hub(one, "me/pets", endpoint=address)


def test_a_client_that_is_told_to_stay_offline_is_a_sentence(
    hub: Hub, one: DistilledSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DstillError, match="unset HF_HUB_OFFLINE"):
        dstill.push_to_hub(one, "me/pets", endpoint=hub.address)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("pets", "'pets' does not name .* pass OWNER/NAME"),
        ("a/b/c", "pass OWNER/NAME"),
        ("me/my pets", "'me/my pets' was refused"),
    ],
)
def test_a_name_that_cannot_be_one_is_a_sentence(hub: Hub, one: DistilledSet, name: str, sentence: str) -> None:
    with pytest.raises(DstillError, match=sentence):
        dstill.push_to_hub(one, name, endpoint=hub.address)
    assert hub.asked == []


def test_a_client_that_is_not_installed_is_a_sentence(one: DistilledSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # type: ignore[arg-type]
    with pytest.raises(DstillError, match=r"pip install 'dstill\[hub\]'"):
        dstill.push_to_hub(one, "me/pets")


def test_a_set_that_cannot_be_exported_leaves_nothing_on_the_hub(hub: Hub, one: DistilledSet) -> None:
    with pytest.raises(DstillError, match="the whitening of tiny"):
        dstill.push_to_hub(replace(one, preprocess=MissingWhitening("0", "tiny")), "me/pets", endpoint=hub.address)
    assert hub.asked == []


def test_the_command_asks_the_hub_and_the_token_of_the_environment(hub: Hub, one: DistilledSet, tmp_path: Path) -> None:
    one.save(tmp_path)
    environment = {**os.environ, "HF_ENDPOINT": hub.address, "HF_TOKEN": "hf_mine", "OMP_NUM_THREADS": "1"}
    del environment["HF_HUB_OFFLINE"]
    command = [sys.executable, "-m", "dstill", "push", str(tmp_path), "me/pets", "--private", "--revision", "try"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{hub.address}/datasets/me/pets/tree/try\n"
    assert {token for _, path, token in hub.asked if "pets" in path or "repos" in path} == {"Bearer hf_mine"}
    assert hub.private and [branch for branch, _, _ in hub.committed] == ["try"]
    hub.status = 401
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.splitlines()[-1].startswith(f"dstill: {hub.address} asks")
