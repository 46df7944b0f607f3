"ImageReward and Compositional through their loader: what is refused, and the stock package beside them"
import importlib.util, json, warnings
from pathlib import Path

import pytest, torch

transformers = pytest.importorskip('transformers')
from safetensors.torch import save_file
from diffusion_sharpening.rewards import image_reward as ir
from diffusion_sharpening.names.catalog import load_reward
from diffusion_sharpening.rewards.image_reward import BlipJudge, Compositional, ImageReward, save_checkpoint

torch.set_num_threads(1)
root = Path(__file__).resolve().parents[1]
SMALL = dict(vision=dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                         patch_size=8,
                         image_size=32),
             text=dict(hidden_size=12, intermediate_size=24, num_hidden_layers=2, num_attention_heads=3,
                       vocab_size=20,
                       max_position_embeddings=12), head=[8, 8, 8, 4], tokens=8)
WORDS = '[PAD] [UNK] [CLS] [SEP] [MASK] a red blue circle square'.split()
PROMPTS = ['a red circle', 'a blue square', 'a red square']


def random_state(seed):
    "Weights of a small judge that pictures and words get through"
    torch.manual_seed(seed); judge = BlipJudge(SMALL).requires_grad_(False)
    for p in judge.parameters(): p += torch.randn_like(p)*(p[0].numel()**-.5 if p.ndim > 1 else .1)
    return judge


def write(folder, sizes=SMALL, words=WORDS):
    folder.mkdir(parents=True, exist_ok=True)
    (folder/'image_reward.json').write_text(json.dumps(sizes))
    (folder/'vocab.txt').write_text('\n'.join(words))
    return folder


@pytest.fixture
def folder(tmp_path):
    write(tmp_path/'w')
    save_checkpoint(random_state(0), tmp_path/'w/ImageReward.pt')
    return tmp_path/'w'


@pytest.fixture(scope='module')
def ims(): return torch.rand(3, 3, 40, 48, generator=torch.Generator().manual_seed(0))


def refused(f, *parts):
    "The one line of a ValueError that names the reward"
    with pytest.raises(ValueError) as e: f()
    line = str(e.value)
    assert '\n' not in line and all(p in line for p in parts), line


def test_the_published_network():
    "What the comparison at full size rests on, read without building 446 million weights"
    with torch.device('meta'): judge = BlipJudge()
    norms = {n: m.eps for n, m in judge.named_modules() if isinstance(m, torch.nn.LayerNorm)}
    assert {e for n, e in norms.items() if n.startswith('vision')} == {1e-6}
    assert {e for n, e in norms.items() if n.startswith('text')} == {1e-12}
    assert {m.num_attention_heads for m in judge.text.modules() if hasattr(m, 'attention_head_size')} == {12}
    assert sum(p.numel() for p in judge.parameters()) == 446_206_689 and len(norms) == 86
    assert not any(isinstance(m, (torch.nn.ReLU, torch.nn.GELU)) for m in judge.head)


# Scores

def test_named_by_folder_file_and_spec(folder, ims):
    r = ImageReward(str(folder))(ims, PROMPTS)
    assert r.std() > 1e-3
    for o in (ImageReward(folder/'ImageReward.pt'), load_reward(f'image_reward@{folder}')):
        torch.testing.assert_close(o(ims, PROMPTS), r, atol=0, rtol=0)


def test_batch_equals_singles_and_order_is_kept(folder, ims):
    reward = ImageReward(folder)
    r = reward(ims, PROMPTS)
    one = torch.cat([reward(ims[i:i+1], PROMPTS[i:i+1]) for i in range(3)])
    torch.testing.assert_close(r, one, atol=1e-5, rtol=0)
    torch.testing.assert_close(reward(ims.flip(0), PROMPTS[::-1]), r.flip(0), atol=1e-5, rtol=0)


def test_gradient_reaches_every_pixel_that_is_seen(folder, ims):
    x = ims.clone().requires_grad_()
    ImageReward(folder)(x, PROMPTS).sum().backward()
    assert (x.grad[..., 8:40].abs().sum((0, 1)) > 0).all()


def test_half_precision_gives_float_scores(folder, ims):
    r, half = ImageReward(folder)(ims, PROMPTS), ImageReward(folder, dtype=torch.bfloat16)(ims, PROMPTS)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, r, atol=.1, rtol=0)


def test_nothing_stays_on_meta(folder):
    judge = ImageReward(folder).judge
    assert not any(t.is_meta for t in [*judge.parameters(), *judge.buffers()])
    assert judge.text.embeddings.position_ids.tolist() == [list(range(12))]


def test_a_long_prompt_is_cut_and_said_to_be(folder, ims):
    reward, long = ImageReward(folder), 'a red circle a blue square a circle'
    with pytest.warns(UserWarning, match='reads 8 tokens'): r = reward(ims[:1], [long])
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        torch.testing.assert_close(reward(ims[:1], ['a red circle a blue square']), r)


def test_other_containers(folder, ims):
    r = ImageReward(folder)(ims, PROMPTS)
    state = torch.load(folder/'ImageReward.pt')
    save_file(state, folder/'w.safetensors')
    torch.save(dict(model={f'module.{k}': v.half() for k, v in state.items()}, epoch=3), folder/'w.pt')
    torch.testing.assert_close(ImageReward(folder/'w.safetensors')(ims, PROMPTS), r)
    assert ImageReward(folder/'w.pt').judge.head[0].weight.dtype == torch.float32


# What is refused

def change(folder, f):
    state = f(torch.load(folder/'ImageReward.pt'))
    torch.save(state, folder/'ImageReward.pt')


@pytest.mark.parametrize('f, line', [
    (lambda s: {k: v for k, v in s.items() if 'cls_token' not in k},
     'is missing 1, first vision.embeddings.class'),
    (lambda s: s | {'mlp.layers.7.bias': torch.zeros(2)}, 'has the wrong shape of 1, first head.7.bias (2,)'),
    (lambda s: s | {'blip.text_decoder.w': torch.zeros(2)}, 'has unknown 1, first blip.text_decoder.w'),
    (lambda s: {'visual.proj': torch.zeros(2)}, 'is missing 96'),
    (lambda s: {}, 'expected tensors by name')])
def test_wrong_checkpoint(folder, f, line):
    change(folder, f)
    refused(lambda: ImageReward(folder), 'image_reward: ', line)


def test_truncated_and_not_a_checkpoint(folder):
    file = folder/'ImageReward.pt'
    whole = file.read_bytes()
    for content in (whole[:len(whole)//2], b'<html>', b''):
        file.write_bytes(content)
        refused(lambda: ImageReward(folder), 'image_reward: ', 'is no whole checkpoint', 'download it again')


def test_a_pickle_with_code_is_not_run(folder):
    torch.save(random_state(0), folder/'ImageReward.pt')
    refused(lambda: ImageReward(folder), 'image_reward: ', 'is a pickle that asks for', 'it was refused')


def test_paths(folder, tmp_path):
    refused(lambda: ImageReward(tmp_path/'nowhere'), 'image_reward: no such file or folder')
    refused(lambda: ImageReward(tmp_path), 'image_reward: expected ImageReward.pt in', 'found w')


def test_vocabulary(folder):
    write(folder, words=WORDS + [f'w{i}' for i in range(30)])
    refused(lambda: ImageReward(folder), 'image_reward: expected the words of 20', 'found 40 words')
    (folder/'image_reward.json').unlink()
    refused(lambda: ImageReward(folder), 'image_reward: expected the words of google-bert/bert-base-uncased')
    refused(lambda: ImageReward(folder, tokenizer=folder.parent), 'image_reward: ', 'no vocabulary')


def test_sizes(folder):
    (folder/'image_reward.json').write_text('{')
    refused(lambda: ImageReward(folder), 'image_reward: ', 'is not JSON')
    write(folder, SMALL | dict(vision=dict(hidden_size=16)))
    refused(lambda: ImageReward(folder), 'image_reward: ', 'expected vision keys hidden_size')


def test_hub(monkeypatch):
    import huggingface_hub as hub, httpx
    from huggingface_hub import errors
    def raising(e):
        def download(*args, **kwargs): raise e
        for f in ('hf_hub_download', 'snapshot_download'): monkeypatch.setattr(hub, f, download)
    def answer(kind, code):
        return kind('no', response=httpx.Response(code,
                                                  request=httpx.Request('GET', 'https://huggingface.co')))
    for e, line in [(errors.LocalEntryNotFoundError('offline'), 'no network'),
                    (ConnectionError('down'), 'no network'),
                    (answer(errors.GatedRepoError, 403), 'accept its terms'),
                    (answer(errors.RepositoryNotFoundError, 401), 'hf auth login'),
                    (answer(errors.RemoteEntryNotFoundError, 404), 'no such file')]:
        raising(e)
        refused(ImageReward, 'image_reward: could not get ImageReward.pt of zai-org/ImageReward: ', line)
        refused(Compositional, 'compositional: could not get ', 'comin/IterComp: ', line)


# Compositional

def test_three_checkpoints(tmp_path, ims):
    folder = write(tmp_path/'reward_models')
    judges = [random_state(i) for i in range(3)]
    for j, f in zip(judges, 'abc'): save_checkpoint(j, folder/f'{f}.pt')
    comp = Compositional(tmp_path)
    each = torch.stack([ImageReward(folder/f'{f}.pt')(ims, PROMPTS) for f in 'abc'])
    torch.testing.assert_close(comp.each(ims, PROMPTS), each)
    torch.testing.assert_close(comp(ims, PROMPTS), each.mean(0))
    (folder/'c.pt').write_bytes(b'PK')
    refused(lambda: Compositional(folder), 'compositional (c.pt): ', 'is no whole checkpoint')
    (folder/'c.pt').unlink()
    refused(lambda: Compositional(folder), 'compositional: expected three checkpoints in', 'found a.pt, b.pt')


# The stock package

def test_package_says_what_it_needs(folder, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(ir.importlib.util, 'find_spec', lambda n: None if n == 'ImageReward' else find(n))
    refused(lambda: ImageReward(folder, backend='package'), 'pip install --no-deps image-reward==1.5')
    monkeypatch.setattr(ir.importlib.util, 'find_spec', lambda n: True)
    refused(lambda: ImageReward(folder, backend='package'), 'image_reward: ', 'published sizes only')
    refused(lambda: ImageReward(folder, backend='wheel'),
            "backend is 'transformers' or 'package', found 'wheel'")


def test_package_refuses_a_checkpoint_with_gaps(tmp_path, monkeypatch):
    "The wheel itself would leave random weights in their place"
    monkeypatch.setattr(ir.importlib.util, 'find_spec', lambda n: True)
    tok = transformers.BertTokenizer.from_pretrained(write(tmp_path/'tok'))
    torch.save({'mlp.layers.7.bias': torch.zeros(1)}, tmp_path/'w.pt')
    def package(): return ir.Package(tmp_path/'w.pt', tok, 'image_reward')
    refused(package, 'image_reward: not the right checkpoint')
    monkeypatch.setattr(ir, 'load_judge', lambda *args: None)
    monkeypatch.setattr(ir.sys, 'executable', 'sh')                   # a child that fails
    refused(package, 'image_reward: the image-reward package stopped: ')


wheel = pytest.mark.skipif(importlib.util.find_spec('ImageReward') is None,
                           reason='the stock package is not there: pip install --no-deps image-reward==1.5')


@wheel
@pytest.mark.slow
def test_backends_agree_at_full_size(tmp_path, monkeypatch):
    "446 million random weights, both backends: minutes, 2 GB of disk and 5 GB of memory"
    monkeypatch.syspath_prepend(str(root/'nbs/_dev'))
    res = importlib.import_module('rewards_image_reward').compare(tmp_path)
    assert res['max_abs_diff'] < 1e-5 and res['max_abs_diff_batch_single'] < 1e-5
    assert res['max_abs_diff_resized'] < 1e-3 and res['spread'] > .01
