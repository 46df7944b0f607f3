#!/usr/bin/env python
"""An experiment seen from one of its arms: data/results/FOLDER-against.json

`python nbs/_dev/against.py runs/fractions-layouts GRAFT` takes the records of a finished experiment, and
compares every arm with the named one, prompt by prompt, as the experiment does with the base."""
import argparse
from pathlib import Path
from results import write
from diffusion_sharpening.basics.files import read_json
from diffusion_sharpening.experiments.arms import EXPERIMENTS
from diffusion_sharpening.experiments.compare import against, name_of

def records(folder, name):
    "Records of an arm, in the order of the seeds"
    return [read_json(f) for f in sorted((Path(folder)/'runs').glob(name_of(name, '[0-9]*')))]

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('folder'); p.add_argument('arm')
    a = p.parse_args()
    asked, control = read_json(Path(a.folder)/'experiment.json')['asked'], records(a.folder, a.arm)
    arms = {k: r for k in ('base', *EXPERIMENTS[asked['experiment']]) if (r := records(a.folder, k))}
    found = {k: against(r, control) for k, r in arms.items()}
    write(f'{Path(a.folder).name}-against', dict(asked=asked, arm=a.arm, arms=found))

if __name__ == '__main__': main()
