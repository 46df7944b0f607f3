#!/usr/bin/env python
"""The demo over several seeds, and what changed on held-out captions: data/results/demo.json

`python nbs/_dev/demos.py --seeds 0 1 2` runs what is missing in runs/demos; `--only 1` runs one."""
import argparse, json
from pathlib import Path
import torch
from results import write
from diffusion_sharpening.basics.stats import numbers, over_seeds, shown
from diffusion_sharpening.commands.demo import demo

root = Path(__file__).resolve().parents[2]

def read(path): return json.loads(path.read_text())

def one(seed):
    "Report and scores of one demo, made unless they are there"
    out = root/'runs'/'demos'/str(seed)
    if not (out/'report.json').exists() and 'stopped' in demo(str(out), seed=seed):
        raise SystemExit(f'seed {seed} was stopped; the same command goes on with it')
    return read(out/'report.json'), read(out/'scores.json')

def rows(scores, side, judge):
    "Scores `(seeds, captions)`"
    return torch.stack([numbers(s[side][judge]) for s in scores])

def gathered(runs):
    "Before, after and change of every judge over seeds and captions"
    reps, scores = zip(*runs)
    sides = lambda k: {s: rows(scores, s, k) for s in ('before', 'after')}
    both = {k: sides(k) for k in scores[0]['after']}
    judges = {k: {s: over_seeds(x, 'captions') for s, x in (o | dict(change=o['after']-o['before'])).items()}
              for k, o in both.items()}
    each = {k: [x.mean().item() for x in o['after']-o['before']] for k, o in both.items()}
    said = ('seed', 'steps', 'seconds', 'seconds_training', 'nfe_training', 'skipped', 'settings', 'alarms')
    stats = [r['delta']['image_stats'] for r in reps]
    return dict(judges=judges, change_of_each_seed=each, image_stats=stats,
                sampler=reps[0]['after']['sampler'], runs=[{k: r[k] for k in said} for r in reps])

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    p.add_argument('--only', type=int, help='run this seed and gather nothing')
    a = p.parse_args()
    if a.only is not None: return one(a.only)
    found = write('demo', gathered([one(s) for s in a.seeds]))
    for k, o in found['judges'].items(): print(k, {s: shown(i) for s, i in o.items()})

if __name__ == '__main__': main()
