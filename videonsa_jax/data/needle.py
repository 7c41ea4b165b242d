"""Generated videos with a needle in each: short coloured events among grey distractors.

Grey shapes drift through the whole clip, and others flash up as briefly as the events do; an event
is a shape of one of `COLOURS`. A question about the events has four options and exactly one right
answer. Answers are balanced within every file of questions, and nothing in a question's text says
which one is right: whoever has not seen the video is right one time in four.

Frames are drawn one by one from the plan of a clip, so a clip of hours takes no more memory than
one of seconds.

    python -m videonsa_jax.data.needle --out=DIR [--kind=first --train=1000 --seconds=60 ...]
"""

import argparse
import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from fractions import Fraction
from typing import Literal, get_args

import av
import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from videonsa_jax.errors import UserError

Kind = Literal["what", "first", "count"]
LETTERS = "ABCD"
SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (230, 30, 30),
    "green": (30, 200, 40),
    "blue": (40, 70, 240),
    "yellow": (240, 220, 30),
}
QUESTIONS: dict[Kind, str] = {
    "what": "Which colour flashes up in the video?",
    "first": "Which colour flashes up first in the video?",
    "count": "How many coloured shapes flash up in the video?",
}
DRIFTING = 3  # grey shapes that are always there
SPLITS = ("train", "heldout")  # the position is part of the seed


@dataclasses.dataclass(frozen=True)
class NeedleConfig:
    """What the clips of a dataset have in common."""

    kind: Kind = "what"
    seconds: float = 4.0
    fps: int = 4  # frames per second of the file
    pixels: int = 112  # side of the square frame, even
    event_seconds: float = 0.75
    seed: int = 0

    def __post_init__(self):
        if self.kind not in QUESTIONS:
            raise ValueError(f"kind={self.kind!r} must be one of {', '.join(QUESTIONS)}")
        if self.pixels < 28 or self.pixels % 2:
            raise ValueError(f"pixels={self.pixels} must be even and at least 28")
        if self.frames < 8:
            raise ValueError(f"{self.seconds} s at {self.fps} fps are {self.frames} frames, not 8")
        if self.event_frames < 1 or self.most_events * self.event_frames > self.frames:
            raise ValueError(
                f"{self.most_events} events of {self.event_seconds} s must take at least a frame "
                f"each and fit {self.frames} frames at {self.fps} fps"
            )

    @property
    def frames(self) -> int:
        """Frames of a clip."""
        return round(self.seconds * self.fps)

    @property
    def event_frames(self) -> int:
        """Frames that show an event."""
        return round(self.event_seconds * self.fps)

    @property
    def most_events(self) -> int:
        """Events of the clip that has most."""
        return 1 if self.kind == "what" else len(LETTERS)


@dataclasses.dataclass(frozen=True)
class Shape:
    """A filled shape; lengths are in widths of the frame."""

    shape: str
    colour: tuple[int, int, int]
    centre: tuple[float, float]  # (x, y)
    radius: float


@dataclasses.dataclass(frozen=True)
class Event:
    """A coloured shape that is shown in frames start <= f < stop."""

    name: str  # of the colour
    start: int
    stop: int
    look: Shape


@dataclasses.dataclass(frozen=True)
class Clip:
    """One video and its question."""

    name: str
    seed: tuple[int, ...]  # of everything that moves behind the events
    events: tuple[Event, ...]  # in the order of time, not overlapping
    options: tuple[str, ...]
    answer: str  # one of LETTERS


def plan(cfg: NeedleConfig, split: str, count: int) -> list[Clip]:
    """The clips of one split, each drawn from its own seed: longer splits begin alike.

    Among every four clips in a row each letter is right once.
    """
    clips = []
    for index in range(count):
        seed = (cfg.seed, SPLITS.index(split), index)
        deck = np.random.default_rng((cfg.seed, SPLITS.index(split), index // len(LETTERS), 1))
        answer = int(deck.permutation(len(LETTERS))[index % len(LETTERS)])
        rng = np.random.default_rng((*seed, 0))
        options, names = _question(cfg.kind, answer, rng)
        clips.append(
            Clip(f"{split}_{index:06d}", seed, _events(cfg, names, rng), options, LETTERS[answer])
        )
    return clips


def _question(
    kind: Kind, answer: int, rng: np.random.Generator
) -> tuple[tuple[str, ...], list[str]]:
    """The options, and the colours that flash up one after the other."""
    colours = tuple(COLOURS)
    if kind == "count":
        names = [colours[i] for i in rng.integers(len(colours), size=answer + 1)]
        return tuple(str(n + 1) for n in range(len(LETTERS))), names
    if kind == "what":
        return colours, [colours[answer]]
    others = [colours[i] for i in rng.permutation(len(colours)) if i != answer]
    return colours, [colours[answer], *others]


def _events(cfg: NeedleConfig, names: Sequence[str], rng: np.random.Generator) -> tuple[Event, ...]:
    """Events at random times, uniform among all that do not overlap."""
    length = cfg.event_frames
    free = cfg.frames - len(names) * length
    gaps = np.sort(rng.choice(free + len(names), len(names), replace=False)) - np.arange(len(names))
    starts = [int(gap) + i * length for i, gap in enumerate(gaps)]
    return tuple(
        Event(name, start, start + length, _shape(rng, COLOURS[name], radius=0.25))
        for name, start in zip(names, starts, strict=True)
    )


def _shape(rng: np.random.Generator, colour: tuple[int, int, int], radius: float) -> Shape:
    x, y = rng.uniform(radius, 1 - radius, 2)
    return Shape(SHAPES[rng.integers(len(SHAPES))], colour, (float(x), float(y)), radius)


def render(cfg: NeedleConfig, clip: Clip) -> Iterator[np.ndarray]:
    """Draws the frames of a clip, u8[pixels pixels 3] each."""
    rng = np.random.default_rng((*clip.seed, 2))
    background = int(rng.integers(20, 70))
    drifting = [_grey(rng, radius=rng.uniform(0.05, 0.09)) for _ in range(DRIFTING)]
    speed = rng.uniform(-0.15, 0.15, (DRIFTING, 2)) / cfg.fps
    events = list(clip.events)
    for frame in range(cfg.frames):
        picture = Image.new("RGB", (cfg.pixels, cfg.pixels), (background,) * 3)
        draw = ImageDraw.Draw(picture)
        for look, velocity in zip(drifting, speed, strict=True):
            x, y = (np.array(look.centre) + velocity * frame) % 1
            _draw(draw, dataclasses.replace(look, centre=(x, y)), cfg.pixels)
        _draw_flash(draw, cfg, clip, frame)
        if events and frame >= events[0].stop:
            events.pop(0)
        if events and frame >= events[0].start:
            _draw(draw, events[0].look, cfg.pixels)
        yield np.asarray(picture)


def _draw_flash(draw: ImageDraw.ImageDraw, cfg: NeedleConfig, clip: Clip, frame: int) -> None:
    """A grey shape in every other stretch of time as long as an event, drawn from its own seed."""
    stretch = frame // cfg.event_frames
    rng = np.random.default_rng((*clip.seed, 3, stretch))
    if rng.random() < 0.5:
        _draw(draw, _grey(rng, radius=0.15), cfg.pixels)


def _grey(rng: np.random.Generator, radius: float) -> Shape:
    return _shape(rng, (int(rng.integers(90, 200)),) * 3, radius)


def _draw(draw: ImageDraw.ImageDraw, look: Shape, pixels: int) -> None:
    (x, y), r = (c * pixels for c in look.centre), look.radius * pixels
    if look.shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=look.colour)
    elif look.shape == "square":
        draw.rectangle((x - r, y - r, x + r, y + r), fill=look.colour)
    elif look.shape == "triangle":
        draw.polygon([(x, y - r), (x + r, y + r), (x - r, y + r)], fill=look.colour)
    else:
        draw.rectangle((x - r, y - r / 3, x + r, y + r / 3), fill=look.colour)
        draw.rectangle((x - r / 3, y - r, x + r / 3, y + r), fill=look.colour)


def write_video(path: str | os.PathLike, frames: Iterator[np.ndarray], *, fps: int) -> None:
    """Encodes frames as H.264 as they come; the file appears under its name when it is whole.

    Args:
      path: ends in .mp4.
      frames: u8[h w 3], all of one even size.
      fps: frames per second.

    Raises:
      ValueError: there are no frames.
    """
    path = pathlib.Path(path)
    partial = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    with av.open(str(partial), "w") as container:
        options = {"preset": "ultrafast", "crf": "18", "threads": "1"}  # one thread: same bytes
        stream = container.add_stream("libx264", rate=Fraction(fps), options=options)
        stream.pix_fmt = "yuv420p"
        empty = True
        for image in frames:
            if empty:
                stream.height, stream.width = image.shape[:2]
                empty = False
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        if empty:
            raise ValueError(f"{path}: a video needs at least one frame")
        container.mux(stream.encode())
    partial.replace(path)


def record(cfg: NeedleConfig, clip: Clip, video: str) -> dict:
    """The clip as LLaVA-Video-178K writes it, with what an evaluation needs beside.

    Args:
      cfg: of the clip.
      clip: its events and question.
      video: path of the file, as the JSON file is to name it.
    """
    choices = [f"{letter}. {text}" for letter, text in zip(LETTERS, clip.options, strict=True)]
    question = "\n".join([QUESTIONS[cfg.kind], *choices, "Answer with the letter."])
    return {
        "id": clip.name,
        "data_source": f"needle_{cfg.kind}",
        "video": video,
        "conversations": [
            {"from": "human", "value": f"<image>\n{question}"},
            {"from": "gpt", "value": clip.answer},
        ],
        "kind": cfg.kind,
        "options": list(clip.options),
        "answer": clip.answer,
        "events": [
            {"name": e.name, "start_s": e.start / cfg.fps, "stop_s": e.stop / cfg.fps}
            for e in clip.events
        ],
    }


def write_dataset(
    out: str | os.PathLike,
    cfg: NeedleConfig,
    counts: dict[str, int],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, pathlib.Path]:
    """Writes the clips of all splits and one JSON file of questions per split.

    Finished videos are kept, so an interrupted call continues. A folder with clips of another
    config is refused.

    Args:
      out: gets videos/NAME.mp4 and SPLIT.json.
      cfg: of all clips.
      counts: clips per split.
      progress: called with (videos done, videos in all) after each.

    Returns:
      The JSON file of each split.

    Raises:
      UserError: `out` holds clips of another config.
    """
    out = pathlib.Path(out)
    (out / "videos").mkdir(parents=True, exist_ok=True)
    _claim(out / "config.json", cfg)
    clips = {split: plan(cfg, split, count) for split, count in counts.items()}
    jobs = [(out / "videos" / f"{c.name}.mp4", c) for split in clips.values() for c in split]

    def write(job):
        path, clip = job
        if not path.exists():
            write_video(path, render(cfg, clip), fps=cfg.fps)

    with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for done, _ in enumerate(pool.map(write, jobs), start=1):
            progress(done, len(jobs))
    files = {}
    for split, planned in clips.items():
        files[split] = out / f"{split}.json"
        records = [record(cfg, clip, f"videos/{clip.name}.mp4") for clip in planned]
        files[split].write_text(json.dumps(records, indent=1))
    return files


def _claim(path: pathlib.Path, cfg: NeedleConfig) -> None:
    """Notes whose folder this is."""
    mine = dataclasses.asdict(cfg)
    if path.exists() and (found := json.loads(path.read_text())) != mine:
        differ = sorted(k for k in mine if found.get(k) != mine[k])
        raise UserError(f"{path}: written with other {', '.join(differ)}; use another folder")
    path.write_text(json.dumps(mine))


def main() -> None:
    """Writes a dataset."""
    parser = argparse.ArgumentParser(
        prog="python -m videonsa_jax.data.needle",
        description="Write generated clips with questions.",
    )
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--train", type=int, default=1000, help="clips to train on")
    parser.add_argument("--heldout", type=int, default=200, help="clips to evaluate on")
    for field in dataclasses.fields(NeedleConfig):
        kinds = get_args(Kind) if field.name == "kind" else None
        kind = type(field.default)
        parser.add_argument(f"--{field.name}", type=kind, default=field.default, choices=kinds)
    args = vars(parser.parse_args())
    out, counts = args.pop("out"), {split: args.pop(split) for split in SPLITS}
    try:
        with tqdm(total=sum(counts.values()), unit="clip", delay=1) as bar:
            write_dataset(out, NeedleConfig(**args), counts, lambda *_: bar.update())
    except ValueError as error:
        sys.exit(f"{parser.prog}: {error}")


if __name__ == "__main__":
    main()
