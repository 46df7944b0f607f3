#!/usr/bin/env python
"""The two halves of the argument for P-GRAFT on a world: data/results/hand_over-MODEL.json

`python nbs/_dev/hand_over.py layouts` measures, at every step of the sampler, what is left of the variance of
the reward given the state, what a perfect learner would gain by choosing states there, and, of a learner of
accepted samples, how much of its denoising error it has lost on accepted samples that it never saw. Rewards
are compared as ranks among samples of the same prompt. For molecules, whose data are a finite set, also the
error of the base model's score against the exact one."""
import argparse
import torch
from results import write
from diffusion_sharpening.basics.seeds import START, noise, stream
from diffusion_sharpening.basics.stats import interval, over_seeds
from diffusion_sharpening.commands.load import load_model
from diffusion_sharpening.data.sources import Pictures
from diffusion_sharpening.evaluation.measure import start_seeds
from diffusion_sharpening.maths.choice import accept
from diffusion_sharpening.maths.rollout import rollout
from diffusion_sharpening.maths.schedules import add_noise
from diffusion_sharpening.methods.parts import at_end, candidate_seeds, from_prompt
from diffusion_sharpening.names.catalog import load_reward
from diffusion_sharpening.training.loop import Callback, train
from diffusion_sharpening.training.run import settings
from diffusion_sharpening.worlds.molecules.data import load_graphs, split_of
from diffusion_sharpening.worlds.molecules.items import ANY, to_items
from diffusion_sharpening.worlds.world import weights, world_of

S, N, K = 16, 8, 2                                     # steps; samples of a prompt, and how many are accepted
POOL, BRANCHES = 32, 4                                 # samples that give ranks; continuations of a state

def ranks(R, pool):
    "Of rewards `(m, B)` among those of whole samples `(n, B)`, from 0 to 1; equal ones count half"
    less, same = (R[:, None] > pool).double(), (R[:, None] == pool).double()
    return (less + same/2).mean(1)

def parts(texts, size=32): return [texts[i:i + size] for i in range(0, len(texts), size)]

@torch.no_grad()
def whole(model, judge, texts, n, seed, eta=-1):
    "Ends `(n, B, …)` and rewards `(n, B)` of `n` samples of each prompt, and their seeds"
    seeds, found = candidate_seeds(start_seeds(seed, len(texts)), n), []
    for i, own in enumerate(parts(texts)):
        s = seeds[:, 32*i:32*i + len(own)]
        x0 = from_prompt(model, S, s, model.encode(own), eta)
        found.append((x0, at_end(model, judge, x0, own)[0]))
    return *(torch.cat(o, 1) for o in zip(*found)), seeds

# What a state says of the reward

@torch.no_grad()
def paths(model, judge, texts, seed):
    "States `(S+1, N, B, …)` on the way to samples, and the rewards and seeds of these"
    seeds = candidate_seeds(start_seeds(seed, len(texts)), N)
    z = noise(seeds, START, model.item)
    tr = rollout(model, z, model.grid(S), model.encode(texts), 1., seeds)
    return tr.states, at_end(model, judge, tr.end, texts)[0], seeds

@torch.no_grad()
def again(model, judge, x, i, texts, seeds):
    "Rewards `(BRANCHES, N, B)` of continuations of the states `(N, B, …)` of step `i`, each with fresh noise"
    many = stream(seeds, 'fresh', torch.arange(BRANCHES)[:, None, None])
    x = x.expand(BRANCHES, *x.shape)
    ends = rollout(model, x, model.grid(S)[i:], model.encode(texts), 1., many, keep=False).end
    R = at_end(model, judge, ends.flatten(0, 1), texts)[0]
    return R.view(many.shape)

def share(part, of):
    "Ratio of the means of `part` and `of`, both `(B,)`, with its interval over prompts"
    ratio = part.mean()/of.mean()
    return interval(ratio + (part - ratio*of)/of.mean(), 'prompts')

def left(model, judge, prompts):
    "At each step: the share of the variance that is left, and the gain of a perfect learner"
    texts = world_of(model.source).prompts(prompts, 'heldout', 3)
    pool = whole(model, judge, texts, POOL, 11, 1.)[1]
    states, R, seeds = paths(model, judge, texts, 12)
    chosen = accept(R, K, seeds).double()
    mean_of = lambda v: (v*chosen).sum(0)/K            # over the accepted of each prompt
    rows = []
    for i in range(S):
        v = again(model, judge, states[i], i, texts, seeds)
        u = ranks(v.flatten(0, 1), pool).view(v.shape)
        rows.append(dict(step=i, t=model.grid(S)[i].item(),
                         ranks=share(u.var(0).mean(0), ranks(pool, pool).var(0)),
                         reward=share(v.double().var(0).mean(0), pool.double().var(0)),
                         gain=interval(mean_of(u.mean(0)) - .5, 'prompts')))
        print(rows[-1], flush=True)
    return dict(prompts=prompts, rows=rows, graft=interval(mean_of(ranks(R, pool)) - .5, 'prompts'))

# What is learnt

def accepted(model, judge, prompts, split, seed):
    "Accepted samples `(rows, …)` with their prompts"
    texts = world_of(model.source).prompts(prompts, split, seed)
    x0, R, seeds = whole(model, judge, texts, N, seed)
    at, which = accept(R, K, seeds).nonzero().T
    return x0[at, which], [texts[i] for i in which.tolist()]

@torch.no_grad()
def errors(model, x0, texts):
    "Squared error of the predicted noise `(S, rows)` at the times of the sampler"
    eps = noise(stream(start_seeds(21, len(x0)), 'fresh', 0), START, model.item)
    cond, out = model.encode(texts), []
    for t in model.grid(S)[:-1]:
        times = t.expand(len(x0))
        e = model.output(add_noise(model.schedule, x0, eps, times), times, cond) - eps
        out.append(e.square().flatten(1).mean(1))
    return torch.stack(out).double()

class Look(Callback):
    "Errors on accepted samples that were not learned from, and ranks of new samples"
    order = 90
    def __init__(self, at, judge, held, texts, pool):
        self.at, self.judge, self.held, self.texts, self.pool, self.rows = at, judge, held, texts, pool, []
    def update(self, s):
        if s.k not in self.at: return
        R = whole(s.model, self.judge, self.texts, 4, 13)[1]
        self.rows.append((errors(s.model, *self.held), ranks(R, self.pool).mean(0)))
        print(s.k, self.rows[-1][0].mean(1).tolist(), self.rows[-1][1].mean().item(), flush=True)

def learned(name, judge, data, held, at, lr, seed, texts, pool):
    "One learner of accepted samples, looked at after the updates `at`"
    model, look = load_model(name), Look(at, judge, held, texts, pool)
    run, method = settings('standard', steps=max(at), seed=seed, lr=lr, batch=64)
    train(model, method, judge, Pictures(model, data[1], data[0], size=64, seed=seed), run, [look])
    return look.rows

def error(model, judge, a):
    "Learners of accepted samples against the base, at each time"
    name, texts = world_of(model.source).name, world_of(model.source).prompts(a.prompts, 'heldout', 3)
    data = accepted(model, judge, a.accepted, 'train', 14)
    held = accepted(model, judge, a.accepted//2, 'train', 15)
    pool, base = whole(model, judge, texts, POOL, 11)[1], errors(model, *held)
    runs = [learned(name, judge, data, held, a.updates, a.lr, seed, texts, pool) for seed in a.seeds]
    rows = []
    for k, looks in zip(a.updates, zip(*runs)):
        lost = torch.stack([base - e for e, _ in looks])                        # (seeds, S, rows)
        rows.append(dict(updates=k, lost=[over_seeds(lost[:, i], 'samples') for i in range(S)],
                         rank=over_seeds(torch.stack([u for _, u in looks]) - .5)))
    start = ranks(whole(model, judge, texts, 4, 13)[1], pool).mean(0) - .5
    return dict(accepted=len(data[0]), held=len(held[0]), batch=64, lr=a.lr,
                times=model.grid(S)[:-1].tolist(), base=[interval(e, 'samples') for e in base],
                base_rank=interval(start, 'prompts'), rows=rows)

# The exact score, where the data are a finite set

def exact_noise(schedule, x_t, t, items):
    "The noise that is expected in states `(B, *item)` at time `t`, if all `items` are equally likely"
    a, s = schedule.alpha_sigma(t)
    far = torch.cdist(x_t.double().flatten(1), a.double()*items.double().flatten(1)).square()
    mean = (-far/(2*s.double()**2)).softmax(1)@items.double().flatten(1)
    return ((x_t.double().flatten(1) - a*mean)/s).view(x_t.shape)

def normal_noise(schedule, x_t, t, items):
    "The same for a normal law with the mean and covariance of `items`"
    (a, s), x = schedule.alpha_sigma(t), items.double().flatten(1)
    values, basis = torch.linalg.eigh(torch.cov(x.T))
    y = (x_t.double().flatten(1) - a*x.mean(0))@basis
    return (s*y/(a**2*values.clamp(min=0) + s**2)@basis.T).view(x_t.shape)

@torch.no_grad()
def exact(model, n=256):
    "Errors of the base model's predicted noise, and of that of a normal law, where nothing is asked for"
    items = to_items(split_of(load_graphs(weights('molecules-qm9'))))
    x0 = items[stream(start_seeds(31, n), 'batch', 0) % len(items)]
    eps, free, rows = noise(start_seeds(32, n), START, model.item), model.encode([ANY]*n), []
    for t in model.grid(S)[:-1]:
        x_t = add_noise(model.schedule, x0, eps, t.expand(n))
        true = exact_noise(model.schedule, x_t, t, items)
        of = lambda e: interval((e - true).square().flatten(1).mean(1), 'samples')
        rows.append(dict(t=t.item(), base=of(model.output(x_t, t.expand(n), free)),
                         normal=of(normal_noise(model.schedule, x_t, t, items)), floor=of(eps)))
        print(rows[-1], flush=True)
    return dict(molecules=len(items), samples=n, rows=rows)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('model', choices=['layouts', 'molecules'])
    p.add_argument('--prompts', type=int, default=32, help='whose states are continued')
    p.add_argument('--accepted', type=int, default=512, help='prompts whose samples are accepted')
    p.add_argument('--updates', type=int, nargs='+', default=[20, 80, 320])
    p.add_argument('--lr', type=float, default=5e-4)
    p.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    a = p.parse_args()
    torch.set_num_threads(1)
    model = load_model(a.model)
    judge = load_reward(world_of(a.model).reward, a.model)
    found = dict(exact=exact(model)) if a.model == 'molecules' else {}
    found |= dict(left=left(model, judge, a.prompts), error=error(model, judge, a))
    write(f'hand_over-{a.model}', dict(S=S, n=N, K=K, pool=POOL, branches=BRANCHES) | found)

if __name__ == '__main__': main()
