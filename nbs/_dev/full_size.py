#!/usr/bin/env python
"""What a training of full-size SDXL with random weights takes, beside what `sharpen plan` says: milliseconds
per stage, peak memory, share of the peak of the processor.

`python nbs/_dev/full_size.py` on a GPU writes data/results/full_size.json; `--tiny` tries it on a CPU."""
import argparse, contextlib, io, tempfile, time
from pathlib import Path
import torch
from results import write
from diffusion_sharpening.data.sources import Prompts
from diffusion_sharpening.models.counting import Anatomy, KNOWN
from diffusion_sharpening.models.denoiser import Denoiser
from diffusion_sharpening.models.tiny import make_tokenizer
from diffusion_sharpening.rewards.protocol import Reward
from diffusion_sharpening.training.callbacks import Timer
from diffusion_sharpening.training.loop import train
from diffusion_sharpening.training.plan import Plan, units_of
from diffusion_sharpening.training.run import settings

TINY = Anatomy(KNOWN['sdxl'].unet | dict(
    sample_size=8, block_out_channels=(32, 32, 64), attention_head_dim=(2, 2, 4), cross_attention_dim=48,
    transformer_layers_per_block=1, addition_time_embed_dim=8, projection_class_embeddings_input_dim=80),
    KNOWN['sdxl'].vae | dict(block_out_channels=(32,)*4, layers_per_block=1), ((16, 2, 0, 0), (32, 2, 0, 32)))

ARMS = dict(lora=('rlhf', dict(rank=32)), full=('graft', dict(rank=0, checkpointing=True)))

class Bright(Reward):
    "The mean of the picture: any judge would do"
    name = 'bright'
    def score(self, images, prompts): return images.flatten(1).mean(1).float()

def text(tok, width, layers, project):
    "A CLIP text encoder with random weights"
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
    cfg = CLIPTextConfig(vocab_size=49408, hidden_size=width, intermediate_size=4*width,
        projection_dim=project or width, num_hidden_layers=layers, num_attention_heads=max(1, width//64),
        max_position_embeddings=tok.model_max_length, bos_token_id=tok.bos_token_id,
        eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id)
    return (CLIPTextModelWithProjection if project else CLIPTextModel)(cfg)

def pipeline(a, device, dtype):
    "A pipeline of SDXL's sizes, made on the device"
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    tok = make_tokenizer(tempfile.mkdtemp(), max_length=a.tokens)
    before = torch.get_default_dtype(); torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            unet, vae = UNet2DConditionModel.from_config(a.unet), AutoencoderKL.from_config(a.vae)
            one, two = (text(tok, w, n, p) for w, n, _, p in a.text)
    finally: torch.set_default_dtype(before)
    scheduler = DDIMScheduler(beta_start=.00085, beta_end=.012, beta_schedule='scaled_linear',
                              clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    return StableDiffusionXLPipeline(vae=vae, text_encoder=one, text_encoder_2=two, tokenizer=tok,
                                     tokenizer_2=tok, unet=unet, scheduler=scheduler).to(device)

def measure(arm, a, o):
    "One short training"
    method, changes = ARMS[arm]
    changes = dict(batch=o.batch, n=o.n, S=o.S, precision=o.precision) | changes
    run, m = settings(method, 'default', steps=o.steps, **changes)
    began = time.time()
    model = Denoiser(pipeline(a, o.device, getattr(torch, o.precision)), guidance=1.)
    built, said = time.time() - began, io.StringIO()
    plan = Plan(f'{method} of SDXL', units=units_of('sdxl', 1024, run) if not o.tiny else None, show=False)
    cuda = o.device == 'cuda'
    if cuda: torch.cuda.reset_peak_memory_stats()
    callbacks = [Timer()] if o.tiny else [plan, Timer()]
    source = Prompts(model, [f'prompt {i}' for i in range(8)], run.batch)
    s = train(model, m, Bright(), source, run, callbacks)
    took = torch.cuda.max_memory_allocated()/2**30 if cuda else None
    rows = getattr(plan, 'rows', [])
    planned = {r['name']: r['value'] for r in rows}
    found = dict(arm=arm, method=method, settings=changes, built_s=built, px=model.size[1], peak_gib=took,
                 planned=planned, batches=s.history)
    print(arm, dict(peak=took, planned=planned.get('memory')), s.history[-1], flush=True)
    return found

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('arms', nargs='*', default=list(ARMS))
    p.add_argument('--device', default='cuda'); p.add_argument('--precision', default='bfloat16')
    p.add_argument('--batch', type=int, default=2); p.add_argument('--n', type=int, default=4)
    p.add_argument('--S', type=int, default=4); p.add_argument('--steps', type=int, default=3)
    p.add_argument('--tiny', action='store_true'); p.add_argument('--out', default='data/results')
    o = p.parse_args(); a, rows = TINY if o.tiny else KNOWN['sdxl'], []
    for arm in o.arms:
        try: rows.append(measure(arm, a, o))
        except torch.cuda.OutOfMemoryError as e: rows.append(dict(arm=arm, error=f'{e}'[:300]))
        if o.device == 'cuda': torch.cuda.empty_cache()
    gpu = torch.cuda.get_device_name() if o.device == 'cuda' else None
    write('full_size', dict(gpu=gpu, rows=rows), into=Path(o.out))

if __name__ == '__main__': main()
