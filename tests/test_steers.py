"Steers keep their contract on a diffusers network with prompts, candidates and guidance"
import pytest, torch

pytest.importorskip('diffusers')
from diffusion_sharpening.basics.seeds import START, fold, noise, stream
from diffusion_sharpening.maths.choice import argmax, pick, weights
from diffusion_sharpening.maths.rollout import check_steer
from diffusion_sharpening.maths.schedules import pad_right
from diffusion_sharpening.models.denoiser import Denoiser
from diffusion_sharpening.models.tiny import tiny_sdxl

PROMPTS = ['a red circle', 'a blue square']


@pytest.fixture(scope='module')
def net(tmp_path_factory):
    d = tmp_path_factory.mktemp('steers')
    tiny_sdxl(d/'xl', words=PROMPTS)
    return Denoiser.from_pretrained(d/'xl', guidance=2., device='cpu')


def drawn(m, n):
    "`n` next states, from the move's own seeds"
    k = torch.arange(n).view(n, *[1]*m.seeds.ndim)
    z = noise(stream(m.seeds, 'candidate', k), m.i, m.x.shape[m.seeds.ndim:])
    return m.step.mean + pad_right(m.step.std.expand(z.shape[:m.seeds.ndim + 1]), z)*z, z


def bright(x0): return x0.flatten(-3).mean(-1)


def best_branch(m):
    "Takes the best of three branches, and hands its estimates on"
    if m.i == 2: return None
    x, _ = drawn(m, 3)
    x0, eps = m.ask(x, m.s.expand(3, *m.s.shape))
    i = argmax(bright(x0))
    return x.gather(0, index(i, x))[0], (x0.gather(0, index(i, x))[0], eps.gather(0, index(i, x))[0])


def index(i, x): return pad_right(i[None], x).expand(1, *x.shape[1:])


def mixed_noise(m):
    "Mixes the noises of three branches by the values of their estimates"
    if m.i == 2: return None
    x, z = drawn(m, 3)
    w = weights(bright(m.ask(x, m.s.expand(3, *m.s.shape))[0]), .1)
    mixed = (pad_right(w, z)*z).sum(0)/w.square().sum(0).sqrt().view(*w.shape[1:], 1, 1, 1)
    return m.step.mean + pad_right(m.step.std, mixed)*mixed


def remembering():
    "Leans on the mean of the states it has seen, which it forgets at step 0"
    seen = []
    def steer(m):
        if m.i == 0: seen.clear()
        seen.append(m.x)
        return m.step.prev + .01*torch.stack(seen).mean(0)
    return steer


ONE, TWO = fold(0, torch.arange(2)), stream(fold(0, torch.arange(2)), 'candidate', torch.arange(2)[:, None])


@pytest.mark.parametrize('steer, seeds', [
    (best_branch, ONE), (mixed_noise, ONE), (remembering(), ONE), (remembering(), TWO),
    (lambda m: None, TWO)])
def test_steers(net, steer, seeds):
    x = noise(seeds, START, net.item)
    check_steer(lambda rows: steer, net, x, net.grid(3), net.encode(PROMPTS), 1., seeds)


@pytest.mark.parametrize('bad, said', [
    (lambda m: m.step.prev.mean(0, keepdim=True).expand_as(m.x), 'alone goes another way'),
    (lambda m: m.step.mean + torch.randn(m.x.shape), 'a second run'),
    (lambda m: (m.step.mean, (m.x0, m.eps)), 'other estimates'),
    (lambda m: m.x.mul_(.5), 'in place'),
    (lambda m: m.x*float('nan'), 'not finite')])
def test_faults_are_found(net, bad, said):
    seeds = fold(0, torch.arange(2))
    with pytest.raises(AssertionError, match=said):
        check_steer(lambda rows: bad, net, noise(seeds, START, net.item), net.grid(3), net.encode(PROMPTS),
                    1., seeds)
