#!/usr/bin/env python
"""What arms of an experiment make, to be looked at: data/results/looks-MODEL.json

`python nbs/_dev/looks.py FOLDER… --arms 'NFT; RVM'` trains arms of experiments again, with the settings and
the first seed they had there, checks that they measure as they measured there, and keeps the first things
they make and what is measured on as many as are asked for. The base and the data are always among them.
Beside that, GRAFT of the first folder against standard fine-tuning on as many samples as it accepts."""
import argparse
from collections import Counter
from dataclasses import replace
from pathlib import Path
import torch
from results import write
from diffusion_sharpening.basics.files import read_json
from diffusion_sharpening.evaluation.measure import measures, statistics
from diffusion_sharpening.experiments.arms import BACKWARD, arms_of
from diffusion_sharpening.experiments.bed import bed_of, evaluated, record
from diffusion_sharpening.experiments.compare import against, name_of, tuned
from diffusion_sharpening.worlds.layouts.grammar import pages, prompt_of
from diffusion_sharpening.worlds.shapes.draw import picture, prompts
from diffusion_sharpening.worlds.molecules.data import load_graphs, molecule_pairs, split_of
from diffusion_sharpening.worlds.world import weights

def _pages(n):
    x = pages(n, 8, 'heldout')
    return x, [prompt_of(o) for o in x]

def _molecules(n): return molecule_pairs(split_of(load_graphs(weights('molecules-qm9')), 'heldout'), n, 8)

def _shapes(n):
    texts = prompts(n, 'heldout', 1)
    return torch.stack([picture(o, k, 'heldout') for k, o in enumerate(texts)]), texts

HELD = dict(shapes=_shapes, layouts=_pages, molecules=_molecules)   # true things, with held-out prompts

def place(folder):
    "Test bed, tuned arms and the records of the first seed of an experiment"
    asked = read_json(Path(folder)/'experiment.json')['asked']
    more = {k: asked[k] for k in ('budget', 'heldout', 'S')} | dict(eta=asked.get('eta'))
    bed = bed_of(asked['model'], asked['reward'], also=tuple(asked['also']), **more)
    def ready(name, arm):
        if name == 'base': return None
        tries = Path(asked.get('like') or folder)/'tries'
        return tuned(name, arm, bed, tries, False) if asked['tune'] else arm
    arms = {'base': None} | arms_of(asked['experiment'])
    there = {k: a for k, a in arms.items() if (Path(folder)/'runs'/name_of(k, 0)).exists()}
    return {k: (bed, ready(k, a), read_json(Path(folder)/'runs'/name_of(k, 0))) for k, a in there.items()}

def check(name, e, rec, reward):
    "The run is the one of the record; ValueError"
    then = torch.tensor(rec['scores'][reward])
    far = (e.scores[reward][:len(then)] - then).abs().max().item()
    if far > 1e-3: raise ValueError(f'{name}: expected the scores of the record, found them {far:.3g} off')

def plain(x): return [[[round(v, 3) for v in row] for row in thing] for thing in x.tolist()]

def seen(world, things, texts, scores):
    "Means of all that can be measured on things, the first of them, and those that are there most often"
    mean = lambda d: {k: v.float().mean().item() for k, v in d.items()}
    made = Counter(str(o) for o in plain(things))
    often = [(n, k) for k, n in made.most_common(3)]
    return dict(scores=mean(scores), stats=mean(statistics(things, texts)), sets=world.sets(things),
                n=len(texts), different=len(made), often=often, things=plain(things[:16]), texts=texts[:16])

def equal(folder, arms):
    "GRAFT, and standard fine-tuning on as many pictures as GRAFT accepts, over the seeds of an experiment"
    bed, arm, rec = arms['GRAFT']
    run, method = arm.made()
    accepted, standard = rec['steps']*run.batch*method.K, arms['standard'][1]
    few = replace(bed, budget=accepted*(1 + BACKWARD))
    files = lambda name: sorted((Path(folder)/'runs').glob(name_of(name, '[0-9]*')))
    there = {k: [read_json(f) for f in files(k)] for k in ('base', 'GRAFT')}
    seeds = range(min(map(len, there.values())))
    base, graft = ([there[k][s] for s in seeds] for k in ('base', 'GRAFT'))
    rows = {'GRAFT': graft, 'standard': [record(standard, few, s) for s in seeds]}
    return dict(accepted=accepted, batch=standard.batch, arms={k: against(v, base) for k, v in rows.items()})

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('folders', nargs='+'); p.add_argument('--arms', default='')
    p.add_argument('--heldout', type=int, default=240, help='prompts that are measured')
    a = p.parse_args()
    torch.set_num_threads(1)
    arms = {k: v for f in a.folders for k, v in place(f).items()}
    bed = replace(arms['base'][0], heldout=a.heldout)
    things, texts = HELD[bed.world.name](a.heldout)
    scores = {k: j(things, texts) for k, j in bed.judges.items()}
    found = dict(data=seen(bed.world, things, texts, scores))
    for name in ['base', *filter(None, map(str.strip, a.arms.split(';')))]:
        own, arm, rec = arms[name]
        e = evaluated(arm, replace(own, heldout=a.heldout), 0)[0]
        check(name, e, rec, own.followed.name)
        found[name] = seen(bed.world, e.images, e.prompts, measures(e))
        print(name, {k: found[name][k] for k in ('scores', 'sets', 'different')}, flush=True)
    same = equal(a.folders[0], arms)
    packages = [p for k, p in (('valid', 'rdkit'), ('fcd', 'fcd')) if k in found['base']['sets']]
    where = [Path(f).name for f in a.folders]
    write(f'looks-{bed.model}', dict(experiments=where, arms=found, equal=same), packages)

if __name__ == '__main__': main()
