"A Sphinx extension: formulas stay plain TeX, which math.js draws in the browser with our KaTeX files"
from html import escape
from docutils.nodes import SkipNode

def slug(title):
    "The anchor of a heading, as nbdev's links have it: `Denoiser.predict` → `denoiser.predict`"
    return title.strip().strip('`').lower().replace(' ', '-')

def inline_math(self, node):
    self.body.append(f'<span class="math notranslate">{escape(node.astext())}</span>')
    raise SkipNode

def display_math(self, node):
    ids = f' id="{node["ids"][0]}"' if node.get('ids') else ''
    self.body.append(f'<div class="math display notranslate"{ids}>{escape(node.astext())}</div>')
    raise SkipNode

def setup(app):
    app.add_html_math_renderer('katex', (inline_math, None), (display_math, None))
    return dict(parallel_read_safe=True, parallel_write_safe=True)
