"The folder of a run: whose it is, what is refused there, and that nothing of anybody is lost"
import json, os, shutil, signal, subprocess, sys, time

import pytest, torch
from PIL import Image
from safetensors.torch import load_file

pytest.importorskip('diffusers')
from diffusion_sharpening.commands.card import model_card
from diffusion_sharpening.commands.evaluate import evaluate
from diffusion_sharpening.commands.interchange import export, push
from diffusion_sharpening.commands.report import said
from diffusion_sharpening.commands.sample import sample
from diffusion_sharpening.commands.train import resume, train
from diffusion_sharpening.models.lora import lora_file
from diffusion_sharpening.training.checkpoints import checkpoints
from diffusion_sharpening.training.folder import describe, read_report, read_run
from diffusion_sharpening.training.loop import TrainingError
import shared
from shared import CODE

torch.set_num_threads(1)
LATER = '''import os
from pathlib import Path
def bright(images, prompts):
    calls = Path(__file__).with_name('calls')
    n = len(calls.read_text()) if calls.exists() else 0
    calls.write_text('.'*(n+1))
    if n == 3 and not Path(__file__).with_name('mended').exists(): raise OSError('the server is away')
    return images.mean((1, 2, 3))
'''
small = dict(heldout=0, batch=2, n=2, S=3, rank=2, checkpoint_every=1)


def go(made, out, steps=2, code='mine.py', **more):
    return shared.go(made, 'rlhf', out, steps, code, **dict(n=2) | more)


def lora(d):
    "Weights as bytes; the header of a file may order its lines in any way"
    return {k: v.numpy().tobytes() for k, v in load_file(d/lora_file).items()}


def inside(d): return {p.relative_to(d).as_posix(): p.read_bytes() for p in d.rglob('*') if p.is_file()}


@pytest.fixture(scope='module')
def finished(made, tmp_path_factory):
    out = tmp_path_factory.mktemp('runs')/'a'
    go(made, out)
    return out


# Whose the folder is

def test_a_finished_run_is_not_overwritten(made, finished):
    before = inside(finished)
    with pytest.raises(ValueError, match='a finished run of rlhf; train it longer: sharpen train rlhf'):
        go(made, finished, seed=1)
    assert inside(finished) == before


THEIRS = 'checkpoints/mine.safetensors', 'model/config.json', 'report.json', lora_file


@pytest.mark.parametrize('name', THEIRS)
def test_files_of_somebody_else_survive(made, tmp_path, monkeypatch, name):
    "Also where the output folder is the current one"
    file = tmp_path/name
    file.parent.mkdir(exist_ok=True)
    file.write_text('mine')
    monkeypatch.chdir(tmp_path)
    for out in (tmp_path, '.'):
        with pytest.raises(ValueError, match=f'has {name.split("/")[0]}, not of a run of this library'):
            go(made, out)
    with pytest.raises(ValueError, match="out: expected a folder, found ''"): go(made, '')
    assert inside(tmp_path) == {name: b'mine'}


def test_files_of_other_names_may_stay(made, tmp_path):
    (tmp_path/'notes.txt').write_text('mine')
    go(made, tmp_path, steps=1)
    assert (tmp_path/'notes.txt').read_text() == 'mine' and read_report(tmp_path)


def test_damaged_checkpoints_survive(made, tmp_path):
    for k in (1, 2):
        d = tmp_path/f'checkpoints/step-0000000{k}'
        d.mkdir(parents=True)
        (d/'weights.safetensors').write_bytes(b'half')
    before = inside(tmp_path)
    with pytest.raises(ValueError, match='holds a damaged run'): go(made, tmp_path)
    with pytest.raises(ValueError, match='no whole checkpoint'): resume('rlhf', tmp_path)
    assert inside(tmp_path) == before


@pytest.mark.parametrize('name, value', [('heldout', None), ('guidance', 3), ('px', 72)])
def test_an_edited_record_is_another_run(finished, tmp_path, name, value):
    "What was trained on, and how, is in the checkpoint too"
    shutil.copytree(finished, tmp_path/'a')
    record = json.loads((tmp_path/'a/run.json').read_text())
    (tmp_path/'a/run.json').write_text(json.dumps(record | {name: value}))
    before = inside(tmp_path)
    with pytest.raises(ValueError, match=f'{name} was .* when this run was saved and is {value} now'):
        resume('rlhf', tmp_path/'a', steps=3)
    assert inside(tmp_path) == before


def test_a_folder_in_the_place_of_a_file(finished, tmp_path):
    "Is said before anything is trained"
    shutil.copytree(finished, tmp_path/'a')
    (tmp_path/'a/report.json').unlink()
    (tmp_path/'a/report.json').mkdir()
    before = inside(tmp_path)
    with pytest.raises(ValueError, match='expected a file .*report.json, found a folder; move it away'):
        resume('rlhf', tmp_path/'a', steps=3)
    assert inside(tmp_path) == before


@pytest.mark.parametrize('name', ['metrics.jsonl', 'reward_curve.png', 'before_after.png', lora_file])
def test_a_pipe_in_the_place_of_a_file(finished, tmp_path, name):
    "Would be waited for; it is said before anything is trained"
    shutil.copytree(finished, tmp_path/'a')
    (tmp_path/'a'/name).unlink(missing_ok=True)
    os.mkfifo(tmp_path/'a'/name)
    with pytest.raises(ValueError, match=f'expected a file .*{name}, found what is no regular file'):
        resume('rlhf', tmp_path/'a', steps=3)


def test_second_process_is_refused(made, tmp_path):
    code = 'import sys, time\nfrom diffusion_sharpening.training.folder import locked\n' \
           'with locked(sys.argv[1]): print("in", flush=True); time.sleep(60)'
    p = subprocess.Popen([sys.executable, '-c', code, str(tmp_path/'a')], stdout=subprocess.PIPE, text=True)
    try:
        assert p.stdout.readline() == 'in\n'
        with pytest.raises(ValueError, match=f'in use by process {p.pid}; wait'): go(made, tmp_path/'a')
    finally: p.kill(); p.wait()
    assert go(made, tmp_path/'a', steps=1)['batches'] == 1          # the lock of a dead process is taken over
    assert not (tmp_path/'a/.sharpen.lock').exists()


def test_refused_before_anything_is_made(made, tmp_path):
    wrong = (dict(clip=-1.), 'clip'), (dict(reward='clpi'), 'clip'), (dict(preset='papr'), 'paper')
    for more, why in wrong:
        with pytest.raises(ValueError, match=why): go(made, tmp_path/'deep/out', **more)
    assert not list(tmp_path.iterdir())


# Going on

def test_refused_resume_changes_nothing(made, finished):
    before = inside(finished)
    odd = dict(reward='clip', prompts='shapes', model='shapes', preset='paper', heldout=3, out='elsewhere',
               lr=1e-3)
    for k, v in odd.items():
        with pytest.raises(ValueError, match='resume: '): resume('rlhf', finished, **{k: v})
    with pytest.raises(ValueError, match='resume: method was'): resume('sft', finished)
    with pytest.raises(ValueError, match='2 batches are done'): resume('rlhf', finished, steps=1)
    assert inside(finished) == before


def test_finished_stays_finished(finished, capsys):
    before = inside(finished)
    assert resume('rlhf', finished, reward=read_run(finished)['reward'])['batches'] == 2
    assert 'is finished' in capsys.readouterr().out and inside(finished) == before


@pytest.mark.parametrize('run_json', ['', None, '[]'])
def test_one_record_is_enough(made, tmp_path, run_json):
    "A kill that left run.json empty, or without it: the checkpoints know"
    go(made, tmp_path)
    (tmp_path/'report.json').unlink()
    if run_json is None: (tmp_path/'run.json').unlink()
    else: (tmp_path/'run.json').write_text(run_json)
    assert resume('rlhf', tmp_path, steps=3)['batches'] == 3
    assert read_run(tmp_path)['changes']['steps'] == 3


def test_unfinished_until_the_report_is_whole(made, tmp_path, monkeypatch):
    "An error after the training, in the evaluation: the LoRA is there, and the training is not made again"
    import diffusion_sharpening.commands.train as T
    def dies(*args): raise OSError('killed here')
    with monkeypatch.context() as m:
        m.setattr(T, 'write_results', dies)
        with pytest.raises(OSError): go(made, tmp_path)
    kept = lora(tmp_path)
    assert describe(tmp_path) == 'a run of rlhf that was stopped after batch 2'
    with pytest.raises(ValueError, match='stopped after batch 2; go on with it: sharpen train rlhf --resume'):
        go(made, tmp_path)
    rep = resume('rlhf', tmp_path)
    assert rep['batches'] == 2 and lora(tmp_path) == kept
    assert len((tmp_path/'metrics.jsonl').read_text().splitlines()) == 2


def test_error_saves_and_goes_on_when_mended(made, tmp_path, capsys):
    "A reward that fails once: nothing is lost, and the end is the same as without the error"
    (tmp_path/'code').mkdir()
    (tmp_path/'code/later.py').write_text(LATER)
    with pytest.raises(ValueError, match='the server is away'):
        go(tmp_path, tmp_path/'a', 4, 'code/later.py', model=str(made/'xl'), prompts=str(made/'prompts.txt'),
           checkpoint_every=0)
    assert 'saved after batch 2' in capsys.readouterr().out
    (tmp_path/'code/mended').touch()
    assert resume('rlhf', tmp_path/'a')['batches'] == 4
    go(made, tmp_path/'b', 4)
    assert lora(tmp_path/'a') == lora(tmp_path/'b')


def test_a_run_that_learned_nothing_is_begun_anew(made, tmp_path, capsys):
    "With other options than those that failed, and as if the first attempt had never been"
    (tmp_path/'later.py').write_text(LATER.replace('n == 3', 'n == 2'))       # in the first batch
    with pytest.raises(ValueError, match='the server is away'):
        go(tmp_path, tmp_path/'a', 3, 'later.py', model=str(made/'xl'), prompts=str(made/'prompts.txt'),
           heldout=1, S_eval=2)
    assert {*inside(tmp_path/'a')} == {'manifest.json', 'run.json', 'metrics.jsonl', 'before.safetensors'}
    capsys.readouterr()
    go(made, tmp_path/'a', 1, heldout=2, S_eval=2, seed=1)
    assert 'nothing was learned here yet; begun anew' in capsys.readouterr().out
    go(made, tmp_path/'b', 1, heldout=2, S_eval=2, seed=1)
    assert lora(tmp_path/'a') == lora(tmp_path/'b') and {*inside(tmp_path/'a')} == {*inside(tmp_path/'b')}
    was, now = (json.loads((tmp_path/d/'scores.json').read_text()) for d in 'ba')
    assert was == now
    with pytest.raises(ValueError, match='a finished run of rlhf'): go(made, tmp_path/'a', 1)


def test_what_changed_is_said(made, tmp_path, capsys):
    "Edited code of a reward, and another number of threads"
    (tmp_path/'mine.py').write_text(CODE)
    more = dict(reward=f'{tmp_path}/mine.py:bright')
    go(made, tmp_path/'a', **more)
    (tmp_path/'mine.py').write_text(CODE.replace('(1, 2, 3))', '(1, 2, 3))**2'))
    resume('rlhf', tmp_path/'a', steps=3)
    said = capsys.readouterr().out
    assert 'reward.code was ' in said and 'may differ from that of an uninterrupted run' in said


def test_an_edited_method_is_said(made, tmp_path, capsys):
    "The code of a method of one's own, which the library does not hold still"
    own = 'from diffusion_sharpening.methods.contrast import Contrast\nclass Mine(Contrast): pass\n'
    (tmp_path/'mine.py').write_text(own)
    shared.go(made, f'{tmp_path}/mine.py:Mine', tmp_path/'a', 1, n=2)
    resume(f'{tmp_path}/mine.py:Mine', tmp_path/'a', steps=2)
    assert 'method was' not in capsys.readouterr().out
    (tmp_path/'mine.py').write_text(own + '# another\n')
    resume(f'{tmp_path}/mine.py:Mine', tmp_path/'a', steps=3)
    assert 'method was ' in capsys.readouterr().out


MINE = """import torch
from diffusion_sharpening.methods.contrast import Contrast
class Mine(Contrast):
    def loss(self, *args):
        losses, log = super().loss(*args)
        return losses*BAD, log
"""


def test_a_method_of_a_file_goes_on_from_anywhere(made, tmp_path, monkeypatch):
    "The record says where the file is; to sample from what was trained it is not needed"
    (tmp_path/'at').mkdir()
    (tmp_path/'at'/'mine.py').write_text(MINE.replace('BAD', '1'))
    monkeypatch.chdir(tmp_path/'at')
    shared.go(made, 'mine.py:Mine', tmp_path/'a', 1, n=2, heldout=1, S_eval=1)
    monkeypatch.chdir(tmp_path)
    assert resume('at/mine.py:Mine', 'a', steps=2)['batches'] == 2
    (tmp_path/'at'/'mine.py').rename(tmp_path/'moved.py')
    sample(lora=str(tmp_path/'a'), out=str(tmp_path/'pictures'), n=1, S=1)
    assert (tmp_path/'pictures'/'0000.png').exists()
    assert resume('moved.py:Mine', 'a', steps=3)['batches'] == 3


def test_updates_that_are_not_made_are_said(made, tmp_path, capsys):
    "In a line when it begins, in a line at the end, and in the report; an error where none was made"
    (tmp_path/'some.py').write_text(MINE.replace('BAD', '(float("nan") if torch.rand(()) < .5 else 1)'))
    rep = shared.go(made, f'{tmp_path}/some.py:Mine', tmp_path/'a', 6, n=2)
    said = capsys.readouterr().out
    assert 0 < rep['skipped'] < 24 and f"{rep['skipped']} updates in 6 batches were not made" in said
    assert 'an update is not made, its loss or gradient is not finite' in said
    assert any('were not made' in o for o in rep['alarms']['rang'])
    (tmp_path/'none.py').write_text(MINE.replace('BAD', 'float("nan")'))
    with pytest.raises(TrainingError, match='8 updates in a row were not finite, and none was made'):
        shared.go(made, f'{tmp_path}/none.py:Mine', tmp_path/'b', 2, n=2)


def test_no_room_for_a_checkpoint_costs_no_weights(made, tmp_path, monkeypatch, capsys):
    "It is said before the first batch and after the last one; the weights themselves fit"
    usage = shutil.disk_usage
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage(path)._replace(free=300_000))
    rep = go(made, tmp_path/'a', 1, checkpoint_every=0)
    said = capsys.readouterr().out
    assert said.index('make room, or this run') < said.index('the run ends with its weights')
    assert (tmp_path/'a'/lora_file).exists() and rep['batches'] == 1


def test_a_reward_that_nobody_asks_is_not_loaded(made, tmp_path, capsys):
    "Pictures, no held-out prompts: weights of a reward that are not here stop nothing, and no card names it"
    (tmp_path/'pictures').mkdir()
    for i in range(3):
        Image.new('RGB', (64, 64), (80*i, 9, 9)).save(tmp_path/'pictures'/f'{i}.png')
        (tmp_path/'pictures'/f'{i}.txt').write_text(f'picture {i}')
    own = dict(model=str(made/'xl'), images=str(tmp_path/'pictures'), reward='image_reward',
               out=str(tmp_path/'a'))
    rep = train('standard', **own, heldout=0, steps=1, batch=2, rank=2)
    assert (rep['judge'], rep['judges'], rep['follows']) == ('none', {}, False)
    assert 'on the reward' not in model_card(rep)
    with pytest.raises(ValueError, match="unknown reward 'no'"):
        train('standard', **own | dict(reward='no', out=str(tmp_path/'b')), heldout=0)

def test_from_another_folder(made, tmp_path, monkeypatch):
    "A run that was started with relative paths goes on from anywhere"
    monkeypatch.chdir(made)
    train('rlhf', 'xl', 'mine.py:bright', 'prompts.txt', str(tmp_path/'a'), steps=1, **small)
    monkeypatch.chdir(tmp_path)
    assert resume('rlhf', 'a', steps=2)['batches'] == 2


def test_validation_goes_on(made, tmp_path):
    "Scores of held-out prompts on the way: of the weights that are kept, and the same after a resume"
    more = dict(heldout=2, S_eval=2, validate_every=2)
    rep = go(made, tmp_path/'a', 4, **more)
    go(made, tmp_path/'b', 3, **more)
    resume('rlhf', tmp_path/'b', steps=4)
    seen = [[{k: v for k, v in json.loads(l).items() if k.startswith('validation/')}
             for l in (tmp_path/d/'metrics.jsonl').read_text().splitlines()] for d in 'ab']
    assert seen[0] == seen[1] and [len(row) for row in seen[0]] == [0, 1, 0, 1]
    kept = rep['after']['judges']['mine:bright']['overall']['mean']
    assert seen[0][3]['validation/mine:bright'] == pytest.approx(kept, abs=1e-5)


def test_the_best_weights_go_on(made, tmp_path):
    "What `keep_best` put aside is in the checkpoints: a resumed run ends with the same weights"
    more = dict(heldout=2, S_eval=2, validate_every=1, keep_best=True, lr=1e-2)
    rep = go(made, tmp_path/'a', 4, **more)
    go(made, tmp_path/'b', 3, **more)
    again = resume('rlhf', tmp_path/'b', steps=4)
    rows = [json.loads(l) for l in (tmp_path/'a/metrics.jsonl').read_text().splitlines()]
    seen = {r['step']: r['validation/mine:bright'] for r in rows if r['kept']}
    assert rep['kept_batch'] == again['kept_batch'] == max(seen, default=0)
    line = f"after batch {rep['kept_batch']} of 4" if rep['kept_batch'] else 'from before the training'
    assert f'kept: the weights {line}' in said(rep)
    assert lora(tmp_path/'a') == lora(tmp_path/'b')
    own = {k: rep[k]['judges']['mine:bright']['overall']['mean'] for k in ('before', 'after')}
    assert own['after'] == pytest.approx(max([own['before'], *seen.values()]), abs=1e-5)
    with pytest.raises(ValueError, match='validate_every'): go(made, tmp_path/'c', 1, keep_best=True)


MUTE = """import torch
def bright(images, prompts):
    return images.mean((1, 2, 3)).masked_fill(torch.tensor(['moon' in p for p in prompts]), torch.nan)
bright.may_fail = True
"""

@pytest.mark.parametrize('keep_best', [False, True])
def test_a_judge_that_says_nothing_loses_nothing(made, tmp_path, keep_best):
    "Held-out prompts without a score: the log is JSON, checkpoints are there, and the report says none"
    (tmp_path/'mute.py').write_text(MUTE)
    (tmp_path/'moons.txt').write_text('a red moon\na blue moon\n')
    asked = dict(heldout=2, S_eval=2, validate_every=1, heldout_prompts=str(tmp_path/'moons.txt'))
    rep = go(made, tmp_path/'a', 2, reward=f'{tmp_path}/mute.py:bright', keep_best=keep_best, **asked)
    def nothing(name): raise AssertionError(f'{name} is no JSON')
    lines = (tmp_path/'a/metrics.jsonl').read_text().splitlines()
    rows = [json.loads(l, parse_constant=nothing) for l in lines]
    assert [r['validation/mute:bright'] for r in rows] == [None, None] and rows[0]['reward'] > 0
    assert checkpoints(tmp_path/'a/checkpoints')
    own = {k: rep[k]['judges']['mute:bright']['overall'] for k in ('before', 'after', 'delta')}
    assert all(o['mean'] is None and o['missing'] == 2 for o in own.values()) and 'none' in said(rep)
    assert rep.get('kept_batch', 0) == 0


def test_scores_on_prompts_of_the_training_are_said(made, finished, tmp_path, recwarn):
    "By `evaluate`, with their number; nothing is said of other prompts"
    (tmp_path/'new.txt').write_text('a red circle\na purple moon\n')
    asked = dict(lora=str(finished), reward=f'{made}/mine.py:bright', n=2, S=1)
    for more, seen in ((dict(prompts=str(tmp_path/'new.txt')), 1), ({}, 2)):
        recwarn.clear()
        assert evaluate(**asked, **more)['trained_on'] == seen
        said = [str(w.message) for w in recwarn if 'trained on' in str(w.message)]
        assert len(said) == 1 and said[0].startswith(f'prompts: {seen} of 2 are among those that {finished}')
    (tmp_path/'new.txt').write_text('a purple moon\n'); recwarn.clear()
    assert evaluate(**asked, prompts=str(tmp_path/'new.txt'))['trained_on'] == 0
    assert not any('trained on' in str(w.message) for w in recwarn)


# What is published

def test_weights_of_another_run_are_not_published(finished, tmp_path):
    import shutil
    shutil.copytree(finished, tmp_path/'a')
    assert lora_file in push(tmp_path/'a', 'me/x', dry_run=True)['files']
    (tmp_path/'a/model').mkdir()
    with pytest.raises(ValueError, match='model is not of the run'): push(tmp_path/'a', 'me/x', dry_run=True)
    (tmp_path/'a/model').rmdir()
    (tmp_path/'a'/lora_file).write_bytes(b'older')
    for f in (export, lambda d: push(d, 'me/x', dry_run=True)):
        with pytest.raises(ValueError, match='SHA-256 differs'): f(tmp_path/'a')


def test_report_without_paths(finished, made):
    out = push(finished, 'me/x', dry_run=True)
    assert not any(str(o) in out['card'] for o in (made, finished)) and 'mine.py:bright' in out['card']


@pytest.mark.slow
def test_killed_in_a_real_process(made, tmp_path):
    "SIGKILL after a checkpoint: the same command says how to go on, and going on ends in the same bits"
    go(made, tmp_path/'whole', 6)
    args = ['--model', made/'xl', '--reward', f'{made}/mine.py:bright', '--prompts', made/'prompts.txt',
            '--heldout', 0]
    pairs = [f'{k}={v}' for k, v in small.items() if k != 'heldout']
    cmd = [sys.executable, '-m', 'diffusion_sharpening', 'train', 'rlhf', *args, '--out', tmp_path/'a',
           '--steps', 6, '--set', *pairs]
    p = subprocess.Popen([*map(str, cmd)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while p.poll() is None and not checkpoints(tmp_path/'a/checkpoints'): time.sleep(.02)
    p.send_signal(signal.SIGKILL)
    p.wait()
    again = subprocess.run([*map(str, cmd)], capture_output=True, text=True)
    line = f'go on with it: sharpen train rlhf --resume {tmp_path}/a'
    assert again.returncode == 2 and line in again.stderr
    resume('rlhf', tmp_path/'a')
    assert lora(tmp_path/'a') == lora(tmp_path/'whole')
