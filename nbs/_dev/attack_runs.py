"Attacks on runs: damaged or edited records and checkpoints, signals, disks, several at once, surroundings"
import json, os, random, resource, shutil, signal, subprocess, sys, time
from functools import partial
from attacking import SMALL, Child, disk, group, inside, sharpen, trouble, weights
from attack_inputs import cut, flip, made, put, whole

CHECKPOINT = 'checkpoints/step-00000002'
RECORDS = ['run.json', 'manifest.json', 'report.json']
HARMS = dict(gone=made('gone'), empty=whole(''), text=whole('hello'), list=whole('[]'), null=whole('null'),
             object=whole('{}'), deep=whole('['*100_000), digits=whole('9'*5000), nan=whole('NaN'),
             latin=put(b'"\xe9"'),
             folder=made('folder'), fifo=made('fifo'), loop=made('loop'), zeros=made('zeros'), cut=cut(-1),
             half=cut(300), flipped=flip(.5), first=flip(0.))


def finished(run, kit):
    "The weights of a whole run of three batches"
    if not hasattr(kit, 'three'):
        d = kit.place()
        end = sharpen(*kit.train(d/'r', 3))
        if end.code: raise SystemExit(end.last())
        kit.three = weights(d/'r')
    return kit.three

def damaged(file, harm, argv, kit):
    "Going on ends in the bits of an uninterrupted run, or is refused and changes nothing"
    run = kit.run()
    harm(run/file)
    before = inside(run)
    end = sharpen(*[a.format(run=run) for a in argv], at=kit.place(), wait=60)
    if why := trouble(end, 0, 1, 2): return why
    lost = {k for k, v in before.items() if not (run/k).exists()} - {'report.json'}
    lost = {k for k in lost if not k.startswith('checkpoints/step-00000001')}       # pruned
    if end.code and lost: return f'refused, and {sorted(lost)[0]} is gone'
    if end.code:
        return '' if weights(run) == weights(kit.folder/'run') or 'lora' in file else 'weights changed'
    if argv[0] == 'train' and weights(run) != finished(run, kit): return 'other bits than without the damage'

RESUME = ['train', 'rlhf', '--resume', '{run}', '--steps', '3']

@group(slow=True)
def damaged_runs():
    files = [*RECORDS, 'metrics.jsonl', 'pytorch_lora_weights.safetensors', 'checkpoints', CHECKPOINT,
             *(f'{CHECKPOINT}/{f}' for f in ('record.json', 'manifest.json', 'weights.safetensors',
                                             'optimizer.safetensors', 'random.safetensors'))]
    for file in files:
        odd = {k: h for k, h in HARMS.items() if k in ('gone', 'fifo', 'loop')} if '.' not in file else HARMS
        for what, harm in odd.items(): yield f'{file}: {what}', partial(damaged, file, harm, RESUME)

def others(file, harm, kit):
    "The commands that only read a run end, in one line if it is wrong"
    run = kit.run()
    harm(run/file)
    before, d = inside(run), kit.place()
    for argv in (['export', run, '--out', d/'x'], ['push', run, 'me/x', '--dry-run'],
                 ['sample', '--lora', run, '--prompts', kit.folder/'prompts.txt', '--n', 1, '--S', 1,
                  '--out', d/'s'],
                 kit.train(run, 2)):
        end = sharpen(*argv, wait=30)
        if why := trouble(end, 0, 1, 2): return f'{argv[0]}: {why}'
        if inside(run) != before: return f'{argv[0]}: it changed the run'

@group(slow=True)
def readers_of_damaged_runs():
    for file in RECORDS:
        for what, harm in HARMS.items(): yield f'{file}: {what}', partial(others, file, harm)

def shortened(file, n, kit):
    "A record cut at a byte: the run is finished, or refused; its weights stay"
    run = kit.run()
    cut(n)(run/file)
    end = sharpen('train', 'rlhf', '--resume', run, at=kit.place(), wait=60)
    return trouble(end, 0, 2) or ('' if weights(run) == weights(kit.folder/'run') else 'other weights')

@group(slow=True)
def records_cut_at_many_bytes():
    for n in range(0, 900, 17): yield f'run.json to {n}', partial(shortened, 'run.json', n)
    for n in range(0, 200, 17): yield f'manifest.json to {n}', partial(shortened, 'manifest.json', n)

def edited(change, kit):
    "An edited record: the same run goes on, or it is refused"
    run = kit.run()
    o = json.loads((run/'run.json').read_text())
    change(o)
    (run/'run.json').write_text(json.dumps(o))
    end = sharpen('train', 'rlhf', '--resume', run, '--steps', 3, at=kit.place())
    if why := trouble(end, 0, 1, 2): return why
    if end.code:
        return '' if weights(run) == weights(kit.folder/'run') else 'refused, and the weights changed'
    return '' if weights(run) == finished(run, kit) else 'other bits, without a word'

KEYS = ('method model reward prompts preset heldout heldout_prompts S_eval tracker px guidance variant vae '
        'images changes run').split()

@group(slow=True)
def edited_records():
    for k in KEYS:
        yield f'{k} gone', partial(edited, lambda o, k=k: o.pop(k, None))
        for v in (None, 3, -1, 'nonsense', [], {}, True, 1e308):
            yield f'{k} = {v!r}', partial(edited, lambda o, k=k, v=v: o.update({k: v}))
    for k, v in dict(lr=-1, n=3, S=0, nonsense=1, seed=7, steps=-1, rank=3, batch='x').items():
        yield f'changes.{k} = {v!r}', partial(edited, lambda o, k=k, v=v: o['changes'].update({k: v}))

def otherwise(more, kit):
    "Options beside --resume that would make it another run are refused, and nothing is changed"
    run = kit.run()
    before = inside(run)
    end = sharpen('train', 'rlhf', '--resume', run, *more, at=kit.place())
    return trouble(end, 2) or ('' if inside(run) == before else 'something was changed')

OTHERWISE = [['--reward', 'clip'], ['--prompts', 'shapes'], ['--model', 'shapes'], ['--preset', 'paper'],
             ['--heldout', 3],
             ['--out', 'x'], ['--px', 64], ['--guidance', 2], ['--S-eval', 7], ['--set', 'lr=1e-3'],
             ['--set', 'n=3'],
             ['--set', 'seed=1'], ['--set', 'rank=3'], ['--set', 'nonsense=1'], ['--steps', 1],
             ['--steps', -1],
             ['--images', 'shapes'], ['--vae', 'x'], ['--variant', 'fp16'], ['--heldout-prompts', 'x'],
             ['--config', 'x']]

@group()
def options_beside_resume():
    for more in OTHERWISE: yield ' '.join(map(str, more)), partial(otherwise, more)
    yield 'another method', lambda kit: trouble(sharpen('train', 'sft', '--resume', kit.run()), 2)


def bits(share, file, kit):
    "One bit of the newest checkpoint is flipped: the one before is used, and the end is the same"
    return damaged(f'{CHECKPOINT}/{file}', flip(share), RESUME, kit)

def swapped(kit):
    "Weights of one checkpoint, optimizer of another"
    run = kit.run()
    shutil.copy(run/'checkpoints/step-00000001/weights.safetensors', run/CHECKPOINT/'weights.safetensors')
    return _goes_on(run, kit)

def _goes_on(run, kit):
    end = sharpen('train', 'rlhf', '--resume', run, '--steps', 3, at=kit.place())
    return trouble(end, 0) or ('' if weights(run) == finished(run, kit) else 'other bits')

def both(kit):
    "Both checkpoints are damaged: refused, and nothing is deleted"
    run = kit.run()
    for k in (1, 2): flip(.5)(run/f'checkpoints/step-0000000{k}/weights.safetensors')
    before = inside(run)
    end = sharpen('train', 'rlhf', '--resume', run, '--steps', 3, at=kit.place())
    return trouble(end, 1, 2) or ('' if inside(run) == before else 'something was changed')

@group(slow=True)
def damaged_checkpoints():
    rng = random.Random(0)
    for file in ('weights.safetensors', 'optimizer.safetensors', 'random.safetensors', 'record.json',
                 'manifest.json'):
        for _ in range(4): yield f'{file}: bit at {(s := rng.random()):.3f}', partial(bits, s, file)
    yield 'swapped weights', swapped
    yield 'both damaged', both


# Disks

def full(limit, argv, kit):
    "A disk that is full: one line, exit code 1, and nothing that was there is lost"
    run = kit.run()
    before = inside(run)
    end = sharpen(*[str(a).format(run=run) for a in argv(kit, run)], at=kit.place(), before=disk(limit))
    if why := trouble(end, 0, 1, 2): return why
    there = inside(run)
    lost = [k for k in before if k not in there and not k.startswith('checkpoints/') and k != 'report.json']
    return f'{lost[0]} is gone' if lost else ''

COMMANDS = dict(
    train=lambda kit, run: kit.train('o', 2, heldout=2),
    resume=lambda kit, run: ['train', 'rlhf', '--resume', run, '--steps', 3],
    sample=lambda kit, run: ['sample', '--lora', run, '--prompts', kit.folder/'prompts.txt', '--n', 2,
                             '--S', 1, '--out', 's'],
    score=lambda kit, run: kit.score(kit.reward, 'sc'), export=lambda kit, run: ['export', run],
    push=lambda kit, run: ['push', run, 'me/x', '--dry-run'])

@group(slow=True)
def full_disks():
    for name, argv in COMMANDS.items():
        for limit in (0, 100, 1000, 10_000, 50_000,
                      200_000): yield f'{name}, {limit} bytes', partial(full, limit, argv)

def resumed_after(limit, kit):
    "A training that a full disk ended goes on, once there is room, to the bits of one that was left alone"
    d = kit.place()
    end = sharpen(*kit.train(d/'r', 3), before=disk(limit))
    if why := trouble(end, 0, 1, 2): return why
    if end.code == 0: return '' if weights(d/'r') == finished(d, kit) else 'other bits'
    if not (d/'r/run.json').exists(): return trouble(sharpen(*kit.train(d/'r', 3)), 0)
    return _goes_on(d/'r', kit)

@group(slow=True)
def full_disks_and_going_on():
    for limit in (0, 100, 300, 1000, 3000, 10_000, 30_000, 100_000, 300_000):
        yield f'{limit} bytes', partial(resumed_after, limit)


# Signals

def signalled(sig, call, kit):
    "A signal during the call of the reward: its exit code, and going on ends in the same bits"
    d = kit.place()
    argv = kit.train(d/'r', 3, heldout=2)
    end = sharpen(*argv, env=dict(AT=str(call), SIG=str(int(sig))))
    want = -sig if sig == signal.SIGKILL else 128 + sig
    if end.code != want: return f'exit code {end.code}, expected {want}: {end.last():.150}'
    if 'Traceback' in end.err + end.out: return f'traceback: {end.last():.150}'
    if not hasattr(kit, 'held'):
        sharpen(*kit.train(kit.folder/'held', 3, heldout=2))
        kit.held = weights(kit.folder/'held')
    again = (['train', 'rlhf', '--resume', d/'r', '--reward',
              kit.reward] if (d/'r/run.json').exists() else argv)
    return trouble(sharpen(*again), 0) or ('' if weights(d/'r') == kit.held else 'other bits')

PHASES = dict(check=1, before=2, collect=4, after=6)

@group(slow=True)
def signals():
    for sig in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL):
        for phase, call in PHASES.items(): yield f'{sig.name} in {phase}', partial(signalled, sig, call)
        yield f'{sig.name} while saving', partial(saving, sig)

def saving(sig, kit):
    "A signal while a checkpoint is written"
    d = kit.place()
    def before():
        from diffusion_sharpening.training import checkpoints as C
        old, calls = C.save_file, []
        def save(*args):
            old(*args); calls.append(1)
            if len(calls) == 4: os.kill(os.getpid(), sig)
        C.save_file = save
    end = sharpen(*kit.train(d/'r', 3), before=before)
    want = -sig if sig == signal.SIGKILL else 128 + sig
    if end.code != want: return f'exit code {end.code}, expected {want}: {end.last():.150}'
    return _goes_on(d/'r', kit)

def sampled(sig, kit):
    "A signal while pictures are made"
    end_of = Child('sample', '--model', kit.folder/'xl', '--prompts', kit.folder/'prompts.txt', '--n', 6,
                   '--S', 400,
                   '--out', kit.place()/'s')
    time.sleep(2.5)
    os.kill(end_of.pid, sig)
    end = end_of.end()
    well = end.code == 128 + sig and 'Traceback' not in end.err
    return '' if well else f'exit code {end.code}: {end.last():.150}'

@group(slow=True)
def signals_to_sample():
    for sig in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP): yield sig.name, partial(sampled, sig)


# Several at once

def at_once(same, kit):
    "Two trainings into one folder: one of them ends, the other is refused"
    d = kit.place()
    both = [Child(*(kit.train(d/'r', 2))) for _ in range(2)]
    ends = [c.end(90) for c in both]
    if sorted(e.code for e in ends) != [0, 2]:
        return f'exit codes {[e.code for e in ends]}: {ends[1].last():.150}'
    lost = next(e for e in ends if e.code)
    return trouble(lost, 2) or ('' if str(d) in lost.last() else f'the line is {lost.last():.200}')

def beside(argv, kit):
    "Another command on the folder of a run that goes on: done or refused, and the run ends as if alone"
    d = kit.place()
    run = Child(*kit.train(d/'r', 3))
    end_at = time.monotonic() + 40
    while not (d/'r/checkpoints').exists() and time.monotonic() < end_at: time.sleep(.02)
    end = sharpen(*[str(a).format(run=d/'r') for a in argv], at=d)
    why = trouble(end, 0, 1, 2)
    ended = run.end(90)
    return why or trouble(ended, 0) or ('' if weights(d/'r') == finished(d, kit) else 'other bits')

@group(slow=True)
def several_at_once():
    for i in range(3): yield f'two trainings, {i}', partial(at_once, i)
    for argv in (['train', 'rlhf', '--resume', '{run}'], ['export', '{run}'],
                 ['push', '{run}', 'me/x', '--dry-run'],
                 ['sample', '--lora', '{run}', '--n', 1, '--S',
                  1]): yield f'{argv[0]} beside', partial(beside, argv)


# Surroundings

def unwritable(): os.umask(0o777)
def tiny_stack(): resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
def no_input(): os.close(0)
def gone():
    d = f'/tmp/gone{os.getpid()}'
    os.mkdir(d); os.chdir(d); os.rmdir(d)

AROUND = dict(
    rank=dict(RANK='1'), ranks=dict(RANK='1', WORLD_SIZE='2'), world=dict(WORLD_SIZE='2'),
              rank_word=dict(RANK='x'),
    world_word=dict(WORLD_SIZE='x'), local=dict(LOCAL_RANK='7'),
              accumulation=dict(ACCELERATE_GRADIENT_ACCUMULATION_STEPS='4'),
    mixed=dict(ACCELERATE_MIXED_PRECISION='fp16'), fsdp=dict(ACCELERATE_USE_FSDP='true'),
    deepspeed=dict(ACCELERATE_USE_DEEPSPEED='true'), tmp=dict(TMPDIR='/nonsense'),
              home=dict(HOME='/nonsense'),
    hub=dict(HF_HOME='/dev/null'), columns=dict(COLUMNS='0'), column_word=dict(COLUMNS='x'),
              backend=dict(MPLBACKEND='nonsense'),
    config=dict(MPLCONFIGDIR='/dev/null'), warnings=dict(PYTHONWARNINGS='error'),
              gpu=dict(CUDA_VISIBLE_DEVICES='x'),
    key=dict(SHARPEN_REWARD_KEY='\udcff\n'))

def around(env, before, kit):
    "A training in odd surroundings: done right, or refused in one line"
    d = kit.place()
    end = sharpen(*kit.train(d/'o', 3), at=d, env=env, before=before)
    return trouble(end, 0, 1, 2) or ('' if end.code or weights(d/'o') == finished(d, kit) else 'other bits')

@group(slow=True)
def surroundings():
    for name, env in AROUND.items(): yield name, partial(around, env, None)
    for before in (unwritable, tiny_stack, no_input, gone): yield before.__name__, partial(around, {}, before)

def closed(fd, argv, kit):
    "Nobody reads what is said"
    def before(): os.close(fd)
    run = kit.run()
    end = sharpen(*[str(a).format(run=run) for a in argv(kit, run)], at=kit.place(), before=before)
    well = end.code in (0, 1, 141) and 'Traceback' not in end.err + end.out
    return '' if well else f'{end.code}: {end.last():.150}'

def unread(argv, kit):
    "A pipe whose reader is gone"
    r, w = os.pipe(); os.close(r)
    def before(): os.dup2(w, 1)
    run = kit.run()
    end = sharpen(*[str(a).format(run=run) for a in argv(kit, run)], at=kit.place(), before=before)
    os.close(w)
    return '' if end.code in (0, 141) and 'Traceback' not in end.err else f'{end.code}: {end.last():.150}'

@group(slow=True)
def closed_pipes():
    more = dict(COMMANDS, methods=lambda *_: ['methods'], plan=lambda kit,
                _: ['plan', 'rlhf', '--model', kit.folder/'xl', '--json'],
                rewards=lambda *_: ['rewards'], help=lambda *_: ['train', '--help'])
    for name, argv in more.items():
        yield f'{name}: reader gone', partial(unread, argv)
        for fd in (0, 1, 2): yield f'{name}: {fd} closed', partial(closed, fd, argv)

def spoken(argv, kit):
    "A terminal that knows ASCII only, in a process of its own"
    d = kit.place()
    (d/'préambule.txt').write_text('ein grüner Stern\n日本の車\na 🐈\nan oak\n', encoding='utf-8')
    env = dict(os.environ, LC_ALL='C', LANG='C', PYTHONUTF8='0', PYTHONCOERCECLOCALE='0')
    argv = [str(a).format(xl=kit.folder/'xl', r=kit.reward) for a in argv]
    res = subprocess.run([sys.executable, '-m', 'diffusion_sharpening', *argv], cwd=d, env=env,
                         capture_output=True,
                         timeout=120)
    err = res.stderr.decode(errors='replace')
    return '' if res.returncode == 0 and 'Traceback' not in err else f'{res.returncode}: {err[-200:]}'

@group(slow=True)
def ascii_terminals():
    p = ['--prompts', 'préambule.txt']
    yield 'sample', partial(spoken, ['sample', '--model', '{xl}', *p, '--out', 'é', '--n', 3, '--S', 1])
    yield 'evaluate', partial(spoken, ['evaluate', '--model', '{xl}', *p, '--reward', '{r}', '--n', 3,
                                       '--S', 1])
    yield 'train', partial(spoken, ['train', 'rlhf', '--model', '{xl}', *p, '--reward', '{r}', '--heldout',
                                    2, '--S-eval', 1,
                                    '--steps', 1, '--out', 'ü', '--set', *SMALL])
