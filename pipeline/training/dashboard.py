"""Writes a run's TensorBoard: scalars with descriptions, charts, histograms, texts and hyperparameters."""

import io
import json
import logging
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from pipeline.config import Recipe
from pipeline.errors import disk_errors
from pipeline.training.scalars import Scalar, charts
from pipeline.training.trackers import Trackers

_HISTOGRAMS_EVERY = 10  # steps; one takes as much room as a hundred scalars
# Of a recipe, what can make one run better than another.
_COMPARED: dict[str, Any] = dict.fromkeys(
    ("seed", "steps", "epochs", "precision", "deepspeed", "objective", "optimizer"), True
)
_COMPARED |= {
    "model": {"family", "path", "train"},
    "batch": {"global_batch", "sub_batch"},
    "data": {"datasets", "cap", "hard_negatives", "batches", "teacher", "negatives"},
}
_FINAL = ("learning/loss", "learning/precision_at_1", "learning/overlap", "speed/samples_per_second", "speed/mfu")

logger = logging.getLogger(__name__)


class Dashboard:
    """RUN/tensorboard, of one start of a run from step `start`. Later steps of an earlier start are purged.

    It is one run of TensorBoard, and one row of its table of hyperparameters, however often it is resumed.
    """

    def __init__(self, run: Path, start: int) -> None:
        self._folder = run / "tensorboard"
        self._shown: set[str] = set()
        self._charts: dict[str, Any] = {}
        self._trackers: Trackers | None = None
        self._excepthook = threading.excepthook
        threading.excepthook = self._thread_ended
        with disk_errors(self._folder):
            self._board = SummaryWriter(str(self._folder), purge_step=start + 1, flush_secs=10)

    def track(self, trackers: Trackers) -> None:
        """Give the trackers all scalars from now on."""
        self._trackers = trackers

    def _thread_ended(self, ended: threading.ExceptHookArgs) -> None:
        """Say in a line that the writer's thread met a full disk. The next value raises the error in the run itself."""
        if type(ended.thread).__name__ == "_AsyncWriterThread" and isinstance(ended.exc_value, OSError):
            logger.warning("%s cannot be written: %s", self._folder, ended.exc_value.strerror)
        else:
            self._excepthook(ended)

    def end_trackers(self, *, failed: bool) -> None:
        """Wait for the trackers, after what is written so far is on disk: a launcher may end the process meanwhile."""
        if self._trackers:
            with suppress(OSError):  # the run has raised it, or `close` does
                self._board.flush()
            self._trackers.end(failed)

    def close(self) -> None:
        self._board.close()
        threading.excepthook = self._excepthook

    def scalars(self, values: Iterable[tuple[Scalar, float]], step: int) -> None:
        """Write values, all in one event. The first of each tag carries its description."""
        summary, all_shown, before = Summary(), {}, len(self._shown)
        for scalar, value in values:
            metadata = None
            if scalar.tag not in self._shown:
                self._shown.add(scalar.tag)
                plugin = SummaryMetadata.PluginData(plugin_name="scalars")
                metadata = SummaryMetadata(summary_description=scalar.text, plugin_data=plugin)
            shown = 100 * value if scalar.percent else value
            all_shown[scalar.tag] = shown
            summary.value.add(tag=scalar.tag, simple_value=shown, metadata=metadata)
        with disk_errors(self._folder):
            self._add(summary, step)
            if len(self._shown) > before and (found := charts(self._shown)) != self._charts:
                self._charts = found
                self._board.add_custom_scalars(found)  # TensorBoard shows the last layout
        if self._trackers:
            self._trackers.log(all_shown, step)

    def histograms(self, values: Mapping[str, np.ndarray], step: int) -> None:
        """Write distributions by name, in every tenth step."""
        for name, each in values.items() if step % _HISTOGRAMS_EVERY == 1 else ():
            if len(finite := each[np.isfinite(each)]):
                with disk_errors(self._folder):
                    self._board.add_histogram(f"similarity/{name}", finite, step)

    def text(self, tag: str, markdown: str, step: int) -> None:
        with disk_errors(self._folder):
            self._board.add_text(tag, markdown, step)

    def picture(self, tag: str, pixels: np.ndarray, step: int) -> None:
        """pixels: (height, width, 3) uint8."""
        # TensorBoard computes checksums in Python, byte by byte, and the training thread waits for the lock: as a JPEG
        # it is smaller than as the PNG of `add_image`.
        encoded = io.BytesIO()
        PIL.Image.fromarray(pixels).save(encoded, "JPEG", quality=90)
        height, width, channels = pixels.shape
        image = Summary.Image(height=height, width=width, colorspace=channels, encoded_image_string=encoded.getvalue())
        with disk_errors(self._folder):
            self._add(Summary(value=[Summary.Value(tag=tag, image=image)]), step)

    def hyperparameters(self, recipe: Recipe, processes: int) -> None:
        """Add the run to the table of hyperparameters, with the last values of the scalars shown so far.

        TensorBoard keeps what a run's first start wrote.
        """
        shown = self._shown
        metrics = [tag for tag in _FINAL if tag in shown] + sorted(
            tag for tag in shown if tag.startswith("evaluation/")
        )
        experiment, session, _ = hparams(compared(recipe, processes), dict.fromkeys(metrics, 0))
        with disk_errors(self._folder):
            self._add(experiment, 0)
            self._add(session, 0)

    def finished(self) -> None:
        """Mark the run in the table as successful."""
        with disk_errors(self._folder):
            self._add(hparams({}, {})[2], 0)

    def _add(self, summary: Summary, step: int) -> None:
        self._board._get_file_writer().add_summary(summary, step)


def compared(recipe: Recipe, processes: int) -> dict[str, float | str | bool]:
    """Return the hyperparameters of a run by dotted name."""
    return {"processes": processes} | flat(recipe.model_dump(mode="json", include=_COMPARED))


def flat(values: Mapping[str, Any], above: str = "") -> dict[str, float | str | bool]:
    """Return all values that are set, by dotted name; lists as JSON."""
    found: dict[str, float | str | bool] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, f"{above}{name}.")
        elif isinstance(value, list):
            found |= {above + name: json.dumps(value)} if value else {}
        elif value is not None:
            found[above + name] = value
    return found
