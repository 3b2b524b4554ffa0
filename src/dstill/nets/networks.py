"""The table of networks, the function that builds one, and access to features and feature maps.

Importing this module does not import torch, so that `dstill ls networks` answers at once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from dstill.config.settings import NetConfig
from dstill.errors import DstillError, suggest
from dstill.nets import timm_models
from dstill.support.plugins import load_class, name_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

# To add a network, write its module and add a line here. The class takes (channels, classes, size, **options).
NETWORKS: dict[str, str] = {
    "convnet": "dstill.nets.convnet:ConvNet",
    "convnet-widening": "dstill.nets.widening:WideningConvNet",
    "alexnet": "dstill.nets.alexnet:AlexNet",
    "vgg11": "dstill.nets.vgg:VGG11",
    "resnet18": "dstill.nets.resnet:ResNet18",
    "resnet18-avgpool": "dstill.nets.resnet:ResNet18AvgPool",
}


def network_class(name: str) -> Callable[..., nn.Module]:
    """The class of a network, or what makes one in the same way.

    Args:
        name: a name in `NETWORKS`, `timm:NAME`, or `package.module:Class` for a class of the user's own.

    Raises:
        DstillError: the name is unknown, or the module or class cannot be imported.
    """
    if name.startswith(timm_models.PREFIX):
        return timm_models.factory(name)
    path = NETWORKS.get(name, name)
    if ":" not in path:
        raise DstillError(
            f"unknown network {name!r}; {suggest(name, NETWORKS)} (or timm:NAME, or your own package.module:Class)"
        )
    cls: Callable[..., nn.Module] = load_class(path, "network")
    return cls


def network_name(net: Any) -> str:
    """The name of a network given as a name, as a class, or as a function that makes one.

    Raises:
        DstillError: it cannot be imported again by its name.

    Example:
        >>> from dstill.nets.convnet import ConvNet
        >>> network_name(ConvNet), network_name("vgg11")
        ('convnet', 'vgg11')
    """
    return name_of(net, NETWORKS, "network")


def evaluation_nets(own: NetConfig, nets: Sequence[Any]) -> list[NetConfig]:
    """The evaluation networks that `nets` names, where `own` keeps its options; only `own` if `nets` is empty.

    Raises:
        DstillError: one cannot be imported again by its name.
    """
    names = [network_name(net) for net in nets]
    return [own if name == own.name else NetConfig(name=name) for name in names] or [own]


def build(config: NetConfig, channels: int, classes: int, size: tuple[int, int], generator: torch.Generator) -> nn.Module:
    """A freshly initialised network. Its initial weights depend on `generator` alone.

    Args:
        config: name and options; an option that is None takes the default of the class.
        channels: colour channels of the images.
        classes: number of logits.
        size: height and width of the images in pixels.
        generator: source of the initial weights (CPU).

    Raises:
        DstillError: the network does not take one of the options, or cannot be built for this image size.
    """
    import torch

    cls = network_class(config.name)
    options: dict[str, Any] = config.model_dump(exclude={"name"}, exclude_none=True)
    accepted = inspect.signature(cls).parameters
    anything = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in accepted.values())
    refused = [key for key in options if key not in accepted and not anything]
    if refused:
        raise DstillError(f"network {config.name!r} takes no option {', '.join(refused)}: remove it from the recipe's net")
    with torch.random.fork_rng(devices=[]):
        # Modules are built on the CPU and draw from torch's global CPU generator, which fork_rng restores afterwards. The
        # generators of accelerators are not used.
        torch.default_generator.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        try:
            return cls(channels, classes, size, **options)
        except ValueError as error:
            raise DstillError(str(error)) from error


def features(net: nn.Module, images: Tensor) -> Tensor:
    """The inputs of the network's last linear layer, `[B, F]`.

    Args:
        net: any module that ends in an `nn.Linear`.
        images: preprocessed images `[B, C, H, W]`.

    Raises:
        DstillError: the module has no `nn.Linear`.
    """
    from torch import nn

    layers = [module for module in net.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise DstillError(f"{type(net).__name__} has no linear layer, so it has no features before the classifier")
    seen: list[Tensor] = []
    hook = layers[-1].register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    try:
        net(images)
    finally:
        hook.remove()
    return seen[-1]


def layers(net: nn.Module, images: Tensor) -> list[Tensor]:
    """The feature maps of each block of a network, from first to last, then the inputs of its last linear layer.

    The maps of a block are the inputs of its pooling layer or, if the block is a module of its own that holds convolutions,
    such as a residual block, its outputs.
    """
    seen: list[Tensor] = []
    pools, blocks = _block_ends(net)
    hooks = [pool.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0])) for pool in pools]
    hooks += [block.register_forward_hook(lambda _module, _inputs, output: seen.append(output)) for block in blocks]
    try:
        last = features(net, images)
    finally:
        for hook in hooks:
            hook.remove()
    return [*seen, last]


def _block_ends(module: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """Pooling layers, and modules that hold convolutions."""
    from torch import nn

    pools: list[nn.Module] = []
    blocks: list[nn.Module] = []
    for child in module.children():
        if isinstance(child, nn.Sequential):
            found = _block_ends(child)
            pools, blocks = pools + found[0], blocks + found[1]
        elif isinstance(child, nn.AvgPool2d | nn.MaxPool2d):
            pools.append(child)
        elif _holds_convolutions(child):
            blocks.append(child)
    return pools, blocks


def _holds_convolutions(module: nn.Module) -> bool:
    from torch import nn

    return any(isinstance(inner, nn.Conv2d) for inner in module.modules() if inner is not module)
