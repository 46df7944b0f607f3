#!/usr/bin/env python
"""Kill trainings at random moments, saves included, go on with them, and compare the bits:
`python nbs/_dev/kill_runs.py [METHOD …] [--runs 20]`

Every method with every preset of the catalogue, or the methods named. Each run is a forked process that gets
SIGKILL after a random time of its processor, goes on, and is often killed a second time. It must end in the
weights, averages, optimizer moments, method state and history of the run left alone. All methods take
turns. The summary goes to data/results/kill_runs.json (not with --dry); begun again, with the same code, the
script goes on from there."""
import hashlib, json, os, random, signal, sys, tempfile, time
from dataclasses import fields
from pathlib import Path
import torch

torch.set_num_threads(1)
from diffusion_sharpening.commands.load import quiet
from arms import asked, known
from results import write
from diffusion_sharpening.data.sources import Columns, Pictures
from diffusion_sharpening.methods.catalog import find
from diffusion_sharpening.methods.protocol import noise_columns
from diffusion_sharpening.models.denoiser import Denoiser
from diffusion_sharpening.models.tiny import tiny_sdxl
from diffusion_sharpening.rewards.protocol import Reward
from diffusion_sharpening.training.callbacks import Log
from diffusion_sharpening.training.checkpoints import checkpoints, load_checkpoint
from diffusion_sharpening.training.folder import read_run, taken
from diffusion_sharpening.training.loop import train
from diffusion_sharpening.training.resume import Checkpoint, Record, Resume
from diffusion_sharpening.training.run import settings

TEXTS = ['a cat', 'a dog', 'a tree', 'a house']
SMALL = dict(n=2, m=2, S=3, K=2)     # of a method, where it has such a setting

class Bright(Reward):
    name, differentiable = 'bright', True
    def score(self, images, prompts): return images.mean((1, 2, 3))

def source(net, method, run):
    "Prompts, with pictures where the method learns from them"
    if not method.needs_images:
        made = noise_columns(method, net.item, len(TEXTS))
        return Columns(net, TEXTS, made, run.batch, run.seed)
    pictures = torch.rand(len(TEXTS), 3, *net.size, generator=torch.Generator().manual_seed(0))
    return Pictures(net, TEXTS, net.latents(pictures), run.batch, run.seed)

def run_once(arm, net, out, steps):
    "One sitting of a run, from its newest checkpoint to its end"
    name, preset = arm
    known = {f.name for f in fields(find(name, preset)())}
    small = {k: v for k, v in SMALL.items() if k in known}
    run, method = settings(name, preset, steps=steps, batch=2, rank=2, checkpoint_every=1, **small)
    about, at = dict(model='tiny', reward='bright'), out/'checkpoints'
    with taken(out, new=False):
        again, asked = bool(read_run(out)), dict(method=name, preset=preset, steps=steps)
        beside = [Resume(at, about), Record(out, asked, again), Log(out/'metrics.jsonl'),
                  Checkpoint(at, about, dict(asked=asked), resume=True)]
        train(net, method, Bright(), source(net, method, run), run, beside)

def processor_seconds(pid):
    "Processor time a child has used (Linux), so that a busy machine moves no kill; None once it has ended"
    try: return time.clock_gettime((~pid << 3) | 2)
    except OSError: return None

def sitting(*run, out, delay=None):
    "Run in a child; its processor seconds if it came to its end before it was killed, else False"
    pid = os.fork()
    if pid == 0:
        sys.stdout = sys.stderr = open(out.with_suffix('.txt'), 'w')
        try:
            run_once(*run)
            os._exit(0)
        except BaseException as e:
            print(f'{type(e).__name__}: {e}', flush=True)
            os._exit(1)
    while delay is not None and (used := processor_seconds(pid)) is not None:
        if used > delay: os.kill(pid, signal.SIGKILL)
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT): break
        time.sleep(.003)
    status, usage = os.wait4(pid, 0)[1:]
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit(f'a run of {run[0]} failed by itself: {out.with_suffix(".txt").read_text()[-500:]}')
    return os.WIFEXITED(status) and usage.ru_utime + usage.ru_stime

def digest(out):
    "The bits a run ended in: all tensors but the random states, the history and the counters"
    tensors, record = load_checkpoint(checkpoints(out/'checkpoints')[-1])
    h = hashlib.sha256()
    for part in sorted(tensors.keys() - {'random'}):
        for k in sorted(tensors[part]):
            h.update(f'{part}/{k}'.encode())
            h.update(tensors[part][k].numpy().tobytes())
    counts = {k: v for k, v in record['counts'].items() if k != 'seconds'}
    h.update(json.dumps([record['history'], counts]).encode())
    h.update((out/'metrics.jsonl').read_bytes())
    return h.hexdigest()

def left_alone(arm, net, d, steps):
    "Seconds of its processor that a run takes which nobody kills, and the bits it ends in"
    return sitting(arm, net, d/'whole', steps, out=d/'whole'), digest(d/'whole')

def killed(arm, net, out, steps, length, rng):
    "Kill a run once or twice and let it come to its end; the number of kills"
    for kills in range(rng.randint(1, 2)):
        if sitting(arm, net, out, steps, out=out, delay=rng.uniform(.05, 1.)*length): return kills
    sitting(arm, net, out, steps, out=out)
    return kills + 1

def report(found, a, seconds):
    "Sums over all methods, written as they are (not with --dry)"
    total = {k: sum(r[k] for r in found.values()) for k in ('runs', 'identical', 'kills')}
    line = (f"{total['identical']} of {total['runs']} runs of {len(found)} methods and presets ended "
            f"bit-identical to the uninterrupted one; {total['kills']} kills")
    total |= dict(batches=a.steps, seed=a.seed, seconds=round(seconds, 1), summary=line, arms=found)
    if not a.dry: write('kill_runs', total)
    return total

def main():
    a, todo = asked(__doc__, runs=(20, 'of each method and preset'), steps=(3, 'batches of a run'),
                    seed=(0, 'of the moments'))
    quiet()
    t0, alone = time.time(), {}
    found = {} if a.dry else known('kill_runs', dict(batches=a.steps, seed=a.seed))
    with tempfile.TemporaryDirectory() as d:
        d = Path(d)
        tiny_sdxl(d/'model')
        net = Denoiser.from_pretrained(d/'model', guidance=1., device='cpu')     # each child has its own copy
        for i, (name, arm) in [o for k in range(a.runs) for o in enumerate(todo.items())]:
            r = found.setdefault(name, dict(runs=0, identical=0, kills=0))
            if r['runs'] >= a.runs: continue
            if name not in alone:
                (d/f'arm{i}').mkdir()
                alone[name] = left_alone(arm, net, d/f'arm{i}', a.steps)
            out, rng = d/f'arm{i}'/f"run{r['runs']}", random.Random(f"{a.seed} {name} {r['runs']}")
            r['kills'] += killed(arm, net, out, a.steps, alone[name][0], rng)
            r['identical'] += digest(out) == alone[name][1]
            r['runs'] += 1
            print(f"{name:28}{r['identical']:>4} of {r['runs']} bit-identical{r['kills']:>6} kills",
                  flush=True)
            total = report(found, a, time.time() - t0)
    print(total['summary'])
    sys.exit(total['identical'] != total['runs'])

if __name__ == '__main__': main()
