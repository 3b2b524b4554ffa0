"""Prints a digest of the results of one small run per method, to compare two commits bit by bit.

    $ PYTHONPATH=one/src python benchmarks/bits.py > one.txt
    $ PYTHONPATH=other/src python benchmarks/bits.py > other.txt
    $ diff one.txt other.txt

The digest covers images, labels, α, settings, all metrics of all iterations, and all accuracies, but not times, memory and
versions. Compare digests of one machine only, since processors differ in rounding.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from safetensors import safe_open

METHODS = ("random", "herding", "forgetting", "dc", "dsa", "dm", "cafe", "frepo", "mtt", "tesla", "ftd", "ast")
# AST with everything that a smoke run leaves out.
EVERYTHING = (
    *("distill.expert_epochs=3", "distill.batch_syn=7", "distill.student_momentum=0.9", "distill.image_ema=0.9"),
    *("distill.feature_epochs=5", "distill.soft_labels=expert-differentiated", "experts.gradient_penalty=released"),
)
_VARYING = {"seconds", "stages", "cost", "dstill", "peak_bytes"}


def run(method: str, folder: Path, cache: Path, *more: str) -> None:
    """`dstill run digits` with settings that take seconds, on one thread."""
    options = ["--method", method, "--recipe", "smoke", "--seed", "3", "--threads", "1", "--workers", "1", "--quiet"]
    judged = ["--sets", "2", "--networks", "2", "--validate-every", "2", "--whole"]
    command = [sys.executable, "-m", "dstill", "run", "digits", *options, *judged, "--cache", str(cache), "-o", str(folder)]
    subprocess.run([*command, *more], check=True, stdout=subprocess.DEVNULL)


def constant(value: Any) -> Any:
    """A JSON value without the parts that differ from run to run."""
    if isinstance(value, dict):
        return {key: constant(item) for key, item in value.items() if key not in _VARYING}
    return [constant(item) for item in value] if isinstance(value, list) else value


def digest(folder: Path) -> str:
    """The digest of all sets, metrics and results below a run folder."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        with safe_open(path, framework="np") as file:
            header = constant(json.loads(file.metadata()["dstill"]))
            header.pop("header_sha256", None)
            total.update(json.dumps(header, sort_keys=True).encode())
            for name in sorted(file.keys()):
                total.update(name.encode() + file.get_tensor(name).tobytes())
    for path in sorted([*folder.rglob("metrics.jsonl"), *folder.rglob("result.json"), *folder.rglob("settings.json")]):
        for line in path.read_text(encoding="utf-8").splitlines() if path.suffix == ".jsonl" else [path.read_text()]:
            total.update(json.dumps(constant(json.loads(line)), sort_keys=True).encode())
    return total.hexdigest()[:16]


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        for method in METHODS:
            run(method, root / method, root / "cache")
            print(f"{method:12} {digest(root / method)}", flush=True)
        run("ast", root / "everything", root / "cache", "--set", *EVERYTHING)
        print(f"{'ast, all on':12} {digest(root / 'everything')}")


if __name__ == "__main__":
    main()
