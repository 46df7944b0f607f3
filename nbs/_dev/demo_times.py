#!/usr/bin/env python
"""How long the demo of a world takes here, and what it changes: data/results/demo-times.json

`python nbs/_dev/demo_times.py layouts molecules` runs `sharpen demo --world …` as a user would, one after
the other, each in a process and a folder of its own."""
import argparse, os, resource, subprocess, sys, tempfile, time
from pathlib import Path
from results import write
from diffusion_sharpening.basics.files import read_json
from diffusion_sharpening.worlds.world import WORLDS

def spent(): return sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])

def one(world, steps):
    "Seconds on the clock and of the processor, imports included, and the changes of the judges"
    more = [] if steps is None else ['--steps', str(steps)]
    with tempfile.TemporaryDirectory() as out:
        began, before = time.time(), spent()
        asked = ['demo', '--world', world, '--out', out, *more]
        subprocess.run([sys.executable, '-m', 'diffusion_sharpening', *asked], check=True)
        took = dict(seconds=round(time.time() - began, 1), processor=round(spent() - before, 1))
        rep = read_json(Path(out)/'report.json')
    said = {k: rep[k] for k in ('steps', 'seconds_training', 'nfe_training', 'settings')}
    change = {k: v['overall'] for k, v in rep['delta']['judges'].items()}
    return dict(world=world, load=os.getloadavg()[0]) | took | said | dict(change=change)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('worlds', nargs='+', choices=list(WORLDS))
    p.add_argument('--steps', type=int, help='batches of the training, for a try')
    a = p.parse_args()
    write('demo-times', dict(demos=[one(w, a.steps) for w in a.worlds]))

if __name__ == '__main__': main()
