#!/usr/bin/env python
"""Searches against their budget on the embedded model: data/results/searches.json

`python nbs/_dev/searches.py run` makes what is missing, a part for each search, budget and seed in
runs/searches; stop it at any time and start it again. `gather` puts together the budgets that every search
and seed has."""
import argparse, time
from pathlib import Path
import torch
from results import write
from diffusion_sharpening.basics.files import read_json, write_json
from diffusion_sharpening.basics.stats import over_seeds
from diffusion_sharpening.commands.load import load_model
from diffusion_sharpening.evaluation.measure import start_seeds
from diffusion_sharpening.names.catalog import load_reward
from diffusion_sharpening.rewards.mixture import Combined, rank
from diffusion_sharpening.search.catalog import SEARCHES
from diffusion_sharpening.search.protocol import record
from diffusion_sharpening.worlds.exam import all_hold
from diffusion_sharpening.worlds.world import WORLDS

root, W = Path(__file__).resolve().parents[2], WORLDS['shapes']
parts, BUDGETS = root/'runs'/'searches', [1, 2, 4, 8, 16, 32]

def more_steps(model, judge, prompts, seeds, S, budget):
    "The base with as many sampler steps as the budget pays for"
    return SEARCHES['best_of_n'](model, judge, prompts, seeds, int(budget), budget)

def arms():
    "Name → search and verifier"
    clip = load_reward('clip', W.name)
    several = Combined([clip, load_reward('preference', W.name), load_reward('aesthetic', W.name)], how=rank)
    same = {k: (f, clip) for k, f in SEARCHES.items()}
    return {'base, more steps': (more_steps, clip)} | same | {
        'best_of_n, three judges': (SEARCHES['best_of_n'], several)}

def part(a, model, name, search, judge, k, seed):
    "Every caption with one search, budget and seed"
    texts, scores, start = W.prompts(a.n, 'heldout', 1), [], time.process_time()
    seeds = start_seeds(seed, a.n)
    for i in range(0, a.n, 8):
        own = slice(i, i + 8)
        res = search(model, judge, texts[own], seeds[own], a.S, a.S*k)
        scores.append((model.show(res.x0), res))
    images = torch.cat([x for x, _ in scores])
    exam, clip = W.exam(images, texts), load_reward('clip', W.name)(images, texts)
    lines = [len(record(res, b)['lineage']) for _, res in scores for b in range(len(res.value))]
    return dict(search=name, budget=k, seed=seed, S=a.S, nfe=max(r.nfe for _, r in scores),
                lineage=max(lines), calls=max(r.calls for _, r in scores),
                seconds=time.process_time() - start,
                exam=exam.tolist(), strict=all_hold(exam).tolist(), clip=clip.tolist())

def file_of(a, name, k, seed):
    return parts/f"{a.n}-{a.S}-{name.replace(', ', '-').replace(' ', '_')}-{k}-{seed}.json"

def run(a):
    "Make what is missing, small budgets first"
    parts.mkdir(parents=True, exist_ok=True)
    model = load_model('shapes')
    for k in BUDGETS:
        for seed in range(a.seeds):
            for name, (search, judge) in arms().items():
                if (f := file_of(a, name, k, seed)).exists(): continue
                got = part(a, model, name, search, judge, k, seed)
                write_json(f, got)
                print(f"{k:3}× {seed} {name:26} nfe {got['nfe']:6.1f} clip {sum(got['clip'])/a.n:.3f} exam "
                      f"{sum(got['exam'])/a.n:.3f} {got['seconds']:.0f} s", flush=True)

def gather(a):
    "The means with their intervals, and what each caption and seed gave"
    names, rows = list(arms()), []
    whole = lambda k: all(file_of(a, n, k, s).exists() for n in names for s in range(a.seeds))
    for k in filter(whole, BUDGETS):
        for name in names:
            got = [read_json(file_of(a, name, k, s)) for s in range(a.seeds)]
            table = {m: torch.tensor([o[m] for o in got]) for m in ('clip', 'exam', 'strict')}
            first = [read_json(file_of(a, name, 1, s)) for s in range(a.seeds)]
            gain = {m: t - torch.tensor([o[m] for o in first]) for m, t in table.items()}
            spent = {m: max(o[m] for o in got) for m in ('nfe', 'calls', 'seconds')}
            rows.append(dict(search=name, budget=k) | spent |
                        {m: over_seeds(t, 'captions') for m, t in table.items()} |
                        {f'gain_{m}': over_seeds(t, 'captions') for m, t in gain.items()})
    write('searches', dict(model='shapes', verifier='clip', captions=a.n, seeds=a.seeds, S=a.S, eta=W.eta,
                           rows=rows))

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('do', choices=['run', 'gather'])
    p.add_argument('--n', type=int, default=24, help='captions (default %(default)s)')
    p.add_argument('--seeds', type=int, default=3); p.add_argument('--S', type=int, default=10)
    torch.set_num_threads(1); a = p.parse_args()
    dict(run=run, gather=gather)[a.do](a)

if __name__ == '__main__': main()
