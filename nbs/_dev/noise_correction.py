#!/usr/bin/env python
"""Inverse noise correction on Fashion-MNIST:
`python nbs/_dev/noise_correction.py [--data FOLDER] [--work FOLDER]`

Trains a small unconditional flow in pixel space and a classifier whose features measure it, inverts training
pictures through the flow, learns the law of the noises (an affine map, and a flow a quarter as large), and
measures the FID and KID of all of them against the pictures held out. Every stage is kept in the work folder
and goes on where it was stopped; data/results/noise_correction.json takes the numbers."""
import argparse
from functools import partial
from pathlib import Path
import torch

torch.set_num_threads(1)
from diffusion_sharpening.basics.seeds import fold
from diffusion_sharpening.data.idx import idx_pictures
from diffusion_sharpening.models.fit import fit, picks, trapezoid_lr
from diffusion_sharpening.models.pixels import PixelFlow

DATA = '/usr/share/datasets/fashion-mnist'
BASE, CORRECTOR = dict(widths=(64, 128)), dict(widths=(32, 64))
BATCH = 64

def train_flow(sizes, items, updates, path, lr=2e-3, seed=0):
    "A flow of pixels with averaged weights after `updates` updates; goes on from the file"
    torch.manual_seed(seed)
    model = PixelFlow(tuple(items.shape[1:]), **sizes).add_full()
    def loss(net, k):
        chosen, _ = picks(len(items), BATCH, seed, k)
        return model.denoising_loss(items[chosen], None, fold(seed, k, torch.arange(BATCH))).mean()
    fit(model.policies.net, loss, updates, lr, path, decay=.995, log=path.with_suffix('.jsonl'),
        rate=partial(trapezoid_lr, warm=100, decay=.3))
    return model

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', default=DATA, help='folder of idx files (default %(default)s)')
    p.add_argument('--work', type=Path, default=Path('runs/noise_correction'), help='default %(default)s')
    p.add_argument('--updates', type=int, default=1500, help='of the base (default %(default)s)')
    a = p.parse_args()
    a.work.mkdir(parents=True, exist_ok=True)
    pictures = 2*idx_pictures(a.data)[0] - 1
    base = train_flow(BASE, pictures, a.updates, a.work/'base.safetensors')

if __name__ == '__main__': main()
