"""Measures what 8 bits cost: networks of the same seeds are trained on a set as it is, and on its compact file.

    python benchmarks/compact.py cifar10-ipc10 'data/cifar10-*.parquet' --protocol rat -o results/compact/cifar10-ipc10.json

The accuracy is on the test images. The difference has the standard error over pairs of networks.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from pathlib import Path

import dstill
from dstill.artifacts.exporting import write
from dstill.artifacts.files import write_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("distilled", help="a set, its folder, or the name of one that ships with the package")
    parser.add_argument("source", help="the real data")
    parser.add_argument("--protocol", default="ast")
    parser.add_argument("--networks", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("-o", "--out", type=Path, required=True)
    options = parser.parse_args()
    real = dstill.load_real(options.source)
    exact = dstill.DistilledSet.load(options.distilled, real=real)
    machine, values = dstill.Machine(threads=options.threads, workers=1), dict[str, list[float]]()
    with tempfile.TemporaryDirectory() as folder:
        said = write(exact, "compact", folder)
        compact = dstill.DistilledSet.load(folder, real=real)
        file_bytes = (Path(folder) / "distilled.safetensors").stat().st_size
    for name, one in (("exact", exact), ("compact", compact)):
        asked = {"networks": options.networks, "protocol": options.protocol, "random": False, "machine": machine}
        values[name] = list(dstill.evaluate(one, real, **asked).accuracy.values)
    points = [100 * (compact - exact) for compact, exact in zip(values["compact"], values["exact"], strict=True)]
    report = {
        "set": Path(options.distilled).name,
        "protocol": options.protocol,
        "kept": said,
        "bytes": {"exact": exact.file_bytes, "compact": file_bytes},
        "accuracy": {name: {"mean": statistics.fmean(some), "values": some} for name, some in values.items()},
        "difference": {"points": statistics.fmean(points), "error": statistics.stdev(points) / math.sqrt(len(points))},
    }
    print(json.dumps(report, indent=1))
    write_text(options.out, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
