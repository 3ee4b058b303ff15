"""A reward of your own: digits that are the same in a mirror. Checked first, then a model that ships is tuned for it.

python examples/own_reward.py [steps of tuning]
"""

import sys

import tiltflow
from tiltflow.testing import check_reward

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 100


def symmetry(images):  # [batch, 1, 28, 28] in [-1, 1] -> [batch], higher is better
    return -(images - images.flip(-1)).square().mean((1, 2, 3))


model = tiltflow.load("digits-latent-flow")  # gradients reach its latents through its decoder
check_reward(symmetry, model.sample(8))  # each sample has a value of its own, the same twice, with the slope that it says
tuned = tiltflow.tune(
    model,
    symmetry,
    tiltflow.AdjointMatching(beta=0.05, num_inference_steps=20),
    tiltflow.Training(max_train_steps=STEPS, train_batch_size=128, ema_decay=0.95),
    optimizer=tiltflow.Optimizer(learning_rate=1e-3),
    evaluation=tiltflow.Evaluation(num_samples=512, judge="digits-judge"),
    output="runs/symmetric",
)
before, after = symmetry(model.sample(512)).mean(), symmetry(tuned.sample(512)).mean()
print(f"mean reward: {before:.3f} before, {after:.3f} after; how close to the target: runs/symmetric/report.html")
