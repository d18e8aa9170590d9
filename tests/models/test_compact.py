"""Smaller forms of vectors, compared with plain formulas in float64."""

import numpy as np
import pytest
import torch

from pipeline.errors import PipelineError
from pipeline.models.compact import Form, packed, quantized, shortened, smaller_forms, unpacked

ROWS = np.random.default_rng(0).normal(size=(50, 37)) * np.logspace(-6, 0, 37)  # the first numbers are tiny
VECTORS = torch.tensor(ROWS / np.linalg.norm(ROWS, axis=1, keepdims=True), dtype=torch.float32)
NUMBERS = VECTORS.numpy().astype(np.float64)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def test_first_numbers_are_normalised_again():
    for size in (1, 2, 7, 16, 36):
        cut = shortened(VECTORS, size)
        assert (cut.dtype, cut.shape) == (torch.float32, (50, size))
        np.testing.assert_allclose(cut, unit(NUMBERS[:, :size]), rtol=1e-7, atol=1e-45)  # rounded once, to float32
    assert shortened(VECTORS, 37) is VECTORS
    assert shortened(VECTORS.bfloat16(), 8).dtype == torch.bfloat16
    np.testing.assert_allclose(shortened(torch.tensor([[3e-30, 4e-30, 1.0]]), 2), [[0.6, 0.8]], rtol=1e-6)
    for size in (0, -1, 38):
        with pytest.raises(PipelineError, match=f"dimensions={size} must be from 1 to 37, the size of the model"):
            shortened(VECTORS, size)


def test_zero_prefix_stays_zero_with_finite_gradient():
    vectors = torch.tensor([[0.0, 0, 0.6, 0.8], [0.6, 0, 0, 0.8]], requires_grad=True)
    cut = shortened(vectors, 2)
    assert cut.tolist() == [[0, 0], [1, 0]]
    (cut * torch.tensor([1.0, 2.0])).sum().backward()
    assert vectors.grad.isfinite().all()
    assert vectors.grad[1].tolist() == pytest.approx([0, 2 / 0.6, 0, 0])


def test_gradient_is_that_of_normalisation():
    def normalised(vectors: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(vectors[:, :5], dim=1)

    weights = torch.linspace(-1, 1, 5, dtype=torch.float64)
    gradients = []
    for function in (normalised, lambda vectors: shortened(vectors, 5)):
        vectors = VECTORS.double().requires_grad_()
        (function(vectors) * weights).sum().backward()
        gradients.append(vectors.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-12, atol=1e-12)


def test_int8_rounds_to_multiples_of_a_rows_scale():
    scale = np.abs(NUMBERS).max(axis=1, keepdims=True) / 127
    codes = np.rint(NUMBERS / scale)
    stored = packed(VECTORS, "int8")
    assert stored.dtype == np.int8
    np.testing.assert_array_equal(stored, codes)
    assert (np.abs(stored).max(axis=1) == 127).all()
    np.testing.assert_allclose(quantized(VECTORS, "int8"), unit(codes * scale), rtol=1e-7)
    halves = packed(torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]]), "int8")
    assert halves.tolist() == [[127, 0, 2, 2, 0, -2]]


def test_binary_keeps_signs_and_zero_is_positive():
    vectors = torch.cat([VECTORS, torch.zeros(1, 37), -torch.zeros(1, 37)])
    signs = np.where(vectors.numpy() >= 0, 1, -1)
    assert {1, -1} == set(signs.ravel())
    stored = packed(vectors, "binary")
    assert (stored.dtype, stored.shape) == (np.uint8, (52, 5))
    np.testing.assert_array_equal(stored, np.packbits(signs > 0, axis=1))
    np.testing.assert_allclose(quantized(vectors, "binary"), signs / np.sqrt(37), rtol=1e-7)


@pytest.mark.parametrize("kind", ["int8", "binary"])
def test_stored_vectors_are_read_back(kind):
    vectors = torch.cat([VECTORS, torch.zeros(1, 37)])
    form, stored = Form(37, kind), packed(vectors, kind)
    assert torch.equal(unpacked(stored, form), quantized(vectors, kind))
    assert quantized(vectors, kind).isfinite().all()
    assert stored[0].nbytes == form.bytes
    assert torch.equal(form.document(vectors), quantized(vectors, kind))
    assert torch.equal(form.query(vectors), vectors)


def test_a_row_does_not_depend_on_others_or_on_its_layout():
    many = VECTORS.repeat(300, 1)
    for function in (lambda v: shortened(v, 29), lambda v: quantized(v, "int8")):
        once = function(VECTORS)
        assert torch.equal(function(many), once.repeat(300, 1))
        assert torch.equal(torch.cat([function(row[None]) for row in VECTORS]), once)
        assert torch.equal(function(VECTORS.T.contiguous().T), once)


def test_forms_to_score_besides_the_full_vectors():
    def forms(sizes: list[int], kinds: list[str]) -> list[str]:
        return list(map(str, smaller_forms(48, sizes, kinds)))

    assert forms([], []) == forms([48], []) == []
    assert forms([8, 16], []) == ["16 float32", "8 float32"]
    assert forms([], ["binary", "int8"]) == ["48 int8", "48 binary"]
    assert forms([8, 8], ["int8"]) == ["48 int8", "8 float32", "8 int8"]
    with pytest.raises(PipelineError, match="dimensions=49 must be from 1 to 48, the size of the model's vectors"):
        forms([8, 49], [])


def test_bytes_of_a_stored_vector():
    assert [Form(63, kind).bytes for kind in ("float32", "int8", "binary")] == [252, 63, 8]
