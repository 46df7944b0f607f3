"Preference models: files, towers of other kinds, resumed runs, and what a short training learns"
import json, math

import pytest, torch

open_clip = pytest.importorskip('open_clip')
from PIL import Image
from safetensors.torch import load_file, save_file
from diffusion_sharpening.worlds.world import weights
from diffusion_sharpening.names.catalog import load_reward
from diffusion_sharpening.rewards.clip import read_clip
from diffusion_sharpening.rewards.preference import (
    Preference, fit_preference, freeze, new_scorer, pair_accuracy, pairs_loss, read_pairs, split_pairs)
from diffusion_sharpening.worlds.shapes.choices import degrade, shapes_choices
from diffusion_sharpening.worlds.shapes.draw import held_out, picture

CLIP = weights('shapes-clip')

torch.set_num_threads(1)


def save(x, path): Image.fromarray((x.permute(1, 2, 0)*255).round().byte().numpy()).save(path)


def colour_pairs(n):
    "Redder is better: plain pictures, of two sizes"
    g = torch.Generator().manual_seed(0)
    def flat(i, r):
        size = (40, 56) if i % 2 else (64, 64)
        return torch.tensor([r, .3, .3]).view(3, 1, 1).expand(3, *size).contiguous()
    def text(i):
        second = ('star', 'heart', 'cross', 'square', 'triangle')[i % 5]
        return f"a {('red', 'blue')[i % 2]} circle and a {second}"
    reds = torch.rand(n, 2, generator=g).sort(1, descending=True).values.tolist()
    return [(text(i), flat(i, a), flat(i, b)) for i, (a, b) in enumerate(reds)]


def test_it_learns_a_simple_taste(tmp_path):
    r = fit_preference(colour_pairs(60), tmp_path/'red', CLIP, steps=25, batch=8, lr=2e-3, fixed=1.,
                       head=dict(width=32, layers=1))
    assert pair_accuracy(r, colour_pairs(90)[60:])['accuracy'] > .9
    assert r.note['held_out']['accuracy'] > .7 and r.note['std'] > 0


def test_files_and_tensors_give_the_same_model(tmp_path):
    pairs, rows = colour_pairs(8), []
    for i, (text, *sides) in enumerate(pairs):
        for name, x in zip('bw', sides): save(x, tmp_path/f'{i}{name}.png')
        rows.append(dict(prompt=text, better=f'{i}b.png', worse=f'{i}w.png'))
    (tmp_path/'pairs.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    how = dict(clip=CLIP, steps=2, batch=4, fixed=1., head=dict(width=32, layers=1))
    bytes8 = [(t, *((o*255).round()/255 for o in sides)) for t, *sides in pairs]
    a, b = (fit_preference(tmp_path/'pairs.jsonl', tmp_path/'a', **how),
            fit_preference(bytes8, tmp_path/'b', **how))
    x = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(a(x, ['a star']*2), b(x, ['a star']*2), atol=1e-4, rtol=0)


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    import diffusion_sharpening.rewards.preference as pretrain
    pairs, how = colour_pairs(8), dict(clip=CLIP, steps=4, batch=4, fixed=1., head=dict(width=32, layers=1))
    whole = fit_preference(pairs, tmp_path/'whole', **how)
    fit, state = pretrain.fit, tmp_path/'state'
    def stopped(net, loss, *args, **kwargs):
        def until(net, k):
            if k == 2: raise KeyboardInterrupt
            return loss(net, k)
        return fit(net, until, *args, save_every=2, **kwargs)
    monkeypatch.setattr(pretrain, 'fit', stopped)
    with pytest.raises(KeyboardInterrupt): fit_preference(pairs, tmp_path/'part', state=state, **how)
    monkeypatch.setattr(pretrain, 'fit', fit)
    rest, x = fit_preference(pairs, tmp_path/'part', state=state, **how), torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(rest(x, ['a star']*2), whole(x, ['a star']*2), atol=1e-5, rtol=0)


@pytest.mark.parametrize('extra', [dict(), dict(custom_text=True, init_logit_bias=-10.)],
                         ids=['clip', 'custom_text'])
def test_towers_of_other_kinds(tmp_path, extra):
    "CLIP's own tokenizer, other widths, a text tower of its own: trained, saved, loaded"
    torch.manual_seed(0)
    cfg = dict(embed_dim=24, vision_cfg=dict(image_size=32, patch_size=16, width=64, layers=2, head_width=32),
               text_cfg=dict(context_length=16, vocab_size=49408, width=32, heads=2, layers=2), **extra)
    (tmp_path/'clip').mkdir()
    (tmp_path/'clip/open_clip_config.json').write_text(json.dumps(dict(model_cfg=cfg, preprocess_cfg={})))
    save_file({k: v.contiguous() for k,
               v in open_clip.create_model(f"local-dir:{tmp_path/'clip'}").state_dict().items()},
              tmp_path/'clip/open_clip_model.safetensors')
    r = fit_preference(colour_pairs(8), tmp_path/'p', clip=str(tmp_path/'clip'), steps=2, batch=2, fixed=.5,
                       head=dict(width=16, heads=2))
    x = torch.rand(3, 3, 50, 70)
    torch.testing.assert_close(load_reward(f"preference@{tmp_path/'p'}")(x, ['a dog']*3), r(x, ['a dog']*3))
    torch.testing.assert_close(r(x, ['a dog']*3), torch.cat([r(x[i:i+1], ['a dog']) for i in range(3)]),
                               atol=1e-5, rtol=0)


def test_what_is_fixed_stays(tmp_path):
    fit_preference(colour_pairs(8), tmp_path/'p', CLIP, steps=2, batch=2, fixed=.7,
                   head=dict(width=32, layers=1))
    before, after = read_clip(CLIP).model.state_dict(), load_file(tmp_path/'p/open_clip_model.safetensors')
    net = read_clip(CLIP).model; freeze(net, .7)
    free = {n for n, p in net.named_parameters() if p.requires_grad}
    assert free and all(before[k].equal(v) for k, v in after.items() if k not in free)
    assert any(not before[k].equal(after[k]) for k in free)


def test_gradients_reach_only_what_is_trained():
    tower = read_clip(CLIP); net = new_scorer(tower, layers=1); freeze(net.clip, 1.)
    pairs_loss(colour_pairs(4), tower, 2)(net, 0).backward()
    assert all(p.grad is not None for p in net.judge.parameters())
    assert not [n for n, p in net.clip.named_parameters() if not p.requires_grad and p.grad is not None]


@pytest.mark.parametrize('file, content, what', [
    ('preference.safetensors', b'x'*50, 'preference: .*no whole checkpoint'),
    ('open_clip_model.safetensors', b'x'*50, 'preference: .*no whole checkpoint'),
    ('open_clip_config.json', b'{}', 'preference: .*describes no open_clip model'),
])
def test_broken_folders(tmp_path, file, content, what):
    fit_preference(colour_pairs(4), tmp_path/'p', CLIP, steps=1, batch=2, fixed=1.,
                   head=dict(width=16, layers=1, heads=2))
    (tmp_path/'p'/file).write_bytes(content)
    with pytest.raises(ValueError, match=what) as e: Preference(tmp_path/'p')
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('end', '\x85\u2028\u2029')
def test_a_prompt_may_hold_other_ends_of_lines(tmp_path, end):
    for name in 'ab': save(torch.zeros(3, 8, 8), tmp_path/f'{name}.png')
    row = dict(prompt=f'a cat,{end}a dog', better='a.png', worse='b.png')
    (tmp_path/'pairs.jsonl').write_text(json.dumps(row, ensure_ascii=False) + '\n', encoding='utf-8')
    assert [o[0] for o in read_pairs(tmp_path/'pairs.jsonl')] == [row['prompt']]


def test_choices_follow_bradley_terry():
    "The chosen side was likely to be chosen as often as it was; none of it shows a held-out caption"
    pairs, p = shapes_choices(120, 5)
    assert (abs(p.mean().item() - (p*p + (1-p)**2).mean().item()) < 4*math.sqrt(.25/120)
            and not any(held_out(t) for t, *_ in pairs))
    assert all(a.dtype == torch.uint8 and a.shape == (3, 64, 64) for _, *sides in pairs for a in sides)
    a, b = split_pairs(pairs); assert not {t for t, *_ in a} & {t for t, *_ in b}


def test_damage_is_seeded():
    x = picture('a red circle and a star')
    for how in ('noise', 'broken'):
        assert (degrade(x, how, .7, 1).equal(degrade(x, how, .7, 1))
                and not degrade(x, how, .7, 1).equal(degrade(x, how, .7, 2)))
    assert degrade(torch.full((3, 16, 16), .5), 'broken', 1.).equal(torch.full((3, 16, 16), .5))
