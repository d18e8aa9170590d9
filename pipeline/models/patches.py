"""Patch embeddings of images as bytes: a patch embedding is linear, so its weights can also normalise the pixels.

    W (x / 255 - mean) / std + b  =  W' (x - c) + b,  with W' = W / (255 std) and c = 255 mean

So a byte becomes a number once, and the backward pass keeps bytes. Modules are transformers' and timm's own with a
changed class, so parameters and their names stay the same. In bf16, x - 128 is exact, and W' is rounded where otherwise
the normalised pixels are.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings
from transformers.models.siglip.modeling_siglip import SiglipVisionEmbeddings

from pipeline.errors import PipelineError
from pipeline.models.chunks import sent

Channels = tuple[float, float, float]

# Pixels that become numbers at once. On a CPU few, which stay in its cache; on a GPU all of most chunks.
_AT_ONCE_ON_CPU, _AT_ONCE = 1 << 20, 1 << 27


def embed_bytes(model: nn.Module, mean: Channels, std: Channels) -> None:
    """Make a vision tower of transformers or timm also accept (n, 3, height, width) uint8 pixels, not normalised.

    mean, std: per channel, for values in [0, 1].  Raises PipelineError if it does not embed patches by one convolution.
    """
    convolutions: list[Any] = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    if len(convolutions) != 1 or not _cuts_patches(convolutions[0]):
        raise PipelineError("the vision tower does not embed patches by one convolution, which is not supported")
    convolutions[0].__class__ = PatchEmbedding
    convolutions[0].mean, convolutions[0].std = mean, std
    for module in model.modules():
        for kind in (ClipEmbeddings, SiglipEmbeddings):
            if type(module) is kind.__base__:
                module.__class__ = kind


def _cuts_patches(module: nn.Conv2d) -> bool:
    high, wide = module.kernel_size
    unpadded = module.padding in ((0, 0), "valid")
    return high == wide and module.stride == module.kernel_size and unpadded and module.in_channels == 3


class PatchEmbedding(nn.Conv2d):
    """A convolution whose patches do not overlap, of normalised pixels or of bytes.

    mean, std: what bytes, divided by 255, are normalised with.
    """

    mean: Channels
    std: Channels

    def forward(self, pixels: Tensor) -> Tensor:
        """Map (n, 3, height, width) to (n, width, rows, columns); pixels beyond the last whole patch are ignored."""
        if pixels.dtype != torch.uint8:
            return super().forward(pixels)
        device, side = self.weight.device, self.kernel_size[0]
        std, centre = (sent(255 * torch.tensor(values), device) for values in (self.std, self.mean))
        weight = (self.weight.float() / std[:, None, None]).to(self.weight.dtype)
        bias = weight.flatten(2).sum(2, dtype=torch.float32) @ (_ZERO - centre)
        bias = bias if self.bias is None else bias + self.bias
        rows, columns = (length // side for length in pixels.shape[2:])
        embedded = _Linear.apply(pixels[..., : rows * side, : columns * side], weight, bias.to(weight.dtype))
        return embedded.transpose(1, 2).unflatten(2, (rows, columns))


# transformers' embeddings would convert bytes to the weights' dtype.
class ClipEmbeddings(CLIPVisionEmbeddings):
    def forward(self, pixel_values: Any, interpolate_pos_encoding: bool = False) -> Tensor:
        if pixel_values.dtype != torch.uint8:
            return super().forward(pixel_values, interpolate_pos_encoding)
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_embedding.expand(len(patches), 1, -1), patches], dim=1)
        return tokens + self.position_embedding(self.position_ids)


class SiglipEmbeddings(SiglipVisionEmbeddings):
    def forward(self, pixel_values: Any, interpolate_pos_encoding: bool = False) -> Tensor:
        if pixel_values.dtype != torch.uint8:
            return super().forward(pixel_values, interpolate_pos_encoding)
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        return patches + self.position_embedding(self.position_ids)


_ZERO = 128  # bytes minus this are signed bytes


class _Linear(torch.autograd.Function):
    """(n, 3, rows * side, columns * side) uint8 -> (n, rows * columns, width): W (x - _ZERO) + b of each patch x.

    weight: (width, 3, side, side).  bias: (width,).
    """

    @staticmethod
    def forward(ctx: Any, pixels: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(pixels)
        ctx.side = weight.shape[2]
        count = pixels.shape[2] // ctx.side * (pixels.shape[3] // ctx.side)
        out = weight.new_empty(len(pixels), count, len(weight))
        for place, patches in _patches(pixels, ctx.side, weight.dtype):
            torch.addmm(bias, patches, weight.flatten(1).T, out=out[place].flatten(0, 1))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor | None, Tensor | None]:
        (pixels,) = ctx.saved_tensors
        of_weight = of_bias = None
        if ctx.needs_input_grad[1]:
            width, numbers = gradient.shape[2], 3 * ctx.side**2
            of_weight = gradient.new_zeros(width, numbers, dtype=torch.float32)
            for place, patches in _patches(pixels, ctx.side, gradient.dtype):
                rows = gradient[place].flatten(0, 1).T
                if gradient.dtype == torch.float32:
                    of_weight.addmm_(rows, patches)
                else:  # slices are summed in float32
                    of_weight += rows @ patches
            of_weight = of_weight.to(gradient.dtype).view(width, 3, ctx.side, ctx.side)
        if ctx.needs_input_grad[2]:
            of_bias = gradient.sum((0, 1))
        return None, of_weight, of_bias


def _patches(pixels: Tensor, side: int, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield (place, patches minus _ZERO) for slices of the images; patches are (rows, 3 * side * side)."""
    n, channels, height, width = pixels.shape
    most = _AT_ONCE_ON_CPU if pixels.device.type == "cpu" else _AT_ONCE
    at_once = max(1, most // (channels * height * width))
    for start in range(0, n, at_once):
        place = slice(start, start + at_once)
        signed = pixels[place].bitwise_xor(_ZERO).view(torch.int8)
        grid = signed.unflatten(3, (-1, side)).unflatten(2, (-1, side)).permute(0, 2, 4, 1, 3, 5)
        yield place, grid.to(dtype, memory_format=torch.contiguous_format).flatten(3).flatten(0, 2)
