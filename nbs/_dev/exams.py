#!/usr/bin/env python
"What the exam says of the embedded model, beside the exam of an earlier commit: data/results/exams.json"
import argparse, subprocess, types
from pathlib import Path
import torch
from results import write
from diffusion_sharpening.basics.stats import interval
from diffusion_sharpening.commands.load import load_model
from diffusion_sharpening.evaluation.measure import evaluate
from diffusion_sharpening.worlds.exam import all_hold
from diffusion_sharpening.worlds.shapes.exam import bleed
from diffusion_sharpening.worlds.world import WORLDS

root = Path(__file__).resolve().parents[2]

def exam_of(commit):
    "`check(images, prompts)` as it was in a commit"
    file = 'diffusion_sharpening/worlds/shapes/exam.py'
    ask = ['git', 'show', f'{commit}:{file}']
    source = subprocess.run(ask, cwd=root, capture_output=True, text=True, check=True)
    old = types.ModuleType('diffusion_sharpening.worlds.shapes.earlier')
    old.__package__ = 'diffusion_sharpening.worlds.shapes'
    exec(compile(source.stdout, file, 'exec'), old.__dict__)
    return old.check

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--n', type=int, default=240, help='held-out captions (default %(default)s)')
    p.add_argument('--earlier', default='25697d3', help='commit of the other exam (default %(default)s)')
    p.add_argument('--model', default='shapes', help='model of Shapes: a name or a folder')
    p.add_argument('--name', default='exams', help='of the file of results')
    a = p.parse_args(); torch.set_num_threads(1)
    w = WORLDS['shapes']; texts = w.prompts(a.n, 'heldout', 1)
    e = evaluate(load_model(a.model), texts, {w.exam.name: w.exam}, 20)
    new, old = e.scores[w.exam.name], exam_of(a.earlier)(e.images, texts)
    sides = {'exam': new, f'exam of {a.earlier}': old}
    both = lambda parts: {k: dict(mean=interval(s), strict=interval(all_hold(s))) for k, s in parts.items()}
    about = dict(captions=a.n, distinct=len(set(texts)), steps=20, eta=0, model=Path(a.model).name)
    groups = both(w.by_group(new, texts))
    write(a.name, about | both(sides) | dict(groups=groups, bleed=bleed(e.images).mean().item()))

if __name__ == '__main__': main()
