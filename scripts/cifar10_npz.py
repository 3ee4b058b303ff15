"""CIFAR-10 as the .npz file that `tiltflow pretrain --data` reads.

    python scripts/cifar10_npz.py FOLDER cifar10.npz

FOLDER holds the official binary version (data_batch_1.bin .. 5, test_batch.bin), or lossless mosaics train_00.webp .. and
test_00.webp .. of 40 x 50 images with their labels.npz (y_train, y_test). Nothing is unpickled.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image


def from_binary(folder: Path) -> dict[str, np.ndarray]:
    """A record is a label byte and 3 x 32 x 32 bytes."""
    arrays: dict[str, np.ndarray] = {}
    for split, names in (("train", sorted(folder.glob("data_batch_*.bin"))), ("test", [folder / "test_batch.bin"])):
        records = np.concatenate([np.fromfile(name, dtype=np.uint8).reshape(-1, 3073) for name in names])
        arrays[f"x_{split}"] = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        arrays[f"y_{split}"] = records[:, 0]
    return arrays


def from_mosaics(folder: Path) -> dict[str, np.ndarray]:
    """A mosaic is 40 rows of 50 images."""
    arrays = {
        key: array for key, array in np.load(folder / "labels.npz", allow_pickle=False).items() if key in ("y_train", "y_test")
    }
    for split in ("train", "test"):
        parts = []
        for name in sorted(folder.glob(f"{split}_*.webp")):
            with Image.open(name) as image:
                mosaic = np.asarray(image.convert("RGB"))
            parts.append(mosaic.reshape(40, 32, 50, 32, 3).transpose(0, 2, 1, 3, 4).reshape(-1, 32, 32, 3))
        arrays[f"x_{split}"] = np.concatenate(parts)
    return arrays


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    if (options.folder / "test_batch.bin").exists():
        arrays = from_binary(options.folder)
    elif (options.folder / "labels.npz").exists():
        arrays = from_mosaics(options.folder)
    else:
        print(f"{options.folder}: holds neither test_batch.bin nor labels.npz", file=sys.stderr)
        sys.exit(2)
    np.savez_compressed(options.output, **arrays)
    print(f"{len(arrays['x_train'])} + {len(arrays['x_test'])} images in {options.output}")


if __name__ == "__main__":
    main()
