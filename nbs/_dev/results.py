"Where measurements are written: data/results/NAME.json, with the command, the commit, hardware and versions"
import shlex, subprocess, sys
from importlib.metadata import version
from pathlib import Path
from diffusion_sharpening.basics.files import write_json
from diffusion_sharpening.commands.provenance import provenance

root = Path(__file__).resolve().parents[2]
folder = root/'data'/'results'

def command(argv=None):
    "The command of this process, as it is typed at the top of the repository; of a path elsewhere its name"
    script, *args = argv or sys.argv
    path = Path(script).resolve()
    if 'pytest' in (path.name, path.parent.name): how = ['-m', 'pytest']
    else: how = [path.relative_to(root).as_posix() if path.is_relative_to(root) else script]
    return shlex.join(['python', *how, *[Path(a).name if Path(a).is_absolute() else a for a in args]])

def clean():
    "Whether every file but the results is as committed; None where there is no git"
    try: res = subprocess.run(['git', '-C', root, 'status', '--porcelain', '--', ':!data/results'],
                              capture_output=True, text=True)
    except OSError: return None
    return res.stdout == '' if res.returncode == 0 else None

def origin(*packages):
    "What every file of results says of itself; versions of more `packages` where they matter"
    said = provenance()
    more = {p: version(p) for p in packages}
    return dict(command=command()) | said | dict(git_clean=clean(), versions=said['versions'] | more)

def write(name, numbers, packages=(), into=folder):
    "Write `numbers` as data/results/NAME.json, print and return what is in it"
    found = origin(*packages) | numbers
    Path(into).mkdir(parents=True, exist_ok=True)
    print(write_json(Path(into)/f'{name}.json', found).read_text())
    return found
