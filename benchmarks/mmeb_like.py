"""MMEB-like training pairs, and their use as in LLaVE's code, for the benchmarks of a training step.

MMEB-train, with at most 50,000 pairs per dataset, has 662,000. By the sizes in arXiv 2410.05160, in thousands:

    image -> text   403   ImageNet-1K 50, N24News 49, SUN397 20, VOC2007 8, HatefulMemes 8; Visual7W 50, DocVQA 40,
                          ChartQA 28, InfographicsVQA 24, A-OKVQA 17, OK-VQA 9; VisualNews 50, MSCOCO 50
    text -> image   167   VisDial 50, VisualNews 50, MSCOCO 50; WebQA 17, with an additional text for the image
    image -> image   92   MSCOCO's grounding 50, CIRR 26, NIGHTS 16

The paper gives no lengths: the shapes of images, and 10 to 60 text tokens in addition to the prompt, are our choice.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LlavaOnevisionConfig, Qwen2Model
from transformers.image_processing_utils import select_best_resolution

from pipeline.data.batch import Batch, Encoded, Image, Origin
from pipeline.models.llave.checks import tiling

PAIR_KINDS = {(True, False): 0.61, (False, True): 0.25, (True, True): 0.14}  # (query, target) with an image: fraction
PROMPT, BEFORE_IMAGE, SHORTEST_TEXT, LONGEST_TEXT = 22, 14, 10, 60  # tokens
# (height, width) of photographs, thumbnails, charts, pages, infographics
SHAPES = (
    *((480, 640), (640, 480), (427, 640), (375, 500), (500, 375), (500, 500), (768, 1024)),
    *((224, 224), (300, 400), (600, 850), (2200, 1700), (2000, 800), (400, 1000)),
)
LLAVE_TILE = 384  # pixels; images of these shapes then have 1,485 to 3,699 tokens
MICRO_BATCH = 4  # pairs


def draw(config: LlavaOnevisionConfig, pairs: int, words: np.ndarray, fewer: int = 1) -> Batch:
    """Return a global batch of distinct items for a model of this config; the same in each call.

    words: the token ids in texts. fewer: the divisor of the texts' numbers of tokens. The number of image tokens
    follows from the model's patches per tile; images are scaled with the tile, relative to LLaVE's.
    """
    rng, cutting, tile = np.random.default_rng(0), tiling(config), config.vision_config.image_size

    def item(with_image: bool) -> Encoded:
        text = rng.choice(words, round((PROMPT + rng.integers(SHORTEST_TEXT, LONGEST_TEXT + 1)) / fewer))
        if not with_image:
            return Encoded(text.astype(np.int32))
        height, width = (side * tile // LLAVE_TILE for side in SHAPES[rng.integers(len(SHAPES))])
        tokens = cutting.tokens(height, width, anyres=True)
        grid = select_best_resolution((height, width), cutting.pinpoints)
        tiles = rng.integers(0, 256, (1 + math.prod(grid) // tile**2, 3, tile, tile), dtype=np.uint8)
        before, after = np.split(text, [round(BEFORE_IMAGE / fewer)])
        ids = np.concatenate([before, np.full(tokens, config.image_token_id), after])
        return Encoded(ids.astype(np.int32), (Image(tiles, height, width),))

    return drawn(pairs, rng, item)


def drawn(pairs: int, rng: np.random.Generator, item: Callable[[bool], Encoded]) -> Batch:
    """Return a global batch of distinct items.  item: makes one, with an image or without."""
    kinds = rng.choice(len(PAIR_KINDS), pairs, p=list(PAIR_KINDS.values()))
    items = dict(enumerate(item(with_image) for kind in kinds for with_image in list(PAIR_KINDS)[kind]))
    query, target = (list(range(side, 2 * pairs, 2)) for side in range(2))
    return Batch(
        items,
        query,
        target,
        negatives=[()] * pairs,
        valid=[True] * pairs,
        origins=[Origin("drawn", pair) for pair in range(pairs)],
        bad=[],
        received=0,
        positives=[()] * pairs,
        weights=[(1.0,)] * pairs,
        scores=[None] * pairs,
        tasks=[""] * pairs,
    )


def tokens_of(items: Iterable[Encoded]) -> int:
    return sum(len(item.input_ids) for item in items)


def tiles_of(items: Iterable[Encoded]) -> int:
    return sum(len(image.tiles) for item in items for image in item.images)


def micro_batches(batch: Batch) -> list[tuple[list[Encoded], list[Encoded]]]:
    """Return queries and targets in groups of four pairs; at most one group mixes queries with and without image."""
    pairs = [(batch.items[q], batch.items[t]) for q, t in zip(batch.query, batch.target, strict=True)]
    pairs.sort(key=lambda pair: not pair[0].images)
    parts = [pairs[start : start + MICRO_BATCH] for start in range(0, len(pairs), MICRO_BATCH)]
    return [([query for query, _ in part], [target for _, target in part]) for part in parts]


def embed_padded(model: Qwen2Model, rows: Sequence[Tensor]) -> Tensor:
    """Embed N items, (T, hidden) token embeddings each, right-padded to the longest, as (N, hidden) float32 unit rows.

    model: transformers' model with causal attention: no token attends to the padding after it, so it needs no mask.
    """
    hidden = model(inputs_embeds=pad_sequence(rows, batch_first=True), use_cache=False).last_hidden_state
    last = torch.tensor([len(row) - 1 for row in rows], device=hidden.device)
    return F.normalize(hidden[torch.arange(len(rows), device=hidden.device), last].float(), dim=-1)
