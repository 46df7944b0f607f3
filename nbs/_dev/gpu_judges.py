#!/usr/bin/env python
"""Train the CLIP of Shapes and the preference model on it on one GPU, by the clock, on near misses and
choices that the processor draws, and on pictures that the model of gpu_base.py makes: OUT/shapes-clip and
OUT/shapes-preference

`python nbs/_dev/gpu_judges.py --out data` follows `gpu_base.py --out data`.
`--device cpu --rows 32 --batch 8 --clip 10 --preference 10 --size 16 --workers 1` tries the script."""
import argparse, copy, json, multiprocessing, random, tempfile, time
from pathlib import Path
import torch, torch.nn.functional as F
from gpu import Log, Optimiser, averaged, by_the_clock, half, taken, whole
from gpu_base import Net
from diffusion_sharpening.maths.schedules import VP
from diffusion_sharpening.rewards.clip import Tower
from diffusion_sharpening.rewards.preference import new_scorer, save_preference, wilson
from diffusion_sharpening.worlds.shapes.base import to_unit, token_ids
from diffusion_sharpening.worlds.shapes.clip import STATS, new_clip

KINDS = 'flaws', 'flaws', 'flaws', 'choice' # What the processes draw in turn

def flaws_rows(size, seed, ids, toks):
    "Pairs, the picture of a near miss of each caption, and four captions that are wrong"
    from diffusion_sharpening.worlds.shapes.draw import dataset
    from diffusion_sharpening.worlds.shapes.flaws import missed, near_pictures
    ims, texts = dataset(size, seed); near, words = near_pictures(texts, seed)
    rng = random.Random(f'gpu-{seed}')
    wrong = torch.stack([ids([missed(w, rng) for w in texts]) for _ in range(4)], 1)
    one, two = (token_ids(t, texts) for t in toks)
    return dict(ims=ims, near=near, own=ids(texts), near_ids=ids(words), wrong=wrong, one=one, two=two)

def choice_rows(size, seed, ids, toks):
    "Choices between two pictures"
    from diffusion_sharpening.worlds.shapes.choices import shapes_choices
    texts, better, worse = zip(*shapes_choices(size, seed)[0])
    return dict(better=torch.stack(better), worse=torch.stack(worse), own=ids(list(texts)))

def draw(number, workers, folder, model, size):
    "Draw until told to stop"
    import open_clip
    from transformers import CLIPTokenizer
    torch.set_num_threads(1); k, rows = 0, dict(flaws=flaws_rows, choice=choice_rows)
    toks = [CLIPTokenizer.from_pretrained(f'{model}/{n}') for n in ('tokenizer', 'tokenizer_2')]
    ids = open_clip.get_tokenizer(f'local-dir:{folder}/clip')
    while not (folder/'stop').exists():
        kind, seed = KINDS[(number + k) % len(KINDS)], 500_000 + number + k*workers
        found = rows[kind](size, seed, ids, toks); bytes8 = torch.uint8
        arrays = {n: (x if x.dtype == bytes8 else x.short()).numpy() for n, x in found.items()}
        whole(folder, f'{kind}-{number}-{k}', arrays); k += 1

def gather(folder, rows, device):
    "Rows of both kinds, when there are enough"
    found = {k: [] for k in KINDS}; n = lambda k: sum(len(q['own']) for q in found[k])
    while n('flaws') < rows or n('choice') < rows//4:
        for k in found: found[k] += [{m: x.to(device) for m, x in q.items()} for q in taken(folder, k)]
        time.sleep(.5)
    (folder/'stop').touch()
    return ({m: torch.cat([q[m] for q in rows]) for m in rows[0]} for rows in found.values())

class Maker:
    "The trained model: pictures through its autoencoder, and made from noise"
    def __init__(self, pipe, device):
        self.vae, self.net = pipe.vae.to(device).eval(), half(Net(pipe).eval(), device)
        self.device = device
        self.a, self.s = (x.float().to(device) for x in VP.scaled_linear().alpha_sigma(torch.arange(1000)))
        self.chunk = 512 if device.type == 'cuda' else 16

    @torch.no_grad()
    def show(self, z):
        bytes8 = lambda y: ((y.clamp(-1, 1) + 1)*127.5).round().to(torch.uint8)
        return torch.cat([bytes8(self.vae.decode(c).sample) for c in z.split(self.chunk)])

    @torch.no_grad()
    def code(self, ims):
        return torch.cat([self.vae.encode(to_unit(c)).latent_dist.mean for c in ims.split(self.chunk)])

    def through(self, ims): return self.show(self.code(ims))

    @torch.no_grad()
    def remade(self, z, one, two, rng):
        "Pictures of latents after noise and steps back, from a start drawn for each chunk; the starts"
        made, starts = [], []; grid = torch.linspace(999, 0, 11).long().tolist()
        for z, one, two in zip(*(x.split(4*self.chunk) for x in (z, one.long(), two.long()))):
            j, eta = max(0, rng.randint(-3, 5)), float(rng.random() < .6); eps = torch.randn_like(z)
            x = eps if j == 0 else self.a[grid[j]]*z + self.s[grid[j]]*eps
            for t, r in zip(grid[j:-1], grid[j+1:]): x = self._step(x, t, r, one, two, eta)
            made.append(self.show(x)); starts.append(torch.full((len(z),), j, device=self.device))
        return torch.cat(made), torch.cat(starts)

    def _step(self, x, t, r, one, two, eta): # DDIM; after the last time nothing is left of the noise
        a, s = self.a[t], self.s[t]; A, S = (self.a[r], self.s[r]) if r else (a*0 + 1, s*0)
        keep, times = torch.ones(len(x), device=x.device), torch.full((len(x),), t, device=x.device)
        v = self.net(x.to(self.net.unet.dtype), times, one, two, keep).float()
        x0, eps = a*x - s*v, s*x + a*v; sd = eta*S/s*(1 - (a/A)**2).clamp(min=0).sqrt()
        return A*x0 + (S**2 - sd**2).clamp(min=0).sqrt()*eps + sd*torch.randn_like(x)

def noisy(x): return x + .04*torch.randn_like(x)

def either(a, b, share=.35):
    "`a` in a share of the rows, else `b`"
    return torch.where((torch.rand(len(a), device=a.device) < share)[:, None, None, None], a, b)

def first(scores): return F.cross_entropy(scores, torch.zeros_like(scores[:, 0]).long(), reduction='none')

class Flaws:
    "Rows of near misses; the first of a random order are held out"
    def __init__(self, rows, held=.05):
        n = len(rows['own']); order = torch.randperm(n, generator=torch.Generator().manual_seed(1))
        self.rows, k = rows, max(2, min(int(held*n), 1024)); order = order.to(rows['own'].device)
        self.held, self.learnt = order[:k], order[k:]

    def batch(self, B):
        "Rows, and drawn pictures and those of near misses, some of them through the autoencoder"
        i = self.learnt[(torch.rand(B, device=self.learnt.device)*len(self.learnt)).long()]
        q = {k: x[i] for k, x in self.rows.items()}
        q |= {k: q[k].long() for k in ('own', 'near_ids', 'wrong')}
        return q, either(q['ims'], q['seen']), either(q['near'], q['near_seen'])

    @torch.no_grad()
    def accuracy(self, score):
        "Of a judge, on the rows that are held out"
        q = {k: x[self.held] for k, x in self.rows.items()}; own, near = q['own'].long(), q['near_ids'].long()
        best = score(q['seen'], own); share = lambda other: (best > other).float().mean().item()
        return dict(over_near_picture=share(score(q['near_seen'], own)),
                    over_made=share(score(q['made'], own)), over_near_caption=share(score(q['seen'], near)))

def clip_loss(net, flaws, B):
    "As `flaws_loss`"
    def loss():
        q, x, x_ = flaws.batch(B); low = net.visual.conv1.weight.dtype
        unit = lambda v: F.normalize(v.float(), dim=-1)
        see = lambda *ims: unit(net.encode_image(noisy(to_unit(torch.cat(ims))).to(low)))
        read = lambda *ids: unit(net.encode_text(torch.cat(ids))).split(B)
        x, x_, made = see(x, x_, q['made']).chunk(3)
        c, c_, *wrong = read(q['own'], q['near_ids'], *q['wrong'].unbind(1))
        scale = net.logit_scale.float().clamp(max=4.6).exp(); s = lambda x, c: scale*(x*c).sum(-1)
        over = lambda x: first(torch.stack([s(x, o) for o in (c, *wrong)], 1))
        kept = (q['start'] >= 3).float()
        order = F.softplus(s(x_, c) - s(x, c)) + F.softplus(s(x, c_) - s(x_, c_))
        made = F.softplus(s(made, c) - s(x, c)).mean() + (over(made)*kept).sum()/kept.sum().clamp(min=1)
        both = torch.cat([q['own'], q['near_ids']])
        ways = both_ways(scale*torch.cat([x, x_])@torch.cat([c, c_]).T, both)
        return ways + over(x).mean() + .5*order.mean() + made
    return loss

def both_ways(logits, ids):
    "Cross-entropy in both directions; equal captions do not count against each other"
    own = torch.arange(len(ids), device=ids.device)
    same = (ids[:, None] == ids[None]).all(-1) & (own[:, None] != own[None])
    l = logits.masked_fill(same, -1e4)
    return .5*F.cross_entropy(l, own) + .5*F.cross_entropy(l.T, own)

def preference_loss(net, flaws, choices, held, B):
    "Bradley-Terry over near misses, pictures the model made, wrong captions, and made-up choices"
    def loss():
        q, x, x_ = flaws.batch(B); n, d = len(choices['own']), x.device
        h = held + (torch.rand(B, device=d)*(n - held)).long(); own = choices['own'][h].long()
        ims = [x, x_, q['made'], choices['better'][h], choices['worse'][h]]
        x, x_, made, better, worse = noisy(to_unit(torch.cat(ims))).chunk(5)
        c, c_, wrong = q['own'], q['near_ids'], q['wrong'][:, 0]
        pairs = [(x, c), (x_, c), (x, c_), (x_, c_), (made, c), (better, own), (worse, own), (x, wrong),
                 (made, wrong)]
        low = net.clip.visual.conv1.weight.dtype; ims, ids = (torch.cat(o) for o in zip(*pairs))
        s = net(ims.to(low), ids).float().chunk(9); sp = F.softplus
        near = sp(s[1] - s[0]) + sp(s[2] - s[3]) + .5*sp(s[7] - s[0])
        return (near + .5*sp(s[4] - s[0]) + sp(s[6] - s[5]) + sp(s[8] - s[4])*(q['start'] >= 3)).mean()
    return loss

def lowered(net, device):
    "As `half`, with the masks of attention, which are no parameters"
    net = half(net, device)
    for m in net.modules():
        if isinstance(getattr(m, 'attn_mask', None), torch.Tensor):
            m.attn_mask = m.attn_mask.to(next(net.parameters()))
    return net

def chunked(f, n=256):
    return lambda x, ids: torch.cat([f(to_unit(a), b) for a, b in zip(x.split(n), ids.split(n))])

def train_clip(net, flaws, a, device, say):
    opt = Optimiser(work := lowered(copy.deepcopy(net).train(), device), 2e-3, .997)
    by_the_clock(clip_loss(work, flaws, a.batch), opt, a.clip, .6, say, 'clip')
    net = averaged(net.to(device), opt); unit = lambda v: F.normalize(v, dim=-1)
    cosine = chunked(lambda x, ids: (unit(net.encode_image(x))*unit(net.encode_text(ids))).sum(-1))
    say(clip=flaws.accuracy(cosine))
    return net.cpu()

def train_preference(tower, flaws, choices, a, device, say):
    torch.manual_seed(1); net = new_scorer(tower).requires_grad_(True)
    held = max(4, len(choices['own'])//20)
    opt = Optimiser(work := lowered(copy.deepcopy(net).train(), device), 1e-3, .997)
    loss = preference_loss(work, flaws, choices, held, a.batch)
    steps = by_the_clock(loss, opt, a.preference, .6, say, 'preference')
    score = chunked(averaged(net.to(device), opt)); say(preference=flaws.accuracy(torch.no_grad()(score)))
    part = lambda side, i: score(choices[side][i], choices['own'][i].long())
    with torch.no_grad():
        won = (part('better', slice(held)) > part('worse', slice(held))).float().sum().item()
        r = torch.cat([part(side, slice(held, held+256)) for side in ('better', 'worse')])
    n = len(choices['own']) - held
    note = dict(head={}, mean=r.mean().item(), std=r.std().item(), clip='shapes', pairs=n, steps=steps,
                lr=1e-3, flaws=len(flaws.learnt), batch=a.batch, fixed=0., seed=1, held_out=wilson(won, held))
    return net.cpu(), note

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--out', required=True, help='has shapes-sdxl, gets the judges')
    p.add_argument('--device', default='cuda'); p.add_argument('--rows', type=int, default=27_000)
    p.add_argument('--clip', type=float, default=95, help='seconds')
    p.add_argument('--preference', type=float, default=50, help='seconds')
    p.add_argument('--batch', type=int, default=256)
    p.add_argument('--workers', type=int, default=14); p.add_argument('--size', type=int, default=128)
    a = p.parse_args(); out, device, folder = Path(a.out), torch.device(a.device), Path(tempfile.mkdtemp())
    import open_clip
    from diffusers import StableDiffusionXLPipeline
    from safetensors.torch import save_file
    torch.set_num_threads(1); torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    net, fork = new_clip(folder/'clip'), multiprocessing.get_context('spawn')
    for i in range(a.workers):
        fork.Process(target=draw, args=(i, a.workers, folder, out/'shapes-sdxl', a.size), daemon=True).start()
    say = Log(out/'gpu_judges.jsonl')
    maker = Maker(StableDiffusionXLPipeline.from_pretrained(out/'shapes-sdxl'), device)
    rows, choices = gather(folder, a.rows, device); z = maker.code(rows['ims'])
    rows |= dict(seen=maker.show(z), near_seen=maker.through(rows['near']))
    rows['made'], rows['start'] = maker.remade(z, rows['one'], rows['two'], random.Random(0))
    for side in ('better', 'worse'): choices[side][::3] = maker.through(choices[side][::3])
    flaws = Flaws(rows); say(flaws=len(rows['own']), choices=len(choices['own']))
    home, made = out/'shapes-clip', train_clip(net, flaws, a, device, say).state_dict()
    clip = new_clip(home); clip.load_state_dict(made)
    save_file({k: x.contiguous() for k, x in made.items()}, home/'open_clip_model.safetensors')
    tower = Tower(clip, open_clip.get_tokenizer(f'local-dir:{home.resolve()}'), STATS)
    judge, note = train_preference(tower, flaws, choices, a, device, say)
    save_preference(out/'shapes-preference', judge, tower, home, note)

if __name__ == '__main__': main()
