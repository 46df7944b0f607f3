#!/usr/bin/env python
"""Inverse noise correction on Fashion-MNIST:
`python nbs/_dev/noise_correction.py [--data FOLDER] [--work FOLDER]`

Trains a small unconditional flow in pixel space and a classifier whose features measure it, inverts training
pictures through the flow, learns the law of the noises (an affine map, and a flow a quarter as large), and
measures the Fréchet and kernel distances of all of them to the pictures held out. Every stage is kept in the
work folder and goes on where it was stopped; data/results/noise_correction.json takes the numbers. With the
defaults it takes about seven minutes of one core. `--large` is a base of 2.8 million parameters."""
import argparse
from functools import partial
from pathlib import Path
import torch

torch.set_num_threads(1)
from safetensors.torch import load_file, save
from diffusion_sharpening.basics.files import write_whole
from diffusion_sharpening.basics.seeds import fold, normals
from diffusion_sharpening.basics.stats import interval
from diffusion_sharpening.corrector.affine import fit_affine
from diffusion_sharpening.corrector.corrected import Corrected, inverted_noises
from diffusion_sharpening.data.idx import idx_pictures
from diffusion_sharpening.evaluation.features import efficientnet, features_of, train_classifier
from diffusion_sharpening.maths.distances import frechet, kernel_distance, moments
from diffusion_sharpening.models.fit import fit, picks, trapezoid_lr
from diffusion_sharpening.models.pixels import PixelFlow
from results import write

DATA = '/usr/share/datasets/fashion-mnist'
SIZES = dict(widths=(32, 64)), dict(widths=(16, 32))     # of the base, of the corrector
LARGE = dict(widths=(64, 128)), dict(widths=(32, 64))
BATCH, PX = 64, 64                     # pictures of an update; side at which EfficientNet sees a picture
TOLERANCE, MOST, ROUNDS = 1e-2, 2e-2, 16    # of a step, of the round trip (a grey level is .8e-2), of a step

def train_flow(sizes, items, updates, path, lr=2e-3, seed=0):
    "A flow of pixels with averaged weights after `updates` updates; goes on from the file"
    torch.manual_seed(seed)
    model = PixelFlow(tuple(items.shape[1:]), **sizes).add_full()
    def loss(net, k):
        chosen, _ = picks(len(items), BATCH, seed, k)
        return model.denoising_loss(items[chosen], None, fold(seed, k, torch.arange(BATCH))).mean()
    fit(model.policies.net, loss, updates, lr, path, decay=.995, log=path.with_suffix('.jsonl'),
        rate=partial(trapezoid_lr, warm=100, decay=.3))
    return model

def flop(model):
    "Operations of one evaluation for one picture, counted as it runs"
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.output(torch.zeros(1, *model.item), torch.tensor([.5]))
    return counter.get_total_flops()

@torch.no_grad()
def features_kept(path, corrected, networks, n, seed, chunk=500):
    "Features of `n` samples by each network, made in chunks; kept in a file"
    if path.exists(): return load_file(path)
    parts = {k: [] for k in networks}
    for start in range(0, n, chunk):
        z = normals(fold(seed, torch.arange(start, min(n, start + chunk))), corrected.model.item)
        pictures = corrected.model.show(corrected.sample(z))
        for k, net in networks.items(): parts[k].append(features_of(net, pictures))
    write_whole(path, save({k: torch.cat(v).contiguous() for k, v in parts.items()}))
    return load_file(path)

def distances(found, real):
    "Both distances by each network, to the pictures held out"
    return {k: dict(frechet=frechet(f, moments(real[k])), kernel=kernel_distance(f, real[k]).mean().item())
            for k, f in found.items()}

def over_seeds(rows):
    "Mean, interval and each value over seeds of samples"
    def told(values): return interval(torch.tensor(values), 'seeds') | dict(each=values)
    return {k: {d: told([r[k][d] for r in rows]) for d in rows[0][k]} for k in rows[0]}

def measured(name, corrected, a, networks, real, cost):
    "One way to sample: its distances over seeds, and what a picture costs"
    file = lambda seed: a.work/f'{name}-{seed}.safetensors'
    made = [features_kept(file(s), corrected, networks, a.samples, s + 1) for s in range(a.seeds)]
    rows = [distances(found, real) for found in made]
    out = dict(name=name, flop=cost) | over_seeds(rows)
    shown = {k: round(out[k]['frechet']['mean'], 3) for k in networks}
    print(name, f'{cost/1e9:.2f} GFLOP', shown, flush=True)
    return out

def floor_of(train, a, networks, real):
    "What pictures of the data themselves come to, as many as are sampled"
    part = lambda s: train[s*a.samples:(s + 1)*a.samples]
    return over_seeds([distances({k: features_of(net, part(s)) for k, net in networks.items()}, real)
                       for s in range(a.seeds)])

def corrections(base, items, a, steps):
    "The two correctors of a number of steps, and what the inversion came to"
    noises, counts = inverted_noises(base, items, steps, a.work/f'noises{steps}', tol=TOLERANCE, most=MOST,
                                     rounds=ROUNDS)
    small = train_flow(a.sizes[1], noises, a.corrector_updates, a.work/f'corrector{steps}.safetensors')
    law = dict(mean=noises.mean().item(), sd=noises.std().item())
    return fit_affine(noises), small, counts | law

def arms(base, items, a, networks, real):
    "Base, base with each corrector, at every number of steps; the base alone at more steps"
    one, rows, inversions = flop(base), [], {}
    plain = lambda S: Corrected(base, S, lambda z: z)
    for S in a.base_steps: rows.append(measured(f'base {S}', plain(S), a, networks, real, S*one))
    for S in a.steps:
        affine, small, inversions[S] = corrections(base, items, a, S)
        rows.append(measured(f'affine {S}', Corrected(base, S, affine), a, networks, real, S*one))
        for own in a.corrector_steps:
            cost = S*one + own*flop(small)
            rows.append(measured(f'flow {S}+{own}', Corrected(base, S, small, own), a, networks, real, cost))
    return rows, inversions

def options():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', default=DATA, help='folder of idx files (default %(default)s)')
    p.add_argument('--work', type=Path, default=Path('runs/noise_correction'), help='default %(default)s')
    p.add_argument('--large', action='store_true', help='four times as many parameters')
    p.add_argument('--updates', type=int, default=500, help='of the base (default %(default)s)')
    p.add_argument('--corrector-updates', type=int, default=400, help='default %(default)s')
    p.add_argument('--inverted', type=int, default=1500, help='training pictures (default %(default)s)')
    p.add_argument('--samples', type=int, default=500, help='of each way and seed (default %(default)s)')
    p.add_argument('--real', type=int, default=2000, help='held-out pictures (default %(default)s)')
    p.add_argument('--seeds', type=int, default=3, help='default %(default)s')
    p.add_argument('--steps', type=int, nargs='+', default=[4], help='with correctors')
    p.add_argument('--base-steps', type=int, nargs='+', default=[4, 5, 6, 8, 12], help='of the base alone')
    p.add_argument('--corrector-steps', type=int, nargs='+', default=[4, 8], help='of the flow corrector')
    a = p.parse_args()
    a.sizes = LARGE if a.large else SIZES
    return a

def main():
    a = options()
    a.work.mkdir(parents=True, exist_ok=True)
    train, labels = idx_pictures(a.data)
    base = train_flow(a.sizes[0], 2*train - 1, a.updates, a.work/'base.safetensors')
    own = train_classifier(train, labels, a.work/'classifier.safetensors', updates=400)
    held, truth = idx_pictures(a.data, 't10k')
    with torch.no_grad(): right = (own(held).argmax(1) == truth).float().mean().item()
    networks = dict(classifier=own.features, efficientnet=efficientnet(PX))
    real = {k: features_of(net, held[:a.real]) for k, net in networks.items()}
    floor = floor_of(train[-a.seeds*a.samples:], a, networks, real)
    rows, inversions = arms(base, 2*train[:a.inverted] - 1, a, networks, real)
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(a).items()}
    write('noise_correction', dict(
        data='Fashion-MNIST', settings=settings, batch=BATCH, efficientnet_px=PX, tolerance=TOLERANCE,
        round_trip_at_most=MOST, rounds=ROUNDS, classifier_accuracy=right, floor=floor,
        parameters={k: sum(p.numel() for p in PixelFlow(**s).policies.net.parameters())
                    for k, s in zip(('base', 'corrector'), a.sizes)},
        inversions=inversions, rows=rows))

if __name__ == '__main__': main()
