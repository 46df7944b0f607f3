"Every command line that the README, the pages and the helps show runs as it stands, with smaller numbers"
import json, os, re, shlex, shutil, signal, sys, time
from pathlib import Path

import pytest
from PIL import Image

root = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(root/'nbs'/'_dev'))
from attacking import TEXTS, Child, trouble
from fault_proxy import FaultProxy
from diffusion_sharpening.commands import cli
from diffusion_sharpening.models.tiny import tiny_sdxl
from diffusion_sharpening.names.catalog import load_reward
from diffusion_sharpening.commands.lists import method_settings
from diffusion_sharpening.rewards.mllm import ASPECTS
from diffusion_sharpening.rewards.remote import serving
from diffusion_sharpening.training.plan import plan

OWN = '''def redness(images, prompts): return images[:, 0].mean((1, 2))
def warm(images, prompts): return (images[:, 0] - images[:, 2]).mean((1, 2))
'''
FEW = dict(train=['--heldout', 2, '--S-eval', 1], sample=['--n', 2, '--S', 1], evaluate=['--n', 2, '--S', 1],
           search=['--n', 2, '--S', 2], demo=['--steps', 1],
           experiment=['--model', 'layouts', '--budget', 400, '--heldout', 4, '--no-tune'])
LITTLE = 'n=2 m=2 S=2 batch=2 rank=2'.split()
NEEDS = {'image_reward': 'clip@shapes',      # weights that are not shipped → some that are
         'stabilityai/stable-diffusion-xl-base-1.0': 'MODEL'}


def fenced(text):
    "Command lines in the blocks of a page"
    blocks = re.findall(r'```\w*\n(.*?)```', re.sub(r'\\\n\s*', '', text), re.S)
    return [l for b in blocks for l in b.splitlines() if re.match(r'([A-Z_]+=\S+ )?sharpen \w', l)]

def pages():
    "Notebook → its command lines; README.md is made from index.ipynb"
    out = {}
    for p in sorted((root/'nbs').rglob('*.ipynb')):
        if p.name == 'index.ipynb' or any(o[0] in '._' for o in p.relative_to(root/'nbs').parts): continue
        found = json.loads(p.read_text(encoding='utf-8'))['cells']
        lines = fenced('\n'.join(''.join(c['source']) for c in found if c['cell_type'] == 'markdown'))
        if lines: out[p.name] = lines
    return out

PAGES = {'README.md': fenced((root/'README.md').read_text(encoding='utf-8')),
         'help': [l for lines in cli.EXAMPLES.values() for l in lines if not l.startswith('sharpen serve')],
         **pages()}


def named_options():
    "Notebook, command and option of every `sharpen` that is mentioned in a text"
    for p in sorted((root/'nbs').rglob('*.ipynb')):
        if any(o[0] in '._' for o in p.relative_to(root/'nbs').parts): continue
        for c in json.loads(p.read_text(encoding='utf-8'))['cells']:
            for name, rest in re.findall(r'\bsharpen ([a-z][a-z-]+)((?: [^`\n]*)?)', ''.join(c['source'])):
                options = re.findall(r' (--[\w-]+)', rest) if name in cli.COMMANDS else []
                yield from ((p.name, name, o) for o in options)


def test_options_that_a_text_names_exist(capsys):
    found = set(named_options())
    assert len(found) > 100
    helps = {name: cli.run([name, '--help']) or capsys.readouterr().out for name in cli.COMMANDS}
    assert not [o for o in found if not re.search(rf'{o[2]}\b', helps[o[1]])]


def known(argv):
    "Settings of the method that a command line trains"
    if ':' in argv[1]: return {'n', 'S', 'batch', 'rank'}      # the page's own method
    preset = dict(zip(argv, argv[1:])).get('--preset', 'default')
    return {r['name'] for r in method_settings(argv[1], preset)}


def smaller(line):
    "Environment and arguments of a command line, with numbers that make it short"
    env, argv = {}, shlex.split(line, comments=True)
    while '=' in argv[0]: k, _, v = argv.pop(0).partition('='); env[k] = v
    argv = [NEEDS.get(a, a) for a in argv[1:]]
    numbers = {'--steps': {'100': '1', '200': '2'}, '--port': {'8765': '0'},
               '--budget': {'160': '4', '400': '12', '12000': '400'}, '--seeds': {'5': '1'}}
    if argv[0] in ('score', 'serve-reward'): numbers['--reward'] = {'clip': 'clip@shapes'}
    argv = [numbers.get(a, {}).get(b, b) for a, b in zip(['', *argv], argv)]
    new = argv[0] == 'train' and '--resume' not in argv
    named = new or argv[0] in ('search', 'experiment')        # a name comes first
    if argv[0] != 'train' or new: argv[1 + named:1 + named] = FEW.get(argv[0], [])  # what is typed later wins
    if new and '--steps' not in argv: argv += ['--steps', 1]
    if new and '--set' not in argv: argv.append('--set')
    free = (known(argv) if new else set()) - {str(a).split('=')[0] for a in argv}
    if new: argv[(i := argv.index('--set') + 1):i] = [o for o in LITTLE if o.split('=')[0] in free]
    return env, [*map(str, argv)]


@pytest.fixture(scope='module', autouse=True)
def counted():
    "What a plan of the embedded model counts is known to every child that is forked after this"
    for rank in (2, 32): plan(rank=rank)

@pytest.fixture
def there(tmp_path):
    "A folder with what the examples name: a model, prompts, pictures with captions, settings, a reward"
    tiny_sdxl(tmp_path/'MODEL', words=' '.join(TEXTS).split())
    (tmp_path/'prompts.txt').write_text('\n'.join(TEXTS))
    (tmp_path/'table.csv').write_text('\n'.join(['caption', *TEXTS]))
    for name in ('mine.py', 'my_rewards.py'): (tmp_path/name).write_text(OWN)
    (tmp_path/'settings.json').write_text('{"S": 3}')
    (tmp_path/'pictures').mkdir()
    choices = [dict(prompt=t, better=i, worse=i + 9) for i, t in enumerate(TEXTS)]
    (tmp_path/'choices.jsonl').write_text('\n'.join(map(json.dumps, choices)))
    for i, t in enumerate(TEXTS):
        Image.new('RGB', (64, 64), (40*i, 9, 9)).save(tmp_path/f'pictures/{i}.png')
        (tmp_path/f'pictures/{i}.txt').write_text(t)
    shutil.copytree(tmp_path/'pictures', tmp_path/'accepted')
    return tmp_path


def few_held_out():
    "The demo measures 240 prompts; two are enough here"
    from diffusion_sharpening.commands import job
    job.heldout_number = lambda n, model: 2


def served(env, argv, at):
    "serve-reward says its address, answers there, and ends when it is asked to"
    child = Child(*argv, at=at, env=env)
    until = time.monotonic() + 60
    while not (url := re.search(rb'http://[^\s:]+:(\d+)/score', child.said[1])) and time.monotonic() < until:
        time.sleep(.05)
    far = f'remote@http://127.0.0.1:{int(url[1])}/score'
    ask = ['score', '--images', 'pictures', '--prompts', 'prompts.txt', '--reward', far, '--out', 'far']
    why = trouble(Child(*ask, at=at, env=env).end(), 0)
    os.kill(child.pid, signal.SIGTERM)
    return why or trouble(child.end(), 0)


@pytest.mark.parametrize('page', PAGES)
def test_examples_run(there, page, monkeypatch):
    monkeypatch.chdir(there)
    grades = json.dumps(dict.fromkeys(ASPECTS, 7))
    with serving(load_reward('clip@shapes')) as remote, FaultProxy(answer=lambda body: grades) as chat:
        for line in PAGES[page]:
            env, argv = smaller(line)
            if '--out' not in argv and argv[0] == 'train' and '--resume' not in argv:
                argv[2:2] = ['--out', f'runs/{len(list(there.glob("runs/*")))}']     # one folder, one run
            argv = [a.replace('http://first-machine:8765/score', remote)
                     .replace('http://127.0.0.1:8000/v1', chat.url) for a in argv]
            if argv[0] == 'serve-reward': why = served(env, argv, there)
            elif argv[0] == 'plan': why = cli.run(argv) and 'refused'       # here: what it counts is kept
            else: why = trouble(Child(*argv, at=there, env=env, before=few_held_out).end(300), 0)
            assert not why, f'{line}: {why}'


def test_every_command_is_shown_and_run():
    assert {l.split()[1] for l in PAGES['README.md']} >= {'train', 'sample', 'evaluate', 'plan'}
    assert {l.split()[1] for l in PAGES['help']} | {'serve-reward'} == set(cli.COMMANDS)


@pytest.mark.parametrize('command', cli.COMMANDS)
def test_help_shows_its_examples(command, capsys):
    assert cli.run([command, '--help']) == 0
    out = capsys.readouterr().out
    assert all(f'\n  {l}\n' in out for l in cli.EXAMPLES[command])


def test_serving_as_in_the_help(there):
    for line in cli.EXAMPLES['serve-reward']: assert not (why := served(*smaller(line), there)), why
