"""Geometries of all molecules in a file of SMILES, made once and kept in an .npz file."""

from __future__ import annotations

import csv
import gzip
import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tiltflow.chemistry.atoms import ELEMENTS, Molecule, samples_of
from tiltflow.chemistry.embedding import Kind, Question, embedded, kinds, rdkit
from tiltflow.chemistry.workers import Crashed, Workers
from tiltflow.data import UNREADABLE
from tiltflow.errors import InputError, did_you_mean
from tiltflow.files import reason, write_file

MADE = 1
"""Number of the way in which geometries are made: raise it when that changes, and what is kept is made again."""
CHUNK = 500
"""SMILES that a process reads at a time."""
Watch = Callable[[int, int], None]
"""Told of geometries that are done, and of all."""


@dataclass(frozen=True)
class Geometries:
    """Molecules with positions.

    Args:
        numbers: atomic numbers, 0 where a molecule has no more atoms: int8 [n, atoms].
        positions: in Å, centred, 0 there: float32 [n, atoms, 3].
        smiles: of each, strings of one width [n]; those of conformers of one molecule are equal.
        left_out: how many SMILES have no geometry here, by reason.
    """

    numbers: NDArray[np.int8]
    positions: NDArray[np.float32]
    smiles: NDArray[np.str_]
    left_out: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.numbers)

    def molecules(self) -> list[Molecule]:
        """All of them."""
        rows = [numbers > 0 for numbers in self.numbers]
        return [
            Molecule(numbers[row].astype(np.int64), positions[row].astype(np.float64))
            for row, numbers, positions in zip(rows, self.numbers, self.positions, strict=True)
        ]

    def samples(self, atoms: int | None = None) -> Tensor:
        """As samples [n, atoms, 3 + 5], with room for the largest if nothing else is asked for."""
        return samples_of(self.molecules(), atoms or self.numbers.shape[1])

    def describe(self) -> str:
        """How many, and what was left out, in words.

        >>> some = Geometries(np.zeros((2, 3), np.int8), np.zeros((2, 3, 3), np.float32), np.array(["O", "O"]), {"charges": 4})
        >>> some.describe()
        '2 geometries of 1 molecule; left out: 4 (charges)'
        """
        molecules = len(set(self.smiles.tolist()))
        reasons = ", ".join(f"{count} ({why})" for why, count in sorted(self.left_out.items()) if count)
        left = f"; left out: {reasons}" if reasons else ""
        return f"{len(self)} geometries of {molecules} molecule{'s' * (molecules != 1)}{left}"


def load_geometries(
    data: Path | str,
    *,
    max_heavy_atoms: int | None = None,
    formula: str | None = None,
    conformers: int = 1,
    seed: int = 0,
    cache: Path | None = None,
    num_workers: int | None = None,
    watch: Watch = lambda done, total: None,
) -> Geometries:
    """Geometries of the molecules in a file of SMILES, from the cache if they have been made before.

    Left out and counted are molecules with charged atoms or unpaired electrons, and those for which no geometry is found.

    Args:
        data: SMILES, one to a line or in a column `smiles` of a .csv file, perhaps as .gz; or an .npz file of `save`.
        max_heavy_atoms: only molecules of so many atoms other than hydrogen, or fewer.
        formula: only isomers of it, such as C7H10O2.
        conformers: how many geometries of each molecule are tried.
        seed: of the distance geometry: the same seed, data and RDKit give the same geometries.
        cache: a folder; None for that of the user.
        num_workers: processes; None for one to a core.

    Raises InputError for files that cannot be read or are empty, for SMILES that do not parse, for other elements, and where
    nothing is left.
    """
    data = Path(data)
    wanted = None if formula is None else counts_of(formula)
    if data.suffix == ".npz":
        return _filtered(load(data), max_heavy_atoms, wanted, data)
    lines = read_smiles(data)
    folder = cache if cache is not None else cache_folder()
    sign = (MADE, lines, max_heavy_atoms, sorted((wanted or {}).items()), conformers, seed, version())
    place = folder / f"geometries-{hashlib.blake2b(repr(sign).encode(), digest_size=8).hexdigest()}.npz"
    if place.exists():
        return load(place)
    workers = Workers(num_workers)
    smiles, left_out = selected(lines, data, workers, max_heavy_atoms, wanted)
    made = made_of(smiles, workers, conformers, seed, watch, left_out)
    if not len(made):
        raise InputError(f"{data}: no molecule has a geometry ({made.describe()})")
    folder.mkdir(parents=True, exist_ok=True)
    save(made, place)
    return made


def made_of(
    smiles: Sequence[str],
    workers: Workers,
    conformers: int = 1,
    seed: int = 0,
    watch: Watch = lambda done, total: None,
    left_out: Counter[str] | None = None,
) -> Geometries:
    """Geometries of molecules that parse and have known elements."""
    left_out = Counter(left_out or {})
    kept: list[tuple[str, NDArray[np.int8], NDArray[np.float32]]] = []
    answers = workers.map(embedded, [Question(each, conformers, seed) for each in smiles])
    for done, (each, answer) in enumerate(zip(smiles, answers, strict=True), start=1):
        watch(done, len(smiles))
        if isinstance(answer, Crashed):
            left_out["crash"] += 1
        elif isinstance(answer, str):
            left_out[answer] += 1
        else:
            kept += [(each, answer[0], positions) for positions in answer[1]]
    return padded(kept, dict(left_out))


def padded(
    kept: Sequence[tuple[str, NDArray[np.integer], NDArray[np.floating]]], left_out: dict[str, int] | None = None
) -> Geometries:
    """Geometries of molecules that are given as (SMILES, atomic numbers [atoms], centred positions in Å [atoms, 3])."""
    atoms = max((len(numbers) for _, numbers, _ in kept), default=0)
    numbers = np.zeros((len(kept), atoms), np.int8)
    positions = np.zeros((len(kept), atoms, 3), np.float32)
    for i, (_, own, places) in enumerate(kept):
        numbers[i, : len(own)], positions[i, : len(own)] = own, places
    return Geometries(numbers, positions, np.array([each for each, _, _ in kept], dtype=np.str_), left_out or {})


def selected(
    lines: Sequence[tuple[int, str]],
    data: Path,
    workers: Workers,
    max_heavy_atoms: int | None = None,
    wanted: dict[str, int] | None = None,
) -> tuple[list[str], Counter[str]]:
    """SMILES that pass the filters and have neither charges nor radicals, and how many have. Raises InputError for SMILES that
    do not parse, for other elements, and where nothing passes."""
    smiles = [each for _, each in lines]
    chunks = [smiles[i : i + CHUNK] for i in range(0, len(smiles), CHUNK)]
    answers = workers.map(kinds, chunks)
    found = [
        k for chunk, ks in zip(chunks, answers, strict=True) for k in ([None] * len(chunk) if isinstance(ks, Crashed) else ks)
    ]
    if unknown := [line for line, kind in zip(lines, found, strict=True) if kind is None]:
        (number, first), many = unknown[0], len(unknown)
        what = "is no SMILES" if many == 1 else f"is no SMILES, and {many - 1} more are none"
        raise InputError(f"{data}, line {number}: {first[:60]!r} {what}")
    known = [(line, kind) for line, kind in zip(lines, found, strict=True) if kind is not None]
    for (number, text), kind in known:
        if strange := sorted(set(kind.counts) - set(ELEMENTS)):
            raise InputError(f"{data}, line {number}: {text[:60]!r} has {strange[0]}; known elements: {', '.join(ELEMENTS)}")
    passing = [(text, kind) for (_, text), kind in known if passes(kind, max_heavy_atoms, wanted)]
    if not passing:
        raise InputError(f"{data}: none of {len(lines)} molecules passes {_filters(max_heavy_atoms, wanted)}")
    return [text for text, kind in passing if not kind.reason], Counter(kind.reason for _, kind in passing if kind.reason)


def passes(kind: Kind, max_heavy_atoms: int | None, wanted: dict[str, int] | None) -> bool:
    """True for a molecule that the filters let through."""
    return (max_heavy_atoms is None or kind.heavy_atoms <= max_heavy_atoms) and (wanted is None or kind.counts == wanted)


def counts_of(formula: str) -> dict[str, int]:
    """Atoms by element. Raises InputError if it is no formula of known elements.

    >>> counts_of("C7H10O2")
    {'C': 7, 'H': 10, 'O': 2}
    """
    parts = re.findall(r"([A-Z][a-z]?)(\d*)", formula)
    if not parts or "".join(symbol + count for symbol, count in parts) != formula:
        raise InputError(f"formula {formula!r}: must be like C7H10O2")
    counts: Counter[str] = Counter()
    for symbol, count in parts:
        if symbol not in ELEMENTS:
            raise InputError(f"formula {formula!r}: unknown element {symbol!r}{did_you_mean(symbol, ELEMENTS)}")
        counts[symbol] += int(count or 1)
    return {symbol: count for symbol, count in counts.items() if count}


def read_smiles(path: Path) -> list[tuple[int, str]]:
    """(line, SMILES) of a file, .gz or not: the column `smiles` where the first line has one, else the first word of each line.

    Raises InputError if it cannot be read or has none.
    """
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode()
    except UNREADABLE as error:
        raise InputError(f"{path}: cannot be read ({reason(error)}); give a file of SMILES, or geometries as .npz") from None
    lines = text.splitlines()
    heads = [head.strip().lower() for head in next(csv.reader(lines[:1]), [])]
    if "smiles" in heads:
        column, reader = heads.index("smiles"), csv.reader(lines)
        next(reader)
        found = [(reader.line_num, row[column].strip()) for row in reader if len(row) > column]
    else:
        found = [(number, re.split(r"[\s,;]", line.strip())[0]) for number, line in enumerate(lines, start=1)]
    if not (found := [(number, smiles) for number, smiles in found if smiles]):
        raise InputError(f"{path}: has no SMILES")
    return found


def save(geometries: Geometries, path: Path) -> None:
    """Write an .npz file, without pickles. Raises OutputError."""
    left_out = np.array([f"{why}={count}" for why, count in sorted(geometries.left_out.items())], dtype=np.str_)

    def write(draft: Path) -> None:
        with open(draft, "wb") as file:
            np.savez_compressed(
                file, numbers=geometries.numbers, positions=geometries.positions, smiles=geometries.smiles, left_out=left_out
            )

    write_file(path, write)


def load(path: Path) -> Geometries:
    """Read what `save` wrote. Raises InputError if it is something else."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            numbers, positions, smiles = archive["numbers"], archive["positions"], archive["smiles"]
            left_out = dict(str(each).rsplit("=", 1) for each in archive["left_out"])
        n, atoms = numbers.shape
        if positions.shape != (n, atoms, 3) or smiles.shape != (n,) or not n:
            raise ValueError(f"shapes {numbers.shape}, {positions.shape}, {smiles.shape}")
        counts = {why: int(count) for why, count in left_out.items()}
        return Geometries(numbers.astype(np.int8), positions.astype(np.float32), smiles.astype(np.str_), counts)
    except UNREADABLE as error:
        raise InputError(f"{path}: no geometries of molecules ({reason(error)})") from None


def cache_folder() -> Path:
    """The folder in which geometries are kept, by the standard of XDG."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tiltflow"


def version() -> str:
    """Version of RDKit, on which geometries depend. Raises InputError if it is not installed."""
    rdkit()
    import rdkit as package

    return str(package.__version__)


def _filtered(all_of_them: Geometries, max_heavy_atoms: int | None, wanted: dict[str, int] | None, data: Path) -> Geometries:
    kept = [i for i, molecule in enumerate(all_of_them.molecules()) if passes(_kind_of(molecule), max_heavy_atoms, wanted)]
    if not kept:
        raise InputError(f"{data}: none of {len(all_of_them)} molecules passes {_filters(max_heavy_atoms, wanted)}")
    made = all_of_them
    return Geometries(made.numbers[kept], made.positions[kept], made.smiles[kept], made.left_out)


def _kind_of(molecule: Molecule) -> Kind:
    return Kind(counts_of(molecule.formula), "")


def _filters(max_heavy_atoms: int | None, wanted: dict[str, int] | None) -> str:
    formula = "" if wanted is None else "formula " + "".join(f"{symbol}{count}" for symbol, count in wanted.items())
    return " and ".join(filter(None, ("" if max_heavy_atoms is None else f"max_heavy_atoms {max_heavy_atoms}", formula)))
