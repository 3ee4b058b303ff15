"""A molecule: isomers of C7H10O2 with a larger dipole moment by xTB, a reward without a gradient. Needs '.[molecules]'.

python examples/molecule.py [steps of tuning] [samples]
"""

import sys
from pathlib import Path

import tiltflow
from tiltflow.chemistry.atoms import molecules_of
from tiltflow.chemistry.molecule_files import to_xyz
from tiltflow.chemistry.validity import structures
from tiltflow.rewards.dipole import Dipole

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 80
SAMPLES = int(sys.argv[2]) if len(sys.argv) > 2 else 64

model, dipole = tiltflow.load("qm9-isomers-flow"), Dipole().build()  # debye
tuned = tiltflow.tune(
    model,
    dipole,
    tiltflow.TiltMatching(beta=1.0, num_inference_steps=20, shift=0.4, solver="euler", num_passes=40, regression_batch_size=64),
    tiltflow.Training(max_train_steps=STEPS, train_batch_size=2 * SAMPLES, ema_decay=0.9),
    optimizer=tiltflow.Optimizer(learning_rate=3e-4),
)
Path("runs").mkdir(exist_ok=True)
for name, each in (("before", model), ("after", tuned)):
    samples = each.sample(SAMPLES)
    moments, molecules = dipole(samples), molecules_of(samples)
    valid = sum(found.valid for found in structures(molecules))
    print(f"{name}: mean dipole moment {moments.mean():.2f} debye, {valid} of {SAMPLES} valid")
    Path(f"runs/{name}.xyz").write_text(to_xyz(molecules, moments.tolist()))  # for any viewer of molecules
