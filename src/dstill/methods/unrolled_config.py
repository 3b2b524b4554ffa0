"""Settings of all methods that differentiate through the training of a student: how its steps are taken and what is kept."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from dstill.config.settings import Case, Count, DistillConfig, Precision


class UnrolledConfig(DistillConfig):
    """What trajectory matching and back-propagation through training have in common."""

    optimises_images: ClassVar[bool] = True

    batch_syn: Count | None = None
    """Synthetic images per student step; left out: the whole set."""
    image_ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of a moving average of the images and learned labels, which becomes the result; left out: the last ones."""
    memory: Literal["auto", "keep", "recompute"] = "auto"
    """What the adjoint keeps of the forward sweep: as much as fits in half of the free memory, everything, or nothing. The
    numbers are the same; keeping more is faster."""
    precision: Precision = "float32"
    """Exact; bfloat16 convolutions in the backward sweep; or bfloat16 everywhere. The last two are approximations."""
    compile: bool = False
    """torch.compile the student's step where native kernels do not run. It takes about a minute; then steps are faster."""
    max_skip_share: Annotated[float, Field(gt=0, le=1)] = 0.2
    """The run stops with advice once more than this share of the steps, and at least 10, has been skipped."""

    def student_batch(self, count: int) -> int:
        """Images in a student step, of a set of `count` images."""
        return min(self.batch_syn or count, count)

    def batch_below(self, case: Case) -> int | None:
        """`batch_syn`, or None if it covers the whole set of a case."""
        whole = case.ipc * self.parts**2 * case.shape.classes
        return self.batch_syn if self.batch_syn is not None and self.batch_syn < whole else None
