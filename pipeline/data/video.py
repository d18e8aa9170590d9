"""Decode some frames of an encoded video."""

import io
from collections.abc import Iterator
from contextlib import contextmanager

import av
import numpy as np
from PIL import Image

from pipeline.data.sample import BadSample

# Limits, so that no video fills a worker's memory or occupies it for hours.
MAX_FRAMES = 108_000  # an hour at 30 frames a second
MAX_FRAME_PIXELS = 7680 * 4320  # 8K
MAX_PIXELS = 2**38  # in all frames: more than an hour of 1080p at 30 frames a second

# The supported containers by suffix, with FFmpeg's demuxer. Without a name FFmpeg would try others, some of which
# (playlists, concatenations) open files and addresses that the data names.
_DEMUXERS = {"mp4": "mp4", "mov": "mov", "webm": "webm", "mkv": "matroska", "avi": "avi"}


def video_format(data: bytes) -> str:
    """Return the suffix of a video from its first bytes: mp4, mov, webm, mkv or avi; "bin" for anything else."""
    if data[4:8] == b"ftyp":
        return "mov" if data[8:12] == b"qt  " else "mp4"
    if data[4:8] in (b"moov", b"mdat", b"wide"):  # QuickTime before it had `ftyp`
        return "mov"
    if data[:4] == b"\x1aE\xdf\xa3":  # EBML, whose header names the type of document
        return "webm" if b"webm" in data[:64] else "mkv" if b"matroska" in data[:64] else "bin"
    return "avi" if data[:4] == b"RIFF" and data[8:12] == b"AVI " else "bin"


def sample_frames(data: bytes, count: int, fps: float | None = None) -> list[Image.Image]:
    """Return `count` RGB frames, evenly spaced from the first to the last as LLaVA-OneVision samples them.

    These are the frames `np.linspace(0, total - 1, count).astype(int)` of the `total` frames that can be decoded, even
    if the container states another number. A video of fewer than `count` frames repeats some.

    fps: return this many frames per second instead, as LLaVE's evaluation does (process_video_with_decord in its
        llava/utils.py): every n-th frame from the first on, where n is the video's mean frame rate / fps, rounded, and
        at least 1. If they are more than `count`, return `count` evenly spaced frames.

    If the video's mean frame rate is known, each frame has its time in seconds as `info["seconds"]`, and the number of
    returned frames per second of video as `info["sampled_fps"]`. Rotated videos are turned upright. Raises BadSample if
    the video is undecodable, has no frames or exceeds the limits above, and for fps if its frame rate is unknown.
    """
    try:
        packets, max_pixels, rate = _survey(data)
        numbers = _chosen(packets, count, rate, fps)
        frames, total = _decode(data, numbers, max_pixels)
        if total != packets:  # some packets have no visible frame, and some decoders merge or split them
            numbers = _chosen(total, count, rate, fps)
            frames, _ = _decode(data, numbers, max_pixels)
        if rate:
            for number, frame in frames.items():
                frame.info |= {"seconds": number / rate, "sampled_fps": len(numbers) / total * rate}
        return [frames[number] for number in numbers]
    except BadSample:
        raise
    except Exception as error:  # FFmpeg raises many types on damaged input
        raise BadSample(f"undecodable video: {type(error).__name__}: {error}") from None


def _chosen(total: int, count: int, rate: float | None, fps: float | None) -> list[int]:
    """Return the numbers of the frames to decode, ascending; see `sample_frames`.  rate: frames per second."""
    if not total:
        raise BadSample("a video without frames")
    if fps is not None:
        if not rate:
            raise BadSample("a video without a frame rate")
        every = range(0, total, max(round(rate / fps), 1))
        if len(every) <= count:
            return list(every)
    return np.linspace(0, total - 1, count).astype(int).tolist()


def _survey(data: bytes) -> tuple[int, int, float | None]:
    """Return, without decoding, the video's packets, the most pixels that a frame may have, and the mean frame rate."""
    packets = 0
    with _open(data) as (container, stream):
        for packets, _ in enumerate(container.demux(stream)):  # the last one flushes the decoder
            if packets > MAX_FRAMES:
                raise BadSample(f"a video of more than {MAX_FRAMES} frames")
        max_pixels = min(MAX_FRAME_PIXELS, MAX_PIXELS // max(packets, 1))
        if stream.width * stream.height > max_pixels:
            raise BadSample(f"a video of {packets} frames of {stream.width}x{stream.height} pixels is too large")
        rate = stream.average_rate
    return packets, max_pixels, None if rate is None else float(rate)


def _decode(data: bytes, numbers: list[int], max_pixels: int) -> tuple[dict[int, Image.Image], int]:
    """Decode the frames with these numbers. Returns (number -> frame, the number of all frames)."""
    wanted, total = set(numbers), 0
    frames: dict[int, Image.Image] = {}
    with _open(data) as (container, stream):
        stream.codec_context.options = {"max_pixels": str(max_pixels)}  # the size may change between frames
        stream.codec_context.thread_count = 1  # the workers are processes already
        for total, frame in enumerate(container.decode(stream), start=1):
            if total - 1 in wanted:
                quarter_turns = round(frame.rotation / 90)
                frames[total - 1] = frame.to_image().rotate(90 * quarter_turns, expand=True)
    return frames, total


@contextmanager
def _open(data: bytes) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    suffix = video_format(data)
    if suffix not in _DEMUXERS:
        raise BadSample(f"not a video in one of the formats {', '.join(_DEMUXERS)}")
    # Titles and other metadata may have any encoding.
    with av.open(io.BytesIO(data), "r", format=_DEMUXERS[suffix], metadata_errors="ignore") as container:
        stream = container.streams.best("video")
        if not isinstance(stream, av.VideoStream) or stream.codec_context is None:
            raise BadSample(f"{suffix} file without a video stream that can be decoded")
        yield container, stream
