#!/usr/bin/env python
"""How the default rule learns: data/results/learner.json and learner-signal.json

`python nbs/_dev/learner.py signal` measures the first gradient, its signal against its noise, by how times
and noise are drawn. `python nbs/_dev/learner.py run NAME --steps 80 --set lr=1e-3` trains with the exam as
reward and looks at held-out captions on the way; its log is runs/learner/NAME.json. `gather NAME…` puts logs
together."""
import argparse, json, time
from dataclasses import asdict
from pathlib import Path
import torch
from results import write
from diffusion_sharpening.basics.files import write_json
from diffusion_sharpening.basics.seeds import START, noise, stream
from diffusion_sharpening.basics.stats import interval
from diffusion_sharpening.commands.load import load_model
from diffusion_sharpening.commands.options import parse_settings
from diffusion_sharpening.commands.provenance import provenance
from diffusion_sharpening.data.sources import Prompts
from diffusion_sharpening.data.tables import prompt_set
from diffusion_sharpening.evaluation.measure import evaluate
from diffusion_sharpening.maths.choice import tied
from diffusion_sharpening.maths.schedules import add_noise
from diffusion_sharpening.methods.parts import at_end, candidate_seeds, from_prompt
from diffusion_sharpening.training.loop import Callback, LINEAR, train
from diffusion_sharpening.training.run import settings
from diffusion_sharpening.worlds.exam import all_hold
from diffusion_sharpening.worlds.world import WORLDS

root, W = Path(__file__).resolve().parents[2], WORLDS['shapes']
logs = root/'runs'/'learner'

# Ways to ask: first and last time; is the time shared by a prompt's candidates, and the noise?
WAYS = {'anywhere': (0, 1000, False, False), 'anywhere, one time': (0, 1000, True, False),
        'anywhere, one time and noise': (0, 1000, True, True), '400 to 900': (400, 900, False, False),
        '400 to 900, one time': (400, 900, True, False),
        '400 to 900, one time and noise': (400, 900, True, True)}

@torch.no_grad()
def candidates(model, prompts, n, S):
    "Per batch of eight prompts: samples, rewards, seeds, conditioning"
    source, out = Prompts(model, prompts, size=8), []
    for k in range(len(prompts)//8):
        b = source.batch(k); seeds = candidate_seeds(b.seeds, n)
        x0 = from_prompt(model, S, seeds, b.cond, model.eta)
        out.append((x0, at_end(model, W.exam, x0, b.prompts)[0], seeds, b.cond))
    return out

def drawn(seeds, lo, hi, one_time, one_noise):
    "Times and noise seeds of one prompt's candidates"
    share, fresh = (stream(seeds, 'time', 0) % 2**24).double()/2**24, stream(seeds, 'fresh', 0)
    if one_time: share = share[:1].expand(len(seeds))
    if one_noise: fresh = fresh[:1].expand(len(seeds))
    return (lo + share*(hi - lo)).long(), fresh

def gradients(model, groups, way):
    "The first gradient that each prompt gives `(prompts, weights)`"
    std, out = torch.cat([R - R.mean(0) for _, R, _, _ in groups], 1).std(correction=0), []
    for x0, R, seeds, cond in groups:
        for j in (~tied(R)).nonzero()[:, 0].tolist():
            t, fresh = drawn(seeds[:, j], *way)
            x_t = add_noise(model.schedule, x0[:, j], noise(fresh, START, model.item), t)
            d = (model.predict(x_t, t, cond[[j]*len(t)])[0] - x0[:, j]).flatten(1)
            loss = ((R[:, j] - R[:, j].mean())/std*d.square().mean(1)/d.detach().abs().mean(1)).mean()
            found = torch.autograd.grad(loss, model.trainable(), allow_unused=True)
            out.append(torch.cat([g.flatten() for g in found if g is not None]))
    return torch.stack(out)

def ratio(G):
    "Squared length of the mean gradient against that of the noise, with the standard error"
    n, M = len(G), G@G.T
    off = M - torch.diag(M.diagonal())
    signal, se = off.sum()/(n*(n - 1)), (2*off.square().sum()).sqrt()/(n*(n - 1))
    rest = M.diagonal().mean() - signal
    return dict(prompts=n, signal=signal.item(), noise=rest.item(), ratio=(signal/rest).item(),
                error=(se/rest).item())

def signal(a):
    "Every way on the same candidates"
    model = load_model('shapes').add_lora(32, targets=LINEAR, seed=0)
    groups = candidates(model, prompt_set('shapes', seed=0)[:a.prompts], 8, 10)
    rows = []
    for name, way in WAYS.items():
        rows.append(dict(way=name) | ratio(gradients(model, groups, way)))
        print(rows[-1])
    write('learner-signal', dict(candidates=8, S=10, eta=model.eta, rank=32, rows=rows))

class Watch(Callback):
    "The exam on held-out captions every so often"
    order = 90
    def __init__(self, texts, every, base):
        self.texts, self.every, self.base, self.rows = texts, every, base, []
    def update(self, s):
        if s.k % self.every == 0: self.look(s)
    def look(self, s):
        with s.model.use('ema' if s.run.ema else 'policy'): x = exam(s.model, self.texts)
        recent = s.history[-self.every:]
        of = {k: sum(r[k] for r in recent)/len(recent) for k in ('reward', 'best', 'spread', 'grad_norm')}
        found = dict(mean=x, strict=all_hold(x), gain=x - self.base)
        means = {k: interval(v, 'captions') for k, v in found.items()}
        self.rows.append(means | dict(batch=s.k, candidates=of))
        print({k: self.rows[-1][k] for k in ('batch', 'gain', 'candidates')}, flush=True)

def exam(model, texts): return evaluate(model, texts, dict(exam=W.exam)).scores['exam']

def run(a):
    "One training with the exam as reward"
    made, method = settings('rlhf', 'default', steps=a.steps, **parse_settings(a.set))
    model, prompts = load_model('shapes'), prompt_set('shapes', seed=made.seed)
    texts = W.prompts(a.n, 'heldout', 1)
    base, start = exam(model, texts), time.process_time()
    watch = Watch(texts, a.every, base)
    train(model, method, W.exam, Prompts(model, prompts, made.batch, made.seed), made, [watch])
    said = dict(name=a.name, captions=a.n, base=interval(base, 'captions'), rows=watch.rows,
                cpu_seconds=time.process_time() - start,
                settings=dict(run=asdict(made), method=asdict(method)))
    logs.mkdir(parents=True, exist_ok=True)
    write_json(logs/f'{a.name}.json', provenance() | said)

def gather(a): write('learner', dict(runs=[json.loads((logs/f'{n}.json').read_text()) for n in a.names]))

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = p.add_subparsers(required=True)
    q = sub.add_parser('signal'); q.set_defaults(do=signal); q.add_argument('--prompts', type=int, default=96)
    q = sub.add_parser('run'); q.set_defaults(do=run); q.add_argument('name')
    q.add_argument('--steps', type=int, default=80); q.add_argument('--every', type=int, default=20)
    q.add_argument('--n', type=int, default=120); q.add_argument('--set', action='append')
    q = sub.add_parser('gather'); q.set_defaults(do=gather); q.add_argument('names', nargs='+')
    torch.set_num_threads(1); a = p.parse_args(); a.do(a)

if __name__ == '__main__': main()
