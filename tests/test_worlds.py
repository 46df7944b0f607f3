"Every world keeps its promises, and the exam of Shapes its bounds"
import random, time
import pytest, torch
from diffusion_sharpening.worlds.shapes import bounds
from diffusion_sharpening.worlds.shapes.draw import dataset, held_out, picture, prompts
from diffusion_sharpening.worlds.shapes.choices import shapes_choices
from diffusion_sharpening.worlds.shapes.clip import near_miss
from diffusion_sharpening.worlds.shapes.exam import Checker, bleed
from diffusion_sharpening.worlds.shapes.flaws import missed
from diffusion_sharpening.worlds.shapes.grader import questions
from diffusion_sharpening.worlds.shapes.ratings import rated_shapes
from diffusion_sharpening.worlds.world import (
    WORLDS, check_world, model_path, weight_folders, weights, world_of)

each_world = pytest.mark.parametrize('world', WORLDS.values(), ids=WORLDS)

@each_world
def test_a_world_keeps_its_promises(world): check_world(world, 48)

@each_world
def test_its_models_are_found_by_name_and_by_folder(world):
    for name, folder in world.models.items():
        assert world_of(name) is world and world_of(weights(folder)) is world
        assert model_path(name) == str(weights(folder))

@each_world
def test_groups_split_scores(world):
    _, texts = world.pairs(18, 0)
    parts = world.by_group(torch.arange(18.), texts)
    assert sorted(torch.cat(list(parts.values())).tolist()) == list(range(18))

def test_names_outside_any_world_stay():
    assert world_of('nobody/nothing') is None and model_path('nobody/nothing') == 'nobody/nothing'

def test_the_named_folder_comes_first(tmp_path, monkeypatch):
    (tmp_path/'shapes-clip').mkdir()
    monkeypatch.setenv('DIFFUSION_SHARPENING_DATA', str(tmp_path))
    assert weights('shapes-clip') == tmp_path/'shapes-clip'
    assert weights('shapes-sdxl').parent == weight_folders()[1]
    with pytest.raises(ValueError, match="'nothing' in .*there are: .*shapes-clip"): weights('nothing')

def test_the_exam_accepts_real_pictures():
    texts = prompts(240, 'heldout', 21)
    ims = torch.stack([picture(t, i, 'heldout') for i, t in enumerate(texts)])
    start = time.process_time(); strict = Checker().strict(ims, texts)
    assert strict.mean() >= .995 and (time.process_time() - start)/240 < .02
    assert bleed(ims).max() < .05

MILD = 'none', 'blur, σ 1.0 px', 'noise, σ 0.05', 'turned by 10°', 'half resolution'

@pytest.mark.parametrize('name', MILD)
def test_it_accepts_right_pictures_by_another_program(name):
    assert bounds.false_rejects(bounds.DAMAGE[name], 60, 4) <= .05

def test_it_rejects_pictures_of_near_captions(): assert bounds.false_accepts(120, 4) == 0

@pytest.mark.parametrize('shape', bounds.NEAR)
def test_it_rejects_near_outlines(shape):
    for name, pen in bounds.NEAR[shape].items(): assert bounds.accepted_as(shape, pen, 12) == 0, name

def test_a_flaw_counts_once():
    "Three in ten pixels of a wrong hue: the circle is there, it is one, and its colour is not the stated one"
    assert abs(bounds.two_inks(.3)[0] - 2/3) < .02
    assert bounds.two_inks(.5, mixed=True)[1] < .15 # Half way between opposite hues lies near a third one

def test_held_out_captions_are_distinct_and_the_first_ones_stay():
    texts = prompts(960, 'heldout', 1)
    assert len(set(texts)) == 960 and all(map(held_out, texts))
    assert prompts(240, 'heldout', 1) == texts[:240] and prompts(960, 'heldout', 2) != texts

def trained_on(n=300):
    "Captions that the trainings of the base and of every judge see, by what makes them"
    rng, texts = random.Random(0), prompts(n)
    yield 'pairs of the base', dataset(60, 0)[1]
    yield 'near misses of the CLIP', [near_miss(t, rng) for t in texts]
    yield 'flaws of the CLIP', [missed(t, rng) for t in texts]
    yield 'questions of the grader', [q for t in texts for q in questions(t, texts, rng)]
    yield 'choices', [text for text, *_ in shapes_choices(60)[0]]
    yield 'ratings', rated_shapes(60)[2]
    yield 'training prompts', texts

@pytest.mark.parametrize('name, texts', list(trained_on()), ids=lambda o: o if isinstance(o, str) else '')
def test_no_training_sees_a_held_out_caption(name, texts): assert [t for t in texts if held_out(t)] == []
