"""How programs embed items with a saved model, and the options of `python -m pipeline.evaluate`."""

from typing import Literal

from pydantic import Field, PositiveInt

from pipeline.config.data import Store, Video
from pipeline.config.section import Local, Place


class EvaluatedVideo(Video):
    fps: float | None = Field(
        None,
        gt=0,
        description="frames per second that the model sees instead, at most video.frames; LLaVE's evaluation: 3 and 32",
    )

    @property
    def identity(self) -> tuple[float, ...]:
        """What changes the vectors of videos."""
        return (self.frames,) if self.fps is None else (self.frames, self.fps)


class Encoding(Store):
    """How a saved model embeds items."""

    encoder: Place | None = Field(
        None,
        description="module:function or file.py:function that makes an Encoder (see pipeline/evaluation/encoders.py)",
    )
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="of the weights: bf16, fp32, or auto: as stored"
    )
    chunk_tokens: int | None = Field(
        None, gt=0, description="maximum tokens per forward pass; default: 16384, or 4096 if attention pads"
    )
    max_tokens: int = Field(4096, ge=64, description="longest item, in tokens; texts are cut to fit")
    video: EvaluatedVideo = EvaluatedVideo()
    timeout_minutes: float = Field(
        15, ge=0.01, le=7 * 24 * 60, description="a collective that waits longer ends the job"
    )


class EvaluationRun(Encoding):
    """The options of `python -m pipeline.evaluate`."""

    out: Local | None = Field(None, description="folder of embeddings and report; default: evaluation/MODEL")
    instructions: Literal["text", "system"] = Field(
        "text",
        description="where the instructions of MMEB-V2's image sets stand: in the texts; or those of queries in the "
        "system's turn of a Qwen-VL's prompt, and candidates have none, as Qwen3-VL-Embedding is evaluated",
    )
    against: Local | None = Field(
        None, description="another evaluation's folder, or its report.json, to show beside it"
    )
    part: str | None = Field(
        None,
        pattern=r"^[0-9]+/[1-9][0-9]*$",
        description="i/N: embed part i (0 to N-1) of the datasets; a run without it writes the report",
    )
    dimensions: list[PositiveInt] = Field(
        [], description="sizes to which vectors are cut and scored, too, for models trained at several sizes"
    )
    vectors: list[Literal["int8", "binary"]] = Field(
        [], description="types of candidates' vectors to score besides float32, at full size and at `dimensions`"
    )
    projector: int = Field(
        0,
        ge=0,
        description="write this many queries of each dataset (of captions: in each direction), with one right answer "
        "to each, to OUT/tensorboard for TensorBoard's embedding projector; 0: none",
    )
