"""CartPole: an environment and a replay that can be saved, and what a greedy episode is worth."""

import importlib.util

import numpy as np
import pytest
import torch
from torch import Tensor, nn

if importlib.util.find_spec("gymnasium") is None:
    pytest.skip("gymnasium is not installed", allow_module_level=True)

from bigops.recipes.cartpole import Environment, Replay, greedy


class Controller(nn.Module):
    """Pushes to where the pole falls."""

    def forward(self, seen: Tensor) -> Tensor:
        falls = (seen * torch.tensor([0.1, 0.5, 1.0, 1.0])).sum(1)
        return torch.stack([-falls, falls], 1)


def test_greedy_tells_a_good_policy_from_a_bad_one() -> None:
    good, bad = Controller(), nn.Linear(4, 2)
    nn.init.zeros_(bad.weight)
    assert greedy(good, 5, seed=0) == 500
    assert 5 < greedy(bad, 5, seed=0) < 20


def test_the_end_of_the_time_is_no_fall() -> None:
    world, policy = Environment(0), Controller()
    for step in range(1, 501):
        action = int(policy(torch.from_numpy(world.seen)[None]).argmax())
        after, fell, over = world.step(action)
        assert not fell
        assert over == (step == 500)
    assert world.length == 0
    assert not np.array_equal(world.seen, after)  # what is seen first in the next episode
    ends = [world.step(0)[1:] for _ in range(20)]
    assert (True, True) in ends
    assert (False, True) not in ends


def test_an_environment_goes_on_from_its_state_through_a_reset() -> None:
    world = Environment(3)
    for _ in range(5):
        world.step(0)
    other = Environment(4)
    other.load_state_dict(world.state_dict())
    assert np.array_equal(other.seen, world.seen)
    for _ in range(30):
        (seen, *ends), (same, *theirs) = world.step(0), other.step(0)
        assert np.array_equal(seen, same)
        assert ends == theirs


def test_replay_keeps_the_newest() -> None:
    replay = Replay(4)
    for i in range(6):
        seen = np.full(4, i, np.float32)
        replay.add(before=seen, action=i % 2, reward=1.0, after=seen + 1, fell=float(i == 5))
    before, action, reward, after, fell = replay.sample(200)
    assert set(before[:, 0].tolist()) == {2, 3, 4, 5}
    assert torch.equal(after, before + 1)
    assert torch.equal(action, before[:, 0].long() % 2)
    assert torch.equal(fell, (before[:, 0] == 5).float())
    assert reward.eq(1).all()
    one = Replay(4)
    one.add(before=np.ones(4, np.float32), action=1, reward=1.0, after=np.ones(4), fell=0.0)
    assert one.sample(9)[0].eq(1).all()  # nothing that was not added
