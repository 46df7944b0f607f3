"Prompts and image-caption pairs from files of every kind, what is wrong with them, and training on them"
import importlib.util, io, json, sys, tarfile, types

import numpy as np, pytest, torch
from PIL import Image

from diffusion_sharpening.data.tables import prompt_set, rows
from diffusion_sharpening.data.latents import Latents, conditioning, dropped, load_entry
from diffusion_sharpening.data.pictures import (
    READY, Size, bucket_rows, bucket_sizes, image_pairs, pair_rows)
from diffusion_sharpening.basics.pictures import open_picture

torch.set_num_threads(1)
PROMPTS = ['a red circle', 'a "blue", square', 'ein grüner Stern']
needs_pyarrow = pytest.mark.skipif(not importlib.util.find_spec('pyarrow'), reason='pyarrow is not installed')


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content) if isinstance(content, bytes) else path.write_text(content, encoding='utf-8')
    return path


def one_line(f, *parts):
    "`f` raises a ValueError of one line that contains `parts`"
    with pytest.raises(ValueError) as e: f()
    text = str(e.value)
    assert '\n' not in text and len(text) < 600, text
    assert all(p in text for p in parts), text


# Prompts

def jsonl(key, texts=PROMPTS): return ''.join(json.dumps({'id': 1, key: t})+'\n' for t in texts)
def csv(key, sep=',', texts=PROMPTS):
    quoted = ['"'+t.replace('"', '""')+'"' for t in texts]
    return f'id{sep}{key}\n' + ''.join(f'1{sep}{t}\n' for t in quoted)


FILES = {
    'p.txt': '\n'.join(PROMPTS)+'\n\n', 'p': '\r\n'.join(PROMPTS), 'bom.txt': '\ufeff'+'\n'.join(PROMPTS),
    'p.jsonl': jsonl('prompt'), 'p.ndjson': jsonl('Caption'),
    'plain.jsonl': ''.join(json.dumps(t)+'\n' for t in PROMPTS),
    'p.json': json.dumps(PROMPTS), 'objects.json': json.dumps([{'text': t, 'n': 1} for t in PROMPTS]),
    'p.csv': csv('prompt'), 'p.tsv': csv('caption', '\t'), 'P.CSV': csv('Prompt'),
    'named.csv': (csv('what'), ':what'),
    'nested.jsonl': (''.join(json.dumps({'Task2': {'Caption': t}})+'\n' for t in PROMPTS), ':Task2.Caption'),
    'a:b.csv': csv('prompt'), 'folder/x.jsonl': (jsonl('prompt'), None), 'odd@name.txt': '\n'.join(PROMPTS)}


@pytest.mark.parametrize('name', FILES)
def test_prompts_of_every_kind(tmp_path, name):
    "The same three prompts, with commas, quotes and umlauts, whatever holds them"
    content, spec = FILES[name] if isinstance(FILES[name], tuple) else (FILES[name], '')
    f = write(tmp_path/name, content)
    assert prompt_set(str(f.parent if spec is None else f)+(spec or '')) == PROMPTS


BROKEN = {
    'missing': ('none.txt', None, '', ['prompts: expected', 'found no file']),
    'missing column': ('p.csv', csv('prompt'), ':capton', ["expected a column 'capton', found id, prompt"]),
    'misspelt column': ('p.csv', csv('prompt'), ':promt', ["Did you mean 'prompt'?"]),
    'no column': ('p.jsonl', jsonl('what'), '',
                  ['prompt, caption, text, or SOURCE:COLUMN', 'found id, what']),
    'unknown suffix': ('p.xlsx', 'x', '', ['expected a file ending in', "found '.xlsx'"]),
    'no JSON': ('p.jsonl', '{"prompt": "a"}\n{"prompt": \n', '', ['p.jsonl, line 2', 'expected JSON']),
    'a number': ('p.jsonl', '7\n', '', ['row 1', 'expected an object or a text, found int']),
    'no list': ('p.json', '{"a": 1}', '', ['expected a list, found dict']),
    'empty prompt': ('p.jsonl', jsonl('prompt', ['a', ' ']), '', ['row 2', "expected a text in 'prompt'"]),
    'null prompt': ('p.jsonl', '{"prompt": null}', '', ['row 1', 'found None']),
    'number as prompt': ('p.jsonl', '{"prompt": 3}', '', ['found 3']),
    'missing in a row': ('p.jsonl', '{"prompt": "a"}\n{"caption": "b"}', '', ['row 2', 'found None']),
    'unquoted comma': ('p.csv', 'kind,prompt\n1,a, b\n', '',
                       ['row 1', 'expected 2 fields', 'found 3', 'quote']),
    'short row': ('p.csv', 'id,prompt\n1\n', '', ['row 1', 'found 1']),
    'bad quotes': ('p.csv', 'prompt\n"a" b\n', '', ['row 1', 'expected whole cells']),
    'nothing': ('p.csv', '', '', ['found none']),
    'header only': ('p.csv', 'prompt\n', '', ['holds no prompt']),
    'not UTF-8': ('p.txt', b'caf\xe9\n', '', ['p.txt, line 1', 'expected UTF-8', '0xe9', "'é'"]),
    'empty folder': ('d/README.md', 'x', 'd', ['expected files ending in', 'found README.md']),
    'no such split': ('d/train.jsonl', jsonl('prompt'), 'd@test', ["the split 'test'", 'train.jsonl'])}


@pytest.mark.parametrize('name', BROKEN)
def test_broken_prompts_are_one_line(tmp_path, name):
    file, content, spec, parts = BROKEN[name]
    if content is not None: write(tmp_path/file, content)
    source = tmp_path/spec if spec and spec[0] != ':' else f'{tmp_path/file}{spec}'
    one_line(lambda: prompt_set(str(source)), *parts)


def test_a_very_long_name_is_no_file():
    with pytest.raises(ValueError, match='found no file'): prompt_set('a cat, '*99)


def test_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'pyarrow', None)
    one_line(lambda: prompt_set(str(write(tmp_path/'p.parquet', b''))), 'pip install pyarrow')


@needs_pyarrow
def test_columnar_prompts(tmp_path):
    import pyarrow as pa, pyarrow.parquet as pq
    t = pa.table({'prompt': PROMPTS, 'deep': [{'er': p} for p in PROMPTS]})
    pq.write_table(t, tmp_path/'p.parquet', row_group_size=2)
    (tmp_path/'saved/train').mkdir(parents=True)                    # as datasets' save_to_disk
    with pa.OSFile(str(tmp_path/'saved/train/data-00000-of-00001.arrow'), 'wb') as f:
        with pa.ipc.new_stream(f, t.schema) as w: w.write_table(t)
    write(tmp_path/'saved/train/state.json', '{}')
    write(tmp_path/'saved/dataset_dict.json', '{"splits": ["train"]}')
    for source in ('p.parquet', 'p.parquet:deep.er', 'saved', 'saved@train:prompt'):
        assert prompt_set(f'{tmp_path}/{source}') == PROMPTS
    one_line(lambda: prompt_set(f'{tmp_path}/p.parquet:none'), "expected a column 'none', found prompt, deep")
    whole = (tmp_path/'p.parquet').read_bytes()
    one_line(lambda: prompt_set(str(write(tmp_path/'cut.parquet', whole[:-20]))),
             'cut.parquet is no whole parquet file')
    hurt = bytearray(whole); hurt[20] ^= 255
    one_line(lambda: prompt_set(str(write(tmp_path/'hurt.parquet', bytes(hurt)))), 'is no whole parquet file')
    one_line(lambda: prompt_set(str(write(tmp_path/'x.arrow', b'123'))), 'is no whole arrow file')


# The Hub, as a folder

class Gated(Exception): pass
Gated.__name__ = 'GatedRepoError'


@pytest.fixture
def hub(monkeypatch, tmp_path):
    "A Hub with one repository in `tmp_path/repo`; what was asked for is noted"
    import huggingface_hub
    repo, asked = tmp_path/'repo', []
    def info(self, name):
        if isinstance(hub.state, Exception): raise hub.state
        files = [p.relative_to(repo).as_posix() for p in repo.rglob('*') if p.is_file()]
        return types.SimpleNamespace(siblings=[types.SimpleNamespace(rfilename=f) for f in files])
    def snapshot(name, repo_type=None, allow_patterns=None, local_files_only=False):
        asked.append(allow_patterns)
        if local_files_only and not hub.cached: raise FileNotFoundError('not cached')
        return str(repo)
    hub = types.SimpleNamespace(repo=repo, asked=asked, state=None, cached=False)
    monkeypatch.setattr(huggingface_hub.HfApi, 'dataset_info', info)
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', snapshot)
    return hub


def test_prompts_of_the_hub(hub):
    for split, texts in (('train', PROMPTS), ('test', PROMPTS[:1])):
        write(hub.repo/f'data/{split}.jsonl', jsonl('Prompt', texts))
    write(hub.repo/'more/x.csv', csv('caption')); write(hub.repo/'README.md', '')
    assert prompt_set('hf:owner/name:Prompt') == PROMPTS and prompt_set('hf:owner/name@test') == PROMPTS[:1]
    assert prompt_set('hf:owner/name/more') == PROMPTS
    assert prompt_set('hf:owner/name/data/test.jsonl') == PROMPTS[:1]
    assert hub.asked == [['data/train.jsonl'], ['data/test.jsonl'], ['more/x.csv'], ['data/test.jsonl']]
    one_line(lambda: prompt_set('hf:owner/name/less'), 'expected less, found no such')
    one_line(lambda: prompt_set('hf:owner/name@dev'), "the split 'dev'")


def test_the_hub_out_of_reach(hub):
    write(hub.repo/'train.jsonl', jsonl('prompt'))
    hub.state = ConnectionError('no network')
    one_line(lambda: prompt_set('hf:owner/name'), 'could not get hf:owner/name',
             'hf download owner/name --repo-type dataset')
    hub.cached = True
    assert prompt_set('hf:owner/name') == PROMPTS                  # what was fetched once is there
    hub.cached, hub.state = False, Gated()
    one_line(lambda: prompt_set('hf:owner/name'), 'accept its terms at huggingface.co/datasets/owner/name')


# Pictures

def photo(size=(96, 64), seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8))


def png(im): im.save(f := io.BytesIO(), 'PNG'); return f.getvalue()


CAPTIONS = [f'a thing, number {i}' for i in range(5)]
SIZES = [(96, 64), (64, 64), (64, 96), (96, 64), (200, 90)]
BYTES = [png(photo(s, i)) for i, s in enumerate(SIZES)]


def texts_beside(d):
    for i in range(5): write(d/f'{i}.png', BYTES[i]); write(d/f'{i}.txt', CAPTIONS[i]+'\n')
    return d
def metadata_jsonl(d, key='text'):
    for i in range(5): write(d/f'train/{i}.png', BYTES[i])
    lines = [json.dumps({'file_name': f'{i}.png', key: CAPTIONS[i]}) + '\n' for i in range(5)]
    write(d/'train/metadata.jsonl', ''.join(lines))
    return d
def metadata_csv(d):
    for i in range(5): write(d/f'{i}.png', BYTES[i])
    write(d/'metadata.csv', 'file_name,caption\n'+''.join(f'{i}.png,"{CAPTIONS[i]}"\n' for i in range(5)))
    return d
def list_beside_folder(d):
    for i in range(5): write(d/f'imgs/00/{i}.png', BYTES[i])
    lines = [json.dumps(dict(img_path=f'./00/{i}.png', prompt=CAPTIONS[i], x=1)) for i in range(5)]
    return f"{write(d/'list.jsonl', chr(10).join(lines))}:img_path,prompt"
def archive(d, texts=False):
    d.mkdir(parents=True, exist_ok=True)
    with tarfile.open(d/'s.tar', 'w') as t:
        for i in range(5):
            text = CAPTIONS[i].encode() if texts else json.dumps({'prompt': CAPTIONS[i], 'x': [1]}).encode()
            for name, b in ((f'./a/{i}.txt' if texts else f'./a/{i}.json', text), (f'./a/{i}.png', BYTES[i])):
                m = tarfile.TarInfo(name); m.size = len(b); t.addfile(m, io.BytesIO(b))
    return d/'s.tar'
def archive_of_texts(d): return archive(d, True)
def parquet(d):
    import pyarrow as pa, pyarrow.parquet as pq
    d.mkdir(parents=True, exist_ok=True)
    t = pa.table({'image': [{'bytes': b, 'path': None} for b in BYTES], 'text': CAPTIONS})
    pq.write_table(t, d/'train-00000-of-00001.parquet', row_group_size=2)
    return d
def parquet_of_bytes(d):
    import pyarrow as pa, pyarrow.parquet as pq
    d.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({'jpg': BYTES, 'caption': CAPTIONS}), d/'x.parquet')
    return d/'x.parquet'
def parquet_of_names(d):
    import pyarrow as pa, pyarrow.parquet as pq
    texts_beside(d)
    pq.write_table(pa.table({'path': [f'{i}.png' for i in range(5)], 'caption': CAPTIONS}), d/'x.parquet')
    return f'{d}/x.parquet:path,caption'


KINDS = [texts_beside, metadata_jsonl, metadata_csv, list_beside_folder, archive, archive_of_texts,
         *(pytest.param(f, marks=needs_pyarrow) for f in (parquet, parquet_of_bytes, parquet_of_names))]


@pytest.mark.parametrize('kind', KINDS)
def test_pairs_of_every_kind(tmp_path, kind):
    "The same five pairs, whatever holds them"
    ps = image_pairs(str(kind(tmp_path/'set')), 32)
    assert ps.captions == CAPTIONS and [ps.data(i) for i in range(5)] == BYTES
    x, caption, size = ps[4]
    assert x.shape == (3, 32, 32) and caption == CAPTIONS[4] and size == Size(90, 200, 0, 19, 32, 32)
    assert 0 <= x.min() and x.max() <= 1 and x.dtype == torch.float32


def change(d, f): texts_beside(d); f(d); return d


BAD_PAIRS = {
    'no such folder': (lambda d: d/'none', ['expected a folder or a file', 'found no']),
    'no pictures': (lambda d: write(d/'README.md', 'x').parent, ['no pictures among 1 files']),
    'empty folder': (lambda d: d.mkdir() or d, ['no pictures among 0 files']),
    'no captions': (lambda d: write(d/'a.png', BYTES[0]).parent, ['found 1 pictures without captions']),
    'caption missing': (lambda d: change(d, lambda d: (d/'3.txt').unlink()),
                        ['expected a .txt beside', 'none for 1 of 5: 3.png']),
    'empty caption': (lambda d: change(d, lambda d: write(d/'3.txt', ' \n')), ['3.txt', 'expected a text']),
    'picture missing': (lambda d: change(d, lambda d: write(d/'metadata.csv', 'file_name,text\n9.png,a\n')),
                        ['row 1', 'found no file 9.png']),
    'empty in table': (lambda d: change(d, lambda d: write(d/'metadata.csv', 'file_name,text\n1.png,\n')),
                       ['row 1', "expected a text in 'text'"]),
    'no caption column': (
        lambda d: change(d, lambda d: write(d/'metadata.csv', 'file_name,what,n\n1.png,a,b\n')),
        ['column of captions named prompt, caption, text', 'found file_name, what, n']),
    'wrong column': (lambda d: f"{write(d/'l.jsonl', '{}')}:a,b", ["expected a column 'a', found none"]),
    'no pairs': (lambda d: change(d, lambda d: write(d/'metadata.csv', 'file_name,text\n')),
                 ['at least one image-caption pair']),
    'cut archive': (lambda d: write(d/'c.tar', archive(d).read_bytes()[:1500]),
                    ['expected a whole, uncompressed .tar']),
    'archive cut between files': (lambda d: write(d/'c.tar', archive(d).read_bytes()[:1024]),
                                  ['end is missing']),
    'no archive': (lambda d: write(d/'c.tar', b'x'*2000), ['expected a whole, uncompressed .tar']),
    'no JSON in it': (lambda d: f'{archive(d)}:json.caption',
                      ["expected a text in 'json.caption'", 'found None']),
    'unknown suffix': (lambda d: write(d/'a.zip', b'x'), ["found '.zip'"]),
    'copy without table': (lambda d: d.mkdir() or f'journeydb:{d}', [f"expected {READY['journeydb'].file}"]),
    'copy without pictures': (
        lambda d: write(d/READY['journeydb'].file, '{"img_path": "a.jpg", "prompt": "a"}')
        and f'journeydb:{d}',
        ['expected its pictures', 'found none']),
    'no copy': (lambda d: 'pokemon:nowhere', ['expected a copy of pokemon, found no nowhere'])}


@pytest.mark.parametrize('name', BAD_PAIRS)
def test_bad_pairs_are_one_line(tmp_path, name):
    make, parts = BAD_PAIRS[name]
    one_line(lambda: image_pairs(str(make(tmp_path/'set')), 32), *parts)


@pytest.mark.parametrize('content, part', [(b'hello', 'found no picture'),
                                           (BYTES[0][:200], '1.png, found'), (b'', 'found')])
def test_broken_pictures_are_one_line(tmp_path, content, part):
    d = change(tmp_path/'set', lambda d: write(d/'1.png', content))
    ps = image_pairs(str(d), 32); ps[0]
    one_line(lambda: ps[1], 'expected a whole picture in', '1.png', part)
    (d/'2.png').unlink(); one_line(lambda: ps[2], 'cannot read', '2.png')


def test_colours():
    clear = Image.new('RGBA', (4, 4), (255, 0, 0, 0))
    for im in (clear, clear.convert('LA'), Image.new('CMYK', (4, 4)), Image.new('1', (4, 4), 1)):
        kind = 'TIFF' if im.mode == 'CMYK' else 'PNG'
        im.save(f := io.BytesIO(), kind)
        assert open_picture(f.getvalue()).getpixel((0, 0)) == (255, 255, 255)


def test_pictures_stand_upright(tmp_path):
    "A photograph taken on its side: the same shape in the list of buckets, in the picture and in its size"
    turned = Image.Exif(); turned[0x112] = 6
    (tmp_path/'s').mkdir()
    photo((96, 64)).save(tmp_path/'s/a.jpg', exif=turned); write(tmp_path/'s/a.txt', 'a')
    ps = image_pairs(str(tmp_path/'s'), 64, True, 8); x, _, size = ps[0]
    assert size[:2] == (96, 64) and x.shape[1:] == ps.shape(0) == (80, 48)


def test_buckets():
    sizes = bucket_sizes()
    assert all(h % 64 == w % 64 == 0 and h*w <= 1024**2 and h*w > .85*1024**2 for h, w in sizes)
    assert (512, 2048) in sizes and (2048, 512) in sizes and (1024, 1024) in sizes
    groups = [list(range(20)), [20, 21, 22], [23]]
    seen = [bucket_rows(groups, 4, 3, k) for k in range(48)]
    counts = np.bincount(sum(seen, []))
    assert (counts == 8).all() and all(any({*s} <= {*g} for g in groups) for s in seen)
    assert seen[::-1] == [bucket_rows(groups, 4, 3, k) for k in reversed(range(48))]   # asked in any order


def test_sets_of_one_size_are_drawn_as_ever(tmp_path):
    ps = image_pairs(str(texts_beside(tmp_path/'s')), 32)
    assert [pair_rows(ps, 2, 5, k) for k in range(9)] == [rows(5, 2, 5, k) for k in range(9)]


def test_ready_sets(hub, tmp_path):
    "Copies of the sets, in the layout that their configurations expect"
    src = archive(hub.repo/'data_1024_10K'); write(hub.repo/'data_512_2M/big.tar', b'')
    assert image_pairs('text-to-image-10k', 32).captions == CAPTIONS
    assert hub.asked == [['data_1024_10K/s.tar']]
    assert image_pairs(f'text-to-image-2m:{src.parent}', 32).captions == CAPTIONS
    jdb = tmp_path/'jdb/data/train'
    for i in (0, 2): write(jdb/f'imgs/000/{i}.png', BYTES[i])
    lines = [json.dumps(dict(img_path=f'./000/{i}.png', prompt=CAPTIONS[i], Task2={})) for i in range(5)]
    write(jdb/READY['journeydb'].file, '\n'.join(lines))
    assert image_pairs(f'journeydb:{tmp_path}/jdb', 32).captions == CAPTIONS[:3:2]  # shards that are there
    assert all(r.licence and r.checked and len(r.place.split('/')) > 1 for r in READY.values())


@needs_pyarrow
def test_ready_set_of_parquet(hub, tmp_path):
    parquet(hub.repo/'data')
    assert image_pairs('naruto', 32).captions == CAPTIONS
    assert CAPTIONS == image_pairs(f'pokemon:{hub.repo}/data', 32).captions


def test_folders_of_the_hub(hub):
    metadata_jsonl(hub.repo); write(hub.repo/'test/metadata.jsonl', '')
    assert image_pairs('hf:owner/name:text', 32).captions == CAPTIONS
    assert 'train/3.png' in hub.asked[0] and 'test/metadata.jsonl' not in hub.asked[0]


# Training on them

diffusers = pytest.importorskip('diffusers')
from diffusion_sharpening.models.denoiser import Denoiser
from diffusion_sharpening.models.tiny import tiny_sd, tiny_sdxl
from diffusion_sharpening.training.run import settings
from diffusion_sharpening.data.sources import StoredPictures
from diffusion_sharpening.training.loop import train
from shared import Bright


@pytest.fixture(scope='module')
def xl(tmp_path_factory):
    d = tmp_path_factory.mktemp('model')/'xl'
    tiny_sdxl(d, words=['a', 'thing', 'number'])
    return str(d)


def load(xl): return Denoiser.from_pretrained(xl, guidance=1., device='cpu')


def test_latents_are_kept(xl, tmp_path):
    "Same bits fresh, kept, half kept and remade after damage; another picture or autoencoder is another file"
    d, ps = load(xl), image_pairs(str(texts_beside(tmp_path/'s')), 64, True, 8)
    fresh = Latents(ps, d); all_of = [fresh[i] for i in range(5)]
    assert {z.shape for z in all_of} == {(4, h//8, w//8) for h, w in map(ps.shape, range(5))}
    Latents(ps, d, tmp_path/'c')[3]; half = Latents(ps, d, tmp_path/'c'); half.fill()
    files = sorted((tmp_path/'c').rglob('*.safetensors')); assert len(files) == 5
    for f in files:
        whole = f.read_bytes(); hurt = bytearray(whole); hurt[-3] ^= 4
        for bad in (whole[:-1], whole[:20], b'', bytes(hurt)):
            f.write_bytes(bad); assert load_entry(f) is None
    again = Latents(ps, d, tmp_path/'c')
    assert all(torch.equal(all_of[i], o[i]) for o in (half, again) for i in range(5))
    write(tmp_path/'s/0.png', BYTES[1]); assert torch.equal(Latents(ps, d, tmp_path/'c')[0], all_of[1])
    with torch.no_grad(): d.pipe.vae.quant_conv.bias += 1
    other = Latents(ps, d, tmp_path/'c')
    assert not torch.equal(other[1], all_of[1]) and other.folder != again.folder


def test_nan_latents_are_an_error(xl, tmp_path):
    d, ps = load(xl), image_pairs(str(texts_beside(tmp_path/'s')), 64)
    with torch.no_grad(): d.pipe.vae.quant_conv.bias += float('nan')
    one_line(lambda: Latents(ps, d, tmp_path/'c')[1], '1.png', 'NaN', 'float32')
    assert not [*(tmp_path/'c').rglob('*.safetensors')]


def test_a_folder_that_cannot_be_written(xl, tmp_path):
    write(tmp_path/'c', 'a file')
    lat = Latents(image_pairs(str(texts_beside(tmp_path/'s')), 64), load(xl), tmp_path/'c')
    one_line(lambda: lat[0], 'cannot write latents')


@pytest.mark.parametrize('name, preset', [('sft', 'plain'), ('sft', 'paper')])
def test_sft_learns_from_any_pairs(xl, tmp_path, name, preset):
    "The loop takes `Latents` for the tensor it knows, and a warm cache changes no bit"
    made = []
    for folder in (None, 'c', 'c'):
        d = load(xl); ps = image_pairs(str(texts_beside(tmp_path/'s')), 64)
        run, method = settings(name, preset, steps=2, batch=2, rank=2,
                               **({} if preset == 'plain' else dict(n=2, m=2, S=3)))
        source = StoredPictures(d, Latents(ps, d, folder and tmp_path/folder), run.batch, run.seed)
        train(d, method, Bright(), source, run)
        made.append({k: v.detach().clone() for k, v in d.policies.named['policy'].items()})
    assert all(torch.equal(v, o[k]) for o in made[1:] for k, v in made[0].items())


def test_sizes_and_withheld_captions(xl, tmp_path):
    d, ps = load(xl), image_pairs(str(texts_beside(tmp_path/'s')), 64, True, 8); lat = Latents(ps, d)
    i = lat.rows(3, 0, 0); x, sizes = lat[i], lat.sizes(i)
    assert len({ps.shape(j) for j in i}) == 1 and sizes.tolist() == [list(map(float, ps[j][2])) for j in i]
    told = conditioning(d, ['a', 'thing', 'a'], sizes, torch.tensor([True, False, False]))
    plain = d.encode(['a', 'thing', 'a'])
    # SDXL's unconditional
    assert told['text'][0].abs().max() == told['pooled'][0].abs().max() == 0
    assert torch.equal(told['text'][1:], plain['text'][1:]) and torch.equal(told['size'], sizes)
    # nothing was changed in place
    assert torch.equal(plain['size'][0], torch.tensor([64., 64, 0, 0, 64, 64]))
    x0, eps = d.predict(x, torch.tensor(300), told)
    assert x0.shape == x.shape and not torch.equal(x0, d.predict(x, torch.tensor(300), plain)[0])
    guided = d.with_guidance(4.).predict(x, torch.tensor(300), told)[0]
    assert torch.allclose(guided[0], x0[0], atol=1e-4) and not torch.allclose(guided[1], x0[1], atol=1e-4)
    original, corner, goal = (tuple(o.int().tolist()) for o in sizes[0].split(2))
    width = d.pipe.text_encoder_2.config.projection_dim
    stock = d.pipe._get_add_time_ids(original, corner, goal, torch.float32, width)
    assert torch.equal(stock[0], sizes[0])


def test_models_that_are_told_no_size(tmp_path):
    d = Denoiser(tiny_sd(tmp_path/'sd'), guidance=1.)
    told = conditioning(d, ['a', 'b'], torch.zeros(2, 6), torch.tensor([False, True]))
    assert 'size' not in told and torch.equal(told['text'][0], d.encode('a')['text'][0])
    assert not torch.equal(told['text'][1], d.encode('b')['text'][0])


def test_dropout_follows_from_seed_and_step():
    all_of = [dropped(8, .3, 1, k) for k in range(200)]
    assert all(torch.equal(a, dropped(8, .3, 1, k)) for k, a in reversed([*enumerate(all_of)]))
    assert .25 < torch.stack(all_of).float().mean() < .35 and not torch.equal(all_of[0], all_of[1])
    assert any(not torch.equal(a, dropped(8, .3, 2, k)) for k, a in enumerate(all_of))
    for p in (-.1, 1.1, float('nan')): one_line(lambda: dropped(4, p, 0, 0), 'between 0 and 1')
