#!/usr/bin/env python
"""Pictures per second of every reward at small size, in batches and one by one:
`throughput.py [--n 8] [--only clip,own]`

Models are small stand-ins of the true architecture, loaded by the class that users run, so the numbers
compare the two ways of asking rather than rewards. *Batch*: one call with a tensor of `n` pictures. *One by
one*: a call for each picture, given as a PIL image. Both know the prompts already. Seconds are those of
this process on one thread of the processor, so that other work on the machine does not count; only `mllm`,
whose grader is a process of its own, is timed by the clock. Writes data/results/rewards-throughput.json."""
import argparse, atexit, json, shutil, tempfile, time, torch
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from results import write

from diffusion_sharpening.names.catalog import load_reward
from diffusion_sharpening.worlds.world import weights

root = Path(__file__).resolve().parents[2]
pkg = 'diffusion_sharpening.rewards.'
MAKE, stack = {}, ExitStack()

def small(f): MAKE[f.__name__] = f; return f
def load(where, *args, **kw):
    module, name = where.split(':')
    return getattr(import_module(pkg+module), name)(*args, **kw)

@small
def clip(d): return load_reward('clip@shapes')
@small
def checker(d): return load_reward('checker', train=False)
@small
def own(d): return load('own:Own', lambda images, prompts: images.mean((1, 2, 3)))
@small
def combined(d): return load('mixture:Combined', [clip(d), own(d)], [.7, .3])
@small
def remote(d): return load('remote:Remote', stack.enter_context(load('remote:serving', clip(d))))
@small
def preference(d): return load_reward('preference@shapes')
@small
def vqa(d): load('vqa:tiny_vlm', d); return load('vqa:VQAScore', str(d))
@small
def blip_vqa(d): return load('blip_vqa:BlipVQA', str(load('blip_vqa:tiny_blip_vqa', d)))
@small
def spatial(d): return load('spatial:Spatial', str(load('spatial:tiny_owlv2', d)), threshold=0.)
@small
def mllm(d): return load_reward('mllm@shapes')

@small
def aesthetic(d):
    x = torch.rand(8, 3, 64, 64)
    return load('aesthetic:fit_aesthetic', d, x, x.mean((1, 2, 3)), weights('shapes-clip'))

def _words(d): # A vocabulary of Shapes captions for BERT
    from diffusion_sharpening.worlds.shapes.draw import prompts
    words = ('[PAD] [UNK] [CLS] [SEP] [MASK]'.split()
             + sorted({w for p in prompts(600) for w in p.replace(',', ' ,').split()}))
    d.mkdir(exist_ok=True); (d/'vocab.txt').write_text('\n'.join(words)); return len(words)

def _judge(d, file):
    net = import_module(pkg+'image_reward')
    size = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    cfg = dict(vision=dict(**size, patch_size=8, image_size=64), head=[32, 16, 8, 4], tokens=20,
               text=dict(**size, vocab_size=_words(d), max_position_embeddings=40))
    (d/'image_reward.json').write_text(json.dumps(cfg)); net.save_checkpoint(net.BlipJudge(cfg), d/file)

@small
def image_reward(d): _judge(d, 'ImageReward.pt'); return load('image_reward:ImageReward', str(d))
@small
def compositional(d):
    for k in 'abc': _judge(d, f'{k}.pt')
    return load('image_reward:Compositional', str(d))

@small
def hps(d):
    import open_clip
    src = weights('shapes-clip').resolve()
    cfg = json.loads((src/'open_clip_config.json').read_text())['model_cfg']
    cfg['text_cfg']['hf_tokenizer_name'] = str(src); d.mkdir(exist_ok=True)
    (d/'throughput-small.json').write_text(json.dumps(cfg))
    open_clip.add_model_config(d/'throughput-small.json')
    torch.save(dict(state_dict=open_clip.create_model(f'local-dir:{src}').state_dict()),
               d/'HPS_v2.1_compressed.pt')
    return load('human:HPS', str(d), 'throughput-small')

@small
def pickscore(d):
    from transformers import CLIPConfig, CLIPModel
    size = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    text = dict(**size, vocab_size=37, max_position_embeddings=20, eos_token_id=36, bos_token_id=35,
                pad_token_id=0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=dict(**size, image_size=64, patch_size=16),
                         projection_dim=24)).save_pretrained(d)
    for f in ('tokenizer.json', 'tokenizer_config.json'): shutil.copy(weights('shapes-clip')/f, d)
    return load('human:PickScore', str(d))

def best(f, repeat, clock): # Seconds of the fastest of several runs, after one for warming up
    f(); out = []
    for _ in range(repeat): t = clock(); f(); out.append(clock()-t)
    return max(min(out), 1e-6)

def pictures(n, name):
    from PIL import Image
    from diffusion_sharpening.worlds.shapes.draw import caption, picture
    import random
    rng = random.Random(0); texts = [caption(rng, 'spatial') for _ in range(n)]
    x = (torch.stack([picture(t, i) for i, t in enumerate(texts)])*255).round().byte()
    return x, [Image.fromarray(o.permute(1, 2, 0).numpy()) for o in x], texts

def measure(name, n, repeat):
    d = Path(tempfile.mkdtemp()); atexit.register(shutil.rmtree, d, ignore_errors=True)
    reward, (x, pils, texts) = MAKE[name](d/'w'), pictures(n, name)
    with torch.no_grad():
        one = lambda: [reward([p], [t]) for p, t in zip(pils, texts)]
        gap = (reward(x, texts) - torch.cat(one())).abs().nan_to_num().max().item()
        clock = time.perf_counter if name == 'mllm' else time.process_time
        batch, single = best(lambda: reward(x, texts), repeat, clock), best(one, repeat, clock)
    return dict(batch=round(n/batch, 1), one_by_one=round(n/single, 1), gain=round(single/batch, 2),
                max_difference=gap)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--n', type=int, default=8)
    p.add_argument('--repeat', type=int, default=2)
    p.add_argument('--only', default='', help='some rewards; nothing is written')
    a = p.parse_args(); torch.set_num_threads(1); torch.manual_seed(0)
    only = [s for s in a.only.split(',') if s]
    if bad := set(only) - set(MAKE): p.error(f"no reward {bad.pop()!r}; there are: {', '.join(MAKE)}")
    found, left_out = {}, {}
    for name in only or MAKE:
        try: found[name] = measure(name, a.n, a.repeat)
        except Exception as e:
            left_out[name] = f'{type(e).__name__}: {(str(e).splitlines() or [""])[0][:160]}'
        print(f"{name:14}{found.get(name) or left_out[name]}", flush=True)
    about = dict(pictures=a.n, size='64 x 64', unit='pictures per second of processor time')
    if not only: write('rewards-throughput', about | dict(rewards=found, left_out=left_out), ['pillow'])
    stack.close()

if __name__ == '__main__': main()
