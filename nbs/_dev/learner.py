#!/usr/bin/env python
"""How the default rule learns: data/results/learner.json and learner-signal.json

`python nbs/_dev/learner.py signal shapes FOLDER` measures the first gradient of each model: its signal
against its noise, by what candidates share and how often they are asked, and how far it is the gradient
of guidance. `python nbs/_dev/learner.py run NAME --steps 80 --set lr=1e-3` trains with the exam as reward
and looks at held-out captions on the way; `--reward clip` follows a judge instead and looks at both. Its
log is runs/learner/NAME.json, and the same command goes on where it was stopped. `--method` trains with
another method, and `--guidance 3` trains and measures the model as it is under guidance. `gather NAME…`
puts logs together."""
import argparse, json, time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
import torch
from results import write
from diffusion_sharpening.basics.files import read_json, write_json
from diffusion_sharpening.basics.seeds import START, noise, stream
from diffusion_sharpening.basics.stats import interval, shown
from diffusion_sharpening.commands.load import load_model
from diffusion_sharpening.commands.options import parse_settings
from diffusion_sharpening.commands.provenance import provenance
from diffusion_sharpening.data.sources import Prompts
from diffusion_sharpening.data.tables import prompt_set
from diffusion_sharpening.evaluation.alarms import alarms
from diffusion_sharpening.evaluation.measure import evaluate, statistics
from diffusion_sharpening.maths.choice import tied
from diffusion_sharpening.maths.rollout import rollout
from diffusion_sharpening.maths.schedules import add_noise
from diffusion_sharpening.methods.parts import at_end, candidate_seeds
from diffusion_sharpening.names.catalog import load_reward
from diffusion_sharpening.training.loop import Callback, LINEAR, train
from diffusion_sharpening.training.resume import Checkpoint, Resume
from diffusion_sharpening.training.run import settings
from diffusion_sharpening.worlds.exam import all_hold
from diffusion_sharpening.worlds.world import WORLDS

root, W = Path(__file__).resolve().parents[2], WORLDS['shapes']
logs = root/'runs'/'learner'

@dataclass
class Way:
    "What the candidates of a prompt share, and how they are asked"
    lo: int = 400 # First time
    hi: int = 900 # Last time
    one_time: bool = True # Is it shared?
    one_noise: bool = False # Is the fresh noise shared?
    draws: int = 1 # Times and noises of each
    opposite: bool = False # Is every second draw the one before with the noise turned round?
    steps: int = 0 # Of ten of the sampler that are shared; they branch after that

TIMES = (200, 400), (400, 550), (550, 700), (700, 850), (850, 1000)

WAYS = {'anywhere': Way(0, 1000, False), '400 to 900': Way(one_time=False), 'one time': Way(),
        'one time and noise': Way(one_noise=True), 'four draws': Way(draws=4),
        'four draws, one noise': Way(one_noise=True, draws=4), 'sixteen draws': Way(draws=16),
        'four draws, 2 steps': Way(draws=4, steps=2), 'four draws, 5 steps': Way(draws=4, steps=5),
        'two pairs': Way(draws=4, opposite=True), 'eight pairs': Way(draws=16, opposite=True),
        **{f'four draws, {lo} to {hi}': Way(lo, hi, draws=4) for lo, hi in TIMES}}

def sampled(model, S, seeds, cond, shared):
    "One sample for each seed; those of a prompt share the first steps"
    first, grid = (seeds[:1] if shared else seeds), model.grid(S)
    x = noise(first, START, model.item)
    if shared: x = rollout(model, x, grid[:shared + 1], cond, model.eta, first, keep=False).end
    x = x.expand(len(seeds), *x.shape[1:])
    return rollout(model, x, grid[shared:], cond, model.eta, seeds, keep=False).end

@torch.no_grad()
def candidates(model, prompts, n, S, shared):
    "Per prompt whose candidates differ: samples, rewards, seeds, conditioning; and the spread of all"
    source, out = Prompts(model, prompts, size=8), []
    for k in range(len(prompts)//8):
        b = source.batch(k); seeds = candidate_seeds(b.seeds, n)
        x0 = sampled(model, S, seeds, b.cond, shared)
        R, _ = at_end(model, W.exam, x0, b.prompts)
        out += [(x0[:, j], R[:, j], seeds[:, j], b.cond[[j]*n]) for j in range(8)]
    std = torch.stack([R - R.mean() for _, R, _, _ in out]).square().mean().sqrt()
    return [g for g in out if not tied(g[1][:, None]).all()], std

def noisy(model, x0, seeds, way, k):
    "One prompt's candidates, noised again: states and times"
    def drawn(what, shared):
        s = stream(seeds, what, k)
        return s[:1].expand(len(s)) if shared else s
    turn = way.opposite and k % 2
    k -= turn
    share = (drawn('time', way.one_time) % 2**24).double()/2**24
    t = (way.lo + share*(way.hi - way.lo)).long()
    eps = (-1)**turn*noise(drawn('fresh', way.one_noise), START, model.item)
    return add_noise(model.schedule, x0, eps, t), t

def pull(pred, target, weight=1.):
    "The loss that pulls estimates towards targets, or pushes them away"
    d = (pred - target).flatten(1)
    return (weight*d.square().mean(1)/d.detach().abs().mean(1)).mean()

def gradient(loss, model):
    "Of all that learns, as one vector"
    found = torch.autograd.grad(loss, model.trainable(), allow_unused=True)
    return torch.cat([g.flatten() for g in found if g is not None])

def mean_gradient(model, way, loss):
    "Of `loss(k)` over the draws"
    return sum(gradient(loss(k), model) for k in range(way.draws))/way.draws

def of_reward(model, group, way, std):
    "The first gradient that one prompt gives"
    x0, R, seeds, cond = group
    def loss(k):
        x_t, t = noisy(model, x0, seeds, way, k)
        return pull(model.predict(x_t, t, cond)[0], x0, (R - R.mean())/std)
    return mean_gradient(model, way, loss)

def of_guidance(model, group, way, scale=3.):
    "The gradient that pulls the same estimates to those under guidance"
    x0, _, seeds, cond = group
    def loss(k):
        x_t, t = noisy(model, x0, seeds, way, k)
        with torch.no_grad(): aim = model.with_guidance(scale).predict(x_t, t, cond)[0]
        return pull(model.predict(x_t, t, cond)[0], aim)
    return mean_gradient(model, way, loss)

def products(A, B):
    "Of gradients of different prompts"
    M = A@B.T
    return M.masked_fill(torch.eye(len(M), dtype=torch.bool), 0.)

def ratio(G):
    "Squared length of the mean gradient against that of the noise, with the standard error"
    n, off = len(G), products(G, G)
    signal, se = off.sum()/(n*(n - 1)), (2*off.square().sum()).sqrt()/(n*(n - 1))
    rest = G.square().sum(1).mean() - signal
    return dict(prompts=n, signal=signal.item(), noise=rest.item(), ratio=(signal/rest).item(),
                error=(se/rest).item())

def cosine(G, H):
    "Of the two mean gradients, without the bias of their noise, and its jackknife error"
    gg, hh, gh = products(G, G), products(H, H), products(G, H)
    def without(M): return M.sum() - M.sum(0) - M.sum(1)
    each = without(gh)/(without(gg)*without(hh)).clamp(min=1e-30).sqrt()
    n, found = len(G), gh.sum()/(gg.sum()*hh.sum()).clamp(min=1e-30).sqrt()
    error = ((n - 1)/n*(each - each.mean()).square().sum()).sqrt()
    return dict(cosine=found.item(), cosine_error=error.item())

LAYERS = {'self-attention': '.attn1.', 'cross-attention': '.attn2.', 'feed-forward': '.ff.',
          'projections': '.proj_', 'of the time': 'time_emb', 'down': 'down_', 'middle': 'mid_', 'up': 'up_'}

def by_layer(G, model):
    "Ratio of the columns of each kind of layer"
    sizes = [(k, p.numel()) for k, p in model.policies.named['policy'].items()]
    def of(mark): return torch.cat([torch.full((n,), mark in f'.{k}') for k, n in sizes])
    return {k: ratio(G[:, of(mark)]) for k, mark in LAYERS.items()}

def signal(a):
    "Every way, and how far the signal is that of guidance"
    rows, prompts = [], prompt_set('shapes', seed=0)[:a.prompts]
    for name in a.models:
        model = load_model(name, guidance=1., eta=1.).add_lora(32, targets=LINEAR, seed=0)
        made = {k: candidates(model, prompts, 8, 10, k) for k in {w.steps for w in WAYS.values()}}
        for label, way in WAYS.items():
            live, std = made[way.steps]
            G = torch.stack([of_reward(model, g, way, std) for g in live])
            rows.append(dict(model=Path(name).name, way=label, spread=std.item()) | asdict(way) | ratio(G))
            if label == 'four draws':
                rows[-1] |= cosine(G, torch.stack([of_guidance(model, g, way) for g in live]))
                rows[-1]['layers'] = by_layer(G, model)
            print(rows[-1], flush=True)
    write('learner-signal', dict(candidates=8, S=10, eta=model.eta, rank=32, guidance=3., rows=rows))

KEPT = 'reward', 'best', 'spread', 'apart', 'grad_norm' # Of the log of a batch

class Watch(Callback):
    "Exam, the judge that is followed and alarms on held-out captions, every so often"
    order = 90
    def __init__(self, texts, every, judges, model, keep, rows): # `keep(watch)` after each look
        self.texts, self.every, self.judges, self.keep, self.rows = texts, every, judges, keep, rows
        self.base = self.asked(model)
    def start(self, s): self.rows = [r for r in self.rows if r['batch'] <= s.k]
    def asked(self, model): return evaluate(model, self.texts, self.judges)
    def update(self, s):
        if s.k % self.every == 0: self.look(s)
    def look(self, s):
        with s.model.use('ema' if s.run.ema else 'policy'): e = self.asked(s.model)
        was, got, x = self.base.scores, e.scores, e.scores['exam']
        recent = s.history[-self.every:]
        of = {k: sum(r[k] for r in recent)/len(recent) for k in KEPT if k in recent[0]}
        found = dict(mean=x, strict=all_hold(x), gain=x - was['exam'],
                     gain_strict=(all_hold(x) - all_hold(was['exam'])).float())
        found |= {f'gain_{k}': v - was[k] for k, v in got.items() if k != 'exam'}
        means = {k: interval(v, 'captions') for k, v in found.items()}
        rang = alarms(e.images, self.base.images, stats=partial(statistics, prompts=self.texts))
        self.rows.append(means | dict(batch=s.k, candidates=of, alarms=rang))
        print({k: shown(v) if k in means else v for k, v in self.rows[-1].items()}, flush=True)
        self.keep(self)

def run(a):
    "One training with the exam as reward, or with a judge"
    own = dict(steps=a.steps, checkpoint_every=a.every) | parse_settings(a.set)
    made, method = settings(a.method, a.preset, **own)
    model, prompts = load_model('shapes', a.guidance), prompt_set('shapes', seed=made.seed)
    texts = W.prompts(a.n, 'heldout', 1)
    judge = load_reward(a.reward, W.name) if a.reward else W.exam
    judges = dict(exam=W.exam) | ({a.reward: judge} if a.reward else {})
    file, folder = logs/f'{a.name}.json', logs/a.name
    old = read_json(file) if file.exists() else dict(rows=[], cpu_seconds=0.)
    start = time.process_time() - old['cpu_seconds']
    logs.mkdir(parents=True, exist_ok=True)
    def keep(watch):
        write_json(file, provenance() | dict(
            name=a.name, method=a.method, preset=a.preset, guidance=a.guidance, captions=a.n, rows=watch.rows,
            reward=(a.reward or 'exam') if method.needs_judge else None,
            base=interval(watch.base.scores['exam'], 'captions'), cpu_seconds=time.process_time() - start,
            settings=dict(run=asdict(made), method=asdict(method))))
    watch = Watch(texts, a.every, judges, model, keep, old['rows'])
    about = dict(reward=a.reward, guidance=a.guidance)
    beside = [watch, Resume(folder, about), Checkpoint(folder, about, resume=True)]
    train(model, method, judge, Prompts(model, prompts, made.batch, made.seed), made, beside)

def gather(a): write(a.out, dict(runs=[json.loads((logs/f'{n}.json').read_text()) for n in a.names]))

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = p.add_subparsers(required=True)
    q = sub.add_parser('signal'); q.set_defaults(do=signal); q.add_argument('--prompts', type=int, default=96)
    q.add_argument('models', nargs='*', default=['shapes'], help='names or folders')
    q = sub.add_parser('run'); q.set_defaults(do=run); q.add_argument('name')
    q.add_argument('--method', default='rlhf'); q.add_argument('--preset', default='default')
    q.add_argument('--steps', type=int, default=80); q.add_argument('--every', type=int, default=20)
    q.add_argument('--n', type=int, default=120); q.add_argument('--set', action='append')
    q.add_argument('--guidance', type=float, default=1.)
    q.add_argument('--reward', help='a judge of this world (default: the exam)')
    q = sub.add_parser('gather'); q.set_defaults(do=gather); q.add_argument('names', nargs='+')
    q.add_argument('--out', default='learner', help='the file of data/results')
    torch.set_num_threads(1); a = p.parse_args(); a.do(a)

if __name__ == '__main__': main()
