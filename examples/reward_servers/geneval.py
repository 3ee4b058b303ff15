"""Are the objects there that a prompt asks for? Object checks in the manner of GenEval (arXiv 2310.11513), as a reward server.

In an environment of its own, with tiltflow, transformers, scipy and pillow, from this folder:

    tiltflow serve-reward geneval.yaml --port 8777

and in the recipe of the run, whose prompts are a file of GenEval's (evaluation_metadata.jsonl has the keys below):

    reward: {name: http, url: "http://127.0.0.1:8777/score"}
    prompts: {path: evaluation_metadata.jsonl}

Metadata of a prompt: `include`, a list of {class, count, color, position: [relation, which of the list]}, and `exclude`, of
{class, count}: as many of these are too many. `strict` is GenEval's own 0 or 1; `graded` is the mean over what is asked for, in
the manner of Flow-GRPO, which says more to a policy that gets nothing right yet.

The detector is Mask2Former (Swin-S, COCO), colours are told by CLIP, both from the hub or from folders that the variables
GENEVAL_DETECTOR and GENEVAL_CLIP name. GenEval runs the same detector by mmdetection, so numbers differ a little.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9
"""Least score of an object; where a prompt is of the tag `counting`, so that one object is not counted twice."""
MOST_OBJECTS = 16
"""Objects of a class that are kept, the surest first."""
OVERLAP = 0.1
"""A relation holds beyond this share of the two sizes."""
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")


@dataclass(frozen=True)
class Found:
    """An object in a picture.

    Args:
        box: left, top, right, bottom, in pixels.
        score: how sure the detector is, 0 to 1.
        mask: bool [height, width]; None if only the box is known.
    """

    box: tuple[float, float, float, float]
    score: float
    mask: Tensor | None = None


Objects = Mapping[str, Sequence[Found]]
"""What is in a picture, by class."""
Detect = Callable[[Tensor], Objects]
Colour = Callable[[Tensor, Found, str], str]
"""(picture [3, height, width] in [-1, 1], object, its class) -> its colour."""


# ---- the score of a picture ----


def sure(objects: Objects, tag: str) -> dict[str, list[Found]]:
    """The objects that count, the surest first."""
    least = COUNTING_THRESHOLD if tag == "counting" else THRESHOLD
    ordered = {name: sorted(some, key=lambda one: -one.score) for name, some in objects.items()}
    return {name: [one for one in some if one.score > least][:MOST_OBJECTS] for name, some in ordered.items()}


def strict_score(image: Tensor, objects: Objects, metadata: Mapping[str, Any], colour: Colour) -> float:
    """1 if all that is asked for is there and nothing that is too much, else 0."""
    there = sure(objects, str(metadata.get("tag", "")))
    groups: list[list[Found] | None] = []
    right = True
    for wanted in metadata.get("include", ()):
        some = there.get(wanted["class"], [])[: wanted["count"]]
        met = len(some) == wanted["count"]
        if met and "color" in wanted:
            met = sum(colour(image, one, wanted["class"]) == wanted["color"] for one in some) >= wanted["count"]
        if met and "position" in wanted:
            met = placed(some, wanted["position"], groups) == 1
        groups.append(some if met else None)
        right &= met
    for unwanted in metadata.get("exclude", ()):
        right &= len(there.get(unwanted["class"], [])) < unwanted["count"]
    return float(right)


def graded_score(image: Tensor, objects: Objects, metadata: Mapping[str, Any], colour: Colour) -> float:
    """The mean over all that is asked for: 1 - |found - asked| / asked of the objects of a class, of those of the right colour,
    and the share of the pairs that stand as they should; each at least 0."""
    there = sure(objects, str(metadata.get("tag", "")))
    groups: list[list[Found] | None] = []
    parts = []
    for wanted in metadata.get("include", ()):
        some, count = there.get(wanted["class"], []), wanted["count"]
        parts.append(nearness(len(some), count))
        if "color" in wanted:
            parts.append(nearness(sum(colour(image, one, wanted["class"]) == wanted["color"] for one in some), count))
        if "position" in wanted:
            parts.append(placed(some[:count], wanted["position"], groups))
        groups.append(some[:count] or None)
    for unwanted in metadata.get("exclude", ()):
        parts.append(float(len(there.get(unwanted["class"], [])) < unwanted["count"]))
    return sum(parts) / len(parts)


def nearness(found: int, asked: int) -> float:
    """1 - |found - asked| / asked, at least 0."""
    return max(0.0, 1 - abs(found - asked) / asked)


def placed(some: Sequence[Found], position: Sequence[Any], groups: Sequence[Sequence[Found] | None]) -> float:
    """The share of the pairs of these and the objects that they refer to whose relation is the one asked for."""
    relation, target = position
    others = groups[target] or ()
    pairs = [relation in relations(one, other) for one in some for other in others]
    return sum(pairs) / len(pairs) if pairs else 0.0


def relations(one: Found, other: Found) -> set[str]:
    """Where `one` is as seen from `other`: none, one or two of left of, right of, above, below."""
    offset, reach = [], []
    for low, high in ((0, 2), (1, 3)):  # across, down
        offset.append((one.box[low] + one.box[high] - other.box[low] - other.box[high]) / 2)
        reach.append(OVERLAP * (one.box[high] - one.box[low] + other.box[high] - other.box[low]))
    distance = math.hypot(*offset)
    beyond = [math.copysign(max(abs(a) - b, 0.0), a) for a, b in zip(offset, reach, strict=True)]
    if max(map(abs, beyond)) < 1e-3:
        return set()
    names = (("left of", "right of"), ("above", "below"))
    pairs = zip(names, (each / distance for each in beyond), strict=True)
    return {name[share > 0] for name, share in pairs if abs(share) > 0.5}


# ---- rewards ----


def strict(images: Tensor, metadata: Sequence[Mapping[str, Any]]) -> Tensor:
    """GenEval's own 0 or 1 of each picture."""
    return scored(images, metadata, strict_score)


def graded(images: Tensor, metadata: Sequence[Mapping[str, Any]]) -> Tensor:
    """How much of what is asked for is there, 0 to 1, of each picture."""
    return scored(images, metadata, graded_score)


def scored(images: Tensor, metadata: Sequence[Mapping[str, Any]], score: Callable[..., float]) -> Tensor:
    if not all(more.get("include") or more.get("exclude") for more in metadata):
        raise ValueError("the metadata of a prompt has neither `include` nor `exclude`: is its file one of GenEval's?")
    detect, colour = networks(str(images.device))
    pairs = zip(images, metadata, strict=True)
    return torch.tensor([score(image, detect(image), more, colour) for image, more in pairs], device=images.device)


# ---- networks ----


@cache
def networks(device: str) -> tuple[Detect, Colour]:
    """The detector, and what tells colours; loaded once."""
    return detector(device), colours(device)


def picture(image: Tensor) -> Any:
    """[3, height, width] in [-1, 1] as a picture of Pillow."""
    from PIL import Image

    return Image.fromarray(((image.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy())


def detector(device: str) -> Detect:
    from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation

    name = os.environ.get("GENEVAL_DETECTOR", "facebook/mask2former-swin-small-coco-instance")
    processor = AutoImageProcessor.from_pretrained(name)
    model = Mask2FormerForUniversalSegmentation.from_pretrained(name).to(device).eval()

    @torch.no_grad()
    def detect(image: Tensor) -> Objects:
        seen = model(**processor(images=picture(image), return_tensors="pt").to(device))
        (result,) = processor.post_process_instance_segmentation(
            seen, threshold=THRESHOLD, target_sizes=[tuple(image.shape[1:])], return_binary_maps=True
        )
        objects: dict[str, list[Found]] = {}
        for segment, mask in zip(result["segments_info"], result["segmentation"], strict=False):  # of nothing there is one map
            rows, columns = mask.bool().nonzero(as_tuple=True)
            if len(rows):
                box = (int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1)
                found = Found(box, float(segment["score"]), mask.bool().cpu())
                objects.setdefault(model.config.id2label[segment["label_id"]], []).append(found)
        return objects

    return detect


def colours(device: str) -> Colour:
    from transformers import AutoProcessor, CLIPModel

    name = os.environ.get("GENEVAL_CLIP", "openai/clip-vit-large-patch14")
    processor, model = AutoProcessor.from_pretrained(name), CLIPModel.from_pretrained(name).to(device).eval()

    @torch.no_grad()
    def colour(image: Tensor, found: Found, kind: str) -> str:
        ground = image if found.mask is None else torch.where(found.mask.to(image.device), image, 0.2)  # grey, as in GenEval
        left, top, right, bottom = (round(edge) for edge in found.box)
        texts = [f"a photo of a {name} {kind}" for name in COLOURS]
        inputs = processor(text=texts, images=picture(ground[:, top:bottom, left:right]), return_tensors="pt", padding=True)
        return COLOURS[int(model(**inputs.to(device)).logits_per_image.argmax())]

    return colour
