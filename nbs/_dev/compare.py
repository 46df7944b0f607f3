#!/usr/bin/env python
"""Train presets of SFT and RLHF at equal wall time over several seeds, and gather the changes on held-out
captions.

`python nbs/_dev/compare.py --seconds 100 --seeds 3` trains what is not there yet in runs/compare, then writes
data/results/comparison.json: means with 95 % intervals over seeds and captions."""
import argparse, json
from pathlib import Path
import torch
from diffusion_sharpening.basics.stats import over_seeds, shown
from diffusion_sharpening.commands.train import train
from results import write

root = Path(__file__).resolve().parents[2]
LR = dict(sft=1e-4, rlhf=5e-4)    # at 5e-4 every preset of SFT lost in an earlier comparison
SETUPS = dict(sft=['plain', 'paper', 'released', 'sde', 'sample'],
              rlhf=['paper', 'released', 'sde', 'sample', 'contrast'])

def read(path): return json.loads(path.read_text())

def one(name, seed, seconds, heldout):
    "Report and scores of one training, made unless they are there"
    method, preset = name.split('-')
    out = root/'runs'/'compare'/f'{name}-{seed}'
    if not (out/'report.json').exists():
        train(method, preset=preset, out=str(out), seed=seed, seconds=seconds, steps=10**6, lr=LR[method],
              heldout=heldout)
    return read(out/'report.json'), read(out/'scores.json')

def gains(scores):
    "Changes of every judge over seeds and captions, with their intervals"
    names = [k for k in scores[0]['after'] if all(k in s['before'] for s in scores)]
    side = (lambda when,
            k: torch.tensor([[float('nan') if v is None else v for v in s[when][k]] for s in scores]))
    return {k: over_seeds(side('after', k) - side('before', k), 'captions') for k in names}

def row(name, runs):
    "What one preset gave, over its seeds"
    reps, scores = zip(*runs)
    method, preset = name.split('-')
    stats = [r['delta']['image_stats'] for r in reps]
    return dict(method=method, preset=preset, seeds=[r['seed'] for r in reps],
                seconds=[r['seconds'] for r in reps],
                change=gains(scores), image_stats={k: sum(s[k] for s in stats)/len(stats) for k in stats[0]},
                batches=[r['batches'] for r in reps], lr=reps[0]['settings']['run']['lr'])

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--seconds', type=float, default=100)
    p.add_argument('--seeds', type=int, default=3)
    p.add_argument('--heldout', type=int, default=960)
    p.add_argument('--only', nargs='*', help='method-preset, e.g. rlhf-contrast')
    a = p.parse_args()
    names = [n for m, ks in SETUPS.items() for k in ks if (n := f'{m}-{k}') and (not a.only or n in a.only)]
    runs = {n: [] for n in names}
    for seed in range(a.seeds):        # a seed of all presets, then the next: at any time a fair comparison
        for n in names: runs[n].append(one(n, seed, a.seconds, a.heldout))
        rows = [row(n, r) for n, r in runs.items()]
        write('comparison', dict(heldout_prompts=a.heldout, rows=rows))
        for r in rows: print(r['method'], r['preset'], {k: shown(i, '+') for k, i in r['change'].items()})

if __name__ == '__main__': main()
