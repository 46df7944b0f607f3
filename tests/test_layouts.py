"Methods, searches and commands of pictures work on pages as they are"
import json
import pytest, torch
from diffusion_sharpening.basics.pictures import read_picture
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
from diffusion_sharpening.worlds.layouts.grammar import ANY, page_prompts, pages, prompt_of
from diffusion_sharpening.worlds.layouts.judges import Tidy
from diffusion_sharpening.worlds.layouts.model import LayoutModel

TEXTS = ['3 text, 1 title', ANY, '1 figure', '2 text, 1 table']

@pytest.fixture
def model():
    torch.manual_seed(0)
    return LayoutModel(SetTransformer(width=16, layers=1, heads=2))

@pytest.mark.parametrize('guidance', [1., 3.])
def test_is_a_model(model, guidance):
    check_model(model.with_guidance(guidance).add_lora(2), TEXTS[:2], pages(3), 1e-5)

def test_the_embedded_one_is_a_model():
    check_model(load_model('layouts').add_lora(2), TEXTS[:2], pages(3), 1e-5)

@pytest.mark.parametrize('name', METHODS)
def test_every_method_learns(model, name):
    method = settings(name)[1]
    source = Columns(model, TEXTS, noise_columns(method, model.item, 4), 2)
    model.add_lora(2)
    method.start(model)
    check_method(method, model, Tidy(), source.batch(0))

def test_a_search_finds_better_pages(model):
    seeds, judge = torch.arange(4), Tidy()
    one, many = (best_of_n(model, judge, TEXTS, seeds, S=2, budget=2*n) for n in (1, 6))
    assert (many.value >= one.value).all() and many.value.mean() > one.value.mean() and many.nfe == 12

def test_a_command_searches(tmp_path):
    "By the reward of the world, and what it finds is drawn"
    res = search('best_of_n', 'layouts', n=2, S=2, budget=4., out=tmp_path/'out')
    assert res['nfe'] == 4 and json.loads((tmp_path/'out'/'search.json').read_text())['asked']['reward']
    assert read_picture(tmp_path/'out'/'0000.png').shape == (3, 96, 72)
    assert (tmp_path/'out'/'lineage.png').exists()

def test_a_command_trains_and_samples(tmp_path, capsys):
    rep = train_command('p_graft', 'layouts', out=tmp_path/'run', heldout=8, S_eval=4, steps=1, S=4, n=2)
    assert rep['reward'] == 'tidy' and {'tidy', 'page'} <= set(rep['after']['judges'])
    sample(lora=tmp_path/'run', out=tmp_path/'out', n=2, S=4)
    assert (tmp_path/'out'/'grid.png').exists() and (tmp_path/'run'/'before_after.png').exists()
    assert json.loads((tmp_path/'run'/'report.json').read_text())['model'] == 'layouts'

@pytest.mark.parametrize('odd, said', [
    (dict(px=64), 'px: models of layouts make no pictures'), (dict(precision='bfloat16'), 'expected float32'),
    (dict(reward='clip@shapes'), "'clip' judges pictures"), (dict(prompts='shapes'), 'prompt: expected')])
def test_what_makes_no_sense_is_refused_in_one_line(tmp_path, odd, said):
    with pytest.raises(ValueError, match=said) as e:
        train_command('graft', 'layouts', out=tmp_path/'run', heldout=4, steps=1, **odd)
    assert '\n' not in str(e.value)

def test_a_reward_of_pages_refuses_pictures(tmp_path):
    with pytest.raises(ValueError, match=r'pages: expected \(B, 9, 5\), found'):
        train_command('graft', 'shapes', 'tidy', out=tmp_path/'run', heldout=4, steps=1)

@pytest.mark.parametrize('name', ['tidy', 'page!'])
def test_a_reward_of_pages_looks_at_each_alone(name):
    "Whatever the order and the company, and leaves the pages as they are"
    r, x = load_reward(name, 'layouts'), pages(4, 2)
    kept, s = x.clone(), r(x, TEXTS)
    assert s.shape == (4,) and s.dtype == torch.float32 and s.isfinite().all() and x.equal(kept)
    assert torch.allclose(r(x.flip(0), TEXTS[::-1]).flip(0), s)
    assert torch.allclose(torch.cat([r(x[i:i+1], TEXTS[i:i+1]) for i in range(4)]), s)

def test_rewards_of_pages_mix():
    x, texts = torch.cat([pages(2), torch.rand(2, 9, 5)]), ['1 text']*4
    both = load_reward('tidy:2,tidy', 'layouts')
    assert torch.allclose(both(x, texts), 3*load_reward('tidy', 'layouts')(x, texts), atol=1e-5)

def test_guidance_of_the_embedded_model_asks_for_labels():
    "Prompts are obeyed: more than twice as many pages have the labels that were asked for as by chance"
    model, texts = load_model('layouts'), page_prompts(48, 'heldout', 5)
    made = [prompt_of(x) for x in model.sample(texts, torch.arange(48), S=16)]
    hits, chance = (sum(a == b for a, b in zip(made, t)) for t in (texts, texts[7:] + texts[:7]))
    assert hits > 2*chance + 3
