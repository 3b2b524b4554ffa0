"""Architecture search on a distilled set: rank a grid of ConvNets without training any on the real images.

Every network of the grid is trained on the distilled images, which takes seconds. To test the ranking, it is also trained on
the whole training set. The script prints both accuracies and Spearman's rank correlation between them, and the correlation
for equally many random real images.

    python examples/architecture_search.py digits runs/digits-ast-ipc1-seed0/set-0
"""

from __future__ import annotations

import itertools
from typing import Annotated

import cyclopts
from scipy.stats import spearmanr

import dstill
from dstill.cli.options import Common, Data
from dstill.config.settings import NetConfig

Sizes = Annotated[tuple[int, ...], cyclopts.Parameter(consume_multiple=True, negative="")]
_DATA = Data()


def main(
    source: str,
    folder: str,
    *,
    widths: Sizes = (8, 16, 32, 64),
    depths: Sizes = (1, 2),
    networks: int = 3,
    protocol: str = "ast",
    data: Data = _DATA,
) -> float:
    """Rank a grid of ConvNets on a distilled set.

    Args:
        source: the real data; see `dstill run`.
        folder: a distilled set.
        widths: channels of the networks.
        depths: blocks of the networks.
        networks: fresh networks for each point of the grid.
        protocol: evaluation protocol.
        data: how the real data are read.
    """
    real, distilled = data.load(source, Common()), dstill.DistilledSet.load(folder)
    same = [f"preprocess={distilled.preprocess.kind}"]
    random = dstill.distill(real, method="random", ipc=distilled.ipc, changes=same)
    rows = []
    for width, depth, norm in itertools.product(widths, depths, ("instance", "none")):
        net = NetConfig(width=width, depth=depth, norm=norm)  # type: ignore[arg-type]
        options = {"protocol": protocol, "networks": networks, "random": False, "machine": dstill.Machine(workers="auto")}
        on_set = dstill.evaluate(distilled.with_net(net), real, whole=True, **options)
        on_random = dstill.evaluate(random.with_net(net), real, **options)
        whole = on_set.whole.mean if on_set.whole else float("nan")
        rows.append((whole, on_set.accuracy.mean, on_random.accuracy.mean))
        print(f"width {width:3} depth {depth} norm {norm:8}  whole {rows[-1][0]:.1%}  distilled {rows[-1][1]:.1%}")
    whole, by_set, by_random = zip(*rows, strict=True)
    correlation, beside = (float(spearmanr(whole, other).statistic) for other in (by_set, by_random))
    print(f"rank correlation with the whole set: distilled {correlation:.2f}, random {beside:.2f}")
    return correlation


if __name__ == "__main__":
    cyclopts.run(main)
