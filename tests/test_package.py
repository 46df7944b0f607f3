"The package as installed: quick to import, in step with its notebooks and settings, and buildable"
import ast, configparser, importlib.metadata, json, re, subprocess, sys
from pathlib import Path
import pytest

root = Path(__file__).resolve().parents[1]
config = configparser.ConfigParser(delimiters=['='])
config.read(root/'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']
lib = root/cfg['lib_path']
modules = {p: '.'.join(p.relative_to(root).with_suffix('').parts)
           for p in sorted(lib.rglob('*.py')) if p.name[0] != '_'}
heavy = 'diffusers transformers open_clip torchvision matplotlib peft accelerate IPython ipywidgets'.split()

def run(code):
    "What `code` prints in a fresh Python"
    res = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=root)
    assert res.returncode == 0, res.stderr
    return res.stdout

def test_imports_are_light():
    "No module imports a heavy library before it is used"
    out = run(f"""
import importlib, json, sys
found = {{}}
for name in {list(modules.values())}:
    importlib.import_module(name)
    for h in {heavy}:
        if h in sys.modules: found.setdefault(h, name)
print(json.dumps(found))""")
    assert json.loads(out) == {}

def test_imports_are_quick():
    "All modules together add little to what they stand on, which is imported first"
    out = run(f"""
import importlib, time, torch, numpy, PIL.Image, safetensors.torch, fastcore.all
start = time.perf_counter()
for name in {list(modules.values())}: importlib.import_module(name)
print(time.perf_counter() - start)""")
    assert float(out) < 5

def test_the_package_alone_imports_nothing():
    assert run("import sys, diffusion_sharpening; print('torch' in sys.modules)").strip() == 'False'

def test_version():
    import diffusion_sharpening
    assert diffusion_sharpening.__version__ == cfg['version'] == importlib.metadata.version(cfg['lib_name'])

def exported(path):
    "Names of the modules that the notebook at `path` exports"
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    text = '\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'code')
    return {f"{cfg['lib_name']}.{m}" for m in re.findall(r'^#\|\s*default_exp\s+(\S+)', text, re.M)}

def test_a_notebook_for_each_module():
    nbs = root/'nbs'
    paths = [p for p in nbs.rglob('*.ipynb') if not any(o[0] in '._' for o in p.relative_to(nbs).parts)]
    assert set(modules.values()) == set().union(*map(exported, paths))

def definitions(path):
    "Functions and classes defined at the top of the module at `path`; patched methods belong to their class"
    def patched(o): return any('patch' in ast.unparse(d) for d in o.decorator_list)
    tree = ast.parse(path.read_text(encoding='utf-8'))
    return {o.name for o in tree.body if isinstance(o, (ast.FunctionDef, ast.ClassDef)) and not patched(o)}

def test_index_is_in_step():
    "`_modidx` names the functions and classes that the modules have"
    from diffusion_sharpening._modidx import d
    assert set(d['syms']) == set(modules.values()), "run nbdev_export"
    for p, name in modules.items():
        listed = {k.removeprefix(name+'.') for k in d['syms'][name] if k.count('.') == name.count('.')+1}
        assert listed == definitions(p), f"{name}: run nbdev_export"

@pytest.mark.parametrize('path', modules, ids=lambda p: p.relative_to(lib).as_posix())
def test_module_names_its_notebook(path):
    found = re.search(r'File to edit: (\S+\.ipynb)', path.read_text(encoding='utf-8'))
    assert found and (path.parent/found[1]).exists()

def test_metadata(tmp_path):
    "setup.py gives name, version, requirements, the command and nbdev's entry point"
    run("import runpy, sys; sys.argv = ['setup.py', '-q', 'egg_info', '--egg-base', "
        f"{str(tmp_path)!r}]; runpy.run_path('setup.py', run_name='__main__')")
    info = tmp_path/f"{cfg['lib_name']}.egg-info"
    text, points = (info/'PKG-INFO').read_text(encoding='utf-8'), (info/'entry_points.txt').read_text()
    assert f"Version: {cfg['version']}" in text and f"Requires-Python: >={cfg['min_python']}" in text
    assert 'Requires-Dist: torch' in text and 'Provides-Extra: dev' in text
    assert ('sharpen = diffusion_sharpening.commands.cli:main' in points
            and 'diffusion_sharpening._modidx:d' in points)
    sources = (info/'SOURCES.txt').read_text().split()
    assert {'settings.ini', f"{cfg['lib_name']}/__init__.py"} <= set(sources)

def name_of(requirement): return re.split(r'[<>=!~ ]', requirement)[0].replace('_', '-').lower()

def test_constraints_are_the_tested_set():
    "Every requirement is pinned, and no line is of one machine"
    lines = [l for l in (root/'constraints.txt').read_text().splitlines() if l and l[0] != '#']
    assert [l for l in lines if not re.fullmatch(r'[\w.-]+==[\w.!]+( ; .*)?', l)] == []
    needed = {name_of(r) for k in ('requirements', 'dev_requirements') for r in cfg[k].split()}
    assert needed - set(map(name_of, lines)) == set()
