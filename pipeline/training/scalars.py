"""What TensorBoard shows of a run: each scalar's group and meaning, and the charts of the custom-scalars page."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from pipeline.evaluation.report import is_rank

_NOT_SHOWN = ("step", "samples", "valid")


@dataclass(frozen=True)
class Scalar:
    """A scalar.  tag: its name in TensorBoard.  text: what it says.  percent: shown times 100."""

    tag: str
    text: str
    percent: bool = False

    def of(self, part: str) -> "Scalar":
        """Return that of a part, such as a dataset or a phase."""
        return Scalar(f"{self.tag}/{part}", f"{self.text} Here: {part}.", self.percent)


def _scalars(group: str, *rows: tuple[str, str, str]) -> dict[str, Scalar]:
    """rows: the name in metrics.jsonl or speed.jsonl; the tag, with % if it is a share; the text."""
    return {name: Scalar(f"{group}/{tag.rstrip('%')}", text, tag.endswith("%")) for name, tag, text in rows}


SCALARS = {
    **_scalars(
        "learning",
        ("loss", "loss", "The loss of the global batch."),
        (
            "precision",
            "precision_at_1%",
            "Queries that are more similar to their target than to any negative of the batch, in percent. "
            "It should rise. A larger batch makes it harder.",
        ),
        ("positive_similarity", "similarity_positive", "Mean similarity of queries to their targets."),
        (
            "hardest_negative_similarity",
            "similarity_hardest_negative",
            "Mean over queries of the similarity to their most similar negative. It should stay below the positive.",
        ),
        ("negative_similarity", "similarity_mean_negative", "Mean over queries of the mean similarity to negatives."),
        (
            "overlap",
            "overlap%",
            "The common area of the distributions of positive and hardest-negative similarities, in percent: 0 if they "
            "are disjoint, 100 if they are equal. It should fall.",
        ),
        (
            "effective_negatives",
            "effective_negatives",
            "1 / sum of squared weights: on how many negatives a query's loss depends. 1: a single one has all weight.",
        ),
        (
            "hardest_percent_weight",
            "hardest_percent_weight%",
            "Share of the weight that the hardest 1 % of a query's negatives have, in percent.",
        ),
        (
            "masked_pairs",
            "masked_pairs%",
            "Pairs that are no negatives, because they share content or exceed the margin, in percent.",
        ),
        ("temperature", "temperature", "The learned temperature."),
        ("alpha", "alpha", "The hardness weight of this step."),
        (
            "grad_norm",
            "grad_norm",
            "The gradient's norm before clipping. Single peaks are clipped; a steady rise comes before a divergence.",
        ),
        ("lr", "lr", "The learning rate."),
        ("accuracy", "accuracy%", "Masked tokens predicted correctly, in percent."),
        ("masked_tokens", "masked_tokens", "Masked tokens of the global batch."),
    ),
    **_scalars(
        "data",
        ("epoch", "epoch", "The number of the epoch, from 0."),
        ("share", "share%", "The dataset's share of the batch, in percent."),
        ("bad_samples", "bad_samples", "Samples so far that could not be used: bad_samples.jsonl names them."),
        ("read_mb_per_second", "read_mb_per_second", "10^6 bytes read per second, by all ranks."),
        ("read_retries", "read_retries", "Requests to S3 that were repeated, by all ranks."),
    ),
    **_scalars(
        "speed",
        ("seconds", "step_seconds", "Seconds of the step, with its wait for data and its metrics."),
        ("waiting_for_data", "waiting_for_data", "The longest wait of a rank for its data, in seconds. Near zero."),
        ("samples_per_second", "samples_per_second", "Pairs per second, over all ranks."),
        ("tokens_per_second", "tokens_per_second", "Tokens per second, over all ranks, without padding."),
        ("padding", "padding%", "Padding among the tokens of all chunks, in percent; 0 if attention packs items."),
        ("heaviest_rank", "heaviest_rank", "The largest rank's tokens, divided by the mean."),
        (
            "slowest_rank",
            "slowest_rank",
            "The rank that takes longest until it waits for others. Constant: look at it.",
        ),
        ("slowest_rank_seconds", "slowest_rank_seconds", "By how much that rank is slower than the mean."),
        ("tflops_per_device", "tflops_per_device", "TFLOP/s that the model needs, per device."),
        ("mfu", "mfu%", "Model FLOPs utilisation, in percent. The first pass of the gradient cache is not counted."),
        ("seconds/", "seconds", "Seconds of a phase, mean over ranks."),
    ),
    **_scalars(
        "memory",
        ("peak_memory_gb", "peak_gb", "The largest rank's peak, in 10^9 bytes."),
        ("peak_memory", "peak%", "The largest rank's peak, in percent of its device."),
        ("chunk_tokens", "chunk_tokens", "Tokens of a chunk at most."),
        ("kept_chunks", "kept_chunks", "Chunks whose graphs are cached."),
    ),
}


@cache  # of a few dozen names, in every step
def scalar_of(name: str, group: str) -> Scalar | None:
    """Return how a value of metrics.jsonl or speed.jsonl is shown; None if it is not.

    group: that of a name which is not listed, as another objective's may be.
    """
    base, _, part = name.partition("/")
    if name in _NOT_SHOWN:
        return None
    if name in SCALARS:
        return SCALARS[name]
    if known := SCALARS.get(f"{base}/") or SCALARS.get(base):
        return known.of(part)
    return Scalar(f"{group}/{name}", "")


def evaluation_scalar(tag: str, metric: str = "") -> Scalar:
    """Return that of an evaluation's score.  metric: its name, which may be a rank."""
    text = "By the evaluation sets, with this step's weights"
    return Scalar(tag, f"{text}: a rank from 1." if is_rank(metric) else f"{text}, in percent.", not is_rank(metric))


# Page -> chart -> the tags in it.
CHARTS = {
    "learning": {
        "loss": r"learning/loss(/.+)?",
        "in-batch Precision@1 (%)": r"learning/precision_at_1",
        "in-batch Precision@1 by dataset (%)": r"learning/precision_at_1/.+",
        "similarities": r"learning/similarity_.+",
        "overlap of positives and hardest negatives (%)": r"learning/overlap",
        "effective number of negatives": r"learning/effective_negatives",
        "weight on the hardest 1 % (%)": r"learning/hardest_percent_weight",
        "masked pairs (%)": r"learning/masked_pairs(/.+)?",
        "accuracy (%)": r"learning/accuracy",
        "temperature": r"learning/temperature(/.+)?",
        "gradient norm": r"learning/grad_norm(/.+)?",
        "learning rate": r"learning/lr(/.+)?",
    },
    "speed": {
        "samples/s": r"speed/samples_per_second",
        "tokens/s": r"speed/tokens_per_second",
        "MFU (%)": r"speed/mfu",
        "seconds of a step": r"speed/(step_seconds|waiting_for_data|slowest_rank_seconds)",
        "seconds by phase": r"speed/seconds/.+",
        "padding (%)": r"speed/padding",
    },
    "data": {
        "share of each dataset (%)": r"data/share/.+",
        "MB/s": r"data/read_mb_per_second",
        "repeated requests": r"data/read_retries",
        "bad samples": r"data/bad_samples",
    },
    "memory": {"peak (%)": r"memory/peak", "chunks": r"memory/(chunk_tokens|kept_chunks)"},
    "evaluation": {"averages (%)": r"evaluation/[^@]+", "averages of shorter vectors (%)": r"evaluation/.+@.+"},
}


def charts(tags: Iterable[str]) -> dict[str, dict[str, list]]:
    """Return the layout of the charts that have a tag, as `SummaryWriter.add_custom_scalars` takes it."""
    tags = list(tags)
    found = {
        page: {
            title: ["Multiline", [f"^{pattern}$"]]
            for title, pattern in of_page.items()
            if any(re.fullmatch(pattern, tag) for tag in tags)
        }
        for page, of_page in CHARTS.items()
    }
    return {page: of_page for page, of_page in found.items() if of_page}
