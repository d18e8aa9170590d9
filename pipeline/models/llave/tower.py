"""SigLIP without gradients: the same features from the same weights, with fewer kernels.

The modules are transformers' own with a changed class.
"""

from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.models.siglip.modeling_siglip import SiglipMLP

from pipeline.models import kernels


def run_frozen(tower: nn.Module) -> None:
    """Make the MLPs of a tower that is never trained apply GELU in the matmul before it, where kernels.py runs."""
    for module in tower.modules():
        if type(module) is SiglipMLP and type(module.activation_fn) is type(ACT2FN["gelu_pytorch_tanh"]):
            module.__class__ = FrozenMLP


class FrozenMLP(SiglipMLP):
    def forward(self, hidden_states: Tensor) -> Tensor:
        if not kernels.usable(hidden_states):
            return super().forward(hidden_states)
        return self.fc2(kernels.linear_gelu(hidden_states, self.fc1.weight, self.fc1.bias))
