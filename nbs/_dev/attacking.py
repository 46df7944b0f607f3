"What attacks are made of: command lines run in children of this process, how they must end, and material"
import hashlib, os, re, resource, shutil, signal, sys, threading, time, traceback
from dataclasses import dataclass
from pathlib import Path
import torch

torch.set_num_threads(1)
import accelerate, diffusers, matplotlib.pyplot, open_clip, peft, transformers  # once, not in every child
from diffusers import StableDiffusionXLPipeline
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from PIL import Image
from diffusion_sharpening.commands import cli, evaluate, interchange, sample, score, serve_reward, train
from diffusion_sharpening.models.lora import lora_file
from diffusion_sharpening.models.tiny import tiny_sdxl
from diffusion_sharpening.training import plan
from diffusion_sharpening.training.run import Run

TEXTS = ['a red circle', 'a blue square', 'a green star', 'a dog', 'two cats', 'a tree']
SMALL = 'n=2 S=2 batch=2 rank=2 checkpoint_every=1'.split()
REWARD = '''import os, signal
calls = 0
def bright(images, prompts):
    "Sends this process the signal SIG at call AT of it, if the environment says so"
    global calls
    calls += 1
    if os.environ.get('AT') == str(calls): os.kill(os.getpid(), int(os.environ['SIG']))
    return images.mean((1, 2, 3))
'''


@dataclass
class End:
    "How a command ended"
    code: int      # Exit code, minus the signal that killed it; None: it had to be stopped
    out: str       # Standard output
    err: str       # Standard error
    seconds: float

    def last(self): return ([l for l in self.err.replace('\r', '\n').splitlines() if l.strip()] or [''])[-1]


class Child:
    "A command line in a forked child; `before()` is called there first"
    def __init__(self, *argv, at='.', env=(), before=None, ends=(None, None)):
        self.began, self.said, self.ends = time.monotonic(), {1: b'', 2: b''}, ends
        pipes = {fd: os.pipe() for fd in (1, 2)}
        sys.stdout.flush(); sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0: self._be([*map(str, argv)], at, dict(env), before, pipes)
        for _, write in pipes.values(): os.close(write)
        self.readers = [threading.Thread(target=self._read, args=(fd, r), daemon=True)
                        for fd, (r, _) in pipes.items()]
        for t in self.readers: t.start()

    def _be(self, argv, at, env, before, pipes):
        code = 70
        try:
            for fd, (r, w) in pipes.items(): os.dup2(w, fd); os.close(r); os.close(w)
            sys.stdout, sys.stderr = streams = [open(fd, 'w', errors='backslashreplace', closefd=False)
                                                for fd in (1, 2)]
            signal.signal(signal.SIGINT, signal.default_int_handler)       # a shell may have it ignored
            torch.set_num_threads(1)       # renews PyTorch's pool while there is one thread: two at once fail
            os.chdir(at); os.environ.update(env)
            if before: before()
            code = self._code(argv)
            for f in streams: f.flush()
        except (OSError, ValueError): pass                                 # nobody reads
        finally: os._exit(code)                                            # never on in the parent's code

    def _code(self, argv):
        try: cli.main(argv)
        except SystemExit as e: return e.code if isinstance(e.code, int) else int(e.code is not None)
        except BaseException: traceback.print_exc()
        return 70

    def _read(self, fd, r):
        with open(r, 'rb', buffering=0) as f:
            while part := f.read(1 << 16): self.said[fd] += part

    def end(self, wait=60.):
        "Wait for it, at most `wait` seconds in which it worked or slept, not those of others"
        code, spent, at, done = None, 0., self.began, 0.
        while code is None and spent < wait:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid: code = os.waitstatus_to_exitcode(status)
            else: time.sleep(.005)
            if code is not None or time.monotonic() < at + .1: continue
            ready, work = doing(self.pid)
            spent += work - done if ready else max(work - done, time.monotonic() - at)
            at, done = time.monotonic(), work
        if code is None: os.kill(self.pid, signal.SIGKILL); os.waitpid(self.pid, 0)
        for t in self.readers: t.join(5)
        out, err = (self.said[fd].decode(errors='replace') for fd in (1, 2))
        return End(code, out, err, time.monotonic() - self.began)


def doing(pid):
    "Does a process work, or would it if it had a CPU; and the seconds of CPU it has had"
    state, *numbers = open(f'/proc/{pid}/stat').read().rpartition(')')[2].split()
    return state == 'R', sum(map(int, numbers[10:12]))/os.sysconf('SC_CLK_TCK')


def sharpen(*argv, wait=60., **where): return Child(*argv, **where).end(wait)


BARS = re.compile(r'(sharpening|sampling|evaluating|measuring|scoring|.*\d+%\|)')

def trouble(end, *codes):
    "What is wrong with how a command ended: one line, or nothing"
    lines = [l for l in end.err.replace('\r', '\n').splitlines() if l.strip()]
    if end.code is None: return f'no end within {end.seconds:.0f} s'
    if 'Traceback' in end.err + end.out: return f'traceback: {end.last():.200}'
    if end.code not in (codes or (0, 1, 2)): return f'exit code {end.code}: {end.last():.200}'
    if end.code in (1, 2) and not re.fullmatch(r'sharpen: .{8,1000}', end.last()):
        return f'exit code {end.code} and no single line: {end.last():.200}'
    odd = [l for l in lines if not BARS.match(l) and not l.startswith(('sharpen: ', 'warning: '))]
    return f'standard error also says: {odd[0]:.200}' if odd else ''


def inside(folder):
    "Path → checksum of every file of a folder"
    sums = {}
    for p in sorted(Path(folder).rglob('*')):
        if p.is_file(): sums[p.relative_to(folder).as_posix()] = hashlib.sha256(p.read_bytes()).hexdigest()
    return sums


def weights(folder):
    "The bits of a LoRA"
    from safetensors.torch import load_file
    try: found = load_file(Path(folder)/lora_file)
    except Exception: return None
    return {k: v.numpy().tobytes() for k, v in found.items()}


class Kit:
    "A tiny SDXL pipeline of 64 px, prompts, a reward, a finished run, and pictures: made once, then copied"
    def __init__(self, folder):
        self.folder, self.count = Path(folder), 0
        tiny_sdxl(self.folder/'xl', words=' '.join(TEXTS).split(), sample_size=8)
        for rank in (2, 32): plan.units_of(str(self.folder/'xl'), 64, Run(rank=rank))    # not in each child
        (self.folder/'mine.py').write_text(REWARD)
        (self.folder/'prompts.txt').write_text('\n'.join(TEXTS) + '\n')
        self.reward = f'{self.folder}/mine.py:bright'
        (self.folder/'pics').mkdir()
        for i, t in enumerate(TEXTS[:2]): Image.new('RGB', (64, 64), (90*i, 40, 9)).save(
            self.folder/f'pics/{i}.png')
        (self.folder/'pics.jsonl').write_text(''.join(f'{{"prompt": "{t}"}}\n' for t in TEXTS[:2]))

    def train(self, out, steps=2, heldout=0, model=None, reward=None, prompts=None, more=(), **how):
        "Train the tiny model"
        source = ['--model', model or self.folder/'xl', '--reward', reward or self.reward, '--prompts',
                  prompts or self.folder/'prompts.txt', '--heldout', heldout, '--S-eval', 1,
                  '--guidance', 1]
        return ['train', 'rlhf', *source, '--steps', steps, '--out', out, *more, '--set', *SMALL]

    def run(self):
        "A copy of a finished run of two batches"
        made = self.folder/'run'
        if not made.exists():
            end = sharpen(*self.train(made))
            if end.code: raise SystemExit(f'the training failed: {end.last()}')
        return self.copy(made)

    def place(self):
        "A new folder"
        self.count += 1
        d = self.folder/f'at{self.count}'
        d.mkdir()
        return d

    def copy(self, made):
        "A copy of a folder in a new one"
        d = self.place()/Path(made).name
        shutil.copytree(made, d, symlinks=True)
        return d

    def score(self, reward, out, more=()):
        return ['score', '--images', self.folder/'pics', '--prompts', self.folder/'pics.jsonl', '--reward',
                reward, '--out', out, *more]


def disk(limit):
    "A disk on which no file grows beyond `limit` bytes"
    def full(): resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return full


GROUPS = {}     # Name → (attacks, slow?); an attack is (name, function of a `Kit` → what did not hold, or '')

def group(slow=False):
    "Name a generator of attacks"
    def named(f):
        GROUPS[f.__name__.replace('_', ' ')] = f, slow
        return f
    return named


def attempt(attack, kit):
    "What did not hold, in one line, or nothing"
    try: return attack(kit) or ''
    except Exception as e: return f'the attack itself: {type(e).__name__}: {" ".join(str(e).split())[:200]}'
