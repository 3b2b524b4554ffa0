"""Commands on files and names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from dstill.api.options import Flag, Whole
from dstill.cli.app import app
from dstill.cli.options import Common, Data, Out
from dstill.support.console import printable

_DATA, _COMMON = Data(), Common()


@app.command
def export(distilled: Path, kind: Literal["hf", "png", "npz", "pt"], *, out: Out, stored: Flag = False) -> None:
    """Write a set for programs that do not know dstill.

    Args:
        distilled: distilled.safetensors or its folder.
        kind: hf: a Hugging Face data set folder; png: one file per image; npz: NumPy arrays; pt: images_best.pt,
            labels_best.pt and lr_best.pt, as trajectory matching scripts read them.
        out: folder.
        stored: of stored images that hold several, write these, instead of what they hold.
    """
    from dstill.artifacts.distilled import DistilledSet
    from dstill.artifacts.exporting import export

    print(export(DistilledSet.load(distilled), kind, out, stored=stored))


@app.command(name="import")
def import_(
    path: Path,
    source: str,
    *,
    preprocess: Literal["published", "standardise", "zca"] = "published",
    method: str = "imported",
    net: str = "convnet",
    augmentation: str = "colour_crop_cutout_flip_scale_rotate",
    alpha: float | None = None,
    parts: Whole = 1,
    out: Out,
    data: Data = _DATA,
    common: Common = _COMMON,
) -> None:
    """Read a distilled set that another program published, for `evaluate`, `judge`, `show` or `distill --init`.

    Args:
        path: images_best.pt beside labels_best.pt (MTT, FTD, TESLA, DATM), res_*.pt (DC, DSA, DM), or an export of dstill.
        source: the real data that it was distilled from; see `dstill run`.
        preprocess: preprocessing of its images: published: the constants of the field's scripts; standardise or zca: fitted
            on the real data. This and the next five are only for files of other programs; exports of dstill contain them.
        method: method name for tables.
        net: network that it was distilled with.
        augmentation: DSA operations joined by _ to train with, or none.
        alpha: learning rate, if there is no lr_best.pt.
        parts: images that each stored image holds along a side (IDC).
        out: folder for distilled.safetensors.
        data: how the real data are read.
        common: how the command behaves.
    """
    from dstill.artifacts import importing
    from dstill.cli.show import describe

    real = data.load(source, common)
    options = {"method": method, "net": net, "augmentation": augmentation, "alpha": alpha, "parts": parts}
    importing.import_set(path, real, preprocess=preprocess, **options).save(out)  # type: ignore[arg-type]
    print(printable(describe(out)))


@app.command
def import_experts(*buffers: Path, out: Out) -> None:
    """Read expert buffers of MTT as a folder for `distill --experts`.

    Args:
        buffers: replay_buffer_*.pt.
        out: folder of trajectories.
    """
    from dstill.cli.show import describe
    from dstill.experts import importing

    print(printable(describe(importing.import_experts(buffers, out))))


@app.command
def show(path: Path, *, png: Path | None = None, stored: Flag = False) -> None:
    """Describe a file or folder of dstill.

    Args:
        path: a distilled set, a run folder, a folder of experts, or a result.json.
        png: write the distilled images as a picture.
        stored: of stored images that hold several, show these in the picture, instead of what they hold.
    """
    from dstill.cli.show import describe, write_picture

    print(printable(describe(path)))
    if png is not None:
        write_picture(path, png, stored=stored)
        print(f"pictures: {png}")


@app.command
def ls(
    kind: Literal["methods", "networks", "datasets", "recipes", "protocols", "reproductions"],
    *,
    as_json: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """List the names that dstill knows.

    Args:
        kind: what to list.
        as_json: print a JSON list of objects.
    """
    from dstill.cli.ls import rows, table

    print(json.dumps(rows(kind), indent=2) if as_json else "\n".join(table(kind)))


@app.command
def report(*runs: Path, out: Out = Path("report.html")) -> None:
    """Write a page about one run, or about several side by side, that opens in any browser.

    Args:
        runs: run folders, or folders of single sets.
        out: the HTML file.
    """
    from dstill.reporting.page import report

    print(report(runs, out))


@app.command
def check(*paths: Path) -> None:
    """Read files whole and compare them with their checksums. The exit code is 1 if one is damaged.

    Args:
        paths: files, or folders with everything below them.
    """
    from dstill.cli.check import check as check_files

    found = check_files(paths)
    for path, problem in found:
        print(f"{path}: {problem or 'whole'}")
    if any(problem for _, problem in found):
        raise SystemExit(1)
