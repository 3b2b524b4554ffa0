"""Class-incremental learning with a distilled memory: new classes arrive step by step, and old images may not be kept.

At each step, the images of the new classes are distilled to a few, which are added to the memory. A fresh network is trained
on the memory only and tested on all classes seen so far. A memory of equally many random real images is the baseline.

    python examples/continual_learning.py digits --method dm --ipc 1 --steps 5
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch

import dstill
from dstill import DistilledSet, RealSet


def remember(memory: DistilledSet | None, new: DistilledSet, seen: RealSet) -> DistilledSet:
    """The memory extended by the images of the new classes, all in the preprocessing of `seen`."""
    parts = [one for one in (memory, new) if one is not None]
    pixels = torch.cat([one.preprocess.invert(one.images) for one in parts])
    names = [name for one in parts for name in (one.class_names[c] for c in one.class_ids.tolist())]
    labels = torch.tensor([seen.class_names.index(name) for name in names])
    fitted = dstill.distill(seen, method="random", ipc=1, changes=["preprocess=standardise"]).preprocess
    fields = {"preprocess": fitted, "class_names": seen.class_names, "data": seen.name, "data_fingerprint": seen.fingerprint}
    return replace(new, images=fitted.forward(pixels), labels=labels, recipe=None, **fields)


def main(
    source: str, method: str, ipc: int, steps: int, networks: int, protocol: str, recipe: str | None
) -> dict[str, list[float]]:
    names = list(dstill.load_real(source).class_names)
    groups = [names[k::steps] for k in range(steps)]
    accuracies: dict[str, list[float]] = {method: [], "random": []}
    for kind in accuracies:
        memory: DistilledSet | None = None
        for k, group in enumerate(groups):
            seen = dstill.load_real(source, classes=[name for some in groups[: k + 1] for name in some])
            new = dstill.load_real(source, classes=group)
            changes = ["preprocess=standardise"]
            one = dstill.distill(new, method=kind, ipc=ipc, recipe=recipe, changes=changes, seed=k)
            memory = remember(memory, one, seen)
            result = dstill.evaluate(
                memory, seen, protocol=protocol, networks=networks, random=False, machine=dstill.Machine(workers="auto")
            )
            accuracies[kind].append(result.accuracy.mean)
            print(f"{kind:8} {len(seen.class_names):3} classes, {len(memory.images):4} images kept: {result.accuracy}")
    return accuracies


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="the real data")
    parser.add_argument("--method", default="dm")
    parser.add_argument("--ipc", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--networks", type=int, default=3)
    parser.add_argument("--protocol", default="ast")
    parser.add_argument("--recipe", default=None, help="smoke for a run of seconds")
    main(**vars(parser.parse_args()))
