"""What fits a card: the doctor's forecast for six published models at two sizes, from their configs alone.

    python benchmarks/what_fits.py                     # the table of docs/memory.md
    python benchmarks/what_fits.py --model flux.1-dev --size 512

A LoRA in bfloat16 by Adjoint Matching toward PickScore with gradient checkpointing: 32 pictures a step, one at a time, 10
sampling steps of which 3 enter the loss. Where a card has less than that needs, a setting is added that lowers the phase with
the peak, and so on.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator
from typing import Any

from tiltflow.runs.doctor.architecture import facts
from tiltflow.runs.doctor.forecast import Known, of_recipe
from tiltflow.runs.recipe import Recipe, read_recipe

CARDS = (12, 16, 24, 48, 80)
"""Gigabytes of memory."""
TINY = {
    "stable-diffusion-v1-5": "madebyollin/taesd",
    "stable-diffusion-xl": "madebyollin/taesdxl",
    "stable-diffusion-3.5-medium": "madebyollin/taesd3",
    "flux.1-dev": "madebyollin/taef1",
}
"""Small decoders."""
PHASES = {"offload": None, "text_encoders: cpu": "encoding", "vae_tiling": "reward", "nf4": None, "TAESD": "reward"}
"""Settings that need less, from no change of the result to the largest, with the phase that each is for; None is several."""


def recipe(model: str, size: int, settings: tuple[str, ...]) -> Recipe:
    """The recipe of a model with these settings."""
    fact = facts()[model]
    denoiser = "unet" if "unet" in fact["components"] else "transformer"
    of_model: dict[str, Any] = {
        "diffusers": fact["names"][0],
        "dtype": {"default": "bfloat16", "vae": "bfloat16"},
        "height": size,
        "width": size,
        "gradient_checkpointing": True,
        "text_encoders": "cpu" if "text_encoders: cpu" in settings else "free",
        "vae_tiling": "vae_tiling" in settings and "TAESD" not in settings,
        "quantization": {denoiser: "nf4"} if "nf4" in settings else {},
        "components": {"vae": TINY[model]} if "TAESD" in settings else {},
    }
    guided = "none" if "flux" in model else "rollout"
    sizes = {"prompts_per_step": 8, "num_generations": 4, "micro_batch_size": 1, "guidance_mode": guided}
    return read_recipe(
        {
            "model": of_model,
            "prompts": {"texts": ["a photograph"]},
            "reward": {"name": "pick-score", "dtype": "bfloat16"},
            "method": {"name": "adjoint-matching", "beta": 0.1, "num_inference_steps": 10, "train_timesteps": [{"count": 3}]},
            "training": {**sizes, "offload": "offload" in settings},
            "evaluation": {"num_prompts": 1, "num_generations": 2, "batch_size": 1},
        },
        "what_fits",
    )


def forecasts(model: str, size: int) -> Iterator[tuple[tuple[str, ...], float]]:
    """Settings with the gigabytes at their peak, until the smallest card has them."""
    known: Known = {}
    vae = facts()[model]["components"]["vae"]
    left = [name for name in PHASES if (name != "TAESD" or model in TINY)]
    if size <= vae.get("sample_size", 0):  # a picture is one tile
        left.remove("vae_tiling")
    found = of_recipe(recipe(model, size, ()), known=known)
    chosen: tuple[str, ...] = ()
    yield chosen, found.on_a_gpu / 2**30
    while found.on_a_gpu > CARDS[0] * 2**30:
        name = next((name for name in left if PHASES[name] in (None, found.worst)), None)
        if name is None:
            return
        left.remove(name)
        less = of_recipe(recipe(model, size, (*chosen, name)), known=known)
        if less.on_a_gpu < 0.99 * found.on_a_gpu:
            chosen, found = (*chosen, name), less
            yield chosen, found.on_a_gpu / 2**30
            for other in chosen[:-1]:  # which may not be needed any more
                without = tuple(setting for setting in chosen if setting != other)
                yield without, of_recipe(recipe(model, size, without), known=known).on_a_gpu / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(facts()), action="append")
    parser.add_argument("--size", type=int, choices=(512, 1024), action="append")
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    print("| model | pixels | " + " | ".join(f"{card} GB" for card in CARDS) + " |", flush=True)
    print("|---|---" + "|---" * len(CARDS) + "|", flush=True)
    for model in chosen.model or sorted(facts()):
        for size in chosen.size or (512, 1024):
            found = list(forecasts(model, size))
            found.sort(key=lambda each: len(each[0]))  # the fewest that fit
            cells = [next((cell(*each) for each in found if each[1] <= card), "no") for card in CARDS]
            print(f"| {model} | {size} | " + " | ".join(cells) + " |", flush=True)


def cell(settings: tuple[str, ...], need: float) -> str:
    """The peak, and the settings that it is of.

    >>> cell(("offload", "nf4"), 11.04)
    '11.0: offload, nf4'
    """
    return f"{need:.1f}: {', '.join(settings)}" if settings else f"{need:.1f}"


if __name__ == "__main__":
    main()
