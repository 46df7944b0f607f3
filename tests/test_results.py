"What data/results holds: numbers written by scripts through one function, or marked as older than that"
import ast, json, re, sys
from pathlib import Path
import pytest

root = Path(__file__).resolve().parents[1]
dev = root/'nbs'/'_dev'
files = sorted((root/'data'/'results').glob('*.json'))


@pytest.fixture
def results(monkeypatch):
    monkeypatch.syspath_prepend(str(dev))
    import results
    return results


@pytest.mark.parametrize('path', files, ids=lambda p: p.stem)
def test_every_file_says_where_it_comes_from(path):
    found = json.loads(path.read_text())
    if mark := found.get('provenance'):
        assert re.match(r'(gathered by hand|written by .*), before commit [0-9a-f]{7}', mark), mark
    else:
        assert re.fullmatch('[0-9a-f]{40}', found['git_commit']) and found['git_clean'] is True
        assert found['command'].startswith('python ') and found['threads'] > 0 and found['processor']
        assert found['versions']['torch']


def test_no_new_file_is_marked():
    "The mark is for files older than the function that writes them: their number may only fall"
    assert sum('provenance' in json.loads(p.read_text()) for p in files) <= 19


def test_scripts_write_through_one_function():
    "No script or test writes a file of results by itself"
    scripts = [p for p in [*dev.glob('*.py'), *(root/'tests').glob('*.py')] if p.name != 'results.py']
    text = {p.name: p.read_text(encoding='utf-8') for p in scripts}
    by_hand = re.compile(r"results.*(write_text|write_json|json\.dump\()|(write_json|json\.dump)\(.*results")
    found = {k: m[0] for k, s in text.items() if k != Path(__file__).name and (m := by_hand.search(s))}
    assert found == {}
    assert by_hand.search("(root/'data'/'results'/'x.json').write_text(s)")       # what it looks for


@pytest.mark.parametrize('path', sorted(dev.glob('*.py')), ids=lambda p: p.stem)
def test_every_script_is_python(path):
    "Scripts that only a person runs, now and then, can be read at least"
    ast.parse(path.read_text(encoding='utf-8'))


def test_write(results, tmp_path, monkeypatch, capsys):
    "Commit, tree, hardware, versions and the command as it was typed"
    typed = ['rollout', '--model', 'a b', str(tmp_path/'qm9.whl')]
    monkeypatch.setattr(sys, 'argv', [str(dev/'bench.py'), *typed])
    made = results.write('x', dict(answer=42, gap=float('nan')), ['numpy'], tmp_path/'new')
    found = json.loads((tmp_path/'new/x.json').read_text())
    assert found == made | dict(gap=None) == json.loads(capsys.readouterr().out)
    assert found['command'] == "python nbs/_dev/bench.py rollout --model 'a b' qm9.whl"
    known = 'answer git_commit git_clean processor threads versions python device'.split()
    assert set(known) <= set(found)
    assert {'numpy', 'torch'} <= set(found['versions'])


def test_command_of_pytest(results):
    assert results.command(['/x/pytest/__main__.py', '-q', 'tests']) == 'python -m pytest -q tests'
    assert results.command(['/x/bin/pytest', '-q']) == 'python -m pytest -q'


def test_no_paths_of_a_machine():
    "What was given by its place on one machine is told by its name"
    said = {p.name: json.loads(p.read_text()).get('command', '') for p in files}
    assert not {k: c for k, c in said.items() if ' /' in c or ' ~' in c}
