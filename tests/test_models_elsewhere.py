"Models and adapters made elsewhere: applied exactly, named in one line, or refused"
import json, shutil, subprocess, sys, warnings
from pathlib import Path

import pytest, torch
from safetensors.torch import load_file, save_file

diffusers = pytest.importorskip('diffusers')
from diffusion_sharpening.basics.seeds import START, noise
from diffusion_sharpening.commands.interchange import export, push
from diffusion_sharpening.commands.sample import sample
from diffusion_sharpening.commands.train import train
from diffusion_sharpening.models.counting import measured
from diffusion_sharpening.models.denoiser import Denoiser
from diffusion_sharpening.models.loading import load_pipeline
from diffusion_sharpening.models.lora import lora_file
from diffusion_sharpening.models.tiny import tiny_flux, tiny_sd, tiny_sd3, tiny_sdxl
from diffusion_sharpening.models.policies import LINEAR
from diffusion_sharpening.training.plan import units_of
from diffusion_sharpening.training.run import Run
from diffusion_sharpening.worlds.world import weights

torch.set_num_threads(1)
diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()
PROMPTS, SEEDS = ['a red circle', 'a blue square'], torch.tensor([3, 4])
root = Path(__file__).resolve().parents[1]


@pytest.fixture(scope='module')
def xl(tmp_path_factory):
    "Folder of a tiny SDXL"
    dir = tmp_path_factory.mktemp('elsewhere')/'xl'
    tiny_sdxl(dir, words=PROMPTS)
    return dir


@pytest.fixture
def copied(xl, tmp_path): return Path(shutil.copytree(xl, tmp_path/'copy'))


def load(folder, **kwargs): return Denoiser.from_pretrained(folder, device='cpu', **kwargs)


def stock(pipe, d, S=6, guidance=4.):
    "Pictures of a plain pipeline from the same start"
    pipe.set_progress_bar_config(disable=True)
    return pipe(PROMPTS, latents=noise(SEEDS, START, d.item), num_inference_steps=S, guidance_scale=guidance,
                height=d.size[0], width=d.size[1], output_type='pt').images


def close(a, b): torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


def one_line(excinfo): assert '\n' not in str(excinfo.value)


# LoRA

def adapter(d, file, names=str, **header):
    "A LoRA file of random numbers for a model, with names and header as another tool writes them"
    g = torch.Generator().manual_seed(1)
    d.add_lora(rank=4)
    w = {names(f'unet.{k}'): .2*torch.randn(p.shape, generator=g) for k, p in d.named['policy'].items()}
    fields = dict(r=4, target_modules=['to_q', 'to_k', 'to_v', 'to_out.0'], **header)
    meta = {f'unet.{k}': v for k, v in fields.items()}
    save_file(w, file, dict(lora_adapter_metadata=json.dumps(meta)) if header else None)
    return file


HEADERS = dict(plain=dict(lora_alpha=8), rslora=dict(lora_alpha=4, use_rslora=True),
               alphas=dict(lora_alpha=8, alpha_pattern={'attn1.to_q': 1, 'to_out.0': 12}),
               both=dict(lora_alpha=4, use_rslora=True, alpha_pattern={'attn2.to_k': 2}), none={})


@pytest.mark.parametrize('header', HEADERS)
def test_scales_of_a_lora_are_those_of_diffusers(xl, tmp_path, header):
    file = adapter(load(xl), tmp_path/lora_file, **HEADERS[header])
    d, pipe = load(xl, guidance=4.).load_lora(tmp_path), load_pipeline(xl)
    base = stock(pipe, d)
    pipe.load_lora_weights(tmp_path)
    tuned = stock(pipe, d)
    close(d.sample(PROMPTS, SEEDS, S=6), tuned)
    assert (tuned - base).abs().max() > .01
    d.save_lora(tmp_path/'again')
    close(load(xl, guidance=4.).load_lora(tmp_path/'again').sample(PROMPTS, SEEDS, S=6), tuned)


def _trained(k): return k.replace('.lora_A.', '.lora.down.').replace('.lora_B.', '.lora.up.')


def _oldest(k):
    k = _trained(k).replace('to_out.0.lora', 'to_out.lora')
    layer, name = k.split('.lora.')[0].rsplit('.', 1)
    return f'{layer}.processor.{name}_lora.' + k.split('.lora.')[1]


@pytest.mark.parametrize('names', [_trained, _oldest])
def test_layouts_of_training_scripts(xl, tmp_path, names):
    adapter(load(xl), tmp_path/lora_file, names)
    d, pipe = load(xl, guidance=4.).load_lora(tmp_path), load_pipeline(xl)
    pipe.load_lora_weights(tmp_path)
    close(d.sample(PROMPTS, SEEDS, S=6), stock(pipe, d))


LAYER = 'unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q'


@pytest.mark.parametrize('entry, header, message', [
    (f'{LAYER}.dora_scale', {}, 'dora_scale, which is not part of a plain LoRA'),
    (f'{LAYER}.lora_magnitude_vector', {}, 'not part of a plain LoRA'),
    (f'{LAYER}.lora_mid.weight', {}, 'not part of a plain LoRA'),
    (f'{LAYER}.diff_b', {}, 'not part of a plain LoRA'),
    (f'{LAYER}.lora_B.bias', {}, 'not part of a plain LoRA'),
    ('text_encoder.layers.0.self_attn.q_proj.lora_A.weight', {}, 'only the U-Net is adapted'),
    ('lora_unet_mid_block_attentions_0_proj_in.alpha', {}, 'from_kohya'),
    (None, dict(use_dora=True), 'use_dora=True in its header'),
    (None, dict(lora_bias=True), 'lora_bias=True in its header'),
    (None, dict(modules_to_save=['conv_in']), 'in its header')])
def test_what_is_not_a_plain_lora_is_refused(xl, tmp_path, entry, header, message):
    file, d = adapter(load(xl), tmp_path/lora_file, lora_alpha=4, **header), load(xl)
    if entry: save_file(load_file(file) | {entry: torch.ones(2)}, file)
    with pytest.raises(ValueError, match=message) as e: d.load_lora(tmp_path)
    one_line(e)
    assert not d.named and not d.trainable()


def test_a_lora_that_a_pipeline_carries_stays(xl, tmp_path):
    "A fresh policy changes nothing on it, the reference has it, and it does not learn"
    adapter(load(xl), tmp_path/lora_file, lora_alpha=8)
    pipe = load_pipeline(xl)
    pipe.load_lora_weights(tmp_path)
    d = Denoiser(pipe, 4.)
    came, bare = d.sample(PROMPTS, SEEDS, S=3), load(xl, guidance=4.).sample(PROMPTS, SEEDS, S=3)
    assert (came - bare).abs().max() > .01
    d.add_lora(rank=2)
    assert torch.equal(d.sample(PROMPTS, SEEDS, S=3), came)
    with torch.no_grad():
        for p in d.trainable(): p += .1
    assert len(d.trainable()) == len(d.named['policy'])
    assert not torch.allclose(d.sample(PROMPTS, SEEDS, S=3), came)
    with d.reference(): assert torch.equal(d.sample(PROMPTS, SEEDS, S=3), came)
    with pytest.raises(ValueError, match='there are adapters'): d.save_pipeline(tmp_path/'whole')


def test_fused_and_carried_loras_that_cannot_be_trained_on(xl, tmp_path):
    adapter(load(xl), tmp_path/lora_file, lora_alpha=8)
    pipe = load_pipeline(xl)
    pipe.load_lora_weights(tmp_path)
    with pytest.raises(ValueError, match='carries a LoRA') as e: Denoiser(pipe).add_full()
    one_line(e)
    pipe.fuse_lora()
    with pytest.raises(ValueError, match='unload_lora_weights') as e: Denoiser(pipe)
    one_line(e)


# Whole pipelines

@pytest.mark.parametrize('part', ['unet', 'vae', 'text_encoder', 'text_encoder_2'])
@pytest.mark.parametrize('kind, message', dict(lost='lacks 1 weights', renamed='lacks 1 weights',
                                               more='has unknown 1 weights', short='does not load').items())
def test_partial_weights(copied, part, kind, message):
    file = next((copied/part).glob('*.safetensors'))
    w = load_file(file)
    k = sorted(w)[-1]
    if kind == 'lost': del w[k]
    if kind == 'renamed': w['odd'] = w.pop(k)
    if kind == 'more': w['odd'] = torch.ones(2)
    if kind == 'short': w[k] = w[k][:1].contiguous()
    save_file(w, file, dict(format='pt'))
    with pytest.raises(ValueError, match=message) as e: load(copied)
    one_line(e)


def test_half_precision_files_alone(xl, copied):
    for f in [*copied.rglob('*.safetensors')]:
        save_file({k: v.half() for k, v in load_file(f).items()}, f.with_name(f'{f.stem}.fp16.safetensors'),
                  dict(format='pt'))
        f.unlink()
    got, want = (load(o).network.conv_in.weight for o in (copied, xl))
    torch.testing.assert_close(got, want, atol=1e-3, rtol=0)


def test_pickles_are_not_opened(copied):
    for f in (copied/'unet').glob('*.safetensors'): f.rename(f.with_suffix('.bin'))
    with pytest.raises(ValueError, match='only pickled weights') as e: load(copied)
    one_line(e)


def _edit(file, **changes): file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_padded_vocabulary_and_sizes_as_lists(xl, copied):
    for part in ('text_encoder', 'text_encoder_2'):
        file = copied/part/'model.safetensors'
        w = load_file(file)
        k = next(k for k in w if k.endswith('token_embedding.weight'))
        w[k] = torch.cat([w[k], torch.zeros(13, w[k].shape[1])])
        save_file(w, file, dict(format='pt'))
        _edit(copied/part/'config.json', vocab_size=len(w[k]))
    _edit(copied/'unet/config.json', sample_size=[8, 4])
    d = load(copied)
    assert d.size == (64, 32) and d.item == (4, 8, 4)
    assert torch.equal(d.encode(PROMPTS)['text'], load(xl).encode(PROMPTS)['text'])


# Schedulers

def _scheduled(copied, name, **settings):
    cfg = json.loads((copied/'scheduler/scheduler_config.json').read_text())
    getattr(diffusers, name).from_config({**cfg, **settings}).save_pretrained(copied/'scheduler')
    index = json.loads((copied/'model_index.json').read_text())
    _edit(copied/'model_index.json', scheduler=['diffusers', name], unet=index['unet'])
    return copied


@pytest.mark.parametrize('name', ['DDIMScheduler', 'EulerDiscreteScheduler'])
@pytest.mark.parametrize('prediction', ['epsilon', 'v_prediction'])
def test_same_picture_as_the_shipped_scheduler(copied, name, prediction, recwarn):
    d = load(_scheduled(copied, name, prediction_type=prediction), guidance=4.)
    close(d.sample(PROMPTS, SEEDS, S=8), stock(load_pipeline(copied), d, 8))
    assert not [w for w in recwarn if str(w.message).startswith('model:')]


@pytest.mark.parametrize('name, settings, named', [
    ('DDIMScheduler', dict(clip_sample=True), 'clip_sample (0.21)'),
    ('DDIMScheduler', dict(thresholding=True), 'thresholding (0.21)'),
    ('EulerDiscreteScheduler', dict(use_karras_sigmas=True), 'use_karras_sigmas (0.02)'),
    ('EulerDiscreteScheduler', dict(use_exponential_sigmas=True), 'use_exponential_sigmas (0.02)'),
    ('PNDMScheduler', {}, 'PNDMScheduler (0.05)'),
    ('UniPCMultistepScheduler', {}, 'UniPCMultistepScheduler (0.05)'),
    ('LCMScheduler', {}, 'LCMScheduler (0.24)'), ('TCDScheduler', {}, 'TCDScheduler (0.03)')])
def test_scheduler_settings_without_effect_are_named(copied, name, settings, named):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        load(_scheduled(copied, name, **settings))
    lines = [str(w.message) for w in said if str(w.message).startswith('model: sampled with DDIM')]
    assert len(lines) == 1 and named in lines[0] and '\n' not in lines[0]


@pytest.mark.parametrize('name, spacing', [('LCMScheduler', 'leading'),
                                           ('EulerDiscreteScheduler', 'trailing')])
def test_distilled_models_are_pointed_out(copied, name, spacing):
    with pytest.warns(UserWarning, match='distilled for 1 to 4 steps'):
        load(_scheduled(copied, name, timestep_spacing=spacing))


def test_embedded_model_in_plain_diffusers():
    "The shipped scheduler ends where the library's sampler does"
    d, pipe = load(weights('shapes-sdxl'), guidance=1.), load_pipeline(weights('shapes-sdxl'))
    close(d.sample(PROMPTS, SEEDS, S=10), stock(pipe, d, 10, guidance=1.))


def test_prompts_that_are_cut_are_said_once(xl):
    d, long = load(xl), 'red ' * 30
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        d.encode([*PROMPTS, long])
        d.encode(long + 'circle')
    found = [str(w.message) for w in said if 'longer than the 16 tokens' in str(w.message)]
    assert len(found) == 1 and found[0].startswith('prompts: 1 of 3')


# The wheel

@pytest.mark.slow
def test_wheel_has_the_weights(tmp_path):
    "Built from a copy of the sources, installed outside of them, it makes the demo's pictures"
    src = tmp_path/'src'
    skip = shutil.ignore_patterns('.git', '.venv', '_docs', '_proc', 'results', 'build', '*.egg-info')
    shutil.copytree(root, src, ignore=skip)
    def run(*cmd, **kw):
        done = subprocess.run(cmd, capture_output=True, text=True, **kw)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout
    build = 'from setuptools.build_meta import build_wheel; print(build_wheel("..", {}))'
    wheel = tmp_path/run(sys.executable, '-c', build, cwd=src).split()[-1]
    run('uv', 'venv', '-q', '--python', sys.executable, str(tmp_path/'venv'))
    python = tmp_path/'venv/bin/python'
    run('uv', 'pip', 'install', '-q', '--offline', '--no-deps', '--python', str(python), str(wheel))
    site = Path(run(str(python), '-c', 'import site; print(site.getsitepackages()[0])').strip())
    here = [p for p in sys.path if p.endswith('site-packages')]
    (site/'libraries.pth').write_text('\n'.join(here))   # torch and the rest, but not this library
    env = dict(PATH='/usr/bin:/bin', HOME=str(tmp_path), HF_HUB_OFFLINE='1', OMP_NUM_THREADS='1')
    where = 'import diffusion_sharpening as d; print(d.__file__)'
    assert str(site) in run(str(python), '-c', where, cwd=tmp_path, env=env)
    out = run(str(tmp_path/'venv/bin/sharpen'), 'demo', '--steps', '2', '--out', 'run', cwd=tmp_path, env=env)
    assert (tmp_path/'run/report.json').exists(), out


# Transformers: SD 3 and FLUX

@pytest.mark.parametrize('make', [tiny_sd3, tiny_flux])
def test_a_transformer_is_counted_and_trained(make, tmp_path):
    "From configs alone: the operations and sizes of the loaded model; and the commands run on it"
    make(tmp_path/'model')
    (tmp_path/'mine.py').write_text('def bright(images, prompts): return images.mean((1, 2, 3))')
    (tmp_path/'prompts.txt').write_text('\n'.join(PROMPTS))
    d = load(tmp_path/'model', guidance=1.)
    units, sizes = units_of(str(tmp_path/'model'), d.size[1], Run(rank=4))
    seen, had = measured(d.add_lora(4, targets=LINEAR))
    assert sizes == had
    for k in ('lesson', 'rollout', 'reference', 'show'):
        assert units[k].tflop == pytest.approx(seen[k].tflop, rel=1e-6)
    asked = dict(prompts=str(tmp_path/'prompts.txt'), model=str(tmp_path/'model'), guidance=1.)
    train('rlhf', out=str(tmp_path/'run'), reward=f'{tmp_path}/mine.py:bright', heldout=0, steps=1, n=2, S=2,
          batch=2, rank=2, **asked)
    sample(lora=str(tmp_path/'run'), out=str(tmp_path/'pictures'), n=1, S=2, **asked)
    assert [*(tmp_path/'pictures').glob('*.png')]
    assert push(str(tmp_path/'run'), 'me/x', dry_run=True)
    with pytest.raises(ValueError, match='with a U-Net'): export(str(tmp_path/'run'))
