"""Class-incremental learning with a distilled memory: new classes arrive step by step, and old images may not be kept.

At each step, the images of the new classes are distilled to a few, which are added to the memory. A fresh network is trained
on the memory only and tested on all classes seen so far. A memory of equally many random real images is the baseline.

    python examples/continual_learning.py digits --method dm --ipc 1 --steps 5
"""

from __future__ import annotations

from dataclasses import replace

import cyclopts
import torch

import dstill
from dstill import DistilledSet, RealSet
from dstill.cli.options import Common, Data

_DATA = Data()


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
    source: str,
    *,
    method: str = "dm",
    ipc: int = 1,
    steps: int = 5,
    networks: int = 3,
    protocol: str = "ast",
    recipe: str | None = None,
    data: Data = _DATA,
) -> dict[str, list[float]]:
    """Compare a distilled memory with one of random images, class by class.

    Args:
        source: the real data; see `dstill run`.
        method: how the images of new classes are distilled.
        ipc: images per class that are kept.
        steps: steps in which the classes come.
        networks: fresh networks at each step.
        protocol: evaluation protocol.
        recipe: smoke for a run of seconds.
        data: how the real data are read.
    """
    real = data.load(source, Common())
    names = list(real.class_names)
    groups = [names[k::steps] for k in range(steps)]
    accuracies: dict[str, list[float]] = {method: [], "random": []}
    for kind in accuracies:
        memory: DistilledSet | None = None
        for k, group in enumerate(groups):
            seen = dstill.load_real(real, classes=[name for some in groups[: k + 1] for name in some])
            new = dstill.load_real(real, classes=group)
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
    cyclopts.run(main)
