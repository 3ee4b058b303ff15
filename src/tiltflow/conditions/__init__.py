"""What a sample is asked for: class labels, prompts."""
