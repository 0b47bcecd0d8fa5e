"""CartPole-v1 by a deep Q-network.

Method: Mnih et al., Human-level control through deep reinforcement learning (2015), with the
hyperparameters that RL Baselines3 Zoo has for CartPole-v1. A target bootstraps through truncation,
when the time is over, and not through termination, when the pole fell.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bigops.nn import Linear
from bigops.recipes.run import Run
from bigops.train import AdamW, MixedPrecision

EPOCH = 1000  # steps of the environment
GAMMA, LR, BATCH, BUFFER, WIDTH = 0.99, 2.3e-3, 64, 100_000, 256
FIRST, EVERY, UPDATES = 1000, 256, 128  # steps before learning, between it, and updates each time
EXPLORING, LEAST_EPSILON = 0.16, 0.04  # share of the steps in which epsilon falls from 1, and to
EPISODES = 100  # that judge
# A Q-network forgets again: greedy episodes every so many rounds of updates say which weights stay.
ROUNDS, CHECKS = 6, 20


class Environment:
    """One CartPole that begins anew by itself, with its whole state to be saved."""

    def __init__(self, seed: int) -> None:
        made = gymnasium.make("CartPole-v1")
        assert made.spec is not None
        # Without its wrappers, whose counter of steps nobody can set.
        self._env: Any = made.unwrapped
        self.limit = made.spec.max_episode_steps or 500
        self.seen, _ = self._env.reset(seed=seed)
        self.length = 0

    def step(self, action: int) -> tuple[np.ndarray, bool, bool]:
        """What is seen then (float32 [4]), whether the pole fell, and whether the episode ended."""
        after, _, fell, _, _ = self._env.step(action)
        self.length += 1
        over = fell or self.length == self.limit
        self.seen = after
        if over:
            self.begin()
        return after, fell, over

    def begin(self) -> None:
        """A new episode, of the environment's own random numbers."""
        self.seen, _ = self._env.reset()
        self.length = 0

    def state_dict(self) -> dict[str, Any]:
        """The cart, the pole, the steps of the episode and the random state."""
        state = [float(x) for x in self._env.state]
        random = self._env.np_random.bit_generator.state
        return {"state": state, "length": self.length, "random": random}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take that over."""
        self.begin()
        self._env.state = np.array(state["state"], dtype=np.float64)
        self._env.np_random.bit_generator.state = state["random"]
        self.seen, self.length = np.array(state["state"], dtype=np.float32), state["length"]


class Replay:
    """The last ``size`` transitions."""

    def __init__(self, size: int) -> None:
        self.before, self.after = torch.zeros(2, size, 4, device="cpu").unbind()
        self.action = torch.zeros(size, dtype=torch.int64, device="cpu")
        self.reward, self.fell = torch.zeros(2, size, device="cpu").unbind()
        self.count = 0

    def add(self, **transition: Any) -> None:
        """before, action, reward, after, fell; the oldest one goes where it is full."""
        for name, value in transition.items():
            getattr(self, name)[self.count % len(self.reward)] = torch.as_tensor(
                value, device="cpu"
            )
        self.count += 1

    def sample(self, rows: int) -> tuple[Tensor, ...]:
        """before, action, reward, after, fell of random transitions."""
        chosen = torch.randint(min(self.count, len(self.reward)), (rows,), device="cpu")
        held = (self.before, self.action, self.reward, self.after, self.fell)
        return tuple(column[chosen] for column in held)

    def state_dict(self) -> dict[str, Any]:
        """All of it."""
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take that over."""
        vars(self).update(state)


def network(width: int = WIDTH) -> nn.Sequential:
    """Values of the two actions, [rows, 2] of [rows, 4]."""
    hidden = Linear(4, width, activation="relu"), Linear(width, width, activation="relu")
    return nn.Sequential(*hidden, Linear(width, 2))


@torch.no_grad()
def greedy(model: nn.Module, episodes: int, seed: int) -> float:
    """Mean return of episodes in which the best action is taken, all side by side.

    Args:
        model: maps [rows, 4] to values [rows, 2].
        seed: of the environments: seed, seed + 1, ..
    """
    worlds = [Environment(seed + i) for i in range(episodes)]
    returns = 0
    while worlds:
        values = model(torch.from_numpy(np.stack([world.seen for world in worlds])))
        ends = [w.step(a)[2] for w, a in zip(worlds, values.argmax(1).tolist(), strict=True)]
        returns += len(worlds)
        worlds = [world for world, over in zip(worlds, ends, strict=True) if not over]
    return returns / episodes


def train(run: Run, epoch: int = EPOCH, first: int = FIRST, width: int = WIDTH) -> dict[str, float]:
    """Mean return of 100 greedy episodes, by the best weights of ``run.epochs`` thousand steps."""
    torch.manual_seed(run.seed)
    online = network(width)
    target, kept = copy.deepcopy(online), copy.deepcopy(online)
    optimizer = AdamW(online.parameters(), lr=LR, weight_decay=0.0)
    precision = MixedPrecision(run.precision)
    world, replay = Environment(run.seed), Replay(min(BUFFER, epoch * run.epochs))
    networks = {"online": online, "target": target, "kept": kept}
    others = {"optimizer": optimizer, "precision": precision, "world": world, "replay": replay}
    run.start(epoch * run.epochs, **networks, **others)
    while run.done < run.steps:
        epsilon = max(LEAST_EPSILON, 1 - run.done / (EXPLORING * run.steps))
        before, length = world.seen, world.length + 1
        if torch.rand((), device="cpu") < epsilon:
            action = int(torch.randint(2, (), device="cpu"))
        else:
            with torch.no_grad():
                action = int(online(torch.from_numpy(before)).argmax())
        after, fell, over = world.step(action)
        replay.add(before=before, action=action, reward=1.0, after=after, fell=float(fell))
        if (run.done + 1) % EVERY == 0 and run.done >= first:
            target.load_state_dict(online.state_dict())
            for _ in range(UPDATES):
                x, actions, rewards, following, ended = replay.sample(BATCH)
                with torch.no_grad():
                    goal = rewards + GAMMA * (1 - ended) * target(following).amax(1)
                with precision.autocast():
                    values = online(x).gather(1, actions[:, None])[:, 0]
                    loss = F.smooth_l1_loss(values.float(), goal)
                optimizer.zero_grad()
                precision.backward(loss)
                precision.step(optimizer, clip_norm=10.0)
            if (run.done + 1) % (EVERY * ROUNDS) == 0:
                score = greedy(online, CHECKS, seed=20_000 + run.seed)
                if score >= max((best for _, best in run.curves.get("greedy", ())), default=0.0):
                    kept.load_state_dict(online.state_dict())
                run.point(greedy=score)
        run.step(**({"length of an episode": length} if over else {}))
    return {"greedy return": greedy(kept, EPISODES, seed=10_000 + run.seed)}
