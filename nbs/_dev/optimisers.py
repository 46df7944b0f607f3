#!/usr/bin/env python
"""AdamW and Muon on the autoencoder of Shapes at equal updates, from the same start on the same crops:
data/results/optimisers.json

`python nbs/_dev/optimisers.py` trains each pair of optimiser and rate for 150 updates, about a minute of one
core each."""
import argparse, json, tempfile, time
from pathlib import Path
import torch
from results import write
from diffusion_sharpening.models.fit import fit
from diffusion_sharpening.models.muon import adamw, muon
from diffusion_sharpening.worlds.shapes.base import autoencoder_loss, shapes_autoencoder
from diffusion_sharpening.worlds.shapes.draw import dataset

TRIED = [(adamw, 1e-3), (adamw, 2e-3), (adamw, 4e-3), (muon, 1e-3), (muon, 3e-3), (muon, 6e-3)]

def one(optimisers, lr, ims, steps):
    "Means of the loss over fifty updates at a time"
    start = time.process_time()
    with tempfile.TemporaryDirectory() as d:
        log = Path(d)/'log.jsonl'
        fit(shapes_autoencoder(), autoencoder_loss(ims, steps), steps, lr, f'{d}/state', log=log,
            optimisers=optimisers)
        losses = [json.loads(row)['loss'] for row in log.read_text().splitlines()]
    return dict(optimiser=optimisers.__name__, lr=lr, losses=losses, cpu_seconds=time.process_time() - start)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--steps', type=int, default=150, help='updates (default %(default)s)')
    p.add_argument('--pictures', type=int, default=2000, help='default %(default)s')
    a = p.parse_args(); torch.set_num_threads(1)
    ims, _ = dataset(a.pictures, 77)
    rows = [one(f, lr, ims, a.steps) for f, lr in TRIED]
    write('optimisers', dict(steps=a.steps, batch=32, pictures=a.pictures, rows=rows))

if __name__ == '__main__': main()
