"""A frozen tower outside the model gives the same embeddings, and processes each tile once per step."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from closeness import assert_close_in_norm
from transformers import SiglipVisionConfig, SiglipVisionModel

from pipeline.data.batch import Encoded, Image
from pipeline.errors import PipelineError
from pipeline.models.chunks import CachedFeatures, embed_chunks, offloaded, plan_chunks
from pipeline.models.lean import GeluLinear, fuse_gelu
from pipeline.models.llave.folder import save_folder
from pipeline.models.llave.model import FrozenTower, Llave, TowerlessLlave, normalised, tower_features
from pipeline.models.llave.processor import LlaveProcessor

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def items(tiny_model) -> list[Encoded]:
    """Return texts, and images of two and of five tiles."""
    processor, rng = LlaveProcessor.load(tiny_model, 512), np.random.default_rng(0)
    items = []
    for number in range(9):
        side = 24 if number % 2 else 48
        tiles = rng.integers(0, 256, (2 if side == 24 else 5, 3, 24, 24), dtype=np.uint8)
        images = () if number % 3 == 0 else (Image(tiles, side, side),)
        tokens = processor.tiling.tokens(side, side, anyres=True) if images else 0
        ids = [5, *[processor.image_token_id] * tokens, *range(6, 6 + number)]
        items.append(Encoded(np.array(ids, np.int32), images))
    return items


def test_embeddings_match_whole_model(tiny_model, items):
    whole, without = Llave.load(tiny_model, torch.float32), TowerlessLlave.load(tiny_model, torch.float32)
    assert not [name for name, _ in without.named_parameters() if "tower" in name]
    tower = FrozenTower.load(tiny_model, torch.float32, CPU, tiles_at_once=2)
    assert not [parameter for parameter in tower.parameters() if parameter.requires_grad]
    chunks = plan_chunks(items, 60, CPU)
    expected = embed_chunks(whole, chunks, len(items))
    for limit in (0, 1 << 30):
        features = CachedFeatures(tower, limit)
        for _ in range(2):  # computed first, then cached
            assert_close_in_norm(embed_chunks(without, chunks, len(items), features), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tower_with_fused_gelu_matches_transformers(dtype):
    torch.manual_seed(0)
    config = SiglipVisionConfig(
        hidden_size=36, intermediate_size=67, num_hidden_layers=2, num_attention_heads=2, image_size=24, patch_size=8
    )
    config.vision_use_head = False
    whole = SiglipVisionModel(config).to(dtype).eval()
    for name, parameter in whole.named_parameters():
        if "mlp.fc1" in name:  # so that GELU is not nearly linear
            parameter.data.mul_(20)
    fused = copy.deepcopy(whole)
    fuse_gelu(fused)
    assert [type(module) for module in fused.modules()].count(GeluLinear) == 2
    assert fused.state_dict().keys() == whole.state_dict().keys()
    pixels = torch.randn(3, 3, 24, 24).to(dtype)
    expected, ours = (tower_features(tower, pixels) for tower in (whole, fused))
    assert torch.equal(ours, expected)
    wanted = [
        torch.autograd.grad(each.square().sum(), tower.encoder.parameters())
        for each, tower in ((expected, whole), (ours, fused))
    ]
    assert all(torch.equal(*pair) for pair in zip(*wanted, strict=True))
    with torch.no_grad():  # as in a step's first pass
        assert torch.equal(tower_features(fused, pixels), expected)
    assert_close_in_norm(tower_features(fused.requires_grad_(False), pixels), expected)


def test_each_tile_is_processed_once_in_small_batches(tiny_model, items):
    tower, seen = FrozenTower.load(tiny_model, torch.float32, CPU, tiles_at_once=2), []
    tower.vision_tower.embeddings.register_forward_pre_hook(lambda _, arguments: seen.append(len(arguments[0])))
    features, chunks = CachedFeatures(tower, 0), plan_chunks(items, 60, CPU)
    with_images = [chunk for chunk in chunks if chunk.packed.images]
    assert len(with_images) > 1
    for _ in range(3):
        for chunk in with_images:
            made = features(chunk, chunk.packed)
            pixels = normalised(chunk.packed.tiles, CPU, torch.float32)
            assert_close_in_norm(made, tower_features(tower.vision_tower, pixels))
            seen.pop()  # the reference above also ran the tower
    assert sum(seen) == sum(len(image.tiles) for item in items for image in item.images)
    assert max(seen) == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="it is about a GPU's memory")
def test_features_offloaded_from_a_gpu_return_unchanged():
    """The copies are asynchronous, while the memory of the originals is used again at once."""
    cuda = torch.device("cuda")
    values = iter(range(100))
    frozen = SimpleNamespace(device=cuda, features_of=lambda *_: torch.full((1 << 20,), next(values), device=cuda))
    chunks = plan_chunks([Encoded(np.ones(9, np.int32))] * 20, 9, cuda)
    for step in range(3):
        features = CachedFeatures(frozen, 0)
        for _ in range(2):
            got = torch.stack([features(chunk, chunk.packed).amax() for chunk in chunks]).tolist()
            assert got == list(range(20 * step, 20 * step + 20))
    assert offloaded(torch.ones(3, device=cuda)).is_pinned()


def test_folder_without_tower_weights_is_refused(tiny_model, tmp_path):
    model = Llave.load(tiny_model, torch.float32)
    weights = {name: p for name, p in model.named_parameters() if "patch_embedding" not in name}
    save_folder(model, weights, tiny_model, tmp_path / "partial")
    with pytest.raises(PipelineError, match=r"lacks 2 of the model's weights, .*vision_tower.*patch_embedding"):
        FrozenTower.load(str(tmp_path / "partial"), torch.float32, CPU)
    assert TowerlessLlave.load(str(tmp_path / "partial"), torch.float32)
