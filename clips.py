"""Clips: frames of one size at a stated rate, from picture files, out of a film, or drawn.

    Clip(("f/0001.jpg", "f/0002.jpg"), fps=1.0, count=2)     all of them are shown, `fps` a second; none is left out
    Clip(Film("a.mp4", 2.0, 9.0), fps=1.0, count=7)          the frames at 2.0, 3.0 ... 8.0 seconds

Time is in seconds from the clip's first frame. Of a film it is told by the frames' own time stamps, so that a variable
rate is as right as a constant one: at each stamp start + i / fps before `end` stands the frame that a player would show
there. (qwen-vl-utils takes others: as many as fps asks for, an even number, spread from the first frame to the last.)

Films are decoded by PyAV, which is optional: pip install "medloc-grpo[video]". Without torch and without PIL's formats:
a worker that reads pictures starts quickly. Left out: sound, deinterlacing; pixels are taken as square.
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from errors import InputError, cause_of, one_line

MOST_FRAMES = 768  # of a clip: what Qwen's own reader takes at most
MOST_PIXELS = 89_478_485  # of a film's frame: as of a picture
# What is opened, whatever a file's name says. Playlists are not: they would have FFmpeg open what they name.
CONTAINERS = "mov,matroska,avi,mpegts,mpeg"  # mov: mp4 too; matroska: webm too
CLOSE = 1e-3  # seconds; Matroska rounds its time stamps to as many


@dataclass(frozen=True)
class Film:
    """A part of a video file, in seconds of the file's own time."""

    path: Path
    start: float
    end: float


@dataclass(frozen=True)
class Clip:
    """Stands where a picture's path would."""

    frames: tuple[Path, ...] | Film | Any  # else an images.PhantomImage, which is drawn
    fps: float  # of these frames, not of the film
    count: int

    @property
    def seconds(self) -> float:
        """How long it lasts: each frame stands for 1 / fps."""
        return self.count / self.fps

    @property
    def field(self) -> str:
        """The record's, for messages."""
        return "video" if isinstance(self.frames, Film) else "frames"


def frames_between(start: float, end: float, fps: float) -> int:
    """How many stamps start + i / fps are before end; at least one."""
    return max(1, math.ceil((end - start - CLOSE) * fps))


@contextmanager
def opened(path: Path) -> Iterator[tuple[Any, Any, Any]]:
    """(container, its first stream of pictures, its first frame); whatever FFmpeg says inside becomes one sentence."""
    try:
        import av
    except ImportError as error:
        how = 'pip install "medloc-grpo[video]", or give its frames as pictures'
        raise InputError(f"video {one_line(path)} needs PyAV, which is not installed: {how}") from error
    if not os.path.isfile(path):  # FFmpeg would wait at a pipe
        raise InputError(f"video {one_line(path)} is not a file; name a video")
    try:
        only = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
        with av.open(f"file:{path}", options=only) as container:
            if not container.streams.video:
                raise InputError(
                    f"video {one_line(path)} has no pictures, only sound or text, or is cut off; name a video"
                )
            stream = container.streams.video[0]
            if stream.codec_context is None:  # and without it no width
                raise InputError(f"video {one_line(path)} is of a kind unknown here, or cut off; write it anew as mp4")
            if stream.width * stream.height > MOST_PIXELS:
                raise InputError(f"video {one_line(path)} has frames of more than {MOST_PIXELS} pixels; scale it down")
            first = next(container.decode(stream), None)
            if first is None or first.time is None:
                what = "frame that can be decoded" if first is None else "time stamps"
                raise InputError(f"video {one_line(path)} has no {what}; is it cut off? write it anew as mp4")
            yield container, stream, first
    except InputError:
        raise
    except Exception as error:  # FFmpeg's errors inherit from all kinds of Python's
        raise InputError(f"video {one_line(path)} cannot be read ({cause_of(error)}); is it cut off?") from error


def upright(frame: Any, path: Path) -> np.ndarray:
    """(h, w, 3) uint8 RGB, turned as the file says that it is to be shown: phones film on their side."""
    turns, odd = divmod(frame.rotation, 90)
    if odd:
        raise InputError(f"video {one_line(path)} is to be shown turned by {frame.rotation} degrees; turn it by 90s")
    return np.rot90(frame.to_ndarray(format="rgb24"), turns)


def film_header(path: Path) -> tuple[tuple[int, int], float | None]:
    """((width, height) of its frames as displayed, seconds if the file states them)."""
    with opened(path) as (container, stream, first):
        height, width, _ = upright(first, path).shape
        if stream.duration is not None:
            return (width, height), float(stream.duration * stream.time_base)
        return (width, height), None if container.duration is None else container.duration / 1e6


def film_frames(clip: Clip) -> list[np.ndarray]:
    """`count` arrays (h, w, 3) uint8 RGB as displayed. InputError where the film ends before the last of them."""
    film, stamps = clip.frames, [clip.frames.start + i / clip.fps for i in range(clip.count)]
    found, shown, until = [], None, 0.0
    with opened(film.path) as (container, stream, first):
        for frame in frames_from(film.start, container, stream, first.time):
            time = frame.time - first.time
            while shown is not None and len(found) < clip.count and stamps[len(found)] < time - CLOSE:
                found.append(upright(shown, film.path))
            if len(found) == clip.count:
                return found
            shown, length = frame, (frame.duration or 0) * float(frame.time_base)
            until = time + (length or 1 / float(stream.average_rate or 1))
        if shown is not None and stamps[-1] < until + CLOSE:
            return found + [upright(shown, film.path)] * (clip.count - len(found))
        raise InputError(
            f"video {one_line(film.path)} ends at {until:.2f} seconds, but a frame at {stamps[-1]:.2f} is asked for; "
            "is it cut off? give its true 'end'"
        )


def frames_from(start: float, container: Any, stream: Any, zero: float) -> Iterator[Any]:
    """The frames from the last key frame before `start` on; from the first, where it cannot be found."""
    for second in (start, 0.0):
        container.seek(round((zero + second) / stream.time_base), stream=stream)
        frames = container.decode(stream)
        first = next(frames, None)
        if first is not None and first.time is not None and first.time - zero <= start + CLOSE:
            break
    if first is not None:
        yield first
        yield from frames
