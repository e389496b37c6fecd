"""Inference form of CondenseNetV2: norms folded, and each block in one buffer.

A block works in one buffer [N, C, H, W]: layers add to the channels of earlier features in place
and write new channels after them, so nothing is concatenated. Every convolution is a matrix product
that reads its operand in place, and intermediate results go to memory that all layers share.
``conv_1`` runs group by group and ``sfr`` as one dense product: the fastest combination by
measurement, although a dense product executes more MACs. torch.export and torch.compile get the
same network as a graph of convolutions (``traced``), since compilers plan memory themselves. On a
GPU they fuse what lies between products: a third fewer kernels.

N images, C channels, P = H * W pixels, G groups, K channels that a group keeps.
"""

import math
import threading

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmdense.models.deploy.fold import norm_affine

TAPS = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)]  # of a 3x3 convolution
CENTRE = TAPS.index((0, 0))
LARGE = 4096  # pixels from which shifted planes are faster on a CPU, by measurement


Workspace = dict[int, Tensor]  # two pieces of memory: one that a step reads, one that it writes


class ThreadWorkspace(threading.local):
    """The workspace of each thread, kept from one image to the next.

    Otherwise the system would fill new memory of this size with zeros, in each step.
    """

    def __init__(self) -> None:
        self.workspace: Workspace = {}

    def __reduce__(self) -> tuple:
        return ThreadWorkspace, ()  # copied and pickled without its memory


def take(work: Workspace, number: int, like: Tensor, *shape: int) -> Tensor:
    """Return a piece of the workspace as a tensor of some shape; its former values are lost."""
    size = math.prod(shape)
    piece = work.get(number)
    kind = like.dtype, like.device
    if piece is None or piece.numel() < size or (piece.dtype, piece.device) != kind:
        with torch.inference_mode(False):  # or it could not be used outside of that mode
            piece = work[number] = torch.empty(size, dtype=like.dtype, device=like.device)
    return piece[:size].view(shape)


class _Norm(nn.Module):
    """A batch norm in evaluation, followed by an activation: [N, C, P]."""

    def __init__(self, norm: nn.Module, activation: nn.Module) -> None:
        super().__init__()
        scale, shift = (value.to(norm.running_mean.dtype) for value in norm_affine(norm))
        self.register_buffer('scale', scale)
        self.register_buffer('shift', shift)
        self.register_buffer('mean', torch.zeros_like(scale))
        self.register_buffer('variance', torch.ones_like(scale))
        self.activation = type(activation)(inplace=True)

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        if x.is_cuda:
            torch.addcmul(self.shift[:, None], x, self.scale[:, None], out=out)
        else:  # the CPU's batch norm is vectorized over a channel, addcmul is not
            statistics = (self.mean, self.variance)
            unused = (x.new_empty(0), x.new_empty(0))
            torch.native_batch_norm(
                x, self.scale, self.shift, *statistics, False, 0.0, 0.0, out=(out, *unused)
            )
        return self.activation(out)

    def traced(self, x: Tensor) -> Tensor:
        statistics = (self.mean, self.variance)
        # Not F.batch_norm, which refuses eps 0 in some versions of torch.
        x = torch.batch_norm(x, self.scale, self.shift, *statistics, False, 0.0, 0.0, False)
        return self.activation(x)


class DeployedGroupConv(nn.Module):
    """The condensed ``conv_1`` with norm and activation of ``conv_2``: [N, C, P] to [N, C_out, P].

    The norm folds into the weight.
    """

    def __init__(self, conv: nn.Module, norm: nn.Module, activation: nn.Module) -> None:
        super().__init__()
        self.norm = _Norm(conv.norm, conv.activation)
        self.activation = type(activation)(inplace=True)
        scale, shift = norm_affine(norm)
        dtype = conv.conv.weight.dtype
        weight = conv.conv.weight.detach().view(conv.groups, -1, conv.conv.weight.shape[1])
        # Channel i of group g is channel i * G + g after the shuffle.
        weight = weight * scale.view(-1, conv.groups).t()[..., None]
        self.register_buffer('index', conv.index)
        self.register_buffer('weight', weight.to(dtype))  # [G, C_out / G, K]
        shift = shift.to(dtype).view(-1, conv.groups)
        self.register_buffer('shift', shift.t().flatten())  # [C_out], in the order of the groups

    def forward(self, x: Tensor, work: Workspace) -> Tensor:
        groups, members, kept = self.weight.shape
        out = take(work, 0, x, len(x), groups * kept, x.shape[2])
        x = torch.index_select(x, 1, self.index, out=out)
        x = self.norm(x, take(work, 1, x, *x.shape)).unflatten(1, (groups, kept))
        x = _product(self.weight, x, take(work, 0, x, *x.shape[:2], members, x.shape[3]))
        out = take(work, 1, x, len(x), members, groups, x.shape[3])
        shift = self.shift.view(groups, members).t()[..., None]
        return self.activation(torch.add(x.transpose(1, 2), shift, out=out)).flatten(1, 2)

    def traced(self, x: Tensor) -> Tensor:
        groups = len(self.weight)
        x = self.norm.traced(x.index_select(1, self.index))
        weight = self.weight.flatten(0, 1)[..., None, None]
        x = F.conv2d(x, weight, self.shift, groups=groups)
        return self.activation(F.channel_shuffle(x, groups))


class DeployedConv(nn.Module):
    """``conv_2``'s convolution: [N, C_in, H, W] to [N, C_out, H, W], in ``out`` or in new memory.

    On a CPU, for large feature maps, one product computes the contribution of each of the nine taps
    and shifted planes are summed: these groups are too narrow for the library's kernels.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.groups = conv.groups
        weight = conv.weight.detach()
        self.register_buffer('weight', weight)
        taps = weight.view(self.groups, -1, *weight.shape[1:]).flatten(3).permute(0, 3, 1, 2)
        self.register_buffer('taps', taps.flatten(1, 2).clone())  # [G, 9 C_out / G, C_in / G]

    def forward(self, x: Tensor, out: Tensor, work: Workspace) -> Tensor:
        if x.device.type != 'cpu' or x.shape[2] * x.shape[3] < LARGE:
            return self.traced(x)
        height, width = x.shape[2:]
        groups, rows, members = self.taps.shape
        x = x.flatten(2).unflatten(1, (groups, members))
        taps = take(work, 0, x, len(x), groups, rows, height * width)
        taps = _product(self.taps, x, taps).view(len(x), groups, 9, rows // 9, height, width)
        sums = out.unflatten(1, (groups, rows // 9))
        sums.copy_(taps[:, :, CENTRE])
        for i, (down, right) in enumerate(TAPS):
            if i != CENTRE:
                to_y, from_y = _shifted(down, height)
                to_x, from_x = _shifted(right, width)
                sums[..., to_y, to_x] += taps[:, :, i, :, from_y, from_x]
        return out

    def traced(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, padding=1, groups=self.groups)


class DeployedReactivation(nn.Module):
    """The condensed ``sfr``: adds new features [N, C_in, P] to [N, C, P] before them, in place."""

    def __init__(self, sfr: nn.Module) -> None:
        super().__init__()
        self.norm = _Norm(sfr.norm, sfr.activation)
        weight = sfr.conv.weight.detach().view(sfr.groups, -1, sfr.conv.weight.shape[1])
        dense = weight.new_zeros(int(sfr.index.max()) + 1, weight.shape[2], sfr.groups)
        index = sfr.index.view(sfr.groups, -1, 1).expand_as(weight).permute(1, 2, 0)
        # [C, C_in], up to the last channel that a group adds to.
        self.register_buffer('weight', dense.scatter_(0, index, weight.permute(1, 2, 0)).flatten(1))

    def forward(self, x: Tensor, new: Tensor, work: Workspace) -> None:
        new = self.norm(new, take(work, 0, x, *new.shape))
        x = x[:, : len(self.weight)]
        torch.baddbmm(x, self.weight.expand(len(x), -1, -1), new, out=x)

    def traced(self, x: Tensor, new: Tensor) -> Tensor:
        added = F.conv2d(self.norm.traced(new), self.weight[..., None, None])
        return x + F.pad(added, (0, 0, 0, 0, 0, x.shape[1] - len(self.weight)))


class DeployedLayer(nn.Module):
    """A dense layer that works in its block's buffer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        norm, activation, conv = layer.conv_2
        self.conv_1 = DeployedGroupConv(layer.conv_1, norm, activation)
        self.conv_2 = DeployedConv(conv)
        self.se = layer.se
        self.sfr = DeployedReactivation(layer.sfr)
        self.growth = conv.out_channels

    def forward(self, buffer: Tensor, begin: int, work: Workspace) -> None:
        """Read and update the channels before ``begin``, write new ones from there on."""
        planes = buffer.flatten(2)
        new = buffer[:, begin : begin + self.growth]
        x = self.conv_1(planes[:, :begin], work).unflatten(2, buffer.shape[2:])
        x = self.conv_2(x, new, work)
        if not isinstance(self.se, nn.Identity):
            torch.mul(x, self.se.gate(x), out=new)
        elif x is not new:
            new.copy_(x)
        self.sfr(planes[:, :begin], new.flatten(2), work)

    def traced(self, x: Tensor) -> Tensor:
        new = self.se(self.conv_2.traced(self.conv_1.traced(x)))
        return torch.cat([self.sfr.traced(x, new), new], 1)


class DeployedBlock(nn.Sequential):
    """The layers of a condensed block, after the pool that halves its input."""

    def __init__(self, block: nn.Sequential) -> None:
        super().__init__()
        for name, layer in block.named_children():
            self.add_module(name, DeployedLayer(layer))
        self.pool = block.pool

    def forward(self, x: Tensor, work: Workspace) -> Tensor:
        """Map [N, C, H, W] to [N, C + layers * growth, H, W], or half of that size with a pool."""
        if torch.compiler.is_compiling():
            x = F.avg_pool2d(x, 2) if self.pool else x
            for layer in self:
                x = layer.traced(x)
            return x
        size = [side // 2 if self.pool else side for side in x.shape[2:]]
        begin = x.shape[1]
        buffer = x.new_empty(len(x), begin + sum(layer.growth for layer in self), *size)
        if self.pool:  # torch's own pool is slow on planes
            x = x[:, :, : 2 * size[0], : 2 * size[1]]
            half = take(work, 0, x, *x.shape[:2], size[0], x.shape[3])
            torch.lerp(x[:, :, ::2], x[:, :, 1::2], 0.5, out=half)
            torch.lerp(half[..., ::2], half[..., 1::2], 0.5, out=buffer[:, :begin])
        else:
            buffer[:, :begin] = x
        for layer in self:
            layer(buffer, begin, work)
            begin += layer.growth
        return buffer


def _product(weight: Tensor, x: Tensor, out: Tensor) -> Tensor:
    """Return weight [G, M, C] times x [N, G, C, P] in out [N, G, M, P]."""
    weight = weight.expand(len(x), *weight.shape)
    torch.bmm(weight.flatten(0, 1), x.flatten(0, 1), out=out.flatten(0, 1))
    return out


def _shifted(offset: int, side: int) -> tuple[slice, slice]:
    """Return where the sums of a tap go, and where they come from, along a side."""
    return (
        slice(max(0, -offset), side - max(0, offset)),
        slice(max(0, offset), side - max(0, -offset)),
    )
