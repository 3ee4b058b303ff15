"""Policy gradients: what the methods that tune a sampler step by step share, whatever their advantages are."""
