"""Inference form of ReXNet: norms folded, activations and shortcuts in place.

Feature maps are channels-last, for images of either memory format, since convolutions follow the
weights' format; on a CPU that is the faster one. A block writes only to memory that it allocated,
so returned feature maps are never written again. All operators are torch's public ones.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmdense.models.deploy.fold import fold_norm


class DeployedConv(nn.Module):
    """``conv``, ``bn`` and ``act``: [N, C_in, H, W] to [N, C_out, H', W'], channels-last."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.conv = fold_norm(layers.conv, layers.bn)
        self.act = layers.act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x))


class DeployedGate(nn.Module):
    """timm's squeeze and excitation with a norm: the gates [N, C, 1, 1] of [N, C, H, W]."""

    def __init__(self, se: nn.Module) -> None:
        super().__init__()
        self.fc1 = fold_norm(se.fc1, se.bn)
        self.fc2 = se.fc2

    def forward(self, x: Tensor) -> Tensor:
        # A 1x1 convolution of one pixel is a linear layer, which takes less time to call.
        x = F.linear(x.mean((2, 3)), self.fc1.weight.flatten(1), self.fc1.bias).relu_()
        x = F.linear(x, self.fc2.weight.flatten(1), self.fc2.bias).sigmoid_()
        return x[..., None, None]


class DeployedBottleneck(nn.Module):
    """A ``LinearBottleneck``; its output [N, C_out, ceil(H / stride), ceil(W / stride)] is new."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.conv_exp = None if block.conv_exp is None else DeployedConv(block.conv_exp)
        self.conv_dw = fold_norm(block.conv_dw.conv, block.conv_dw.bn)
        self.se = None if block.se is None else DeployedGate(block.se)
        self.conv_pwl = fold_norm(block.conv_pwl.conv, block.conv_pwl.bn)
        self.shortcut = block.drop_path is not None

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.conv_exp is None else self.conv_exp(x)
        y = self.conv_dw(y)
        if self.se is not None:
            y *= self.se(y)
        y = self.conv_pwl(F.relu6(y, inplace=True))
        if not self.shortcut:
            return y
        if torch.compiler.is_compiling():
            # Inductor fuses this, and fails on a part written in place if it freezes weights.
            return y + F.pad(x, (0, 0, 0, 0, 0, y.shape[1] - x.shape[1]))
        y[:, : x.shape[1]].add_(x)
        return y
