"""Checks of the network: is it the velocity field of the law that it samples, and does the tuned model start as the base."""

# Mutation tests: none: thresholds, and words for them

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tiltflow.models.consistency import TIMES, WRONG_CLOCK, consistency
from tiltflow.models.model import Model
from tiltflow.runs.doctor.patient import Finding, Patient
from tiltflow.user_code import tried


def denoising(patient: Patient) -> Iterator[Finding]:
    """Check that the network is the velocity field of the law that it samples."""
    if isinstance(patient.model, Model):
        yield examine_model(patient.model)


def examine_model(model: Model, data: Tensor | None = None) -> Finding:
    """Check that the network of a model is used as it was trained: with the right time convention, the right direction and the
    right kind of prediction (`tiltflow.models.consistency`). Returns a green finding, or an amber one with a remedy.

    Args:
        data: 32 or more samples [n, *event] of the training data. Without them the model is checked on its own samples, which a
            wrong network may fit by chance: a Gaussian around 0 that is read backwards is one.

    >>> from tiltflow import Flow, Model
    >>> examine_model(Model(Flow(lambda x, time: -x), (2,))).level
    'amber'

    Raises InputError if the network cannot be called, or for data of another shape.
    """
    with tried():
        found = consistency(model, data)
    errors = ", ".join(f"{error:.2g}" for error in found.errors)
    whose = "of its own samples" if data is None else "of the data"
    text = f"the denoising error is {errors} of the variance {whose} at t = {', '.join(f'{t:g}' for t in TIMES)}"
    if found.wrong:
        text += f": up to {found.worst:.3g} times that of the best affine guess, so it is not the velocity of their law"
        return Finding("denoising", "amber", text, WRONG_CLOCK)
    return Finding("denoising", "green", text)


def ratio(patient: Patient) -> Iterator[Finding]:
    """Check that before the first update the tuned model is the base, and has the same velocities in training as in sampling:
    the likelihood ratio is 1."""
    x = patient.batch.x[patient.few]
    t = torch.tensor(0.5, device=x.device)
    with torch.no_grad():
        sampling, base = patient.bound(patient.tuned)(x, t), patient.bound(patient.base)(x, t)
    with torch.enable_grad():
        training = patient.batch.bind(patient.tuned).select(slice(min(len(x), 4)))(x[:4], t).detach()
    scale = sampling.abs().max().item() or 1.0
    layout = (training - sampling[: len(training)]).abs().max().item() / scale
    moved = (sampling - base).abs().max().item() / scale
    if layout > 1e-2:
        fix = "switch dropout and batch statistics off: network.eval()"
        yield Finding("ratio", "red", f"velocities in training differ from those in sampling by {layout:.1%}", fix)
    elif moved > 1e-2:
        fix = "start from an adapter that is zero, or from a copy of the base"
        yield Finding("ratio", "amber", f"before training the model is {moved:.1%} from the base", fix)
    elif layout > 1e-4:
        text = f"sampling and training agree to {layout:.1e}: the precision of the network"
        yield Finding("ratio", "amber", text, "fine for most; float32 weights bring it to 1e-6")
    else:
        yield Finding("ratio", "green", f"1 before the first update (velocities agree to {max(layout, moved):.0e})")
