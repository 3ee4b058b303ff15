"""What fits a card: the doctor's forecast for six published models at two sizes, from their configs alone.

    python benchmarks/what_fits.py                     # the table of docs/text-to-image.md
    python benchmarks/what_fits.py --model flux.1-dev --size 512

Adjoint Matching toward PickScore in bfloat16, 32 pictures a step, one at a time, 20 sampling steps of which 5 enter the loss.
"""

from __future__ import annotations

import argparse
import warnings
from typing import Any

from tiltflow.runs.doctor.architecture import facts
from tiltflow.runs.doctor.forecast import Known, of_recipe
from tiltflow.runs.recipe import Recipe, read_recipe

CARDS = (12, 16, 24, 48, 80)
"""Gigabytes of memory."""
LESS = {"gradient_checkpointing": True, "dtype": {"default": "bfloat16", "vae": "bfloat16"}}
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "LoRA": ({}, {}),
    "LoRA, less memory": (LESS, {"offload": True}),
    "LoRA, nf4": ({**LESS, "quantization": "nf4"}, {"offload": True}),
    "full": ({**LESS, "adapter": None}, {"offload": True, "mixed_precision": "bf16", "use_8bit_adam": True}),
}
"""Settings of the model and of the training."""


def recipe(model: str, size: int, setting: str) -> Recipe:
    """The recipe of a row and a column."""
    fact, (of_model, of_training) = facts()[model], SETTINGS[setting]
    denoiser = "unet" if "unet" in fact["components"] else "transformer"
    network = {"diffusers": fact["names"][0], "dtype": "bfloat16", "height": size, "width": size, **of_model}
    if "quantization" in network:
        network["quantization"] = {denoiser: network["quantization"]}
    guided = "none" if "flux" in model else "rollout"
    sizes = {"prompts_per_step": 8, "num_generations": 4, "micro_batch_size": 1, "guidance_mode": guided}
    return read_recipe(
        {
            "model": network,
            "prompts": {"texts": ["a photograph"]},
            "reward": {"name": "pick-score", "dtype": "bfloat16"},
            "method": {"name": "adjoint-matching", "beta": 0.1, "num_inference_steps": 20, "train_timesteps": [{"count": 5}]},
            "training": {**sizes, **of_training},
            "evaluation": {"num_prompts": 1, "num_generations": 2},
        },
        "what_fits",
    )


def cell(model: str, size: int, setting: str, known: Known) -> str:
    """The peak, and the smallest card that it fits."""
    need = of_recipe(recipe(model, size, setting), known=known).on_a_gpu / 2**30
    card = next((str(card) for card in CARDS if need <= card), "none")
    return f"{need:.1f} ({card})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(facts()), action="append")
    parser.add_argument("--size", type=int, choices=(512, 1024), action="append")
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    print("| model | pixels | " + " | ".join(SETTINGS) + " |", flush=True)
    print("|---|---" * 1 + "|---" * len(SETTINGS) + "|", flush=True)
    for model in chosen.model or sorted(facts()):
        for size in chosen.size or (512, 1024):
            known: Known = {}
            row = [cell(model, size, setting, known) for setting in SETTINGS]
            print(f"| {model} | {size} | " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
