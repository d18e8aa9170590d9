import copy

import pytest
import torch
from transformers import Qwen2Config, Qwen2Model

from pipeline.models.attention import Segments, implementation
from pipeline.models.checkpointing import checkpoint_layers
from pipeline.models.last_layer import pool_in_last_layer

LENGTHS = (5, 1, 17, 3)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_it_gives_the_last_tokens_states_and_all_gradients(checkpointed):
    config = Qwen2Config(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        attn_implementation=implementation("sdpa"),
    )
    torch.manual_seed(0)
    whole = Qwen2Model(config).double()
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    pooling = copy.deepcopy(whole)
    pool_in_last_layer(pooling)
    assert pooling.state_dict().keys() == whole.state_dict().keys()
    if checkpointed:
        checkpoint_layers(pooling)
    packed = {
        "inputs_embeds": torch.randn(1, sum(LENGTHS), 32, dtype=torch.float64, requires_grad=True),
        "position_ids": torch.cat([torch.arange(length) for length in LENGTHS])[None],
        "segments": Segments(LENGTHS, torch.device("cpu")),
        "use_cache": False,
    }
    last = torch.tensor(LENGTHS).cumsum(0) - 1
    expected = whole(**packed).last_hidden_state[:, last]
    ours = pooling(**packed).last_hidden_state
    torch.testing.assert_close(ours, expected)
    directions = torch.randn_like(expected)
    of_ours, of_whole = (
        torch.autograd.grad((each * directions).sum(), [packed["inputs_embeds"], *model.layers.parameters()])
        for each, model in ((ours, pooling), (expected, whole))
    )
    torch.testing.assert_close(of_ours, of_whole)
