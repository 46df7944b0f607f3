#!/usr/bin/env python
"""The figure of the README, from the first demo of `demos.py`: `python nbs/_dev/front_figure.py`

Both sides are made again and must score what the demo wrote down. `make readme` makes the narrow form. How
many captions rose and fell goes to data/results/front.json."""
import argparse
from pathlib import Path
import torch
from results import write
from diffusion_sharpening.basics.files import read_json
from diffusion_sharpening.basics.stats import numbers
from diffusion_sharpening.commands.load import load_model
from diffusion_sharpening.evaluation.figures import before_after
from diffusion_sharpening.evaluation.measure import evaluate
from diffusion_sharpening.worlds.world import WORLDS

root, exam = Path(__file__).resolve().parents[2], WORLDS['shapes'].exam

def side(told, which, lora=None):
    "Pictures and scores of one side, once more"
    found = evaluate(load_model('shapes', lora=lora), told['prompts'], {exam.name: exam})
    now, was = found.scores[exam.name].double(), numbers(told[which][exam.name])
    if torch.allclose(now, was, atol=1e-4): return found
    raise SystemExit(f'{which}: {exam.name} is {now.mean():.4f} now, was {was.mean():.4f}')

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--run', type=Path, default=root/'runs'/'demos'/'0', help='folder of a demo')
    a = p.parse_args()
    told = read_json(a.run/'scores.json')
    was, now = side(told, 'before'), side(told, 'after', str(a.run))
    change = now.scores[exam.name] - was.scores[exam.name]
    write('front', dict(captions=len(change), rose=(change > 0).sum().item(), fell=(change < 0).sum().item()))
    before_after(was, now, root/'figures'/'demo.png', exam.name)

if __name__ == '__main__': main()
