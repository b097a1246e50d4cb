"""A recurrent actor-critic on CartPole: states are carried along and cleared where episodes end."""

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Categorical

STEPS, ENVS, H = 12, 3, 16


class Policy(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, H), nn.Tanh())
        self.gru = nn.GRU(H, H)
        for name, parameter in self.gru.named_parameters():
            nn.init.constant_(parameter, 0) if "bias" in name else nn.init.orthogonal_(parameter)
        self.actor, self.critic = nn.Linear(H, 2), nn.Linear(H, 1)

    def states(self, x, hidden, done):
        x, outputs = self.body(x), []
        for features, ended in zip(x, done, strict=True):
            y, hidden = self.gru(features[None], (1.0 - ended).view(1, -1, 1) * hidden)
            outputs.append(y)
        return torch.cat(outputs), hidden

    def act(self, x, hidden, done):
        y, hidden = self.states(x[None], hidden, done[None])
        choice = Categorical(logits=self.actor(y[0]))
        return choice, self.critic(y[0]).squeeze(-1), hidden


torch.manual_seed(0)
policy = Policy()
optimizer = torch.optim.RMSprop(policy.parameters(), lr=1e-3)
environments = [gym.make("CartPole-v1") for _ in range(ENVS)]
seen = torch.tensor(np.stack([env.reset(seed=i)[0] for i, env in enumerate(environments)]))
done, hidden = torch.zeros(ENVS), torch.zeros(1, ENVS, H)
for update in range(6):
    observations, ends, actions, rewards = [], [], [], []
    first = hidden.detach()
    for _ in range(STEPS):
        with torch.no_grad():
            choice, value, hidden = policy.act(seen, hidden, done)
        action = choice.probs.cumsum(-1).gt(torch.rand(ENVS, 1)).int().argmax(-1)
        observations.append(seen)
        ends.append(done)
        actions.append(action)
        following, gained, ended = [], [], []
        for env, a in zip(environments, action.tolist(), strict=True):
            observation, reward, terminated, truncated, _ = env.step(a)
            if terminated or truncated:
                observation, _ = env.reset()
            following.append(observation)
            gained.append(reward)
            ended.append(float(terminated or truncated))
        seen, done = torch.tensor(np.stack(following)), torch.tensor(ended)
        rewards.append(torch.tensor(gained))
    y, _ = policy.states(torch.stack(observations), first, torch.stack(ends))
    values, logits = policy.critic(y).squeeze(-1), policy.actor(y)
    with torch.no_grad():
        value = policy.act(seen, hidden, done)[1]
    returns = []
    for reward, ended in zip(reversed(rewards), reversed([*ends[1:], done]), strict=True):
        value = reward + 0.99 * (1.0 - ended) * value
        returns.append(value)
    advantages = torch.stack(returns[::-1]) - values
    log_probability = -F.cross_entropy(logits.flatten(0, 1), torch.cat(actions), reduction="none")
    entropy = Categorical(logits=logits).entropy().mean()
    loss = -(log_probability.view_as(values) * advantages.detach()).mean() + 0.5 * advantages.pow(2).mean()
    optimizer.zero_grad()
    (loss - 0.01 * entropy).backward()
    nn.utils.clip_grad_norm_(policy.parameters(), 0.5)
    optimizer.step()
    print(f"update {update} loss {loss.item()} entropy {entropy.item()} ended {int(torch.stack(ends).sum())}")
