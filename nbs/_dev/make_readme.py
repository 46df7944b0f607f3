#!/usr/bin/env python
"""README.md from nbs/index.ipynb, without Quarto: text as it is, code and its output as blocks, links as seen
from the top of the repository. Brings the list of notebooks in index.ipynb up to date first."""
import os, re, sys
from pathlib import Path
from execnb.nbio import read_nb, write_nb

root = Path(__file__).resolve().parents[2]
nbs = root/'nbs'

def notebooks():
    "All notebooks but the first page, in reading order"
    return [p for p in sorted(nbs.rglob('*.ipynb')) if p.name != 'index.ipynb'
            and not any(o[0] in '._' for o in p.relative_to(nbs).parts)]

def heading(path):
    "Title and subtitle of the notebook at `path`"
    texts = [c.source for c in read_nb(path).cells if c.cell_type == 'markdown' and c.source.startswith('# ')]
    text = texts[0] if texts else f'# {path.stem}'
    sub = re.search(r'^>\s*(.*)$', text, re.M)
    return text.splitlines()[0][2:].strip(), sub[1].strip() if sub else ''

def notebook_map():
    "A list of the notebooks, by folder, with what each is about"
    res, folder = [], None
    for p in notebooks():
        rel = p.relative_to(nbs)
        if rel.parent != folder:
            folder = rel.parent
            name = re.sub(r'^\d+_', '', folder.name).replace('_', ' ').capitalize()
            if name: res.append(f'\n**{name}**\n')
        title, sub = heading(p)
        res.append(f'- [{title}]({rel.as_posix()})' + (f': {sub}' if sub else ''))
    return '\n'.join(res).strip()

def update_map(nb):
    "Put the list of notebooks between the marks in `nb`"
    text = f'<!-- map -->\n\n{notebook_map()}\n\n<!-- /map -->'
    for c in nb.cells:
        if c.cell_type == 'markdown':
            c.source = re.sub(r'<!-- map -->.*<!-- /map -->', lambda _: text, c.source, flags=re.S)
    return nb

def relocate(text):
    "Relative links and pictures in `text` as seen from the repository's top; they must lead somewhere"
    def fix(m):
        path = m[2].partition('#')[0]
        if not (nbs/path).exists(): sys.exit(f"index.ipynb refers to {path}: there is no such file in nbs")
        return f"{m[1]}{os.path.normpath(f'nbs/{m[2]}')}{m[3]}"
    text = re.sub(r'(\]\()(?!\w+:|#)([^)\s]+)(\))', fix, text)
    return re.sub(r'(<(?:img|source)[^>]*src(?:set)?=")(?!\w+:)([^"]+)(")', fix, text)

def cell_text(c):
    "Cell `c` as GitHub's Markdown"
    if c.cell_type == 'markdown': return relocate(re.sub(r'<!--.*?-->\n*', '', c.source, flags=re.S)).strip()
    if c.cell_type != 'code' or re.search(r'^#\|\s*(hide|export|default_exp)', c.source, re.M): return ''
    res = [] if re.search(r'^#\|\s*echo:\s*false', c.source, re.M) else [f'```python\n{c.source}\n```']
    for o in c.outputs:
        data = o.get('data', {})
        if 'image/png' in data: sys.exit("index.ipynb has a picture as output: save it in figures")
        text = ''.join(data.get('text/markdown') or o.get('text') or data.get('text/plain') or '').rstrip()
        if 'text/markdown' in data: res.append(relocate(text))
        elif text: res.append(f'```\n{text}\n```')
    return '\n\n'.join(res)

def narrowed(path):
    "A figure of two columns for a phone: the right one under the left, each begun where its picture begins"
    from PIL import Image, ImageOps
    wide = Image.open(path).convert('RGB')
    w, h = wide.width//2, wide.height
    parts = [wide.crop((x, 0, x + w, h)) for x in (0, w)]
    drawn = [ImageOps.invert(o.convert('L')).getbbox() for o in parts]
    out = Image.new('RGB', (max(r - l for l, _, r, _ in drawn) + 10, 2*h), 'white')
    for i, (o, (l, _, r, _)) in enumerate(zip(parts, drawn)): out.paste(o.crop((l, 0, r, h)), (5, i*h))
    return out

def narrow(path):
    "Beside a figure its form for a phone, as `NAME-narrow.png`"
    narrowed(path).save(path.with_name(f'{path.stem}-narrow.png'), optimize=True)

def readme(nb):
    "The text of README.md"
    head = '<!-- Made from nbs/index.ipynb by `make readme`: edit that. -->'
    return '\n\n'.join([head] + [t for c in nb.cells if (t := cell_text(c))]) + '\n'

def main(check=False):
    "Write README.md and the list in index.ipynb; with `check`, only say whether they are up to date"
    if not check: narrow(root/'figures'/'demo.png')
    old = read_nb(nbs/'index.ipynb')
    nb = update_map(read_nb(nbs/'index.ipynb'))
    text, path = readme(nb), root/'README.md'
    if check: return nb.cells == old.cells and path.exists() and path.read_text(encoding='utf-8') == text
    write_nb(nb, nbs/'index.ipynb')
    path.write_text(text, encoding='utf-8')
    return True

if __name__ == '__main__':
    if not main(check='--check' in sys.argv[1:]): sys.exit("README.md is not up to date: run `make readme`")
