"The commands: what they write, and that wrong input is one clear line, exit code 2 and nothing written"
import json, os, re, signal, subprocess, sys, time
from pathlib import Path

import pytest, torch
from PIL import Image

import diffusion_sharpening
from diffusion_sharpening.basics.devices import Device
from diffusion_sharpening.commands import cli, job, report as reports, train as command
from diffusion_sharpening.evaluation.measure import report
from diffusion_sharpening.commands.load import load_model
from diffusion_sharpening.commands.report import table
from diffusion_sharpening.models.denoiser import Denoiser
from diffusion_sharpening.rewards.protocol import Reward
from diffusion_sharpening.rewards.remote import serving
from diffusion_sharpening.training import advice
from diffusion_sharpening.models.tiny import tiny_sdxl
from diffusion_sharpening.worlds.shapes.draw import prompts

torch.set_num_threads(1)
small = ['n=2', 'S=2', 'batch=2', 'rank=2']    # settings under which a training takes a second
keys = {'method', 'model', 'reward', 'seed', 'steps', 'seconds', 'before', 'after', 'delta',
        'heldout_prompts', 'nfe_per_image', 'versions', 'git_commit', 'alarms'}


@pytest.fixture(scope='module')
def xl(tmp_path_factory):
    "Folder of a tiny SDXL pipeline"
    d = tmp_path_factory.mktemp('model')/'xl'
    tiny_sdxl(d, words=' '.join(prompts(200)).split(), max_length=32)
    return str(d)


def strict(text):
    "JSON without NaN and infinities, which other languages do not read"
    def refuse(o): raise AssertionError(f'{o} in JSON')
    return json.loads(text, parse_constant=refuse)


def sharpen(*args):
    "A real run of the console command"
    code = 'from diffusion_sharpening.commands.cli import main; main()'
    return subprocess.run([sys.executable, '-c', code, *map(str, args)], capture_output=True, text=True,
                          env=dict(os.environ, OMP_NUM_THREADS='1'))


def call(monkeypatch, *args):
    "The exit code of the console command, run here"
    with pytest.raises(SystemExit) as e: cli.main([*map(str, args)])
    return e.value.code


def one_line(err, part):
    assert err.startswith('sharpen: ') and err.endswith('\n') and err.count('\n') == 1, err
    assert part in err


def refused(monkeypatch, capsys, out, part, *args):
    "Exit code 2, one line that holds `part`, and no folder `out`"
    assert call(monkeypatch, *args) == 2
    res = capsys.readouterr()
    one_line(res.err, part)
    assert not out.exists()
    return res


# What is refused. `{xl}`: a model, `{out}`: the output folder, `{tmp}`: a folder with the files below

files = dict(empty='', blank='\n  \n', three='a red circle\na blue square\na green star\n', broken='{"n": 3',
             array='[1, 2]', wrong='{"betta": 1}', twice='{"n": 3, "n": 4}')
train = ('train rlhf --model {xl} --reward checker! --heldout 2 --S-eval 1 --steps 1 --out {out} '
         '--set n=2 S=2 batch=2 rank=2')
bad = {
    'no such command': ('trian rlhf', "you mean 'train'"),
    'no method named': ('train', 'method'),
    'no such option': ('train rlhf --outt {out}', '--outt'),
    'steps not a number': ('train rlhf --steps many --out {out}', '--steps'),
    'no such method': (train.replace('rlhf', 'rlfh'), "you mean 'rlhf'"),
    'no such preset': (train + ' --preset papr', "you mean 'paper'"),
    'no such reward': (train.replace('checker!', 'clpi'), "you mean 'clip'"),
    'the exam as reward': (train.replace('checker!', 'checker'), 'exam'),
    'no reward': (train.replace('checker!', ','), 'reward'),
    'no such setting': (train + ' --set betta=1', "you mean 'beta'"),
    'a setting twice': (train + ' --set n=3', 'found it twice'),
    'a setting twice in a config': (train + ' --config {tmp}/twice', "'n' is there twice"),
    'setting without value': (train + ' --set beta', 'key=value'),
    'no such model': (train.replace('{xl}', '{tmp}/nothing'), 'model: expected a folder or'),
    'a folder, but no model': (train.replace('{xl}', '{tmp}'), 'model_index.json'),
    'no such prompts': (train + ' --prompts {tmp}/nothing', 'prompts: expected'),
    'empty prompts': (train + ' --prompts {tmp}/empty', 'no prompt'),
    'blank prompts': (train + ' --prompts {tmp}/blank', 'no prompt'),
    'no candidates': (train.replace(' n=2', ' n=0'), 'n: expected at least'),
    'one candidate': (train.replace(' n=2', ' n=1'), 'n: expected at least 2'),
    'no prompts per batch': (train.replace('batch=2', 'batch=0'), 'batch: expected at least 1'),
    'negative steps': (train + ' --steps -1', 'steps: expected at least 0'),
    'negative heldout': (train + ' --heldout -1', 'heldout: expected'),
    'negative heldout of a file': (train + ' --heldout -1 --prompts {tmp}/three', 'heldout: expected'),
    'no steps in the evaluation': (train + ' --S-eval 0', 'S_eval: expected'),
    'a word for a number': (train.replace(' n=2', ' n=two'), 'n'),
    'half a step': (train + ' --set steps=1.5', 'steps'),
    'NaN for a number': (train.replace('batch=2', 'batch=NaN'), 'batch'),
    'Python for JSON': (train + ' --set bptt=False', 'bptt'),
    'an option as setting': (train + ' --set out=5', 'out'),
    'no such config': (train + ' --config {tmp}/nothing', 'config: '),
    'broken config': (train + ' --config {tmp}/broken', 'config: '),
    'config that is a list': (train + ' --config {tmp}/array', 'expected an object'),
    'no such setting in config': (train + ' --config {tmp}/wrong', "you mean 'beta'"),
    'pictures that are not there': (train.replace('rlhf', 'sft --preset paper').replace('S=2', 'S=5'),
                                    'image-caption pairs'),
    'no pictures to make': ('sample --model {xl} --out {out} --n 0', 'n: expected'),
    'no sampler steps': ('sample --model {xl} --out {out} --S 0', 'S: expected'),
    'guidance below one': ('sample --model {xl} --out {out} --guidance .5', 'guidance: expected'),
    'sample of an empty file': ('sample --model {xl} --out {out} --prompts {tmp}/empty', 'no prompt'),
    'no such LoRA': ('sample --model {xl} --out {out} --n 1 --S 1 --lora {tmp}/nothing', 'lora: expected'),
    'a folder without LoRA': ('evaluate --model {xl} --reward checker --n 1 --lora {tmp}', 'lora: expected'),
    'nothing to evaluate': ('evaluate --model {xl} --reward checker --n 0', 'n: expected'),
    'no steps to evaluate': ('evaluate --model {xl} --reward checker --n 2 --S 0', 'S: expected')}


@pytest.mark.parametrize('args, part', bad.values(), ids=bad)
def test_bad_input(xl, tmp_path, monkeypatch, capsys, args, part):
    for k, v in files.items(): (tmp_path/k).write_text(v)
    out = tmp_path/'runs'/'out'
    refused(monkeypatch, capsys, out, part, *[o.format(xl=xl, out=out, tmp=tmp_path) for o in args.split()])
    assert {o.name for o in tmp_path.iterdir()} == set(files)


@pytest.mark.parametrize('below', ['', 'deeper'])
@pytest.mark.parametrize('command', ['train rlhf --reward checker!', 'sample --n 1 --S 1'])
def test_out_is_a_file(xl, tmp_path, monkeypatch, capsys, command, below):
    file = tmp_path/'out'
    file.write_text('mine')
    assert call(monkeypatch, *command.split(), '--model', xl, '--out', file/below) == 2
    one_line(capsys.readouterr().err, 'out: ')
    assert file.read_text() == 'mine'


class Flawed(Reward):
    "Right for the first `good` calls, then wrong in one way"
    name = 'flawed'
    def __init__(self, kind, good=0): self.kind, self.good, self.calls = kind, good, 0
    def score(self, images, prompts):
        self.calls += 1
        s = images.mean((1, 2, 3))
        if self.calls <= self.good: return s
        if self.kind == 'nan': s[-1] = float('nan')
        flaws = dict(nan=s, inf=s/0, short=s[:-1], long=torch.cat([s, s]), scalar=s.mean(), none=s[:0])
        return flaws[self.kind]


def flawed(monkeypatch, *args): monkeypatch.setattr(job, 'load_reward', lambda *a, **k: Flawed(*args))


@pytest.mark.parametrize('heldout', [0, 2])
@pytest.mark.parametrize('kind', ['nan', 'inf', 'short', 'long', 'scalar', 'none'])
def test_flawed_reward(xl, tmp_path, monkeypatch, capsys, kind, heldout):
    "The name of the reward is in the message; it is found before anything is sampled or written"
    (tmp_path/'three').write_text(files['three'])
    flawed(monkeypatch, kind)
    args = ['--model', xl, '--out', tmp_path/'out', '--heldout', heldout, '--S-eval', 1, '--steps', 1]
    assert call(monkeypatch, 'train', 'rlhf', *args, '--prompts', tmp_path/'three', '--set', *small) == 2
    err = capsys.readouterr().err
    one_line(err, 'flawed: ')
    assert not (tmp_path/'out').exists()


def test_reward_that_breaks_later(xl, tmp_path, monkeypatch, capsys):
    "The log of what was done stays, without report or weights; the message has its own line"
    flawed(monkeypatch, 'short', 3)
    args = ['--model', xl, '--out', tmp_path/'out', '--heldout', 0, '--steps', 5, '--set', *small]
    assert call(monkeypatch, 'train', 'rlhf', *args) == 2
    one_line(capsys.readouterr().err.splitlines(True)[-1], 'flawed: ')
    there = sorted(o.name for o in (tmp_path/'out').iterdir())
    assert there == ['checkpoints', 'manifest.json', 'metrics.jsonl', 'run.json']
    assert len((tmp_path/'out/metrics.jsonl').read_text().splitlines()) == 2


def test_reward_that_goes_blind(xl, tmp_path, monkeypatch, capsys):
    "Scores that are not finite are skipped; too many in a row save the run and end it, naming the prompts"
    flawed(monkeypatch, 'nan', 3)
    args = ['--model', xl, '--out', tmp_path/'out', '--heldout', 0, '--steps', 9, '--set', *small,
            'patience=3']
    assert call(monkeypatch, 'train', 'rlhf', *args) == 1
    one_line(capsys.readouterr().err.splitlines(True)[-1],
             '3 updates in a row were not finite; the last prompts: a ')
    rows = [json.loads(l) for l in (tmp_path/'out/metrics.jsonl').read_text().splitlines()]
    assert [r['skipped'] for r in rows] == [0, 0, 1, 2, 3]
    assert [o.name for o in (tmp_path/'out/checkpoints').iterdir()] == ['step-00000005']


# What comes out

def test_methods_and_rewards_are_json(capsys):
    assert cli.run(['methods', '--json']) == 0
    found = {m['name']: m for m in strict(capsys.readouterr().out)}
    assert {'sft', 'rlhf'} <= set(found)
    assert all({'paper', 'released', 'default'} <= set(found[m]['presets']) for m in ('sft', 'rlhf'))
    for m in found.values():
        assert 'default' in m['presets']
        assert m['about'] and all(o['about'] for o in m['settings'])
    assert cli.run(['rewards', '--json']) == 0
    found = {r['name']: r for r in strict(capsys.readouterr().out)}
    for r in found.values(): assert r['needs'] and isinstance(r['usable'], bool) and (r['usable'] or r['how'])
    assert found['checker']['usable']


def test_help_and_lists_for_people(capsys):
    for args in ([], ['--help'], ['methods'], ['rewards']): assert cli.run(args) == 0
    out = capsys.readouterr().out
    assert all(c in out for c in [*cli.COMMANDS, 'sft', 'clip'])
    for c in cli.COMMANDS:
        assert cli.run([c, '--help']) == 0 and '--' in capsys.readouterr().out


def interval(o): return o['low'] <= o['mean'] <= o['high']


def check_report(rep):
    assert keys <= set(rep)
    for side in ('before', 'after', 'delta'):
        judges = rep[side]['judges']
        assert {rep['judge'], 'checker', 'checker (strict)'} <= set(judges) and rep[side]['image_stats']
        for groups in judges.values(): assert len(groups) == 7 and all(map(interval, groups.values()))
    assert rep['before']['sampler'] == rep['after']['sampler']
    for judge in judges:
        b, a, d = (rep[s]['judges'][judge]['overall'] for s in ('before', 'after', 'delta'))
        assert d['mean'] == pytest.approx(a['mean'] - b['mean'], abs=1e-6)
    assert rep['nfe_per_image']['before'] == rep['nfe_per_image']['after'] > 0
    assert rep['versions']['torch'] == torch.__version__.split('+')[0] and rep['seconds'] > 0


@pytest.fixture(scope='module')
def trained(xl, tmp_path_factory):
    "A whole training as a user starts it: settings from the file, some of them changed on the line"
    tmp = tmp_path_factory.mktemp('trained')
    (tmp/'config.json').write_text('{"n": 3, "S": 2, "batch": 2}')
    res = sharpen('train', 'rlhf', '--model', xl, '--reward', 'checker!', '--prompts', 'shapes',
                  '--heldout', 12, '--S-eval', 2, '--steps', 2, '--out', tmp/'out',
                  '--config', tmp/'config.json', '--set', 'n=2', '--set', 'rank=2', 'seed=5')
    assert res.returncode == 0, res.stderr
    return tmp/'out', res


def test_train_writes_a_report(trained, xl):
    out, res = trained
    rep = strict((out/'report.json').read_text())
    check_report(rep)
    assert (rep['method'], rep['model'], rep['reward']) == ('rlhf', xl, 'checker!')
    assert (rep['seed'], rep['steps'], rep['heldout_prompts']) == (5, 2, 12)
    made = rep['settings']['run'] | rep['settings']['method']
    assert [made[k] for k in ('n', 'S', 'batch', 'rank')] == [2, 2, 2, 2]
    files = 'pytorch_lora_weights.safetensors', 'metrics.jsonl', 'reward_curve.png', 'before_after.png'
    assert all((out/o).stat().st_size for o in files)
    assert [strict(o)['step'] for o in (out/'metrics.jsonl').read_text().splitlines()] == [1, 2]


def test_train_is_quiet(trained):
    "A progress bar on stderr and nothing else; a table on stdout"
    _, res = trained
    lines = [o for o in res.stderr.replace('\r', '\n').splitlines() if o.strip()]
    assert lines and all(o.startswith('sharpening: ') for o in lines), res.stderr
    assert '12 held-out prompts' in res.stdout and 'checker, overall' in res.stdout


def test_git_commit(trained):
    root = Path(__file__).parents[1]
    git = subprocess.run(['git', '-C', root, 'rev-parse', 'HEAD'], capture_output=True, text=True)
    assert json.loads((trained[0]/'report.json').read_text())['git_commit'] == (git.stdout.strip() or None)


def test_sample_and_evaluate_with_lora(trained, xl, tmp_path, capsys):
    out = tmp_path/'pictures'
    model = ['--model', xl, '--lora', str(trained[0])]
    assert cli.run(['sample', *model, '--out', str(out), '--n', '3', '--S', '2']) == 0
    assert sorted(o.stem for o in out.iterdir()) == ['0000', '0001', '0002', 'grid', 'prompts', 'sample']
    assert Image.open(out/'0000.png').size == (64, 64)                              # no frame
    assert capsys.readouterr().out.strip() == f'{out}/grid.png'
    assert cli.run(['sample', *model, '--out', str(out), '--n', '3', '--S', '2']) == 0        # the same again
    for other, said in ((model[:2], 'lora '), ([*model, '--seed', '1'], 'seed 0, not 1')):
        with pytest.raises(ValueError, match=f'holds pictures of {said}'):
            cli.run(['sample', *other, '--out', str(out), '--n', '3', '--S', '2'])
    capsys.readouterr()
    assert cli.run(['evaluate', *model, '--reward', 'checker', '--n', '12', '--S', '2', '--json']) == 0
    rep, after = strict(capsys.readouterr().out), json.loads((trained[0]/'report.json').read_text())['after']
    assert rep['heldout_prompts'] == 12
    found, was = (r['judges']['checker']['overall'] for r in (rep, after))
    assert found.pop('over') == was.pop('over') == '12 prompts' and found == pytest.approx(was, abs=1e-3)
    assert rep['sampler'] == after['sampler']


def test_few_prompts_are_strict_json(xl, capsys):
    "One prompt has no interval; what is written is still JSON, and what is printed is still a table"
    args = ['evaluate', '--model', xl, '--reward', 'checker', '--n', '1', '--S', '1']
    assert cli.run(args + ['--json']) == 0
    strict(capsys.readouterr().out)
    assert cli.run(args) == 0


@pytest.mark.parametrize('name', ['first', 'flawed:2'])
def test_reward_spec_need_not_be_its_name(xl, tmp_path, monkeypatch, name):
    "Prompts that no checker reads, a reward asked for with weights: report and pictures are made"
    (tmp_path/'plain').write_text('something else\nand more\nand\nless\n')
    flawed(monkeypatch, 'nan', 99)
    rep = command.train('rlhf', xl, name, str(tmp_path/'plain'), str(tmp_path/'out'), heldout=2, S_eval=1,
                     steps=1, n=2, S=2, batch=2, rank=2)
    assert [*rep['after']['judges']] == [rep['judge']]
    assert interval(rep['delta']['judges'][rep['judge']]['overall'])
    assert (tmp_path/'out/before_after.png').exists() and '2 held-out prompts' in table(rep)


def test_steps_on_the_line_win(xl, tmp_path):
    "An option that was typed is stronger than the file"
    (tmp_path/'config.json').write_text('{"steps": 3, "S": 2, "n": 2, "batch": 2, "rank": 2}')
    args = ['train', 'rlhf', '--model', xl, '--reward', 'checker!', '--heldout', '0',
            '--config', str(tmp_path/'config.json')]
    for extra, steps in ([], 3), (['--steps', '1'], 1):
        assert cli.run([*args, '--out', str(tmp_path/f'{steps}'), *extra]) == 0
        assert json.loads((tmp_path/f'{steps}/report.json').read_text())['steps'] == steps


def test_alarms_are_in_the_report(xl, tmp_path, monkeypatch):
    "What the log watched, and what rang on the held-out pictures of this run; the table repeats it"
    asked = []
    def ring(images, reference, stats):
        asked.append((images, reference))
        return ['pictures are darker']
    monkeypatch.setattr(reports, 'alarms', ring)
    rep = command.train('rlhf', 'shapes', 'clip', out=str(tmp_path/'out'), heldout=12, S_eval=1, steps=20,
                        n=2,
                        S=2, batch=2, rank=2, lr=.03)
    seen = strict((tmp_path/'out/report.json').read_text())['alarms']
    assert seen == rep['alarms'] and seen['rang'][0] == 'pictures are darker'
    assert {'image/brightness', 'image/bleed', 'held-out/checker'} <= set(seen['watched'])
    after, before = asked[0]
    assert after.shape == before.shape == (12, 3, 64, 64) and not after.equal(before)
    rows = [json.loads(l) for l in (tmp_path/'out/metrics.jsonl').read_text().splitlines()]
    ends = seen['watched']['image/brightness']
    assert [ends['first'], ends['last']] == [r['image/brightness'] for r in rows if 'image/brightness' in r]
    assert 'alarm: pictures are darker' in table(rep)


def test_every_weight_can_be_trained(xl, tmp_path):
    "rank 0: the whole pipeline is saved, and loads by its folder"
    command.train('rlhf', xl, 'checker!', out=str(tmp_path/'out'), heldout=0, steps=1, n=2, S=2, batch=2,
               rank=0)
    assert load_model(str(tmp_path/'out/model')).sample('a red circle', S=1).isfinite().all()


def test_refusal_in_a_real_process(xl, tmp_path):
    "Nothing but the one line, also from the libraries below"
    res = sharpen('sample', '--model', xl, '--out', tmp_path/'out', '--n', 1, '--S', 1, '--lora', tmp_path)
    assert res.returncode == 2 and res.stdout == '' and not (tmp_path/'out').exists()
    one_line(res.stderr, f'lora: expected pytorch_lora_weights.safetensors in {tmp_path}')


# On the embedded model

def test_embedded_rewards_are_usable(capsys):
    assert cli.run(['rewards', '--json']) == 0
    assert {r['name']: r['usable'] for r in json.loads(capsys.readouterr().out)}['clip']


@pytest.mark.parametrize('method', ['rlhf', pytest.param('sft', marks=pytest.mark.slow)])
def test_embedded_model_trains_on_clip(tmp_path, monkeypatch, method):
    "The main job in small: learned reward, exam beside it"
    args = ['--heldout', 12, '--S-eval', 4, '--steps', 1, '--set', 'batch=2', 'n=2', 'S=4']
    assert call(monkeypatch, 'train', method, '--out', tmp_path/method, *args) == 0
    rep = strict((tmp_path/method/'report.json').read_text())
    check_report(rep)
    assert rep['nfe_per_image']['after'] == 4 and rep['reward'] == 'clip'


# Every command as a command line

def test_each_command(trained, tmp_path, monkeypatch, capsys):
    "export, push, score, plan, methods, rewards and serve-reward, from the command line to what they print"
    run, pics = trained[0], tmp_path/'pics'
    # model: the run's own
    assert call(monkeypatch, 'sample', '--lora', run, '--out', pics, '--n', 2, '--S', 1) == 0
    lines = [('export', run, '--out', tmp_path/'x.safetensors'),
             ('export', run, '--layout', 'diffusers', '--out', tmp_path),
             ('push', run, 'me/sharp', '--dry-run'),
             ('merge', f'{run}:.5,{run}:.5', '--out', tmp_path/'m'),
             ('plan', 'rlhf', '--json'),
             ('score', '--images', pics, '--prompts', pics/'prompts.jsonl', '--reward', 'clip@shapes',
              '--out', tmp_path/'s'),
             ('search', 'fk', '--lora', run, '--out', tmp_path/'f', '--n', 1, '--S', 2, '--budget', 4,
              '--reward', 'clip@shapes'),
             ('experiment', 'fractions', '--model', 'layouts', '--only', 'GRAFT', '--budget', 400,
              '--seeds', 1, '--heldout', 4, '--no-tune', '--out', tmp_path/'e'),
             ('methods',), ('rewards',), ('evaluate', '--lora', run, '--reward', 'clip@shapes', '--n', 2,
                                          '--S', 1)]
    for argv in lines:
        capsys.readouterr()
        assert call(monkeypatch, *argv) == 0, argv
        assert capsys.readouterr().out.strip(), argv
    assert (tmp_path/'x.safetensors').stat().st_size and {l[0] for l in lines} | {'sample', 'train'} | {
        'demo', 'serve-reward'} == set(cli.COMMANDS)
    assert call(monkeypatch, 'serve-reward', '--reward', 'clip@nothing') == 2
    assert call(monkeypatch, 'demo', '--steps', -1, '--out', tmp_path/'demo') == 2


def test_demo(tmp_path, monkeypatch, capsys):
    "Few steps, what it prints and leaves, and that it goes on where it was"
    monkeypatch.setattr(job, 'heldout_number', lambda n, model: 4)       # its 240 prompts take minutes
    assert call(monkeypatch, 'demo', '--steps', 1, '--out', tmp_path/'demo') == 0
    out = capsys.readouterr().out
    assert '4 held-out prompts' in out and 'checker, overall' in out
    assert f'report.json in {tmp_path}/demo' in out
    there = {p.name for p in (tmp_path/'demo').iterdir()}
    assert {'before_after.png', 'reward_curve.png', 'report.json'} <= there
    assert call(monkeypatch, 'demo', '--steps', 1, '--out', tmp_path/'demo') == 2      # finished: stays


def test_serve_reward_answers_a_remote_reward(tmp_path, monkeypatch, capsys):
    "A server started as a command, asked by a training, ended by SIGTERM; its key is nowhere in the files"
    code = 'from diffusion_sharpening.commands.cli import main; main()'
    argv = ['serve-reward', '--reward', 'clip@shapes', '--port', '0']
    pipe = subprocess.PIPE
    server = subprocess.Popen([sys.executable, '-c', code, *argv], stdout=pipe, stderr=pipe, text=True,
                              env=dict(os.environ, OMP_NUM_THREADS='1'))
    try:
        url = server.stdout.readline().split('--reward remote@')[1].strip()
        args = ['--heldout', 2, '--S-eval', 1, '--set', *small]
        keyed = f'remote@{url}/k/SECRET123Zk9dK2aQ/s?token=SECRET123#patience=1'
        out = tmp_path/'out'
        train = ['train', 'rlhf', '--out', out, '--reward', keyed, '--steps', 1]
        assert call(monkeypatch, *train, *args) == 0
        assert 'types --reward again' in capsys.readouterr().out
        assert call(monkeypatch, 'evaluate', '--reward', f'remote@{url}', '--n', 2, '--S', 1) == 0
        assert call(monkeypatch, 'train', 'rlhf', '--resume', out, '--steps', 2) == 2     # no key
        one_line(capsys.readouterr().err, 'resume: a part of the address of the reward')
        assert call(monkeypatch, 'train', 'rlhf', '--resume', out, '--reward', keyed, '--steps', 2) == 0
        assert json.loads((out/'report.json').read_text())['batches'] == 2
        files = [p for p in out.rglob('*') if p.is_file()]
        assert len(files) > 8 and not [p for p in files if b'SECRET123' in p.read_bytes()]
        server.send_signal(signal.SIGTERM)
        assert server.wait(20) == 0 and server.stderr.read() == ''
        assert call(monkeypatch, 'train', 'rlhf', '--resume', out, '--reward', keyed, '--steps', 3) == 2
        res = capsys.readouterr()
        assert 'gave no scores' in res.err and 'SECRET' not in res.out + res.err      # of the whole test
    finally: server.kill()


def test_before_is_measured_once(xl, tmp_path, monkeypatch, capsys):
    "A run that goes on takes it from its folder; when something it hangs on changed, it is measured again"
    args = ['--model', xl, '--reward', 'checker!', '--heldout', 2, '--S-eval', 1, '--steps', 1,
            '--out', tmp_path/'out']
    said = 'before training: as it was measured'
    assert call(monkeypatch, 'train', 'rlhf', *args, '--set', *small) == 0
    first = json.loads((tmp_path/'out/report.json').read_text())
    assert said not in capsys.readouterr().out
    assert call(monkeypatch, 'train', 'rlhf', '--resume', tmp_path/'out', '--steps', 2) == 0
    assert said in capsys.readouterr().out
    second = json.loads((tmp_path/'out/report.json').read_text())
    assert (second['before'], second['batches']) == (first['before'], 2)
    monkeypatch.setattr(command, 'content', lambda path: 'other code')
    assert call(monkeypatch, 'train', 'rlhf', '--resume', tmp_path/'out', '--steps', 3) == 0
    assert said not in capsys.readouterr().out


class Changes(Reward):
    name, more = 'changes', 0.
    def score(self, images, prompts): return images.mean((1, 2, 3)) + self.more


def test_a_server_that_changed_is_noticed(xl, tmp_path, monkeypatch, capsys):
    "Its scores of before the training are made anew, on the pictures that were kept, and this is said"
    judge = Changes()
    with serving(judge) as url:
        args = ['--model', xl, '--reward', f'remote@{url}', '--heldout', 2, '--S-eval', 1, '--steps', 1,
                '--out', tmp_path/'out', '--set', *small]
        assert call(monkeypatch, 'train', 'rlhf', *args) == 0
        first = json.loads((tmp_path/'out/report.json').read_text())
        judge.more = .5
        assert call(monkeypatch, 'train', 'rlhf', '--resume', tmp_path/'out', '--steps', 2) == 0
    assert 'warning: remote scores the same pictures otherwise' in capsys.readouterr().err
    again = json.loads((tmp_path/'out/report.json').read_text())
    was, now = (o['before']['judges']['remote']['overall']['mean'] for o in (first, again))
    assert now - was == pytest.approx(.5, abs=1e-3)
    assert abs(again['delta']['judges']['remote']['overall']['mean']) < .4


def test_a_server_that_changed_is_noticed_without_held_out_prompts(xl, tmp_path, monkeypatch, capsys):
    "By what it says of two test pictures; a server that answers as before is not mentioned"
    judge = Changes()
    with serving(judge) as url:
        args = ['--model', xl, '--reward', f'remote@{url}', '--heldout', 0, '--steps', 1, '--out',
                tmp_path/'out', '--set', *small]
        assert call(monkeypatch, 'train', 'rlhf', *args) == 0
        assert call(monkeypatch, 'train', 'rlhf', '--resume', tmp_path/'out', '--steps', 2) == 0
        assert 'answers was' not in capsys.readouterr().out
        judge.more = .5
        assert call(monkeypatch, 'train', 'rlhf', '--resume', tmp_path/'out', '--steps', 3) == 0
    said = 'resume: answers was .*, .* and is .*, .*; the end may differ'
    assert re.search(said, capsys.readouterr().out)


never = {'plan rlhf --set n=1000000000': 'n: expected at most 10000', 'plan ddpo --set updates=1000000000':
         'updates: expected', 'plan nft --set batch=1000000': 'plan: expected at most 10,000,000 evaluations',
         'plan rlhf --set n=9999 updates=9999': 'found 8e+09 (batch=8, n=9,999', 'plan rlhf --px 1000000000':
         'px: expected a multiple of', 'plan rlhf --S-eval 1000000000': 'S_eval: expected 1 to 1,000',
         'plan rlhf --heldout 1000000000': 'heldout: expected 0 to', 'plan rlhf --guidance 0': 'at least 1',
         'sample --n 1000000000': 'n: expected 1 to', 'sample --S 1000000000': 'S: expected 1 to 1,000',
         'sample --px 1000000000': 'up to 16,384', 'evaluate --n 1000000': 'prompts of Shapes',
         'evaluate --S 1000000000': 'S: expected 1 to 1,000',
         'plan flow_grpo --set eta=1e300': 'eta: expected a finite number up to 10',
         'plan standard --set gamma=1e300': 'gamma: expected a finite',
         'plan ddpo --set clip=1e20': 'clip: expected',
         'train rlhf --px 512x768': '--px: expected a whole number'}

@pytest.mark.parametrize('line', never)
def test_numbers_that_would_take_forever(monkeypatch, capsys, line):
    began = time.process_time()
    assert call(monkeypatch, *line.split()) == 2
    one_line(capsys.readouterr().err, never[line])
    assert time.process_time() - began < 5


def test_guidance_of_a_method_and_of_a_model(xl, tmp_path, monkeypatch, capsys):
    "The setting is the rollouts' alone; the option is the model's, and theirs where the setting is 0"
    args = ['--model', xl, '--reward', 'checker!', '--heldout', 2, '--S-eval', 1, '--steps', 1]
    found = {}
    for own, model in ((0, 1), (0, 3), (1, 3)):
        out = tmp_path/f'{own}{model}'
        assert call(monkeypatch, 'train', 'rlhf', *args, '--guidance', model, '--out', out, '--set', *small,
                    f'guidance={own}', 'updates=1') == 0
        rep = json.loads((out/'report.json').read_text())
        found[own, model] = rep['nfe_per_image']['before'], rep['nfe_training']
        assert (rep['guidance'], rep['settings']['method']['guidance']) == (model, own)
    (one, plain), (two, asked), (same, spared) = found.values()
    assert two == same == 2*one and plain == spared < asked
    capsys.readouterr()
    for line in (['train', 'rlhf', '--help'], ['methods', 'contrast']):
        assert cli.run(line) == 0
        assert 'of its rollouts alone (--set guidance=3)' in capsys.readouterr().out
    alone = ['--out', tmp_path/'x', '--set', 'guidance=3']
    assert call(monkeypatch, 'train', 'standard', *args[:-2], *alone) == 2
    one_line(capsys.readouterr().err, "setting 'guidance': expected one of the method or the run; give it as")


def test_pictures_are_made_in_chunks_that_fit(xl, tmp_path, monkeypatch, capsys):
    "By sample and evaluate, as by train; where not one fits, that is a line"
    asked, real = [], Denoiser.output
    def output(self, x, t, cond):
        asked.append(len(x))
        return real(self, x, t, cond)
    monkeypatch.setattr(Denoiser, 'output', output)
    make = ['--model', xl, '--prompts', 'shapes', '--guidance', 1, '--n', 3, '--S', 1]
    lines = (['sample', *make, '--out', tmp_path/'out'], ['evaluate', *make, '--reward', 'clip@shapes'])
    for memory, chunks in ((64., [3]), (.0066, [1, 1, 1])):
        dev = Device('a card', memory, 1., 1.)
        monkeypatch.setattr(advice, 'device_here', lambda d: dev)
        for line in lines:
            asked.clear()
            assert call(monkeypatch, *line) == 0
            assert asked == chunks, (memory, line)
    dev = Device('a card', .001, 1., 1.)
    for line in lines:
        capsys.readouterr()
        assert call(monkeypatch, *line) == 2
        one_line(capsys.readouterr().err, 'px: expected a picture that fits in 0.001 GiB of a card')


def test_the_embedded_model_at_another_size(monkeypatch, capsys):
    "It is measured without its exam, which reads pictures of 64 pixels, and a warning says so"
    assert call(monkeypatch, 'evaluate', '--px', 96, '--S', 1, '--n', 2, '--json') == 0
    res = capsys.readouterr()
    assert [*json.loads(res.out)['judges']] == ['clip']
    assert 'warning: measured without the exam: checker: expected images (B, 3, 64, 64)' in res.err


def test_texts_that_are_too_long(xl, tmp_path, monkeypatch, capsys):
    "Are refused with file and row, by every command that reads them"
    (tmp_path/'p.txt').write_text('a dog\n' + 'a'*500_001 + '\n')
    (tmp_path/'p.csv').write_text('prompt\na dog\n' + 'a'*500_001 + '\n')
    (tmp_path/'pics').mkdir()
    for k in 'ab': Image.new('RGB', (64, 64)).save(tmp_path/f'pics/{k}.png')
    for name in ('p.txt', 'p.csv'):
        said = f'{tmp_path}/{name}, row 2: expected a text'
        for line in (['sample', '--model', xl, '--out', tmp_path/'out', '--prompts', tmp_path/name],
                     ['score', '--images', tmp_path/'pics', '--reward', 'clip@shapes', '--prompts',
                      tmp_path/name],
                     ['train', 'rlhf', '--model', xl, '--out', tmp_path/'out', '--prompts', tmp_path/name]):
            res = refused(monkeypatch, capsys, tmp_path/'out', said, *line)
            assert 'at most 500,000 characters, found 500,001' in res.err


def test_cut_prompts_are_said_once(xl, tmp_path, monkeypatch, capsys):
    "Of all prompts of a command, in one line, however many batches meet them"
    texts = [f'a red circle {k} ' + 'and a blue square '*20 for k in range(6)]
    texts += ['a red circle', 'a blue star']
    (tmp_path/'long').write_text('\n'.join(texts))
    prompts = ['--model', xl, '--prompts', tmp_path/'long']
    evaluation = ['--reward', 'clip@shapes', '--heldout', 2, '--S-eval', 1, '--steps', 3, '--set', *small]
    for argv in (['train', 'rlhf', *prompts, '--out', tmp_path/'run', *evaluation],
                 ['sample', *prompts, '--n', 8, '--S', 1, '--out', tmp_path/'p'],
                 ['evaluate', *prompts, '--n', 8, '--S', 1, '--reward', 'clip@shapes']):
        assert call(monkeypatch, *argv) == 0
        said = [l for l in capsys.readouterr().err.splitlines() if l.startswith('warning: prompts: ')]
        assert len(said) == 1 and '6 of 8 are longer than the 32 tokens' in said[0], said


def test_captions_are_split_too(xl, tmp_path, monkeypatch, capsys):
    "Nobody learns from pictures of held-out captions; a circle of links is walked once"
    (tmp_path/'pairs').mkdir()
    for i in range(6):
        Image.new('RGB', (64, 64), (40*i, 90, 30)).save(tmp_path/f'pairs/{i}.png')
        (tmp_path/f'pairs/{i}.txt').write_text(f'a red circle and {i} things')
    (tmp_path/'pairs/again').symlink_to(tmp_path/'pairs', target_is_directory=True)
    (tmp_path/'pairs/up').symlink_to(tmp_path, target_is_directory=True)
    seen, fit = [], command.fit
    def look(model, method, judge, source, *more):
        seen.append(source.prompts)
        return fit(model, method, judge, source, *more)
    monkeypatch.setattr(command, 'fit', look)
    monkeypatch.setenv('DIFFUSION_SHARPENING_CACHE', str(tmp_path/'cache'))
    args = ['--model', xl, '--images', tmp_path/'pairs', '--reward', 'clip@shapes', '--S-eval', 1,
            '--steps', 1]
    assert call(monkeypatch, 'train', 'standard', *args, '--heldout', 2, '--out', tmp_path/'out', '--set',
                'batch=2', 'rank=2') == 0
    rep = json.loads((tmp_path/'out/report.json').read_text())
    assert len(seen[0]) == 4 and rep['heldout_prompts'] == 2
    assert '2 held out, 4 to train on' in rep['heldout_from']
    held = json.loads((tmp_path/'out/scores.json').read_text())['prompts']
    assert not {*held} & {*seen[0]}
    capsys.readouterr()
    no = tmp_path/'no'
    refused(monkeypatch, capsys, no, 'learns from none', 'train', 'rlhf', *args, '--out', no)


def test_scoring_a_sampled_folder_is_evaluating(tmp_path, monkeypatch, capsys):
    "Equal to 1e-6 on the pictures rounded to 8 bits, which is what a PNG holds; within 1e-2 of the unrounded"
    from diffusion_sharpening.names.catalog import load_reward
    from diffusion_sharpening.commands.score import score_folder
    from diffusion_sharpening.data.tables import prompt_set
    from diffusion_sharpening.evaluation.measure import evaluate
    assert cli.run(['sample', '--n', '6', '--S', '4', '--out', str(tmp_path/'p')]) == 0
    clip, texts = load_reward('clip@shapes'), prompt_set('shapes', 6, 'heldout', 1)
    e = evaluate(load_model('shapes'), texts, dict(clip=clip), 4)
    found = score_folder(clip, tmp_path/'p', str(tmp_path/'p/prompts.jsonl'), tmp_path/'s')['mean']
    rounded = (e.images*255).round()/255
    assert found == pytest.approx(clip(rounded, texts).mean().item(), abs=1e-6)
    assert found == pytest.approx(e.scores['clip'].mean().item(), abs=1e-2)


def test_help_is_quick_and_needs_no_torch():
    import time
    code = ("import sys; from diffusion_sharpening.commands import cli\n"
            "for c in cli.COMMANDS: cli.run([c, '--help'])\n"
            "cli.run([]); sys.exit('torch' in sys.modules)")
    t0 = time.perf_counter()
    assert sharpen('--help').returncode == 0
    assert time.perf_counter() - t0 < 2
    assert subprocess.run([sys.executable, '-c', code], capture_output=True).returncode == 0


def test_help_of_a_method_shows_what_runs(capsys):
    from dataclasses import asdict
    from diffusion_sharpening.training.run import settings
    for preset in ('default', 'paper'):
        assert cli.run(['train', 'rlhf', '--preset', preset, '--help']) == 0
        rows = [l.split() for l in capsys.readouterr().out.split('settings of rlhf')[1]
                .split('\n\n')[0].splitlines()[1:]]
        run, method = settings('rlhf', preset)
        runs = asdict(run) | asdict(method)
        assert {r[0]: json.loads(r[1]) for r in rows if r} == runs


# Exit codes, and what the machine does

class Signal(Reward):
    "Bright, and sends this process a signal at its third call"
    name = 'signal'
    def __init__(self, sig): self.sig, self.calls = sig, 0
    def score(self, images, prompts):
        self.calls += 1
        if self.calls == 3: signal.raise_signal(self.sig)
        return images.mean((1, 2, 3))


@pytest.mark.parametrize('name', ['SIGTERM', 'SIGINT'])
def test_a_stopped_run_does_not_exit_0(xl, tmp_path, monkeypatch, capsys, name):
    sig = getattr(signal, name)
    monkeypatch.setattr(job, 'load_reward', lambda *a, **k: Signal(sig))
    args = ['--model', xl, '--out', tmp_path/'out', '--heldout', 0, '--steps', 5, '--set', *small]
    assert call(monkeypatch, 'train', 'rlhf', *args) == 128 + sig
    assert f'{name}: stopped after batch' in capsys.readouterr().out


def test_closed_pipe_is_no_error():
    code = 'from diffusion_sharpening.commands.cli import main; main()'
    read, write = os.pipe()
    os.close(read)
    res = subprocess.run([sys.executable, '-c', code, 'methods'], stdout=write, stderr=subprocess.PIPE,
                         text=True)
    os.close(write)
    assert res.returncode == 128 + signal.SIGPIPE and res.stderr == ''


def test_ascii_terminal():
    env = dict(os.environ, PYTHONIOENCODING='ascii', PYTHONUTF8='0', PYTHONCOERCECLOCALE='0', LC_ALL='C')
    code = 'from diffusion_sharpening.commands.cli import main; main()'
    for argv, rc in (['--help'], 0), (['rewards'], 0), (['tráin'], 2):
        res = subprocess.run([sys.executable, '-c', code, *argv], capture_output=True, text=True, env=env)
        assert res.returncode == rc and 'Traceback' not in res.stderr, res.stderr


@pytest.mark.slow
def test_names_under_an_ascii_locale(xl, tmp_path):
    "A training whose prompts and folder have names that the locale cannot spell"
    (tmp_path/'préambule.txt').write_text('ein grüner Stern\n日本の車\na 🐈\n', encoding='utf-8')
    env = dict(os.environ, PYTHONUTF8='0', PYTHONCOERCECLOCALE='0', LC_ALL='C', OMP_NUM_THREADS='1')
    argv = ['train', 'rlhf', '--model', xl, '--reward', 'clip@shapes', '--prompts', 'préambule.txt']
    argv += ['--heldout', '1', '--S-eval', '1', '--steps', '1', '--out', 'ü', '--set', *small]
    res = subprocess.run([sys.executable, '-m', 'diffusion_sharpening', *argv], capture_output=True,
                         text=True, env=env, cwd=tmp_path)
    assert res.returncode == 0 and (tmp_path/'ü/before_after.png').exists(), res.stderr


long = 'x'*300
@pytest.mark.parametrize('argv', [
    'sample --out {long} --n 1 --S 1', 'sample --lora {long} --model shapes --n 1 --out {out}',
    'sample --prompts {long} --out {out}', 'sample --model {long} --out {out}',
    'train rlhf --config {long} --out {out}', 'train rlhf --out {long} --heldout 0',
    'score --images {long} --prompts {long}', 'export {long}', 'plan rlhf --model {long}'])
def test_names_that_are_too_long(tmp_path, monkeypatch, capsys, argv):
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, *argv.format(long=long, out=tmp_path/'out').split()) in (1, 2)
    one_line(capsys.readouterr().err, '')
    assert not list(tmp_path.iterdir())


def test_disk_that_takes_no_more(tmp_path):
    "A limit on the size of files acts like a full disk: one line, exit code 1"
    import resource
    code = 'from diffusion_sharpening.commands.cli import main; main()'
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    argv = ['sample', '--n', '1', '--S', '1', '--out', str(tmp_path/'o')]
    res = subprocess.run([sys.executable, '-B', '-c', code, *argv],
                         capture_output=True, text=True, preexec_fn=limit)
    assert res.returncode == 1 and 'Traceback' not in res.stderr and 'sharpen: ' in res.stderr, res.stderr


@pytest.mark.parametrize('option', ['--lora', '--model', '--out', '--prompts'])
def test_empty_names_are_refused(monkeypatch, capsys, option):
    assert call(monkeypatch, 'sample', '--n', 1, '--S', 1, option, '') == 2
    one_line(capsys.readouterr().err, f'{option}: expected a text')


def test_rank_left_in_the_environment(monkeypatch, capsys):
    monkeypatch.setenv('RANK', '1')
    assert cli.run(['methods']) == 0 and 'rlhf' in capsys.readouterr().out


def test_seeds_of_64_bits(xl, tmp_path, monkeypatch, capsys):
    args = ['--model', xl, '--n', 1, '--S', 1, '--out', tmp_path/'a']
    assert call(monkeypatch, 'sample', *args, '--seed', 2**64-1) == 0
    train = ['train', 'rlhf', '--model', xl, '--reward', 'checker!', '--heldout', 0, '--steps', 1]
    assert call(monkeypatch, *train, '--out', tmp_path/'b', '--set', *small, f'seed={2**64-1}') == 0
    capsys.readouterr()
    for argv in (['sample', *args, '--seed', 2**64],
                 ['evaluate', *args[:-2], '--reward', 'checker', '--seed', 2**64],
                 [*train, '--out', tmp_path/'c', '--set', *small, f'seed={2**64}']):
        assert call(monkeypatch, *argv) == 2
        one_line(capsys.readouterr().err, 'seed: expected ')


# What is measured

def test_own_prompts_are_split(xl, tmp_path, capsys):
    "Held-out prompts are not trained on, the report says where they are from, and another file can be named"
    texts = [f'a red circle and {i} things' for i in range(10)]
    (tmp_path/'mine').write_text('\n'.join(texts))
    (tmp_path/'other').write_text('an oak\nan ash\n')
    common = dict(model=xl, reward='clip@shapes', prompts=str(tmp_path/'mine'), S_eval=1, steps=1,
                  n=2, S=2, batch=2, rank=2)
    seen = []
    fit = command.fit
    def look(model, method, judge, source, *more):
        seen.append(source.prompts)
        return fit(model, method, judge, source, *more)
    command.fit = look
    try:
        rep = command.train('rlhf', out=str(tmp_path/'a'), heldout=3, **common)
        other = command.train('rlhf', out=str(tmp_path/'b'), heldout_prompts=str(tmp_path/'other'), **common)
    finally: command.fit = fit
    assert (len(seen[0]) == 7 and rep['heldout_prompts'] == 3
            and '3 held out, 7 to train on' in rep['heldout_from'])
    assert len(seen[1]) == 10 and other['heldout_prompts'] == 2 and 'other' in other['heldout_from']
    for run, held in ('a', {*texts} - {*seen[0]}), ('b', {'an oak', 'an ash'}):     # and what is drawn later
        drawn = tmp_path/f'drawn {run}'
        assert cli.run(['sample', '--lora', str(tmp_path/run), '--S', '1', '--out', str(drawn)]) == 0
        assert {json.loads(l)['prompt'] for l in (drawn/'prompts.jsonl').read_text().splitlines()} == held
        assert cli.run(['evaluate', '--lora', str(tmp_path/run), '--reward', 'clip@shapes', '--S', '1',
                        '--json']) == 0
        assert str(tmp_path) in capsys.readouterr().out


def test_prompts_that_change_between_two_stops(xl, tmp_path, capsys):
    "The report rings, and a later evaluation does not call them held out without a warning"
    file, out = tmp_path/'mine', tmp_path/'run'
    file.write_text('\n'.join(f'a red circle and {i} things' for i in range(6)))
    common = dict(n=2, S=2, batch=2, rank=2)
    told = command.train('rlhf', model=xl, reward='clip@shapes', prompts=str(file), heldout=2, S_eval=1,
                         out=str(out), steps=1, **common)
    assert told['changed'] == []
    file.write_text('\n'.join(f'a red circle and {i} things' for i in range(4)))
    told = command.train('rlhf', resume=str(out), steps=2)
    assert any('prompts' in o and 'may have been trained on' in o for o in told['alarms']['rang'])
    told = command.train('rlhf', resume=str(out), steps=3)                 # which a later stop does not hide
    assert [o.split(' was ')[0] for o in told['changed']] == ['prompts']
    capsys.readouterr()
    with pytest.warns(UserWarning, match='may have been trained on'):
        assert cli.run(['evaluate', '--lora', str(out), '--reward', 'clip@shapes', '--S', '1']) == 0


def test_two_commands_in_one_folder(xl, tmp_path, monkeypatch, capsys):
    "What another process works in is left alone, by `sample` and `score` too"
    drawn, out = tmp_path/'drawn', tmp_path/'busy'
    assert call(monkeypatch, 'sample', '--model', xl, '--n', 2, '--S', 1, '--out', drawn) == 0
    code = ('import sys; from diffusion_sharpening.training.folder import locked\n'
            f'with locked({str(out)!r}): print(flush=True); sys.stdin.read()')
    with subprocess.Popen([sys.executable, '-c', code], stdin=-1, stdout=-1) as other:
        other.stdout.readline(); capsys.readouterr()
        for argv in (['sample', '--model', xl, '--n', 2, '--S', 1], ['score', '--images', drawn,
                     '--reward', 'clip@shapes']):
            assert call(monkeypatch, *argv, '--out', out) == 2
            one_line(capsys.readouterr().err, str(other.pid))
        assert [p.name for p in out.iterdir()] == ['.sharpen.lock']
        other.stdin.close()
    assert call(monkeypatch, 'sample', '--model', xl, '--n', 2, '--S', 1, '--out', out) == 0


def test_refused_before_anything_is_measured(xl, tmp_path, monkeypatch, capsys):
    "A tracker that is not there, a model that is none, a disk too small for the weights"
    own = ['train', 'rlhf', '--reward', 'clip@shapes', '--heldout', 2, '--S-eval', 1, '--steps', 1,
           '--out', tmp_path/'o']
    def never(*args, **kw): raise AssertionError('measured')
    monkeypatch.setattr(command, 'evaluate', never)
    assert call(monkeypatch, *own, '--model', xl, '--tracker', 'foo', '--set', *small) == 2
    one_line(capsys.readouterr().err, 'tracker: ')
    assert call(monkeypatch, *own[:3], 'image_reward', *own[4:], '--model', 'nosuch') == 2
    one_line(capsys.readouterr().err, 'found no nosuch')
    monkeypatch.undo()
    import shutil
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, 'disk_usage', lambda _: full)
    assert call(monkeypatch, *own, '--model', xl, '--set', *small) in (1, 2)
    one_line(capsys.readouterr().err.splitlines(True)[-1], 'weights: needs ')


def test_an_exam_belongs_to_its_model(xl, tmp_path, monkeypatch, capsys):
    "Captions of Shapes with another model: no exam; a judge that cannot judge is refused before work"
    assert cli.run(['evaluate', '--model', xl, '--reward', 'clip@shapes', '--n', '2', '--S', '1',
                    '--json']) == 0
    assert list(strict(capsys.readouterr().out)['judges']) == ['clip']
    refused(monkeypatch, capsys, tmp_path/'out', 'checker', 'train', 'rlhf', '--model', xl, '--px', 128,
            '--reward', 'checker!', '--heldout', 2, '--out', tmp_path/'out')


def test_one_held_out_prompt_has_no_interval(xl, tmp_path, monkeypatch, capsys):
    args = ['--model', xl, '--reward', 'checker!', '--heldout', 1, '--S-eval', 1, '--steps', 1, '--set',
            *small]
    assert call(monkeypatch, 'train', 'rlhf', *args, '--out', tmp_path/'out') == 0
    out = capsys.readouterr().out
    assert 'None' not in out and f'are in {tmp_path}/out' in out
    assert call(monkeypatch, 'push', tmp_path/'out', 'me/one', '--dry-run') == 0


def test_version(capsys):
    "As people type it when they report a fault"
    assert cli.run(['--version']) == 0
    assert capsys.readouterr().out == f'sharpen {diffusion_sharpening.__version__}\n'


@pytest.mark.parametrize('line', ['sharpen methods >&-', 'sharpen methods 2>&-', 'sharpen nothing >&- 2>&-'])
def test_streams_that_the_shell_closed(line):
    "Nobody reads what is said, and nothing else goes wrong"
    where = f'PATH={Path(sys.executable).parent}:$PATH; '
    done = subprocess.run(['bash', '-c', where + line], capture_output=True, text=True)
    assert done.returncode == (2 if 'nothing' in line else 0) and 'Traceback' not in done.stderr
