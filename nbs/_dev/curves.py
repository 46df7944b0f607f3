#!/usr/bin/env python
"""Margin and held-out reward over the updates of every method and preset, on the embedded Shapes model:
`python nbs/_dev/curves.py [METHOD …] [--updates 50]`

The reward is the embedded CLIP. Watched every few updates: that reward and the exam on held-out captions,
and the *margin*, one measure for all methods. For each held-out caption the base model has made four
samples; the one of the highest reward is the winner, that of the lowest the loser. Both are noised with the
same noise, and the margin is by how much more training has lowered the network's error on the winner than
on the loser, relative (`log_ratio` of Diffusion-DPO without β). It is 0 before the first update.
data/results/curves.json takes it all."""
import argparse, time
from dataclasses import asdict
import torch

torch.set_num_threads(1)
from diffusion_sharpening.basics.seeds import fold
from diffusion_sharpening.basics.stats import interval
from diffusion_sharpening.basics.words import one_of
from diffusion_sharpening.commands.load import quiet
from diffusion_sharpening.data.sources import Pictures, Prompts
from diffusion_sharpening.evaluation.measure import evaluate, measures
from diffusion_sharpening.maths.choice import pair, pick
from diffusion_sharpening.maths.losses import log_ratio
from diffusion_sharpening.methods.catalog import METHODS
from diffusion_sharpening.methods.parts import asked_times, candidate_seeds, end_error, from_prompt, noised
from diffusion_sharpening.models.denoiser import Denoiser
from diffusion_sharpening.names.catalog import load_reward
from diffusion_sharpening.rewards.ahead import judged
from diffusion_sharpening.training.loop import Callback, train
from diffusion_sharpening.training.run import settings
from diffusion_sharpening.worlds.world import WORLDS, model_path
from kill_runs import arms
from results import write

WORLD = 'shapes'
FROM_PICTURES, OWN = 1e-4, 5e-4      # learning rates: at 5e-4 every method that learns from pictures lost

def held_out_pairs(net, judge, prompts, n=4, S=20):
    "Best and worst of `n` samples of the base model for each prompt"
    seeds, cond = fold(7, torch.arange(len(prompts))), net.encode(prompts)
    x0 = from_prompt(net, S, candidate_seeds(seeds, n), cond)
    R, _ = judged(net, judge, x0, prompts)
    return [pick(x0, i) for i in pair(R)], seeds, cond

def margin(net, winners_losers, seeds, cond, looks=2, S=20):
    "How much more the error fell on winners than on losers `(N,)`, mean over `looks` times and noises"
    def fell(x0, u):
        t = asked_times(net.grid(S), seeds, u)
        x_t = noised(net, x0, t, seeds, u)
        now = end_error(net, x_t, t, x0, cond)
        with net.reference(): return log_ratio(now, end_error(net, x_t, t, x0, cond))
    w, l = ([fell(x0, u) for u in range(looks)] for x0 in winners_losers)
    return (torch.stack(w) - torch.stack(l)).mean(0)

class Watch(Callback):
    "Measure before the first update and after every few"
    def __init__(self, prompts, judges, pairs, every):
        self.args, self.rows, self.first = (prompts, judges, pairs, every), [], None

    def start(self, s): self.look(s)

    def update(self, s):
        if s.k*s.method.updates % self.args[3] == 0: self.look(s)

    @torch.no_grad()
    def look(self, s):
        prompts, judges, pairs, _ = self.args
        e = evaluate(s.model, prompts, judges, S=10)
        scores = measures(e) | dict(margin=margin(s.model, *pairs))
        self.first = self.first or scores
        change = {k: interval(v - self.first[k]) for k, v in scores.items()}
        self.rows.append(dict(update=s.k*s.method.updates, change=change,
                              value={k: v.mean().item() for k, v in scores.items()}))
        said = ', '.join(f'{k} {v.mean():.4g}' for k, v in scores.items())
        print(f'  update {self.rows[-1]["update"]:>3}: {said}', flush=True)

def base(): return Denoiser.from_pretrained(model_path(WORLD), guidance=1., device='cpu')

def one(arm, a, world, judge, prompts, pairs):
    "Train one method and watch it"
    (name, preset), net = arm, base()
    run, method = settings(name, preset, batch=a.batch, seed=a.seed, ema=0., warmup=5)
    if a.updates % method.updates:
        raise SystemExit(f'updates: expected a multiple of {method.updates} for {name}')
    run.steps, run.lr = a.updates//method.updates, FROM_PICTURES if method.needs_images else OWN
    if method.needs_images:
        things, texts = world.pairs(256, a.seed + 11)
        latents = torch.cat([net.latents(o) for o in world.show(things).split(32)])
        source = Pictures(net, texts, latents, a.batch, a.seed)
    else: source = Prompts(net, world.prompts(256, 'train', a.seed), a.batch, a.seed)
    watch, t0 = Watch(prompts, {judge.name: judge, world.exam.name: world.exam}, pairs, a.every), time.time()
    train(net, method, judge, source, run, [watch])
    return dict(method=name, preset=preset, lr=run.lr, settings=asdict(method), rows=watch.rows,
                seconds=round(time.time() - t0, 1))

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('methods', nargs='*', help='default: all')
    p.add_argument('--updates', type=int, default=50)
    p.add_argument('--every', type=int, default=10, help='updates between two measurements')
    p.add_argument('--batch', type=int, default=4, help='prompts of a batch')
    p.add_argument('--prompts', type=int, default=60, help='held-out captions')
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--dry', action='store_true', help='write no summary')
    a = p.parse_args()
    try: todo = arms([one_of(name, list(METHODS), 'method') for name in a.methods or METHODS])
    except ValueError as e: p.error(str(e))
    quiet()
    world, judge, found = WORLDS[WORLD], load_reward('clip', WORLD), {}
    prompts = world.prompts(a.prompts, 'heldout', 0)
    pairs = held_out_pairs(base(), judge, prompts)
    for name, arm in todo.items():
        print(name, flush=True)
        found[name] = one(arm, a, world, judge, prompts, pairs)
    if not a.dry:
        write('curves', vars(a) | dict(model=WORLD, reward=judge.name, exam=world.exam.name, arms=found))

if __name__ == '__main__': main()
