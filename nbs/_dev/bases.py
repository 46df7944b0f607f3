#!/usr/bin/env python
"""The exam of base models at equal calls, and how much pictures of a caption differ: data/results/NAME.json

`python nbs/_dev/bases.py shapes shapes@3 FOLDER` measures all on the same captions, seeds and samplers; `@3`
asks for classifier-free guidance 3, which takes two calls a step."""
import argparse
from pathlib import Path
import torch
from results import write
from diffusion_sharpening.basics.stats import interval
from diffusion_sharpening.commands.load import load_model
from diffusion_sharpening.evaluation.measure import evaluate
from diffusion_sharpening.worlds.exam import all_hold
from diffusion_sharpening.worlds.world import WORLDS

def spread(images, k):
    "Root mean square difference of two pictures of one caption `(N,)`, of `(N·k, 3, H, W)`"
    x = images.view(-1, k, *images.shape[1:])
    return (2*x.var(1)).mean((1, 2, 3)).sqrt()

def both(scores):
    "Mean and strict"
    return dict(mean=interval(scores, 'captions'), strict=interval(all_hold(scores), 'captions'))

def loaded(spec):
    "A model by its name or folder, with guidance where `@` names it"
    name, _, guidance = spec.partition('@')
    return load_model(name, guidance=float(guidance or 1))

def measured(model, w, texts, eta, steps, few, k):
    "One model with one sampler"
    e = evaluate(model, texts, {w.exam.name: w.exam}, steps, eta)
    s = e.scores[w.exam.name]
    again = [t for t in texts[:few] for _ in range(k)]
    many = evaluate(model, again, {w.exam.name: w.exam}, steps, eta, seed=7)
    of = many.scores[w.exam.name].view(few, k)
    groups = {g: both(v) for g, v in w.by_group(s, texts).items()}
    apart = interval(spread(many.images, k), 'captions')
    return s, both(s) | dict(eta=eta, calls=e.nfe, groups=groups, spread=apart, k=k,
                             best_of_k=interval(of.amax(1), 'captions'))

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('models', nargs='+', help='names or folders; others are compared with the first')
    p.add_argument('--n', type=int, default=240, help='held-out captions (default %(default)s)')
    p.add_argument('--few', type=int, default=40, help='captions with several pictures (default %(default)s)')
    p.add_argument('--k', type=int, default=8, help='pictures of each of them (default %(default)s)')
    p.add_argument('--steps', type=int, default=20, help='of the sampler (default %(default)s)')
    p.add_argument('--eta', type=float, nargs='+', default=[0., 1.])
    p.add_argument('--name', default='bases', help='of the file of results')
    a = p.parse_args(); torch.set_num_threads(1)
    w = WORLDS['shapes']; texts, rows, first = w.prompts(a.n, 'heldout', 1), [], {}
    for name in a.models:
        model = loaded(name)
        for eta in a.eta:
            s, row = measured(model, w, texts, eta, a.steps, a.few, a.k)
            d = s - first.setdefault(eta, s)
            more = all_hold(s) - all_hold(first[eta])
            change = dict(mean=interval(d, 'captions'), strict=interval(more, 'captions'))
            if name != a.models[0]: row['change'] = change
            rows.append(dict(model=Path(name).name) | row)
            write(a.name, dict(captions=a.n, steps=a.steps, rows=rows))

if __name__ == '__main__': main()
