"What a plan says against what happens: published counts, a real training counted, and the choices it makes"
import json
from collections import Counter

import pytest, torch

diffusers = pytest.importorskip('diffusers')
from diffusion_sharpening.methods.catalog import METHODS, method
from diffusion_sharpening.methods.sharpening import select_first
from diffusion_sharpening.models.denoiser import Denoiser
from diffusion_sharpening.rewards.protocol import Reward
from diffusion_sharpening.models.tiny import tiny_sd, tiny_sdxl
from diffusion_sharpening.models.counting import KNOWN, anatomy, unet_cost, vae_cost
from diffusion_sharpening.training.loop import ATTENTION, LINEAR, batch_of
from diffusion_sharpening.training.run import settings
from diffusion_sharpening.training.plan import (
    ROWS, device_here, evaluations, measured, mfu, plan, plan_rows, plan_table)
from diffusion_sharpening.basics.seeds import START, noise

torch.set_num_threads(1)
diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()
PROMPTS = ['a red circle', 'a blue square']
small = dict(batch=2, rank=2, n=2, S=4, ema=0.)
presets = pytest.mark.parametrize('name, preset', [(k, p) for k, m in METHODS.items() for p in m.presets])


class Bright(Reward):
    name = 'bright'
    def score(self, images, prompts): return 100*images.mean((1, 2, 3))


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    tmp = tmp_path_factory.mktemp('models')
    tiny_sdxl(tmp/'xl', words=PROMPTS)
    tiny_sd(tmp/'sd', words=PROMPTS)
    return tmp


def values(rows): return {r['name']: r['value'] for r in rows}


def trained(folder, name, preset, **changes):
    "One batch of a real training: network evaluations by kind, decodes, TFLOP"
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    run, cfg = settings(name, preset, **changes)
    d, m, seen = Denoiser.from_pretrained(folder, guidance=1., device='cpu'), method(name), Counter()
    d.add_lora(run.rank, targets=ATTENTION if run.layers == 'attention' else LINEAR)
    m.setup(cfg, d)
    forward, decode = d.policies.forward, d.pipe.vae.decode
    def network(x, *a, **k): seen['lesson' if torch.is_grad_enabled() else 'plain'] += len(x); return forward(x, *a, **k)
    def pictures(z, *a, **k): seen['decode'] += len(z); return decode(z, *a, **k)
    d.policies.forward, d.pipe.vae.decode = network, pictures
    images = noise(torch.arange(2), START, d.item) if cfg.needs_images else None
    b = batch_of(d, PROMPTS, run, 0, images)
    with FlopCounterMode(display=False) as flops, sdpa_kernel(SDPBackend.MATH):
        lesson = m.collect(cfg, d, Bright(), b)
        for u in range(getattr(cfg, 'updates', 1)): m.loss(cfg, d, lesson, u)[0].backward()
    return seen, flops.get_total_flops()/1e12


@presets
def test_evaluations_are_those_of_a_training(folders, name, preset):
    changes = small | dict(m=2) if preset != 'plain' else small | dict(n=1, m=1)
    seen, _ = trained(folders/'xl', name, preset, **changes)
    ask = evaluations(name, *settings(name, preset, **changes), batches=1)
    assert ask['lesson'] == seen['lesson']
    assert ask['rollout'] + ask['reference'] == seen['plain']
    assert ask['decode'] == seen['decode']


@pytest.mark.parametrize('layout', ['xl', 'sd'])
@pytest.mark.parametrize('name, preset, more', [('sft', 'paper', {}), ('rlhf', 'contrast', {}), ('rlhf', 'paper', {}), ('rlhf', 'paper', dict(select='select'))])
def test_flops_are_those_of_a_training(folders, layout, name, preset, more):
    changes = small | dict(m=2, layers='attention', guidance=1., early=0., late=.5) | more
    _, tflop = trained(folders/layout, name, preset, **changes)
    planned = values(plan(str(folders/layout), name, preset, **changes))
    assert planned['tflop'] == pytest.approx(tflop, rel=.02)


def test_guidance_doubles_evaluations():
    one, two = [evaluations('rlhf', *settings('rlhf', 'sde', guidance=g)) for g in (1., 4.)]
    assert all(two[k] == 2*one[k] for k in ('rollout', 'reference', 'lesson')) and one['decode'] == two['decode']


def test_flops_are_quadratic_in_the_number_of_latents():
    "Convolutions and layers are linear in it, attention quadratic, text constant: three sizes give every other"
    L = lambda px: (px/8)**2
    F = {px: unet_cost('shapes', px, dtype='float32')[0].tflop for px in (64, 128, 192, 320)}
    A = torch.tensor([[1, L(px), L(px)**2] for px in (64, 128, 192)], dtype=torch.float64)
    c = torch.linalg.solve(A, torch.tensor([F[64], F[128], F[192]], dtype=torch.float64))
    assert float(c @ torch.tensor([1, L(320), L(320)**2], dtype=torch.float64)) == pytest.approx(F[320], rel=1e-6)


# Published counts (2 operations per multiply-add)

def test_sd15():
    F, size, _ = unet_cost('sd15')
    assert size == 859_520_964 and F.tflop == pytest.approx(.803, rel=.02)


def test_sdxl_at_512():
    F, size, _ = unet_cost('sdxl', 512)
    V, _ = vae_cost('sdxl', 512)
    assert size == 2_567_463_684
    assert F.tflop == pytest.approx(1.589, rel=.02) and V.tflop == pytest.approx(2.515, rel=.02)


@pytest.mark.slow
@pytest.mark.parametrize('px, F, V, E', [(512, 1.589, 2.515, 1.117), (1024, 6.761, 10.47, 4.879)])
def test_sdxl_forward(px, F, V, E):
    assert unet_cost('sdxl', px)[0].tflop == pytest.approx(F, rel=.02)
    assert vae_cost('sdxl', px)[0].tflop == pytest.approx(V, rel=.02)
    assert vae_cost('sdxl', px, 'encode')[0].tflop == pytest.approx(E, rel=.02)


@pytest.mark.slow
@pytest.mark.parametrize('px, rank, checkpointing, total', [
    (512, 0, False, 4.714), (512, 0, True, 5.915), (512, 16, False, 3.166), (512, 16, True, 4.352),
    (1024, 0, False, 20.1), (1024, 16, False, 14.19)])           # the last: PyTorch's own count with attention as matrices
def test_sdxl_backward(px, rank, checkpointing, total):
    c, _, learn = unet_cost('sdxl', px, rank, 'attention', checkpointing)
    assert c.total == pytest.approx(total, rel=.02)
    if rank: assert learn == pytest.approx(23.2e6, rel=.01)


@pytest.mark.slow
def test_checkpointing_trades_memory_for_work():
    kept, again = unet_cost('sdxl', 512, 16, 'attention'), unet_cost('sdxl', 512, 16, 'attention', True)
    assert again[0].held < .1*kept[0].held and again[0].peak < .6*kept[0].peak and again[0].total > 1.2*kept[0].total


@pytest.mark.slow
def test_decode_in_the_graph_is_what_costs_memory():
    "What released code keeps per picture for a reward that carries no gradient"
    kept, free = [vae_cost('sdxl', 512, grad=g, dtype='float32')[0] for g in (True, False)]
    assert kept.held == pytest.approx(5.61, rel=.05) and kept.held > 2*free.peak


@pytest.mark.slow
def test_algorithm_1_on_sdxl():
    "n = m = 3, every weight, one prompt: 9 F, 9 decodes, 3 lessons of 2.97 F; and with the graph kept, 9 lessons"
    def total(select): return values(plan('sdxl', 'sft', 'paper', px=512, device='h200', batch=1, guidance=1., rank=0, late=.8, select=select))['tflop']
    assert total('select') == pytest.approx(9*1.589 + 9*2.515 + 3*4.714, rel=.02)
    assert total('keep') == pytest.approx(9*2.515 + 9*4.714, rel=.02)
    assert total('auto') == total('select')


# Choices

@pytest.mark.parametrize('n, p, B, select', [(3, 1, 2.97, True), (3, 1, 1.99, True), (3, 2, 3.97, True), (2, 2, 2.99, False),
                                             (4, 2, 2.97, True), (5, 2, 1.99, True), (1, 1, 2.97, False)])
def test_select_first(n, p, B, select): assert select_first(n, p, B) is select


def test_selection_is_chosen_and_can_be_chosen():
    auto = {n: values(plan('shapes', 'rlhf', 'paper', n=n))['selection'] for n in (2, 3, 16)}
    assert auto == {2: 'keep', 3: 'select', 16: 'select'}
    two = [values(plan('shapes', 'rlhf', 'paper', n=2, select=s)) for s in ('select', 'keep')]
    assert two[1]['tflop'] < two[0]['tflop'] and two[1]['memory_graph'] == pytest.approx(two[0]['memory_graph'])   # free speed
    forced = [values(plan('shapes', 'rlhf', 'paper', n=16, select=s)) for s in ('select', 'keep')]
    assert [f['selection'] for f in forced] == ['select', 'keep'] and forced[0]['tflop'] < forced[1]['tflop']
    assert forced[1]['memory_graph'] == pytest.approx(8*forced[0]['memory_graph'])                  # 16 paths, not 2
    for kw in (dict(preset='contrast'), dict(preset='paper', guidance=4.), dict(preset='released')):       # nothing to keep
        assert values(plan('shapes', 'rlhf', n=2, **kw))['selection'] == 'select'
        with pytest.raises(ValueError, match="select 'keep': expected lessons"): plan('shapes', 'rlhf', n=2, select='keep', **kw)


def test_the_plan_of_a_loaded_model(folders):
    "What `train` prints is counted on the model itself, and says what `plan` says of its folder"
    d = Denoiser.from_pretrained(folders/'xl', guidance=1., device='cpu')
    d.encode(PROMPTS); d.add_lora(2, targets=LINEAR)
    run, cfg = settings('rlhf', 'paper', **small)
    units, sizes = measured(d)
    now = values(plan_rows('', 'rlhf', run, cfg, units, sizes, device_here(d)))
    then = values(plan(str(folders/'xl'), 'rlhf', 'paper', guidance=1., **small))
    for k in ('rollout', 'reference', 'lesson', 'forwards', 'decode', 'parameters', 'learning'): assert now[k] == pytest.approx(then[k])
    for k in ('V', 'tflop', 'memory_weights', 'memory_learning', 'memory_graph'): assert now[k] == pytest.approx(then[k], rel=.15)
    shared = values(plan_rows('', 'rlhf', run, cfg, units, sizes, device_here(d), world=2))
    assert shared['images_per_second'] == pytest.approx(2*now['images_per_second']) and shared['memory_graph'] == pytest.approx(now['memory_graph']/2)
    resumed = values(plan_rows('', 'rlhf', run, cfg, units, sizes, device_here(d), seconds=2.))
    assert resumed['images_per_second'] == run.batch*cfg.n/2


def test_measured_time_gives_utilisation():
    got = values(plan('shapes', 'rlhf', 'paper', seconds=3., batch=4, n=2, steps=1200))
    assert got['mfu'] == pytest.approx(mfu(got['tflop'], 3., 'cpu')) and got['hours'] == pytest.approx(1.)
    assert got['images_per_second'] == pytest.approx(8/3)
    guess = values(plan('shapes', 'rlhf', 'paper', share=.25))
    assert guess['mfu'] == .25 and mfu(guess['tflop'], guess['seconds'], 'cpu') == pytest.approx(.25)


def test_memory_grows_with_what_learns():
    lora, full, many = [values(plan('shapes', 'rlhf', **kw)) for kw in (dict(), dict(rank=0), dict(batch=80))]
    assert full['memory_learning'] > 4*lora['memory_learning'] and many['memory_graph'] == pytest.approx(10*lora['memory_graph'])
    assert lora['fits'] and lora['memory'] < 4 and full['learning'] == pytest.approx(full['parameters'])


def test_rows_are_documented_and_printable():
    rows = plan('shapes')
    assert [r['name'] for r in rows[1:]] == list(ROWS) and all(r['about'] for r in rows[1:])
    json.dumps(rows, allow_nan=False)
    assert len(plan_table(rows).splitlines()) == len(rows)


def test_names_and_folders(folders):
    assert anatomy('stabilityai/stable-diffusion-xl-base-1.0') is KNOWN['sdxl']
    assert anatomy(str(folders/'xl')).tokens == 16 and not anatomy(str(folders/'sd')).xl
    own = Denoiser.from_pretrained(folders/'xl', device='cpu')
    assert unet_cost(str(folders/'xl'))[1] == sum(p.numel() for p in own.policies.net.parameters())
    assert vae_cost(str(folders/'xl'))[1] == sum(p.numel() for p in own.pipe.vae.parameters())


@pytest.mark.parametrize('kw, message', [
    (dict(model='sdxl-turbo'), 'expected sdxl, sd15, shapes'), (dict(device='h100'), "Did you mean 'h200'"),
    (dict(px=100), 'multiple of 8'), (dict(px=-8), 'multiple of 8'), (dict(method='ppo'), 'method'),
    (dict(n=0), 'at least 1'), (dict(seconds=0.), 'positive'), (dict(precision='int8'), 'precision'), (dict(select='never'), 'select'), (dict(colour=1), 'setting of rlhf')])
def test_wrong_requests(kw, message):
    with pytest.raises(ValueError, match=message) as e: plan(**dict(model='shapes', method='rlhf') | kw)
    assert '\n' not in str(e.value)


def test_a_folder_that_is_no_pipeline(tmp_path):
    with pytest.raises(ValueError, match='unet/config.json'): plan(str(tmp_path))
