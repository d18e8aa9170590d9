"""Sampled frames equal those found by decoding and counting; invalid videos are refused and open no other file."""

import contextlib
import io
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from pipeline.data import video
from pipeline.data.sample import BadSample
from pipeline.data.video import sample_frames, video_format

BARS = 8  # per frame: its number in binary, white is 1


def pixels(number: int, width: int = 128, height: int = 32) -> np.ndarray:
    bits = np.array([255 * (number >> bar & 1) for bar in range(BARS)], np.uint8)
    return np.broadcast_to(bits.repeat(width // BARS)[None, :, None], (height, width, 3)).copy()


def number(frame: Image.Image) -> int:
    assert frame.mode == "RGB"
    bars = np.asarray(frame.convert("L")).reshape(frame.height, BARS, -1).mean(axis=(0, 2))
    return sum(int(bar > 128) << place for place, bar in enumerate(bars))


def encoded(
    container: str,
    codec: str,
    frames: int = 40,
    *,
    rate: int | Fraction = 25,
    start: int = 0,
    muxer: dict[str, str] | None = None,
    **options: str,
) -> bytes:
    """Return a video of numbered frames. The first frame is shown at time `start` / `rate`."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container, container_options=muxer) as file:
        stream = file.add_stream(codec, rate=rate, options=options, width=128, height=32, pix_fmt="yuv420p")
        for count in range(frames):
            frame = av.VideoFrame.from_ndarray(pixels(count))
            frame.pts = start + count
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return buffer.getvalue()


MP4 = encoded("mp4", "libx264")
VIDEOS = {
    "mp4": MP4,
    "mp4 of mpeg4": encoded("mp4", "mpeg4"),
    "mp4 in fragments": encoded("mp4", "libx264", muxer={"movflags": "frag_keyframe+empty_moov"}),
    "mov": encoded("mov", "libx264"),
    "webm of vp8": encoded("webm", "libvpx"),
    "webm of vp9": encoded("webm", "libvpx-vp9"),
    "mkv": encoded("matroska", "libx264"),
    "avi": encoded("avi", "mpeg4"),
}


@pytest.mark.parametrize("name", VIDEOS)
def test_sampled_frames_are_evenly_spaced(name):
    with av.open(io.BytesIO(VIDEOS[name])) as container:
        decoded = [frame.to_image() for frame in container.decode(video=0)]
    for count in (1, 2, 7, 8, len(decoded)):
        expected = np.linspace(0, len(decoded) - 1, count).astype(int).tolist()
        frames = sample_frames(VIDEOS[name], count)
        assert [number(frame) for frame in frames] == expected
        for frame, place in zip(frames, expected, strict=True):
            assert np.array_equal(np.asarray(frame), np.asarray(decoded[place]))


@pytest.mark.parametrize(
    ("frames", "rate", "fps", "count", "expected"),
    [
        (40, 25, 3, 32, [0, 8, 16, 24, 32]),
        (40, 25, 3, 5, [0, 8, 16, 24, 32]),
        (40, 25, 3, 4, [0, 13, 26, 39]),  # too many frames: as without fps
        (40, Fraction(30000, 1001), 3, 32, [0, 10, 20, 30]),
        (9, Fraction(15, 2), 3, 32, [0, 2, 4, 6, 8]),  # 2.5 is rounded to even
        (9, Fraction(21, 2), 3, 32, [0, 4, 8]),  # 3.5
        (40, 3, 3, 32, np.linspace(0, 39, 32, dtype=int).tolist()),
        (5, 1, 3, 32, [0, 1, 2, 3, 4]),  # never less than every frame, and none twice
        (40, 25, 0.1, 32, [0]),
    ],
)
def test_frames_per_second_follow_published_formula(frames, rate, fps, count, expected):
    """n = round(frame rate / fps); frames 0, n, 2n, ...; if they exceed the limit, as many evenly spaced ones."""
    data = encoded("mp4", "libx264", frames, rate=rate)
    assert [number(frame) for frame in sample_frames(data, count, fps)] == expected


@pytest.mark.parametrize("name", VIDEOS)
def test_frame_rate_is_read_from_every_container(name):
    assert [number(frame) for frame in sample_frames(VIDEOS[name], 32, 3)] == [0, 8, 16, 24, 32]


def test_video_without_frame_rate_is_bad_sample_only_for_fps(monkeypatch):
    survey = video._survey
    monkeypatch.setattr(video, "_survey", lambda data: (*survey(data)[:2], None))
    assert len(sample_frames(MP4, 2)) == 2
    with pytest.raises(BadSample, match="a video without a frame rate"):
        sample_frames(MP4, 2, 3)


def test_frames_before_edit_list_are_skipped():
    data = encoded("mp4", "mpeg4", start=-10, muxer={"avoid_negative_ts": "disabled"})
    with av.open(io.BytesIO(data)) as container:
        packets = sum(packet.size > 0 for packet in container.demux(video=0))
    assert packets == 40
    assert [number(frame) for frame in sample_frames(data, 4)] == [10, 19, 29, 39]


def test_wrong_frame_count_in_container_is_ignored():
    avi = bytearray(VIDEOS["avi"])
    header = avi.index(b"avih") + 8
    avi[header + 16 : header + 20] = struct.pack("<I", 7)
    length = avi.index(b"strh") + 8 + 32
    avi[length : length + 4] = struct.pack("<I", 7)
    with av.open(io.BytesIO(avi)) as container:
        assert container.streams.video[0].frames == 7
    assert [number(frame) for frame in sample_frames(bytes(avi), 3)] == [0, 19, 39]


def test_short_video_repeats_frames():
    assert [number(frame) for frame in sample_frames(encoded("mp4", "libx264", 3), 8)] == [0, 0, 0, 0, 1, 1, 1, 2]


def test_rotated_video_is_turned_upright():
    data = bytearray(MP4)
    matrix = data.index(b"tkhd") + 44
    data[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)  # by 90 degrees
    upright = sample_frames(bytes(data), 2)[1]
    assert upright.size == (32, 128)
    assert number(upright.transpose(Image.Transpose.ROTATE_90)) == 39


def test_non_utf8_metadata_is_accepted():
    data = encoded("avi", "mpeg4", 2)
    title = b"LIST" + struct.pack("<I", 16) + b"INFOINAM" + struct.pack("<I", 4) + b"caf\xe9"
    start = data.index(b"LIST", data.index(b"LIST") + 4)
    assert len(sample_frames(data[:start] + title + data[start:], 2)) == 2


@pytest.mark.parametrize(
    ("data", "suffix"),
    [
        (MP4, "mp4"),
        (VIDEOS["mp4 in fragments"], "mp4"),
        (VIDEOS["mov"], "mov"),
        (b"\0\0\0\x08wide\0\0\1\0mdat", "mov"),
        (VIDEOS["webm of vp8"], "webm"),
        (VIDEOS["webm of vp9"], "webm"),
        (VIDEOS["mkv"], "mkv"),
        (VIDEOS["avi"], "avi"),
        (b"", "bin"),
        (b"RIFF\0\0\0\0WAVE", "bin"),
        (b"\x1aE\xdf\xa3 of another type", "bin"),
        (b"#EXTM3U\n", "bin"),
    ],
)
def test_video_format_is_detected_from_content(data, suffix):
    assert video_format(data) == suffix


def audio() -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as file:
        stream = file.add_stream("aac", rate=44100, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not a video in one of the formats mp4, mov, webm, mkv, avi"),
        (b"\0\0\0\x18ftypisom" + bytes(range(256)), "undecodable video"),
        (MP4[: len(MP4) // 2], "undecodable video"),
        (VIDEOS["mp4 in fragments"][:-600], "undecodable video"),
        (VIDEOS["mkv"].replace(b"V_MPEG4/ISO/AVC", b"V_UNKNOWN/CODEC"), "mkv file without a video stream"),
        (audio(), "mp4 file without a video stream"),
        (VIDEOS["mp4 in fragments"][: VIDEOS["mp4 in fragments"].index(b"moof") - 4], "a video without frames"),
    ],
)
def test_broken_videos_are_bad_samples(data, reason):
    with pytest.raises(BadSample, match=reason):
        sample_frames(data, 8)


def test_damaged_videos_decode_or_raise_bad_sample():
    rng = np.random.default_rng(0)
    for data in (MP4, VIDEOS["webm of vp8"], VIDEOS["avi"]):
        for _ in range(30):
            damaged = bytearray(data)
            for place in rng.integers(0, len(data), 5):
                damaged[place] = rng.integers(256)
            with contextlib.suppress(BadSample):
                assert len(sample_frames(bytes(damaged), 4)) == 4


@pytest.mark.parametrize("disguise", [b"", b"\0\0\0\x08ftyp"])
def test_playlist_opens_no_other_file(tmp_path, disguise):
    (tmp_path / "secret.mp4").write_bytes(MP4)
    concat = f"ffconcat version 1.0\nfile '{tmp_path}/secret.mp4'\n".encode()
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:1,\n{tmp_path}/secret.mp4\n#EXT-X-ENDLIST\n".encode()
    with av.open(io.BytesIO(concat), options={"safe": "0"}) as container:
        assert container.streams.video[0].width == 128  # FFmpeg opens it with safety checks off
    for data in (concat, playlist):
        with pytest.raises(BadSample):
            sample_frames(disguise + data, 8)


def test_video_with_too_many_frames_is_refused(monkeypatch):
    monkeypatch.setattr(video, "MAX_FRAMES", 40)
    assert len(sample_frames(MP4, 2)) == 2
    monkeypatch.setattr(video, "MAX_FRAMES", 39)
    with pytest.raises(BadSample, match="more than 39 frames"):
        sample_frames(MP4, 2)


@pytest.mark.parametrize(("limit", "needed"), [("MAX_FRAME_PIXELS", 128 * 32), ("MAX_PIXELS", 40 * 128 * 32)])
def test_video_with_too_many_pixels_is_refused(monkeypatch, limit, needed):
    monkeypatch.setattr(video, limit, needed)
    assert len(sample_frames(MP4, 2)) == 2
    monkeypatch.setattr(video, limit, needed - 1)
    with pytest.raises(BadSample, match="40 frames of 128x32 pixels is too large"):
        sample_frames(MP4, 2)


def test_frame_growing_past_pixel_limit_is_refused(monkeypatch):
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as file:
        stream = file.add_stream("mjpeg", rate=25, width=128, height=32, pix_fmt="yuvj420p")
        for time, scale in enumerate((1, 1, 10, 1)):
            jpeg = io.BytesIO()
            Image.fromarray(pixels(time, 128 * scale, 32 * scale)).save(jpeg, "JPEG")
            packet = av.Packet(jpeg.getvalue())
            packet.stream, packet.time_base, packet.pts, packet.dts = stream, Fraction(1, 25), time, time
            file.mux(packet)
    assert [number(frame) for frame in sample_frames(buffer.getvalue(), 4)] == [0, 1, 2, 3]
    monkeypatch.setattr(video, "MAX_FRAME_PIXELS", 100 * 128 * 32 - 1)
    with pytest.raises(BadSample, match="undecodable video"):
        sample_frames(buffer.getvalue(), 4)
