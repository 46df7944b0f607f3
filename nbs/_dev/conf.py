"Sphinx configuration of the documentation site; build_docs.py puts it beside the pages and builds them"
import os
from configparser import ConfigParser

_cfg = ConfigParser(delimiters=['='])
_cfg.read(os.environ['SHARPEN_SETTINGS'], encoding='utf-8')
_cfg = _cfg['DEFAULT']

project, author, release = 'Diffusion Sharpening', _cfg['author'], _cfg['version']
copyright = _cfg['copyright']
html_title = project
extensions = ['myst_nb', 'sphinx_site']
exclude_patterns = ['_build', '_templates', 'conf.py']
suppress_warnings = ['myst.header', 'mystnb.unknown_mime_type']

nb_execution_mode = 'off'                          # outputs are those saved in the notebooks
nb_merge_streams = True
nb_render_markdown_format = 'myst'                # tables in outputs, too
myst_enable_extensions = ['amsmath', 'attrs_block', 'attrs_inline', 'colon_fence', 'deflist',
                          'dollarmath', 'html_image']
myst_heading_anchors = 4
myst_dmath_double_inline = True

html_theme = 'furo'
html_favicon = '_static/favicon.svg'
html_use_index = False                             # `reference/names` is the index
html_search_scorer = os.path.join(os.path.dirname(__file__), 'scorer.js')
html_static_path, templates_path = ['_static'], ['_templates']
html_css_files = ['site.css']
html_copy_source = html_show_sourcelink = html_show_sphinx = False
_font = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', 'Noto Sans', sans-serif"
_mono = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
def _colours(c): return {'color-brand-primary': c, 'color-brand-content': c, 'color-brand-visited': c}
html_theme_options = dict(
    light_css_variables={'font-stack': _font, 'font-stack--monospace': _mono, **_colours('#0b5fa5')},
    dark_css_variables=_colours('#6cb6ff'))

myst_heading_slug_func = 'sphinx_site.slug'

# Formulas: KaTeX from our own files
html_css_files.insert(0, 'katex/katex.min.css')
html_js_files = [('katex/katex.min.js', {'defer': 'defer'}), ('math.js', {'defer': 'defer'})]
html_math_renderer = 'katex'
