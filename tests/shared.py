"What several tests use: a cheap reward, and a folder with all that a training asks for"
from diffusion_sharpening.commands.train import train
from diffusion_sharpening.models.tiny import tiny_sdxl
from diffusion_sharpening.rewards.protocol import Reward

PROMPTS = ['a red circle', 'a blue square', 'a green star', 'a plain heart']
CODE = 'def bright(images, prompts): return images.mean((1, 2, 3))\n'


class Bright(Reward):
    "Mean brightness: cheap, with a gradient, and never tied"
    name, differentiable = 'bright', True
    def score(self, images, prompts): return 100*images.mean((1, 2, 3))


def fill(d):
    "A tiny SDXL pipeline, prompts and a reward, in the folder `d`"
    tiny_sdxl(d/'xl', words=PROMPTS)
    (d/'prompts.txt').write_text('\n'.join(PROMPTS))
    (d/'mine.py').write_text(CODE)
    return d


def go(made, name, out, steps, code='mine.py', **more):
    "A training on what `fill` made"
    asked = dict(model=str(made/'xl'), reward=f'{made/code}:bright', prompts=str(made/'prompts.txt'),
                 heldout=0, batch=2, S=3, rank=2, checkpoint_every=1)
    return train(name, out=str(out), steps=steps, **{**asked, **more})
