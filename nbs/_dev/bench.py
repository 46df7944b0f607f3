#!/usr/bin/env python
"Time and memory of the inner loops: `bench.py [rollout|selection|update] [--model FOLDER] [--write]`"
import argparse, json, os, resource, statistics, subprocess, sys, tempfile, time
from pathlib import Path

root = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(root))
from results import write
KINDS = ['rollout', 'selection', 'update']
prompts = ['a red circle', 'a blue square', 'a green star', 'a yellow triangle']

def embedded(): return root/'data'/'shapes-sdxl'

def model_folder(name, tmp):
    "The folder named, the embedded model if it is there, or an untrained pipeline of its size"
    if name: return name
    if embedded().is_dir(): return str(embedded())
    from diffusion_sharpening.worlds.shapes.base import shapes_sdxl
    shapes_sdxl(Path(tmp)/'shapes-sdxl')
    return str(Path(tmp)/'shapes-sdxl')

def load(folder, guidance=1.):
    from diffusion_sharpening.commands.load import quiet
    from diffusion_sharpening.models.denoiser import Denoiser
    quiet()
    return Denoiser.from_pretrained(folder, guidance=guidance)

def now():
    "Seconds on a clock that stops for nothing, once the device has finished"
    import torch
    if torch.cuda.is_available(): torch.cuda.synchronize()
    return time.perf_counter()

def seconds(f):
    start = now(); f()
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

def median(rows, k): return statistics.median(r[k] for r in rows)
def ratio(rows, a, b): return statistics.median(r[a]/r[b] for r in rows)   # of each round, then the median

# (a) Rollout, bare network calls and the diffusers pipeline

def bare(d, x, ts, inputs):
    "The network alone, as often as a rollout calls it and with the same batch"
    import torch
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
    c = d.encode((prompts*B)[:B])
    h, w = d.size
    def run(x):
        return pipe(prompt_embeds=c['text'], pooled_prompt_embeds=c['pooled'], latents=x.clone(),
                    height=h, width=w, num_inference_steps=S, guidance_scale=1., output_type='latent').images
    return run

def bench_rollout(folder, batch, steps, repeat):
    "Seconds of `steps` sampler steps of `batch` pictures"
    import torch
    from diffusion_sharpening.basics.seeds import START, noise
    from diffusion_sharpening.maths.rollout import rollout
    d = load(folder)
    c, seeds = d.encode((prompts*batch)[:batch]), torch.arange(batch)
    x, ts, pipe = noise(seeds, START, d.item, d.device), d.grid(steps), stock(folder, d, batch, steps)
    ours = lambda eta=0., keep=False: rollout(d, x, ts, c, eta, seeds, keep)
    apart = (ours().end - pipe(x)).abs().max().item()
    fs = {'bare network calls': bare(d, x, ts.to(d.device), d.family.inputs(c)), 'rollout, eta 0': ours,
          'rollout, eta 1, all states kept': lambda: ours(1., True), 'diffusers pipeline': lambda: pipe(x)}
    rows = paired(fs, repeat)
    return dict(batch=batch, steps=steps, repeat=repeat, largest_difference_to_pipeline=apart,
                seconds={k: median(rows, k) for k in rows[0]},
                to_bare={k: ratio(rows, k, 'bare network calls') for k in rows[0]},
                to_pipeline={k: ratio(rows, k, 'diffusers pipeline') for k in rows[0]},
                ms_per_image_step=1000*median(rows, 'rollout, eta 0')/batch/steps)

def print_rollout(r):
    print(f"\nRollout: {r['steps']} steps of {r['batch']} pictures, median of {r['repeat']} paired rounds; "
          f"{r['ms_per_image_step']:.2f} ms per picture and step")
    print(f"{'':<34}{'seconds':>9}{'× bare':>9}{'× pipeline':>12}")
    for k, s in r['seconds'].items():
        print(f"{k:<34}{s:>9.3f}{r['to_bare'][k]:>9.3f}{r['to_pipeline'][k]:>12.3f}")
    print(f"largest difference to the pipeline's latents: {r['largest_difference_to_pipeline']:.1e}")

# (b) Choose first and learn from the chosen, or keep every candidate in the graph

def learner(folder, method, n, m):
    "A model with a LoRA that learns, its method and the paper's settings"
    from diffusion_sharpening.methods.catalog import method as find
    from diffusion_sharpening.training.loop import prepare
    from diffusion_sharpening.training.run import settings
    d, how = load(folder), find(method)
    run, cfg = settings(method, 'paper', n=n, m=m, S=max(20, m))
    prepare(d, run, how, cfg)
    return d, how, cfg

def one_batch(d, B):
    "Prompts and latents of one update"
    import torch
    from diffusion_sharpening.data.sources import Batch
    from diffusion_sharpening.basics.seeds import START, fold, noise
    texts, i = (prompts*B)[:B], torch.arange(B)
    return Batch(texts, d.encode(texts), fold(0, i), noise(i, START, d.item, d.device))

def bright(images, prompts): return images.mean((1, 2, 3))           # a reward that costs nothing

def chosen_first(d, cfg, batch):
    "What the library does: candidates and choice without a graph, then a graph of the winners only"
    from diffusion_sharpening.methods.sft import collect_sft, loss_sft
    return loss_sft(cfg, d, collect_sft(cfg, d, bright, batch))[0]

def all_in_graph(d, cfg, batch):
    "The straightforward way: errors of every candidate with a graph, then pick the winners' (same rollout)"
    import torch
    from diffusion_sharpening.methods.sharpening import (
        candidates, noise_targets, path_errors, path_mean, values)
    from diffusion_sharpening.maths.choice import argmax, pick
    c = candidates(cfg, d, batch)
    x, ts, errs = c.tr.states[:-1], c.tr.t, []
    eps = noise_targets(cfg.target, d.schedule, x, ts, c.x0, c.eps)
    for i in range(cfg.n):
        errs.append(path_mean(path_errors(d, x[:, i], ts[:, i], batch.cond, eps[:, i]), ts[:, i]))
    return pick(torch.stack(errs), argmax(values(cfg, d, bright, batch, c)[0])).mean()

ways = {'choose, then learn': chosen_first, 'all candidates in the graph': all_in_graph}

def graph_bytes(d, f):
    "Bytes that autograd keeps for the backward pass of `f` (parameters apart), and its result"
    import torch
    seen, own = {}, {p.untyped_storage().data_ptr() for p in d.policies.net.parameters()}
    def pack(t):
        seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t): res = f()
    return sum(v for k, v in seen.items() if k not in own), res

def gradient(d, loss):
    import torch
    for p in d.trainable(): p.grad = None
    loss.backward()
    return torch.cat([p.grad.flatten() for p in d.trainable()])

def bench_selection(folder, batch, n, m, repeat):
    "Seconds, graph and peak memory of one update (rollout, choice, loss, backward) in both ways"
    import torch
    d, _, cfg = learner(folder, 'sft', n, m)
    args, g = (d, cfg, one_batch(d, batch)), torch.Generator().manual_seed(0)
    for p in d.trainable(): p.data += .01*torch.randn(p.shape, generator=g).to(p.device)
    grads, graph = {}, {}
    for k, f in ways.items():
        graph[k], loss = graph_bytes(d, lambda: f(*args))
        grads[k] = gradient(d, loss)
    a, b = grads.values()
    rows = paired({k: lambda f=f: gradient(d, f(*args)) for k, f in ways.items()}, repeat)
    return dict(batch=batch, n=n, m=m, repeat=repeat, gradient_difference=((a - b).norm()/b.norm()).item(),
                seconds={k: median(rows, k) for k in ways}, ratio=ratio(rows, *list(ways)[::-1]),
                graph_MB={k: v/1e6 for k, v in graph.items()},
                peak_MB={k: peak(folder, batch, n, m, i) for i, k in enumerate(ways)})

def reset_peak():
    "Start a new peak where the system can (Linux, GPU)"
    import torch
    if torch.cuda.is_available(): torch.cuda.reset_peak_memory_stats()
    elif Path('/proc/self/clear_refs').exists(): Path('/proc/self/clear_refs').write_text('5')

def peak_mb():
    "Largest memory in use since `reset_peak`: of the GPU if there is one, else of this process"
    import torch
    if torch.cuda.is_available(): return torch.cuda.max_memory_allocated()/1e6
    status = Path('/proc/self/status')
    if status.exists(): return int(status.read_text().split('VmHWM:')[1].split()[0])*1024/1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1e6

def peak(folder, batch, n, m, way):
    "MB by which one update raises the peak of a process of its own"
    args = ['--child', str(way), '--model', folder, '--train-batch', str(batch), '-n', str(n), '-m', str(m)]
    res = subprocess.run([sys.executable, __file__, *args], capture_output=True, text=True)
    if res.returncode: sys.exit(res.stderr)
    return json.loads(res.stdout.splitlines()[-1])

def child(a):
    "Print the rise of the peak in one update; a small one before it loads code and allocates gradients"
    if a.child.isdigit():
        f, (d, _, cfg) = list(ways.values())[int(a.child)], learner(a.model, 'sft', a.n, a.m)
        update = lambda b: gradient(d, f(d, cfg, b))
    else:
        from diffusion_sharpening.names.catalog import load_reward
        method, way = a.child.split('-')
        (d, how, cfg), reward = learner(a.model, method, a.n, a.m), load_reward('clip', 'shapes')
        update = lambda b: gradient(d, updates[way](d, how, cfg, b, reward))
    update(one_batch(d, 1)); batch = one_batch(d, a.train_batch)
    reset_peak(); before = peak_mb(); update(batch)
    print(json.dumps(peak_mb() - before))

def print_selection(r):
    print(f"\nOne update (rollout, choice, loss, backward): {r['batch']} prompts, {r['n']} candidates, "
          f"{r['m']} steps; median of {r['repeat']} paired rounds")
    print(f"{'':<30}{'seconds':>9}{'graph MB':>10}{'peak MB':>9}")
    for k in ways: print(f"{k:<30}{r['seconds'][k]:>9.3f}{r['graph_MB'][k]:>10.1f}{r['peak_MB'][k]:>9.1f}")
    print(f"all in the graph takes {r['ratio']:.2f} × the time; "
          f"relative difference of the gradients: {r['gradient_difference']:.1e}")

# (c) One update of the library beside the released algorithm, written down straightforwardly

def ours(d, how, cfg, batch, reward): return how.loss(cfg, d, how.collect(cfg, d, reward, batch))[0]

def one_path(d, batch, x, eps, ts, reward=None):
    "Errors and values along one candidate's path; whatever gradients are on stay on, through sampler, decoder and reward"
    from diffusion_sharpening.maths.losses import denoising
    from diffusion_sharpening.maths.samplers import step
    errs, R = [], 0.
    for t, s in zip(ts, ts[1:]):
        x0, e = d.predict(x, t.clamp(min=0), batch.cond)
        errs.append(denoising(e, eps))
        if reward is not None: R = R + reward(d.show(x0, fast=True, grad=True), batch.prompts)
        x = step(d.schedule, x, x0, e, t, s).prev
    return sum(errs)/len(errs), R

def released(d, how, cfg, batch, reward):
    "Every candidate rolled out, decoded and scored with its graph, one after the other; then the choice and the loss"
    import torch
    from diffusion_sharpening.maths.losses import log_ratio, preference
    from diffusion_sharpening.methods.sharpening import starts
    from diffusion_sharpening.maths.choice import argmax, pair, pick, standardise
    from diffusion_sharpening.maths.schedules import add_noise
    from diffusion_sharpening.basics.seeds import START, fold, noise
    ts, got, refs, rlhf = starts(cfg, d.schedule, d.grid(cfg.S), batch.seeds), [], [], how.name == 'rlhf'
    for i in range(cfg.n):
        eps = noise(fold(batch.seeds, i), START, d.item, d.device)
        x = add_noise(d.schedule, batch.x0, eps, ts[0])
        got.append(one_path(d, batch, x, eps, ts, reward))
        with torch.no_grad(), d.reference(): refs.append(one_path(d, batch, x, eps, ts)[0] if rlhf else None)
    errs, R = (torch.stack(v) for v in zip(*got))
    if not rlhf: return pick(errs, argmax(R)).mean()
    (w, l), ref, Z = pair(R), torch.stack(refs), standardise(R.detach())
    lw, ll = (log_ratio(pick(errs, i), pick(ref, i)) for i in (w, l))
    return preference(cfg.beta*(lw-ll), pick(Z, w) - pick(Z, l), cfg.kind).mean()

updates = dict(library=ours, released=released)

def bench_update(folder, batch, n, m, repeat):
    "Seconds and peak memory of one SFT and one RLHF update in both ways, with the embedded CLIP as the reward"
    from diffusion_sharpening.names.catalog import load_reward
    reward, out = load_reward('clip', 'shapes'), {}
    for method in ('sft', 'rlhf'):
        d, how, cfg = learner(folder, method, n, m)
        args = d, how, cfg, one_batch(d, batch), reward
        rows = paired({k: lambda f=f: gradient(d, f(*args)) for k, f in updates.items()}, repeat)
        peaks = {k: peak(folder, batch, n, m, f'{method}-{k}') for k in updates}
        out[method] = dict(seconds={k: median(rows, k) for k in updates}, peak_MB=peaks,
                           times_faster=ratio(rows, 'released', 'library'),
                           memory_share=peaks['library']/peaks['released'])
    return dict(batch=batch, n=n, m=m, repeat=repeat, **out)

def print_update(r):
    print(f"\nOne update beside the released algorithm: {r['batch']} prompts, {r['n']} candidates, {r['m']} "
          f"steps; "
          f"median of {r['repeat']} paired rounds")
    print(f"{'':<6}{'seconds':>9}{'released':>10}{'faster':>8}{'peak MB':>10}{'released':>10}{'share':>7}")
    for k in ('sft', 'rlhf'):
        s, p = r[k]['seconds'], r[k]['peak_MB']
        print(f"{k:<6}{s['library']:>9.3f}{s['released']:>10.3f}{r[k]['times_faster']:>7.2f}×"
              f"{p['library']:>10.0f}{p['released']:>10.0f}{r[k]['memory_share']:>7.2f}")

# Report

def arguments():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('what', nargs='*', help="rollout, selection, update (default: all)")
    p.add_argument('--model', help="folder of a pipeline (default: the embedded one, or one of its size)")
    p.add_argument('--batch', type=int, default=16, help="pictures of a rollout")
    p.add_argument('--steps', type=int, default=20, help="sampler steps of a rollout")
    p.add_argument('--train-batch', type=int, default=8, help="prompts of an update")
    p.add_argument('-n', type=int, default=4, help="candidates per prompt of an update")
    p.add_argument('-m', type=int, default=3, help="steps per path of an update")
    p.add_argument('--repeat', type=int, default=7, help="paired rounds")
    p.add_argument('--write', action='store_true', help="write data/results/bench.json")
    p.add_argument('--child', help=argparse.SUPPRESS)
    a = p.parse_args()
    for o in a.what:
        if o not in KINDS: p.error(f"expected {', '.join(KINDS)}, found {o!r}")
    return a

def main():
    a = arguments()
    if a.child is not None: return child(a)
    with tempfile.TemporaryDirectory() as tmp:
        folder, what = model_folder(a.model, tmp), a.what or KINDS
        name = 'shapes-sdxl' if embedded().is_dir() else 'shapes-sdxl, untrained'
        out = dict(model=a.model or name, cpus=os.cpu_count(), load=round(os.getloadavg()[0], 2))
        if 'rollout' in what:
            out['rollout'] = bench_rollout(folder, a.batch, a.steps, a.repeat)
            print_rollout(out['rollout'])
        if 'selection' in what:
            out['selection'] = bench_selection(folder, a.train_batch, a.n, a.m, a.repeat)
            print_selection(out['selection'])
        if 'update' in what:
            out['update'] = bench_update(folder, a.train_batch, a.n, a.m, a.repeat)
            print_update(out['update'])
    if a.write: write('bench', out)

if __name__ == '__main__': main()
