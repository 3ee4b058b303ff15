"""Samples that are learned from again: which are kept, and under which condition of the present batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tiltflow.flows import conditions
from tiltflow.flows.field import FunctionField, VelocityField
from tiltflow.flows.flow import Flow
from tiltflow.training.replay import Replay

FREE = FunctionField(lambda x, t: x)


def of(condition: object) -> VelocityField:
    return Flow(lambda x, time, condition: x).bind(condition)


def column(*values: float) -> Tensor:
    return torch.tensor(values)[:, None]


def test_the_first_batch_and_the_latest_are_kept() -> None:
    replay = Replay()
    for i in range(6):
        recalled = replay.add(column(i, i + 0.5), torch.tensor([i, -i]), i / 10, FREE, most=3)
    assert [batch.tilt for batch in replay.batches] == [0.0, 0.4, 0.5]
    assert recalled.x.flatten().tolist() == [0, 0.5, 4, 4.5, 5, 5.5]
    assert recalled.rewards.tolist() == [0, 0, 4, -4, 5, -5]
    assert recalled.rewards.dtype == recalled.tilts.dtype == torch.float64
    assert recalled.tilts.tolist() == [0, 0, 0.4, 0.4, 0.5, 0.5]
    assert recalled.where.tolist() == [0, 1] * 3
    assert [members.tolist() for members in recalled.groups] == [list(range(6))]
    with_one = Replay()
    for i in range(3):
        recalled = with_one.add(column(i), torch.zeros(1), 0.0, FREE, most=1)
    assert recalled.x.tolist() == [[2.0]]
    assert [batch.x.tolist() for batch in with_one.batches] == [[[2.0]]]


def test_samples_come_back_with_their_own_condition() -> None:
    replay = Replay()
    replay.add(column(10, 20, 30, 11), torch.tensor([1.0, 2, 3, 1.1]), 0.0, of(torch.tensor([1, 2, 3, 1])), most=9)
    labels = torch.tensor([3, 1, 3, 1, 3])
    recalled = replay.add(column(31, 12, 32, 13, 33), torch.tensor([3.1, 1.2, 3.2, 1.3, 3.3]), 0.5, of(labels), most=9)
    assert recalled.x.flatten().tolist() == [10, 30, 11, 31, 12, 32, 13, 33]  # 20 waits for its class
    assert (recalled.x.flatten() // 10).long().tolist() == labels[recalled.where].tolist()
    assert recalled.where[-5:].tolist() == [0, 1, 2, 3, 4]
    assert recalled.rewards.tolist() == pytest.approx([1, 3, 1.1, 3.1, 1.2, 3.2, 1.3, 3.3])
    assert recalled.tilts.tolist() == [0.0] * 3 + [0.5] * 5
    assert [(recalled.x[members].flatten() // 10).tolist() for members in recalled.groups] == [[1] * 4, [3] * 4]
    last = replay.add(column(21), torch.zeros(1), 0.5, of(torch.tensor([2])), most=9)
    assert last.x.flatten().tolist() == [20, 21]


def test_prompts_are_told_apart_by_their_embeddings() -> None:
    first, second, third = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    replay = Replay()
    one = of({"embeds": torch.stack([first, second]), "scale": 2.0})
    replay.add(column(1, 2), torch.zeros(2), 0.0, one, most=9)
    other = of({"embeds": torch.stack([third, first, third]), "scale": 2.0})
    recalled = replay.add(column(3, 1.5, 3.5), torch.zeros(3), 0.0, other, most=9)
    assert recalled.x.flatten().tolist() == [1, 3, 1.5, 3.5]
    assert recalled.where.tolist() == [1, 0, 1, 2]


def test_names_of_conditions() -> None:
    embedded = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    field = of(embedded)
    assert field.name_of(0) == field.name_of(2) != field.name_of(1)
    assert field.name_of(1) == of(embedded[1:]).name_of(0)
    assert of(torch.tensor([4, 7])).name_of(1) == of(torch.tensor([7])).name_of(0) != of(torch.tensor([4])).name_of(0)
    assert len({of(torch.tensor([0, 1, 0])).name_of(i) for i in range(3)}) == 2
    alone, longer = ({"embeds": torch.ones(1, n, 2), "mask": torch.ones(1, n)} for n in (2, 3))
    both = of(conditions.joined([alone, longer]))
    assert (both.name_of(0), both.name_of(1)) == (of(alone).name_of(0), of(longer).name_of(0))
    assert both.name_of(0) != both.name_of(1)
    assert both.condition["mask"].tolist() == [[1, 1, 0], [1, 1, 1]]  # type: ignore[index]
    assert both.condition["embeds"][0].tolist() == [[1, 1], [1, 1], [0, 0]]  # type: ignore[index]
    with pytest.raises(ValueError, match=r"shapes \[2, 2\], \[3, 2\]"):  # no network could know zeros from the rest
        conditions.joined([{"embeds": alone["embeds"]}, {"embeds": longer["embeds"]}])
    pooled = [{**part, "pooled": torch.ones(1, n)} for part, n in ((alone, 2), (longer, 2))]
    assert conditions.joined(pooled)["pooled"].tolist() == [[1, 1], [1, 1]]
    assert FREE.name_of(0) == of(None).name_of(0) == of(torch.tensor(3.0)).name_of(1) == ""


def test_a_replay_goes_on_from_its_state() -> None:
    replay, again = Replay(), Replay()
    labels = of(torch.tensor([0, 1]))
    for i in range(3):
        replay.add(column(i, -i), torch.tensor([1.0, i]), 0.1 * i, labels, most=3)
    again.load_state_dict(replay.state_dict(), torch.device("cpu"))
    one, other = (each.add(column(7, 8), torch.ones(2), 0.4, labels, most=3) for each in (replay, again))
    assert all(torch.equal(a, b) for a, b in zip(vars(one).values(), vars(other).values(), strict=True))
