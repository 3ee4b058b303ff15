"""Compiled networks are the networks: all that is asked of one, by a backend of torch.compile that needs no compiler."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_recipe
from tiny_pipelines import tiny_pipeline
from torch import Tensor, nn
from torch.testing import assert_close

from tiltflow.errors import InputError
from tiltflow.flows.adapter import base_of
from tiltflow.flows.at_weights import AtWeights
from tiltflow.flows.counting import CountEvaluations
from tiltflow.flows.field import VelocityField
from tiltflow.flows.flow import Flow
from tiltflow.flows.linearize import linearize
from tiltflow.flows.precision import tf32
from tiltflow.models.compiled import compiled, try_compiled
from tiltflow.models.denoiser import Denoiser
from tiltflow.models.trainable import Adapter, adapted, merged
from tiltflow.networks.mlp import Mlp
from tiltflow.optimization import StoredWeights
from tiltflow.runs.recipe import Recipe
from tiltflow.runs.run import run
from tiltflow.runs.run_files import read_records
from tiltflow.settings import read_yaml, validate
from tiltflow.streams import new_network, stream
from tiltflow.training.records import of_machine

RUNS: dict[str, dict[str, Any]] = {
    "adjoint-matching": {"num_inference_steps": 4, "beta": 0.1, "bootstrap": 1.0, "control_from": 0.3},
    "score-as-action": {"num_inference_steps": 4, "beta": 0.1},
    "orw-cfm-w2": {"num_inference_steps": 2, "num_passes": 2, "min_effective_sample_size": 1},
    "path-reweighted": {
        "num_inference_steps": 4,
        "path_steps": 4,
        "num_passes": 2,
        "beta": 3.0,
        "min_effective_sample_size": 1,
    },
    "tilt-matching": {},
}


@pytest.fixture(autouse=True)
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("tiltflow.models.compiled.BACKEND", "aot_eager")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def network() -> nn.Module:
    return new_network(Mlp(dimension=3, hidden=8, layers=1), 0)


def everything(tuned: Flow, base: VelocityField, other: VelocityField, x: Tensor) -> list[Tensor]:
    """What the library asks of networks: rollouts, products with the Jacobian, gradients of weights; the base, other weights,
    and 16 bits in between."""
    t, found = torch.tensor(0.3), list[Tensor]()
    for flow in (tuned, base, other, tuned, base):
        with torch.no_grad():
            found.append(flow(x, t))
        v, pullback = linearize(flow, x, t)
        found += [v, pullback(torch.ones_like(x))]
    found += torch.autograd.grad(tuned(x, t.expand(len(x))).square().sum(), list(tuned.parameters()))
    with torch.no_grad():
        found += [replace(tuned, autocast=torch.bfloat16)(x, t), tuned(x[:2], t)]
    return found


@pytest.mark.parametrize("adapter", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_compiled_network_computes_what_it_did(adapter: bool) -> None:
    net = adapted(network(), Adapter(rank=2), 0) if adapter else network()
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:  # a new LoRA is zero
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=stream(1)))
    tuned = Flow(net)
    base, weights = base_of(tuned), [1.5 * p.detach() for p in tuned.parameters()]
    other = AtWeights(tuned, StoredWeights(tuned.parameters(), weights))
    x, names = torch.randn(4, 3, generator=stream(2)), list(net.state_dict())
    expected = everything(tuned, base, other, x)
    with compiled("whole", net, base.network):
        try_compiled(tuned, net, x)
        try_compiled(base, base.network, x)
        with CountEvaluations(net, base.network) as count:
            found = everything(tuned, base, other, x)
        assert count.total == (10 + 1 + 1) * 4 + 2  # those that are counted without
        assert list(net.state_dict()) == names
        alone = copy.deepcopy(net)
        assert torch._dynamo.utils.counters["frames"]["ok"] > 3  # it was compiled, not left out
        time = torch.full((4,), 0.3)
        with torch.no_grad():  # a copy is not compiled, and has weights of its own
            assert_close(alone(x, time), net(x, time))
            next(iter(alone.parameters())).zero_()
            assert_close(merged(net)(x, time), net(x, time))
    for one, same in zip(expected, found, strict=True):
        assert_close(one, same)
    assert "forward" not in vars(net)
    assert all(torch.equal(a, b) for a, b in zip(everything(tuned, base, other, x), expected, strict=True))


def test_what_cannot_be_compiled_is_one_line() -> None:
    class Blocks(nn.Module):
        _repeated_blocks: tuple[str, ...] = ()

    for how, net, said in (
        ("whole", lambda x, t: x, "no torch module"),
        ("regional", network(), "use whole"),
        ("regional", Denoiser(Blocks(), lambda *arguments: arguments[1]), "Blocks does not say which of its blocks"),
    ):
        with pytest.raises(InputError, match=f"training.compile: .*{said}"), compiled(how, net):
            pass


def broken(graph: torch.fx.GraphModule, inputs: object) -> Any:
    raise RuntimeError("No working C++ compiler found")


def wrong(graph: torch.fx.GraphModule, inputs: object) -> Any:
    return lambda *arguments: [1.1 * each for each in graph(*arguments)]


@pytest.mark.parametrize(
    ("which", "said"), [(broken, "No working C.. compiler found"), (wrong, "changes the value .* by 0.1 ")]
)
def test_a_compiler_that_fails_is_one_line_before_the_first_step(
    which: Any, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tiltflow.models.compiled.BACKEND", which)
    tree = read_yaml(tiny_recipe(tmp_path))
    tree["training"]["compile"] = "whole"
    with pytest.raises(InputError, match=f"^training.compile: .*{said}.*; leave it out$"):
        run(validate(Recipe, tree, "recipe"), tmp_path / "run")
    assert not (tmp_path / "run" / "recipe.yaml").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")
def test_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.config

    monkeypatch.setattr("tiltflow.models.compiled.BACKEND", "inductor")
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (None, str(tmp_path / "g++")))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    with compiled("whole", net := network()), pytest.raises(InputError, match=r"^training.compile: .*compiler.*leave it out$"):
        try_compiled(Flow(net), net, torch.zeros(2, 3))


@pytest.mark.slow
@pytest.mark.parametrize("method", RUNS)
def test_compiled_runs_are_the_runs(method: str, tmp_path: Path, unmeasured: None) -> None:
    """With an average of the weights, and micro-batches that do not divide the batch."""
    rows = []
    for how in (None, "whole"):
        tree = read_yaml(tiny_recipe(tmp_path, method={"name": method, **RUNS[method]}))
        tree["training"] |= {"train_batch_size": 6, "micro_batch_size": 4, "compile": how}
        run(validate(Recipe, tree, "recipe"), tmp_path / str(how))
        rows.append([{k: v for k, v in row.items() if not of_machine(k)} for row in read_records(tmp_path / str(how))])
    for one, other in zip(*rows, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "how", "changes"),
    [
        ("stable-diffusion", "regional", {}),
        ("stable-diffusion", "regional", {"adapter": None}),
        ("stable-diffusion", "regional", {"gradient_checkpointing": True}),
        ("stable-diffusion-3", "whole", {}),
        ("flux", "regional", {}),
    ],
)
def test_compiled_pipelines_are_the_pipelines(
    name: str, how: str, changes: dict[str, Any], tmp_path: Path, unmeasured: None
) -> None:
    """With guidance in the rollouts; what was tuned is saved under the same names."""
    source, found = tmp_path / name, []
    tiny_pipeline(name, tmp_path).save_pretrained(source)
    for each in (None, how):
        tree = {
            "model": {"diffusers": str(source), "height": 16, "width": 16, "adapter": {"rank": 2}, **changes},
            "prompts": {"texts": ["a red cat", "a blue dog"], "validation": 0.5},
            "reward": "named-colour",
            "method": {"name": "adjoint-matching", "num_inference_steps": 3},
            "training": {"max_train_steps": 3, "prompts_per_step": 1, "micro_batch_size": 2, "compile": each},
            "evaluation": {"num_prompts": 1, "points": [{"num_inference_steps": 2}]},
        }
        tree["training"]["guidance_mode"] = "none" if name == "flux" else "rollout"
        run(validate(Recipe, tree, "recipe"), tmp_path / str(each))
        weights = {}
        for path in sorted((tmp_path / str(each) / "model").rglob("*.safetensors")):
            weights |= load_file(path)
        rows = [{k: v for k, v in row.items() if not of_machine(k)} for row in read_records(tmp_path / str(each))]
        found.append((weights, rows))
    assert found[0][0].keys() == found[1][0].keys() != set()
    for key, value in found[0][0].items():
        assert_close(found[1][0][key], value, rtol=1e-4, atol=1e-6)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_tf32_is_for_a_while_and_on_cuda_alone() -> None:
    def flags() -> tuple[str, bool]:
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32

    before = flags()
    cases = ((True, "cuda", ("high", True)), (False, "cuda", ("highest", False)), (None, "cuda", before), (True, "cpu", before))
    for allowed, device, expected in cases:
        with tf32(allowed, torch.device(device)):
            assert flags() == expected
        assert flags() == before == ("highest", True)  # matrices in float32, and convolutions in TF32: PyTorch's default
