#!/usr/bin/env python
"""Run `sharpen experiment` and keep what it came to as data/results/NAME-MODEL.json, with `--eta 0` as
NAME-MODEL-eta0.json:
`python nbs/_dev/experiments.py NAME [options of sharpen experiment]`"""
import sys
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
    name, eta = f"{rep['asked']['experiment']}-{rep['asked']['model']}", rep['asked']['eta']
    if eta is not None: name += f'-eta{eta:g}'
    write(name, {k: v for k, v in rep.items() if k != 'out'})

if __name__ == '__main__': main()
