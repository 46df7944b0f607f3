"Compositional rewards: errors, batches, equivalences; `-m slow` writes data/results/rewards-*.json"
import json, math, re, sys, time
from pathlib import Path
import pytest, torch, torch.nn.functional as F
from diffusion_sharpening.rewards.protocol import RewardError
from diffusion_sharpening.rewards.blip_vqa import (
    BlipVQA, load_blip_vqa, noun_phrases, split_by_rules, tiny_blip_vqa, yes_probability)
from diffusion_sharpening.rewards.compbench import (
    CATEGORIES, KINDS, CompBench, by_category, make_sets, read_sets, write_sets)
from diffusion_sharpening.worlds.shapes.benchmark import shapes_sets
from diffusion_sharpening.rewards.spatial import (
    NEAR, SIDES, Spatial, position, read_relation, spatial_score, tiny_owlv2)
from diffusion_sharpening.rewards.vqa import VQAScore, VQAYesNo, tiny_vlm

results = Path(__file__).resolve().parents[1]/'data'/'results'


@pytest.fixture(scope='module')
def dirs(tmp_path_factory):
    d = tmp_path_factory.mktemp('small')
    return dict(vqa=tiny_vlm(d/'vqa'), blip=tiny_blip_vqa(d/'blip'), owl=tiny_owlv2(d/'owl'))


def noise(b, h, w, seed=0): return torch.rand(b, 3, h, w, generator=torch.Generator().manual_seed(seed))


def one_line(e, *words):
    text = str(e.value)
    assert '\n' not in text and all(w in text for w in words), text


# Loading: nothing random, one line each

makers = dict(vqa=VQAScore, blip=BlipVQA, owl=Spatial)
names = dict(vqa='vqa', blip='blip_vqa', owl='spatial_owlv2')

def copied(src, dst):
    import shutil
    return Path(shutil.copytree(src, dst))

def rewrite(dir, change):
    from safetensors.torch import load_file, save_file
    w = load_file(dir/'model.safetensors')
    change(w)
    save_file(w, dir/'model.safetensors', metadata={'format': 'pt'})

def gap(w): w.pop(sorted(k for k in w if 'vision' in k and k.endswith('weight'))[0])
def misfit(w):
    k = sorted(k for k in w if 'vision' in k and k.endswith('weight'))[0]
    w[k] = torch.zeros(*w[k].shape[:-1], w[k].shape[-1] + 1)


def extra(w): w['head_of_another_model.weight'] = torch.zeros(3)

says = dict(gap='lacks 1 weights of', extra='has 1 weights unknown to', other='expected a model of type')

@pytest.mark.parametrize('kind', makers)
@pytest.mark.parametrize('how', ['gap', 'misfit', 'extra', 'truncated', 'no weights', 'no config', 'other'])
def test_broken_checkpoints(dirs, tmp_path, kind, how):
    d = copied(dirs[kind], tmp_path/'bad')
    if how in ('gap', 'misfit', 'extra'): rewrite(d, globals()[how])
    if how == 'truncated': (d/'model.safetensors').write_bytes((d/'model.safetensors').read_bytes()[:5000])
    if how == 'no weights': (d/'model.safetensors').unlink()
    if how == 'no config': (d/'config.json').unlink()
    if how == 'other':
        other = dirs['blip' if kind == 'owl' else 'owl']
        for f in ('config.json', 'model.safetensors'): (d/f).write_bytes((other/f).read_bytes())
    with pytest.raises(ValueError) as e: makers[kind](d)
    one_line(e, names[kind] + ':', '' if kind == 'vqa' and how == 'other' else says.get(how, ''))


@pytest.mark.parametrize('kind', makers)
def test_names_that_lead_nowhere(kind, tmp_path, monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    with pytest.raises(ValueError) as e: makers[kind](tmp_path/'nothing')
    one_line(e, names[kind] + ':', 'no such file or folder')
    with pytest.raises(ValueError) as e: makers[kind]('no-such-owner-xyz/no-such-model-xyz')
    one_line(e, names[kind] + ':', 'no-such-model-xyz', 'hf ')


def test_text_only_model_is_no_vqa(dirs, tmp_path):
    from transformers import AutoTokenizer
    AutoTokenizer.from_pretrained(dirs['vqa']).save_pretrained(tmp_path/'words')
    (tmp_path/'words'/'config.json').write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError) as e: VQAScore(tmp_path/'words')
    one_line(e, 'vqa:')


def test_blip_wants_its_own_vocabulary(dirs, tmp_path):
    d = copied(dirs['blip'], tmp_path/'bad')
    vocab = json.loads((d/'tokenizer.json').read_text())
    vocab['model']['vocab']['maybe'] = vocab['model']['vocab'].pop('yes')
    (d/'tokenizer.json').write_text(json.dumps(vocab))
    (d/'vocab.txt').write_text((d/'vocab.txt').read_text().replace('\nyes\n', '\nmaybe\n'))
    with pytest.raises(ValueError) as e: BlipVQA(d)
    one_line(e, 'blip_vqa:', 'bert-base-uncased')


# Batches, shapes, limits

def test_batches_of_any_split_agree(dirs):
    texts = ['a red circle and a blue star', 'a cup', 'three small green hearts near a box', 'a dog', 'a cat']
    ims = noise(5, 50, 70)
    for r in (VQAScore(dirs['vqa']), VQAYesNo(dirs['vqa']), BlipVQA(dirs['blip'], how='rules', size=64)):
        whole = r(ims, texts); r.batch = 2
        assert torch.allclose(whole, r(ims, texts), atol=1e-5), r.name
        assert torch.allclose(whole, torch.cat([r(ims[i:i+1], texts[i:i+1]) for i in range(5)]), atol=1e-5), (
            r.name)


def test_vqa_without_chat_template(dirs, tmp_path):
    d = copied(dirs['vqa'], tmp_path/'plain'); (d/'chat_template.jinja').unlink()
    with pytest.raises(ValueError) as e: VQAScore(d)
    one_line(e, 'vqa:', 'template=')
    ours = VQAScore(d, template='USER: <image>\n{} ASSISTANT:')
    assert torch.allclose(ours(noise(1, 32, 32), ['a cup']),
                          VQAScore(dirs['vqa'])(noise(1, 32, 32), ['a cup']), atol=1e-6)


def test_prompts_past_the_limit(dirs):
    with pytest.raises(ValueError) as e: VQAScore(dirs['vqa'])(noise(1, 32, 32), ['a very long prompt '*40])
    one_line(e, 'vqa:', 'the model reads 512')
    with pytest.warns(UserWarning, match='cut at 35 tokens'):
        BlipVQA(dirs['blip'], phrases={'x': ['long'*20]}, size=64)(noise(1, 32, 32), ['x'])
    with pytest.warns(UserWarning, match='cut at 16 tokens'):
        Spatial(dirs['owl'])(noise(1, 32, 32), ['a cathedral on the left of a hippopotamus'])


def test_blip_gradient(dirs):
    r, x = BlipVQA(dirs['blip'], how='rules', size=64), noise(2, 40, 60).requires_grad_()
    r(x, ['a red circle and a blue star', 'a cup']).sum().backward()
    d, h = x.grad.sign(), 2e-4
    with torch.no_grad():
        num = (r(x + h*d, ['a red circle and a blue star', 'a cup'])
               - r(x - h*d, ['a red circle and a blue star', 'a cup'])).sum()/(2*h)
    assert abs(num.item()/(x.grad*d).sum().item() - 1) < .05


@pytest.mark.parametrize('prompt, want', {
    'an orange kite and an oval mirror': ['an orange kite', 'an oval mirror'],
    'A small white kitchen with brown wood floor.': ['a small white kitchen', 'brown wood floor'],
    'two owls under the wooden table': ['two owls', 'the wooden table'],
    'The postman was standing near a red, old door': ['the postman', 'a red', 'old door'],
    'goats': ['goats'], 'on top of the hill': ['the hill'],
    'a cup on the left side of a plate': ['a cup', 'a plate'],
    'The candle is next to the vase in front of a mirror': ['the candle', 'the vase', 'a mirror']}.items())
def test_rule_splitter(prompt, want): assert split_by_rules(prompt) == want


def test_phrases_by_spacy(monkeypatch):
    from types import SimpleNamespace as N
    from diffusion_sharpening.rewards import blip_vqa
    chunks = [N(text=t) for t in ('The red hat', 'top', 'the left', 'the brown rack')]
    monkeypatch.setattr(blip_vqa, '_spacy', lambda: lambda text: N(noun_chunks=chunks))
    assert noun_phrases('…') == (['The red hat', 'the brown rack'], 'spacy')
    assert noun_phrases('a cup', 'rules') == (['a cup'], 'rules')


# Geometry, against the benchmark's rules written out case by case

def by_the_book(relation, a, b, bar=.1, near=150):
    ax, ay, bx, by = (a[0]+a[2])/2, (a[1]+a[3])/2, (b[0]+b[2])/2, (b[1]+b[3])/2
    x, y = bx - ax, by - ay
    inter = max(0, min(a[2], b[2])-max(a[0], b[0]))*max(0, min(a[3], b[3])-max(a[1], b[1]))
    u = inter/((a[2]-a[0])*(a[3]-a[1]) + (b[2]-b[0])*(b[3]-b[1]) - inter)
    soft = 1 if u < bar else bar/u
    if relation in NEAR:
        if abs(x) < near or abs(y) < near: return 1
        return near/max(abs(x), abs(y))
    if relation == 'on the right of': return soft if x < 0 and abs(x) > abs(y) else 0
    if relation == 'on the left of': return soft if x > 0 and abs(x) > abs(y) else 0
    if relation == 'on the bottom of': return soft if y < 0 and abs(y) > abs(x) else 0
    if relation == 'on the top of': return soft if y > 0 and abs(y) > abs(x) else 0


def test_geometry_on_random_boxes():
    g = torch.Generator().manual_seed(0)
    for scale in (60, 200, 512):
        for row in torch.rand(300, 8, generator=g)*scale:
            a, b = ((*r[:2].tolist(), *(r[:2] + r[2:]/2 + 1).tolist()) for r in (row[:4], row[4:]))
            for rel in (*SIDES, *NEAR):
                assert position(rel, a, b) == pytest.approx(by_the_book(rel, a, b)), rel


def test_spatial_score_cases():
    box = (0., 0., 10., 10.), (60., 0., 70., 10.)
    for ca, cb in ((.1, .2), (.9, .9), (1., 1.)):
        got = spatial_score('on the left of', (box[0], ca), (box[1], cb))
        assert got == pytest.approx(.5 + .25*(ca + cb))
    assert spatial_score('on the left of', None, None) == 0 == spatial_score('near', None, (box[0], 1.))
    assert read_relation('A big cat ON THE LEFT OF a lamp') == ('a big cat', 'on the left of', 'a lamp')


def test_spatial_names_the_prompt_without_a_relation(dirs):
    with pytest.raises(RewardError) as e:
        Spatial(dirs['owl'])(noise(2, 32, 32), ['a cup near a cat', 'two cats'])
    one_line(e, 'prompt 1', 'two cats')


# Prompt sets and the 3-in-1

def test_sets_round_trip(tmp_path):
    for split in ('train', 'val'):
        sets = make_sets(20, split, seed=4)
        assert read_sets(write_sets(tmp_path, sets, split), split) == sets
    assert sorted(p.name for p in tmp_path.iterdir() if 'complex' in p.name and 'val' in p.name) == [
        'complex_val.txt', 'complex_val_action.txt', 'complex_val_spatial.txt',
        'complex_val_spatialaction.txt']


def test_a_prompt_ends_where_its_line_ends(tmp_path):
    "Not at the other signs that Python's own way of splitting lines ends lines at"
    texts = [f'a red{c}cube and a blue{c}drum' for c in '\u2028\u2029\x85\v\f\x1c\x1d\x1e']
    write_sets(tmp_path, dict(color=texts))
    assert read_sets(tmp_path)['color'] == texts
    lines = '\r\n'.join(['', *texts, ' ', ''])
    (tmp_path/'color_val.txt').write_bytes(lines.encode('utf-8-sig'))
    assert read_sets(tmp_path)['color'] == texts
    for data, why in ((b' \r\n\n', 'expected a prompt a line'), (b'a caf\xe9', 'save the file as UTF-8')):
        (tmp_path/'color_val.txt').write_bytes(data)
        with pytest.raises(ValueError, match=why): read_sets(tmp_path)


def test_val_and_train_never_meet():
    a, b = (set(sum(make_sets(60, s, seed).values(), [])) for s, seed in (('train', 0), ('val', 1)))
    assert not a & b


def test_compbench_with_published_architectures(dirs):
    "Small models of the real kinds behind every row"
    from diffusion_sharpening.rewards.protocol import Reward
    class Flat(Reward):
        name = 'flat'
        def score(self, images, prompts):
            self.seen = prompts
            return torch.full((len(prompts),), .25)
    sets, flat = make_sets(4, seed=2), Flat()
    blip, owl = BlipVQA(dirs['blip'], how='rules', size=32), Spatial(dirs['owl'])
    bench = CompBench(sets, dict(attribute=blip, spatial=owl, action=flat))
    texts = [p for c in CATEGORIES for p in sets[c]]*2
    ims = noise(len(texts), 32, 48)
    scores = bench(ims, texts)
    rows = by_category(scores, texts, bench)
    assert [(r['category'], r['prompts'], r['images']) for r in rows] == [(c, 4, 8) for c in CATEGORIES]
    assert [r['judge'] for r in rows] == ['blip_vqa']*3 + ['spatial_owlv2', 'flat', '3-in-1']
    cats = bench.categories(texts)
    i = next(k for k, c in enumerate(cats) if c == 'complex')
    A = blip(ims[i:i+1], texts[i:i+1])
    S = owl(ims[i:i+1], texts[i:i+1]) if read_relation(texts[i]) else torch.zeros(1)
    kind = next(k for k in KINDS if texts[i] in sets[f'complex_{k}'])
    want = dict(spatial=(A+S)/2, action=(A+.25)/2, spatialaction=(A+S+.25)/3)[kind]
    assert torch.allclose(scores[i:i+1], want, atol=1e-5)
    # adjectives dropped for the deed
    assert not any('red ' in p for p in flat.seen)
    assert len(shapes_sets(3)['complex']) == 3


# BLIP for questions, written out plainly from its papers: the authors' tensors in, the probability out

def linear(s, k, x): return x @ s[f'{k}.weight'].T + s[f'{k}.bias']
def norm(s, k, x, eps): return F.layer_norm(x, x.shape[-1:], s[f'{k}.weight'], s[f'{k}.bias'], eps)

def attend(q, k, v, heads, mask=None):
    cut = lambda x: x.view(*x.shape[:2], heads, -1).transpose(1, 2)
    q, k, v = cut(q), cut(k), cut(v)
    a = q @ k.transpose(-1, -2)/math.sqrt(q.shape[-1])
    if mask is not None: a = a.masked_fill(~mask[:, None, None], -1e9)
    return (a.softmax(-1) @ v).transpose(1, 2).flatten(2)

def plain_vit(s, x, patch, heads):
    x = F.conv2d(x, s['visual_encoder.patch_embed.proj.weight'], s['visual_encoder.patch_embed.proj.bias'],
                 stride=patch)
    x = torch.cat([s['visual_encoder.cls_token'].expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1)
    x = x + s['visual_encoder.pos_embed']
    for i in range(sum(k.endswith('attn.qkv.weight') for k in s)):
        p = f'visual_encoder.blocks.{i}'
        q, k, v = linear(s, f'{p}.attn.qkv', norm(s, f'{p}.norm1', x, 1e-6)).chunk(3, -1)
        x = x + linear(s, f'{p}.attn.proj', attend(q, k, v, heads))
        x = x + linear(s, f'{p}.mlp.fc2', F.gelu(linear(s, f'{p}.mlp.fc1', norm(s, f'{p}.norm2', x, 1e-6))))
    return norm(s, 'visual_encoder.norm', x, 1e-6)

def plain_bert(s, root, ids, mask, other, other_mask, heads):
    "Post-norm BERT with cross-attention; one token or all at once, so causal or not is the same here"
    x = (s[f'{root}.embeddings.word_embeddings.weight'][ids]
         + s[f'{root}.embeddings.position_embeddings.weight'][:ids.shape[1]])
    x = norm(s, f'{root}.embeddings.LayerNorm', x, 1e-12)
    for i in range(len({k for k in s if re.fullmatch(rf'{root}\.encoder\.layer\.\d+\.output\.dense\.weight',
                                                     k)})):
        p = f'{root}.encoder.layer.{i}'
        for part, y, m in (('attention', None, mask), ('crossattention', other, other_mask)):
            y = x if y is None else y
            q, k, v = (linear(s, f'{p}.{part}.self.{n}', z) for n,
                       z in (('query', x), ('key', y), ('value', y)))
            a = linear(s, f'{p}.{part}.output.dense', attend(q, k, v, heads, m))
            x = norm(s, f'{p}.{part}.output.LayerNorm', a + x, 1e-12)
        h = linear(s, f'{p}.output.dense', F.gelu(linear(s, f'{p}.intermediate.dense', x)))
        x = norm(s, f'{p}.output.LayerNorm', h + x, 1e-12)
    return x

def plain_blip(s, pixels, owner, ids, mask, heads, yes, no, enc, dec):
    seen = plain_vit(s, pixels, s['visual_encoder.patch_embed.proj.weight'].shape[-1], heads)[owner]
    ids = ids.clone(); ids[:, 0] = enc
    states = plain_bert(s, 'text_encoder', ids, mask.bool(), seen, None, heads)
    x = plain_bert(s, 'text_decoder.bert', torch.full((len(ids), 1), dec), None, states, mask.bool(),
                   heads)[:, 0]
    head = 'text_decoder.cls.predictions'
    x = norm(s, f'{head}.transform.LayerNorm', F.gelu(linear(s, f'{head}.transform.dense', x)), 1e-12)
    p = (x @ s[f'{head}.decoder.weight'].T + s[f'{head}.bias']).softmax(-1)
    return p[:, yes]/(p[:, yes] + p[:, no])


def original_state(width, layers, vocab, side, patch, inner, positions, seed=0):
    "Random tensors in the layout of the authors' file"
    g = torch.Generator().manual_seed(seed)
    s = {}
    def lin(k, o, i): s[f'{k}.weight'], s[f'{k}.bias'] = (torch.randn(o, i, generator=g)*1.2/i**.5,
                                                          torch.randn(o, generator=g)*.05)
    def ln(k): s[f'{k}.weight'], s[f'{k}.bias'] = (1 + .1*torch.randn(width, generator=g),
                                                   .1*torch.randn(width, generator=g))
    s['visual_encoder.cls_token'] = torch.randn(1, 1, width, generator=g)*.5
    s['visual_encoder.pos_embed'] = torch.randn(1, (side//patch)**2 + 1, width, generator=g)*.5
    s['visual_encoder.patch_embed.proj.weight'] = torch.randn(width, 3, patch, patch,
                                                              generator=g)/(3*patch*patch)**.5
    s['visual_encoder.patch_embed.proj.bias'] = torch.zeros(width)
    ln('visual_encoder.norm')
    for i in range(layers):
        p = f'visual_encoder.blocks.{i}'
        ln(f'{p}.norm1')
        ln(f'{p}.norm2')
        lin(f'{p}.attn.qkv', 3*width, width)
        lin(f'{p}.attn.proj', width, width)
        lin(f'{p}.mlp.fc1', inner, width); lin(f'{p}.mlp.fc2', width, inner)
    for root in ('text_encoder', 'text_decoder.bert'):
        s[f'{root}.embeddings.word_embeddings.weight'] = torch.randn(vocab, width, generator=g)*.5
        s[f'{root}.embeddings.position_embeddings.weight'] = torch.randn(positions, width, generator=g)*.5
        s[f'{root}.embeddings.position_ids'] = torch.arange(positions)[None]
        ln(f'{root}.embeddings.LayerNorm')
        for i in range(layers):
            p = f'{root}.encoder.layer.{i}'
            for part in ('attention', 'crossattention'):
                for n in ('query', 'key', 'value'): lin(f'{p}.{part}.self.{n}', width, width)
                lin(f'{p}.{part}.output.dense', width, width); ln(f'{p}.{part}.output.LayerNorm')
            lin(f'{p}.intermediate.dense', inner, width); lin(f'{p}.output.dense', width, inner)
            ln(f'{p}.output.LayerNorm')
    head = 'text_decoder.cls.predictions'
    lin(f'{head}.transform.dense', width, width); ln(f'{head}.transform.LayerNorm')
    s[f'{head}.decoder.weight'] = s['text_decoder.bert.embeddings.word_embeddings.weight']
    s[f'{head}.bias'] = s[f'{head}.decoder.bias'] = .1*torch.randn(vocab, generator=g)
    return s


def vocabulary(dir, size, yes=None, no=None):
    "A folder with a word-piece tokenizer of `size` words that spells with letters"
    from transformers import BertTokenizer
    dir.mkdir(parents=True, exist_ok=True)
    letters = [a + c for c in "abcdefghijklmnopqrstuvwxyz?'-," for a in ('', '##')]
    words = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *letters]
    words += [f'[unused{i}]' for i in range(size - len(words))]
    for k, w in ((yes or size-2, 'yes'), (no or size-1, 'no')): words[k] = w
    (dir/'vocab.txt').write_text('\n'.join(words) + '\n')
    BertTokenizer.from_pretrained(dir).save_pretrained(dir)
    return dir


def against_plain(s, tok_dir, file, heads, questions, owner, pixels):
    "Largest difference between the reward and the plain one, which gets padded questions with a mask"
    torch.save({'model': s}, file)
    start = time.process_time(); net, tok = load_blip_vqa(file, tok_dir); load = time.process_time() - start
    start = time.process_time()
    with torch.no_grad(): ours = yes_probability(net, tok, pixels, questions, torch.tensor(owner))
    took = time.process_time() - start
    parameters = sum(p.numel() for p in net.parameters())
    del net
    q = tok(questions, padding=True, return_tensors='pt')
    yes, no = (tok.convert_tokens_to_ids(w) for w in ('yes', 'no'))
    vocab = len(s['text_encoder.embeddings.word_embeddings.weight'])
    with torch.no_grad():
        plain = plain_blip(s, pixels, owner, q.input_ids, q.attention_mask, heads, yes, no, vocab-1, vocab-2)
    return ours, plain, dict(load_s=load, forward_s=took, parameters=parameters)


questions = ['a red circle?', 'a large striped blue star?', 'box?']


def test_blip_equals_the_plain_one(tmp_path):
    s = original_state(128, 2, 90, 64, 16, 192, 48)
    tok = vocabulary(tmp_path/'tok', 88)
    ours, plain, _ = against_plain(s, tok, tmp_path/'blip.pth', 2, questions, [0, 0, 1],
                                   noise(2, 64, 64) - .5)
    assert (ours - plain).abs().max() < 1e-5 and plain.std() > 1e-3


def test_original_file_with_a_gap(tmp_path):
    s = original_state(64, 1, 90, 32, 16, 96, 48)
    s.pop('text_decoder.bert.encoder.layer.0.crossattention.self.key.bias')
    torch.save({'model': s}, tmp_path/'gap.pth')
    with pytest.raises(ValueError) as e: BlipVQA(tmp_path/'gap.pth', tokenizer=vocabulary(tmp_path/'tok', 88))
    one_line(e, 'blip_vqa:', 'missing')
    (tmp_path/'cut.pth').write_bytes((tmp_path/'gap.pth').read_bytes()[:4000])
    with pytest.raises(ValueError) as e: BlipVQA(tmp_path/'cut.pth', tokenizer=tmp_path/'tok')
    one_line(e, 'blip_vqa:', 'no whole checkpoint')


# Full sizes, once, with their numbers

def record(name, **numbers):
    sys.path.insert(0, str(results.parents[1]/'nbs'/'_dev'))
    from results import write
    seconds = 'of processor time on one core, since the machine was shared'
    write(f'rewards-{name}', dict(weights='random', seconds=seconds) | numbers)

def timed(f, n=3):
    f(); start = time.process_time()
    for _ in range(n): f()
    return (time.process_time() - start)/n


@pytest.mark.slow
def test_full_size_blip_vqa(tmp_path):
    "ViT-B at 480 pixels and both text models of 12 layers, random, against the plain one"
    s = original_state(768, 12, 30524, 480, 16, 3072, 512)
    tok = vocabulary(tmp_path/'tok', 30522, 2748, 2053)
    ours, plain, about = against_plain(s, tok, tmp_path/'blip.pth', 12, questions, [0, 0, 0],
                                       noise(1, 480, 480) - .5)
    diff = (ours - plain).abs().max().item()
    record('blip_vqa',
           what='BLIP-VQA at full size against an independent implementation written out in the test',
           questions=len(questions), pictures=1, max_abs_diff=diff, scores=ours.tolist(),
           s_per_image=about['forward_s'], **about)
    assert diff < 1e-5


@pytest.mark.slow
def test_numbers_of_vqa(dirs):
    r, ims = VQAScore(dirs['vqa']), noise(32, 64, 64)
    texts = [f'a {c} cup near {n} small boxes' for c in ('red', 'blue', 'pale green', 'black')
             for n in range(8)]
    whole, alone = r(ims, texts), torch.cat([r(ims[i:i+1], texts[i:i+1]) for i in range(32)])
    batch, single = (timed(lambda: r(ims, texts)),
                     timed(lambda: [r(ims[i:i+1], texts[i:i+1]) for i in range(32)], 1))
    record('vqa', what='VQAScore with the tiny LLaVA', pictures=32,
           parameters=sum(p.numel() for p in r.model.parameters()),
           max_abs_diff_batch_single=(whole - alone).abs().max().item(),
           images_per_s_batched=32/batch, images_per_s_one_by_one=32/single)
    assert torch.allclose(whole, alone, atol=1e-5)


@pytest.mark.slow
def test_full_size_owlv2(tmp_path):
    "The published configuration (ViT-B/16 at 960 pixels) with random weights through the loader"
    from transformers import Owlv2Config, Owlv2ForObjectDetection, Owlv2ImageProcessor, Owlv2Processor
    from diffusion_sharpening.models.tiny import make_tokenizer
    tok = make_tokenizer(tmp_path, ['a', 'photo', 'of', 'cup', 'cat'], max_length=16)
    Owlv2Processor(Owlv2ImageProcessor(), tok).save_pretrained(tmp_path)
    cfg = Owlv2Config(vision_config=dict(image_size=960, patch_size=16))
    cfg.text_config.bos_token_id, cfg.text_config.eos_token_id = tok.bos_token_id, tok.eos_token_id
    net = Owlv2ForObjectDetection(cfg); parameters = sum(p.numel() for p in net.parameters())
    net.save_pretrained(tmp_path); del net
    start = time.process_time(); r = Spatial(tmp_path, threshold=0.); load = time.process_time() - start
    start = time.process_time(); score = r(noise(1, 512, 512), ['a cup on the left of a cat'])
    record('spatial', what='OWLv2 of the published configuration with random weights: loads and runs',
           parameters=parameters, load_s=load, s_per_image=time.process_time() - start, score=score.item())
    assert score.item() == 0 or score.item() >= .5
