"""A Sphinx extension: formulas stay plain TeX, which math.js draws in the browser with our KaTeX files; each
page says in its head what it is about; and a search may be a question"""
import json
from functools import cache
from html import escape
from pathlib import Path
from docutils.nodes import SkipNode
from sphinx.search.en import SearchEnglish

QUESTION = ('how do does did i my me we our you your can could should would what which when where why who '
            'use using used')

def slug(title):
    "The anchor of a heading: `Denoiser.predict` → `denoiser.predict`"
    return title.strip().strip('`').lower().replace(' ', '-')

class Questions(SearchEnglish):
    "English in which the words of a question need not stand on the page that answers it"
    stopwords = frozenset(SearchEnglish.stopwords) | set(QUESTION.split())
    @cache
    def stem(self, word): return super().stem(word)

def inline_math(self, node):
    self.body.append(f'<span class="math notranslate">{escape(node.astext())}</span>')
    raise SkipNode

def display_math(self, node):
    ids = f' id="{node["ids"][0]}"' if node.get('ids') else ''
    self.body.append(f'<div class="math display notranslate"{ids}>{escape(node.astext())}</div>')
    raise SkipNode

def describe(app, page, template, context, doctree):
    "The description in the head of a page; no contents from Sphinx, which would take most of the time"
    about = app.about['about'].get(page) or app.about['about']['index']
    context['metatags'] = context.get('metatags', '') + f'<meta name="description" content="{escape(about)}">'
    context['toctree'] = lambda **_: ''

def navigate(app, page, template, context, doctree):
    "The contents beside a page: a fold for each chapter, that of the page open"
    def item(name, title):
        here = ' current-page" aria-current="page' if name == page else ''
        return (f'<li class="toctree-l1{here}"><a class="reference internal" '
                f'href="{context["pathto"](name)}">{escape(title)}</a></li>')
    def group(title, pages):
        opened = ' open' if page in [o[0] for o in pages] or title == 'Start' else ''
        return (f'<details class="chapter"{opened}><summary>{escape(title)}</summary>'
                f'<ul>{"".join(item(*o) for o in pages)}</ul></details>')
    context['furo_navigation_tree'] = ''.join(group(k, v) for k, v in app.about['groups'].items())

def setup(app):
    app.about = json.loads((Path(app.srcdir)/'about.json').read_text(encoding='utf-8'))
    app.add_html_math_renderer('katex', (inline_math, None), (display_math, None))
    app.add_search_language(Questions)
    app.connect('html-page-context', describe, priority=100)
    app.connect('html-page-context', navigate, priority=900)
    return dict(parallel_read_safe=True, parallel_write_safe=True)
