"What every notebook must be, read without running it; `nbdev_test` runs them. Together they test it all."
import ast, importlib, json, re, sys
from pathlib import Path
import pytest

root = Path(__file__).resolve().parents[1]
nbs = root/'nbs'
paths = [p for p in sorted(nbs.rglob('*.ipynb')) if not any(o[0] in '._' for o in p.relative_to(nbs).parts)]
each_notebook = pytest.mark.parametrize('path', paths, ids=lambda p: p.relative_to(nbs).as_posix())
checks = re.compile(r'^\s*assert\b|\b(test_\w+|assert_\w+|check_\w+)\(|\braises\(', re.M)
on_a_machine = re.compile(r'(?<![\w./:~-])/(?:home|Users|root|work|mnt|tmp|private|var/folders)/[\w.-]+')
widget = 'application/vnd.jupyter.widget-view+json'
imports = (ast.Import, ast.ImportFrom)

def read(path):
    "The notebook at `path`, each cell with its text as `src`"
    nb = json.loads(path.read_text(encoding='utf-8'))
    for c in nb['cells']: c['src'] = ''.join(c['source'])
    return nb

def code(nb): return [c['src'] for c in nb['cells'] if c['cell_type'] == 'code']
def number_free(path): return re.sub(r'^\d+_', '', path.stem)
def markdown(nb): return [c['src'] for c in nb['cells'] if c['cell_type'] == 'markdown']
def outputs(nb): return [(c['src'], o) for c in nb['cells'] for o in c.get('outputs', [])]
def pictures(nb): return [d for _, o in outputs(nb) if (d := o.get('data', {}).get('image/png'))]
def directive(names, src): return re.search(rf'^#\|\s*({names})\b', src, re.M)

def parse(src):
    "The statements of a cell; none where it has magics"
    try: return ast.parse(src).body
    except SyntaxError: return []

def names(trees):
    "All names and attributes used in `trees`"
    nodes = [o for t in trees for o in ast.walk(t)]
    return {getattr(o, 'id', None) or getattr(o, 'attr', None) for o in nodes} - {None}

def bound(tree):
    "Names that statement `tree` defines"
    if hasattr(tree, 'name'): return {tree.name}
    return {o.id for o in ast.walk(tree) if isinstance(o, ast.Name) and isinstance(o.ctx, ast.Store)}

@each_notebook
def test_is_clean(path):
    from execnb.nbio import nb2str
    from nbdev.clean import clean_nb
    from nbdev.config import get_config
    nb = json.loads(path.read_text(encoding='utf-8'))
    kept = get_config(path=root).allowed_cell_metadata_keys.split()
    clean_nb(nb, allowed_cell_metadata_keys=kept)
    assert nb2str(nb) == path.read_text(encoding='utf-8'), "run nbdev_clean"

@each_notebook
def test_opens_as_a_page(path):
    "A kernel is named, so that JupyterLab does not ask; the module comes first, then title and subtitle"
    nb = read(path)
    ids = [c['id'] for c in nb['cells']]
    assert len({*ids}) == len(ids), 'expected each cell to have an id of its own'
    assert nb['metadata']['kernelspec']['name'] == 'python3'
    if directive('default_exp', '\n'.join(code(nb))): assert directive('default_exp', nb['cells'][0]['src'])
    assert re.fullmatch(r'# .*\n+> .*(\n- .*)*\s*', markdown(nb)[0]), (
        "expected '# Title' and '> subtitle' only in the first markdown cell: nbdev drops the rest")

@each_notebook
def test_outputs_are_saved(path):
    "Pictures are there; no errors, no warnings, no widget that needs a kernel"
    nb = read(path)
    for src, o in outputs(nb):
        assert o['output_type'] != 'error', f"saved with an error: {src}"
        assert o.get('name') != 'stderr', f"saved with standard error: {src}"
        assert widget not in o.get('data', {}), f"saved with a widget: {src}"
        said = ''.join(o.get('data', {}).get('text/plain', ''))
        assert not re.match(r'\w+\(children=', said), f"saved with the code of a widget: {src}"
    plots = [s for s in code(nb) if re.search(r'^[^#\n]*\bplt\.subplots\(', s, re.M)
             and not directive('exports?|exporti|hide|slow|cuda|eval', s)]
    assert pictures(nb) or not plots, f"no picture is saved: run make notebooks NB={path.relative_to(root)}"

@each_notebook
def test_pictures_are_small(path):
    sizes = [len(''.join(d))*3//4000 for d in pictures(read(path))]
    assert not [s for s in sizes if s > 120], f"pictures of {sizes} kB: 100 kB each is the most"

@each_notebook
def test_names_no_machine(path):
    "No path of the machine it was written on, in text, code or output"
    nb = read(path)
    shown = [json.dumps(o.get('text') or o.get('data', {}).get('text/plain')) for _, o in outputs(nb)]
    assert on_a_machine.findall('\n'.join(code(nb) + markdown(nb) + shown)) == []

@each_notebook
def test_links_lead_somewhere(path):
    text = re.sub(r'\$[^$]*\$|`[^`]*`', '', '\n\n'.join(markdown(read(path))))
    links = re.findall(r'\]\((?!\w+:|#)([^)\s#]+)', text)
    assert [l for l in links if not (path.parent/l).exists()] == []

@each_notebook
def test_every_public_name_is_checked(path):
    "Each exported function and class is used in a cell that checks something, or in what such a cell uses"
    cells = code(read(path))
    public = [o.name for s in cells if directive('exports?', s) for o in parse(s)
              if isinstance(o, (ast.FunctionDef, ast.ClassDef)) and o.name[0] != '_']
    checked = names([t for s in cells if checks.search(s) and not directive('exports?', s) for t in parse(s)])
    statements = [t for s in cells for t in parse(s)]
    for _ in range(3): checked |= names([t for t in statements if bound(t) & checked])
    bare = [n for n in public if n not in checked]
    assert not bare, f"not used in a cell that checks something (assert, test_…, check_…): {', '.join(bare)}"

@each_notebook
def test_imports_have_their_own_cells(path):
    "A cell with imports and other code would be executed whenever the documentation is made"
    shown = [s for s in code(read(path)) if not directive('hide', s)]
    mixed = [s for s in shown if len({isinstance(t, imports) for t in parse(s)}) == 2]
    assert not mixed, f"imports belong in a cell of their own, not beside other code: {mixed[0]:.80}"

CHAPTERS = '02_maths', '04_rewards', '08_methods', '09_search', '10_corrector'
taught = [p for p in paths if p.parent.name in CHAPTERS
          and number_free(p) not in ('catalog', 'figures', 'curves', 'pipeline')]
asking = [p for p in paths if p in taught or any('## Exercises\n' in c for c in markdown(read(p)))]

@pytest.mark.parametrize('path', asking, ids=lambda p: p.relative_to(nbs).as_posix())
def test_has_exercises(path):
    "Each question has its answer in a fold below it; cells with hidden code compute what the answers say"
    cells = [c for c in read(path)['cells'] if not directive('hide', c['src'])]
    at = [i for i, c in enumerate(cells) if c['src'].startswith('## Exercises\n')]
    assert len(at) == 1, "expected one cell '## Exercises'"
    asked, *computed = cells[at[0]:]
    each = re.split(r'^\*\*(\d)\.\*\* ', asked['src'], flags=re.M)[1:]
    numbers, texts = each[::2], each[1::2]
    assert 2 <= len(texts) <= 4 and numbers == [str(i + 1) for i in range(len(texts))]
    fold = r'.{40,}\n\n<details>\n<summary>Answer</summary>\n\n.{40,}\n\n</details>\s*'
    assert [n for n, t in zip(numbers, texts) if not re.fullmatch(fold, t, re.S)] == []
    assert computed and all(c['metadata'].get('jupyter', {}).get('source_hidden') for c in computed)
    assert any(checks.search(c['src']) for c in computed)

@pytest.mark.parametrize('path', [p for p in taught if p.parent.name != '04_rewards'],
                         ids=lambda p: p.relative_to(nbs).as_posix())
def test_has_a_picture(path):
    "Maths, methods and searches are drawn on their pages"
    assert pictures(read(path)), "expected a picture at least, saved with the page"

@pytest.mark.parametrize('chapter', ['02_maths', '08_methods'])
def test_a_letter_has_one_meaning(chapter):
    "No letter stands twice in the tables of letters of a chapter"
    texts = '\n'.join(t for p in paths if p.parent.name == chapter for t in markdown(read(p)))
    tables = re.findall(r'^\| (?:letter|symbol) \|.*\n((?:\|.*\n?)+)', texts, re.M)
    rows = [line.split('|')[1] for table in tables for line in table.splitlines()]
    letters = [o.strip() for row in rows for m in re.findall(r'\$([^$]+)\$', row) for o in m.split(',')]
    assert len(letters) > 15 and [o for o in letters if letters.count(o) > 1] == []

def test_readme_is_up_to_date(monkeypatch):
    monkeypatch.syspath_prepend(str(nbs/'_dev'))
    assert importlib.import_module('make_readme').main(check=True), "run make readme"

def test_the_counts_under_the_figure_are_measured():
    told = json.loads((nbs.parent/'data'/'results'/'front.json').read_text())
    said = f"Of {told['captions']} captions {told['rose']} rose, {told['fell']} fell"
    assert said in (nbs.parent/'README.md').read_text(encoding='utf-8')

def test_the_figure_for_a_phone_is_that_of_the_page(monkeypatch):
    "Its pictures are those of the wide one, one under the other and begun at one column"
    from PIL import Image, ImageChops, ImageOps
    monkeypatch.syspath_prepend(str(nbs/'_dev'))
    figures = nbs.parent/'figures'
    want = importlib.import_module('make_readme').narrowed(figures/'demo.png')
    kept = Image.open(figures/'demo-narrow.png').convert('RGB')
    assert kept.size == want.size and not ImageChops.difference(kept, want).getbbox(), 'run make readme'
    w, h = want.width, want.height//2
    begun = {ImageOps.invert(want.crop((0, y, w, y + h)).convert('L')).getbbox()[0] for y in (0, h)}
    assert len(begun) == 1


taught = [p for p in paths if p.parent.name == '00_tutorials' or p.name == '33_your_own.ipynb']

@pytest.mark.parametrize('path', taught, ids=lambda p: p.name)
def test_a_tutorial_shows_what_it_imports(path):
    "Whoever types it along has every name that its cells use"
    cells = [c for c in code(read(path)) if 'nbdev_export(' not in c]
    def brought(hidden):
        trees = [t for c in cells if bool(directive('hide', c)) == hidden for t in parse(c)]
        said = [o for t in trees if isinstance(t, imports) for o in t.names]
        return {(o.asname or o.name).split('.')[0] for o in said}
    used = names([t for c in cells if not directive('hide', c) for t in parse(c)])
    assert (brought(True) - brought(False)) & used == set()
