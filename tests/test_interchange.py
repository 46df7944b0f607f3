"LoRA files for other programs, the model card, the Hub and autoencoders that overflow"
import json
from pathlib import Path

import pytest, torch
from safetensors.torch import load_file, save_file

diffusers = pytest.importorskip('diffusers')
import transformers
from diffusion_sharpening.models.lora import lora_file, read_lora
from diffusion_sharpening.models.denoiser import Denoiser
from diffusion_sharpening.models.tiny import tiny_flux, tiny_sd, tiny_sd3, tiny_sdxl
from diffusion_sharpening.commands import interchange
from diffusion_sharpening.models.counting import anatomy
from diffusion_sharpening.commands.interchange import (
    check_decode, decode_problem, export, from_kohya, kohya_name, plain_layout, push, to_kohya)
from diffusion_sharpening.commands.card import model_card
from diffusion_sharpening.commands.merge import merge
from diffusion_sharpening.commands.sample import sample
from diffusion_sharpening.models.policies import ATTENTION, LINEAR
from diffusion_sharpening.worlds.world import model_path

torch.set_num_threads(1)
for log in (diffusers.utils.logging, transformers.utils.logging):
    log.set_verbosity_error()
    log.disable_progress_bar()


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    tmp = tmp_path_factory.mktemp('models')
    tiny_sdxl(tmp/'xl', channels=(16, 32, 32), layers=2)
    tiny_sd(tmp/'sd', channels=(16, 32))
    return tmp


def tuned(folder, out, rank=2, alpha=None, targets=ATTENTION):
    "Folder `out` with a random LoRA of the model in `folder`"
    d = Denoiser.from_pretrained(folder, device='cpu', guidance=1.).add_lora(rank, alpha, targets)
    g = torch.Generator().manual_seed(1)
    for p in d.trainable(): torch.nn.init.normal_(p, std=.1, generator=g)
    d.save_lora(out)
    return out


def picture(folder, lora=None):
    "What diffusers alone makes of it"
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    if lora: pipe.load_lora_weights(str(lora))
    return pipe('a red circle', num_inference_steps=2, guidance_scale=1., height=64, width=64,
                output_type='pt',
                generator=torch.Generator().manual_seed(0)).images


def same(a, b):
    (a, *ra), (b, *rb) = read_lora(a), read_lora(b)
    return ra == rb and a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def report(run, model, **more):
    rep = dict(method='rlhf', preset='default', model=str(model), reward='clip', seed=0, steps=3, seconds=2.,
               batches=3,
               heldout_prompts=0, settings=dict(run=dict(rank=2), method=dict(n=2)), versions=dict(torch='2'),
               device='cpu')
    (run/'report.json').write_text(json.dumps(rep | more))
    return rep | more


# Layouts

@pytest.mark.parametrize('layout', ['xl', 'sd'])
@pytest.mark.parametrize('targets', [ATTENTION, LINEAR], ids=['attention', 'linear'])
def test_both_layouts_give_the_same_picture(folders, tmp_path, layout, targets):
    model = folders/layout
    lora = tuned(model, tmp_path/'run', alpha=1., targets=targets)
    file = to_kohya(lora, tmp_path/'a.safetensors', str(model))
    one, two = picture(model, lora), picture(model, file)
    assert torch.equal(one, two) and (one - picture(model)).abs().max() > 1e-3
    assert same(lora, from_kohya(file, tmp_path/'back', str(model)))


def test_embedded_model_in_both_layouts(tmp_path):
    model = model_path('shapes')
    lora = tuned(model, tmp_path/'run', rank=4, targets=LINEAR)
    report(tmp_path/'run', 'shapes')
    file = export(tmp_path/'run')
    pipe = diffusers.DiffusionPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    made = []
    for name, weights in dict(one=lora, two=file).items():
        pipe.load_lora_weights(str(weights), adapter_name=name)
        pipe.set_adapters(name)
        made.append(pipe('a red circle', num_inference_steps=2, output_type='pt',
                         generator=torch.Generator().manual_seed(0)).images)
    assert torch.equal(*made)
    again = from_kohya(file, tmp_path/'back', 'shapes')
    d = Denoiser.from_pretrained(model, device='cpu', guidance=1.).load_lora(again.parent)
    own = Denoiser.from_pretrained(model, device='cpu', guidance=1.).load_lora(lora)
    assert torch.equal(d.sample('a red circle', S=2), own.sample('a red circle', S=2))


@pytest.mark.parametrize('model, layers', [('sdxl', 722), ('sd15', 192)])
def test_every_layer_of_the_real_models_has_a_name_of_its_own(model, layers):
    "As many as kohya-ss reports for its default: linear layers and 1×1 convolutions of the transformers"
    a, known = anatomy(model), interchange._layers(model)
    inside = {v for v in known.values() if '.attentions.' in v}
    mine = {kohya_name(v, a.xl, a.unet['layers_per_block']) for v in inside}
    assert len(inside) == len(mine) == layers


def test_diffusers_reads_every_name_of_sdxl():
    "The names of all layers of the real SDXL, through diffusers' own conversion"
    layers = sorted(v for v in set(interchange._layers('sdxl').values())
                    if v.endswith((*ATTENTION, 'proj_in', 'proj_out', 'ff.net.0.proj', 'ff.net.2',
                                   'time_emb_proj')))
    w = {f'{kohya_name(v, True)}.lora_{s}.weight': torch.full((1, 1), float(i))
         for i, v in enumerate(layers) for s in ('down', 'up')}
    config = type('Config', (), dict(layers_per_block=2))
    out, _ = diffusers.StableDiffusionXLPipeline.lora_state_dict(w, unet_config=config)
    def clean(k):
        for part in ('.processor', '_lora.down.weight', '.lora.down.weight'): k = k.replace(part, '')
        return k.removeprefix('unet.').replace('to_out', 'to_out.0')
    got = {clean(k): int(v.item()) for k, v in out.items() if '.down.weight' in k}
    assert len(layers) == 739 and got == {v: i for i, v in enumerate(layers)}


@pytest.mark.parametrize('layer, name', [
    ('down_blocks.1.attentions.1.transformer_blocks.0.ff.net.0.proj',
     'input_blocks_5_1_transformer_blocks_0_ff_net_0_proj'),
    ('down_blocks.2.attentions.0.proj_in', 'input_blocks_7_1_proj_in'),
    ('down_blocks.0.resnets.1.time_emb_proj', 'input_blocks_2_0_emb_layers_1'),
    ('mid_block.attentions.0.transformer_blocks.9.attn2.to_out.0',
     'middle_block_1_transformer_blocks_9_attn2_to_out_0'),
    ('up_blocks.0.attentions.2.transformer_blocks.4.attn1.to_v',
     'output_blocks_2_1_transformer_blocks_4_attn1_to_v'),
    ('up_blocks.2.resnets.0.time_emb_proj', 'output_blocks_6_0_emb_layers_1')])
def test_names_of_sdxl(layer, name): assert kohya_name(layer, xl=True) == f'lora_unet_{name}'


def test_files_of_others(folders, tmp_path):
    "A rank and an alpha per layer, or no alpha at all, or SDXL layers under diffusers' names"
    model = str(folders/'xl')
    file = to_kohya(tuned(model, tmp_path/'run', rank=3), tmp_path/'a.safetensors', model)
    w = load_file(file)
    names = sorted({k.split('.')[0] for k in w})
    for i, n in enumerate(names):
        r = 1 + i % 3
        w[f'{n}.lora_down.weight'] = w[f'{n}.lora_down.weight'][:r].contiguous()
        w[f'{n}.lora_up.weight'] = w[f'{n}.lora_up.weight'][:, :r].contiguous()
        if i % 2: del w[f'{n}.alpha']
        else: w[f'{n}.alpha'] = torch.tensor(.5 + i % 4)
    save_file(w, tmp_path/'uneven.safetensors')
    back = interchange._layers(model)
    even, rank, alpha = read_lora(from_kohya(tmp_path/'uneven.safetensors', tmp_path/'even', model))
    assert rank == 3 and len(even) == 2*len(names)
    for n in names:
        down, up = w[f'{n}.lora_down.weight'], w[f'{n}.lora_up.weight']
        change = up @ down*(w.get(f'{n}.alpha', torch.tensor(float(len(down))))/len(down))
        mine = even[f'{back[n]}.lora_B.weight'] @ even[f'{back[n]}.lora_A.weight']*(alpha/rank)
        torch.testing.assert_close(mine, change)
    w = {f'{kohya_name(back[k.split(".")[0]])}.{k.split(".", 1)[1]}': v for k, v in load_file(file).items()}
    save_file(w, tmp_path/'plain_names.safetensors')
    assert same(tmp_path/'run', from_kohya(tmp_path/'plain_names.safetensors', tmp_path/'p', model))


@pytest.mark.parametrize('kind, message', dict(
    text='does not have', lonely='lora_down and lora_up', empty='not a complete',
    other='does not have').items())
def test_bad_files(folders, tmp_path, kind, message):
    file = to_kohya(tuned(folders/'sd', tmp_path/'run'), tmp_path/'a.safetensors', str(folders/'sd'))
    w = load_file(file)
    k = next(k for k in w if 'lora_up' in k)
    if kind == 'text': w |= {o.replace('unet', 'te'): v.clone() for o, v in w.items()}
    if kind == 'lonely': del w[k]
    if kind == 'empty': file.write_bytes(b'')
    else: save_file(w, file)
    with pytest.raises(ValueError, match=message) as e:
        from_kohya(file, tmp_path/'out', str(folders/('xl' if kind == 'other' else 'sd')))
    assert '\n' not in str(e.value) and not (tmp_path/'out').exists()


@pytest.mark.parametrize('more', ['dora_scale', 'lora_mid.weight', 'diff_b', 'diff', 'hada_w1_a', 'strength'])
def test_what_is_more_than_lora_is_refused(folders, tmp_path, more):
    "Dropping it would change the picture without a word"
    file = to_kohya(tuned(folders/'sd', tmp_path/'run'), tmp_path/'a.safetensors', str(folders/'sd'))
    w = load_file(file)
    name = next(iter(w)).split('.')[0]
    save_file(w | {f'{name}.{more}': torch.ones(1)}, file)
    with pytest.raises(ValueError, match=f'found 1 others, the first is {name}.{more}') as e:
        from_kohya(file, tmp_path/'out', str(folders/'sd'))
    assert '\n' not in str(e.value) and not (tmp_path/'out').exists()


@pytest.mark.parametrize('down', ['.lora.down.', '_lora.down.'], ids=['layers', 'processors'])
def test_layouts_of_training_scripts(folders, tmp_path, down):
    "`to_q.lora.down.weight`, and `processor.to_q_lora.down.weight` before that"
    lora = tuned(folders/'sd', tmp_path/'run')
    def name(k):
        layer, side = k.removesuffix('.weight').rsplit('.lora_', 1)
        if down[0] == '_':
            block, attn = layer.replace('.to_out.0', '.to_out').rsplit('.', 1)
            layer = f'{block}.processor.{attn}'
        return f"unet.{layer}{down if side == 'A' else down.replace('down', 'up')}weight"
    save_file({name(k): v for k, v in read_lora(lora)[0].items()}, tmp_path/'script.safetensors')
    assert same(lora, from_kohya(tmp_path/'script.safetensors', tmp_path/'back', str(folders/'sd')))


# Runs

@pytest.fixture
def run(folders, tmp_path):
    tuned(folders/'xl', tmp_path/'run')
    report(tmp_path/'run', folders/'xl')
    (tmp_path/'run/before_after.png').write_bytes(b'png')
    return tmp_path/'run'


def test_export(run, tmp_path):
    assert export(run) == run/'lora_kohya.safetensors' and export(run, 'diffusers') == run/lora_file
    assert export(run, 'kohya', tmp_path/'x/name.safetensors').name == 'name.safetensors'
    assert same(run, export(run, 'diffusers', tmp_path/'y').parent)
    assert sorted(p.name for p in run.iterdir()) == ['before_after.png', 'lora_kohya.safetensors', lora_file,
                                                     'report.json']


def test_export_of_what_is_no_lora(run, tmp_path):
    with pytest.raises(ValueError, match='diffusers, kohya'): export(run, 'comfy')
    with pytest.raises(ValueError, match='report.json'): export(tmp_path)
    (run/lora_file).unlink()
    with pytest.raises(ValueError, match=lora_file): export(run)
    (run/'model').mkdir()
    with pytest.raises(ValueError, match='every weight'): export(run)


def test_card_tells_what_was_measured(run):
    iv = lambda x: dict(mean=x, low=x-.01, high=x+.01, over='9 prompts')
    side = lambda x: dict(judges=dict(clip=dict(overall=iv(x)), checker=dict(overall=iv(2*x))))
    rep = json.loads((run/'report.json').read_text())
    card = model_card(rep | dict(model='owner/base', before=side(.2), after=side(.3), delta=side(.1),
                                 heldout_prompts=9), 'me/x')
    assert ('| checker, overall | 0.400 | 0.600 | +0.200 [+0.190, +0.210] over 9 prompts |' in card
            and '9 held-out prompts' in card)
    front = card.split('---')[1]
    assert 'base_model: owner/base' in front and '- lora' in front
    assert 'base_model' not in model_card(rep) and '- lora' not in model_card(rep, full=True)


def test_card_without_intervals(run):
    "One held-out prompt has a mean and no interval"
    one = dict(judges=dict(clip=dict(overall=dict(mean=.5, low=None, high=None, over='1 prompt'))))
    rep = json.loads((run/'report.json').read_text())
    card = model_card(rep | dict(before=one, after=one, delta=one, heldout_prompts=1), 'me/x')
    assert '| clip, overall | 0.500 | 0.500 | +0.500 over 1 prompt |' in card


def test_dry_run(run, folders):
    out = push(run, 'me/sharp', dry_run=True)
    assert set(out['files']) == {'README.md', 'report.json', 'before_after.png', lora_file,
                                 'lora_kohya.safetensors'}
    assert out['url'] is None and all(out['files'].values()) and out['card'].startswith('---\n')
    assert str(folders) not in out['card']


class Hub:
    "Stands for the Hub: keeps what is uploaded, or refuses"
    def __init__(self, refuse=False): self.refuse, self.calls, self.files = refuse, [], {}
    def create_repo(self, repo, **kw):
        if self.refuse: raise PermissionError('401\nlog in first')
        self.calls.append((repo, kw))
    def upload_folder(self, repo_id, folder_path, commit_message):
        self.files = {p.relative_to(folder_path).as_posix(): p.read_bytes()
                      for p in Path(folder_path).rglob('*') if p.is_file()}
        return f'https://huggingface.co/{repo_id}'


def test_push(run, folders, monkeypatch):
    import huggingface_hub
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, 'HfApi', lambda: hub)
    out = push(run, 'me/sharp')
    assert (out['url'] == 'https://huggingface.co/me/sharp'
            and hub.calls == [('me/sharp', dict(private=True, exist_ok=True))])
    assert {k: len(v) for k, v in hub.files.items()} == out['files']
    # no path of this machine
    assert not [k for k, v in hub.files.items() if str(folders).encode() in v]
    monkeypatch.setattr(huggingface_hub, 'HfApi', lambda: Hub(refuse=True))
    with pytest.raises(ValueError, match='^push: the Hub says PermissionError: 401$'): push(run, 'me/sharp')


@pytest.mark.parametrize('repo', ['sharp', 'a/b/c', 'me/has space', ''])
def test_bad_repo(run, repo):
    with pytest.raises(ValueError, match='owner/name'): push(run, repo, dry_run=True)


def test_full_fine_tunes_go_up_as_pipelines(folders, tmp_path):
    d = Denoiser.from_pretrained(folders/'sd', device='cpu')
    (tmp_path/'run').mkdir()
    d.save_pipeline(tmp_path/'run/model')
    report(tmp_path/'run', folders/'sd')
    out = push(tmp_path/'run', 'me/full', dry_run=True)
    assert ({'model_index.json', 'unet/config.json', 'README.md'} <= set(out['files'])
            and lora_file not in out['files'])
    assert "from_pretrained('me/full')" in out['card']


# Autoencoders

def test_overflow_is_found(folders):
    d = Denoiser.from_pretrained(folders/'xl', device='cpu')
    check_decode(d)
    d.pipe.vae.decoder.conv_in.weight.data *= 1e6
    check_decode(d)
    d.pipe.vae.half()
    with pytest.raises(ValueError, match='2 of 2 pictures .*float16, which overflows.* are NaN; .*fp16-fix'):
        check_decode(d)
    d.score_vae, d.pipe.vae = d.pipe.vae, Denoiser.from_pretrained(folders/'xl', device='cpu').pipe.vae
    # the scoring one too
    with pytest.raises(ValueError, match='fp16-fix'): check_decode(d)


@pytest.mark.parametrize('images, message', [
    (torch.rand(3, 3, 8, 8), None), (torch.rand(2, 2, 3, 8, 8), None), (torch.zeros(2, 3, 8, 8), 'blank'),
    (torch.full((2, 3, 8, 8), torch.nan), 'NaN'),
    (torch.cat([torch.rand(1, 3, 8, 8), torch.zeros(1, 3, 8, 8)]), None)])
def test_decode_problem(images, message):
    found = decode_problem(images)
    assert found is None if message is None else message in found


@pytest.mark.parametrize('make', [tiny_sd3, tiny_flux])
def test_a_merge_of_transformers_opens_in_diffusers(make, tmp_path):
    "Half and half of one adapter is that adapter, in the pipeline that loads it"
    make(tmp_path/'model')
    d = Denoiser.from_pretrained(tmp_path/'model', 3., device='cpu', size=64).add_lora(rank=2)
    g = torch.Generator().manual_seed(0)
    for p in d.trainable(): p.data = torch.randn(p.shape, generator=g)
    d.save_lora(tmp_path/'a')
    merge(f"{tmp_path/'a'}:.5,{tmp_path/'a'}:.5", str(tmp_path/'m'), model=str(tmp_path/'model'))
    def changes(folder):
        pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path/'model')
        pipe.load_lora_weights(folder)
        return {k: m.get_delta_weight('default_0') for k, m in pipe.transformer.named_modules()
                if hasattr(m, 'get_delta_weight')}
    was, now = changes(tmp_path/'a'), changes(tmp_path/'m')
    assert was and {*was} == {*now}
    for k, v in was.items(): torch.testing.assert_close(now[k], v)


def test_files_of_other_tools(folders, tmp_path):
    "A command makes the same pictures of a LoRA in kohya's layout and in that of diffusers"
    model = str(folders/'xl')
    lora = tuned(folders/'xl', tmp_path/'run')
    file = to_kohya(lora, tmp_path/'theirs.safetensors', model)
    for name, path in (('ours', lora), ('theirs', file)):
        sample(model, str(path), out=str(tmp_path/name), prompts='shapes', n=1, S=2)
    ours, theirs = ((tmp_path/k/'0000.png').read_bytes() for k in ('ours', 'theirs'))
    assert ours == theirs
    with pytest.raises(ValueError, match='does not have'): plain_layout(file, tmp_path/'x', str(folders/'sd'))
