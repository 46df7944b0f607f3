#!/usr/bin/env python
"""Margin and held-out reward over the updates of every method and preset, on the embedded Shapes model:
`python nbs/_dev/curves.py [METHOD …] [--updates 48]`

The reward is the embedded CLIP. Watched every few updates: that reward and the exam on held-out captions,
and the *margin*, one measure for all methods. For each held-out caption the base model has made four
samples; the one of the highest reward is the winner, that of the lowest the loser. Both are noised with the
same noise, and the margin is by how much more training has lowered the network's error on the winner than
on the loser, relative (`log_ratio` of Diffusion-DPO without β). It is 0 before the first update.
data/results/curves.json has it all, and is written after each method. Stopped and begun again with the same
settings and code it goes on with the methods that are missing."""
import time
from dataclasses import asdict
import torch

torch.set_num_threads(1)
from diffusion_sharpening.basics.seeds import fold
from diffusion_sharpening.basics.stats import interval
from diffusion_sharpening.commands.load import quiet
from diffusion_sharpening.data.sources import Columns, Prompts
from diffusion_sharpening.evaluation.measure import evaluate, measures
from diffusion_sharpening.maths.choice import pair, pick
from diffusion_sharpening.maths.losses import log_ratio
from diffusion_sharpening.methods.parts import asked_times, candidate_seeds, end_error, from_prompt, noised
from diffusion_sharpening.models.denoiser import Denoiser
from diffusion_sharpening.names.catalog import load_reward
from diffusion_sharpening.rewards.ahead import judged
from diffusion_sharpening.training.loop import Callback, train
from diffusion_sharpening.training.run import settings
from diffusion_sharpening.worlds.world import WORLDS, model_path
from arms import asked, known
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
        made, every = s.k*s.method.updates, self.args[3]
        if made//every > (made - s.method.updates)//every: self.look(s)

    @torch.no_grad()
    def look(self, s):
        prompts, judges, pairs, _ = self.args
        e = evaluate(s.method.deployed(s.model, 10), prompts, judges, S=10)
        scores = measures(e) | dict(margin=margin(s.model, *pairs))
        self.first = self.first or scores
        change = {k: interval(v - self.first[k]) for k, v in scores.items()}
        self.rows.append(dict(update=s.k*s.method.updates, change=change,
                              value={k: v.mean().item() for k, v in scores.items()}))
        said = ', '.join(f'{k} {v.mean():.4g}' for k, v in scores.items())
        print(f'  update {self.rows[-1]["update"]:>3}: {said}', flush=True)

def base(): return Denoiser.from_pretrained(model_path(WORLD), guidance=1., device='cpu')

def source(net, method, a, world):
    "Prompts, pictures with captions, or pairs of the caption's picture and another's"
    if not method.columns: return Prompts(net, world.prompts(256, 'train', a.seed), a.batch, a.seed)
    things, texts = world.pairs(256, a.seed + 11)
    x0 = torch.cat([net.latents(o) for o in world.show(things[:]).split(32)])
    made = dict(x0=x0, better=x0, worse=x0.roll(1, 0))
    return Columns(net, texts, {c: made[c] for c in method.columns}, a.batch, a.seed)

def one(arm, a, world, judge, prompts, pairs):
    "Train one method and watch it"
    (name, preset), net = arm, base()
    run, method = settings(name, preset, batch=a.batch, seed=a.seed, ema=0., warmup=5)
    run.steps, run.lr = -(-a.updates//method.updates), FROM_PICTURES if method.columns else OWN
    watch, t0 = Watch(prompts, {judge.name: judge, world.exam.name: world.exam}, pairs, a.every), time.time()
    train(net, method, judge, source(net, method, a, world), run, [watch])
    return dict(method=name, preset=preset, lr=run.lr, settings=asdict(method), rows=watch.rows,
                seconds=round(time.time() - t0, 1))

def main():
    a, todo = asked(__doc__, updates=(48, 'of each method'), every=(12, 'updates between two measurements'),
                    batch=(2, 'prompts of a batch'), prompts=(48, 'held-out captions'), seed=(0, 'of a run'))
    quiet()
    world, judge = WORLDS[WORLD], load_reward('clip', WORLD)
    about = {k: getattr(a, k) for k in ('updates', 'every', 'batch', 'prompts', 'seed')}
    about |= dict(model=WORLD, reward=judge.name, exam=world.exam.name)
    found, prompts = {} if a.dry else known('curves', about), world.prompts(a.prompts, 'heldout', 0)
    pairs = held_out_pairs(base(), judge, prompts)
    for name, arm in todo.items():
        if name in found or arm == ('d3po', 'human'): continue  # there are no choices of people
        print(name, flush=True)
        try: found[name] = one(arm, a, world, judge, prompts, pairs)
        except ValueError as e:                                   # the reward is not one for this method
            print(f'{name}: not measured ({e})', flush=True)
            continue
        if not a.dry: write('curves', about | dict(arms=found))

if __name__ == '__main__': main()
