"CLIP score, aesthetic, HPS and PickScore: names, errors, towers, and (slow) the architectures at full size"
import gc, json, sys, time, warnings
from pathlib import Path

import pytest, torch

open_clip = pytest.importorskip('open_clip')
transformers = pytest.importorskip('transformers')
from PIL import Image
from safetensors.torch import save_file
from torchvision.transforms import functional as TF
from diffusion_sharpening.worlds.world import weights
from diffusion_sharpening.rewards import aesthetic, clip, human
from diffusion_sharpening.rewards.aesthetic import Aesthetic, fit_aesthetic
from diffusion_sharpening.names.catalog import load_reward
from diffusion_sharpening.rewards.clip import (
    CLIPScore, find_clip, load_clip, new_model, preprocess, read_clip)
from diffusion_sharpening.rewards.human import HPS, PickScore

CLIP = weights('shapes-clip')

root = Path(__file__).resolve().parents[1]
torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()
PROMPTS = ['a red circle to the left of a striped blue square', 'a photograph of a lighthouse, in the rain']


def smooth(h, w, n=2, seed=0):
    "Pictures that are easy to resize: coarse noise, enlarged, in eight bits"
    x = torch.rand(n, 3, h//24, w//24, generator=torch.Generator().manual_seed(seed))
    return (torch.nn.functional.interpolate(x, (h, w), mode='bicubic').clamp(0, 1)*255).round()/255


def pil(x): return [Image.fromarray((o.permute(1, 2, 0)*255).round().byte().numpy()) for o in x]


@pytest.fixture
def offline(monkeypatch):
    "No network, and an empty cache"
    import huggingface_hub.constants as c
    monkeypatch.setattr(c, 'HF_HUB_OFFLINE', True)
    def no(*args, **kwargs): raise OSError('no network')
    monkeypatch.setattr(torch.hub, 'download_url_to_file', no)


@pytest.mark.parametrize('make, what', [
    (lambda: CLIPScore(), r'clip: could not get timm/vit_large_patch14_clip_224.openai: .*hf download timm/'),
    (lambda: HPS(),
     r'hps: could not get HPS_v2.1_compressed.pt of xswu/HPSv2: .*hf download xswu/HPSv2 HPS_v2'),
    (lambda: PickScore(), r'pickscore: could not get .*: .*hf download .*'),
    (lambda: load_reward('clip@#scale=100'), r'clip: could not get timm/'),
    (lambda: load_reward('pickscore@/no/such/folder'), 'pickscore: no such file or folder: /no/such/folder'),
    (lambda: load_reward('hps@/no/such/file.pt'), 'hps: no such file or folder'),
    (lambda: load_reward('aesthetic@/no/such/file.pth'), 'aesthetic: no such file or folder'),
    (lambda: load_reward('clip@ViT-B-32/nobody'), 'clip: expected a folder, or model/weights'),
])
def test_errors_are_one_line_that_helps(offline, tmp_path, monkeypatch, make, what):
    monkeypatch.setenv('HF_HUB_CACHE', str(tmp_path))
    with pytest.raises(ValueError, match=what) as e: make()
    assert '\n' not in str(e.value)


def test_no_head_without_network(offline, tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    with pytest.raises(ValueError, match='aesthetic: no download: OSError; .* curl -fL -o sac') as e:
        Aesthetic()
    assert '\n' not in str(e.value)


def test_a_head_with_another_checksum_is_fetched_again(tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    seen, head = [], tmp_path/'hub/checkpoints/sac+logos+ava1-l14-linearMSE.pth'
    monkeypatch.setattr(torch.hub, 'download_url_to_file', lambda url, path,
                        **k: seen.append((url, path, k['hash_prefix'])))
    head.parent.mkdir(parents=True); head.write_bytes(b'half')
    aesthetic.laion_head()
    assert seen == [(aesthetic.LAION, str(head), aesthetic.SHA256)]


def test_towers_are_shared_and_let_go(tmp_path):
    gc.collect(); clip._towers.clear()
    g = torch.Generator().manual_seed(0)
    a = CLIPScore(CLIP)
    b = fit_aesthetic(tmp_path, torch.rand(8, 3, 64, 64, generator=g), torch.rand(8, generator=g), CLIP)
    c = CLIPScore(CLIP, scale=100)
    assert a.tower is b.tower is c.tower and len(clip._towers) == 1
    assert read_clip(CLIP) is not a.tower and load_clip(CLIP, resize_mode='squash') is not a.tower
    del a, b, c; gc.collect()
    assert not len(clip._towers)


def test_mixture_of_two_rewards_on_one_tower(tmp_path):
    g = torch.Generator().manual_seed(0)
    x = torch.rand(3, 3, 64, 64, generator=g)
    fit_aesthetic(tmp_path/'head', x.repeat(2, 1, 1, 1), torch.rand(6, generator=g), CLIP)
    both = load_reward(f"clip@shapes:2,aesthetic@{tmp_path/'head'}:.5")
    one, two = both.rewards
    assert one.tower is two.tower
    torch.testing.assert_close(both(x, ['a star']*3), 2*one(x, ['a star']*3) + .5*two(x, ['a star']*3))


def test_text_cache_serves_training_after_inference_mode():
    r, x = CLIPScore(CLIP), torch.rand(1, 3, 64, 64)
    r.tower.texts.clear()
    with torch.inference_mode(): r(x, ['a red star'])
    x.requires_grad_(); r(x, ['a red star']).sum().backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize('extra', [
    dict(),
    dict(quick_gelu=True),
    dict(custom_text=True, init_logit_bias=-10.),
    dict(custom_text=True, timm='vit_tiny_patch16_224'),
], ids=['clip', 'quick_gelu', 'custom_text', 'timm'])
def test_folders_equal_open_clip(tmp_path, extra):
    "A folder as the hub has them, of other architectures, squashed pictures: features are those of open_clip"
    torch.manual_seed(0)
    extra = dict(extra); timm = extra.pop('timm', None)
    vision = dict(image_size=64, patch_size=16, width=64, layers=2, head_width=32)
    if timm: vision = dict(timm_model_name=timm, timm_pool='avg', timm_proj='linear', image_size=224)
    cfg = dict(embed_dim=32, vision_cfg=vision,
               text_cfg=dict(context_length=77, vocab_size=49408, width=32, heads=2, layers=2), **extra)
    pre = dict(mean=[.5]*3, std=[.5]*3, interpolation='bicubic', resize_mode='squash')
    (tmp_path/'open_clip_config.json').write_text(json.dumps(dict(model_cfg=cfg, preprocess_cfg=pre)))
    path = f'local-dir:{tmp_path}'
    made = open_clip.create_model(path)
    save_file({k: v.contiguous() for k, v in made.state_dict().items()},
              tmp_path/'open_clip_model.safetensors')
    theirs, _, transform = open_clip.create_model_and_transforms(path)
    theirs.eval(); x = smooth(96, 144)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        v = theirs.encode_image(torch.stack([transform(o) for o in pil(x)]), normalize=True)
        t = theirs.encode_text(open_clip.get_tokenizer(path)(PROMPTS), normalize=True)
    ours = read_clip(str(tmp_path))
    assert ours.cfg["resize_mode"] == "squash"
    torch.testing.assert_close(ours.text(PROMPTS), t, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.image(x), v, atol=2e-2, rtol=0)          # eight bits after their resize
    with torch.no_grad(): exact = theirs.encode_image(preprocess(x, ours.cfg), normalize=True)
    torch.testing.assert_close(ours.image(x), exact, atol=1e-5, rtol=0)


# Full size, random weights, once: `pytest -m slow`

def record(name, **found):
    "Keep what was measured"
    sys.path.insert(0, str(root/'nbs'/'_dev'))
    from results import write
    write(f'rewards-{name}', dict(weights='random, of the published architecture') | found,
          ['open_clip_torch'])


def random_state(net, seed=0):
    "Values for a model without any, such that features differ from picture to picture"
    g, out = torch.Generator().manual_seed(seed), {}
    for k, v in net.state_dict().items():
        if not v.is_floating_point(): out[k] = torch.arange(v.numel()).reshape(v.shape)
        elif v.ndim < 2:
            out[k] = torch.full(v.shape, 1. if k.endswith('weight') else 4.6 if 'logit' in k else 0.)
        else: out[k] = torch.empty(v.shape).normal_(0, .03, generator=g)
    return out


def seconds(f):
    "Processor seconds of a call, and what it returns"
    start = time.process_time(); out = f()
    return round(time.process_time()-start, 2), out


def reference(arch, state):
    "open_clip's own model with these values"
    with torch.device('meta'): net = open_clip.create_model(arch, load_weights=False, device='meta')
    net.load_state_dict(state, strict=True, assign=True)
    net.attn_mask = torch.full(net.attn_mask.shape, float('-inf')).triu(1)
    return net.eval()


@pytest.mark.slow
@torch.no_grad()
def test_full_size_aesthetic(tmp_path):
    "ViT-L/14 and the five-layer head, one picture after the other through PIL, against the reward"
    arch = 'ViT-L-14-quickgelu'
    state = random_state(new_model(open_clip.get_model_config(arch))); torch.save(state, tmp_path/'l14.pt')
    torch.manual_seed(1); sizes = [768, 1024, 128, 64, 16, 1]
    layers = torch.nn.ModuleDict({str(i): torch.nn.Linear(*sizes[j:j+2]) for j,
                                  i in enumerate((0, 2, 4, 6, 7))})
    torch.save({f'layers.{k}': v for k, v in layers.state_dict().items()}, tmp_path/'head.pth')
    transform = open_clip.image_transform(224, False)
    net, tok, x = reference(arch, state), open_clip.get_tokenizer(arch), smooth(384, 512)
    def naive(o):
        v = net.encode_image(transform(o)[None], normalize=True); e = v
        for l in layers.values(): e = l(e)
        return e[0, 0], (v*net.encode_text(tok(PROMPTS[0]), normalize=True)).sum()
    slow, rows = seconds(lambda: [naive(o) for o in pil(x)])
    exact = net.encode_image(preprocess(x, dict(size=224, mean=open_clip.OPENAI_DATASET_MEAN,
                                                std=open_clip.OPENAI_DATASET_STD)), normalize=True)
    for l in layers.values(): exact = l(exact)
    del net, state; gc.collect()
    load, ours = seconds(lambda: Aesthetic(tmp_path/'head.pth', f"{arch}/{tmp_path/'l14.pt'}"))
    score = CLIPScore(f"{arch}/{tmp_path/'l14.pt'}")
    fast, r = seconds(lambda: ours(x, ['']*2))
    a, c = (torch.stack([o[i] for o in rows]) for i in range(2))
    diff, through, cos = ((p - q).abs().max().item() for p,
                          q in ((r, exact[:, 0]), (r, a), (score(x, [PROMPTS[0]]*2), c)))
    (tmp_path/'l14.pt').unlink()
    record('aesthetic', reference='open_clip tower and the uncollapsed five-layer head', max_abs_diff=diff,
           max_abs_diff_through_pil=through, clip_score_max_abs_diff_through_pil=cos,
           spread_of_scores=r.std().item(),
           cpu_seconds=dict(load=load, image_batch_of_2=fast/2, image_alone_through_pil_with_text=slow/2))
    assert score.tower is ours.tower and diff < 1e-5 and through < 1e-2 and cos < 1e-3


@pytest.mark.slow
@torch.no_grad()
def test_full_size_hps(tmp_path):
    "ViT-H/14 of open_clip, with the original's transform on tensors, one picture after the other"
    file = tmp_path/'HPS_v2.1_compressed.pt'
    state = random_state(new_model(open_clip.get_model_config('ViT-H-14')))
    torch.save(dict(epoch=0, state_dict=state), file)
    net, tok, x = reference('ViT-H-14', state), open_clip.get_tokenizer('ViT-H-14'), smooth(384, 512)
    def naive(o, text):
        y = TF.resize(TF.to_tensor(o), [168, 224], TF.InterpolationMode.BICUBIC)
        y = TF.normalize(TF.pad(y, [0, 28, 0, 28], 0), open_clip.OPENAI_DATASET_MEAN,
                         open_clip.OPENAI_DATASET_STD)
        return (net.encode_image(y[None], normalize=True)*net.encode_text(tok([text]), normalize=True)).sum()
    slow, theirs = seconds(lambda: torch.stack([naive(*o) for o in zip(pil(x), PROMPTS)]))
    del net, state; gc.collect()
    load, hps = seconds(lambda: HPS(str(tmp_path)))
    fast, ours = seconds(lambda: hps(x, PROMPTS))
    diff = (ours - theirs).abs().max().item()
    file.unlink()
    record('hps',
           reference='features of plain open_clip, pictures resized on tensors and padded as by the original',
           max_abs_diff=diff, scores=ours.tolist(),
           parameters=sum(p.numel() for p in hps.tower.model.parameters()),
           cpu_seconds=dict(load=load, image_batch_of_2=fast/2, image_alone_through_pil=slow/2))
    assert diff < 1e-5


def write_bpe(folder):
    "CLIP's vocabulary, as it comes with open_clip, in the files of transformers"
    tok = open_clip.SimpleTokenizer()
    marks = {'<start_of_text>': '<|startoftext|>', '<end_of_text>': '<|endoftext|>'}
    (folder/'vocab.json').write_text(json.dumps({marks.get(k, k): i for k, i in tok.encoder.items()}))
    (folder/'merges.txt').write_text('\n'.join(['#version: 0.2', *map(' '.join, tok.bpe_ranks)]))
    (folder/'tokenizer_config.json').write_text(json.dumps(dict(
        tokenizer_class='CLIPTokenizer', model_max_length=77, unk_token='<|endoftext|>',
        pad_token='<|endoftext|>',
        bos_token='<|startoftext|>', eos_token='<|endoftext|>')))


def test_bpe_of_transformers_equals_open_clip(tmp_path):
    write_bpe(tmp_path)
    tok = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    theirs = open_clip.SimpleTokenizer()(PROMPTS)
    for row, text in zip(theirs.tolist(), PROMPTS):
        ids = tok(text)['input_ids']; assert row[:len(ids)] == ids


@pytest.mark.slow
@torch.no_grad()
def test_full_size_pickscore(tmp_path):
    "CLIP-H of transformers: its own forward pass and picture processor, against the reward"
    text = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
                hidden_act='gelu', projection_dim=1024,
                bos_token_id=49406, eos_token_id=49407, pad_token_id=49407)
    vision = dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16,
                  hidden_act='gelu', patch_size=14,
                  image_size=224, projection_dim=1024)
    cfg = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=1024)
    with torch.device('meta'): net = transformers.CLIPModel(cfg)
    net.load_state_dict(random_state(net), assign=True)
    net.save_pretrained(tmp_path, max_shard_size='9GB'); write_bpe(tmp_path)
    some = net.visual_projection.weight.clone(); del net; gc.collect()
    load, pick = seconds(lambda: PickScore(tmp_path)); model = pick.tower.model
    assert model.visual_projection.weight.equal(some)
    proc, tok, x = (transformers.CLIPImageProcessor(), transformers.CLIPTokenizer.from_pretrained(tmp_path),
                    smooth(384, 512))
    def naive(o, text):
        ids = tok([text], padding=True, truncation=True, max_length=77, return_tensors='pt')
        out = model(input_ids=ids['input_ids'], attention_mask=ids['attention_mask'],
                    **proc([o], return_tensors='pt'))
        return out.logits_per_image[0, 0]
    slow, theirs = seconds(lambda: torch.stack([naive(*o) for o in zip(pil(x), PROMPTS)]))
    fast, ours = seconds(lambda: pick(x, PROMPTS))
    diff = (ours - theirs).abs().max().item()
    (tmp_path/'model.safetensors').unlink()
    record('pickscore',
           reference="transformers' CLIPModel.forward with its own picture processor (eight bits after "
           "resizing)",
           max_abs_diff_through_pil=diff, scale=pick.scale, scores=ours.tolist(),
           parameters=sum(p.numel() for p in model.parameters()),
           cpu_seconds=dict(load=load, image_batch_of_2=fast/2, image_alone_through_pil=slow/2))
    assert diff/pick.scale < 1e-3
