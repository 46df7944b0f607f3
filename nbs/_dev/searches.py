#!/usr/bin/env python
"""Searches against their budget on the embedded model, and on the model that was sharpened:
data/results/searches.json

`python nbs/_dev/searches.py --n 12` makes what is missing, a part for each search, budget and seed in
runs/searches, with sharpened models (runs/sharpened, as `sharpen demo` trains them, one for each seed), and
puts together what all seeds have; stop it at any time and start it again. `--only gather` only puts together.
With 12 captions it takes about 45 minutes of one core."""
import argparse, time
from pathlib import Path
import torch
from results import write
from diffusion_sharpening.basics.files import read_json, write_json
from diffusion_sharpening.basics.stats import over_seeds
from diffusion_sharpening.commands.load import load_model
from diffusion_sharpening.commands.provenance import provenance
from diffusion_sharpening.commands.train import resume, train
from diffusion_sharpening.evaluation.measure import start_seeds
from diffusion_sharpening.names.catalog import load_reward
from diffusion_sharpening.rewards.mixture import Combined, rank
from diffusion_sharpening.search.catalog import SEARCHES
from diffusion_sharpening.search.protocol import record
from diffusion_sharpening.training.folder import read_report, read_run
from diffusion_sharpening.worlds.exam import all_hold
from diffusion_sharpening.worlds.world import WORLDS

root, W = Path(__file__).resolve().parents[2], WORLDS['shapes']
parts, BUDGETS = root/'runs'/'searches', [1, 2, 4, 8, 16, 32]
BASE, THREE, SHARP = 'base, more steps', 'best_of_n, three judges', 'best_of_n, sharpened model'
NAMES = [BASE, *SEARCHES, THREE, SHARP]

def sharpened(seed, batches):
    "The embedded model with the LoRA of the demo's training, made unless it is there"
    out = root/'runs'/'sharpened'/f'{batches}-{seed}'
    asked = dict(model='shapes', steps=batches, seed=seed, decay=1., heldout=0)
    if not read_report(out):
        rep = resume('rlhf', str(out), **asked) if read_run(out) else train('rlhf', out=str(out), **asked)
        if 'stopped' in rep: raise SystemExit('stopped: start it again to go on')
    return load_model('shapes', lora=str(out))

def more_steps(model, judge, prompts, seeds, S, budget):
    "The base with as many sampler steps as the budget pays for"
    return SEARCHES['best_of_n'](model, judge, prompts, seeds, int(budget), budget)

def arms():
    "Name → search and verifier"
    clip = load_reward('clip', W.name)
    several = Combined([clip, load_reward('preference', W.name), load_reward('aesthetic', W.name)], how=rank)
    best, same = SEARCHES['best_of_n'], {k: (f, clip) for k, f in SEARCHES.items()}
    return {BASE: (more_steps, clip)} | same | {THREE: (best, several), SHARP: (best, clip)}

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
    return dict(search=name, budget=k, seed=seed, S=a.S, commit=provenance()['git_commit'],
                nfe=max(r.nfe for _, r in scores), lineage=max(lines), calls=max(r.calls for _, r in scores),
                seconds=time.process_time() - start,
                exam=exam.tolist(), strict=all_hold(exam).tolist(), clip=clip.tolist())

def file_of(a, name, k, seed):
    if name == SHARP: name = f'{SHARP} {a.batches}'
    return parts/f"{a.n}-{a.S}-{name.replace(', ', '-').replace(' ', '_')}-{k}-{seed}.json"

def order(a):
    "Budget, seed and name of every part: small budgets first, and last the models that are trained for it"
    seeds = range(a.seeds)
    plain = [(k, s, name) for k in BUDGETS for s in seeds for name in NAMES if name != SHARP]
    return plain + [(k, s, SHARP) for s in seeds for k in BUDGETS]

def run(a):
    "Make what is missing"
    parts.mkdir(parents=True, exist_ok=True)
    models, found = {}, arms()
    for k, seed, name in order(a):
        if (f := file_of(a, name, k, seed)).exists(): continue
        of = seed if name == SHARP else None
        if of not in models: models = {of: load_model('shapes') if of is None else sharpened(seed, a.batches)}
        got = part(a, models[of], name, *found[name], k, seed)
        write_json(f, got)
        print(f"{k:3}× {seed} {name:26} nfe {got['nfe']:6.1f} clip {sum(got['clip'])/a.n:.3f} exam "
              f"{sum(got['exam'])/a.n:.3f} {got['seconds']:.0f} s", flush=True)

def gather(a):
    "What all seeds have: means with intervals over captions and seeds, and gains over the base"
    read = lambda name, k: [read_json(file_of(a, name, k, s)) for s in range(a.seeds)]
    table = lambda got: {m: torch.tensor([o[m] for o in got]) for m in ('clip', 'exam', 'strict')}
    whole = lambda name, k: all(file_of(a, name, k, s).exists() for s in range(a.seeds))
    base, rows, commits = table(read(BASE, 1)), [], set()
    for name in NAMES:
        for got in (read(name, k) for k in BUDGETS if whole(name, k)):
            commits |= {o['commit'] for o in got}
            spent = {m: max(o[m] for o in got) for m in ('nfe', 'calls', 'seconds')}
            rows.append(dict(search=name, budget=got[0]['budget']) | spent |
                        {m: over_seeds(t, 'captions') for m, t in table(got).items()} |
                        {f'gain_{m}': over_seeds(t - base[m], 'captions') for m, t in table(got).items()})
    write('searches', dict(model='shapes', verifier='clip', captions=a.n, seeds=a.seeds, S=a.S, eta=W.eta,
                           batches=a.batches, parts_of_commits=sorted(commits), rows=rows))

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--n', type=int, default=24, help='captions (default %(default)s)')
    p.add_argument('--seeds', type=int, default=3, help='default %(default)s')
    p.add_argument('--S', type=int, default=10, help='sampler steps of one picture (default %(default)s)')
    p.add_argument('--batches', type=int, default=60, help='that sharpen the model (default %(default)s)')
    p.add_argument('--only', choices=['gather'], help='make nothing')
    torch.set_num_threads(1)
    a = p.parse_args()
    if not a.only: run(a)
    gather(a)

if __name__ == '__main__': main()
