"""A policy: actions cloned from recorded behaviour by flow matching, then tilted by a value, at each observation by itself.

python examples/policy.py [steps of tuning]
"""

import sys
from math import exp
from pathlib import Path

import numpy as np
import torch

import tiltflow
from tiltflow.pretraining.recipe import read_pretraining
from tiltflow.pretraining.run import run_pretraining

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 300
RIGHT, ARM, BETA = 0.3, 0.7, 0.5

# recorded behaviour: whatever it sees, it goes to -0.7 or, less often, to 0.7; episodes of 20 rows
rng = np.random.default_rng(0)
seen, right = rng.uniform(-1, 1, (4000, 1)), rng.random((4000, 1)) < RIGHT
actions = np.where(right, ARM, -ARM) + 0.2 * rng.normal(size=(4000, 1))
Path("runs").mkdir(exist_ok=True)
np.savez("runs/behaviour.npz", observations=seen, actions=actions, terminals=np.arange(4000) % 20 == 19)

# `tiltflow pretrain behaviour-policy --data runs/behaviour.npz --output runs/behaviour`, smaller
small = ["horizon=1", "hidden=64", "layers=2", "training.learning_rate=2e-3", f"training.max_train_steps={5 * STEPS}"]
run_pretraining(read_pretraining("behaviour-policy", small), Path("runs/behaviour.npz"), Path("runs/behaviour"), name="example")


def value(actions, metadata):  # Q(s, a) = s a; a value that is learned: docs/control.md
    return actions[:, 0] * actions.new_tensor([row["observation"][0] for row in metadata])


policy = tiltflow.load("runs/behaviour")
tuned = tiltflow.tune(
    policy,
    value,
    tiltflow.AdjointMatching(beta=BETA, num_inference_steps=20),
    tiltflow.Training(max_train_steps=STEPS, prompts_per_step=128, num_generations=1),
    optimizer=tiltflow.Optimizer(learning_rate=1e-3),
    conditions=torch.tensor(seen[:1000], dtype=torch.float32),
)
for s in (-1.0, 0.0, 1.0):
    before, after = ((each.act(torch.full((4000, 1), s)) > 0).float().mean() for each in (policy, tuned))
    odds = RIGHT / (1 - RIGHT) * exp(2 * ARM * s / BETA)  # of behaviour times exp(Q / beta)
    print(f"at {s:+.0f}, to the right: {before:.2f} before, {after:.2f} after, {odds / (1 + odds):.2f} under the target law")
