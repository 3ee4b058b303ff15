"""Models that are sampled, tuned, saved and loaded: networks on tensors, and diffusers pipelines."""
