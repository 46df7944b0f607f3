"Policy gradients, preferences and rewards with gradients: exact numbers, costs, resume, the command line"
import json, math
from dataclasses import fields

import pytest, torch
from safetensors.torch import load_file

diffusers = pytest.importorskip('diffusers')
from diffusion_sharpening.basics.seeds import START, fold, noise
from diffusion_sharpening.commands import cli, train as command
from diffusion_sharpening.commands.load import load_model, quiet
from diffusion_sharpening.data.sources import Batch, Columns
from diffusion_sharpening.maths.choice import advantages, standardise
from diffusion_sharpening.maths.losses import policy_gradient, preference, refl, step_log_ratio
from diffusion_sharpening.maths.samplers import flow_sde_coefs, log_prob, move, step
from diffusion_sharpening.maths.schedules import VP, Flow
from diffusion_sharpening.methods.catalog import METHODS, find, presets
from diffusion_sharpening.methods.ddpo import DDPO, DDPOScore
from diffusion_sharpening.methods.steps import trained_steps
from diffusion_sharpening.methods.protocol import check_method, noise_columns
from diffusion_sharpening.methods.reward_gradient import ReFL
from diffusion_sharpening.models.denoiser import Denoiser
from diffusion_sharpening.models.lora import lora_file
from diffusion_sharpening.models.tiny import tiny_sd, tiny_sdxl
from diffusion_sharpening.models.toy import Gaussian
from diffusion_sharpening.training.loop import prepare, train
from diffusion_sharpening.commands.lists import asks
from diffusion_sharpening.training.plan import evaluations
from diffusion_sharpening.training.resume import Checkpoint, Resume
from diffusion_sharpening.training.run import Run, settings
from shared import Bright

torch.set_num_threads(1)
quiet()
PROMPTS = ['a red circle', 'a blue square', 'a green star']
OURS = [('ddpo', 'default'), ('ddpo', 'score'), ('flow_grpo', 'default'), ('flow_grpo', 'cps'),
        ('flow_grpo', 'precise'), ('diffusion_dpo', 'default'), ('d3po', 'default'), ('d3po', 'human'),
        ('spo', 'default'), ('refl', 'default'), ('draft', 'default'), ('draft', 'alignprop')]


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    tmp = tmp_path_factory.mktemp('models')
    tiny_sdxl(tmp/'xl', words=PROMPTS)
    tiny_sd(tmp/'flow', words=PROMPTS, scheduler='FlowMatchEulerDiscreteScheduler', prediction='epsilon')
    return tmp


def source_of(d, method, run):
    return Columns(d, PROMPTS, noise_columns(method, d.item, 3), run.batch, run.seed)


def little(name, preset, **more):
    "Small settings, those that the method has"
    have = type(find(name, preset)()).__dataclass_fields__
    return {k: v for k, v in dict(n=2, S=4, K=2, least=2).items() if k in have} | more


# Exact numbers

@pytest.mark.parametrize('A, ratio, loss', [
    (2., 1.00005, -2.0001), (2., 1.0005, -2.0002), (2., .9995, -1.9990), (-2., 1.0005, 2.0010),
    (-2., .9995, 1.9998)])
def test_clipped_policy_gradient(A, ratio, loss):
    logp, A = torch.tensor(ratio, dtype=torch.float64).log(), torch.tensor(A).double()
    got = policy_gradient(logp, 0*logp, A)
    assert got.item() == pytest.approx(loss, abs=2e-7)


def test_advantages():
    R = torch.tensor([[1.], [2.], [4.]])
    assert standardise(R)[:, 0].tolist() == pytest.approx([-1.06904, -.26726, 1.33631], abs=1e-5)
    assert advantages(R, True)[:, 0].tolist() == pytest.approx([-1.06896, -.26724, 1.33620], abs=1e-5)


def test_worked_examples():
    "Diffusion-DPO's pair, D3PO's bounds, ReFL's three rewards, the density of a step"
    assert preference(torch.tensor(.35)).item() == pytest.approx(.533382, abs=1e-6)
    cut = [step_log_ratio(torch.tensor(s*9.), torch.tensor(0.), .1).item() for s in (1, -1)]
    bounds = [preference(torch.tensor(.1*s*(cut[0] - cut[1]))).item() for s in (1, -1)]
    assert bounds == pytest.approx([.683164, .703231], abs=1e-6)
    assert refl(torch.tensor([.5, 2.5, -1.])).sum().item() == pytest.approx(.0045)
    mean, std = torch.zeros(1, 2, 3), torch.tensor([.2876854])
    assert log_prob(mean + .3, mean, std).item() == pytest.approx(-.2167727, abs=1e-6)
    assert log_prob(mean + .3, mean, std, 'sum').item() == pytest.approx(-.2167727*6, abs=1e-5)


def test_flow_step_without_noise_is_euler():
    x, x0, eps = torch.randn(3, 4, 2, 2, 2)
    t, s = torch.tensor(.7), torch.tensor(.6)
    x = (1 - t)*x0 + t*eps
    got = move(x, x0, eps, flow_sde_coefs(Flow(), t, s, 0.)).prev
    torch.testing.assert_close(got, x + (s - t)*(eps - x0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got, step(Flow(), x, x0, eps, t, s).prev)


@pytest.mark.parametrize('name, preset', [o for o in OURS if o[0] in ('diffusion_dpo', 'd3po', 'spo')])
def test_preferences_begin_at_log_2(folders, name, preset):
    d = Denoiser.from_pretrained(folders/'xl', guidance=1., device='cpu')
    run, method = settings(name, preset, batch=2, rank=2, **little(name, preset))
    prepare(d, run, method)
    with torch.no_grad(): lesson = method.collect(d, Bright(), source_of(d, method, run).batch(0))
    losses, _ = method.loss(d, Bright(), lesson, 0)
    torch.testing.assert_close(losses, torch.full_like(losses, math.log(2)), atol=1e-5, rtol=0)


def test_first_gradient_is_that_of_the_policy():
    "Ratio 1, loss minus the mean advantage, and the gradient of the score-function form"
    model = Gaussian(.3, item=(3, 1, 1))
    batch = Batch(PROMPTS, model.encode(PROMPTS), fold(1, torch.arange(3)))
    grads = []
    for made in (DDPO, DDPOScore):
        m = made(n=5, S=6); lesson = m.collect(model, Bright(), batch)
        losses, log = m.loss(model, None, lesson, 0)
        assert log['ratio'].sub(1).abs().max() < 1e-4
        grads.append(torch.autograd.grad(losses.mean(), model.trainable())[0].item())
        if made is DDPO:
            assert losses.mean().item() == pytest.approx(-m.advantages(lesson).mean().item(), abs=1e-4)
    assert grads[0] == pytest.approx(grads[1], rel=1e-3)


def half(batch, i):
    "What one of two processes gets of a batch of two prompts"
    own = slice(i, i + 1)
    return Batch(batch.prompts[own], batch.cond[own], batch.seeds[own], {})


@pytest.mark.parametrize('name', ['contrast', 'nft', 'flow_grpo', 'ddpo'])
def test_rewards_are_compared_with_the_whole_batch(name):
    "Two processes with a prompt each, whose rewards are far apart, have the losses of one with both"
    class Uneven(Bright):
        def score(self, images, prompts):
            return images.mean((1, 2, 3))*torch.tensor([9.**len(p) for p in prompts])
    model, texts = Gaussian(.3, item=(3, 1, 1)), ['a', 'ab']
    method = find(name)(n=3, S=4)
    method.start(model)
    batch = Batch(texts, model.encode(texts), fold(1, torch.arange(2)), {})
    collect = lambda b: method.collect(model, Uneven(), b)
    with torch.no_grad(): whole, *parts = [collect(b) for b in (batch, half(batch, 0), half(batch, 1))]
    model.trainable()[0].data.add_(.2)                            # at first Contrast's losses ignore rewards
    want = method.loss(model, None, whole, 0)[0].view(-1, 2)
    apart = [method.loss(model, None, p, 0)[0] for p in parts]
    means = {k: (parts[0].means[k] + parts[1].means[k])/2 for k in whole.means}
    for p in parts: p.means = means
    got = torch.stack([method.loss(model, None, p, 0)[0] for p in parts], 1)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    assert means and not torch.allclose(torch.stack(apart, 1), want, rtol=.01)


@pytest.mark.parametrize('final', [None, 1.])
def test_a_last_step_without_variance_is_left_out(final):
    "Stable Diffusion ends at ᾱ_0, where the last step has a density; a schedule that ends clean has none"
    model = Gaussian(.3, VP.scaled_linear(final=final), item=(3, 1, 1))
    batch = Batch(PROMPTS, model.encode(PROMPTS), fold(1, torch.arange(3)))
    lesson = DDPO(n=2, S=6).collect(model, Bright(), batch)
    assert len(lesson) == (6 if final is None else 5)*2*3 and lesson['logp'].isfinite().all()


def test_steps_of_a_share():
    at = trained_steps(torch.ones(10, 3, 2), fold(0, torch.arange(6)).view(3, 2), .6)
    assert at.shape == (6, 3, 2) and all(len(set(o)) == 6 for o in at.flatten(1).T.tolist())


# What an update costs: evaluations per prompt, g for guidance

COSTS = dict(ddpo=lambda o, g: dict(rollout=o.n*o.S*g, lesson=o.n*o.S*g, decode=o.n),
             flow_grpo=lambda o, g: dict(rollout=o.n*o.S*g, reference=o.n*o.S*g, lesson=o.n*o.S*g,
                                         decode=o.n),
             diffusion_dpo=lambda o, g: dict(reference=2, lesson=2),
             d3po=lambda o, g: dict(rollout=2*o.S*g, reference=2*o.S*g, lesson=2*o.S*g, decode=2),
             spo=lambda o, g: dict(rollout=(o.S + (o.n - 1)*len(o.at))*g, reference=len(o.at)*g,
                                   lesson=len(o.at)*g, decode=o.n*len(o.at)),
             draft=lambda o, g: dict(rollout=(o.S - o.K)*g, lesson=o.K*g) | {'decode with gradient': 1})


@pytest.mark.parametrize('name', COSTS)
@pytest.mark.parametrize('guidance', [1., 5.])
def test_costs_are_those_of_the_literature(name, guidance):
    "Exactly, and none of any other kind"
    run, method = settings(name, batch=3, ema=0.)
    want, got = COSTS[name](method, 1 if guidance == 1 else 2), evaluations(run, method, guidance, batches=2)
    kinds = 'rollout', 'old', 'reference', 'lesson', 'decode', 'decode with gradient'
    assert {k: got[k] for k in kinds} == {k: 3*want.get(k, 0) for k in kinds}


def test_cost_of_refl_is_at_most_40():
    found = [evaluations(Run(batch=1, seed=k), ReFL(), batches=1) for k in range(20)]
    assert {o['lesson'] for o in found} == {1} and {o['rollout'] for o in found} <= set(range(30, 40))
    assert all(o['decode with gradient'] == 1 and o['decode'] == o['reference'] == 0 for o in found)


def test_recorded_choices_are_made_by_the_reference():
    got = evaluations(*settings('d3po', 'human', batch=1, S=5), batches=1)
    assert (got['rollout'], got['reference'], got['lesson'], got['decode']) == (0, 20, 10, 0)


def test_a_share_of_steps_saves_their_gradients():
    got = evaluations(*settings('ddpo', batch=1, n=2, S=10, share=.3), batches=1)
    assert (got['rollout'], got['lesson']) == (20, 6)
    assert evaluations(*settings('flow_grpo', batch=1, beta=0.), batches=1)['reference'] == 0


@pytest.mark.parametrize('name, preset, needs', [
    ('ddpo', 'default', ['reward']), ('flow_grpo', 'default', ['reward', 'reference']),
    ('diffusion_dpo', 'default', ['pairs of images', 'reference']),
    ('d3po', 'human', ['recorded choices', 'reference']),
    ('refl', 'default', ['reward', 'gradient of the reward'])])
def test_needs_follow_from_the_method(name, preset, needs):
    assert asks(find(name, preset)())[0] == needs


# In the loop

@pytest.mark.parametrize('name, preset', [o for o in OURS if o[1] in ('default', 'human')])
def test_resumes_bit_for_bit(folders, tmp_path, name, preset):
    "Killed after two of three batches and continued: the same weights, log and memory"
    def fit(steps, *callbacks):
        d = Denoiser.from_pretrained(folders/'xl', guidance=1., device='cpu')
        run, method = settings(name, preset, steps=steps, batch=2, rank=2, **little(name, preset))
        s = train(d, method, Bright(), source_of(d, method, run), run, callbacks)
        return s, {k: p.detach().clone() for k, p in d.named['policy'].items()}
    whole, weights = fit(3)
    fit(2, Checkpoint(tmp_path, {}))
    again, continued = fit(3, Resume(tmp_path, {}), Checkpoint(tmp_path, {}, resume=True))
    assert all(torch.equal(v, continued[k]) for k, v in weights.items())
    assert whole.history == again.history and whole.nfe == again.nfe
    kept = again.method.state()
    assert kept.keys() == whole.method.state().keys() and bool(kept) == (name == 'ddpo')
    assert all(torch.equal(v, kept[k]) for k, v in whole.method.state().items())


@pytest.mark.parametrize('name, preset', [o for o in OURS if o[1] != 'default'])
def test_variants_keep_their_promises(folders, name, preset):
    "Those that the catalogue's own test does not reach"
    d = Denoiser.from_pretrained(folders/'xl', guidance=1., device='cpu')
    run, method = settings(name, preset, batch=2, rank=2, **little(name, preset))
    prepare(d, run, method)
    check_method(method, d, Bright(), source_of(d, method, run).batch(0))


@pytest.mark.parametrize('name, preset', [
    ('flow_grpo', 'default'), ('flow_grpo', 'precise'), ('ddpo', 'default')])
def test_on_a_flow_pipeline(folders, name, preset):
    "A real pipeline with a flow-matching scheduler learns, and its ratio is 1 at first"
    d = Denoiser.from_pretrained(folders/'flow', guidance=1., device='cpu')
    run, method = settings(name, preset, steps=2, batch=2, rank=2, ema=0., **little(name, preset))
    s = train(d, method, Bright(), source_of(d, method, run), run)
    assert isinstance(d.schedule, Flow) and s.skipped == 0
    assert s.history[0]['ratio'] == pytest.approx(1, abs=1e-3) and s.history[0]['grad_norm'] > 0


def test_a_reward_without_gradient_is_refused(folders):
    class Blind(Bright): differentiable = False
    d = Denoiser.from_pretrained(folders/'xl', guidance=1., device='cpu')
    run, method = settings('draft', batch=2)
    with pytest.raises(ValueError, match='follows the gradient of the reward; bright lets none pass'):
        train(d, method, Blind(), source_of(d, method, run), run)
    with pytest.raises(ValueError, match='learns from better, worse, found prompts alone'):
        run, method = settings('diffusion_dpo', batch=2, rank=2)
        train(d, method, None, Columns(d, PROMPTS, {}, 2), run)


def test_gradient_of_the_reward_in_pixels(folders):
    "DRaFT through a real decoder: the slope along its own gradient, by finite differences"
    class Fine(Bright):
        def score(self, images, prompts): return 1e3*(images.double() - .5).mean((1, 2, 3))
    d = Denoiser.from_pretrained(folders/'xl', guidance=1., device='cpu')
    run, method = settings('draft', batch=2, rank=2, S=4, K=2)
    prepare(d, run, method)
    with torch.no_grad(): [p.add_(.02) for p in d.trainable()]
    with torch.no_grad(): lesson = method.collect(d, Fine(), source_of(d, method, run).batch(0))
    mean = lambda: method.loss(d, Fine(), lesson, 0)[0].mean()
    grads = torch.autograd.grad(mean(), d.trainable())
    norm, out = sum(g.square().sum() for g in grads).sqrt(), []
    for h in (.02, -.04):
        with torch.no_grad(): [p.add_(h*g/norm) for p, g in zip(d.trainable(), grads)]
        out.append(mean().item())
    assert (out[0] - out[1])/.04 == pytest.approx(norm.item(), rel=.03)


# From the command line to plain diffusers

@pytest.fixture(scope='module')
def tables(tmp_path_factory):
    "Prompts, pairs of pictures with captions, preferences and choices, as a user would have them"
    from PIL import Image
    tmp = tmp_path_factory.mktemp('tables')
    (tmp/'prompts.txt').write_text('\n'.join(PROMPTS))
    for c in ('red', 'blue', 'green'): Image.new('RGB', (64, 64), c).save(tmp/f'{c}.png')
    both = zip(PROMPTS, ('red', 'green', 'green'))
    rows = [dict(prompt=p, better=f'{c}.png', worse='blue.png') for p, c in both]
    (tmp/'pairs.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    lines = [f'{p},{i},{i + 9}' for i, p in enumerate(PROMPTS)]
    (tmp/'choices.csv').write_text('\n'.join(['prompt,better,worse', *lines]))
    lines = [f'{c}.png,{p}' for c, p in zip(('red', 'blue', 'green'), PROMPTS)]
    (tmp/'captions.csv').write_text('image,caption\n' + '\n'.join(lines))
    return tmp


def stock(folder, start, lora=None):
    "What a plain diffusers script makes of the folder"
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(folder)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    if lora: pipe.load_lora_weights(lora)
    return pipe(PROMPTS[:2], latents=start, num_inference_steps=4, guidance_scale=1., height=64, width=64,
                output_type='pt').images


EVERY = sorted({*OURS, *((k, 'default') for k in METHODS)})
FAST = {('ddpo', 'default'), ('draft', 'default'), ('diffusion_dpo', 'default'), ('d3po', 'human')}


@pytest.mark.parametrize('name, preset', [
    pytest.param(*o, marks=[] if o in FAST else pytest.mark.slow) for o in EVERY])
def test_from_the_command_line_to_plain_diffusers(folders, tables, tmp_path, name, preset):
    "`sharpen train` with two batches; its LoRA gives plain diffusers the pictures it gives us"
    images = {'better': 'pairs.jsonl', 'better_seed': 'choices.csv', 'x0': 'captions.csv'}
    want = [images[c] for c in find(name, preset)().columns if c in images]
    more = ['--images', tables/want[0]] if want else []
    small = [f'{k}={v}' for k, v in little(name, preset, batch=2, rank=2, lr=.02, ema=0).items()]
    args = ['train', name, '--preset', preset, '--model', folders/'xl', '--reward', 'clip@shapes',
            '--heldout', 0, '--prompts', tables/'prompts.txt', '--guidance', 1, '--out', tmp_path/'run',
            '--steps', 2, *more, '--set', *small]
    assert cli.run([str(a) for a in args]) == 0
    rows = [json.loads(l) for l in (tmp_path/'run'/'metrics.jsonl').read_text().splitlines()]
    assert len(rows) == 2 and rows[-1]['skipped'] == 0 and rows[-1]['loss'] is not None
    rep = json.loads((tmp_path/'run'/'report.json').read_text())
    if name == 'diffusion_dpo': assert 0 <= rep['win_rate'] <= 1
    d = Denoiser.from_pretrained(folders/'xl', guidance=1., device='cpu')
    d.load_lora(tmp_path/'run', trainable=False)
    seeds = torch.tensor([3, 4])
    start = noise(seeds, START, d.item)
    theirs, ours = stock(folders/'xl', start, tmp_path/'run'), d.sample(PROMPTS[:2], seeds, S=4)
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)
    assert any(v.abs().max() > 0 for k, v in load_file(tmp_path/'run'/lora_file).items() if 'lora_B' in k)


@pytest.mark.slow
def test_the_embedded_world_has_preferences():
    "Without a table, pairs are pictures of the caption and of another one; choices must be named"
    d = load_model('shapes')
    source = command.preference_source(d, find('diffusion_dpo')(), 'shapes', size=4)
    batch = source.batch(0)
    assert batch.data['better'].shape == (4, *d.item)
    assert not torch.equal(batch.data['better'], batch.data['worse'])
    assert not set(source.held.prompts) <= set(source.prompts) and len(source.held.batch(0)) == 64
    with pytest.raises(ValueError, match='expected a table of choices'):
        command.preference_source(d, find('d3po', 'human')(), 'shapes', size=4)


class Mean(Bright):
    "The mean of an item of numbers, as a chance where it has to be one"
    differentiable = True
    def score(self, things, prompts): return things.flatten(1).mean(1).sigmoid()


LATE = [(m, p, kw) for m in METHODS for p in presets(m) if p not in ('human', 'released')
        and m != 'guidance_distillation'           # a toy has nothing to be guided by
        for kw in ({}, dict(early=.5, late=1.)) if {*kw} <= {f.name for f in fields(find(m, p)())}]

@pytest.mark.parametrize('name,preset,late', LATE, ids=lambda o: o if isinstance(o, str) else str(bool(o)))
def test_every_method_learns_on_a_flow(name, preset, late):
    "Whose last step has no fresh noise; also from late starts, 48 of them so that one leads there"
    model, seeds = Gaussian(0., item=(3, 1, 1), schedule=Flow()), fold(3, torch.arange(48))
    x0 = noise(seeds, 5, model.item)
    batch = Batch(['a']*48, model.encode(['a']*48), seeds, dict(x0=x0, better=x0, worse=-x0))
    method, judge = find(name, preset)(**late), Mean()
    method.start(model)
    lesson = method.collect(model, judge, batch)
    losses, _ = method.loss(model, judge, lesson, 0)
    assert losses.requires_grad and losses.isfinite().all()


@pytest.mark.parametrize('name', ['sft_sharpening', 'rlhf_sharpening'])
def test_times_of_the_released_code_are_no_flow_s(name):
    model, seeds = Gaussian(0., item=(3, 1, 1), schedule=Flow()), fold(3, torch.arange(2))
    batch = Batch(['a']*2, None, seeds, dict(x0=noise(seeds, 5, model.item)))
    with pytest.raises(ValueError, match='anywhere: expected a model of whole times, found a flow'):
        find(name, 'released')().collect(model, Mean(), batch)
