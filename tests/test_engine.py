"The engine from outside: killed and continued runs, signals, several processes, damaged checkpoints"
import json, os, signal, socket, subprocess, sys, time
from pathlib import Path

import pytest, torch
from safetensors.torch import load_file

pytest.importorskip('diffusers')
sys.path.insert(0, str(Path(__file__).resolve().parents[1]/'nbs'/'_dev'))
from attacking import Child
from diffusion_sharpening.models.lora import lora_file
from diffusion_sharpening.models.tiny import tiny_sdxl
from diffusion_sharpening.training.checkpoints import checkpoints, load_checkpoint

root = Path(__file__).resolve().parents[1]
SHARPEN = [sys.executable, '-m', 'diffusion_sharpening']
ENV = os.environ | dict(OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='', HF_HUB_OFFLINE='1')
PROMPTS = ['a red circle', 'a blue square', 'a green star', 'a plain heart']


@pytest.fixture(scope='module')
def xl(tmp_path_factory):
    "Folder of a tiny SDXL pipeline, and a file of prompts"
    d = tmp_path_factory.mktemp('engine')
    tiny_sdxl(d/'xl', words=PROMPTS); (d/'prompts.txt').write_text('\n'.join(PROMPTS))
    return d


def command(xl, out, *more, steps=3, batch=4, method='rlhf', **settings):
    "A training of the tiny pipeline as a command line"
    pairs = [f'{k}={v}' for k, v in (dict(batch=batch, n=2, S=3, rank=2,
                                          checkpoint_every=1) | settings).items()]
    return [str(a) for a in (*SHARPEN, 'train', method, '--model', xl/'xl', '--reward', 'clip@shapes',
                             '--prompts', xl/'prompts.txt',
                             '--out', out, '--heldout', 0, '--guidance', 1, '--steps', steps,
                             *more, '--set', *pairs)]


def started(cmd):
    "A command line in a fork of this process, which has imported what it needs"
    return Child(*cmd[len(SHARPEN):], env=ENV)


def run(cmd):
    "How a command line ends"
    if cmd[:len(SHARPEN)] != SHARPEN:
        return subprocess.run(cmd, env=ENV, capture_output=True, text=True, timeout=900)
    r = started(cmd).end(240)
    return subprocess.CompletedProcess(cmd, r.code, r.out, r.err)


def launched(n, cmd):
    "The same command in `n` processes that talk over gloo, started by torchrun"
    launch = [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={n}']
    return run([*launch, *cmd[1:]])


def forget():
    "accelerate keeps one state for a process, and a fork has that of the trainings its parent ran"
    from accelerate.state import AcceleratorState
    AcceleratorState._reset_state(reset_partial_state=True)


def many(n, cmd):
    "The same in forks of this process, which have imported already, told what torchrun would tell them"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        place = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(s.getsockname()[1]), WORLD_SIZE=str(n),
                     LOCAL_WORLD_SIZE=str(n))
    def child(k):
        own = dict(RANK=str(k), LOCAL_RANK=str(k))
        return Child(*cmd[len(SHARPEN):], env=ENV | place | own, before=forget)
    all_of = [child(k) for k in range(n)]
    ends = [c.end(240) for c in all_of]
    code = next((e.code for e in ends if e.code), 0)
    return subprocess.CompletedProcess(cmd, code, ''.join(e.out for e in ends), ''.join(e.err for e in ends))


def apart(a, b):
    "Distance of two LoRAs relative to what was trained (Adam magnifies the rounding of tiny gradients)"
    a, b = load_file(a/lora_file), load_file(b/lora_file)
    assert a.keys() == b.keys()
    a, b = [torch.cat([v.flatten() for k, v in sorted(o.items()) if 'lora_B' in k]) for o in (a, b)]
    return ((a-b).norm()/a.norm()).item()


@pytest.fixture(scope='module')
def alone(xl):
    "A run of one process that was left alone"
    r = run(command(xl, xl/'alone')); assert r.returncode == 0, r.stderr
    return xl/'alone'


def test_two_processes_equal_one(xl, alone):
    r = launched(2, command(xl, xl/'two')); assert r.returncode == 0, r.stderr[-2000:]
    assert r.stdout.count('sharpen plan prints the whole plan') == 1 and 'on 2 × ' in r.stdout
    assert apart(alone, xl/'two') < 1e-2
    one, two = [[json.loads(l) for l in (d/'metrics.jsonl').read_text().splitlines()]
                for d in (alone, xl/'two')]
    assert [r['nfe'] for r in one] == [r['nfe'] for r in two]
    for k in ('reward', 'loss', 'grad_norm'):
        assert [r[k] for r in one] == pytest.approx([r[k] for r in two], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize('method', ['flow_grpo', 'ddpo'])
def test_two_processes_compare_with_the_batch_of_both(xl, method):
    "Spread and memory of rewards are those of all processes, so the losses are those of one"
    rows = []
    for n in (1, 2):
        out = xl/f'{method}{n}'
        args = command(xl, out, method=method, **(dict(least=4, memory=4) if method == 'ddpo' else {}))
        r = run(args) if n == 1 else many(2, args)
        assert r.returncode == 0, r.stderr[-2000:]
        rows.append([json.loads(l) for l in (out/'metrics.jsonl').read_text().splitlines()])
    for k in ('reward', 'loss', 'grad_norm', 'ratio', 'cut'):
        assert [r[k] for r in rows[0]] == pytest.approx([r[k] for r in rows[1]], rel=1e-3, abs=1e-6)


def test_goes_on_with_another_number_of_processes(xl, alone):
    r = many(2, command(xl, xl/'mixed', steps=2)); assert r.returncode == 0, r.stderr[-2000:]
    r = run([*SHARPEN, 'train', 'rlhf', '--resume', str(xl/'mixed'), '--steps', '3'])
    assert r.returncode == 0, r.stderr
    assert 'going on after batch 2' in r.stdout and apart(alone, xl/'mixed') < 1e-2


def test_dealt_out_weights_learn_the_same(xl):
    "In `paper` paths end early, in one process before the other"
    one, out = xl/'whole', xl/'dealt'
    r = run(command(xl, one, '--preset', 'paper')); assert r.returncode == 0, r.stderr[-2000:]
    r = many(2, command(xl, out, '--preset', 'paper', shard='true'))
    assert r.returncode == 0, r.stderr[-3000:]
    assert r.stdout.count('sharpen plan prints the whole plan') == 1
    # whole weights in two processes: .025
    assert apart(one, out) < 5e-2
    a, b = [[json.loads(l) for l in (d/'metrics.jsonl').read_text().splitlines()] for d in (one, out)]
    for k in ('reward', 'loss', 'grad_norm'):
        assert [r[k] for r in a] == pytest.approx([r[k] for r in b], rel=1e-3)


@pytest.mark.slow
def test_dealt_out_full_fine_tune_goes_on_in_one_process(xl):
    weights = lambda d: load_file(next((d/'model'/'unet').glob('*.safetensors')))
    r = run(command(xl, xl/'full1', rank=0, lr=1e-3)); assert r.returncode == 0, r.stderr[-2000:]
    r = many(2, command(xl, xl/'full2', steps=2, rank=0, lr=1e-3, shard='true'))
    assert r.returncode == 0, r.stderr[-3000:]
    config = json.loads((xl/'full2'/'model'/'unet'/'config.json').read_text())
    assert config['_class_name'] == 'UNet2DConditionModel'
    r = run([*SHARPEN, 'train', 'rlhf', '--resume', str(xl/'full2'), '--steps', '3'])
    assert r.returncode == 0, r.stderr[-2000:]
    assert 'going on after batch 2' in r.stdout
    a, b, start = (weights(xl/'full1'), weights(xl/'full2'),
                   load_file(next((xl/'xl'/'unet').glob('*.safetensors'))))
    moved = sum((a[k]-start[k]).square().sum() for k in a).sqrt(); assert moved > 0
    assert sum((a[k]-b[k]).square().sum() for k in a).sqrt() < 2e-2*moved


@pytest.mark.slow
def test_reward_that_fails_in_one_process_of_dealt_out_weights(xl, tmp_path):
    "The other process still has the weights of the reference in place: both leave the batch together"
    (tmp_path/'odd.py').write_text("import os\ncalls = []\ndef odd(images, prompts):\n    calls.append(1)\n"
        "    bad = os.environ['RANK'] == '1' and len(calls) == 3\n    return images.mean((1, 2, 3)) + "
        "(float('nan') if bad else 0.)\n")
    r = many(2, command(xl, tmp_path/'out', '--reward', f'{tmp_path/"odd.py"}:odd', '--preset', 'paper',
                        rank=0, shard='true'))
    assert r.returncode == 0, r.stderr[-3000:]
    rows = [json.loads(l) for l in (tmp_path/'out'/'metrics.jsonl').read_text().splitlines()]
    assert [o['skipped'] for o in rows] == [0, 1, 1] and 'batch 2 skipped' in r.stdout


def test_batch_that_cannot_be_shared(xl):
    r = many(2, command(xl, xl/'odd', batch=3))
    assert r.returncode != 0 and 'expected processes that share a batch of 3 evenly, found 2' in r.stderr


@pytest.mark.parametrize('sig', [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_says_how_to_go_on(xl, alone, sig):
    out = xl/f'signal{sig}'
    p = started(command(xl, out, steps=400))
    log = out/'metrics.jsonl'
    for _ in range(1200):
        if log.exists() and log.read_text(): break
        time.sleep(.1)
    os.kill(p.pid, sig)
    r = p.end(120)
    assert r.code == 128+sig, r.err
    assert f'sharpen train rlhf --resume {out}' in r.out and signal.Signals(sig).name in r.out
    k = len(log.read_text().splitlines())
    assert load_checkpoint(checkpoints(out/'checkpoints')[-1])[1]['counts']['k'] == k < 400


def test_killed_and_damaged(xl, alone):
    "SIGKILL, then the newest checkpoint loses a byte: the run goes on from the one before, to the same bits"
    out = xl/'killed'
    p = started(command(xl, out))
    for _ in range(6000):
        if len(checkpoints(out/'checkpoints')) > 1: break
        time.sleep(.02)
    os.kill(p.pid, signal.SIGKILL)
    p.end()
    f = checkpoints(out/'checkpoints')[-1]/'optimizer.safetensors'; f.write_bytes(f.read_bytes()[:-1])
    r = run([*SHARPEN, 'train', 'rlhf', '--resume', str(out)]); assert r.returncode == 0, r.stderr
    assert 'trying the one before' in r.stdout
    a, b = load_file(alone/lora_file), load_file(out/lora_file)
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_autoencoder_that_gives_nan_is_refused(xl, tmp_path):
    "Before anything is made with it, and before there is an output folder"
    import shutil
    from safetensors.torch import save_file
    from diffusion_sharpening.commands.train import train
    shutil.copytree(xl/'xl', tmp_path/'nan'); f = tmp_path/'nan'/'vae'/'diffusion_pytorch_model.safetensors'
    save_file({k: v*float('nan') for k, v in load_file(f).items()}, f, metadata=dict(format='pt'))
    with pytest.raises(ValueError, match='pictures from the autoencoder are NaN; pass dtype'):
        train('rlhf', str(tmp_path/'nan'), 'clip@shapes', str(xl/'prompts.txt'), str(tmp_path/'out'),
              heldout=0, steps=1)
    assert not (tmp_path/'out').exists()


def test_resume_refuses_another_run(xl, alone):
    r = run([*SHARPEN, 'train', 'rlhf', '--resume', str(alone), '--steps', '4', '--set', 'lr=1e-3'])
    assert r.returncode == 2 and 'resume: run.lr was 0.0005' in r.stderr and 'Traceback' not in r.stderr


@pytest.mark.parametrize('method', ['contrast', pytest.param('sft_sharpening', marks=pytest.mark.slow)])
def test_random_kills(method):
    "Two runs killed at random moments; nbs/_dev/kill_runs.py does twenty of every method"
    r = run([sys.executable, str(root/'nbs'/'_dev'/'kill_runs.py'), method, '--runs', '2', '--steps', '3',
             '--dry'])
    assert r.returncode == 0 and 'ended bit-identical' in r.stdout, r.stdout + r.stderr
