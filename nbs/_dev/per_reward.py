#!/usr/bin/env python
"""What each reward makes of the same base: data/results/per_reward.json and figures/per_reward.png

`python nbs/_dev/per_reward.py` trains the default rule for 60 batches with each reward of Shapes, as the
demo does, has every judge look at the same held-out captions before and after, and draws the first caption of
each kind, from the same noise, under each of them. `--only clip` trains with one; what is in runs/per_reward
is not trained again."""
import argparse, textwrap
import matplotlib.pyplot as plt
import torch
from results import root, write
from diffusion_sharpening.basics.pictures import LITERAL, plain
from diffusion_sharpening.basics.stats import interval
from diffusion_sharpening.commands.load import load_model, quiet
from diffusion_sharpening.commands.train import resume, train
from diffusion_sharpening.evaluation.figures import columns
from diffusion_sharpening.evaluation.measure import evaluate, measures
from diffusion_sharpening.names.catalog import load_reward
from diffusion_sharpening.training.folder import read_report, read_run
from diffusion_sharpening.worlds.world import WORLDS

WORLD, REWARDS = WORLDS['shapes'], ('clip', 'preference', 'aesthetic', 'checker!')

def trained(reward, steps):
    "Folder of a training with one reward"
    out = f"runs/per_reward/{reward.strip('!')}"
    if read_report(out): return out
    if read_run(out): resume('rlhf', out)
    else: train('rlhf', model='shapes', reward=reward, steps=steps, heldout=0, out=out, decay=1.)
    return out

def draw(found, path):
    "A row for each caption, a column for each model"
    texts = found['base'].prompts
    which = columns(texts, 6)
    fig, axs = plt.subplots(len(which), len(found), figsize=(1.15*len(found) + 1.6, 1.22*len(which)),
                            layout='constrained')
    for row, i in zip(axs, which):
        for ax, (name, e) in zip(row, found.items()):
            ax.imshow(e.images[i].permute(1, 2, 0))
            ax.set(xticks=[], yticks=[])
            if i == which[0]: ax.set_title(name, fontsize=8)
        said = '\n'.join(textwrap.wrap(plain(texts[i]), 22))
        row[0].set_ylabel(said, fontsize=7, rotation=0, ha='right', va='center', **LITERAL)
    fig.savefig(path, dpi=110)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--steps', type=int, default=60); p.add_argument('--n', type=int, default=240)
    p.add_argument('--only', help='train with this reward and measure nothing')
    a = p.parse_args()
    torch.set_num_threads(1); quiet()
    if a.only: return trained(a.only, a.steps)
    texts = WORLD.prompts(a.n, 'heldout', 1)
    judges = {k: load_reward(k, WORLD.name, train=False) for k in ('clip', 'preference', 'aesthetic')}
    judges[WORLD.exam.name] = WORLD.exam
    loras = dict(base=None) | {r.strip('!'): trained(r, a.steps) for r in REWARDS}
    found = {k: evaluate(load_model('shapes', lora=v), texts, judges) for k, v in loras.items()}
    was = measures(found['base'])
    change = {k: {j: interval(v - was[j], 'captions') for j, v in measures(e).items()}
              for k, e in found.items() if k != 'base'}
    draw({'the base': found['base']} | {k: e for k, e in found.items() if k != 'base'},
         root/'figures'/'per_reward.png')
    base = {j: interval(v, 'captions') for j, v in was.items()}
    write('per_reward', dict(steps=a.steps, seed=0, base=base, rewards=change))

if __name__ == '__main__': main()
