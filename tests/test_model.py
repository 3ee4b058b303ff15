"""Model folders: what is written is what is read, and a damaged folder is one clear line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny import UNET, tiny_classifier, tiny_flow
from torch import nn

from tiltflow.chemistry.atoms import molecules_of
from tiltflow.errors import InputError
from tiltflow.flows.flow import Flow
from tiltflow.flows.interpolant import DiscreteVariancePreserving
from tiltflow.models.model import Model, load
from tiltflow.models.model_folder import load_classifier, model_folder, shipped_models
from tiltflow.plugins import allow_code
from tiltflow.samplers.sampling import Sampling
from tiltflow.streams import new_network


def test_a_saved_model_samples_bit_for_bit_the_same(tmp_path: Path) -> None:
    flow = Flow(new_network(UNET, 3), "epsilon", DiscreteVariancePreserving(num_train_timesteps=10))
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.05)
    model = Model(flow, (1, 8, 8), Sampling(solver="heun", num_inference_steps=3), UNET)
    model.save(tmp_path / "m")
    loaded = load(tmp_path / "m")
    assert loaded.sampling == model.sampling
    assert loaded.flow.interpolant == flow.interpolant
    assert torch.equal(loaded.sample(5, seed=1), model.sample(5, seed=1))
    assert not any(parameter.requires_grad for parameter in loaded.flow.network.parameters())  # type: ignore[attr-defined]


def test_samples_depend_on_the_seed_and_their_number_alone(tmp_path: Path) -> None:
    model = load(tiny_flow(tmp_path / "m"))
    assert torch.equal(model.sample(6, seed=1, batch_size=4)[:4], model.sample(4, seed=1, batch_size=4))
    assert not torch.equal(model.sample(4, seed=1), model.sample(4, seed=2))


def test_networks_of_others_can_be_sampled_but_not_saved(tmp_path: Path) -> None:
    model = Model(Flow(nn.Identity()), (2,))
    with pytest.raises(InputError, match=r"give factory='package\.module:function' that builds it, or save its state_dict"):
        model.save(tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_damaged_folders(tmp_path: Path) -> None:
    folder = tiny_flow(tmp_path / "m")
    weights, config = folder / "model.safetensors", folder / "config.json"
    original, tree = weights.read_bytes(), json.loads(config.read_text())

    weights.write_bytes(original[:100])
    with pytest.raises(InputError, match=r"model\.safetensors: the weights cannot be read"):
        load(folder)
    weights.unlink()
    with pytest.raises(InputError, match=r"model\.safetensors: the weights cannot be read"):
        load(folder)
    weights.write_bytes(original)
    config.write_text(json.dumps(tree | {"network": tree["network"] | {"embedding": 16}}))
    with pytest.raises(InputError, match=r"config\.json says"):
        load(folder)
    config.write_text(json.dumps(tree | {"network": tree["network"] | {"blocks": [1, 2]}}))
    with pytest.raises(InputError, match=r"lacks tensor 'middle\.1"):
        load(folder)
    config.write_text(json.dumps(tree | {"predicton": "v"}))
    with pytest.raises(InputError, match="predicton is not a setting, did you mean 'prediction'"):
        load(folder)
    config.write_text("{")
    with pytest.raises(InputError, match=r"config\.json: cannot be read"):
        load(folder)


def test_wrong_names_and_kinds(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no model 'digits-flwo', did you mean 'digits-flow'"):
        load("digits-flwo")
    with pytest.raises(InputError, match="is neither a model folder nor a run"):
        load(tmp_path)
    with pytest.raises(InputError, match="is a classifier; must be a flow"):
        load(tiny_classifier(tmp_path / "c"))
    with pytest.raises(InputError, match="is a flow; must be a classifier"):
        load_classifier(tiny_flow(tmp_path / "f"))


def test_the_shipped_models_load_and_have_cards() -> None:
    assert shipped_models() == [
        "digits-classifier",
        "digits-diffusion",
        "digits-flow",
        "digits-judge",
        "digits-latent-flow",
        "qm9-flow",
        "qm9-isomers-flow",
    ]
    for name, of_state in (("digits-flow", (1, 28, 28)), ("digits-diffusion", (1, 28, 28)), ("digits-latent-flow", (16,))):
        model = load(name)
        assert model.event_shape == of_state
        x = model.sample(2, sampling=Sampling(num_inference_steps=4))
        assert x.shape == (2, 1, 28, 28)
        assert torch.isfinite(x).all()
    for name, label, numbers in (("qm9-flow", "19 atoms", None), ("qm9-isomers-flow", "C7H10O2", [6] * 7 + [1] * 10 + [8] * 2)):
        molecules = molecules_of(load(name).sample(2, labels=label, sampling=Sampling(num_inference_steps=2)))
        assert [len(each) for each in molecules] == [19, 19]
        assert numbers in (None, molecules[0].numbers.tolist())
    for name in ("digits-classifier", "digits-judge"):
        network, config = load_classifier(name)
        assert network(torch.zeros(2, 1, 28, 28)).shape == (2, len(config.class_names))
    for name in shipped_models():
        assert f"tiltflow pretrain {name}" in (model_folder(name) / "README.md").read_text()


def test_the_judge_shares_nothing_with_the_classifier_of_the_reward() -> None:
    (_, reward), (_, judge) = load_classifier("digits-classifier"), load_classifier("digits-judge")
    assert type(reward.network) is not type(judge.network)


def test_a_network_of_ones_own_is_saved_with_the_function_that_builds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loaded with consent alone, with its clock; sampled bit for bit the same; a tuned copy is saved the same way."""
    (tmp_path / "own_networks.py").write_text(
        "from torch import nn\nimport torch\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, width=3):\n        super().__init__()\n        self.a = nn.Linear(2, width)\n"
        "        self.b = nn.Linear(width, 2)\n"
        "    def forward(self, x, time):\n        return self.b(torch.tanh(self.a(x))) * time[:, None] / 1000\n"
        "def wrong():\n    return 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    from own_networks import Net  # type: ignore[import-not-found]

    model = Model(Flow(Net(width=5), time_scale=1000.0, time_direction="data-to-noise"), (2,), Sampling(num_inference_steps=3))
    model.save("mine", factory="own_networks:Net", arguments={"width": 5})
    with pytest.raises(InputError, match=r"its network is built by own_networks:Net, which is code; .* --allow-code"):
        load("./mine")
    with allow_code():
        again = load("./mine")
    assert torch.equal(again.sample(4, seed=1), model.sample(4, seed=1))
    again.save("copy")
    with allow_code():
        assert torch.equal(load("./copy").sample(4), model.sample(4))
    for factory, arguments, message in (
        ("own_networks:Net", {}, r"its a\.bias is \[3\], this model's is \[5\]"),
        ("own_networks:wrong", {}, "must return a torch module, and returns int"),
        ("own_networks:Nat", {}, "did you mean 'Net'"),
        ("torch.nn:Linear", {"in_features": 2, "out_features": 2}, "only this model has a.bias"),
    ):
        with pytest.raises(InputError, match=message):
            model.save("other", factory=factory, arguments=arguments)
    assert not (tmp_path / "other").exists()
