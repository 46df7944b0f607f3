#!/usr/bin/env python
"Execute notebooks in place and save what they show: `run_notebooks.py [--flags slow] [notebooks or folders]`"
import argparse, base64, hashlib, io, os, re, subprocess, sys, time
from pathlib import Path

root = Path(__file__).resolve().parents[2]
kernelspec = dict(display_name='python3', language='python', name='python3')
max_png = 100_000                                  # larger figures are reduced to 256 colours
widget_view = 'application/vnd.jupyter.widget-view+json'
setup_code = "import matplotlib as mpl; mpl.rcParams['figure.dpi'] = 72"    # retina doubles it in the file

def smaller_png(b64):
    "The same picture without metadata, well packed; with 256 colours where it would be over `max_png`"
    from PIL import Image
    im = Image.open(io.BytesIO(base64.b64decode(b64)))
    if im.mode == 'RGBA' and im.getextrema()[3][0] == 255: im = im.convert('RGB')
    def pack(im): im.save(buf := io.BytesIO(), 'PNG', optimize=True); return buf.getvalue()
    res = pack(im)
    if len(res) > max_png and im.mode == 'RGB': res = pack(im.quantize(256, dither=0))
    if len(res) > max_png: print(f"  a figure takes {len(res)//1000} kB; make it smaller", file=sys.stderr)
    return base64.b64encode(res).decode() + '\n'

def tidy_stream(text):
    "What a terminal would still show of `text`: overwritten lines and cursor codes removed"
    text = re.sub(r'\x1b\[[0-9;?]*[A-Za-z]', '', ''.join(text)).replace('\r\n', '\n')
    return '\n'.join(o.rstrip('\r').rpartition('\r')[2] for o in text.split('\n'))

def tidy_output(o):
    "Output `o` as it is saved, or None: no progress bars, warnings, widget models or empty text"
    if o['output_type'] == 'stream':
        text = '' if o['name'] == 'stderr' else tidy_stream(o['text'])
        return {**o, 'text': text.splitlines(True)} if text.strip() else None
    if widget_view in o['data']: return None           # its text is the code of a widget
    data = dict(o['data'])
    if 'image/png' in data: data['image/png'] = smaller_png(data['image/png'])
    return {**o, 'data': data} if data else None

def skip_cell(cell, flags):
    "Cells that are not executed, and keep the outputs they have"
    directives = getattr(cell, 'directives_', None) or {}
    return (cell.cell_type != 'code' or 'nbdev_export(' in cell.source
            or directives.get('eval:', [''])[0].lower() == 'false' or bool(flags & directives.keys()))

def split_title(nb):
    "Prose below title and subtitle gets its own cell: nbdev drops what else is in theirs"
    from execnb.nbio import NbCell
    i, cell = next(((i, c) for i, c in enumerate(nb.cells) if c.cell_type == 'markdown'), (0, None))
    parts = re.fullmatch(r'(# [^\n]*\n+> [^\n]*(?:\n- [^\n]*)*)\n+(.*)', cell.source, re.S) if cell else None
    if not parts or not (rest := parts[2].strip()): return
    cell.source = parts[1].rstrip()
    new = dict(cell_type='markdown', id=hashlib.sha1(rest.encode()).hexdigest()[:8], metadata={}, source=rest)
    nb.cells.insert(i+1, NbCell(i+1, new))

def run_notebook(path, force=()):
    "Execute the notebook at `path`, save its outputs, cleaned as by `nbdev_clean`; False where a cell fails"
    from execnb.nbio import write_nb
    from execnb.shell import CaptureShell
    from nbdev.clean import clean_nb
    from nbdev.config import get_config
    from nbdev.process import NBProcessor, read_nb
    os.chdir(path.parent)
    sys.path.insert(0, str(root))
    flags = set(get_config().tst_flags.split()) - set(force)
    nb = read_nb(path)
    marked = NBProcessor(nb=read_nb(path), process=True).nb      # a copy: its cells know their directives
    shell = CaptureShell(path)
    shell._run(setup_code)
    for cell, mark in zip(nb.cells, marked.cells):
        if skip_cell(mark, flags): continue
        outs = shell.run(cell.source)
        if shell.exc:
            err = next(o for o in outs if o['output_type'] == 'error')
            source = '\n'.join('    ' + o for o in cell.source.splitlines())
            print(f"\n{path.relative_to(root)}: cell {cell.idx_} fails; nothing was saved.\n\n{source}\n\n"
                  + ''.join(err['traceback']), file=sys.stderr)
            return False
        cell['outputs'] = [t for o in outs if (t := tidy_output(o))]
        cell['execution_count'] = None
    split_title(nb)
    nb.metadata['kernelspec'] = kernelspec
    cfg = get_config()
    clean_nb(nb, clean_ids=cfg.clean_ids, allowed_cell_metadata_keys=cfg.allowed_cell_metadata_keys.split())
    write_nb(nb, path)
    return True

def notebooks(args):
    "The notebooks meant by `args` (files or folders), or all; names that start with _ or . only if named"
    res = []
    for a in map(Path.absolute, map(Path, args or [root/'nbs'])):
        if not a.exists(): sys.exit(f"run_notebooks: expected a notebook or a folder, found nothing at {a}")
        if a.is_file(): res.append(a); continue
        below = sorted(a.rglob('*.ipynb'))
        res += [o for o in below if not any(p[0] in '._' for p in o.relative_to(a).parts)]
    return res

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('paths', nargs='*', help="notebooks or folders (default: all)")
    p.add_argument('--flags', default='', help="test flags whose cells run too, space separated")
    args = p.parse_args()
    todo = notebooks(args.paths)
    os.environ.setdefault('MPLBACKEND', 'module://matplotlib_inline.backend_inline')
    if len(todo) == 1: sys.exit(0 if run_notebook(todo[0].resolve(), args.flags.split()) else 1)
    for i, o in enumerate(todo, 1):              # a process each: nothing leaks from one notebook to the next
        start = time.time()
        rc = subprocess.run([sys.executable, __file__, str(o), '--flags', args.flags]).returncode
        if rc: sys.exit(rc)
        print(f"[{i}/{len(todo)}] {o.relative_to(root)}  {time.time()-start:.1f} s", flush=True)

if __name__ == '__main__': main()
