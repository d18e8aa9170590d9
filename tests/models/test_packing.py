"""The check that a model's layers do not mix packed texts, based on the layers' outputs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sections import section
from transformers import AutoModel, PreTrainedConfig, Qwen2Tokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from pipeline.config import load_recipe
from pipeline.data.batch import Encoded
from pipeline.errors import PipelineError
from pipeline.jobs.preflight.job import Job
from pipeline.jobs.preflight.job import model as preflight_model
from pipeline.models.chunks import pack
from pipeline.models.llave import model as llave
from pipeline.models.packing import check_packing
from pipeline.models.registry import saved, training
from pipeline.models.text_encoder import model as decoder
from pipeline.models.text_encoder.masked import MaskedLanguageModel
from pipeline.models.text_encoder.model import TextEncoder

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
}
CONV = SIZES | {"layer_types": ["full_attention", "conv", "full_attention"]}
LINEAR = SIZES | {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
GEMMA = {  # the first layers include all types, except those that reuse earlier keys and values
    "num_hidden_layers": 14,
    "layer_types": ["sliding_attention", "full_attention"] * 7,
    "head_dim": 16,
    "vocab_size_per_layer_input": 64,
    "hidden_size_per_layer_input": 8,
}
WIDE = {"hidden_size": 1024, "num_attention_heads": 32, "mamba_n_heads": 64, "mamba_d_head": 32}  # consistent values
ZAMBA = {"layer_types": ["linear_attention", "linear_attention", "hybrid"], "n_mamba_heads": 8}
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}


def config_of(kind: str, **fields: object) -> PreTrainedConfig:
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {kind}")
    return CONFIG_MAPPING[kind](**SIZES | fields)


@pytest.mark.parametrize("fields", [{}, {"hidden_size": 4096, "num_attention_heads": 32, "vocab_size": 30_000}])
@pytest.mark.parametrize(
    ("kind", "own"),
    [
        ("llama", {}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 16}),
        ("mistral", {"sliding_window": 4}),
        ("gemma3_text", {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention", "full_attention"]}),
        ("phi3", {"pad_token_id": 0}),
        ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 16}),
        ("gemma4_text", GEMMA | {"global_head_dim": 32, "num_global_key_value_heads": 4, "attention_k_eq_v": True}),
        ("gemma3n_text", GEMMA | {"num_kv_shared_layers": 5, "laurel_rank": 8}),
    ],
)
def test_decoders_that_separate_packed_texts_pass(kind, own, fields):
    check_packing("here", config_of(kind, **own | fields), TextEncoder.of_config)


@pytest.mark.parametrize(
    ("kind", "fields", "named"),
    [
        ("lfm2", CONV, "lfm2 model.*depend.*Lfm2ShortConv"),
        ("qwen3_next", LINEAR, "qwen3_next model.*depend.*GatedDeltaNet"),
        ("falcon_h1", MAMBA, "falcon_h1 model.*depend.*FalconH1Mixer"),
        ("recurrent_gemma", {"lru_width": 32, "head_dim": 8}, "recurrent_gemma model.*depend.*Recurrent"),
        ("gemma2", {"head_dim": 16}, "gemma2 model.*give their attention a cap on logits"),
        ("stablelm", {}, "stablelm model: the model's layers do not tell its attention where items begin"),
        ("bamba", WIDE, "bamba model.*BambaMixer mixes"),
        ("granitemoehybrid", WIDE | {"layer_types": ["mamba"] * 3}, "granitemoehybrid model.*HybridMambaLayer mixes"),
        ("zamba2", ZAMBA, "zamba2 model.*Zamba2MambaMixer"),
        ("llama4_text", {"no_rope_layers": [1, 1, 0]}, "llama4_text model.*depend.*its place in the row"),
        ("doge", {}, "doge model.*give their attention a mask"),
        ("falcon", {}, "falcon model.*FalconModel computes attention with its own code"),
        (
            "gpt_oss",
            {},
            "gpt_oss model.*its GptOssModel does not run on them .ValueError",
        ),
        ("dots1", {}, "dots1 model.*transformers makes no model of its config.json"),
        ("axk2", {"qk_rope_head_dim": 8}, "axk2 model.*its AXK2Attention does not run on them"),
    ],
)
def test_decoders_that_fail_the_packing_check_are_refused(kind, fields, named):
    with pytest.raises(PipelineError, match=f"^here is a {named}"):
        check_packing("here", config_of(kind, **fields), TextEncoder.of_config)


@pytest.mark.parametrize("kind", ["gpt2", "bloom", "mamba", "jamba", "opt", "phi4_multimodal"])
def test_decoders_of_unsupported_model_types_are_refused(kind, tmp_path):
    CONFIG_MAPPING[kind]().save_pretrained(tmp_path)
    with pytest.raises(PipelineError, match=f"is a {kind} model; expected a text-only decoder"):
        training("text_encoder").check(section("text_encoder", path=str(tmp_path)))


def test_layers_that_ignore_text_boundaries_are_refused():
    class Deaf(torch.nn.Module):
        """Attention that ignores the boundaries of texts and mixes the whole row."""

        def __init__(self, attention: torch.nn.Module) -> None:
            super().__init__()
            self.attention = attention

        def forward(self, hidden_states: torch.Tensor, segments: object, **others: object) -> tuple:
            return self.attention(
                hidden_states + 0.1 * hidden_states.mean(1, keepdim=True), segments=segments, **others
            )

    def build(config: PreTrainedConfig) -> TextEncoder:
        model = TextEncoder.of_config(config)
        model.language_model.layers[-1].self_attn = Deaf(model.language_model.layers[-1].self_attn)
        return model

    with pytest.raises(PipelineError, match=r"qwen2 model.*depend.*because its Deaf mixes them"):
        check_packing("here", config_of("qwen2"), build)


def test_positions_that_continue_across_texts_are_refused():
    def build(config: PreTrainedConfig) -> TextEncoder:
        model = TextEncoder.of_config(config)
        inner = model.language_model.embed_tokens.forward
        model.language_model.embed_tokens.forward = lambda ids: inner(ids) + 0.01 * torch.arange(ids.shape[1])[:, None]
        return model

    with pytest.raises(PipelineError, match=r"qwen2 model.*depend"):
        check_packing("here", config_of("qwen2"), build)


@pytest.fixture
def conv(tmp_path) -> str:
    AutoModel.from_config(config_of("lfm2", **CONV)).save_pretrained(tmp_path)
    Qwen2Tokenizer().train_new_from_iterator(["a cat"], 300, show_progress=False).save_pretrained(tmp_path)
    return str(tmp_path)


def test_every_loader_refuses_an_unsupported_decoder(conv):
    ways = [
        lambda: TextEncoder.load(conv, torch.float32),
        lambda: MaskedLanguageModel.load(conv, torch.float32),
        lambda: training("text_encoder").check(section("text_encoder", path=conv)),
        lambda: training("text_encoder", "masked_next_token").check(section("text_encoder", path=conv)),
        lambda: training("llm2clip").check(section("llm2clip", path=conv, text_encoder=conv)),
        lambda: saved("text_encoder").open(conv, "auto", torch.device("cpu")),
        lambda: decoder.random_config(CONV | {"model_type": "lfm2"}),
    ]
    for way in ways:
        with pytest.raises(PipelineError, match=r"lfm2 model.*Lfm2ShortConv"):
            way()


@pytest.mark.parametrize("recipe", ["demo_caption", "demo_masked"])
def test_preflight_refuses_an_unsupported_decoder(conv, recipe):
    path = Path(__file__).parents[2] / f"pipeline/recipes/{recipe}.yaml"
    overrides = [f"model.path={conv}", "model.architecture=null"]
    found = preflight_model(Job(load_recipe(path, overrides), world=1, gpus=0, guessed=True))
    assert found.state == "red"
    assert "lfm2 model" in found.found
    assert "Lfm2ShortConv" in found.found


def test_packing_check_covers_llave_layers(tiny_model, monkeypatch):
    model = section("llave", path=tiny_model)
    training("llave").check(model)
    monkeypatch.setattr("pipeline.models.packing._problems", {})

    def first(self: object, hidden_states: torch.Tensor, position_embeddings: object, segments: object) -> torch.Tensor:
        return self.o_proj(hidden_states.mean(1, keepdim=True).expand(-1, len(segments.lengths), -1))

    monkeypatch.setattr("pipeline.models.packed_attention.PoolingAttention.forward", first)
    for way in (lambda: training("llave").check(model), lambda: llave.Llave.load(tiny_model, torch.float32)):
        with pytest.raises(PipelineError, match=r"qwen2 model.*depend"):
            way()


def test_items_longer_than_the_attention_window_are_refused():
    chunked = {"attention_chunk_size": 8, "attn_temperature_tuning": False}
    for kind, fields in (("llama4_text", chunked), ("mistral", {"sliding_window": 8})):
        model = TextEncoder.of_config(config_of(kind, **fields)).eval()
        assert model(pack([Encoded(np.arange(8, dtype=np.int32))])).isfinite().all()
        with pytest.raises(PipelineError, match="beyond 8 tokens the model attends within a window"):
            model(pack([Encoded(np.arange(9, dtype=np.int32))]))


def test_items_beyond_the_dynamic_rope_limit_are_refused():
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    model = TextEncoder.of_config(config_of("llama", rope_parameters=rope, max_position_embeddings=32)).eval()
    short, long = (Encoded(np.arange(length, dtype=np.int32) % 50) for length in (20, 40))
    assert model(pack([short, short])).isfinite().all()
    with pytest.raises(
        PipelineError, match=r"beyond 32 tokens the model changes the rotary frequencies .* lower max_tokens to 32"
    ):
        model(pack([short, long]))
