"What both trainings on a GPU share: half precision, Muon and AdamW, updates as graphs, a clock"
import json, math, os, time
from pathlib import Path
import torch
from diffusion_sharpening.models.muon import inner, orthogonal

class Optimiser:
    """Float32 weights of a network that computes in another precision, moved by Muon (arXiv 2502.16982) and
    AdamW, and their moving average; all its numbers lie on the device, so that an update can be a graph"""
    def __init__(self, net, lr, average, decay=1e-2, momentum=.95):
        self.work = dict(net.named_parameters()); device = next(net.parameters()).device
        for q in self.work.values(): q.grad = torch.zeros_like(q)
        self.top, self.decay, self.momentum, self.average = lr, decay, momentum, average
        self.lr, self.follow, self.norm = (torch.zeros((), device=device) for _ in range(3))
        self.p = {n: q.detach().float().clone() for n, q in self.work.items()}
        self.ema = {n: q.clone() for n, q in self.p.items()}
        self.m = {n: torch.zeros_like(q) for n, q in self.p.items()}
        self.muon = [n for n, q in self.p.items() if inner(n, q)]
        self.adam = [n for n in self.p if n not in set(self.muon)]
        self.v = {n: torch.zeros_like(self.p[n]) for n in self.adam}

    def set(self, share, k):
        "Learning rate as a share of the largest, and how far the average follows, for update `k`"
        self.lr.fill_(self.top*share); self.follow.fill_(1 - min(self.average, (k+1)/(k+10)))

    @torch.no_grad()
    def step(self):
        "One update from the gradients of the network, which are emptied"
        grads = {n: q.grad.float() for n, q in self.work.items()}; G = list(grads.values())
        self.norm.copy_(torch.stack(torch._foreach_norm(G)).norm())
        torch._foreach_mul_(G, 1/(self.norm + 1e-6).clamp(min=1.))
        torch._foreach_mul_(list(self.p.values()), 1 - self.lr*self.decay)
        self._adam(grads); self._muon(grads)
        for e, p in zip(self.ema.values(), self.p.values()): e.lerp_(p, self.follow)
        torch._foreach_copy_(list(self.work.values()), list(self.p.values()))
        torch._foreach_zero_([q.grad for q in self.work.values()])

    def _adam(self, grads):
        P, G, M, V = ([d[n] for n in self.adam] for d in (self.p, grads, self.m, self.v))
        torch._foreach_lerp_(M, G, .1); torch._foreach_mul_(V, .99); torch._foreach_addcmul_(V, G, G, .01)
        D = torch._foreach_sqrt(V); torch._foreach_add_(D, 1e-8); U = torch._foreach_div(M, D)
        torch._foreach_mul_(U, self.lr); torch._foreach_sub_(P, U)

    def _muon(self, grads): # Weights of one shape are made orthogonal together
        G, M = ([d[n] for n in self.muon] for d in (grads, self.m)); shapes = {}
        torch._foreach_lerp_(M, G, 1 - self.momentum); torch._foreach_lerp_(G, M, self.momentum)
        for n, g in zip(self.muon, G):
            g = g.reshape(len(g), -1); g = g if len(g) <= g.shape[1] else g.T
            shapes.setdefault(g.shape, []).append((n, g))
        for (_, b), rows in shapes.items():
            U = orthogonal(torch.stack([g for _, g in rows]))*(.2*math.sqrt(b))*self.lr
            for (n, _), u in zip(rows, U):
                p = self.p[n]; p.sub_((u if len(p) == len(u) else u.T).reshape(p.shape))

def graphed(f, device):
    "`f` as one graph of a GPU; on a processor, `f`"
    if device.type != 'cuda': return f
    side = torch.cuda.Stream(); side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3): f()
    torch.cuda.current_stream().wait_stream(side); torch.cuda.synchronize(); g = torch.cuda.CUDAGraph()
    with torch.cuda.graph(g): f()
    return g.replay

class Log:
    "Lines on the screen and in a file, with the seconds since it was opened"
    def __init__(self, path): self.file, self.began = open(path, 'a'), time.time()
    def __call__(self, **row):
        row = dict(at=round(time.time() - self.began, 1), **row); print(row, flush=True)
        self.file.write(json.dumps(row) + '\n'); self.file.flush()

def by_the_clock(f, opt, seconds, decay, say, name, beside=None, warm=100):
    """Minimise `f()` for some seconds: the rate rises over `warm` updates and falls over the last share
    `decay`; `beside(share of the time, update)` is called every second"""
    device = opt.lr.device; loss = torch.zeros((), device=device); opt.set(0., 0)
    def update(): l = f(); l.backward(); loss.lerp_(l.detach(), .03); opt.step()
    go = graphed(update, device); start = tick = last = time.time(); k = 0
    while (u := (time.time() - start)/seconds) < 1:
        opt.set(min(1., (k+1)/warm, (1-u)/decay), k); go(); k += 1
        if k % 10 == 0 and device.type == 'cuda': torch.cuda.synchronize()
        if beside and time.time() - last > 1: last = time.time(); beside(u, k)
        if time.time() - tick > 10:
            tick = time.time(); say(**{name: k}, loss=loss.item(), norm=opt.norm.item())
    say(**{name: k}, loss=loss.item(), seconds=round(time.time() - start, 1))
    return k

def half(net, device):
    "The network on a device, in the precision it is trained in there"
    return net.to(device).to(torch.bfloat16 if device.type == 'cuda' else torch.float32)

def averaged(net, opt):
    "A float32 network with the averaged weights"
    net.load_state_dict({**net.state_dict(), **opt.ema}); return net.eval()

def whole(folder, name, arrays):
    "Write arrays for the process that trains, as one file that is there or is not"
    import numpy as np
    file = Path(folder)/f'{name}.npz'; part = file.with_name(f'.{name}.part.npz')
    np.savez(part, **arrays); os.replace(part, file)

def taken(folder, kind, most=10**9):
    "What `whole` wrote, tensor by tensor; files go"
    import numpy as np
    for f in sorted(Path(folder).glob(f'{kind}-*.npz'))[:most]:
        with np.load(f) as o: yield {k: torch.from_numpy(o[k]) for k in o.files}
        f.unlink()
