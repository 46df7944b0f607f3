#!/usr/bin/env python
"""Train `data/shapes-preference` and fit `data/shapes-aesthetic`, both on the towers of `data/shapes-clip`;
started again after a stop, it goes on. `--pairs 0` leaves the preference model as it is (that which ships was
trained by gpu_judges.py) and measures it."""
import argparse, time
from pathlib import Path
import torch
from diffusion_sharpening.rewards.aesthetic import fit_aesthetic
from diffusion_sharpening.worlds.shapes.ratings import rated_shapes
from diffusion_sharpening.basics.stats import rank_correlation
from diffusion_sharpening.basics.files import digest
from diffusion_sharpening.rewards.clip import CLIPScore, find_clip
from diffusion_sharpening.rewards.preference import Preference, fit_preference, pair_accuracy
from diffusion_sharpening.worlds.shapes.choices import shapes_choices
from diffusion_sharpening.worlds.shapes.exam import by_category, check
from diffusion_sharpening.worlds.shapes.recipe import drawn_choices
from diffusion_sharpening.worlds.world import weights
from results import write

def with_checker(reward, pairs):
    "Rank correlation with the checker over both pictures of pairs, overall and by category"
    texts = [o[0] for o in pairs]*2
    ims = torch.stack([o[side] for side in (1, 2) for o in pairs]).float()/255
    with torch.no_grad(): r = reward(ims, texts)
    a, b = by_category(r, texts), by_category(truth := check(ims, texts), texts)
    return dict(overall=rank_correlation(r, truth)) | {k: rank_correlation(a[k], b[k]) for k in a}

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--pairs', type=int, default=6000, help="choices to learn; 0: none (default %(default)s)")
    p.add_argument('--steps', type=int, default=800, help="updates (default %(default)s)")
    p.add_argument('--test', type=int, default=600,
                   help="choices about held-out captions to test on (default %(default)s)")
    p.add_argument('--rated', type=int, default=2000,
                   help="rated pictures for the aesthetic head (default %(default)s)")
    p.add_argument('--out', default='data',
                   help="folder that gets the weights and results/rewards-preference.json")
    p.add_argument('--work', default='runs/preference', help="folder of the run: pairs, state file and log")
    args = p.parse_args()
    from diffusers import AutoencoderKL
    torch.set_num_threads(1)
    work, out, start = Path(args.work), Path(args.out), time.time()
    work.mkdir(parents=True, exist_ok=True)
    vae = AutoencoderKL.from_pretrained(weights('shapes-sdxl')/'vae').eval()
    pairs = drawn_choices(args.pairs, work, vae) if args.pairs else []
    drawn = time.time()
    small = CLIPScore(weights('shapes-clip')); clip = digest(find_clip(weights('shapes-clip'))[2])
    state = work/f'state-{clip[:8]}-{args.pairs}-{args.steps}'        # a CLIP trained again starts a new run
    home, clip_home = out/'shapes-preference', out/'shapes-clip'
    if pairs: judge = fit_preference(pairs, home, clip_home, steps=args.steps, state=state)
    else: judge = Preference(home)
    fitted = time.time()
    rated, stars, _ = rated_shapes(args.rated)
    taste = fit_aesthetic(out/'shapes-aesthetic', rated, stars, out/'shapes-clip')
    held, prob = shapes_choices(args.test, 1, 'heldout')
    new, true, texts = rated_shapes(max(12, args.test//2), 1, 'heldout')
    result = dict(
        clip_sha256=clip,
        possible=torch.maximum(prob, 1-prob).mean().item(),
        held_out_captions={r.name: pair_accuracy(r, held) for r in (judge, small)},
        held_out_prompts_of_training=judge.note['held_out'], checker=with_checker(judge, held[:240]),
        aesthetic=dict(rank_correlation_with_ratings=rank_correlation(taste(new, texts), true),
                       checker=with_checker(taste, held[:240])),
        seconds=dict(pairs=round(drawn-start, 1), training=round(fitted-drawn, 1)))
    write('rewards-preference', result, into=out/'results')

if __name__ == '__main__': main()
