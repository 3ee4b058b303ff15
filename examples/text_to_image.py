"""Text-to-image: a LoRA that makes a pipeline follow its prompts' colours, and plain diffusers with it. Needs '.[diffusers]'.

python examples/text_to_image.py [steps of tuning]

`tiles-pipeline` is a Stable Diffusion in miniature that ships; `from_diffusers` takes the name or the folder of a large one.
"""

import sys

import tiltflow

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 30
COLOURS = ("red", "green", "blue")
PROMPTS = [f"{what} on a {colour} background" for what in ("weapon", "armour", "potion") for colour in COLOURS]
HELD_OUT = [f"undead on a {colour} background" for colour in COLOURS] * 4


def reward(
    images, prompts
):  # [batch, 3, height, width] in [-1, 1], and a text for each: how near all of a picture is to its colour
    wanted = [[1.0 if name in prompt else -1.0 for name in COLOURS] for prompt in prompts]
    return -(images - images.new_tensor(wanted)[:, :, None, None]).square().mean((1, 2, 3))


model = tiltflow.load("tiles-pipeline")
before = reward(model.sample(HELD_OUT, seed=0), HELD_OUT).mean()
tuned = tiltflow.tune(
    model,
    reward,
    tiltflow.AdjointMatching(beta=0.002, num_inference_steps=10, bootstrap=0.5, train_timesteps=[{"count": 4}]),
    tiltflow.Training(max_train_steps=STEPS, prompts_per_step=4, num_generations=4),
    optimizer=tiltflow.Optimizer(learning_rate=1e-3),
    conditions=PROMPTS,
    adapter=tiltflow.Adapter(rank=8),
)
after = reward(tuned.sample(HELD_OUT, seed=0), HELD_OUT).mean()
print(f"mean reward of prompts that were not trained on: {before:.3f} before, {after:.3f} after")

tuned.save("runs/colours")  # pytorch_lora_weights.safetensors
plain = tiltflow.load("tiles-pipeline").pipeline  # that of diffusers, without a LoRA
plain.load_lora_weights("runs/colours")
plain("undead on a red background", height=32, width=32, num_inference_steps=20).images[0].save("runs/colours/red.png")
