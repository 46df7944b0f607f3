#!/usr/bin/env python
"""Build the documentation site in _docs/ from the notebooks, without Quarto and without running anything:
each notebook becomes a page for MyST-NB in _proc/site, and Sphinx makes the site. Another
folder may be named."""
import base64, io, json, os, re, shutil, subprocess, sys, tarfile
from pathlib import Path
from execnb.nbio import mk_cell, write_nb
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from site_api import anchor
from site_pages import Links, convert, number_free, plain, read_page

here, cfg = Path(__file__).resolve().parent, get_config(path=Path(__file__).resolve().parents[2])
root, nbs, out = cfg.config_path, cfg.nbs_path, cfg.doc_path
site = root/'_proc'/'site'
static = ['site.css', 'math.js', 'favicon.svg']

def group_title(folder):
    "`02_maths` → `Maths`"
    return ' · '.join(number_free(o).replace('_', ' ').capitalize() for o in folder.split('/'))

def groups_of(pages):
    "The pages of the site, `[address, title]`, one group for each folder"
    groups = {}
    for p in pages:
        folder = group_title(p.path.parent.as_posix())
        if p.path.stem != 'index': groups.setdefault(folder, []).append([p.out.as_posix(), plain(p.title)])
    made = [[f'reference/{o}', o.capitalize()] for o in ('gallery', 'names')]
    groups.setdefault('Reference', []).extend(made)
    return groups

def contents(groups):
    "The table of contents as Sphinx reads it"
    def block(title, names): return f'```{{toctree}}\n:hidden:\n:caption: {title}\n\n{names}\n```'
    return '\n\n'.join(block(k, '\n'.join(name for name, _ in v)) for k, v in groups.items())

def names_page(pages):
    "Every public name of the library in the order of the alphabet, with one line on each"
    things = sorted((o for p in pages for o in p.things), key=lambda o: (o.name.lower(), o.page))
    parts = ['# Names', '{.subtitle}\nEvery public function and class, in the order of the alphabet']
    letter = ''
    for o in things:
        if o.name[0].upper() != letter:
            letter = o.name[0].upper()
            parts.append(f'## {letter}')
        about = plain(o.about)
        parts.append(f'- [`{o.name}`](../{o.page}.ipynb#{anchor(o.name)}) *{o.module}* · {about}')
    return re.sub(r'\n\n(?=- )', '\n', '\n\n'.join(parts)) + '\n'

def thumbnail(b64, path, width=420):
    from PIL import Image
    im = Image.open(io.BytesIO(base64.b64decode(b64))).convert('RGB')
    if im.width > width: im = im.resize((width, round(im.height*width/im.width)), Image.LANCZOS)
    im.quantize(128).save(path, optimize=True)

def first_picture(nb):
    "The picture a page is known by, its alternative text and its kind, or None"
    found = [(o.data['image/png'], *c.metadata.mystnb['image'].values()) for c in nb.cells
             for o in c.get('outputs', []) if 'image/png' in o.get('data', {})]
    return found[0] if found else None

def gallery(pages, made):
    "One picture of every page that has any"
    (site/'reference'/'pictures').mkdir(parents=True)
    parts = ['# Gallery', '{.subtitle}\nOne picture of every page that has any', '<div class="gallery">']
    for i, p in enumerate(pages):
        if not (found := first_picture(made[p.path])): continue
        thumbnail(''.join(found[0]), site/'reference'/'pictures'/f'{i}.png')
        image = f'class="{found[2]}" alt="{escaped(found[1])}" loading="lazy"'
        parts.append(f'<a href="../{p.out.as_posix()}.html"><img src="pictures/{i}.png" {image}>'
                     f'<span>{escaped(p.title)}</span></a>')
    return '\n\n'.join(parts[:2]) + '\n\n' + '\n'.join(parts[2:]) + '\n</div>\n'

def escaped(text): return text.replace('&', '&amp;').replace('"', '&quot;').replace('<', '&lt;')

def katex(dest):
    "KaTeX, which draws the formulas, in `dest`: with us as its release has it, so that nothing is downloaded"
    with tarfile.open(next(here.glob('katex-*.tgz'))) as tar: tar.extractall(dest, filter='data')

def write_pages():
    "All pages as Sphinx wants them, in a folder of their own"
    files = [Path(o) for o in nbglob(nbs)]
    files.sort(key=lambda p: (p != nbs/'index.ipynb', p.relative_to(nbs).parts))
    pages = [read_page(p, nbs) for p in files]
    links = Links(pages)
    made = {p.path: convert(p, links, cfg.lib_name) for p in pages}
    groups = groups_of(pages)
    made[Path('index.ipynb')].cells.append(mk_cell(contents(groups), 'markdown'))
    for p in pages:
        dest = site/p.out.with_suffix('.ipynb')
        for c in made[p.path].cells: c.source = re.sub(r'(?:\.\./)+figures/', f'{p.up}figures/', c.source)
        dest.parent.mkdir(parents=True, exist_ok=True)
        write_nb(made[p.path], dest)
    (site/'reference').mkdir()
    (site/'reference'/'gallery.md').write_text(gallery(pages, made), encoding='utf-8')
    (site/'reference'/'names.md').write_text(names_page(pages), encoding='utf-8')
    about = dict(groups=groups, about={p.out.as_posix(): plain(p.about) for p in pages})
    (site/'about.json').write_text(json.dumps(about), encoding='utf-8')
    return pages

def copy_sources(pages, out):
    "The notebooks and modules beside the site, as plain text that any browser shows"
    for p in pages:
        to = out/'source'/'nbs'/f'{p.path.as_posix()}.txt'
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(nbs/p.path, to)
    for p in cfg.lib_path.rglob('*.py'):
        to = out/'source'/cfg.lib_name/f'{p.relative_to(cfg.lib_path).as_posix()}.txt'
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(p, to)

def main(out=out):
    shutil.rmtree(site, ignore_errors=True)
    shutil.rmtree(out, ignore_errors=True)
    pages = write_pages()
    print(f'{len(pages)} notebooks', flush=True)
    shutil.copytree(root/'figures', site/'figures')
    (site/'_static').mkdir()
    katex(site/'_static'/'katex')
    for name in static: shutil.copy(here/name, site/'_static'/name)
    (site/'_templates').mkdir()
    shutil.copy(here/'search.html', site/'_templates')
    for name in ['conf.py', 'sphinx_site.py', 'scorer.js']: shutil.copy(here/name, site/name)
    for name in ['reference/pictures', 'figures']: shutil.copytree(site/name, out/name)
    env = dict(os.environ, SHARPEN_SETTINGS=str(cfg.config_file), PYTHONPATH=str(site))
    jobs = ['-j', str(min(4, os.cpu_count() or 1))]
    rc = subprocess.run([sys.executable, '-m', 'sphinx', '-q', '-W', '--keep-going', '-b', 'html', *jobs,
                         '-d', str(root/'_proc'/'doctrees'), str(site), str(out)], env=env).returncode
    if rc: sys.exit(rc)
    copy_sources(pages, out)
    print(f"Open {out/'index.html'}")

if __name__ == '__main__': main(*map(Path, sys.argv[1:]))
