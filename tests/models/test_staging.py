"""What is sent to the device are the items as `pack` concatenates them."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.data.batch import Encoded, Image
from pipeline.models.chunks import pack
from pipeline.models.staging import Layout, Staging

CPU = torch.device("cpu")


def item(number: int, tiles: int = 0, width: int = 0, axes: bool = False) -> Encoded:
    draws = np.random.default_rng(number)
    ids = draws.integers(0, 99, 3 + number, dtype=np.int32)
    images = (Image(draws.integers(0, 256, (tiles, 3, 5, 5), dtype=np.uint8), 5, 5),) if tiles else ()
    vector = draws.random(width, np.float32) if width else None
    return Encoded(ids, images, vector=vector, positions=np.tile(np.arange(len(ids)), (3, 1)) if axes else None)


CHUNKS = {
    "texts": [item(1), item(2)],
    "images": [item(3, tiles=2), item(4), item(5, tiles=1)],
    "three axes": [item(6, tiles=1, axes=True), item(7)],
    "vectors": [item(8, width=7), item(9, tiles=1), item(10)],
}


def tensors_of(packed) -> dict[str, torch.Tensor]:
    found = {"input_ids": packed.input_ids, "position_ids": packed.position_ids, "tiles": packed.tiles}
    return found if packed.text_vectors is None else found | {"text_vectors": packed.text_vectors}


@pytest.mark.parametrize("name", CHUNKS)
def test_blocks_hold_packed_items_also_where_a_buffer_is_used_again(name):
    buffer = torch.full((20_000,), 7, dtype=torch.uint8)
    for items in (CHUNKS[name], CHUNKS["images"]):
        expected = tensors_of(pack(items))
        arrays = {name: [tensor.numpy()] for name, tensor in expected.items()}
        if any(each.images for each in items):
            arrays["tiles"] = [image.tiles for each in items for image in each.images]
        layout = Layout.of(arrays)
        layout.fill(buffer[: layout.size], arrays)
        found = layout.views(buffer[: layout.size].clone())
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
            assert found[name].storage_offset() * found[name].itemsize % 256 == 0


@pytest.mark.parametrize("tiles", [True, False])
@pytest.mark.parametrize("name", CHUNKS)
def test_on_a_cpu_items_are_packed_and_nothing_is_copied(name, tiles):
    packed = pack(CHUNKS[name])
    received = Staging(CPU).sent(packed, tiles=tiles).received()
    assert replace(received, made={}) == packed  # the same tensors
    assert ("tiles" in received.made) == (tiles and bool(packed.images))
    for name, tensor in tensors_of(packed).items():
        assert torch.equal(tensors_of(received)[name], tensor)
    if "text_vectors" in received.made:
        assert received.text_vectors is received.text_vectors


def test_missing_vectors_are_zeros_and_images_have_none():
    packed = pack(CHUNKS["vectors"])
    assert torch.equal(packed.text_vectors[0], torch.from_numpy(CHUNKS["vectors"][0].vector))
    assert packed.text_vectors.shape == (2, 7) and not packed.text_vectors[1].any()
    assert pack(CHUNKS["images"]).text_vectors is None
