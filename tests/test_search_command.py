"The command `sharpen search`: killed and continued, read by `score`, refused in one line, and one's own"
import json, os, signal, sys
from pathlib import Path
import pytest

root = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(root/'nbs'/'_dev'))
from attacking import TEXTS, Child
from diffusion_sharpening.commands import cli, search
from diffusion_sharpening.models.tiny import tiny_sdxl

MINE = '''
import torch
from diffusion_sharpening.search.best_of_n import best_of_n
def redness(images, prompts): return images[:, 0].mean((1, 2))
def mute(images, prompts):
    return images[:, 0].mean((1, 2)).masked_fill(torch.tensor(['red' in p for p in prompts]), torch.nan)
mute.may_fail = True
def other(images, prompts): return -images[:, 0].mean((1, 2))
def twice(model, judge, prompts, seeds, S=20, budget=40., k=1):
    return best_of_n(model, judge, prompts, seeds + k, S, budget)
'''
ASK = ('search best_of_n --model xl --prompts prompts.txt --reward mine.py:redness --n 3 --S 2 --guidance 1 '
       '--px 32')


@pytest.fixture(scope='module')
def at(tmp_path_factory):
    d = tmp_path_factory.mktemp('search')
    tiny_sdxl(d/'xl', words=TEXTS)
    (d/'mine.py').write_text(MINE)
    (d/'prompts.txt').write_text('\n'.join(TEXTS))
    return d


def run(at, line, before=None):
    "Exit code and what was said"
    child = Child(*line.split(), at=at, before=before)
    res = child.end(120)
    return res, child.said[1].decode(), child.said[2].decode()


def files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


def dies_at(name, k):
    "SIGKILL in the `k`-th call of a function of the command, as from outside"
    def before():
        real, left = getattr(search, name), [k]
        def call(*args, **kw):
            left[0] -= 1
            if left[0] < 0: os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kw)
        setattr(search, name, call)
    return before


@pytest.fixture(scope='module')
def whole(at):
    code, out, err = run(at, f'{ASK} --budget 6 --out whole')
    assert 'whole/grid.png' in out and '6 evaluations and 3 calls' in out, err
    return files(at/'whole')


def test_killed_anywhere_it_ends_in_the_same_bytes(at, whole):
    line = f'{ASK} --budget 6 --out cut'
    places = dict(write_json=0, write_whole=1, keep=1, write_pictures=0, draw=0)
    for name, k in places.items():
        run(at, line, dies_at(name, k))
        assert files(at/'cut') != whole
    run(at, line)
    ours = files(at/'cut')
    assert ours == whole
    run(at, line)
    assert files(at/'cut') == whole


def test_the_folder_is_read_by_score(at, whole):
    ask = 'score --images whole --prompts whole/prompts.jsonl --reward mine.py:redness --json'
    code, out, err = run(at, ask)
    told = [json.loads(whole[f'records/{i:04d}.json']) for i in range(3)]
    assert abs(json.loads(out)['mean'] - sum(o['value'] for o in told)/3) < .005, err
    assert [o['prompt'] for o in told] == TEXTS[:3]
    assert all(o['lineage'][-1]['value'] == max(r[0] for r in o['rounds'][-1]['scores']) for o in told)


@pytest.mark.parametrize('more, said', [
    ('--budget 1', 'budget: expected at least 2 evaluations for one picture of 2 steps, found 1'),
    ('--budget 6 --settings m=2', 'setting'),
    ('--budget 6 --settings chunk=x', 'chunk: expected a whole number'),
    ('--budget 6 --settings eta', 'expected key=value'),
    ('--budget 6 --combine rank', 'expected several rewards'),
    ('--budget 6 --n 0', 'n: expected at least 1'),
    ('--budget 1e30', 'budget: expected 0 to 1000000'),
    ('--budget 8 --out whole', 'holds a search with budget 6'),
    ('--budget 6 --reward mine.py:other --out whole', 'holds a search with reward')])
def test_refusals(at, whole, more, said):
    code, out, err = run(at, f'{ASK} --out refused {more}')
    assert said in err and err.count('\n') == 1, err
    assert not (at/'refused').exists() and files(at/'whole') == whole


def test_names(at):
    assert "Did you mean 'demon'" in run(at, ASK.replace('best_of_n', 'demmon'))[2]
    assert 'no module' in run(at, ASK.replace('best_of_n', 'nowhere:f'))[2]


def test_a_search_of_ones_own(at):
    line = ASK.replace('best_of_n', 'mine.py:twice')
    for k in (1, 2): run(at, f'{line} --budget 4 --settings k={k} --out own{k} --combine minmax '
                             '--reward mine.py:redness:1,mine.py:other:.5')
    a, b = (json.loads((at/f'own{k}'/'records'/'0000.json').read_text()) for k in (1, 2))
    assert a['seed'] != b['seed'] and a['nfe'] == b['nfe'] == 4 and len(a['rounds'][0]['scores'][0]) == 2


def test_files_of_others_stay(at, capsys):
    "A folder of the user's own: neither `search` nor `sample` replaces anything in it, and each its own only"
    for name, asked in (('search', ['best_of_n', '--budget', '4']), ('sample', [])):
        line = [name, *asked, '--model', str(at/'xl'), '--prompts', str(at/'prompts.txt'), '--n', '2',
                '--S', '2', '--guidance', '1', '--px', '32']
        line += ['--reward', f'{at}/mine.py:redness'] if asked else []
        for k in ('0001.png', 'grid.png', 'prompts.jsonl'):
            mine = at/f'{name}-{k}'
            mine.mkdir()
            (mine/k).write_text('mine')
            with pytest.raises(ValueError, match=f'holds {k}, which this command has not written'):
                cli.run([*line, '--out', str(mine)])
            assert files(mine) == {k: b'mine'}
        assert cli.run([*line, '--out', str(at/name)]) == cli.run([*line, '--out', str(at/name)]) == 0
    with pytest.raises(ValueError, match='holds 0000.png'): cli.run([*line, '--out', str(at/'search')])
    few = [o if o != '2' or line[i-1] != '--n' else '1' for i, o in enumerate(line)]
    with pytest.raises(ValueError, match='pictures of n 2, not 1'): cli.run([*few, '--out', str(at/'sample')])
    assert (at/'sample'/'0001.png').exists()


def test_a_prompt_without_a_score_keeps_its_picture(at):
    code, out, err = run(at, ASK.replace('redness', 'mute') + ' --budget 4 --out mute')
    assert code.code == 0 and '1 missing' in out, err
    assert len([*(at/'mute'/'records').iterdir()]) == 3
