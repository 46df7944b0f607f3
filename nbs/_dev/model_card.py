#!/usr/bin/env python
"""Measure the embedded model and write data/README.md and data/results/base.json:
`python nbs/_dev/model_card.py [--n 960]`"""
import argparse, time
from pathlib import Path
import torch
from results import write
from diffusion_sharpening.basics.stats import interval, shown
from diffusion_sharpening.evaluation.measure import evaluate
from diffusion_sharpening.commands.load import load_model
from diffusion_sharpening.names.catalog import load_reward
from diffusion_sharpening.basics.seeds import START, noise
from diffusion_sharpening.maths.rollout import rollout
from diffusion_sharpening.worlds.exam import all_hold
from diffusion_sharpening.worlds.shapes.exam import by_category, check
from diffusion_sharpening.worlds.shapes.clip import near_miss
from diffusion_sharpening.worlds.shapes.draw import CATEGORIES, category, picture, prompts

root = Path(__file__).resolve().parents[2]

def table(scores, texts):
    "Overall and per category, with intervals"
    return {k: interval(v, 'captions') for k, v in dict(overall=scores, **by_category(scores, texts)).items()}

def best_of(model, texts, judge, k, S):
    "Best of `k` pictures per prompt, by `judge`; seeds of the i-th prompt's pictures follow from i"
    many = [t for t in texts for _ in range(k)]
    e = evaluate(model, many, dict(judge=judge), S, seed=7)
    return e.scores['judge'].view(-1, k)

def per_step(model, B=32, S=10):
    "Milliseconds per image and step of a rollout"
    cond = model.encode(['a red circle']*B); x = noise(torch.arange(B), START, model.item)
    go = lambda: rollout(model, x, model.grid(S), cond, keep=False)
    go(); ts = []
    for _ in range(5): t = time.perf_counter(); go(); ts.append(time.perf_counter()-t)
    return 1e3*sorted(ts)[2]/B/S

def clip_facts(texts, ims):
    "How often the small CLIP prefers a picture's own caption to a near miss"
    import random
    clip, rng = load_reward('clip', 'shapes'), random.Random(0)
    return interval((clip(ims, texts) > clip(ims, [near_miss(t, rng) for t in texts])).float())

def measure(n, S):
    texts = prompts(n, 'heldout', seed=1)
    ims = torch.stack([picture(t, i, 'heldout') for i, t in enumerate(texts)])
    model, checker = load_model('shapes'), load_reward('checker', train=False)
    recon = model.show(model.latents(ims))
    mine = {c: [t for t in texts if category(t) == c] for c in CATEGORIES}
    other = [mine[category(t)][mine[category(t)].index(t) - 1] for t in texts]    # of the same category
    base = evaluate(model, texts, dict(checker=checker), S)
    eight = best_of(model, texts[:60], checker, 8, S)
    strong = evaluate(model.with_guidance(3.), texts, dict(checker=checker), S)
    return dict(
        S=S, guidance=model.guidance, n=n, guidance_3=interval(strong.scores['checker']),
        strict=interval(all_hold(base.scores['checker'])), ms_per_image_step=per_step(model),
        real=table(check(ims, texts), texts), shuffled=table(check(ims, other), texts),
        reconstructed=table(check(recon, texts), texts), base=table(base.scores['checker'], texts),
        one_of_8=interval(eight[:, 0]), best_of_8=interval(eight.amax(1)),
        best_of_8_gain=interval(eight.amax(1)-eight.mean(1)), clip_prefers_own=clip_facts(texts, ims))

CARD = """# What lies here

Weights that this repository trained itself, from nothing, on its own worlds (`worlds.shapes`, \
`worlds.layouts`, `worlds.molecules`), and the molecules that the last of them learns from. \
Apache-2.0 but for those.

| folder | what it is, and how it is loaded | made by |
|---|---|---|
| `shapes-sdxl/` | a `StableDiffusionXLPipeline`: 64-pixel pictures, 8 × 8 × 12 latents, U-Net {unet:.1f} M \
parameters, two CLIP text encoders, v-prediction; plain `StableDiffusionXLPipeline.from_pretrained` | \
`nbs/_dev/gpu_base.py` |
| `shapes-clip/` | an open_clip model that scores pictures of Shapes against captions; \
`open_clip.create_model_and_transforms('local-dir:…/shapes-clip')`, the reward `clip@shapes` | \
`nbs/_dev/gpu_judges.py` |
| `shapes-grader/` | a LLaVA of 0.3 M parameters that grades pictures of Shapes behind `transformers \
serve`, the reward `mllm@shapes`; a coarse judge that hears wrong colours, half hears outlines and no \
textures (`results/rewards-mllm.json`) | `make weights` |
| `shapes-preference/` | a small ImageReward-style judge of pictures of Shapes, its towers begun from \
`shapes-clip/`, trained on made-up choices and near misses; the reward `preference@shapes` \
(`results/judges.json`) | `nbs/_dev/gpu_judges.py` |
| `shapes-aesthetic/` | one linear layer on the picture tower of `shapes-clip/`, fitted to the ratings of a \
made-up taste (warm colours, patterned fills); the reward `aesthetic@shapes` \
(`results/rewards-preference.json`) | `python nbs/_dev/preference_weights.py` |
| `layouts-model/` | a transformer of pages, .5 M parameters, with the spreads that the reward `tidy` \
divides by; `sharpen demo --world layouts` | `make weights` |
| `layouts-features/` | the features of layout-FID (ours), .2 M parameters: not those of any published score \
| `make weights` |
| `molecules-model/` | a transformer of molecules, 1.1 M parameters; `sharpen demo --world molecules` | \
`make weights` |
| `molecules-qm9/` | 3,757 molecules of QM9 as graphs: those of up to seven heavy atoms that are stable by \
EDM's rule, from the package `qm9pack` 1.0.3 under its MIT licence, which lies beside them | \
`worlds.molecules.data` |
| `results/` | measurements, each with the command that makes it again | the commands named in the files |

All of it but `molecules-qm9/` (MIT) is licensed like the code (Apache-2.0). Pictures, captions, pages, \
choices and ratings are drawn by this repository's own code; no photograph, no artwork, no person's \
judgement and no published weights are in it. \
The tokenizers are trained on the same captions.

## Training

Image-caption pairs of the training split, no held-out caption and none of the nine held-out attribute \
pairs:

{training}

`make weights` trains models of the same shape on a processor, in hours and on 60,000 pairs, and can be \
interrupted and continued; they come out weaker.

## Scores

{n} held-out captions, one picture each, {S} DDIM steps, guidance {guidance:g} (seed 0); mean of the \
checker and its 95 % interval over the captions named. In {strict} of the generated pictures every \
statement of the caption holds. Remake with `python nbs/_dev/model_card.py`.

| | over | real renders | shuffled captions | after the autoencoder | generated |
|---|---|---|---|---|---|
{rows}

Best of 8 by the checker on 60 of the captions: {best} against {one} for a single picture. The CLIP prefers \
a picture's own caption to a near miss in {clip}.
Sampling takes {ms:.2f} ms per image and step with PyTorch's thread count at {threads}, on a machine that \
was busy with other work.

With classifier-free guidance 3 (twice the network calls) the checker gives {guided}. Fills still leak \
between things and colours are sometimes swapped.
"""

def show(i): return shown(i, over='')

def card(r, training):
    kinds = ('real', 'shuffled', 'reconstructed', 'base')
    rows = [' | '.join([k, f"{r['base'][k]['over']}", *(show(r[o][k]) for o in kinds)])
            for k in ['overall', *CATEGORIES]]
    unet = sum(p.numel() for p in load_model('shapes').pipe.unet.parameters())/1e6
    about = dict(guided='guidance_3', strict='strict', best='best_of_8', one='one_of_8',
                 clip='clip_prefers_own')
    return CARD.format(unet=unet, training=training, rows='\n'.join(f'| {o} |' for o in rows),
                       ms=r['ms_per_image_step'], **{k: show(r[v]) for k, v in about.items()},
                       **{k: r[k] for k in ('n', 'S', 'guidance', 'threads')})

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--n', type=int, default=960)
    p.add_argument('--S', type=int, default=20)
    a = p.parse_args()
    r = write('base', measure(a.n, a.S))
    training = (root/'data'/'training.md').read_text().strip() if (root/'data'/'training.md').exists() else ''
    (root/'data'/'README.md').write_text(card(r, training))
    print((root/'data'/'README.md').read_text())

if __name__ == '__main__': main()
