"""Videos in reports and files: rows of frames, and animated GIFs."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from test_report import Balanced, write

from tiltflow.commands.sample import check_suffix, write_samples
from tiltflow.conditions import Item
from tiltflow.errors import InputError
from tiltflow.evaluation.samples import Asked
from tiltflow.reports import plots
from tiltflow.reports.videos import FRAMES, SIDE, frames_in_rows, gif_rows, save_gif, spaced
from tiltflow.runs.evaluate import pictures_of
from tiltflow.runs.watch import COLOURS, EDGES, MOTION, in_pictures


def grey_videos(count: int = 2, frames: int = 17, height: int = 96, width: int = 192) -> torch.Tensor:
    """Each frame of one grey, brighter with time; the second video is the first one backwards."""
    one = torch.linspace(-1, 1, frames)[:, None, None, None].expand(frames, 3, height, width)
    return torch.stack([one, one.flip(0)] * (count // 2))


def greys(picture: Image.Image, rows: int, columns: int) -> np.ndarray:
    """The grey in the middle of each cell of a grid."""
    pixels = np.asarray(picture.convert("L"), dtype=int)
    high, wide = pixels.shape[0] / rows, pixels.shape[1] / columns
    return pixels[(high * (np.arange(rows) + 0.5)).astype(int)][:, (wide * (np.arange(columns) + 0.5)).astype(int)]


def test_frames_are_evenly_spaced_from_the_first_to_the_last_and_shrunk() -> None:
    videos = grey_videos(frames=29, height=SIDE, width=2 * SIDE)
    some = spaced(videos, FRAMES)
    assert some.shape == (2, FRAMES, 3, SIDE // 2, SIDE)
    assert torch.allclose(some[0, :, 0, 0, 0], torch.linspace(-1, 1, 8), atol=1e-6)  # 28 is a multiple of 7
    assert torch.equal(spaced(videos[:, :3, :, :4, :4], FRAMES), videos[:, :3, :, :4, :4])
    rows = greys(frames_in_rows(videos), 2, FRAMES)
    assert np.abs(rows - [np.linspace(0, 255, 8), np.linspace(255, 0, 8)]).max() <= 1


def test_a_gif_moves_as_the_videos_do_and_is_cut_into_their_rows(tmp_path: Path) -> None:
    save_gif(grey_videos(), 1, tmp_path / "a.gif", seconds=3.4)
    whole = (tmp_path / "a.gif").read_bytes()
    forward = np.linspace(0, 255, 17)
    both = (forward, forward[::-1])
    parts = [(row, [each]) for row, each in zip(gif_rows(whole, 2), both, strict=True)]
    for gif, rows in [(whole, list(both)), *parts]:
        opened = Image.open(io.BytesIO(gif))
        assert (opened.info["duration"], opened.info["loop"]) == (200, 0)
        seen = np.stack([greys(frame, len(rows), 1)[:, 0] for frame in ImageSequence.Iterator(opened)])
        assert np.abs(seen - np.stack(rows, 1)).max() <= 3  # of 256 colours in a frame


def test_of_each_prompt_the_first_video_is_shown() -> None:
    videos, asked = grey_videos(4), Asked.of_prompts([Item("a"), Item("b")], 2)
    files, about = pictures_of(videos, videos.flip(1), asked, 64, None)
    assert about == {"rows": 2, "prompts": ["a", "b"], "frames": 17}
    assert sorted(files) == ["after.gif", "after.png", "before.gif", "before.png"]
    assert pictures_of(videos, videos, asked, 1, None)[1] == {"rows": 1, "prompts": ["a"], "frames": 17}
    assert pictures_of(videos[:, :, 0], videos[:, :, 0], asked, 64, None) == ({}, {})


def test_what_the_alarm_watches_of_videos() -> None:
    """Edges and colours as the mean over frames, and motion, whose answers are known."""
    board = (1.0 - 2 * ((torch.arange(8)[:, None] + torch.arange(8)) % 2)).expand(1, 1, 3, 8, 8)
    still, turning = board.expand(1, 5, 3, 8, 8), board * torch.tensor([1.0, -1, 1, 1, 1])[:, None, None, None]
    half = torch.cat([board, 0 * board], 1)
    for videos, moves, edges, colours in ((still, 0, 1, 2), (2 * turning, 2 / 4, 1, 2), (half, 1 / 2, 1 / 2, 2**0.5)):
        found = in_pictures(videos)
        assert found[MOTION].item() == pytest.approx(moves)
        assert found[EDGES].item() == pytest.approx(edges)
        assert found[COLOURS].exp().item() == pytest.approx(colours)
    assert in_pictures(board)[MOTION].item() == 0
    assert in_pictures(torch.cat([still, turning]))[MOTION].tolist() == [0, 2 / 4]
    assert in_pictures(board[:, 0]).keys() == {EDGES, COLOURS}
    assert in_pictures(torch.zeros(2, 3)) == {}


def test_the_page_has_videos_that_move_beside_their_frames(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for side in ("before", "after"):
        frames_in_rows(grey_videos()).save(folder / f"{side}.png")
        save_gif(grey_videos(), 1, folder / f"{side}.gif")
    page = write(folder, {"pictures": {"rows": 2, "prompts": ["<a>", "b"], "frames": 17}}, rows=False)
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    kinds = [source.split(";")[0] for source in parser.sources if source != "data:,"]  # which is the icon
    assert kinds == 2 * (2 * ["data:image/gif"] + 2 * ["data:image/png"])
    assert "first video" in page
    assert "-samples.gif" in page


def test_files_of_samples(tmp_path: Path) -> None:
    videos = grey_videos(4, frames=3)
    for suffix in (".png", ".gif", ".npz"):
        check_suffix(Path(f"x{suffix}"), tuple(videos.shape[1:]))
        write_samples(tmp_path / f"x{suffix}", videos, 2)
    with Image.open(tmp_path / "x.gif") as gif, Image.open(tmp_path / "x.png") as png:
        assert np.abs(greys(gif, 2, 2) - [[0, 255], [0, 255]]).max() <= 3
        assert png.size == plots.image_grid(videos.flatten(0, 1), 3, scale=1).size
    assert np.array_equal(np.load(tmp_path / "x.npz")["samples"], videos.numpy())
    for name, shape, message in (
        ("x.gif", (3, 8, 8), r"\[3, 8, 8\] are not videos; use .png or .npz"),
        ("x.gif", (2,), r"\[2\] are not videos; use .npz"),
        ("x.png", (2,), r"\[2\] are not pictures; use .npz"),
    ):
        with pytest.raises(InputError, match=message):
            check_suffix(Path(name), shape)
