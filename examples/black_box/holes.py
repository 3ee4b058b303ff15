"""The reward, in a process of its own that may have other packages than the training: how many holes a digit has."""

import torch
from scipy.ndimage import label


def score(images):  # [batch, 1, height, width] in [-1, 1] -> [batch]; any program that ends in numbers, without a gradient
    background = (images[:, 0] < -0.2).numpy()
    return torch.tensor([label(picture)[1] - 1.0 for picture in background])
