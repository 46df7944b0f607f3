#!/usr/bin/env python
"""Accepting in rounds, on samples of a model: data/results/rounds-MODEL.json

`python nbs/_dev/rounds.py layouts` draws many samples of a few prompts. One half says which rank a reward
has; from the other half samples are accepted, by one rule at once, or in rounds, with a perfect learner
between them, which samples from what was accepted. The ranks are compared with those of the formula."""
import argparse, math
import torch
from results import write
from diffusion_sharpening.basics.seeds import fold
from diffusion_sharpening.commands.load import load_model
from diffusion_sharpening.maths.acceptance import accept_softmax, top_shape
from diffusion_sharpening.maths.choice import accept
from diffusion_sharpening.names.catalog import load_reward
from diffusion_sharpening.worlds.world import world_of
from hand_over import whole

PLANS = (4, 1), (2, 2), (4, 2), (2, 4), (2, 3)                 # best of M, in L rounds
RULES = (4, 1), (8, 1), (8, 2), (16, 4)                        # K best of M

def drawn(R, M, n, g):
    "Candidates `(M, n, B)` that a learner of the rewards `(m, B)` of each prompt makes"
    at = torch.randint(len(R), (M*n, R.shape[1]), generator=g)
    return R.gather(0, at).view(M, n, -1)

def best(R, M, n, g):
    "Of each of `n` times `M` candidates the best `(n, B)`"
    return drawn(R, M, n, g).amax(0)

def rounds(R, M, L, n, g):
    "Rewards `(n, B)` after `L` rounds"
    for _ in range(L): R = best(R, M, n, g)
    return R

def kept(R, M, K, n, g):
    "Rewards `(n·K, B)` of the `K` best of `M`"
    found = drawn(R, M, n, g).flatten(1)
    ok = accept(found, K, fold(7, torch.arange(found.numel())).view(found.shape))
    return found.T[ok.T].view(n, R.shape[1], K).movedim(2, 0).flatten(0, 1)

def below(R, pool, strict):
    "For each reward `(n, B)` the share of whole samples `(m, B)` below it, or up to it"
    order = pool.sort(0).values.T.contiguous()
    return torch.searchsorted(order, R.T.contiguous(), right=not strict).T/len(pool)

def apart(R, pool, law):
    "Largest distance of the distribution of `R` from `law` of the ranks, at every reward of the pool"
    here = below(pool, R, False)
    return (here - law(below(pool, pool, False))).abs().amax(0).mean().item()

def bins(R, pool, g, n=10):
    "Share in equal parts of the ranks; a rank shared by many is one of theirs by chance"
    low, high = below(R, pool, True), below(R, pool, False)
    u = low + (high - low)*torch.rand(R.shape, generator=g)
    return torch.histc(u.clamp(0, 1 - 1e-6), n, 0, 1).div(u.numel()).tolist()

def expected(shape, n=10):
    "Shares in equal parts of the ranks, of a density on [0, 1]"
    u = (torch.arange(1000*n, dtype=torch.float64) + .5)/(1000*n)
    return shape(u).view(n, -1).sum(1).div(1000*n).tolist()

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('model', choices=['layouts', 'molecules'])
    p.add_argument('--prompts', type=int, default=12); p.add_argument('--samples', type=int, default=1024)
    p.add_argument('--S', type=int, default=10, help='steps of the sampler')
    a = p.parse_args()
    torch.set_num_threads(1)
    model, world = load_model(a.model), world_of(a.model)
    judge, texts = load_reward(world.reward, world.name), world.prompts(a.prompts, 'heldout', 5)
    R = whole(model, judge, texts, a.samples, 41)[1]
    pool, own = R.chunk(2)
    g, n = torch.Generator().manual_seed(0), 4096
    same = lambda found, law: dict(apart=apart(found, pool, law), shares=bins(found, pool, g))
    rows = [dict(M=M, L=L, expected=expected(lambda u: M**L*u**(M**L - 1)),
                 rounds=same(rounds(own, M, L, n, g), lambda u: u**M**L),
                 once=same(best(own, M**L, n, g), lambda u: u**M**L)) for M, L in PLANS]
    rules = [dict(M=M, K=K, expected=expected(lambda u: M/K*top_shape(u, M, K)),
                  shares=bins(kept(own, M, K, n, g), pool, g)) for M, K in RULES]
    noise = apart(own, pool, lambda u: u)
    found = dict(prompts=texts, samples=a.samples, candidates=n, different=len(own.unique()), apart=noise)
    write(f'rounds-{a.model}', found | dict(rows=rows, rules=rules))

if __name__ == '__main__': main()
