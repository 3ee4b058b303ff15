"""Labels: a class-conditional network, each class tilted by itself, by a reward that may depend on the class.

python examples/labels.py [steps of tuning]
"""

import sys

import torch
from torch.nn import Embedding, Linear, Sequential, SiLU

import tiltflow

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 200


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.classes, self.body = Embedding(3, 8), Sequential(Linear(10, 64), SiLU(), Linear(64, 64), SiLU(), Linear(64, 1))

    def forward(self, x, time, labels):  # labels: int64 [batch]
        return self.body(torch.cat([x, time[:, None], self.classes(labels)], 1))


torch.manual_seed(0)
network = Net()
adam = torch.optim.Adam(network.parameters(), 2e-3)
for _ in range(10 * STEPS):  # a stand-in for your own training: class c is N(c - 1, 1/4)
    labels, time, noise = torch.randint(3, (256,)), torch.rand(256, 1), torch.randn(256, 1)
    data = labels[:, None] - 1 + 0.5 * torch.randn(256, 1)
    loss = (network(time * data + (1 - time) * noise, time[:, 0], labels) - (data - noise)).square().mean()
    adam.zero_grad()
    loss.backward()
    adam.step()


def reward(x, labels):  # down for the first class, nothing for the second, up for the third
    return (labels - 1) * x[:, 0]


model = tiltflow.Model(tiltflow.Flow(network), event_shape=(1,), class_names=("low", "middle", "high"))
method = tiltflow.AdjointMatching(beta=0.5, num_inference_steps=20)
training = tiltflow.Training(max_train_steps=STEPS, train_batch_size=96)
tuned = tiltflow.tune(model, reward, method, training, optimizer=tiltflow.Optimizer(learning_rate=2e-3))
for number, name in enumerate(model.class_names):
    before, after = model.sample(4000, labels=name), tuned.sample(4000, labels=name)
    target = before.mean() + before.var() * (number - 1) / 0.5  # a normal law moves by its variance over beta
    print(f"{name}: mean {before.mean():.2f} before, {after.mean():.2f} after, {target:.2f} under its target law")
