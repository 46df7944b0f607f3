#!/usr/bin/env python
"""Run `sharpen experiment` and keep what it came to as data/results/FOLDER.json:
`python nbs/_dev/experiments.py NAME [options of sharpen experiment]`

FOLDER is the last part of `--out`, by itself NAME-MODEL."""
import sys
from pathlib import Path
import torch
from diffusion_sharpening.commands.cli import parser
from diffusion_sharpening.experiments.command import experiment, said
from results import write

def main():
    torch.set_num_threads(1)
    a = vars(parser('experiment').parse_args(sys.argv[1:]))
    a.pop('json', None)
    rep = experiment(**a)
    print(said(rep))
    write(Path(rep['out']).name, {k: v for k, v in rep.items() if k != 'out'})

if __name__ == '__main__': main()
