"Scoring a folder of pictures: what belongs together, what stops it, kills, and what is read back"
import csv, json, multiprocessing, os, signal, time, warnings
import pytest, torch
from PIL import Image

from diffusion_sharpening.commands.score import (
    fingerprints, list_images, open_journal, read_pairs, score_folder, summarise)
from diffusion_sharpening.data.tables import write_prompts
from diffusion_sharpening.rewards.mixture import Mixture
from diffusion_sharpening.rewards.protocol import Reward

torch.set_num_threads(1)
nan = float('nan')
forks = pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs os.fork')
fork = multiprocessing.get_context('fork') if hasattr(os, 'fork') else None


class Light(Reward):
    "Brightness plus the length of the prompt; NaN for black pictures if it may fail"
    name = 'light'
    def __init__(self, may_fail=False): self.may_fail = may_fail
    def score(self, images, prompts):
        s = images.mean((1, 2, 3)) + torch.tensor([float(len(p)) for p in prompts])
        return torch.where(images.amax((1, 2, 3)) == 0, nan, s) if self.may_fail else s


class Red(Reward):
    name = 'red'
    def score(self, images, prompts): return 100*images[:, 0].mean((1, 2))


class Slow(Reward):
    "Takes its time and writes down what it was asked"
    name = 'slow'
    def __init__(self, log): self.log = log
    def score(self, images, prompts):
        with self.log.open('a') as f: f.write(f'{len(prompts)}\n')
        time.sleep(.1)
        return images.mean((1, 2, 3))


@pytest.fixture
def folder(tmp_path):
    "Twelve pictures of two sizes, and their prompts"
    d = tmp_path/'pics'; d.mkdir()
    for i in range(12):
        Image.new('RGB', (8, 8 if i % 3 else 12), (20*i, 0, 0)).save(d/f'im {i}.png')
    text = '\ufeff' + '\n'.join('x'*i or 'zero' for i in range(12)) + '\r\n'
    (tmp_path/'p.txt').write_text(text, encoding='utf-8')
    return tmp_path


def table(path):
    with (path/'scores.csv').open(newline='', encoding='utf-8') as f: return list(csv.DictReader(f))


def scored(folder, reward=None, prompts='p.txt', out='out', **kw):
    return score_folder(reward or Light(), folder/'pics', folder/prompts, folder/out, device='cpu', **kw)


def test_scores_of_a_folder(folder):
    res = scored(folder, batch=5)
    rows = table(folder/'out')
    want = [20*i/255/3 + (i or 4) for i in range(12)]
    assert [float(r['score']) for r in rows] == pytest.approx(want, abs=1e-5)
    assert [r['file'] for r in rows] == [f'im {i}.png' for i in range(12)]
    full = json.loads((folder/'out'/'scores.json').read_text())
    assert full['mean'] == pytest.approx(sum(want)/12, abs=1e-5) and len(full['scores']) == 12
    assert full['low'] < full['mean'] < full['high']
    assert res['new'] == 12 and scored(folder)['new'] == 0


def test_what_is_a_picture_of_the_folder(folder):
    "The overview of `sample` is none, hidden files are none, all else is, whatever it is called"
    d = folder/'pics'
    for name in ('grid.png', 'crash test.jpg', 'val.jfif', '².png', '12²3.webp'):
        Image.new('RGB', (8, 8)).save(d/name)
    for name in ('._im 1.png', '.DS_Store', 'Thumbs.db'): (d/name).write_bytes(b'x')
    (d/'.ipynb_checkpoints').mkdir(); (d/'.ipynb_checkpoints'/'im 1.png').write_bytes(b'x')
    assert len(list_images(d)) == 12 + 5 and 'grid.png' in list_images(d)
    Image.new('RGB', (8, 8)).save(d/'0000.png')
    assert len(list_images(d)) == 12 + 5 and 'grid.png' not in list_images(d)


HARD = ['a cat\non a mat', 'a red, big cat', '"quoted"', 'a\u2028b', 'x\x0cy', 'semi;colon', 'tab\there',
        '{"a": 1}', "it's", '=1+1', 'ünïcödé 🐈', 'x'*200_000]


def test_prompts_of_any_kind_come_back(folder):
    "What `sample` writes is read back: prompts of two lines, odd line ends, very long ones"
    names = list_images(folder/'pics')
    for files in (None, names, names[::-1]):
        f = write_prompts(folder/'q.jsonl', HARD, files)
        assert read_pairs(folder/'pics', f) == [*zip(files or names, HARD)]
    assert scored(folder, prompts='q.jsonl')['new'] == 12
    rows = json.loads((folder/'out'/'scores.json').read_text())['scores']
    assert [r['prompt'] for r in rows] == HARD == [r['prompt'] for r in table(folder/'out')]


TABLES = {
    'semicolons.csv': 'file;prompt\nim 1.png;a red, big cat\nim 2.png;"a ""b"" c"\n',
    'commas.csv': 'file,prompt\r\nim 1.png,a red, big cat\r\nim 2.png,"a ""b"" c"\r\n',
    'bom.csv': '\ufefffile,prompt\nim 1.png,"a red, big cat"\nim 2.png,"a ""b"" c"\n',
    'excel.csv': 'sep=;\nFile;Prompt\nim 1.png;a red, big cat\nim 2.png;"a ""b"" c"\n',
    'quotes.tsv': 'prompt\tfile\na red, big cat\tim 1.png\na "b" c\tim 2.png\n',
    'objects.jsonl': '{"image_path": "im 1.png", "caption": "a red, big cat"}\n'
                     '{"image_path": "im 2.png", "caption": "a \\"b\\" c"}\n',
    'objects.json': '[{"file": "im 1.png", "text": "a red, big cat"},\n'
                    '{"file": "im 2.png", "text": "a \\"b\\" c"}]'}


@pytest.mark.parametrize('name', TABLES)
def test_tables_name_the_pictures(folder, name):
    (folder/name).write_text(TABLES[name], encoding='utf-8', newline='')
    with pytest.warns(UserWarning, match='10 pictures without a prompt'):
        pairs = read_pairs(folder/'pics', folder/name)
    assert pairs == [('im 1.png', 'a red, big cat'), ('im 2.png', 'a "b" c')]


def test_columns_can_be_named(folder):
    (folder/'t.csv').write_text('name,which,what\nim 1.png,im 2.png,a\n')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert read_pairs(folder/'pics', f'{folder}/t.csv:which,what') == [('im 2.png', 'a')]


@forks
def test_killed_and_resumed(folder):
    "SIGKILL in the middle: what was done is kept, a torn line is mended, nothing is scored twice"
    journal = folder/'out'/'scores.jsonl'
    args = Slow(folder/'calls'), folder/'pics', folder/'p.txt', folder/'out', 2, 'cpu'
    p = fork.Process(target=score_folder, args=args)
    p.start()
    end = time.time() + 60
    def begun(): return journal.exists() and journal.read_text().count('\n') >= 5
    while time.time() < end and not begun(): time.sleep(.01)
    os.kill(p.pid, signal.SIGKILL); p.join()
    kept = journal.read_text().count('\n') - 1
    assert 4 <= kept < 12 and not (folder/'out'/'scores.csv').exists()
    with journal.open('a') as f: f.write('{"file": "im 9.p')
    assert score_folder(*args)['new'] == 12 - kept
    assert len(table(folder/'out')) == 12 and journal.read_text().count('\n') == 13
    asked = sum(map(int, (folder/'calls').read_text().split()))
    assert asked <= 12 + 2     # at most the batch under way is scored again


def test_changes_are_noticed(folder):
    scored(folder, batch=4)
    Image.new('RGB', (8, 8), (0, 99, 0)).save(folder/'pics'/'im 3.png')
    Image.new('RGB', (8, 8), (0, 50, 0)).save(folder/'pics'/'im 12.png')
    (folder/'p.txt').write_text('\n'.join(['new'] + ['x'*i for i in range(1, 12)] + ['more']))
    assert scored(folder, batch=4)['new'] == 3
    assert float(table(folder/'out')[3]['score']) == pytest.approx(3 + 33/255, abs=1e-5)


def test_a_mixture_has_a_column_each(folder):
    scored(folder, Mixture([Light(), Red(), Light()], [1., .1, 2.]))
    r = {k: float(v) for k, v in table(folder/'out')[6].items() if k not in ('file', 'prompt')}
    assert list(r) == ['score', 'light 1', 'red', 'light 3']
    assert r['score'] == pytest.approx(3*r['light 1'] + .1*r['red'], abs=1e-4)


def test_no_score_is_empty_and_asked_again(folder):
    res = scored(folder, Light(may_fail=True))                         # the first picture is black
    assert (res['failed'], res['new']) == (1, 12) and table(folder/'out')[0]['score'] == ''
    assert json.loads((folder/'out'/'scores.json').read_text())['scores'][0]['score'] is None
    assert scored(folder, Light(may_fail=True))['new'] == 1
    assert summarise([dict(score=None)])['mean'] is None


STOPS = {  # what is written, and what is said
    'bin.txt': (b'\xff\xfe\x00', 'expected UTF-16 text'), 'few.txt': (b'a\nb', 'found 12 pictures in'),
    'windows.txt': (b'a\nit\x92s\n' + b'b\n'*10,
                    "windows.txt, line 2: expected UTF-8 text, found the byte 0x92"),
    'gap.txt': (b'a\n\n' + b'b\n'*10, 'line 2'), 'none.txt': (b' \n', 'holds no prompt'),
    'lost.csv': (b'file,prompt\nim 1.png,a\nim 77.png,b\nim 78.png,c\n',
                 '2 of 3', 'im 77.png (no such file), im 78.png'),
    'open.csv': (b'file,prompt\nim 0.png,a red, big cat\nim 1.png,"a dog\nim 2.png,a fox\n',
                 'open.csv, row 2', 'never closed'),
    'other.csv': (b'file,kind,prompt\nim 1.png,old, and grey,a\n', 'row 1', 'found 4'),
    'unnamed.csv': (b'file,what\nim 1.png,a\n', 'prompt, caption, text', 'found file, what'),
    'empty.jsonl': (b'{"file": "im 1.png", "prompt": " "}\n', 'row 1', "expected a text in 'prompt'"),
    'half.jsonl': (b'{"file": "im 1.png", "prompt": "a \\ud83d"}\n', 'row 1', 'half of a character'),
    'twice.jsonl': (b'{"file": "im 1.png", "prompt": "a"}\n'*2, 'stands twice')}


@pytest.mark.filterwarnings('ignore:images')
@pytest.mark.parametrize('name', STOPS)
def test_prompts_that_stop_a_folder(folder, name):
    content, *parts = STOPS[name]
    (folder/name).write_bytes(content)
    with pytest.raises(ValueError) as e: scored(folder, prompts=name)
    assert all(p in str(e.value) for p in parts) and '\n' not in str(e.value), str(e.value)
    assert not (folder/'out').exists()                                 # nothing was written


def test_what_stops_a_folder(folder):
    d, p, out = folder/'pics', folder/'p.txt', folder/'out'
    def fails(part, images=d, prompts=p, reward=Light(), **kw):
        with pytest.raises(ValueError) as e: score_folder(reward, images, prompts, kw.pop('out', out), **kw)
        assert part in str(e.value) and '\n' not in str(e.value), str(e.value)
    fails('no folder', images=folder/'none'); fails('found no', prompts=folder/'none')
    fails('expected at least one picture', batch=0)
    fails("did you mean 'clip'", reward='clpi')
    (folder/'file').write_text(''); fails('cannot make the folder', out=folder/'file')
    empty = folder/'empty'; empty.mkdir(); fails('found none', images=empty)
    assert not out.exists()                                            # nothing was written for any of these
    score_folder(Light(), d, p, out, device='cpu'); fails("holds scores of 'light', not 'red'", reward=Red())


@pytest.mark.parametrize('data', [b'', b'text', 'cut', 'flip'])
def test_broken_pictures(folder, data):
    f = folder/'pics'/'im 5.png'
    raw = f.read_bytes()
    bad = dict(cut=raw[:-30], flip=raw[:45] + bytes([raw[45] ^ 255]) + raw[46:])
    f.write_bytes(bad[data] if isinstance(data, str) else data)
    with pytest.raises(ValueError, match=r'1 of 12 in .* im 5.png \(') as e: scored(folder)
    assert '\n' not in str(e.value) and not (folder/'out').exists()


def test_broken_jpegs_are_found_before_anything_is_scored(folder):
    "A cut JPEG looks sound from outside; the mended folder goes on"
    d = folder/'pics'
    for i in range(12):
        Image.effect_noise((64, 64), 50).convert('RGB').save(d/f'im {i}.jpg')
        (d/f'im {i}.png').unlink()
    whole = {i: (d/f'im {i}.jpg').read_bytes() for i in (3, 7)}
    for i, raw in whole.items(): (d/f'im {i}.jpg').write_bytes(raw[:len(raw)//2])
    said = r'2 of 12 .*im 3.jpg \(.*im 7.jpg \(.*truncated'
    with pytest.raises(ValueError, match=said) as e: scored(folder)
    assert '\n' not in str(e.value) and not (folder/'out').exists()
    for i, raw in whole.items(): (d/f'im {i}.jpg').write_bytes(raw)
    assert scored(folder)['new'] == 12


def test_pictures_of_one_content_have_one_fingerprint(folder):
    (folder/'pics'/'copy.png').write_bytes((folder/'pics'/'im 1.png').read_bytes())
    a, b, c = fingerprints(folder/'pics', ['im 1.png', 'copy.png', 'im 2.png'])
    assert a == b != c


def test_damaged_journals(tmp_path):
    for text in ('[]\n', '{}\n', '{"reward": "clip"}\n{"file": "a"}\n', 'x\n'):
        (tmp_path/'j').write_text(text)
        with pytest.raises(ValueError, match='is damaged; remove it'): open_journal(tmp_path/'j', 'clip')


def test_scores_of_an_edited_reward_do_not_mix(tmp_path):
    "Edited after it failed, the call goes on; edited after it scored, the old scores are not shown as new"
    Image.new('RGB', (8, 8), 'white').save(tmp_path/'a.png')
    (tmp_path/'p.txt').write_text('white')
    def scored(body):
        (tmp_path/'mine.py').write_text(f'def f(images, prompts): return {body}')
        return score_folder(f'{tmp_path}/mine.py:f', tmp_path, tmp_path/'p.txt', tmp_path/'out')
    with pytest.raises(ValueError, match='NameError') as e: scored('imagse')
    assert 'are kept' not in str(e.value)                             # there are none
    assert scored('[1.]')['new'] == 1 and scored('[1.]')['new'] == 0
    with pytest.raises(ValueError, match='out: .*from before it was changed; choose another folder'):
        scored('[2.]')
