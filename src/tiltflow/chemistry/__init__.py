"""Molecules: their atoms as tensors, geometries from SMILES, bonds from geometries. It knows nothing of models and rewards."""
