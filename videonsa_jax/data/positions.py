"""Where tokens and patches are: rotary ids of the text model, window order of the vision tower.

All of it is integer arithmetic on the grids, done once on the host.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from videonsa_jax.config.schema import ModelConfig, VisionConfig
from videonsa_jax.data.sample import Visual


def is_vision_token(tokens: np.ndarray, cfg: ModelConfig) -> np.ndarray:
    """i32[s] -> bool[s]: placeholders of images and videos."""
    return (tokens == cfg.image_token_id) | (tokens == cfg.video_token_id)


def merged_grid(grid: tuple[int, int, int], cfg: VisionConfig) -> tuple[int, int, int]:
    """Patches along (time, height, width) -> merged tokens along the same axes."""
    t, h, w = grid
    return t, h // cfg.merge_size, w // cfg.merge_size


def mrope_positions(tokens: np.ndarray, visuals: Sequence[Visual], cfg: ModelConfig) -> np.ndarray:
    """Multimodal rotary ids (time, height, width) of one sequence.

    Text advances all three by one per token. An image or video starts all axes at the next id; its
    temporal ids are `tokens_per_second * seconds_per_grid` apart (truncated), 0 apart for images.

    Args:
      tokens: i32[s] with placeholders expanded.
      visuals: one per run of placeholders.
      cfg: token ids, merge size, tokens_per_second, position_advance.

    Returns:
      i32[s 3].

    Raises:
      ValueError: the placeholders do not match the visuals' token counts or kinds.
    """
    out = np.zeros((len(tokens), 3), np.int32)
    vision = is_vision_token(tokens, cfg)
    index, next_id = 0, 0
    for number, visual in enumerate(visuals):
        start = index + int(np.argmax(vision[index:])) if vision[index:].any() else len(tokens)
        t, h, w = merged_grid(visual.grid, cfg.vision)
        stop = start + t * h * w
        expected = cfg.video_token_id if visual.is_video else cfg.image_token_id
        if stop > len(tokens) or not (tokens[start:stop] == expected).all():
            raise ValueError(
                f"visual {number} of grid {visual.grid} needs {t * h * w} placeholders {expected} "
                f"from token {start} on; the sequence of {len(tokens)} tokens does not have them"
            )
        text_length = start - index
        out[index:start] = next_id + np.arange(text_length)[:, None]
        origin = next_id + text_length
        seconds = visual.seconds_per_grid
        if cfg.attention == "released" and cfg.released.whole_seconds:
            seconds = int(seconds)
        interval = np.float32(cfg.tokens_per_second * seconds)
        times = (np.arange(t, dtype=np.float32) * (interval if visual.is_video else 0)).astype(int)
        grid = np.stack(np.meshgrid(times, np.arange(h), np.arange(w), indexing="ij"), axis=-1)
        out[start:stop] = origin + grid.reshape(-1, 3)
        last = max(h, w) - 1
        if cfg.position_advance == "all_axes":
            last = max(last, int(times[-1]))
        index, next_id = stop, origin + last + 1
    if vision[index:].any():
        raise ValueError(
            f"{int(vision[index:].sum())} placeholders are left after {len(visuals)} visuals"
        )
    out[index:] = next_id + np.arange(len(tokens) - index)[:, None]
    return out


@dataclasses.dataclass(frozen=True)
class PatchLayout:
    """How the vision tower orders the patches of one image or video."""

    order: np.ndarray  # i32[r] merged token (in sequence order) at each place of window order
    windows: np.ndarray  # i32[p 2] half-open range of each patch's window, in window order
    frames: np.ndarray  # i32[p 2] likewise its frame
    coordinates: np.ndarray  # i32[p 2] (row, column) of each patch, in window order


def patch_layout(grid: tuple[int, int, int], cfg: VisionConfig) -> PatchLayout:
    """Frame by frame, window by window, row-major inside a window; edge windows are smaller."""
    t, h, w = merged_grid(grid, cfg)
    unit = cfg.merge_size**2
    side = cfg.window_pixels // (cfg.patch_size * cfg.merge_size)
    time, row, column = (a.reshape(-1) for a in np.indices((t, h, w)))
    window = (time * -(-h // side) + row // side) * -(-w // side) + column // side
    order = np.argsort(window, kind="stable").astype(np.int32)
    inner_row, inner_column = (a.reshape(-1) for a in np.indices((cfg.merge_size,) * 2))
    rows = row[order][:, None] * cfg.merge_size + inner_row
    columns = column[order][:, None] * cfg.merge_size + inner_column
    return PatchLayout(
        order=order,
        windows=_ranges(window[order], unit),
        frames=_ranges(time[order], unit),
        coordinates=np.stack([rows.reshape(-1), columns.reshape(-1)], axis=-1).astype(np.int32),
    )


def _ranges(group: np.ndarray, unit: int) -> np.ndarray:
    """Sorted group id per merged token -> i32[p 2] range of patches of the same group."""
    start = np.searchsorted(group, group, side="left")
    stop = np.searchsorted(group, group, side="right")
    return np.repeat(np.stack([start, stop], axis=-1) * unit, unit, axis=0).astype(np.int32)
