"The models room on real pipelines of small size: dtypes, policies, files and errors"
import copy, re, time
from pathlib import Path

import pytest, torch
from safetensors.torch import load_file, save_file

diffusers = pytest.importorskip('diffusers')
from diffusion_sharpening.models.lora import lora_file
from diffusion_sharpening.maths.schedules import VP, Flow
from diffusion_sharpening.models import denoiser
from diffusion_sharpening.models.denoiser import Denoiser
from diffusion_sharpening.models.protocol import check_model
from diffusion_sharpening.models.toy import Gaussian, Toy, TwoModes
from diffusion_sharpening.models.tiny import make_tokenizer, tiny_sd, tiny_sdxl, tiny_vae
from diffusion_sharpening.basics.seeds import START, noise
from diffusion_sharpening.maths.rollout import rollout
from diffusion_sharpening.training.plan import StandIn

torch.set_num_threads(1)
diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()
WORDS, PROMPTS = ['a red circle', 'a blue square'], ['a red circle', 'a blue square']
layouts = pytest.mark.parametrize('layout', ['xl', 'sd'])


@pytest.fixture(scope='module')
def models(tmp_path_factory):
    "Folders of a tiny SDXL, a tiny SD 1.x and a tiny scoring autoencoder"
    tmp = tmp_path_factory.mktemp('models')
    tiny_sdxl(tmp/'xl', words=WORDS)
    tiny_sd(tmp/'sd', words=WORDS, prediction='v_prediction')
    tiny_vae(tmp/'taesd')
    return tmp


def load(models, layout='xl', **kwargs):
    return Denoiser.from_pretrained(models/layout, device='cpu', **kwargs)


def jolt(d, name='policy', scale=.1):
    "Pretend to have trained"
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in d.policies.named[name].values(): p += scale*torch.randn(p.shape, generator=g)
    return d


def batch(d, n=()):
    g = torch.Generator().manual_seed(0)
    return torch.randn(*n, 2, *d.item, generator=g), torch.tensor([900, 41]), d.encode(PROMPTS)


def stock(d, start, S=6, guidance=4., lora=None):
    "Pictures of diffusers' own pipeline, with the scheduler it ships, from the same start"
    pipe = diffusers.DiffusionPipeline.from_pretrained(d.pipe.config._name_or_path)
    pipe.set_progress_bar_config(disable=True)
    if lora: pipe.load_lora_weights(lora)
    return pipe(PROMPTS, latents=start.clone(), num_inference_steps=S, guidance_scale=guidance, height=64,
                width=64,
                output_type='pt').images


# The contract

@pytest.mark.parametrize('make', [tiny_sdxl, tiny_sd])
@pytest.mark.parametrize('prediction', ['epsilon', 'v_prediction', 'sample'])
@pytest.mark.parametrize('learning', [lambda d: d, lambda d: d.add_lora(rank=2),
                                      lambda d: d.add_full(keep_base=True)])
def test_a_denoiser_is_a_model(tmp_path, make, prediction, learning):
    make(tmp_path, words=WORDS, prediction=prediction)
    for guidance in (1., 3.):
        d = learning(Denoiser.from_pretrained(tmp_path, guidance, device='cpu'))
        check_model(d, PROMPTS, torch.rand(2, 3, 64, 64))


@pytest.mark.parametrize('kind', [TwoModes, Gaussian])
@pytest.mark.parametrize('item', [(1,), (3, 2), (4, 8, 8)])
@pytest.mark.parametrize('schedule', [VP.scaled_linear(), Flow()])
def test_a_toy_is_a_model(kind, item, schedule):
    check_model(kind(schedule=schedule, item=item), PROMPTS, torch.randn(2, *item), 0.)


def test_the_stand_in_that_counts_is_a_model():
    for guidance in (1., 3.): check_model(StandIn(guidance), PROMPTS)


BREAKS = dict(
    dtype=('float32', lambda d, x, t, c: tuple(o.double() for o in Toy.predict(d, x, t, c))),
    mixed=('do not make up x_t', lambda d, x, t, c: Toy.predict(d, x, t, c)[::-1]),
    company=('together and alone', lambda d, x, t, c: Toy.predict(d, x, t, c) if x.ndim < 3 else
             tuple(o.roll(1, 0) for o in Toy.predict(d, x, t, c))))


@pytest.mark.parametrize('message, predict', BREAKS.values(), ids=BREAKS)
def test_a_model_that_breaks_the_contract_is_found(message, predict):
    d = type('Odd', (TwoModes,), dict(predict=lambda self, x, t, c=None: predict(self, x, t, c)))()
    with pytest.raises(AssertionError, match=message): check_model(d, PROMPTS)


# Sampling

@layouts
@pytest.mark.parametrize('guidance', [1., 4.])
def test_sample_equals_pipeline(models, layout, guidance):
    d, seeds = load(models, layout, guidance=guidance), torch.tensor([3, 4])
    torch.testing.assert_close(d.sample(PROMPTS, seeds, S=6),
                               stock(d, noise(seeds, START, d.item), 6, guidance),
                               atol=1e-4, rtol=0)


def test_parts_equal_whole(models):
    d, seeds = load(models), [5, 6, 7]
    prompts = [*PROMPTS, 'a red circle']
    whole = d.sample(prompts, seeds, S=4, eta=1., show=False)
    alone = torch.cat([d.sample(p, [s], S=4, eta=1., show=False) for p, s in zip(prompts, seeds)])
    torch.testing.assert_close(whole, alone, atol=1e-4, rtol=1e-4)


def test_candidates_are_flattened(models):
    d = load(models, guidance=3.)
    x_t, t, c = batch(d, (3,))
    with torch.no_grad():
        x0, eps = d.predict(x_t, t, c)
        for i in range(3): torch.testing.assert_close(d.predict(x_t[i], t, c)[0], x0[i], atol=1e-4, rtol=1e-4)
        times = torch.tensor([[900, 41], [500, 300], [1, 999]])
        mixed = d.predict(x_t, times, c)[1]
        torch.testing.assert_close(mixed[1], d.predict(x_t[1], times[1], c)[1], atol=1e-4, rtol=1e-4)
    assert x0.shape == eps.shape == x_t.shape


def test_memo_is_not_stale(models):
    d = load(models)
    x_t, t, c = batch(d)
    other = d.encode(PROMPTS[::-1])
    with torch.no_grad():
        a, b = d.predict(x_t, t, c)[0], d.predict(x_t, t, other)[0]
        assert not torch.allclose(a, b)
        assert torch.equal(a, d.predict(x_t, t, c)[0])
        d.guidance = 1.
        assert not torch.allclose(a, d.predict(x_t, t, c)[0])
        d.guidance, d.negative = 5., 'a blue square'
        assert not torch.allclose(a, d.predict(x_t, t, c)[0])


def test_prompt_features_do_not_depend_on_company(models):
    a, b = load(models), load(models)
    together = a.encode([*PROMPTS, 'something long and quite different'])
    for i, p in enumerate(PROMPTS):
        one = b.encode(p)
        for k, v in one.items(): assert torch.equal(v[0], together[k][i])


def test_prompt_features_are_bounded(models):
    "What was not used for longest goes; results equal those of an unbounded cache"
    d, free = load(models), load(models)
    words = [f'{a} {b}' for a in ('red', 'blue', 'a', 'the') for b in ('circle', 'square')]
    one = free.encode(words[0])
    size = sum(v[0].numel()*v.element_size() for k, v in one.items() if k != 'size')
    d.cache.most = 3*size
    for _ in range(2):
        for w in words: assert torch.equal(d.encode([w])['text'], free.encode([w])['text'])
    assert list(d.cache) == words[-3:] and d.cache.bytes == 3*size
    d.encode(words[5]); d.encode(words[0])
    assert list(d.cache) == [words[7], words[5], words[0]]
    assert torch.equal(d.encode(words)['text'], free.encode(words)['text']) and len(d.cache) == 3
    d.cache.most = 9*size; d.encode(words); d.free_text_encoders()
    assert (d.cache.most == float('inf')
            and all(torch.equal(d.encode([w])['text'], free.encode([w])['text']) for w in words))


def test_rollout_overhead_is_small(models):
    "The library's own work per step, measured without the network, against the smallest network"
    d = load(models, guidance=4.)
    x_t, _, c = batch(d)
    ts, network = d.grid(20), d.policies.forward
    def seconds():
        best = float('inf')
        for _ in range(3):
            start = time.process_time()
            rollout(d, x_t, ts, c, keep=False)
            best = min(best, time.process_time() - start)
        return best
    with_network = seconds()
    d.policies.forward = lambda x, *args, **kwargs: (x,)
    assert seconds() < .15*with_network                    # 3 % on a quiet machine; this one may not be
    d.policies.forward = network


# Dtypes (a reference cast to half precision and fed float32 latents is a known way to crash)

@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
@layouts
def test_policy_equals_reference_in_every_dtype(models, layout, dtype):
    d = load(models, layout, guidance=3., dtype=dtype).add_lora(rank=4)
    x_t, t, c = batch(d, (2,))
    with torch.no_grad():
        policy = d.predict(x_t, t, c)
        with d.reference(): ref = d.predict(x_t, t, c)
    base = load(models, layout, guidance=3., dtype=dtype)
    with torch.no_grad(): plain = base.predict(x_t, t, c)
    for p, r, b in zip(policy, ref, plain):
        assert p.dtype == torch.float32 and p.isfinite().all()
        assert torch.equal(p, r) and torch.equal(p, b)
    assert all(p.dtype == torch.float32 for p in d.trainable())


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_half_precision_learns_and_decodes(models, dtype):
    d = jolt(load(models, dtype=dtype).add_lora(rank=2))
    x_t, t, c = batch(d)
    d.output(x_t, t, c).square().mean().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in d.trainable())
    pics = d.show(x_t)
    assert pics.dtype == torch.float32 and pics.isfinite().all()
    assert d.latents(pics).dtype == torch.float32
    assert d.pipe.vae.dtype == (torch.float32 if dtype == 'float16' else torch.bfloat16)   # force_upcast


def test_half_precision_is_close_to_full(models):
    x_t, t, c = batch(load(models))
    with torch.no_grad():
        full, half = [load(models, dtype=o, guidance=1.).output(x_t, t, c) for o in ('float32', 'bfloat16')]
    assert (half - full).std() < .03*full.std()


def test_cast_is_loading_in_that_precision(models):
    x_t, t, c = batch(load(models))
    cast, loaded = load(models, vae=models/'taesd').cast('bfloat16'), load(models, dtype='bfloat16')
    with torch.no_grad(): a, b = (m.output(x_t, t, m.encode(PROMPTS)) for m in (cast, loaded))
    assert torch.equal(a, b)
    assert {cast.pipe.vae.dtype, cast.score_vae.dtype} == {torch.bfloat16}
    full = load(models).cast('float16'); assert full.autoencoder.dtype == torch.float32     # force_upcast
    with pytest.raises(ValueError, match='before add_lora'): loaded.add_lora(rank=2).cast('float32')


@pytest.mark.parametrize('backend', ['eager', pytest.param('inductor', marks=pytest.mark.slow)])
def test_compiled_equals_plain(models, backend):
    "Policy, reference and an added copy, with and without gradients"
    plain, fast = (jolt(load(models, guidance=1.).add_lora(rank=2)) for _ in range(2))
    fast.compile(backend)
    x_t, t, c = batch(plain)
    for d in (plain, fast): d.copy_adapter('policy', 'old'); jolt(d, 'old')
    def outs(d):
        with torch.no_grad():
            yield d.output(x_t, t, c)
            with d.reference(): yield d.output(x_t, t, c)
            with d.use('old'): yield d.output(x_t, t, c)
        d.output(x_t, t, c).square().mean().backward()
        yield torch.cat([p.grad.flatten() for p in d.trainable()])
    a, b = list(outs(plain)), list(outs(fast))
    for x, y in zip(a, b): torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-3)
    assert not torch.allclose(b[0], b[1]) and not torch.allclose(b[0], b[2])


# Policies

@layouts
def test_gradients_reach_the_policy_only(models, layout):
    d = jolt(load(models, layout, guidance=2.).add_lora(rank=2))
    d.copy_adapter('policy', 'old')
    x_t, t, c = batch(d)
    x0, _ = d.predict(x_t, t, c)
    with torch.no_grad(), d.reference(): d.predict(x_t, t, c)
    with torch.no_grad(), d.use('old'): d.predict(x_t, t, c)
    x0.square().mean().backward()
    with_grad = {id(p) for p in d.policies.net.parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert with_grad == {id(p) for p in d.trainable()} == {id(p) for p in d.policies.named['policy'].values()}


def test_gradients_equal_finite_differences(models):
    d = jolt(load(models).add_lora(rank=2))
    x_t, t, c = batch(d)
    loss = lambda: d.predict(x_t, t, c)[1].double().square().sum()
    loss().backward()
    p = max(d.trainable(), key=lambda p: p.grad.abs().max())
    i = p.grad.abs().argmax()
    with torch.no_grad():
        h, ends = 1e-2, []
        for sign in (1, -1):
            p.view(-1)[i] += sign*h; ends.append(loss()); p.view(-1)[i] -= sign*h
    assert float((ends[0] - ends[1])/(2*h)) == pytest.approx(float(p.grad.view(-1)[i]), rel=.05)


def test_switches_nest_and_survive_errors(models):
    d = jolt(load(models).add_lora(rank=2))
    d.add_lora(rank=3, name='other', trainable=False); jolt(d, 'other', .3)
    x_t, t, c = batch(d)
    def out():
        with torch.no_grad(): return d.output(x_t, t, c)
    policy = out()
    with d.use('other'):
        other = out()
        with d.reference(): base = out()
        assert torch.equal(out(), other)
    with pytest.raises(RuntimeError):
        with d.reference(): raise RuntimeError
    assert torch.equal(out(), policy)
    assert not torch.allclose(policy, other) and not torch.allclose(policy, base)
    assert len(d.trainable()) == len(d.policies.named['policy'])
    with d.with_guidance(1.).reference(): assert torch.equal(out(), base)       # views share the weights


def test_adapter_start_is_seeded(models):
    state = torch.random.get_rng_state()
    a, b, c = [load(models).add_lora(seed=s).trainable() for s in (0, 0, 1)]
    assert all(map(torch.equal, a, b)) and not all(map(torch.equal, a, c))
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize('full', [False, True])
def test_old_policy_follows(models, full):
    d = load(models, 'sd')
    d = d.add_full(keep_base=True) if full else d.add_lora(rank=2)
    x_t, t, c = batch(d)
    def out(name):
        with torch.no_grad(), d.use(name): return d.output(x_t, t, c)
    start = out('policy')
    d.copy_adapter('policy', 'old')
    jolt(d, scale=.02)
    assert torch.equal(out('old'), start) and not torch.allclose(out('policy'), start)
    with torch.no_grad(), d.reference(): assert torch.equal(d.output(x_t, t, c), start)
    before = {k: p.clone() for k, p in d.policies.named['old'].items()}
    d.blend_adapter('policy', 'old', .25)
    for k, p in d.policies.named['old'].items():
        want = .75*before[k] + .25*d.named['policy'][k].detach()
        torch.testing.assert_close(p, want, atol=1e-6, rtol=1e-5)
    d.copy_adapter('old', 'policy')
    assert torch.equal(out('old'), out('policy'))


def test_full_training_learns_every_weight(models):
    d = load(models, guidance=1.).add_full()
    x_t, t, c = batch(d)
    d.output(x_t, t, c).square().mean().backward()
    assert all(p.requires_grad and p.dtype == torch.float32 for p in d.pipe.unet.parameters())
    missing = [k for k, p in d.pipe.unet.named_parameters() if p.grad is None]
    assert not missing
    assert not any(p.requires_grad for p in d.pipe.vae.parameters())
    with pytest.raises(ValueError, match='keep_base=True'): d.reference()
    with pytest.raises(ValueError, match='no adapter to save'): d.save_lora('nowhere')


# Files

@layouts
@pytest.mark.parametrize('alpha', [None, 2., 16.])
def test_lora_gives_the_same_pictures_in_plain_diffusers(models, tmp_path, layout, alpha):
    d = load(models, layout, guidance=4.).add_lora(rank=4, alpha=alpha)
    start = noise(torch.tensor([3, 4]), START, d.item)
    jolt(d).save_lora(tmp_path)
    tuned, base = stock(d, start, lora=tmp_path), stock(d, start)
    torch.testing.assert_close(d.sample(PROMPTS, [3, 4], S=6), tuned, atol=1e-3, rtol=0)
    assert (tuned - base).abs().max() > .01
    again = load(models, layout, guidance=4.).load_lora(tmp_path)
    assert torch.equal(again.sample(PROMPTS, [3, 4], S=6), d.sample(PROMPTS, [3, 4], S=6))
    assert len(again.trainable()) == len(d.trainable())
    assert sorted(p.name for p in tmp_path.iterdir()) == [lora_file]


def test_lora_saved_by_diffusers_loads(models, tmp_path):
    "A file without a header, as most on the Hub are: alpha is the rank"
    d = jolt(load(models).add_lora(rank=4))
    weights = {f'unet.{k}': p.detach().contiguous() for k, p in d.policies.named['policy'].items()}
    save_file(weights, tmp_path/'any_name.safetensors')
    again = load(models).load_lora(tmp_path/'any_name.safetensors')
    assert torch.equal(again.sample(PROMPTS, S=3), d.sample(PROMPTS, S=3))


def test_saving_again_keeps_rank_and_alpha(models, tmp_path):
    jolt(load(models).add_lora(rank=4, alpha=2)).save_lora(tmp_path/'a')
    load(models).load_lora(tmp_path/'a').save_lora(tmp_path/'b')
    a, b = [load_file(tmp_path/o/lora_file) for o in 'ab']
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    d = load(models).load_lora(tmp_path/'b')
    assert d.policies.net.peft_config['policy'].lora_alpha == 2


def _break(kind, file, out):
    if kind == 'truncated': out.write_bytes(file.read_bytes()[:-100])
    elif kind == 'empty': out.write_bytes(b'')
    elif kind == 'text': out.write_text('not a weight file, but long enough for a header of eight bytes')
    else:
        w = load_file(file)
        k = next(iter(w))
        if kind == 'foreign': w = {k.replace('unet.', 'lora_unet_'): v for k, v in w.items()}
        if kind == 'lonely': del w[k]
        if kind == 'layer': w = {k.replace('to_q', 'to_z'): v for k, v in w.items()}
        if kind == 'shape': w = {k: v[:, :5] if 'lora_A' in k else v for k, v in w.items()}
        if kind == 'rank': w[k] = w[k][:1]
        if kind == 'nan': w[k] = w[k]*float('nan')
        save_file({k: v.contiguous() for k, v in w.items()}, out)


@pytest.mark.parametrize('kind, message', dict(
    truncated='not a complete safetensors file', empty='not a complete safetensors file',
    text='not a complete',
    foreign='diffusers format', lonely='no partner', layer='does not exist', shape='made for another model',
    rank='has rank 1 on one side, 2 on the other', nan='not finite').items())
def test_bad_lora_files(models, tmp_path, kind, message):
    file = jolt(load(models).add_lora(rank=2)).save_lora(tmp_path)
    _break(kind, file, tmp_path/'bad.safetensors')
    d = load(models)
    with pytest.raises(ValueError, match=message) as e: d.load_lora(tmp_path/'bad.safetensors')
    assert '\n' not in str(e.value)
    assert not d.policies.named and not d.trainable()                     # nothing half-loaded


def test_missing_and_misfit_lora(models, tmp_path):
    with pytest.raises(ValueError, match=f'folder with {lora_file}'):
        load(models).load_lora(tmp_path/'nowhere')
    with pytest.raises(ValueError, match=f'folder with {lora_file}'): load(models).load_lora(tmp_path)
    jolt(load(models, 'sd').add_lora(rank=2)).save_lora(tmp_path)
    with pytest.raises(ValueError, match='made for another model'): load(models).load_lora(tmp_path)
    with pytest.raises(ValueError, match='has rank'): load(models, 'sd').add_lora(rank=3).load_lora(tmp_path)
    (tmp_path/'file').write_text('')
    with pytest.raises(ValueError, match='found the file'): load(models).add_lora().save_lora(tmp_path/'file')


# What is refused

def _without(models, tmp_path, part):
    import shutil
    shutil.copytree(models/'xl', tmp_path/'cut')
    path = tmp_path/'cut'/part
    shutil.rmtree(path) if path.is_dir() else path.write_bytes(path.read_bytes()[:99])
    return tmp_path/'cut'


@pytest.mark.parametrize('part', ['unet', 'unet/diffusion_pytorch_model.safetensors', 'vae/config.json',
                                  'tokenizer',
                                  'model_index.json'])
def test_broken_folders(models, tmp_path, part):
    with pytest.raises(ValueError, match='^model: ') as e:
        Denoiser.from_pretrained(_without(models, tmp_path, part))
    assert '\n' not in str(e.value)


def test_names_that_lead_nowhere(tmp_path, monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    for name in (tmp_path/'nothing', 'a/b/c', 'word'):
        with pytest.raises(ValueError, match='expected a folder or a Hub name'):
            Denoiser.from_pretrained(name)
    with pytest.raises(ValueError, match='hf download'):
        Denoiser.from_pretrained('no-such-owner-xyz/no-such-model-xyz')


def test_unknown_pipeline(models):
    pipe = copy.copy(load(models).pipe)
    pipe.__class__ = type('StableCascadePipeline', (type(pipe),), {})
    with pytest.raises(ValueError,
                       match=r'SDXL \(StableDiffusionXLPipeline\), SD 1.x/2.x .*found StableCascade'):
        Denoiser(pipe)


@pytest.mark.parametrize('prompts', [[], [None], [3], None])
def test_bad_prompts(models, prompts):
    with pytest.raises(ValueError, match='prompts: expected a text or a list'): load(models).encode(prompts)


def test_scoring_decoder(models):
    d = load(models, vae=models/'taesd')
    z = batch(d, (2,))[0]
    assert d.show(z, fast=True).shape == d.show(z).shape == (2, 2, 3, 64, 64)
    assert not torch.allclose(d.show(z, fast=True), d.show(z))


def test_tokenizer_round_trip(tmp_path):
    words = [f'{a}{b}' for a in ('red', 'green', 'ever', 'reen') for b in ('', 'ish', 'er', 'ered')]
    tok = make_tokenizer(tmp_path, words, max_length=8)
    assert [len(tok(w).input_ids) for w in words] == [3]*len(words)        # two marks and one token
    assert all(len(set(tok(w).input_ids)) == 3 for w in words)
    assert tok.decode(tok('red greenish').input_ids, skip_special_tokens=True) == 'red greenish'


# Who may look inside

INSIDE = re.compile(r'\b(?!self\b|cls\b|models\b)\w+\.(?:pipe|policies)\b'
                    r'|\b(?:model|d|view|net)\._[a-z]\w*\b')


def test_nobody_outside_the_room_looks_inside_a_model():
    lib = Path(denoiser.__file__).parents[1]
    found = [p.relative_to(lib).as_posix() for p in lib.rglob('*.py') if p.name != '_modidx.py'
             and p.parent.name != 'models' and INSIDE.search(p.read_text(encoding='utf-8'))]
    assert not found
    for text in ('model.pipe.vae', 's.model.policies', 'd._inputs(x)'): assert INSIDE.search(text)
