#!/usr/bin/env python
"""Train presets of SFT and RLHF at equal wall time over several seeds, and gather the changes on held-out prompts.

`python nbs/_dev/compare.py --seconds 100 --seeds 3` trains what is not there yet in runs/compare, then writes data/results/comparison.json."""
import argparse, json
from pathlib import Path
import torch
from diffusion_sharpening.commands.provenance import provenance
from diffusion_sharpening.commands.train import train

root = Path(__file__).resolve().parents[2]
LR = dict(sft=1e-4, rlhf=5e-4)    # at 5e-4 every preset of SFT lost in an earlier comparison
SETUPS = dict(sft=['plain', 'paper', 'released', 'sde', 'sample'], rlhf=['paper', 'released', 'sde', 'sample', 'contrast'])

def one(method, preset, seed, seconds, folder):
    "Train once, unless its report is there"
    out = folder/f'{method}-{preset}-{seed}'
    if not (out/'report.json').exists():
        train(method, preset=preset, out=str(out), seed=seed, seconds=seconds, steps=10**6, lr=LR[method])
    return json.loads((out/'report.json').read_text())

def pooled(reps, pick):
    "Mean over seeds of a paired change, with the interval of the mean over seeds and prompts"
    xs = [pick(r) for r in reps]; mean = sum(x['mean'] for x in xs)/len(xs)
    var = sum(((x['high']-x['low'])/3.92)**2 for x in xs)/len(xs)**2
    between = torch.tensor([x['mean'] for x in xs]).var().item()/len(xs) if len(xs) > 1 else 0.
    half = 1.96*max(var, between)**.5
    return dict(mean=mean, low=mean-half, high=mean+half)

def row(method, preset, reps):
    return dict(method=method, preset=preset, seeds=[r['seed'] for r in reps], seconds=[r['seconds'] for r in reps],
                checker=pooled(reps, lambda r: r['delta']['checker']['overall']), reward=pooled(reps, lambda r: r['delta']['reward']),
                image_stats={k: sum(r['delta']['image_stats'][k] for r in reps)/len(reps) for k in reps[0]['delta']['image_stats']},
                batches=[r['batches'] for r in reps], lr=reps[0]['settings']['run']['lr'])

def compare(names, seeds, seconds, command):
    "All presets with the first seed, then with the next: what is there so far is always a fair comparison"
    folder, reps, out = root/'runs'/'compare', {n: [] for n in names}, root/'data'/'results'/'comparison.json'
    out.parent.mkdir(parents=True, exist_ok=True)
    for s in range(seeds):
        for n in names: reps[n].append(one(*n.split('-'), s, seconds, folder)); print(n, s, reps[n][-1]['delta']['checker']['overall'], flush=True)
        rows = [row(*n.split('-'), r) for n, r in reps.items()]
        out.write_text(json.dumps(dict(command=command, heldout_prompts=reps[names[0]][0]['heldout_prompts'], rows=rows, **provenance()), indent=1)+'\n')

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--seconds', type=float, default=100); p.add_argument('--seeds', type=int, default=3)
    p.add_argument('--only', nargs='*', help='method-preset, e.g. rlhf-contrast')
    a = p.parse_args(); names = [f'{m}-{k}' for m, ks in SETUPS.items() for k in ks]
    cmd = f'python nbs/_dev/compare.py --seconds {a.seconds:g} --seeds {a.seeds}' + (f" --only {' '.join(a.only)}" if a.only else '')
    compare([n for n in names if not a.only or n in a.only], a.seeds, a.seconds, cmd)

if __name__ == '__main__': main()
