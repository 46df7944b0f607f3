"Methods, searches and commands of pictures work on molecules as they are"
import json
import pytest, torch
from diffusion_sharpening.basics.pictures import read_picture
from diffusion_sharpening.commands.evaluate import evaluate
from diffusion_sharpening.commands.load import load_model
from diffusion_sharpening.commands.sample import sample
from diffusion_sharpening.commands.search import search
from diffusion_sharpening.commands.train import train as train_command
from diffusion_sharpening.data.sources import Columns
from diffusion_sharpening.methods.catalog import METHODS
from diffusion_sharpening.methods.protocol import check_method, noise_columns
from diffusion_sharpening.models.protocol import check_model
from diffusion_sharpening.models.sets import SetTransformer
from diffusion_sharpening.names.catalog import load_reward
from diffusion_sharpening.search.best_of_n import best_of_n
from diffusion_sharpening.training.run import settings
from diffusion_sharpening.worlds.molecules.graphs import graph_stable
from diffusion_sharpening.worlds.molecules.items import ANY
from diffusion_sharpening.worlds.molecules.judges import Stable
from diffusion_sharpening.worlds.molecules.model import MoleculeModel
from diffusion_sharpening.worlds.world import WORLDS

TEXTS = ['4 C, 1 O', ANY, '3 C, 2 N', '6 C']
GRADIENT = 'refl', 'draft'   # they need a reward that a gradient passes through

def molecules(n): return WORLDS['molecules'].pairs(n, 2)[0]

@pytest.fixture
def model():
    torch.manual_seed(0)
    return MoleculeModel(SetTransformer(numbers=33, told=5, width=16, layers=1, heads=2, places=7))

@pytest.mark.parametrize('guidance', [1., 3.])
def test_is_a_model(model, guidance):
    check_model(model.with_guidance(guidance).add_lora(2), TEXTS[:2], molecules(3), 0)

def test_the_embedded_one_is_a_model():
    check_model(load_model('molecules').add_lora(2), TEXTS[:2], molecules(3), 0)

@pytest.mark.parametrize('name', [m for m in METHODS if m not in GRADIENT])
def test_methods_learn(model, name):
    method = settings(name)[1]
    source = Columns(model, TEXTS, noise_columns(method, model.item, 4), 2)
    model.add_lora(2)
    method.start(model)
    check_method(method, model, Stable(), source.batch(0))

@pytest.mark.parametrize('name', GRADIENT)
def test_methods_that_need_a_gradient_say_so(tmp_path, name):
    with pytest.raises(ValueError, match='gradient|differentiable') as e:
        train_command(name, 'molecules', out=tmp_path/'run', heldout=4, steps=1, S=2)
    assert '\n' not in str(e.value)

def test_equal_molecules_are_accepted_once():
    "Where a prompt leaves little choice"
    model, judge = load_model('molecules').add_lora(2), Stable()
    source = Columns(model, ['1 C'], {}, 1)
    made = {}
    for once in (False, True):
        method = settings('graft', 'threshold', n=8, S=8, noises=1, threshold=-1., once=once)[1]
        method.start(model)
        lesson = method.collect(model, judge, source.batch(0))
        made[once] = model.keys(model.show(lesson['x']))
    assert len(made[False]) == 8 and sorted(made[True].tolist()) == sorted({*made[False].tolist()})
    assert len(made[True]) < 8

@pytest.mark.parametrize('name', ['graft', 'p_graft'])
def test_models_that_do_not_say_what_is_equal_refuse_once(tmp_path, name):
    with pytest.raises(ValueError, match='once: expected a model whose') as e:
        train_command(name, 'layouts', out=tmp_path/'run', heldout=4, steps=1, S=2, S_eval=2, once=True)
    assert '\n' not in str(e.value)

def test_a_command_measures():
    rep = evaluate('molecules', n=4, S=2)
    assert rep['judge'] == 'stable' and rep['heldout_prompts'] == 4
    assert {'stable', 'molecule'} <= set(rep['judges'])

def test_a_search_finds_more_stable_molecules():
    model, texts, seeds = load_model('molecules'), [ANY]*16, torch.arange(16)
    one, many = (best_of_n(model, Stable(), texts, seeds, S=4, budget=4*n) for n in (1, 6))
    assert (many.value >= one.value).all() and many.nfe == 24
    assert graph_stable(model.show(many.x0)).sum() > graph_stable(model.show(one.x0)).sum()

def test_a_command_searches(tmp_path):
    "By the reward of the world, and what it finds is drawn"
    res = search('best_of_n', 'molecules', n=2, S=2, budget=4., out=tmp_path/'out')
    assert res['nfe'] == 4 and json.loads((tmp_path/'out'/'search.json').read_text())['asked']['reward']
    assert read_picture(tmp_path/'out'/'0000.png').shape == (3, 128, 128)

def test_a_command_trains_samples_and_measures(tmp_path, capsys):
    rep = train_command('p_graft', 'molecules', out=tmp_path/'run', heldout=8, S_eval=4, steps=1, S=4, n=2)
    assert rep['reward'] == 'stable' and {'stable', 'molecule'} <= set(rep['after']['judges'])
    assert 'in_qm9' in json.dumps(rep)
    sample(lora=tmp_path/'run', out=tmp_path/'out', n=2, S=4)
    assert (tmp_path/'out'/'grid.png').exists() and (tmp_path/'run'/'before_after.png').exists()
    assert json.loads((tmp_path/'run'/'report.json').read_text())['model'] == 'molecules'

@pytest.mark.parametrize('odd, said', [
    (dict(px=64), 'px: models of molecules make no pictures'),
    (dict(precision='bfloat16'), 'expected float32'),
    (dict(reward='clip@shapes'), "'clip' judges pictures"), (dict(reward='tidy'), 'pages: expected'),
    (dict(prompts='layouts'), 'prompt: expected'), (dict(reward='molecule'), 'is the exam')])
def test_what_makes_no_sense_is_refused_in_one_line(tmp_path, odd, said):
    with pytest.raises(ValueError, match=said) as e:
        train_command('graft', 'molecules', out=tmp_path/'run', heldout=4, steps=1, **odd)
    assert '\n' not in str(e.value)

@pytest.mark.parametrize('name', ['stable', 'qed', 'molecule!'])
def test_a_reward_of_molecules_looks_at_each_alone(name):
    "Whatever the order and the company, and leaves the molecules as they are"
    if name == 'qed': pytest.importorskip('rdkit')
    r, x = load_reward(name, 'molecules'), molecules(4)
    kept, s = x.clone(), r(x, TEXTS)
    assert s.shape == (4,) and s.dtype == torch.float32 and s.isfinite().all() and x.equal(kept)
    assert torch.allclose(r(x.flip(0), TEXTS[::-1]).flip(0), s)
    assert torch.allclose(torch.cat([r(x[i:i+1], TEXTS[i:i+1]) for i in range(4)]), s)

def test_most_samples_of_the_embedded_model_are_stable():
    model, texts = load_model('molecules'), [ANY]*64
    noisy, still = (model.sample(texts, torch.arange(64), S=16, eta=eta) for eta in (1., 0.))
    assert graph_stable(noisy).float().mean() > .7 and graph_stable(still).float().mean() > .5

def test_without_rdkit_a_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'rdkit', None)
    with pytest.raises(ValueError, match='pip install') as e: load_reward('qed', 'molecules')
    assert '\n' not in str(e.value)
