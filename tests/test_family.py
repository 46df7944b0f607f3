"Methods that learn from finished samples: their costs, bit-exact resume, and how they are sampled"
import pytest, torch
from safetensors.torch import load_file

pytest.importorskip('diffusers')
from diffusion_sharpening.commands.sample import sample
from diffusion_sharpening.commands.train import resume
from diffusion_sharpening.evaluation.measure import start_seeds
from diffusion_sharpening.methods.graft import GRAFT
from diffusion_sharpening.models.hand_over import hand_over
from diffusion_sharpening.models.denoiser import Denoiser
from diffusion_sharpening.models.lora import lora_file
from diffusion_sharpening.training.plan import evaluations
from diffusion_sharpening.training.run import settings
import shared
from shared import PROMPTS

torch.set_num_threads(1)
FORWARD = 'nft', 'awm', 'rvm', 'ram', 'crd', 'elbo_pg'
ACCEPTING = 'graft', 'p_graft', 'gors', 'rwr'
QUICK = 'nft', 'p_graft'                           # an old copy and a count; a state on the way
each = pytest.mark.parametrize('name', [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow)
                                        for n in (*FORWARD, *ACCEPTING)])


def go(made, name, out, steps, **more):
    small = dict(n=3, S=4, noises=2, guidance=1., lr=1e-2)
    return shared.go(made, name, out, steps, **small | more)


def weights(d): return {k: v.numpy().tobytes() for k, v in load_file(d/lora_file).items()}


@each
def test_resumes_bit_for_bit(made, tmp_path, name):
    "Three batches in one go, and one batch and then two more"
    go(made, name, tmp_path/'whole', 3)
    go(made, name, tmp_path/'parts', 1)
    assert resume(name, tmp_path/'parts', steps=3)['batches'] == 3
    assert weights(tmp_path/'whole') == weights(tmp_path/'parts')


# Costs

@pytest.mark.parametrize('g', [1., 3.])
@pytest.mark.parametrize('name', FORWARD)
def test_forward_process_evaluations(name, g):
    "n·B·S·g to sample; each update n·B·K with gradient and as many of each network that is compared with"
    B, n, S, K, cost = 4, 3, 5, 2, 1 if g == 1 else 2
    run, m = settings(name, batch=B, n=n, S=S, noises=K, guidance=g)
    ask = evaluations(run, m, batches=2)
    others, rows = m.others(), n*B*K*m.updates
    assert ask['lesson'] == rows and ask['reference'] == rows*others.count('ref')
    copies = rows*(('old' in others) + ('average' in others))
    sampled = n*B*S*cost
    assert ask['rollout'] + ask['old'] == sampled + copies and ask['decode'] == n*B
    assert ask['rollout'] == (0 if m.sampler == 'old' else sampled)


@pytest.mark.parametrize('name', ['graft', 'p_graft'])
def test_graft_evaluations(name):
    "M·S·g for K kept, whoever samples; no reference, no gradient but on the accepted"
    B, M, S, K, noises = 4, 6, 8, 2, 3
    run, m = settings(name, batch=B, n=M, S=S, K=K, noises=noises, guidance=3.)
    ask = evaluations(run, m, batches=2)
    assert ask['rollout'] + ask['reference'] == M*B*S*2
    assert ask['lesson'] == K*B*noises and ask['decode'] == M*B


# One sampler

@pytest.mark.parametrize('fraction', [0., .5, 1.])
def test_sample_hands_over(made, tmp_path, fraction):
    "`sharpen sample` on the folder of a run: the policy first, then the base"
    go(made, 'p_graft', tmp_path/'run', 1, ft_fraction=fraction, lr=.1, ema=0.)
    seen = []
    with pytest.MonkeyPatch.context() as mp:
        mp.setattr('diffusion_sharpening.commands.sample.write_pictures', lambda x, *_: seen.append(x))
        sample(lora=str(tmp_path/'run'), prompts=str(made/'prompts.txt'), out=str(tmp_path/'pics'), n=2, S=6,
               guidance=1.)
    d, seeds = Denoiser.from_pretrained(made/'xl', guidance=1., device='cpu'), start_seeds(0, 2)
    base = d.sample(PROMPTS[:2], seeds, S=6)
    d.load_lora(tmp_path/'run', trainable=False)
    policy = d.sample(PROMPTS[:2], seeds, S=6)
    want = {0.: base, 1.: policy}.get(fraction, hand_over(d, fraction, 6).sample(PROMPTS[:2], seeds, S=6))
    assert not torch.equal(base, policy)
    torch.testing.assert_close(seen[0], want, atol=1e-5, rtol=0)


def test_all_steps_is_graft(made, tmp_path):
    "ft_fraction 1: the weights of GRAFT, bit for bit"
    go(made, 'graft', tmp_path/'a', 2)
    go(made, 'p_graft', tmp_path/'b', 2, ft_fraction=1.)
    assert weights(tmp_path/'a') == weights(tmp_path/'b')


def test_rules_are_presets():
    for preset in GRAFT.variants:
        _, m = settings('graft', preset, n=3)
        assert m.n == 3 and not hasattr(m, 'K')
    with pytest.raises(ValueError, match='K'): settings('graft', 'softmax', K=2)


def test_anchor_needs_pictures(made, tmp_path):
    with pytest.raises(ValueError, match='learns from image-caption pairs'):
        go(made, 'ram', tmp_path/'a', 1, anchor=.1)
