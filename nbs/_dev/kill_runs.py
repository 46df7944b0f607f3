#!/usr/bin/env python
"""Kill trainings at random moments, saves included, go on with them, and compare the bits: `python nbs/_dev/kill_runs.py --runs 200`

Each run is a forked process that gets SIGKILL after a random delay, again and again until it comes to its end. It must end in the weights, averages,
optimizer moments and history of the run that was left alone. The summary goes to data/results/kill_runs.json (not with --dry)."""
import argparse, hashlib, json, os, random, signal, sys, tempfile, time
from pathlib import Path
import torch

torch.set_num_threads(1)
from diffusion_sharpening.commands.load import quiet
from results import write
from diffusion_sharpening.models.denoiser import Denoiser
from diffusion_sharpening.rewards.protocol import Reward
from diffusion_sharpening.models.tiny import tiny_sdxl
from diffusion_sharpening.data.sources import Prompts
from diffusion_sharpening.training.folder import read_run, taken
from diffusion_sharpening.training.resume import Checkpoint, Record, Resume
from diffusion_sharpening.training.callbacks import Log
from diffusion_sharpening.training.checkpoints import checkpoints, load_checkpoint
from diffusion_sharpening.training.run import settings
from diffusion_sharpening.training.loop import train

root = Path(__file__).resolve().parents[2]
TEXTS = ['a cat', 'a dog', 'a tree', 'a house']

class Bright(Reward):
    name = 'bright'
    def score(self, images, prompts): return images.mean((1, 2, 3))

def run_once(model, out, steps):
    "One sitting of a run, from its newest checkpoint to its end"
    run, method = settings('rlhf', steps=steps, batch=2, S=3, n=2, rank=2, checkpoint_every=1)
    net = Denoiser.from_pretrained(model, guidance=1., device='cpu')
    about, at = dict(model='tiny', reward='bright'), out/'checkpoints'
    with taken(out, new=False):
        again, asked = bool(read_run(out)), dict(method='rlhf', steps=steps)
        beside = [Resume(at, about), Record(out, asked, again), Log(out/'metrics.jsonl'),
                  Checkpoint(at, about, dict(asked=asked), resume=True)]
        train(net, method, Bright(), Prompts(net, TEXTS, run.batch, run.seed), run, beside)

def sitting(model, out, steps, delay):
    "Run in a child; True if it came to its end before it was killed"
    pid = os.fork()
    if pid == 0:
        sys.stdout = sys.stderr = open(os.devnull, 'w')
        try: run_once(model, out, steps); os._exit(0)
        except BaseException: os._exit(1)
    if delay is not None: time.sleep(delay); os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    if os.WIFEXITED(status) and os.WEXITSTATUS(status): raise SystemExit(f'a run in {out} failed by itself')
    return os.WIFEXITED(status)

def digest(out):
    "The bits a run ended in: all tensors but the random states, the history and the counters"
    tensors, record = load_checkpoint(checkpoints(out/'checkpoints')[-1])
    h = hashlib.sha256()
    for part in ('weights', 'optimizer'):
        for k in sorted(tensors[part]): h.update(k.encode()); h.update(tensors[part][k].numpy().tobytes())
    counts = {k: v for k, v in record['counts'].items() if k != 'seconds'}
    h.update(json.dumps([record['history'], counts]).encode()); h.update((out/'metrics.jsonl').read_bytes())
    return h.hexdigest()

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--runs', type=int, default=200); p.add_argument('--steps', type=int, default=6)
    p.add_argument('--seed', type=int, default=0); p.add_argument('--dry', action='store_true', help='write no summary')
    a = p.parse_args(); quiet(); rng, kills, same, t0 = random.Random(a.seed), 0, 0, time.time()
    with tempfile.TemporaryDirectory() as d:
        d = Path(d); tiny_sdxl(d/'model')
        t = time.time(); sitting(d/'model', d/'whole', a.steps, None); length = time.time() - t
        want = digest(d/'whole')
        for i in range(a.runs):
            out = d/f'run{i}'
            while not sitting(d/'model', out, a.steps, rng.uniform(.05, 1.1)*length): kills += 1
            same += digest(out) == want
    line = f'{same} of {a.runs} runs ended bit-identical to the uninterrupted one; {kills} kills; {time.time()-t0:.0f} s'
    print(line)
    if not a.dry:
        write('kill_runs', dict(runs=a.runs, identical=same, kills=kills, batches=a.steps,
                                seconds=round(time.time()-t0, 1), summary=line))
    sys.exit(same != a.runs)

if __name__ == '__main__': main()
