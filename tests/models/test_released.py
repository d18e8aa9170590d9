"""Published text encoders of LLM2CLIP, from folders like theirs with random weights."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from pipeline.config import EvaluationRun
from pipeline.data.sample import Item
from pipeline.embedding.embedder import Embedder
from pipeline.errors import PipelineError
from pipeline.evaluation.encoders import load_encoder
from pipeline.models.llm2clip import model as llm2clip
from pipeline.models.llm2clip.model import Llm2Clip
from pipeline.models.registry import family_of, saved
from pipeline.models.text_encoder import model as decoder
from pipeline.models.vision import VisionEncoder

PAPER = Path(__file__).parents[1] / "papers/llm2clip"
NAMES = {
    # As in config.json of the 1B model.
    "1b": "modeling_bidirectional_llama_encoder.LlamaBiModel",
    # The 8B model has the file modeling_llama_encoder.py, and issue 60 of its project names the class.
    "8b": "McGill-NLP/LLM2Vec-Meta-Llama-3-8B-Instruct-mntp--modeling_llama_encoder.LlamaEncoderModel",
    "8b-local": "modeling_llama_encoder.LlamaEncoderModel",
}


def folder_of(folder: Path, code: str, **fields: object) -> Path:
    """Write a folder like a published one: its class of `code`, which would create a file if it was imported."""
    shutil.copytree(PAPER / "text_encoder", folder)
    config = json.loads((folder / "config.json").read_text())
    module, _, name = code.rpartition("--")[2].partition(".")
    config |= {"architectures": [name], "auto_map": {"AutoModel": code}} | fields
    (folder / "config.json").write_text(json.dumps(config))
    (folder / f"{module}.py").write_text(f"open({str(folder / 'executed')!r}, 'w')\n")
    return folder


@pytest.fixture(params=NAMES)
def published(request, tmp_path) -> Path:
    return folder_of(tmp_path / "published", NAMES[request.param])


def expected() -> tuple[list[str], torch.Tensor]:
    """Return texts, and their embeddings by the extraction of the published code."""
    rows = json.loads((PAPER / "extraction_texts.json").read_text())["without_instruction"]["rows"]
    rows = [row for row in rows if row["text"].strip()]
    return [row["text"] for row in rows], F.normalize(torch.tensor([row["embedding"] for row in rows]), dim=1)


def test_published_text_encoder_embeds_as_its_own_code(published):
    texts, embeddings = expected()
    assert family_of(str(published)) is saved("text_encoder")
    rows = Embedder.load(published, max_tokens=512, device="cpu").embed(texts)
    torch.testing.assert_close(rows, embeddings, rtol=0, atol=1e-5)
    encoder = load_encoder(str(published), EvaluationRun(max_tokens=512), torch.device("cpu"))
    rows = encoder.embed([encoder.prepare(Item(text)) for text in texts])
    torch.testing.assert_close(rows, embeddings, rtol=0, atol=1e-5)
    decoder.check_folder(str(published))
    assert not (published / "executed").exists()


def test_llm2clip_of_a_published_teacher_keeps_its_settings(published, tmp_path):
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    VisionEncoder.build(vision | {"image_size": 8, "patch_size": 4}, 8, 0).save(tmp_path / "vision")
    model = Llm2Clip.load(str(tmp_path / "vision"), torch.float32, 64)
    llm2clip.save(model, str(published), tmp_path / "out", None)
    config = json.loads((tmp_path / "out/text_encoder/config.json").read_text())
    assert "auto_map" not in config and config["is_causal"] is False and config["architectures"] == ["LlamaModel"]
    assert not list((tmp_path / "out").rglob("*.py"))
    texts, embeddings = expected()
    rows = Embedder.load(tmp_path / "out/text_encoder", max_tokens=512, device="cpu").embed(texts)
    torch.testing.assert_close(rows, embeddings, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        Embedder.load(tmp_path / "out", max_tokens=512, device="cpu").embed(texts),
        model.adapter(embeddings),
        rtol=0,
        atol=1e-4,
    )


def test_weights_may_be_named_as_in_a_causal_language_model(tmp_path):
    folder = folder_of(tmp_path / "published", NAMES["1b"])
    weights = load_file(folder / "model.safetensors")
    renamed = {f"model.{name.removeprefix('model.')}": weight for name, weight in weights.items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    texts, embeddings = expected()
    rows = Embedder.load(folder, max_tokens=512, device="cpu").embed(texts)
    torch.testing.assert_close(rows, embeddings, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("code", "fields"),
    [
        ("modeling_llama_encoder.Other", {}),
        ("other.LlamaBiModel", {}),
        (NAMES["1b"], {"model_type": "mistral"}),
        (NAMES["1b"], {"auto_map": {"AutoModel": NAMES["1b"], "AutoConfig": "evil.Config"}}),
        (NAMES["1b"], {"auto_map": {"AutoModel": ["a", "b"]}}),
    ],
)
def test_other_code_is_refused(code, fields, tmp_path):
    folder = folder_of(tmp_path / "published", code, **fields)
    with pytest.raises(PipelineError, match="has an auto_map"):
        family_of(str(folder))
    assert not (folder / "executed").exists()


def test_a_folder_of_llm2vec_itself_is_refused(tmp_path):
    """Its template depends on the base model."""
    folder = folder_of(tmp_path / "published", NAMES["8b-local"])
    (folder / "llm2vec_config.json").write_text("{}")
    with pytest.raises(PipelineError, match="has an auto_map"):
        family_of(str(folder))
