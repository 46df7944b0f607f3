"""What every reward keeps to, each at small size through the class that users run: shape and order,
copies, the grad mode, and errors that name the judge.
"""
import json, sys
from pathlib import Path
import pytest, torch

pytest.importorskip('open_clip')
pytest.importorskip('transformers')
sys.path.insert(0, str(Path(__file__).resolve().parents[1]/'nbs'/'_dev'))
import throughput
from diffusion_sharpening.names.catalog import USES, load_reward
from diffusion_sharpening.rewards.compbench import CATEGORIES, CompBench
from diffusion_sharpening.rewards.mixture import Combined
from diffusion_sharpening.rewards.protocol import NonFinite, Reward, RewardError, tensors_of
from diffusion_sharpening.worlds.shapes.draw import picture

torch.set_num_threads(1)
WORDS = [('red', 'circle', 'blue'), ('cyan', 'square', 'red'), ('blue', 'heart', 'green'),
         ('green', 'cross', 'cyan')]
TEXTS = [f'a {c} {s} to the left of a {d} star' for c, s, d in WORDS]


def compbench(folder):
    checker = load_reward('checker', train=False)
    sets = {c: [] for c in CATEGORIES} | dict(spatial=TEXTS)
    return CompBench(sets, dict(attribute=checker, spatial=checker, action=load_reward('clip@shapes')))


def vqa_yes_no(folder):
    from diffusion_sharpening.rewards.vqa import VQAYesNo, tiny_vlm
    tiny_vlm(folder)
    return VQAYesNo(str(folder))


EXTRA = dict(compbench=compbench, vqa_yes_no=vqa_yes_no)
MAKERS = {k: v for k, v in throughput.MAKE.items() if k != 'mllm'} | EXTRA
names = [pytest.param(k, marks=pytest.mark.slow if k == 'mllm' else ()) for k in [*MAKERS, 'mllm']]


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    kept, all_of = {}, MAKERS | dict(mllm=throughput.MAKE['mllm'])
    def make(name):
        if name not in kept: kept[name] = all_of[name](tmp_path_factory.mktemp(name)/'w')
        return kept[name]
    yield make
    throughput.stack.close()


@pytest.fixture(scope='module')
def pictures(): return torch.stack([picture(t, i) for i, t in enumerate(TEXTS)])


def replaced(reward, score):
    "The reward with another `score`, for as long as the test lasts"
    patch = pytest.MonkeyPatch()
    patch.setattr(reward, 'score', score, raising=False)
    return patch


def test_all_rewards_are_here():
    "But those that judge no pictures: test_layouts.py and test_molecules.py have them"
    assert set(USES) <= {*MAKERS, 'mllm', 'page', 'tidy', 'molecule', 'stable', 'qed'}


@pytest.mark.parametrize('name', names)
def test_shape_order_and_copies(name, made, pictures):
    r, x, texts = made(name), pictures.clone(), list(TEXTS)
    s = r(x, texts)
    assert s.shape == (4,) and s.dtype == torch.float32 and (s.isfinite() | r.may_fail).all()
    turned = r(x.flip(0), texts[::-1])
    torch.testing.assert_close(turned.flip(0), s, atol=1e-4, rtol=1e-3, equal_nan=True)
    alone = torch.cat([r(x[i:i+1], texts[i:i+1]) for i in range(4)])
    torch.testing.assert_close(alone, s, atol=1e-4, rtol=1e-3, equal_nan=True)
    assert x.equal(pictures) and texts == TEXTS


@pytest.mark.parametrize('name', names)
def test_what_it_is_handed_is_its_own(name, made, pictures):
    r, x, texts = made(name), pictures.clone(), list(TEXTS)
    def rude(images, prompts):
        torch.set_grad_enabled(not torch.is_grad_enabled())
        n = len(prompts); images.zero_(); prompts.clear()
        return torch.zeros(n)
    patch = replaced(r, rude)
    try:
        for on in (True, False):
            with torch.set_grad_enabled(on): r(x, texts); assert torch.is_grad_enabled() == on
    finally: patch.undo()
    assert x.equal(pictures) and texts == TEXTS


@pytest.mark.parametrize('name', names)
def test_gradients_pass_where_it_says_so(name, made, pictures):
    r, x = made(name), pictures[:2].clone().requires_grad_()
    s = r(x, TEXTS[:2])
    assert s.requires_grad == r.differentiable
    if r.differentiable: s.sum().backward(); assert x.grad.abs().sum() > 0
    with torch.no_grad(): assert not r(x, TEXTS[:2]).requires_grad


@pytest.mark.parametrize('name', names)
def test_errors_name_the_judge(name, made, pictures):
    r = made(name)
    with pytest.raises(RewardError, match='4 images but 3 prompts') as e: r(pictures, TEXTS[:3])
    assert str(e.value).startswith(r.name)
    def stops(images, prompts): raise SystemExit(1)
    wrong = [(lambda x, t: [1.]*3, 'expected 4 scores'), (lambda x, t: ['a']*4, 'expected 4 scores'),
             (lambda x, t: torch.ones(4, 1), 'expected 4 scores'),
             (lambda x, t: [float('inf')]*4, 'not finite'), (stops, 'sys.exit')]
    if not r.may_fail: wrong.append((lambda x, t: [float('nan')]*4, 'not finite'))
    for score, what in wrong:
        patch = replaced(r, score)
        try:
            with pytest.raises(RewardError, match=what) as e: r(pictures, TEXTS)
        finally: patch.undo()
        assert str(e.value).startswith(r.name) and '\n' not in str(e.value)


@pytest.mark.parametrize('name', names)
def test_identity_is_its_content(name, made, pictures):
    r = made(name)
    before = json.dumps(r.identity())
    r(pictures, TEXTS)
    assert json.dumps(r.identity()) == before
    assert '/' not in before.replace(r.name, '') and '://' not in before
    weights = [t for t in tensors_of(r) if t.is_floating_point()]
    for t in weights[:1]:
        with torch.no_grad(): t.flatten()[0] += 1; changed = json.dumps(r.identity()); t.flatten()[0] -= 1
        assert changed != before


def test_a_reward_written_elsewhere_keeps_to_it_too(pictures):
    "Subclassing is all that a new reward needs"
    class Dark(Reward):
        name = 'dark'
        def score(self, images, prompts): return 1 - images.mean((1, 2, 3))
    both = Combined([Dark(), load_reward('clip@shapes')], [1., 2.])
    assert both(pictures, TEXTS).shape == (4,) and both.identity()['parts'][0]['name'] == 'dark'
    with pytest.raises(NonFinite, match='^dark: 4 of 4'): Combined([Dark()])(pictures*float('nan'), TEXTS)
