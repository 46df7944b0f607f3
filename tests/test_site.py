"""The documentation site as a reader meets it: built, served from this machine, opened in headless Chromium.
Skipped where Chromium is missing (`apt-get install chromium`)."""
import functools, http.server, re, shutil, subprocess, sys, threading
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
import pytest

root = Path(__file__).resolve().parents[1]
chromium = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
browser_only = pytest.mark.skipif(not chromium, reason='no chromium here: apt-get install chromium')
WIDTHS = (390, 1366, 1400, 1920)
EIGHT = ('index.html', '00_start/how_do_i.html', '00_start/does_it_sharpen.html', '02_maths/losses.html',
         '12_training/run.html', '08_methods/parts.html', 'reference/gallery.html', 'reference/names.html')
QUESTIONS = {'how do I use my own reward': 'how_do_i', 'learning rate': 'how_do_i',
             'which method when': 'which_method', 'use my own reward': 'how_do_i', 'train sdxl': 'how_do_i',
             'what is nfe': 'metrics', 'resume': 'resume', 'train on my prompts': 'how_do_i',
             'reward hacking': 'how_do_i', 'out of memory': 'how_do_i', 'multiple gpus': 'how_do_i',
             'what is eta': 'how_do_i', 'dataset format': 'how_do_i', 'preference pairs': 'how_do_i',
             'windows': 'how_do_i', 'install': 'how_do_i', 'citation': 'index', 'SDXL 24 GB': 'sdxl'}

@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "The site, built without a warning"
    out = tmp_path_factory.mktemp('site')/'docs'
    build = [sys.executable, root/'nbs'/'_dev'/'build_docs.py', out]
    res = subprocess.run(build, capture_output=True, text=True)
    assert res.returncode == 0, res.stdout + res.stderr
    assert 'WARNING' not in res.stderr
    return out

class Seen(HTMLParser):
    "Pictures without a text, what a page describes itself as, and prose outside of code"
    def __init__(self):
        super().__init__()
        self.mute, self.description, self.inside, self.words, self.links = [], '', 0, [], []
    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        if tag == 'img' and len(a.get('alt') or '') < 10: self.mute.append(a.get('src'))
        if tag == 'meta' and a.get('name') == 'description': self.description = a['content']
        if tag in ('pre', 'script', 'style'): self.inside += 1
        if tag == 'a': self.links.append(a.get('href') or '')
    def handle_endtag(self, tag): self.inside -= tag in ('pre', 'script', 'style')
    def handle_data(self, data):
        if not self.inside: self.words.append(data)

@pytest.fixture(scope='module')
def pages(site):
    out = {}
    for p in sorted(site.rglob('*.html')):
        out[p.relative_to(site).as_posix()] = seen = Seen()
        seen.text = p.read_text(encoding='utf-8')
        seen.feed(seen.text)
    return out

SOURCE = """def one(a:int # First
       )->str: # Said
    'About'

def two(a, b=2): # Second
    'More'

def three(cls, # A class
          a=1, b=2, # Both
          **more # Rest
         )->tuple: # All
    'Most'
"""

def test_comments_go_to_what_they_are_of(monkeypatch):
    "Each comment of a signature is read for its parameter, or for what is returned"
    monkeypatch.syspath_prepend(str(root/'nbs'/'_dev'))
    import site_api
    one, two, three = (site_api.document(o, SOURCE) for o in site_api.public(site_api.parsed(SOURCE)))
    assert '| `a: int` | First |' in one and '| *returns* `str` | Said |' in one
    assert '`b=2` | Second |' in two and 'returns' not in two
    rows = '| `cls` | A class |', '| `a=1`, `b=2` | Both |', '| `**more` | Rest |'
    places = [three.index(o) for o in rows]
    assert places == sorted(places)
    assert '| *returns* `tuple` | All |' in three and 'three(cls, a=1, b=2, **more) -> tuple' in three

def test_every_notebook_has_its_page(pages):
    found = [p.relative_to(root) for p in (root/'nbs').rglob('*.ipynb')]
    notebooks = [p for p in found if not any(o[0] in '._' for o in p.parts)]
    assert len(pages) >= len(notebooks)

def test_every_picture_has_a_text(pages):
    assert {name: p.mute for name, p in pages.items() if p.mute} == {}

def test_every_page_says_what_it_is_about(pages):
    assert [name for name, p in pages.items() if len(p.description) < 10] == []

def test_no_raw_markdown(pages):
    "No link, attribute or fold of Markdown is left as it was typed"
    raw = re.compile(r'\]\([\w./#-]+(?:html|ipynb|#)[^)]*\)|\{\.[a-z][\w-]*\}|^#+ ', re.M)
    assert {n: m[0] for n, p in pages.items() if (m := raw.search(' '.join(p.words)))} == {}
    signatures = [s for p in pages.values() for s in re.findall(r'<pre>.*?</pre>', p.text, re.S)]
    assert [s for s in signatures if re.search(r'\]\([\w./]+\.(html|ipynb)', s)] == []

def test_links_stay_at_home(site, pages):
    "Every file that a page refers to is there"
    gone = {(n, l) for n, p in pages.items() for l in p.links if not re.match(r'\w+:|#|$', l)
            and not (site/n).parent.joinpath(l.partition('#')[0].partition('?')[0]).exists()}
    assert gone == set()

def test_settings_have_their_comments(pages):
    text = pages['12_training/run.html'].text
    assert 'Learning rate of AdamW' in text and 'more than 0 and at most 1' in text

def test_functions_stand_in_the_order_of_the_source(pages):
    for name, p in pages.items():
        source = re.search(r'href="[./]*source/(diffusion_sharpening/[^"]*)\.txt"', p.text)
        if not source: continue
        code = (root/source[1]).read_text(encoding='utf-8')
        there = [m for m in re.findall(r'<section class="api" id="([\w.]+)">', p.text)]
        at = [m.start() for o in there if (m := re.search(rf'^(?:def|class) {o}\b', code, re.M | re.I))]
        assert at == sorted(at), name

@pytest.fixture(scope='module')
def address(site):
    "The site on a port of this machine"
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}'
    server.shutdown()

@pytest.fixture(scope='module')
def tab(address):
    "One tab of a browser, which remembers what went wrong"
    sync = pytest.importorskip('playwright.sync_api')
    with sync.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=['--no-sandbox'])
        tab = browser.new_page()
        tab.wrong = []
        tab.on('requestfailed', lambda r: tab.wrong.append(f'{r.url}: {r.failure}')
               if 'ABORTED' not in r.failure else None)            # what the last page still asked for
        tab.on('response', lambda r: tab.wrong.append(f'{r.url}: {r.status}') if r.status >= 400 else None)
        ours = lambda r: r.url.startswith(address)
        tab.on('request', lambda r: None if ours(r) else tab.wrong.append(f'{r.url}: elsewhere'))
        tab.on('console', lambda m: tab.wrong.append(m.text) if m.type == 'error' else None)
        yield tab
        browser.close()

WIDER = '''() => document.documentElement.scrollWidth > innerWidth ||
    [...document.querySelectorAll('.content')].some(e => e.getBoundingClientRect().right > innerWidth + 1)'''

@browser_only
@pytest.mark.parametrize('page', EIGHT)
def test_page_fits(tab, address, page):
    "Light and dark, on a phone, a laptop and a large screen: nothing is cut, nothing fails"
    tab.wrong.clear()
    tab.goto(f'{address}/{page}')
    for scheme in ('light', 'dark'):
        tab.emulate_media(color_scheme=scheme)
        for width in WIDTHS:
            tab.set_viewport_size(dict(width=width, height=900))
            assert not tab.evaluate(WIDER), f'cut at {width} px'
        shade = tab.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0]")
        assert (shade > 128) == (scheme == 'light')
    assert tab.wrong == []

LOOK = """() => [...document.querySelectorAll('.cell_output img')].map(e => {
    const s = getComputedStyle(e);
    return [e.className.includes('drawing'), s.filter.includes('invert'), s.mixBlendMode]; })"""

@browser_only
def test_figures_in_the_dark(tab, address, pages):
    "Drawings stand in light lines on the page's own ground; pictures keep their colours"
    kinds = {k: sum(f'class="{k}"' in p.text for p in pages.values()) for k in ('drawing', 'picture')}
    assert min(kinds.values()) > 10, kinds
    seen = []
    for page in ('00_start/does_it_sharpen.html', '05_worlds/shapes/draw.html'):
        for scheme in ('light', 'dark'):
            tab.emulate_media(color_scheme=scheme)
            tab.goto(f'{address}/{page}')
            found = tab.evaluate(LOOK)
            dark = scheme == 'dark'
            assert all((turned, blend) == ((True, 'screen') if drawing and dark else (False, 'normal'))
                       for drawing, turned, blend in found), (page, scheme, found)
            seen += [drawing for drawing, *_ in found]
    assert {True, False} <= set(seen)

DRAW = """formulas => formulas.map(([tex, display]) => {
    const strict = code => code === 'unknownSymbol' ? 'error' : 'ignore';      // a letter that its fonts lack
    try { katex.renderToString(tex, {displayMode: display, throwOnError: true, strict}); return null; }
    catch (e) { return tex + ': ' + e.message; }}).filter(Boolean)"""

@browser_only
def test_formulas_are_drawn(tab, address, pages):
    "KaTeX draws every formula of the site, and does so on a page"
    found = [(unescape(tex).strip(), bool(display)) for p in pages.values() for display, tex in
             re.findall(r'class="math( display)? notranslate"[^>]*>(.*?)</', p.text, re.S)]
    rows = lambda t, d: d and r'\\' in t and r'\begin' not in t
    gathered = [(rf'\begin{{gathered}}{t}\end{{gathered}}' if rows(t, d) else t, d) for t, d in found]
    assert len(found) > 500
    tab.goto(f'{address}/02_maths/losses.html')
    assert tab.evaluate(DRAW, gathered) == []
    assert tab.evaluate("[...document.querySelectorAll('.math')].every(e => e.querySelector('.katex'))")

@browser_only
@pytest.mark.parametrize('question', QUESTIONS)
def test_search_finds(tab, address, question):
    "The page that answers is among the first three"
    tab.wrong.clear()
    tab.goto(f"{address}/search.html?q={question.replace(' ', '+')}")
    tab.wait_for_selector('#search-results ul.search li a', timeout=15_000)
    links = '#search-results ul.search li a'
    first = tab.eval_on_selector_all(links, 'all => all.slice(0, 3).map(e => e.href)')
    assert any(f'/{QUESTIONS[question]}.html' in o for o in first), first
    assert tab.wrong == []

@browser_only
def test_search_can_be_asked_on_its_page(tab, address):
    "Without a question the page has a form and examples, and both lead to results"
    for act in ("document.querySelector('.search-here input').value = 'LoRA'; "
                "document.querySelector('.search-here').submit()",
                "[...document.querySelectorAll('article a')].find(a => a.search).click()"):
        tab.goto(f'{address}/search.html')
        assert tab.query_selector_all('#search-results li') == []
        tab.evaluate(act)
        tab.wait_for_selector('#search-results ul.search li a', timeout=15_000)
