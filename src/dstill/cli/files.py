"""Commands on files and names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from dstill.cli.app import app
from dstill.cli.options import Common, Data, Out, Set
from dstill.jobs.options import Flag, Whole
from dstill.support.console import printable

_DATA, _COMMON = Data(), Common()


@app.command
def export(
    distilled: Path,
    kind: Literal["dstill", "compact", "hf", "png", "pictures", "npz", "pt"],
    *,
    out: Out,
    stored: Flag = False,
    source: str | None = None,
    data: Data = _DATA,
) -> None:
    """Write a set for another machine, or for programs that do not know dstill.

    Args:
        distilled: distilled.safetensors, its folder, or the folder of a run with one set.
        kind: dstill: one distilled.safetensors that holds everything, for another machine; compact: the same as small as can
            be, with images in 8 bits and without a whitening; hf: a Hugging Face data set folder; png: one 8-bit file per
            image, to train on; pictures: the same in natural colours, to look at; npz: NumPy arrays; pt: images_best.pt,
            labels_best.pt and lr_best.pt, as trajectory matching scripts read them.
        out: folder.
        stored: of stored images that hold several, write these, instead of what they hold.
        source: the real data that the set was distilled from; needed only if its whitening is not found.
        data: how the real data are read.
    """
    from dstill.artifacts.distilled import DistilledSet
    from dstill.artifacts.exporting import write

    one = DistilledSet.load(distilled, real=data.load(source, Common()) if source else None)
    kept = write(one, kind, out, stored=stored)
    print(f"{out}\n{kept}")


@app.command
def push(
    distilled: Path,
    repo: str,
    *,
    private: Flag = False,
    revision: str | None = None,
    source: str | None = None,
    data: Data = _DATA,
) -> None:
    """Upload a set to the Hugging Face hub, with the login of its client or the token in HF_TOKEN. Prints the address.

    Args:
        distilled: distilled.safetensors, its folder, or the folder of a run with one set.
        repo: OWNER/NAME of the data set, which is made if it is missing.
        private: make it visible to its owner only.
        revision: branch to write to, made if missing (default: main).
        source: the real data that the set was distilled from; needed only if its whitening is not found.
        data: how the real data are read.
    """
    from dstill.artifacts.distilled import DistilledSet
    from dstill.artifacts.hub import push_to_hub

    one = DistilledSet.load(distilled, real=data.load(source, Common()) if source else None)
    print(push_to_hub(one, repo, private=private, revision=revision))


@app.command(name="import")
def import_(
    path: Path,
    source: str,
    *,
    preprocess: Literal["published", "standardise", "zca", "pixels"] = "published",
    method: str = "imported",
    net: str = "convnet",
    changes: Set = (),
    augmentation: str = "colour_crop_cutout_flip_scale_rotate",
    alpha: float | None = None,
    parts: Whole = 1,
    out: Out,
    data: Data = _DATA,
    common: Common = _COMMON,
) -> None:
    """Read a distilled set that another program published, for `evaluate`, `judge`, `show` or `distill --init`.

    Args:
        path: images_best.pt beside labels_best.pt (MTT, FTD, TESLA, DATM), res_*.pt (DC, DSA, DM), a folder of images
            <class>/*.png by names or numbers of classes (SRe2L, RDED, D4M), or an export of dstill.
        source: the real data that it was distilled from; see `dstill run`.
        preprocess: what its images have been through: published: normalised with the constants of the field's scripts;
            standardise or zca: fitted on the real data; pixels: nothing. This and the next six are only for files of other
            programs; exports of dstill contain them.
        method: method name for tables.
        net: network that it was distilled with; the depth of a convnet follows from the image size.
        changes: options of the network, for example `--set net.depth=4 net.width=64 net.norm=batch`.
        augmentation: DSA operations joined by _ to train with, or none.
        alpha: learning rate, if there is no lr_best.pt.
        parts: images that each stored image holds along a side (IDC).
        out: folder for distilled.safetensors.
        data: how the real data are read.
        common: how the command behaves.
    """
    from dstill.api.importing import import_set
    from dstill.cli.show import describe

    told = {"method": method, "net": net, "changes": changes, "augmentation": augmentation, "alpha": alpha, "parts": parts}
    import_set(path, data.load(source, common), preprocess=preprocess, **told).save(out)  # type: ignore[arg-type]
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
def show(path: Path, *, png: Path | None = None, stored: Flag = False, source: str | None = None, data: Data = _DATA) -> None:
    """Describe a file or folder of dstill. A terminal with colours also shows the distilled images.

    Args:
        path: a distilled set, a run folder, a folder of experts, or a result.json.
        png: write the distilled images as a picture.
        stored: of stored images that hold several, show these, instead of what they hold.
        source: the real data that the set was distilled from; needed for a picture if its whitening is not found.
        data: how the real data are read.
    """
    from dstill.cli.show import describe, print_drawing, write_picture

    real = data.load(source, Common()) if source else None
    print(printable(describe(path)))
    print_drawing(path, real=real, stored=stored)
    if png is not None:
        write_picture(path, png, real=real, stored=stored)
        print(f"pictures: {png}")


@app.command
def ls(
    kind: Literal["methods", "networks", "datasets", "recipes", "protocols", "reproductions", "sets"],
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
