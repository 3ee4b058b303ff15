"""What is sampled, tuned, saved and loaded: networks on tensors, and pipelines of diffusers."""
