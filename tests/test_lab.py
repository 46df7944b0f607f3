"""A real JupyterLab in headless Chromium: a notebook is opened and run, a key answers a study,
nothing complains. Skipped where Chromium or JupyterLab is missing."""
import json, os, shutil, subprocess, sys, time, urllib.request
from pathlib import Path
import pytest

root = Path(__file__).resolve().parents[1]
chromium = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
pytestmark = pytest.mark.skipif(not chromium, reason='no chromium here: apt-get install chromium')
TOKEN = 'of-this-test'
QUIET = {'@jupyterlab/apputils-extension:notification': dict(fetchNews='false', checkForUpdates=False,
                                                            doNotDisturbMode=True)}
SMALL = ["""from pathlib import Path
from PIL import Image
from diffusion_sharpening.widgets.study import Study, from_files
from diffusion_sharpening.widgets.views import StudyView
here = Path('study')
here.mkdir(exist_ok=True)
for name in ('red', 'blue'): Image.new('RGB', (64, 64), name).save(here/f'{name}.png')
study = Study([('a colour', here/'red.png', here/'blue.png')]*4, here/'answers.jsonl')""",
         "StudyView(study, from_files, here/'choices.jsonl')", "print('ran to its end')"]

def notebook(cells):
    "A notebook of code"
    made = [dict(cell_type='code', id=f'c{i}', metadata={}, source=s, outputs=[], execution_count=None)
            for i, s in enumerate(cells)]
    kernel = dict(kernelspec=dict(display_name='python3', language='python', name='python3'))
    return json.dumps(dict(cells=made, metadata=kernel, nbformat=4, nbformat_minor=5))

@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    "JupyterLab on a folder of its own, with settings of its own: where it is, and the folder"
    pytest.importorskip('jupyterlab')
    here = tmp_path_factory.mktemp('lab')
    shutil.copy(root/'settings.ini', here)
    (here/'nbs').mkdir()
    (here/'nbs'/'small.ipynb').write_text(notebook(SMALL))
    shutil.copy(root/'nbs'/'15_widgets'/'04_views.ipynb', here/'nbs'/'views.ipynb')
    config = here/'config'/'labconfig'
    config.mkdir(parents=True)
    (config/'default_setting_overrides.json').write_text(json.dumps(QUIET))
    own = {f'JUPYTER_{k}_DIR': str(here/k.lower()) for k in ('CONFIG', 'DATA', 'RUNTIME')}
    env = dict(os.environ, **own, IPYTHONDIR=str(here/'ipython'), PYTHONPATH=str(root))
    port = 18000 + os.getpid() % 20000
    cmd = [sys.executable, '-m', 'jupyterlab', '--no-browser', '--ip=127.0.0.1', f'--port={port}',
           '--ServerApp.port_retries=0', '--allow-root', f'--IdentityProvider.token={TOKEN}',
           f'--notebook-dir={here}']
    process = subprocess.Popen(cmd, env=env, cwd=here, stdout=open(here/'log', 'w'), stderr=subprocess.STDOUT)
    address = f'http://127.0.0.1:{port}'
    for _ in range(3000):                                         # a busy machine takes minutes
        try: urllib.request.urlopen(f'{address}/api?token={TOKEN}'); break
        except OSError: assert process.poll() is None, (here/'log').read_text(); time.sleep(.1)
    yield address, here
    process.terminate()
    process.wait(30)

@pytest.fixture(scope='module')
def browser():
    sync = pytest.importorskip('playwright.sync_api')
    with sync.sync_playwright() as p:
        found = p.chromium.launch(executable_path=chromium, args=['--no-sandbox'])
        yield found
        found.close()

def opened(browser, address, name):
    "A tab with the notebook, its kernel ready; it remembers errors of the console"
    tab = browser.new_page(viewport=dict(width=1400, height=1000))
    tab.wrong = []
    tab.on('console', lambda m: tab.wrong.append(m.text) if m.type == 'error' else None)
    tab.on('pageerror', lambda e: tab.wrong.append(str(e)))
    tab.set_default_timeout(120_000)
    tab.goto(f'{address}/lab/tree/nbs/{name}?token={TOKEN}&reset')
    tab.wait_for_selector('.jp-NotebookPanel')
    kernel = "document.querySelector('.jp-Toolbar-kernelName')?.textContent"   # idle means nothing before
    tab.wait_for_function(f"/python ?3/i.test({kernel})")
    tab.wait_for_selector('.jp-Notebook-ExecutionIndicator[data-status=idle]', state='attached')
    return tab

def run_all(tab, text):
    "Run all cells, and wait for `text` in an output"
    tab.click('text="Run"')
    tab.click('text="Run All Cells"')
    tab.wait_for_selector(f'.jp-OutputArea-output >> text="{text}"', state='attached')
    tab.wait_for_selector('.jp-Notebook-ExecutionIndicator[data-status=idle]', state='attached')
    assert tab.locator('[data-mime-type="application/vnd.jupyter.stderr"]').count() == 0

def test_a_key_answers_a_study(lab, browser):
    "Run a notebook with a study, press →, t, Backspace, ← and ↓: every answer is on disk"
    address, here = lab
    tab = opened(browser, address, 'small.ipynb')
    run_all(tab, 'ran to its end')
    answers = here/'nbs'/'study'/'answers.jsonl'
    for key, name, said, lines in (('ArrowRight', 'right', '1 of 4', 1), ('t', 'tie', '2 of 4', 2),
                                   ('Backspace', 'undo', '1 of 4', 1), ('ArrowLeft', 'left', '2 of 4', 2),
                                   ('ArrowDown', 'tie', '3 of 4', 3)):
        tab.wait_for_selector(f'.sharpen-study .sharpen-{name}:enabled')
        tab.hover('.sharpen-study')                               # where it is now: a page may scroll
        tab.keyboard.press(key)
        tab.wait_for_selector(f'.sharpen-study >> text="{said} answered"')
        assert len(answers.read_text().splitlines()) == lines
    assert [json.loads(o)['answer'] for o in answers.read_text().splitlines()] == ['right', 'left', 'tie']
    assert len((here/'nbs'/'study'/'choices.jsonl').read_text().splitlines()) == 2
    assert tab.wrong == []
    tab.close()

def test_what_is_typed_in_a_cell_is_no_answer(lab, browser):
    "Even with the pointer on the study; with Control or held down no key counts, five at once are one"
    address, here = lab
    tab = opened(browser, address, 'small.ipynb')
    (here/'nbs'/'study'/'answers.jsonl').unlink(missing_ok=True)
    run_all(tab, 'ran to its end')
    tab.locator('.jp-CodeCell .cm-content').last.click()
    tab.hover('.sharpen-study')
    tab.keyboard.type('tt')
    assert 'tt' in tab.locator('.jp-CodeCell .cm-content').last.inner_text()
    tab.locator('.sharpen-study img').first.click()               # out of the cell, on to the study
    tab.keyboard.press('Control+ArrowLeft')
    tab.evaluate("""['ArrowLeft', 'ArrowLeft'].forEach(key => document.querySelector('.sharpen-study')
        .dispatchEvent(new KeyboardEvent('keydown', {key, repeat: true, bubbles: true})))""")
    tab.evaluate("""for (let i = 0; i < 5; i++) document.querySelector('.sharpen-study')
        .dispatchEvent(new KeyboardEvent('keydown', {key: 'T', bubbles: true}))""")  # as with caps lock
    tab.wait_for_selector('.sharpen-study >> text="1 of 4 answered"')
    tab.wait_for_timeout(1000)                                    # or the others would still be on their way
    assert [json.loads(o)['answer'] for o in
            (here/'nbs'/'study'/'answers.jsonl').read_text().splitlines()] == ['tie']
    assert tab.wrong == []
    tab.close()

@pytest.mark.slow
def test_the_page_of_views_runs(lab, browser):
    """The explorer draws when it is run and when its slider is moved; a study goes on where it was when the
    page is run again; a sample is accepted by a click. What the person did is in a folder beside the page."""
    address, here = lab
    mine = here/'nbs'/'mine'
    tab = opened(browser, address, 'views.ipynb')
    run_page(tab)
    assert not mine.exists()
    picture = "document.querySelector('.jupyter-widgets.widget-image').src"
    tab.wait_for_function(picture)
    before = tab.evaluate(picture)
    tab.locator('.jupyter-widgets .noUi-handle').nth(1).focus()
    for _ in range(3): tab.keyboard.press('ArrowLeft')
    tab.wait_for_function(f"was => {picture} !== was", arg=before)
    tab.locator('.sharpen-study button:has-text("right")').click()
    tab.wait_for_selector('.sharpen-study >> text="1 of 3 answered"')
    tab.locator('.sharpen-curation button:has-text("accept")').first.click()
    tab.wait_for_selector('.sharpen-curation >> text=/1 accepted/')
    assert sorted(p.name for p in mine.rglob('*') if p.is_file()) == [
        '00000.png', '00000.txt', 'accepted.json', 'answers.jsonl', 'choices.jsonl']
    run_page(tab)
    tab.wait_for_selector('.sharpen-study >> text="1 of 3 answered"')
    tab.wait_for_selector('.sharpen-curation >> text=/1 accepted/')
    assert tab.wrong == []

def run_page(tab):
    "Run all cells to the end, without an error and without red text"
    tab.click('text="Run"')
    tab.click('text="Run All Cells"')
    time.sleep(1)
    tab.wait_for_selector('.jp-Notebook-ExecutionIndicator[data-status=idle]', state='attached')
    for kind in ('error', 'stderr'):
        assert tab.locator(f'[data-mime-type="application/vnd.jupyter.{kind}"]').all_inner_texts() == []
