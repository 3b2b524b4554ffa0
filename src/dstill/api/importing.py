"""`import_set` reads a distilled set that another program published, and checks what is said about it."""

from __future__ import annotations

from pathlib import Path

from dstill.artifacts import importing
from dstill.artifacts.distilled import DistilledSet
from dstill.data.preprocess import Preprocess
from dstill.data.real import Source, load_real
from dstill.jobs.checks import check_network
from dstill.jobs.options import Changes


def import_set(
    path: str | Path,
    real: Source,
    *,
    preprocess: Preprocess | str = "published",
    method: str = "imported",
    net: str = "convnet",
    changes: Changes = (),
    augmentation: str = "colour_crop_cutout_flip_scale_rotate",
    alpha: float | None = None,
    parts: int = 1,
) -> DistilledSet:
    """A distilled set from the files of another program, ready for `evaluate`.

    Args:
        path: one of: a folder or file that `export` wrote, or the folder of a run with one set; a `.pt` file of images such as
            `images_best.pt`, with `labels_best.pt` and perhaps `lr_best.pt` beside it; a `.pt` file of DC, DSA or DM
            (`res_*.pt`), from which the last repetition is taken; a folder of images, as SRe2L, RDED and D4M publish them:
            `<class>/*.png`, by the names of classes or by their numbers, or all in one folder as `class003_id000.jpg`.
        real: the data that the set was distilled from, see `load_real`. They give the class names.
        preprocess: what the images have been through. `published`: normalised with the constants that the field's scripts have
            for a data set of this name. `standardise` or `zca`: fitted on the real data. `pixels`: nothing; they are in [0, 1]
            or bytes, and are standardised here. Or a fitted preprocessing. Images in files are pixels; they are put through
            the one that is named, or standardised if no constants are known. A set that dstill exported brings its own.
        method: name of the method, for tables.
        net: the network that the set was distilled with. The depth of a `convnet` follows from the size of the images: 3 for
            32x32, 4 for 64x64.
        changes: options of the network, such as `["net.depth=5", "net.width=64"]`.
        augmentation: DSA strategy to train with.
        alpha: the learning rate to train with; if left out, that in the file, if any.
        parts: images in each stored image along a side, see `dstill.data.formation`. Labels are those of stored images or of
            their parts.

    Returns:
        The set. Floating-point labels are label logits, unless they lie in [0, 1] and each row adds up to one: then they are
        probabilities.

    Warns:
        DstillWarning: the images look as if they had been through another preprocessing; classes differ in their number of
            images; or no soft label favours some class.

    Raises:
        DstillError: the file does not exist, is damaged, is too large, holds more than tensors, or does not fit `real`; a class
            has no image; or the network or the augmentation is unknown.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from dstill.data.real import RealSet, Split
        >>> split = Split(torch.arange(128, dtype=torch.uint8).view(2, 1, 8, 8), torch.tensor([0, 1]))
        >>> real = RealSet("pets", split, split, ("cat", "dog"))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save(torch.zeros(2, 1, 8, 8), f"{folder}/images_best.pt")
        ...     torch.save(torch.tensor([0, 1]), f"{folder}/labels_best.pt")
        ...     import_set(f"{folder}/images_best.pt", real, preprocess="standardise")
        DistilledSet('imported' of 'pets', 2 images of 1x8x8, 2 classes)
    """
    loaded = load_real(real)
    config = importing.network_of(net, loaded, changes)
    check_network(config, loaded)
    options = {"method": method, "augmentation": augmentation, "alpha": alpha, "parts": parts}
    return importing.import_set(path, loaded, preprocess=preprocess, net=config, **options)  # type: ignore[arg-type]
