"""A network of your own, in a convention of its own: made into a model, tuned, saved and loaded again.

python examples/own_network.py [steps of tuning]
"""

import sys

import torch
from torch.nn import Linear, Sequential, SiLU

import tiltflow
from tiltflow.flows.interpolant import Cosine

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 200


class Net(torch.nn.Module):  # v-prediction, on a cosine path whose time 0 is data
    def __init__(self, width=64):
        super().__init__()
        self.body = Sequential(Linear(3, width), SiLU(), Linear(width, width), SiLU(), Linear(width, 2))

    def forward(self, x, time):
        return self.body(torch.cat([x, time[:, None]], 1))


def train(network, steps):  # a stand-in for your own training: points around a ring
    adam = torch.optim.Adam(network.parameters(), 2e-3)
    for _ in range(steps):
        data, noise, angle = torch.randn(256, 2), torch.randn(256, 2), torch.rand(256, 1) * torch.pi / 2
        data = (2 + 0.2 * torch.randn(256, 1)) * data / data.norm(dim=1, keepdim=True)
        predicted = network(angle.cos() * data + angle.sin() * noise, angle[:, 0] / (torch.pi / 2))
        loss = (predicted - angle.cos() * noise + angle.sin() * data).square().mean()
        loss.backward()
        adam.step()
        adam.zero_grad()


if __name__ == "__main__":
    torch.manual_seed(0)
    train(network := Net(), 10 * STEPS)
    flow = tiltflow.Flow(network, "v", Cosine(), time_direction="data-to-noise")
    model = tiltflow.Model(flow, event_shape=(2,))
    print(tiltflow.examine_model(model).level)  # green: the convention is the right one
    method, training = tiltflow.AdjointMatching(num_inference_steps=20), tiltflow.Training(max_train_steps=STEPS)
    tuned = tiltflow.tune(model, lambda x: x[:, 0], method, training, optimizer=tiltflow.Optimizer(learning_rate=2e-3))
    tuned.save("runs/ring", factory="own_network:Net", arguments={"width": 64})
    with tiltflow.allow_code():  # the folder names code
        again = tiltflow.load("runs/ring").sample(4000)
    before, after = model.sample(4000)[:, 0], again[:, 0]
    target = before.softmax(0) @ before  # base samples, weighted by exp(r / beta)
    print(f"mean reward: {before.mean():.2f} before, {after.mean():.2f} after, {target:.2f} under the target law")
