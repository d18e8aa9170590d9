"""Estimate the device memory of the loss from its shapes."""

from pipeline.models.memory import FP32
from pipeline.objectives.contrastive.config import ContrastiveSection
from pipeline.objectives.contrastive.loss import CACHED_BYTES, TILE


def loss_bytes(
    objective: ContrastiveSection, dimension: int, global_batch: int, gpus: int, *, negatives: int = 0, teacher: int = 0
) -> int:
    """Return the loss's peak memory in bytes on each of `gpus` devices, in float32, besides the items' embeddings.

    negatives: explicit ones of each pair.  teacher: the width of its vectors; 0 without a teacher.

    Sizes below are in numbers, not bytes. Vectors of this device's n pairs are `rows`, those of all are `columns`. Each
    tile of the matrix of rows and columns is in use at all of objective.dimensions at once.
    """
    n, columns = global_batch // gpus, global_batch * (1 + negatives)
    own, sizes = (2 + negatives) * n, max(len(objective.dimensions), 1)
    cuts = [size for size in objective.dimensions if size < dimension]
    # Columns: gathered, and in one tensor. Rows: without invalid ones, and as a factor of the logits. Cuts are computed
    # in float64, and autograd keeps those, too.
    gradients = (columns + n) * (dimension + sum(cuts))
    vectors = (2 * columns + 2 * n + own) * dimension + (3 * columns + 4 * n) * sum(cuts)
    vectors += (2 * columns + n + own) * teacher

    both = objective.directions == "both"
    distills = objective.distill is not None and objective.distill.scores == "teacher"
    margin = objective.margin is not None or bool(objective.margins)
    of_targets = both and (margin or bool(objective.temperatures))  # the targets' logits are not the queries'
    learned = both and bool(objective.temperatures) and objective.learn_temperature
    tile = sizes * (columns * (1 + distills) + global_batch * (of_targets + learned))  # of one row
    # What is in memory only while a tile is computed: masks, similarities of teacher and policy, distributions.
    work = columns * (objective.mask_duplicates * 3 / 4 + bool(teacher) + margin)
    work += columns * ((objective.reward == "teacher") + 2.25 * distills)
    height = min(TILE, n)
    cached = min(CACHED_BYTES // (FP32 * height * tile) * height, n) * tile

    # Tiles that are not cached: the one before is still there. They are computed again after the cached ones are gone.
    others = height * 2 * tile if cached < n * tile else 0
    sums = vectors + cached + others + height * max(work, columns * (1 + bool(teacher)))
    slopes = vectors + gradients + max(cached, others + height * work) + height * global_batch * both
    backward = own * dimension + gradients + 2 * (columns + n) * sum(cuts)
    backward += 2 * columns * dimension + 5 * columns * max(cuts, default=0)
    return int(FP32 * max(sums, slopes, backward))
