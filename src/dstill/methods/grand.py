"""GraNd: real images by the norm of the gradient of their loss early in training (Paul et al. 2021)."""

from __future__ import annotations

from typing import final

from torch import Tensor, nn
from torch.func import grad, vmap

from dstill.methods.difficulty import Difficulty
from dstill.support.devices import full_precision
from dstill.unrolling.student import Student

# Each image of a block has a gradient of its own, as large as the network. 128 MB hold those of 104 images at width 128.
_BLOCK_BYTES, _BLOCK = 2**27, 128


@full_precision()
def gradient_norms(net: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """‖∇_θ CE(x, y)‖₂ of each image, with respect to all weights θ (GraNd of Paul et al. 2021, Section 2), `[n]`.

    The gradients of a block of images are computed together, by torch's vectorised autograd.

    Args:
        net: a network without running statistics; its weights are θ.
        images: `[n, C, H, W]`, preprocessed.
        labels: class ids `[n]`.

    Raises:
        DstillError: the network has running statistics or dropout.
    """
    student, theta = Student(net), nn.utils.parameters_to_vector(net.parameters()).detach()
    block = max(1, min(_BLOCK, _BLOCK_BYTES // (theta.numel() * theta.itemsize)))

    def of_one(image: Tensor, label: Tensor) -> Tensor:
        gradient: Tensor = grad(student.loss)(theta, image.unsqueeze(0), label.unsqueeze(0))
        return gradient.norm()

    norms: Tensor = vmap(of_one, chunk_size=block)(images, labels)
    return norms


@final
class Grand(Difficulty):
    """Selects by the norm of the gradient of an image's loss, averaged over networks."""

    def score(self, net: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        return gradient_norms(net, images, labels)
