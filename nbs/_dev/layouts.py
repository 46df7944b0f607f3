#!/usr/bin/env python
"""Methods on pages: data/results/layouts.json

`python nbs/_dev/layouts.py --seeds 0 1 2` trains what is missing in runs/layouts, measures it on held-out
prompts, and gathers all; `--arms graft ddpo` trains only these and gathers nothing; `--gather` puts together
what is there. Every arm collects the same number of batches with the same prompts and starting noise."""
import argparse, json, time
from dataclasses import asdict
from functools import cache
from pathlib import Path
import torch
from results import write
from diffusion_sharpening.basics.files import write_json
from diffusion_sharpening.basics.seeds import START, noise, stream
from diffusion_sharpening.basics.stats import interval, over_seeds
from diffusion_sharpening.commands.load import load_model
from diffusion_sharpening.data.sources import Pictures, Prompts
from diffusion_sharpening.evaluation.measure import start_seeds
from diffusion_sharpening.maths.rollout import rollout
from diffusion_sharpening.names.catalog import load_reward
from diffusion_sharpening.search.best_of_n import best_of_n
from diffusion_sharpening.training.loop import train
from diffusion_sharpening.training.run import settings
from diffusion_sharpening.worlds.layouts.features import layout_fid, load_features
from diffusion_sharpening.worlds.layouts.grammar import ANY, page_prompts, pages, prompt_of
from diffusion_sharpening.worlds.layouts.judges import PageExam, consistency, page_stats
from diffusion_sharpening.worlds.layouts.matching import area_distance, label_distance, max_iou
from diffusion_sharpening.worlds.layouts.metrics import (
    alignment, in_columns, in_margins, overlap, overlap_area)
from diffusion_sharpening.worlds.world import weights

root = Path(__file__).resolve().parents[2]
runs, S = root/'runs'/'layouts', 16
GROUP = dict(n=8, S=S)                                       # candidates of each prompt
GRAFT = GROUP | dict(K=2, noises=16)
ARMS = dict(                                                 # name → method and its settings
    standard=('standard', dict(batch=64)), ddpo=('ddpo', GROUP | dict(share=.5)), graft=('graft', GRAFT),
    **{f'p_graft {f}': ('p_graft', GRAFT | dict(ft_fraction=f)) for f in (.75, .5, .25)},
    nft=('nft', GROUP), **{'nft, a fifth': ('nft', GROUP)})                    # the same, stopped early

@cache
def known(): return pages(1000, 7, 'heldout'), load_features(weights('layouts-features'))

def per_page(x, texts, judge):
    "Numbers of each page"
    exam = PageExam()(x, texts)
    found = dict(tidy=judge(x, texts), alignment=100*alignment(x), overlap=overlap(x), exam=exam,
                 overlap_area=overlap_area(x), consistency=consistency(x), margins=in_margins(x).float(),
                 columns=in_columns(x).float())
    return {k: v.tolist() for k, v in (found | page_stats(x)).items()}

def of_set(x):
    "Numbers of all pages together, against held-out pages"
    real, net = known()
    return dict(fid=layout_fid(net, x, real), max_iou=max_iou(x, real[:400], 10),
                labels=label_distance(x, real), areas=area_distance(x, real))

def measured(x, texts, judge): return dict(pages=per_page(x, texts, judge), sets=of_set(x))

@torch.no_grad()
def sampled(model, texts, seed, eta):
    "Pages of held-out prompts from the same noise for all"
    return model.sample(texts, start_seeds(100 + seed, len(texts)), S, eta, chunk=128)

def searched(model, texts, seed, judge):
    "The best of eight"
    seeds = start_seeds(100 + seed, len(texts)).split(32)
    parts = [texts[i:i+32] for i in range(0, len(texts), 32)]
    return torch.cat([model.show(best_of_n(model, judge, p, s, S, 8*S, model.eta).x0)
                      for p, s in zip(parts, seeds)])

def source(model, method, run, texts):
    "Prompts, or pages with theirs"
    more = dict(size=run.batch, seed=run.seed)
    if not method.columns: return Prompts(model, texts, **more)
    x = pages(2400, 0)
    return Pictures(model, [prompt_of(o) for o in x], model.latents(x), **more)

def trained(arm, a, seed):
    "One run; its model as it is deployed, and what it took"
    name, changes = ARMS[arm]
    steps = a.steps//5 if 'fifth' in arm else a.steps
    run, method = settings(name, steps=steps, seed=seed, lr=a.lr, **dict(batch=2) | changes)
    model, judge = load_model('layouts'), load_reward('tidy', 'layouts')
    start = time.process_time()
    texts = [ANY] if a.any else page_prompts(2400, 'train', seed)
    s = train(model, method, judge, source(model, method, run, texts), run)
    said = dict(cpu_seconds=round(time.process_time() - start, 1), nfe=s.nfe, rewards=[
        r.get('reward') for r in s.history], settings=dict(run=asdict(run), method=asdict(method)))
    return method.deployed(model, S), said

def path_of(arm, a, seed): return runs/f"{'any-' if a.any else ''}{arm.replace(' ', '-')}-{seed}.json"

def one(arm, a, seed):
    "Measure an arm with a seed, unless it was"
    path = path_of(arm, a, seed)
    if path.exists(): return json.loads(path.read_text())
    texts = [ANY]*a.heldout if a.any else page_prompts(a.heldout, 'heldout', 1)
    judge, said = load_reward('tidy', 'layouts'), {}
    if arm in ARMS: model, said = trained(arm, a, seed)
    else: model = load_model('layouts')
    best = arm == 'best of 8'
    x = searched(model, texts, seed, judge) if best else sampled(model, texts, seed, model.eta)
    still = None if best else per_page(sampled(model, texts, seed, 0.), texts, judge)
    found = said | measured(x, texts, judge) | dict(arm=arm, seed=seed, still=still)
    write_json(path, found)
    if seed == 0: torch.save(x[:24], path.with_suffix('.pt'))
    print(arm, seed, {k: round(sum(v)/len(v), 3) for k, v in found['pages'].items()}, found['sets'],
          said.get('cpu_seconds'), flush=True)
    return found

@torch.no_grad()
def variance(prompts=64, branches=16):
    "How much of the reward's variance is left, given the state at each step"
    model, judge, rows = load_model('layouts'), load_reward('tidy', 'layouts'), []
    texts, grid = page_prompts(prompts, 'heldout', 3), model.grid(S)
    cond, seeds = model.encode(texts), start_seeds(9, prompts)
    many = stream(seeds, 'candidate', torch.arange(branches)[:, None])
    z = noise(many, START, model.item)
    ends = rollout(model, z, grid, cond, 1., many, keep=False).end
    total = score(judge, model, ends, texts).var(0).mean()
    path = rollout(model, noise(seeds, START, model.item), grid, cond, 1., seeds).states
    for i in range(S):
        x = path[i].expand(branches, *path[i].shape)
        ends = rollout(model, x, grid[i:], cond, 1., many, keep=False).end
        left = score(judge, model, ends, texts).var(0)/total
        rows.append(dict(step=i, t=grid[i].item(), left=interval(left, 'prompts')))
    return dict(total=total.item(), branches=branches, rows=rows)

def score(judge, model, ends, texts):
    x = model.show(ends)
    return judge(x.flatten(0, 1), texts*len(x)).view(x.shape[:2])

def gathered(found):
    "Means of an arm with their intervals, over seeds and prompts, or over seeds"
    of = lambda part: {k: over_seeds(torch.tensor([o[part][k] for o in found])) for k in found[0][part] or ()}
    rows = of('pages') | dict(still=of('still'))
    sets = {k: interval(torch.tensor([o['sets'][k] for o in found]), 'seeds') for k in found[0]['sets']}
    more = {k: [o[k] for o in found] for k in ('seed', 'cpu_seconds', 'nfe', 'rewards') if k in found[0]}
    return rows | sets | more | {k: found[0][k] for k in ('settings',) if k in found[0]}

def change(found, base, part='pages'):
    "Differences to the base, page by page; `still`: without noise in the sampler"
    if not found[0][part]: return None
    base = [next(b for b in base if b['seed'] == o['seed']) for o in found]
    of = lambda rows: {k: torch.tensor([o[part][k] for o in rows]) for k in rows[0][part]}
    now, then = of(found), of(base)
    return {k: over_seeds(now[k] - then[k]) for k in now}

def looks(arm, a):
    "The first pages of an arm, to be drawn"
    file = path_of(arm, a, a.seeds[0]).with_suffix('.pt')
    return [[[round(v, 3) for v in slot] for slot in x] for x in torch.load(file)[:8].tolist()]

def real(judge):
    "What pages of data have: the other half of the held-out ones against the known"
    x = pages(256, 8, 'heldout')
    found = measured(x, [prompt_of(o) for o in x], judge)
    return {k: sum(v)/len(v) for k, v in found['pages'].items()} | found['sets']

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    p.add_argument('--arms', nargs='+'); p.add_argument('--any', action='store_true', help='ask for nothing')
    p.add_argument('--gather', action='store_true', help='train nothing')
    p.add_argument('--steps', type=int, default=150); p.add_argument('--lr', type=float, default=1e-3)
    p.add_argument('--heldout', type=int, default=256)
    a = p.parse_args()
    torch.set_num_threads(1); runs.mkdir(parents=True, exist_ok=True)
    arms = ['base', 'best of 8', *ARMS]
    for seed in () if a.gather else a.seeds:
        for arm in a.arms or arms: one(arm, a, seed)
    if a.arms: return
    there = lambda arm: [one(arm, a, s) for s in a.seeds if path_of(arm, a, s).exists()]
    all_of = {arm: rows for arm in arms if (rows := there(arm))}
    base = all_of['base']
    found = dict(seeds=a.seeds, heldout=a.heldout, steps=a.steps, S=S,
                 data=real(load_reward('tidy', 'layouts')),
                 arms={k: gathered(v) for k, v in all_of.items()},
                 change={k: change(v, base) for k, v in all_of.items() if k != 'base'},
                 change_still={k: change(v, base, 'still') for k, v in all_of.items() if k in ARMS},
                 variance=variance(), pages={k: looks(k, a) for k in all_of})
    write('layouts-any' if a.any else 'layouts', found)

if __name__ == '__main__': main()
