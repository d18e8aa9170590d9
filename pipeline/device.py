"""Settings of CUDA that hold for a whole process."""

import os

import torch

# torch uses the first of these variables that is set.
_ALLOCATOR = {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_ALLOC_CONF"}


def configure_device(device: torch.device | str) -> None:
    """Set what computations on a CUDA device rely on; for a CPU, change nothing.

    Call it before a model is put on the device, and before the first allocation there. It may be called again.
    """
    if torch.device(device).type != "cuda":
        return
    # Freed segments are reused for tensors of other sizes.
    if not _ALLOCATOR.intersection(os.environ):
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    # Products and convolutions have the error of float32, which TF32's exceeds: losses and exact search rely on it.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    # On Hopper, bf16 SDPA would use cuDNN's attention. It builds a plan for every new shape (0.4 s forward, 0.5 s
    # backward), and shapes change with every chunk. With cuDNN 9.20, which torch 2.13 brings, gradients of masked
    # attention are NaN where a length is 64 more than a multiple of 128 (github.com/pytorch/pytorch/issues/196678).
    torch.backends.cuda.enable_cudnn_sdp(False)
