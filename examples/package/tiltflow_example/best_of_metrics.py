"""A metric: what the method measures, in words."""

from tiltflow.evaluation.metrics import Metric, nothing

METRICS = (Metric("kept", "Samples kept", "Samples of the batch that the model learned.", source="training"),)

measure = nothing
