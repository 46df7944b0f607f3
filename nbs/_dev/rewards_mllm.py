#!/usr/bin/env python
"Measure the embedded grader through `transformers serve`: writes `data/results/rewards-mllm.json`"
import argparse, random, sys, time
from pathlib import Path

root = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(root))

def spearman(a, b):
    "Rank correlation, None where one side is constant"
    from diffusion_sharpening.basics.stats import rank_correlation
    r = rank_correlation(a, b)
    return round(r, 3) if r == r else None

def agreement(which, split, n):
    "Grades of `n` pictures for their own caption, a near miss and another's, beside the exact checker"
    import torch
    from diffusion_sharpening.rewards.mllm import MLLMGrader
    from diffusion_sharpening.worlds.shapes.exam import check
    from diffusion_sharpening.worlds.shapes.clip import near_miss
    from diffusion_sharpening.worlds.shapes.draw import CATEGORIES, category, picture, prompts
    rng, own = random.Random(1), prompts(n, split, seed=77)
    asked = dict(own=own, near=[near_miss(t, rng) for t in own], other=own[6:] + own[:6])
    ims = torch.stack([picture(t, i, split) for i, t in enumerate(own)])
    g, true = MLLMGrader(which, weights=dict(accuracy=1.)), {k: check(ims, ts) for k, ts in asked.items()}
    r = {k: g.score(ims, ts) for k, ts in asked.items()}
    R, T, kinds = torch.cat([*r.values()]), torch.cat([*true.values()]), [category(t) for t in own]*3
    by = {c: [i for i, k in enumerate(kinds) if k == c] for c in CATEGORIES}
    first = lambda k: round((r['own'] > r[k]).float().mean().item(), 3)
    tied = lambda k: round((r['own'] == r[k]).float().mean().item(), 3)
    return dict(pictures=n, failed=g.report()['failed'],
                graded={k: round(v.mean().item(), 3) for k, v in r.items()},
                true={k: round(v.mean().item(), 3) for k, v in true.items()}, spearman=spearman(R, T),
                spearman_by_category={c: spearman(R[i], T[i]) for c, i in by.items()},
                own_above=dict(near=first('near'), other=first('other')),
                own_tied=dict(near=tied('near'), other=tied('other')))

def speed(which, workers, n=24):
    "Milliseconds per picture with so many threads"
    import torch
    from diffusion_sharpening.rewards.mllm import MLLMGrader, Settings
    from diffusion_sharpening.worlds.shapes.draw import picture, prompts
    texts, g = prompts(n, seed=5), MLLMGrader(which, Settings(workers=workers))
    ims = torch.stack([picture(t, i) for i, t in enumerate(texts)])
    g.score(ims[:2], texts[:2]); start = time.time(); g.score(ims, texts)
    return round((time.time()-start)/n*1000, 1)

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--n', type=int, default=144, help='pictures of each split, a multiple of 6')
    n = p.parse_args().n
    import torch
    from diffusion_sharpening.rewards.local_grader import serve
    from diffusion_sharpening.worlds.world import weights
    from results import write
    torch.set_num_threads(1); start = time.time()
    with serve(weights('shapes-grader'), wait=1200) as which:
        what = 'the embedded grader behind `transformers serve`: accuracy against the exam, and time'
        found = dict(what=what, start_s=round(time.time()-start, 1),
                     agreement={s: agreement(which, s, n) for s in ('train', 'heldout')},
                     ms_per_picture={f'{w} threads': speed(which, w) for w in (1, 4, 8)})
    write('rewards-mllm', found, ['openai', 'fastapi', 'uvicorn'])

if __name__ == '__main__': main()
