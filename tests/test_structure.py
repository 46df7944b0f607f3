"""How the library is built, read from its code: rooms that import only from rooms above, no circles, no world
named outside its room, small modules and cells. `structure.json` lists what does not hold yet, by rule
and file, and may only shrink: `python tests/test_structure.py` takes out what was mended. What a file that is
gone was allowed goes to files that are new.
"""
import ast, json, re, sys
from pathlib import Path
import pytest

root = Path(__file__).resolve().parents[1]
lib, nbs, listed = root/'diffusion_sharpening', root/'nbs', root/'tests'/'structure.json'
ROOMS = ('basics maths models rewards worlds names data methods search corrector evaluation training '
         'commands experiments widgets').split()       # in the order of reading
WORLDS = re.compile(r'\b(shapes|checker|layouts|tidy|molecules)\b')
WIDTH, LENGTH, HELPER = 110, 400, 5   # columns of a line, lines of a module, lines of a helper
METHOD = 120                          # lines of a module that is a method

def modules():
    "Path → dotted name without the package's, of every module with code of its own"
    paths = sorted(p for p in lib.rglob('*.py') if p.name not in ('_modidx.py', '__init__.py', '__main__.py'))
    return {p: '.'.join(p.relative_to(lib).with_suffix('').parts) for p in paths}

def parsed(path): return ast.parse(path.read_text(encoding='utf-8'))

def module_of(dotted, known):
    "The longest module that `dotted` starts with, or None"
    parts = dotted.split('.')
    return next((m for i in range(len(parts), 0, -1) if (m := '.'.join(parts[:i])) in known), None)

definition = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)

def texts(tree):
    "Strings of the code, docstrings left out"
    docs = {id(o.body[0].value) for o in ast.walk(tree)
            if isinstance(o, (ast.Module, *definition)) and ast.get_docstring(o) is not None}
    return [o.value for o in ast.walk(tree)
            if isinstance(o, ast.Constant) and isinstance(o.value, str) and id(o) not in docs]

def absolute(o, module):
    "The module of import-from `o` in `module`, written from the top"
    if not o.level: return o.module
    up = [lib.name, *module.split('.')][:-o.level]
    return '.'.join([*up, *([o.module] if o.module else [])])

def imported(tree, module=''):
    "Dotted names that `tree` of `module` imports from this package, by text too (`'rewards.clip:CLIPScore'`)"
    pre, out = lib.name + '.', []
    for o in ast.walk(tree):
        if isinstance(o, ast.Import): out += [a.name for a in o.names]
        if isinstance(o, ast.ImportFrom): out += [f'{absolute(o, module)}.{a.name}' for a in o.names]
    out = [o.removeprefix(pre) for o in out if o.startswith(pre)]
    dotted = [s for s in texts(tree) if re.fullmatch(r'\w+(\.\w+)+(:\w+)?', s)]
    return out + [s.removeprefix(pre).replace(':', '.') for s in dotted]

def arrows():
    "Module → the modules it imports from"
    found, known = modules(), set(modules().values())
    return {m: {module_of(o, known) for o in imported(parsed(p), m)} - {None, m} for p, m in found.items()}

def file_of(module): return 'diffusion_sharpening/' + module.replace('.', '/') + '.py'
def place(path): return path.relative_to(root).as_posix()

def imports_from_below():
    "Imports from a room not above the module's own; the command line, the outermost, may name every room"
    def room(m): return len(ROOMS) if m == 'commands.cli' else ROOMS.index(m.split('.')[0])
    pairs = [(a, b) for a, bs in arrows().items() for b in sorted(bs)]
    return [(file_of(a), f'imports {b}') for a, b in pairs if room(b) > room(a)]

def circles():
    "Modules that import themselves through others"
    to = arrows()
    def reached(m):
        seen, todo = set(), list(to[m])
        while todo:
            if (o := todo.pop()) not in seen: seen.add(o); todo += to[o]
        return seen
    return [(file_of(m), 'imports itself through others') for m in to if m in reached(m)]

def worlds_named():
    "Code outside `worlds` that names a world or its exam: in texts and in imports"
    outside = {p: (parsed(p), m) for p, m in modules().items() if m.split('.')[0] != 'worlds'}
    return [(place(p), s) for p, (t, m) in outside.items() for s in texts(t) + imported(t, m)
            if WORLDS.search(s)]

def long_modules():
    "Modules of more than 400 lines, and methods of more than 120"
    found = {p: (len(p.read_text(encoding='utf-8').splitlines()), m) for p, m in modules().items()}
    apart = 'methods.parts', 'methods.protocol'
    most = lambda m: METHOD if m.startswith('methods.') and m not in apart else LENGTH
    return [(place(p), f'{n} lines') for p, (n, m) in found.items() if n > most(m)]

def notebooks():
    paths = sorted(nbs.rglob('*.ipynb'))
    return [p for p in paths if not any(o[0] in '._' for o in p.relative_to(nbs).parts)]

def cells(path):
    "Code of a notebook, cell by cell"
    nb = json.loads(path.read_text(encoding='utf-8'))
    return [''.join(c['source']) for c in nb['cells'] if c['cell_type'] == 'code']

def all_code():
    "Path → pieces of code, for notebooks, tests and scripts"
    scripts = [*sorted((root/'tests').glob('*.py')), *sorted((nbs/'_dev').glob('*.py'))]
    return {p: cells(p) for p in notebooks()} | {p: [p.read_text(encoding='utf-8')] for p in scripts}

def wide_lines():
    "Lines of code over 110 columns, in notebooks, tests and scripts"
    return [(place(p), line) for p, pieces in all_code().items() for s in pieces
            for line in s.splitlines() if len(line) > WIDTH]

def bounds_in(code):
    "Bounds of intervals in f-strings of `code` with a format, which fails where there is none"
    try: tree = ast.parse(code)
    except SyntaxError: return []
    found = [o for o in ast.walk(tree) if isinstance(o, ast.FormattedValue) and o.format_spec]
    return [ast.unparse(o.value) for o in found if re.search(r"\['(low|high)'\]$", ast.unparse(o.value))]

def formatted_bounds():
    "Bounds of intervals written without `shown`, which knows that there may be none"
    apart = ('03_stats.ipynb', 'test_structure.py')
    return [(place(p), b) for p, pieces in all_code().items() if p.name not in apart
            for s in pieces for b in bounds_in(s)]

def too_many(cell):
    "Names defined in an exported cell beyond the one it may define; a short private helper beside it is free"
    defs = [o for o in ast.parse(cell).body if isinstance(o, definition)]
    helpers = [o for o in defs if o.name[0] == '_' and o.end_lineno - o.lineno < HELPER]
    return [o.name for o in defs][1 + bool(helpers):]

def crowded_cells():
    "Definitions beyond one in an exported cell"
    return [(place(p), n) for p in notebooks() for c in cells(p)
            if re.search(r'^#\|\s*export[si]?\b', c, re.M) for n in too_many(c)]

def undocumented():
    "Public functions and classes without a docstring"
    return [(place(p), o.name) for p in modules() for o in parsed(p).body
            if isinstance(o, definition) and o.name[0] != '_' and not ast.get_docstring(o)]

ALL = (imports_from_below, circles, worlds_named, long_modules, wide_lines, formatted_bounds, crowded_cells,
       undocumented)
RULES = {f.__name__: f for f in ALL}

def counts(found):
    "File → how often"
    out = {}
    for path, _ in found: out[path] = out.get(path, 0) + 1
    return out

def allowed(): return json.loads(listed.read_text(encoding='utf-8'))

@pytest.mark.parametrize('rule', RULES)
def test_structure(rule):
    "Nothing breaks the rule but what is listed, and all that is listed still does"
    found, known = RULES[rule](), allowed()[rule]
    now = counts(found)
    new = [f'{p}: {what}' for p, what in found if now[p] > known.get(p, 0)]
    assert not new, f'{RULES[rule].__doc__}; more than `structure.json` lists:\n' + '\n'.join(new[:20])
    assert now == known, 'mended since it was listed: run python tests/test_structure.py'

def test_every_room_has_its_place():
    assert {m.split('.')[0] for m in modules().values()} - set(ROOMS) == set()

def test_rules_find_what_they_look_for():
    "Each reader of code sees a fault that is put before it"
    tree = ast.parse("""'a checker'
def f():
    'docs of shapes'
    from diffusion_sharpening.rewards.clip import CLIPScore
    return 'shapes-clip', 'models.fit:fit'""")
    assert texts(tree) == ['shapes-clip', 'models.fit:fit']
    assert imported(tree) == ['rewards.clip.CLIPScore', 'models.fit.fit']
    near = ast.parse('from .loop import train; from ..basics.seeds import fold; from . import run')
    assert imported(near, 'training.plan') == ['training.loop.train', 'basics.seeds.fold', 'training.run']
    assert module_of('rewards.clip.CLIPScore', {'rewards.clip'}) == 'rewards.clip'
    assert module_of('os.path', {'rewards.clip'}) is None
    assert too_many('def a(): pass\ndef _b(): pass') == []
    assert too_many('def a(): pass\ndef b(): pass') == ['b']
    assert too_many('def _long():\n' + ' x\n'*6 + 'def b(): pass') == ['b']
    assert bounds_in("f\"{i['low']:.3f} {i['mean']:.3f} {i['high']}\"") == ["i['low']"]
    assert WORLDS.search('shapes-sdxl') and not WORLDS.search('reshapes') and not WORLDS.search('checkers')

def shrink(old, now):
    "The list without what was mended; new files may take over what files that are gone were allowed"
    free = sum(n for p, n in old.items() if not (root/p).exists())
    out = {p: min(n, now[p]) for p, n in old.items() if p in now}
    for p, n in now.items():
        if p not in out and n <= free: out[p] = n; free -= n
    return dict(sorted(out.items()))

def main():
    old = allowed() if listed.exists() else {}
    new = {k: shrink(old[k], counts(f())) if k in old else counts(f()) for k, f in RULES.items()}
    listed.write_text(json.dumps(new, indent=1) + '\n', encoding='utf-8')
    for k, v in new.items(): print(f'{k:20}{sum(old.get(k, v).values()):>6} → {sum(v.values())}')

if __name__ == '__main__': main()
