#!/usr/bin/env python
"""From a folder with a model to a LoRA that other tools load: `python nbs/_dev/end_to_end.py`

A random pipeline in the layout of SDXL, 128 px, with prompts and a reward of one's own: plan, train, kill,
resume, sample, evaluate, score, export, push (dry run), and the reward served to score and to train again.
Each command is a process of its own; what two of them say of the same thing must be the same."""
import json, os, re, signal, subprocess, sys, tempfile, threading, time
from pathlib import Path
import torch
from attacking import SMALL, TEXTS, End, trouble, weights
from diffusion_sharpening.basics.pictures import read_picture
from diffusion_sharpening.basics.seeds import START, noise
from diffusion_sharpening.evaluation.measure import start_seeds
from diffusion_sharpening.models.lora import lora_file
from diffusion_sharpening.models.tiny import tiny_sdxl

REWARD = '''"Mean redness of the pictures as files hold them"
import os, signal
calls = 0
def red(images, prompts):
    global calls
    calls += 1
    if os.environ.get('KILL') == str(calls): os.kill(os.getpid(), signal.SIGKILL)
    return (images[:, 0]*255).round().double().mean((1, 2)).float()/255
'''

class Process:
    "A command line as a user runs it"
    def __init__(self, *argv, at='.', env=()):
        self.began, self.said = time.monotonic(), {1: b'', 2: b''}
        code = 'from diffusion_sharpening.commands.cli import main; main()'
        self.p = subprocess.Popen([sys.executable, '-c', code, *map(str, argv)], cwd=at, stdout=-1, stderr=-1,
                                  env=dict(os.environ, OMP_NUM_THREADS='1', **dict(env)))
        self.pid = self.p.pid
        self.readers = [threading.Thread(target=self._read, args=(k, f), daemon=True)
                        for k, f in ((1, self.p.stdout), (2, self.p.stderr))]
        for t in self.readers: t.start()
    def _read(self, k, f):
        while part := f.read1(1 << 16): self.said[k] += part
    def end(self, wait=600.):
        code = self.p.wait(wait)
        for t in self.readers: t.join(5)
        return End(code, *(self.said[k].decode(errors='replace') for k in (1, 2)),
                   time.monotonic() - self.began)


def make(d):
    "A model, prompts and a reward"
    tiny_sdxl(d/'xl', words=' '.join(TEXTS).split(), sample_size=16)
    (d/'prompts.txt').write_text('\n'.join(TEXTS) + '\n')
    (d/'mine.py').write_text(REWARD)

def plain(model, lora, prompts, S=3, guidance=5., **more):
    "What a script of diffusers draws with a LoRA, as pixels"
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline
    pipe = StableDiffusionXLPipeline.from_pretrained(model)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    if lora: pipe.load_lora_weights(str(lora.parent), weight_name=lora.name)
    side = pipe.unet.config.sample_size
    start = noise(start_seeds(0, len(prompts)), START, (pipe.unet.config.in_channels, side, side))
    return pipe(prompts, latents=start, num_inference_steps=S, guidance_scale=guidance, output_type='pt',
                height=side*pipe.vae_scale_factor, width=side*pipe.vae_scale_factor, **more).images.cpu()

def check(ok, what):
    if not ok: raise SystemExit(f'end to end: {what}')
    print(f'  {what}', flush=True)


def end_to_end(d, start=Process):
    "All of it in folder `d`; `start(*argv, at, env)` begins a command line"
    make(d)
    own, prompts = 'mine.py:red', 'prompts.txt'
    def sharpen(*argv, env=()):
        end = start(*argv, at=d, env=env).end(600)
        why = trouble(end, 0)
        check(not why, f"sharpen {argv[0]}: {why or f'{end.seconds:.1f} s'}")
        return end.out
    def train(out, reward=own, **how):
        return ['train', 'rlhf', '--model', 'xl', '--reward', reward, '--prompts', prompts, '--heldout', 3,
                '--S-eval', 3,
                '--steps', 2, '--out', out, '--set', *SMALL, 'lr=.05', 'ema=0']

    planned = json.loads(sharpen('plan', 'rlhf', '--model', 'xl', '--reward', own, '--prompts', prompts,
                                 '--heldout', 3,
                                 '--json', '--set', *SMALL))
    check(next(r['value'] for r in planned if r['name'] == 'fits'), 'the plan fits this machine')
    sharpen(*train('whole'))
    killed = start(*train('killed'), at=d, env=dict(KILL='4')).end(600)
    check(killed.code == -signal.SIGKILL, 'a training is killed in its second batch')
    sharpen('train', 'rlhf', '--resume', 'killed')
    whole, again = (json.loads((d/k/'report.json').read_text()) for k in ('whole', 'killed'))
    check(weights(d/'whole') == weights(d/'killed') and whole['after'] == again['after'],
          'going on ends in the bits, and the report, of the run that was left alone')
    check(whole['heldout_prompts'] == 3 and '3 held out, 3 to train on' in whole['heldout_from'],
          'prompts were split')

    ask = ['--lora', 'whole', '--prompts', prompts, '--n', 4, '--S', 3]
    sharpen('sample', *ask, '--out', 'pictures')
    asked = json.loads(sharpen('evaluate', *ask, '--reward', own,
                               '--json'))['judges']['mine:red']['overall']['mean']
    scored = ['score', '--images', 'pictures', '--prompts', 'pictures/prompts.jsonl']
    found = json.loads(sharpen(*scored, '--reward', own, '--out', 'scores', '--json'))
    check(abs(found['mean'] - asked) < 1e-6 and found['pictures'] == 4, 'a folder scores what evaluate says')

    for layout in ('diffusers', 'kohya'): sharpen('export', 'whole', '--layout', layout, '--out',
                                                  f'{layout}.safetensors')
    drawn = torch.stack([read_picture(d/f'pictures/000{i}.png') for i in range(4)])
    check((plain(d/'xl', None, TEXTS[:4]) - drawn).abs().max() > .02, 'the LoRA changes the pictures')
    for layout in ('diffusers', 'kohya'):
        gap = (plain(d/'xl', d/f'{layout}.safetensors', TEXTS[:4]) - drawn).abs().max().item()*255
        check(gap < .6, f'diffusers draws the same from the {layout} file: {gap:.2f} of 255')
    pushed = json.loads(sharpen('push', 'whole', 'me/sharp', '--dry-run', '--json'))
    check({lora_file, 'lora_kohya.safetensors', 'README.md', 'report.json'} <= {*pushed['files']}
          and str(d) not in pushed['card'], 'what would be pushed is there, without a path of this machine')

    server = start('serve-reward', '--reward', own, '--port', 0, at=d, env=())
    until = time.monotonic() + 120
    while not (url := re.search(rb'http://\S+/score',
                                server.said[1])) and time.monotonic() < until: time.sleep(.05)
    far = f'remote@{url[0].decode()}'
    there = json.loads(sharpen(*scored, '--reward', far, '--out', 'far', '--json'))
    check(there['mean'] == found['mean'], 'a served reward scores the same')
    sharpen(*train('remote', far))
    check(weights(d/'remote') == weights(d/'whole'), 'and trains the same bits')
    os.kill(server.pid, signal.SIGTERM)
    why = trouble(server.end(60), 0)
    check(not why, f'the server ends when it is asked to {why}')


def main():
    with tempfile.TemporaryDirectory() as d: end_to_end(Path(d))
    print('end to end: all as it should be')

if __name__ == '__main__': main()
