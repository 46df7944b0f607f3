#!/usr/bin/env python
"""Time and memory of the inner loops:
`python nbs/_dev/bench.py [rollout|selection|update|methods|search|adapters] [--model FOLDER] [--write]`

Everything is timed in turns: a round times each way once, in an order that turns, and what is reported is the
median over rounds of the ratio within a round, with a 95 % interval of that median. A busy machine makes the
interval wide rather than the ratio wrong; the final numbers want a quiet one."""
import argparse, json, os, resource, statistics, subprocess, sys, tempfile, time
from math import comb
from pathlib import Path

root = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(root))
import torch
from results import write
from diffusion_sharpening.basics.seeds import START, fold, noise, stream
from diffusion_sharpening.basics.stats import shown
from diffusion_sharpening.commands.load import quiet
from diffusion_sharpening.data.sources import Batch
from diffusion_sharpening.maths.choice import pair, pick, standardise, weights
from diffusion_sharpening.maths.losses import denoising, log_ratio
from diffusion_sharpening.maths.rollout import Meter, rollout
from diffusion_sharpening.maths.samplers import step
from diffusion_sharpening.maths.schedules import add_noise, target
from diffusion_sharpening.methods.catalog import METHODS, find
from diffusion_sharpening.methods.parts import (
    along_path, begun, candidate_seeds, from_noises, from_prompt, margin_loss, path_error, path_rows, turned)
from diffusion_sharpening.methods.protocol import noise_columns
from diffusion_sharpening.models.denoiser import Denoiser
from diffusion_sharpening.models.policies import apart
from diffusion_sharpening.models.tiny import tiny_sdxl
from diffusion_sharpening.names.catalog import load_reward
from diffusion_sharpening.rewards.protocol import Reward
from diffusion_sharpening.search.catalog import SEARCHES
from diffusion_sharpening.training.loop import collect, learn, prepare, State
from diffusion_sharpening.training.processes import Team, accelerator
from diffusion_sharpening.training.run import settings
from diffusion_sharpening.worlds.world import model_path

KINDS = ['rollout', 'selection', 'update', 'methods', 'search', 'adapters']
WORLD = 'shapes'
prompts = ['a red circle', 'a blue square', 'a green star', 'a yellow triangle']

def embedded(): return model_path(WORLD)

def medium(folder):
    "Folder of an untrained pipeline whose network takes some ten times what the embedded one takes"
    if not (Path(folder)/'model_index.json').exists():
        tiny_sdxl(folder, channels=(128, 256), attn=(True, True), head_dim=32, text=(64, 96), words=prompts,
                  sample_size=16)
    return str(folder)

def load(folder, guidance=1.):
    quiet()
    return Denoiser.from_pretrained(folder, guidance=guidance)

def now():
    "Seconds on a clock that stops for nothing, once the device has finished"
    if torch.cuda.is_available(): torch.cuda.synchronize()
    return time.perf_counter()

def seconds(f):
    start = now()
    f()
    return now() - start

def paired(fs, repeat):
    "Seconds of each function of `fs` in `repeat` rounds; the order turns, so that drift hits all alike"
    names, rows = list(fs), []
    for f in fs.values(): f()                                        # warm up
    for i in range(repeat):
        order = names[i % len(names):] + names[:i % len(names)]
        took = {k: seconds(fs[k]) for k in order}
        rows.append({k: took[k] for k in names})
    return rows

def median(values):
    "Median with the 95 % interval that order statistics give; None where there are too few values"
    v, n = sorted(values), len(values)
    below = lambda k: sum(comb(n, i) for i in range(k + 1))/2**n     # P(at most k values below the median)
    k = max((k for k in range(n//2) if below(k) <= .025), default=None)
    bounds = (None, None) if k is None else (v[k], v[n-1-k])
    return dict(median=statistics.median(v), low=bounds[0], high=bounds[1])

def ratio(rows, a, b): return median([r[a]/r[b] for r in rows])   # of each round, then the median
def typical(rows): return {k: statistics.median(r[k] for r in rows) for k in rows[0]}

def said(r):
    "A median and its interval as text"
    return shown(dict(mean=r['median'], low=r['low'], high=r['high']), over='')

# Rollout, bare network calls and the diffusers pipeline

def bare(d, x, ts, inputs):
    "The network alone, as often as a rollout calls it and with the same batch"
    times = [t.expand(len(x)) for t in ts[:-1]]
    def run():
        with torch.no_grad():
            for t in times: d.family.forward(d.policies, x, t, inputs)
    return run

def stock(folder, d, B, S):
    "diffusers' own pipeline from cached embeddings to latents, with its DDIM scheduler"
    import diffusers
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder).to(d.device)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    c, (h, w) = d.encode((prompts*B)[:B]), d.size
    def run(x):
        return pipe(prompt_embeds=c['text'], pooled_prompt_embeds=c['pooled'], latents=x.clone(), height=h,
                    width=w, num_inference_steps=S, guidance_scale=1., output_type='latent').images
    return run

def bench_rollout(folder, batch, steps, repeat):
    "Sampler steps of `batch` pictures, all states kept, beside the network calls alone"
    d = load(folder)
    c, seeds = d.encode((prompts*batch)[:batch]), torch.arange(batch)
    x, ts, pipe = noise(seeds, START, d.item, d.device), d.grid(steps), stock(folder, d, batch, steps)
    ours = lambda eta, keep=True: rollout(d, x, ts, c, eta, seeds, keep)
    apart = (ours(0.).end - pipe(x)).abs().max().item()
    fs = {'bare network calls': bare(d, x, ts.to(d.device), d.family.inputs(c)),
          'rollout, eta 0, all states kept': lambda: ours(0.),
          'rollout, eta 1, all states kept': lambda: ours(1.),
          'rollout, eta 0': lambda: ours(0., False), 'diffusers pipeline': lambda: pipe(x)}
    rows = paired(fs, repeat)
    took = typical(rows)
    return dict(batch=batch, steps=steps, repeat=repeat, largest_difference_to_pipeline=apart, seconds=took,
                parameters=sum(p.numel() for p in d.network.parameters()),
                to_bare={k: ratio(rows, k, 'bare network calls') for k in fs},
                to_pipeline={k: ratio(rows, k, 'diffusers pipeline') for k in fs},
                ms_per_image_step=1000*took['rollout, eta 0']/batch/steps)

def print_rollout(name, r):
    print(f"\nRollout, {name} network of {r['parameters']/1e6:.1f} M parameters: {r['steps']} steps of "
          f"{r['batch']} pictures, {r['repeat']} paired rounds; {r['ms_per_image_step']:.2f} ms per picture "
          f"and step")
    print(f"{'':<34}{'seconds':>9}   {'× bare':<24}× pipeline")
    for k, s in r['seconds'].items():
        print(f"{k:<34}{s:>9.3f}   {said(r['to_bare'][k]):<24}{said(r['to_pipeline'][k])}")
    print(f"largest difference to the pipeline's latents: {r['largest_difference_to_pipeline']:.1e}")

# Choose first and learn from the chosen, or keep every candidate in the graph

def learner(folder, name, preset='default', **changes):
    "A model with what learns, and its method"
    run, method = settings(name, preset, **changes)
    d = load(folder)
    prepare(d, run, method)
    return d, run, method

def one_batch(d, method, B):
    "Prompts of one update, and latents where the method learns from them"
    texts, i = (prompts*B)[:B], torch.arange(B)
    return Batch(texts, d.encode(texts), fold(0, i), noise_columns(method, d.item, B))

class Bright(Reward):
    "A reward that costs nothing"
    name = 'bright'
    def score(self, images, prompts): return images.mean((1, 2, 3))

def mean_loss(d, m, lesson):
    "As the loop takes it"
    return (m.loss(d, None, lesson, 0)[0]*lesson.use).sum()/lesson.use.sum().clamp(min=1e-9)

def chosen_first(d, m, batch, judge=Bright()):
    "What the library does: candidates and choice without a graph, then a graph of the chosen only"
    with torch.no_grad(): lesson = m.collect(d, judge, batch)
    return mean_loss(d, m, lesson)

def all_in_graph(d, m, batch, judge=Bright()):
    "The straightforward way: errors of every candidate with a graph, then pick the winners' (same rollout)"
    ts, seeds = begun(m, d, batch.seeds), candidate_seeds(batch.seeds, m.n)
    paths = from_noises(d, batch.data['x0'], ts, seeds, batch.cond)
    with torch.no_grad(): R = along_path(d, judge, paths.tr, batch.prompts, m.aggregate)[0]
    rows = {k: v for k, v in path_rows(paths).items()}
    errs = [path_error(d, turned(rows['x'][i]), turned(rows['ts'][i]), batch.cond, rows['x0'][i],
                       rows['eps'][i])
            for i in range(m.n)]
    return (torch.stack(errs)*weights(R, m.alpha)).sum(0).mean()

ways = {'choose, then learn': chosen_first, 'all candidates in the graph': all_in_graph}

def graph_bytes(d, f):
    "Bytes that autograd keeps for the backward pass of `f` (parameters apart), and its result"
    seen, own = {}, {p.untyped_storage().data_ptr() for p in d.network.parameters()}
    def pack(t):
        seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t): res = f()
    return sum(v for k, v in seen.items() if k not in own), res

def gradient(d, loss):
    for p in d.trainable(): p.grad = None
    loss.backward()
    return torch.cat([p.grad.flatten() for p in d.trainable()])

def bench_selection(folder, batch, n, m, repeat):
    "Seconds, graph and peak memory of one update (rollout, choice, loss, backward) in both ways"
    d, _, method = learner(folder, 'sft', 'paper', n=n, m=m, S=max(20, m))
    args, g = (d, method, one_batch(d, method, batch)), torch.Generator().manual_seed(0)
    for p in d.trainable(): p.data += .01*torch.randn(p.shape, generator=g).to(p.device)
    grads, graph = {}, {}
    for k, f in ways.items():
        graph[k], loss = graph_bytes(d, lambda: f(*args))
        grads[k] = gradient(d, loss)
    a, b = grads.values()
    rows = paired({k: lambda f=f: gradient(d, f(*args)) for k, f in ways.items()}, repeat)
    return dict(batch=batch, n=n, m=m, repeat=repeat, gradient_difference=((a - b).norm()/b.norm()).item(),
                seconds=typical(rows), ratio=ratio(rows, *list(ways)[::-1]),
                graph_MB={k: v/1e6 for k, v in graph.items()},
                peak_MB={k: peak(folder, batch, n, m, f'sft-{i}') for i, k in enumerate(ways)})

def print_selection(r):
    print(f"\nOne update (rollout, choice, loss, backward): {r['batch']} prompts, {r['n']} candidates, "
          f"{r['m']} steps; {r['repeat']} paired rounds")
    print(f"{'':<30}{'seconds':>9}{'graph MB':>10}{'peak MB':>9}")
    for k in ways: print(f"{k:<30}{r['seconds'][k]:>9.3f}{r['graph_MB'][k]:>10.1f}{r['peak_MB'][k]:>9.1f}")
    print(f"all in the graph takes {said(r['ratio'])} × the time; "
          f"relative difference of the gradients: {r['gradient_difference']:.1e}")

# One update of the library beside the released algorithm, written down straightforwardly

def one_path(d, batch, x, x0, eps, ts, judge=None):
    "Errors and values along one candidate's path; gradients run through sampler, decoder and reward"
    errs, R = [], 0.
    for t, s in zip(ts, ts[1:]):
        clean, e = d.predict(x, t.clamp(min=0), batch.cond)
        out = d.output(x, t.clamp(min=0), batch.cond)
        errs.append(denoising(out, target(d.schedule, x0, eps, t.clamp(min=0), d.kind)))
        if judge is not None: R = R + judge(d.show(clean, fast=True, grad=True), batch.prompts)
        x = step(d.schedule, x, clean, e, t, s).prev
    return sum(errs)/len(errs), R

def straight(d, m, batch, judge):
    "Every candidate rolled out, decoded and scored with its graph, one after the other; then choice and loss"
    ts, got, refs, pairs = begun(m, d, batch.seeds), [], [], hasattr(m, 'beta')
    x0 = from_prompt(d, m.S, stream(batch.seeds, 'image'), batch.cond) if pairs else batch.data['x0']
    for seeds in candidate_seeds(batch.seeds, m.n):
        eps = noise(seeds, START, d.item, d.device)
        x = add_noise(d.schedule, x0, eps, ts[0])
        got.append(one_path(d, batch, x, x0, eps, ts, judge))
        with torch.no_grad(), d.reference():
            refs.append(one_path(d, batch, x, x0, eps, ts)[0] if pairs else None)
    errs, R = (torch.stack(v) for v in zip(*got))
    if not pairs: return pick(errs, R.argmax(0)).mean()
    (w, l), ref, Z = pair(R), torch.stack(refs), standardise(R.detach())
    lw, ll = (log_ratio(pick(errs, i), pick(ref, i)) for i in (w, l))
    return margin_loss(m.beta*(lw-ll), pick(Z, w) - pick(Z, l), m.loss_kind)[0].mean()

updates = dict(library=chosen_first, released=straight)

def bench_update(folder, batch, n, m, repeat):
    "Seconds and peak memory of one SFT and one RLHF update in both ways; the reward is the embedded CLIP"
    judge, out = load_reward('clip', WORLD), {}
    for name in ('sft', 'rlhf'):
        d, _, method = learner(folder, name, 'paper', n=n, m=m, S=max(20, m))
        args = d, method, one_batch(d, method, batch), judge
        rows = paired({k: lambda f=f: gradient(d, f(*args)) for k, f in updates.items()}, repeat)
        peaks = {k: peak(folder, batch, n, m, f'{name}-{k}') for k in updates}
        out[name] = dict(seconds=typical(rows), peak_MB=peaks,
                         times_faster=ratio(rows, 'released', 'library'),
                         memory_share=peaks['library']/peaks['released'])
    return dict(batch=batch, n=n, m=m, repeat=repeat, **out)

def print_update(r):
    print(f"\nOne update beside the released algorithm: {r['batch']} prompts, {r['n']} candidates, {r['m']} "
          f"steps; "
          f"{r['repeat']} paired rounds")
    print(f"{'':<6}{'seconds':>9}{'released':>10}  {'times faster':<24}{'peak MB':>10}{'released':>10}"
          f"{'share':>7}")
    for k in ('sft', 'rlhf'):
        s, p = r[k]['seconds'], r[k]['peak_MB']
        print(f"{k:<6}{s['library']:>9.3f}{s['released']:>10.3f}  {said(r[k]['times_faster']):<24}"
              f"{p['library']:>10.0f}{p['released']:>10.0f}{r[k]['memory_share']:>7.2f}")

# Peaks, each in a process of its own

def reset_peak():
    "Start a new peak where the system can (Linux, GPU)"
    if torch.cuda.is_available(): torch.cuda.reset_peak_memory_stats()
    elif Path('/proc/self/clear_refs').exists(): Path('/proc/self/clear_refs').write_text('5')

def peak_mb():
    "Largest memory in use since `reset_peak`: of the GPU if there is one, else of this process"
    if torch.cuda.is_available(): return torch.cuda.max_memory_allocated()/1e6
    status = Path('/proc/self/status')
    if status.exists(): return int(status.read_text().split('VmHWM:')[1].split()[0])*1024/1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1e6

def peak(folder, batch, n, m, way):
    "MB by which one update raises the peak of a process of its own"
    args = ['--child', way, '--model', folder, '--train-batch', str(batch), '-n', str(n), '-m', str(m)]
    res = subprocess.run([sys.executable, __file__, *args], capture_output=True, text=True)
    if res.returncode: sys.exit(res.stderr)
    return json.loads(res.stdout.splitlines()[-1])

def child(a):
    "Print the rise of the peak in one update; a small one before it loads code and allocates gradients"
    name, way = a.child.split('-')
    d, _, method = learner(a.model, name, 'paper', n=a.n, m=a.m, S=max(20, a.m))
    f, judge = ((list(ways.values())[int(way)], Bright()) if way.isdigit()
                else (updates[way], load_reward('clip', WORLD)))
    update = lambda b: gradient(d, f(d, method, b, judge))
    update(one_batch(d, method, 1))
    batch = one_batch(d, method, a.train_batch)
    reset_peak()
    before = peak_mb()
    update(batch)
    print(json.dumps(peak_mb() - before))

# One batch of every method, as the loop makes it

def bench_method(folder, name, preset, batch, n, repeat):
    "Seconds of collecting a batch and of learning from it, and the network evaluations of the first"
    small = {'n': n} if hasattr(find(name, preset)(), 'n') else {}
    d, run, method = learner(folder, name, preset, batch=batch, **small)
    s = State(d, method, load_reward('clip', WORLD), None, run, Team(accelerator(d.device, run)),
              torch.optim.AdamW(d.trainable(), lr=1e-5))
    lesson, took = None, []
    for i in range(repeat + 1):                                      # the first one warms up
        once, s.meter, s.k = {}, Meter(d), i
        def gather(): once['lesson'] = collect(s, one_batch(d, method, batch))
        first = seconds(gather)
        lesson = once['lesson']
        took.append(dict(collect=first,
                         learn=seconds(lambda: [learn(s, lesson, u) for u in range(method.updates)])))
    return dict(method=name, preset=preset, seconds=typical(took[1:]), nfe=s.meter.nfe, rows=len(lesson),
                updates=method.updates)

def bench_methods(folder, batch, n, repeat):
    "One batch of every method at its own settings but the number of candidates"
    return dict(batch=batch, n=n, repeat=repeat,
                arms=[bench_method(folder, name, 'default', batch, n, repeat) for name in METHODS])

def print_methods(r):
    print(f"\nOne batch of each method: {r['batch']} prompts, {r['n']} candidates where it has any; median "
          f"of "
          f"{r['repeat']} rounds")
    print(f"{'':<20}{'collect s':>10}{'learn s':>9}{'evaluations':>13}{'rows':>6}{'updates':>9}")
    for o in r['arms']:
        print(f"{o['method']:<20}{o['seconds']['collect']:>10.3f}{o['seconds']['learn']:>9.3f}{o['nfe']:>13}"
              f"{o['rows']:>6}{o['updates']:>9}")

# An adapter multiplied into the weights of narrow layers, or kept apart as peft does it

def bench_adapters(folder, batch, repeat):
    "A call without gradients and one with them, and all of a batch of the default rule, in both ways"
    d, _, method = learner(folder, 'rlhf')
    x, c = noise(torch.arange(batch), START, d.item, d.device), d.encode((prompts*batch)[:batch])
    t, b = torch.full((batch,), 500, device=d.device), one_batch(d, method, batch//method.n)
    def plain():
        with torch.no_grad(): d.predict(x, t, c)
    def taught():
        with torch.no_grad(): lesson = method.collect(d, Bright(), b)
        for u in range(method.updates):
            (method.loss(d, None, lesson, u)[0]*lesson.use).sum().backward()
    out = {}
    for name, f in {'call': plain, 'call with gradients': lambda: d.predict(x, t, c)[0].mean().backward(),
                    'batch of the default rule': taught}.items():
        def peft():
            with apart(d.network): f()
        rows = paired(dict(multiplied=f, apart=peft), repeat)
        out[name] = dict(seconds=typical(rows), share=ratio(rows, 'multiplied', 'apart'))
    return dict(rows=batch, repeat=repeat, method=type(method).__name__, arms=out)

def print_adapters(r):
    print(f"\nAdapters, {r['rows']} rows, {r['repeat']} paired rounds: multiplied out against apart")
    for k, o in r['arms'].items():
        print(f"{k:<28}{o['seconds']['multiplied']:>8.3f} s {said(o['share'])} of the time apart")

# Searches beside their network evaluations, decodings and reward calls alone

class Tape(Reward):
    "A model and a judge that remember what they were asked"
    def __init__(self, model, judge): self.model, self.judge, self.calls = model, judge, []
    def __getattr__(self, name): return getattr(self.model, name)
    def predict(self, x, t, cond):
        self.calls.append(bare_call(self.model, x, t, cond))
        return self.model.predict(x, t, cond)
    def show(self, x, **more):
        self.calls.append(lambda: self.model.show(x, **more))
        return self.model.show(x, **more)
    def score(self, images, prompts):
        self.calls.append(lambda: self.judge(images, prompts))
        return self.judge(images, prompts)

def bare_call(d, x, t, cond):
    "One call of the network as `predict` makes it, everything else prepared"
    flat, times = x.flatten(0, -4), t.expand(x.shape[:-3]).flatten()
    inputs = d.family.inputs(cond.repeat(len(flat)//len(cond)))
    return lambda: d.family.forward(d.policies, flat, times, inputs)

def bench_search(folder, batch, steps, repeat):
    "Each search with the budget of three samples, and what it asks, alone"
    d, judge, rows = load(folder), load_reward('clip', WORLD), {}
    texts, seeds = (prompts*batch)[:batch], torch.arange(batch)
    for name, search in SEARCHES.items():
        tape = Tape(d, judge)
        res = search(tape, tape, texts, seeds, steps, 3*steps)
        def alone():
            with torch.no_grad(): [call() for call in tape.calls]
        took = paired({name: lambda: search(d, judge, texts, seeds, steps, 3*steps), 'alone': alone}, repeat)
        rows[name] = dict(nfe=res.nfe, calls=res.calls, seconds=typical(took),
                          to_alone=ratio(took, name, 'alone'))
    return dict(batch=batch, steps=steps, repeat=repeat, searches=rows)

def print_search(r):
    print(f"\nSearches of {r['batch']} pictures in {r['steps']} steps, {r['repeat']} paired rounds")
    for k, o in r['searches'].items():
        print(f"{k:<14}{o['nfe']:>7g} evaluations {o['calls']:>4} calls {o['seconds'][k]:>8.3f} s   "
              f"{said(o['to_alone'])} × what it asks")

# Report

def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('what', nargs='*', help=f"{', '.join(KINDS)} (default: all)")
    p.add_argument('--model',
                   help="folder of a pipeline (default: the embedded one, and a medium one for rollouts)")
    p.add_argument('--batch', type=int, default=16, help="pictures of a rollout")
    p.add_argument('--steps', type=int, default=20, help="sampler steps of a rollout")
    p.add_argument('--train-batch', type=int, default=8, help="prompts of an update")
    p.add_argument('-n', type=int, default=4, help="candidates per prompt of an update")
    p.add_argument('-m', type=int, default=3, help="steps per path of an update")
    p.add_argument('--repeat', type=int, default=15, help="paired rounds; an interval takes at least six")
    p.add_argument('--write', action='store_true', help="write data/results/bench.json, or bench-KIND.json")
    p.add_argument('--child', help=argparse.SUPPRESS)
    a = p.parse_args()
    for o in a.what:
        if o not in KINDS: p.error(f"expected {', '.join(KINDS)}, found {o!r}")
    return a

def main():
    a = arguments()
    if a.child is not None: return child(a)
    what, folder = a.what or KINDS, a.model or embedded()
    out = dict(model=a.model or WORLD, cpus=os.cpu_count(), load=round(os.getloadavg()[0], 2))
    with tempfile.TemporaryDirectory() as tmp:
        if 'rollout' in what:
            nets = (dict(rollout=folder) if a.model
                    else dict(rollout=medium(Path(tmp)/'medium'), rollout_embedded=folder))
            for k, net in nets.items():
                out[k] = bench_rollout(net, a.batch, a.steps, a.repeat)
                print_rollout(Path(net).name, out[k])
        if 'selection' in what:
            out['selection'] = bench_selection(folder, a.train_batch, a.n, a.m, a.repeat)
            print_selection(out['selection'])
        if 'update' in what:
            out['update'] = bench_update(folder, a.train_batch, a.n, a.m, a.repeat)
            print_update(out['update'])
        if 'methods' in what:
            out['methods'] = bench_methods(folder, a.train_batch, a.n, max(3, a.repeat//5))
            print_methods(out['methods'])
        if 'adapters' in what:
            out['adapters'] = bench_adapters(folder, 64, a.repeat)
            print_adapters(out['adapters'])
    if 'search' in what:
        out['search'] = bench_search(folder, 4, 10, a.repeat)
        print_search(out['search'])
    if a.write: write('bench' if what == KINDS else f"bench-{'-'.join(what)}", out)

if __name__ == '__main__': main()
