"""What the site says of functions and classes, read from their source: nothing is imported and nothing runs.
Comments beside parameters become a table, in the order of the source."""
import ast, io, re, tokenize
from dataclasses import dataclass, field

functions = (ast.FunctionDef, ast.AsyncFunctionDef)
definitions = (*functions, ast.ClassDef)
BOUNDS = dict(lo='at least', above='more than', hi='at most', below='less than')   # lower ones first
raised = str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹')

@dataclass
class Thing:
    "One documented name: where it is, and what is said of it in one line"
    name: str
    page: str
    module: str
    kind: str
    about: str = ''
    fields: set = field(default_factory=set)

def anchor(name): return name.lower()

def comments(source):
    "Line → comment, of `source`"
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {t.start[0]: t.string.lstrip('# ').strip() for t in tokens if t.type == tokenize.COMMENT}

def is_patch(node): return any(ast.unparse(d).partition('(')[0] == 'patch' for d in node.decorator_list)
def is_static(node): return any(ast.unparse(d) == 'staticmethod' for d in node.decorator_list)
def is_property(node): return any('property' in ast.unparse(d) for d in node.decorator_list)

def name_of(node):
    "The name of a definition; `Class.method` where it is patched into a class"
    return f'{ast.unparse(node.args.args[0].annotation)}.{node.name}' if is_patch(node) else node.name

def about(node):
    "First paragraph of the docstring, in one line"
    return ' '.join((ast.get_docstring(node) or '').split('\n\n')[0].split())

def public(tree): return [o for o in tree.body if isinstance(o, definitions) and not o.name.startswith('_')]

def arguments(node, method=False):
    "Stars, name and default of each parameter; a method's own object is left out"
    a = node.args
    plain = [*a.posonlyargs, *a.args]
    defaults = [None]*(len(plain) - len(a.defaults)) + a.defaults
    out = [('', p, d) for p, d in zip(plain, defaults)]
    if a.vararg: out.append(('*', a.vararg, None))
    elif a.kwonlyargs: out.append(('*', None, None))
    out += [('', p, d) for p, d in zip(a.kwonlyargs, a.kw_defaults)]
    if a.kwarg: out.append(('**', a.kwarg, None))
    return out[method or is_patch(node):]

def short(node):
    "An expression as text, for a signature"
    text = ast.unparse(node)
    return text if len(text) <= 40 else '...'

def written(stars, p, default, kinds=False):
    "One parameter as it stands in a signature"
    text = stars + (p.arg if p else '')
    if kinds and p and p.annotation: text += ': ' + ast.unparse(p.annotation).strip("'")
    if default is None: return text
    return text + (' = ' if ': ' in text else '=') + short(default)

def wrapped(head, parts, tail, width=84):
    "A signature, over several lines where it is long"
    one = f"{head}({', '.join(parts)}){tail}"
    if len(one) <= width: return one
    lines, line = [], '    '
    for p in parts:
        if len(line) + len(p) > width: lines.append(line.rstrip()); line = '    '
        line += p + ', '
    return '\n'.join([head + '(', *lines, line.rstrip().rstrip(','), ')' + tail])

def signature(node, name, method=False):
    "The call of a function with names and defaults"
    out = f' -> {ast.unparse(node.returns)}' if node.returns else ''
    return wrapped(name, [written(*o) for o in arguments(node, method)], out)

def cell(text): return re.sub(r'(?<!\\)\|', r'\\|', text).strip()
def code(text): return '`' + cell(text.replace('`', "'")) + '`'

def table(rows, head):
    "A table of two columns; none where nothing is said"
    rows = [r for r in rows if any(r)]
    if not any(r[1] for r in rows): return ''
    lines = [f'| {a} | {b} |' for a, b in rows]
    return '\n'.join(['{.parameters}', f'| {head[0]} | {head[1]} |', '| --- | --- |', *lines])

def parameters(node, notes, method=False):
    "What each parameter is, and what is returned"
    rows, last, args = [], node.body[0].lineno - 1, arguments(node, method)
    at = [p.lineno for _, p, _ in args if p is not None]
    header = max([node.lineno, *at])
    ends = [n for n in sorted(notes) if node.lineno <= n <= last and (n > header or n not in at)]
    lines = {}
    for stars, p, d in args:
        if p is not None: lines.setdefault((d or p).end_lineno, []).append((stars, p, d))
    one_line = last <= node.lineno # the comment is of the last parameter or of what is returned
    for n, ps in lines.items():
        said = '' if one_line else notes.get(n, '')
        rows.append((', '.join(code(written(*p, kinds=True)) for p in ps), cell(said)))
    end = notes.get(node.lineno, '') if one_line else ' '.join(notes[n] for n in ends if n not in lines)
    if one_line and rows and end and not node.returns: rows[-1], end = (rows[-1][0], cell(end)), ''
    kind = code(ast.unparse(node.returns)) if node.returns else ''
    if end: rows.append((f'*returns* {kind}', cell(end)))
    return table(rows, ('Parameter', 'What it is'))

def allowed(call):
    "The range that `within` or `words` gives a setting, in words, and its default"
    kind, args = call.func.id, [ast.unparse(o) for o in call.args]
    named = {k.arg: ast.unparse(k.value) for k in call.keywords}
    if kind == 'words': return args[0], 'one of ' + ', '.join(code(o.strip("'")) for o in args[1:])
    bounds = dict(zip(('lo', 'hi'), args[1:])) | named
    said = [f'{word} {bounds[k]}' for k, word in BOUNDS.items() if bounds.get(k, 'None') != 'None']
    text = re.sub(r' \*\* (\d+)', lambda m: m[1].translate(raised), ' and '.join(said))
    return args[0] if args else named['default'], text

def is_field(o): return isinstance(o, ast.AnnAssign) and isinstance(o.target, ast.Name)

def default_of(o):
    "Default and range of a dataclass field"
    v = o.value
    if v is None: return '', ''
    if isinstance(v, ast.Call) and getattr(v.func, 'id', '') in ('within', 'words'): return allowed(v)
    return short(v), ''

def settings(node, notes):
    "The fields of a dataclass: kind, default, meaning, range"
    rows = []
    for o in filter(is_field, node.body):
        default, range_ = default_of(o)
        said = notes.get(o.end_lineno, '')
        name = f'{o.target.id}: {ast.unparse(o.annotation)}' + (f' = {default}' if default else '')
        rows.append((code(name), cell(said + (f' ({range_})' if range_ else ''))))
    return table(rows, ('Field', 'What it is'))

def methods(node):
    "The public methods of a class that say what they do"
    found = [o for o in node.body if isinstance(o, functions) and o.name[0] != '_' and ast.get_docstring(o)]
    def call(o): return f"{o.name}({', '.join(written(*a) for a in arguments(o, not is_static(o)))})"
    rows = [(code(o.name if is_property(o) else call(o)), cell(about(o))) for o in found]
    return table(rows, ('Method', 'What it does'))

def class_text(node, notes, linked):
    "What there is to say of a class below its docstring"
    init = next((o for o in node.body if isinstance(o, functions) and o.name == '__init__'), None)
    made = signature(init, node.name, True).removesuffix(' -> None') if init else ''
    bases = ', '.join(linked(ast.unparse(b)) for b in node.bases)
    parts = [f'```python\n{made}\n```' if made else '', f'A kind of {bases}.' if bases else '',
             parameters(init, notes, True) if init else '', settings(node, notes), methods(node)]
    return [p for p in parts if p]

def document(node, source, linked=code):
    "Heading, call, docstring and tables of one definition, as MyST"
    notes, name = comments(source), name_of(node)
    doc = (ast.get_docstring(node) or '').strip()
    if isinstance(node, ast.ClassDef): call, rest = [], class_text(node, notes, linked)
    else:
        call = [f'```python\n{name if is_property(node) else signature(node, name)}\n```']
        rest = [parameters(node, notes)]
    return '\n\n'.join(p for p in [f'{{.api}}\n### {name}', *call, doc, *rest] if p)

def parsed(source):
    "The tree of a cell, or None where it is no plain Python"
    try: return ast.parse(source)
    except SyntaxError: return None

def things_in(sources, page, module):
    "What a notebook documents, from the sources of its exported cells"
    found = []
    for s in sources:
        for o in public(parsed(s) or ast.Module([], [])):
            known = {a[1].arg for a in arguments(o) if a[1]} if isinstance(o, functions) else {
                f.target.id for f in filter(is_field, o.body)}
            kind = 'class' if isinstance(o, ast.ClassDef) else 'function'
            found.append(Thing(name_of(o), page, module, kind, about(o), known))
    return found

def imported(sources):
    "Names that the cells of a notebook import, and the module each is from"
    trees = [t for s in sources if (t := parsed(s))]
    return {a.asname or a.name: (o.module or '').removeprefix('diffusion_sharpening.') for t in trees
            for o in ast.walk(t) if isinstance(o, ast.ImportFrom) for a in o.names}
