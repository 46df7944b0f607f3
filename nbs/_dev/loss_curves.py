#!/usr/bin/env python
"""The loss on data that nobody trains on, while methods learn: data/results/loss_curves.json

`python nbs/_dev/loss_curves.py [--steps 80] [--every 20] [--seeds 3]` trains standard fine-tuning and both
sharpening methods as printed on each of the three worlds, which are the data sets. Every few batches the
denoising loss is measured on the same held-out things with the same times and noises, beside the loss that
the method itself logs. What was measured lies in runs/loss_curves and is not measured again."""
import argparse
from pathlib import Path
import torch
from looks import HELD
from results import write
from diffusion_sharpening.basics.files import read_json, write_json
from diffusion_sharpening.basics.seeds import fold
from diffusion_sharpening.basics.stats import over_seeds
from diffusion_sharpening.commands.load import quiet
from diffusion_sharpening.experiments.arms import arms_of
from diffusion_sharpening.experiments.bed import bed_of, job_for
from diffusion_sharpening.training.loop import Callback, train

ARMS = 'standard; SFT sharpening; RLHF sharpening'
DRAWS = 8 # Times and noises of each held-out thing

class Fixed(Callback):
    "Losses of held-out things before the first batch and after every few, always with the same noise"
    order = 90
    def __init__(self, x0, texts, every): self.things, self.every, self.rows = (x0, texts), every, []
    def start(self, s): self.look(s)
    def update(self, s):
        if s.k % self.every == 0: self.look(s)

    @torch.no_grad()
    def look(self, s):
        x0, texts = self.things
        seeds, cond = fold(7, torch.arange(len(x0))), s.model.encode(texts)
        with s.model.use('policy'):
            losses = [s.model.denoising_loss(x0, cond, fold(seeds, u)) for u in range(DRAWS)]
        recent = [r['loss'] for r in s.history[-self.every:] if r.get('loss') is not None]
        self.rows.append(dict(batch=s.k, held=torch.stack(losses).mean(0).tolist(),
                              own=sum(recent)/len(recent) if recent else None))

def curve(bed, arm, held, a, seed):
    "One training"
    method = arm.made(seed=seed)[1]
    own = {f'method.{k}': v for k, v in arm.own.items()}
    changes = dict(lr=arm.lr, batch=arm.batch, steps=a.steps, seed=seed, checkpoint_every=0) | own
    job, (things, texts) = job_for(arm, bed, method, changes), held
    watch = Fixed(torch.cat([job.model.latents(o) for o in things.split(32)]), texts, a.every)
    train(job.model, job.method, job.judge, job.source, job.run, [watch])
    return watch.rows

def summary(runs):
    "Rows of one method over its seeds: own losses, the held-out loss, and its change since the first batch"
    first = torch.tensor([r[0]['held'] for r in runs])
    def row(k):
        held = torch.tensor([r[k]['held'] for r in runs])
        return dict(batch=runs[0][k]['batch'], own=[r[k]['own'] for r in runs], held=held.mean().item(),
                    change=over_seeds(held - first, 'things'), of_each_seed=(held - first).mean(1).tolist())
    return [row(k) for k in range(len(runs[0]))]

def known(file, asked):
    "Rows of a training that was measured before; SystemExit where it was asked for otherwise"
    told = read_json(file)
    if (was := told['asked'] | dict(seeds=asked['seeds'])) == asked: return told['rows']
    raise SystemExit(f'{file} was measured with {was}, not {asked}; remove it to measure it anew')

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--steps', type=int, default=80, help='batches of each training')
    p.add_argument('--every', type=int, default=20, help='batches between two looks')
    p.add_argument('--seeds', type=int, default=3); p.add_argument('--n', type=int, default=240)
    a = p.parse_args()
    torch.set_num_threads(1); quiet()
    folder, found = Path('runs/loss_curves'), {}
    folder.mkdir(parents=True, exist_ok=True)
    for world, make in HELD.items():
        bed, held, found[world] = bed_of(world, budget=1., heldout=2, looks=0), make(a.n), {}
        for name, arm in arms_of('comparison', ARMS).items():
            files = [folder/f'{world}-{name.replace(" ", "_")}-{s}.json' for s in range(a.seeds)]
            for s, f in enumerate(files):
                if not f.exists(): write_json(f, dict(asked=vars(a), rows=curve(bed, arm, held, a, s)))
            found[world][name] = summary([known(f, vars(a)) for f in files])
            print(world, name, [{k: r[k] for k in ('batch', 'held', 'change')} for r in found[world][name]])
    write('loss_curves', vars(a) | dict(draws=DRAWS, worlds=found))

if __name__ == '__main__': main()
