"Attacks by what a user types or brings: settings, options, names, tables, pictures, weights, reward code"
import dataclasses, json, math, os, shutil, struct
from functools import partial
from attacking import TEXTS, group, sharpen, trouble, weights
from diffusion_sharpening.methods.catalog import METHODS
from diffusion_sharpening.rewards.mllm import Settings as Grading
from diffusion_sharpening.rewards.remote import Asking
from diffusion_sharpening.training.run import Run
from PIL import Image

CLASSES = dict(run=Run, remote=Asking, mllm=Grading, **METHODS)


# Settings

ODD = [math.nan, math.inf, -math.inf, 'x', '', '1', None, [], {}, -1, 0, -1e308, 1e308, 1.5, 10**400,
       -10**400,
       '\0', 'x'*10_000]

def values(f):
    "Values that a field should not take, or only where they make sense"
    kind = type(f.default)
    return [*ODD, *[True]*(kind is not bool), *[1, 0.]*(kind is bool),
            *[f.metadata[k] - 1 for k in ('lo', 'above')
            if f.metadata.get(k) is not None], *[f.metadata[k] + 1 for k in ('hi', 'below')
            if f.metadata.get(k) is not None]]

def fits(f, v):
    "Is a value of the kind and within the range of a field?"
    if v == f.default: return True
    kind, m = type(f.default), f.metadata
    if kind in (bool, str): return isinstance(v, kind) and (not m.get('words') or v in m['words'])
    if isinstance(v, bool) or not isinstance(v, (int, kind)): return False
    if not -1.8e308 < v < 1.8e308: return False
    bounds = dict(lo=lambda b: v >= b, hi=lambda b: v <= b, above=lambda b: v > b, below=lambda b: v < b)
    return all(ok(m[k]) for k, ok in bounds.items() if m.get(k) is not None)

def set_to(cls, f, v, kit):
    "Either refused in one line that names the field, or a value that makes sense"
    try: o = cls(**{f.name: v})
    except ValueError as e:
        text = str(e)
        return '' if f.name in text and '\n' not in text and len(text) < 1000 else f'the line is {text:.200}'
    except Exception as e: return f'{type(e).__name__}: {e!s:.150}'
    got = getattr(o, f.name)
    return '' if fits(f, got) else f'{f.name} is {got!r:.60}'

@group()
def settings():
    "Every field of every class of settings"
    for name, cls in CLASSES.items():
        for f in dataclasses.fields(cls):
            if f.default is dataclasses.MISSING: continue
            for v in values(f): yield f'{name}.{f.name} = {v!r:.30}', partial(set_to, cls, f, v)

def typed(name, text, kit):
    d = kit.place()
    end = sharpen('plan', name, '--model', kit.folder/'xl', '--set', *text, at=d)
    return trouble(end, 0, 2)

@group(slow=True)
def settings_of_plans():
    "Values that are within range, and still large: the plan says what they cost"
    for name, cls in METHODS.items():
        for f in dataclasses.fields(cls):
            if isinstance(f.default, bool) or not isinstance(f.default, (int, float)): continue
            for v in (10**30, 10**9, 1e300, 0, 1e-300): yield f'{name} {f.name}={v:g}', partial(
                typed, name, [f'{f.name}={v}'])
    for f in dataclasses.fields(Run):
        if isinstance(f.default, bool) or not isinstance(f.default, (int, float)): continue
        for v in (10**30, 10**9,
                  1e300): yield f'run {f.name}={v:g}', partial(typed, 'rlhf', [f'{f.name}={v}'])

PAIRS = ['n=' + '['*100_000, 'n=' + '9'*5000, 'n={"a":' * 50_000, '=3', '==', 'n==3', 'n', 'n=1e400', 'n=-0',
         'n=0x10', 'n=²', 'n=NaN', 'n=Infinity', 'lr=1e-400', 'seed=1e3', '__class__=3', 'self=1', 'steps=',
         'n=3 ', ' n=3', 'n=3;S=2', '\udcff=3', 'compile=nonsense', 'compile=eager\0']

@group()
def pairs_of_set():
    for p in PAIRS: yield f'--set {p:.30}', lambda kit, p=p: trouble(
        sharpen('train', 'rlhf', '--out', kit.place()/'o', '--heldout', 0, '--set', p, 'batch=0'), 2)

CONFIGS = dict(deep='['*100_000, digits='{"n": ' + '9'*5000 + '}', nan='{"lr": NaN}', bytes=b'{"n": 3\xff}',
               bom='\ufeff{"n": 0}', empty='', null='null', twice='{"n": 3, "n": 0}',
               nested='{"n": {"a": 1}}',
               long='{"' + 'n'*100_000 + '": 1}', zero='\0', utf16='{"n": 0}'.encode('utf-16'))

def configured(content, kit):
    d = kit.place()
    if content in ('fifo', 'folder'): (os.mkfifo if content == 'fifo' else os.mkdir)(d/'c.json')
    else: (d/'c.json').write_bytes(content if isinstance(content, bytes) else content.encode())
    end = sharpen('train', 'rlhf', '--heldout', 0, '--out', d/'o', '--config', d/'c.json', '--set', 'batch=0',
                  wait=30)
    return trouble(end, 2) or ('something was written' if (d/'o').exists() else '')

@group()
def config_files():
    for name, content in CONFIGS.items(): yield name, partial(configured, content)
    for name in ('fifo', 'folder'): yield name, partial(configured, name)


# Options

OPTIONS = {
    'plan rlhf': ('--model {xl} --reward {r} --prompts {p}',
             '--model --preset --px --device --world --batch-seconds --share --heldout '
             '--S-eval --steps'),
    'sample': ('--model {xl} --prompts {p} --out {o} --n 1 --S 1',
               '--model --lora --prompts --out --n --S --seed --guidance --px --variant'),
    'search best_of_n': ('--model {xl} --prompts {p} --reward {r} --out {o} --n 1 --S 1 --budget 2',
                         '--model --lora --reward --combine --prompts --budget --out --n --S --settings '
                         '--seed --guidance --px --variant'),
    'evaluate': ('--model {xl} --prompts {p} --reward {r} --n 1 --S 1',
                 '--model --lora --reward --prompts --n --S --seed --guidance --px --variant'),
    'train rlhf': ('--model {xl} --prompts {p} --reward {r} --out {o} --heldout 0 --steps 0 --set n=2 S=2 '
                   'batch=2',
                   '--model --reward --prompts --out --preset --heldout --heldout-prompts --S-eval --tracker '
                   '--px --guidance --variant --vae --images --resume --steps --config'),
    'score': ('--images {pics} --prompts {pics}.jsonl --reward {r} --out {o}',
              '--images --prompts --reward --out --batch'),
    'serve-reward': ('--reward nothing', '--port --host --reward'),
    'demo': ('--out {o} --steps 1', '--out --steps --seed')}
NUMBERS = ['-1', '1.5', 'x', '', 'nan', 'inf', '1e400', '999999999', str(10**30), '9'*5000, '²', '0']
TEXT = ['', '\0', 'x'*5000, '/dev/null', '/dev/full', '/', '.', '-', '~nobody/x', 'hf:', 'hf:a', 'hf:/',
        ':', '::',
        'a:b:c', '..', '{fifo}', '{file}', '{folder}', '\udcff', 'a\nb', '@', '!', ',', 'clip@', '(',
        'clip:nan',
        'remote@', 'mllm@', 'remote@http://[', 'own', 'http://', '*', '%s', '{{x}}', 'a/b', 'a/b/c', '--']
COUNTS = ('--n --m --px --world --batch-seconds --share --heldout --S-eval --steps --S --seed --guidance '
          '--batch --port --budget').split()

def short():
    "A training that is accepted ends before its first batch, and a demo measures two prompts"
    from diffusion_sharpening.commands import job, train
    fit, number = train.fit, job.heldout_number
    def once(model, method, judge, source, run, *more):
        run.steps = 0
        return fit(model, method, judge, source, run, *more)
    train.fit = once
    job.heldout_number = lambda n, model: 2 if n is None else number(n, model)

def optional(command, base, option, value, kit):
    "Refused in one line, or done"
    d = kit.place()
    os.mkfifo(d/'fifo'); (d/'file').write_text('mine'); (d/'folder').mkdir()
    names = dict(xl=kit.folder/'xl', p=kit.folder/'prompts.txt', o=d/'o', r=kit.reward,
                 pics=kit.folder/'pics',
                 **{k: d/k for k in ('fifo', 'file', 'folder')})
    argv = [a.format(**names) for a in base.split()]
    value = value.format(**names) if '{' in value else value
    end = sharpen(*command.split(), *argv, option, value, at=d, before=short, wait=90)
    if (d/'file').read_text() != 'mine': return 'it overwrote a file'
    return trouble(end)

@group(slow=True)
def options():
    for command, (base, names) in OPTIONS.items():
        for o in names.split():
            for v in NUMBERS if o in COUNTS else TEXT: yield f'{command} {o} {v!r:.20}', partial(
                optional, command, base, o, v)


# Names of files

NAMES = ['with space', 'a\nb', "it's", 'a"b', 'a:b', 'a,b', 'a;b', 'a=b', 'a#b', 'a@b', 'a!b', '%s', '{x}',
         '$HOME',
         '-dash', '~', 'é', '日本', '🐈', 'a\u2028b', '\udcff\udcfe', 'x'*200, '...', '(a)', '[a]', 'a*',
         'a\\b', '\x1b[31m']

def named(name, kit):
    "Everything of a run lies in a folder of that name; weights are read where it is UTF-8, or that is said"
    d, spelt = kit.place()/name, name == name.encode(errors='replace').decode()
    d.mkdir()
    shutil.copytree(kit.folder/'xl', d/'xl')
    (d/'r.py').write_text('def bright(images, prompts): return images.mean((1, 2, 3))\n')
    (d/'p.txt').write_text('\n'.join(TEXTS))
    argv = kit.train('o', 1, model='xl', reward='r.py:bright', prompts='p.txt')
    if why := trouble(sharpen(*argv, at=d), 0 if spelt else 2): return f'train: {why}'
    for more in ('sample', '--lora', 'o', '--out', 's', '--n', 1, '--S', 1, '--prompts', 'p.txt'), (
            'push', 'o', 'me/x', '--dry-run'), ('export',
                                                'o'), ('train', 'rlhf', '--resume', 'o', '--steps', 2):
        if not spelt: break
        if why := trouble(sharpen(*more, at=d), 0): return f'{more[0]}: {why}'
    full = kit.train(d/'o2', 1, model=d/'xl', reward=f'"{d}/r.py:bright"', prompts=d/'p.txt')
    return trouble(sharpen(*full), 0, 2)

@group(slow=True)
def names_of_files():
    for n in NAMES: yield repr(n)[:30], partial(named, n)


# Prompts

PROMPTS = {
    'p.txt': ['a $_$ dog', 'a\tb', '\\frac{', '<b>|x|</b>', '`', 'x'*100_000, '🐈'*500, '\u202eabc',
              'e\u0301'*99, '%s%n',
              '{0}', '$(rm x)', '#', '--', '\x07', '\x1b[2J', 'None', 'null', '0'],
    'p.jsonl': ['{"prompt": "a\\nb"}', '{"prompt": "\\u0000"}', '{"prompt": 3}', '{"prompt": null}', '[]',
                '"x"', '{}',
                '['*100_000, '{"prompt": "\\ud800"}', '{"prompt": "x", "prompt": "y"}', '9'*5000,
                '{"a": 1e999}'],
    'p.csv': ['prompt\n', '"', 'prompt,prompt\na,b', 'a,b\n1,2', 'prompt\n"x', '\0', ',,,',
              'prompt\n' + 'x'*10**6],
    'p.parquet': ['PAR1', '', 'PAR1' + '\0'*100 + 'PAR1'], 'p.arrow': ['ARROW1', '\xff'*99],
    'p.json': ['{', '[[[]]]', '3', '"a"', '[{"prompt": "a"}, 3]', '{"prompt": {"prompt": 3}}', 'NaN'],
    'p.zip': ['PK'], 'p.exe': ['MZ'], 'p': ['a dog']}

def prompted(file, content, kit):
    "Read, or refused in one line with the name of the file; what was sampled can be scored"
    d = kit.place()
    (d/file).write_bytes(content.encode(errors='surrogateescape'))
    argv = ['sample', '--model', kit.folder/'xl', '--out', 's', '--n', 1, '--S', 1, '--prompts', file]
    end = sharpen(*argv, at=d)
    if why := trouble(end, 0, 2): return why
    if end.code:
        return '' if file in end.err and not (d/'s').exists() else f'line or leftovers: {end.last():.200}'
    back = sharpen('score', '--images', 's', '--prompts', 's/prompts.jsonl', '--reward', kit.reward, at=d)
    return trouble(back, 0)

@group(slow=True)
def prompts():
    for file, contents in PROMPTS.items():
        for c in contents: yield f'{file}: {c!r:.30}', partial(prompted, file, c)

def drawn(prompt, kit):
    "A training with such prompts ends with a report, a card and pictures; a blank one is refused"
    d = kit.place()
    (d/'p.jsonl').write_text(''.join(json.dumps(dict(prompt=p)) + '\n' for p in (prompt, *TEXTS)))
    argv = kit.train(d/'o', 1, prompts=d/'p.jsonl', heldout=3)
    if why := trouble(sharpen(*argv), 0 if prompt.strip() else 2): return why
    if not prompt.strip(): return
    there = {p.name for p in (d/'o').iterdir()}
    if not {'report.json', 'before_after.png', 'reward_curve.png'} <= there: return f'only {sorted(there)}'
    return trouble(sharpen('push', d/'o', 'me/x', '--dry-run'), 0)

@group(slow=True)
def prompts_of_trainings():
    for p in (*PROMPTS['p.txt'], 'a\nb', '\0', '\u2028'): yield repr(p)[:30], partial(drawn, p)


# Weights and models

def lora_with(change, kit):
    "A damaged LoRA is refused, or its strength is as said"
    run = kit.run()
    file = run/'pytorch_lora_weights.safetensors'
    change(file)
    model = ['--model', kit.folder/'xl', '--prompts', kit.folder/'prompts.txt', '--n', 1, '--S', 1]
    for argv in (['sample', *model, '--lora', run, '--out', run/'s'], ['export', run],
                 ['push', run, 'me/x', '--dry-run']):
        if why := trouble(sharpen(*argv, wait=30), 1, 2): return f'{argv[0]}: {why}'

def packed(header, data=b''): return struct.pack('<Q', len(header)) + header + data

def cut(n): return lambda f: f.write_bytes(f.read_bytes()[:n])
def put(data): return lambda f: f.write_bytes(data)

def made(kind):
    "Put a FIFO, a folder or a link in place of a file"
    def change(f):
        shutil.rmtree(f) if f.is_dir() and not f.is_symlink() else f.unlink()
        if kind == 'fifo': os.mkfifo(f)
        if kind == 'folder': f.mkdir()
        if kind == 'loop': f.symlink_to(f.name)
        if kind == 'zeros': f.symlink_to('/dev/zero')
    return change

LORAS = {f'cut to {n} bytes': cut(n) for n in (0, 1, 7, 8, 9, 100, 2000, -1)} | {
    'text': put(b'hello'), 'long header': put(struct.pack('<Q', 2**63) + b'{}'),
    'header of 100 MB': put(struct.pack('<Q', 10**8) + b'{}'), 'no JSON': put(packed(b'{"a": ')),
    'deep header': put(packed(b'['*10_000)), 'no tensors': put(packed(b'{}')),
    'offsets beyond': put(packed(b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,999]}}', b'x'*36)),
    'huge shape': put(packed(b'{"a":{"dtype":"F32","shape":[99999999999,9],"data_offsets":[0,36]}}',
                             b'x'*36)),
    'strange key': put(packed(b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}', b'x'*36))} | {
    k: made(k) for k in ('fifo', 'folder', 'loop', 'zeros', 'gone')}

@group(slow=True)
def lora_files():
    for name, change in LORAS.items(): yield name, partial(lora_with, change)

def model_with(file, change, kit):
    "A damaged model is refused in one line, or draws the same picture as a whole one"
    d = kit.copy(kit.folder/'xl').parent
    change(d/'xl'/file)
    argv = ['sample', '--prompts', kit.folder/'prompts.txt', '--n', 1, '--S', 1]
    end = sharpen(*argv, '--model', d/'xl', '--out', d/'s', wait=60)
    if end.code == 0:
        sharpen(*argv, '--model', kit.folder/'xl', '--out', d/'t')
        same = (d/'s/0000.png').read_bytes() == (d/'t/0000.png').read_bytes()
        if not same and not end.err: return 'another picture, without a word'
    return trouble(end, 0, 1, 2)

CONFIG_FILES = ['model_index.json', 'unet/config.json', 'vae/config.json', 'text_encoder/config.json',
                'text_encoder_2/config.json', 'scheduler/scheduler_config.json',
                'tokenizer/tokenizer_config.json',
                'tokenizer/tokenizer.json']
WEIGHT_FILES = ['unet/diffusion_pytorch_model.safetensors', 'vae/diffusion_pytorch_model.safetensors',
                'text_encoder/model.safetensors', 'text_encoder_2/model.safetensors']

def whole(content): return lambda f: f.write_text(content)

def changed(**new):
    def change(f):
        if f.name.endswith('.json'): f.write_text(json.dumps(json.loads(f.read_text()) | new))
    return change

def flip(share):
    "Flip a bit somewhere in the file"
    def change(f):
        data = bytearray(f.read_bytes()); data[int(share*(len(data)-1))] ^= 64
        f.write_bytes(data)
    return change

def missing_key(f):
    from safetensors.torch import load_file, save_file
    w = load_file(f); w.pop(sorted(w)[0]); save_file(w, f, dict(format='pt'))

def other_keys(f):
    from safetensors.torch import load_file, save_file
    save_file({f'x.{k}': v for k, v in load_file(f).items()}, f, dict(format='pt'))

def other_shape(f):
    from safetensors.torch import load_file, save_file
    w = load_file(f); k = sorted(w)[0]; w[k] = w[k].flatten()[:1].clone(); save_file(w, f, dict(format='pt'))

def not_finite(f):
    from safetensors.torch import load_file, save_file
    w = load_file(f); w = {k: v*math.nan if v.is_floating_point() else v for k, v in w.items()}
    save_file(w, f, dict(format='pt'))

JSON_DAMAGE = {'empty': whole(''), 'half': lambda f: f.write_text(f.read_text()[:len(f.read_text())//2]),
               'list': whole('[]'), 'null': whole('null'), 'object': whole('{}'), 'deep': whole('['*100_000),
               'latin': put(b'{"a": "\xe9"}')} | {k: made(k) for k in ('gone', 'fifo', 'folder', 'loop')}
WEIGHT_DAMAGE = {'empty': whole(''), 'cut': cut(-1), 'half': cut(9999), 'key gone': missing_key,
                 'other keys': other_keys,
                 'other shape': other_shape,
                 'NaN': not_finite} | {k: made(k) for k in ('gone', 'fifo', 'folder')}
VALUES = [('unet/config.json', dict(block_out_channels=64)), ('unet/config.json', dict(in_channels=0)),
          ('unet/config.json', dict(sample_size='x')), ('unet/config.json', dict(sample_size=0)),
          ('vae/config.json', dict(scaling_factor=0)), ('vae/config.json', dict(scaling_factor='x')),
          ('vae/config.json', dict(scaling_factor=1e400)), ('vae/config.json', dict(block_out_channels=[])),
          ('scheduler/scheduler_config.json', dict(num_train_timesteps=0)),
          ('scheduler/scheduler_config.json', dict(num_train_timesteps=10**9)),
          ('scheduler/scheduler_config.json', dict(num_train_timesteps='x')),
          ('scheduler/scheduler_config.json', dict(beta_schedule='nonsense')),
          ('scheduler/scheduler_config.json', dict(beta_end=2)),
          ('scheduler/scheduler_config.json', dict(beta_end=None)),
          ('scheduler/scheduler_config.json', dict(prediction_type='nonsense')),
          ('model_index.json', dict(_class_name='Nonsense')), ('model_index.json', dict(_class_name=3)),
          ('model_index.json', dict(unet=None)), ('model_index.json', dict(unet=['os', 'system'])),
          ('model_index.json', dict(unet=['diffusers', 'AutoencoderKL'])),
          ('model_index.json', dict(more=['x', 'Y'])),
          ('text_encoder/config.json', dict(hidden_size=0)),
          ('text_encoder/config.json', dict(num_hidden_layers=1)),
          ('text_encoder/config.json', dict(model_type='nonsense')),
          ('tokenizer/tokenizer_config.json', dict(model_max_length='x')),
          ('tokenizer/tokenizer_config.json', dict(model_max_length=0)),
          ('tokenizer/tokenizer_config.json', dict(model_max_length=10**9))]

@group(slow=True)
def folders_of_models():
    for file in CONFIG_FILES:
        for what, change in JSON_DAMAGE.items(): yield f'{file}: {what}', partial(model_with, file, change)
    for file in WEIGHT_FILES:
        for what, change in WEIGHT_DAMAGE.items(): yield f'{file}: {what}', partial(model_with, file, change)
    for file, new in VALUES: yield f'{file}: {new}', partial(model_with, file, changed(**new))


# Reward code

CODE = '''import os, sys, time, torch
light = lambda images: images.mean((1, 2, 3))
def exits(images, prompts): sys.exit(0)
def exits_words(images, prompts): sys.exit("done")
def raises(images, prompts): raise RuntimeError("two\\nlines")
def deep(images, prompts): return deep(images, prompts)
def asserts(images, prompts): assert False
def stops(images, prompts): raise StopIteration
def generator(images, prompts): yield 1
def memory(images, prompts): raise MemoryError
def nan(images, prompts): return light(images)*float('nan')
def inf(images, prompts): return light(images)/0
def short(images, prompts): return light(images)[:-1]
def long(images, prompts): return [0.]*(len(prompts) + 1)
def scalar(images, prompts): return 1.
def words(images, prompts): return ['good']*len(prompts)
def nothing(images, prompts): return None
def nested(images, prompts): return [[1.]]*len(prompts)
def complex_(images, prompts): return [1j]*len(prompts)
def big(images, prompts): return [10**400]*len(prompts)
def wide(images, prompts): return images
def one(images): return [1.]
def broken_type(images, prompts): raise type('Odd', (Exception,), {'__str__': lambda s: 1/0})()
class Fails:
    def __init__(self): raise OSError('no')
    def __call__(self, images, prompts): return light(images)
value = 3
def in_place(images, prompts): s = light(images); images.zero_(); prompts[:] = ['x']*len(prompts); return s
def grad_off(images, prompts): torch.set_grad_enabled(False); return light(images)
def grad_on(images, prompts): torch.set_grad_enabled(True); return light(images).requires_grad_()
def seeds(images, prompts): torch.manual_seed(0); return light(images)
def numpy_(images, prompts): return light(images).numpy()
def double(images, prompts): return light(images).double()
def ints(images, prompts): return [*range(len(prompts))]
def prints(images, prompts): print('hello'); return light(images)
def dtype(images, prompts): torch.set_default_dtype(torch.float64); return light(images)
def cwd(images, prompts): os.chdir('/'); return light(images)
def closes(images, prompts): sys.stdout = None; return light(images)
def equal(images, prompts): return [1.]*len(prompts)
def huge(images, prompts): return light(images)*1e37
def inference(images, prompts):
    with torch.inference_mode(): return light(images)
'''
REFUSED = ('exits exits_words raises deep asserts stops generator memory nan inf short long scalar words '
           'nothing nested complex_ big wide one broken_type Fails value').split()
HARMLESS = ('in_place grad_off grad_on seeds numpy_ double ints prints dtype cwd closes equal huge '
            'inference').split()
SAME = ('in_place grad_off grad_on seeds numpy_ double prints cwd closes inference').split()    # as `bright`

def judged(name, kit):
    d = kit.place()
    (d/'odd.py').write_text(CODE)
    end = sharpen(*kit.train('o', 2, heldout=2, reward=f'{d}/odd.py:{name}'), at=d)
    if name in REFUSED:
        return trouble(end, 1, 2) or ('' if name in end.last() else f'no name in: {end.last():.200}')
    if why := trouble(end, 0): return why
    if name not in SAME: return ''
    sharpen(*kit.train('p', 2, heldout=2), at=d)
    return '' if weights(d/'o') == weights(d/'p') else 'it changed what was trained'

MODULES = dict(syntax='def f(', exits='import sys; sys.exit(0)', raises='1/0',
               imports='import nonsense_package',
               nul='\0', latin=b'x = "\xe9"\ndef f(a, b): return [0.]*len(b)', empty='', folder='folder',
               fifo='fifo',
               deep='(' * 1000, loop='def __getattr__(k): raise SystemExit(k)')

def imported(content, kit):
    d = kit.place()
    if content in ('folder', 'fifo'): made(content)((d/'m.py').touch() or d/'m.py')
    else: (d/'m.py').write_bytes(content if isinstance(content, bytes) else content.encode())
    end = sharpen(*kit.train('o', 1, reward='m.py:f'), at=d, wait=20)
    return trouble(end, 2) or ('something was written' if (d/'o').exists() else '')

@group(slow=True)
def reward_code():
    for name in (*REFUSED, *HARMLESS): yield name, partial(judged, name)
    for name, content in MODULES.items(): yield f'module: {name}', partial(imported, content)


# Pictures

def bytes_of(mode='RGB', size=(64, 64), kind='PNG', **how):
    import io
    Image.new(mode, size).save(buf := io.BytesIO(), kind, **how)
    return buf.getvalue()

def pictures_of():
    good = bytes_of()
    bad = {'empty': b'', 'text': b'hello', 'half': good[:len(good)//2],
           'flipped': good[:60] + b'\xff' + good[61:],
           '16 bit': bytes_of('I;16'), 'float': bytes_of('F', kind='TIFF'), 'svg': b'<svg/>',
           'eps': b'%!PS-Adobe-3.0 EPSF',
           'moving': bytes_of('L', kind='GIF', save_all=True, append_images=[Image.new('L', (64, 64), 200)])}
    fine = {'gray': bytes_of('L'), 'palette': bytes_of('P'), 'alpha': bytes_of('RGBA'),
            'cmyk': bytes_of('CMYK', kind='JPEG'),
            'one bit': bytes_of('1'), 'webp': bytes_of(kind='WEBP'), 'one pixel': bytes_of(size=(1, 1)),
            'long': bytes_of(size=(3000, 2))}
    return bad, fine

def pictured(data, codes, kit):
    "Found before anything is scored or trained, and the file is named"
    d = kit.place()
    (d/'pics').mkdir()
    for i in range(3): (d/f'pics/{i}.png').write_bytes(bytes_of())
    (d/'pics/odd.png').write_bytes(data)
    for p in (d/'pics').iterdir(): p.with_suffix('.txt').write_text('a dog')
    (d/'p.txt').write_text('a dog\n'*4)
    for argv in (['score', '--images', 'pics', '--prompts', 'p.txt', '--reward', kit.reward],
                 [*kit.train('o', 1, more=['--images', 'pics']), ]):
        if argv[0] == 'train': argv[1:2] = ['standard']; argv[-len('n=2 S=2'.split())-3:-3] = []
        end = sharpen(*argv, at=d)
        if why := trouble(end, *codes): return f'{argv[0]}: {why}'
        if end.code and 'odd.png' not in end.last():
            return f'{argv[0]}: the file is not named: {end.last():.200}'

@group(slow=True)
def pictures():
    bad, fine = pictures_of()
    for name, data in bad.items(): yield name, partial(pictured, data, (1, 2))
    for name, data in fine.items(): yield name, partial(pictured, data, (0,))
