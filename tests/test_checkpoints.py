"Checkpoints under damage and under hands that are not ours (promises of the engine: resume, kills, damage)"
import json, os
from pathlib import Path

import pytest, torch

from diffusion_sharpening.basics.files import read_json
from diffusion_sharpening.training import checkpoints as C
from diffusion_sharpening.training.checkpoints import (
    CheckpointError, checkpoints, latest, load_checkpoint, load_latest, manifest, save_checkpoint, verify)

STATE = dict(weights=dict(a=torch.arange(12.).view(3, 4)), optimizer={'a/exp_avg': torch.ones(3, 4)})


def save(d, k, keep=9): return save_checkpoint(d, k, STATE, dict(step=k), keep)
def names(d): return sorted(p.name for p in d.iterdir())


def cut(p): p.write_bytes(p.read_bytes()[:-1])
def grown(p): p.write_bytes(p.read_bytes() + b'x')
def flipped(p): p.write_bytes(bytes([p.read_bytes()[0] ^ 1]) + p.read_bytes()[1:])
def empty(p): p.write_bytes(b'')
def gone(p): p.unlink()
def folder(p): p.unlink(); p.mkdir()
def pipe(p): p.unlink(); os.mkfifo(p)
def loop(p): p.unlink(); p.symlink_to(p.name)
def deep(p): p.write_text('['*10**6)
def digits(p): p.write_text('1'*5000)
def elsewhere(p):
    files = {'../x': dict(bytes=0, sha256='')}
    p.write_text(json.dumps(dict(files=files, seal=C._seal(files))))
harms = cut, grown, flipped, empty, gone, folder, pipe, loop, deep, digits


FILES = 'manifest.json', 'record.json', 'weights.safetensors', 'optimizer.safetensors'


@pytest.mark.parametrize('file', FILES)
@pytest.mark.parametrize('harm', harms)
def test_damage_falls_back(tmp_path, harm, file):
    "Whatever the damage: one line that names the folder, and the checkpoint before is used"
    for k in (1, 2): save(tmp_path, k)
    harm(tmp_path/'step-00000002'/file)
    said = []
    path, tensors, record = load_latest(tmp_path, said.append)
    assert record == dict(step=1) and torch.equal(tensors['weights']['a'], STATE['weights']['a'])
    assert latest(tmp_path, said.append) == path and len(said) == 2
    assert all('step-00000002' in l and '\n' not in l and l.endswith('trying the one before') for l in said)


def unreadable(path, monkeypatch):
    "An error of the disk while a file is read"
    def broken(file):
        if Path(file).parent == path: raise OSError(5, 'Input/output error')
        return old(file)
    old = C.digest
    monkeypatch.setattr(C, 'digest', broken)


def test_error_of_the_disk(tmp_path, monkeypatch):
    for k in (1, 2): save(tmp_path, k)
    unreadable(tmp_path/'step-00000002', monkeypatch)
    said = []
    assert load_latest(tmp_path, said.append)[2] == dict(step=1) and 'Input/output error' in said[0]


OTHERS = '[]', '3', '{}', 'null', '{"files": 3, "seal": ""}', '{"files": {"a": {}}, "seal": "x"}'


@pytest.mark.parametrize('text', OTHERS)
def test_manifest_of_something_else(tmp_path, text):
    (tmp_path/'manifest.json').write_text(text)
    with pytest.raises(CheckpointError): verify(tmp_path)


def test_sealed_manifest_may_still_be_wrong(tmp_path):
    "The seal is no secret: names outside the folder, a record that is nested too deeply"
    path = save(tmp_path, 1)
    elsewhere(path/'manifest.json')
    with pytest.raises(CheckpointError): verify(path)
    (path/'manifest.json').unlink()
    (path/'record.json').write_text('['*10**6)
    (path/'manifest.json').write_text(json.dumps(manifest(path)))
    verify(path)
    with pytest.raises(CheckpointError, match='nested too deeply'): load_checkpoint(path)


def test_file_in_the_place_of_a_checkpoint(tmp_path):
    save(tmp_path, 1)
    (tmp_path/'step-00000002').write_text('')
    assert latest(tmp_path, lambda _: None).name == 'step-00000001'


def test_damaged_ones_do_not_count(tmp_path):
    "With the newest two damaged, the two whole ones before them stay"
    for k in range(1, 5): save(tmp_path, k)
    for k in (3, 4): flipped(tmp_path/f'step-0000000{k}/weights.safetensors')
    save(tmp_path, 5, keep=2)
    assert names(tmp_path) == [f'step-0000000{k}' for k in (2, 3, 4, 5)]


def test_nothing_of_others_is_removed(tmp_path):
    "A folder called like a checkpoint, one with a file more, and what only looks hidden"
    save(tmp_path, 1)
    (tmp_path/'step-00000001/notes.txt').write_text('mine')
    for name in ('step-00000002', '.old-mine', '.part-00000003', 'best'): (tmp_path/name).mkdir()
    (tmp_path/'.part-00000003/notes.txt').write_text('mine')
    for k in (4, 5, 6): save(tmp_path, k, keep=1)
    others = ['.old-mine', '.part-00000003', 'best', 'step-00000001', 'step-00000002']
    assert names(tmp_path) == [*others, 'step-00000006']
    assert (tmp_path/'step-00000001/notes.txt').read_text() == 'mine'


def test_killed_while_a_file_was_written(tmp_path):
    "safetensors writes under a name of its own first; a kill leaves that file, and the batch is saved again"
    save(tmp_path, 1)
    (tmp_path/'.part-00000002').mkdir()
    for name in ('weights.safetensors', '.tmp6jXg0k'): (tmp_path/'.part-00000002'/name).write_bytes(b'half')
    save(tmp_path, 2)
    assert names(tmp_path) == ['step-00000001', 'step-00000002']


@pytest.mark.parametrize('kind', ['part', 'old'])
def test_somebody_elses_file_stops_no_save(tmp_path, kind):
    "It stays where it is; the same batch can be saved, and saved again"
    mine = tmp_path/f'.{kind}-00000002'
    mine.mkdir()
    (mine/'notes.txt').write_text('mine')
    for _ in range(2): save(tmp_path, 2)
    assert names(tmp_path) == [mine.name, 'step-00000002'] and names(mine) == ['notes.txt']


def test_damaged_one_makes_room(tmp_path):
    "A run that fell back comes to the damaged one's number again"
    for _ in range(2):
        cut(save(tmp_path, 3)/'weights.safetensors')
    save(tmp_path, 3)
    assert names(tmp_path) == ['damaged-00000003', 'damaged1-00000003', 'step-00000003']


def test_full_disk_leaves_what_was_saved(tmp_path, monkeypatch):
    save(tmp_path, 1)
    def full(*args): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(C, 'save_tensors', full)
    with pytest.raises(CheckpointError, match='No space left .*what was saved before is untouched'):
        save(tmp_path, 2)
    assert names(tmp_path) == ['step-00000001'] and latest(tmp_path)


def test_json_is_bounded(tmp_path):
    (tmp_path/'big.json').write_text('"' + ' '*100 + '"')
    with pytest.raises(ValueError, match='more than 50 bytes'): read_json(tmp_path/'big.json', 50)
    os.mkfifo(tmp_path/'pipe.json')
    with pytest.raises(ValueError, match='not a regular file'): read_json(tmp_path/'pipe.json')
    (tmp_path/'latin.json').write_bytes('"é"'.encode('latin1'))
    with pytest.raises(ValueError, match='not readable JSON'): read_json(tmp_path/'latin.json')
