#!/usr/bin/env python
"""The recipe of the molecules' model with more heavy atoms: data/results/molecules-HEAVY.json

`python nbs/_dev/heavier_molecules.py HEAVY` trains a network for up to HEAVY atoms, with the batch and rates
of the recipe that ships, on the molecules of QM9 of at most so many, and measures what it makes: of nothing
asked for, and of held-out compositions. `HEAVY 7` is the recipe itself, to compare with at equal updates.
The run is kept in runs/molecules-HEAVY and goes on where it was."""
import argparse, time
from importlib.util import find_spec
from pathlib import Path
import torch

torch.set_num_threads(1)
p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
p.add_argument('heavy', type=int, choices=range(2, 10), metavar='HEAVY')
p.add_argument('--updates', type=int, default=4000)
p.add_argument('--source', help='folder of the tables of qm9pack, or its wheel; else the installed package')
p.add_argument('--many', type=int, default=512, help='molecules to measure')
a = p.parse_args()

from diffusion_sharpening.worlds.molecules import qm9
qm9.SLOTS = a.heavy                    # before the modules are loaded that make all their shapes of it

from results import write
from diffusion_sharpening.models.fit import fit, trapezoid_lr
from diffusion_sharpening.models.sets import SetTransformer
from diffusion_sharpening.worlds.molecules.data import (
    load_graphs, molecule_prompts, real_graphs, save_graphs, split_of)
from diffusion_sharpening.worlds.molecules.graphs import in_rdkit, keys, molecule_metrics
from diffusion_sharpening.worlds.molecules.items import ANY, ITEM, conditions, prompt_of, to_items
from diffusion_sharpening.worlds.molecules.model import MoleculeModel
from diffusion_sharpening.worlds.molecules.recipe import molecule_loss

def valid(graphs): # Share that RDKit accepts; None where it is not installed
    return sum(in_rdkit(g) is not None for g in graphs)/len(graphs) if find_spec('rdkit') else None

def measured(model, texts, trained, known, eta):
    x = model.sample(texts, torch.arange(len(texts)), S=16, eta=eta)
    said = dict(in_qm9=torch.isin(keys(x), known).float().mean().item(), valid=valid(x),
                asked=sum(prompt_of(g) == t for g, t in zip(x, texts))/len(texts))
    return molecule_metrics(x, trained) | said

def main():
    work = Path(f'runs/molecules-{a.heavy}')
    if not (work/'graphs.safetensors').exists(): save_graphs(real_graphs(a.source, qm9.PARTS), work)
    graphs = load_graphs(work)
    train, held = split_of(graphs), split_of(graphs, 'heldout')
    print(len(graphs), 'molecules,', len(train), 'to train on', flush=True)
    torch.manual_seed(0)
    net = SetTransformer(numbers=ITEM[1], told=5, width=128, layers=5, heads=4, places=a.heavy).train()
    told, began = conditions([prompt_of(g) for g in train])['told'], time.process_time()
    net = fit(net, molecule_loss(to_items(train), told), a.updates, 1e-3, work/f'{a.updates}.state',
              log=work/f'{a.updates}.jsonl', rate=trapezoid_lr, save_every=200)
    spent, model = time.process_time() - began, MoleculeModel(net.eval())
    known, trained = keys(graphs), {*keys(train).tolist()}
    asked = {'nothing': [ANY]*a.many, 'held-out compositions': molecule_prompts(held, a.many, 1)}
    rows = [dict(prompts=k, eta=eta) | measured(model, texts, trained, known, eta)
            for k, texts in asked.items() for eta in (0., 1.)]
    size = sum(p.numel() for p in net.parameters())
    write(f'molecules-{a.heavy}', dict(
        heavy=a.heavy, updates=a.updates, molecules=len(graphs), trained=len(train), parameters=size,
        processor_seconds=round(spent), rows=rows))

if __name__ == '__main__': main()
