"""Losses of the first 20 updates of every method on the embedded model, held to a file.

`python tests/test_golden.py` writes the file anew: after a change of the weights or of a method, and only then."""
import json
from pathlib import Path
import pytest
import torch
from diffusion_sharpening.commands.load import load_model
from diffusion_sharpening.data.tables import prompt_set, shapes_pairs
from diffusion_sharpening.methods.catalog import METHODS
from diffusion_sharpening.names.catalog import load_reward
from diffusion_sharpening.training.loop import settings, train

FILE = Path(__file__).parent/'golden_losses.json'
RUNS = [f'{m}-{p}' for m in ('sft', 'rlhf') for p in METHODS[m].presets if p != 'default']
SMALL = dict(batch=2, n=2, S=4, seed=3, rank=4)

def losses(name, threads=1):
    "The logged losses of 20 updates"
    method, preset = name.split('-'); was = torch.get_num_threads(); torch.set_num_threads(threads)
    run, cfg = settings(method, preset, **SMALL, steps=20)
    run.steps //= getattr(cfg, 'updates', 1)
    d, prompts, images = load_model('shapes'), prompt_set('shapes', 40), None
    if cfg.needs_images:
        ims, prompts = shapes_pairs(40)
        images = d.latents(ims)
    try: return [r['loss'] for r in train(d, method, load_reward('clip', 'shapes'), prompts, run, cfg, images).history]
    finally: torch.set_num_threads(was)

@pytest.mark.parametrize('name', RUNS)
def test_losses_are_those_of_the_file(name):
    "Loose enough for another processor, where sums are made in another order, and for no other reason"
    want, got = torch.tensor(json.loads(FILE.read_text())[name]), torch.tensor(losses(name))
    torch.testing.assert_close(got, want, rtol=.02, atol=2e-3*want.abs().max().item())

def test_file_holds_every_preset():
    assert sorted(json.loads(FILE.read_text())) == sorted(RUNS)

if __name__ == '__main__':
    FILE.write_text(json.dumps({n: [round(l, 6) for l in losses(n)] for n in RUNS}, indent=1)+'\n')
