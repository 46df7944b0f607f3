"What a plan says against what happens: published counts, a real training counted, and the choices it makes"
import json
from collections import Counter
from contextlib import nullcontext
from dataclasses import fields, replace
from functools import partial

import pytest, torch

diffusers = pytest.importorskip('diffusers')
from diffusion_sharpening.data.sources import Columns, Prompts
from diffusion_sharpening.evaluation.measure import evaluate
from diffusion_sharpening.methods.catalog import METHODS, find, presets as presets_of
from diffusion_sharpening.methods.protocol import noise_columns
from diffusion_sharpening.maths.rollout import Meter
from diffusion_sharpening.models import policies
from diffusion_sharpening.models.denoiser import Denoiser
from diffusion_sharpening.models.tiny import tiny_sd, tiny_sdxl
from diffusion_sharpening.models.counting import KNOWN, anatomy, measured, unet_cost, vae_cost
from diffusion_sharpening.worlds.world import model_path
from diffusion_sharpening.training.loop import prepare, train
from diffusion_sharpening.training.run import Run, settings
from diffusion_sharpening.basics.devices import DEVICES, device_here, device_of, mfu
from diffusion_sharpening.training.advice import advice, fitting
from diffusion_sharpening.training.plan import (
    BRIEF, ROWS, Plan, evaluations, plan, plan_rows, plan_table, units_of)
from shared import Bright

torch.set_num_threads(1)
diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()
PROMPTS = ['a red circle', 'a blue square']
small = dict(batch=2, rank=2, n=2, S=4, ema=0.)
names = [(k, p) for k in ('sft', 'rlhf', *METHODS) for p in presets_of(k)]


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    tmp = tmp_path_factory.mktemp('models')
    tiny_sdxl(tmp/'xl', words=PROMPTS)
    tiny_sd(tmp/'sd', words=PROMPTS)
    return tmp


def values(rows): return {r['name']: r['value'] for r in rows}


def small_for(name, preset, **more):
    "Small settings, those that the method has"
    have = {f.name for f in (*fields(Run), *fields(find(name, preset)()))}
    return {k: v for k, v in (small | dict(m=2, K=2) | more).items() if k in have}


def metered(d):
    "Counts every evaluation of the network, with gradient and without, and every decode"
    seen, forward, decode = Counter(), d.policies.forward, d.autoencoder.decode
    def network(x, *args, **kw):
        seen['lesson' if torch.is_grad_enabled() else 'plain'] += len(x)
        return forward(x, *args, **kw)
    def pictures(z, *args, **kw):
        seen['decode'] += len(z)
        return decode(z, *args, **kw)
    d.policies.forward, d.autoencoder.decode = network, pictures
    return seen


def total_flops(do):
    "Of what runs within the counter that `do` is given; attention in its plain form, which is counted"
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH): do(counter)
    return counter.get_total_flops()


def counted(folder, name, preset, within=None, **changes):
    "One batch of a real training, perhaps within a counter: evaluations by kind, decodes; a meter agrees"
    run, method = settings(name, preset, **changes)
    d = Denoiser.from_pretrained(folder, guidance=1., device='cpu')
    prepare(d, run, method)
    source = Columns(d, PROMPTS, noise_columns(method, d.item, 2), 2, run.seed)
    batch, seen, meter = source.batch(0), metered(d), Meter(d)
    with within or nullcontext():
        with torch.no_grad(): lesson = method.collect(meter, Bright(), batch)
        for u in range(method.updates): method.loss(meter, Bright(), lesson, u)[0].mean().backward()
    assert meter.nfe == seen['lesson'] + seen['plain']
    return seen


# how many are accepted by chance hangs on the rewards
fixed = [o for o in names if o not in (('graft', 'chance'), ('graft', 'classical'))]


@pytest.mark.parametrize('name, preset', fixed)
def test_evaluations_are_those_of_a_training(folders, name, preset):
    "Every method, on a real model: what is planned is what is counted, exactly"
    changes = small_for(name, preset)
    seen = counted(folders/'xl', name, preset, **changes)
    ask = evaluations(*settings(name, preset, **changes), batches=1)
    assert ask['lesson'] == seen['lesson']
    assert ask['rollout'] + ask['old'] + ask['reference'] == seen['plain']
    assert ask['decode'] + ask['decode with gradient'] == seen['decode']


@pytest.mark.parametrize('layout', ['xl', 'sd'])
@pytest.mark.parametrize('name, preset', [('sft', 'paper'), ('rlhf', 'contrast'), ('rlhf', 'paper'),
                                          ('sft', 'sample')])
def test_flops_are_those_of_a_training(folders, layout, name, preset, monkeypatch):
    "LoRA of rollouts and lessons is in them, and not in those of the reference; narrow layers are kept apart"
    monkeypatch.setattr(policies, '_narrow', lambda *_: False)
    changes = small_for(name, preset, layers='linear', rank=8, guidance=1., early=0., late=.5)
    tflop = total_flops(lambda counter: counted(folders/layout, name, preset, counter, **changes))/1e12
    planned = values(plan(str(folders/layout), name, preset, **changes))
    assert planned['tflop'] == pytest.approx(tflop, rel=.01)
    assert planned['F'] > units_of(str(folders/layout), None, Run(rank=8))[0]['reference'].tflop


@pytest.mark.parametrize('name, preset', [('sft', 'paper'), ('rlhf', 'contrast')])
def test_a_plan_of_narrow_layers_is_no_less_than_they_take(folders, name, preset):
    "Adapters that are multiplied into the weight take a little less than a plan says"
    changes = small_for(name, preset, layers='linear', rank=8, guidance=1., early=0., late=.5)
    tflop = total_flops(lambda counter: counted(folders/'sd', name, preset, counter, **changes))/1e12
    assert tflop < values(plan(str(folders/'sd'), name, preset, **changes))['tflop'] < 1.03*tflop


def test_the_evaluation_is_priced(folders):
    d = Denoiser.from_pretrained(folders/'xl', guidance=3., device='cpu')
    e = evaluate(d, PROMPTS, dict(bright=Bright()), S=3)
    rows = values(plan(str(folders/'xl'), 'rlhf', heldout=2, S_eval=3))
    assert rows['evaluation'] == 2*e.nfe*len(PROMPTS)
    free = values(plan(str(folders/'xl'), 'rlhf'))
    assert free['evaluation'] == free['evaluation_tflop'] == 0 and free['hours'] < rows['hours']


def test_an_update_is_made_in_chunks_that_fit(folders):
    "A device that holds only some of an update gets a chunk, and the training uses it"
    run, method = settings('rlhf', 'contrast', **small_for('rlhf', 'contrast', batch=2, n=4))
    units, sizes = units_of(str(folders/'xl'), None, run)
    args = 'x', run, method, units, sizes
    big = values(plan_rows(*args, device_of('cpu')))
    assert big['micro'] == 0 and big['fits']
    lean = big['memory_weights'] + big['memory_learning'] + 3*units['lesson'].peak
    little = values(plan_rows(*args, replace(device_of('cpu'), memory=1.21*lean)))
    assert 0 < little['micro'] < big['lesson'] and little['memory_graph'] < big['memory_graph']
    chosen = values(plan_rows('x', replace(run, micro=1), *args[2:], device_of('cpu')))
    assert chosen['micro'] == 1


def test_training_takes_the_chunk_of_the_plan(folders, monkeypatch):
    from diffusion_sharpening.training import plan as module
    monkeypatch.setattr(module, 'chunk_that_fits', lambda *a: 1)
    d = Denoiser.from_pretrained(folders/'xl', guidance=1., device='cpu')
    run, method = settings('rlhf', 'contrast', **small_for('rlhf', 'contrast', steps=1))
    s = train(d, method, Bright(), Prompts(d, PROMPTS, 2), run, [Plan('x')])
    assert s.run.micro == 1 and s.k == 1 and s.skipped == 0


@pytest.mark.slow
def test_advice():
    "What fits needs none; what does not gets settings that do, as they are typed"
    def asked(device, **more): return partial(plan, 'sdxl', 'rlhf', 'paper', device, 512, **more)
    run = settings('rlhf', 'paper')
    small = asked('h200', precision='bfloat16', batch=1)
    assert fitting(small, *run) == {} and advice(small, *run) == ''
    found = fitting(asked('4090'), *run)
    assert found['precision'] == 'bfloat16' and values(asked('4090')(**found))['fits']
    typed = advice(asked('4090'), *run).partition('--set ')[2].split()
    from diffusion_sharpening.commands.options import parse_settings
    assert parse_settings(typed) == found


@pytest.mark.parametrize('name', DEVICES)
def test_every_device_has_a_plan(name):
    rows = values(plan('shapes', 'sft', device=name))
    assert rows['fits'] and ('hours' in rows) == (name != 'mps')


def test_guidance_doubles_evaluations():
    one, two = [evaluations(*settings('rlhf', 'sde', guidance=g)) for g in (1., 4.)]
    assert (all(two[k] == 2*one[k] for k in ('rollout', 'reference', 'lesson'))
            and one['decode'] == two['decode'])


def test_flops_are_quadratic_in_the_number_of_latents():
    "Convolutions and layers are linear in it, attention quadratic, text constant: three sizes give all"
    L = lambda px: (px/8)**2
    F = {px: unet_cost(model_path('shapes'), px, dtype='float32')[0].tflop for px in (64, 128, 192, 320)}
    A = torch.tensor([[1, L(px), L(px)**2] for px in (64, 128, 192)], dtype=torch.float64)
    c = torch.linalg.solve(A, torch.tensor([F[64], F[128], F[192]], dtype=torch.float64))
    assert float(c @ torch.tensor([1, L(320), L(320)**2],
                                  dtype=torch.float64)) == pytest.approx(F[320], rel=1e-6)


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
    # the last: PyTorch's own count with attention as matrices
    (1024, 0, False, 20.1), (1024, 16, False, 14.19)])
def test_sdxl_backward(px, rank, checkpointing, total):
    c, _, learn = unet_cost('sdxl', px, rank, 'attention', checkpointing)
    assert c.total == pytest.approx(total, rel=.02)
    if rank: assert learn == pytest.approx(23.2e6, rel=.01)


@pytest.mark.slow
def test_checkpointing_trades_memory_for_work():
    kept, again = unet_cost('sdxl', 512, 16, 'attention'), unet_cost('sdxl', 512, 16, 'attention', True)
    assert (again[0].held < .1*kept[0].held and again[0].peak < .6*kept[0].peak
            and again[0].total > 1.2*kept[0].total)


@pytest.mark.slow
def test_decode_in_the_graph_is_what_costs_memory():
    "What released code keeps per picture for a reward that carries no gradient"
    kept, free = [vae_cost('sdxl', 512, grad=g, dtype='float32')[0] for g in (True, False)]
    assert kept.held == pytest.approx(5.61, rel=.05) and kept.held > 2*free.peak


@pytest.mark.slow
def test_algorithm_1_on_sdxl():
    "n = m = 3, every weight, one prompt: 9 F, 9 decodes, 3 lessons of 2.97 F"
    rows = plan('sdxl', 'sft', 'paper', px=512, device='h200', batch=1, guidance=1., rank=0, late=.8)
    assert values(rows)['tflop'] == pytest.approx(9*1.589 + 9*2.515 + 3*4.714, rel=.02)


def test_the_plan_of_a_loaded_model(folders):
    "What `train` prints is counted on the model itself, and says what `plan` says of its folder"
    d = Denoiser.from_pretrained(folders/'xl', guidance=1., device='cpu')
    d.encode(PROMPTS)
    run, method = settings('rlhf', 'paper', **small)
    prepare(d, run, method)
    units, sizes = measured(d)
    now = values(plan_rows('', run, method, units, sizes, device_here(d.device)))
    then = values(plan(str(folders/'xl'), 'rlhf', 'paper', guidance=1., **small))
    for k in 'rollout reference lesson forwards decode parameters learning'.split():
        assert now[k] == pytest.approx(then[k])
    for k in 'V tflop memory_weights memory_learning memory_graph'.split():
        assert now[k] == pytest.approx(then[k], rel=.15)
    shared = values(plan_rows('', run, method, units, sizes, device_here(d.device), world=2))
    assert (shared['images_per_second'] == pytest.approx(2*now['images_per_second'])
            and shared['memory_graph'] == pytest.approx(now['memory_graph']/2))
    resumed = values(plan_rows('', run, method, units, sizes, device_here(d.device), seconds=2.))
    assert resumed['images_per_second'] == run.batch*method.n/2


def test_measured_time_gives_utilisation():
    got = values(plan('shapes', 'rlhf', 'paper', batch_seconds=3., batch=4, n=2, steps=1200))
    assert got['mfu'] == pytest.approx(mfu(got['tflop'], 3., 'cpu')) and got['hours'] == pytest.approx(1.)
    assert got['images_per_second'] == pytest.approx(8/3)
    guess = values(plan('shapes', 'rlhf', 'paper', share=.25))
    assert guess['mfu'] == .25 and mfu(guess['tflop'], guess['seconds'], 'cpu') == pytest.approx(.25)


def test_memory_grows_with_what_learns():
    lora, full, many = [values(plan('shapes', 'rlhf', **kw)) for kw in (dict(), dict(rank=0), dict(batch=80))]
    assert (full['memory_learning'] > 4*lora['memory_learning']
            and many['memory_graph'] == pytest.approx(10*lora['memory_graph']))
    assert lora['fits'] and lora['memory'] < 4 and full['learning'] == pytest.approx(full['parameters'])


def test_rows_are_documented_and_printable():
    rows = plan('shapes', 'rlhf')
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
    (dict(model='sdxl-turbo'), 'expected sdxl, sd15, an embedded model'),
    (dict(device='h20'), "Did you mean 'h200'"),
    (dict(px=100), 'multiple of 8'), (dict(px=-8), 'multiple of 8'), (dict(method='ppo'), 'method'),
    (dict(n=0), 'at least 2'), (dict(batch_seconds=0.), 'positive'), (dict(precision='int8'), 'precision'),
    (dict(colour=1), 'setting of rlhf')])
def test_wrong_requests(kw, message):
    with pytest.raises(ValueError, match=message) as e: plan(**dict(model='shapes', method='rlhf') | kw)
    assert '\n' not in str(e.value)


def test_a_folder_that_is_no_pipeline(tmp_path):
    with pytest.raises(ValueError, match='unet/config.json'): plan(str(tmp_path))


def test_the_command_line(capsys):
    "As the README types it, and without a model"
    from diffusion_sharpening.commands import cli
    for args in (['--model', 'sdxl', '--px', '512', '--device', 'h200'], []):
        assert cli.run(['plan', 'rlhf', *args]) == 0
        assert 'fits' in capsys.readouterr().out


def test_plan_and_train_take_the_same_options():
    "But for where results go; a plan may also be of another machine"
    from diffusion_sharpening.commands import cli
    train, planned = ({a.name: a for a in cli.ARGUMENTS[c]} for c in ('train', 'plan'))
    assert train.keys() - planned.keys() == {'out', 'tracker', 'resume'}
    assert planned.keys() - train.keys() == {'device', 'world', 'batch_seconds', 'share'}
    for k in train.keys() & planned.keys(): assert train[k] == planned[k], k
    assert cli.COMMANDS['train'].settings and cli.COMMANDS['plan'].settings
    assert {'checkpointing', 'micro', 'batch', 'precision'} <= {f.name for f in fields(Run)}


@pytest.fixture(scope='module')
def cheap(tmp_path_factory):
    "Folder of a small autoencoder; random weights decode to nearly one grey, so the last layer is made loud"
    d = tmp_path_factory.mktemp('cheap')/'taesd'
    vae = diffusers.AutoencoderTiny(encoder_block_out_channels=(8,)*4, decoder_block_out_channels=(8,)*4,
                                    num_encoder_blocks=(1,)*4, num_decoder_blocks=(1,)*4)
    with torch.no_grad(): vae.decoder.layers[-1].weight.mul_(30)
    vae.save_pretrained(d)
    return d


def test_train_prints_lines_of_the_plan(folders, cheap, tmp_path, capsys):
    "With every option that changes what a run costs, and not the lines of the run without them"
    from diffusion_sharpening.commands import cli
    options = ['--model', folders/'xl', '--px', 128, '--guidance', 2, '--vae', cheap, '--heldout', 2,
               '--S-eval', 1, '--reward', 'clip@shapes', '--steps', 1, '--set', 'n=2', 'S=2', 'batch=2',
               'rank=2', 'checkpointing=true', 'micro=1', 'guidance=1']
    options = [str(o) for o in options]
    def lines(*argv):
        assert cli.run([*argv]) == 0
        return [' '.join(l.split()) for l in capsys.readouterr().out.strip().splitlines()]
    table = lines('plan', 'rlhf', *options)
    said = lines('train', 'rlhf', *options, '--out', str(tmp_path/'run'))
    assert said[0] == table[0] and 'guidance 1, float32' in said[0]
    assert [l for l in table if l in said[1:]] == said[1:7] and len(table) > 30
    assert [l.split()[0] for l in said[1:7]] == [*BRIEF]
    assert said[7] == f"weights, log and report go to {tmp_path/'run'}; sharpen plan prints the whole plan"
    made = json.loads((tmp_path/'run/report.json').read_text())['settings']
    assert made['run']['checkpointing'] and made['method']['guidance'] == 1
    other = lines('plan', 'rlhf', *[o for o in options if o != 'checkpointing=true'])
    assert not {*said[1:7]} <= {*other}


def test_a_run_that_does_not_fit_says_what_would(folders, tmp_path, capsys, monkeypatch):
    "And the settings it names do fit; nothing is written"
    from diffusion_sharpening.commands import cli, job, train as command
    rows = values(plan(str(folders/'xl'), 'rlhf', 'paper', batch=8, n=8, S=4, micro=1, heldout=2, S_eval=1))
    least = sum(rows[f'memory_{k}'] for k in ('weights', 'learning', 'graph'))        # of one row
    less = replace(device_here(), memory=1.1*least)
    for module in (job, command): monkeypatch.setattr(module, 'device_here', lambda *a: less)
    args = ['train', 'rlhf', '--preset', 'paper', '--model', str(folders/'xl'), '--reward', 'clip@shapes',
            '--heldout', '2', '--S-eval', '1', '--steps', '1', '--out', str(tmp_path/'run'), '--set',
            'batch=8', 'n=8', 'S=4']
    with pytest.raises(SystemExit) as e, monkeypatch.context() as no_decode:
        no_decode.setattr(Denoiser, 'show', lambda *a, **kw: 1/0)          # the plan comes first
        cli.main(args)
    assert e.value.code == 2 and not (tmp_path/'run').exists()
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith('sharpen: plan: ') and 'it would fit with --set ' in line
    more = line.split('--set ')[1].split()
    asked = [a for a in args if a not in ('--out', str(tmp_path/'run'))]
    assert cli.run(['plan', *asked[1:]]) == 0 and line.split('; ')[1] in capsys.readouterr().out
    with pytest.raises(SystemExit) as e: cli.main([*args, *more])
    assert e.value.code == 0, capsys.readouterr().err


GUIDED = 'ddpo', 'd3po', 'draft', 'step_preference'         # methods whose lessons are guided too

@pytest.mark.parametrize('name', ['contrast', 'rlhf_sharpening', *GUIDED])
def test_a_row_of_a_lesson_is_counted_whole(folders, name):
    "With `micro=1` no call with gradient is larger than what the plan counts as one row, and one is as large"
    changes = small_for(name, 'default', guidance=3., rank=2)
    run, method = settings(name, 'default', **changes)
    d = Denoiser.from_pretrained(folders/'xl', guidance=3., device='cpu')
    forward, sizes = d.policies.forward, []
    def network(x, *args, **kw):
        if torch.is_grad_enabled(): sizes.append(len(x))
        return forward(x, *args, **kw)
    prepare(d, run, method)
    d.policies.forward = network
    source = Columns(d, PROMPTS, noise_columns(method, d.item, 2), 2, run.seed)
    with torch.no_grad(): lesson = method.collect(d, Bright(), source.batch(0))
    method.loss(d, Bright(), lesson.parts(1)[0], 0)
    assert sum(sizes) <= evaluations(run, method, 3.)['width'] <= sum(sizes)*(2 if name == 'draft' else 1)


def test_a_decode_with_gradient_is_in_the_graph():
    "A method that follows the reward's gradient keeps the graph of the decoder too"
    got = [values(plan('sdxl', 'draft', device='h200', px=512, batch=1, guidance=1., precision=p, S=4))
           for p in ('bfloat16', 'float32')]
    held = vae_cost('sdxl', 512, grad=True)[0].held
    assert got[0]['memory_graph'] > held and got[1]['memory_graph'] > 1.8*held


def test_rollouts_and_decodes_in_chunks_give_the_same(folders, tmp_path):
    "A device that holds a part of a rollout step: the plan says how many, and the pictures are the same"
    run, method = settings('rlhf', 'contrast', **small_for('rlhf', 'contrast', n=4, steps=1))
    lean, rewards = device_here(), []
    for chunks in ((0, 8), (3, 1)):
        d = Denoiser.from_pretrained(folders/'xl', guidance=3., device='cpu')
        d.rollout_chunk, d.decode_chunk = chunks
        seen, forward = [], d.policies.forward
        def network(x, *args, forward=forward, seen=seen, **kw):
            if not torch.is_grad_enabled(): seen.append(len(x))
            return forward(x, *args, **kw)
        prepare(d, run, method)
        d.policies.forward = network
        with torch.no_grad(): lesson = method.collect(d, Bright(), Prompts(d, PROMPTS, 2).batch(0))
        assert max(seen) == (3 if chunks[0] else 16)
        rewards.append(lesson.pictures)
    assert torch.allclose(*rewards, atol=1e-4)
    units, sizes = units_of(str(folders/'xl'), None, run)
    args = 'x', run, method, units, sizes
    big = values(plan_rows(*args, lean))
    assert (big['rollout_chunk'], big['decode_chunk']) == (0, 8)
    room = big['memory_weights'] + big['memory_learning'] + 3.5*units['rollout'].peak
    small = values(plan_rows(*args, replace(lean, memory=1.2*room)))
    assert small['rollout_chunk'] == 3 and small['memory_rollout'] < big['memory_rollout']


WIDE = {('rlhf', 'released'), ('rlhf', 'sde'), ('rlhf_sharpening', 'released'),
        ('step_preference', 'default'), ('draft', 'alignprop')}
TOO_WIDE = {'80gb': WIDE, '24gb': WIDE | {
    ('rlhf', 'paper'), ('sft', 'released'), ('sft_sharpening', 'released'), ('rlhf_sharpening', 'default'),
    ('rlhf_sharpening', 'paper'), ('d3po', 'default'), ('d3po', 'human'), ('refl', 'default'),
    ('draft', 'default'), ('crd', 'default')}}

@pytest.mark.parametrize('size, devices', [('24gb', ('4090', 'l4')), ('80gb', ('a100', 'h100'))])
@pytest.mark.parametrize('some', ['few', pytest.param('all', marks=pytest.mark.slow)])
def test_sizes_of_cards(size, devices, some):
    "SDXL at 1024 px learns with `--config 24gb` and `80gb`, by the plan, unless one row is too wide"
    from diffusion_sharpening.commands.options import read_config
    few = [('sft', 'paper'), ('rlhf', 'default'), ('rlhf', 'paper')]
    for name, preset in names if some == 'all' else few:
        asked = partial(plan, 'sdxl', name, preset, devices[0], heldout=24, **read_config(size))
        got = values(asked())
        if got['fits']: assert 1.2*got['memory'] < device_of(devices[1]).memory
        one_row = got['micro'] == got['width'] and (name, preset) in TOO_WIDE[size]
        assert got['fits'] or one_row, (name, preset)


def test_recomputed_activations_give_the_same_gradient(folders):
    grads = []
    for again in (False, True):
        d = Denoiser.from_pretrained(folders/'xl', guidance=1., device='cpu')
        run, method = settings('sft', 'plain', rank=2, checkpointing=again, ema=0.)
        prepare(d, run, method)
        with torch.no_grad():
            for p in d.trainable(): p += .01
        x = torch.randn(2, *d.item, generator=torch.Generator().manual_seed(0))
        loss = d.denoising_loss(x, d.encode(PROMPTS), torch.tensor([1, 2])).sum()
        grads.append(torch.autograd.grad(loss, d.trainable()))
    for a, b in zip(*grads): assert torch.allclose(a, b, atol=1e-7)
    assert any(g.abs().max() > 0 for g in grads[0])


def test_the_evaluation_is_made_in_chunks_that_fit():
    few = [values(plan('sdxl', 'rlhf', device=k, batch=1, n=4, precision='bfloat16', heldout=24))
           for k in ('l4', 'h200')]
    assert few[0]['evaluation_chunk'] < few[1]['evaluation_chunk'] == 24
    assert all(v['memory_evaluation'] + v['memory_weights'] < v['memory'] + 1e-6 for v in few)
