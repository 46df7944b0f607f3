"""Losses of the first updates of every method on the embedded model, held to a file: 4, or 20 if asked.

`python tests/test_golden.py` writes the file anew: only after a change of the weights or of
a method."""
import json, math
from pathlib import Path
import pytest
import torch
from diffusion_sharpening.commands.load import load_model
from diffusion_sharpening.data.sources import Pictures, Prompts
from diffusion_sharpening.methods.catalog import PRESETS
from diffusion_sharpening.names.catalog import load_reward
from diffusion_sharpening.training.loop import Callback, train
from diffusion_sharpening.training.run import settings
from diffusion_sharpening.worlds.world import WORLDS

FILE = Path(__file__).parent/'golden_losses.json'
RUNS = [f'{m}-{p}' for m in PRESETS for p in PRESETS[m] if p != 'default']
SMALL = dict(batch=2, seed=3, rank=4)

class Until(Callback):
    "Ends a training after some batches"
    def __init__(self, k): self.k = k
    def update(self, s):
        if s.k >= self.k: s.stop = 'enough'


def losses(name, threads=1, share=1.):
    "The logged losses of a share of 20 updates"
    method, preset = name.split('-'); was = torch.get_num_threads(); torch.set_num_threads(threads)
    run, made = settings(method, preset, **SMALL, steps=20, **({} if preset == 'plain' else dict(n=2, S=4)))
    run.steps //= made.updates
    d, world = load_model('shapes'), WORLDS['shapes']
    if made.needs_images:
        ims, texts = world.pairs(40)
        source = Pictures(d, texts, d.latents(ims[:]), run.batch, run.seed)
    else: source = Prompts(d, world.prompts(40), run.batch, run.seed)
    watch = [Until(math.ceil(share*run.steps))]
    try: return [r['loss'] for r in train(d, made, load_reward('clip@shapes'), source, run, watch).history]
    finally: torch.set_num_threads(was)

@pytest.mark.parametrize('share', [.2, pytest.param(1., marks=pytest.mark.slow)])
@pytest.mark.parametrize('name', RUNS)
def test_losses_are_those_of_the_file(name, share):
    "Loose enough for another processor, where sums are made in another order, and for no other reason"
    want, got = torch.tensor(json.loads(FILE.read_text())[name]), torch.tensor(losses(name, share=share))
    assert len(got) == math.ceil(share*len(want))
    torch.testing.assert_close(got, want[:len(got)], rtol=.02, atol=2e-3*want.abs().max().item())

def test_file_holds_every_preset():
    assert sorted(json.loads(FILE.read_text())) == sorted(RUNS)

if __name__ == '__main__':
    FILE.write_text(json.dumps({n: [round(l, 6) for l in losses(n)] for n in RUNS}, indent=1)+'\n')
