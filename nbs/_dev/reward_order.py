#!/usr/bin/env python
"""How well rewards order the embedded model's own pictures of one prompt: correlation with the exam within
prompts, what the best of k is worth, and what the exam says of pictures by the score that a reward gives.

`python nbs/_dev/reward_order.py clip@shapes preference@shapes` writes data/results/order.json (`--name`:
another one); a CLIP of another folder is named clip@FOLDER."""
import argparse
import torch
from results import write
from diffusion_sharpening.basics.stats import interval, rank_correlation, shown
from diffusion_sharpening.commands.load import load_model
from diffusion_sharpening.names.catalog import load_reward
from diffusion_sharpening.worlds.exam import all_hold
from diffusion_sharpening.worlds.shapes.exam import by_category, check
from diffusion_sharpening.worlds.shapes.draw import prompts

def pictures(texts, k, S):
    "`k` pictures of each caption, and the checker's opinion `(n, k)`"
    many = [t for t in texts for _ in range(k)]
    model = load_model('shapes')
    ims = model.sample(many, 5*10**6 + torch.arange(len(many)), S, chunk=32)
    return ims, many, check(ims, many).view(-1, k), model.eta

def within(a, b):
    "Correlation of each row, NaN where one does not vary"
    a, b = (x.double() - x.double().mean(1, keepdim=True) for x in (a, b))
    return (a*b).sum(1)/(a.norm(dim=1)*b.norm(dim=1))

def calibration(scores, truth, parts=5):
    "What the exam says of pictures, in parts of as many by the judge's score"
    at = scores.flatten().argsort().chunk(parts)
    score, exam = scores.flatten(), truth.flatten()
    return [dict(score=score[i].mean().item(), exam=interval(exam[i], 'pictures'),
                 strict=interval(all_hold(exam[i]), 'pictures')) for i in at]

def order(reward, ims, many, truth):
    "What a reward's order is worth, over prompts"
    k = truth.shape[1]; texts = many[::k]
    with torch.no_grad(): r = reward(ims, many).view(-1, k)
    corr = within(r, truth); pick = lambda i: truth.gather(1, i[:, None])[:, 0]
    groups = {c: v.nanmean().item() for c, v in by_category(corr, texts).items()}
    return groups | dict(correlation=interval(corr), best=interval(pick(r.argmax(1))),
                         worst=interval(pick(r.argmin(1))), calibration=calibration(r, truth),
                         rank_correlation_of_all=rank_correlation(r.flatten(), truth.flatten()))

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('rewards', nargs='*', default=['clip@shapes'])
    p.add_argument('--n', type=int, default=120, help='captions of each split')
    p.add_argument('--k', type=int, default=8)
    p.add_argument('--S', type=int, default=20)
    p.add_argument('--name', default='order', help='of the file of results')
    a = p.parse_args(); torch.set_num_threads(1)
    texts = [t for split in ('train', 'heldout') for t in prompts(a.n, split, seed=77)]
    ims, many, truth, eta = pictures(texts, a.k, a.S)
    rows = {r: order(load_reward(r, train=False), ims, many, truth) for r in a.rewards}
    one, best = interval(truth.mean(1)), interval(truth.amax(1))
    write(a.name, dict(captions=len(texts), pictures=a.k, S=a.S, eta=eta, mean=one, best_possible=best,
                       rewards=rows))
    for r, v in rows.items():
        print(f"{r}: within a prompt {shown(v['correlation'])}; best of {a.k} {shown(v['best'])}, one "
              f"{shown(one)}")

if __name__ == '__main__': main()
