"""What `dstill ls` prints. Importing this does not import torch."""

from __future__ import annotations

from typing import Any

from dstill.artifacts.ready import ready_card, ready_names
from dstill.config import recipes
from dstill.config.measured import reached
from dstill.config.registry import methods
from dstill.data.catalog import DATASETS
from dstill.evaluation.protocols import load_protocol, protocol_names
from dstill.nets.networks import NETWORKS
from dstill.reproductions.spec import load_reproduction, reproduction_names

# The keys of each kind that a printed list shows.
_SHOWN = {"methods": ("name", "family", "needs", "labels", "paper", "note")}


def table(kind: str) -> list[str]:
    """The printed list of a kind in columns, one line per object."""
    keys = _SHOWN.get(kind, ("name", "note"))
    cells = [[str(row[key]) for key in keys] for row in rows(kind)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(keys))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return lines + (_budgets() if kind == "methods" else [])


def _budgets() -> list[str]:
    """What runs with --minutes have reached, in lines."""
    known = [
        f"{one.data}, {one.side} pixels, {one.classes} classes, IPC {one.ipc}: {one.minutes:g} min of one core  {one.method} "
        f"{one.accuracy:.1f} %  (coresets {one.coreset:.1f} %)"
        for one in reached()
    ]
    return ["", "`dstill run SOURCE --minutes N` chooses by data, machine and time. So far measured:", *known]


def rows(kind: str) -> list[dict[str, Any]]:
    """Objects with a `name` and a `note`, and what else is known of their kind."""
    match kind:
        case "methods":
            return [
                {"name": n, "note": m.note, "family": m.family, "paper": m.paper, "needs": m.needs, "labels": m.labels}
                for n, m in methods().items()
            ]
        case "networks":
            return [{"name": name, "note": path} for name, path in NETWORKS.items()]
        case "datasets":
            return [{"name": name, "note": entry.note, "hub": entry.hub} for name, entry in DATASETS.items()]
        case "recipes":
            return [{"name": name, **head} for name, head in recipes.recipe_heads().items()]
        case "sets":
            cards = {name: ready_card(name) for name in ready_names()}
            return [{"name": n, "note": f"{one.measured[0]}; {one.title}", **one.model_dump()} for n, one in cards.items()]
        case "reproductions":
            entries = [(name, load_reproduction(name)) for name in reproduction_names()]
            return [{"name": name, "note": one.heading, "rows": len(one.rows)} for name, one in entries]
        case _:
            protocols = [load_protocol(name) for name in protocol_names()]
            return [
                {
                    "name": p.name,
                    "note": f"version {p.version}: {p.passes} passes, {p.networks} networks",
                    "version": p.version,
                }
                for p in protocols
            ]
