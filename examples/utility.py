"""A utility of the whole law, in stages: the best tenth of digits with thicker strokes, the others as they are.

python examples/utility.py [steps of each stage] [samples for the utility]
"""

import sys

import tiltflow
from tiltflow.rewards.stroke_thickness import StrokeThickness
from tiltflow.utilities.superquantile import Superquantile

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 200
SAMPLES = int(sys.argv[2]) if len(sys.argv) > 2 else 2000

model = tiltflow.load("digits-latent-flow")
utility = tiltflow.OfLaw(Superquantile(share=0.1), reward=StrokeThickness().build(), num_samples=SAMPLES)
stages = tiltflow.stages(
    model,
    utility,
    tiltflow.TiltMatching(beta=20.0, num_inference_steps=20, proposal="auto", num_passes=20, regression_batch_size=256),
    tiltflow.Training(max_train_steps=STEPS, train_batch_size=512),
    count=3,
    base="first",  # beta is then the price of the KL from the model that was loaded
    mixing=0.5,  # a stage tunes for half of the last reward and half of the new one, which settles
    optimizer=tiltflow.Optimizer(learning_rate=1e-3),
    evaluation=tiltflow.Evaluation(num_samples=SAMPLES),
    output="runs/thick",
)
for stage in stages:
    print(f"stage {stage.number}: the best tenth has {stage.before} before, {stage.after} after")
print("runs/thick/report.html shows all stages; tiltflow.load('runs/thick') is the model of the last one")
