#!/usr/bin/env python
"""Molecules as points in space instead of graphs, for an hour: data/results/molecules-space.json

`python nbs/_dev/molecules_in_space.py --source WHEEL` trains a transformer on elements and coordinates,
hydrogen included, of the molecules of QM9 with at most seven heavy atoms, each turned by chance whenever it
is seen; then it measures what comes out by EDM's rule, and as graphs beside the graph model that ships. The
run is kept in runs/molecules-space and goes on where it was."""
import argparse
from pathlib import Path
import torch
from results import write
from diffusion_sharpening.commands.load import load_model
from diffusion_sharpening.models.fit import fit, trapezoid_lr
from diffusion_sharpening.models.set_model import SetModel, noise_loss
from diffusion_sharpening.models.sets import SetTransformer
from diffusion_sharpening.worlds.molecules.bonds import atom_stable, bond_orders, molecule_stable
from diffusion_sharpening.worlds.molecules.data import molecule_prompts, split_of
from diffusion_sharpening.worlds.molecules.graphs import keys, molecule_metrics
from diffusion_sharpening.worlds.molecules.items import ANY, conditions, prompt_of
from diffusion_sharpening.worlds.molecules.qm9 import PARTS, SLOTS, as_graph, qm9

ATOMS, KINDS = 23, 6                 # C7H16; none and five elements
ANGSTROM, KIND = .6, .5              # factors on what the network sees

def points(atoms, places):
    "Elements and centred coordinates of a molecule as one sample `(23, 9)`; empty places lie in the middle"
    out = torch.zeros(ATOMS, 3 + KINDS)
    out[:len(atoms), :3] = ANGSTROM*(places - places.mean(0))
    kinds = torch.nn.functional.pad(atoms, (0, ATOMS - len(atoms)))
    out[:, 3:] = KIND*(2*torch.nn.functional.one_hot(kinds, KINDS) - 1)
    return out

def molecule(x):
    "Elements and places in ångström of a sample"
    kinds = x[:, 3:].argmax(-1)
    return kinds[kinds > 0], x[kinds > 0, :3]/ANGSTROM

def turned(x0, g):
    "Every molecule turned by a rotation of its own, or turned and mirrored"
    q, r = torch.linalg.qr(torch.randn(len(x0), 3, 3, generator=g))
    q = q*torch.diagonal(r, dim1=-2, dim2=-1).sign()[:, None]
    return torch.cat([x0[..., :3] @ q, x0[..., 3:]], -1)

class PointModel(SetModel):
    "Prompts in, points out"
    item = ATOMS, 3 + KINDS
    def encode(self, prompts): return conditions(list(prompts)).to(self.device)
    def show(self, x0, **kw): return x0
    def latents(self, things, chunk=8): return things

def read(work, source):
    "Points, and the graphs of the same molecules: those that are stable in space"
    file = work/'molecules.pt'
    if not file.exists():
        found = [(a, x) for _, a, x in qm9(source, SLOTS, PARTS) if molecule_stable(a, bond_orders(a, x))]
        work.mkdir(parents=True, exist_ok=True)
        torch.save([torch.stack([f(a, x) for a, x in found]) for f in (points, as_graph)], file)
    return torch.load(file)

def as_points(samples):
    "Shares of atoms and molecules that are stable by EDM's rule, and the heavy graphs of those that have one"
    got = [molecule(x) for x in samples]
    stable = [atom_stable(a, bond_orders(a, x)) for a, x in got]
    whole = [len(a) > 0 and bool(molecule_stable(a, bond_orders(a, x))) for a, x in got]
    none = torch.zeros(SLOTS, 1 + SLOTS, dtype=torch.long)
    graphs = [as_graph(a, x) if (a > 1).sum() <= SLOTS else none for a, x in got]
    return torch.cat(stable).float().mean().item(), sum(whole)/len(whole), torch.stack(graphs)

def measured(samples, texts, trained, known, in_space):
    "What a set of samples is worth"
    atoms, whole, graphs = as_points(samples) if in_space else (None, None, samples)
    return dict(edm_atoms=atoms, edm_molecules=whole, **molecule_metrics(graphs, trained),
                in_qm9=torch.isin(keys(graphs), known).float().mean().item(),
                asked=sum(prompt_of(g) == t for g, t in zip(graphs, texts))/len(texts))

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--source', help='folder of tables of qm9pack, or its wheel; else the installed package')
    p.add_argument('--updates', type=int, default=12000)
    p.add_argument('--many', type=int, default=512, help='molecules to measure')
    a = p.parse_args()
    torch.set_num_threads(1)
    work = Path('runs/molecules-space')
    x, graphs = read(work, a.source)
    train = torch.isin(keys(graphs), keys(split_of(graphs)))
    torch.manual_seed(0)
    net = SetTransformer(numbers=3 + KINDS, told=5, width=128, layers=6, heads=8).train()
    told = conditions([prompt_of(g) for g in graphs[train]])['told']
    loss = noise_loss(PointModel.schedule, x[train], told, view=turned)
    net = fit(net, loss, a.updates, 1e-3, work/'points.state', log=work/'points.jsonl', rate=trapezoid_lr)
    models = {'points': PointModel(net.eval()), 'graphs': load_model('molecules')}
    known, trained = keys(graphs), {*keys(graphs[train]).tolist()}
    held = split_of(graphs, 'heldout')
    asked = {'nothing': [ANY]*a.many, 'held-out compositions': molecule_prompts(held, a.many, 1)}
    rows = []
    for kind, model in models.items():
        for k, texts in asked.items():
            for S, eta in ((16, 0.), (16, 1.), (100, 0.), (100, 1.)):
                got = model.sample(texts, torch.arange(len(texts)), S=S, eta=eta)
                rows.append(dict(kind=kind, prompts=k, S=S, eta=eta) |
                            measured(got, texts, trained, known, kind == 'points'))
                print(rows[-1], flush=True)
    data = measured(x, [prompt_of(g) for g in graphs], trained, known, True)
    write('molecules-space', dict(
        updates=a.updates, molecules=len(x), trained=int(train.sum()),
        parameters={k: sum(p.numel() for p in m.network.parameters()) for k, m in models.items()},
        data=data, rows=rows))

if __name__ == '__main__': main()
