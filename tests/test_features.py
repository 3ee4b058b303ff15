"""Fréchet distances of a prompt's few pictures, and diversity in features of a user's function."""

from __future__ import annotations

import math
import sys
from itertools import combinations
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from tiltflow.conditions import Item
from tiltflow.evaluation.features import feature_extractor, features_of, frechet_distance, frechet_distances
from tiltflow.evaluation.metrics.diversity import diversity
from tiltflow.evaluation.samples import Asked
from tiltflow.evaluation.table import of_prompts
from tiltflow.streams import stream


def normal(*shape: int, name: str = "features") -> Tensor:
    return torch.randn(shape, generator=stream(0, name), dtype=torch.float64)


@pytest.mark.parametrize("width", [3, 40])
def test_the_distance_of_groups_is_that_of_each(width: int) -> None:
    """By torchmetrics, from matrices of the width; with more features than pictures too, whose covariances have no inverse."""
    x, y = normal(4, 12, width), 1.5 * normal(4, 9, width, name="others") + 0.3
    expected = [frechet_distance(a, b) for a, b in zip(x, y, strict=True)]
    assert frechet_distances(x, y).tolist() == pytest.approx(expected, rel=1e-5)
    assert frechet_distances(x, x.flip(1)).abs().max() < 1e-12


def test_a_prompts_bias_is_what_theory_says() -> None:
    """In one dimension it is (m_x - m_y)^2 + (s_x - s_y)^2, and s of n normal numbers has mean c sigma and variance
    (1 - c^2) sigma^2, c = sqrt(2 / (n - 1)) Gamma(n / 2) / Gamma((n - 1) / 2)."""
    prompts, n = 4000, 4
    asked = Asked.of_prompts([Item(str(i)) for i in range(prompts)], n)
    base, fresh, tuned = (normal(prompts * n, 1, name=name) for name in ("base", "fresh", "tuned"))
    c = math.sqrt(2 / (n - 1)) * math.gamma(n / 2) / math.gamma((n - 1) / 2)
    bias = 2 / n + 2 * (1 - c**2)
    for features, expected in ((base, bias), (2 * tuned + 3, 9 + 5 / n + (1 - c**2) * 5 + c**2)):
        row = of_prompts(features, fresh, asked)
        assert abs(row["fid_per_prompt"] - expected) < 4 * row["fid_per_prompt_error"]


def test_variance_in_the_features_of_a_users_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The function for DreamSim of docs/text-to-image.md, on a stand-in of the package: half the mean squared distance of two
    pictures of a prompt (2409.08861, appendix G), and pictures come as its network wants them."""
    page = (Path(__file__).parent.parent / "docs" / "text-to-image.md").read_text(encoding="utf-8")
    (code,) = (part.split("```")[0] for part in page.split("```python\n") if part.startswith("# my_features.py"))
    (tmp_path / "my_dreamsim.py").write_text(code)
    seen: list[Tensor] = []

    class Network:
        def embed(self, images: Tensor) -> Tensor:
            seen.append(images)
            return images.mean((2, 3)) + images[:, :, 0, 0]

    stand_in = ModuleType("dreamsim")
    stand_in.dreamsim = lambda pretrained: (Network(), None)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "dreamsim", stand_in)
    monkeypatch.syspath_prepend(tmp_path)
    images = torch.rand(6, 3, 20, 20, generator=stream(1, "pictures")) * 2 - 1
    features = features_of(images, feature_extractor("my_dreamsim:dreamsim"), 4, "cpu")
    assert [tuple(each.shape) for each in seen] == [(4, 3, 224, 224), (2, 3, 224, 224)]
    assert torch.cat(seen).mean().item() == pytest.approx(((images + 1) / 2).mean().item(), abs=0.01)
    assert features.norm(dim=1).tolist() == pytest.approx([1] * 6)
    found = diversity(features, Asked.of_prompts([Item("a"), Item("b")], 3))
    pairs = [(features[i] - features[j]).square().sum().item() for k in (0, 3) for i, j in combinations(range(k, k + 3), 2)]
    assert found["variance"] == pytest.approx(sum(pairs) / len(pairs) / 2)
