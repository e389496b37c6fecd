"""How a condensed CondenseNetV2 is run once it is trained, without gradients.

A block works in one buffer, [N, C, H, W] with a plane per channel: layers add to the planes of
earlier features in place and write new ones behind them, so nothing is concatenated. Planes are
gathered as they are, and every convolution is a product of matrices that reads its operand where it
lies; what a layer computes on the way goes to memory that all layers share. Each 1x1 convolution
runs group by group (fewest multiply-adds) or as one dense product (fewest steps). torch.export gets
the same network as a graph of convolutions (``traced``): memory is up to who runs that.

N images, C channels, P = H * W pixels, G groups, K channels that a group keeps.
"""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ['DeployedBlock', 'ThreadWorkspace', 'Workspace', 'can_run_dense']

TAPS = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)]  # of a 3x3 convolution
CENTRE = TAPS.index((0, 0))
LARGE = 4096  # pixels from which shifted planes are faster on a CPU: by measurement


class Workspace:
    """Two pieces of memory, for what a step reads and for what it writes.

    New tensors of this size would come from the system each time, which fills them with zeros.
    """

    def __init__(self) -> None:
        self.pieces: dict[int, Tensor] = {}

    def take(self, piece: int, like: Tensor, *shape: int) -> Tensor:
        """Return a piece as a tensor of some shape; what was in it is lost."""
        size = math.prod(shape)
        held = self.pieces.get(piece)
        if held is None or held.numel() < size or held.dtype != like.dtype:
            with torch.inference_mode(False):  # or it could not be used outside of that mode
                held = self.pieces[piece] = torch.empty(size, dtype=like.dtype, device=like.device)
        return held[:size].view(shape)


class ThreadWorkspace(threading.local):
    """The workspace that a network keeps from one image to the next, one for each thread."""

    def __init__(self) -> None:
        self.workspace = Workspace()

    def __reduce__(self) -> tuple:
        return ThreadWorkspace, ()  # copied and pickled without what it holds


class _Norm(nn.Module):
    """A batch norm in evaluation, and the activation behind it: [N, C, P]."""

    def __init__(self, scale: Tensor, shift: Tensor, activation: nn.Module) -> None:
        super().__init__()
        self.register_buffer('scale', scale.clone())
        self.register_buffer('shift', shift.clone())
        self.register_buffer('mean', torch.zeros_like(scale))
        self.register_buffer('variance', torch.ones_like(scale))
        self.activation = _in_place(activation)

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        # One step, where a product and a sum take two.
        statistics = (self.mean, self.variance)
        unused = (x.new_empty(0), x.new_empty(0))
        torch.native_batch_norm(
            x, self.scale, self.shift, *statistics, False, 0.0, 0.0, out=(out, *unused)
        )
        return self.activation(out)

    def traced(self, x: Tensor) -> Tensor:
        x = F.batch_norm(x, self.mean, self.variance, self.scale, self.shift, eps=0.0)
        return self.activation(x)


class DeployedGroupConv(nn.Module):
    """``conv_1`` with the norm and the activation of ``conv_2``: [N, C, P] to [N, C_out, P].

    Args:
        conv: ``conv_1`` of the condensed form.
        norm: ``conv_2``'s norm, which folds into the weight.
        activation: ``conv_2``'s activation.
        dense: Run as one product over all channels.
    """

    def __init__(
        self, conv: nn.Module, norm: nn.Module, activation: nn.Module, *, dense: bool
    ) -> None:
        super().__init__()
        self.dense = dense
        self.activation = _in_place(activation)
        scale, shift = _affine(norm)
        weight = conv.conv.weight.detach().view(conv.groups, -1, conv.conv.weight.shape[1])
        # Channel i of group g is channel i * G + g behind the shuffle.
        weight = weight * scale.view(-1, conv.groups).t()[..., None]  # [G, C_out / G, K]
        if dense:
            channels = int(conv.index.max()) + 1
            affine = [_ungather(values, conv.index, channels) for values in _affine(conv.norm)]
            full = weight.new_zeros(*weight.shape[:2], channels)
            index = conv.index.view(conv.groups, 1, -1).expand_as(weight)
            weight = full.scatter_(2, index, weight).transpose(0, 1).flatten(0, 1)
            shift = shift[:, None]
        else:
            self.register_buffer('index', conv.index)
            affine = _affine(conv.norm)
            shift = shift.view(-1, conv.groups, 1)
        self.norm = _Norm(*affine, conv.activation)
        self.register_buffer('weight', weight)
        self.register_buffer('shift', shift)

    def forward(self, x: Tensor, work: Workspace) -> Tensor:
        if self.dense:
            channels, pixels = self.weight.shape[1], x.shape[2]
            x = x[:, :channels]
            x = self.norm(x, work.take(0, x, *x.shape))
            out = work.take(1, x, len(x), len(self.weight), pixels)
            return self.activation(_product(self.weight, x, out).add_(self.shift))
        groups, members, kept = self.weight.shape
        out = work.take(0, x, len(x), groups * kept, x.shape[2])
        x = torch.index_select(x, 1, self.index, out=out)
        x = self.norm(x, work.take(1, x, *x.shape)).unflatten(1, (groups, kept))
        x = _product(self.weight, x, work.take(0, x, *x.shape[:2], members, x.shape[3]))
        out = work.take(1, x, len(x), members, groups, x.shape[3])
        return self.activation(torch.add(x.transpose(1, 2), self.shift, out=out)).flatten(1, 2)

    def traced(self, x: Tensor) -> Tensor:
        if self.dense:
            x = self.norm.traced(x[:, : self.weight.shape[1]])
            return self.activation(_conv(x, self.weight, self.shift.flatten()))
        groups = len(self.weight)
        x = self.norm.traced(x.index_select(1, self.index))
        x = _conv(x, self.weight.flatten(0, 1), self.shift.squeeze(2).t().flatten(), groups)
        return self.activation(F.channel_shuffle(x, groups))


class DeployedConv(nn.Module):
    """``conv_2``'s convolution: [N, C_in, H, W] into out [N, C_out, H, W].

    On a CPU, for large maps, one product gives what each of the nine taps adds, and shifted planes
    are summed: these groups are too narrow for the library's kernels.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.groups = conv.groups
        weight = conv.weight.detach()
        self.register_buffer('weight', weight)
        taps = weight.view(self.groups, -1, *weight.shape[1:]).flatten(3).permute(0, 3, 1, 2)
        self.register_buffer('taps', taps.flatten(1, 2).clone())  # [G, 9 C_out / G, C_in / G]

    def forward(self, x: Tensor, out: Tensor, work: Workspace) -> None:
        if x.device.type != 'cpu' or x.shape[2] * x.shape[3] < LARGE:
            out.copy_(F.conv2d(x, self.weight, padding=1, groups=self.groups))
            return
        height, width = x.shape[2:]
        groups, rows, members = self.taps.shape
        x = x.flatten(2).unflatten(1, (groups, members))
        taps = work.take(0, x, len(x), groups, rows, height * width)
        taps = _product(self.taps, x, taps).view(len(x), groups, 9, rows // 9, height, width)
        out = out.unflatten(1, (groups, rows // 9))
        out.copy_(taps[:, :, CENTRE])
        for i, (down, right) in enumerate(TAPS):
            if i != CENTRE:
                to_y, from_y = _shifted(down, height)
                to_x, from_x = _shifted(right, width)
                out[..., to_y, to_x] += taps[:, :, i, :, from_y, from_x]

    def traced(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, padding=1, groups=self.groups)


class DeployedReactivation(nn.Module):
    """``sfr``: new features [N, C_in, P] are added to those before them, [N, C, P], in place.

    Args:
        sfr: ``sfr`` of the condensed form.
        dense: Run as one product over all channels.
    """

    def __init__(self, sfr: nn.Module, *, dense: bool) -> None:
        super().__init__()
        self.dense = dense
        self.norm = _Norm(*_affine(sfr.norm), sfr.activation)
        weight = sfr.conv.weight.detach().view(sfr.groups, -1, sfr.conv.weight.shape[1])
        if dense:
            full = weight.new_zeros(int(sfr.index.max()) + 1, weight.shape[2], sfr.groups)
            index = sfr.index.view(sfr.groups, -1, 1).expand_as(weight).permute(1, 2, 0)
            weight = full.scatter_(0, index, weight.permute(1, 2, 0)).flatten(1)
        else:
            self.register_buffer('index', sfr.index)
        self.register_buffer('weight', weight.clone())  # [C, C_in] or [G, K, C_in / G]

    def forward(self, x: Tensor, new: Tensor, work: Workspace) -> None:
        new = self.norm(new, work.take(0, x, *new.shape))
        if self.dense:
            x = x[:, : len(self.weight)]
            torch.baddbmm(x, self.weight.expand(len(x), -1, -1), new, out=x)
        else:
            groups, kept, _ = self.weight.shape
            new = new.unflatten(1, (new.shape[1] // groups, groups)).transpose(1, 2)
            out = work.take(1, x, len(x), groups, kept, x.shape[2])
            x.index_add_(1, self.index, _product(self.weight, new, out).flatten(1, 2))

    def traced(self, x: Tensor, new: Tensor) -> Tensor:
        new = self.norm.traced(new)
        if self.dense:
            added = _conv(new, self.weight)
            return x + F.pad(added, (0, 0, 0, 0, 0, x.shape[1] - len(self.weight)))
        groups, _, members = self.weight.shape
        new = F.channel_shuffle(new, members)  # channel i is of group i mod G
        return x.index_add(1, self.index, _conv(new, self.weight.flatten(0, 1), groups=groups))


class DeployedLayer(nn.Module):
    """A dense layer that works in its block's buffer."""

    def __init__(self, layer: nn.Module, *, dense_conv: bool, dense_sfr: bool) -> None:
        super().__init__()
        norm, activation, conv = layer.conv_2
        self.conv_1 = DeployedGroupConv(layer.conv_1, norm, activation, dense=dense_conv)
        self.conv_2 = DeployedConv(conv)
        self.se = layer.se
        self.sfr = DeployedReactivation(layer.sfr, dense=dense_sfr)
        self.growth = conv.out_channels

    def forward(self, buffer: Tensor, begin: int, work: Workspace) -> None:
        """Read and update the channels before ``begin``, write new ones from there on."""
        planes = buffer.flatten(2)
        new = buffer[:, begin : begin + self.growth]
        x = self.conv_1(planes[:, :begin], work).unflatten(2, buffer.shape[2:])
        self.conv_2(x, new, work)
        if not isinstance(self.se, nn.Identity):
            new *= self.se.gate(new)
        self.sfr(planes[:, :begin], new.flatten(2), work)

    def traced(self, x: Tensor) -> Tensor:
        new = self.se(self.conv_2.traced(self.conv_1.traced(x)))
        return torch.cat([self.sfr.traced(x, new), new], 1)


class DeployedBlock(nn.Sequential):
    """The layers of a block, behind the pool that halves the map of the block before it.

    Args:
        block: A block of the condensed form.
        dense: The 1x1 convolutions that run dense, such as 'denselayer_1.sfr'.
    """

    def __init__(self, block: nn.Sequential, dense: set[str]) -> None:
        super().__init__()
        for name, layer in block.named_children():
            dense_conv, dense_sfr = (f'{name}.{conv}' in dense for conv in ('conv_1', 'sfr'))
            self.add_module(name, DeployedLayer(layer, dense_conv=dense_conv, dense_sfr=dense_sfr))
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
            half = work.take(0, x, *x.shape[:2], size[0], x.shape[3])
            torch.lerp(x[:, :, ::2], x[:, :, 1::2], 0.5, out=half)
            torch.lerp(half[..., ::2], half[..., 1::2], 0.5, out=buffer[:, :begin])
        else:
            buffer[:, :begin] = x
        for layer in self:
            layer(buffer, begin, work)
            begin += layer.growth
        return buffer


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, groups: int = 1) -> Tensor:
    """Return the 1x1 convolution of [N, C, H, W] with a weight [C_out, C / G]."""
    return F.conv2d(x, weight[..., None, None], bias, groups=groups)


def _product(weight: Tensor, x: Tensor, out: Tensor) -> Tensor:
    """Return weight [..., M, C] times x [N, ..., C, P] in out [N, ..., M, P]."""
    weight = weight.expand(len(x), *weight.shape)
    if weight.ndim > 3:
        torch.bmm(weight.flatten(0, 1), x.flatten(0, 1), out=out.flatten(0, 1))
    else:
        torch.bmm(weight, x, out=out)
    return out


def _shifted(offset: int, side: int) -> tuple[slice, slice]:
    """Return where the sums of a tap go, and where they come from, along a side."""
    return (
        slice(max(0, -offset), side - max(0, offset)),
        slice(max(0, offset), side - max(0, -offset)),
    )


def _affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Return what a batch norm in evaluation multiplies by, and adds."""
    scale = norm.weight.detach() * (norm.running_var + norm.eps).rsqrt()
    return scale, norm.bias.detach() - norm.running_mean * scale


def can_run_dense(conv: nn.Module) -> bool:
    """Whether the groups of a ``conv_1`` of the condensed form norm each channel alike."""
    try:
        for values in _affine(conv.norm):
            _ungather(values, conv.index, int(conv.index.max()) + 1)
    except ValueError:
        return False
    return True


def _ungather(values: Tensor, index: Tensor, channels: int) -> Tensor:
    """Return values per channel from those of gathered channels."""
    full = values.new_zeros(channels)
    full[index] = values
    if not torch.equal(full[index], values):
        raise ValueError('groups norm the same channel in different ways: this cannot run dense')
    return full


def _in_place(activation: nn.Module) -> nn.Module:
    return type(activation)(inplace=True)
