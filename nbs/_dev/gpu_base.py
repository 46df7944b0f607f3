#!/usr/bin/env python
"""Train the autoencoder and the text-to-image model of Shapes on one GPU, by the clock, on pairs that the
processor draws meanwhile: OUT/shapes-sdxl

`python nbs/_dev/gpu_base.py --out data` makes what ships, with the judges of gpu_judges.py: the average of
the weights after a fifth of four minutes, where the model is good and not yet perfect. OUT/whole is the model
after all of it. `--device cpu --vae 20 --base 20 --batch 16 --crops 16 --workers 1` tries the script."""
import argparse, copy, multiprocessing, tempfile, time
from pathlib import Path
import torch
from gpu import Log, Optimiser, averaged, by_the_clock, half, taken, whole
from diffusion_sharpening.maths.schedules import VP
from diffusion_sharpening.worlds.shapes.base import (
    shapes_autoencoder, shapes_sdxl, to_unit, token_ids, whiten)

def draw(number, workers, folder, tokenizers, size):
    "Draw pairs until told to stop"
    from transformers import CLIPTokenizer
    from diffusion_sharpening.worlds.shapes.draw import dataset
    torch.set_num_threads(1); k = 0
    toks = [CLIPTokenizer.from_pretrained(d) for d in tokenizers]
    while not (folder/'stop').exists():
        ims, texts = dataset(size, 10_000 + number + k*workers)
        one, two = (token_ids(t, texts).numpy().astype('int16') for t in toks)
        whole(folder, f'pairs-{number}-{k}', dict(ims=ims.numpy(), one=one, two=two)); k += 1

class Pairs:
    "What was drawn, on the device; latents of the first `m` of `n`"
    def __init__(self, folder, most, device):
        made = lambda *s, d: torch.empty(most, *s, dtype=d, device=device)
        self.folder, self.most, self.n, self.m = folder, most, 0, 0
        self.count = torch.zeros((), device=device)
        self.ims, self.z = made(3, 64, 64, d=torch.uint8), made(12, 8, 8, d=torch.float16)
        self.one, self.two = made(20, d=torch.int16), made(20, d=torch.int16)

    def take(self, most):
        "Bring over what was drawn since"
        for q in taken(self.folder, 'pairs', most):
            k = min(len(q['ims']), self.most - self.n)
            for name, x in q.items(): getattr(self, name)[self.n:self.n+k] = x[:k].to(self.count.device)
            self.n += k
        return self

    @torch.no_grad()
    def encode(self, vae, chunk=2048):
        "Latents of what has none"
        kind = self.count.device.type
        while self.m < self.n:
            b = min(self.m + chunk, self.n)
            x = to_unit(self.ims[self.m:b]).contiguous(memory_format=torch.channels_last)
            with torch.autocast(kind, torch.bfloat16, enabled=kind == 'cuda'): h = vae.encoder(x)
            self.z[self.m:b] = vae.quant_conv(h.float())[:, :12].half(); self.m = b
        self.count.fill_(self.m)

    def some(self, B): return (torch.rand(B, device=self.count.device)*self.count).long()

def crops(y, size=32):
    "One crop of each picture, around a pixel drawn in proportion to its squared saturation"
    B, C, H, W = y.shape; d = y.device
    weight = ((y.amax(1) - y.amin(1)).flatten(1)**2 + 1e-4).log()
    at = (weight - (-torch.rand_like(weight).clamp(1e-9, 1-1e-7).log()).log()).argmax(1)
    jit = torch.randint(-6, 7, (2, B), device=d); r = torch.arange(size, device=d)
    ys = ((at//W + jit[0] - size//2).clamp(0, H-size)[:, None] + r)[:, None, :, None]
    xs = ((at % W + jit[1] - size//2).clamp(0, W-size)[:, None] + r)[:, None, None, :]
    b, c = torch.arange(B, device=d), torch.arange(C, device=d)
    return y[b[:, None, None, None], c[None, :, None, None], ys, xs]

def picture_loss(vae, pairs, B, whole):
    "As `autoencoder_loss`, on crops or on whole pictures"
    low = next(vae.parameters()).dtype
    def loss():
        y = to_unit(pairs.ims[pairs.some(B)]); y = y if whole else crops(y)
        y = y.contiguous(memory_format=torch.channels_last)
        mean, log_var = vae.quant_conv(vae.encoder(y.to(low))).float().chunk(2, 1)
        log_var = log_var.clamp(-30, 20); z = mean + (.5*log_var).exp()*torch.randn_like(mean)
        d = vae.decoder(vae.post_quant_conv(z.to(low))).float() - y
        kl = .5*(mean**2 + log_var.exp() - 1 - log_var).mean()
        edges = d.diff(dim=-1).abs().mean() + d.diff(dim=-2).abs().mean()
        return d.abs().mean() + 5*(d**2).mean() + edges + 1e-2*kl
    return loss

def train_vae(pairs, a, device, say):
    "The autoencoder, its latents made white"
    torch.manual_seed(0); first = shapes_autoencoder().to(device); net = half(copy.deepcopy(first), device)
    opt = Optimiser(net, 3e-3, .998); pairs.count.fill_(pairs.n)
    def more(u, k): pairs.take(16); pairs.count.fill_(pairs.n)
    by_the_clock(picture_loss(net, pairs, a.crops, False), opt, .65*a.vae, 1e-6, say, 'crops', more)
    pictures = picture_loss(net, pairs, max(1, a.crops//4), True)
    by_the_clock(pictures, opt, .35*a.vae, 1., say, 'pictures', more, 1)
    vae = averaged(first, opt); vae.register_to_config(scaling_factor=1.)
    with torch.no_grad():
        seen = [vae.encode(to_unit(x).contiguous(memory_format=torch.channels_last)).latent_dist.mean
                for x in pairs.ims[:min(16384, pairs.n)].split(512)]
        whiten(vae, torch.cat(seen))
    return vae

class Text(torch.nn.Module):
    "A CLIP text encoder, without what a graph cannot hold"
    def __init__(self, net): super().__init__(); self.net = net

    def forward(self, ids):
        "States before the last layer, and the pooled features"
        t = getattr(self.net, 'text_model', self.net); e = t.embeddings
        h = e.token_embedding(ids) + e.position_embedding(torch.arange(ids.shape[1], device=ids.device))
        for layer in t.encoder.layers: before, h = h, self._layer(layer, h)
        h = t.final_layer_norm(h); end = (ids == self.net.config.eos_token_id).int().argmax(1)
        h = h[torch.arange(len(ids), device=ids.device), end]
        return before, self.net.text_projection(h) if hasattr(self.net, 'text_projection') else h

    def _layer(self, layer, h):
        a, x = layer.self_attn, layer.layer_norm1(h); B, T, C = x.shape
        q, k, v = (p(x).view(B, T, -1, a.head_dim).transpose(1, 2) for p in (a.q_proj, a.k_proj, a.v_proj))
        o = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=a.scale)
        h = h + a.out_proj(o.transpose(1, 2).reshape(B, T, C))
        return h + layer.mlp(layer.layer_norm2(h))

class Net(torch.nn.Module):
    "As `Trainee`, fit for a graph"
    def __init__(self, pipe):
        super().__init__()
        self.unet, self.text1, self.text2 = pipe.unet, pipe.text_encoder, pipe.text_encoder_2
        self.register_buffer('sizes', torch.tensor([[64., 64, 0, 0, 64, 64]]), persistent=False)

    def forward(self, x, t, one, two, keep):
        (a, _), (b, pooled) = Text(self.text1)(one), Text(self.text2)(two)
        keep = keep.to(a.dtype); h = torch.cat([a, b], -1)*keep[:, None, None]
        added = dict(text_embeds=pooled*keep[:, None], time_ids=self.sizes.expand(len(x), 6))
        return self.unet(x, t, encoder_hidden_states=h, added_cond_kwargs=added).sample

def base_loss(net, pairs, B, device):
    "Squared error of the v-prediction, one time in each B-th of the schedule"
    low, shape = net.unet.dtype, (-1, 1, 1, 1)
    a, s = (x.float().to(device) for x in VP.scaled_linear().alpha_sigma(torch.arange(1000)))
    def loss():
        i = pairs.some(B); x0 = pairs.z[i].float(); eps = torch.randn_like(x0)
        t = ((torch.arange(B, device=device) + torch.rand(B, device=device))/B*1000).long().clamp(max=999)
        at, st = a[t].view(shape), s[t].view(shape); keep = (torch.rand(B, device=device) >= .1).float()
        v = net((at*x0 + st*eps).to(low), t, pairs.one[i].long(), pairs.two[i].long(), keep).float()
        return ((v - (at*eps - st*x0))**2).mean()
    return loss

def train_base(vae, pairs, pipe, a, device, say):
    "Averaged weights after a share `--keep` of the time, and at the end"
    net = half(Net(pipe).train(), device); opt, kept = Optimiser(net, 2e-3, .998), {}
    def more(u, k):
        pairs.take(24).encode(vae)
        if u > a.keep and not kept: kept.update({n: p.clone() for n, p in opt.ema.items()}); say(kept=k)
    loss = base_loss(net, pairs, a.batch, device)
    by_the_clock(loss, opt, a.base, .45, say, 'base', more, warm=200)
    return kept or opt.ema, opt.ema

def save(pipe, vae, weights, folder):
    "A pipeline in float32"
    net = Net(pipe).float().cpu(); net.load_state_dict({n: p.cpu() for n, p in weights.items()})
    pipe.register_modules(vae=vae.cpu()); pipe.save_pretrained(folder)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--out', required=True); p.add_argument('--device', default='cuda')
    p.add_argument('--vae', type=float, default=75, help='seconds of the autoencoder')
    p.add_argument('--base', type=float, default=240, help='seconds of U-Net and text encoders')
    p.add_argument('--keep', type=float, default=.2, help='share of them after which what ships is kept')
    p.add_argument('--batch', type=int, default=2048); p.add_argument('--crops', type=int, default=512)
    p.add_argument('--workers', type=int, default=14); p.add_argument('--size', type=int, default=512)
    p.add_argument('--most', type=int, default=2_000_000, help='pairs that are held')
    a = p.parse_args(); out, device = Path(a.out), torch.device(a.device)
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1); torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    folder = Path(tempfile.mkdtemp()); pipe = shapes_sdxl(folder/'untrained')
    tokenizers = folder/'untrained'/'tokenizer', folder/'untrained'/'tokenizer_2'
    fork = multiprocessing.get_context('spawn')
    for i in range(a.workers):
        fork.Process(target=draw, args=(i, a.workers, folder, tokenizers, a.size), daemon=True).start()
    say, pairs = Log(out/'gpu_base.jsonl'), Pairs(folder, a.most, device)
    while pairs.take(64).n < 4*a.size: time.sleep(.2)
    vae = train_vae(pairs, a, device, say); pairs.encode(vae)
    kept, last = train_base(vae, pairs, pipe, a, device, say); (folder/'stop').touch()
    say(pairs=pairs.n)
    save(pipe, vae, last, out/'whole'); save(pipe, vae, kept, out/'shapes-sdxl')

if __name__ == '__main__': main()
