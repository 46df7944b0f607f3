"From notebooks to pages: cells as MyST-NB wants them, links between pages, alternative texts of pictures"
import ast, base64, io, os, re
from dataclasses import dataclass, field
from pathlib import Path
from fastcore.basics import AttrDict
from execnb.nbio import mk_cell, read_nb
from site_api import anchor, definitions, document, imported, name_of, parsed, public, things_in

LONG = 15                                          # lines of code that are shown without a fold
CHECKS = 8                                         # lines of checks that are shown without a fold
EXERCISES = 'Exercises'                            # the heading below which all code is folded
checking = re.compile(r'test_\w+|assert_\w+|check_\w+')

# code, directives, rows of tables, formulas and links, in which no name is linked
apart = re.compile(r'(^```.*?^```|^:::.*?$|^\|.*?$|\$\$.*?\$\$|!?\[(?:[^\[\]]|\[[^\]]*\])*\]\([^)]*\))',
                   re.S | re.M)
to_notebook = re.compile(r'\]\((?!\w+:)([^)#\s]+\.ipynb)((?:#[^)\s]*)?)\)')

def number_free(name): return re.sub(r'^\d+[a-z]?_', '', name)

@dataclass
class Page:
    "A notebook and what other pages may want to know of it"
    path: Path                                     # of the notebook, seen from the folder of notebooks
    nb: object
    title: str = ''
    about: str = ''
    module: str = ''                               # dotted, without the package; empty for a page to read
    things: list = field(default_factory=list)
    names: dict = field(default_factory=dict)      # imported from elsewhere → the module
    @property
    def out(self): return self.path.parent/number_free(self.path.stem)
    @property
    def up(self): return '../'*(len(self.path.parts) - 1)

def directive(cell, names): return re.search(rf'^#\|\s*({names})\b', cell.source, re.M)
def option(cell, name):
    m = re.search(rf'^#\|\s*{name}:\s*(.*)$', cell.source, re.M)
    return m[1].strip() if m else ''
def bare(cell): return re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M).strip('\n')
def exports(nb): return [bare(c) for c in nb.cells if c.cell_type == 'code' and directive(c, 'exports?')]

def plain(text):
    "Markdown as the words that a person would hear"
    text = re.sub(r'!?\[([^\]]*)\]\([^)]*\)', r'\1', text)
    return ' '.join(re.sub(r'[*`$\\{}]|^#+ ', '', text, flags=re.M).split())

def read_page(path, nbs):
    "The notebook at `path`, with its title, its names and its module"
    nb = read_nb(path)
    page = Page(path.relative_to(nbs), nb)
    head = next((c.source for c in nb.cells if c.cell_type == 'markdown'), '')
    page.title = head.splitlines()[0].removeprefix('# ').strip()
    sub = re.search(r'^> *(.*)$', head, re.M)
    page.about = sub[1].strip() if sub else ''
    exp = re.search(r'^#\|\s*default_exp\s+(\S+)', '\n'.join(c.source for c in nb.cells), re.M)
    page.module = exp[1] if exp else ''
    page.things = things_in(exports(nb), page.out.as_posix(), page.module)
    page.names = imported([bare(c) for c in nb.cells if c.cell_type == 'code'])
    return page

class Links:
    "Which name, notebook or module leads where"
    def __init__(self, pages):
        self.pages = {p.path.as_posix(): p for p in pages}
        self.modules = {p.module: p for p in pages if p.module}
        self.things = {}
        for p in pages:
            for o in p.things: self.things.setdefault(o.name, []).append(o)

    def thing(self, name, page):
        "The documented thing that `name` means on `page`, or None where it may be an ordinary word"
        found = self.things.get(name, [])
        here = [o for o in found if o.page == page.out.as_posix()]
        if re.fullmatch('[a-z]+', name):
            words = set().union(*(o.fields for o in page.things))
            if name in words or not (here or name in page.names): return None
        said = page.names.get(name, '')
        from_there = [o for o in found if said and o.module.endswith(said)]
        return (here or from_there or (found if len(found) == 1 else [None]))[0]

    def address(self, o, page):
        "Where thing `o` is, seen from `page`"
        return f"{'' if o.page == page.out.as_posix() else f'{page.up}{o.page}.ipynb'}#{anchor(o.name)}"

    def linked(self, name, page, shown=''):
        "`name` as code, with a link where it is known"
        shown = shown or f'`{name}`'
        if '.' in name and (to := self.modules.get(name.removeprefix('diffusion_sharpening.'))):
            return shown if to is page else f'[{shown}]({page.up}{to.out.as_posix()}.ipynb)'
        whole, owner = self.thing(name, page), name.partition('.')[0]
        o = whole or (self.thing(owner, page) if '.' in name else None)
        return f'[{shown}]({self.address(o, page)})' if o else shown

    def text(self, text, page):
        "Markdown of `page`, its names and notebooks linked"
        def notebook(m):
            to = self.pages.get(os.path.normpath(page.path.parent/m[1]))
            return f'](/{to.out.as_posix()}.ipynb{m[2]})' if to else m[0]
        def name(m): return self.linked(m[1], page, m[0])
        parts = re.split(apart, text)
        for i, p in enumerate(parts):
            if i % 2 == 0: p = re.sub(r'(?<![`\\\w])`([A-Za-z_][\w.]*)(?:\(\))?`(?!`)', name, p)
            parts[i] = p if p.startswith('```') else to_notebook.sub(notebook, p)
        return ''.join(parts)

def texts_of(tree):
    "What is written on a figure, as far as its code says: titles and names of axes"
    wanted = 'xlabel ylabel title suptitle supxlabel supylabel set_xlabel set_ylabel set_title'.split()
    def text(o): return o.value if isinstance(o, ast.Constant) and isinstance(o.value, str) else ''
    found = []
    for o in ast.walk(tree):
        if isinstance(o, ast.keyword) and o.arg in wanted: found.append((o.arg, text(o.value)))
        name = isinstance(o, ast.Call) and getattr(o.func, 'attr', '')
        if name in wanted and o.args: found.append((name, text(o.args[0])))
    kinds = {k: [plain(t) for w, t in found if k in w and t.strip()] for k in ('title', 'xlabel', 'ylabel')}
    says = {'title': 'titled', 'xlabel': 'horizontal axis', 'ylabel': 'vertical axis'}
    return '; '.join(f"{says[k]} {', '.join(dict.fromkeys(v))}" for k, v in kinds.items() if v)

def alternative(cell, page, heading, prose, drawing=False):
    "Alternative text of a picture: its own `fig-alt`, or what its axes and the prose before it say"
    if own := option(cell, 'fig-alt'): return own
    tree = parsed(bare(cell))
    drawn = texts_of(tree) if tree else ''
    lines = [plain(p) for p in prose.split('\n\n') if not p.startswith(('#', '|', '```', '-', '$$'))]
    said = re.split(r'(?<=[.?!]) (?=[A-Z])', lines[-1])[-1] if lines else ''
    kind = 'Chart' if 'axis' in drawn or drawing else 'Pictures'
    where = heading if heading == page.title else f'{page.title}, {heading}'
    first = ', '.join(t for t in [f'{kind}: {where}', drawn] if t)
    text = '. '.join(t.rstrip('.:') for t in [first, said] if t)
    return text[:400].replace('"', "'") + '.'

def opened(png):
    from PIL import Image
    return Image.open(io.BytesIO(base64.b64decode(''.join(png))))

def is_drawing(png, cell):
    "Is this picture lines and letters on a white ground, whose colours may be turned in the dark?"
    if 'imshow' in cell.source or option(cell, 'fig-kind') == 'picture': return False
    im = opened(png).convert('L')
    return im.histogram()[255] > .6*im.width*im.height

WIDE = 700                                         # pixels of a picture that a phone shows in part, not small

def checks_only(source):
    "Is this a cell of many checks and nothing to look at?"
    tree = parsed(source)
    if not tree or source.count('\n') < CHECKS: return False
    called = [getattr(o.func, 'id', '') for o in ast.walk(tree) if isinstance(o, ast.Call)]
    checks = [o for o in called if checking.fullmatch(o)]
    checks += [o for o in ast.walk(tree) if isinstance(o, ast.Assert)]
    return 2*len(checks) >= len(tree.body)

def imports_only(source):
    tree = parsed(source)
    return bool(tree and tree.body) and all(isinstance(o, (ast.Import, ast.ImportFrom)) for o in tree.body)

def folded(c, prompt, tag='hide-input'):
    c.metadata.tags.append(tag)
    c.metadata.mystnb = dict(code_prompt_show=prompt, code_prompt_hide=prompt)

def exported(c, page, links):
    "The cells that an exported one becomes: what is said of each definition, then the source in a fold"
    source = bare(c)
    tree = parsed(source)
    if tree is None or imports_only(source): return []
    link = lambda name: links.linked(name, page)
    out = [mk_cell(links.text(document(o, source, link), page), 'markdown') for o in public(tree)
           if directive(c, 'exports?')]
    defs = [name_of(o) for o in tree.body if isinstance(o, definitions)]
    c = mk_cell(source, 'code')
    c.metadata = AttrDict(tags=[])
    if out: folded(c, 'Source of ' + ', '.join(defs))
    elif defs: folded(c, 'Helper: ' + ', '.join(defs))
    elif source.count('\n') >= LONG: folded(c, 'Source')
    return out + [c]

def shown(c, page, links, heading, prose):
    "A cell of code with what it shows, as MyST-NB wants it"
    c.metadata = AttrDict(tags=[])
    if option(c, 'echo') == 'false': c.metadata.tags.append('remove-input')
    if option(c, 'output') == 'false': c.metadata.tags.append('remove-output')
    for o in c.outputs:
        if md := o.get('data', {}).get('text/markdown'):
            o.data['text/markdown'] = links.text(''.join(md), page)
    pictures = [p for o in c.outputs if (p := o.get('data', {}).get('image/png'))]
    drawing = bool(pictures) and all(is_drawing(p, c) for p in pictures)
    alt = alternative(c, page, heading, prose, drawing) if pictures else ''
    c.source = bare(c)
    if imports_only(c.source): folded(c, 'Imports')
    elif not prose and not c.outputs: folded(c, 'Made for this page')
    elif heading == EXERCISES: folded(c, 'The answers, computed', 'hide-cell')
    elif not c.outputs and checks_only(c.source): folded(c, 'Checks')
    elif pictures and c.source.count('\n') >= LONG: folded(c, 'Code of the figure')
    if pictures:
        wide = max(opened(p).width for p in pictures) > WIDE
        kind = 'drawing' if drawing else 'picture wide' if wide else 'picture'
        c.metadata.setdefault('mystnb', {})['image'] = dict(alt=alt, classes=kind)
    return [c]

def origin(page, package):
    "Where the page comes from: its notebook, and the module that it is the source of"
    def link(to, text): return f'<a href="{page.up}source/{to}">{text}</a>'
    parts = [link(f'nbs/{page.path.as_posix()}.txt', 'Notebook')]
    if page.module:
        parts.append(link(f"{package}/{page.module.replace('.', '/')}.py.txt",
                          f'Module <code>{package}.{page.module}</code>'))
    return '{.origin}\n' + ' · '.join(parts)

def convert(page, links, package):
    "The notebook of `page`, as MyST-NB wants it"
    sub = f'{{.subtitle}}\n{links.text(page.about, page)}' if page.about else ''
    cells, heading, prose = [], page.title, ''
    first = True
    for c in page.nb.cells:
        if c.cell_type == 'markdown':
            if first:
                head = [f'# {page.title}', sub, '' if page.path.stem == 'index' else origin(page, package)]
                cells.append(mk_cell('\n\n'.join(h for h in head if h), 'markdown'))
                first = False
                continue
            titles = re.findall(r'^#+ (.*)$', c.source, re.M)
            if titles: heading = plain(titles[-1])
            prose = c.source
            c.source = links.text(c.source, page)
            cells.append(c)
        elif directive(c, 'hide|default_exp') or not c.source.strip(): continue
        elif directive(c, 'export|exports|exporti'): cells += exported(c, page, links)
        else: cells += shown(c, page, links, heading, prose)
    for i, c in enumerate(cells): c['id'] = f'cell{i}'
    page.nb.cells = cells
    page.nb.metadata = dict(kernelspec=dict(display_name='Python 3', language='python', name='python3'))
    return page.nb
